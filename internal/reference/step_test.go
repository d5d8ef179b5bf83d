package reference_test

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/engine/enginetest"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/reference"
)

// parameters are pointers to every weight of an adapter, and to its gradient.
func parameters(l *reference.LoRA) (weights, gradients []*float64) {
	for _, site := range reference.Sites(2, reference.Modules...) {
		p := l.Pairs[site]
		for _, m := range [][2]reference.Matrix{{p.A, p.GradA}, {p.B, p.GradB}} {
			for r, row := range m[0] {
				for i := range row {
					weights, gradients = append(weights, &m[0][r][i]), append(gradients, &m[1][r][i])
				}
			}
		}
	}
	return weights, gradients
}

// The backward pass is the derivative of the forward pass: along random directions and single weights, the gradient
// equals central differences of the objective, for every architecture, over a forest of segments, with dropout, with
// several targets for a position and with an objective that weighs its targets.
func TestGradientsAgainstFiniteDifferences(t *testing.T) {
	forest := enginetest.Forest()
	weighted := func(losses []float64) float64 {
		total := 0.0
		for i, target := range forest.Targets {
			total += float64(target.Weight) * losses[i]
		}
		return total
	}
	preference, preferenceLoss := enginetest.Preference(0.3)
	for _, spec := range enginetest.Models {
		if spec.Type != gguf.F32 {
			continue
		}
		for _, c := range []struct {
			name      string
			batch     engine.Batch
			objective func(losses []float64) float64
			dropout   float64
			tolerance float64
		}{
			{"weighted", forest, weighted, 0, 1e-8},
			{"dropout", forest, weighted, 0.3, 1e-8},
			{"preference", preference, preferenceLoss, 0, 2e-6}, // losses and weights pass through Weigh in float32
		} {
			t.Run(spec.Name+"/"+c.name, func(t *testing.T) {
				t.Parallel()
				model, lora := enginetest.OpenReference(t, spec.Write(t), enginetest.Adapter{
					Rank: 3, Alpha: 6, Dropout: c.dropout, Sites: reference.Sites(2, reference.Modules...),
				})
				random := rand.New(rand.NewPCG(7, 8))
				weights, gradients := parameters(lora)
				for _, w := range weights {
					*w = 0.1 * random.NormFloat64()
				}
				if _, err := model.Gradients(c.batch, lora, 1); err != nil {
					t.Fatal(err)
				}
				objective := func() float64 {
					p, err := model.Forward(c.batch, lora)
					if err != nil {
						t.Fatal(err)
					}
					return c.objective(p.Losses)
				}
				// slope is the derivative along a direction by differences of fourth order, which leave an error of
				// about h^4 and of the rounding of the objective, 1e-14, divided by h.
				slope := func(direction []float64, h float64) float64 {
					at := func(step float64) float64 {
						for i, d := range direction {
							*weights[i] += step * d
						}
						defer func() {
							for i, d := range direction {
								*weights[i] -= step * d
							}
						}()
						return objective()
					}
					return (8*(at(h)-at(-h)) - (at(2*h) - at(-2*h))) / (12 * h)
				}
				norm := 0.0
				for _, g := range gradients {
					norm += *g * *g
				}
				// Along a direction of length 1, most slopes are smaller than the gradient by about this much.
				size := math.Sqrt(norm / float64(len(weights)))
				worst := 0.0
				check := func(direction []float64) {
					want := 0.0
					for i, d := range direction {
						want += d * *gradients[i]
					}
					got := slope(direction, 1e-3)
					e := math.Abs(got-want) / size
					worst = max(worst, e)
					if !(e <= c.tolerance) {
						t.Errorf("gradient %.9g, central difference %.9g", want, got)
					}
				}
				for range 3 {
					direction := make([]float64, len(weights))
					for i := range direction {
						direction[i] = random.NormFloat64() / math.Sqrt(float64(len(weights)))
					}
					check(direction)
				}
				for range 12 {
					direction := make([]float64, len(weights))
					direction[random.IntN(len(weights))] = 1
					check(direction)
				}
				t.Logf("largest relative error: %.1e", worst)
			})
		}
	}
}
