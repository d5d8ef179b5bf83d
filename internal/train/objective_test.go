package train

import (
	"math"
	"testing"
)

// Each derivative is that of a central difference, and the values are those that the papers' formulae give by hand.
func TestObjectives(t *testing.T) {
	policy, reference := []float64{-3.2, -2.5}, [2]float64{-3, -2.9}
	for _, c := range []struct {
		name string
		loss float64
		eval func(p []float64) comparison
	}{
		// margin = (-3.2 + 2.5) - (-3 + 2.9) = -0.6
		{"sigmoid", -math.Log(1 / (1 + math.Exp(0.06))), func(p []float64) comparison {
			return preference{beta: 0.1}.compare([2]float64(p), reference)
		}},
		{"sigmoid, smoothed", -0.9*math.Log(1/(1+math.Exp(0.06))) - 0.1*math.Log(1/(1+math.Exp(-0.06))), func(p []float64) comparison {
			return preference{beta: 0.1, smoothing: 0.1}.compare([2]float64(p), reference)
		}},
		{"ipo", 5.6 * 5.6, func(p []float64) comparison {
			return preference{beta: 0.1, ipo: true}.compare([2]float64(p), reference)
		}},
		{"choice", -math.Log(math.Exp(-3.2) / (math.Exp(-3.2) + math.Exp(-2.5))), func(p []float64) comparison {
			return choose(p, 0)
		}},
	} {
		got := c.eval(policy)
		if math.Abs(got.loss-c.loss) > 1e-12 {
			t.Errorf("%s: loss %g, want %g", c.name, got.loss, c.loss)
		}
		if got.right {
			t.Errorf("%s: the first candidate is said to be the better one", c.name)
		}
		for i := range policy {
			const h = 1e-5
			up, down := []float64{policy[0], policy[1]}, []float64{policy[0], policy[1]}
			up[i] += h
			down[i] -= h
			if slope := (c.eval(up).loss - c.eval(down).loss) / (2 * h); math.Abs(slope-got.gradient[i]) > 1e-8 {
				t.Errorf("%s: derivative %d is %g, central difference %g", c.name, i, got.gradient[i], slope)
			}
		}
	}
	if far := choose([]float64{-1e4, 0}, 0); far.loss != 1e4 || far.gradient[0] != -1 {
		t.Errorf("a hopeless choice: %+v", far)
	}
	if far := (preference{beta: 2}).compare([2]float64{-1e4, 0}, [2]float64{}); far.loss != 2e4 || far.gradient[0] != -2 {
		t.Errorf("a hopeless preference: %+v", far)
	}
}
