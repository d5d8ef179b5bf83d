package runner

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/llguidance"
)

// sequence is one request's prompt and completion tokens. Between submit and the closing of done it is the scheduler's.
type sequence struct {
	ctx        context.Context
	adapter    *adapter // nil: the base model
	tokens     []engine.Token
	prompt     int // of tokens, how many are the prompt's
	limit      int // most tokens
	sampler    *sampler
	constraint *constraint      // nil: free text
	spellings  [][]engine.Token // of the choices, as the tokenizer writes them; nil: any
	text       *text
	logProbs   bool
	top        int
	vocabulary *llama.Model
	out        *outbox

	slot   *slot // nil while it waits
	cached int   // prompt tokens that the prefix cache had; -1 before the first admission
	done   chan struct{}
}

// next takes the logits after the sequence's last token, samples and reports; finished says that it was the last.
func (s *sequence) next(logits []float32) (finished bool) {
	var mask []uint32
	if s.constraint != nil {
		var err error
		if mask, err = s.constraint.Mask(); err != nil {
			return s.fail(err)
		}
		mask = s.spelled(mask)
	}
	token := s.sampler.pick(logits, mask)
	if token < 0 {
		return s.fail(errNoToken)
	}
	if s.vocabulary.IsEndOfGeneration(token) {
		return s.finish("stop")
	}
	var logProb *child.TokenLogProb
	if s.logProbs {
		p, top := s.sampler.probabilities(logits, mask, token, s.top)
		entry := s.entry(token, p)
		for _, t := range top {
			entry.Top = append(entry.Top, s.entry(t.token, t.logP))
		}
		logProb = &entry
	}
	s.tokens = append(s.tokens, token)
	s.sampler.accept(token)
	var piece []byte
	if !s.vocabulary.IsControl(token) { // the name of a control token is no text
		piece = s.vocabulary.Piece(token)
	}
	show, shown, stopped := s.text.add(piece, logProb)
	if show != "" || len(shown) > 0 {
		s.out.put(child.GenerateEvent{Text: show, LogProbs: shown})
	}
	if stopped {
		return s.finish("stop")
	}
	if s.constraint != nil {
		if err := s.constraint.Accept(token); err != nil {
			return s.fail(err)
		}
		if s.constraint.Stopped() {
			return s.finish("stop")
		}
	}
	if len(s.tokens) >= s.limit {
		return s.finish("length")
	}
	return false
}

// spelled keeps of the allowed tokens those that go on with a choice as the tokenizer writes it. The constraint alone
// also allows parts of words, which a model hardly ever writes: "L" would win for "London" over "Paris".
func (s *sequence) spelled(allowed []uint32) []uint32 {
	if s.spellings == nil {
		return allowed
	}
	written := s.tokens[s.prompt:]
	kept := make([]uint32, len(allowed))
	any := false
	keep := func(t engine.Token) {
		if llguidance.Allowed(allowed, t) {
			kept[t/32] |= 1 << (t % 32)
			any = true
		}
	}
	for _, spelling := range s.spellings {
		if len(spelling) > len(written) && slices.Equal(spelling[:len(written)], written) {
			keep(spelling[len(written)])
		}
	}
	for _, t := range s.sampler.ends {
		keep(t)
	}
	if !any { // two tokens of the same bytes, of which the constraint knows one
		return allowed
	}
	return kept
}

func (s *sequence) entry(token engine.Token, logP float64) child.TokenLogProb {
	piece := s.vocabulary.Piece(token)
	return child.TokenLogProb{Token: validUTF8(piece), Bytes: piece, LogProb: logP}
}

func (s *sequence) finish(reason string) bool {
	show, logProbs := s.text.finish()
	s.out.put(child.GenerateEvent{Text: show, LogProbs: logProbs, FinishReason: reason, Usage: &child.Usage{
		PromptTokens:     s.prompt,
		CompletionTokens: len(s.tokens) - s.prompt,
		CachedTokens:     max(s.cached, 0),
	}})
	return true
}

func (s *sequence) fail(err error) bool {
	var refusal *child.Error
	if !errors.As(err, &refusal) {
		refusal = &child.Error{Code: child.CodeInternal, Message: err.Error()}
	}
	s.out.put(child.GenerateEvent{Error: refusal})
	return true
}

// outbox holds what a sequence has to say and its reader has not taken yet, joined to one event: a slow reader never
// holds up the batch, and what it leaves is bounded by the context.
type outbox struct {
	mu    sync.Mutex
	event child.GenerateEvent
	full  bool
	wake  chan struct{} // capacity 1
}

func newOutbox() *outbox { return &outbox{wake: make(chan struct{}, 1)} }

func (o *outbox) put(e child.GenerateEvent) {
	o.mu.Lock()
	o.event.Text += e.Text
	o.event.LogProbs = append(o.event.LogProbs, e.LogProbs...)
	if e.FinishReason != "" {
		o.event.FinishReason, o.event.Usage = e.FinishReason, e.Usage
	}
	if e.Error != nil {
		o.event.Error = e.Error
	}
	o.full = true
	o.mu.Unlock()
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// take waits for the next event; it returns the context's cause when that ends first.
func (o *outbox) take(ctx context.Context) (child.GenerateEvent, error) {
	for {
		o.mu.Lock()
		if o.full {
			event := o.event
			o.event, o.full = child.GenerateEvent{}, false
			o.mu.Unlock()
			return event, nil
		}
		o.mu.Unlock()
		select {
		case <-o.wake:
		case <-ctx.Done():
			return child.GenerateEvent{}, context.Cause(ctx)
		}
	}
}
