// Package finetune owns fine-tuning jobs: their states, their queue, their events, and the trainer processes that do
// the work. A job's truth is its row in the store; everything held in memory can be lost at any moment.
//
//	              Create
//	                 │
//	                 ▼
//	        validating_files ────────────┐ a bad line, or no rows
//	                 │ files are good    │
//	                 ▼                   │
//	              queued ◄──────┐        │
//	                 │ claimed: │ paused, and its state saved:
//	                 │ a lease, │ claimed again once it is resumed
//	                 │ attempt+1│        │
//	                 ▼          │        ▼
//	   ┌───────── running ──────┴───► failed    the trainer said why it cannot work,
//	   │  ▲          │                          or ended MaxFailures times without getting further
//	   │  └──────────┤ the trainer or the server ended, or the server is stopped:
//	   │             │ attempt+1 from the newest resume state
//	   ▼             ▼
//	succeeded    cancelled    Cancel: from validating_files, queued and running
//
// Whether a job is paused is no state of its own, because OpenAI's enum of states has none: it is a mark on a job that is
// validated or queued, and keeps it from being claimed, also after a restart. Pause sets it (PausedByRequest), and Resume takes
// it away. A full disk sets it too (PausedForSpace): before an attempt that has less free space than two resume states take,
// or when something could not be written. It goes away when there is room, or with Resume. Each is an event.
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
