package dataset_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/modeltest"
	"github.com/hone-llm/hone/internal/prompt"
)

// model is the default model's vocabulary, and prompts by its own template, by one that knows tools, and without one.
type model struct {
	*llama.Model
	chat, tools, base *prompt.Builder
}

func loadModel(t testing.TB) model {
	t.Helper()
	llama.Open(llama.Options{})
	m, err := llama.LoadModel(modeltest.Path(t), llama.ModelOptions{VocabularyOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	build := func(template string) *prompt.Builder {
		b, err := prompt.New(prompt.Options{Template: template, Vocabulary: m})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.Close() })
		return b
	}
	tools, err := os.ReadFile("../prompt/testdata/qwen2.5.jinja")
	if err != nil {
		t.Fatal(err)
	}
	return model{m, build(m.ChatTemplate()), build(string(tools)), build("")}
}

func (m model) text(tokens []engine.Token) string {
	var b strings.Builder
	for _, t := range tokens {
		b.Write(m.Piece(t))
	}
	return b.String()
}

// show writes a row with its trained runs in brackets.
func (m model) show(r prompt.Row) string {
	var b strings.Builder
	on := false
	for i, t := range r.Tokens {
		if (r.Weights[i] != 0) != on {
			b.WriteByte("[]"[map[bool]int{false: 0, true: 1}[on]])
			on = !on
		}
		b.Write(m.Piece(t))
	}
	if on {
		b.WriteByte(']')
	}
	return b.String()
}

