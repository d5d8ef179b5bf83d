// Package train runs one attempt at a fine-tuning job: it reads the data, loads the base model, and steps an adapter
// with AdamW until the plan is done, saving resume states on the way.
//
//	err := train.Run(ctx, config, commands, events) // the trainer process is little more than this
//
// A job that is resumed from a state continues bit for bit: the order of the rows and the dropout masks follow from
// seed, epoch and row, and every sum runs in a fixed order, whatever the number of threads.
package train

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/durable"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/memory"
)

const (
	progressInterval   = time.Second
	defaultSaveMinutes = 5.0

	methodSupervised = "supervised"
	methodDPO        = "dpo"
)

// errStopped ends an attempt on request; its resume state is saved.
var errStopped = errors.New("stopped")

// errOrphaned ends an attempt whose parent is gone.
var errOrphaned = errors.New("the server that started this trainer is gone")

// Run trains the job until it is done, stopped or failed, and writes its events, one JSON object a line. A command
// "stop", or the end of ctx, saves a resume state and returns nil without the event done; the end of commands (the parent died) returns an
// error. A job that cannot succeed by being tried again ends with the event failed and nil, and so does an attempt that found the
// disk full (child.CodeDiskFull); other errors are returned.
func Run(ctx context.Context, config child.TrainerConfig, commands io.Reader, events io.Writer) error {
	t := &trainer{config: config, started: time.Now(), threads: config.Threads}
	if t.threads == 0 {
		t.threads = runtime.NumCPU()
	}
	t.reporter.encoder = json.NewEncoder(events)
	parent := ctx
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(parent))
	defer cancel(nil)
	defer context.AfterFunc(parent, func() { cancel(errStopped) })()
	go func() { cancel(follow(commands)) }()

	var background sync.WaitGroup
	done := make(chan struct{})
	background.Go(func() { t.reportProgress(done) })
	err := t.run(ctx)
	close(done)
	background.Wait()
	t.close()

	var failure *child.Error
	switch {
	case errors.Is(err, errStopped):
		return nil
	case errors.As(err, &failure):
		return t.emit(child.TrainerEvent{Type: child.EventFailed, Error: failure})
	case durable.DiskFull(err):
		return t.emit(child.TrainerEvent{Type: child.EventFailed, Error: &child.Error{Code: child.CodeDiskFull, Message: err.Error()}})
	}
	return err
}

// follow reads commands until one of them, or their end, stops the attempt.
func follow(commands io.Reader) error {
	lines := bufio.NewScanner(commands)
	for lines.Scan() {
		var c child.TrainerCommand
		if err := json.Unmarshal(lines.Bytes(), &c); err == nil && c.Op == "stop" {
			return errStopped
		}
	}
	return errOrphaned
}

type reporter struct {
	mu      sync.Mutex
	encoder *json.Encoder
}

func (r *reporter) emit(e child.TrainerEvent) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.encoder.Encode(e); err != nil {
		return fmt.Errorf("report %s: %w", e.Type, err)
	}
	return nil
}

// trainer is one attempt.
type trainer struct {
	reporter
	config  child.TrainerConfig
	threads int
	started time.Time

	backend      *ggml.Backend
	model        *graph.Model
	lora         *graph.LoRA
	data, valid  *dataset.Dataset
	validChoices *dataset.Dataset // the validation rows with the answers to choose from; nil if the objective compares them itself or there are none
	template     string           // digest
	architecture string
	plan         child.TrainPlan

	objective, validObjective objective
	// compute runs a micro-batch forward and backward.
	compute func(m dataset.Micro) (engine.Result, error)

	position
	moments    moments
	saved      int // step of the newest resume state
	savedAt    time.Time
	metric     *float64 // of the evaluation at step evaluated
	progress   progress
	spent      spent
	neighbours load      // of all other processes
	runners    load      // of the server that started this one
	worked     time.Time // when the last micro-batch began
}

// position is how far a job has come: with the plan and the arrays, all that a resume state holds.
type position struct {
	step        int   // optimizer steps done
	trained     int64 // tokens
	skipped     int   // steps in a row without an update
	evaluated   int   // step of the last evaluation
	window      window
	selection   selection
	checkpoints []checkpoint         // oldest first
	reported    []child.TrainerEvent // the latest maxReported of steps and evaluations, oldest first
}

// spent is the time that did not go into steps.
type spent struct{ saving, evaluation time.Duration }

func (t *trainer) close() {
	t.lora.Close()
	t.model.Close()
	t.backend.Close()
	t.data.Close()
	t.valid.Close()
	t.validChoices.Close()
}

func (t *trainer) run(ctx context.Context) error {
	state, err := t.prepare(ctx)
	if err != nil {
		return err
	}
	if t.config.DryRun {
		return t.emit(child.TrainerEvent{Type: child.EventDone, TotalSteps: t.plan.TotalSteps, Message: "Dry run: nothing was trained"})
	}
	// Abort interrupts the computation from another goroutine; wait for it, so that it cannot meet a closed backend.
	aborted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { t.backend.Abort(); close(aborted) })
	defer func() {
		if !stop() {
			<-aborted
		}
	}()
	if err = t.begin(ctx, state); err == nil {
		err = t.train(ctx)
	}
	if errors.Is(err, ggml.ErrAborted) {
		err = context.Cause(ctx)
	}
	if errors.Is(err, errStopped) && t.step > t.saved {
		if err := t.save(); err != nil {
			return err
		}
	}
	return err
}

// maxReported is more than what can be on its way to a server: 64 events in its memory, and pipes and buffers of 64 KiB each.
const maxReported = 1000

