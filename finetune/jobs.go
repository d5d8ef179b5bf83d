package finetune

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/durable"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/store"
)

// Models resolves the base models that jobs name.
type Models interface {
	// Base returns the directory of a base model and the sha256 of its base.gguf, in hex. For a name that it does not know,
	// the error is ErrUnknownModel.
	Base(ctx context.Context, name string) (dir, digest string, err error)
}

// Adapters takes up what jobs make. *adapters.Registry is one.
type Adapters interface {
	Publish(ctx context.Context, dir string) (adapters.Adapter, error)
	Import(ctx context.Context, dir string) (adapters.Adapter, error)
	List() []adapters.Adapter
	Lookup(name string) (adapters.Adapter, error)
	Delete(ctx context.Context, name string) error
}

// Trainer is a running trainer process.
type Trainer interface {
	// Events carries what the trainer reports; it is closed when the trainer's output ends.
	Events() <-chan child.TrainerEvent
	// Stop asks the trainer to save its state and end. It does not wait.
	Stop() error
	// Kill ends the trainer now. It may be called at any time, and again.
	Kill()
	// Wait returns once the process has ended and everything of it is gone; the error says how it ended if not with code 0.
	Wait() error
}

// queue hands out jobs to run, each to one owner at a time. *store.Store is the one of a single machine.
type queue interface {
	Claim(ctx context.Context, owner string, ttl time.Duration, change func(*store.Job) ([]store.Event, error)) (store.Job, error)
	Heartbeat(ctx context.Context, jobID, owner string, attempt int, ttl time.Duration) error
	Release(ctx context.Context, jobID, owner string, attempt int) error
	Reclaim(ctx context.Context) error
}

// Options of New.
type Options struct {
	Store    *store.Store
	Models   Models
	Adapters Adapters
	// Start starts a trainer. The context is never cancelled: the trainer is ended by Stop and Kill.
	Start func(ctx context.Context, config child.TrainerConfig) (Trainer, error)
	// Trainable says why a base model in this directory cannot be trained, so that a job for it is refused at once. If it is nil, the
	// trainer says so.
	Trainable func(dir string) error

	Dir    string           // jobs/ of the data directory, in the file system of the adapters
	Logger *slog.Logger     // default: discards
	Now    func() time.Time // default: time.Now

	Threads     int           // of the trainer; 0 means all cores
	Device      string        // auto, cpu or cuda, for jobs that do not say; "" means auto
	MemoryBytes int64         // that a trainer may take; 0: what is free
	CacheDir    string        // of tokenized files; "": each attempt makes its own
	MaxFailures int           // attempts in a row that get no further, after which a job fails; default 3
	RetryDelay  time.Duration // before the second attempt, then doubled; default 1 s
	CancelGrace time.Duration // from asking a cancelled job's trainer to end until killing it; default 1 s
	StopGrace   time.Duration // the same when the server stops; default 20 s
	Heartbeat   time.Duration // default 5 s; a lease lasts four of them

	// FreeBytes is the space that is left in the file system of a directory; default durable.FreeBytes.
	FreeBytes func(dir string) (int64, error)
	Retention Retention
}

// Jobs is the set of fine-tuning jobs, and what runs them. Its methods may be called from any goroutine.
type Jobs struct {
	opts  Options
	queue queue
	owner string // of leases: this process

	wakeDispatch chan struct{}
	wakeValidate chan struct{}
	hard         chan struct{} // closed when Stop has no patience left
	hardOnce     sync.Once

	mu      sync.Mutex
	stop    context.CancelCauseFunc // nil before Start
	stopped bool
	done    sync.WaitGroup
	live    map[string]*run // by job id: what works on a job now
	// unwritten is why the state of a job could not be written, until it can.
	unwritten map[string]error

	dryRuns chan struct{} // holds a token while one runs
}

// run is work on one job in this process: a validation, or attempts.
type run struct {
	cancel context.CancelCauseFunc
	ended  chan struct{}
	// counted is up to when the row has the time of the attempt. Only the goroutine that follows the trainer uses it.
	counted time.Time

	mu       sync.Mutex
	pid      int                // of the trainer, 0 while there is none
	progress child.TrainerEvent // the newest of type progress
	at       time.Time
}

