package finetune_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/store"
)

func (h *home) pause(id string) *finetune.Job {
	h.t.Helper()
	job, err := h.jobs.Pause(h.t.Context(), id)
	if err != nil {
		h.t.Fatal(err)
	}
	return job
}

func (h *home) resume(id string) {
	h.t.Helper()
	if _, err := h.jobs.Resume(h.t.Context(), id); err != nil {
		h.t.Fatal(err)
	}
}

// steps are the events of a job's steps, oldest first.
func (h *home) steps(id string) (texts []string) {
	for _, m := range h.messages(id) {
		if strings.HasPrefix(m, "Step ") {
			texts = append(texts, m)
		}
	}
	return texts
}

// A job that is paused and resumed has the same losses and events, each once, as one that ran through.
func TestPause(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	through := h.awaitEnd(h.create(behaviour{Steps: 8}).ID, finetune.Succeeded)

	job := h.create(behaviour{Steps: 8, Delay: 20 * time.Millisecond})
	h.await(job.ID, "step 3", func(job *finetune.Job) bool { return job.Progress.Step >= 3 })
	paused := h.pause(job.ID)
	if paused.Status != finetune.Queued || paused.Paused != finetune.PausedByRequest || paused.Progress.Step < 3 || paused.EstimatedFinish != 0 {
		t.Fatalf("paused job: %+v", paused)
	}
	h.awaitProcessEnd(job.ID, 1)
	if again := h.pause(job.ID); again.Paused != finetune.PausedByRequest {
		t.Errorf("paused again: %+v", again)
	}
	// Others go by, and a restart changes nothing.
	h.awaitEnd(h.create(behaviour{Steps: 2}).ID, finetune.Succeeded)
	if err := h.close(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.open()
	h.awaitEnd(h.create(behaviour{Steps: 2}).ID, finetune.Succeeded)
	if now := h.get(job.ID); now.Status != finetune.Queued || now.Attempt != 1 || now.Paused == "" {
		t.Errorf("after a restart: %+v", now)
	}
	h.resume(job.ID)
	done := h.awaitEnd(job.ID, finetune.Succeeded)
	messages := h.messages(job.ID)
	at := slices.IndexFunc(messages, func(m string) bool { return strings.HasPrefix(m, "Fine-tuning job paused at step ") })
	if at < 0 || !slices.Equal(messages[at+1:at+3], []string{"Fine-tuning job resumed", fmt.Sprintf("Resuming from step %d", paused.Progress.Step)}) {
		t.Errorf("events\n%s", strings.Join(messages, "\n"))
	}
	if diff := cmp.Diff(h.steps(through.ID), h.steps(job.ID)); diff != "" || done.Attempt != 2 || done.TrainedTokens != through.TrainedTokens {
		t.Errorf("attempt %d, %d tokens, steps of a job that ran through, and of this (-+)\n%s", done.Attempt, done.TrainedTokens, diff)
	}
	if done.RunSeconds <= 0 || done.RunSeconds > time.Since(time.Unix(done.CreatedAt, 0)).Seconds()+1 {
		t.Errorf("ran for %v s", done.RunSeconds)
	}
}

// trainerRuns reports whether the trainer of an attempt is there.
func (h *home) trainerRuns(id string, attempt int) bool {
	h.t.Helper()
	data, err := os.ReadFile(filepath.Join(h.dir, "jobs", id, fmt.Sprintf("a%d", attempt), "pid.log"))
	if err != nil {
		h.t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(data))
	if err != nil {
		h.t.Fatal(err)
	}
	return syscall.Kill(pid, 0) == nil
}

func (h *home) awaitProcessEnd(id string, attempt int) {
	h.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for h.trainerRuns(id, attempt) {
		if time.Now().After(deadline) {
			h.t.Fatal("the trainer still runs")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestPauseStates(t *testing.T) {
	t.Parallel()
	slow := behaviour{Steps: 1000, Delay: 20 * time.Millisecond}
	t.Run("queued, then cancelled", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		first := h.create(slow)
		h.await(first.ID, "step 1", func(job *finetune.Job) bool { return job.Progress.Step >= 1 })
		second := h.awaitStatus(h.create(behaviour{Steps: 2}).ID, finetune.Queued)
		if job := h.pause(second.ID); job.Status != finetune.Queued || job.Paused == "" {
			t.Errorf("paused: %+v", job)
		}
		third := h.awaitStatus(h.create(behaviour{Steps: 2}).ID, finetune.Queued)
		if messages := h.messages(third.ID); messages[len(messages)-1] != "Waiting for its turn: jobs ahead in the queue: 1" {
			t.Errorf("last event %q: a paused job is not ahead of others", messages[len(messages)-1])
		}
		for _, id := range []string{first.ID, second.ID} {
			if job, err := h.jobs.Cancel(t.Context(), id); err != nil || job.Status != finetune.Cancelled {
				t.Errorf("cancelled: %+v, %v", job, err)
			}
		}
		h.awaitEnd(third.ID, finetune.Succeeded)
		if job := h.get(second.ID); job.Attempt != 0 {
			t.Errorf("the paused job ran: %+v", job)
		}
	})
	t.Run("running, then cancelled", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		id := h.await(h.create(slow).ID, "step 1", func(job *finetune.Job) bool { return job.Progress.Step >= 1 }).ID
		h.pause(id)
		if job, err := h.jobs.Cancel(t.Context(), id); err != nil || job.Status != finetune.Cancelled {
			t.Errorf("cancelled: %+v, %v", job, err)
		}
		h.awaitGone(id, 1)
	})
	t.Run("validating", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		job := h.createSpec(finetune.Spec{Model: "base", TrainingFile: h.upload(strings.Repeat(goodRow, 20_000)), Options: behaviour{Steps: 2}.options()})
		h.pause(job.ID)
		job = h.awaitStatus(job.ID, finetune.Queued)
		time.Sleep(100 * time.Millisecond)
		if job = h.get(job.ID); job.Status != finetune.Queued || job.Attempt != 0 {
			t.Errorf("a job that was paused while it was validated: %+v", job)
		}
		h.resume(job.ID)
		h.awaitEnd(job.ID, finetune.Succeeded)
	})
	t.Run("while attempts end by accident", func(t *testing.T) {
		t.Parallel()
		h := openHome(t, func(o *finetune.Options) { o.RetryDelay, o.MaxFailures = 200*time.Millisecond, 100 })
		id := h.create(behaviour{Steps: 4, CrashAt: 1, Crashes: 1}).ID
		h.awaitMessages(id, "Attempt 1 ended early", 1)
		if job := h.pause(id); job.Status != finetune.Queued {
			t.Errorf("paused: %+v", job)
		}
		h.resume(id)
		h.awaitEnd(id, finetune.Succeeded)
	})
	t.Run("finished and unknown", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		id := h.awaitEnd(h.create(behaviour{Steps: 2}).ID, finetune.Succeeded).ID
		for name, call := range map[string]func(string) (*finetune.Job, error){
			"Pause":  func(id string) (*finetune.Job, error) { return h.jobs.Pause(t.Context(), id) },
			"Resume": func(id string) (*finetune.Job, error) { return h.jobs.Resume(t.Context(), id) },
		} {
			var conflict *finetune.ConflictError
			if _, err := call(id); !errors.As(err, &conflict) || conflict.Status != finetune.Succeeded {
				t.Errorf("%s of a finished job: %v", name, err)
			}
			if _, err := call("ftjob-x"); !errors.Is(err, finetune.ErrNotFound) {
				t.Errorf("%s of no job: %v", name, err)
			}
		}
	})
	// Wherever in its life a job is paused, nothing of it runs afterwards, and it ends once and well when it is resumed.
	t.Run("at any time", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		for i := range 15 {
			id := h.create(behaviour{Steps: 4, Delay: 2 * time.Millisecond}).ID
			time.Sleep(time.Duration(i) * 5 * time.Millisecond)
			job, err := h.jobs.Pause(t.Context(), id)
			var conflict *finetune.ConflictError
			if err != nil && !errors.As(err, &conflict) {
				t.Fatal(err)
			}
			if err == nil && job.Status == finetune.Running {
				t.Errorf("runs on: %+v", job)
			}
			if err == nil && !job.Status.Final() {
				h.resume(id)
			}
			h.awaitEnd(id, finetune.Succeeded)
			if steps := h.steps(id); len(steps) != 6 {
				t.Errorf("events of steps\n%s", strings.Join(steps, "\n"))
			}
		}
	})
}

