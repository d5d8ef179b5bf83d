package runner

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/llguidance"
)

// constraints makes the constraints of requests for one model. Any goroutine may call New. The vocabulary is handed to
// llguidance in the background from newConstraints on (0.15 s for 49,152 tokens).
//
// What a grammar compiles to is kept, and a completion gets a copy: the second request with the same schema compiles
// nothing. One grammar is compiled at a time, so that hostile ones together take no more than one core.
type constraints struct {
	ready     chan struct{} // closed when the two below are set
	tokenizer *llguidance.Tokenizer
	err       error

	compiling chan struct{} // capacity 1: held while a grammar is compiled

	mu      sync.Mutex
	kept    map[[sha256.Size]byte]*list.Element // of *compiled
	recent  *list.List                          // of *compiled, the one used last first
	seconds time.Duration                       // what compiling the kept ones took
}

// Bounds of what is kept: grammars that took long to compile are also those that take much memory (a tenth of a second
// makes some 20 MB).
const (
	keptGrammars = 64
	keptTime     = time.Second
)

// compiled is a grammar as compiled, or why it was refused.
type compiled struct {
	key  [sha256.Size]byte
	took time.Duration
	err  error

	mu      sync.Mutex // the grammar is copied by one goroutine at a time
	grammar *llguidance.Constraint
}

