//go:build faults

package faults

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestTwoServers starts a second server on a data directory that has one, and one after the first was killed.
func TestTwoServers(t *testing.T) {
	p := prove(t, "R14", "a second server on the same data directory", "it ends within a second and names the first's process; after a SIGKILL of the first the next one starts")
	home := newHome(t)
	var slowest time.Duration
	for range 5 {
		first := start(t, home)
		began := time.Now()
		second, err := tryStart(t, home)
		slowest = max(slowest, time.Since(began))
		if err == nil {
			second.kill()
			t.Fatal("two servers run on one data directory")
		}
		if pid := strconv.Itoa(first.cmd.Process.Pid); !strings.Contains(err.Error(), pid) {
			t.Errorf("the refusal does not name process %s: %v", pid, err)
		}
		p.inject(1)
		first.kill()
	}
	if slowest > 10*time.Second { // a second, where nothing else runs
		t.Errorf("the refusal took %v", slowest)
	}
	p.found("refused by name, in %v at most; 5 of 5 started again after a SIGKILL", slowest.Round(time.Millisecond))
}

// TestSmoke trains the tiny model and asks the tuned one, without any fault: the other tests stand on it.
func TestSmoke(t *testing.T) {
	s := start(t, newHome(t))
	j := s.train(t, s.upload(t, "train.jsonl", rows(10)), map[string]any{"r": 4, "num_train_epochs": 3, "batch_size": 4, "learning_rate": 2e-3})
	if j = s.await(t, j.ID, time.Minute); j.Status != "succeeded" {
		t.Fatalf("the job is %+v", j)
	}
	if text, _, err := s.chat(t.Context(), j.FineTunedModel, "问 1", 4); err != nil {
		t.Fatalf("%q, %v", text, err)
	}
	if code, took := s.stop(t); code != 0 {
		t.Errorf("SIGTERM ended the server with %d after %v", code, took)
	}
}

// A recipe is a job on the tiny model that writes a resume state after every step.
type recipe struct {
	name string
	rows string
	body map[string]any // of the request, but for the file
}

func (r recipe) create(t *testing.T, s *server, file string) job {
	t.Helper()
	body := maps.Clone(r.body)
	body["model"], body["training_file"], body["seed"] = tiny, file, 42
	var j job
	s.must(t, http.MethodPost, "/v1/fine_tuning/jobs", body, &j)
	return j
}

// recipes are jobs of so many epochs of three steps each.
func recipes(epochs int) []recipe {
	var pairs strings.Builder
	for i := range 10 {
		fmt.Fprintf(&pairs, `{"prompt":"ask %d%s","chosen":" yes %c","rejected":" no, never"}`+"\n", i, strings.Repeat(" word", i%4), 'A'+i%4)
	}
	options := func(more map[string]any) map[string]any {
		all := map[string]any{"r": 4, "num_train_epochs": epochs, "batch_size": 4, "learning_rate": 2e-3, "save_minutes": 1e-6}
		maps.Copy(all, more)
		return all
	}
	return []recipe{
		{"supervised", rows(10), map[string]any{"hone": options(map[string]any{"lora_dropout": 0.1, "micro_batch_tokens": 32, "save_strategy": "steps", "save_steps": 7, "save_total_limit": 2})}},
		{"dpo", pairs.String(), map[string]any{"method": map[string]any{"type": "dpo"}, "hone": options(map[string]any{"lora_dropout": 0.05})}},
	}
}

// A course is what is left of a job: its adapter, and the loss at each step.
type course struct {
	adapter string
	losses  []float64
}

