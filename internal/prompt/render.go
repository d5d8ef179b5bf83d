package prompt

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/wire"
	"github.com/hone-llm/hone/third_party/jinja"
	"github.com/ncruces/go-strftime"
)

var errRenderTime = errors.New("rendering took too long")

// globals are the variables that every rendering has, as in transformers.
func globals(o Options) map[string]jinja.Value {
	now := o.Now
	if now == nil {
		now = time.Now
	}
	name := func(token engine.Token, ok bool) jinja.Value {
		if !ok {
			return jinja.NewString("")
		}
		return jinja.NewString(string(o.Vocabulary.Piece(token)))
	}
	return map[string]jinja.Value{
		"bos_token": name(o.Vocabulary.BOS()),
		"eos_token": name(o.Vocabulary.EOS()),
		"tools":     jinja.None(),
		"documents": jinja.None(),
		"strftime_now": jinja.NewCallable("strftime_now", func(args []jinja.Value, _ map[string]jinja.Value) (jinja.Value, error) {
			if len(args) != 1 || !args[0].IsString() {
				return jinja.Undefined(), errors.New("strftime_now takes one format string")
			}
			return jinja.NewString(strftime.Format(args[0].AsString(), now())), nil
		}),
	}
}

// variables are what a rendering has besides the messages, the tools and the globals; templates that do not know one ignore it.
type variables map[string]jinja.Value

// callStyle is how a template takes tool calls, where there are several ways.
type callStyle struct {
	textArguments bool // the arguments as the JSON text that they come as, not as an object
	emptyContent  bool // the content of a message that only calls tools as "", not as none
}

// render runs the template over a conversation, within the limits. The error is ErrNoTemplate, a *MessageError or the
// context's.
func (b *Builder) render(ctx context.Context, chat Chat, generationPrompt bool, vars variables) (string, error) {
	var style callStyle
	if b.template != nil && slices.ContainsFunc(chat.Messages, func(m wire.Message) bool { return len(m.ToolCalls) > 0 }) {
		style = b.tools().style
	}
	return b.renderAs(ctx, chat, generationPrompt, vars, style)
}

// renderAs is render with a given style of calls.
func (b *Builder) renderAs(ctx context.Context, chat Chat, generationPrompt bool, vars variables, style callStyle) (string, error) {
	if b.template == nil {
		return "", ErrNoTemplate
	}
	messages := chat.Messages
	if len(messages) == 0 && generationPrompt {
		return "", &MessageError{Message: -1, Err: errors.New("no messages before the assistant's turn")}
	}
	data := make(map[string]jinja.Value, len(b.globals)+len(vars)+2)
	for name, value := range b.globals {
		data[name] = value
	}
	for name, value := range vars {
		data[name] = value
	}
	items := make([]jinja.Value, len(messages))
	for i := range messages {
		var err error
		if items[i], err = messageValue(&messages[i], style); err != nil {
			return "", &MessageError{Message: i, Err: err}
		}
	}
	if chat.Tools != nil {
		tools, err := jinja.FromJSON(chat.Tools)
		if err == nil && !tools.IsNone() && !tools.IsList() {
			err = errors.New("expected an array")
		}
		if err != nil {
			return "", &MessageError{Message: -1, Err: fmt.Errorf("tools: %w", err)}
		}
		if tools.IsList() && tools.AsList().Len() > 0 {
			data["tools"] = tools
		}
	}
	data["messages"] = jinja.NewList(items)
	data["add_generation_prompt"] = jinja.NewBool(generationPrompt)

	rendering, cancel := context.WithTimeoutCause(ctx, b.renderTime, errRenderTime)
	defer cancel()
	text, err := b.template.RenderLimited(rendering, jinja.DefaultLimits, data)
	if err != nil {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		if errors.Is(err, errRenderTime) {
			err = fmt.Errorf("%w: it was stopped after %v", err, b.renderTime)
		}
		return "", &MessageError{Message: -1, Err: fmt.Errorf("the model's chat template: %w", err)}
	}
	return text, nil
}

// exceeds tells whether a rendering ended because it cost too much: another would too.
func exceeds(err error) bool {
	limit := new(jinja.LimitError)
	return errors.Is(err, errRenderTime) || errors.As(err, &limit)
}

// messageValue is a message as transformers' users pass it: keys that are not set are absent, tool arguments are
// objects, and the content of an assistant's message that only calls tools is none, unless the style says otherwise.
func messageValue(m *wire.Message, style callStyle) (jinja.Value, error) {
	v := jinja.NewDict()
	d := v.AsDict()
	text := func(s string) jinja.Value { return jinja.NewString(strings.ToValidUTF8(s, "\uFFFD")) }
	d.Set("role", text(m.Role))
	if m.Content == "" && len(m.ToolCalls) > 0 && !style.emptyContent {
		d.Set("content", jinja.None())
	} else {
		d.Set("content", text(m.Content))
	}
	if m.ReasoningContent != "" { // transformers gives it both names
		d.Set("reasoning_content", text(m.ReasoningContent))
		d.Set("thinking", text(m.ReasoningContent))
	}
	if m.Name != "" {
		d.Set("name", text(m.Name))
	}
	if len(m.ToolCalls) > 0 {
		calls := make([]jinja.Value, len(m.ToolCalls))
		for i, call := range m.ToolCalls {
			arguments, err := argumentsValue(call.Function.Arguments)
			if err != nil {
				return v, fmt.Errorf("tool_calls[%d].function.arguments %w", i, err)
			}
			if style.textArguments {
				arguments = text(call.Function.Arguments)
			}
			function := jinja.NewDict()
			function.AsDict().Set("name", text(call.Function.Name))
			function.AsDict().Set("arguments", arguments)
			value := jinja.NewDict()
			if call.ID != "" {
				value.AsDict().Set("id", text(call.ID))
			}
			kind := call.Type
			if kind == "" {
				kind = "function"
			}
			value.AsDict().Set("type", text(kind))
			value.AsDict().Set("function", function)
			calls[i] = value
		}
		d.Set("tool_calls", jinja.NewList(calls))
	}
	if m.ToolCallID != "" {
		d.Set("tool_call_id", text(m.ToolCallID))
	}
	return v, nil
}

// argumentsValue reads the arguments of a call, a JSON object; no text is an object without keys. The error continues
// a sentence that begins with the name of the field.
func argumentsValue(text string) (jinja.Value, error) {
	if strings.TrimSpace(text) == "" {
		return jinja.NewDict(), nil
	}
	arguments, err := jinja.FromJSON([]byte(text))
	if err != nil {
		return arguments, fmt.Errorf("is not JSON: %w", err)
	}
	if !arguments.IsDict() {
		return arguments, fmt.Errorf("must be a JSON object, not %.40q", text)
	}
	return arguments, nil
}