func newConstraints(m *llama.Model) *constraints {
	c := &constraints{
		ready: make(chan struct{}), compiling: make(chan struct{}, 1),
		kept: make(map[[sha256.Size]byte]*list.Element), recent: list.New(),
	}
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

// free waits for the vocabulary and frees it, with what is kept. Constraints made before stay valid until their own
// Close; New must not be called any more.
func (c *constraints) free() {
	if c == nil {
		return
	}
	<-c.ready
	c.mu.Lock()
	defer c.mu.Unlock()
	for e := c.recent.Front(); e != nil; e = e.Next() {
		e.Value.(*compiled).close()
	}
	c.recent.Init()
	clear(c.kept)
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
	key := keyOf(want)
	for {
		found, err := c.compiled(ctx, key, want)
		if err != nil {
			return nil, err
		}
		made, err := found.copy()
		if errors.Is(err, llguidance.ErrClosed) {
			continue // let go of since it was found
		}
		return made, err
	}
}

// compiled returns a grammar as kept, or compiles it. The error is the context's cause.
func (c *constraints) compiled(ctx context.Context, key [sha256.Size]byte, want child.Constraint) (*compiled, error) {
	if found := c.find(key); found != nil {
		return found, nil
	}
	select {
	case c.compiling <- struct{}{}:
		defer func() { <-c.compiling }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if found := c.find(key); found != nil { // another request has compiled it meanwhile
		return found, nil
	}
	made := c.compile(key, want)
	c.keep(made)
	return made, nil
}

func keyOf(want child.Constraint) [sha256.Size]byte {
	hash := sha256.New()
	for _, text := range append([]string{want.Kind, want.Text}, want.Choices...) {
		_ = binary.Write(hash, binary.LittleEndian, int64(len(text))) // a hash takes everything
		_, _ = io.WriteString(hash, text)
	}
	return [sha256.Size]byte(hash.Sum(nil))
}

// find returns a kept grammar, nil if there is none.
func (c *constraints) find(key [sha256.Size]byte) *compiled {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.kept[key]
	if e == nil {
		return nil
	}
	c.recent.MoveToFront(e)
	return e.Value.(*compiled)
}

// keep puts a grammar first and lets go of those used longest ago.
func (c *constraints) keep(g *compiled) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kept[g.key] = c.recent.PushFront(g)
	c.seconds += g.took
	for c.recent.Len() > keptGrammars || c.seconds > keptTime && c.recent.Len() > 1 {
		last := c.recent.Remove(c.recent.Back()).(*compiled)
		delete(c.kept, last.key)
		c.seconds -= last.took
		last.close()
	}
}

// compile compiles a grammar and computes its first mask, which finds grammars that no text satisfies, and those that
// explode at once.
func (c *constraints) compile(key [sha256.Size]byte, want child.Constraint) *compiled {
	g := &compiled{key: key}
	var err error
	param := want.Kind
	switch want.Kind {
	case child.ConstraintChoice:
		param = "choices"
		g.grammar, err = c.tokenizer.Choices(want.Choices)
	case child.ConstraintJSONObject:
		g.grammar, err = c.tokenizer.New(llguidance.KindJSONObject, "")
	case child.ConstraintJSONSchema:
		g.grammar, err = c.tokenizer.New(llguidance.KindJSONSchema, want.Text)
	case child.ConstraintRegex:
		g.grammar, err = c.tokenizer.New(llguidance.KindRegex, want.Text)
	case child.ConstraintLark:
		param = "grammar"
		g.grammar, err = c.tokenizer.New(llguidance.KindLark, want.Text)
	default:
		g.err = &child.Error{Code: child.CodeInvalidRequest, Param: "constraint", Message: fmt.Sprintf("constraint: unknown kind %q", want.Kind)}
		return g
	}
	var refused *llguidance.GrammarError
	switch {
	case errors.As(err, &refused):
		g.took = refused.Took
		g.err = &child.Error{Code: child.CodeInvalidRequest, Param: param, Message: param + ": " + refused.Message}
	case err != nil:
		g.err = &child.Error{Code: child.CodeInternal, Message: err.Error()}
	default:
		g.took = g.grammar.Compiled()
		if _, err := g.grammar.Mask(); err != nil {
			_ = g.grammar.Close() // frees memory
			g.grammar = nil
			g.err = &child.Error{Code: child.CodeInvalidRequest, Param: param, Message: param + ": " + err.Error()}
		}
	}
	return g
}

// copy returns a completion's own constraint. The error is a *child.Error, or llguidance.ErrClosed.
func (g *compiled) copy() (*constraint, error) {
	if g.err != nil {
		return nil, g.err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	grammar, err := g.grammar.Clone()
	if err != nil {
		return nil, err
	}
	return &constraint{grammar: grammar}, nil
}

func (g *compiled) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	_ = g.grammar.Close() // frees memory; a refused one has none
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

	computing chan struct{} // closed when mask and err are set; nil before the first Start
	started   bool          // Start was called and Mask was not
	mask      []uint32
	err       error
}

// Start begins to compute the next mask in another goroutine. It may be called again before Mask, without effect.
func (c *constraint) Start() {
	if c.started {
		return
	}
	c.started = true
	computing := make(chan struct{})
	c.computing = computing
	go func() {
		defer close(computing)
		c.mask, c.err = c.grammar.Mask()
	}()
}

// Mask returns the tokens that may come next (bit t%32 of word t/32 is 1), waiting for what Start began. It is valid
// until the next Start or Mask and must not be changed. The error is a *child.Error of this completion alone.
func (c *constraint) Mask() ([]uint32, error) {
	c.Start()
	<-c.computing
	c.started = false
	if c.err != nil {
		return nil, stuck(c.err)
	}
	return c.mask, nil
}

// Accept goes on with a token that the last mask allows. The error is a *child.Error of this completion alone: what
// follows the token may be more than the library's limits.
func (c *constraint) Accept(t engine.Token) error {
	if err := c.grammar.Accept(t); err != nil {
		if llguidance.Allowed(c.mask, t) {
			return stuck(err)
		}
		return &child.Error{Code: child.CodeInternal, Message: err.Error()}
	}
	return nil
}

// stuck blames the request for a constraint that a completion came to the library's limits with.
func stuck(err error) error {
	return &child.Error{Code: child.CodeInvalidRequest, Param: "constraint", Message: "the completion cannot follow its constraint any further: " + err.Error()}
}

// Stopped reports that the completion is complete and nothing can follow.
func (c *constraint) Stopped() bool { return c.grammar.Stopped() }

// Close frees the constraint, waiting for a mask being computed. It may be called more than once, and for nil.
func (c *constraint) Close() {
	if c != nil {
		if c.computing != nil {
			<-c.computing
		}
		_ = c.grammar.Close() // frees memory
	}
}
