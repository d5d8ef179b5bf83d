package finetune

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/hone-llm/hone/internal/wire"
)

const (
	maxLineBytes  = 16 << 20 // of a training file
	maxLineErrors = 20       // reported of one file
)

// datasetError says what is wrong with a file's lines.
type datasetError struct {
	lines []LineProblem // at most maxLineErrors
	bad   int           // lines that are wrong, reported or not
}

func (e *datasetError) Error() string {
	var lines []string
	for _, p := range e.lines {
		lines = append(lines, fmt.Sprintf("line %d: %s", p.Line, p.Message))
	}
	text := strings.Join(lines, "\n")
	if more := e.bad - len(e.lines); more > 0 {
		text += fmt.Sprintf("\nand %d more", more)
	}
	return text
}

func (e *datasetError) add(line int, format string, args ...any) {
	e.bad++
	if len(e.lines) < maxLineErrors {
		e.lines = append(e.lines, LineProblem{line, fmt.Sprintf(format, args...)})
	}
}

// validateDataset reads a whole training file and returns what is in it, also with an error. Every line must be a row that a
// job of this method learns from, all of one kind, and with one of the choices as its last answer if there are any;
// *datasetError lists the lines that are not. A UTF-8 byte order mark, CRLF and blank lines are accepted.
func validateDataset(ctx context.Context, r io.Reader, method string, choices []string) (*FileReport, error) {
	report := &FileReport{Errors: []LineProblem{}, Messages: map[string]int{}}
	problems := &datasetError{}
	err := scanDataset(ctx, r, method, choices, report, problems)
	report.finish()
	report.BadLines, report.Errors = problems.bad, append(report.Errors, problems.lines...)
	switch {
	case err != nil:
	case problems.bad > 0:
		return report, problems
	case report.Rows == 0:
		err = errors.New("no rows; " + expectedRows(method))
	}
	if err != nil {
		report.Problem = err.Error()
	}
	return report, err
}

// scanDataset adds the lines of a file to report, and those that are bad to problems. Its error is of reading.
func scanDataset(ctx context.Context, r io.Reader, method string, choices []string, report *FileReport, problems *datasetError) error {
	first, firstLine := wire.RowKind(""), 0 // kind and line of the first row
	lines := bufio.NewReaderSize(r, 64<<10)
	for number := 1; ; number++ {
		if number%256 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		line, tooLong, err := readLine(lines)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if number == 1 {
			if encoding := foreignEncoding(line); encoding != "" {
				problems.add(1, "the file is %s; save it as UTF-8", encoding)
				break
			}
			line = bytes.TrimPrefix(line, []byte("\ufeff"))
			if bytes.HasPrefix(bytes.TrimSpace(line), []byte("[")) {
				problems.add(1, "the file is a JSON array; expected one JSON object a line (JSONL)")
				break
			}
		}
		line = bytes.TrimSpace(line)
		switch {
		case tooLong:
			problems.add(number, "longer than %d MiB", maxLineBytes>>20)
		case len(line) == 0:
		case !utf8.Valid(line):
			problems.add(number, "not valid UTF-8; save the file as UTF-8")
		default:
			row, kind, err := validateRow(line, method)
			if err == nil {
				err = checkChoice(row, kind, choices)
			}
			if first == "" && kind != "" {
				first, firstLine = kind, number
			}
			switch {
			case err != nil:
				problems.add(number, "%v", err)
			case kind != first:
				problems.add(number, "a row %s, and line %d is a row %s; expected rows of one kind in a file", kind, firstLine, first)
			default:
				report.add(number, line, row, kind)
			}
		}
	}
	return nil
}

// readLine returns the next line without its end, or io.EOF after the last. Of a line that is too long it returns none of
// it, and goes on behind it. The slice is good until the next call.
func readLine(r *bufio.Reader) (line []byte, tooLong bool, err error) {
	piece, err := r.ReadSlice('\n')
	if err == nil || err == io.EOF && len(piece) > 0 {
		return bytes.TrimSuffix(piece, []byte("\n")), false, nil
	}
	if !errors.Is(err, bufio.ErrBufferFull) {
		return nil, false, err
	}
	line = bytes.Clone(piece)
	for errors.Is(err, bufio.ErrBufferFull) {
		piece, err = r.ReadSlice('\n')
		if len(line)+len(piece) > maxLineBytes+1 {
			tooLong, line = true, line[:0]
		}
		if !tooLong {
			line = append(line, piece...)
		}
	}
	if err != nil && err != io.EOF {
		return nil, false, err
	}
	return bytes.TrimSuffix(line, []byte("\n")), tooLong, nil
}

