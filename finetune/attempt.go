package finetune

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/durable"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/store"
)

var (
	errLeaseLost = errors.New("another process took the job over")
	// errWrite ends an attempt whose state could not be written: training on would only lose more.
	errWrite = errors.New("the job's state cannot be written")
)

// dispatch runs jobs, one at a time, until the context ends. With nothing to do, it looks at every heartbeat for leases that
// have expired, and for room on the disk, which nobody wakes it for.
func (j *Jobs) dispatch(ctx context.Context) {
	for ctx.Err() == nil {
		row, err := j.queue.Claim(ctx, j.owner, 4*j.opts.Heartbeat, j.claimed)
		switch {
		case err == nil:
			j.run(ctx, row)
		case errors.Is(err, store.ErrNotFound):
			if j.resumeForSpace(ctx) {
				continue
			}
			select {
			case <-ctx.Done():
			case <-j.wakeDispatch:
			case <-time.After(j.opts.Heartbeat):
			}
		case ctx.Err() == nil:
			j.opts.Logger.Error("claim a job", "error", err)
			wait := j.opts.RetryDelay
			if durable.DiskFull(err) {
				wait *= 5
			}
			sleep(ctx, wait)
		}
	}
}

// claimed is the change of a row that was claimed.
func (j *Jobs) claimed(row *store.Job) ([]store.Event, error) {
	if err := j.move(Running)(row); err != nil {
		return nil, err
	}
	j.mu.Lock()
	unwritten := j.unwritten[row.ID]
	j.mu.Unlock()
	if unwritten != nil {
		return []store.Event{message("warn", "Fine-tuning job interrupted: %v. It goes on now", unwritten)}, nil
	}
	if row.Attempt > 1 {
		return nil, nil // the plan will say where it goes on
	}
	return []store.Event{message("info", "Fine-tuning job started")}, nil
}

// run makes one attempt at a claimed job and writes down how it ended. When it returns, nothing of the attempt runs any
// more; a job that is to be tried again can be claimed.
func (j *Jobs) run(ctx context.Context, row store.Job) {
	logger := j.opts.Logger.With("job_id", row.ID, "attempt", row.Attempt)
	ctx, working := j.begin(ctx, row.ID)
	defer j.end(row.ID, working)
	defer j.setAsideIfPaused(ctx, row)
	j.mu.Lock()
	delete(j.unwritten, row.ID) // the claim has said it
	j.mu.Unlock()
	// A cancellation or a pause before begin found nobody to tell, so look once more.
	now, err := j.opts.Store.Job(context.WithoutCancel(ctx), row.ID)
	if err == nil && now.Attempt == row.Attempt && Status(now.Status) == Running && now.Paused != "" {
		err = ErrPaused
	} else if err == nil && now.Attempt == row.Attempt && !Status(now.Status).Final() {
		beats := make(chan struct{})
		beatCtx, stopBeats := context.WithCancel(ctx)
		go func() {
			defer close(beats)
			j.heartbeats(beatCtx, working, row)
		}()
		logger.Info("attempt starts", "base_model", row.Model)
		err = j.attempt(ctx, working, row)
		stopBeats()
		<-beats
		logger.Info("attempt ended", "result", err)
	} else if err == nil {
		err = store.ErrStale
	}

	// What is written now is written even when the server is stopping.
	last := context.WithoutCancel(ctx)
	var reason *JobError
	if err != nil && ctx.Err() != nil && !errors.As(err, &reason) && !errors.Is(err, store.ErrStale) {
		err = context.Cause(ctx) // whatever it led to
	}
	var space *spaceError
	switch {
	case err == nil:
		j.clear(row.ID)
	case errors.As(err, &reason):
		if err := j.fail(last, row.ID, row.Attempt, reason); err != nil {
			j.writeFailed(ctx, row, err)
			return
		}
		j.clear(row.ID)
	case errors.Is(err, ErrStopping):
		j.interrupt(last, row)
	case errors.Is(err, ErrPaused):
		j.setAside(ctx, row, PausedByRequest, nil)
	case errors.As(err, &space), durable.DiskFull(err):
		j.setAside(ctx, row, PausedForSpace, err)
	case errors.Is(err, ErrCancelled), errors.Is(err, store.ErrStale), errors.Is(err, errLeaseLost):
		j.lost(last, row.ID)
	default:
		j.retry(ctx, row, err)
	}
}

