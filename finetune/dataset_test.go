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

// sft is what a line of a supervised job may be.
const sft = `expected an object {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}`

const row = `{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}`

// Rows with tools, and the two kinds of pairs.
const (
	tools = `{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function",` +
		`"function":{"name":"f","arguments":"{}"}}]},{"role":"tool","content":"","tool_call_id":"c1"},{"role":"assistant","content":"a"}],` +
		`"tools":[{"type":"function","function":{"name":"f","parameters":{}}}],"parallel_tool_calls":true}`
	pair   = `{"prompt":"q","chosen":"a","rejected":"b"}`
	openAI = `{"input":{"messages":[{"role":"user","content":"q"}],"tools":[],"parallel_tool_calls":true},` +
		`"preferred_output":[{"role":"assistant","content":"a"}],"non_preferred_output":[{"role":"assistant","content":"b"}]}`
)

func TestValidatePairs(t *testing.T) {
	t.Parallel()
	chat := `{"prompt":[{"role":"user","content":"q"}],"chosen":[{"role":"assistant","content":"a"}],"rejected":[{"role":"assistant","content":"b"}]}`
	whole := `{"chosen":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}],"rejected":[{"role":"user","content":"q"},{"role":"assistant","content":"b"}]}`
	dpo := expectedRows(DPO)
	for name, test := range map[string]struct {
		file string
		rows int
		want string
	}{
		"TRL":              {pair, 1, ""},
		"TRL's chat":       {chat, 1, ""},
		"TRL's whole":      {whole + "\n" + `{"prompt":"q","messages":[],` + whole[1:], 2, ""},
		"whole differ":     {strings.Replace(whole, `{"role":"user","content":"q"},`, "", 1), 0, `line 1: no list of messages as "prompt", and "chosen" and "rejected" are no conversations that differ in their last message alone`},
		"OpenAI":           {openAI + "\n" + openAI, 2, ""},
		"empty":            {"", 0, "no rows; " + dpo},
		"no pair":          {row, 0, `line 1: a row {"messages": [...]} has no two answers to compare, and the job is dpo; ` + dpo},
		"no keys":          {`{}`, 0, "line 1: " + dpo + "; this one has no keys"},
		"mixed":            {openAI + "\n" + pair, 1, `line 2: a row {"prompt": "...", "chosen": "...", "rejected": "..."}, and line 1 is a row {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}; expected rows of one kind in a file`},
		"prompt alone":     {`{"prompt":"q"}`, 0, "line 1: " + dpo + `; this one has the key "prompt"`},
		"no prompt":        {`{"chosen":"a","rejected":"b"}`, 0, `line 1: no "prompt"; expected it beside "chosen" and "rejected": what both answers follow`},
		"no chosen":        {`{"prompt":"q","rejected":"b"}`, 0, `line 1: no "chosen"; expected the better answer`},
		"no rejected":      {`{"prompt":"q","chosen":"b"}`, 0, `line 1: no "rejected"; expected the other answer`},
		"no input":         {`{"preferred_output":[],"non_preferred_output":[]}`, 0, `line 1: no "input"; expected {"messages": [...]}, the conversation that both answers follow`},
		"no preferred":     {`{"input":{"messages":[]}}`, 0, `line 1: no "preferred_output"; expected a list with the better answer, an assistant message`},
		"no non-preferred": {`{"input":{"messages":[]},"preferred_output":[]}`, 0, `line 1: no "non_preferred_output"; expected a list with the other answer, an assistant message`},
		"input empty":      {strings.Replace(openAI, `{"role":"user","content":"q"}`, "", 1), 0, "line 1: input.messages is empty; expected at least a user message"},
		"answer empty":     {strings.Replace(openAI, `{"role":"assistant","content":"b"}`, "", 1), 0, "line 1: non_preferred_output has 0 messages; expected one assistant message"},
		"answer of user":   {strings.Replace(openAI, `"role":"assistant","content":"a"`, `"role":"user","content":"a"`, 1), 0, "line 1: preferred_output[0].role is user after user; expected user and assistant to take turns"},
		"answer a text":    {strings.Replace(chat, `[{"role":"assistant","content":"b"}]`, `"b"`, 1), 0, "line 1: rejected: a JSON string; expected a list of messages"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report, err := validateDataset(t.Context(), strings.NewReader(test.file), DPO, nil)
			got := ""
			if err != nil {
				got = err.Error()
			}
			if diff := cmp.Diff(test.want, got); diff != "" || report.Rows != test.rows {
				t.Errorf("rows %d, want %d; error (-want +got)\n%s", report.Rows, test.rows, diff)
			}
		})
	}
}

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

		"empty":          {"", 0, "no rows; " + sft},
		"blank only":     {"\n\r\n", 0, "no rows; " + sft},
		"a JSON array":   {"[" + row + "]", 0, "line 1: the file is a JSON array; expected one JSON object a line (JSONL)"},
		"UTF-16":         {"\xff\xfe{\x00", 0, "line 1: the file is UTF-16; save it as UTF-8"},
		"a zip":          {"PK\x03\x04xx", 0, "line 1: the file is a zip archive; save it as UTF-8"},
		"invalid UTF-8":  {row + "\n{\"\xb2\xe2\"}\n", 1, "line 2: not valid UTF-8; save the file as UTF-8"},
		"broken JSON":    {row + "\n\n{\"messages\":[\n", 1, "line 3: not valid JSON at byte 13: unexpected end of JSON input; " + sft},
		"a number":       {"1", 0, "line 1: a JSON number; " + sft},
		"two objects":    {row + row, 0, fmt.Sprintf("line 1: not valid JSON at byte %d: invalid character '{' after top-level value; %s", len(row)+1, sft)},
		"other keys":     {`{"question":"q","answer":"a"}`, 0, "line 1: " + sft + `; this one has the keys "answer", "question"`},
		"no keys":        {`{}`, 0, "line 1: " + sft + "; this one has no keys"},
		"messages empty": {`{"messages":[]}`, 0, "line 1: messages is empty; expected at least a user and an assistant message"},
		"messages text":  {`{"messages":"q"}`, 0, "line 1: messages is a JSON string; expected an array"},
		"message text":   {`{"messages":["q"]}`, 0, `line 1: messages[0]: a JSON string; expected an object {"role": ..., "content": ...}`},
		"role missing":   {`{"messages":[{"content":"q"}]}`, 0, "line 1: messages[0].role is missing; expected system, user, assistant or tool"},
		"role unknown":   {`{"messages":[{"role":"human","content":"q"}]}`, 0, `line 1: messages[0].role is "human"; expected system, user, assistant or tool`},
		"role number":    {`{"messages":[{"role":1,"content":"q"}]}`, 0, "line 1: messages[0]: role is a JSON number; expected a string"},
		"content image": {`{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}`, 0,
			`line 1: messages[0]: content[0]: part of type "image_url" is not supported, only text`},
		"content empty":   {`{"messages":[{"role":"user","content":" "},{"role":"assistant","content":"a"}]}`, 0, "line 1: messages[0].content is empty; expected text"},
		"content missing": {`{"messages":[{"role":"user","content":"q"},{"role":"assistant"}]}`, 0, "line 1: messages[1].content is empty; expected text"},
		"assistant first": {`{"messages":[{"role":"assistant","content":"a"}]}`, 0, "line 1: messages[0].role is assistant; expected system or user as the first message"},
		"system second":   {`{"messages":[{"role":"user","content":"q"},{"role":"system","content":"s"}]}`, 0, "line 1: messages[1].role is system; expected it as the first message only"},
		"user twice":      {`{"messages":[{"role":"user","content":"q"},{"role":"user","content":"q"}]}`, 0, "line 1: messages[1].role is user after user; expected user and assistant to take turns"},
		"no question":     {`{"messages":[{"role":"system","content":"s"},{"role":"assistant","content":"a"}]}`, 0, "line 1: messages[1].role is assistant after system; expected user and assistant to take turns"},
		"tool message":    {`{"messages":[{"role":"user","content":"q"},{"role":"tool","content":"r"}]}`, 0, "line 1: messages[1].role is tool; expected it after an assistant message with tool_calls"},
		"function":        {`{"messages":[{"role":"user","content":"q"},{"role":"function","content":"r"}]}`, 0, "line 1: messages[1].role is function; say tool, which OpenAI replaced it by"},
		"functions":       {`{"messages":[],"functions":[{}]}`, 0, "line 1: functions is not empty; say tools, which OpenAI replaced it by"},
		"function call":   {`{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":null,"function_call":{"name":"f","arguments":"{}"}}]}`, 0, "line 1: messages[1].function_call: say tool_calls, which OpenAI replaced it by"},
		"no tool":         {`{"messages":[],"tools":[{}]}`, 0, `line 1: tools[0]: expected {"type": "function", "function": {"name": ...}}`},
		"call of user":    {`{"messages":[{"role":"user","content":"q","tool_calls":[{"function":{"name":"f","arguments":"{}"}}]}]}`, 0, "line 1: messages[0].tool_calls is set on a user message; expected it on assistant messages only"},
		"call unnamed":    {`{"messages":[{"role":"user","content":"q"},{"role":"assistant","tool_calls":[{"function":{"arguments":"{}"}}]}]}`, 0, "line 1: messages[1].tool_calls[0].function.name is missing"},
		"call arguments":  {`{"messages":[{"role":"user","content":"q"},{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"x"}}]}]}`, 0, `line 1: messages[1].tool_calls[0].function.arguments is "x"; expected the text of a JSON object, such as "{}"`},
		"no result":       {`{"messages":[{"role":"user","content":"q"},{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{}"}}]},{"role":"user","content":"q"}]}`, 0, "line 1: messages[2].role is user after tool_calls; expected a tool message with the result of each"},
		"other result":    {strings.Replace(tools, `"tool_call_id":"c1"`, `"tool_call_id":"c2"`, 1), 0, `line 1: messages[2].tool_call_id is "c2"; expected that of a call before: c1`},
		"user after tool": {`{"messages":[{"role":"user","content":"q"},{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{}"}}]},{"role":"tool","content":"r"},{"role":"user","content":"q"}]}`, 0,
			"line 1: messages[3].role is user after tool; expected the assistant to go on"},
		"tools": {tools, 1, ""},

		"prompts":            {`{"prompt":"q","completion":"a"}` + "\n" + `{"prompt":"","completion":"a"}`, 2, ""},
		"prompts of chat":    {`{"prompt":[{"role":"user","content":"q"}],"completion":[{"role":"assistant","content":"a"}]}`, 1, ""},
		"no completion":      {`{"prompt":"q"}`, 0, `line 1: no "completion"; expected it beside "prompt": a text or messages`},
		"no prompt":          {`{"completion":"q"}`, 0, `line 1: no "prompt"; expected it beside "completion": a text, which may be empty, or messages`},
		"completion empty":   {`{"prompt":"q","completion":""}`, 0, "line 1: completion is empty; expected text"},
		"completion a chat":  {`{"prompt":"q","completion":[]}`, 0, "line 1: prompt: a JSON string; expected a list of messages, as the completion is one"},
		"completion a text":  {`{"prompt":[{"role":"user","content":"q"}],"completion":"a"}`, 0, "line 1: completion: a JSON string; expected a list of messages"},
		"completion of user": {`{"prompt":[{"role":"user","content":"q"}],"completion":[{"role":"user","content":"a"}]}`, 0, "line 1: completion[0].role is user after user; expected user and assistant to take turns"},
		"prompt ends wrong":  {`{"prompt":[{"role":"system","content":"q"}],"completion":[{"role":"assistant","content":"a"}]}`, 0, `line 1: the last message of prompt has role "system"; expected user, whom the answer follows`},
		"weight in a prompt": {`{"prompt":[{"role":"user","content":"q"}],"completion":[{"role":"assistant","content":"a","weight":1}]}`, 0, `line 1: completion[0].weight is set; expected it in rows {"messages": [...]} only: here the answer is learnt and nothing else`},
		"text":               {`{"text":"t"}`, 1, ""},
		"text empty":         {`{"text":" "}`, 0, "line 1: text is empty; expected text"},
		"text a number":      {`{"text":1}`, 0, "line 1: text: a JSON number; expected a text"},
		"mixed":              {row + "\n\n" + `{"text":"t"}`, 1, `line 3: a row {"text": "..."}, and line 1 is a row {"messages": [...]}; expected rows of one kind in a file`},
		"pairs":              {pair, 0, `line 1: a row {"prompt": "...", "chosen": "...", "rejected": "..."} is of method dpo, and the job is supervised; ` + sft},

		"no answer":        {`{"messages":[{"role":"user","content":"q"}]}`, 0, `line 1: the last message has role "user"; expected assistant, whose answer is learnt`},
		"weight of user":   {`{"messages":[{"role":"user","content":"q","weight":1},{"role":"assistant","content":"a"}]}`, 0, "line 1: messages[0].weight is set on a user message; expected it on assistant messages only"},
		"weight half":      {`{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a","weight":0.5}]}`, 0, "line 1: messages[1].weight is 0.5; expected 0 or 1"},
		"weight text":      {`{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a","weight":"1"}]}`, 0, "line 1: messages[1]: weight is a JSON string; expected a number"},
		"nothing to learn": {`{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a","weight":0}]}`, 0, "line 1: every assistant message has weight 0; expected one with weight 1 or none, else there is nothing to learn"},
		"tools an object":  {`{"messages":[],"tools":{}}`, 0, "line 1: tools is a JSON object; expected an array"},
		"too long":         {row + "\n" + strings.Repeat("x", maxLineBytes+1) + "\n" + row + "\n{}", 2, "line 2: longer than 16 MiB\nline 4: " + sft + "; this one has no keys"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report, err := validateDataset(t.Context(), strings.NewReader(test.file), Supervised, nil)
			got := ""
			if err != nil {
				got = err.Error()
			}
			if diff := cmp.Diff(test.want, got); diff != "" || report.Rows != test.rows {
				t.Errorf("rows %d, want %d; error (-want +got)\n%s", report.Rows, test.rows, diff)
			}
		})
	}
}

