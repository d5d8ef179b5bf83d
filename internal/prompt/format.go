package prompt

import (
	"context"
	"encoding/json"
	"errors"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/wire"
)

// ChatOptions say how a conversation becomes a prompt, and what its answer may hold.
type ChatOptions struct {
	Tools             json.RawMessage  // OpenAI's array; nil, null and [] mean none
	ToolChoice        child.ToolChoice // "" is auto
	ParallelToolCalls bool

	EnableThinking       *bool
	ReasoningEffort      string
	ContinueFinalMessage bool // the last message is the assistant's, and the completion goes on with it
	// Answer says that the completion is constrained (to a choice, a schema, ...), so that it can neither reason nor call tools.
	Answer bool
}

// ChatPrompt is a prompt, and how the completions that follow it are constrained and read.
type ChatPrompt struct {
	Tokens []engine.Token
	// Constraint makes the calls of tools well-formed; nil if there is nothing to call.
	Constraint *child.Constraint
}

// NewParser returns a parser for one completion of the prompt.
func (p *ChatPrompt) NewParser() *Parser { return &Parser{} }

// ChatPrompt returns the prompt of a conversation. The error is ErrNoTemplate, a *MessageError or the context's.
func (b *Builder) ChatPrompt(ctx context.Context, messages []wire.Message, o ChatOptions) (*ChatPrompt, error) {
	if o.ContinueFinalMessage || len(o.Tools) > 0 {
		return nil, &MessageError{Message: -1, Err: errors.New("tools and continue_final_message are not supported")}
	}
	tokens, err := b.Prompt(ctx, messages)
	if o.Answer {
		tokens, err = b.AnswerPrompt(ctx, messages)
	}
	if err != nil {
		return nil, err
	}
	return &ChatPrompt{Tokens: tokens}, nil
}

// Delta is what a piece of a completion adds to the message: content, reasoning and calls.
type Delta struct {
	Text      string
	Reasoning string
	ToolCalls []child.ToolCallDelta
}

// Parser takes a completion apart. It is not safe for concurrent use.
type Parser struct{ called bool }

// Add appends a part of the completion's text, with the names of special tokens in it, and returns what it adds to the
// message. What may become a tag is held back.
func (p *Parser) Add(text string) []Delta {
	if text == "" {
		return nil
	}
	return []Delta{{Text: text}}
}

// End returns what was held back. The completion is over.
func (p *Parser) End() []Delta { return nil }

// Called tells whether the completion has called a tool.
func (p *Parser) Called() bool { return p.called }