// interrupt leaves a running job for the next start.
func (j *Jobs) interrupt(ctx context.Context, row store.Job) {
	_, err := j.opts.Store.UpdateJob(ctx, store.JobUpdate{ID: row.ID, Attempt: row.Attempt, Events: []store.Event{
		message("info", "Fine-tuning job paused: the server is stopping; the job goes on when it starts again"),
	}})
	if err == nil {
		err = j.queue.Release(ctx, row.ID, j.owner, row.Attempt)
	}
	if err != nil && !errors.Is(err, store.ErrStale) {
		j.opts.Logger.Error("interrupt a job", "job_id", row.ID, "error", err) // the next start reclaims it all the same
	}
}

// retry counts an attempt that ended by accident, and waits before the next. The job fails if attempts get no further.
// The row is that of the claim.
func (j *Jobs) retry(ctx context.Context, claimed store.Job, cause error) {
	last := context.WithoutCancel(ctx)
	failures := 0
	_, err := j.opts.Store.UpdateJob(last, store.JobUpdate{ID: claimed.ID, Attempt: claimed.Attempt, Change: func(row *store.Job) error {
		row.Failures++
		if row.SavedStep > claimed.SavedStep {
			row.Failures = 0
		}
		failures = row.Failures
		return nil
	}, Events: []store.Event{message("warn", "Attempt %d ended early: %v", claimed.Attempt, cause)}})
	if errors.Is(err, store.ErrStale) {
		j.lost(last, claimed.ID)
		return
	}
	if err == nil && failures >= j.opts.MaxFailures {
		err = j.fail(last, claimed.ID, claimed.Attempt, &JobError{
			Code: child.CodeInternal, Message: fmt.Sprintf("%d attempts in a row got no further; the last ended so: %v", failures, cause),
		})
		if err == nil {
			j.clear(claimed.ID)
			return
		}
	}
	if err != nil {
		j.writeFailed(ctx, claimed, err)
		return
	}
	j.opts.Logger.Warn("attempt will be repeated", "job_id", claimed.ID, "attempt", claimed.Attempt, "failures", failures, "error", cause)
	sleep(ctx, j.opts.RetryDelay<<max(0, failures-1))
}

// lost is for a job that is no longer this attempt's: it was cancelled, or another process has it and needs its resume states.
func (j *Jobs) lost(ctx context.Context, id string) {
	row, err := j.opts.Store.Job(ctx, id)
	if err != nil {
		j.opts.Logger.Error("look at a lost job", "job_id", id, "error", err)
	} else if Status(row.Status).Final() {
		j.clear(id)
	}
}

// writeFailed is for state that did not reach the disk. The row still says that the job is running, so it will be claimed and
// go on from its resume state, again and again until there is room on the disk; the first claim that succeeds says why it
// was interrupted.
func (j *Jobs) writeFailed(ctx context.Context, row store.Job, err error) {
	j.mu.Lock()
	j.unwritten[row.ID] = err
	j.mu.Unlock()
	j.opts.Logger.Error("write the state of a job; it will be tried again", "job_id", row.ID, "attempt", row.Attempt, "error", err)
	sleep(ctx, 5*j.opts.RetryDelay)
}

// heartbeats keeps the lease until the context ends.
func (j *Jobs) heartbeats(ctx context.Context, working *run, row store.Job) {
	ticker := time.NewTicker(j.opts.Heartbeat)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		err := j.queue.Heartbeat(ctx, row.ID, j.owner, row.Attempt, 4*j.opts.Heartbeat)
		switch {
		case err == nil || ctx.Err() != nil:
		case errors.Is(err, store.ErrStale):
			working.cancel(errLeaseLost)
			return
		default:
			j.opts.Logger.Error("heartbeat", "job_id", row.ID, "error", err)
		}
	}
}

