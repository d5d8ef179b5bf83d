//go:build faults

package faults

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"mime/multipart"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

var (
	binary = flag.String("hone", "../../bin/hone", "the binary that is tested")
	report = flag.String("report", "", "the file to write the table to, after a run of every test")
	seed   = flag.Uint64("seed", uint64(time.Now().UnixNano()), "of the moments and places of faults")
	kills  = flag.Int("kills", 20, "how often the trainer is killed for R1; the published table has 200")
)

func TestMain(m *testing.M) {
	flag.Parse()
	var err error
	if *binary, err = filepath.Abs(*binary); err == nil {
		_, err = os.Stat(*binary)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%v; run `make build`, or name the binary with -hone\n", err)
		os.Exit(1)
	}
	fmt.Printf("seed %d\n", *seed)
	code := m.Run()
	if *report != "" && flag.Lookup("test.run").Value.String() == "" { // a part of the table would replace the whole
		if err := writeReport(*report); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// random is the generator of one test: its moments depend on the seed and the test's name, not on the tests before it.
func random(t *testing.T) *rand.Rand {
	var hash uint64 = 14695981039346656037
	for _, b := range []byte(t.Name()) {
		hash = (hash ^ uint64(b)) * 1099511628211
	}
	return rand.New(rand.NewPCG(*seed, hash))
}

// A proof is one row of the table: a fault, what hone promises, how often it was injected and what came of it.
type proof struct {
	id, fault, promise string
	injected           atomic.Int64

	mu              sync.Mutex
	result          string
	failed, skipped bool
}

var (
	proofsMu sync.Mutex
	proofs   []*proof
)

// prove begins a row of the table. id is the fault's number (R1, S4); fault and promise are a sentence each. The row says
// FAILED if the test fails.
func prove(t *testing.T, id, fault, promise string) *proof {
	t.Helper()
	p := &proof{id: id, fault: fault, promise: promise}
	proofsMu.Lock()
	proofs = append(proofs, p)
	proofsMu.Unlock()
	t.Cleanup(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.failed, p.skipped = t.Failed(), t.Skipped()
		t.Logf("%s: %s", id, p.result)
		if t.Skipped() {
			return
		}
		if p.result == "" && !t.Failed() {
			t.Errorf("%s says nothing of its result", id)
		}
		if p.injected.Load() == 0 && !t.Failed() {
			t.Errorf("%s was never injected", id)
		}
	})
	return p
}

// inject counts faults that were injected.
func (p *proof) inject(n int) { p.injected.Add(int64(n)) }

// found says what came of the fault, with figures, in a sentence. A later one replaces an earlier one.
func (p *proof) found(format string, args ...any) {
	p.mu.Lock()
	p.result = fmt.Sprintf(format, args...)
	p.mu.Unlock()
}

// number splits R10 into its parts, so that it comes after R2.
var number = regexp.MustCompile(`^([A-Z]+)(\d+)`)

func writeReport(path string) error {
	slices.SortStableFunc(proofs, func(a, b *proof) int {
		x, y := number.FindStringSubmatch(a.id), number.FindStringSubmatch(b.id)
		if x == nil || y == nil {
			return strings.Compare(a.id, b.id)
		}
		m, _ := strconv.Atoi(x[2])
		n, _ := strconv.Atoi(y[2])
		return cmp.Or(strings.Compare(x[1], y[1]), m-n)
	})
	var b bytes.Buffer
	b.WriteString(`# Faults

What happens to hone when something goes wrong, tried on the real binary with real models. ` + "`make test-faults`" + ` injects every fault below
and writes this file. The moments and places of faults are random; `)
	fmt.Fprintf(&b, "this run's seed is %d (`make test-faults FAULTS=\"-seed %d\"`).\n\n", *seed, *seed)
	b.WriteString("| | fault | promise | injected | result |\n| --- | --- | --- | --- | --- |\n")
	cell := strings.NewReplacer("|", "\\|", "\n", " ")
	for _, p := range proofs {
		result := "ok: " + p.result
		switch {
		case p.skipped:
			result = "not tried on this machine, which cannot mount the file system"
		case p.failed:
			result = "**FAILED** " + p.result
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %d | %s |\n", p.id, cell.Replace(p.fault), cell.Replace(p.promise), p.injected.Load(), cell.Replace(result))
	}
	return os.WriteFile(path, b.Bytes(), 0o644)
}

// A model that the tests train and ask. The tiny one is random, of two layers: its answers mean nothing and a step takes
// milliseconds. The default model is real.
const (
	tiny         = "tiny"
	defaultModel = "smollm2-135m-instruct"
)

// newHome makes a data directory with the tiny model and, if they are named, others: the names of default models.
func newHome(t *testing.T, names ...string) string {
	t.Helper()
	home := t.TempDir()
	addModel(t, home, "../train/testdata/tiny-llama-q4_1.gguf", tiny)
	for _, name := range names {
		addModel(t, home, os.Getenv("HONE_TEST_MODEL"), name)
	}
	return home
}

func addModel(t *testing.T, home, file, name string) {
	t.Helper()
	if out, err := command(t, home, "models", "add", file, "--name", name).CombinedOutput(); err != nil {
		t.Fatalf("hone models add: %v\n%s", err, out)
	}
}

// command is a hone command with a data directory and no configuration but env.
func command(t *testing.T, home string, args ...string) *exec.Cmd {
	cmd := exec.Command(*binary, args...)
	cmd.Env = append(environment(), "HONE_HOME="+home)
	return cmd
}

func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "HONE_") && !strings.HasPrefix(v, "HONE_TEST_MODEL=")
	})
}

