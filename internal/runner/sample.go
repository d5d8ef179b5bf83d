package runner

import (
	"cmp"
	"fmt"
	"math"
	"math/bits"
	"math/rand/v2"
	"slices"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llama"
)

// sampler chooses the tokens of one completion. The order of what it does to the logits is Hugging Face's (bias,
// repetition penalty, temperature, top-k, top-p, min-p: GenerationMixin._get_logits_processor), with OpenAI's presence
// and frequency penalties after the repetition penalty, as in vLLM's sampler:
//
//	allowed    the constraint's mask, without the tokens that end a turn while min_tokens or ignore_eos keeps them out
//	bias       logit += logit_bias[t]
//	repetition logit = logit > 0 ? logit/r : logit*r, for the tokens of prompt and completion (CTRL, arXiv:1909.05858)
//	frequency  logit -= f * (times in the completion)
//	presence   logit -= p, for the tokens of the completion
//	           temperature 0 ends here: the highest logit, the lowest id of equals
//	softmax(logit / temperature), of which top-k, then the smallest set of at least top-p, then at least min-p times the
//	likeliest are kept
//
// Equal seeds, logits and masks give equal tokens. A sampler belongs to one goroutine at a time.
type sampler struct {
	temperature float64 // 0 is greedy
	topP, minP  float64 // 1 and 0 keep all
	topK        int     // 0 keeps all
	random      *rand.Rand

	bias       []tokenBias
	presence   float64
	frequency  float64
	repetition float64 // 1 changes nothing

	ends     []engine.Token // end a turn
	keepOut  int            // so many tokens must come before one of ends; math.MaxInt: never one
	accepted int

	counts map[engine.Token]int // in the completion; nil without a penalty on them
	seen   []uint64             // one bit a token of prompt and completion; nil without a repetition penalty

	adjusted   []float32 // reused between tokens, as are all below
	mask       []uint32
	weights    []float64
	candidates []candidate
}

type tokenBias struct {
	token engine.Token
	bias  float32
}

type candidate struct {
	token engine.Token
	logit float32
	p     float64 // not normalised
}

// newSampler returns the sampler of a request's completion number index. Its seed is the request's plus index, so that
// the completions of one request differ and each can be had again; without one it is random. ends are the tokens that
// end a turn (endTokens).
func newSampler(req child.GenerateRequest, index int, ends []engine.Token) *sampler {
	s := &sampler{
		temperature: req.Temperature, topP: req.TopP, topK: req.TopK, minP: req.MinP,
		presence: req.PresencePenalty, frequency: req.FrequencyPenalty, repetition: req.RepetitionPenalty,
		ends: ends, keepOut: req.MinTokens,
	}
	if req.IgnoreEOS {
		s.keepOut = math.MaxInt
	}
	if s.repetition == 0 {
		s.repetition = 1
	}
	for t, bias := range req.LogitBias {
		s.bias = append(s.bias, tokenBias{t, float32(bias)})
	}
	if s.presence != 0 || s.frequency != 0 {
		s.counts = make(map[engine.Token]int)
	}
	if s.repetition != 1 {
		s.seen = []uint64{}
	}
	if s.temperature > 0 {
		state := rand.Uint64()
		if req.Seed != nil {
			state = uint64(*req.Seed + int64(index))
		}
		s.random = rand.New(rand.NewPCG(state, 0x686f6e65)) // the second word only has to be the same every time
	}
	return s
}

// checkSampling refuses a request's sampling parameters that are out of range, and a logit_bias of a token that a
// vocabulary of so many tokens does not have. The error is a *child.Error.
func checkSampling(req child.GenerateRequest, vocabulary int) error {
	refuse := func(param, format string, args ...any) error {
		return &child.Error{Code: child.CodeInvalidRequest, Param: param, Message: param + " " + fmt.Sprintf(format, args...)}
	}
	// The comparisons are false for NaN.
	switch {
	case !(req.Temperature >= 0 && req.Temperature <= 100):
		return refuse("temperature", "is %v, expected 0 to 100", req.Temperature)
	case !(req.TopP >= 0 && req.TopP <= 1):
		return refuse("top_p", "is %v, expected 0 to 1", req.TopP)
	case req.TopK < 0:
		return refuse("top_k", "is %d, expected 0 (all) or more", req.TopK)
	case !(req.MinP >= 0 && req.MinP <= 1):
		return refuse("min_p", "is %v, expected 0 to 1", req.MinP)
	case !(req.PresencePenalty >= -2 && req.PresencePenalty <= 2):
		return refuse("presence_penalty", "is %v, expected -2 to 2", req.PresencePenalty)
	case !(req.FrequencyPenalty >= -2 && req.FrequencyPenalty <= 2):
		return refuse("frequency_penalty", "is %v, expected -2 to 2", req.FrequencyPenalty)
	case !(req.RepetitionPenalty >= 0 && req.RepetitionPenalty <= 100):
		return refuse("repetition_penalty", "is %v, expected more than 0, at most 100", req.RepetitionPenalty)
	case req.MinTokens < 0:
		return refuse("min_tokens", "is %d, expected 0 or more", req.MinTokens)
	}
	wrong := engine.Token(-1)
	for t, bias := range req.LogitBias {
		if !(bias >= -100 && bias <= 100) {
			return refuse("logit_bias", "of token %d is %v, expected -100 to 100", t, bias)
		}
		if outside := t < 0 || int(t) >= vocabulary; outside && (wrong == -1 || t < wrong) {
			wrong = t
		}
	}
	if _, ok := req.LogitBias[wrong]; ok && (wrong < 0 || int(wrong) >= vocabulary) {
		return refuse("logit_bias", "names token %d; the model's vocabulary has the tokens 0 to %d", wrong, vocabulary-1)
	}
	return nil
}

