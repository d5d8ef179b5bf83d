package dataset

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/hone-llm/hone/internal/prompt"
	"github.com/hone-llm/hone/internal/wire"
)

// conversation is the part of a row that holds messages, and the part that a prompt of messages has beside it.
type conversation struct {
	Messages          json.RawMessage `json:"messages"`
	Tools             json.RawMessage `json:"tools"`
	Functions         json.RawMessage `json:"functions"`           // OpenAI's older word for tools
	ParallelToolCalls json.RawMessage `json:"parallel_tool_calls"` // says how the API answers; no template writes it
}

// row is a line of any kind. Keys that are not here are the author's own and ignored.
type row struct {
	conversation
	Prompt       json.RawMessage `json:"prompt"`
	Completion   json.RawMessage `json:"completion"`
	Text         json.RawMessage `json:"text"`
	Chosen       json.RawMessage `json:"chosen"`
	Rejected     json.RawMessage `json:"rejected"`
	Input        *conversation   `json:"input"`
	Preferred    json.RawMessage `json:"preferred_output"`
	NonPreferred json.RawMessage `json:"non_preferred_output"`
}

func present(raw json.RawMessage) bool { return len(raw) > 0 && string(raw) != "null" }
func isList(raw json.RawMessage) bool  { return len(raw) > 0 && raw[0] == '[' }

// kind goes from the keys that mean one thing only to those that other kinds of rows have beside theirs.
func (r *row) kind() wire.RowKind {
	switch {
	case r.Input != nil || present(r.Preferred) || present(r.NonPreferred):
		return wire.OutputPairs
	case present(r.Chosen) || present(r.Rejected):
		if isList(r.Chosen) || isList(r.Rejected) {
			return wire.ChatPairs
		}
		return wire.TextPairs
	case present(r.Messages):
		return wire.ChatRows
	case present(r.Completion):
		if isList(r.Prompt) || isList(r.Completion) {
			return wire.ChatCompletionRows
		}
		return wire.CompletionRows
	case present(r.Text):
		return wire.TextRows
	}
	return ""
}

// parsed is a line's examples, not yet fitted to the maximum length, and what is remembered of it.
type parsed struct {
	kind     wire.RowKind
	examples []Example
	system   string // the system message that it begins with
	answer   string // its last answer, if answered
	answered bool
}

// parse makes examples of a line that is not empty. Its errors are those of the line, or ctx's.
func (o Options) parse(ctx context.Context, b *prompt.Builder, line []byte) (parsed, error) {
	var p parsed
	if !utf8.Valid(line) {
		return p, errors.New("not valid UTF-8; save the file as UTF-8")
	}
	if line[0] == '[' {
		return p, errors.New("a JSON array; expected one JSON object a line (JSONL)")
	}
	var r row
	if err := json.Unmarshal(line, &r); err != nil {
		return p, fmt.Errorf("not a JSON object with the fields of a row: %w", err)
	}
	p.kind = r.kind()
	switch {
	case p.kind == "":
		return p, fmt.Errorf("expected one of %v, %v, %v, or rows with two answers, %v or %v", wire.ChatRows, wire.CompletionRows, wire.TextRows, wire.OutputPairs, wire.TextPairs)
	case o.DPO && !p.kind.Pairs():
		return p, fmt.Errorf("a %v row has one answer; a preference job (DPO) expects %v or %v", p.kind, wire.OutputPairs, wire.TextPairs)
	case !o.DPO && p.kind.Pairs():
		return p, fmt.Errorf("a %v row has two answers, for a job whose method is dpo; supervised tuning expects %v, %v or %v", p.kind, wire.ChatRows, wire.CompletionRows, wire.TextRows)
	case len(o.Choices) > 0 && p.kind == wire.TextRows:
		return p, fmt.Errorf("a %v row has no answer that could be one of the choices; expected %v or %v", wire.TextRows, wire.ChatRows, wire.CompletionRows)
	}
	var err error
	switch p.kind {
	case wire.ChatRows:
		err = o.parseChat(ctx, b, &p, r.conversation, nil)
	case wire.ChatCompletionRows:
		completion, parseErr := messages("completion", r.Completion)
		if parseErr == nil && len(completion) == 0 {
			parseErr = errors.New("completion: expected at least one message")
		}
		if parseErr != nil {
			return p, parseErr
		}
		c := r.conversation
		c.Messages = r.Prompt
		err = o.parseChat(ctx, b, &p, c, completion)
	case wire.CompletionRows:
		err = o.parseCompletion(b, &p, r)
	case wire.TextRows:
		var text string
		if text, err = texts("text", r.Text); err == nil && text == "" {
			err = errors.New("text is empty")
		}
		if err == nil {
			var row prompt.Row
			row, err = b.PlainText(text)
			p.examples = []Example{{Candidates: []prompt.Row{row}, Tokens: len(row.Tokens)}}
		}
	case wire.OutputPairs, wire.ChatPairs:
		err = o.parsePair(ctx, b, &p, r)
	case wire.TextPairs:
		var before, chosen, rejected string
		var rows []prompt.Row
		before, err = texts("prompt", r.Prompt)
		if err == nil {
			chosen, err = texts("chosen", r.Chosen)
		}
		if err == nil {
			rejected, err = texts("rejected", r.Rejected)
		}
		if err == nil {
			rows, err = b.Completions(before, chosen, rejected)
		}
		p.pair(rows)
	}
	if errors.Is(err, prompt.ErrNoTemplate) {
		err = fmt.Errorf("the model has no chat template, which %v rows need: write %v rows, or put the model's chat_template.jinja into its directory", p.kind, wire.CompletionRows)
	}
	for _, e := range p.examples {
		for _, c := range e.Candidates {
			if lastTarget(c) == 0 {
				return p, errors.New("a single token, which nothing comes before to predict it from")
			}
		}
	}
	return p, err
}