// New returns jobs that are not running yet. They can be created and listed before Start.
func New(opts Options) *Jobs {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	opts.MaxFailures = cmp.Or(opts.MaxFailures, 3)
	opts.RetryDelay = cmp.Or(opts.RetryDelay, time.Second)
	opts.CancelGrace = cmp.Or(opts.CancelGrace, time.Second)
	opts.StopGrace = cmp.Or(opts.StopGrace, 20*time.Second)
	opts.Heartbeat = cmp.Or(opts.Heartbeat, 5*time.Second)
	if opts.FreeBytes == nil {
		opts.FreeBytes = durable.FreeBytes
	}
	return &Jobs{
		opts: opts, queue: opts.Store, owner: store.NewID("", 16), live: map[string]*run{}, unwritten: map[string]error{},
		wakeDispatch: make(chan struct{}, 1), wakeValidate: make(chan struct{}, 1), hard: make(chan struct{}), dryRuns: make(chan struct{}, 1),
	}
}

// Start takes over the jobs of the data directory, whose lock the caller holds: those that were running go on. It returns
// once that is under way; ctx is for the start only.
func (j *Jobs) Start(ctx context.Context) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.stop != nil || j.stopped {
		return errors.New("start jobs: started or stopped before")
	}
	if err := os.MkdirAll(j.opts.Dir, 0o700); err != nil {
		return fmt.Errorf("start jobs: %w", err)
	}
	if err := j.queue.Reclaim(ctx); err != nil {
		return fmt.Errorf("start jobs: %w", err)
	}
	if err := errors.Join(j.sweepDryRuns(), j.sweep(ctx)); err != nil {
		return fmt.Errorf("start jobs: %w", err)
	}
	if err := j.park(ctx); err != nil {
		return fmt.Errorf("start jobs: %w", err)
	}
	life, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	j.stop = stop
	j.done.Go(func() { j.dispatch(life) })
	j.done.Go(func() { j.validateAll(life) })
	j.done.Go(func() { j.retainAll(life) })
	return nil
}

// Stop ends the work: the running trainer is asked to save its state, and its job goes on after the next Start. When ctx
// ends first, the trainer is killed, and the job goes on from an older state. Stop returns when nothing runs any more; it may
// be called twice, and before Start.
func (j *Jobs) Stop(ctx context.Context) error {
	j.mu.Lock()
	j.stopped = true
	stop := j.stop
	j.mu.Unlock()
	if stop == nil {
		return nil
	}
	stop(ErrStopping)
	ended := make(chan struct{})
	go func() {
		j.done.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		j.hardOnce.Do(func() { close(j.hard) })
		<-ended
		return fmt.Errorf("stop jobs: the trainer was killed: %w", context.Cause(ctx))
	}
}

// Create adds a job. It returns *InvalidError for a request that cannot work: options out of range, an unknown model or
// file, a file of another purpose. What is in the files is looked at later, in state validating_files.
func (j *Jobs) Create(ctx context.Context, spec Spec) (*Job, error) {
	row, err := j.prepare(ctx, spec)
	if err != nil {
		return nil, err
	}
	validating := "Validating training file: " + row.TrainingFile
	if row.ValidationFile != "" {
		validating += " and validation file: " + row.ValidationFile
	}
	events := []store.Event{message("info", "Created fine-tuning job: %s", row.ID), message("info", "%s", validating)}
	if row.StartAdapter != "" {
		events = append(events, message("info", "Going on from %s", row.StartAdapter))
	}
	if err := j.opts.Store.CreateJob(ctx, row, events...); err != nil {
		return nil, err
	}
	wake(j.wakeValidate)
	return j.job(row)
}