// courseOf reads the course of a job that has succeeded, and checks that it says so once, and every step once and in order.
func (s *server) courseOf(t *testing.T, id string) course {
	t.Helper()
	var j job
	s.must(t, http.MethodGet, "/v1/fine_tuning/jobs/"+id, nil, &j)
	if j.Status != "succeeded" {
		t.Fatalf("job %s is %+v", id, j)
	}
	c := course{adapter: weightsOf(t, s.home, j.FineTunedModel)}
	model, err := os.ReadFile(filepath.Join(adapterDir(s.home, j.FineTunedModel), "adapter.gguf"))
	if err != nil {
		t.Fatal(err)
	}
	c.adapter += digestOf(bytes.ReplaceAll(model, []byte(j.FineTunedModel), nil)) // its name is that of the job
	succeeded := 0
	for _, e := range s.events(t, id) {
		switch {
		case e.Type == "metrics" && e.Data.Step != len(c.losses)+1:
			t.Errorf("job %s: step %d comes after %d", id, e.Data.Step, len(c.losses))
		case e.Type == "metrics":
			c.losses = append(c.losses, e.Data.TrainLoss)
		case e.Message == "The job has successfully completed":
			succeeded++
		}
	}
	if succeeded != 1 {
		t.Errorf("job %s says %d times that it has succeeded", id, succeeded)
	}
	return c
}

func (c course) same(t *testing.T, undisturbed course) {
	t.Helper()
	if c.adapter != undisturbed.adapter {
		t.Error("the adapter differs from that of a job that was left alone")
	}
	if !slices.Equal(c.losses, undisturbed.losses) {
		t.Errorf("the losses differ from those of a job that was left alone: %d steps, expected %d", len(c.losses), len(undisturbed.losses))
	}
}

// lostSteps is the most steps that a resumed job had done and did again, of those that it had reported.
func lostSteps(events []jobEvent) (most int) {
	reported := 0
	for _, e := range events {
		from := -1
		if e.Type == "metrics" {
			reported = e.Data.Step
		} else if _, err := fmt.Sscanf(e.Message, "Resuming from step %d", &from); err == nil || strings.HasPrefix(e.Message, "No saved state found") {
			most = max(most, reported-max(from, 0))
		}
	}
	return most
}

// child waits for a child of the server that is not the one given, and returns its process id; 0 when done says so.
func (s *server) child(t *testing.T, but int, done func() bool) int {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(3 * time.Millisecond) {
		for _, pid := range s.children(t) {
			if pid != but && !gone(pid) {
				return pid
			}
		}
		if done() {
			return 0
		}
	}
	t.Fatalf("no new child in a minute\n%s", s.tail())
	return 0
}

// states are the names of the resume states of a job.
func (s *server) states(t *testing.T, id string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(s.home, "jobs", id, "a*", "state-*"))
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(names, func(name string) bool { return strings.Contains(name, ".tmp-") })
}

// unfinished says whether a file or directory of a job was being written.
func (s *server) unfinished(id string) bool {
	found := false
	_ = filepath.WalkDir(filepath.Join(s.home, "jobs", id), func(path string, _ fs.DirEntry, err error) error {
		found = found || strings.Contains(path, ".tmp-")
		return err // what the next trainer removes meanwhile
	})
	return found
}

// TestTrainerKills kills trainers at random moments: while they start, compute and write.
func TestTrainerKills(t *testing.T) {
	p := prove(t, "R1", "SIGKILL of the trainer at a random moment, in supervised and dpo jobs",
		"the job goes on by itself, loses at most one saving interval, and ends with the bytes and losses of a job that was left alone; it succeeds once")
	s, random := start(t, newHome(t)), random(t)
	began := time.Now()
	var steps, jobs, writing, lost int
	share := 0
	for n, r := range recipes(60) {
		file := s.upload(t, "train.jsonl", r.rows)
		alone := r.create(t, s, file)
		s.await(t, alone.ID, 2*time.Minute)
		undisturbed := s.courseOf(t, alone.ID)
		share += (*kills + 1 - n) / 2 // a half each
		for int(p.injected.Load()) < share {
			j := r.create(t, s, file)
			writing += s.killTrainers(t, p, random, j.ID, share)
			s.await(t, j.ID, 2*time.Minute)
			s.courseOf(t, j.ID).same(t, undisturbed)
			lost = max(lost, lostSteps(s.events(t, j.ID)))
			jobs++
			steps += len(undisturbed.losses)
		}
	}
	if lost > 1 {
		t.Errorf("a job lost %d steps that it had reported; it saves after each", lost)
	}
	p.found("%d of %d kills resumed, %d of them while a resume state or checkpoint was written; %d jobs of %d steps in all, each with the same sha256 and losses as alone; at most %d step done again; %s",
		p.injected.Load(), p.injected.Load(), writing, jobs, steps, lost, time.Since(began).Round(time.Second))
}

