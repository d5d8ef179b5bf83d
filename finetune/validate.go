package finetune

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/store"
)

// validateAll looks through the files of new jobs, one job after the other, while another job may be running.
func (j *Jobs) validateAll(ctx context.Context) {
	for ctx.Err() == nil {
		rows, err := j.opts.Store.JobsWithStatus(ctx, string(ValidatingFiles))
		for _, row := range rows {
			if err = j.validate(ctx, row); err != nil {
				break
			}
		}
		if err != nil && ctx.Err() == nil {
			j.opts.Logger.Error("validate files", "error", err)
			sleep(ctx, j.opts.RetryDelay)
			continue
		}
		select {
		case <-ctx.Done():
		case <-j.wakeValidate:
		}
	}
}

// validate moves one job from validating_files to queued or failed. The error is of the store: the job stays as it is.
func (j *Jobs) validate(ctx context.Context, row store.Job) error {
	ctx, working := j.begin(ctx, row.ID)
	defer j.end(row.ID, working)

	report, problem := j.readFiles(ctx, row)
	if ctx.Err() != nil {
		return nil // cancelled, or stopping: validated again after the next start
	}
	ctx = context.WithoutCancel(ctx) // from here on the result is written, unless the row says cancelled
	var results []store.Result
	if report != nil {
		result, err := report.result()
		if err != nil {
			return err
		}
		results = append(results, result)
	}
	if problem != nil {
		return j.fail(ctx, row.ID, store.AnyAttempt, problem, results...)
	}
	events, err := report.events()
	if err != nil {
		return err
	}
	running, err := j.opts.Store.JobsWithStatus(ctx, string(Running))
	if err != nil {
		return err
	}
	queued, err := j.opts.Store.JobsWithStatus(ctx, string(Queued))
	if err != nil {
		return err
	}
	ahead := 0
	for _, other := range slices.Concat(running, queued) {
		if other.Paused == "" {
			ahead++
		}
	}
	events = append(events, message("info", "Files validated, moving job to queued state"))
	if ahead > 0 {
		events = append(events, message("info", "Waiting for its turn: jobs ahead in the queue: %d", ahead))
	}
	_, err = j.opts.Store.UpdateJob(ctx, store.JobUpdate{ID: row.ID, Attempt: store.AnyAttempt, Change: j.move(Queued), Events: events, Results: results})
	if err != nil && !errors.Is(err, store.ErrStale) {
		return err
	}
	wake(j.wakeDispatch)
	return nil
}

// readFiles validates the files of a job.
func (j *Jobs) readFiles(ctx context.Context, row store.Job) (*Report, *JobError) {
	var options child.TrainOptions
	if err := json.Unmarshal(row.Options, &options); err != nil {
		return nil, &JobError{Code: child.CodeInternal, Message: fmt.Sprintf("options: %v", err)}
	}
	report := &Report{}
	training, problem := j.readFile(ctx, "training", row.TrainingFile, row.Method, options.Choices)
	report.Training = *training
	if problem == nil && row.ValidationFile != "" {
		report.Validation, problem = j.readFile(ctx, "validation", row.ValidationFile, row.Method, options.Choices)
		report.Overlap = overlap(&report.Training, report.Validation)
	}
	report.Valid = problem == nil
	return report, problem
}

// readFile validates one file of a job; kind is training or validation.
func (j *Jobs) readFile(ctx context.Context, kind, id, method string, choices []string) (*FileReport, *JobError) {
	param := kind + "_file"
	problem := func(format string, args ...any) *JobError {
		return &JobError{Code: "invalid_" + param, Param: param, Message: fmt.Sprintf(format, args...)}
	}
	_, content, err := j.opts.Store.OpenFile(ctx, id)
	if err != nil {
		return &FileReport{ID: id, Problem: err.Error()}, problem("%s file %s cannot be read: %v", kind, id, err)
	}
	defer content.Close()
	report, err := validateDataset(ctx, content, method, choices)
	report.ID = id
	var lines *datasetError
	switch {
	case err == nil:
		return report, nil
	case errors.As(err, &lines) && lines.bad == 1:
		return report, problem("%s file %s is invalid: %v", kind, id, lines)
	case errors.As(err, &lines):
		return report, problem("%s file %s has %d invalid lines:\n%v", kind, id, lines.bad, lines)
	default:
		return report, problem("%s file %s is invalid: %v", kind, id, err)
	}
}

// fail moves a job to failed. The reason is in the event's text too: go-openai's job has no field for it.
// It is no error if the job was cancelled meanwhile.
func (j *Jobs) fail(ctx context.Context, id string, attempt int, reason *JobError, results ...store.Result) error {
	move := j.move(Failed)
	_, err := j.opts.Store.UpdateJob(ctx, store.JobUpdate{
		ID: id, Attempt: attempt,
		Change: func(row *store.Job) error {
			row.ErrorCode, row.ErrorMessage, row.ErrorParam = reason.Code, reason.Message, reason.Param
			return move(row)
		},
		Events: []store.Event{message("error", "The job failed: %s", reason.Message)}, Results: results,
	})
	if errors.Is(err, store.ErrStale) {
		return nil
	}
	return err
}

// begin registers work on a job, so that Cancel finds it. The returned context ends with the cause of the cancellation.
func (j *Jobs) begin(ctx context.Context, id string) (context.Context, *run) {
	ctx, cancel := context.WithCancelCause(ctx)
	working := &run{cancel: cancel, ended: make(chan struct{}), counted: j.opts.Now()}
	j.mu.Lock()
	j.live[id] = working
	j.mu.Unlock()
	return ctx, working
}

func (j *Jobs) end(id string, working *run) {
	j.mu.Lock()
	if j.live[id] == working { // else the next work on it has begun
		delete(j.live, id)
	}
	j.mu.Unlock()
	working.cancel(nil)
	close(working.ended)
}
