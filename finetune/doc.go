// Package finetune owns fine-tuning jobs: their states, their queue, their events, and the trainer processes that do
// the work. A job's truth is its row in the store; everything held in memory can be lost at any moment.
//
//	              Create
//	                 │
//	                 ▼
//	        validating_files ────────────┐ a bad line, or no rows
//	                 │ files are good    │
//	                 ▼                   │
//	              queued                 │
//	                 │ claimed: a lease, │
//	                 │ attempt 1         │
//	                 ▼                   ▼
//	   ┌───────── running ──────────► failed    the trainer said why it cannot work,
//	   │  ▲          │                          or ended MaxFailures times without getting further
//	   │  └──────────┤ the trainer or the server ended, or the server is stopped:
//	   │             │ attempt+1 from the newest resume state
//	   ▼             ▼
//	succeeded    cancelled    Cancel: from validating_files, queued and running
//
// A checkpoint is an adapter of a job at one of its steps, which the trainer writes and the registry serves; Checkpoints lists
// them. DryRun does what a job does before its first step, and is no job.
//
// One job runs at a time. Each attempt at it has a number, and every write of an attempt is refused once the row has
// another number or a final state; so an attempt that lost its job can change nothing.
//
//	jobs, err := finetune.New(finetune.Options{Store: st, Models: models, Adapters: registry, Start: start, Dir: dir})
//	err = jobs.Start(ctx) // jobs that were running go on
//	job, err := jobs.Create(ctx, finetune.Spec{Model: "smollm2-135m", TrainingFile: file.ID})
//	err = jobs.Stop(ctx) // the running job saves its state and goes on after the next Start
package finetune
