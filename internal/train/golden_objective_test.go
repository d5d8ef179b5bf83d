package train

import (
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/prompt"
)

// goldenObjective is what the two files of scripts/golden/objective_golden.py share; its head explains every field.
type goldenObjective struct {
	R         int     `json:"r"`
	LoraAlpha float64 `json:"lora_alpha"`
	BBound    float64 `json:"b_bound"`
}

func (g goldenObjective) load(t *testing.T) adapter {
	t.Helper()
	a := loadAdapter(t, "testdata/tiny-llama-q4_1.gguf", graph.Layout{Forward: ggml.F32, Backward: ggml.F32}, 1,
		graph.LoRAOptions{Rank: g.R, Alpha: g.LoraAlpha, Modules: graph.AllLinear})
	a.initialise(g.BBound)
	return a
}

// compare logs and bounds the relative error of the adapter's gradients, tensor by tensor.
func (a adapter) compare(t *testing.T, what string, want func(name string) gguf.Float32Tensor) {
	t.Helper()
	worst, where := 0.0, ""
	a.eachGradient(func(p graph.Part, half int, got []float32) {
		name := tensorName(p, half)
		if e := distance(got, want(name).Data); e > worst || math.IsNaN(e) {
			worst, where = e, name
		}
	})
	t.Logf("%s: relative error of the gradients at most %.3g (%s)", what, worst, where)
	if !(worst < rounding()) {
		t.Errorf("%s: gradients are not PyTorch's", what)
	}
}

// near reports a number that is not the wanted one. Numbers below 1 are sums of larger ones.
func near(t *testing.T, what string, got, want float64) {
	t.Helper()
	if !(math.Abs(got-want) <= rounding()*math.Max(1, math.Abs(want))) {
		t.Errorf("%s: got %.7g, PyTorch has %.7g", what, got, want)
	}
}

// gradientStep does a step of the trainer at rate 0 and leaves the gradient of the step's loss in the adapter, with micro-batches
// of at most microTokens tokens.
func (a attempt) gradientStep(t *testing.T, examples []dataset.Example, microTokens int) child.TrainerEvent {
	t.Helper()
	step := a.optimize(t, examples, microTokens, Schedule{Kind: "constant"})
	for i := range a.lora.Gradients { // they are those of the sum
		a.lora.Gradients[i] /= float32(len(examples))
	}
	return step
}

