package runner

import (
	"cmp"
	"encoding/json"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
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
	if got := newSampler(child.GenerateRequest{Temperature: 1, TopP: 1}, 0, nil).pick([]float32{nan, nan}, nil); got != 0 {
		t.Errorf("took %d where nothing is a number, want the first token", got)
	}
	for _, temperature := range []float64{0, 1} {
		s := newSampler(child.GenerateRequest{Temperature: temperature, TopP: 1}, 0, nil)
		if got := s.pick(logits, []uint32{0}); got != -1 {
			t.Errorf("temperature %v: took %d where nothing is allowed", temperature, got)
		}
		if got := s.pick([]float32{1, float32(math.Inf(1)), 2}, nil); got != 1 {
			t.Errorf("temperature %v: took %d, want the infinite logit", temperature, got)
		}
	}
	if got := newSampler(child.GenerateRequest{Temperature: 1, TopP: 0}, 0, nil).pick(logits, nil); got != 2 {
		t.Errorf("top_p 0 took %d, want the likeliest", got)
	}
}

// goldens are what Hugging Face's logits processors make of logits (scripts/golden/sampling.py).
type golden struct {
	Name               string
	Logits             []float32
	Prompt, Completion []engine.Token
	Allowed            []engine.Token
	Request            child.GenerateRequest
	Probabilities      []float64
}

func goldens(t *testing.T) []golden {
	t.Helper()
	data, err := os.ReadFile("testdata/sampling.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []golden
	if err := json.Unmarshal(data, &cases); err != nil {
		t.Fatal(err)
	}
	return cases
}

func (g *golden) sampler(seed int64) (*sampler, []uint32) {
	req := g.Request
	req.Seed = &seed
	s := newSampler(req, 0, nil)
	s.prompt(g.Prompt)
	for _, token := range g.Completion {
		s.accept(token)
	}
	var mask []uint32
	if len(g.Allowed) > 0 {
		mask = maskOf(g.Allowed...)
	}
	return s, mask
}

func TestSamplerDistributionsAreHuggingFaces(t *testing.T) {
	t.Parallel()
	for _, g := range goldens(t) {
		s, mask := g.sampler(1)
		before := slices.Clone(g.Logits)
		kept, total := s.keep(s.penalised(g.Logits), mask)
		got := make([]float64, len(g.Logits))
		for _, c := range kept {
			got[c.token] = c.p / total
		}
		for token, want := range g.Probabilities {
			// transformers computes in float32.
			if math.Abs(got[token]-want) > 2e-6 || (got[token] == 0) != (want == 0) {
				t.Errorf("%s: token %d has probability %v, want %v", g.Name, token, got[token], want)
			}
		}
		if !slices.Equal(before, g.Logits) {
			t.Errorf("%s: the logits were changed", g.Name)
		}
	}
}

// What is drawn follows the distributions: a chi-square test for each, with fixed seeds.
func TestSamplerDrawsTheDistribution(t *testing.T) {
	t.Parallel()
	const draws = 20000
	for _, g := range goldens(t) {
		s, mask := g.sampler(7)
		counts := make([]int, len(g.Logits))
		for range draws {
			counts[s.pick(g.Logits, mask)]++
		}
		statistic, cells, restWant, restGot := 0.0, 0, 0.0, 0.0
		for token, p := range g.Probabilities {
			switch want := p * draws; {
			case p == 0 && counts[token] > 0:
				t.Errorf("%s: token %d was drawn, which is excluded", g.Name, token)
			case want < 5: // too rare for a cell of its own
				restWant, restGot = restWant+want, restGot+float64(counts[token])
			default:
				d := float64(counts[token]) - want
				statistic += d * d / want
				cells++
			}
		}
		if restWant >= 5 {
			statistic += (restGot - restWant) * (restGot - restWant) / restWant
			cells++
		}
		// Exceeded by chance once in 30,000: four standard deviations above the mean (Wilson and Hilferty).
		k := float64(max(cells-1, 1))
		bound := k * math.Pow(1-2/(9*k)+4*math.Sqrt(2/(9*k)), 3)
		if statistic > bound {
			t.Errorf("%s: chi-square %.1f over %d cells, at most %.1f expected", g.Name, statistic, cells, bound)
		}
	}
}

func TestSamplerSeeds(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 1))
	logits := make([]float32, 500)
	for i := range logits {
		logits[i] = float32(random.NormFloat64())
	}
	draw := func(seed *int64, index int) []engine.Token {
		s := newSampler(child.GenerateRequest{Temperature: 1, TopP: 0.99, Seed: seed}, index, nil)
		var tokens []engine.Token
		for range 30 {
			tokens = append(tokens, s.pick(logits, nil))
		}
		return tokens
	}
	seed, next := int64(41), int64(42)
	if !slices.Equal(draw(&seed, 0), draw(&seed, 0)) {
		t.Error("equal seeds gave different tokens")
	}
	if !slices.Equal(draw(&seed, 1), draw(&next, 0)) {
		t.Error("completion 1 of a seed is not completion 0 of the next seed")
	}
	if slices.Equal(draw(&seed, 0), draw(&seed, 1)) || slices.Equal(draw(nil, 0), draw(nil, 0)) {
		t.Error("different or absent seeds gave equal tokens")
	}
}

