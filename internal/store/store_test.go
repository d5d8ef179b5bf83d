package store_test

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/hone-llm/hone/internal/store"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("STORE_TEST_HOLD"); dir != "" {
		st, err := store.Open(context.Background(), dir, store.Options{})
		if err != nil {
			panic(err)
		}
		os.Stdout.WriteString("open\n")
		_, _ = io.Copy(io.Discard, os.Stdin)
		st.Close()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func open(t *testing.T, dir string, opts store.Options) *store.Store {
	t.Helper()
	st, err := store.Open(t.Context(), dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return st
}

func create(t *testing.T, st *store.Store, name, content string) store.File {
	t.Helper()
	file, err := st.CreateFile(t.Context(), name, "fine-tune", strings.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// job is a valid row that reads file.
func job(id string, file store.File) store.Job {
	return store.Job{
		ID: id, CreatedAt: 1, Status: "queued", Model: "m", BaseDigest: strings.Repeat("0", 64), TrainingFile: file.ID,
		Method: "supervised", AdapterID: "a-" + id, AdapterName: "ft:m:local::" + id,
		Requested: []byte(`{}`), Options: []byte(`{}`),
	}
}

func running(job *store.Job) ([]store.Event, error) {
	job.Status = "running"
	return nil, nil
}

// TestClockJumps sets the clock a day ahead and a day back: no lease that is kept up is lost, and no event is
// older than the one before it.
func TestClockJumps(t *testing.T) {
	t.Parallel()
	now := time.Unix(1700000000, 0)
	st := open(t, t.TempDir(), store.Options{Now: func() time.Time { return now }})
	if err := st.CreateJob(t.Context(), job("j", create(t, st, "a.jsonl", "a")), store.Event{Level: "info", Type: "message", Message: "0"}); err != nil {
		t.Fatal(err)
	}
	claimed, err := st.Claim(t.Context(), "owner", time.Minute, running)
	if err != nil {
		t.Fatal(err)
	}
	for _, jump := range []time.Duration{24 * time.Hour, -48 * time.Hour, 24 * time.Hour} {
		now = now.Add(jump)
		if err := st.Heartbeat(t.Context(), "j", "owner", claimed.Attempt, time.Minute); err != nil {
			t.Errorf("heartbeat after a jump of %v: %v", jump, err)
		}
		if _, err := st.Claim(t.Context(), "other", time.Minute, running); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("claim of another after a jump of %v and a heartbeat: %v", jump, err)
		}
		if _, err := st.UpdateJob(t.Context(), store.JobUpdate{ID: "j", Attempt: claimed.Attempt, Events: []store.Event{{Level: "info", Type: "message", Message: "e"}}}); err != nil {
			t.Fatal(err)
		}
	}
	events, _, err := st.Events(t.Context(), "j", "", 10)
	if err != nil {
		t.Fatal(err)
	}
	for i := 1; i < len(events); i++ { // newest first
		if events[i].CreatedAt > events[i-1].CreatedAt {
			t.Errorf("event %d is of %d, the one after it of %d", i, events[i].CreatedAt, events[i-1].CreatedAt)
		}
	}
	if len(events) != 4 || events[0].CreatedAt != 1700000000+24*60*60 {
		t.Errorf("events %+v", events)
	}
}

func TestFiles(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "dir with spaces, % and ?")
	st := open(t, dir, store.Options{})
	a := create(t, st, "a.jsonl", "same")
	b := create(t, st, "b.jsonl", "same")
	c := create(t, st, "数据.jsonl", "other")
	if a.SHA256 != b.SHA256 || a.ID == b.ID || a.Bytes != 4 {
		t.Errorf("files of the same content: %+v and %+v", a, b)
	}
	if len(a.ID) != len("file-")+24 {
		t.Errorf("id %q: want file- and 24 characters", a.ID)
	}

	page := func(q store.FileQuery) (ids []string, more bool) {
		t.Helper()
		files, more, err := st.Files(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			ids = append(ids, file.ID)
		}
		return ids, more
	}
	for _, test := range []struct {
		query store.FileQuery
		want  []string
		more  bool
	}{
		{store.FileQuery{}, []string{c.ID, b.ID, a.ID}, false},
		{store.FileQuery{Ascending: true}, []string{a.ID, b.ID, c.ID}, false},
		{store.FileQuery{Limit: 2}, []string{c.ID, b.ID}, true},
		{store.FileQuery{Limit: 2, After: b.ID}, []string{a.ID}, false},
		{store.FileQuery{Ascending: true, After: a.ID}, []string{b.ID, c.ID}, false},
		{store.FileQuery{Purpose: "batch"}, nil, false},
	} {
		got, more := page(test.query)
		if diff := cmp.Diff(test.want, got); diff != "" || more != test.more {
			t.Errorf("Files(%+v): more %v, (-want +got)\n%s", test.query, more, diff)
		}
	}
	if _, _, err := st.Files(t.Context(), store.FileQuery{After: "file-x"}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("unknown cursor: %v", err)
	}

	// The blob stays while one file has its content.
	if err := st.DeleteFile(t.Context(), a.ID); err != nil {
		t.Fatal(err)
	}
	_, content, err := st.OpenFile(t.Context(), b.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	if err := st.DeleteFile(t.Context(), b.ID); err != nil {
		t.Fatal(err)
	}
	// What is open can be read to its end.
	if text, err := io.ReadAll(content); err != nil || string(text) != "same" {
		t.Errorf("content %q, %v", text, err)
	}
	if _, err := st.OpenBlob(a.SHA256); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("blob of deleted files: %v", err)
	}
	if _, err := st.File(t.Context(), a.ID); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("deleted file: %v", err)
	}
	if err := st.DeleteFile(t.Context(), a.ID); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("delete again: %v", err)
	}
}