// parseChat makes examples of a conversation. With a completion, only that is trained.
func (o Options) parseChat(ctx context.Context, b *prompt.Builder, p *parsed, c conversation, completion []wire.Message) error {
	field := "messages"
	if completion != nil {
		field = "prompt"
	}
	chat, err := c.chat(field)
	if err != nil {
		return err
	}
	if len(chat.Messages) == 0 {
		return fmt.Errorf("%s: expected at least one message", field)
	}
	if first := chat.Messages[0]; first.Role == "system" {
		p.system = first.Content
	}
	if completion != nil {
		untrained := 0.0
		for i := range chat.Messages {
			chat.Messages[i].Weight = &untrained
		}
		chat.Messages = append(chat.Messages, completion...)
	}
	last := chat.Messages[len(chat.Messages)-1]
	if p.answered = len(last.ToolCalls) == 0; p.answered {
		p.answer = last.Content
	}
	if len(o.Choices) > 0 {
		switch {
		case last.Role != "assistant":
			return fmt.Errorf("the last message has role %q; expected the assistant's, one of the choices", last.Role)
		case last.Weight != nil && *last.Weight == 0:
			return errors.New("the last message has weight 0; expected an answer to learn, one of the choices")
		}
		before := prompt.Chat{Messages: chat.Messages[:len(chat.Messages)-1], Tools: chat.Tools}
		return o.choose(p, last.Content, func() ([]prompt.Row, error) { return b.Choices(ctx, before, o.Choices) })
	}
	rows, err := b.Rows(ctx, chat)
	for _, row := range rows {
		p.examples = append(p.examples, Example{Candidates: []prompt.Row{row}, Tokens: len(row.Tokens)})
	}
	return err
}

func (o Options) parseCompletion(b *prompt.Builder, p *parsed, r row) error {
	before, err := texts("prompt", r.Prompt)
	if err != nil {
		return err
	}
	completion, err := texts("completion", r.Completion)
	if err != nil {
		return err
	}
	p.answer, p.answered = completion, true
	if len(o.Choices) > 0 {
		lead := completion[:len(completion)-len(strings.TrimLeft(completion, " \t\r\n"))]
		return o.choose(p, completion, func() ([]prompt.Row, error) { return b.CompletionChoices(before, lead, o.Choices) })
	}
	if before == "" && completion == "" {
		return errors.New("prompt and completion are both empty")
	}
	rows, err := b.Completions(before, completion)
	if err == nil {
		p.examples = []Example{{Candidates: rows, Tokens: len(rows[0].Tokens)}}
	}
	return err
}

