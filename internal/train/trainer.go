// Package train runs one attempt at a fine-tuning job: it reads the data, loads the base model, and steps an adapter
// with AdamW until the plan is done, saving resume states on the way.
//
//	err := train.Run(ctx, config, commands, events) // the trainer process is little more than this
//
// A job that is resumed from a state continues bit for bit: the order of the rows and the dropout masks follow from
// seed, epoch and row, and every sum runs in a fixed order for a given number of threads.
package train

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/lora"
)

const (
	// microTokens is the size of a micro-batch: larger ones are hardly faster and take more memory.
	microTokens = 1024
	// maxSkipped is how many steps in a row may have a loss or gradient that is not a number.
	maxSkipped       = 5
	progressInterval = time.Second
	defaultSave      = 5 * time.Minute
)

// errStopped ends an attempt on request; its resume state is saved.
var errStopped = errors.New("stopped")

// errOrphaned ends an attempt whose parent is gone.
var errOrphaned = errors.New("the server that started this trainer is gone")

// Run trains the job until it is done, stopped or failed, and writes its events, one JSON object a line. A command
// "stop", or the end of ctx, saves a resume state and returns nil without the event done; the end of commands (the parent died) returns an
// error. A job that cannot succeed by being tried again ends with the event failed and nil; other errors are returned.
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
	small        bool
	data, valid  *dataset.Dataset
	template     string // digest
	architecture string
	plan         child.TrainPlan
	moments      moments
	step         int
	trained      int64 // tokens
	saved        int   // step of the newest resume state
	savedAt      time.Time
	skipped      int // steps in a row without an update

	progress progress
}

func (t *trainer) close() {
	t.lora.Close()
	t.model.Close()
	t.backend.Close()
	t.data.Close()
	t.valid.Close()
}

func (t *trainer) run(ctx context.Context) error {
	if err := t.prepare(ctx); err != nil {
		return err
	}
	// Abort interrupts the computation from another goroutine; wait for it, so that it cannot meet a closed backend.
	aborted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { t.backend.Abort(); close(aborted) })
	defer func() {
		if !stop() {
			<-aborted
		}
	}()
	err := t.train(ctx)
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

