package reference_test

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/hone-llm/hone/internal/reference"
)

// Dropout is torch.nn.Dropout's in distribution: a share of p is 0, the rest is scaled so that the mean stays, and the masks
// of modules, layers, tokens and neighbouring elements are independent of each other.
func TestDropoutStatistics(t *testing.T) {
	const tokens, elements = 300, 256
	n := float64(tokens * elements)
	random := rand.New(rand.NewPCG(3, 4))
	for _, p := range []float64{0.05, 0.3, 0.5} {
		mask := reference.Dropout(p)
		site := reference.Site{Layer: 1, Module: reference.Query}
		other := func(name string) func(seed uint32, element int) float64 {
			return map[string]func(seed uint32, element int) float64{
				"module": func(seed uint32, i int) float64 {
					return mask(reference.Site{Layer: 1, Module: reference.Value}, seed, i)
				},
				"layer": func(seed uint32, i int) float64 {
					return mask(reference.Site{Layer: 2, Module: reference.Query}, seed, i)
				},
				"token":      func(seed uint32, i int) float64 { return mask(site, seed+1, i) },
				"next":       func(seed uint32, i int) float64 { return mask(site, seed, i+1) },
				"16 further": func(seed uint32, i int) float64 { return mask(site, seed, i^16) },
			}[name]
		}
		for _, name := range []string{"module", "layer", "token", "next", "16 further"} {
			second := other(name)
			dropped, both, sum := 0.0, 0.0, 0.0
			for range tokens {
				seed := random.Uint32()
				for i := range elements {
					v := mask(site, seed, i)
					sum += v
					switch {
					case v == 0:
						dropped++
						if second(seed, i) == 0 {
							both++
						}
					case math.Abs(v-1/(1-p)) > 1e-4:
						t.Fatalf("p %g: an element is scaled by %g", p, v)
					}
				}
			}
			// Five standard deviations of a binomial count; "16 further" counts each pair twice.
			near := func(what string, got, share float64) {
				if math.Abs(got-share*n) > 7.1*math.Sqrt(n*share*(1-share)) {
					t.Errorf("p %g, %s: %s is %.5f, expected %.5f", p, name, what, got/n, share)
				}
			}
			near("the share that is dropped", dropped, p)
			near("the share of both", both, p*p)
			if mean := sum / n; math.Abs(mean-1) > 0.02 {
				t.Errorf("p %g: the mean is scaled by %g", p, mean)
			}
		}
	}
}