// report emits an event of a step or an evaluation. A server that is killed has not written down what was on its way to it,
// though a resume state may be of a later step; so the state holds these events, and the next attempt says them again.
func (t *trainer) report(e child.TrainerEvent) error {
	t.reported = append(t.reported[max(0, len(t.reported)+1-maxReported):], e)
	return t.emit(e)
}

// reportAgain emits what attempts before have reported and the server may not have.
func (t *trainer) reportAgain() error {
	for _, e := range t.reported {
		known := t.config.ReportedStep
		if e.Step < known || e.Step == known && e.Type == child.EventStep { // the evaluation after it may not be known
			continue
		}
		if err := t.emit(e); err != nil {
			return err
		}
	}
	return nil
}

func (t *trainer) log(level, format string, args ...any) error {
	return t.emit(child.TrainerEvent{Type: child.EventLog, Level: level, Message: fmt.Sprintf(format, args...)})
}

func (t *trainer) warn(format string, args ...any) error { return t.log("warn", format, args...) }
func (t *trainer) info(format string, args ...any) error { return t.log("info", format, args...) }

func (t *trainer) schedule() Schedule {
	return Schedule{Kind: t.plan.LRScheduler, Peak: t.plan.LearningRate, Minimum: t.plan.MinLearningRate, Warmup: t.plan.WarmupSteps, Total: t.plan.TotalSteps}
}

// train steps until the plan is done or ends early, and exports the adapter.
func (t *trainer) train(ctx context.Context) error {
	began := time.Now()
	schedule, loader := t.schedule(), newLoader(t)
	defer loader.close()
	// What was due after the step of a resume state, which is saved first.
	stop, err := t.afterStep(ctx)
	for err == nil && !stop && t.step < t.plan.TotalSteps {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var w work
		if w, err = loader.next(t.step); err != nil {
			return err
		}
		if err = t.optimize(ctx, w, schedule); err != nil {
			return err
		}
		stop, err = t.afterStep(ctx)
	}
	if err != nil {
		return err
	}
	if stop && t.step < t.plan.TotalSteps {
		if err := t.info("Stopped early at step %d: no better %s in %d evaluations", t.step, t.plan.MetricForBestModel, t.selection.Patience); err != nil {
			return err
		}
	}
	if t.plan.LoadBestModelAtEnd {
		if err := t.loadBest(); err != nil {
			return err
		}
	}
	if err := t.export(t.config.AdapterDir, t.config.AdapterID, t.config.AdapterName); err != nil {
		return err
	}
	return t.done(time.Since(began))
}

// due reports whether a strategy asks for something after the current step. The last one always does.
func (t *trainer) due(strategy string, every int) bool {
	switch {
	case t.step == 0 || strategy == "no":
		return false
	case t.step == t.plan.TotalSteps:
		return true
	case strategy == "steps":
		return t.step%every == 0
	}
	return t.step%stepsPerEpoch(t.data.Rows, t.plan.BatchSize) == 0
}

// epochs is how many epochs have begun after a number of steps.
func (t *trainer) epochs(steps int) int {
	perEpoch := stepsPerEpoch(t.data.Rows, t.plan.BatchSize)
	return (steps + perEpoch - 1) / perEpoch
}

// afterStep saves, evaluates and writes a checkpoint where that is due, in this order: an evaluation or a checkpoint that was cut off is
// done again from the same state. It reports whether to stop early.
func (t *trainer) afterStep(ctx context.Context) (stop bool, err error) {
	evaluates := t.due(t.plan.EvalStrategy, t.plan.EvalSteps) && t.evaluated < t.step
	newest := 0
	if n := len(t.checkpoints); n > 0 {
		newest = t.checkpoints[n-1].Step
	}
	writes := t.due(t.plan.SaveStrategy, t.plan.SaveSteps) && newest < t.step
	if t.step > t.saved && (evaluates || writes || t.due("epoch", 0) || time.Since(t.savedAt) >= t.saveInterval()) {
		if err := t.save(); err != nil {
			return false, err
		}
	}
	if evaluates {
		if stop, err = t.evaluate(ctx); err != nil {
			return false, err
		}
	}
	if writes || stop && t.plan.SaveStrategy != "no" && newest < t.step {
		return stop, t.checkpoint()
	}
	return stop, nil
}

func (t *trainer) saveInterval() time.Duration {
	return time.Duration(or(t.config.Options.SaveMinutes, defaultSaveMinutes) * float64(time.Minute))
}

// done reports the end of the job, where its time went, and its memory.
func (t *trainer) done(took time.Duration) error {
	share := func(d time.Duration) float64 { return 100 * d.Seconds() / took.Seconds() }
	message := fmt.Sprintf("Trained %d steps in %s; evaluation took %.1f%% of the time, resume states and checkpoints %.1f%%",
		t.step, took.Round(100*time.Millisecond), share(t.spent.evaluation), share(t.spent.saving))
	if peak, err := memory.Peak(); err == nil && !t.backend.GPU() {
		message += fmt.Sprintf("; memory at most %d MiB, estimated %d MiB", peak>>20, t.plan.Memory.TotalBytes>>20)
	}
	if device, ok := t.backend.Device(); ok {
		message += fmt.Sprintf("; %d MiB of %s are in use by all, estimated %d MiB by this job", (device.MemoryBytes-device.FreeBytes)>>20, device.Description, t.plan.Memory.TotalBytes>>20)
	}
	if err := t.info("%s", message); err != nil {
		return err
	}
	return t.emit(child.TrainerEvent{Type: child.EventDone, Step: t.step, TotalSteps: t.plan.TotalSteps, TrainedTokens: t.trained, Message: message})
}
