//go:build faults

package faults

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	_ "modernc.org/sqlite" // the driver "sqlite"
)

// diskJob are the options of the job that the tests of disks train: 80 steps, with a resume state and a checkpoint at every fifth.
func diskJob() map[string]any {
	return map[string]any{"r": 4, "num_train_epochs": 4, "batch_size": 2, "learning_rate": 2e-3, "save_strategy": "steps", "save_steps": 5}
}

// weightsOf is the sha256 of the weights of an adapter in a data directory.
func weightsOf(t *testing.T, home, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(adapterDir(home, name), "adapter_model.safetensors"))
	if err != nil {
		t.Fatal(err)
	}
	return digestOf(data)
}

// adapterDir is where the adapter of this name lies.
func adapterDir(home, name string) string {
	return filepath.Join(home, "adapters", name[strings.LastIndexByte(name, ':')+1:])
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// undisturbed is the sha256 of the weights that a job on 40 rows has without any fault.
func undisturbed(t *testing.T, options map[string]any) string {
	t.Helper()
	home := newHome(t)
	s := start(t, home)
	j := s.train(t, s.upload(t, "train.jsonl", rows(40)), options)
	if j = s.await(t, j.ID, 2*time.Minute); j.Status != "succeeded" {
		t.Fatalf("without a fault the job is %+v", j)
	}
	s.stop(t)
	return weightsOf(t, home, j.FineTunedModel)
}

// fsck is what `hone fsck` says, and its exit code.
func fsck(t *testing.T, home string, args ...string) (text string, code int) {
	t.Helper()
	out, err := command(t, home, append([]string{"fsck"}, args...)...).CombinedOutput()
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		return string(out), exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	return string(out), 0
}

// checkDatabase examines a copy of the database of a data directory.
func checkDatabase(t *testing.T, home string) error {
	t.Helper()
	copied := t.TempDir()
	for _, name := range []string{"hone.db", "hone.db-wal"} {
		data, err := os.ReadFile(filepath.Join(home, name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(copied, name), data, 0o600)
		}
		if err != nil {
			return err
		}
	}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: filepath.Join(copied, "hone.db")}).String())
	if err != nil {
		return err
	}
	defer db.Close()
	var said string
	if err := db.QueryRowContext(t.Context(), `PRAGMA integrity_check`).Scan(&said); err != nil {
		return err
	}
	if said != "ok" {
		return fmt.Errorf("integrity_check: %s", said)
	}
	return nil
}

// killAll ends the server and waits until its children are gone too.
func (s *server) killAll(t *testing.T) {
	t.Helper()
	children := s.children(t)
	s.kill()
	for deadline := time.Now().Add(20 * time.Second); len(children) > 0; time.Sleep(5 * time.Millisecond) {
		if gone(children[0]) {
			children = children[1:]
		} else if time.Now().After(deadline) {
			t.Fatalf("process %d outlives its server by 20 s", children[0])
		}
	}
}

// acknowledged is what a server has answered with 200.
type acknowledged struct {
	mu      sync.Mutex
	files   map[string]string // sha256 by id
	deleted map[string]bool   // ids
	jobs    []string
	models  []string // adapters of jobs that have succeeded
	batches []string
	counts  map[string]int
}