// attempt runs a trainer to its end. It returns nil for a job that has succeeded, *JobError for one that cannot, *spaceError for
// one that needs room on the disk, the context's cause if that ended it, store.ErrStale if the job is no longer this attempt's, and any other error for an accident.
func (j *Jobs) attempt(ctx context.Context, working *run, row store.Job) error {
	// A server killed between the last two steps of an earlier attempt has left only the last to do.
	if _, err := j.opts.Adapters.Lookup(row.AdapterName); err == nil {
		return j.succeed(context.WithoutCancel(ctx), row, "")
	}
	if err := j.checkSpace(row); err != nil {
		return err
	}
	config, err := j.config(ctx, row)
	if err != nil {
		return err
	}
	if err := j.reconcile(ctx, &row, config); err != nil {
		return fmt.Errorf("checkpoints of earlier attempts: %w", err)
	}
	trainer, err := j.opts.Start(context.WithoutCancel(ctx), config)
	if err != nil {
		return fmt.Errorf("start the trainer: %w", err)
	}
	if process, ok := trainer.(interface{ PID() int }); ok {
		working.process(process.PID())
	}
	result := j.follow(ctx, working, &row, trainer)
	ended := trainer.Wait()
	working.process(0)

	var reason *JobError
	var space *spaceError
	switch {
	case errors.Is(result, errDone):
		return j.succeed(context.WithoutCancel(ctx), row, config.AdapterDir)
	case errors.As(result, &reason), errors.As(result, &space), errors.Is(result, store.ErrStale), errors.Is(result, errWrite):
		return result
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case ended != nil:
		return fmt.Errorf("the trainer ended: %w", ended)
	default:
		return errors.New("the trainer ended without saying that it was done")
	}
}

// errDone is follow's result when the trainer reported done.
var errDone = errors.New("done")

// follow applies a trainer's events until its output ends, and ends the trainer when the context ends or the state cannot be
// written. It returns errDone, *JobError, *spaceError, an error of the store, or nil if the trainer reported no end.
func (j *Jobs) follow(ctx context.Context, working *run, row *store.Job, trainer Trainer) (result error) {
	// endWithin kills the trainer unless it ends by itself in time; soft asks it to.
	var deadline <-chan time.Time
	var killAt time.Time
	endWithin := func(grace time.Duration) {
		if at := time.Now().Add(grace); deadline == nil || at.Before(killAt) {
			deadline, killAt = time.After(grace), at
		}
	}
	asked := false
	soft := func(grace time.Duration) {
		if !asked {
			asked = true
			if err := trainer.Stop(); err != nil {
				j.opts.Logger.Warn("ask the trainer to stop", "job_id", row.ID, "error", err)
				grace = 0
			}
		}
		endWithin(grace)
	}
	stop, hard := ctx.Done(), (<-chan struct{})(j.hard)
	for {
		select {
		case event, ok := <-trainer.Events():
			if !ok {
				return result
			}
			if result != nil {
				continue
			}
			// The trainer's state is written even when the server is stopping.
			result = j.apply(context.WithoutCancel(ctx), working, row, event)
			var reason *JobError
			var space *spaceError
			switch {
			case result == nil:
			case errors.Is(result, errDone), errors.As(result, &reason):
				endWithin(j.opts.StopGrace) // it is about to end by itself
			case errors.As(result, &space):
				soft(j.opts.StopGrace)
			default:
				if !errors.Is(result, store.ErrStale) {
					result = fmt.Errorf("%w: %w", errWrite, result)
				}
				soft(j.opts.StopGrace)
			}
		case <-stop:
			stop = nil
			switch cause := context.Cause(ctx); {
			case errors.Is(cause, ErrStopping), errors.Is(cause, ErrPaused):
				soft(j.opts.StopGrace)
			case errors.Is(cause, ErrCancelled):
				soft(j.opts.CancelGrace)
			default:
				soft(0)
			}
		case <-deadline:
			deadline = nil
			trainer.Kill()
		case <-hard:
			hard = nil
			trainer.Kill()
		}
	}
}