// endTokens lists the tokens with which a model ends its turn.
func endTokens(m *llama.Model) []engine.Token {
	var ends []engine.Token
	for t := range engine.Token(m.VocabularySize()) {
		if m.IsEndOfGeneration(t) {
			ends = append(ends, t)
		}
	}
	return ends
}

// prompt tells the sampler the prompt's tokens, which the repetition penalty counts.
func (s *sampler) prompt(tokens []engine.Token) {
	for _, t := range tokens {
		s.see(t)
	}
}

// accept tells the sampler that the completion goes on with the token.
func (s *sampler) accept(t engine.Token) {
	s.accepted++
	if s.counts != nil {
		s.counts[t]++
	}
	s.see(t)
}

func (s *sampler) see(t engine.Token) {
	if s.seen == nil {
		return
	}
	for int(t)/64 >= len(s.seen) {
		s.seen = append(s.seen, make([]uint64, 1+int(t)/64-len(s.seen))...)
	}
	s.seen[t/64] |= 1 << (t % 64)
}

// allowed takes the tokens that end a turn out of the mask (nil: all tokens) while they must not come. If nothing else
// is allowed, as where a constraint is complete, they stay.
func (s *sampler) allowed(size int, mask []uint32) []uint32 {
	if s.accepted >= s.keepOut || len(s.ends) == 0 {
		return mask
	}
	words := (size + 31) / 32
	s.mask = slices.Grow(s.mask[:0], words)[:words]
	if mask == nil {
		for i := range s.mask {
			s.mask[i] = math.MaxUint32
		}
	} else {
		clear(s.mask[copy(s.mask, mask):])
	}
	if rest := size % 32; rest > 0 {
		s.mask[words-1] &= 1<<rest - 1
	}
	for _, t := range s.ends {
		if int(t) < size {
			s.mask[t/32] &^= 1 << (t % 32)
		}
	}
	if !slices.ContainsFunc(s.mask, func(w uint32) bool { return w != 0 }) {
		return mask
	}
	return s.mask
}

// biased adds logit_bias; the logits themselves are never changed.
func (s *sampler) biased(logits []float32) []float32 {
	if len(s.bias) == 0 {
		return logits
	}
	s.adjusted = append(s.adjusted[:0], logits...)
	for _, b := range s.bias {
		if int(b.token) < len(s.adjusted) {
			s.adjusted[b.token] += b.bias
		}
	}
	return s.adjusted
}

// penalised applies logit_bias and the penalties.
func (s *sampler) penalised(logits []float32) []float32 {
	adjusted := s.biased(logits)
	if len(s.seen) == 0 && len(s.counts) == 0 {
		return adjusted
	}
	if len(s.bias) == 0 {
		s.adjusted = append(s.adjusted[:0], logits...)
		adjusted = s.adjusted
	}
	r := float32(s.repetition)
	for i, word := range s.seen {
		for ; word != 0; word &= word - 1 {
			t := i*64 + bits.TrailingZeros64(word)
			switch {
			case t >= len(adjusted):
			case adjusted[t] > 0:
				adjusted[t] /= r
			default:
				adjusted[t] *= r
			}
		}
	}
	for t, n := range s.counts {
		if int(t) < len(adjusted) {
			adjusted[t] -= float32(s.frequency*float64(n) + s.presence)
		}
	}
	return adjusted
}