// killTrainers kills the trainers of a job until it is over or so many were killed in all, and returns how many of them left
// something half written. No more than two in a row are killed before they have saved a state: three end the job.
func (s *server) killTrainers(t *testing.T, p *proof, random *rand.Rand, id string, upTo int) (writing int) {
	t.Helper()
	over := func() bool {
		var j job
		s.must(t, http.MethodGet, "/v1/fine_tuning/jobs/"+id, nil, &j)
		return j.over()
	}
	last, idle := 0, 0
	for int(p.injected.Load()) < upTo {
		before := s.states(t, id)
		fresh := func() (n int) {
			for _, name := range s.states(t, id) {
				if !slices.Contains(before, name) {
					n++
				}
			}
			return n
		}
		pid := s.child(t, last, over)
		if pid == 0 {
			return writing
		}
		last = pid
		if idle < 2 && random.IntN(4) == 0 {
			time.Sleep(time.Duration(random.Int64N(int64(200 * time.Millisecond)))) // from its start, through its first steps
		} else {
			// Two: when the second is there, the first was reported.
			for deadline := time.Now().Add(time.Minute); fresh() < 2 && !gone(pid); time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("the trainer has saved nothing in a minute\n%s", s.tail())
				}
			}
			time.Sleep(time.Duration(random.Int64N(int64(25 * time.Millisecond))))
		}
		if gone(pid) {
			continue // it was done
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			continue
		}
		for !gone(pid) {
			time.Sleep(time.Millisecond)
		}
		p.inject(1)
		if idle++; fresh() >= 2 {
			idle = 0
		}
		if s.unfinished(id) {
			writing++
		}
	}
	return writing
}

// TestTrainerKilledAgain kills the trainers of a job before they save anything.
func TestTrainerKilledAgain(t *testing.T) {
	p := prove(t, "R1", "SIGKILL of three trainers of a job in a row, none of which got any further", "the job fails and says why; the next job runs")
	s := start(t, newHome(t))
	file := s.upload(t, "train.jsonl", rows(500))
	j := s.train(t, file, map[string]any{"r": 4, "num_train_epochs": 1000, "batch_size": 4})
	for pid := 0; ; {
		if pid = s.child(t, pid, func() bool {
			s.must(t, http.MethodGet, "/v1/fine_tuning/jobs/"+j.ID, nil, &j)
			return j.over()
		}); pid == 0 {
			break
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if p.inject(1); p.injected.Load() > 10 {
			t.Fatal("the job does not give up after ten kills")
		}
	}
	if j.Status != "failed" || !strings.Contains(j.Error.Message, "3 attempts in a row got no further") || !strings.Contains(j.Error.Message, "signal 9") {
		t.Errorf("the job is %+v", j)
	}
	next := s.train(t, file, map[string]any{"r": 4, "num_train_epochs": 2})
	if next = s.await(t, next.ID, time.Minute); next.Status != "succeeded" {
		t.Errorf("the next job is %+v", next)
	}
	p.found("failed after %d: %q; the next job succeeded", p.injected.Load(), j.Error.Message)
}

// TestServerKilledInJob kills servers while a job runs.
func TestServerKilledInJob(t *testing.T) {
	const times = 8
	p := prove(t, "R2", "SIGKILL of the server while a job runs", "the next start goes on with it by itself; its status never goes backwards, it succeeds once, with the same sha256")
	home, random := newHome(t), random(t)
	s := start(t, home)
	r := recipes(120)[0]
	file := s.upload(t, "train.jsonl", r.rows)
	alone := r.create(t, s, file)
	s.await(t, alone.ID, 2*time.Minute)
	undisturbed := s.courseOf(t, alone.ID)

	j := r.create(t, s, file)
	order := []string{"validating_files", "queued", "running", "succeeded"}
	at, pid := 0, 0
	look := func() bool {
		s.must(t, http.MethodGet, "/v1/fine_tuning/jobs/"+j.ID, nil, &j)
		now := slices.Index(order, j.Status)
		if now < at {
			t.Errorf("the job went from %s to %s", order[at], j.Status)
		}
		at = now
		return j.over()
	}
	var recovery time.Duration
	for n := range times {
		killed := time.Now()
		if n > 0 {
			s = start(t, home)
		}
		if pid = s.child(t, pid, look); pid == 0 {
			break
		}
		if n > 0 {
			recovery = max(recovery, time.Since(killed))
		}
		for end := time.Now().Add(time.Duration(random.Int64N(int64(700 * time.Millisecond)))); time.Now().Before(end) && !look(); {
			time.Sleep(5 * time.Millisecond)
		}
		s.kill()
		p.inject(1)
	}
	s = start(t, home)
	for deadline := time.Now().Add(2 * time.Minute); !look() && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond)
	}
	s.courseOf(t, j.ID).same(t, undisturbed)
	lost := lostSteps(s.events(t, j.ID))
	if lost > 1 {
		t.Errorf("the job lost %d steps that it had reported; it saves after each", lost)
	}
	if recovery > 20*time.Second {
		t.Errorf("the trainer ran again only %v after the start", recovery)
	}
	p.found("resumed each time, the trainer ran again at most %v after the start of the server; at most %d step done again, sha256 and %d losses as alone", recovery.Round(time.Millisecond), lost, len(undisturbed.losses))
}