// prepare returns the row of a job that could be created. Errors are those of Create.
func (j *Jobs) prepare(ctx context.Context, spec Spec) (store.Job, error) {
	spec.MethodType = cmp.Or(spec.MethodType, Supervised)
	if err := spec.check(); err != nil {
		return store.Job{}, err
	}
	base, start := spec.Model, ""
	var from adapters.Adapter
	if strings.HasPrefix(spec.Model, "ft:") {
		var err error
		from, err = j.opts.Adapters.Lookup(spec.Model)
		if errors.Is(err, adapters.ErrNotFound) {
			return store.Job{}, invalid("model", "model_not_found", "model %q does not exist; GET /v1/models lists the models", spec.Model)
		}
		if err != nil {
			return store.Job{}, err
		}
		settings, err := lora.ReadSettings(from.Dir)
		if err != nil {
			return store.Job{}, fmt.Errorf("go on from %q: %w", from.Name, err)
		}
		if err := checkShape(&spec.Options, from.Name, settings); err != nil {
			return store.Job{}, err
		}
		base, start = from.BaseModel, from.Name
	}
	dir, digest, err := j.opts.Models.Base(ctx, base)
	switch {
	case errors.Is(err, ErrUnknownModel) && start != "":
		return store.Job{}, invalid("model", "base_model_missing", "the base model %s of %s is not here any more; add it again", base, start)
	case errors.Is(err, ErrUnknownModel):
		return store.Job{}, invalid("model", "model_not_found", "model %q does not exist; GET /v1/models lists the models", spec.Model)
	case err != nil:
		return store.Job{}, fmt.Errorf("base model %q: %w", base, err)
	}
	if j.opts.Trainable != nil {
		if err := j.opts.Trainable(dir); err != nil {
			return store.Job{}, invalid("model", child.CodeInvalidModel, "%s: %v", base, err)
		}
	}
	if start != "" {
		if err := from.CheckBase(digest); err != nil {
			return store.Job{}, err
		}
	}
	if err := j.checkFile(ctx, "training_file", spec.TrainingFile); err != nil {
		return store.Job{}, err
	}
	if spec.ValidationFile != "" {
		if err := j.checkFile(ctx, "validation_file", spec.ValidationFile); err != nil {
			return store.Job{}, err
		}
	}
	row := store.Job{
		ID: store.NewJobID(), CreatedAt: j.opts.Now().Unix(), Status: string(ValidatingFiles), Model: base, BaseDigest: digest, StartAdapter: start,
		TrainingFile: spec.TrainingFile, ValidationFile: spec.ValidationFile, Suffix: spec.Suffix, Method: spec.MethodType,
		Metadata: spec.Metadata, AdapterID: store.NewID("", 8),
	}
	row.AdapterName = adapters.Name(base, spec.Suffix, row.AdapterID)
	if spec.Seed != nil {
		row.Seed = *spec.Seed
	} else {
		row.Seed = int64(rand.Int32())
	}
	if row.Requested, err = json.Marshal(spec.Requested); err != nil {
		return store.Job{}, fmt.Errorf("create job: %w", err)
	}
	if row.Options, err = json.Marshal(spec.Options); err != nil {
		return store.Job{}, fmt.Errorf("create job: %w", err)
	}
	return row, nil
}

// checkFile checks that a job can read the file.
func (j *Jobs) checkFile(ctx context.Context, param, id string) error {
	file, err := j.opts.Store.File(ctx, id)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return invalid(param, "file_not_found", "%s %q does not exist; GET /v1/files lists the files", param, id)
	case err != nil:
		return err
	case file.Purpose != "fine-tune":
		return invalid(param, "invalid_file_purpose", "%s %q has purpose %q; expected a file with purpose \"fine-tune\"", param, id, file.Purpose)
	case file.Bytes == 0:
		return invalid(param, "invalid_"+param, "%s %q is empty; expected a row a line", param, id)
	}
	return nil
}

// Get returns a job, or ErrNotFound.
func (j *Jobs) Get(ctx context.Context, id string) (*Job, error) {
	row, err := j.opts.Store.Job(ctx, id)
	if err != nil {
		return nil, notFound(id, err)
	}
	return j.job(row)
}

// Query selects jobs.
type Query struct {
	After      string            // the id that the page before ended with, or ""
	Limit      int               // 0 means 20; at most 1000
	Metadata   map[string]string // pairs that a job must have
	NoMetadata bool              // only jobs without metadata
}

// List returns a page of jobs, newest first, and whether there are more. An unknown q.After is an *InvalidError.
func (j *Jobs) List(ctx context.Context, q Query) (jobs []Job, more bool, err error) {
	rows, more, err := j.opts.Store.Jobs(ctx, store.JobQuery{After: q.After, Limit: pageSize(q.Limit), Metadata: q.Metadata, NoMetadata: q.NoMetadata})
	if err != nil {
		return nil, false, badCursor(q.After, err)
	}
	jobs = make([]Job, 0, len(rows))
	for _, row := range rows {
		job, err := j.job(row)
		if err != nil {
			return nil, false, err
		}
		jobs = append(jobs, *job)
	}
	return jobs, more, nil
}