// A server is a running `hone serve`.
type server struct {
	home, url, log string
	cmd            *exec.Cmd
	ended          chan struct{} // closed when it has ended
	err            error         // of its end, once ended is closed
}

// start starts a server over home on a free port and waits until it listens. env has lines like HONE_SEQUENCES=4. It is
// killed when the test ends, if it has not ended.
func start(t *testing.T, home string, env ...string) *server {
	t.Helper()
	s, err := tryStart(t, home, env...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// tryStart is start for a server that may refuse to start: the error has what it wrote.
func tryStart(t *testing.T, home string, env ...string) (*server, error) {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), "serve-*.log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s := &server{home: home, log: log.Name(), ended: make(chan struct{})}
	s.cmd = command(t, home, "serve", "--host", "127.0.0.1", "--port", "0")
	s.cmd.Env = append(append(s.cmd.Env, "HONE_DEFAULT_MODEL="+tiny), env...)
	s.cmd.Stderr = log
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	url := make(chan string, 1)
	var reading sync.WaitGroup
	reading.Go(func() {
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if line := lines.Text(); strings.HasPrefix(line, "listening") {
				url <- line[strings.LastIndexByte(line, ' ')+1:]
			}
		}
	})
	go func() {
		reading.Wait()
		s.err = s.cmd.Wait()
		close(s.ended)
	}()
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		<-s.ended
		if t.Failed() {
			t.Logf("the end of the log of the server of %s:\n%s", s.home, s.tail())
		}
	})
	select {
	case s.url = <-url:
		return s, nil
	case <-s.ended:
		return nil, fmt.Errorf("hone serve ended with %w\n%s", cmp.Or(s.err, errors.New("code 0")), s.tail())
	case <-time.After(2 * time.Minute):
		return nil, fmt.Errorf("hone serve does not listen after two minutes\n%s", s.tail())
	}
}

// tail is the end of what the server logged.
func (s *server) tail() string {
	text, _ := os.ReadFile(s.log)
	return string(text[max(0, len(text)-4000):])
}

// kill ends the server with SIGKILL and waits for its end.
func (s *server) kill() {
	_ = s.cmd.Process.Kill()
	<-s.ended
}

// stop ends the server with SIGTERM, as a service manager does, and returns its exit code and how long it took.
func (s *server) stop(t *testing.T) (code int, took time.Duration) {
	t.Helper()
	began := time.Now()
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.ended:
	case <-time.After(time.Minute):
		t.Errorf("the server has not ended a minute after SIGTERM\n%s", s.tail())
		s.kill()
	}
	return s.cmd.ProcessState.ExitCode(), time.Since(began)
}

// children are the process ids of the server's runners and trainers.
func (s *server) children(t *testing.T) (pids []int) {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		after := stat[bytes.LastIndexByte(stat, ')')+1:] // the name in parentheses may have spaces
		if fields := strings.Fields(string(after)); len(fields) > 1 && fields[1] == strconv.Itoa(s.cmd.Process.Pid) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// gone says whether a process has ended; a zombie has.
func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || bytes.Contains(stat, []byte(") Z "))
}

// do sends a request and decodes the reply into out, if that is not nil. A body that is not a reader is sent as JSON. The
// status is 0 if there was no reply.
func (s *server) do(ctx context.Context, method, path string, body, out any) (status int, text string, err error) {
	var reader io.Reader
	contentType := "application/json"
	switch b := body.(type) {
	case nil:
	case io.Reader:
		reader = b
	default:
		data, err := json.Marshal(b)
		if err != nil {
			return 0, "", err
		}
		reader = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.url+path, reader)
	if err != nil {
		return 0, "", err
	}
	if reader != nil {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err == nil && out != nil && resp.StatusCode == http.StatusOK {
		err = json.Unmarshal(data, out)
	}
	return resp.StatusCode, string(data), err
}

// get is a GET of any address; the caller closes the reply's body.
func get(ctx context.Context, url string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return nil, err
	}
	return http.DefaultClient.Do(req)
}

