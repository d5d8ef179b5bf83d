package runner

import (
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
)

// maskOf is a constraint's mask that allows these tokens.
func maskOf(tokens ...engine.Token) []uint32 {
	var mask []uint32
	for _, t := range tokens {
		for int(t)/32 >= len(mask) {
			mask = append(mask, 0)
		}
		mask[t/32] |= 1 << (t % 32)
	}
	return mask
}

func TestSampler(t *testing.T) {
	t.Parallel()
	logits := []float32{0, 1, 3, 2, 3}
	if got := newSampler(child.GenerateRequest{TopP: 1}, 0, nil).pick(logits, nil); got != 2 {
		t.Errorf("greedy took %d, want 2, the first of equals", got)
	}
	if got := newSampler(child.GenerateRequest{TopP: 1}, 0, nil).pick(logits, maskOf(0, 3)); got != 3 {
		t.Errorf("greedy among 0 and 3 took %d", got)
	}
	nan := float32(math.NaN())
	if got := newSampler(child.GenerateRequest{TopP: 1}, 0, nil).pick([]float32{nan, 1, nan}, nil); got != 1 {
		t.Errorf("greedy took %d, a NaN", got)
	}
	const draws = 20000
	for _, c := range []struct {
		name        string
		temperature float64
		topP        float64
		allowed     []uint32
		want        []float64
	}{
		{"all", 1, 1, nil, softmax(1, logits, 0, 1, 2, 3, 4)},
		{"hot", 2, 1, nil, softmax(2, logits, 0, 1, 2, 3, 4)},
		{"allowed", 1, 1, maskOf(1, 3), softmax(1, logits, 1, 3)},
		{"nucleus of two", 1, 0.7, nil, softmax(1, logits, 2, 4)},
		{"nucleus of three", 1, 0.85, nil, softmax(1, logits, 2, 3, 4)},
		{"at least one", 1, 0, nil, softmax(1, logits, 2)},
	} {
		seed := int64(5)
		s := newSampler(child.GenerateRequest{Temperature: c.temperature, TopP: c.topP, Seed: &seed}, 0, nil)
		counts := make([]float64, len(logits))
		for range draws {
			counts[s.pick(logits, c.allowed)] += 1.0 / draws
		}
		for token, p := range c.want {
			// Four standard deviations of a share of 20,000 draws are at most 0.015.
			if math.Abs(counts[token]-p) > 0.015 {
				t.Errorf("%s: token %d drawn in %.3f of the cases, want %.3f", c.name, token, counts[token], p)
			}
		}
	}
}

func softmax(temperature float64, logits []float32, kept ...int) []float64 {
	p := make([]float64, len(logits))
	sum := 0.0
	for _, t := range kept {
		p[t] = math.Exp(float64(logits[t]) / temperature)
		sum += p[t]
	}
	for t := range p {
		p[t] /= sum
	}
	return p
}

func TestProbabilities(t *testing.T) {
	t.Parallel()
	logits := []float32{0, 1, 3, 2, 3}
	p, top := probabilities(logits, nil, 3, 3)
	want := softmax(1, logits, 0, 1, 2, 3, 4)
	if math.Abs(p-math.Log(want[3])) > 1e-12 {
		t.Errorf("log-probability %v, want %v", p, math.Log(want[3]))
	}
	var order []engine.Token
	for _, e := range top {
		order = append(order, e.token)
		if math.Abs(e.logP-math.Log(want[e.token])) > 1e-12 {
			t.Errorf("token %d: %v, want %v", e.token, e.logP, math.Log(want[e.token]))
		}
	}
	if diff := cmp.Diff([]engine.Token{2, 4, 3}, order); diff != "" {
		t.Errorf("most likely tokens (-want +got):\n%s", diff)
	}
	if p, top = probabilities(logits, maskOf(1), 1, 20); p != 0 || len(top) != 1 {
		t.Errorf("the only allowed token has log-probability %v and alternatives %v", p, top)
	}
}