// Events returns a page of a job's events, newest first, and whether there are more. After and limit are as in Query.
func (j *Jobs) Events(ctx context.Context, id, after string, limit int) (events []Event, more bool, err error) {
	if _, err := j.opts.Store.Job(ctx, id); err != nil {
		return nil, false, notFound(id, err)
	}
	rows, more, err := j.opts.Store.Events(ctx, id, after, pageSize(limit))
	if err != nil {
		return nil, false, badCursor(after, err)
	}
	events = make([]Event, 0, len(rows))
	for _, e := range rows {
		events = append(events, Event{ID: e.ID, CreatedAt: e.CreatedAt, Level: e.Level, Message: e.Message, Type: e.Type, Data: e.Data})
	}
	return events, more, nil
}

// Unfinished returns the ids of the unfinished jobs of a base model, the running one first.
func (j *Jobs) Unfinished(ctx context.Context, base string) (ids []string, err error) {
	for _, status := range []Status{Running, Queued, ValidatingFiles} {
		rows, err := j.opts.Store.JobsWithStatus(ctx, string(status))
		if err != nil {
			return nil, err
		}
		for _, row := range rows {
			if row.Model == base {
				ids = append(ids, row.ID)
			}
		}
	}
	return ids, nil
}

// Cancel ends a job, and returns it once nothing of it runs any more. Of a job in a final state it returns *ConflictError.
func (j *Jobs) Cancel(ctx context.Context, id string) (*Job, error) {
	row, err := j.opts.Store.UpdateJob(ctx, store.JobUpdate{
		ID: id, Attempt: store.AnyAttempt, Change: j.move(Cancelled),
		Events: []store.Event{message("info", "The job was cancelled")},
	})
	if errors.Is(err, store.ErrStale) {
		return nil, j.conflict(ctx, id, "cancelled")
	}
	if err != nil {
		return nil, notFound(id, err)
	}
	// From here on every write of the attempt is refused; what is left is to end its process.
	j.mu.Lock()
	working := j.live[id]
	j.mu.Unlock()
	if working != nil {
		working.cancel(ErrCancelled)
		select {
		case <-working.ended:
		case <-ctx.Done():
			return nil, fmt.Errorf("cancel job %s: its trainer is still ending: %w", id, context.Cause(ctx))
		}
	}
	j.clear(id)
	return j.job(row)
}

// move returns a change of the row to the next state. A move that the state machine does not have is our own bug.
func (j *Jobs) move(to Status) func(*store.Job) error {
	return func(row *store.Job) error {
		if !slices.Contains(moves[Status(row.Status)], to) {
			return fmt.Errorf("job %s cannot go from %s to %s", row.ID, row.Status, to)
		}
		row.Status = string(to)
		if to.Final() {
			row.FinishedAt = max(row.CreatedAt, j.opts.Now().Unix()) // the clock may have been set back
		}
		return nil
	}
}

