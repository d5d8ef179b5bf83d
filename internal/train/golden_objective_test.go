package train

import (
	"fmt"
	"math"
	"slices"
	"testing"

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

// candidates are examples packed into one micro-batch whose loss is an objective's.
type candidates struct{ dataset.Micro }

func packCandidates(t *testing.T, examples []dataset.Example) candidates {
	t.Helper()
	micros := dataset.Pack(examples, 1<<20, false)
	if len(micros) != 1 {
		t.Fatalf("%d micro-batches, expected 1", len(micros))
	}
	return candidates{micros[0]}
}

// logProbs are the log-probabilities of the candidates, in nats.
func (c candidates) logProbs(losses []float32) []float64 {
	sums := make([]float64, len(c.Candidates))
	for i, candidate := range c.Candidates {
		for k, target := range candidate.Targets {
			sums[i] -= float64(candidate.Weights[k]) * float64(losses[target])
		}
	}
	return sums
}

// gradients adds the gradients of objective, which returns the derivatives of a loss with respect to the log-probability
// of each candidate.
func (c candidates) gradients(t *testing.T, a adapter, objective func(logProbs []float64) []float64) {
	t.Helper()
	b := c.Batch
	b.Weigh = func(losses []float32) ([]float32, error) {
		weights := make([]float32, len(losses))
		derivatives := objective(c.logProbs(losses))
		for i, candidate := range c.Candidates {
			for k, target := range candidate.Targets {
				weights[target] -= candidate.Weights[k] * float32(derivatives[i])
			}
		}
		return weights, nil
	}
	clear(a.lora.Gradients)
	if _, err := a.model.Gradients(b, a.lora, 1); err != nil {
		t.Fatal(err)
	}
}

// TestGoldenPreferences compares preference optimisation with TRL's formulae over PEFT: the log-probabilities of both
// rows with the adapter and without, the losses, the rewards and all gradients, of separate rows and of pairs that
// share the computation of what they have in common.
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
			Name            string    `json:"name"`
			LossType        string    `json:"loss_type"`
			Beta            float64   `json:"beta"`
			LabelSmoothing  float64   `json:"label_smoothing"`
			Loss            float64   `json:"loss"`
			PairLosses      []float64 `json:"pair_losses"`
			RewardsChosen   float64   `json:"rewards_chosen"`
			RewardsRejected float64   `json:"rewards_rejected"`
			Accuracy        float64   `json:"accuracy"`
		} `json:"losses"`
	}
	tensors := readGoldenFiles(t, "tiny-dpo", &golden)
	a := golden.load(t)
	var apart, together []dataset.Example
	for i, pair := range golden.Pairs {
		rows := []prompt.Row{pair.Chosen.row(), pair.Rejected.row()}
		together = append(together, dataset.Example{Row: i, Candidates: rows})
		for _, row := range rows {
			apart = append(apart, dataset.Example{Row: i, Candidates: []prompt.Row{row}})
		}
	}
	for packing, examples := range map[string][]dataset.Example{"rows apart": apart, "prefixes shared": together} {
		pack := packCandidates(t, examples)
		result, err := a.model.Evaluate(pack.Batch, nil)
		if err != nil {
			t.Fatal(err)
		}
		referenceLogProbs := pack.logProbs(result.Losses)
		for _, want := range golden.Losses {
			objective := preference{beta: want.Beta, smoothing: want.LabelSmoothing, ipo: want.LossType == "ipo"}
			what := fmt.Sprintf("%s, %s", want.Name, packing)
			n := float64(len(golden.Pairs))
			pack.gradients(t, a, func(logProbs []float64) []float64 {
				derivatives := make([]float64, len(logProbs))
				var loss, chosen, rejected, right float64
				for i, pair := range golden.Pairs {
					policy, reference, lengths := [2]float64(logProbs[2*i:]), [2]float64(referenceLogProbs[2*i:]), [2]float64{1, 1}
					for k, row := range []goldenRow{pair.Chosen, pair.Rejected} {
						near(t, fmt.Sprintf("%s: log-probability %d of pair %d", what, k, i), policy[k], pair.Policy[k])
						near(t, fmt.Sprintf("%s: reference %d of pair %d", what, k, i), reference[k], pair.Reference[k])
						if objective.ipo {
							lengths[k] = trainedTokens(row)
						}
						policy[k] /= lengths[k]
						reference[k] /= lengths[k]
					}
					c := objective.compare(policy, reference)
					near(t, fmt.Sprintf("%s: loss of pair %d", what, i), c.loss, want.PairLosses[i])
					loss += c.loss / n
					chosen += c.rewards[0] * lengths[0] / n
					rejected += c.rewards[1] * lengths[1] / n
					if c.right {
						right += 1 / n
					}
					for k := range 2 {
						derivatives[2*i+k] = c.gradient[k] / lengths[k] / n
					}
				}
				near(t, what+": loss", loss, want.Loss)
				near(t, what+": rewards of chosen rows", chosen, want.RewardsChosen)
				near(t, what+": rewards of rejected rows", rejected, want.RewardsRejected)
				if !objective.ipo {
					near(t, what+": accuracy", right, want.Accuracy)
				}
				return derivatives
			})
			a.compare(t, fmt.Sprintf("%s (%d tokens)", what, len(pack.Batch.Tokens)), func(name string) gguf.Float32Tensor { return tensors[want.Name+"."+name] })
		}
	}
}

func trainedTokens(r goldenRow) float64 {
	n := 0.0
	for _, w := range r.Weights {
		n += float64(w)
	}
	return n
}

// TestGoldenChoices compares the loss over the logits of the choices alone with PyTorch's.
func TestGoldenChoices(t *testing.T) {
	var golden struct {
		goldenObjective
		Choices []engine.Token `json:"choices"`
		Rows    []struct {
			goldenRow
			Position int     `json:"position"`
			Answer   int     `json:"answer"`
			Loss     float64 `json:"loss"`
			Right    bool    `json:"right"`
		} `json:"rows"`
		Loss     float64 `json:"loss"`
		Accuracy float64 `json:"accuracy"`
	}
	tensors := readGoldenFiles(t, "tiny-choice", &golden)
	a := golden.load(t)
	var examples []dataset.Example
	for i, row := range golden.Rows {
		e := dataset.Example{Row: i, Right: row.Answer}
		for _, choice := range golden.Choices {
			c := row.row()
			c.Tokens = append(slices.Clone(c.Tokens[:row.Position+1]), choice)
			e.Candidates = append(e.Candidates, c)
		}
		examples = append(examples, e)
	}
	n := float64(len(golden.Rows))
	packCandidates(t, examples).gradients(t, a, func(logProbs []float64) []float64 {
		var derivatives []float64
		var loss, right float64
		for i, row := range golden.Rows {
			c := choose(logProbs[i*len(golden.Choices):(i+1)*len(golden.Choices)], row.Answer)
			near(t, fmt.Sprintf("loss of row %d", i), c.loss, row.Loss)
			if c.right != row.Right {
				t.Errorf("row %d: right is %t, PyTorch has %t", i, c.right, row.Right)
			}
			loss += c.loss / n
			if c.right {
				right += 1 / n
			}
			for _, d := range c.gradient {
				derivatives = append(derivatives, d/n)
			}
		}
		near(t, "loss", loss, golden.Loss)
		near(t, "accuracy", right, golden.Accuracy)
		return derivatives
	})
	a.compare(t, "choices", func(name string) gguf.Float32Tensor { return tensors[name] })
}
