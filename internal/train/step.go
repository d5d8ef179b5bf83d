package train

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
)

const (
	// defaultMicroTokens is the size of a micro-batch: larger ones are hardly faster and take more memory.
	defaultMicroTokens = 1024
	// minMicroTokens ends the halving of micro-batches.
	minMicroTokens = 32
	// maxSkipped is how many steps in a row may have a loss or gradient that is not a number.
	maxSkipped = 5
)

func (t *trainer) microTokens() int {
	if n := t.plan.Memory.MicroBatchTokens; n > 0 {
		return n
	}
	return defaultMicroTokens
}

// work is the examples of one optimizer step.
type work struct {
	step, microTokens int // that it is for, counted from 0, and that it is packed for
	epoch             int
	examples          []dataset.Example
	micros            []dataset.Micro
	tokens            int
	next              *pending // of the step after it, or none
}

// after returns what says which micro-batch follows micros[i].
func (w work) after(i int) func() (engine.Batch, bool) {
	return func() (engine.Batch, bool) {
		micros := w.micros[i+1:]
		if len(micros) == 0 && w.next != nil {
			<-w.next.done
			micros = w.next.micros
		}
		if len(micros) == 0 {
			return engine.Batch{}, false
		}
		return micros[0].Batch, true
	}
}

// pack makes micro-batches of a step's examples and chooses their dropout masks: every token of a row has its own. The
// answers of an example have those of their row, so that both of a pair lose the same.
func (t *trainer) pack(examples []dataset.Example, epoch, microTokens int) work {
	w := work{microTokens: microTokens, epoch: epoch, examples: examples, micros: dataset.Pack(examples, microTokens, t.plan.PrefixSharing)}
	for i := range w.micros {
		m := &w.micros[i]
		w.tokens += m.Tokens
		m.Batch.Weigh = weigh(t.objective, *m, examples)
		if t.plan.LoraDropout > 0 {
			m.Batch.Seeds = make([]uint32, len(m.Owners))
			for k, o := range m.Owners {
				m.Batch.Seeds[k] = dropoutSeed(t.plan.Seed, epoch, int(o.Row), int(o.Position))
			}
		}
	}
	return w
}

// loader reads and packs the examples of the next step while the current one is computed.
type loader struct {
	t     *trainer
	ahead *pending
	order dataset.Order // of epoch
	epoch int
}

type loaded struct {
	work
	err error
}

// pending is work that is being loaded.
type pending struct {
	done chan struct{} // closed once the rest is set
	loaded
}

func newLoader(t *trainer) *loader { return &loader{t: t, epoch: -1} }

// next returns the work of a step, packed for so many tokens, and begins with that of the step after it.
func (l *loader) next(step int) (work, error) {
	microTokens := l.t.microTokens()
	var w loaded
	if l.ahead != nil {
		<-l.ahead.done
		w = l.ahead.loaded
	}
	if w.step != step || w.microTokens != microTokens {
		w = l.load(step, microTokens)
	}
	l.ahead = nil
	if step+1 < l.t.plan.TotalSteps {
		next := &pending{done: make(chan struct{})}
		l.ahead, w.next = next, next
		go func() {
			defer close(next.done)
			next.loaded = l.load(step+1, microTokens)
		}()
	}
	return w.work, w.err
}

func (l *loader) load(step, microTokens int) loaded {
	t := l.t
	perEpoch := stepsPerEpoch(t.data.Rows, t.plan.BatchSize)
	epoch, position := step/perEpoch, step%perEpoch*t.plan.BatchSize
	if epoch != l.epoch {
		l.order, l.epoch = t.data.Order(t.plan.Seed, epoch), epoch
	}
	examples, err := t.data.Examples(l.order, position, position+t.plan.BatchSize)
	if err != nil {
		return loaded{err: err}
	}
	w := t.pack(examples, epoch, microTokens)
	w.step = step
	return loaded{work: w}
}

// close waits for what is still being read.
func (l *loader) close() {
	if l.ahead != nil {
		<-l.ahead.done
	}
}

// optimize does one optimizer step and reports it. The loss of the step is the mean over its trained tokens, or over its examples
// where an objective compares their answers, in whatever micro-batches they come.
func (t *trainer) optimize(ctx context.Context, w work, schedule Schedule) error {
	began := time.Now()
	t.beginStep(w.tokens)
	total, err := t.gradients(ctx, w)
	if err != nil {
		return fmt.Errorf("step %d: %w", t.step+1, err)
	}
	rate := schedule.Rate(t.step)
	gradientNorm := norm(t.lora.Gradients) / total.Weight
	if finite(total.Loss) && finite(gradientNorm) {
		scale := 1 / total.Weight
		if t.plan.MaxGradNorm > 0 && gradientNorm > t.plan.MaxGradNorm { // 0 turns clipping off, as in HF
			scale *= t.plan.MaxGradNorm / gradientNorm
		}
		optimizer := AdamW{t.plan.AdamBeta1, t.plan.AdamBeta2, t.plan.AdamEpsilon, t.plan.WeightDecay}
		optimizer.step(t.lora.Parameters, t.lora.Gradients, t.moments, scale, rate, t.step+1)
		t.skipped = 0
		t.window.add(total)
	} else if err := t.skip(); err != nil {
		return err
	}
	t.step++
	t.trained += int64(w.tokens)
	t.endStep(w.tokens, time.Since(began))
	if t.window.Steps == 0 || t.step%max(1, t.plan.LoggingSteps) != 0 && t.step != t.plan.TotalSteps {
		return nil
	}
	e := t.window.event(t.plan.Method)
	e.Step, e.TotalSteps, e.TrainedTokens, e.LearningRate = t.step, t.plan.TotalSteps, t.trained, rate
	if finite(gradientNorm) {
		e.GradNorm = gradientNorm
	}
	t.window = window{}
	return t.report(e)
}

