package runner

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/llguidance"
)

// constraints makes the constraints of requests for one model. Any goroutine may call New. The vocabulary is handed to
// llguidance in the background from newConstraints on.
type constraints struct {
	ready     chan struct{} // closed when the two below are set
	tokenizer *llguidance.Tokenizer
	err       error
}

func newConstraints(m *llama.Model) *constraints {
	c := &constraints{ready: make(chan struct{})}
	go func() {
		defer close(c.ready)
		c.tokenizer, c.err = vocabularyOf(m)
	}()
	return c
}

// vocabularyOf hands a model's vocabulary to llguidance.
func vocabularyOf(m *llama.Model) (*llguidance.Tokenizer, error) {
	size := m.VocabularySize()
	pieces, special := make([][]byte, size), make([]bool, size)
	for t := range size {
		token := engine.Token(t)
		pieces[t] = m.Piece(token)
		special[t] = m.IsControl(token) || m.IsEndOfGeneration(token)
	}
	eos, ok := m.EOS()
	if !ok {
		return nil, errors.New("the model has no end-of-text token, which constrained completions need")
	}
	tokenizer, err := llguidance.NewTokenizer(pieces, special, eos)
	if err != nil {
		return nil, fmt.Errorf("prepare constraints: %w", err)
	}
	return tokenizer, nil
}

// free waits for the vocabulary and frees it. Constraints made before stay valid until their own Close.
func (c *constraints) free() {
	if c == nil {
		return
	}
	<-c.ready
	_ = c.tokenizer.Close() // frees memory; a nil one has none
}

// New returns the constraint of one completion. The error is a *child.Error, with CodeInvalidRequest and a Param where
// the request is at fault, or the context's cause.
func (c *constraints) New(ctx context.Context, want child.Constraint) (*constraint, error) {
	select {
	case <-c.ready:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if c.err != nil {
		return nil, &child.Error{Code: child.CodeInternal, Message: c.err.Error()}
	}
	var grammar *llguidance.Constraint
	var err error
	param := want.Kind
	switch want.Kind {
	case child.ConstraintChoice:
		param = "choices"
		grammar, err = c.tokenizer.Choices(want.Choices)
	case child.ConstraintJSONObject:
		grammar, err = c.tokenizer.New(llguidance.KindJSONObject, "")
	case child.ConstraintJSONSchema:
		grammar, err = c.tokenizer.New(llguidance.KindJSONSchema, want.Text)
	case child.ConstraintRegex:
		grammar, err = c.tokenizer.New(llguidance.KindRegex, want.Text)
	case child.ConstraintLark:
		param = "grammar"
		grammar, err = c.tokenizer.New(llguidance.KindLark, want.Text)
	default:
		return nil, &child.Error{Code: child.CodeInvalidRequest, Param: "constraint", Message: fmt.Sprintf("constraint: unknown kind %q", want.Kind)}
	}
	if refused := (*llguidance.GrammarError)(nil); errors.As(err, &refused) {
		return nil, &child.Error{Code: child.CodeInvalidRequest, Param: param, Message: param + ": " + refused.Message}
	}
	if err != nil {
		return nil, &child.Error{Code: child.CodeInternal, Message: err.Error()}
	}
	return &constraint{grammar: grammar}, nil
}

// constraint says which tokens one completion may go on with. Its methods are for one goroutine at a time:
//
//	c.Start()                  // as soon as the token before is accepted
//	...                        // the batch is computed
//	mask, err := c.Mask()      // waits for it
//	err = c.Accept(token)
//	if c.Stopped() { ... }     // complete: nothing but the end of the turn can follow
type constraint struct {
	grammar *llguidance.Constraint

	computing sync.WaitGroup
	started   bool // Start was called and Mask was not
	mask      []uint32
	err       error
}

// Start begins to compute the next mask in another goroutine. It may be called again before Mask, without effect.
func (c *constraint) Start() {
	if c.started {
		return
	}
	c.started = true
	c.computing.Go(func() { c.mask, c.err = c.grammar.Mask() })
}

// Mask returns the tokens that may come next (bit t%32 of word t/32 is 1), waiting for what Start began. It is valid
// until the next Start or Mask and must not be changed. The error is a *child.Error of this completion alone.
func (c *constraint) Mask() ([]uint32, error) {
	c.Start()
	c.computing.Wait()
	c.started = false
	if c.err != nil {
		return nil, &child.Error{Code: child.CodeInvalidRequest, Param: "constraint", Message: c.err.Error()}
	}
	return c.mask, nil
}

// Accept goes on with a token that the last mask allows.
func (c *constraint) Accept(t engine.Token) error {
	if err := c.grammar.Accept(t); err != nil {
		return &child.Error{Code: child.CodeInternal, Message: err.Error()}
	}
	return nil
}

// Stopped reports that the completion is complete and nothing can follow.
func (c *constraint) Stopped() bool { return c.grammar.Stopped() }

// Close frees the constraint, waiting for a mask being computed. It may be called more than once, and for nil.
func (c *constraint) Close() {
	if c != nil {
		c.computing.Wait()
		_ = c.grammar.Close() // frees memory
	}
}
