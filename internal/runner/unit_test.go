package runner

import (
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
)

func TestText(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		stops   []string
		pieces  []string
		want    []string // shown after each piece, then by finish unless stopped
		stopped bool
	}{
		{"plain", nil, []string{"a", "b"}, []string{"a", "b", ""}, false},
		{"split character", nil, []string{"\xe4", "\xb8\xad", "x"}, []string{"", "中", "x", ""}, false},
		{"incomplete at the end", nil, []string{"a\xe4\xb8"}, []string{"a", "\uFFFD\uFFFD"}, false},
		{"invalid inside", nil, []string{"a\xffb"}, []string{"a\uFFFDb", ""}, false},
		{"stop in one piece", []string{"END"}, []string{"x", "yENDz"}, []string{"x", "y"}, true},
		{"stop across pieces", []string{"END"}, []string{"xE", "N", "D"}, []string{"x", "", ""}, true},
		{"not a stop after all", []string{"END"}, []string{"xE", "N", "x"}, []string{"x", "", "ENx", ""}, false},
		{"held at the end", []string{"END"}, []string{"xEN"}, []string{"x", "EN"}, false},
		{"overlapping beginnings", []string{"aab"}, []string{"a", "a", "a", "b"}, []string{"", "", "a", ""}, true},
		{"first of two stops", []string{"zz", "b"}, []string{"abzz"}, []string{"a"}, true},
		{"stop of several bytes", []string{"中文"}, []string{"x中", "文y"}, []string{"x", ""}, true},
		{"character before a held stop", []string{"\nQ"}, []string{"é\n", "A"}, []string{"é", "\nA", ""}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			text := newText(c.stops)
			var got []string
			stopped := false
			for i, piece := range c.pieces {
				show, _, stop := text.add([]byte(piece), nil)
				got = append(got, show)
				if stopped = stop; stop {
					if i != len(c.pieces)-1 {
						t.Errorf("stopped after piece %d", i)
					}
					break
				}
			}
			if !stopped {
				show, _ := text.finish()
				got = append(got, show)
			}
			if diff := cmp.Diff(c.want, got); diff != "" || stopped != c.stopped {
				t.Errorf("stopped %v, want %v; shown (-want +got):\n%s", stopped, c.stopped, diff)
			}
		})
	}
}

// A token's log-probability comes with the event that shows its last byte; those of a stop string do not come.
func TestTextLogProbs(t *testing.T) {
	t.Parallel()
	text := newText([]string{"END"})
	var events []string
	for _, piece := range []string{"a", "\xe4", "\xb8\xad", " E", "N", "D"} {
		show, logProbs, _ := text.add([]byte(piece), &child.TokenLogProb{Token: piece})
		var tokens []string
		for _, p := range logProbs {
			tokens = append(tokens, p.Token)
		}
		events = append(events, show+"|"+strings.Join(tokens, ","))
	}
	want := []string{"a|a", "|", "中|\xe4,\xb8\xad", " |", "|", "| E"}
	if diff := cmp.Diff(want, events); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

func TestSampler(t *testing.T) {
	t.Parallel()
	logits := []float32{0, 1, 3, 2, 3}
	if got := newSampler(0, 1, nil).pick(logits, nil); got != 2 {
		t.Errorf("greedy took %d, want 2, the first of equals", got)
	}
	if got := newSampler(0, 1, nil).pick(logits, []engine.Token{0, 3}); got != 3 {
		t.Errorf("greedy among 0 and 3 took %d", got)
	}
	nan := float32(math.NaN())
	if got := newSampler(0, 1, nil).pick([]float32{nan, 1, nan}, nil); got != 1 {
		t.Errorf("greedy took %d, a NaN", got)
	}
	const draws = 20000
	for _, c := range []struct {
		name        string
		temperature float64
		topP        float64
		allowed     []engine.Token
		want        []float64
	}{
		{"all", 1, 1, nil, softmax(1, logits, 0, 1, 2, 3, 4)},
		{"hot", 2, 1, nil, softmax(2, logits, 0, 1, 2, 3, 4)},
		{"allowed", 1, 1, []engine.Token{1, 3}, softmax(1, logits, 1, 3)},
		{"nucleus of two", 1, 0.7, nil, softmax(1, logits, 2, 4)},
		{"nucleus of three", 1, 0.85, nil, softmax(1, logits, 2, 3, 4)},
		{"at least one", 1, 0, nil, softmax(1, logits, 2)},
	} {
		seed := int64(5)
		s := newSampler(c.temperature, c.topP, &seed)
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
	if p, top = probabilities(logits, []engine.Token{1}, 1, 20); p != 0 || len(top) != 1 {
		t.Errorf("the only allowed token has log-probability %v and alternatives %v", p, top)
	}
}

func TestTokensOf(t *testing.T) {
	t.Parallel()
	if diff := cmp.Diff([]engine.Token{0, 31, 32, 63}, tokensOf([]uint32{1 | 1<<31, 1 | 1<<31, 1}, 64)); diff != "" {
		t.Errorf("tokens (-want +got):\n%s", diff)
	}
	if got := tokensOf([]uint32{0, 0}, 64); got == nil || len(got) != 0 {
		t.Errorf("an empty mask gave %v, want an empty list, not nil", got)
	}
}