// foreignEncoding names the encoding that the first bytes of a file show, or is "".
func foreignEncoding(line []byte) string {
	switch {
	case bytes.HasPrefix(line, []byte{0xff, 0xfe}), bytes.HasPrefix(line, []byte{0xfe, 0xff}):
		return "UTF-16"
	case bytes.HasPrefix(line, []byte{0x1f, 0x8b}):
		return "compressed with gzip"
	case bytes.HasPrefix(line, []byte("PK\x03\x04")):
		return "a zip archive"
	}
	return ""
}

// trainingRow is one line of a training file, whichever kind of row it is.
type trainingRow struct {
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

// conversation is OpenAI's: of a chat row, and of the input of a DPO row.
type conversation struct {
	Messages          *[]json.RawMessage `json:"messages"`
	Tools             []json.RawMessage  `json:"tools"`
	Functions         []json.RawMessage  `json:"functions"` // OpenAI's older word
	ParallelToolCalls *bool              `json:"parallel_tool_calls"`
}

// expectedRows says what a line of a training file may be.
func expectedRows(method string) string {
	if method == DPO {
		return `expected an object {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]} or {"prompt": ..., "chosen": ..., "rejected": ...}`
	}
	return `expected an object {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}`
}

// validateRow returns the row and the kind of one line, and says what is wrong with it for a job of this method, or nil.
func validateRow(line []byte, method string) (row *trainingRow, kind wire.RowKind, err error) {
	row = &trainingRow{}
	if err := json.Unmarshal(line, row); err != nil {
		return row, "", jsonError(err, expectedRows(method))
	}
	kind, err = row.check(method)
	if kind != "" && kind.Pairs() != (method == DPO) {
		if kind.Pairs() {
			return row, kind, fmt.Errorf("a row %s is of method dpo, and the job is %s; %s", kind, method, expectedRows(method))
		}
		return row, kind, fmt.Errorf("a row %s has no two answers to compare, and the job is dpo; %s", kind, expectedRows(method))
	}
	if kind == "" {
		err = fmt.Errorf("%s; this one has %s", expectedRows(method), keys(line))
	}
	return row, kind, err
}

func present(raw json.RawMessage) bool { return len(raw) > 0 && string(raw) != "null" }
func isList(raw json.RawMessage) bool  { return len(raw) > 0 && raw[0] == '[' }

// check returns the row's kind, and what is wrong with it. It goes from the keys that mean one thing only to those that
// other kinds of rows have beside theirs; keys that no kind has are the author's own. The kind of a row without any is "".
func (r *trainingRow) check(method string) (kind wire.RowKind, err error) {
	switch {
	case r.Input != nil || present(r.Preferred) || present(r.NonPreferred):
		return wire.OutputPairs, r.checkOpenAIPair()
	case present(r.Chosen) || present(r.Rejected):
		return r.checkTRLPair()
	case r.Messages != nil:
		return wire.ChatRows, r.conversation.check()
	case present(r.Completion) || present(r.Prompt) && method == Supervised:
		return r.checkCompletion()
	case present(r.Text):
		return wire.TextRows, checkText("text", r.Text)
	}
	return "", nil
}

func (r *trainingRow) checkOpenAIPair() error {
	switch {
	case r.Input == nil || r.Input.Messages == nil:
		return errors.New(`no "input"; expected {"messages": [...]}, the conversation that both answers follow`)
	case !present(r.Preferred):
		return errors.New(`no "preferred_output"; expected a list with the better answer, an assistant message`)
	case !present(r.NonPreferred):
		return errors.New(`no "non_preferred_output"; expected a list with the other answer, an assistant message`)
	}
	return cmp.Or(
		r.Input.checkAnswer("input.messages", "preferred_output", r.Preferred, true),
		r.Input.checkAnswer("input.messages", "non_preferred_output", r.NonPreferred, true),
	)
}

func (r *trainingRow) checkTRLPair() (kind wire.RowKind, err error) {
	switch {
	case !present(r.Chosen):
		return wire.TextPairs, errors.New(`no "chosen"; expected the better answer`)
	case !present(r.Rejected):
		return wire.TextPairs, errors.New(`no "rejected"; expected the other answer`)
	case !isList(r.Chosen) && !isList(r.Rejected):
		if !present(r.Prompt) {
			return wire.TextPairs, errors.New(`no "prompt"; expected it beside "chosen" and "rejected": what both answers follow`)
		}
		return wire.TextPairs, checkTexts(r.Prompt, []string{"chosen", "rejected"}, r.Chosen, r.Rejected)
	case !isList(r.Prompt):
		return wire.ChatPairs, r.conversation.checkWhole(r.Chosen, r.Rejected)
	}
	c := r.conversation
	if err := json.Unmarshal(r.Prompt, &c.Messages); err != nil {
		return wire.ChatPairs, fmt.Errorf("prompt: %w", jsonError(err, "expected a list of messages"))
	}
	return wire.ChatPairs, cmp.Or(c.checkAnswer("prompt", "chosen", r.Chosen, true), c.checkAnswer("prompt", "rejected", r.Rejected, true))
}

func (r *trainingRow) checkCompletion() (kind wire.RowKind, err error) {
	switch {
	case !present(r.Prompt):
		return wire.CompletionRows, errors.New(`no "prompt"; expected it beside "completion": a text, which may be empty, or messages`)
	case !present(r.Completion):
		return wire.CompletionRows, errors.New(`no "completion"; expected it beside "prompt": a text or messages`)
	case !isList(r.Prompt) && !isList(r.Completion):
		return wire.CompletionRows, checkTexts(r.Prompt, []string{"completion"}, r.Completion)
	}
	c := r.conversation
	if err := json.Unmarshal(r.Prompt, &c.Messages); err != nil {
		return wire.ChatCompletionRows, fmt.Errorf("prompt: %w", jsonError(err, "expected a list of messages, as the completion is one"))
	}
	return wire.ChatCompletionRows, c.checkAnswer("prompt", "completion", r.Completion, false)
}

// checkTexts checks a prompt, which may be empty, and the answers to it, which may not.
func checkTexts(prompt json.RawMessage, names []string, answers ...json.RawMessage) error {
	var text string
	if err := json.Unmarshal(prompt, &text); err != nil {
		return fmt.Errorf("prompt: %w", jsonError(err, "expected a text or a list of messages"))
	}
	for i, answer := range answers {
		if err := checkText(names[i], answer); err != nil {
			return err
		}
	}
	return nil
}

// checkWhole checks two conversations that differ in their last message alone: TRL's pairs without a prompt.
func (c *conversation) checkWhole(chosen, rejected json.RawMessage) error {
	var both [2][]json.RawMessage
	for i, raw := range []json.RawMessage{chosen, rejected} {
		if err := json.Unmarshal(raw, &both[i]); err != nil {
			return fmt.Errorf("%s: %w", [2]string{"chosen", "rejected"}[i], jsonError(err, "expected a list of messages"))
		}
	}
	n := len(both[0]) - 1
	if n < 1 || len(both[1]) != n+1 {
		return errors.New(`no list of messages as "prompt", and "chosen" and "rejected" are no conversations that differ in their last message alone`)
	}
	whole := *c
	before := both[0][:n]
	whole.Messages = &before
	for i, name := range [2]string{"chosen", "rejected"} {
		answer, err := json.Marshal(both[i][n:])
		if err != nil {
			return err
		}
		if err := whole.checkAnswer(name, name, answer, true); err != nil {
			return err
		}
	}
	return nil
}

func checkText(name string, raw json.RawMessage) error {
	var text string
	if err := json.Unmarshal(raw, &text); err != nil {
		return fmt.Errorf("%s: %w", name, jsonError(err, "expected a text"))
	}
	if strings.TrimSpace(text) == "" {
		return fmt.Errorf("%s is empty; expected text", name)
	}
	return nil
}

// check checks a conversation to learn from.
func (c *conversation) check() error {
	if err := c.checkTools(); err != nil {
		return err
	}
	if len(*c.Messages) == 0 {
		return errors.New("messages is empty; expected at least a user and an assistant message")
	}
	check := messageCheck{weights: true}
	if err := check.all("messages", *c.Messages); err != nil {
		return err
	}
	if check.previous.Role != "assistant" {
		return fmt.Errorf("the last message has role %q; expected assistant, whose answer is learnt", check.previous.Role)
	}
	if !check.trained {
		return errors.New("every assistant message has weight 0; expected one with weight 1 or none, else there is nothing to learn")
	}
	return nil
}

// checkAnswer checks messages that are an answer to the conversation, whose own messages are called prompt: one message, or,
// unless single, as many as it takes.
func (c *conversation) checkAnswer(prompt, name string, raw json.RawMessage, single bool) error {
	if err := c.checkTools(); err != nil {
		return err
	}
	var check messageCheck
	if err := check.all(prompt, *c.Messages); err != nil {
		return err
	}
	switch check.previous.Role {
	case "user", "tool":
	case "":
		return fmt.Errorf("%s is empty; expected at least a user message", prompt)
	default:
		return fmt.Errorf("the last message of %s has role %q; expected user, whom the answer follows", prompt, check.previous.Role)
	}
	var answer []json.RawMessage
	if err := json.Unmarshal(raw, &answer); err != nil {
		return fmt.Errorf("%s: %w", name, jsonError(err, "expected a list of messages"))
	}
	if len(answer) == 0 || single && len(answer) > 1 {
		return fmt.Errorf("%s has %d messages; expected one assistant message", name, len(answer))
	}
	if err := check.all(name, answer); err != nil {
		return err
	}
	if check.previous.Role != "assistant" {
		return fmt.Errorf("the last message of %s has role %q; expected assistant, whose answer is learnt", name, check.previous.Role)
	}
	return nil
}

func (c *conversation) checkTools() error {
	if len(c.Functions) > 0 {
		return errors.New("functions is not empty; say tools, which OpenAI replaced it by")
	}
	for i, raw := range c.Tools {
		var tool struct {
			Type     string `json:"type"`
			Function *struct {
				Name string `json:"name"`
			} `json:"function"`
		}
		if err := json.Unmarshal(raw, &tool); err != nil {
			return fmt.Errorf("tools[%d]: %w", i, jsonError(err, `expected an object {"type": "function", "function": {...}}`))
		}
		if tool.Type != "function" || tool.Function == nil || tool.Function.Name == "" {
			return fmt.Errorf(`tools[%d]: expected {"type": "function", "function": {"name": ...}}`, i)
		}
	}
	return nil
}

// messageCheck goes through the messages of a row in order.
type messageCheck struct {
	weights  bool         // assistant messages may have one
	previous wire.Message // role "" at the beginning
	calls    []string     // ids of the tool calls that wait for their results
	trained  bool
}

// all checks messages that are called name in errors.
func (c *messageCheck) all(name string, messages []json.RawMessage) error {
	for i, raw := range messages {
		var m wire.Message
		if err := json.Unmarshal(raw, &m); err != nil {
			return fmt.Errorf("%s[%d]: %w", name, i, jsonError(err, `expected an object {"role": ..., "content": ...}`))
		}
		if bytes.Contains(raw, []byte(`"function_call"`)) { // OpenAI's older word, which would be left out of account
			var old struct {
				FunctionCall json.RawMessage `json:"function_call"`
			}
			if json.Unmarshal(raw, &old) == nil && len(old.FunctionCall) > 0 && string(old.FunctionCall) != "null" {
				return fmt.Errorf("%s[%d].function_call: say tool_calls, which OpenAI replaced it by", name, i)
			}
		}
		if err := c.next(&m); err != nil {
			return fmt.Errorf("%s[%d]%w", name, i, err)
		}
	}
	return nil
}

// follows lists, for each role, what may come before it; "" is the beginning.
var follows = map[string][]string{
	"system":    {""},
	"developer": {""},
	"user":      {"", "system", "developer", "assistant"},
	"assistant": {"user", "tool"},
	"tool":      {"assistant", "tool"},
}

// next checks the message that comes after those before. Its errors begin with the field.
func (c *messageCheck) next(m *wire.Message) error {
	previous := c.previous
	allowed, known := follows[m.Role]
	switch {
	case m.Role == "":
		return errors.New(".role is missing; expected system, user, assistant or tool")
	case m.Role == "function":
		return errors.New(".role is function; say tool, which OpenAI replaced it by")
	case !known:
		return fmt.Errorf(".role is %.60q; expected system, user, assistant or tool", m.Role)
	case m.Role == "tool" && (previous.Role == "assistant" && len(previous.ToolCalls) == 0 || !slices.Contains(allowed, previous.Role)):
		return errors.New(".role is tool; expected it after an assistant message with tool_calls")
	case slices.Contains(allowed, previous.Role):
	case m.Role == "system" || m.Role == "developer":
		return fmt.Errorf(".role is %s; expected it as the first message only", m.Role)
	case previous.Role == "":
		return fmt.Errorf(".role is %s; expected system or user as the first message", m.Role)
	case previous.Role == "tool":
		return fmt.Errorf(".role is %s after tool; expected the assistant to go on", m.Role)
	default:
		return fmt.Errorf(".role is %s after %s; expected user and assistant to take turns", m.Role, previous.Role)
	}
	if m.Role != "tool" && previous.Role == "assistant" && len(previous.ToolCalls) > 0 {
		return fmt.Errorf(".role is %s after tool_calls; expected a tool message with the result of each", m.Role)
	}
	if err := c.tools(m); err != nil {
		return err
	}
	if strings.TrimSpace(m.Content) == "" && len(m.ToolCalls) == 0 && m.Role != "tool" { // a tool may have nothing to say
		return errors.New(".content is empty; expected text")
	}
	if m.Weight != nil {
		switch {
		case m.Role != "assistant":
			return fmt.Errorf(".weight is set on a %s message; expected it on assistant messages only", m.Role)
		case !c.weights:
			return errors.New(`.weight is set; expected it in rows {"messages": [...]} only: here the answer is learnt and nothing else`)
		case *m.Weight != 0 && *m.Weight != 1:
			return fmt.Errorf(".weight is %v; expected 0 or 1", *m.Weight)
		}
	}
	if m.Role == "assistant" && (m.Weight == nil || *m.Weight == 1) {
		c.trained = true
	}
	c.previous = *m
	return nil
}

// tools checks calls and their results.
func (c *messageCheck) tools(m *wire.Message) error {
	if len(m.ToolCalls) > 0 && m.Role != "assistant" {
		return fmt.Errorf(".tool_calls is set on a %s message; expected it on assistant messages only", m.Role)
	}
	if m.Role == "assistant" {
		c.calls = nil
	}
	for i, call := range m.ToolCalls {
		var arguments map[string]json.RawMessage
		switch {
		case call.Type != "" && call.Type != "function":
			return fmt.Errorf(".tool_calls[%d].type is %.60q; expected function", i, call.Type)
		case call.Function.Name == "":
			return fmt.Errorf(".tool_calls[%d].function.name is missing", i)
		case json.Unmarshal([]byte(call.Function.Arguments), &arguments) != nil || arguments == nil:
			return fmt.Errorf(`.tool_calls[%d].function.arguments is %.60q; expected the text of a JSON object, such as "{}"`, i, call.Function.Arguments)
		}
		if call.ID != "" {
			c.calls = append(c.calls, call.ID)
		}
	}
	if m.Role == "tool" && m.ToolCallID != "" && len(c.calls) > 0 && !slices.Contains(c.calls, m.ToolCallID) {
		return fmt.Errorf(".tool_call_id is %.60q; expected that of a call before: %s", m.ToolCallID, strings.Join(c.calls, ", "))
	}
	return nil
}

// jsonError words an error of encoding/json for the author of a file.
func jsonError(err error, expected string) error {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		return fmt.Errorf("not valid JSON at byte %d: %s; %s", syntax.Offset, syntax.Error(), expected)
	case errors.As(err, &kind) && kind.Field != "":
		return fmt.Errorf("%s is a JSON %s; expected %s", fieldPath(kind.Field), kind.Value, kindName(kind.Type.Kind().String()))
	case errors.As(err, &kind):
		return fmt.Errorf("a JSON %s; %s", kind.Value, expected)
	}
	return err
}

// fieldPath leaves out the names of our own embedded types, which are not the author's concern.
func fieldPath(field string) string {
	return strings.TrimPrefix(strings.TrimPrefix(field, "plain."), "conversation.")
}

func kindName(kind string) string {
	switch kind {
	case "slice":
		return "an array"
	case "struct", "map":
		return "an object"
	case "ptr", "float64", "int":
		return "a number"
	case "bool":
		return "true or false"
	}
	return "a " + kind
}

// keys lists the keys of a JSON object for an error message.
func keys(object []byte) string {
	var m map[string]json.RawMessage
	if json.Unmarshal(object, &m) != nil || len(m) == 0 {
		return "no keys"
	}
	var names []string
	for name := range m {
		names = append(names, fmt.Sprintf("%.40q", name))
	}
	if len(names) > 5 {
		return fmt.Sprintf("%d other keys", len(names))
	}
	if len(names) == 1 {
		return "the key " + names[0]
	}
	slices.Sort(names)
	return "the keys " + strings.Join(names, ", ")
}