// prepare reads data and model, decides the plan or takes it from a resume state, and reports both.
func (t *trainer) prepare(ctx context.Context) error {
	path := filepath.Join(t.config.ModelDir, "base.gguf")
	file, err := gguf.Open(path)
	if err != nil {
		return &child.Error{Code: child.CodeInvalidModel, Message: err.Error(), Param: "model"}
	}
	defer file.Close()
	if err := gguf.CheckModel(file); err != nil {
		return &child.Error{Code: child.CodeInvalidModel, Message: err.Error(), Param: "model"}
	}
	shape, err := graph.ReadShape(file)
	if err != nil {
		return &child.Error{Code: child.CodeInvalidModel, Message: err.Error(), Param: "model"}
	}
	t.architecture, _ = file.Metadata.String("general.architecture")
	maxLength, err := MaxLength(t.config.Options, shape)
	if err != nil {
		return optionFailure(err)
	}
	if err := t.readData(ctx, path, maxLength); err != nil {
		return err
	}
	if err := t.emit(t.datasetEvent()); err != nil {
		return err
	}

	state, arrays, skipped := findState(t.config.ResumeFrom, t.config.JobID, t.config.BaseDigest)
	for _, err := range skipped {
		if err := t.warn("Skipped a resume state: %v", err); err != nil {
			return err
		}
	}
	if state != nil && state.Rows != t.data.Rows {
		return fmt.Errorf("the resume state is of %d training rows, the file has %d", state.Rows, t.data.Rows)
	}
	weights := shape.Parameters() + shape.Vocabulary*shape.Embedding
	if state == nil {
		t.plan, err = NewPlan(t.config.Options, facts{
			Rows: t.data.Rows, Weights: weights, MaxLength: maxLength, Layers: shape.Layers, Valid: t.valid != nil, Method: t.config.Method, Seed: t.config.Seed,
		})
		if err != nil {
			return optionFailure(err)
		}
	} else {
		t.plan, t.step, t.trained, t.threads = state.Plan, state.Step, state.TrainedTokens, state.Threads
		t.plan.ResumedStep, t.saved = state.Step, state.Step
	}
	layout, err := t.chooseLayout(shape, state)
	if err != nil {
		return err
	}
	if t.backend, err = ggml.NewCPU(t.threads); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if t.model, err = graph.Load(file, t.backend, layout); err != nil {
		var unsupported *graph.UnsupportedError
		if errors.As(err, &unsupported) {
			return &child.Error{Code: child.CodeInvalidModel, Message: err.Error(), Param: "model"}
		}
		return err
	}
	modules, err := modulesOf(t.plan.TargetModules)
	if err != nil {
		return optionFailure(&OptionError{"target_modules", err.Error()})
	}
	t.lora, err = t.model.NewLoRA(graph.LoRAOptions{
		Rank: t.plan.R, Alpha: t.plan.LoraAlpha, RankScale: t.plan.UseRSLoRA, Dropout: t.plan.LoraDropout, Modules: modules,
	})
	if err != nil {
		return err
	}
	t.moments = newMoments(len(t.lora.Parameters))
	if state == nil {
		initialise(t.lora, t.plan.Seed)
	} else {
		for name, into := range map[string][]float32{"parameters": t.lora.Parameters, "first": t.moments.first, "second": t.moments.second} {
			if copy(into, arrays[name]) != len(into) || len(arrays[name]) != len(into) {
				return fmt.Errorf("resume state: %d values of %s, expected %d", len(arrays[name]), name, len(into))
			}
		}
	}
	t.savedAt = time.Now()
	return t.emit(child.TrainerEvent{Type: child.EventPlan, Plan: &t.plan, Step: t.step, TotalSteps: t.plan.TotalSteps})
}

func optionFailure(err error) error {
	var option *OptionError
	if errors.As(err, &option) {
		return &child.Error{Code: child.CodeInvalidRequest, Message: err.Error(), Param: "hone." + option.Option}
	}
	return err
}

func (t *trainer) datasetEvent() child.TrainerEvent {
	e := child.TrainerEvent{Type: child.EventDataset, TrainRows: t.data.Rows, TrainTokens: t.data.Tokens, DroppedRows: t.data.Dropped}
	if t.valid != nil {
		e.ValidRows, e.ValidTokens = t.valid.Rows, t.valid.Tokens
		e.DroppedRows += t.valid.Dropped
	}
	return e
}

func (t *trainer) warn(format string, args ...any) error {
	return t.emit(child.TrainerEvent{Type: child.EventLog, Level: "warn", Message: fmt.Sprintf(format, args...)})
}

// train steps until the plan is done, and exports the adapter.
func (t *trainer) train(ctx context.Context) error {
	perEpoch := stepsPerEpoch(t.data.Rows, t.plan.BatchSize)
	if t.step > 0 && (t.step%perEpoch == 0 || t.step == t.plan.TotalSteps) {
		if err := t.evaluate(ctx, (t.step+perEpoch-1)/perEpoch); err != nil { // the state is saved before the evaluation
			return err
		}
	}
	schedule := Schedule{Kind: t.plan.LRScheduler, Peak: t.plan.LearningRate, Minimum: t.plan.MinLearningRate, Warmup: t.plan.WarmupSteps, Total: t.plan.TotalSteps}
	order, orderEpoch := dataset.Order{}, -1
	for t.step < t.plan.TotalSteps {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		epoch, position := t.step/perEpoch, t.step%perEpoch*t.plan.BatchSize
		if epoch != orderEpoch {
			order, orderEpoch = t.data.Order(t.plan.Seed, epoch), epoch
		}
		examples, err := t.data.Examples(order, position, position+t.plan.BatchSize)
		if err != nil {
			return err
		}
		if err := t.optimize(examples, epoch, schedule); err != nil {
			return err
		}
		ended := t.step%perEpoch == 0 || t.step == t.plan.TotalSteps
		if ended || time.Since(t.savedAt) >= t.saveInterval() {
			if err := t.save(); err != nil {
				return err
			}
		}
		if ended {
			if err := t.evaluate(ctx, epoch+1); err != nil {
				return err
			}
		}
	}
	if err := t.export(); err != nil {
		return err
	}
	return t.emit(child.TrainerEvent{Type: child.EventDone, Step: t.step, TotalSteps: t.plan.TotalSteps, TrainedTokens: t.trained})
}

