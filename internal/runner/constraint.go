package runner

import (
	"errors"
	"fmt"
	"sync"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/llguidance"
)

// constraints makes the constraints of requests. The vocabulary is handed to llguidance for the first one: that takes
// a moment, and most runners of a chat model never need it.
type constraints struct {
	model *llama.Model

	mu        sync.Mutex
	tokenizer *llguidance.Tokenizer
}

// choices returns a constraint to exactly one of the texts. The error is a *child.Error.
func (c *constraints) choices(choices []string) (*llguidance.Constraint, error) {
	tokenizer, err := c.vocabulary()
	if err != nil {
		return nil, &child.Error{Code: child.CodeInternal, Message: err.Error()}
	}
	constraint, err := tokenizer.Choices(choices)
	if grammar := (*llguidance.GrammarError)(nil); errors.As(err, &grammar) {
		return nil, &child.Error{Code: child.CodeInvalidRequest, Param: "choices", Message: "choices: " + grammar.Message}
	}
	if err != nil {
		return nil, &child.Error{Code: child.CodeInternal, Message: err.Error()}
	}
	return constraint, nil
}

func (c *constraints) vocabulary() (*llguidance.Tokenizer, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tokenizer != nil {
		return c.tokenizer, nil
	}
	size := c.model.VocabularySize()
	pieces, special := make([][]byte, size), make([]bool, size)
	for t := range size {
		token := engine.Token(t)
		pieces[t] = c.model.Piece(token)
		special[t] = c.model.IsControl(token) || c.model.IsEndOfGeneration(token)
	}
	eos, ok := c.model.EOS()
	if !ok {
		return nil, errors.New("the model has no end-of-text token, which constrained completions need")
	}
	tokenizer, err := llguidance.NewTokenizer(pieces, special, eos)
	if err != nil {
		return nil, fmt.Errorf("prepare constraints: %w", err)
	}
	c.tokenizer = tokenizer
	return tokenizer, nil
}

func (c *constraints) free() {
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.tokenizer.Close() // frees memory; a nil one has none
	c.tokenizer = nil
}
