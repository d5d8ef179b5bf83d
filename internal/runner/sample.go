package runner

import (
	"cmp"
	"math"
	"math/bits"
	"math/rand/v2"
	"slices"

	"github.com/hone-llm/hone/internal/engine"
)

// sampler chooses the next token of one sequence.
type sampler struct {
	temperature float64    // 0 is greedy
	topP        float64    // 1 keeps all
	random      *rand.Rand // nil when greedy

	candidates []candidate // reused between tokens
}

type candidate struct {
	token engine.Token
	p     float64 // not normalised
}

// newSampler returns a sampler; a nil seed takes a random one. Equal seeds give equal tokens for equal logits.
func newSampler(temperature, topP float64, seed *int64) *sampler {
	s := &sampler{temperature: temperature, topP: topP}
	if temperature > 0 {
		state := rand.Uint64()
		if seed != nil {
			state = uint64(*seed)
		}
		s.random = rand.New(rand.NewPCG(state, 0x686f6e65)) // the second word only has to be the same every time
	}
	return s
}

// pick returns the next token: of the allowed ones, of all if allowed is nil. Greedy takes the lowest id of equals.
func (s *sampler) pick(logits []float32, allowed []engine.Token) engine.Token {
	best := argmax(logits, allowed)
	if s.random == nil {
		return best
	}
	top := float64(logits[best])
	s.candidates = s.candidates[:0]
	total := 0.0
	each(logits, allowed, func(t engine.Token, logit float32) {
		if p := math.Exp((float64(logit) - top) / s.temperature); p > 0 {
			s.candidates = append(s.candidates, candidate{t, p})
			total += p
		}
	})
	kept := s.candidates
	if s.topP < 1 {
		kept, total = nucleus(s.candidates, s.topP*total)
	}
	at := s.random.Float64() * total
	for _, c := range kept {
		if at -= c.p; at < 0 {
			return c.token
		}
	}
	return kept[len(kept)-1].token // rounding left a rest
}

// nucleus returns the most likely candidates, in that order, until their sum reaches mass, and that sum; at least one.
// It reorders the slice. A heap gives them one by one, since few of a whole vocabulary are needed.
func nucleus(c []candidate, mass float64) ([]candidate, float64) {
	less := func(a, b candidate) bool { return a.p > b.p || a.p == b.p && a.token < b.token }
	down := func(i, n int) {
		for {
			child := 2*i + 1
			if child >= n {
				return
			}
			if child+1 < n && less(c[child+1], c[child]) {
				child++
			}
			if !less(c[child], c[i]) {
				return
			}
			c[i], c[child] = c[child], c[i]
			i = child
		}
	}
	for i := len(c)/2 - 1; i >= 0; i-- {
		down(i, len(c))
	}
	sum := 0.0
	n := len(c)
	for n > 0 {
		sum += c[0].p
		n--
		c[0], c[n] = c[n], c[0]
		if sum >= mass {
			break
		}
		down(0, n)
	}
	kept := c[n:]
	slices.Reverse(kept)
	return kept, sum
}

// tokenProbability is a token and its log-probability, natural logarithm.
type tokenProbability struct {
	token engine.Token
	logP  float64
}

// probabilities returns the log-probability of the chosen token and the n most likely tokens in descending order,
// ties by id. The distribution is the model's own, without temperature, over the allowed tokens if there are any.
func probabilities(logits []float32, allowed []engine.Token, chosen engine.Token, n int) (float64, []tokenProbability) {
	top := float64(logits[argmax(logits, allowed)])
	sum := 0.0
	best := make([]tokenProbability, 0, n+1)
	order := func(a, b tokenProbability) int {
		return cmp.Or(cmp.Compare(b.logP, a.logP), cmp.Compare(a.token, b.token))
	}
	each(logits, allowed, func(t engine.Token, logit float32) {
		sum += math.Exp(float64(logit) - top)
		if n == 0 || len(best) == n && float64(logit) <= best[n-1].logP {
			return
		}
		entry := tokenProbability{t, float64(logit)}
		at, _ := slices.BinarySearchFunc(best, entry, order)
		best = slices.Insert(best, at, entry)
		best = best[:min(n, len(best))]
	})
	norm := top + math.Log(sum)
	for i := range best {
		best[i].logP -= norm
	}
	return float64(logits[chosen]) - norm, best
}

// each calls f for every allowed token and its logit, for every token if allowed is nil.
func each(logits []float32, allowed []engine.Token, f func(engine.Token, float32)) {
	if allowed == nil {
		for t, logit := range logits {
			f(engine.Token(t), logit)
		}
		return
	}
	for _, t := range allowed {
		f(t, logits[t])
	}
}

// argmax returns the token with the highest logit; a NaN never wins.
func argmax(logits []float32, allowed []engine.Token) engine.Token {
	if allowed == nil {
		best := 0
		for t, logit := range logits {
			if logit > logits[best] || logits[best] != logits[best] {
				best = t
			}
		}
		return engine.Token(best)
	}
	best := allowed[0]
	for _, t := range allowed {
		if logits[t] > logits[best] || logits[best] != logits[best] {
			best = t
		}
	}
	return best
}

// tokensOf returns the tokens whose bits are set in a constraint's mask, in ascending order, at most size.
func tokensOf(mask []uint32, size int) []engine.Token {
	tokens := []engine.Token{} // not nil: nil allows all
	for i, word := range mask {
		for ; word != 0; word &= word - 1 {
			if t := i*32 + bits.TrailingZeros32(word); t < size {
				tokens = append(tokens, engine.Token(t))
			}
		}
	}
	return tokens
}