func write(t testing.TB, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "rows.jsonl")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t testing.TB, path string, b *prompt.Builder, o dataset.Options) *dataset.Dataset {
	t.Helper()
	d, err := dataset.Open(t.Context(), path, b, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func examples(t testing.TB, d *dataset.Dataset) []dataset.Example {
	t.Helper()
	all, err := d.Examples(d.Sequence(), 0, d.Len())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

const system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"

func TestFormats(t *testing.T) {
	t.Parallel()
	m := loadModel(t)
	ask := "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
	for _, test := range []struct {
		name    string
		builder *prompt.Builder
		options dataset.Options
		line    string
		want    []string // candidates of its examples
		right   int
		tokens  int // beside those of the candidates that are counted
	}{
		{"chat", m.chat, dataset.Options{}, `{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"北京。"}]}`, []string{system + ask + "[北京。<|im_end|>]"}, 0, 0},
		{
			"every turn of a conversation but those of weight 0", m.chat, dataset.Options{},
			`{"messages":[{"role":"developer","content":"S"},{"role":"user","content":"Q"},{"role":"assistant","content":"A","weight":1},{"role":"user","content":"Q"},` +
				`{"role":"assistant","content":"B","weight":0},{"role":"user","content":"Q"},{"role":"assistant","content":"C"}],"parallel_tool_calls":true,"id":7}`,
			[]string{"<|im_start|>system\nS<|im_end|>\n" + ask + "[A<|im_end|>]\n" + ask + "B<|im_end|>\n" + ask + "[C<|im_end|>]"}, 0, 0,
		},
		{
			"all tokens", m.chat, dataset.Options{TrainOnAll: true}, `{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}`,
			[]string{"<|im_start|>[" + strings.TrimPrefix(system, "<|im_start|>") + ask + "A<|im_end|>]"}, 0, 0,
		},
		{
			"tools", m.tools, dataset.Options{},
			`{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function","function":{"name":"weather","arguments":"{\"city\": \"北京\"}"}}]},` +
				`{"role":"tool","tool_call_id":"c1","content":"sunny"},{"role":"assistant","content":"A"}],"tools":[{"type":"function","function":{"name":"weather","parameters":{}}}]}`,
			[]string{
				"<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n\n<tools>\n" +
					`{"type": "function", "function": {"name": "weather", "parameters": {}}}` + "\n</tools><|im_end|>\n" + ask +
					"[<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"北京\"}}\n</tool_call><|im_end|>]\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n" +
					"<|im_start|>assistant\n[A<|im_end|>]",
			}, 0, 0,
		},
		{"completion", m.base, dataset.Options{}, `{"prompt":"Q: x\nA:","completion":" yes"}`, []string{"Q: x\nA:[ yes<|im_end|>]"}, 0, 0},
		{"completion that ends itself", m.base, dataset.Options{}, `{"prompt":"Q","completion":" A<|im_end|>"}`, []string{"Q[ A<|im_end|>]"}, 0, 0},
		{"completion of nothing", m.base, dataset.Options{}, `{"prompt":"","completion":"once upon"}`, []string{"once[ upon<|im_end|>]"}, 0, 0},
		{
			"completion of messages", m.chat, dataset.Options{},
			`{"prompt":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"},{"role":"user","content":"Q"}],"completion":[{"role":"assistant","content":"B"}]}`,
			[]string{system + ask + "A<|im_end|>\n" + ask + "[B<|im_end|>]"}, 0, 0,
		},
		{"text", m.base, dataset.Options{}, `{"text":"once upon a time"}`, []string{"once[ upon a time<|im_end|>]"}, 0, 0},
		{
			"preference", m.chat, dataset.Options{DPO: true},
			`{"input":{"messages":[{"role":"user","content":"Q"}],"tools":[],"parallel_tool_calls":true},"preferred_output":[{"role":"assistant","content":"A"}],"non_preferred_output":[{"role":"assistant","content":"B"}]}`,
			[]string{system + ask + "[A<|im_end|>]", system + ask + "[B<|im_end|>]"}, 0, 0,
		},
		{
			"preference of texts", m.base, dataset.Options{DPO: true}, `{"prompt":"Q","chosen":" A","rejected":" not"}`,
			[]string{"Q[ A<|im_end|>]", "Q[ not<|im_end|>]"}, 0, 0,
		},
		{
			"preference of messages", m.chat, dataset.Options{DPO: true},
			`{"prompt":[{"role":"user","content":"Q"}],"chosen":[{"role":"assistant","content":"A"}],"rejected":[{"role":"assistant","content":"B"}]}`,
			[]string{system + ask + "[A<|im_end|>]", system + ask + "[B<|im_end|>]"}, 0, 0,
		},
		{
			"preference of whole conversations", m.chat, dataset.Options{DPO: true},
			`{"prompt":"Q","chosen":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}],"rejected":[{"role":"user","content":"Q"},{"role":"assistant","content":"B"}]}`,
			[]string{system + ask + "[A<|im_end|>]", system + ask + "[B<|im_end|>]"}, 0, 0,
		},
		{
			"choices", m.chat, dataset.Options{Choices: []string{"A", "B", "C"}}, `{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":" B\n"}]}`,
			[]string{system + ask + "[A]", system + ask + "[B]", system + ask + "[C]"}, 1, 0,
		},
		{
			"choices that begin with each other", m.chat, dataset.Options{Choices: []string{"A", "A and B"}}, `{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}`,
			[]string{system + ask + "[A<|im_end|>]", system + ask + "[A and B<|im_end|>]"}, 0, 0,
		},
		{
			"choices of completions", m.base, dataset.Options{Choices: []string{"yes", "no"}}, `{"prompt":"Q: x\nA:","completion":" no"}`,
			[]string{"Q: x\nA:[ yes]", "Q: x\nA:[ no]"}, 1, 0,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			all := examples(t, open(t, write(t, test.line), test.builder, test.options))
			if len(all) != 1 {
				t.Fatalf("%d examples, expected 1", len(all))
			}
			var got []string
			for _, c := range all[0].Candidates {
				got = append(got, m.show(c))
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("candidates (-want +got):\n%s", diff)
			}
			tokens := len(all[0].Candidates[test.right].Tokens)
			if test.options.DPO {
				tokens += len(all[0].Candidates[1].Tokens)
			}
			if all[0].Right != test.right || all[0].Tokens != tokens {
				t.Errorf("candidate %d is right and %d tokens count, expected %d and %d", all[0].Right, all[0].Tokens, test.right, tokens)
			}
		})
	}
}

// Where the template opens a <think> block, the choices stand after its end, as they will be asked for.
func TestChoicesFollowTheEmptyThinkBlock(t *testing.T) {
	t.Parallel()
	m := loadModel(t)
	template := `{% for m in messages %}<|im_start|>{{ m.role }}` + "\n" + `{% if m.role == 'assistant' and loop.last %}<think>` + "\n\n" + `</think>` + "\n\n" + `{% endif %}{{ m.content }}<|im_end|>` + "\n" +
		`{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant` + "\n" + `{% endif %}`
	b, err := prompt.New(prompt.Options{Template: template, Vocabulary: m})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	line := `{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"B"}]}`
	for _, choices := range [][]string{{"A", "B"}, {"B", "B or C"}} {
		e := examples(t, open(t, write(t, line), b, dataset.Options{Choices: choices}))[0]
		if got, before := m.show(e.Candidates[1]), "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n["+choices[1]; !strings.HasPrefix(got, before) {
			t.Errorf("got %q, expected %q", got, before)
		}
	}
}

const (
	chatLine = `{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}`
	pairLine = `{"prompt":"Q","chosen":"A","rejected":"B"}`
)

func TestLinesThatCannotBeUsed(t *testing.T) {
	t.Parallel()
	m := loadModel(t)
	for name, test := range map[string]struct {
		builder *prompt.Builder
		options dataset.Options
		lines   []string
		line    int
		want    string
	}{
		"bad JSON":                    {m.chat, dataset.Options{}, []string{chatLine, "", "{"}, 3, "unexpected end of JSON"},
		"no JSON at all":              {m.chat, dataset.Options{}, []string{"question,answer"}, 1, "JSON"},
		"an array":                    {m.chat, dataset.Options{}, []string{"[", chatLine, "]"}, 1, "one JSON object a line"},
		"a number":                    {m.chat, dataset.Options{}, []string{"1"}, 1, "JSON object"},
		"another encoding":            {m.chat, dataset.Options{}, []string{"\xff\xfe{\x00"}, 1, "UTF-8"},
		"no known keys":               {m.chat, dataset.Options{}, []string{`{"question":"Q"}`}, 1, `{"messages": [...]}`},
		"mixed":                       {m.chat, dataset.Options{}, []string{chatLine, chatLine, `{"text":"x"}`}, 3, `a {"text": "..."} row, but the first row of the file is {"messages": [...]}`},
		"mixed and broken":            {m.chat, dataset.Options{}, []string{chatLine, `{"prompt":"x","completion":1}`}, 2, "but the first row"},
		"mixed completions":           {m.chat, dataset.Options{}, []string{`{"prompt":"Q","completion":"A"}`, `{"prompt":[{"role":"user","content":"Q"}],"completion":[{"role":"assistant","content":"A"}]}`}, 2, "[messages]"},
		"no messages":                 {m.chat, dataset.Options{}, []string{`{"messages":[]}`}, 1, "at least one message"},
		"messages that are a text":    {m.chat, dataset.Options{}, []string{`{"messages":"Q"}`}, 1, "messages is a text; expected a list"},
		"a message without a role":    {m.chat, dataset.Options{}, []string{`{"messages":["Q"]}`}, 1, "messages"},
		"nothing trained":             {m.chat, dataset.Options{}, []string{`{"messages":[{"role":"user","content":"Q"}]}`}, 1, "no assistant message"},
		"no template":                 {m.base, dataset.Options{}, []string{chatLine}, 1, `write {"prompt": "...", "completion": "..."} rows`},
		"tools without support":       {m.chat, dataset.Options{}, []string{`{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}],"tools":[{"type":"function","function":{"name":"f"}}]}`}, 1, "does not write tools"},
		"calls without support":       {m.chat, dataset.Options{}, []string{`{"messages":[{"role":"user","content":"Q"},{"role":"assistant","tool_calls":[{"type":"function","function":{"name":"f","arguments":"{}"}}]}]}`}, 1, "does not write tool_calls"},
		"functions":                   {m.chat, dataset.Options{}, []string{`{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}],"functions":[{"name":"f"}]}`}, 1, "tools"},
		"parallel_tool_calls":         {m.chat, dataset.Options{}, []string{`{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}],"parallel_tool_calls":"x"}`}, 1, "true or false"},
		"half a weight":               {m.chat, dataset.Options{}, []string{`{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A","weight":0.5}]}`}, 1, "messages[1].weight is 0.5; expected 0 or 1"},
		"a single token":              {m.base, dataset.Options{}, []string{`{"prompt":"","completion":"<|im_end|>"}`}, 1, "a single token"},
		"empty text":                  {m.base, dataset.Options{}, []string{`{"text":""}`}, 1, "empty"},
		"empty completion":            {m.base, dataset.Options{}, []string{`{"prompt":"","completion":""}`}, 1, "empty"},
		"completion without prompt":   {m.base, dataset.Options{}, []string{`{"completion":"A"}`}, 1, "prompt is missing"},
		"one answer in a DPO job":     {m.chat, dataset.Options{DPO: true}, []string{chatLine}, 1, "has one answer"},
		"two answers":                 {m.base, dataset.Options{}, []string{pairLine}, 1, "method is dpo"},
		"an answer missing":           {m.base, dataset.Options{DPO: true}, []string{pairLine, `{"prompt":"Q","chosen":"A"}`}, 2, "rejected is missing"},
		"an answer of the user":       {m.chat, dataset.Options{DPO: true}, []string{`{"prompt":[{"role":"user","content":"Q"}],"chosen":[{"role":"user","content":"A"}],"rejected":[{"role":"assistant","content":"B"}]}`}, 1, "chosen: expected exactly one message, the assistant's"},
		"answers to different things": {m.chat, dataset.Options{DPO: true}, []string{`{"chosen":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}],"rejected":[{"role":"user","content":"R"},{"role":"assistant","content":"B"}]}`}, 1, "last message alone"},
		"no input":                    {m.chat, dataset.Options{DPO: true}, []string{`{"preferred_output":[],"non_preferred_output":[]}`}, 1, `no "input"`},
		"not a choice":                {m.chat, dataset.Options{Choices: []string{"B", "C"}}, []string{chatLine}, 1, `the answer is "A"; expected one of the choices ["B" "C"]`},
		"choices of a text":           {m.base, dataset.Options{Choices: []string{"B", "C"}}, []string{`{"text":"B"}`}, 1, "no answer that could be one of the choices"},
		"choice of weight 0":          {m.chat, dataset.Options{Choices: []string{"A", "C"}}, []string{`{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A","weight":0}]}`}, 1, "weight 0"},
		"choice of the user":          {m.chat, dataset.Options{Choices: []string{"A", "C"}}, []string{`{"messages":[{"role":"user","content":"A"}]}`}, 1, `role "user"`},
		"too long a line":             {m.base, dataset.Options{}, []string{`{"text":"x"}`, `{"text":"` + strings.Repeat("x", dataset.MaxLineBytes) + `"}`}, 2, "longer than 16 MiB"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, err := dataset.Open(t.Context(), write(t, test.lines...), test.builder, test.options)
			var line *dataset.LineError
			if !errors.As(err, &line) || line.Line != test.line || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, expected line %d and %q", err, test.line, test.want)
			}
			d.Close()
		})
	}
}

