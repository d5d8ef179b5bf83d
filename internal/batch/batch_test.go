package batch_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/hone-llm/hone/internal/batch"
	"github.com/hone-llm/hone/internal/store"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("BATCH_TEST_SERVE"); dir != "" {
		if err := serve(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// serve answers the batches of dir until there are no more.
func serve(dir string) error {
	ctx := context.Background()
	st, err := store.Open(ctx, dir, store.Options{})
	if err != nil {
		return err
	}
	b := batch.New(batch.Options{Store: st})
	fmt.Println("open")
	b.Start(&model{pause: time.Millisecond})
	for {
		if _, err := st.NextBatch(ctx, batch.Validating, batch.InProgress, batch.Finalizing, batch.Cancelling); errors.Is(err, store.ErrNotFound) {
			b.Stop()
			return st.Close()
		}
		time.Sleep(time.Millisecond)
	}
}

// model answers a request with its own text. Some texts act: bad is refused, later is answered the third time, broken fails
// always, wait goes on until the request is given up.
type model struct {
	pause   time.Duration
	busy    atomic.Bool
	mu      sync.Mutex
	asked   map[string]int
	running int // now, and the most at a time
	most    int
}

func (m *model) Busy() bool { return m.busy.Load() }

func (m *model) Answer(ctx context.Context, path string, body []byte) batch.Answer {
	var req struct{ Text string }
	if err := json.Unmarshal(body, &req); err != nil {
		return batch.Answer{Status: 400, Body: []byte(`{"error":{"message":"no JSON"}}`)}
	}
	m.mu.Lock()
	if m.asked == nil {
		m.asked = map[string]int{}
	}
	m.asked[req.Text]++
	times := m.asked[req.Text]
	m.running++
	m.most = max(m.most, m.running)
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.running--
	}()
	select {
	case <-time.After(m.pause):
	case <-ctx.Done():
	}
	switch {
	case req.Text == "bad":
		return batch.Answer{Status: 400, RequestID: "req_1", Body: []byte(`{"error":{"message":"bad"}}`)}
	case req.Text == "later" && times < 3:
		return batch.Answer{Status: 503, RetryAfter: time.Millisecond, Body: []byte(`{}`)}
	case req.Text == "broken":
		return batch.Answer{Status: 500, RequestID: "req_1", Body: []byte(`{"error":{"message":"broken"}}`)}
	case req.Text == "wait":
		<-ctx.Done()
		return batch.Answer{Status: 499}
	}
	return batch.Answer{
		Status: 200, RequestID: "req_1",
		Body: fmt.Appendf(nil, `{"path":%q,"text":%q,"usage":{"prompt_tokens":2,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":1}}}`+"\n", path, req.Text),
	}
}

type rig struct {
	t     *testing.T
	store *store.Store
	*batch.Batches
}

func open(t *testing.T, dir string, api batch.API, opts batch.Options) *rig {
	t.Helper()
	st, err := store.Open(t.Context(), dir, store.Options{Now: opts.Now})
	if err != nil {
		t.Fatal(err)
	}
	opts.Store = st
	r := &rig{t: t, store: st, Batches: batch.New(opts)}
	r.Start(api)
	t.Cleanup(r.close)
	return r
}

func (r *rig) close() {
	r.Stop()
	if err := r.store.Close(); err != nil {
		r.t.Error(err)
	}
}

const endpoint = "/v1/chat/completions"

// line is a valid line of an input file.
func line(id, text string) string {
	return fmt.Sprintf(`{"custom_id":%q,"method":"POST","url":%q,"body":{"model":"m","text":%q}}`+"\n", id, endpoint, text)
}

func (r *rig) create(content string) store.Batch {
	r.t.Helper()
	file, err := r.store.CreateFile(r.t.Context(), "in.jsonl", "batch", strings.NewReader(content))
	if err != nil {
		r.t.Fatal(err)
	}
	row, err := r.Create(r.t.Context(), batch.Spec{InputFile: file.ID, Endpoint: endpoint, Window: "24h", Metadata: map[string]string{"k": "v"}})
	if err != nil {
		r.t.Fatal(err)
	}
	return row
}

func (r *rig) await(id string, states ...string) store.Batch {
	r.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		row, err := r.Get(r.t.Context(), id)
		if err != nil {
			r.t.Fatal(err)
		}
		if slices.Contains(states, row.Status) {
			return row
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("the batch stays %+v", row)
		}
	}
}

