package finetune

import (
	"bufio"
	"bytes"
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
	lines []string // "line 3: ...", at most maxLineErrors
	bad   int      // lines that are wrong, reported or not
}

func (e *datasetError) Error() string {
	text := strings.Join(e.lines, "\n")
	if more := e.bad - len(e.lines); more > 0 {
		text += fmt.Sprintf("\nand %d more", more)
	}
	return text
}

func (e *datasetError) add(line int, format string, args ...any) {
	e.bad++
	if len(e.lines) < maxLineErrors {
		e.lines = append(e.lines, fmt.Sprintf("line %d: ", line)+fmt.Sprintf(format, args...))
	}
}

// validateDataset reads a whole training file and returns how many rows it has. Every line must be a conversation to learn
// from; *datasetError lists the lines that are not. A UTF-8 byte order mark, CRLF and blank lines are accepted.
func validateDataset(ctx context.Context, r io.Reader) (rows int, err error) {
	problems := &datasetError{}
	lines := bufio.NewReaderSize(r, 64<<10)
	for number := 1; ; number++ {
		if number%256 == 0 && ctx.Err() != nil {
			return rows, context.Cause(ctx)
		}
		line, tooLong, err := readLine(lines)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return rows, err
		}
		if number == 1 {
			if encoding := foreignEncoding(line); encoding != "" {
				problems.add(1, "the file is %s; save it as UTF-8", encoding)
				break
			}
			line = bytes.TrimPrefix(line, []byte("\ufeff"))
			if bytes.HasPrefix(bytes.TrimSpace(line), []byte("[")) {
				problems.add(1, "the file is a JSON array; expected one JSON object {\"messages\": [...]} a line (JSONL)")
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
			if err := validateRow(line); err != nil {
				problems.add(number, "%v", err)
			} else {
				rows++
			}
		}
	}
	if problems.bad > 0 {
		return rows, problems
	}
	if rows == 0 {
		return 0, errors.New("no rows; expected at least one line {\"messages\": [...]}")
	}
	return rows, nil
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

// validateRow says what is wrong with one line, or nil.
func validateRow(line []byte) error {
	var row struct {
		Messages          *[]json.RawMessage `json:"messages"`
		Tools             []json.RawMessage  `json:"tools"`
		Functions         []json.RawMessage  `json:"functions"` // OpenAI's older word
		ParallelToolCalls *bool              `json:"parallel_tool_calls"`
	}
	if err := json.Unmarshal(line, &row); err != nil {
		return jsonError(err, `expected an object {"messages": [...]}`)
	}
	if row.Messages == nil {
		return fmt.Errorf(`no "messages"; expected an object {"messages": [...]}, this one has %s`, keys(line))
	}
	if len(row.Tools) > 0 {
		return fmt.Errorf("tools is not empty; %s", noTools)
	}
	if len(row.Functions) > 0 {
		return fmt.Errorf("functions is not empty; %s", noTools)
	}
	if len(*row.Messages) == 0 {
		return errors.New("messages is empty; expected at least a user and an assistant message")
	}
	previous, trained := "", false
	for i, raw := range *row.Messages {
		var m wire.Message
		if err := json.Unmarshal(raw, &m); err != nil {
			return fmt.Errorf("messages[%d]: %w", i, jsonError(err, `expected an object {"role": ..., "content": ...}`))
		}
		if err := validateMessage(&m, i, previous); err != nil {
			return fmt.Errorf("messages[%d]%w", i, err)
		}
		if m.Role == "assistant" && (m.Weight == nil || *m.Weight == 1) {
			trained = true
		}
		previous = m.Role
	}
	if previous != "assistant" {
		return fmt.Errorf("the last message has role %q; expected assistant, whose answer is learnt", previous)
	}
	if !trained {
		return errors.New("every assistant message has weight 0; expected one with weight 1 or none, else there is nothing to learn")
	}
	return nil
}

// noTools ends the refusal of a row that would be learnt without what its tools said and did.
const noTools = "training on tools is not available yet: expected a conversation of system, user and assistant messages"

// follows lists, for each role, what may come before it; "" is the beginning.
var follows = map[string][]string{
	"system":    {""},
	"developer": {""},
	"user":      {"", "system", "developer", "assistant"},
	"assistant": {"user"},
}

// validateMessage checks message i, which comes after a message of role previous. Its errors begin with the field.
func validateMessage(m *wire.Message, i int, previous string) error {
	switch {
	case m.Role == "tool" || m.Role == "function":
		return fmt.Errorf(".role is %s; %s", m.Role, noTools)
	case len(m.ToolCalls) > 0:
		return fmt.Errorf(".tool_calls is not empty; %s", noTools)
	}
	allowed, known := follows[m.Role]
	if !known {
		if m.Role == "" {
			return errors.New(".role is missing; expected system, user or assistant")
		}
		return fmt.Errorf(".role is %q; expected system, user or assistant", m.Role)
	}
	if !slices.Contains(allowed, previous) {
		switch {
		case m.Role == "system" || m.Role == "developer":
			return fmt.Errorf(".role is %s; expected it as the first message only", m.Role)
		case i == 0:
			return fmt.Errorf(".role is %s; expected system or user as the first message", m.Role)
		default:
			return fmt.Errorf(".role is %s after %s; expected user and assistant to take turns", m.Role, previous)
		}
	}
	if strings.TrimSpace(m.Content) == "" {
		return errors.New(".content is empty; expected text")
	}
	if m.Weight != nil {
		if m.Role != "assistant" {
			return fmt.Errorf(".weight is set on a %s message; expected it on assistant messages only", m.Role)
		}
		if *m.Weight != 0 && *m.Weight != 1 {
			return fmt.Errorf(".weight is %v; expected 0 or 1", *m.Weight)
		}
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
		// wire.Message decodes into a type of its own, whose name is not the author's concern.
		return fmt.Errorf("%s is a JSON %s; expected %s", strings.TrimPrefix(kind.Field, "plain."), kind.Value, kindName(kind.Type.Kind().String()))
	case errors.As(err, &kind):
		return fmt.Errorf("a JSON %s; %s", kind.Value, expected)
	}
	return err
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
