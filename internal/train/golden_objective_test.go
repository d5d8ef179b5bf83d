package train

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
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
	if !(worst < 3e-5) {
		t.Errorf("%s: gradients are not PyTorch's", what)
	}
}

// near reports a number that is not the wanted one. Numbers below 1 are sums of larger ones.
func near(t *testing.T, what string, got, want float64) {
	t.Helper()
	if !(math.Abs(got-want) <= 3e-5*math.Max(1, math.Abs(want))) {
		t.Errorf("%s: got %.7g, PyTorch has %.7g", what, got, want)
	}
}

// place is where a label is asked for.
type place struct {
	position int
	label    engine.Token
}

// packer makes a micro-batch of candidates: rows of trained tokens whose log-probabilities an objective compares.
type packer struct {
	batch      engine.Batch
	places     map[place][]int // candidates that the label at this place belongs to
	candidates int
	users      [][]int // of each target
}

func (p *packer) segment(tokens []engine.Token, parent int) (index, start int) {
	start = len(p.batch.Tokens)
	if len(tokens) == 0 {
		return parent, start
	}
	p.batch.Tokens = append(p.batch.Tokens, tokens...)
	p.batch.Segments = append(p.batch.Segments, engine.Segment{Start: start, End: start + len(tokens), Parent: parent})
	return len(p.batch.Segments) - 1, start
}

func (p *packer) target(position int, label engine.Token, candidate int) {
	if p.places == nil {
		p.places = make(map[place][]int)
	}
	at := place{position, label}
	p.places[at] = append(p.places[at], candidate)
}

// add packs rows that begin with the same tokens, computed once if share is set.
func (p *packer) add(share bool, rows ...goldenRow) {
	common := 0
	for share && !slices.ContainsFunc(rows, func(r goldenRow) bool {
		return common >= len(r.Tokens) || r.Tokens[common] != rows[0].Tokens[common]
	}) {
		common++
	}
	prefix, first := p.segment(rows[0].Tokens[:common], -1)
	for _, row := range rows {
		_, start := p.segment(row.Tokens[common:], prefix)
		for i, w := range row.Weights {
			if w == 0 {
				continue
			}
			position := first + i - 1
			if i > common {
				position = start + i - 1 - common
			}
			p.target(position, row.Tokens[i], p.candidates)
		}
		p.candidates++
	}
}

// finish orders the targets. Gradients then follows objective, which gets the log-probability of each candidate and returns the
// derivatives of a loss with respect to them.
func (p *packer) finish(objective func(logProbs []float64) []float64) engine.Batch {
	order := slices.SortedFunc(maps.Keys(p.places), func(a, b place) int {
		return cmp.Or(cmp.Compare(a.position, b.position), cmp.Compare(a.label, b.label))
	})
	for _, at := range order {
		p.batch.Targets = append(p.batch.Targets, engine.Target{Position: at.position, Label: at.label, Weight: 1})
		p.users = append(p.users, p.places[at])
	}
	b := p.batch
	b.Weigh = func(losses []float32) ([]float32, error) {
		weights := make([]float32, len(losses))
		derivatives := objective(p.logProbs(losses))
		for i, users := range p.users {
			for _, c := range users {
				weights[i] -= float32(derivatives[c])
			}
		}
		return weights, nil
	}
	return b
}

func (p *packer) logProbs(losses []float32) []float64 {
	sums := make([]float64, p.candidates)
	for i, users := range p.users {
		for _, c := range users {
			sums[c] -= float64(losses[i])
		}
	}
	return sums
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
	for _, share := range []bool{false, true} {
		var reference packer
		for _, pair := range golden.Pairs {
			reference.add(share, pair.Chosen, pair.Rejected)
		}
		result, err := a.model.Evaluate(reference.finish(nil), nil)
		if err != nil {
			t.Fatal(err)
		}
		referenceLogProbs := reference.logProbs(result.Losses)
		for _, want := range golden.Losses {
			objective := preference{beta: want.Beta, smoothing: want.LabelSmoothing, ipo: want.LossType == "ipo"}
			var p packer
			for _, pair := range golden.Pairs {
				p.add(share, pair.Chosen, pair.Rejected)
			}
			what := fmt.Sprintf("%s, shared prefixes %t", want.Name, share)
			n := float64(len(golden.Pairs))
			batch := p.finish(func(logProbs []float64) []float64 {
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
			clear(a.lora.Gradients)
			if _, err := a.model.Gradients(batch, a.lora, 1); err != nil {
				t.Fatal(err)
			}
			a.compare(t, fmt.Sprintf("%s (%d tokens)", what, len(batch.Tokens)), func(name string) gguf.Float32Tensor { return tensors[want.Name+"."+name] })
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
	var p packer
	for _, row := range golden.Rows {
		_, start := p.segment(row.Tokens, -1)
		for _, choice := range golden.Choices {
			p.target(start+row.Position, choice, p.candidates)
			p.candidates++
		}
	}
	n := float64(len(golden.Rows))
	batch := p.finish(func(logProbs []float64) []float64 {
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
	if _, err := a.model.Gradients(batch, a.lora, 1); err != nil {
		t.Fatal(err)
	}
	a.compare(t, "choices", func(name string) gguf.Float32Tensor { return tensors[name] })
}
