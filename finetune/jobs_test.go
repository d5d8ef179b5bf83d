package finetune_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/store"
)

const goodRow = `{"messages":[{"role":"user","content":"1+1?"},{"role":"assistant","content":"2"}]}` + "\n"

// home is a data directory with a server running on it.
type home struct {
	*server
	t     *testing.T
	dir   string
	edits []func(*finetune.Options)
}

func openHome(t *testing.T, edits ...func(*finetune.Options)) *home {
	t.Helper()
	h := &home{t: t, dir: t.TempDir(), edits: edits}
	h.open()
	t.Cleanup(func() {
		if err := h.close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return h
}

func (h *home) open() {
	h.t.Helper()
	var err error
	logger := slog.New(slog.NewTextHandler(h.t.Output(), nil))
	if h.server, err = openServer(h.t.Context(), h.dir, logger, h.edits...); err != nil {
		h.t.Fatal(err)
	}
}

func (h *home) upload(content string) string {
	h.t.Helper()
	file, err := h.store.CreateFile(h.t.Context(), "train.jsonl", "fine-tune", strings.NewReader(content))
	if err != nil {
		h.t.Fatal(err)
	}
	return file.ID
}

// create makes a job on one good row.
func (h *home) create(b behaviour) *finetune.Job {
	h.t.Helper()
	return h.createSpec(finetune.Spec{Model: "base", TrainingFile: h.upload(goodRow), Options: b.options()})
}

func (h *home) createSpec(spec finetune.Spec) *finetune.Job {
	h.t.Helper()
	job, err := h.jobs.Create(h.t.Context(), spec)
	if err != nil {
		h.t.Fatal(err)
	}
	return job
}

func (h *home) get(id string) *finetune.Job {
	h.t.Helper()
	job, err := h.jobs.Get(h.t.Context(), id)
	if err != nil {
		h.t.Fatal(err)
	}
	return job
}

// await polls a job until ok, for at most 10 s.
func (h *home) await(id, what string, ok func(*finetune.Job) bool) *finetune.Job {
	h.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		job := h.get(id)
		if ok(job) {
			return job
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("job is %s at step %d, waiting for: %s\n%s", job.Status, job.Progress.Step, what, strings.Join(h.messages(id), "\n"))
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (h *home) awaitStatus(id string, status finetune.Status) *finetune.Job {
	h.t.Helper()
	return h.await(id, string(status), func(job *finetune.Job) bool { return job.Status == status || job.Status.Final() })
}

func (h *home) awaitEnd(id string, status finetune.Status) *finetune.Job {
	h.t.Helper()
	job := h.await(id, "the end", func(job *finetune.Job) bool { return job.Status.Final() })
	if job.Status != status {
		h.t.Fatalf("job ended %s (%+v), want %s\n%s", job.Status, job.Error, status, strings.Join(h.messages(id), "\n"))
	}
	return job
}

// messages are the texts of a job's events, oldest first.
func (h *home) messages(id string) (texts []string) {
	h.t.Helper()
	events, more, err := h.jobs.Events(h.t.Context(), id, "", 1000)
	if err != nil || more {
		h.t.Fatalf("events: more %v, %v", more, err)
	}
	for _, e := range slices.Backward(events) {
		texts = append(texts, e.Message)
	}
	return texts
}

// awaitGone waits until the trainer of an attempt has ended and its resume states are removed.
func (h *home) awaitGone(id string, attempt int) {
	h.t.Helper()
	data, err := os.ReadFile(filepath.Join(h.dir, "jobs", id, fmt.Sprintf("a%d", attempt), "pid.log"))
	if err != nil {
		h.t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(data))
	if err != nil {
		h.t.Fatal(err)
	}
	deadline := time.Now().Add(5 * time.Second)
	for {
		gone := errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
		left := h.leftovers(id)
		if gone && len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("trainer gone: %v, files left: %v", gone, left)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// leftovers are the files of a job's directory that are not logs.
func (h *home) leftovers(id string) (files []string) {
	h.t.Helper()
	err := filepath.WalkDir(filepath.Join(h.dir, "jobs", id), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.IsDir() && !strings.HasSuffix(path, ".log") {
			files = append(files, path)
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.t.Fatal(err)
	}
	return files
}

func TestJobSucceeds(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	epochs := 2
	spec := finetune.Spec{
		Model: "base", TrainingFile: h.upload(goodRow + goodRow), ValidationFile: h.upload(goodRow), Suffix: "My quiz",
		Options: behaviour{Steps: 4}.options(), Metadata: map[string]string{"k": "v"}, Requested: finetune.Hyperparameters{NEpochs: &epochs},
	}
	created := h.createSpec(spec)
	if created.Status != finetune.ValidatingFiles || created.FineTunedModel != "" || created.Error != nil {
		t.Errorf("created job: %+v", created)
	}
	job := h.awaitEnd(created.ID, finetune.Succeeded)

	if !strings.HasPrefix(job.FineTunedModel, "ft:base:local:My-quiz:") {
		t.Errorf("fine_tuned_model %q", job.FineTunedModel)
	}
	adapter, err := h.registry.Lookup(job.FineTunedModel)
	if err != nil || adapter.JobID != job.ID {
		t.Errorf("adapter %+v, %v", adapter, err)
	}
	want := []string{
		"Created fine-tuning job: " + job.ID,
		"Validating training file: " + spec.TrainingFile + " and validation file: " + spec.ValidationFile,
		"Training file: 2 rows, 4 messages (assistant 2, user 2); validation file: 1 row, 2 messages (assistant 1, user 1)",
		"The training file has 1 duplicate row; the first is line 2, the same as line 1",
		"The validation file has 1 row that the training file has too, the first in line 1 (line 1 there): what is measured on them says little about new rows",
		"Files validated, moving job to queued state",
		"Fine-tuning job started",
		"Training on 4 examples with 40 tokens (10 of them are shared by rows and computed once), validating on 1 examples with 9 tokens",
		"1 examples are longer than max_length and are left out (64 tokens): line 3 of the training file",
		"2 examples are longer than max_length and lose the beginning of their prompt (64 tokens): line 1, 2 of the validation file",
		"Memory: 4.0 GiB of 8.0 GiB on cpu: weights 3.0 GiB (layout exact: bf16, transposed bf16), adapter 1.0 MiB, activations of 1024 tokens 512 MiB, the rest 256 MiB",
		"Step 1/4: training loss=2.0000",
		"Step 2/4: training loss=1.0000",
		"Step 2/4: training loss=1.0000, validation loss=1.5000, full validation loss=1.5000, full validation accuracy=0.2500",
		"Step 3/4: training loss=0.6667",
		"Step 4/4: training loss=0.5000",
		"Step 4/4: training loss=0.5000, validation loss=0.7500, full validation loss=0.7500, full validation accuracy=0.2500",
		"New fine-tuned model created: " + job.FineTunedModel,
		"The job has successfully completed",
	}
	if diff := cmp.Diff(want, h.messages(job.ID)); diff != "" {
		t.Errorf("events (-want +got)\n%s", diff)
	}
	if len(job.ResultFiles) != 2 {
		t.Fatalf("result files %v", job.ResultFiles)
	}
	file, content, err := h.store.OpenFile(t.Context(), job.ResultFiles[0])
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	csv, err := io.ReadAll(content)
	if err != nil || file.Purpose != "fine-tune-results" {
		t.Errorf("result file %+v, %v", file, err)
	}
	wantCSV := resultHeader + "1,2,0.5,,,,,,,,\n2,1,0.5,1.5,0.25,,,,,,\n3,0.66666667,0.5,,,,,,,,\n4,0.5,0.5,0.75,0.25,,,,,,\n"
	if diff := cmp.Diff(wantCSV, string(csv)); diff != "" {
		t.Errorf("result file (-want +got)\n%s", diff)
	}
	if job.TrainedTokens != 80 || job.FinishedAt == 0 || job.Attempt != 1 || job.Plan == nil || *job.Hyperparameters.BatchSize != 2 || *job.Hyperparameters.NEpochs != 2 {
		t.Errorf("job at its end: %+v", job)
	}
	if job.Requested.BatchSize != nil {
		t.Errorf("requested batch size %v; want auto", *job.Requested.BatchSize)
	}
	h.awaitGone(job.ID, 1)

	events, _, err := h.jobs.Events(t.Context(), job.ID, "", 3)
	if err != nil || string(events[2].Data) != `{"step":4,"total_steps":4,"train_loss":0.5,"train_mean_token_accuracy":0.5,"valid_loss":0.75,`+
		`"valid_mean_token_accuracy":0.25,"full_valid_loss":0.75,"full_valid_mean_token_accuracy":0.25}` || events[2].Type != "metrics" {
		t.Errorf("metrics event %s %s, %v", events[2].Type, events[2].Data, err)
	}
}

// resultHeader are the columns of a result file: OpenAI's, then ours.
const resultHeader = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy," +
	"train_choice_accuracy,valid_choice_accuracy,rewards_chosen,rewards_rejected,learning_rate,grad_norm\n"

func TestJobFails(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	job := h.awaitEnd(h.create(behaviour{Fail: child.CodeInvalidFile}).ID, finetune.Failed)
	want := &finetune.JobError{Code: "invalid_training_file", Message: "no row fits max_length", Param: "training_file"}
	if diff := cmp.Diff(want, job.Error); diff != "" || job.Attempt != 1 {
		t.Errorf("attempt %d, error (-want +got)\n%s", job.Attempt, diff)
	}
	if messages := h.messages(job.ID); messages[len(messages)-1] != "The job failed: no row fits max_length" {
		t.Errorf("last event %q", messages[len(messages)-1])
	}
	h.awaitGone(job.ID, 1)

	// What would help stands in the trainer's message, which comes through as it is.
	for _, code := range []string{child.CodeInsufficientMemory, child.CodeDiverged} {
		job := h.awaitEnd(h.create(behaviour{Fail: code}).ID, finetune.Failed)
		if job.Error.Code != code || job.Error.Message != "no row fits max_length" || job.Attempt != 1 {
			t.Errorf("%s: attempt %d, %+v", code, job.Attempt, job.Error)
		}
	}
}

func TestTrainerCrashes(t *testing.T) {
	t.Parallel()
	t.Run("and the job goes on", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		job := h.awaitEnd(h.create(behaviour{Steps: 6, CrashAt: 4, Crashes: 1}).ID, finetune.Succeeded)
		messages := h.messages(job.ID)
		if job.Attempt != 2 || !slices.Contains(messages, "Attempt 1 ended early: the trainer ended: exit status 3") || !slices.Contains(messages, "Resuming from step 2") {
			t.Errorf("attempt %d, events\n%s", job.Attempt, strings.Join(messages, "\n"))
		}
		counts := map[string]int{}
		for _, m := range messages {
			counts[m]++
			if counts[m] > 1 {
				t.Errorf("event %q comes twice", m)
			}
		}
		h.awaitGone(job.ID, 2)
	})
	// Four crashes in all, but each attempt got two steps further.
	t.Run("often, but getting further", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		job := h.create(behaviour{Steps: 1000, Delay: 20 * time.Millisecond})
		for range 4 {
			before := h.await(job.ID, "running", func(job *finetune.Job) bool { return job.Status == finetune.Running && job.Plan != nil })
			h.await(job.ID, "a saved step", func(now *finetune.Job) bool { return now.Progress.Step >= before.Progress.Step+3 })
			h.killTrainer(job.ID, h.get(job.ID).Attempt)
			h.await(job.ID, "the next attempt", func(now *finetune.Job) bool { return now.Attempt > before.Attempt && now.Status == finetune.Running })
			h.awaitMessages(job.ID, "Resuming from step", h.get(job.ID).Attempt-1)
		}
		if job, err := h.jobs.Cancel(t.Context(), job.ID); err != nil || job.Attempt != 5 {
			t.Errorf("job %+v, %v; want it running in attempt 5", job, err)
		}
	})
	t.Run("always at the same place", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		// The first attempt saved step 2, which is progress; the next three get no further.
		job := h.awaitEnd(h.create(behaviour{Steps: 6, CrashAt: 4, Crashes: 99}).ID, finetune.Failed)
		if job.Attempt != 4 || !strings.Contains(job.Error.Message, "3 attempts in a row got no further") || !strings.Contains(job.Error.Message, "exit status 3") {
			t.Errorf("attempt %d, error %+v", job.Attempt, job.Error)
		}
		h.awaitGone(job.ID, job.Attempt)
	})
	t.Run("without a word", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		job := h.awaitEnd(h.create(behaviour{Silent: true}).ID, finetune.Failed)
		if !strings.Contains(job.Error.Message, "without saying that it was done") {
			t.Errorf("error %+v", job.Error)
		}
	})
	t.Run("after a wrong adapter", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		job := h.awaitEnd(h.create(behaviour{Steps: 2, WrongAdapter: true}).ID, finetune.Failed)
		if !strings.Contains(job.Error.Message, "the trainer wrote adapter") || len(h.registry.List()) != 0 {
			t.Errorf("error %+v, adapters %v", job.Error, h.registry.List())
		}
	})
}

func (h *home) killTrainer(id string, attempt int) {
	h.t.Helper()
	data, err := os.ReadFile(filepath.Join(h.dir, "jobs", id, fmt.Sprintf("a%d", attempt), "pid.log"))
	if err != nil {
		h.t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(data))
	if err != nil {
		h.t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		h.t.Fatal(err)
	}
}

// awaitMessages waits for n events that begin with prefix.
func (h *home) awaitMessages(id, prefix string, n int) {
	h.t.Helper()
	h.await(id, fmt.Sprintf("%d events %q", n, prefix), func(*finetune.Job) bool {
		found := 0
		for _, m := range h.messages(id) {
			if strings.HasPrefix(m, prefix) {
				found++
			}
		}
		return found >= n
	})
}

func TestCancel(t *testing.T) {
	t.Parallel()
	slow := behaviour{Steps: 1000, Delay: 50 * time.Millisecond}
	cancel := func(t *testing.T, h *home, id string) {
		t.Helper()
		start := time.Now()
		job, err := h.jobs.Cancel(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); job.Status != finetune.Cancelled || job.FinishedAt == 0 || took > 2*time.Second {
			t.Errorf("cancelled job is %s after %v", job.Status, took)
		}
		if messages := h.messages(id); messages[len(messages)-1] != "The job was cancelled" {
			t.Errorf("last event %q", messages[len(messages)-1])
		}
		var conflict *finetune.ConflictError
		if _, err := h.jobs.Cancel(t.Context(), id); !errors.As(err, &conflict) || conflict.Status != finetune.Cancelled {
			t.Errorf("cancelled again: %v", err)
		}
	}
	running := func(t *testing.T, h *home, b behaviour) string {
		t.Helper()
		return h.await(h.create(b).ID, "step 2", func(job *finetune.Job) bool { return job.Progress.Step >= 2 }).ID
	}
	t.Run("running", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		id := running(t, h, slow)
		cancel(t, h, id)
		h.awaitGone(id, 1)
	})
	t.Run("running, with a trainer that does not listen", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		deaf := slow
		deaf.Deaf = true
		id := running(t, h, deaf)
		cancel(t, h, id)
		h.awaitGone(id, 1)
	})
	t.Run("queued", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		first := running(t, h, slow)
		second := h.awaitStatus(h.create(slow).ID, finetune.Queued)
		if messages := h.messages(second.ID); messages[len(messages)-1] != "Waiting for its turn: jobs ahead in the queue: 1" {
			t.Errorf("last event %q", messages[len(messages)-1])
		}
		cancel(t, h, second.ID)
		cancel(t, h, first)
	})
	t.Run("validating", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		file := h.upload(strings.Repeat(goodRow, 200_000))
		job := h.createSpec(finetune.Spec{Model: "base", TrainingFile: file, Options: slow.options()})
		cancel(t, h, job.ID)
		if job := h.get(job.ID); job.Attempt != 0 {
			t.Errorf("a cancelled job was started: %+v", job)
		}
	})
	t.Run("finished", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		job := h.awaitEnd(h.create(behaviour{Steps: 2}).ID, finetune.Succeeded)
		var conflict *finetune.ConflictError
		if _, err := h.jobs.Cancel(t.Context(), job.ID); !errors.As(err, &conflict) || conflict.Status != finetune.Succeeded {
			t.Errorf("Cancel = %v", err)
		}
	})
	t.Run("unknown", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		if _, err := h.jobs.Cancel(t.Context(), "ftjob-x"); !errors.Is(err, finetune.ErrNotFound) {
			t.Errorf("Cancel = %v", err)
		}
	})
	// Wherever in its life a job is cancelled, it ends in one state, and there is an adapter if and only if it succeeded.
	t.Run("at any time", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		ends := map[finetune.Status]int{}
		for i := range 25 {
			job := h.create(behaviour{Steps: 4})
			time.Sleep(time.Duration(i) * 3 * time.Millisecond)
			_, err := h.jobs.Cancel(t.Context(), job.ID)
			var conflict *finetune.ConflictError
			if err != nil && !errors.As(err, &conflict) {
				t.Fatal(err)
			}
			job = h.get(job.ID)
			ends[job.Status]++
			found := slices.ContainsFunc(h.registry.List(), func(a adapters.Adapter) bool { return a.JobID == job.ID })
			if found != (job.Status == finetune.Succeeded) || !job.Status.Final() || (err != nil) != (job.Status == finetune.Succeeded) {
				t.Errorf("job ended %s, Cancel = %v, adapter there: %v", job.Status, err, found)
			}
		}
		t.Log(ends)
	})
}

