//go:build faults

package faults

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A smallDisk is a file system in memory, with a file that takes up what is to be full.
type smallDisk struct {
	dir     string
	balloon *os.File
}

// newSmallDisk mounts one of so many bytes. It skips the test where that is not allowed.
func newSmallDisk(t *testing.T, bytes int64) *smallDisk {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", bytes)); err != nil {
		t.Skipf("a tmpfs cannot be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	balloon, err := os.Create(filepath.Join(dir, "balloon"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = balloon.Close() })
	return &smallDisk{dir: dir, balloon: balloon}
}

// leave makes the balloon as large or as small as it takes for so many bytes to be free.
func (d *smallDisk) leave(t *testing.T, bytes int64) {
	t.Helper()
	for range 100 { // others write meanwhile
		var s unix.Statfs_t
		if err := unix.Statfs(d.dir, &s); err != nil {
			t.Fatal(err)
		}
		info, err := d.balloon.Stat()
		if err != nil {
			t.Fatal(err)
		}
		free := int64(s.Bavail) * s.Bsize
		size := info.Size() + free - bytes
		switch {
		case free > bytes:
			err = unix.Fallocate(int(d.balloon.Fd()), 0, 0, size)
		default:
			err = d.balloon.Truncate(max(size, 0))
		}
		if err == nil {
			return
		}
		if err != unix.ENOSPC { //nolint:errorlint // as the kernel returns it
			t.Fatal(err)
		}
	}
	t.Fatal("the disk cannot be filled")
}

// free makes all room that there is.
func (d *smallDisk) free(t *testing.T) {
	t.Helper()
	if err := d.balloon.Truncate(0); err != nil {
		t.Fatal(err)
	}
}

// jobState is what a job says of its being paused.
type jobState struct {
	job
	Hone struct{ Paused string }
}

// wholeAdapters checks the files of every published adapter against its manifest, and returns how many there are.
func wholeAdapters(t *testing.T, home string) (n int) {
	t.Helper()
	manifests, err := filepath.Glob(filepath.Join(home, "adapters", "[^.]*", "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range manifests {
		var manifest struct{ Files map[string]string }
		data, err := os.ReadFile(path)
		if os.IsNotExist(err) { // a checkpoint that was given up
			continue
		}
		if err == nil {
			err = json.Unmarshal(data, &manifest)
		}
		if err != nil || len(manifest.Files) == 0 {
			t.Errorf("%s: %v, %d files", path, err, len(manifest.Files))
		}
		for name, want := range manifest.Files {
			data, err := os.ReadFile(filepath.Join(filepath.Dir(path), name))
			if _, gone := os.Stat(path); os.IsNotExist(gone) {
				break
			}
			if err != nil || digestOf(data) != want {
				t.Errorf("the published %s of %s is not whole: %v, %d bytes", name, filepath.Base(filepath.Dir(path)), err, len(data))
			}
		}
		n++
	}
	return n
}

// endless is content that does not end before the disk does.
func endless(bytes int64) io.Reader {
	return io.LimitReader(repeating("{\"text\": \"nothing of this is to be kept\"}\n"), bytes)
}

type repeating string

func (r repeating) Read(p []byte) (int, error) {
	for n := 0; n < len(p); {
		n += copy(p[n:], r)
	}
	return len(p), nil
}

// TestDiskFull fills the disk at every place that writes.
func TestDiskFull(t *testing.T) {
	p := prove(t, "R6", "the disk fills up under an upload, a part, the creation of a job, a running job (resume states, checkpoints, adapter, database, log) and a batch (a small tmpfs; skipped where none can be mounted)",
		"requests get 507 with a sentence and leave nothing; a job waits, says why, and goes on by itself when there is room, to the same weights; nothing that is not whole is published; reading and chatting go on")
	const rounds = 12
	random := random(t)
	options := diskJob()
	options["num_train_epochs"] = 12
	want := undisturbed(t, options)
	d := newSmallDisk(t, 112<<20)
	addModel(t, d.dir, "../train/testdata/tiny-llama-q4_1.gguf", tiny)
	s := start(t, d.dir)
	file := s.upload(t, "train.jsonl", rows(40))
	s.ask(t, tiny)

	p.inject(d.fullUploads(t, s))
	p.inject(d.fullRequests(t, s, file))
	p.inject(d.preflight(t, s, file, options, want))
	waited := 0
	for n := range rounds {
		if d.fullJob(t, s, random, file, options, want, n%2 == 0) {
			waited++
		}
		p.inject(1)
	}
	if waited < rounds/4 {
		t.Errorf("the disk was full for %d jobs of %d only", waited, rounds)
	}
	batches := d.fullBatches(t, s, random)
	p.inject(batches)
	s.stop(t)
	if text, code := fsck(t, d.dir); code != 0 {
		t.Errorf("hone fsck at the end: %d\n%s", code, text)
	}
	p.found("507 for uploads, parts and jobs, with nothing left of them; %d jobs on a disk that filled up at a random moment (%d of them waited) ended with the same weights, and %d batches with all answers; a job that has no room for two resume states waits before it starts",
		rounds+1, waited+1, batches)
}

// fullUploads fills the disk by uploads themselves.
func (d *smallDisk) fullUploads(t *testing.T, s *server) (injected int) {
	t.Helper()
	for i := range 4 {
		d.leave(t, int64(i)*7<<20+1<<19)
		_, err := s.tryUpload(t.Context(), "endless.jsonl", endless(64<<20))
		d.refused(t, "an upload", err)
		d.free(t)
		var upload struct{ ID string }
		s.must(t, http.MethodPost, "/v1/uploads", map[string]any{"filename": "parts.txt", "purpose": "user_data", "bytes": 8 << 20, "mime_type": "text/plain"}, &upload)
		d.leave(t, int64(i)<<20+1<<19)
		content := strings.Repeat("part\n", (8<<20)/5)
		_, err = s.uploadPart(t.Context(), upload.ID, content)
		d.refused(t, "a part", err)
		injected += 2
	}
	d.free(t)
	var files struct{ Data []struct{ Filename string } }
	s.must(t, http.MethodGet, "/v1/files", nil, &files)
	for _, f := range files.Data {
		if f.Filename != "train.jsonl" {
			t.Errorf("a refused upload is listed: %+v", f)
		}
	}
	if left, err := os.ReadDir(filepath.Join(d.dir, "blobs", "tmp")); err != nil || len(left) > 0 {
		t.Errorf("refused uploads have left %v, %v", left, err)
	}
	return injected
}

// refused checks that an error is a 507 with a sentence.
func (d *smallDisk) refused(t *testing.T, what string, err error) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), "507") || !strings.Contains(err.Error(), "free some space") {
		t.Errorf("%s on a full disk: %v, expected a 507 that says what to do", what, err)
	}
}

