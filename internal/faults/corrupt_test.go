//go:build faults

package faults

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// corrupt flips a bit of a file, or cuts it, at a random place.
func corrupt(t *testing.T, random *rand.Rand, path string) (what string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := random.IntN(len(data))
	if random.IntN(4) == 0 {
		data, what = data[:at], fmt.Sprintf("%s cut to %d bytes", filepath.Base(path), at)
	} else {
		bit := random.IntN(8)
		data[at] ^= 1 << bit
		what = fmt.Sprintf("%s with bit %d of byte %d flipped", filepath.Base(path), bit, at)
	}
	// A new file: the old one may have other names, in the directory of a job, or be mapped.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return what
}

// copyTree copies the files of a directory.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

// rename gives the copied adapter or model in dir another name.
func rename(t *testing.T, dir string, fields map[string]string) {
	t.Helper()
	path := filepath.Join(dir, "manifest.json")
	data, err := os.ReadFile(path)
	manifest := map[string]any{}
	if err == nil {
		err = json.Unmarshal(data, &manifest)
	}
	for key, value := range fields {
		manifest[key] = value
	}
	if err == nil {
		data, err = json.Marshal(manifest)
	}
	if err == nil {
		err = os.WriteFile(path, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// envelopeOf reads an answer of the API that is an error: it has an envelope with a message.
func envelopeOf(text string) (code, message string) {
	var envelope struct {
		Error struct{ Code, Message string }
	}
	if json.Unmarshal([]byte(text), &envelope) != nil {
		return "", ""
	}
	return envelope.Error.Code, envelope.Error.Message
}

// ask is a chat whose answer may be an error.
func (s *server) ask(t *testing.T, model string) (status int, text string) {
	t.Helper()
	status, text, err := s.do(t.Context(), http.MethodPost, "/v1/chat/completions", map[string]any{
		"model": model, "messages": []any{map[string]any{"role": "user", "content": "问 1"}}, "max_tokens": 4, "temperature": 0}, nil)
	if err != nil {
		t.Fatalf("%s: %v\n%s", model, err, s.tail())
	}
	return status, text
}

// TestCorruptAdapters damages adapters beside a running server.
func TestCorruptAdapters(t *testing.T) {
	p := prove(t, "R7a", "a bit of an adapter or of a checkpoint flips, or it is cut", "a request for it is refused by name, the base model and the other adapters answer as before from the same process, and `hone fsck` names it")
	const times = 256
	random := random(t)
	home := newHome(t)
	s := start(t, home)
	j := s.train(t, s.upload(t, "train.jsonl", rows(10)), map[string]any{"r": 4, "num_train_epochs": 2, "batch_size": 2, "learning_rate": 2e-3})
	if j = s.await(t, j.ID, time.Minute); j.Status != "succeeded" {
		t.Fatalf("%+v", j)
	}
	good, err := filepath.Glob(filepath.Join(home, "adapters", "*"))
	if err != nil || len(good) < 2 {
		t.Fatalf("adapters %v, %v: expected one and its checkpoints", good, err)
	}
	base, _, err := s.chat(t.Context(), tiny, "问 1", 4)
	if err != nil {
		t.Fatal(err)
	}
	tuned, _, err := s.chat(t.Context(), j.FineTunedModel, "问 1", 4)
	if err != nil {
		t.Fatal(err)
	}
	children := s.children(t)
	sound := map[string]bool{} // that hone fsck need not name
	var refused, harmless int
	for n := range times {
		id := fmt.Sprintf("damaged%d", n)
		dir := filepath.Join(home, "adapters", id)
		copyTree(t, good[random.IntN(len(good))], filepath.Join(home, id))
		name := "ft:tiny:local::" + id
		rename(t, filepath.Join(home, id), map[string]string{"id": id, "name": name})
		file := "adapter.gguf"
		if n%8 == 0 {
			file = "manifest.json"
		}
		what := corrupt(t, random, filepath.Join(home, id, file))
		if err := os.Rename(filepath.Join(home, id), dir); err != nil {
			t.Fatal(err)
		}
		p.inject(1)
		sound[id] = file == "manifest.json" // a bit of the name makes it an adapter of another name
		status, text := s.ask(t, name)
		code, message := envelopeOf(text)
		switch {
		case status == http.StatusOK && file == "manifest.json": // white space, a time
			harmless++
		case status == http.StatusOK:
			t.Errorf("%s was served: %s", what, text)
		case code == "" || code == "runner_ended" || !strings.Contains(message, id):
			t.Errorf("%s: %d %s", what, status, text)
		default:
			refused++
		}
	}
	if again, _, err := s.chat(t.Context(), tiny, "问 1", 4); err != nil || again != base {
		t.Errorf("the base model says %q, %v; before it said %q", again, err, base)
	}
	if again, _, err := s.chat(t.Context(), j.FineTunedModel, "问 1", 4); err != nil || again != tuned {
		t.Errorf("the undamaged adapter says %q, %v; before it said %q", again, err, tuned)
	}
	if now := s.children(t); !slices.Equal(now, children) {
		t.Errorf("the runner was process %v and is %v", children, now)
	}
	s.stop(t)
	text, code := fsck(t, home)
	for n := range times {
		if id := fmt.Sprintf("damaged%d", n); !sound[id] && !strings.Contains(text, id+":") && !strings.Contains(text, id+"/") {
			t.Errorf("hone fsck (%d) does not name %s", code, id)
		}
	}
	p.found("%d refused by name, %d changed nothing that matters (a time or white space of the manifest), 0 ends of the runner; `hone fsck` names all whose weights are damaged", refused, harmless)
}

// TestCorruptModels damages the weights of base models beside a running server.
func TestCorruptModels(t *testing.T) {
	p := prove(t, "R7b", "a bit of a base model's GGUF flips, or it is cut", "a file whose structure is damaged is refused by name; no runner ends, no other model is disturbed, and `hone fsck` names every one")
	const times = 144
	random := random(t)
	home := newHome(t)
	s := start(t, home, "HONE_RUNNER_IDLE_TIMEOUT=2s")
	var refused, answered int
	for n := range times {
		name := fmt.Sprintf("damaged%d", n)
		copyTree(t, filepath.Join(home, "models", tiny), filepath.Join(home, name))
		rename(t, filepath.Join(home, name), map[string]string{"name": name})
		what := corrupt(t, random, filepath.Join(home, name, "base.gguf"))
		if err := os.Rename(filepath.Join(home, name), filepath.Join(home, "models", name)); err != nil {
			t.Fatal(err)
		}
		p.inject(1)
		status, text := s.ask(t, name)
		code, message := envelopeOf(text)
		switch {
		case status == http.StatusOK:
			answered++
		case strings.HasPrefix(message, "the model's chat template: "): // a letter of it is another
			refused++
		case code == "" || code == "runner_ended" || !strings.Contains(message, name):
			t.Errorf("%s: %d %s", what, status, text)
		default:
			refused++
		}
	}
	if status, text := s.ask(t, tiny); status != http.StatusOK {
		t.Errorf("the undamaged model: %d %s", status, text)
	}
	s.stop(t)
	text, code := fsck(t, home)
	for n := range times {
		if name := fmt.Sprintf("model damaged%d:", n); !strings.Contains(text, name) {
			t.Errorf("hone fsck (%d) does not name %s", code, name)
		}
	}
	p.found("%d refused by name; %d, where a weight or a word of the vocabulary is another now, load and answer; 0 ends of a runner; `hone fsck` names all %d", refused, answered, times)
}

// TestCorruptStates damages the newest resume state of a paused job.
func TestCorruptStates(t *testing.T) {
	p := prove(t, "R7c", "a bit of a job's newest resume state flips, or it is cut", "the state is passed over with an event, the job goes on from the one before, and its weights are the same in the end")
	const times = 48
	random := random(t)
	options := diskJob()
	options["num_train_epochs"] = 40
	home := newHome(t)
	s := start(t, home)
	file := s.upload(t, "train.jsonl", rows(40))
	whole := s.train(t, file, options)
	if whole = s.await(t, whole.ID, 2*time.Minute); whole.Status != "succeeded" {
		t.Fatalf("%+v", whole)
	}
	want := weightsOf(t, home, whole.FineTunedModel)
	injected, skipped, jobs := 0, 0, 0
	for deadline := time.Now().Add(3 * time.Minute); injected < times && time.Now().Before(deadline); jobs++ {
		j := s.train(t, file, options)
		here := 0
		damaged := "" // the state that was damaged last: it is the newest until the trainer has passed over it
		for {
			states := s.twoStates(t, j.ID, damaged)
			if states == nil {
				break // it is over
			}
			var paused job
			if status, text, err := s.do(t.Context(), http.MethodPost, "/v1/fine_tuning/jobs/"+j.ID+"/pause", nil, &paused); err != nil || status != http.StatusOK {
				if status == http.StatusConflict {
					break
				}
				t.Fatalf("pause: %d %s, %v", status, text, err)
			}
			if states = statesOf(t, home, j.ID); len(states) >= 2 && injected < times {
				damaged = states[len(states)-1]
				corrupt(t, random, filepath.Join(damaged, []string{"state.safetensors", "state.json"}[injected%2]))
				injected++
				here++
				p.inject(1)
			}
			s.must(t, http.MethodPost, "/v1/fine_tuning/jobs/"+j.ID+"/resume", nil, nil)
			if injected == times {
				break
			}
		}
		if j = s.await(t, j.ID, 2*time.Minute); j.Status != "succeeded" {
			t.Fatalf("%+v", j)
		}
		if got := weightsOf(t, home, j.FineTunedModel); got != want {
			t.Errorf("after %d damaged states the weights are %s, undisturbed they are %s", here, got, want)
		}
		said := 0
		for _, e := range s.events(t, j.ID) {
			if e.Level == "warn" && strings.Contains(e.Message, "resume state") {
				said++
			}
		}
		if skipped += said; said != here {
			t.Errorf("of %d damaged states %d were passed over with an event", here, said)
		}
	}
	p.found("%d were passed over with an event; %d jobs, each with the undisturbed weights", skipped, jobs)
}

// statesOf are the resume states of a job, the newest last.
func statesOf(t *testing.T, home, id string) []string {
	t.Helper()
	states, err := filepath.Glob(filepath.Join(home, "jobs", id, "a*", "state-*"))
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(states, func(a, b string) int { return strings.Compare(filepath.Base(a), filepath.Base(b)) })
	return states
}

// twoStates waits until the newest attempt at a job has two resume states, the newest another than damaged. It returns nil when
// the job is over.
func (s *server) twoStates(t *testing.T, id, damaged string) []string {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		states := statesOf(t, s.home, id)
		if n := len(states); n >= 2 && filepath.Dir(states[n-1]) == filepath.Dir(states[n-2]) && states[n-1] != damaged {
			return states
		}
		var j job
		if s.must(t, http.MethodGet, "/v1/fine_tuning/jobs/"+id, nil, &j); j.over() {
			return nil
		}
	}
	t.Fatalf("job %s has no two resume states after a minute\n%s", id, s.tail())
	return nil
}

// TestCorruptDatabase damages the database of a server that is stopped.
func TestCorruptDatabase(t *testing.T) {
	p := prove(t, "R7d", "a bit of the SQLite database flips, or it is cut", "the start says that it is damaged and what to do, or the server serves what is there without an end; `hone fsck --repair` makes a database that starts; no content of a file is removed")
	const times = 64
	random := random(t)
	home := newHome(t)
	s := start(t, home)
	contents := map[string]bool{}
	for n := range 12 {
		content := strings.Repeat(fmt.Sprintf("{\"n\": %d}\n", n), 10)
		s.upload(t, "data.jsonl", content)
		contents[digestOf([]byte(content))] = true
	}
	j := s.train(t, s.upload(t, "train.jsonl", rows(10)), map[string]any{"r": 4, "num_train_epochs": 2, "batch_size": 2})
	s.await(t, j.ID, time.Minute)
	s.stop(t)
	var refused, served, repaired int
	for range times {
		copied := filepath.Join(t.TempDir(), "home")
		copyTree(t, home, copied)
		what := corrupt(t, random, filepath.Join(copied, "hone.db"))
		p.inject(1)
		again, err := tryStart(t, copied)
		if err != nil {
			refused++
			if !strings.Contains(err.Error(), "hone.db") || !strings.Contains(err.Error(), "hone fsck --repair") {
				t.Errorf("%s: the start does not say what to do: %v", what, err)
			}
			if text, code := fsck(t, copied, "--repair"); code != 0 {
				t.Errorf("%s: hone fsck --repair: %d\n%s", what, code, text)
			} else if again, err = tryStart(t, copied); err != nil {
				t.Errorf("%s: after hone fsck --repair: %v", what, err)
			} else {
				repaired++
			}
		} else {
			served++
		}
		if again != nil {
			for _, path := range []string{"/v1/files", "/v1/fine_tuning/jobs", "/v1/models", "/v1/batches"} {
				status, text, err := again.do(t.Context(), http.MethodGet, path, nil, nil)
				if _, message := envelopeOf(text); err != nil || status != http.StatusOK && message == "" {
					t.Errorf("%s: GET %s: %d %s, %v", what, path, status, text, err)
				}
			}
			again.stop(t)
		}
		left := map[string]bool{}
		err = filepath.WalkDir(copied, func(path string, entry os.DirEntry, err error) error {
			name := entry.Name()
			if err == nil && len(name) >= 64 {
				left[name[len(name)-64:]] = true
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for digest := range contents {
			if !left[digest] {
				t.Errorf("%s: the content %s is gone", what, digest)
			}
		}
	}
	p.found("%d refused at the start with the way out, %d of them repaired by it; %d start, where the bit is in a text or in no row; no content of a file lost", refused, repaired, served)
}

// TestLostFiles removes contents of files, and the database.
func TestLostFiles(t *testing.T) {
	p := prove(t, "R7e", "contents of files are removed or cut behind hone's back, or the database is removed and hone is used on",
		"the start names the files; each says in its object and when it is used what is wrong, and uploading the content again mends it; what a lost database leaves is kept in lost+found, and `hone fsck` names it")
	const files = 8
	home := newHome(t)
	s := start(t, home)
	var ids, texts []string
	for n := range files {
		texts = append(texts, rows(10+n))
		ids = append(ids, s.upload(t, "train.jsonl", texts[n]))
	}
	s.stop(t)
	blob := func(text string) string {
		digest := digestOf([]byte(text))
		return filepath.Join("blobs", "sha256", digest[:2], digest)
	}
	for n, text := range texts {
		err := os.Remove(filepath.Join(home, blob(text)))
		if n%2 == 1 {
			err = os.WriteFile(filepath.Join(home, blob(text)), []byte(text[:n]), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		p.inject(1)
	}
	s = start(t, home)
	said := s.tail()
	for n, id := range ids {
		if !strings.Contains(said, id) {
			t.Errorf("the start does not name %s", id)
		}
		var file struct {
			Status        string
			StatusDetails string `json:"status_details"`
		}
		if s.must(t, http.MethodGet, "/v1/files/"+id, nil, &file); file.Status != "error" || !strings.Contains(file.StatusDetails, id) {
			t.Errorf("the object of a lost file is %+v", file)
		}
		status, text, err := s.do(t.Context(), http.MethodGet, "/v1/files/"+id+"/content", nil, nil)
		if code, message := envelopeOf(text); err != nil || status != http.StatusInternalServerError || code != "file_damaged" || !strings.Contains(message, id) {
			t.Errorf("the content of a lost file: %d %.200s, %v", status, text, err)
		}
		var j job
		status, text, err = s.do(t.Context(), http.MethodPost, "/v1/fine_tuning/jobs", map[string]any{"model": tiny, "training_file": id}, &j)
		if err != nil {
			t.Fatal(err)
		}
		if status == http.StatusOK {
			j = s.await(t, j.ID, time.Minute)
			text = j.Error.Message
		}
		if j.Status == "succeeded" || !strings.Contains(text, id) || !strings.Contains(text, "the content of file") {
			t.Errorf("a job on a lost file: %d %s %s", status, text, j.Status)
		}
		if n == 0 {
			s.upload(t, "again.jsonl", texts[n])
			if s.must(t, http.MethodGet, "/v1/files/"+id, nil, &file); file.Status != "processed" {
				t.Errorf("after the upload of the same content the object is %+v", file)
			}
			s.must(t, http.MethodGet, "/v1/files/"+id+"/content", nil, nil)
		}
	}
	s.stop(t)
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.RemoveAll(filepath.Join(home, "hone.db"+suffix)); err != nil {
			t.Fatal(err)
		}
	}
	p.inject(1)
	for range 2 {
		s = start(t, home)
		if !strings.Contains(s.tail(), "the database was lost") && len(ids) > 0 {
			t.Errorf("the start does not say that the database was lost\n%s", s.tail())
		}
		ids = nil // the second start has nothing to say
		s.upload(t, "new.jsonl", "{}\n")
		s.stop(t)
	}
	kept, err := filepath.Glob(filepath.Join(home, "lost+found", "*", "*", filepath.Base(blob(texts[0]))))
	if err != nil || len(kept) != 1 {
		t.Errorf("the blob of the lost database: %v, %v", kept, err)
	}
	if text, code := fsck(t, home); code != 3 || !strings.Contains(text, "lost+found/of-a-lost-database-") {
		t.Errorf("hone fsck: %d\n%s", code, text)
	}
	p.found("%d of %d files named at the start, in their object, in use and by the job; mended by an upload; the blobs of the lost database kept", files, files)
}