// config is what the trainer of this attempt is told.
func (j *Jobs) config(ctx context.Context, row store.Job) (child.TrainerConfig, error) {
	modelDir, digest, err := j.opts.Models.Base(ctx, row.Model)
	if errors.Is(err, ErrUnknownModel) {
		return child.TrainerConfig{}, &JobError{Code: "model_not_found", Message: fmt.Sprintf("the base model %q was removed", row.Model)}
	}
	if err != nil {
		return child.TrainerConfig{}, fmt.Errorf("base model %q: %w", row.Model, err)
	}
	if digest != row.BaseDigest {
		return child.TrainerConfig{}, &JobError{Code: "model_changed", Message: fmt.Sprintf(
			"the base model %q has sha256 %.12s and had %.12s when the job was created; create the job again", row.Model, digest, row.BaseDigest)}
	}
	config := child.TrainerConfig{
		JobID: row.ID, Attempt: row.Attempt, ModelDir: modelDir, BaseModel: row.Model, BaseDigest: digest,
		AdapterID: row.AdapterID, AdapterName: row.AdapterName, Seed: row.Seed, Threads: j.opts.Threads,
		Method: row.Method, ReportedStep: row.Step, CacheDir: j.opts.CacheDir, MemoryBytes: j.opts.MemoryBytes,
	}
	if err := json.Unmarshal(row.Options, &config.Options); err != nil {
		return config, fmt.Errorf("options: %w", err)
	}
	if config.Options.Device == nil && j.opts.Device != "" {
		config.Options.Device = &j.opts.Device
	}
	if row.StartAdapter != "" {
		from, err := j.opts.Adapters.Lookup(row.StartAdapter)
		if err != nil {
			return config, &JobError{Code: "model_not_found", Message: fmt.Sprintf("the job cannot go on from %q: %v", row.StartAdapter, err)}
		}
		config.StartAdapter = from.Dir
	}
	if config.TrainingFile, err = j.filePath(ctx, row.TrainingFile); err != nil {
		return config, err
	}
	if row.ValidationFile != "" {
		if config.ValidationFile, err = j.filePath(ctx, row.ValidationFile); err != nil {
			return config, err
		}
	}
	dir, err := filepath.Abs(j.dir(row.ID))
	if err != nil {
		return config, err
	}
	// An attempt writes into its own directory only, so that a trainer that outlived its server can harm no later one.
	attemptDir := func(n int) string { return filepath.Join(dir, fmt.Sprintf("a%d", n)) }
	config.Dir = attemptDir(row.Attempt)
	config.AdapterDir = filepath.Join(config.Dir, "adapter")
	for n := row.Attempt - 1; n > 0; n-- {
		_, err := os.Stat(attemptDir(n))
		switch {
		case err == nil:
			config.ResumeFrom = append(config.ResumeFrom, attemptDir(n))
		case !errors.Is(err, os.ErrNotExist):
			return config, err
		}
	}
	if config.CacheDir != "" {
		if err := os.MkdirAll(config.CacheDir, 0o700); err != nil {
			return config, err
		}
	}
	return config, os.MkdirAll(config.Dir, 0o700)
}

// filePath is the path of a file's content. A file whose content was lost ends the job.
func (j *Jobs) filePath(ctx context.Context, id string) (string, error) {
	path, err := j.opts.Store.FilePath(ctx, id)
	if lost := new(store.ContentError); errors.As(err, &lost) {
		return "", &JobError{Code: "file_damaged", Message: lost.Error()}
	}
	return path, err
}

