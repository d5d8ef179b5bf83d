package ggml

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
)

// mask is the multiplier of an element under dropout, written from the description in kernels.c.
func mask(seed uint32, module, element int, p float64) float64 {
	threshold := uint32(math.Round(p * 65536))
	x := uint32(element/32*16+element%16)*0x85ebca6b + (seed ^ uint32(module)*0x9e3779b9)
	x = (x ^ x>>16) * 0x7feb352d
	x = (x ^ x>>15) * 0x846ca68b
	x ^= x >> 16
	if element/16%2 == 1 {
		x >>= 16
	}
	if x&0xffff < threshold {
		return 0
	}
	return 1 / (1 - float64(threshold)/65536)
}

func TestLoRA(t *testing.T) {
	const module, p, scale = 5, 0.3, 0.5
	for _, s := range []struct{ in, r, tokens int }{{16, 16, 1}, {80, 16, 37}, {48, 32, 99}, {592, 16, 61}, {112, 256, 50}, {160, 48, 130}} {
		for _, dropped := range []bool{false, true} {
			t.Run(fmt.Sprintf("%+v dropout %t", s, dropped), func(t *testing.T) {
				x, w, u, y, g := normal(1, s.in*s.tokens), normal(2, s.in*s.r), normal(3, s.r*s.tokens), normal(4, s.in*s.tokens), normal(5, s.in*s.r)
				seeds := make([]int32, s.tokens)
				random := rand.New(rand.NewPCG(1, 2))
				for i := range seeds {
					seeds[i] = int32(random.Uint32())
				}
				down, up, outer := make([]float64, s.r*s.tokens), make([]float64, len(y)), make([]float64, len(g))
				for i, v := range y {
					up[i] = float64(v)
				}
				for i, v := range g {
					outer[i] = float64(v)
				}
				for token := range s.tokens {
					for i := range s.in {
						m := 1.0
						if dropped {
							m = mask(uint32(seeds[token]), module, i, p)
						}
						for r := range s.r {
							down[token*s.r+r] += m * float64(x[token*s.in+i]) * float64(w[r*s.in+i])
							up[token*s.in+i] += scale * m * float64(u[token*s.r+r]) * float64(w[r*s.in+i])
							outer[r*s.in+i] += scale * m * float64(u[token*s.r+r]) * float64(x[token*s.in+i])
						}
					}
				}
				got := eachThreads(t, func(h *harness) []Tensor {
					drop := Dropout{Module: module, P: p}
					if dropped {
						drop.Seeds = h.ints(seeds, s.tokens)
					}
					tx, tw, tu := h.floats(x, s.in, s.tokens), h.floats(w, s.in, s.r), h.floats(u, s.r, s.tokens)
					return []Tensor{
						h.add(h.x.LoRADown(tx, tw, drop)),
						h.add(h.x.LoRAUp(h.floats(y, s.in, s.tokens), tu, tw, scale, drop)),
						h.add(h.x.LoRAOuter(h.floats(g, s.in, s.r), tu, tx, scale, drop)),
					}
				})
				near(t, "down", got[0], down, 1e-5)
				near(t, "up", got[1], up, 1e-5)
				near(t, "outer", got[2], outer, 1e-5)
			})
		}
	}
}

// The masks of different modules, tokens and elements are independent, and drop the asked share.
func TestDropoutShare(t *testing.T) {
	const in, tokens, r = 4096, 64, 16
	for _, p := range []float64{0.05, 0.5} {
		ones, w := make([]float32, in*tokens), make([]float32, in*r)
		for i := range ones {
			ones[i] = 1
		}
		for i := range in {
			w[i%r*in+i] = 1 // rank r sums the elements of its residue
		}
		seeds := make([]int32, tokens)
		for i := range seeds {
			seeds[i] = int32(i) // neighbours, the worst seeds there are
		}
		h := newHarness(t, 1)
		ts := h.ints(seeds, tokens)
		a := h.add(h.x.LoRADown(h.floats(ones, in, tokens), h.floats(w, in, r), Dropout{ts, 1, p}))
		b := h.add(h.x.LoRADown(h.floats(ones, in, tokens), h.floats(w, in, r), Dropout{ts, 2, p}))
		h.run()
		// A sum of n = in/r elements has mean n and variance n p/(1-p).
		n := float64(in / r)
		deviation := math.Sqrt(n * p / (1 - p))
		var squares, products, total float64
		for i := range a.Floats() {
			da, db := (float64(a.Floats()[i])-n)/deviation, (float64(b.Floats()[i])-n)/deviation
			squares += da * da
			products += da * db
			total += da
		}
		count := float64(r * tokens)
		if math.Abs(total/math.Sqrt(count)) > 4 || math.Abs(squares/count-1) > 4*math.Sqrt(2/count) || math.Abs(products/math.Sqrt(count)) > 4 {
			t.Errorf("p %g: mean off by %.1f deviations, variance %.2f, correlation of modules %.3f", p, total/math.Sqrt(count), squares/count, products/count)
		}
	}
}
