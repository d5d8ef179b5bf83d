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
	definitions, calls, results probed
	style                       callStyle
	form                        toolForm // of a call
}

// probed says whether a template writes something; err, that it refused the probe, so that this is not known.
type probed struct {
	written bool
	err     error
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
	text, err := b.renderAs(ctx, Chat{[]wire.Message{question}, tools}, true, nil, callStyle{})
	s.definitions = probed{strings.Contains(text, "probedname"), err}

	chat := Chat{[]wire.Message{question, call, result}, tools}
	text, err = b.renderAs(ctx, chat, true, nil, callStyle{})
	for _, style := range []callStyle{{textArguments: true}, {emptyContent: true}, {textArguments: true, emptyContent: true}} {
		if err == nil {
			break
		}
		other, otherErr := b.renderAs(ctx, chat, true, nil, style)
		if otherErr == nil && (!style.emptyContent || strings.Contains(other, "probedcall")) {
			text, err, s.style = other, nil, style
		}
	}
	s.form = formOf(text)
	s.calls = probed{strings.Contains(text, "probedcall") && strings.Contains(text, "probedvalue"), err}
	s.results = probed{strings.Contains(text, "probedresult"), err}
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
			if err := b.writes(ctx, chat, "tool_calls", i, b.tools().calls); err != nil {
				return err
			}
		case m.Role == "tool":
			if err := b.writes(ctx, chat, `messages of role "tool"`, i, b.tools().results); err != nil {
				return err
			}
		}
	}
	if defines {
		return b.writes(ctx, chat, "tools", -1, b.tools().definitions)
	}
	return nil
}

// writes reports that the template does not write a part of a conversation.
func (b *Builder) writes(ctx context.Context, chat Chat, what string, message int, p probed) error {
	err := p.err
	switch {
	case err == nil && p.written:
		return nil
	case err != nil:
		// It may take the row although it does not take the probe.
		if _, err = b.render(ctx, chat, false, nil); err == nil || ctx.Err() != nil {
			return err
		}
	}
	reason := fmt.Sprintf("the model's chat template does not write %s, so the model could not learn them: "+
		"take a base model whose template knows tools, or give the model directory a chat_template.jinja that does", what)
	if err != nil {
		reason += fmt.Sprintf(" (%v)", err)
	}
	return &MessageError{Message: message, Err: errors.New(reason)}
}