func TestValidateDatasetReportsTwenty(t *testing.T) {
	t.Parallel()
	_, err := validateDataset(t.Context(), strings.NewReader(strings.Repeat("{}\n", 30)), Supervised, nil)
	var lines *datasetError
	if !errors.As(err, &lines) || lines.bad != 30 || len(lines.lines) != 20 || !strings.HasSuffix(err.Error(), "\nand 10 more") {
		t.Errorf("error %v", err)
	}
}

func TestValidateDatasetPassesReadErrors(t *testing.T) {
	t.Parallel()
	broken := errors.New("disk")
	_, err := validateDataset(t.Context(), io.MultiReader(strings.NewReader(row+"\n"), iotest.ErrReader(broken)), Supervised, nil)
	if !errors.Is(err, broken) {
		t.Errorf("error %v, want the reader's", err)
	}
}

func FuzzValidateDataset(f *testing.F) {
	f.Add([]byte(row + "\r\n{}"))
	f.Add([]byte("\ufeff[" + row))
	f.Add([]byte(`{"messages":[{"role":"tool","content":[{"type":"text"}],"weight":null}]}`))
	f.Add([]byte(tools))
	f.Add([]byte(pair + "\n" + openAI))
	f.Fuzz(func(t *testing.T, file []byte) {
		if _, err := validateDataset(t.Context(), bytes.NewReader(file), DPO, nil); err != nil && len(err.Error()) > 64<<10 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
		report, err := validateDataset(t.Context(), bytes.NewReader(file), Supervised, []string{"a", "b"})
		if err == nil && report.Rows == 0 {
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
		Running:         "queued running succeeded failed cancelled",
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