// work uploads, deletes and asks for batches until the server is gone.
func (a *acknowledged) work(ctx context.Context, s *server, random *rand.Rand) {
	for n := 0; ctx.Err() == nil; n++ {
		switch random.IntN(5) {
		case 0, 1: // one upload
			content := strings.Repeat(fmt.Sprintf("{\"n\": %d}\n", random.Uint64()), 1+random.IntN(20000))
			if id, err := s.tryUpload(ctx, "data.jsonl", strings.NewReader(content)); err == nil {
				a.add("uploads", func() { a.files[id] = digestOf([]byte(content)) })
			}
		case 2: // one in parts
			content := strings.Repeat(fmt.Sprintf("%d\n", random.Uint64()), 1+random.IntN(5000))
			if id, err := s.uploadParts(ctx, content); err == nil {
				a.add("uploads in parts", func() { a.files[id] = digestOf([]byte(content)) })
			}
		case 3: // a deletion
			id := ""
			a.mu.Lock()
			for id = range a.files {
				break
			}
			delete(a.files, id) // from now on it may be there or not
			a.mu.Unlock()
			if id == "" {
				continue
			}
			if status, _, err := s.do(ctx, http.MethodDelete, "/v1/files/"+id, nil, nil); err == nil && status == http.StatusOK {
				a.add("deletions", func() { a.deleted[id] = true })
			} else if err == nil && status == http.StatusConflict {
				continue // a batch or job reads it
			}
		case 4: // a batch
			var lines strings.Builder
			for i := range 3 {
				fmt.Fprintf(&lines, `{"custom_id":"%d","method":"POST","url":"/v1/completions","body":{"model":%q,"prompt":"%d","max_tokens":2}}`+"\n", i, tiny, random.IntN(100))
			}
			id, err := s.postForm(ctx, "/v1/files", map[string]string{"purpose": "batch"}, "file", "batch.jsonl", strings.NewReader(lines.String()))
			if err != nil {
				continue
			}
			var batch struct{ ID string }
			request := map[string]any{"input_file_id": id, "endpoint": "/v1/completions", "completion_window": "24h"}
			if status, _, err := s.do(ctx, http.MethodPost, "/v1/batches", request, &batch); err == nil && status == http.StatusOK {
				a.add("batches", func() { a.batches = append(a.batches, batch.ID) })
			}
		}
	}
}

func (a *acknowledged) add(what string, change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
	a.counts[what]++
}

// uploadParts uploads in three parts.
func (s *server) uploadParts(ctx context.Context, content string) (fileID string, err error) {
	var upload struct {
		ID   string
		File struct{ ID string }
	}
	request := map[string]any{"filename": "parts.txt", "purpose": "user_data", "bytes": len(content), "mime_type": "text/plain"}
	if status, text, err := s.do(ctx, http.MethodPost, "/v1/uploads", request, &upload); err != nil || status != http.StatusOK {
		return "", fmt.Errorf("create upload: %d %s, %w", status, text, err)
	}
	var ids []string
	for i := range 3 {
		id, err := s.uploadPart(ctx, upload.ID, content[len(content)*i/3:len(content)*(i+1)/3])
		if err != nil {
			return "", err
		}
		ids = append(ids, id)
	}
	status, text, err := s.do(ctx, http.MethodPost, "/v1/uploads/"+upload.ID+"/complete", map[string]any{"part_ids": ids}, &upload)
	if err != nil || status != http.StatusOK {
		return "", fmt.Errorf("complete upload: %d %s, %w", status, text, err)
	}
	return upload.File.ID, nil
}

// check looks that the server has all that was acknowledged.
func (a *acknowledged) check(t *testing.T, s *server) {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, want := range a.files {
		status, text, err := s.do(t.Context(), http.MethodGet, "/v1/files/"+id+"/content", nil, nil)
		if err != nil || status != http.StatusOK {
			t.Errorf("file %s, which was acknowledged: %d %.200s, %v", id, status, text, err)
		} else if got := digestOf([]byte(text)); got != want {
			t.Errorf("file %s has sha256 %s and was acknowledged with %s", id, got, want)
		}
	}
	for id := range a.deleted {
		if status, _, err := s.do(t.Context(), http.MethodGet, "/v1/files/"+id, nil, nil); err != nil || status != http.StatusNotFound {
			t.Errorf("file %s, whose deletion was acknowledged: %d, %v", id, status, err)
		}
	}
	for _, id := range a.jobs {
		if status, text, err := s.do(t.Context(), http.MethodGet, "/v1/fine_tuning/jobs/"+id, nil, nil); err != nil || status != http.StatusOK {
			t.Errorf("job %s, which was acknowledged: %d %s, %v", id, status, text, err)
		}
	}
	for _, name := range a.models {
		if status, text := s.ask(t, name); status != http.StatusOK {
			t.Errorf("adapter %s, whose job has succeeded: %d %s", name, status, text)
		}
	}
	for _, id := range a.batches {
		if status, text, err := s.do(t.Context(), http.MethodGet, "/v1/batches/"+id, nil, nil); err != nil || status != http.StatusOK {
			t.Errorf("batch %s, which was acknowledged: %d %s, %v", id, status, text, err)
		}
	}
}