// fullRequests asks for everything on a disk that has no room at all.
func (d *smallDisk) fullRequests(t *testing.T, s *server, file string) (injected int) {
	t.Helper()
	d.leave(t, 0)
	full := 0
	for range 300 { // the log of the database has room for some
		status, text, err := s.do(t.Context(), http.MethodPost, "/v1/uploads", map[string]any{
			"filename": strings.Repeat("x", 200), "purpose": "user_data", "bytes": 1, "mime_type": "text/plain"}, nil)
		if err != nil || status != http.StatusOK && (status != http.StatusInsufficientStorage || !strings.Contains(text, "free some space")) {
			t.Fatalf("an upload on a full disk: %d %s, %v", status, text, err)
		}
		if status == http.StatusInsufficientStorage {
			full++
		}
		if full > 5 {
			break
		}
	}
	status, text, err := s.do(t.Context(), http.MethodPost, "/v1/fine_tuning/jobs", map[string]any{"model": tiny, "training_file": file}, nil)
	if err != nil || status != http.StatusInsufficientStorage || !strings.Contains(text, "free some space") {
		t.Errorf("a job on a full disk: %d %s, %v", status, text, err)
	}
	for range 5 {
		if status, text := s.ask(t, tiny); status != http.StatusOK {
			t.Errorf("a chat on a full disk: %d %s", status, text)
		}
		s.must(t, http.MethodGet, "/v1/files/"+file+"/content", nil, nil)
		s.must(t, http.MethodGet, "/v1/fine_tuning/jobs", nil, nil)
	}
	d.free(t)
	return full + 1
}

// waits waits until a job says that it waits for room, or is over.
func (s *server) waits(t *testing.T, id string, limit time.Duration) bool {
	t.Helper()
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		var j jobState
		s.must(t, http.MethodGet, "/v1/fine_tuning/jobs/"+id, nil, &j)
		if j.Hone.Paused == "disk_full" || j.over() {
			return !j.over()
		}
	}
	return false
}