// job joins a row with what is known of its running attempt.
func (j *Jobs) job(row store.Job) (*Job, error) {
	job := &Job{
		ID: row.ID, CreatedAt: row.CreatedAt, FinishedAt: row.FinishedAt, Model: row.Model, StartAdapter: row.StartAdapter, FineTunedModel: row.FineTunedModel,
		Status: Status(row.Status), MethodType: row.Method, Seed: row.Seed, TrainingFile: row.TrainingFile, ValidationFile: row.ValidationFile,
		ResultFiles: row.ResultFiles, TrainedTokens: row.TrainedTokens, Metadata: row.Metadata, Suffix: row.Suffix, Attempt: row.Attempt,
		Paused: row.Paused, RunSeconds: row.RunSeconds,
		Progress: Progress{
			Step: row.Step, TotalSteps: row.TotalSteps, TrainLoss: row.TrainLoss, ValidLoss: row.ValidLoss, ValidAccuracy: row.ValidAccuracy,
			ValidChoiceAccuracy: row.ValidChoiceAccuracy,
		},
	}
	if job.ResultFiles == nil {
		job.ResultFiles = []string{}
	}
	if err := json.Unmarshal(row.Requested, &job.Requested); err != nil {
		return nil, fmt.Errorf("job %s: hyperparameters: %w", row.ID, err)
	}
	if err := json.Unmarshal(row.Options, &job.Options); err != nil {
		return nil, fmt.Errorf("job %s: options: %w", row.ID, err)
	}
	job.Hyperparameters = job.Requested
	if row.Plan != nil {
		job.Plan = &child.TrainPlan{}
		if err := json.Unmarshal(row.Plan, job.Plan); err != nil {
			return nil, fmt.Errorf("job %s: plan: %w", row.ID, err)
		}
		job.Hyperparameters = Hyperparameters{
			NEpochs: &job.Plan.NumTrainEpochs, BatchSize: &job.Plan.BatchSize, LearningRateMultiplier: &job.Plan.LearningRateMultiplier,
		}
		if row.Method == DPO {
			job.Hyperparameters.Beta = &job.Plan.Beta
		}
	}
	if job.Status == Failed {
		job.Error = &JobError{Code: row.ErrorCode, Message: row.ErrorMessage, Param: row.ErrorParam}
	}
	j.mu.Lock()
	working, unwritten := j.live[row.ID], j.unwritten[row.ID]
	j.mu.Unlock()
	if durable.DiskFull(unwritten) && !job.Status.Final() && job.Paused == "" {
		job.Paused = PausedForSpace // which the row cannot say
	}
	if job.Status == Running && working != nil {
		working.mu.Lock()
		p, at := working.progress, working.at
		working.mu.Unlock()
		if p.Type != "" {
			job.Progress.Step, job.Progress.Fraction = p.Step, p.Fraction
			job.Progress.TotalSteps = cmp.Or(p.TotalSteps, job.Progress.TotalSteps)
			job.Progress.TokensPerSecond, job.Progress.SecondsLeft = p.TokensPerSecond, p.SecondsLeft
			if p.SecondsLeft > 0 {
				finish := at.Add(time.Duration(p.SecondsLeft * float64(time.Second)))
				if now := j.opts.Now(); finish.Before(now) { // a trainer that makes way for requests reports less often
					finish = now
				}
				job.EstimatedFinish = finish.Unix()
			}
		}
	}
	return job, nil
}

// dir is a job's directory; id comes from a row.
func (j *Jobs) dir(id string) string { return filepath.Join(j.opts.Dir, id) }

// sweepDryRuns removes what dry runs of a killed server have left. None may be running.
func (j *Jobs) sweepDryRuns() error {
	left, err := filepath.Glob(filepath.Join(j.opts.Dir, dryRunPrefix+"*"))
	for _, dir := range left {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

// sweep removes the resume states of finished jobs, which a killed server may have left or which were kept for a time.
func (j *Jobs) sweep(ctx context.Context) error {
	dirs, err := os.ReadDir(j.opts.Dir)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if strings.HasPrefix(dir.Name(), dryRunPrefix) {
			continue
		}
		row, err := j.opts.Store.Job(ctx, dir.Name())
		if errors.Is(err, store.ErrNotFound) {
			j.opts.Logger.Warn("left a directory alone that belongs to no job", "dir", j.dir(dir.Name()))
			continue
		}
		if err != nil {
			return err
		}
		if Status(row.Status).Final() {
			j.clear(row.ID)
		}
	}
	return nil
}

// clear removes everything of a finished job but its logs, unless Retention keeps its resume states. What cannot be removed is
// tried again at the next start.
func (j *Jobs) clear(id string) {
	if keep := j.opts.Retention.ResumeStates; keep > 0 {
		row, err := j.opts.Store.Job(context.Background(), id)
		if err == nil && Status(row.Status) != Succeeded && j.opts.Now().Sub(time.Unix(row.FinishedAt, 0)) < keep {
			return
		}
	}
	err := filepath.WalkDir(j.dir(id), func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || entry.IsDir() || entry.Name() == "log" || strings.HasSuffix(entry.Name(), ".log") {
			return err
		}
		return os.Remove(path) // #nosec G122 -- in a directory that only the server and its trainer may write
	})
	if err != nil {
		j.opts.Logger.Error("remove the resume states of a finished job", "job_id", id, "error", err)
	}
}

func pageSize(limit int) int {
	if limit <= 0 {
		return 20
	}
	return min(limit, 1000)
}

func notFound(id string, err error) error {
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("%w: %q", ErrNotFound, id)
	}
	return err
}

func badCursor(after string, err error) error {
	if errors.Is(err, store.ErrNotFound) {
		return invalid("after", "", "after %q is not an id of this list", after)
	}
	return err
}

// wake makes the loop that waits on c look again; a loop that is busy looks again when it is done.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