// A job whose disk is full waits and says so, and goes on when there is room.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	const plenty = 1 << 40
	open := func(t *testing.T, now int64) (*home, *atomic.Int64) {
		t.Helper()
		free := new(atomic.Int64)
		free.Store(now)
		return openHome(t, func(o *finetune.Options) { o.FreeBytes = func(string) (int64, error) { return free.Load(), nil } }), free
	}
	awaitPaused := func(t *testing.T, h *home, id, sentence string) {
		t.Helper()
		job := h.await(id, "a pause", func(job *finetune.Job) bool { return job.Paused != "" })
		messages := h.messages(id)
		if job.Status != finetune.Queued || job.Paused != finetune.PausedForSpace || !strings.Contains(messages[len(messages)-1], sentence) {
			t.Errorf("%s, paused %q, last event %q", job.Status, job.Paused, messages[len(messages)-1])
		}
	}
	t.Run("before the first attempt", func(t *testing.T) {
		t.Parallel()
		h, free := open(t, 1<<20)
		id := h.create(behaviour{Steps: 2}).ID
		awaitPaused(t, h, id, "the disk has 1.0 MiB free, and the job needs 4.0 MiB")
		time.Sleep(150 * time.Millisecond)
		if job := h.get(id); job.Attempt != 1 {
			t.Errorf("it was tried again: attempt %d", job.Attempt)
		}
		h.resume(id) // as if the user knew better
		h.awaitMessages(id, "Fine-tuning job paused", 2)
		free.Store(plenty)
		h.awaitEnd(id, finetune.Succeeded)
	})
	t.Run("for what the plan says", func(t *testing.T) {
		t.Parallel()
		h, free := open(t, 1<<30)
		id := h.create(behaviour{Steps: 2, AdapterBytes: 1 << 30}).ID
		awaitPaused(t, h, id, "the disk has 1.0 GiB free, and the job needs 1.5 GiB for two resume states")
		free.Store(plenty)
		h.awaitEnd(id, finetune.Succeeded)
	})
	t.Run("while it runs", func(t *testing.T) {
		t.Parallel()
		h, free := open(t, 6<<20)
		id := h.create(behaviour{Steps: 6, FullAt: 4}).ID
		awaitPaused(t, h, id, "the disk is full: write state: no space left on device. It goes on by itself from step 2 when 10 MiB are free (now 6.0 MiB)")
		free.Store(plenty)
		job := h.awaitEnd(id, finetune.Succeeded)
		if messages := h.messages(id); job.Attempt != 2 || !slices.Contains(messages, "Resuming from step 2") || len(h.steps(id)) != 9 {
			t.Errorf("attempt %d, events\n%s", job.Attempt, strings.Join(messages, "\n"))
		}
	})
	t.Run("and there is room again when the attempt has ended", func(t *testing.T) {
		t.Parallel()
		h, _ := open(t, 1<<30)
		job := h.awaitEnd(h.create(behaviour{Steps: 6, FullAt: 4}).ID, finetune.Succeeded)
		if messages := h.messages(job.ID); job.Attempt != 2 || !slices.Contains(messages, "Resuming from step 2") {
			t.Errorf("attempt %d, events\n%s", job.Attempt, strings.Join(messages, "\n"))
		}
	})
	t.Run("and somebody wants it to wait", func(t *testing.T) {
		t.Parallel()
		h, free := open(t, 1<<20)
		id := h.create(behaviour{Steps: 2}).ID
		awaitPaused(t, h, id, "the disk has")
		h.pause(id)
		free.Store(plenty)
		time.Sleep(150 * time.Millisecond)
		if job := h.get(id); job.Paused != finetune.PausedByRequest || job.Status != finetune.Queued {
			t.Errorf("%+v", job)
		}
		h.resume(id)
		h.awaitEnd(id, finetune.Succeeded)
	})
}