// TestPowerLoss cuts the power of the disk under a server that uploads, deletes, trains and answers batches.
func TestPowerLoss(t *testing.T) {
	p := prove(t, "R5", "power loss: everything is killed, and what was not synced is lost, kept in part, or kept with its names alone (a FUSE file system; skipped where none can be mounted)",
		"after the start, the database is whole, all that was answered with 200 is there with its sha256, `hone fsck` is content, and jobs end with the same weights")
	const cuts = 21
	d := newDisk(t)
	options := diskJob()
	options["num_train_epochs"] = 1 // more jobs are created, and end
	want := undisturbed(t, options)
	random := random(t)
	addModel(t, d.mount, "../train/testdata/tiny-llama-q4_1.gguf", tiny)
	a := &acknowledged{files: map[string]string{}, deleted: map[string]bool{}, counts: map[string]int{}}
	s := start(t, d.mount)
	file := s.upload(t, "train.jsonl", rows(40)) // never deleted: not in a.files
	var slowest time.Duration
	jobs := map[string]bool{}
	for n := range cuts {
		a.check(t, s)
		ctx, cancel := context.WithCancel(t.Context())
		var workers sync.WaitGroup
		for range 2 {
			seed := rand.New(rand.NewPCG(random.Uint64(), 0))
			workers.Go(func() { a.work(ctx, s, seed) })
		}
		unfinished := 0
		for _, id := range a.jobs {
			var j job
			s.must(t, http.MethodGet, "/v1/fine_tuning/jobs/"+id, nil, &j)
			if !j.over() {
				unfinished++
			} else if j.Status != "succeeded" {
				t.Errorf("job %+v", j)
			} else if !jobs[id] {
				jobs[id] = true
				a.models = append(a.models, j.FineTunedModel)
				if got := weightsOf(t, d.back, j.FineTunedModel); got != want {
					t.Errorf("job %s has weights %s, undisturbed they are %s", id, got, want)
				}
			}
		}
		if unfinished < 1 {
			j := s.train(t, file, options)
			a.add("jobs", func() { a.jobs = append(a.jobs, j.ID) })
		}
		time.Sleep(time.Duration(20+random.IntN(1500)) * time.Millisecond)
		kind := powerCut(n % int(numPowerCuts))
		s.killAll(t)
		cancel()
		workers.Wait()
		if err := d.cut(random, kind); err != nil {
			t.Fatal(err)
		}
		p.inject(1)
		if err := checkDatabase(t, d.back); err != nil {
			t.Errorf("the database after cut %d (%s): %v", n, kind, err)
		}
		if text, code := fsck(t, d.mount); code != 0 {
			t.Errorf("hone fsck after cut %d (%s): %d\n%s", n, kind, code, text)
		}
		began := time.Now()
		s = start(t, d.mount)
		slowest = max(slowest, time.Since(began))
		if t.Failed() {
			t.Fatalf("cut %d, which %s", n, kind)
		}
	}
	a.check(t, s)
	for _, id := range a.jobs {
		if j := s.await(t, id, 2*time.Minute); j.Status != "succeeded" {
			t.Errorf("job %+v", j)
		} else if got := weightsOf(t, d.back, j.FineTunedModel); got != want {
			t.Errorf("job %s has weights %s, undisturbed they are %s", id, got, want)
		}
	}
	s.stop(t)
	if text, code := fsck(t, d.mount); code != 0 || !strings.Contains(text, "all is well") {
		t.Errorf("hone fsck at the end: %d\n%s", code, text)
	}
	p.found("%d cuts; of %d uploads, %d in parts, %d deletions, %d batches and %d jobs that were acknowledged none was lost; %d of %d jobs have the same weights; the slowest start took %v",
		cuts, a.counts["uploads"], a.counts["uploads in parts"], a.counts["deletions"], a.counts["batches"], a.counts["jobs"], len(a.jobs), len(a.jobs), slowest.Round(time.Millisecond))
}
