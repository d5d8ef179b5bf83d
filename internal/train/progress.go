package train

import (
	"sync"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/ggml"
)

// progress is what the reporting goroutine reads while the training goroutine computes.
type progress struct {
	mu           sync.Mutex
	backend      *ggml.Backend
	plan         child.TrainPlan
	step         int
	stepTokens   int           // of the current step
	doneTokens   int           // of it, in finished micro-batches
	microTokens  int           // of the running micro-batch
	trained      int64         // tokens since this attempt began
	training     time.Duration // that they took
	stepBegan    time.Time     // zero outside of steps
	tokensLeft   int64         // after the current step
	validLeft    int64         // tokens still to be evaluated
	validSeconds float64       // seconds per token of evaluation, once known
	evalBegan    time.Time     // zero outside of evaluations
	evalTokens   int           // of one evaluation
	evalShare    float64       // of the running one that is done
}

func (t *trainer) beginStep(tokens int) {
	p := &t.progress
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.backend == nil {
		p.backend, p.plan = t.backend, t.plan
		p.validLeft = t.validTokensLeft()
	}
	p.step, p.stepTokens, p.doneTokens, p.microTokens, p.stepBegan = t.step, tokens, 0, 0, time.Now()
	perStep := float64(t.data.Tokens) / float64(stepsPerEpoch(t.data.Rows, t.plan.BatchSize))
	p.tokensLeft = int64(perStep * float64(t.plan.TotalSteps-t.step-1))
}

// validTokensLeft are those of the evaluations after the current step.
func (t *trainer) validTokensLeft() int64 {
	if t.valid == nil || t.plan.EvalStrategy == "no" || t.step >= t.plan.TotalSteps {
		return 0
	}
	every := stepsPerEpoch(t.data.Rows, t.plan.BatchSize)
	if t.plan.EvalStrategy == "steps" {
		every = t.plan.EvalSteps
	}
	left := (t.plan.TotalSteps+every-1)/every - t.step/every // the last step has one whatever its number
	return int64(left) * int64(t.valid.Tokens)
}

func (t *trainer) beginEvaluation() {
	p := &t.progress
	p.mu.Lock()
	defer p.mu.Unlock()
	p.evalBegan, p.evalTokens, p.evalShare = time.Now(), t.valid.Tokens, 0
}

// evaluatedRows says how many rows of the running evaluation are done.
func (t *trainer) evaluatedRows(rows int) {
	p := &t.progress
	p.mu.Lock()
	defer p.mu.Unlock()
	p.evalShare = float64(rows) / float64(max(1, t.valid.Rows))
}

func (t *trainer) endEvaluation(took time.Duration) {
	p := &t.progress
	p.mu.Lock()
	defer p.mu.Unlock()
	p.validSeconds = took.Seconds() / float64(max(1, t.valid.Tokens))
	p.validLeft, p.evalBegan = t.validTokensLeft(), time.Time{}
}

func (t *trainer) beginMicro(tokens int) {
	t.progress.mu.Lock()
	defer t.progress.mu.Unlock()
	t.progress.doneTokens += t.progress.microTokens
	t.progress.microTokens = tokens
}

func (t *trainer) endStep(tokens int, took time.Duration) {
	t.progress.mu.Lock()
	defer t.progress.mu.Unlock()
	t.progress.trained += int64(tokens)
	t.progress.training += took
	t.progress.step, t.progress.stepTokens, t.progress.stepBegan = t.step, 0, time.Time{}
}

// reportProgress emits a progress event every second, also while one step computes, until done is closed.
func (t *trainer) reportProgress(done <-chan struct{}) {
	ticker := time.NewTicker(progressInterval)
	defer ticker.Stop()
	for {
		select {
		case <-done:
			return
		case <-ticker.C:
			if err := t.emit(t.progress.event()); err != nil {
				return // the parent is gone, which ends the attempt elsewhere
			}
		}
	}
}

func (p *progress) event() child.TrainerEvent {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := child.TrainerEvent{Type: child.EventProgress, Step: p.step, TotalSteps: p.plan.TotalSteps}
	if p.backend == nil {
		return e // still reading data or loading the model
	}
	inStep := 0.0
	took := p.training
	if p.stepTokens > 0 {
		inStep = float64(p.doneTokens) + float64(p.microTokens)*p.backend.Progress()
		e.Fraction = min(0.999, inStep/float64(p.stepTokens))
		took += time.Since(p.stepBegan)
	}
	if seconds := took.Seconds(); seconds > 0 {
		e.TokensPerSecond = (float64(p.trained) + inStep) / seconds
	}
	if e.TokensPerSecond > 0 {
		e.SecondsLeft = (float64(p.tokensLeft) + float64(p.stepTokens) - inStep) / e.TokensPerSecond
		perToken := p.validSeconds
		if perToken == 0 {
			perToken = 0.4 / e.TokensPerSecond // a forward pass is about 40% of a step
		}
		left := float64(p.validLeft)
		if !p.evalBegan.IsZero() {
			elapsed := time.Since(p.evalBegan).Seconds()
			if done := p.evalShare * float64(p.evalTokens); done > 0 {
				perToken = elapsed / done
			}
			left -= min(left, float64(p.evalTokens), elapsed/perToken)
		}
		e.SecondsLeft += left * perToken
	}
	return e
}