// gradients sums up those of a step's micro-batches. If memory runs out, it halves them and begins again: the step's
// examples stay the same.
func (t *trainer) gradients(ctx context.Context, w work) (scores, error) {
	for {
		total, err := t.accumulate(ctx, w)
		if !errors.Is(err, ggml.ErrMemory) {
			return total, err
		}
		if err := t.halve(w.micros); err != nil {
			return total, err
		}
		w = t.pack(w.examples, w.epoch, t.microTokens())
		t.beginStep(w.tokens)
	}
}

func (t *trainer) accumulate(ctx context.Context, w work) (scores, error) {
	clear(t.lora.Gradients)
	var total scores
	for i, m := range w.micros {
		if ctx.Err() != nil {
			return total, context.Cause(ctx)
		}
		t.beginMicro(m.Tokens)
		t.yield(ctx)
		// The sum of the losses and not their mean: small gradients stay far from the smallest numbers of the types.
		t.model.Ahead(t.lora, 1, w.after(i))
		r, err := t.compute(m)
		if err != nil {
			return total, err
		}
		score(t.objective, m, w.examples, r, &total)
	}
	return total, nil
}

// halve makes micro-batches smaller, after one of these did not fit into the memory.
func (t *trainer) halve(micros []dataset.Micro) error {
	size := t.microTokens() / 2
	single := !slices.ContainsFunc(micros, func(m dataset.Micro) bool {
		return m.Candidates[0].Example != m.Candidates[len(m.Candidates)-1].Example
	})
	if single || size < minMicroTokens {
		return &child.Error{
			Code:    child.CodeInsufficientMemory,
			Message: fmt.Sprintf("memory ran out with micro-batches of %d tokens, which cannot be made smaller: free some memory, or try a lower max_length (it is %d) or a smaller base model", t.microTokens(), t.plan.MaxLength),
			Param:   "hone.max_length",
		}
	}
	t.plan.Memory.MicroBatchTokens = size
	return t.warn("Memory ran out: going on with micro-batches of %d tokens and the same batch size", size)
}

func finite(x float64) bool { return !math.IsNaN(x) && !math.IsInf(x, 0) }

// skip reports a step whose loss or gradient is not finite, and fails the job after several in a row.
func (t *trainer) skip() error {
	t.skipped++
	if t.skipped >= maxSkipped {
		return &child.Error{
			Code:    child.CodeDiverged,
			Message: fmt.Sprintf("the loss is not a number for %d steps in a row, up to step %d: try a lower learning_rate (it was %g)", t.skipped, t.step+1, t.plan.LearningRate),
			Param:   "hone.learning_rate",
		}
	}
	return t.warn("Step %d skipped: its loss or gradient is not a number", t.step+1)
}

// window sums up the steps since the last event of one. It is part of the resume state.
type window struct {
	Steps    int     `json:"steps"`
	Loss     float64 `json:"loss"`
	Accuracy float64 `json:"accuracy"`
	Compared bool    `json:"compared"`
	Right    float64 `json:"right"`
	Chosen   float64 `json:"chosen"`
	Rejected float64 `json:"rejected"`
}

func (w *window) add(s scores) {
	w.Steps++
	w.Loss += s.meanLoss()
	w.Accuracy += s.accuracy()
	if s.Compared > 0 {
		w.Compared = true
		w.Right += s.Right / s.Compared
		w.Chosen += s.Chosen / s.Compared
		w.Rejected += s.Rejected / s.Compared
	}
}

// event is the mean over the steps.
func (w *window) event(method string) child.TrainerEvent {
	n := float64(w.Steps)
	e := child.TrainerEvent{Type: child.EventStep, TrainLoss: w.Loss / n, TrainAccuracy: w.Accuracy / n}
	mean := func(sum float64) *float64 { sum /= n; return &sum }
	if w.Compared {
		e.ChoiceAccuracy = mean(w.Right)
	}
	if method == methodDPO {
		e.RewardsChosen, e.RewardsRejected = mean(w.Chosen), mean(w.Rejected)
	}
	return e
}