func TestJobsWaitForEachOther(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	first := h.create(behaviour{Steps: 6, Delay: 20 * time.Millisecond})
	second := h.create(behaviour{Steps: 2})
	third := h.create(behaviour{Steps: 2})
	for job := third; !job.Status.Final(); job = h.get(third.ID) {
		jobs, _, err := h.jobs.List(t.Context(), finetune.Query{})
		if err != nil {
			t.Fatal(err)
		}
		running := 0
		for _, job := range jobs {
			if job.Status == finetune.Running {
				running++
			}
		}
		if running > 1 {
			t.Errorf("%d jobs run at once", running)
		}
		time.Sleep(2 * time.Millisecond)
	}
	for _, id := range []string{first.ID, second.ID, third.ID} {
		h.awaitEnd(id, finetune.Succeeded)
	}
	jobs, more, err := h.jobs.List(t.Context(), finetune.Query{Limit: 2})
	if err != nil || !more || jobs[0].ID != third.ID || jobs[1].ID != second.ID {
		t.Errorf("first page %v, more %v, %v", jobs, more, err)
	}
	jobs, more, err = h.jobs.List(t.Context(), finetune.Query{After: second.ID, Limit: 2})
	if err != nil || more || len(jobs) != 1 || jobs[0].ID != first.ID {
		t.Errorf("second page %v, more %v, %v", jobs, more, err)
	}
	var bad *finetune.InvalidError
	if _, _, err := h.jobs.List(t.Context(), finetune.Query{After: "ftjob-x", Limit: 2}); !errors.As(err, &bad) || bad.Param != "after" {
		t.Errorf("unknown cursor: %v", err)
	}
}