func TestFileThatBreaksOff(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	st := open(t, dir, store.Options{})
	broken := errors.New("client gone")
	_, err := st.CreateFile(t.Context(), "a", "fine-tune", io.MultiReader(strings.NewReader("half"), iotest.ErrReader(broken)))
	if !errors.Is(err, broken) {
		t.Fatalf("CreateFile = %v, want the reader's error", err)
	}
	files, _, err := st.Files(t.Context(), store.FileQuery{})
	if err != nil || len(files) != 0 {
		t.Errorf("files %v, %v; want none", files, err)
	}
	temps, err := os.ReadDir(filepath.Join(dir, "blobs", "tmp"))
	if err != nil || len(temps) != 0 {
		t.Errorf("temporary files %v, %v; want none", temps, err)
	}
}

func TestFileOfAJob(t *testing.T) {
	t.Parallel()
	st := open(t, t.TempDir(), store.Options{})
	file := create(t, st, "a", "x")
	if err := st.CreateJob(t.Context(), job("ftjob-1", file)); err != nil {
		t.Fatal(err)
	}
	var inUse *store.FileInUseError
	if err := st.DeleteFile(t.Context(), file.ID); !errors.As(err, &inUse) || inUse.JobID != "ftjob-1" {
		t.Fatalf("delete of a used file: %v", err)
	}
	_, err := st.UpdateJob(t.Context(), store.JobUpdate{ID: "ftjob-1", Attempt: store.AnyAttempt, Change: func(j *store.Job) error {
		j.Status = "cancelled"
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := st.DeleteFile(t.Context(), file.ID); err != nil {
		t.Errorf("delete after the job: %v", err)
	}
	if err := st.CreateJob(t.Context(), job("ftjob-2", file)); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("job on a deleted file: %v", err)
	}
}

func TestStartupRemovesLeftovers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	st := open(t, dir, store.Options{})
	kept := create(t, st, "a", "kept")
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	orphan := filepath.Join(dir, "blobs", "sha256", "ab", "ab"+strings.Repeat("0", 62))
	temp := filepath.Join(dir, "blobs", "tmp", "half")
	foreign := filepath.Join(dir, "blobs", "sha256", "README")
	for _, path := range []string{orphan, temp, foreign} {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	st = open(t, dir, store.Options{})
	for _, path := range []string{orphan, temp} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	if _, err := os.Stat(foreign); err != nil {
		t.Errorf("a file that is not ours was removed: %v", err)
	}
	if _, content, err := st.OpenFile(t.Context(), kept.ID); err != nil {
		t.Error(err)
	} else {
		content.Close()
	}
}

func TestDigestsCannotEscape(t *testing.T) {
	t.Parallel()
	st := open(t, t.TempDir(), store.Options{})
	for _, digest := range []string{"", "..", "../../../../etc/passwd", strings.Repeat("A", 64), "../" + strings.Repeat("0", 61), strings.Repeat("0", 63) + "\x00"} {
		if _, err := st.BlobPath(digest); err == nil {
			t.Errorf("BlobPath(%q) = nil error", digest)
		}
		if _, err := st.OpenBlob(digest); err == nil {
			t.Errorf("OpenBlob(%q) = nil error", digest)
		}
	}
}

// A second server is told the first one's process id; once the first was killed, the next one starts.
func TestDirectoryInUse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	holder := exec.CommandContext(t.Context(), os.Args[0])
	holder.Env = append(os.Environ(), "STORE_TEST_HOLD="+dir)
	if _, err := holder.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stdout, make([]byte, len("open\n"))); err != nil {
		t.Fatal(err)
	}
	_, err = store.Open(t.Context(), dir, store.Options{})
	var inUse *store.InUseError
	if !errors.As(err, &inUse) || inUse.PID != holder.Process.Pid {
		t.Errorf("Open = %v; want *InUseError with pid %d", err, holder.Process.Pid)
	}
	if err := holder.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = holder.Wait() // it was killed
	open(t, dir, store.Options{})
}