// filesIn are the paths of all files below a data directory but the database's own.
func filesIn(t *testing.T, home string) (paths []string) {
	t.Helper()
	err := filepath.WalkDir(home, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() && !strings.HasPrefix(entry.Name(), "hone.db") {
			paths = append(paths, strings.TrimPrefix(path, home))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// TestServerKilledInUpload kills servers while uploads have sent a part of their bytes.
func TestServerKilledInUpload(t *testing.T) {
	const servers, uploads = 10, 10
	p := prove(t, "R3", "SIGKILL of the server while uploads have sent a random number of their bytes, or all, and wait for the answer", "no file of a part is listed, and nothing of it is left after the next start; sent again, twice, with its Idempotency-Key each upload is one file")
	home, random := newHome(t), random(t)
	s := start(t, home)
	before := filesIn(t, home)
	content := rows(5000)
	body := "--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--b\r\n" +
		"Content-Disposition: form-data; name=\"file\"; filename=\"train.jsonl\"\r\n\r\n" + content + "\r\n--b--\r\n"
	send := func(s *server, key string, bytes int) net.Conn {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintf(conn, "POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nIdempotency-Key: %s\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n%s", key, len(body), body[:bytes]); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	temporary, made := 0, 0
	for range servers {
		for i := range uploads {
			offset := random.IntN(len(body))
			if i == 0 {
				offset = len(body) - 1 - random.IntN(20) // within the last boundary
			}
			defer send(s, fmt.Sprint("part-", i), offset).Close()
			p.inject(1)
		}
		time.Sleep(time.Duration(random.Int64N(int64(100 * time.Millisecond))))
		defer send(s, "whole", len(body)).Close()
		p.inject(1)
		time.Sleep(time.Duration(random.Int64N(int64(10 * time.Millisecond))))
		s.kill()
		temporary = max(temporary, len(filesIn(t, home))-len(before))
		s = start(t, home)
		var list struct{ Data []struct{ ID string } }
		s.must(t, http.MethodGet, "/v1/files", nil, &list)
		if len(list.Data) > 1 {
			t.Fatalf("files %v are listed", list.Data)
		}
		if len(list.Data) == 1 {
			made++
		} else if left := filesIn(t, home); !slices.Equal(left, before) {
			t.Fatalf("files below the data directory: %v, expected %v", left, before)
		}
		for range 2 {
			for i := range uploads + 1 {
				key := fmt.Sprint("part-", i)
				if i == uploads {
					key = "whole"
				}
				conn := send(s, key, len(body))
				if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || line != "HTTP/1.1 200 OK\r\n" {
					t.Fatalf("an upload that is sent again: %q, %v", line, err)
				}
				conn.Close()
			}
		}
		if s.must(t, http.MethodGet, "/v1/files", nil, &list); len(list.Data) != uploads+1 {
			t.Fatalf("%d files are listed after %d uploads were sent again twice", len(list.Data), uploads+1)
		}
		s.stop(t)
		home = newHome(t)
		s = start(t, home)
	}
	id := s.upload(t, "train.jsonl", content)
	if _, text, err := s.do(t.Context(), http.MethodGet, "/v1/files/"+id+"/content", nil, nil); err != nil || text != content {
		t.Errorf("an upload after that has %d bytes, expected %d; %v", len(text), len(content), err)
	}
	if temporary == 0 {
		t.Error("no kill left a temporary file: the uploads had not begun")
	}
	p.found("%d servers were killed with %d uploads each; up to %d temporary files were left and gone after the start; %d of %d whole uploads had made their file before the kill; sent again each is one file", servers, uploads+1, temporary, made, servers)
}

// A stream is how a streamed chat ended.
type stream struct {
	status   int
	text     string
	tokens   int    // said by the usage at its end
	finish   string // finish_reason
	failure  string // the error's code, of a status or of a frame
	done     bool   // [DONE] came
	began    bool   // a token came
	err      error  // of the connection
	retry    string // the header Retry-After
	envelope bool   // an error is OpenAI's object
}

// stream asks for a greedy stream of exactly so many tokens. begun, if not nil, is called with the first.
func (s *server) stream(ctx context.Context, model, prompt string, tokens int, begun func()) (r stream) {
	data, err := json.Marshal(map[string]any{
		"model": model, "messages": []any{map[string]any{"role": "user", "content": prompt}}, "max_tokens": tokens, "temperature": 0,
		"ignore_eos": true, "stream": true, "stream_options": map[string]any{"include_usage": true},
	})
	if err != nil {
		return stream{err: err}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+"/v1/chat/completions", bytes.NewReader(data))
	if err != nil {
		return stream{err: err}
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return stream{err: err}
	}
	defer resp.Body.Close()
	r.status, r.retry = resp.StatusCode, resp.Header.Get("Retry-After")
	type frame struct {
		Choices []struct {
			Delta        struct{ Content string }
			FinishReason string `json:"finish_reason"`
		}
		Usage *struct {
			CompletionTokens int `json:"completion_tokens"`
		}
		Error *struct{ Message, Type, Code string }
	}
	take := func(text string) {
		var f frame
		if r.err = json.Unmarshal([]byte(text), &f); r.err != nil {
			return
		}
		for _, c := range f.Choices {
			if c.Delta.Content != "" && !r.began {
				r.began = true
				if begun != nil {
					begun()
				}
			}
			r.text += c.Delta.Content
			r.finish += c.FinishReason
		}
		if f.Usage != nil {
			r.tokens = f.Usage.CompletionTokens
		}
		if f.Error != nil {
			r.failure, r.envelope = f.Error.Code, f.Error.Message != "" && f.Error.Type != ""
		}
	}
	if r.status != http.StatusOK {
		text, err := io.ReadAll(resp.Body)
		take(string(text))
		r.err = errors.Join(r.err, err)
		return r
	}
	lines := bufio.NewScanner(resp.Body)
	for r.err == nil && lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), "data: "); ok && text == "[DONE]" {
			r.done = true
		} else if ok {
			take(text)
		}
	}
	r.err = errors.Join(r.err, lines.Err())
	return r
}

// whole says whether a stream is one that was left alone.
func (r stream) whole(tokens int) bool {
	return r.status == http.StatusOK && r.done && r.tokens == tokens && r.finish == "length" && r.failure == "" && r.err == nil
}

// cut says whether a client could see that a stream has not come to its end.
func (r stream) cut() bool {
	return !r.done && r.finish == "" && (r.failure != "" || r.err != nil || r.status == http.StatusOK)
}

// TestStreamsKilled kills runners, and servers, in the middle of streams.
func TestStreamsKilled(t *testing.T) {
	const rounds, streams, tokens = 6, 10, 200
	p := prove(t, "R4", "SIGKILL of the runner, or of the server, in the middle of streams",
		"each stream ends with an error frame, or without [DONE]; other models' runners go on, and the killed one answers again")
	home, random := newHome(t, defaultModel), random(t)
	s := start(t, home)
	// load returns the runner that a request starts.
	load := func(model string) (runner int) {
		t.Helper()
		before := s.children(t)
		if _, _, err := s.chat(t.Context(), model, "Hi", 1); err != nil {
			t.Fatal(err)
		}
		for _, pid := range s.children(t) {
			if !slices.Contains(before, pid) {
				return pid
			}
		}
		t.Fatalf("a request to %s starts no runner", model)
		return 0
	}
	other, runner := load(tiny), load(defaultModel)
	kinds, unaffected := map[string]int{}, 0
	var again, ready time.Duration
	for round := range rounds {
		server := round%2 == 1
		results := make([]stream, streams)
		first, killed := make(chan struct{}), make(chan struct{})
		begun := sync.OnceFunc(func() { close(first) })
		go func() {
			defer close(killed)
			<-first
			time.Sleep(time.Duration(random.Int64N(int64(500 * time.Millisecond))))
			if server {
				s.kill()
			} else if err := syscall.Kill(runner, syscall.SIGKILL); err != nil {
				t.Error(err)
			}
		}()
		var all sync.WaitGroup
		for i := range results {
			all.Go(func() {
				results[i] = s.stream(t.Context(), defaultModel, fmt.Sprintf("Count to %d.", i), tokens, begun)
			})
		}
		for !server && unaffected < 10*(round+1) {
			if r := s.stream(t.Context(), tiny, "Hi", tokens, nil); !r.whole(tokens) {
				t.Fatalf("a stream of another model: %+v", r)
			}
			unaffected++
		}
		all.Wait()
		begun() // it must have been, or every stream has failed
		<-killed
		for i, r := range results {
			switch {
			case r.whole(tokens):
				kinds["whole"]++
			case r.cut() && r.failure != "":
				kinds["error"]++
				p.inject(1)
			case r.cut():
				kinds["cut off"]++
				p.inject(1)
			default:
				t.Errorf("round %d, stream %d seems to be whole and is not: %+v", round, i, r)
			}
		}
		began := time.Now()
		if server {
			s = start(t, home)
			ready = max(ready, time.Since(began))
		} else if gone(other) {
			t.Error("another model's runner has ended")
		}
		runner = load(defaultModel)
		again = max(again, time.Since(began))
		if server {
			other = load(tiny)
		}
	}
	if p.injected.Load() < 20 {
		t.Errorf("%d of %d streams were cut", p.injected.Load(), rounds*streams)
	}
	if ready > 20*time.Second || again > 90*time.Second {
		t.Errorf("the server listened %v after its start, and answered after %v", ready, again)
	}
	p.found("%d streams ended with an error, %d without [DONE]; %d came to their end, before the kill or from the next runner; %d streams of another model went on; the next server listened after %v, the model answered again after %v",
		kinds["error"], kinds["cut off"], kinds["whole"], unaffected, ready.Round(time.Millisecond), again.Round(time.Millisecond))
}

// TestDrain ends a server with SIGTERM that streams and trains.
func TestDrain(t *testing.T) {
	const streams, tokens = 20, 60
	p := prove(t, "R15", "SIGTERM with 20 streams and a job: streams that end within the grace, streams that do not, and a second SIGTERM",
		"new requests get a 503 with Retry-After, the streams come to their end or, 2 s after the grace at the latest, to an error; the job saves its state, the exit code is 0 and no process is left; the second ends everything within 2 s")
	home := newHome(t, defaultModel)
	serve := func(grace time.Duration) *server {
		s := start(t, home, "HONE_SHUTDOWN_GRACE="+grace.String(), "HONE_RUNNER_WAIT=2m")
		if _, _, err := s.chat(t.Context(), defaultModel, "Hi", 1); err != nil {
			t.Fatal(err)
		}
		return s
	}
	// await waits for an event of the job that begins so.
	await := func(s *server, id, prefix string) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			if slices.ContainsFunc(s.events(t, id), func(e jobEvent) bool { return strings.HasPrefix(e.Message, prefix) }) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("the job does not say %q\n%s", prefix, s.tail())
			}
		}
	}
	ask := func(s *server, tokens int) <-chan []stream {
		results, ended := make([]stream, streams), make(chan []stream, 1)
		first := make(chan struct{})
		var once sync.Once
		go func() {
			var all sync.WaitGroup
			for i := range streams {
				all.Go(func() {
					results[i] = s.stream(t.Context(), defaultModel, fmt.Sprintf("Count to %d.", i), tokens, func() { once.Do(func() { close(first) }) })
				})
			}
			all.Wait()
			ended <- results
		}()
		<-first
		time.Sleep(300 * time.Millisecond) // all of them have come in
		return ended
	}

	s := serve(2 * time.Minute)
	j := s.train(t, s.upload(t, "train.jsonl", rows(500)), map[string]any{"r": 4, "num_train_epochs": 1000, "batch_size": 4})
	await(s, j.ID, "Step 10/")
	children := s.children(t)
	ended := ask(s, tokens)
	began := time.Now()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	refused := 0
	for range 5 {
		if r := s.stream(t.Context(), defaultModel, "Hi", 1, nil); r.status != http.StatusServiceUnavailable || r.retry == "" || r.failure != "shutting_down" || !r.envelope {
			t.Errorf("a new request while draining: %+v", r)
		}
		refused++
	}
	if status, text, err := s.do(t.Context(), http.MethodGet, "/ready", nil, nil); status != http.StatusServiceUnavailable || !strings.Contains(text, "draining") {
		t.Errorf("/ready while draining: %d %s %v", status, text, err)
	}
	p.inject(1)
	for i, r := range <-ended {
		if !r.whole(tokens) {
			t.Errorf("stream %d did not come to its end: %+v", i, r)
		}
	}
	streamed := time.Since(began)
	select {
	case <-s.ended:
	case <-time.After(time.Minute):
		t.Fatalf("the server has not ended a minute after its streams\n%s", s.tail())
	}
	after := time.Since(began) - streamed
	if s.err != nil {
		t.Errorf("the server ended with %v", s.err)
	}
	orphans := func(children []int) {
		t.Helper()
		for _, pid := range children {
			if !gone(pid) {
				t.Errorf("process %d is left", pid)
			}
		}
	}
	orphans(children)

	const grace = time.Second
	s = serve(grace)
	await(s, j.ID, "Resuming from step")
	children = s.children(t)
	ended = ask(s, 2000)
	code, late := s.stop(t)
	if code != 0 || late > grace+20*time.Second {
		t.Errorf("with streams that go on, the server ended with code %d after %v", code, late)
	}
	p.inject(1)
	orphans(children)
	for i, r := range <-ended {
		if !r.cut() || r.failure != "shutting_down" {
			t.Errorf("stream %d was not told that the server is stopping: %+v", i, r)
		}
	}

	s = serve(2 * time.Minute)
	if lost := lostSteps(s.events(t, j.ID)); lost > 0 {
		t.Errorf("the job lost %d steps when the server was stopped", lost)
	}
	children = s.children(t)
	ended = ask(s, 2000)
	for n := range 2 {
		if n == 1 {
			time.Sleep(500 * time.Millisecond)
		}
		began = time.Now()
		if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	p.inject(1)
	<-s.ended
	aborted := time.Since(began)
	if aborted > 10*time.Second {
		t.Errorf("the server ended %v after the second SIGTERM", aborted)
	}
	orphans(children)
	for i, r := range <-ended {
		if !r.cut() {
			t.Errorf("stream %d seems to be whole and is not: %+v", i, r)
		}
	}
	p.found("%d of %d new requests got 503 with Retry-After, and /ready said that it drains; %d streams came to their end in %v, and the server ended with code 0 %v later; with longer streams and a grace of %v it ended after %v, also with code 0, and each was told; no step of the job was lost; a second SIGTERM ended all within %v",
		refused, refused, streams, streamed.Round(100*time.Millisecond), after.Round(time.Millisecond), grace, late.Round(time.Millisecond), aborted.Round(time.Millisecond))
}