func TestSamplerKeepsTheEndOut(t *testing.T) {
	t.Parallel()
	ends := []engine.Token{2, 4}
	logits := make([]float32, 40)
	logits[2], logits[4], logits[7] = 9, 8, 5
	s := newSampler(child.GenerateRequest{TopP: 1, MinTokens: 2}, 0, ends)
	for i, want := range []engine.Token{7, 7, 2} {
		got := s.pick(logits, nil)
		if got != want {
			t.Errorf("token %d is %d, want %d", i, got, want)
		}
		s.accept(got)
	}
	never := newSampler(child.GenerateRequest{TopP: 1, IgnoreEOS: true}, 0, ends)
	for range 100 {
		never.accept(7)
	}
	if got := never.pick(logits, nil); got != 7 {
		t.Errorf("ignore_eos took %d", got)
	}
	if got := never.pick(logits, maskOf(4, 30)); got != 30 {
		t.Errorf("ignore_eos under a constraint took %d, want the other allowed token", got)
	}
	if got := never.pick(logits, maskOf(2)); got != 2 {
		t.Errorf("took %d where a constraint allows the end of the turn only", got)
	}
	if _, top := never.probabilities(logits, nil, 7, 3); top[0].token != 7 {
		t.Errorf("likeliest alternatives %v, want them without the ends", top)
	}
}

func TestCheckSampling(t *testing.T) {
	t.Parallel()
	nan := math.NaN()
	for param, req := range map[string]child.GenerateRequest{
		"temperature": {Temperature: -1}, "top_p": {TopP: nan}, "top_k": {TopK: -1}, "min_p": {MinP: 1.1}, "presence_penalty": {PresencePenalty: 3},
		"frequency_penalty": {FrequencyPenalty: nan}, "repetition_penalty": {RepetitionPenalty: -0.1}, "min_tokens": {MinTokens: -1},
	} {
		var refusal *child.Error
		if err := checkSampling(req, 100); !errors.As(err, &refusal) || refusal.Code != child.CodeInvalidRequest || refusal.Param != param {
			t.Errorf("%s: %v", param, err)
		}
	}
	for _, c := range []struct {
		bias map[engine.Token]float64
		say  string
	}{
		{map[engine.Token]float64{5: 1, 100: 2, 200: 3}, "token 100"},
		{map[engine.Token]float64{-7: 1}, "token -7"},
		{map[engine.Token]float64{-1: 1}, "token -1"},
		{map[engine.Token]float64{5: 101}, "token 5 is 101"},
	} {
		var refusal *child.Error
		if err := checkSampling(child.GenerateRequest{LogitBias: c.bias}, 100); !errors.As(err, &refusal) || refusal.Param != "logit_bias" || !strings.Contains(refusal.Message, c.say) {
			t.Errorf("%v: %v", c.bias, err)
		}
	}
	if err := checkSampling(child.GenerateRequest{Temperature: 2, TopP: 1, LogitBias: map[engine.Token]float64{99: -100, 0: 100}}, 100); err != nil {
		t.Error(err)
	}
}