type answered struct {
	ID       string `json:"id"`
	CustomID string `json:"custom_id"`
	Response *struct {
		StatusCode int    `json:"status_code"`
		RequestID  string `json:"request_id"`
		Body       struct{ Text string }
	} `json:"response"`
	Error *struct{ Code, Message string } `json:"error"`
}

// lines reads an output or error file; "" has none.
func (r *rig) lines(id string) (list []answered) {
	r.t.Helper()
	if id == "" {
		return nil
	}
	file, content, err := r.store.OpenFile(r.t.Context(), id)
	if err != nil {
		r.t.Fatal(err)
	}
	defer content.Close()
	if file.Purpose != "batch_output" {
		r.t.Errorf("the file %+v has another purpose", file)
	}
	scanner := bufio.NewScanner(content)
	for scanner.Scan() {
		var a answered
		if err := json.Unmarshal(scanner.Bytes(), &a); err != nil || !strings.HasPrefix(a.ID, "batch_req_") {
			r.t.Fatalf("line %q: %v", scanner.Text(), err)
		}
		list = append(list, a)
	}
	return list
}

// outcomes are what became of each request: its text, its status, or the error's code. A custom id that stands twice is an error.
func (r *rig) outcomes(row store.Batch) map[string]string {
	r.t.Helper()
	all := map[string]string{}
	for _, file := range []string{row.OutputFile, row.ErrorFile} {
		for _, a := range r.lines(file) {
			if _, twice := all[a.CustomID]; twice {
				r.t.Errorf("%s stands twice", a.CustomID)
			}
			switch {
			case a.Error != nil:
				all[a.CustomID] = a.Error.Code
			case a.Response.StatusCode == 200:
				all[a.CustomID] = a.Response.Body.Text
			default:
				all[a.CustomID] = fmt.Sprint(a.Response.StatusCode)
			}
			if a.Error == nil && (file == row.OutputFile) != (a.Response.StatusCode == 200) {
				r.t.Errorf("%s is in the wrong file", a.CustomID)
			}
		}
	}
	return all
}

func TestBatch(t *testing.T) {
	t.Parallel()
	m := &model{}
	r := open(t, t.TempDir(), m, batch.Options{})
	input := "\ufeff" + line("a", "one <b> & 二") + "\n" + line("b", "bad") + line("c", "later") + line("d", "broken") + strings.TrimSpace(line("e", "two"))
	row := r.create(input)
	if row.Status != batch.Validating || row.ExpiresAt != row.CreatedAt+24*3600 {
		t.Errorf("created %+v", row)
	}
	row = r.await(row.ID, batch.Completed)
	want := map[string]string{"a": "one <b> & 二", "b": "400", "c": "later", "d": "500", "e": "two"}
	if diff := cmp.Diff(want, r.outcomes(row)); diff != "" {
		t.Errorf("outcomes (-want +got)\n%s", diff)
	}
	if row.Total != 5 || row.Completed != 3 || row.Failed != 2 || row.Model != "m" || row.CompletedAt == 0 || row.FinalizingAt == 0 || row.InProgressAt == 0 ||
		row.Usage != (store.BatchUsage{PromptTokens: 6, CompletionTokens: 9, CachedTokens: 3}) || row.Metadata["k"] != "v" {
		t.Errorf("row %+v", row)
	}
	if got := r.lines(row.OutputFile); got[0].CustomID != "a" || got[1].CustomID != "c" || got[2].CustomID != "e" {
		t.Errorf("the output is not in the order of the input: %+v", got)
	}
	if m.asked["broken"] != 3 || m.asked["later"] != 3 || m.asked["bad"] != 1 {
		t.Errorf("asked %v", m.asked)
	}
	if err := r.store.DeleteFile(t.Context(), row.InputFile); err != nil {
		t.Error(err)
	}
}

