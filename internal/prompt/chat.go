package prompt

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/wire"
	"github.com/hone-llm/hone/third_party/jinja"
)

// ChatOptions say how a conversation becomes a prompt, and what its answer may hold.
type ChatOptions struct {
	// Tools is OpenAI's array; nil, null and [] mean none. With ToolChoice none they stay out of the prompt.
	Tools             json.RawMessage
	ToolChoice        child.ToolChoice // "" is auto
	ParallelToolCalls bool             // several calls in one answer are allowed

	// EnableThinking is the template's enable_thinking where it has one. False closes the <think> block of any template.
	EnableThinking *bool
	// ReasoningEffort is the template's reasoning_effort; templates that have none ignore it. "none" is also
	// EnableThinking false, unless that is set.
	ReasoningEffort string
	// ContinueFinalMessage leaves the turn of the last message, the assistant's, open: the completion goes on with it.
	ContinueFinalMessage bool
	// Answer says that the request constrains the completion (to a choice, a schema, ...): it cannot hold reasoning, so it
	// comes after an empty <think> block, as a training row's answer without reasoning does, and it calls no tools.
	Answer bool
}

// ChatPrompt is a prompt, and how the completions that follow it are constrained and read.
type ChatPrompt struct {
	Tokens []engine.Token
	// Constraint makes sure that calls name a tool and that their arguments are JSON of its schema; nil if there are no
	// tools to call. Of ToolChoice auto it allows any text too; its cost is that of a mask for each token.
	Constraint *child.Constraint

	form     toolForm // unknownForm: no calls are read
	tools    []tool
	thinking thinkState
}

// thinkState is where a completion begins.
type thinkState int

const (
	noThinking   thinkState = iota
	mayThink                // it may begin with <think>
	openThinking            // the prompt has opened the block
)

// tool is a function that the model may call.
type tool struct {
	name       string
	parameters json.RawMessage // a JSON schema, nil if none was given
	strict     bool            // every keyword of the schema must be kept to
}