// apply takes one event of the trainer into the row, which it keeps up to date. It returns errDone, *JobError or *spaceError for the
// events that end an attempt, and otherwise an error of the store.
func (j *Jobs) apply(ctx context.Context, working *run, row *store.Job, e child.TrainerEvent) error {
	var change func(*store.Job) error
	var events []store.Event
	after := func(store.Job) error { return nil }
	switch e.Type {
	case child.EventProgress:
		working.report(e, j.opts.Now())
		return nil

	case child.EventDataset:
		if row.Plan != nil {
			return nil // it was said before
		}
		var err error
		if events, err = datasetMessages(e); err != nil {
			return err
		}

	case child.EventMemory:
		if e.Memory == nil {
			return errors.New("the trainer sent a memory event without a plan")
		}
		need := spaceFor(*e.Memory)
		change = func(row *store.Job) error {
			row.DiskBytes = need
			return nil
		}
		if row.Plan == nil {
			event, err := memoryMessage(*e.Memory)
			if err != nil {
				return err
			}
			events = append(events, event)
		}
		after = j.checkSpace

	case child.EventPlan:
		if e.Plan == nil {
			return errors.New("the trainer sent a plan event without a plan")
		}
		plan, err := json.Marshal(e.Plan)
		if err != nil {
			return err
		}
		change = func(row *store.Job) error {
			row.Plan, row.TotalSteps = plan, e.Plan.TotalSteps
			return nil
		}
		working.report(child.TrainerEvent{Type: child.EventProgress, Step: e.Plan.ResumedStep, TotalSteps: e.Plan.TotalSteps}, j.opts.Now())
		switch {
		case e.Plan.ResumedStep > 0:
			events = append(events, message("info", "Resuming from step %d", e.Plan.ResumedStep))
		case row.Step > 0:
			events = append(events, message("warn", "No saved state found, starting again from step 0"))
		}

	case child.EventStep:
		working.step(e, j.opts.Now())
		if e.Step <= row.Step {
			return nil // done again after a resume: same seed, same data, same numbers
		}
		total := max(e.TotalSteps, row.TotalSteps)
		m := metrics{
			Step: e.Step, TotalSteps: total, TrainLoss: &e.TrainLoss, TrainAccuracy: &e.TrainAccuracy, TrainChoiceAccuracy: e.ChoiceAccuracy,
			RewardsChosen: e.RewardsChosen, RewardsRejected: e.RewardsRejected, LearningRate: e.LearningRate, GradNorm: e.GradNorm,
		}
		if row.Method == DPO && e.TrainAccuracy == 0 {
			m.TrainAccuracy = nil // it compares answers, and need not count tokens
		}
		event, err := m.event()
		if err != nil {
			return err
		}
		events = append(events, event)
		change = func(row *store.Job) error {
			row.Step, row.TotalSteps, row.TrainLoss, row.TrainAccuracy = e.Step, total, m.TrainLoss, m.TrainAccuracy
			row.TrainedTokens = max(row.TrainedTokens, e.TrainedTokens)
			return nil
		}

	case child.EventEval:
		step := e.Step
		if step == 0 {
			step = row.Step
		}
		if step <= row.ValidStep {
			return nil
		}
		m := metrics{Step: step, TotalSteps: row.TotalSteps, ValidChoiceAccuracy: e.ValidChoiceAccuracy, Best: e.Best}
		if e.ValidLoss != 0 || e.ValidAccuracy != 0 { // no loss and nothing right is an evaluation of choices alone
			m.ValidLoss, m.FullValidLoss = &e.ValidLoss, &e.ValidLoss
			if row.Method != DPO || e.ValidAccuracy != 0 {
				m.ValidAccuracy, m.FullValidAccuracy = &e.ValidAccuracy, &e.ValidAccuracy
			}
		}
		if step == row.Step {
			m.TrainLoss, m.TrainAccuracy = row.TrainLoss, row.TrainAccuracy
		}
		event, err := m.event()
		if err != nil {
			return err
		}
		events = append(events, event)
		change = func(row *store.Job) error {
			row.ValidStep, row.ValidLoss, row.ValidAccuracy, row.ValidChoiceAccuracy = step, m.ValidLoss, m.ValidAccuracy, m.ValidChoiceAccuracy
			return nil
		}

	case child.EventCheckpoint:
		return j.checkpoint(ctx, row, e)

	case child.EventSaved:
		if e.Step <= row.SavedStep {
			return nil
		}
		change = func(row *store.Job) error {
			row.SavedStep, row.Failures = e.Step, 0
			return nil
		}

	case child.EventLog:
		level := e.Level
		if level != "warn" && level != "error" {
			level = "info"
		}
		events = append(events, message(level, "%s", e.Message))

	case child.EventDone:
		return errDone

	case child.EventFailed:
		if e.Error == nil {
			return errors.New("the trainer sent a failed event without an error")
		}
		if e.Error.Code == child.CodeDiskFull {
			return &spaceError{what: e.Error.Message}
		}
		return &JobError{Code: e.Error.Code, Message: e.Error.Message, Param: e.Error.Param}

	default:
		j.opts.Logger.Warn("unknown event of the trainer", "job_id", row.ID, "type", e.Type)
		return nil
	}
	next, err := j.opts.Store.UpdateJob(ctx, store.JobUpdate{ID: row.ID, Attempt: row.Attempt, Change: j.timed(working, change), Events: events})
	if err != nil {
		return err
	}
	*row = next
	return after(next)
}