func TestServerStops(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	running := h.create(behaviour{Steps: 9, Delay: 30 * time.Millisecond})
	queued := h.create(behaviour{Steps: 2})
	before := h.await(running.ID, "step 3", func(job *finetune.Job) bool { return job.Progress.Step >= 3 })
	if before.EstimatedFinish == 0 || before.Progress.TokensPerSecond != 100 || before.Progress.TotalSteps != 9 {
		t.Errorf("running job: %+v", before)
	}
	if err := h.close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.jobs.Stop(t.Context()); err != nil {
		t.Errorf("stopped again: %v", err)
	}
	h.open()
	job := h.awaitEnd(running.ID, finetune.Succeeded)
	messages := h.messages(job.ID)
	paused := slices.IndexFunc(messages, func(m string) bool { return strings.HasPrefix(m, "Fine-tuning job paused") })
	resumed := slices.IndexFunc(messages, func(m string) bool { return strings.HasPrefix(m, "Resuming from step ") })
	if job.Attempt != 2 || paused < 0 || resumed < paused {
		t.Errorf("attempt %d, events\n%s", job.Attempt, strings.Join(messages, "\n"))
	}
	if step := strings.TrimPrefix(messages[resumed], "Resuming from step "); step < "3" {
		t.Errorf("resumed from step %s; the trainer was to save where it was", step)
	}
	h.awaitEnd(queued.ID, finetune.Succeeded)
}