func TestInvalidFiles(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), &model{}, batch.Options{})
	row := r.create(line("a", "x") + "\n" +
		"no json\n" +
		`["custom_id"]` + "\n" +
		line("a", "x") +
		`{"method":"POST","url":"/v1/chat/completions","body":{"model":"m"}}` + "\n" +
		`{"custom_id":"b","method":"GET","url":"/v1/embeddings","body":{"model":"m"}}` + "\n" +
		`{"custom_id":"c","method":"POST","url":"/v1/chat/completions"}` + "\n" +
		`{"custom_id":"d","method":"POST","url":"/v1/chat/completions","body":{"model":3,"stream": true}}` + "\n" +
		"{\"custom_id\":\"\xff\"}\n")
	row = r.await(row.ID, batch.Failed)
	var got []string
	for _, e := range row.Errors {
		got = append(got, fmt.Sprintf("%d %s %s", e.Line, e.Code, e.Param))
		if e.Message == "" {
			t.Errorf("%+v has no message", e)
		}
	}
	want := []string{
		"3 invalid_json_line ", "4 invalid_json_line ", "5 duplicate_custom_id custom_id", "6 missing_required_parameter custom_id",
		"7 invalid_method method", "7 invalid_url url", "8 invalid_body body", "9 missing_required_parameter body.model", "9 invalid_body body.stream",
		"10 invalid_json_line ",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("errors (-want +got)\n%s", diff)
	}
	if row.FailedAt == 0 || row.OutputFile != "" || row.ErrorFile != "" || row.Total != 0 {
		t.Errorf("row %+v", row)
	}
	if row := r.await(r.create("\n \n").ID, batch.Failed); row.Errors[0].Code != "empty_file" || row.Errors[0].Line != 0 {
		t.Errorf("an empty file: %+v", row.Errors)
	}
	if row := r.await(r.create(strings.Repeat("x\n", 1000)).ID, batch.Failed); len(row.Errors) != 50 {
		t.Errorf("%d errors are reported", len(row.Errors))
	}
	if row := r.await(r.create(strings.Repeat("x", 33<<20)+"\n"+line("a", "x")).ID, batch.Failed); len(row.Errors) != 1 || !strings.Contains(row.Errors[0].Message, "longer than 32 MiB") {
		t.Errorf("a long line: %+v", row.Errors)
	}
}

func TestCreateRefuses(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), &model{}, batch.Options{})
	file, err := r.store.CreateFile(t.Context(), "a", "fine-tune", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	for param, spec := range map[string]batch.Spec{
		"endpoint":          {Endpoint: "/v1/responses", Window: "24h"},
		"completion_window": {Endpoint: endpoint, Window: "1h"},
		"metadata":          {Endpoint: endpoint, Window: "24h", Metadata: map[string]string{strings.Repeat("k", 65): ""}},
		"input_file_id":     {Endpoint: endpoint, Window: "24h", InputFile: file.ID},
	} {
		refused := new(batch.InvalidError)
		if _, err := r.Create(t.Context(), spec); !errors.As(err, &refused) || refused.Param != param {
			t.Errorf("%s: %v", param, err)
		}
	}
	refused := new(batch.InvalidError)
	if _, err := r.Create(t.Context(), batch.Spec{Endpoint: endpoint, Window: "24h", InputFile: "file-none"}); !errors.As(err, &refused) || refused.Param != "input_file_id" {
		t.Errorf("unknown file: %v", err)
	}
}

func TestCancel(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), &model{}, batch.Options{})
	row := r.create(line("a", "one") + line("b", "wait") + line("c", "wait") + line("d", "wait") + line("e", "wait") + line("f", "two"))
	waiting := r.create(line("a", "one"))
	for r.await(row.ID, batch.InProgress).Completed == 0 {
		time.Sleep(time.Millisecond)
	}
	inUse := new(store.FileInUseError)
	if err := r.store.DeleteFile(t.Context(), row.InputFile); !errors.As(err, &inUse) || inUse.BatchID != row.ID {
		t.Errorf("delete of a file in use: %v", err)
	}
	// One that was not begun is cancelled while another runs.
	if row, err := r.Cancel(t.Context(), waiting.ID); err != nil || row.Status != batch.Cancelling {
		t.Errorf("cancel: %+v, %v", row, err)
	}
	if row, err := r.Cancel(t.Context(), row.ID); err != nil || row.Status != batch.Cancelling || row.CancellingAt == 0 {
		t.Errorf("cancel: %+v, %v", row, err)
	}
	row = r.await(row.ID, batch.Cancelled)
	const not = "batch_cancelled"
	if diff := cmp.Diff(map[string]string{"a": "one", "b": not, "c": not, "d": not, "e": not, "f": not}, r.outcomes(row)); diff != "" || row.CancelledAt == 0 {
		t.Errorf("outcomes of %+v (-want +got)\n%s", row, diff)
	}
	r.await(waiting.ID, batch.Cancelled)
	if _, err := r.Cancel(t.Context(), row.ID); !errors.As(err, new(*batch.ConflictError)) {
		t.Errorf("second cancel: %v", err)
	}
	if _, err := r.Cancel(t.Context(), "batch_none"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("cancel of none: %v", err)
	}
}