// TestParentDeath kills servers that have a runner and a trainer.
func TestParentDeath(t *testing.T) {
	const times = 5
	p := prove(t, "R16", "SIGKILL of the server while a runner and a trainer work", "both end within 2 s")
	home := newHome(t)
	var slowest time.Duration
	for n := range times {
		s := start(t, home)
		if n == 0 {
			s.train(t, s.upload(t, "train.jsonl", rows(500)), map[string]any{"r": 4, "num_train_epochs": 1000, "batch_size": 4})
		}
		if _, _, err := s.chat(t.Context(), tiny, "Hi", 1); err != nil {
			t.Fatal(err)
		}
		trainer := s.child(t, 0, func() bool { return false })
		s.child(t, trainer, func() bool { return false })
		children := s.children(t)
		began := time.Now()
		s.kill()
		for _, pid := range children {
			for !gone(pid) {
				if time.Since(began) > 10*time.Second {
					t.Fatalf("process %d is left 10 s after the server's end", pid)
				}
				time.Sleep(time.Millisecond)
			}
		}
		slowest = max(slowest, time.Since(began))
		p.inject(1)
	}
	p.found("a runner and a trainer each time; both had ended %v after the kill at the latest", slowest.Round(time.Millisecond))
}

// TestClock lets a server find a database that was written a day ahead of its clock, or a day behind: the clock has jumped.
// Within a server, leases and times left are of its own monotonic clock.
func TestClock(t *testing.T) {
	p := prove(t, "R13", "the clock is a day ahead of the one that the server's database was written with, or behind",
		"a job goes on at once, whatever its lease says; times of events never go backwards, the estimated end is finite")
	home := newHome(t)
	s := start(t, home)
	j := s.train(t, s.upload(t, "train.jsonl", rows(500)), map[string]any{"r": 4, "num_train_epochs": 1000, "batch_size": 4, "save_minutes": 1e-6})
	pid := 0
	var slowest time.Duration
	const day = 24 * 60 * 60
	for _, jump := range []int64{-day, day, day, -day} {
		pid = s.child(t, pid, func() bool { return false })
		for deadline := time.Now().Add(time.Minute); len(s.states(t, j.ID)) == 0; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the job does not save its state")
			}
		}
		s.killAll(t)
		shiftTimes(t, home, -jump) // what was written lies a day off, seen from now
		p.inject(1)
		began := time.Now()
		s = start(t, home)
		s.child(t, pid, func() bool { return false })
		slowest = max(slowest, time.Since(began))
		var estimated int64
		for deadline := time.Now().Add(time.Minute); estimated == 0; time.Sleep(50 * time.Millisecond) {
			var now struct {
				Status          string
				EstimatedFinish int64 `json:"estimated_finish"`
			}
			s.must(t, http.MethodGet, "/v1/fine_tuning/jobs/"+j.ID, nil, &now)
			if estimated = now.EstimatedFinish; now.Status != "running" || time.Now().After(deadline) {
				t.Fatalf("the job is %+v", now)
			}
		}
		if left := time.Until(time.Unix(estimated, 0)); left < -5*time.Second || left > 30*24*time.Hour {
			t.Errorf("the job is estimated to end in %v", left)
		}
		var before int64
		for _, e := range s.events(t, j.ID) {
			if e.CreatedAt < before {
				t.Fatalf("event %q is of %d, and comes after one of %d", e.Message, e.CreatedAt, before)
			}
			before = e.CreatedAt
		}
	}
	s.must(t, http.MethodPost, "/v1/fine_tuning/jobs/"+j.ID+"/cancel", map[string]any{}, nil)
	var ended struct {
		CreatedAt  int64 `json:"created_at"`
		FinishedAt int64 `json:"finished_at"`
	}
	s.must(t, http.MethodGet, "/v1/fine_tuning/jobs/"+j.ID, nil, &ended)
	if ended.FinishedAt < ended.CreatedAt {
		t.Errorf("the job was created at %d and ended at %d", ended.CreatedAt, ended.FinishedAt)
	}
	p.found("%d jumps: the trainer ran again %v after the start at the latest, with leases that end a day later or ended a day before; events and estimates as promised",
		p.injected.Load(), slowest.Round(time.Millisecond))
}

// shiftTimes adds seconds to every time in the database of a data directory whose server has ended.
func shiftTimes(t *testing.T, home string, seconds int64) {
	t.Helper()
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: filepath.Join(home, "hone.db")}).String())
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, statement := range []string{
		"UPDATE jobs SET created_at = created_at + ?", "UPDATE job_events SET created_at = created_at + ?",
		"UPDATE files SET created_at = created_at + ?", "UPDATE leases SET expires_at = expires_at + 1000 * ?",
	} {
		if _, err := db.ExecContext(t.Context(), statement, seconds); err != nil {
			t.Fatal(err)
		}
	}
}