// The first bad line is named, whichever worker sees it first.
func TestTheFirstBadLineIsNamed(t *testing.T) {
	t.Parallel()
	m := loadModel(t)
	lines := slices.Repeat([]string{`{"text":"some words"}`}, 2000)
	lines[700], lines[701], lines[1500] = "{", "{", "{"
	for range 5 {
		_, err := dataset.Open(t.Context(), write(t, lines...), m.base, dataset.Options{})
		var line *dataset.LineError
		if !errors.As(err, &line) || line.Line != 701 {
			t.Fatalf("error is %v, expected line 701", err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	o := dataset.Options{Progress: func(int) { cancel() }}
	if _, err := dataset.Open(ctx, write(t, slices.Repeat([]string{`{"text":"x"}`}, 5000)...), m.base, o); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestOptionsAreChecked(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]dataset.Options{
		"one choice":             {Choices: []string{"A"}},
		"an empty choice":        {Choices: []string{"A", ""}},
		"space around a choice":  {Choices: []string{"A", " B"}},
		"a choice twice":         {Choices: []string{"A", "A"}},
		"choices of preferences": {Choices: []string{"A", "B"}, DPO: true},
		"all of a choice":        {Choices: []string{"A", "B"}, TrainOnAll: true},
		"all of a preference":    {DPO: true, TrainOnAll: true},
	} {
		if _, err := dataset.Open(t.Context(), "unread", nil, o); err == nil || errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
}

// A byte order mark, CRLF, blank lines and a missing last newline are what editors leave.
func TestEncodingsOfLines(t *testing.T) {
	t.Parallel()
	m := loadModel(t)
	path := write(t, "\ufeff{\"messages\":[{\"role\":\"system\",\"content\":\"请回答。\"},{\"role\":\"user\",\"content\":\"1+1?\\nA. 二\"},{\"role\":\"assistant\",\"content\":\"A\"}]}\r", "\r", "",
		"  {\"messages\":[{\"role\":\"system\",\"content\":[{\"type\":\"text\",\"text\":\"请回答。\"}]},{\"role\":\"user\",\"content\":\"日本語、한국어\"},{\"role\":\"assistant\",\"content\":\"B\"}]}\r")
	d := open(t, path, m.chat, dataset.Options{})
	all := examples(t, d)
	if len(all) != 2 || !strings.Contains(m.text(all[1].Candidates[0].Tokens), "日本語、한국어") {
		t.Errorf("%d examples: %q", len(all), m.text(all[len(all)-1].Candidates[0].Tokens))
	}
	want := dataset.Summary{
		Rows: 2, Tokens: all[0].Tokens + all[1].Tokens, Targets: 4, Longest: max(all[0].Tokens, all[1].Tokens),
		SystemMessage: "请回答。", Answers: []string{"A", "B"},
	}
	if diff := cmp.Diff(want, d.Summary); diff != "" {
		t.Errorf("summary (-want +got):\n%s", diff)
	}
	if _, err := dataset.Open(t.Context(), write(t, "\ufeff", " \r"), m.chat, dataset.Options{}); !errors.Is(err, dataset.ErrNoRows) {
		t.Errorf("an empty file: %v", err)
	}
}

// What max_length leaves of rows of ten tokens of prompt and three of answer.
func TestTruncation(t *testing.T) {
	t.Parallel()
	m := loadModel(t)
	plain := `{"prompt":"one two three four five six seven eight nine ten","completion":" yes no"}`
	turns := `{"messages":[{"role":"system","content":"S"},{"role":"user","content":"one two three"},{"role":"assistant","content":"A B C D"},{"role":"user","content":"Q"},{"role":"assistant","content":"E"}]}`
	tail := "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[E<|im_end|>]"
	for name, test := range map[string]struct {
		builder            *prompt.Builder
		options            dataset.Options
		line               string
		want               []string // nil: no row is left
		dropped, truncated int
	}{
		"short enough":                   {m.base, dataset.Options{MaxLength: 13, Truncate: true}, plain, []string{"one two three four five six seven eight nine ten[ yes no<|im_end|>]"}, 0, 0},
		"dropped":                        {m.base, dataset.Options{MaxLength: 12}, plain, nil, 1, 0},
		"cut":                            {m.base, dataset.Options{MaxLength: 12, Truncate: true}, plain, []string{" two three four five six seven eight nine ten[ yes no<|im_end|>]"}, 0, 1},
		"one token of prompt":            {m.base, dataset.Options{MaxLength: 4, Truncate: true}, plain, []string{" ten[ yes no<|im_end|>]"}, 0, 1},
		"the answer alone":               {m.base, dataset.Options{MaxLength: 3, Truncate: true}, plain, nil, 1, 0},
		"all tokens":                     {m.base, dataset.Options{MaxLength: 5, Truncate: true, TrainOnAll: true}, plain, []string{" nine[ ten yes no<|im_end|>]"}, 0, 1},
		"a text has no prompt":           {m.base, dataset.Options{MaxLength: 3, Truncate: true}, `{"text":"one two three four"}`, nil, 1, 0},
		"the longest of two answers":     {m.base, dataset.Options{MaxLength: 6, Truncate: true, DPO: true}, `{"prompt":"one two three four","chosen":" A","rejected":" B C D"}`, []string{" three four[ A<|im_end|>]", " three four[ B C D<|im_end|>]"}, 0, 1},
		"BOS stays":                      {m.chat, dataset.Options{MaxLength: 28, Truncate: true}, turns, []string{"<|im_start|>one two three<|im_end|>\n<|im_start|>assistant\n[A B C D<|im_end|>]\n" + tail}, 0, 1},
		"a cut answer is not trained":    {m.chat, dataset.Options{MaxLength: 17, Truncate: true}, turns, []string{"<|im_start|> C D<|im_end|>\n" + tail}, 0, 1},
		"choices count with their right": {m.base, dataset.Options{MaxLength: 3, Truncate: true, Choices: []string{"yes", "no"}}, `{"prompt":"one two three four","completion":" no"}`, []string{" three four[ yes]", " three four[ no]"}, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lines := []string{test.line}
			if test.want == nil { // a row that stays, so that there is something to open
				short := map[bool]string{true: `{"text":"x"}`, false: `{"prompt":"x","completion":""}`}[strings.Contains(test.line, "text")]
				lines = append(lines, short)
			}
			d := open(t, write(t, lines...), test.builder, test.options)
			if d.Dropped != test.dropped || d.Truncated != test.truncated {
				t.Errorf("%d dropped and %d truncated, expected %d and %d", d.Dropped, d.Truncated, test.dropped, test.truncated)
			}
			if len(d.DroppedLines) != test.dropped || len(d.TruncatedLines) != test.truncated || slices.ContainsFunc(slices.Concat(d.DroppedLines, d.TruncatedLines), func(n int) bool { return n != 1 }) {
				t.Errorf("dropped lines %v, truncated lines %v", d.DroppedLines, d.TruncatedLines)
			}
			if test.want == nil {
				if d.Rows != 1 {
					t.Errorf("%d rows, expected only the short one", d.Rows)
				}
				return
			}
			e := examples(t, d)[0]
			var got []string
			tokens := 0
			for i, c := range e.Candidates {
				got = append(got, m.show(c))
				if test.options.DPO || i == e.Right {
					tokens += len(c.Tokens)
				}
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if e.Tokens != tokens || d.Tokens != tokens {
				t.Errorf("%d tokens count, expected %d", e.Tokens, tokens)
			}
		})
	}
	if _, err := dataset.Open(t.Context(), write(t, plain), m.base, dataset.Options{MaxLength: 3}); !errors.Is(err, dataset.ErrNoRows) || !strings.Contains(err.Error(), "max_length, 3 tokens") {
		t.Errorf("nothing left: %v", err)
	}
}

// The same content, model and options are tokenized once; anything else is tokenized anew, and so is a damaged file.
func TestCache(t *testing.T) {
	t.Parallel()
	m := loadModel(t)
	dir := filepath.Join(t.TempDir(), "cache")
	lines := []string{}
	for i := range 300 {
		lines = append(lines, fmt.Sprintf(`{"prompt":"question %d","completion":" answer %d"}`, i, i*i))
	}
	content := write(t, lines...)
	progress := 0
	o := dataset.Options{MaxLength: 100, CacheDir: dir, Progress: func(rows int) { progress = rows }}
	tokenized := func(path string, b *prompt.Builder, o dataset.Options) bool {
		t.Helper()
		progress = 0
		d := open(t, path, b, o)
		if d.Len() != len(lines) {
			t.Fatalf("%d rows, expected %d", d.Len(), len(lines))
		}
		for i, e := range examples(t, d) {
			if got, want := m.show(e.Candidates[0]), fmt.Sprintf("question %d[ answer %d<|im_end|>]", i, i*i); got != want || e.Row != i {
				t.Fatalf("row %d: got %q, expected %q", i, got, want)
			}
		}
		return progress == len(lines)
	}
	if !tokenized(content, m.base, o) {
		t.Error("not tokenized at first")
	}
	if tokenized(content, m.base, o) || tokenized(write(t, lines...), m.base, o) {
		t.Error("the same content is tokenized again")
	}
	truncate := o
	truncate.Truncate = true
	if !tokenized(content, m.base, truncate) || !tokenized(content, m.chat, o) || !tokenized(write(t, append(lines, "")...), m.base, o) {
		t.Error("other content, another template or other options take the tokens of the first")
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) != 4 {
		t.Fatalf("%v, %v: expected four files", files, err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	for round := range 20 {
		for _, path := range files {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case len(data) == 0: // cut before, and not the one that is looked for
			case round%2 == 0:
				data[random.IntN(len(data))] ^= 1 << random.IntN(8)
			default:
				data = data[:random.IntN(len(data))]
			}
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if !tokenized(content, m.base, o) {
			t.Fatal("a damaged file is used")
		}
		if tokenized(content, m.base, o) {
			t.Fatal("the damaged file was not replaced")
		}
	}
}

func TestOrderDependsOnSeedAndEpochOnly(t *testing.T) {
	t.Parallel()
	all := make([]dataset.Example, 100)
	for i := range all {
		all[i].Candidates = []prompt.Row{{Tokens: []engine.Token{1, 2}, Weights: []float32{0, 1}}}
	}
	d, err := dataset.New(all...)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	rows := func(o dataset.Order) []int {
		var rows []int
		for i := range o.Len() {
			rows = append(rows, o.At(i))
		}
		return rows
	}
	first := rows(d.Order(1, 0))
	if !slices.Equal(first, rows(d.Order(1, 0))) {
		t.Error("the same seed and epoch give another order")
	}
	if slices.Equal(first, rows(d.Order(1, 1))) || slices.Equal(first, rows(d.Order(2, 0))) {
		t.Error("another seed or epoch gives the same order")
	}
	if sequence := rows(d.Sequence()); !slices.Equal(slices.Sorted(slices.Values(first)), sequence) {
		t.Errorf("not a permutation: %v", first)
	}
	// Resume states of earlier releases go on in the order that they began with.
	want := make([]int, 100)
	for i := range want {
		want[i] = i
	}
	rand.New(rand.NewPCG(1, 0)).Shuffle(100, func(i, j int) { want[i], want[j] = want[j], want[i] })
	if !slices.Equal(first, want) {
		t.Errorf("order %v, expected %v", first, want)
	}
}

func TestShared(t *testing.T) {
	t.Parallel()
	m := loadModel(t)
	d := open(t, questions(t, 100), m.chat, dataset.Options{})
	saved, err := d.Shared(d.Order(1, 0), 8, 1024)
	if err != nil || saved < 0.05 || saved > 0.3 {
		t.Errorf("rows of 127 tokens that share 17 save %g (%v)", saved, err)
	}
	var alone []string
	random := rand.New(rand.NewPCG(3, 4))
	for range 100 {
		alone = append(alone, fmt.Sprintf(`{"text":"%d %d %d %d"}`, random.Uint64(), random.Uint64(), random.Uint64(), random.Uint64()))
	}
	d = open(t, write(t, alone...), m.chat, dataset.Options{})
	if saved, err := d.Shared(d.Order(1, 0), 8, 1024); err != nil || saved > 0.01 {
		t.Errorf("rows that share nothing save %g (%v)", saved, err)
	}
}

// A dataset takes its index of memory, not its rows, and tokenizing it no more than what is under way.
func TestMemoryIsFlat(t *testing.T) {
	m := loadModel(t)
	const rows = 50000
	line := `{"prompt":"question","completion":" answer"}`
	few, many := write(t, line), write(t, slices.Repeat([]string{line}, rows)...)
	open(t, few, m.base, dataset.Options{}).Close()
	heap := func() uint64 {
		var s runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&s)
		return s.HeapAlloc
	}
	before, peak, calls := heap(), uint64(0), 0
	d := open(t, many, m.base, dataset.Options{Progress: func(int) {
		if calls++; calls%100 == 0 {
			peak = max(peak, heap())
		}
	}})
	held := int64(heap()) - int64(before)
	t.Logf("%d rows: %.1f bytes a row are held; %.1f MiB more than before while tokenizing", d.Len(), float64(held)/rows, float64(int64(peak)-int64(before))/(1<<20))
	if d.Len() != rows {
		t.Fatalf("%d rows, expected %d", d.Len(), rows)
	}
	if held > 40*rows || int64(peak)-int64(before) > 16<<20 {
		t.Errorf("%d bytes are held, %d while tokenizing", held, int64(peak)-int64(before))
	}
	order := d.Order(1, 0)
	for i := 0; i < rows; i += 100 {
		all, err := d.Examples(order, i, i+8)
		if err != nil {
			t.Fatal(err)
		}
		if got := m.show(all[0].Candidates[0]); got != "question[ answer<|im_end|>]" {
			t.Fatalf("row %d is %q", all[0].Row, got)
		}
	}
	if after := int64(heap()) - int64(before); after > 40*rows {
		t.Errorf("%d bytes are held after an epoch", after)
	}
	runtime.KeepAlive(d)
}

// Whatever a file holds, it is read or refused by name, and what is read has something to train on.
func FuzzLines(f *testing.F) {
	for _, line := range []string{
		chatLine, pairLine, chatLine + "\n" + pairLine, `{"text":"a"}`, `{"prompt":"","completion":"a"}`, `{"prompt":[],"completion":[]}`, `{"messages":[null]}`,
		`{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f","arguments":"{\"a\":1}"}}]}],"tools":[{}]}`,
		`{"input":{"messages":[{"role":"user","content":"Q"}]},"preferred_output":[{"role":"assistant","content":"A"}],"non_preferred_output":[null]}`,
		`{"chosen":[{"role":"assistant","content":"A"}],"rejected":[{"role":"assistant","content":"B"}]}`, "\ufeff", "[", "{}", "null",
	} {
		for _, options := range []uint8{0, 1, 2, 3, 4, 7} {
			f.Add(line, options)
		}
	}
	m := loadModel(f)
	f.Fuzz(func(t *testing.T, text string, options uint8) {
		o := dataset.Options{MaxLength: 20, Truncate: options&1 != 0, DPO: options&2 != 0}
		if options&4 != 0 && !o.DPO {
			o.Choices = []string{"A", "B"}
		}
		for _, b := range []*prompt.Builder{m.chat, m.tools, m.base} {
			d, err := dataset.Open(t.Context(), write(t, text), b, o)
			var line *dataset.LineError
			switch {
			case errors.As(err, &line) || errors.Is(err, dataset.ErrNoRows):
				continue
			case err != nil:
				t.Fatal(err)
			}
			for _, micro := range dataset.Pack(examples(t, d), 64, true) {
				if err := micro.Batch.Validate(m.VocabularySize()); err != nil {
					t.Errorf("%q: %v", text, err)
				}
			}
			d.Close()
		}
	})
}