// timed is a change of an attempt that also counts the time of the attempt so far.
func (j *Jobs) timed(working *run, change func(*store.Job) error) func(*store.Job) error {
	return func(row *store.Job) error {
		now := j.opts.Now()
		row.RunSeconds += max(0, now.Sub(working.counted).Seconds())
		working.counted = now
		if change == nil {
			return nil
		}
		return change(row)
	}
}

// report takes a progress event.
func (r *run) report(e child.TrainerEvent, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.progress, r.at = e, now
}

// step moves the progress on to a finished step; speed and time left stay those of the last progress event.
func (r *run) step(e child.TrainerEvent, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.progress.Type == child.EventProgress && e.Step < r.progress.Step {
		return
	}
	elapsed := now.Sub(r.at).Seconds()
	r.progress.Type, r.progress.Step, r.progress.Fraction = child.EventProgress, e.Step, 0
	r.progress.TotalSteps = max(r.progress.TotalSteps, e.TotalSteps)
	r.progress.SecondsLeft = max(0, r.progress.SecondsLeft-elapsed)
	r.at = now
}

// succeed publishes the adapter in adapterDir, unless that is "" (it is published already), and writes the end of the job.
func (j *Jobs) succeed(ctx context.Context, row store.Job, adapterDir string) error {
	if adapterDir != "" {
		manifest, err := lora.ReadManifest(adapterDir)
		if err != nil {
			return err
		}
		if manifest.ID != row.AdapterID || manifest.Name != row.AdapterName || manifest.BaseDigest != row.BaseDigest {
			return fmt.Errorf("the trainer wrote adapter %q of base %.12s; expected %q of base %.12s",
				manifest.Name, manifest.BaseDigest, row.AdapterName, row.BaseDigest)
		}
		if _, err := j.opts.Adapters.Publish(ctx, adapterDir); err != nil {
			return err
		}
	}
	steps, err := j.opts.Store.MetricsEvents(ctx, row.ID)
	if err != nil {
		return err
	}
	results, err := resultFile(steps)
	if err != nil {
		return err
	}
	move := j.move(Succeeded)
	_, err = j.opts.Store.UpdateJob(ctx, store.JobUpdate{
		ID: row.ID, Attempt: row.Attempt,
		Change: func(row *store.Job) error {
			row.FineTunedModel, row.Step = row.AdapterName, row.TotalSteps
			return move(row)
		},
		Results: []store.Result{{Filename: "step_metrics.csv", Purpose: "fine-tune-results", Content: results}},
		Events: []store.Event{
			message("info", "New fine-tuned model created: %s", row.AdapterName),
			message("info", "The job has successfully completed"),
		},
	})
	if errors.Is(err, store.ErrStale) {
		// Cancelled at the last moment: the adapter must not outlive that.
		now, lookErr := j.opts.Store.Job(ctx, row.ID)
		if lookErr == nil && Status(now.Status) == Cancelled {
			if err := j.opts.Adapters.Delete(ctx, row.AdapterName); err != nil && !errors.Is(err, adapters.ErrNotFound) {
				return errors.Join(store.ErrStale, err)
			}
		}
		return errors.Join(err, lookErr)
	}
	return err
}

// sleep waits for d or until the context ends.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