// choose makes the example of a row whose answer is one of the choices.
func (o Options) choose(p *parsed, answer string, candidates func() ([]prompt.Row, error)) error {
	p.answer = strings.TrimSpace(answer)
	right := slices.Index(o.Choices, p.answer)
	if right < 0 {
		return fmt.Errorf("the answer is %.80q; expected one of the choices %q", p.answer, o.Choices)
	}
	rows, err := candidates()
	if err != nil {
		return err
	}
	p.examples = []Example{{Candidates: rows, Right: right, Tokens: len(rows[right].Tokens)}}
	return nil
}

// parsePair makes an example of two answers to a conversation.
func (o Options) parsePair(ctx context.Context, b *prompt.Builder, p *parsed, r row) error {
	c, field, names := r.conversation, "prompt", [2]string{"chosen", "rejected"}
	outputs := [2]json.RawMessage{r.Chosen, r.Rejected}
	if p.kind == wire.OutputPairs {
		if r.Input == nil {
			return errors.New(`no "input"; expected ` + string(wire.OutputPairs))
		}
		c, field = *r.Input, "input.messages"
		names, outputs = [2]string{"preferred_output", "non_preferred_output"}, [2]json.RawMessage{r.Preferred, r.NonPreferred}
	} else if c.Messages = r.Prompt; !isList(c.Messages) {
		c.Messages = nil // then both answers begin with the prompt's messages
	}
	chat, err := c.chat(field)
	if err != nil {
		return err
	}
	var answers [2][]wire.Message
	for i, name := range names {
		if answers[i], err = messages(name, outputs[i]); err != nil {
			return err
		}
		if len(answers[i]) == 0 {
			return fmt.Errorf("%s: expected an assistant message", name)
		}
	}
	if c.Messages == nil {
		n := len(answers[0]) - 1
		if len(answers[1]) != n+1 || !slices.EqualFunc(answers[0][:n], answers[1][:n], sameMessage) {
			return errors.New("chosen and rejected have no prompt beside them, and do not differ in their last message alone")
		}
		chat.Messages, answers[0], answers[1] = answers[0][:n:n], answers[0][n:], answers[1][n:]
	}
	for i, name := range names {
		if len(answers[i]) != 1 || answers[i][0].Role != "assistant" {
			return fmt.Errorf("%s: expected exactly one message, the assistant's; it has %d, the last of role %q", name, len(answers[i]), answers[i][len(answers[i])-1].Role)
		}
	}
	if len(chat.Messages) == 0 {
		return fmt.Errorf("%s: expected at least one message", field)
	}
	if first := chat.Messages[0]; first.Role == "system" {
		p.system = first.Content
	}
	rows, err := b.Answers(ctx, chat, answers[0][0], answers[1][0])
	p.pair(rows)
	return err
}

func sameMessage(a, b wire.Message) bool {
	return a.Role == b.Role && a.Content == b.Content && a.Name == b.Name && a.ToolCallID == b.ToolCallID && slices.Equal(a.ToolCalls, b.ToolCalls)
}

func (p *parsed) pair(rows []prompt.Row) {
	if len(rows) == 2 {
		p.examples = []Example{{Candidates: rows, Tokens: len(rows[0].Tokens) + len(rows[1].Tokens)}}
	}
}

// chat reads the messages, in the given field, and the tools beside them.
func (c conversation) chat(field string) (prompt.Chat, error) {
	var chat prompt.Chat
	var err error
	if c.Messages != nil {
		if chat.Messages, err = messages(field, c.Messages); err != nil {
			return chat, err
		}
	}
	if present(c.Functions) && string(c.Functions) != "[]" {
		return chat, errors.New(`functions: expected "tools", a list of {"type": "function", "function": ...}`)
	}
	if present(c.ParallelToolCalls) {
		var parallel bool
		if json.Unmarshal(c.ParallelToolCalls, &parallel) != nil {
			return chat, fmt.Errorf("parallel_tool_calls is %.20s; expected true or false", c.ParallelToolCalls)
		}
	}
	if present(c.Tools) {
		if !isList(c.Tools) {
			return chat, errors.New(`tools: expected a list of {"type": "function", "function": ...}`)
		}
		chat.Tools = c.Tools
	}
	return chat, nil
}