func TestExpiry(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := open(t, dir, &model{}, batch.Options{})
	row := r.create(line("a", "one") + line("b", "wait"))
	for r.await(row.ID, batch.InProgress).Completed == 0 {
		time.Sleep(time.Millisecond)
	}
	r.Stop()
	r.store.Close()
	r = open(t, dir, &model{}, batch.Options{Now: func() time.Time { return time.Now().Add(25 * time.Hour) }})
	row = r.await(row.ID, batch.Expired)
	if diff := cmp.Diff(map[string]string{"a": "one", "b": "batch_expired"}, r.outcomes(row)); diff != "" || row.ExpiredAt == 0 {
		t.Errorf("outcomes of %+v (-want +got)\n%s", row, diff)
	}
}

// TestUsersGoFirst holds a batch back while a user's request is computed.
func TestUsersGoFirst(t *testing.T) {
	t.Parallel()
	m := &model{pause: time.Millisecond}
	m.busy.Store(true)
	r := open(t, t.TempDir(), m, batch.Options{InFlight: 3})
	var input strings.Builder
	for i := range 30 {
		input.WriteString(line(fmt.Sprint(i), fmt.Sprint(i)))
	}
	row := r.create(input.String())
	r.await(row.ID, batch.InProgress)
	time.Sleep(100 * time.Millisecond)
	m.mu.Lock()
	if len(m.asked) != 0 {
		t.Errorf("asked %v while a user waits", m.asked)
	}
	m.mu.Unlock()
	m.busy.Store(false)
	if row := r.await(row.ID, batch.Completed); row.Completed != 30 {
		t.Errorf("row %+v", row)
	}
	if m.most > 3 {
		t.Errorf("%d requests at a time", m.most)
	}
}

// TestKill kills the server again and again: every request stands in the output once.
func TestKill(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	st, err := store.Open(t.Context(), dir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, store: st, Batches: batch.New(batch.Options{Store: st})}
	want := map[string]string{}
	var input strings.Builder
	for i := range 1500 {
		id := fmt.Sprintf("id-%d", i)
		text := id
		if want[id] = text; i%7 == 0 {
			text, want[id] = "bad", "400"
		}
		input.WriteString(line(id, text))
	}
	row := r.create(input.String())
	r.close()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	kills := 0
	for ended := false; !ended; {
		command := exec.Command(os.Args[0])
		command.Env = append(os.Environ(), "BATCH_TEST_SERVE="+dir)
		var stderr bytes.Buffer
		command.Stderr = &stderr
		stdout, err := command.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := command.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(stdout, make([]byte, len("open\n"))); err != nil {
			t.Fatalf("%v: %s", err, stderr.Bytes())
		}
		killer := time.AfterFunc(time.Duration(random.IntN(int(150*time.Millisecond))), func() { _ = command.Process.Kill() })
		ended = command.Wait() == nil
		killer.Stop()
		if !ended {
			kills++
		}
		if kills > 500 {
			t.Fatal("the batch does not get on")
		}
	}
	r = open(t, dir, &model{}, batch.Options{})
	row = r.await(row.ID, batch.Completed)
	if diff := cmp.Diff(want, r.outcomes(row)); diff != "" {
		t.Errorf("after %d kills (-want +got)\n%s", kills, diff)
	}
	if row.Total != 1500 || row.Completed+row.Failed != 1500 || row.Failed != 215 {
		t.Errorf("row %+v", row)
	}
	if temps, err := os.ReadDir(filepath.Join(dir, "blobs", "tmp")); err != nil || len(temps) > 0 {
		t.Errorf("temporary files %v, %v", temps, err)
	}
	t.Logf("killed %d times", kills)
}
