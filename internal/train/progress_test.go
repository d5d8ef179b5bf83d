package train

import (
	"math"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/ggml"
)

// What is left of a job shrinks with the evaluation that runs, at the speed that is measured in it.
func TestTimeLeftInEvaluation(t *testing.T) {
	p := progress{
		backend: &ggml.Backend{}, plan: child.TrainPlan{TotalSteps: 10}, step: 4, trained: 4000, training: 40 * time.Second,
		tokensLeft: 6000, validLeft: 2000, validSeconds: 0.01,
	}
	about := func(name string, want float64) {
		t.Helper()
		if got := p.event().SecondsLeft; math.Abs(got-want) > 1 {
			t.Errorf("%s: %.2f s left, want %v", name, got, want)
		}
	}
	about("between steps", 60+20)
	p.evalBegan, p.evalTokens = time.Now().Add(-4*time.Second), 1000
	about("in an evaluation, at the speed of the one before", 60+16)
	p.evalShare = 0.2
	about("in an evaluation that is slower", 60+16+20)
	p.evalBegan = time.Now().Add(-30 * time.Second)
	p.evalShare = 0
	about("in one that takes longer than thought", 60+10)
	p.validSeconds, p.evalBegan = 0, time.Now().Add(-2*time.Second)
	about("in the first, before anything of it is measured", 60+8-2)
}

func TestEvaluationsLeft(t *testing.T) {
	tr := &trainer{
		valid: &dataset.Dataset{Summary: dataset.Summary{Rows: 1, Tokens: 1}}, data: &dataset.Dataset{Summary: dataset.Summary{Rows: 8}},
		plan: child.TrainPlan{TotalSteps: 10, EvalStrategy: "steps", EvalSteps: 4, BatchSize: 2},
	}
	for step, want := range map[int]int64{0: 3, 3: 3, 4: 2, 7: 2, 8: 1, 9: 1, 10: 0} {
		if tr.step = step; tr.validTokensLeft() != want {
			t.Errorf("after step %d: %d evaluations, want %d", step, tr.validTokensLeft(), want)
		}
	}
	tr.plan.EvalSteps = 5
	for step, want := range map[int]int64{0: 2, 5: 1, 9: 1, 10: 0} {
		if tr.step = step; tr.validTokensLeft() != want {
			t.Errorf("after step %d of 10, every 5: %d evaluations, want %d", step, tr.validTokensLeft(), want)
		}
	}
	tr.plan.EvalStrategy, tr.plan.TotalSteps = "epoch", 8
	for step, want := range map[int]int64{0: 2, 3: 2, 4: 1, 7: 1, 8: 0} {
		if tr.step = step; tr.validTokensLeft() != want {
			t.Errorf("after step %d of two epochs: %d evaluations, want %d", step, tr.validTokensLeft(), want)
		}
	}
}