// messages reads a list of messages. OpenAI's newer word developer is system to every template.
func messages(field string, raw json.RawMessage) ([]wire.Message, error) {
	if !isList(raw) {
		return nil, fmt.Errorf("%s is %s; expected a list of messages", field, kind(raw))
	}
	var list []wire.Message
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	for i := range list {
		if list[i].Role == "developer" {
			list[i].Role = "system"
		}
		list[i].ReasoningContent = "" // a key of the author's own; what is trained stands in the content
		if list[i].Role == "" {
			return nil, fmt.Errorf("%s[%d]: expected a role and a content", field, i)
		}
		if w := list[i].Weight; w != nil && *w != 0 && *w != 1 {
			return nil, fmt.Errorf("%s[%d].weight is %v; expected 0 or 1", field, i, *w)
		}
	}
	return list, nil
}

func texts(field string, raw json.RawMessage) (string, error) {
	var text string
	if !present(raw) || json.Unmarshal(raw, &text) != nil {
		return "", fmt.Errorf("%s is %s; expected a text", field, kind(raw))
	}
	return text, nil
}

// kind names what a JSON value is, for an error message.
func kind(raw json.RawMessage) string {
	switch {
	case len(raw) == 0:
		return "missing"
	case raw[0] == '[':
		return "a list"
	case raw[0] == '{':
		return "an object"
	case raw[0] == '"':
		return "a text"
	}
	return fmt.Sprintf("%.20s", raw)
}

// fate is what MaxLength does to an example.
type fate int

const (
	kept fate = iota
	truncated
	dropped
)

// fit applies MaxLength and TrainOnAll.
func (o Options) fit(e *Example, b *prompt.Builder) fate {
	fate := kept
	longest := 0
	for _, c := range e.Candidates {
		longest = max(longest, len(c.Tokens))
	}
	if cut := longest - o.MaxLength; o.MaxLength > 0 && cut > 0 {
		if !o.Truncate {
			return dropped
		}
		// Every candidate loses the same tokens: they stand in the common prompt. One is left to predict the answer from.
		keep := 0
		first := e.Candidates[0].Tokens[0]
		if bos, ok := b.BOS(); ok && first == bos {
			keep = 1
		}
		for _, c := range e.Candidates {
			if cut > answerStart(c)-max(keep, 1) {
				return dropped
			}
		}
		for i, c := range e.Candidates {
			e.Candidates[i] = cutLeft(c, keep, cut)
			if len(e.Candidates) == 2 && len(o.Choices) == 0 || i == e.Right {
				e.Tokens -= cut
			}
		}
		fate = truncated
	}
	if o.TrainOnAll {
		for _, c := range e.Candidates {
			for i := 1; i < len(c.Weights); i++ {
				c.Weights[i] = 1
			}
		}
	}
	return fate
}

// answerStart is where the last run of trained tokens begins.
func answerStart(r prompt.Row) int {
	i := len(r.Weights)
	for i > 0 && r.Weights[i-1] == 0 {
		i--
	}
	for i > 0 && r.Weights[i-1] != 0 {
		i--
	}
	return i
}

// cutLeft removes cut tokens after the first keep. What is left of an answer that it cuts is not trained: nothing tells
// how it began.
func cutLeft(r prompt.Row, keep, cut int) prompt.Row {
	begin := keep + cut
	if r.Weights[begin-1] != 0 {
		for i := begin; i < len(r.Weights) && r.Weights[i] != 0; i++ {
			r.Weights[i] = 0
		}
	}
	return prompt.Row{Tokens: slices.Concat(r.Tokens[:keep], r.Tokens[keep+cut:]), Weights: slices.Concat(r.Weights[:keep], r.Weights[keep+cut:])}
}
