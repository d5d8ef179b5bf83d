package prompt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/hone-llm/hone/internal/wire"
)

// toolSupport is what a template writes of tools.
type toolSupport struct {
	definitions, calls, results bool
	textArguments               bool  // it takes the arguments of a call as JSON text, not as an object
	err                         error // the template refused the probe: what it supports is not known
}

// probeTools renders a conversation of names that no template has, and looks for them in the text. The identifier has
// the nine letters and digits that Mistral's templates insist on.
func (b *Builder) probeTools() toolSupport {
	tools := json.RawMessage(`[{"type": "function", "function": {"name": "probedname", "description": "probeddescription",
		"parameters": {"type": "object", "properties": {"probedkey": {"type": "string", "description": "x"}}, "required": ["probedkey"]}}}]`)
	question := wire.Message{Role: "user", Content: "x"}
	call := wire.Message{Role: "assistant", ToolCalls: []wire.ToolCall{{
		ID: "probe1234", Type: "function", Function: wire.FunctionCall{Name: "probedcall", Arguments: `{"probedkey": "probedvalue"}`},
	}}}
	result := wire.Message{Role: "tool", Name: "probedcall", ToolCallID: "probe1234", Content: "probedresult"}

	var s toolSupport
	ctx := context.Background() // bounded by the limits of a rendering
	defined, err := b.renderAs(ctx, Chat{[]wire.Message{question}, tools}, true, false)
	if err != nil {
		return toolSupport{err: err}
	}
	s.definitions = strings.Contains(defined, "probedname")
	chat := Chat{[]wire.Message{question, call, result}, tools}
	text, err := b.renderAs(ctx, chat, true, false)
	if err != nil {
		if text, s.err = b.renderAs(ctx, chat, true, true); s.err != nil {
			s.err = err
			return s
		}
		s.textArguments = true
	}
	s.calls = strings.Contains(text, "probedcall") && strings.Contains(text, "probedvalue")
	s.results = strings.Contains(text, "probedresult")
	return s
}

// checkTools refuses a training row whose tools the template would leave out of the text, for a model that learnt from
// it would answer as if there were none.
func (b *Builder) checkTools(ctx context.Context, chat Chat) error {
	if b.template == nil {
		return nil // render says so
	}
	defines := false
	if len(chat.Tools) > 0 {
		var tools []json.RawMessage
		if err := json.Unmarshal(chat.Tools, &tools); err != nil {
			return &MessageError{Message: -1, Err: errors.New("tools: expected an array")}
		}
		defines = len(tools) > 0
	}
	for i := range chat.Messages {
		m := &chat.Messages[i]
		switch {
		case len(m.ToolCalls) > 0 && m.Role != "assistant":
			return &MessageError{Message: i, Err: fmt.Errorf("tool_calls in a message of role %q: only an assistant's has them", m.Role)}
		case len(m.ToolCalls) > 0:
			if err := b.writes(ctx, chat, "tool_calls", i, func(s toolSupport) bool { return s.calls }); err != nil {
				return err
			}
		case m.Role == "tool":
			if err := b.writes(ctx, chat, `messages of role "tool"`, i, func(s toolSupport) bool { return s.results }); err != nil {
				return err
			}
		}
	}
	if defines {
		return b.writes(ctx, chat, "tools", -1, func(s toolSupport) bool { return s.definitions })
	}
	return nil
}

// writes reports that the template does not write a part of a conversation.
func (b *Builder) writes(ctx context.Context, chat Chat, what string, message int, has func(toolSupport) bool) error {
	s := b.tools()
	err := s.err
	if err != nil {
		// It may take the row although it does not take the probe.
		_, err = b.render(ctx, chat, false)
		if err == nil || ctx.Err() != nil {
			return err
		}
	} else if has(s) {
		return nil
	}
	reason := fmt.Sprintf("the model's chat template does not write %s, so the model could not learn them: "+
		"take a base model whose template knows tools, or give the model directory a chat_template.jinja that does", what)
	if err != nil {
		reason += fmt.Sprintf(" (%v)", err)
	}
	return &MessageError{Message: message, Err: errors.New(reason)}
}