func TestDirectoryNotWritable(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := store.Open(t.Context(), filepath.Join(file, "home"), store.Options{})
	if err == nil || !strings.Contains(err.Error(), "--data-dir") {
		t.Errorf("Open below a file = %v; want what to do", err)
	}
}

func TestDatabaseOfANewerVersion(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	st := open(t, dir, store.Options{})
	if err := st.Exec(t.Context(), `INSERT INTO goose_db_version (version_id, is_applied) VALUES (999, 1)`); err != nil {
		t.Fatal(err)
	}
	st.Close()
	if _, err := store.Open(t.Context(), dir, store.Options{}); err == nil || !strings.Contains(err.Error(), "newer hone") {
		t.Errorf("Open = %v; want a refusal", err)
	}
}

// The lease rules, with a clock that only the test moves.
func TestLeases(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	st := open(t, t.TempDir(), store.Options{Now: func() time.Time { return now }})
	file := create(t, st, "a", "x")
	for _, id := range []string{"ftjob-1", "ftjob-2"} {
		if err := st.CreateJob(t.Context(), job(id, file)); err != nil {
			t.Fatal(err)
		}
	}
	const ttl = 20 * time.Second
	claim := func(owner, want string, attempt int) {
		t.Helper()
		got, err := st.Claim(t.Context(), owner, ttl, running)
		if want == "" {
			if !errors.Is(err, store.ErrNotFound) {
				t.Fatalf("%s claims %s, %v; want nothing", owner, got.ID, err)
			}
			return
		}
		if err != nil || got.ID != want || got.Attempt != attempt {
			t.Fatalf("%s claims %s attempt %d, %v; want %s attempt %d", owner, got.ID, got.Attempt, err, want, attempt)
		}
	}
	claim("a", "ftjob-1", 1)
	claim("b", "ftjob-2", 1)
	claim("c", "", 0)
	now = now.Add(15 * time.Second)
	if err := st.Heartbeat(t.Context(), "ftjob-1", "a", 1, ttl); err != nil {
		t.Fatal(err)
	}
	now = now.Add(15 * time.Second) // 30 s: b's lease is over, a's is not
	claim("c", "ftjob-2", 2)
	if err := st.Heartbeat(t.Context(), "ftjob-2", "b", 1, ttl); !errors.Is(err, store.ErrStale) {
		t.Errorf("heartbeat of the lost lease: %v", err)
	}
	stale := store.JobUpdate{ID: "ftjob-2", Attempt: 1, Change: func(j *store.Job) error { j.Step = 7; return nil },
		Events: []store.Event{{Level: "info", Type: "message", Message: "late"}}}
	if _, err := st.UpdateJob(t.Context(), stale); !errors.Is(err, store.ErrStale) {
		t.Errorf("write of the lost attempt: %v", err)
	}
	events, _, err := st.Events(t.Context(), "ftjob-2", "", 10)
	if err != nil || len(events) != 0 {
		t.Errorf("events %v, %v; want none of the lost attempt", events, err)
	}
	if err := st.Release(t.Context(), "ftjob-2", "b", 1); err != nil {
		t.Error(err)
	}
	claim("d", "", 0) // b's release freed nothing
	if err := st.Release(t.Context(), "ftjob-1", "a", 1); err != nil {
		t.Fatal(err)
	}
	claim("d", "ftjob-1", 2)
	claim("d", "ftjob-1", 3) // its own
	if err := st.Reclaim(t.Context()); err != nil {
		t.Fatal(err)
	}
	claim("e", "ftjob-1", 4)
	_, err = st.UpdateJob(t.Context(), store.JobUpdate{ID: "ftjob-1", Attempt: 4, Change: func(j *store.Job) error {
		j.Status = "succeeded"
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Heartbeat(t.Context(), "ftjob-1", "e", 4, ttl); !errors.Is(err, store.ErrStale) {
		t.Errorf("heartbeat of a finished job: %v", err)
	}
	if _, err := st.UpdateJob(t.Context(), store.JobUpdate{ID: "ftjob-1", Attempt: 4}); !errors.Is(err, store.ErrStale) {
		t.Errorf("write to a finished job: %v", err)
	}
}

func TestJobRowKeepsEverything(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	st := open(t, dir, store.Options{})
	file := create(t, st, "a", "x")
	loss := 0.5
	want := job("ftjob-1", file)
	want.ValidationFile, want.Suffix, want.Seed, want.Metadata = file.ID, "s", 42, map[string]string{"k": "v"}
	want.Plan = []byte(`{"r":16}`)
	want.Step, want.TotalSteps, want.TrainedTokens, want.TrainLoss = 3, 9, 1<<40, &loss
	if err := st.CreateJob(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	events := []store.Event{
		{Level: "info", Type: "message", Message: "one"},
		{Level: "info", Type: "metrics", Message: "two", Data: []byte(`{"step":1}`)},
	}
	got, err := st.UpdateJob(t.Context(), store.JobUpdate{ID: want.ID, Events: events, Results: []store.Result{
		{Filename: "step_metrics.csv", Purpose: "fine-tune-results", Content: []byte("step\n1\n")},
	}})
	if err != nil {
		t.Fatal(err)
	}
	st.Close()

	st = open(t, dir, store.Options{})
	reread, err := st.Job(t.Context(), want.ID)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(got, reread); diff != "" {
		t.Errorf("row after a restart (-before +after)\n%s", diff)
	}
	want.ResultFiles = got.ResultFiles
	if diff := cmp.Diff(want, reread); diff != "" || len(reread.ResultFiles) != 1 {
		t.Errorf("row (-want +got)\n%s", diff)
	}
	_, content, err := st.OpenFile(t.Context(), reread.ResultFiles[0])
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	if text, err := io.ReadAll(content); err != nil || string(text) != "step\n1\n" {
		t.Errorf("result file %q, %v", text, err)
	}
	page, more, err := st.Events(t.Context(), want.ID, "", 1)
	if err != nil || len(page) != 1 || page[0].Message != "two" || !more {
		t.Fatalf("first page of events %+v, more %v, %v", page, more, err)
	}
	page, more, err = st.Events(t.Context(), want.ID, page[0].ID, 1)
	if err != nil || len(page) != 1 || page[0].Message != "one" || more {
		t.Errorf("second page of events %+v, more %v, %v", page, more, err)
	}
}