func TestRetention(t *testing.T) {
	t.Parallel()
	var late atomic.Int64 // seconds that the clock is ahead
	clock := func() time.Time { return time.Now().Add(time.Duration(late.Load()) * time.Second) }
	h := openHome(t, func(o *finetune.Options) {
		o.Now = clock
		o.Retention = finetune.Retention{ResumeStates: time.Hour, Checkpoints: time.Hour, Events: time.Hour, Files: time.Hour, CacheBytes: 250}
	})
	cache := filepath.Join(h.dir, "cache")
	if err := os.MkdirAll(cache, 0o700); err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"old", "middle", "new"} {
		path, at := filepath.Join(cache, name), time.Now().Add(time.Duration(i-5)*time.Hour)
		if err := errors.Join(os.WriteFile(path, make([]byte, 100), 0o600), os.Chtimes(path, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	tuned := h.awaitEnd(h.create(behaviour{Steps: 4, Checkpoints: 2}).ID, finetune.Succeeded)
	cancelled := h.await(h.create(behaviour{Steps: 1000, Delay: 10 * time.Millisecond}).ID, "step 3", func(job *finetune.Job) bool { return job.Progress.Step >= 3 })
	if _, err := h.jobs.Cancel(t.Context(), cancelled.ID); err != nil {
		t.Fatal(err)
	}
	waiting := h.create(behaviour{Steps: 1000, Delay: 50 * time.Millisecond})
	h.await(waiting.ID, "step 1", func(job *finetune.Job) bool { return job.Progress.Step >= 1 })
	h.pause(waiting.ID)
	look := func() [4]int {
		files, _, err := h.store.Files(t.Context(), store.FileQuery{})
		if err != nil {
			t.Fatal(err)
		}
		return [4]int{len(h.leftovers(cancelled.ID)), len(h.registry.List()), len(h.messages(tuned.ID)), len(files)}
	}
	reopen := func() {
		if err := h.close(t.Context()); err != nil {
			t.Fatal(err)
		}
		h.open()
	}
	reopen()
	before := look()
	if before[0] == 0 || before[1] != 3 || before[2] < 10 || before[3] < 4 {
		t.Errorf("resume states, adapters, events, files %v: nothing is old yet", before)
	}
	late.Store(2 * 3600)
	reopen()
	deadline := time.Now().Add(10 * time.Second)
	// What stays: the tuned model, the last event, the file of the unfinished job.
	cached := func() []os.DirEntry {
		left, err := os.ReadDir(cache)
		if err != nil {
			t.Fatal(err)
		}
		return left
	}
	for look() != [4]int{0, 1, 1, 1} || len(cached()) > 2 {
		if time.Now().After(deadline) {
			t.Fatalf("resume states, adapters, events, files %v, cache %v", look(), cached())
		}
		time.Sleep(5 * time.Millisecond)
	}
	if left := cached(); len(left) != 2 || left[0].Name() != "middle" {
		t.Errorf("cache %v", left)
	}
	if messages := h.messages(tuned.ID); messages[0] != "The job has successfully completed" {
		t.Errorf("last event %q", messages)
	}
}