// ChatPrompt returns the prompt of a conversation. The error is ErrNoTemplate, a *MessageError or the context's.
//
// Definitions, calls and results of tools are written by the template, if the form of its calls is one that a Parser
// reads. Otherwise they are stated in Hermes' form, definitions in the system message, so that every model with
// a template can be asked to call tools; whether one that was not trained on them calls them well is another matter,
// but with ToolChoice required, or a function's name, its answer is a valid call.
func (b *Builder) ChatPrompt(ctx context.Context, messages []wire.Message, o ChatOptions) (*ChatPrompt, error) {
	if b.template == nil {
		return nil, ErrNoTemplate
	}
	if len(messages) == 0 {
		return nil, &MessageError{Message: -1, Err: errors.New("no messages before the assistant's turn")}
	}
	if last := len(messages) - 1; o.ContinueFinalMessage {
		switch {
		case messages[last].Role != "assistant":
			return nil, &MessageError{Message: last, Err: errors.New("continue_final_message: the last message must be the assistant's")}
		case len(messages[last].ToolCalls) > 0:
			return nil, &MessageError{Message: last, Err: errors.New("continue_final_message: the last message calls tools, there is no text to continue")}
		}
	}
	tools, err := parseTools(o.Tools)
	if err != nil {
		return nil, &MessageError{Message: -1, Param: "tools", Err: err}
	}
	choice, err := chooseTool(tools, o)
	if err != nil {
		return nil, &MessageError{Message: -1, Param: "tool_choice", Err: err}
	}
	chat := Chat{Messages: messages, Tools: o.Tools}
	if choice.Mode == child.ToolNone {
		chat.Tools, tools = nil, nil
	}
	chat, form, err := b.stateTools(chat, tools, false)
	if err != nil {
		return nil, err
	}
	p := &ChatPrompt{tools: tools}
	if len(tools) > 0 && !o.Answer {
		p.form = form
	}
	o.Answer = o.Answer || choice.Mode == child.ToolRequired || choice.Mode == child.ToolFunction
	write := b.generate
	if o.ContinueFinalMessage {
		write = b.continueFinal
	}
	err = write(ctx, p, chat, o)
	if message := new(MessageError); errors.As(err, &message) && len(chat.Tools) > 0 && !exceeds(err) {
		// Some templates cannot do without what OpenAI lets a tool leave out, others know few types of parameters.
		if full, fullErr := completeTools(chat.Tools); fullErr == nil && write(ctx, p, Chat{chat.Messages, full}, o) == nil {
			err = nil
		} else if stated, _, stateErr := b.stateTools(chat, tools, true); form == hermesForm && stateErr == nil && write(ctx, p, stated, o) == nil {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	if p.form != unknownForm {
		grammar, err := b.toolGrammar(p, choice, o.ParallelToolCalls)
		if err != nil {
			return nil, err
		}
		p.Constraint = &child.Constraint{Kind: child.ConstraintLark, Text: grammar}
	}
	return p, nil
}

// NewParser returns a parser for one completion of the prompt.
func (p *ChatPrompt) NewParser() *Parser {
	names := make(map[string]bool, len(p.tools))
	for _, t := range p.tools {
		names[t.name] = true
	}
	return newParser(p.form, names, p.thinking)
}

// vars are the template's variables that a request sets.
func (o *ChatOptions) vars() variables {
	vars := variables{}
	if thinks := o.thinks(); thinks != nil {
		vars["enable_thinking"] = jinja.NewBool(*thinks)
	}
	if o.ReasoningEffort != "" {
		vars["reasoning_effort"] = jinja.NewString(o.ReasoningEffort)
	}
	return vars
}

func (o *ChatOptions) thinks() *bool {
	if o.EnableThinking == nil && o.ReasoningEffort == "none" {
		return new(bool)
	}
	return o.EnableThinking
}

// generate makes the prompt up to the assistant's turn, or to the end of an empty <think> block in it.
func (b *Builder) generate(ctx context.Context, p *ChatPrompt, chat Chat, o ChatOptions) error {
	var text, empty string
	var err error
	thinks := b.thinking()
	open, closes := false, o.Answer
	if !closes {
		if text, err = b.render(ctx, chat, true, o.vars()); err != nil {
			return err
		}
		open = strings.HasSuffix(strings.TrimSpace(text), thinkStart)
		closes = o.thinks() != nil && !*o.thinks() && (open || thinks.thinks && !thinks.switches)
	}
	if closes {
		if text, empty, err = b.answerText(ctx, chat, o.vars()); err != nil {
			return err
		}
		if open = strings.HasSuffix(strings.TrimSpace(text+empty), thinkStart); open {
			// The template takes no answer after these messages: the block is closed as closeThink does.
			empty += strings.Repeat("\n", 2-min(1, len(text)-len(strings.TrimSuffix(text, "\n")))) + thinkEnd + "\n\n"
			open = false
		}
	}
	switch {
	case open:
		p.thinking = openThinking
	case thinks.thinks && empty == "" && !o.Answer && !strings.HasSuffix(strings.TrimSpace(text), thinkEnd):
		p.thinking = mayThink
	}
	p.Tokens, err = b.joined(text, empty)
	return err
}

// continueMark stands behind the text that is to be continued while it is rendered, as transformers puts one there.
const continueMark = "CONTINUE_FINAL_MESSAGE_TAG "

// continueFinal makes the prompt up to the end of the last message's text, as transformers' continue_final_message does.
func (b *Builder) continueFinal(ctx context.Context, p *ChatPrompt, chat Chat, o ChatOptions) error {
	last := len(chat.Messages) - 1
	final := chat.Messages[last]
	content := final.Content
	final.Content += continueMark
	text, err := b.render(ctx, Chat{Messages: chat.Messages[:last], Tools: chat.Tools}.with(final), false, o.vars())
	if err != nil {
		return err
	}
	at := strings.LastIndex(text, strings.TrimSpace(continueMark))
	if at < 0 || !strings.Contains(text[:at], strings.TrimSpace(content)) {
		return &MessageError{Message: last, Err: errors.New("continue_final_message: the chat template does not write the last message as it is, so it cannot be continued")}
	}
	if !strings.HasPrefix(text[at:], continueMark) {
		// The template trims messages.
		text = strings.TrimRight(text[:at], " \t\r\n\v\f")
	} else {
		text = text[:at]
	}
	switch {
	case strings.LastIndex(content, thinkStart) > strings.LastIndex(content, thinkEnd):
		p.thinking = openThinking
	case strings.TrimSpace(content) == "" && b.thinking().thinks && !o.Answer && !strings.HasSuffix(strings.TrimSpace(text), thinkEnd):
		p.thinking = mayThink
	}
	p.Tokens, err = b.tokenize(text)
	return err
}

// functionName is what OpenAI allows as the name of a function, and dots, which some frameworks send.
var functionName = regexp.MustCompile(`^[a-zA-Z0-9_.-]{1,128}$`)

// parseTools reads OpenAI's array.
func parseTools(text json.RawMessage) ([]tool, error) {
	if len(text) == 0 {
		return nil, nil
	}
	var items []struct {
		Type     string `json:"type"`
		Function struct {
			Name       string          `json:"name"`
			Parameters json.RawMessage `json:"parameters"`
			Strict     bool            `json:"strict"`
		} `json:"function"`
	}
	if err := json.Unmarshal(text, &items); err != nil {
		return nil, fmt.Errorf("tools: expected an array of {\"type\": \"function\", \"function\": {...}}: %w", err)
	}
	var tools []tool
	for i, item := range items {
		if item.Type != "function" {
			return nil, fmt.Errorf("tools[%d].type is %q: only \"function\" is supported", i, item.Type)
		}
		f := item.Function
		if !functionName.MatchString(f.Name) {
			return nil, fmt.Errorf("tools[%d].function.name %q: expected 1 to 128 of a-z, A-Z, 0-9, _, - and .", i, f.Name)
		}
		if slices.ContainsFunc(tools, func(t tool) bool { return t.name == f.Name }) {
			return nil, fmt.Errorf("tools[%d].function.name %q: another tool has this name", i, f.Name)
		}
		if bytes.Equal(f.Parameters, []byte("null")) {
			f.Parameters = nil
		}
		tools = append(tools, tool{f.Name, f.Parameters, f.Strict})
	}
	return tools, nil
}

// completeTools gives functions without a description or parameters empty ones.
func completeTools(tools json.RawMessage) (json.RawMessage, error) {
	list, err := jinja.FromJSON(tools)
	if err != nil {
		return nil, err
	}
	for _, item := range list.AsList().Items {
		if !item.IsDict() {
			return nil, errors.New("a tool is no object")
		}
		function, _ := item.AsDict().Get("function")
		if !function.IsDict() {
			return nil, errors.New("a tool has no function")
		}
		if _, ok := function.AsDict().Get("description"); !ok {
			function.AsDict().Set("description", jinja.NewString(""))
		}
		if _, ok := function.AsDict().Get("parameters"); !ok {
			parameters, err := jinja.FromJSON([]byte(`{"type": "object", "properties": {}}`))
			if err != nil {
				return nil, err
			}
			function.AsDict().Set("parameters", parameters)
		}
	}
	text, err := jinja.ToJSON(list)
	return json.RawMessage(text), err
}

// chooseTool checks the request's tool_choice and fills in its default.
func chooseTool(tools []tool, o ChatOptions) (child.ToolChoice, error) {
	choice := o.ToolChoice
	if choice.Mode == "" {
		choice.Mode = child.ToolAuto
	}
	switch choice.Mode {
	case child.ToolNone, child.ToolAuto:
		return choice, nil
	case child.ToolRequired, child.ToolFunction:
	default:
		return choice, fmt.Errorf("tool_choice %q: expected none, auto, required or a function", choice.Mode)
	}
	switch {
	case len(tools) == 0:
		return choice, errors.New("tool_choice asks for a call, but there are no tools")
	case o.Answer:
		return choice, errors.New("tool_choice asks for a call, and another part of the request constrains the text: only one of the two is possible")
	case choice.Mode == child.ToolFunction && !slices.ContainsFunc(tools, func(t tool) bool { return t.name == choice.Name }):
		return choice, fmt.Errorf("tool_choice names the function %q, which is not among the tools", choice.Name)
	}
	return choice, nil
}

// stateTools returns the conversation as the template can write it, and the form of its calls. Where the template does
// not write something of tools, or calls in a form that no Parser reads, the conversation says it in its messages'
// texts, in Hermes' form; always with force.
func (b *Builder) stateTools(chat Chat, tools []tool, force bool) (Chat, toolForm, error) {
	var calls, results bool
	for i := range chat.Messages {
		m := &chat.Messages[i]
		if len(m.ToolCalls) > 0 && m.Role != "assistant" {
			return chat, 0, &MessageError{Message: i, Err: fmt.Errorf("tool_calls in a message of role %q: only an assistant's has them", m.Role)}
		}
		calls = calls || len(m.ToolCalls) > 0
		results = results || m.Role == "tool"
	}
	if len(tools) == 0 && !calls && !results {
		return Chat{Messages: chat.Messages}, unknownForm, nil
	}
	support := b.tools()
	if !force && (len(tools) == 0 || support.definitions.written && support.form != unknownForm) &&
		(!calls || support.calls.written) && (!results || support.results.written) {
		return chat, support.form, nil
	}

	var messages []wire.Message
	for i := range chat.Messages {
		m := chat.Messages[i]
		switch {
		case len(m.ToolCalls) > 0:
			text, err := hermesCalls(m.ToolCalls)
			if err != nil {
				return chat, 0, &MessageError{Message: i, Err: err}
			}
			if m.Content != "" {
				text = m.Content + "\n" + text
			}
			messages = append(messages, wire.Message{Role: "assistant", Content: text, ReasoningContent: m.ReasoningContent})
		case m.Role == "tool":
			text := "<tool_response>\n" + m.Content + "\n</tool_response>"
			if i > 0 && chat.Messages[i-1].Role == "tool" {
				messages[len(messages)-1].Content += "\n" + text
			} else {
				messages = append(messages, wire.Message{Role: "user", Content: text})
			}
		default:
			messages = append(messages, m)
		}
	}
	if len(tools) == 0 {
		return Chat{Messages: messages}, hermesForm, nil
	}
	statement, err := hermesStatement(chat.Tools)
	if err != nil {
		return chat, 0, &MessageError{Message: -1, Param: "tools", Err: fmt.Errorf("tools: %w", err)}
	}
	first := slices.IndexFunc(messages, func(m wire.Message) bool { return m.Role == "user" })
	switch {
	case messages[0].Role == "system":
		messages[0].Content += "\n\n" + statement
	case b.thinking().systems || first < 0:
		messages = slices.Insert(messages, 0, wire.Message{Role: "system", Content: statement})
	default:
		messages[first].Content = statement + "\n\n" + messages[first].Content
	}
	return Chat{Messages: messages}, hermesForm, nil
}

// hermesCalls writes calls as Hermes' and Qwen's templates do.
func hermesCalls(calls []wire.ToolCall) (string, error) {
	var text []string
	for i, call := range calls {
		arguments, err := argumentsValue(call.Function.Arguments)
		if err != nil {
			return "", fmt.Errorf("tool_calls[%d].function.arguments %w", i, err)
		}
		object, err := jinja.ToJSON(arguments)
		if err != nil {
			return "", fmt.Errorf("tool_calls[%d].function.arguments: %w", i, err)
		}
		name, err := jinja.ToJSON(jinja.NewString(call.Function.Name))
		if err != nil {
			return "", fmt.Errorf("tool_calls[%d].function.name: %w", i, err)
		}
		text = append(text, callStart+"\n{\"name\": "+name+", \"arguments\": "+object+"}\n"+callEnd)
	}
	return strings.Join(text, "\n"), nil
}

// hermesStatement tells the model what tools there are and how they are called.
func hermesStatement(tools json.RawMessage) (string, error) {
	list, err := jinja.FromJSON(tools)
	if err != nil {
		return "", err
	}
	var s strings.Builder
	s.WriteString("You can call functions to answer the user. These are their signatures, within <tools></tools>:\n<tools>\n")
	for _, item := range list.AsList().Items {
		text, err := jinja.ToJSON(item)
		if err != nil {
			return "", err
		}
		s.WriteString(text + "\n")
	}
	s.WriteString("</tools>\n\nTo call a function, answer with a JSON object of its name and arguments within <tool_call></tool_call>:\n" +
		"<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>\n" +
		"Its result comes within <tool_response></tool_response>.")
	return s.String(), nil
}