// preflight creates a job for which there is less room than two resume states and the rest take.
func (d *smallDisk) preflight(t *testing.T, s *server, file string, options map[string]any, want string) (injected int) {
	t.Helper()
	d.leave(t, 2<<20)
	j := s.train(t, file, options)
	if !s.waits(t, j.ID, 30*time.Second) {
		t.Fatalf("a job without room does not wait\n%s", s.tail())
	}
	said := func(e jobEvent) bool { return e.Level == "warn" && strings.Contains(e.Message, "free") }
	if events := s.events(t, j.ID); !slices.ContainsFunc(events, said) {
		t.Errorf("no event says why the job waits: %+v", events)
	}
	d.free(t)
	if j = s.await(t, j.ID, 2*time.Minute); j.Status != "succeeded" || weightsOf(t, d.dir, j.FineTunedModel) != want {
		t.Errorf("the job that waited is %+v", j)
	}
	return 1
}

// fullJob fills the disk at a random moment of a job. It reports whether the job waited.
func (d *smallDisk) fullJob(t *testing.T, s *server, random *rand.Rand, file string, options map[string]any, want string, byItself bool) (waited bool) {
	t.Helper()
	j := s.train(t, file, options)
	time.Sleep(time.Duration(random.IntN(900)) * time.Millisecond)
	d.leave(t, int64(random.IntN(200<<10)))
	waited = s.waits(t, j.ID, 10*time.Second)
	wholeAdapters(t, d.dir)
	if waited {
		var now jobState
		s.must(t, http.MethodGet, "/v1/fine_tuning/jobs/"+j.ID, nil, &now)
		if now.Status == "failed" {
			t.Errorf("the job has failed: %+v", now)
		}
	}
	d.free(t)
	if waited && !byItself {
		s.must(t, http.MethodPost, "/v1/fine_tuning/jobs/"+j.ID+"/resume", nil, nil)
	}
	if j = s.await(t, j.ID, 2*time.Minute); j.Status != "succeeded" {
		t.Errorf("the job is %+v", j)
	} else if got := weightsOf(t, d.dir, j.FineTunedModel); got != want {
		t.Errorf("the weights are %s, undisturbed they are %s", got, want)
	}
	wholeAdapters(t, d.dir)
	return waited
}

// fullBatches fills the disk while batches are answered.
func (d *smallDisk) fullBatches(t *testing.T, s *server, random *rand.Rand) (injected int) {
	t.Helper()
	const lines = 40
	for range 4 {
		var input strings.Builder
		for i := range lines {
			fmt.Fprintf(&input, `{"custom_id":"%d","method":"POST","url":"/v1/completions","body":{"model":%q,"prompt":"%d","max_tokens":8}}`+"\n", i, tiny, i)
		}
		id, err := s.postForm(t.Context(), "/v1/files", map[string]string{"purpose": "batch"}, "file", "batch.jsonl", strings.NewReader(input.String()))
		if err != nil {
			t.Fatal(err)
		}
		var batch struct {
			ID, Status   string
			OutputFileID string `json:"output_file_id"`
		}
		s.must(t, http.MethodPost, "/v1/batches", map[string]any{"input_file_id": id, "endpoint": "/v1/completions", "completion_window": "24h"}, &batch)
		time.Sleep(time.Duration(random.IntN(150)) * time.Millisecond)
		d.leave(t, int64(random.IntN(64<<10)))
		injected++
		time.Sleep(time.Second)
		d.free(t)
		for deadline := time.Now().Add(time.Minute); batch.Status != "completed"; time.Sleep(50 * time.Millisecond) {
			s.must(t, http.MethodGet, "/v1/batches/"+batch.ID, nil, &batch)
			if batch.Status == "failed" || time.Now().After(deadline) {
				t.Fatalf("the batch is %+v\n%s", batch, s.tail())
			}
		}
		status, text, err := s.do(t.Context(), http.MethodGet, "/v1/files/"+batch.OutputFileID+"/content", nil, nil)
		if err != nil || status != http.StatusOK || strings.Count(text, "\n") != lines {
			t.Errorf("the batch has %d answers of %d: %d, %v", strings.Count(text, "\n"), lines, status, err)
		}
	}
	return injected
}