// must is do for a request that must answer 200.
func (s *server) must(t *testing.T, method, path string, body, out any) {
	t.Helper()
	if status, text, err := s.do(t.Context(), method, path, body, out); err != nil || status != http.StatusOK {
		t.Fatalf("%s %s: %d %s, %v", method, path, status, text, err)
	}
}

// job is what the tests read of a fine-tuning job.
type job struct {
	ID             string
	Status         string
	FineTunedModel string `json:"fine_tuned_model"`
	Error          struct{ Code, Message string }
}

// jobEvent is an event of a job.
type jobEvent struct {
	ID, Message, Type, Level string
	CreatedAt                int64 `json:"created_at"`
	Data                     struct {
		Step      int
		TrainLoss float64 `json:"train_loss"`
	}
}

func (j job) over() bool {
	return j.Status == "succeeded" || j.Status == "failed" || j.Status == "cancelled"
}

// events are all events of a job, oldest first.
func (s *server) events(t *testing.T, id string) (events []jobEvent) {
	t.Helper()
	after := ""
	for {
		var page struct {
			Data    []jobEvent
			HasMore bool `json:"has_more"`
		}
		s.must(t, http.MethodGet, "/v1/fine_tuning/jobs/"+id+"/events?limit=100"+after, nil, &page)
		events = append(events, page.Data...)
		if !page.HasMore {
			slices.Reverse(events)
			return events
		}
		after = "&after=" + page.Data[len(page.Data)-1].ID
	}
}

// await waits until a job is over.
func (s *server) await(t *testing.T, id string, limit time.Duration) (j job) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
		s.must(t, http.MethodGet, "/v1/fine_tuning/jobs/"+id, nil, &j)
		if j.over() {
			return j
		}
		if time.Now().After(deadline) {
			t.Fatalf("job %s is %s after %v\n%s", id, j.Status, limit, s.tail())
		}
	}
}

// upload sends a file for fine-tuning and returns its id.
func (s *server) upload(t *testing.T, name, content string) string {
	t.Helper()
	id, err := s.tryUpload(t.Context(), name, strings.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (s *server) tryUpload(ctx context.Context, name string, content io.Reader) (id string, err error) {
	return s.postForm(ctx, "/v1/files", map[string]string{"purpose": "fine-tune"}, "file", name, content)
}

// uploadPart sends a part of an upload.
func (s *server) uploadPart(ctx context.Context, upload, content string) (id string, err error) {
	return s.postForm(ctx, "/v1/uploads/"+upload+"/parts", nil, "data", "part", strings.NewReader(content))
}

// postForm sends a form whose last field is a file, and returns the id of what that made.
func (s *server) postForm(ctx context.Context, path string, fields map[string]string, fileField, name string, content io.Reader) (id string, err error) {
	pipe, to := io.Pipe()
	form := multipart.NewWriter(to)
	go func() {
		var err error
		for key, value := range fields {
			err = errors.Join(err, form.WriteField(key, value))
		}
		if err == nil {
			var part io.Writer
			if part, err = form.CreateFormFile(fileField, name); err == nil {
				_, err = io.Copy(part, content)
			}
		}
		if err == nil {
			err = form.Close()
		}
		to.CloseWithError(err)
	}()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+path, pipe)
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", form.FormDataContentType())
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("upload of %s: %s %s", name, resp.Status, data)
	}
	var made struct{ ID string }
	err = json.Unmarshal(data, &made)
	return made.ID, err
}

// rows are n lines of chat data, with text outside of ASCII and lines that end as on Windows.
func rows(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `{"messages":[{"role":"user","content":"问 %d: %s"},{"role":"assistant","content":"%c"}]}`+"\r\n", i, strings.Repeat("word ", i%4), 'A'+i%4)
	}
	return b.String()
}

// train starts a job on the tiny model; options are hone's (the job's `hone` object).
func (s *server) train(t *testing.T, file string, options map[string]any) job {
	t.Helper()
	var j job
	s.must(t, http.MethodPost, "/v1/fine_tuning/jobs", map[string]any{"model": tiny, "training_file": file, "seed": 42, "hone": options}, &j)
	return j
}

// chat asks for a greedy completion and returns its text.
func (s *server) chat(ctx context.Context, model, prompt string, tokens int) (text string, status int, err error) {
	var reply struct {
		Choices []struct{ Message struct{ Content string } }
	}
	status, body, err := s.do(ctx, http.MethodPost, "/v1/chat/completions", map[string]any{
		"model": model, "messages": []any{map[string]any{"role": "user", "content": prompt}}, "max_tokens": tokens, "temperature": 0}, &reply)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("chat: %d %s", status, body)
	}
	if err != nil {
		return "", status, err
	}
	return reply.Choices[0].Message.Content, status, nil
}