// TestGoldenPreferences compares preference optimisation with TRL's, over PEFT: the log-probabilities of both
// rows with the adapter and without, the loss, the rewards and all gradients, in one micro-batch and in several.
func TestGoldenPreferences(t *testing.T) {
	var golden struct {
		goldenObjective
		Pairs []struct {
			Chosen    goldenRow  `json:"chosen"`
			Rejected  goldenRow  `json:"rejected"`
			Policy    [2]float64 `json:"policy"`
			Reference [2]float64 `json:"reference"`
		} `json:"pairs"`
		Losses []struct {
			Name            string  `json:"name"`
			LossType        string  `json:"loss_type"`
			Beta            float64 `json:"beta"`
			LabelSmoothing  float64 `json:"label_smoothing"`
			Loss            float64 `json:"loss"`
			RewardsChosen   float64 `json:"rewards_chosen"`
			RewardsRejected float64 `json:"rewards_rejected"`
			Accuracy        float64 `json:"accuracy"`
		} `json:"losses"`
	}
	tensors := readGoldenFiles(t, "tiny-dpo", &golden)
	a := golden.load(t)
	var examples []dataset.Example
	for i, pair := range golden.Pairs {
		rows := []prompt.Row{pair.Chosen.row(), pair.Rejected.row()}
		examples = append(examples, dataset.Example{Row: i, Candidates: rows, Tokens: len(rows[0].Tokens) + len(rows[1].Tokens)})
	}
	attempt := a.attempt(t, child.TrainPlan{Method: methodDPO, NumTrainEpochs: 1, BatchSize: len(examples), TotalSteps: 1000, AdamEpsilon: 1e-8}, examples)
	reference, err := attempt.references(t.Context(), attempt.data)
	if err != nil {
		t.Fatal(err)
	}
	policy, err := attempt.answers(t.Context(), examples, a.lora)
	if err != nil {
		t.Fatal(err)
	}
	for i, pair := range golden.Pairs {
		for k := range 2 {
			near(t, fmt.Sprintf("log-probability of row %d of pair %d", k, i), policy[i][k].logProb, pair.Policy[k])
			near(t, fmt.Sprintf("reference of row %d of pair %d", k, i), reference[i][k], pair.Reference[k])
		}
	}
	for _, want := range golden.Losses {
		attempt.objective = preferences{preference{beta: want.Beta, smoothing: want.LabelSmoothing, ipo: want.LossType == "ipo"}, reference}
		for _, microTokens := range []int{defaultMicroTokens, 60} {
			what := fmt.Sprintf("%s, micro-batches of %d tokens", want.Name, microTokens)
			step := attempt.gradientStep(t, examples, microTokens)
			if step.RewardsChosen == nil || step.RewardsRejected == nil || step.ChoiceAccuracy == nil {
				t.Fatalf("%s: the step reports no rewards: %+v", what, step)
			}
			near(t, what+": loss", step.TrainLoss, want.Loss)
			near(t, what+": rewards of chosen rows", *step.RewardsChosen, want.RewardsChosen)
			near(t, what+": rewards of rejected rows", *step.RewardsRejected, want.RewardsRejected)
			near(t, what+": accuracy", *step.ChoiceAccuracy, want.Accuracy)
			a.compare(t, what, func(name string) gguf.Float32Tensor { return tensors[want.Name+"."+name] })
		}
	}
}

// TestGoldenChoices compares the loss over the logits of the choices alone with PyTorch's.
func TestGoldenChoices(t *testing.T) {
	var golden struct {
		goldenObjective
		Choices []engine.Token `json:"choices"`
		Rows    []struct {
			goldenRow
			Position int  `json:"position"`
			Answer   int  `json:"answer"`
			Right    bool `json:"right"`
		} `json:"rows"`
		Loss     float64 `json:"loss"`
		Accuracy float64 `json:"accuracy"`
	}
	tensors := readGoldenFiles(t, "tiny-choice", &golden)
	a := golden.load(t)
	var examples []dataset.Example
	for i, row := range golden.Rows {
		e := dataset.Example{Row: i, Right: row.Answer, Tokens: len(row.Tokens)}
		for _, choice := range golden.Choices {
			c := row.row()
			c.Tokens = append(slices.Clone(c.Tokens[:row.Position+1]), choice)
			e.Candidates = append(e.Candidates, c)
		}
		examples = append(examples, e)
	}
	attempt := a.attempt(t, child.TrainPlan{Choices: []string{"A", "B", "C", "D"}, NumTrainEpochs: 1, BatchSize: len(examples), TotalSteps: 1000, AdamEpsilon: 1e-8}, examples)
	attempt.objective = choice{}
	for _, microTokens := range []int{defaultMicroTokens, 60} {
		what := fmt.Sprintf("micro-batches of %d tokens", microTokens)
		step := attempt.gradientStep(t, examples, microTokens)
		if step.ChoiceAccuracy == nil {
			t.Fatalf("%s: the step reports no accuracy: %+v", what, step)
		}
		near(t, what+": loss", step.TrainLoss, golden.Loss)
		near(t, what+": accuracy", *step.ChoiceAccuracy, golden.Accuracy)
		a.compare(t, what, func(name string) gguf.Float32Tensor { return tensors[name] })
	}
	answers, err := attempt.answers(t.Context(), examples, a.lora)
	if err != nil {
		t.Fatal(err)
	}
	for i, row := range golden.Rows {
		if right := choose(logProbs(answers[i]), row.Answer).right; right != row.Right {
			t.Errorf("row %d: right is %t, PyTorch has %t", i, right, row.Right)
		}
	}
}