// pick returns the next token, of those that the mask allows (bit t%32 of word t/32 is 1), of all if it is nil; -1 if
// it allows none. It does not accept it.
func (s *sampler) pick(logits []float32, mask []uint32) engine.Token {
	mask = s.allowed(len(logits), mask)
	logits = s.penalised(logits)
	if s.random == nil {
		return argmax(logits, mask)
	}
	if s.topK == 0 && s.topP >= 1 && s.minP == 0 {
		return s.draw(logits, mask)
	}
	kept, total := s.keep(logits, mask)
	if len(kept) == 0 { // nothing is allowed, or no logit of it is a number
		return argmax(logits, mask)
	}
	at := s.random.Float64() * total
	for _, c := range kept {
		if at -= c.p; at < 0 {
			return c.token
		}
	}
	return kept[len(kept)-1].token // rounding left a rest
}

// draw takes one of all allowed tokens at random.
func (s *sampler) draw(logits []float32, mask []uint32) engine.Token {
	best := argmax(logits, mask)
	total := s.weigh(logits, mask, best)
	if total == 0 {
		return best
	}
	at := s.random.Float64() * total
	for t, weight := range s.weights {
		if at -= weight; at < 0 {
			return engine.Token(t)
		}
	}
	return best // rounding left a rest
}

// keep returns what is drawn from, after temperature, top-k, top-p and min-p, and the sum of its probabilities.
func (s *sampler) keep(logits []float32, mask []uint32) (kept []candidate, total float64) {
	if s.topK > 0 && s.topK < len(logits) {
		s.likeliest(logits, mask)
		for _, c := range s.candidates {
			total += c.p
		}
	} else {
		total = s.weigh(logits, mask, argmax(logits, mask))
		// The tokens below the bound have together less than the mass that top-p leaves out. Without top-p, min-p itself
		// is the bound.
		bound := (1 - s.topP) * total / float64(len(logits)) * (1 - 1e-9)
		if s.topP >= 1 {
			bound = s.minP
		}
		s.candidates = s.candidates[:0]
		for t, weight := range s.weights {
			if weight > 0 && weight >= bound {
				s.candidates = append(s.candidates, candidate{token: engine.Token(t), p: weight})
			}
		}
	}
	kept = s.candidates
	if len(kept) == 0 {
		return nil, 0
	}
	if s.topP < 1 {
		kept, _ = nucleus(kept, s.topP*total)
	}
	total = 0
	if s.minP > 0 {
		kept = slices.DeleteFunc(kept, func(c candidate) bool { return c.p < s.minP })
	}
	for _, c := range kept {
		total += c.p
	}
	return kept, total
}

// weigh sets the weights of all tokens to their probabilities in units of the likeliest one's, 0 of tokens that are not
// allowed, and returns their sum: 0 if best is -1 or its logit is no number.
func (s *sampler) weigh(logits []float32, mask []uint32, best engine.Token) (total float64) {
	s.weights = slices.Grow(s.weights[:0], len(logits))[:len(logits)]
	if best < 0 || logits[best] != logits[best] || math.IsInf(float64(logits[best]), -1) {
		clear(s.weights)
		return 0
	}
	if math.IsInf(float64(logits[best]), 1) {
		clear(s.weights)
		s.weights[best] = 1
		return 1
	}
	top, inverse := float64(logits[best]), 1/s.temperature
	if mask == nil {
		weights := s.weights[:len(logits)]
		for t, logit := range logits {
			w := math.Exp((float64(logit) - top) * inverse)
			weights[t] = w
			total += w
		}
		return total
	}
	clear(s.weights)
	for i, word := range mask {
		for ; word != 0; word &= word - 1 {
			if t := i*32 + bits.TrailingZeros32(word); t < len(logits) {
				s.weights[t] = math.Exp((float64(logits[t]) - top) * inverse)
				total += s.weights[t]
			}
		}
	}
	return total
}

// likeliest makes the topK allowed tokens of the highest logits, of equals those of the lowest ids, the candidates,
// with their probabilities.
func (s *sampler) likeliest(logits []float32, mask []uint32) {
	heap := s.candidates[:0] // the least likely first
	each(logits, mask, func(t engine.Token, logit float32) {
		switch {
		case logit != logit:
		case len(heap) < s.topK:
			heap = append(heap, candidate{token: t, logit: logit})
			for i := len(heap) - 1; i > 0 && after(heap[i], heap[(i-1)/2]); i = (i - 1) / 2 {
				heap[i], heap[(i-1)/2] = heap[(i-1)/2], heap[i]
			}
		case logit > heap[0].logit: // ids ascend, so an equal one comes after
			heap[0] = candidate{token: t, logit: logit}
			sift(heap, 0, after)
		}
	})
	s.candidates = heap
	if len(heap) == 0 {
		return
	}
	top := heap[0].logit
	for _, c := range heap {
		top = max(top, c.logit)
	}
	for i := range heap {
		heap[i].p = 1 // of the highest, also where that is infinite
		if heap[i].logit < top {
			heap[i].p = math.Exp(float64(heap[i].logit-top) / s.temperature)
		}
	}
}