func (t *trainer) saveInterval() time.Duration {
	if m := t.config.Options.SaveMinutes; m != nil {
		return time.Duration(*m * float64(time.Minute))
	}
	return defaultSave
}

// sums adds up results over micro-batches.
type sums struct{ loss, weight, correct float64 }

func (s *sums) add(b engine.Batch, r engine.Result) {
	for i, target := range b.Targets {
		w := float64(target.Weight)
		s.loss += w * float64(r.Losses[i])
		s.weight += w
		if r.Correct[i] {
			s.correct += w
		}
	}
}

func (s *sums) meanLoss() float64 { return s.loss / s.weight }
func (s *sums) accuracy() float64 { return s.correct / s.weight }

// seeds chooses the dropout masks of a micro-batch: every token of a row has its own.
func (t *trainer) seeds(m dataset.Micro, epoch int) []uint32 {
	seeds := make([]uint32, len(m.Owners))
	for i, o := range m.Owners {
		seeds[i] = dropoutSeed(t.plan.Seed, epoch, int(o.Row), int(o.Position))
	}
	return seeds
}

// optimize does one optimizer step on the given examples and reports it. The loss of the step is the mean over its trained
// tokens, in whatever micro-batches they come.
func (t *trainer) optimize(examples []dataset.Example, epoch int, schedule Schedule) error {
	began := time.Now()
	tokens := 0
	for _, e := range examples {
		tokens += e.Tokens
	}
	t.beginStep(tokens, epoch)
	clear(t.lora.Gradients)
	var total sums
	for _, micro := range dataset.Pack(examples, microTokens, false) {
		b := micro.Batch
		if t.plan.LoraDropout > 0 {
			b.Seeds = t.seeds(micro, epoch)
		}
		t.beginMicro(micro.Tokens)
		// The sum of the losses and not their mean: small gradients stay far from the smallest numbers of the types.
		result, err := t.model.Gradients(b, t.lora, 1)
		if err != nil {
			return fmt.Errorf("step %d: %w", t.step+1, err)
		}
		total.add(b, result)
	}
	rate := schedule.Rate(t.step)
	gradientNorm := norm(t.lora.Gradients) / total.weight
	if finite(total.loss) && finite(gradientNorm) {
		scale := 1 / total.weight
		if t.plan.MaxGradNorm > 0 && gradientNorm > t.plan.MaxGradNorm { // 0 turns clipping off, as in HF
			scale *= t.plan.MaxGradNorm / gradientNorm
		}
		optimizer := AdamW{t.plan.AdamBeta1, t.plan.AdamBeta2, t.plan.AdamEpsilon, t.plan.WeightDecay}
		optimizer.step(t.lora.Parameters, t.lora.Gradients, t.moments, scale, rate, t.step+1)
		t.skipped = 0
	} else if err := t.skip(); err != nil {
		return err
	}
	t.step++
	t.trained += int64(tokens)
	t.endStep(tokens, time.Since(began))
	if t.skipped > 0 {
		return nil
	}
	return t.emit(child.TrainerEvent{
		Type: child.EventStep, Step: t.step, TotalSteps: t.plan.TotalSteps, TrainLoss: total.meanLoss(), TrainAccuracy: total.accuracy(),
		LearningRate: rate, GradNorm: gradientNorm, TrainedTokens: t.trained,
	})
}

