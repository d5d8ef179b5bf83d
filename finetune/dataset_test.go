package finetune

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

const row = `{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}`

func TestValidateDataset(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 100<<10)
	for name, test := range map[string]struct {
		file string
		rows int
		want string // "" is valid
	}{
		"plain":             {row + "\n" + row + "\n", 2, ""},
		"no newline at end": {row + "\n" + row, 2, ""},
		"byte order mark":   {"\ufeff" + row + "\n", 1, ""},
		"CRLF":              {row + "\r\n" + row + "\r\n", 2, ""},
		"blank lines":       {"\n" + row + "\n  \n" + row + "\n\n", 2, ""},
		"a long line":       {`{"messages":[{"role":"user","content":"` + long + `"},{"role":"assistant","content":"a"}]}` + "\n" + row, 2, ""},
		"everything": {`{"messages":[{"role":"system","content":"s"},{"role":"user","content":[{"type":"text","text":"q"}]},` +
			`{"role":"assistant","content":"a","weight":0},{"role":"user","content":"题"},{"role":"assistant","content":"答","weight":1}],` +
			`"tools":[],"functions":[],"parallel_tool_calls":false}`, 1, ""},

		"empty":          {"", 0, "no rows; expected at least one line {\"messages\": [...]}"},
		"blank only":     {"\n\r\n", 0, "no rows; expected at least one line {\"messages\": [...]}"},
		"a JSON array":   {"[" + row + "]", 0, `line 1: the file is a JSON array; expected one JSON object {"messages": [...]} a line (JSONL)`},
		"UTF-16":         {"\xff\xfe{\x00", 0, "line 1: the file is UTF-16; save it as UTF-8"},
		"a zip":          {"PK\x03\x04xx", 0, "line 1: the file is a zip archive; save it as UTF-8"},
		"invalid UTF-8":  {row + "\n{\"\xb2\xe2\"}\n", 1, "line 2: not valid UTF-8; save the file as UTF-8"},
		"broken JSON":    {row + "\n\n{\"messages\":[\n", 1, `line 3: not valid JSON at byte 13: unexpected end of JSON input; expected an object {"messages": [...]}`},
		"a number":       {"1", 0, `line 1: a JSON number; expected an object {"messages": [...]}`},
		"two objects":    {row + row, 0, fmt.Sprintf(`line 1: not valid JSON at byte %d: invalid character '{' after top-level value; expected an object {"messages": [...]}`, len(row)+1)},
		"other keys":     {`{"prompt":"q","completion":"a"}`, 0, `line 1: no "messages"; expected an object {"messages": [...]}, this one has the keys "completion", "prompt"`},
		"no keys":        {`{}`, 0, `line 1: no "messages"; expected an object {"messages": [...]}, this one has no keys`},
		"messages empty": {`{"messages":[]}`, 0, "line 1: messages is empty; expected at least a user and an assistant message"},
		"messages text":  {`{"messages":"q"}`, 0, "line 1: messages is a JSON string; expected an array"},
		"message text":   {`{"messages":["q"]}`, 0, `line 1: messages[0]: a JSON string; expected an object {"role": ..., "content": ...}`},
		"role missing":   {`{"messages":[{"content":"q"}]}`, 0, "line 1: messages[0].role is missing; expected system, user or assistant"},
		"role unknown":   {`{"messages":[{"role":"human","content":"q"}]}`, 0, `line 1: messages[0].role is "human"; expected system, user or assistant`},
		"role number":    {`{"messages":[{"role":1,"content":"q"}]}`, 0, "line 1: messages[0]: role is a JSON number; expected a string"},
		"content image": {`{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}`, 0,
			`line 1: messages[0]: content[0]: part of type "image_url" is not supported, only text`},
		"content empty":   {`{"messages":[{"role":"user","content":" "},{"role":"assistant","content":"a"}]}`, 0, "line 1: messages[0].content is empty; expected text"},
		"content missing": {`{"messages":[{"role":"user","content":"q"},{"role":"assistant"}]}`, 0, "line 1: messages[1].content is empty; expected text"},
		"assistant first": {`{"messages":[{"role":"assistant","content":"a"}]}`, 0, "line 1: messages[0].role is assistant; expected system or user as the first message"},
		"system second":   {`{"messages":[{"role":"user","content":"q"},{"role":"system","content":"s"}]}`, 0, "line 1: messages[1].role is system; expected it as the first message only"},
		"user twice":      {`{"messages":[{"role":"user","content":"q"},{"role":"user","content":"q"}]}`, 0, "line 1: messages[1].role is user after user; expected user and assistant to take turns"},
		"no question":     {`{"messages":[{"role":"system","content":"s"},{"role":"assistant","content":"a"}]}`, 0, "line 1: messages[1].role is assistant after system; expected user and assistant to take turns"},
		"tool message":    {`{"messages":[{"role":"user","content":"q"},{"role":"tool","content":"r"}]}`, 0, "line 1: messages[1].role is tool; " + noTools},
		"tool calls": {`{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function",` +
			`"function":{"name":"f","arguments":"{}"}}]},{"role":"tool","content":"r","tool_call_id":"1"},{"role":"assistant","content":"a"}]}`, 0,
			"line 1: messages[1].tool_calls is not empty; training on tools is not available yet: expected a conversation of system, user and assistant messages"},
		"tools":            {`{"messages":[],"tools":[{}]}`, 0, "line 1: tools is not empty; " + noTools},
		"functions":        {`{"messages":[],"functions":[{}]}`, 0, "line 1: functions is not empty; " + noTools},
		"no answer":        {`{"messages":[{"role":"user","content":"q"}]}`, 0, `line 1: the last message has role "user"; expected assistant, whose answer is learnt`},
		"weight of user":   {`{"messages":[{"role":"user","content":"q","weight":1},{"role":"assistant","content":"a"}]}`, 0, "line 1: messages[0].weight is set on a user message; expected it on assistant messages only"},
		"weight half":      {`{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a","weight":0.5}]}`, 0, "line 1: messages[1].weight is 0.5; expected 0 or 1"},
		"weight text":      {`{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a","weight":"1"}]}`, 0, "line 1: messages[1]: weight is a JSON string; expected a number"},
		"nothing to learn": {`{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a","weight":0}]}`, 0, "line 1: every assistant message has weight 0; expected one with weight 1 or none, else there is nothing to learn"},
		"tools an object":  {`{"messages":[],"tools":{}}`, 0, "line 1: tools is a JSON object; expected an array"},
		"too long":         {row + "\n" + strings.Repeat("x", maxLineBytes+1) + "\n" + row + "\n{}", 2, "line 2: longer than 16 MiB\nline 4: no \"messages\"; expected an object {\"messages\": [...]}, this one has no keys"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rows, err := validateDataset(t.Context(), strings.NewReader(test.file))
			got := ""
			if err != nil {
				got = err.Error()
			}
			if diff := cmp.Diff(test.want, got); diff != "" || rows != test.rows {
				t.Errorf("rows %d, want %d; error (-want +got)\n%s", rows, test.rows, diff)
			}
		})
	}
}