// A sampler gives the same as the plain way of doing it: sort everything.
func TestLargeVocabularies(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(8, 9))
	logits := make([]float32, 49_152)
	for i := range logits {
		logits[i] = float32(random.IntN(4000))/200 - 10 // with equals
	}
	mask := make([]uint32, len(logits)/32)
	for i := range mask {
		mask[i] = []uint32{0, math.MaxUint32, random.Uint32()}[random.IntN(3)]
	}
	for _, m := range [][]uint32{nil, mask} {
		var sorted []engine.Token
		each(logits, m, func(t engine.Token, _ float32) { sorted = append(sorted, t) })
		slices.SortStableFunc(sorted, func(a, b engine.Token) int { return cmp.Compare(logits[b], logits[a]) })
		if got := argmax(logits, m); got != sorted[0] {
			t.Errorf("the highest is %d, want %d", got, sorted[0])
		}
		s := newSampler(child.GenerateRequest{Temperature: 1, TopP: 1, TopK: 50}, 0, nil)
		kept, _ := s.keep(logits, m)
		var got []engine.Token
		for _, c := range kept {
			got = append(got, c.token)
		}
		slices.SortFunc(got, func(a, b engine.Token) int {
			return cmp.Or(cmp.Compare(logits[b], logits[a]), cmp.Compare(a, b))
		})
		if diff := gocmp.Diff(sorted[:50], got); diff != "" {
			t.Errorf("the 50 highest (-want +got):\n%s", diff)
		}
		total, sum, nucleus := 0.0, 0.0, 0
		for _, token := range sorted {
			total += math.Exp(float64(logits[token]))
		}
		for sum < 0.6*total {
			sum += math.Exp(float64(logits[sorted[nucleus]]))
			nucleus++
		}
		s = newSampler(child.GenerateRequest{Temperature: 1, TopP: 0.6}, 0, nil)
		kept, _ = s.keep(logits, m)
		if len(kept) != nucleus || kept[nucleus-1].token != sorted[nucleus-1] {
			t.Errorf("%d tokens in the nucleus, want %d", len(kept), nucleus)
		}
	}
}

func BenchmarkSampler(b *testing.B) {
	random := rand.New(rand.NewPCG(8, 9))
	logits := make([]float32, 49_152)
	for i := range logits {
		logits[i] = float32(random.NormFloat64()) * 4
	}
	full, few := make([]uint32, len(logits)/32), make([]uint32, len(logits)/32)
	for i := range full {
		full[i] = math.MaxUint32
	}
	few[3], few[900] = 0x11, 0x8001
	bias := map[engine.Token]float64{5: 1}
	for _, c := range []struct {
		name string
		req  child.GenerateRequest
		mask []uint32
	}{
		{"greedy", child.GenerateRequest{TopP: 1}, nil},
		{"greedy full mask", child.GenerateRequest{TopP: 1}, full},
		{"greedy four tokens", child.GenerateRequest{TopP: 1}, few},
		{"greedy bias and penalties", child.GenerateRequest{TopP: 1, LogitBias: bias, RepetitionPenalty: 1.1, FrequencyPenalty: 1}, nil},
		{"temperature", child.GenerateRequest{Temperature: 1, TopP: 1}, nil},
		{"top_p", child.GenerateRequest{Temperature: 0.7, TopP: 0.9}, nil},
		{"top_k", child.GenerateRequest{Temperature: 1, TopP: 1, TopK: 40}, nil},
		{"min_p", child.GenerateRequest{Temperature: 1, TopP: 1, MinP: 0.05}, nil},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := newSampler(c.req, 0, nil)
			s.accept(17)
			for b.Loop() {
				s.pick(logits, c.mask)
			}
		})
	}
	b.Run("log-probabilities", func(b *testing.B) {
		for b.Loop() {
			probabilities(logits, nil, 3, 20)
		}
	})
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
	if diff := gocmp.Diff([]engine.Token{2, 4, 3}, order); diff != "" {
		t.Errorf("most likely tokens (-want +got):\n%s", diff)
	}
	if p, top = probabilities(logits, maskOf(1), 1, 20); p != 0 || len(top) != 1 {
		t.Errorf("the only allowed token has log-probability %v and alternatives %v", p, top)
	}
}
