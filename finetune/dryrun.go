package finetune

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/hone-llm/hone/internal/child"
)

// dryRunPrefix begins the names of the directories of dry runs, beside those of jobs.
const dryRunPrefix = ".dry-run-"

// DryRun is what a job would do.
type DryRun struct {
	Model          string // the base model
	StartAdapter   string
	MethodType     string
	Options        child.TrainOptions // as requested
	Plan           child.TrainPlan    // with the memory plan
	TrainRows      int                // that are left to train on
	ValidRows      int
	TrainTokens    int // of one epoch
	ValidTokens    int
	SharedTokens   int // of TrainTokens, computed once for several rows
	TruncatedRows  int
	DroppedRows    int
	Notes          []string // what the trainer logged
	TrainingFile   string
	ValidationFile string
}

// DryRun does everything that a job does before its first step: it checks the request and the files, tokenizes them and
// decides the plan. Nothing is stored but tokenized files in the cache. Errors are those of Create, and *JobError for what
// would fail the job. It ends when ctx does, with nothing left running; a second one waits for the first.
func (j *Jobs) DryRun(ctx context.Context, spec Spec) (_ *DryRun, err error) {
	row, err := j.prepare(ctx, spec)
	if err != nil {
		return nil, err
	}
	if _, problem := j.readFiles(ctx, row); problem != nil {
		return nil, problem
	}
	select {
	case j.dryRuns <- struct{}{}:
		defer func() { <-j.dryRuns }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if err := os.MkdirAll(j.opts.Dir, 0o700); err != nil { // where no job was started yet
		return nil, fmt.Errorf("dry run: %w", err)
	}
	dir, err := os.MkdirTemp(j.opts.Dir, dryRunPrefix+"*")
	if err != nil {
		return nil, fmt.Errorf("dry run: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	row.ID, row.Attempt = filepath.Base(dir), 1
	config, err := j.config(ctx, row)
	if err != nil {
		return nil, err
	}
	config.DryRun = true
	result := &DryRun{
		Model: row.Model, StartAdapter: row.StartAdapter, MethodType: row.Method, TrainingFile: row.TrainingFile, ValidationFile: row.ValidationFile,
	}
	if err := json.Unmarshal(row.Options, &result.Options); err != nil {
		return nil, fmt.Errorf("dry run: %w", err)
	}
	if err := j.runDry(ctx, config, result); err != nil {
		return nil, err
	}
	return result, nil
}

// runDry runs the trainer of a dry run to its end.
func (j *Jobs) runDry(ctx context.Context, config child.TrainerConfig, result *DryRun) error {
	trainer, err := j.opts.Start(context.WithoutCancel(ctx), config)
	if err != nil {
		return fmt.Errorf("start the trainer: %w", err)
	}
	stop := context.AfterFunc(ctx, trainer.Kill)
	defer stop()
	planned, done := false, false
	var failed *JobError
	var memory child.MemoryPlan
	for e := range trainer.Events() {
		switch e.Type {
		case child.EventDataset:
			result.TrainRows, result.ValidRows, result.TrainTokens, result.ValidTokens = e.TrainRows, e.ValidRows, e.TrainTokens, e.ValidTokens
			result.SharedTokens, result.TruncatedRows, result.DroppedRows = e.SharedTokens, e.TruncatedRows, e.DroppedRows
		case child.EventMemory:
			if e.Memory != nil {
				memory = *e.Memory
			}
		case child.EventPlan:
			if e.Plan != nil {
				result.Plan, planned = *e.Plan, true
			}
		case child.EventLog:
			result.Notes = append(result.Notes, e.Message)
		case child.EventFailed:
			if e.Error != nil {
				failed = &JobError{Code: e.Error.Code, Message: e.Error.Message, Param: e.Error.Param}
			}
		case child.EventDone:
			done = true
		}
	}
	ended := trainer.Wait()
	switch {
	case failed != nil:
		return failed
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case ended != nil:
		return fmt.Errorf("the trainer ended: %w", ended)
	case !planned || !done:
		return errors.New("the trainer ended without a plan")
	}
	if memory.TotalBytes > 0 {
		result.Plan.Memory = memory
	}
	return nil
}