// after orders candidates from the lowest logit on.
func after(a, b candidate) bool { return a.logit < b.logit || a.logit == b.logit && a.token > b.token }

// before orders candidates from the most probable on.
func before(a, b candidate) bool { return a.p > b.p || a.p == b.p && a.token < b.token }

// sift moves a heap's element i down to where no child is before it.
func sift(heap []candidate, i int, before func(a, b candidate) bool) {
	for {
		next := 2*i + 1
		if next >= len(heap) {
			return
		}
		if next+1 < len(heap) && before(heap[next+1], heap[next]) {
			next++
		}
		if !before(heap[next], heap[i]) {
			return
		}
		heap[i], heap[next] = heap[next], heap[i]
		i = next
	}
}

// nucleus returns the most likely candidates, in that order, until their sum reaches mass, and that sum; at least one.
// It reorders the slice. A heap gives them one by one, since few are needed.
func nucleus(c []candidate, mass float64) ([]candidate, float64) {
	for i := len(c)/2 - 1; i >= 0; i-- {
		sift(c, i, before)
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
		sift(c[:n], 0, before)
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

// probabilities is the function of that name over what the sampler may choose from: the constraint's tokens and
// min_tokens count, and logit_bias, but no penalty and no temperature.
func (s *sampler) probabilities(logits []float32, mask []uint32, chosen engine.Token, n int) (float64, []tokenProbability) {
	return probabilities(s.biased(logits), s.allowed(len(logits), mask), chosen, n)
}

// probabilities returns the log-probability of the chosen token and the n most likely tokens in descending order,
// ties by id. The distribution is the model's own, without temperature, over the tokens that the mask allows, all if
// it is nil.
func probabilities(logits []float32, mask []uint32, chosen engine.Token, n int) (float64, []tokenProbability) {
	first := argmax(logits, mask)
	if first < 0 {
		return math.Inf(-1), nil
	}
	top := float64(logits[first])
	sum := 0.0
	best := make([]tokenProbability, 0, n+1)
	order := func(a, b tokenProbability) int {
		return cmp.Or(cmp.Compare(b.logP, a.logP), cmp.Compare(a.token, b.token))
	}
	each(logits, mask, func(t engine.Token, logit float32) {
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

// each calls f for every token that the mask allows and its logit, in ascending order; for every token if it is nil.
func each(logits []float32, mask []uint32, f func(engine.Token, float32)) {
	if mask == nil {
		for t, logit := range logits {
			f(engine.Token(t), logit)
		}
		return
	}
	for i, word := range mask {
		for ; word != 0; word &= word - 1 {
			if t := i*32 + bits.TrailingZeros32(word); t < len(logits) {
				f(engine.Token(t), logits[t])
			}
		}
	}
}

// argmax returns the allowed token with the highest logit, the lowest id of equals; a NaN never wins against a number.
// It is -1 if no token is allowed.
func argmax(logits []float32, mask []uint32) engine.Token {
	best, top := -1, float32(math.Inf(-1))
	if mask == nil {
		for t, logit := range logits {
			if logit > top {
				best, top = t, logit
			}
		}
		if best < 0 && len(logits) > 0 {
			best = 0 // all are minus infinity or NaN
		}
		return engine.Token(best)
	}
	for i, word := range mask {
		if bits.OnesCount32(word) > 8 && i*32+32 <= len(logits) {
			for j, logit := range logits[i*32 : i*32+32] {
				if logit > top && word>>j&1 == 1 { // the first is seldom true, so the second costs nothing
					best, top = i*32+j, logit
				}
			}
			continue
		}
		for ; word != 0; word &= word - 1 {
			if t := i*32 + bits.TrailingZeros32(word); t < len(logits) && logits[t] > top {
				best, top = t, logits[t]
			}
		}
	}
	if best < 0 {
		best = firstAllowed(mask, len(logits))
	}
	return engine.Token(best)
}

// firstAllowed returns the lowest token below size that the mask allows, -1 if there is none.
func firstAllowed(mask []uint32, size int) int {
	for i, word := range mask {
		if t := i*32 + bits.TrailingZeros32(word); word != 0 && t < size {
			return t
		}
	}
	return -1
}