func TestValidateDatasetReportsTwenty(t *testing.T) {
	t.Parallel()
	_, err := validateDataset(t.Context(), strings.NewReader(strings.Repeat("{}\n", 30)))
	var lines *datasetError
	if !errors.As(err, &lines) || lines.bad != 30 || len(lines.lines) != 20 || !strings.HasSuffix(err.Error(), "\nand 10 more") {
		t.Errorf("error %v", err)
	}
}

func TestValidateDatasetPassesReadErrors(t *testing.T) {
	t.Parallel()
	broken := errors.New("disk")
	_, err := validateDataset(t.Context(), io.MultiReader(strings.NewReader(row+"\n"), iotest.ErrReader(broken)))
	if !errors.Is(err, broken) {
		t.Errorf("error %v, want the reader's", err)
	}
}

func FuzzValidateDataset(f *testing.F) {
	f.Add([]byte(row + "\r\n{}"))
	f.Add([]byte("\ufeff[" + row))
	f.Add([]byte(`{"messages":[{"role":"tool","content":[{"type":"text"}],"weight":null}]}`))
	f.Fuzz(func(t *testing.T, file []byte) {
		rows, err := validateDataset(t.Context(), bytes.NewReader(file))
		if err == nil && rows == 0 {
			t.Error("a file without rows is valid")
		}
		if err != nil && len(err.Error()) > 64<<10 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
	})
}

// The state machine, as the package comment draws it.
func TestMoves(t *testing.T) {
	t.Parallel()
	states := []Status{ValidatingFiles, Queued, Running, Succeeded, Failed, Cancelled}
	want := map[Status]string{
		ValidatingFiles: "queued failed cancelled",
		Queued:          "running failed cancelled",
		Running:         "running succeeded failed cancelled",
	}
	for _, from := range states {
		var got []string
		for _, to := range states {
			if slices.Contains(moves[from], to) {
				got = append(got, string(to))
			}
		}
		if diff := cmp.Diff(want[from], strings.Join(got, " ")); diff != "" {
			t.Errorf("from %s (-want +got)\n%s", from, diff)
		}
		if from.Final() != (len(got) == 0) {
			t.Errorf("%s: final %v, but it moves to %v", from, from.Final(), got)
		}
	}
}