func finite(x float64) bool { return !math.IsNaN(x) && !math.IsInf(x, 0) }

// skip reports a step whose loss or gradient is not finite, and fails the job after several in a row.
func (t *trainer) skip() error {
	t.skipped++
	if t.skipped >= maxSkipped {
		return &child.Error{
			Code:    "training_diverged",
			Message: fmt.Sprintf("the loss is not a number for %d steps in a row, up to step %d: try a lower learning_rate (it was %g)", t.skipped, t.step+1, t.plan.LearningRate),
			Param:   "hone.learning_rate",
		}
	}
	return t.warn("Step %d skipped: its loss or gradient is not a number", t.step+1)
}

// evaluate reports loss and token accuracy over the whole validation file, without dropout.
func (t *trainer) evaluate(ctx context.Context, epoch int) error {
	if t.valid == nil {
		return nil
	}
	began := time.Now()
	var total sums
	const together = 64 // examples read at once
	for at := 0; at < t.valid.Rows; at += together {
		examples, err := t.valid.Examples(t.valid.Sequence(), at, at+together)
		if err != nil {
			return err
		}
		for _, micro := range dataset.Pack(examples, microTokens, false) {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			result, err := t.model.Evaluate(micro.Batch, t.lora)
			if err != nil {
				return fmt.Errorf("evaluate after step %d: %w", t.step, err)
			}
			total.add(micro.Batch, result)
		}
	}
	t.progress.mu.Lock()
	t.progress.validSeconds = time.Since(began).Seconds() / float64(t.valid.Tokens)
	t.progress.validLeft = int64(t.plan.NumTrainEpochs-epoch) * int64(t.valid.Tokens)
	t.progress.mu.Unlock()
	if !finite(total.loss) {
		return t.warn("The validation loss after step %d is not a number", t.step)
	}
	return t.emit(child.TrainerEvent{Type: child.EventEval, Step: t.step, TotalSteps: t.plan.TotalSteps, Epoch: epoch, ValidLoss: total.meanLoss(), ValidAccuracy: total.accuracy()})
}

func (t *trainer) save() error {
	s := resumeState{
		JobID: t.config.JobID, BaseDigest: t.config.BaseDigest, Rows: t.data.Rows, Step: t.step, TrainedTokens: t.trained,
		Threads: t.threads, Small: t.small, Plan: t.plan,
	}
	if err := s.save(t.config.Dir, t.lora.Parameters, t.moments); err != nil {
		return err
	}
	t.saved, t.savedAt = t.step, time.Now()
	return t.emit(child.TrainerEvent{Type: child.EventSaved, Step: t.step})
}

// export writes the finished adapter, its manifest last.
func (t *trainer) export() error {
	w := lora.Weights{
		Manifest: lora.Manifest{
			ID: t.config.AdapterID, Name: t.config.AdapterName, BaseModel: t.config.BaseModel, BaseDigest: t.config.BaseDigest,
			JobID: t.config.JobID, CreatedAt: time.Now().Unix(), Rank: t.plan.R, Alpha: t.plan.LoraAlpha, TargetModules: t.plan.TargetModules,
			ChatTemplateDigest: t.template, QuestionTemplate: or(t.config.Options.QuestionTemplate, ""),
			SystemMessage: t.data.SystemMessage, Choices: t.data.Answers, MaxLength: t.data.Longest,
		},
		Architecture: t.architecture, UseRSLoRA: t.plan.UseRSLoRA, Dropout: t.plan.LoraDropout,
		Heads: t.model.Heads.Query, KVHeads: t.model.Heads.KeyValue,
	}
	for _, p := range t.lora.Parts {
		a, b := t.lora.Matrices(t.lora.Parameters, p)
		w.Modules = append(w.Modules, lora.Module{Layer: p.Layer, Name: p.Module.String(), In: p.In, Out: p.Out, A: a, B: b})
	}
	return lora.Export(t.config.AdapterDir, w)
}