// A trainer that does not save its state in time is killed when Stop's context ends, and the job goes on all the same.
func TestServerStopsWithoutPatience(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	job := h.create(behaviour{Steps: 8, Delay: 50 * time.Millisecond, Deaf: true})
	h.await(job.ID, "step 3", func(job *finetune.Job) bool { return job.Progress.Step >= 3 })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := h.jobs.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Stop = %v", err)
	}
	if err := h.close(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.open()
	h.awaitEnd(job.ID, finetune.Succeeded)
	h.awaitMessages(job.ID, "Resuming from step", 1)
}

// A server that is killed in the middle of a job leaves no process, and the next one goes on with the job.
func TestServerKilled(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	command := exec.CommandContext(t.Context(), os.Args[0])
	command.Env = append(os.Environ(), "FINETUNE_TEST_SERVER="+dir)
	command.Stderr = os.Stderr
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	var pidFile string
	deadline := time.Now().Add(20 * time.Second)
	for {
		states, err := filepath.Glob(filepath.Join(dir, "jobs", "*", "a1", resumeFile))
		if err != nil {
			t.Fatal(err)
		}
		if len(states) == 1 {
			pidFile = filepath.Join(filepath.Dir(states[0]), "pid.log")
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the server did not get to a resume state")
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err := command.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = command.Wait() // it was killed

	h := &home{t: t, dir: dir}
	h.open()
	defer func() {
		if err := h.close(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	jobs, _, err := h.jobs.List(t.Context(), finetune.Query{})
	if err != nil || len(jobs) != 1 {
		t.Fatalf("jobs %v, %v", jobs, err)
	}
	job := h.awaitEnd(jobs[0].ID, finetune.Succeeded)
	if messages := h.messages(job.ID); job.Attempt != 2 || !slices.Contains(messages, "Resuming from step 2") {
		t.Errorf("attempt %d, events\n%s", job.Attempt, strings.Join(messages, "\n"))
	}
	data, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(data))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, 0); err == nil {
		// An orphan that nobody reaps stays as a zombie where process 1 does not wait for it.
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err == nil && !strings.Contains(string(status), "State:\tZ") {
			t.Errorf("the killed server's trainer still runs:\n%s", status)
		}
	}
}

// An attempt whose lease another process took writes nothing more, and its trainer ends.
func TestLeaseLost(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	job := h.create(behaviour{Steps: 1000, Delay: 10 * time.Millisecond})
	h.await(job.ID, "step 2", func(job *finetune.Job) bool { return job.Progress.Step >= 2 })
	if err := h.store.Reclaim(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err := h.store.Claim(t.Context(), "another", time.Hour, func(job *store.Job) ([]store.Event, error) { return nil, nil })
	if err != nil {
		t.Fatal(err)
	}
	step := h.get(job.ID).Progress.Step
	data, err := os.ReadFile(filepath.Join(h.dir, "jobs", job.ID, "a1", "pid.log"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(data))
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); syscall.Kill(pid, 0) == nil; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the trainer still runs")
		}
	}
	row, err := h.store.Job(t.Context(), job.ID)
	if err != nil || row.Step > step || row.Attempt != 2 || row.Status != "running" {
		t.Errorf("row %+v, %v; want step %d, attempt 2, running", row, err, step)
	}
}

// When the state cannot be written, the trainer does not train on.
func TestStateCannotBeWritten(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	job := h.create(behaviour{Steps: 1000, Delay: 10 * time.Millisecond})
	h.await(job.ID, "step 2", func(job *finetune.Job) bool { return job.Progress.Step >= 2 })
	data, err := os.ReadFile(filepath.Join(h.dir, "jobs", job.ID, "a1", "pid.log"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(data))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.store.Close(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); syscall.Kill(pid, 0) == nil; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the trainer still runs")
		}
	}
	if err := h.close(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.open() // the disk is well again
	h.await(job.ID, "attempt 2", func(job *finetune.Job) bool { return job.Attempt >= 2 && job.Progress.Step >= 2 })
	h.awaitMessages(job.ID, "Resuming from step", 1)
}

func TestInvalidFiles(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	bad := h.upload(goodRow + "{\n" + goodRow)
	job := h.awaitEnd(h.createSpec(finetune.Spec{Model: "base", TrainingFile: bad}).ID, finetune.Failed)
	if e := job.Error; e.Code != "invalid_training_file" || e.Param != "training_file" || !strings.Contains(e.Message, "line 2: not valid JSON") {
		t.Errorf("training file: %+v", e)
	}
	if messages := h.messages(job.ID); !strings.Contains(messages[len(messages)-1], "line 2: not valid JSON") {
		t.Errorf("last event %q", messages[len(messages)-1])
	}
	if len(job.ResultFiles) != 1 {
		t.Fatalf("result files %v", job.ResultFiles)
	}
	_, content, err := h.store.OpenFile(t.Context(), job.ResultFiles[0])
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	var report finetune.Report
	if err := json.NewDecoder(content).Decode(&report); err != nil || report.Valid || report.Training.ID != bad || report.Training.Rows != 2 || report.Training.BadLines != 1 ||
		report.Training.Errors[0].Line != 2 || report.Validation != nil {
		t.Errorf("report %+v, %v", report, err)
	}
	job = h.awaitEnd(h.createSpec(finetune.Spec{Model: "base", TrainingFile: h.upload(goodRow), ValidationFile: bad}).ID, finetune.Failed)
	if e := job.Error; e.Code != "invalid_validation_file" || e.Param != "validation_file" || job.Attempt != 0 {
		t.Errorf("validation file: %+v", e)
	}
}

func TestCreateRefuses(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	good, empty := h.upload(goodRow), h.upload("")
	other, err := h.store.CreateFile(t.Context(), "a", "batch", strings.NewReader(goodRow))
	if err != nil {
		t.Fatal(err)
	}
	n := func(v int) *int { return &v }
	f := func(v float64) *float64 { return &v }
	long := map[string]string{}
	for i := range 17 {
		long[strconv.Itoa(i)] = ""
	}
	seed := int64(-1)
	for _, test := range []struct {
		param string
		edit  func(s *finetune.Spec)
	}{
		{"model", func(s *finetune.Spec) { s.Model = "" }},
		{"model", func(s *finetune.Spec) { s.Model = "gpt-4o-mini" }},
		{"model", func(s *finetune.Spec) { s.Model = "ft:base:local::x" }},
		{"training_file", func(s *finetune.Spec) { s.TrainingFile = "" }},
		{"training_file", func(s *finetune.Spec) { s.TrainingFile = "file-x" }},
		{"training_file", func(s *finetune.Spec) { s.TrainingFile = empty }},
		{"training_file", func(s *finetune.Spec) { s.TrainingFile = other.ID }},
		{"validation_file", func(s *finetune.Spec) { s.ValidationFile = "../../etc/passwd" }},
		{"method.type", func(s *finetune.Spec) { s.MethodType = "reinforcement" }},
		{"hyperparameters.beta", func(s *finetune.Spec) { s.Requested.Beta = f(0) }},
		{"suffix", func(s *finetune.Spec) { s.Suffix = strings.Repeat("x", 65) }},
		{"seed", func(s *finetune.Spec) { s.Seed = &seed }},
		{"metadata", func(s *finetune.Spec) { s.Metadata = long }},
		{"hyperparameters.n_epochs", func(s *finetune.Spec) { s.Requested.NEpochs = n(0) }},
		{"hyperparameters.batch_size", func(s *finetune.Spec) { s.Requested.BatchSize = n(257) }},
		{"hyperparameters.learning_rate_multiplier", func(s *finetune.Spec) { s.Requested.LearningRateMultiplier = f(0) }},
		{"hone.num_train_epochs", func(s *finetune.Spec) { s.Requested.NEpochs, s.Options.NumTrainEpochs = n(3), n(4) }},
		{"hone.learning_rate", func(s *finetune.Spec) {
			s.Requested.LearningRateMultiplier, s.Options.LearningRate = f(2), f(1e-3)
		}},
		{"hone.r", func(s *finetune.Spec) { s.Options.R = n(0) }},
		{"hone.lora_dropout", func(s *finetune.Spec) { s.Options.LoraDropout = f(1) }},
		{"hone.target_modules", func(s *finetune.Spec) { s.Options.TargetModules = []string{"lm_head"} }},
		{"hone.lr_scheduler_type", func(s *finetune.Spec) { text := "step"; s.Options.LRSchedulerType = &text }},
	} {
		spec := finetune.Spec{Model: "base", TrainingFile: good}
		test.edit(&spec)
		_, err := h.jobs.Create(t.Context(), spec)
		var bad *finetune.InvalidError
		if !errors.As(err, &bad) || bad.Param != test.param {
			t.Errorf("%+v: %v; want *InvalidError of %s", spec, err, test.param)
		}
	}
	if jobs, _, err := h.jobs.List(t.Context(), finetune.Query{}); err != nil || len(jobs) != 0 {
		t.Errorf("jobs %v, %v; want none", jobs, err)
	}
}
