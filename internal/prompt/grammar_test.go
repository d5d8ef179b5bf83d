package prompt_test

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llguidance"
	"github.com/hone-llm/hone/internal/prompt"
	"github.com/hone-llm/hone/internal/wire"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

const bookingTools = `[
	{"type": "function", "function": {"name": "book", "parameters": {"type": "object", "required": ["city", "nights"], "properties": {
		"city": {"type": "string", "enum": ["北京", "上海，浦东", "a \"b\" {c}"]},
		"nights": {"type": "integer", "minimum": 1, "maximum": 30},
		"guests": {"type": "array", "maxItems": 2, "items": {"type": "object", "required": ["name"], "additionalProperties": false, "properties": {"name": {"type": "string", "maxLength": 5}, "vip": {"type": "boolean"}}}}}}}},
	{"type": "function", "function": {"name": "clock"}},
	{"type": "function", "function": {"name": "note-it", "parameters": {"$defs": {"t": {"type": "string", "pattern": "^[甲乙丙]{1,3}$"}}, "type": "object", "properties": {"tag": {"$ref": "#/$defs/t"}}, "required": ["tag"]}}}]`

// constrained is a prompt with its grammar over a vocabulary of bytes and control tokens.
type constrained struct {
	prompt     *prompt.ChatPrompt
	vocabulary byteVocabulary
	tokenizer  *llguidance.Tokenizer
	constraint *llguidance.Constraint
}

// constrain makes one; control names are control tokens, tags that are not among them are text.
func constrain(t *testing.T, family string, o prompt.ChatOptions, control ...string) constrained {
	t.Helper()
	_, v := chatModel(t, family)
	v.special = append([]string{v.eos}, control...)
	v.bos = ""
	b := builder(t, prompt.Options{Template: template(t, family), Vocabulary: v})
	p, err := b.ChatPrompt(t.Context(), []wire.Message{user("Q")}, o)
	if err != nil {
		t.Fatal(err)
	}
	pieces, special := make([][]byte, v.VocabularySize()), make([]bool, v.VocabularySize())
	for i := range pieces {
		pieces[i], special[i] = v.Piece(engine.Token(i)), i >= 256
	}
	eos, _ := v.EOS()
	tokenizer, err := llguidance.NewTokenizer(pieces, special, eos)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tokenizer.Close() })
	constraint, err := tokenizer.New(p.Constraint.Kind, p.Constraint.Text)
	if err != nil {
		t.Fatalf("%v in\n%s", err, p.Constraint.Text)
	}
	t.Cleanup(func() { constraint.Close() })
	return constrained{p, v, tokenizer, constraint}
}

// accepts returns how many bytes of text the grammar takes, and whether it may end there.
func (c constrained) accepts(t *testing.T, text string) (taken int, complete bool) {
	t.Helper()
	tokens, err := c.vocabulary.Tokenize(text, false, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range tokens {
		mask, err := c.constraint.Mask()
		if err != nil {
			t.Fatal(err)
		}
		if !llguidance.Allowed(mask, token) {
			return taken, false
		}
		if err := c.constraint.Accept(token); err != nil {
			t.Fatal(err)
		}
		taken += len(c.vocabulary.Piece(token))
	}
	return taken, c.constraint.Complete()
}

var (
	auto     = child.ToolChoice{Mode: child.ToolAuto}
	required = child.ToolChoice{Mode: child.ToolRequired}
	clock    = child.ToolChoice{Mode: child.ToolFunction, Name: "clock"}
)

// The grammars take what they should, and stop at the byte that they should not.
func TestToolGrammar(t *testing.T) {
	t.Parallel()
	const (
		book     = "<tool_call>\n{\"name\": \"book\", \"arguments\": {\"city\": \"上海，浦东\", \"nights\": 2, \"guests\": [{\"name\": \"甲\\\"}\", \"vip\": true}]}}\n</tool_call>"
		bookTime = "<tool_call>\n{\"name\": \"clock\", \"arguments\": {}}\n</tool_call>"
		llama    = "{\"name\": \"book\", \"parameters\": {\"city\": \"北京\", \"nights\": 12}}"
	)
	tags := []string{"<tool_call>", "</tool_call>"}
	thinks := []string{"<think>", "</think>"}
	tests := []struct {
		name, family string
		choice       child.ToolChoice
		parallel     bool
		control      []string
		text         string
		stop         string // what the grammar does not take and all that follows; "" if it takes everything
		unfinished   bool   // takes everything, but not the end
	}{
		{"text", "qwen2.5-instruct", auto, true, nil, "Hello <tool> {\"name\": 北京\n", "", false},
		{"nothing", "qwen2.5-instruct", auto, true, nil, "", "", false},
		{"a call", "qwen2.5-instruct", auto, true, nil, book, "", false},
		{"text and calls", "qwen2.5-instruct", auto, true, nil, "Well:\n" + book + "\n" + bookTime + "\n" + book, "", false},
		{"one call only", "qwen2.5-instruct", auto, false, nil, book + "\n" + bookTime, "\n" + bookTime, false},
		{"text after calls", "qwen2.5-instruct", auto, true, nil, book + "x", "x", false},
		{"an unknown function", "qwen2.5-instruct", auto, true, nil, "a <tool_call>\n{\"name\": \"rm", "rm", false},
		{"a city that is not in the enum", "qwen2.5-instruct", auto, true, nil, "<tool_call>\n{\"name\": \"book\", \"arguments\": {\"city\": \"东京", "\x9c京", false},
		{"too many nights", "qwen2.5-instruct", auto, true, nil, "<tool_call>\n{\"name\": \"book\", \"arguments\": {\"city\": \"北京\", \"nights\": 31", "1", false},
		{"an argument that there is not", "qwen2.5-instruct", auto, true, nil, "<tool_call>\n{\"name\": \"clock\", \"arguments\": {\"", "\"", false},
		{"endless white space", "qwen2.5-instruct", auto, true, nil, "<tool_call>\n{\"name\": \"book\", \"arguments\": {\n", "\n", false},
		{"pattern and reference", "qwen2.5-instruct", required, true, nil, "<tool_call>\n{\"name\": \"note-it\", \"arguments\": {\"tag\": \"甲丁", "\x81", false},
		{"required takes no text", "qwen2.5-instruct", required, true, nil, "Hello", "Hello", false},
		{"required takes no end", "qwen2.5-instruct", required, true, nil, "", "", true},
		{"required calls", "qwen2.5-instruct", required, true, nil, book + "\n" + bookTime, "", false},
		{"required call", "qwen2.5-instruct", required, false, nil, book + "\n" + bookTime, "\n" + bookTime, false},
		{"a named function", "qwen2.5-instruct", clock, true, nil, bookTime + "\n" + bookTime, "\n" + bookTime, false},
		{"another function", "qwen2.5-instruct", clock, true, nil, book, "book\"" + strings.SplitN(book, "book\"", 2)[1], false},
		{"tags are tokens", "qwen2.5-instruct", auto, true, tags, "Well: " + book + "\n" + bookTime, "", false},
		{"tags are tokens, text", "qwen2.5-instruct", auto, true, tags, "Well: {}", "", false},
		{"tags are tokens, unknown", "qwen2.5-instruct", auto, true, tags, "Well: <tool_call>\n{\"name\": \"rm", "rm", false},
		{"tags are tokens, required", "hermes", required, true, tags, book + "\n" + bookTime, "", false},
		{"stated", "smollm2", required, false, nil, bookTime, "", false},
		{"reasoning", "qwen3-0.6b", auto, true, nil, "<think>\nA <tool_call> or not.\n</think>\n\n" + book, "", false},
		{"reasoning and text", "qwen3-0.6b", auto, true, nil, "<think>\nA <tool_call> or not.\n</think>\n\nNo.", "", false},
		{"reasoning without end", "qwen3-0.6b", auto, true, nil, "<think>\nA <tool_call>\n{\"name\": \"x", "", true},
		{"no reasoning", "qwen3-0.6b", auto, true, nil, book, "", false},
		{"no reasoning, text", "qwen3-0.6b", auto, true, nil, "<thin>", "", false},
		{"reasoning is tokens", "qwen3-0.6b", auto, true, thinks, "<think>\nA <tool_call> or not.\n</think>\n\n" + book, "", false},
		{"reasoning is tokens, none", "qwen3-0.6b", auto, true, thinks, "a\n" + book, "", false},
		{"all are tokens", "qwen3-0.6b", auto, true, slices.Concat(thinks, tags), "<think>\nA or not.\n</think>\n\n" + book, "", false},
		{"all are tokens, none", "qwen3-0.6b", auto, true, slices.Concat(thinks, tags), book, "", false},
		{"required after an empty block", "qwen3-0.6b", required, true, nil, "<think>", "hink>", false},
		{"open reasoning", "deepseek-r1-distill-llama", auto, true, nil, "A <tool_call> or\n</think>\n\n" + book, "", false},
		{"open reasoning, text", "deepseek-r1-distill-llama", auto, true, thinks, "A <tool_call> or\n</think>\n\nNo", "", false},
		{"llama text", "llama3.1", auto, true, nil, "Hello {\"name\"", "", false},
		{"llama JSON", "llama3.1", auto, true, nil, "{\"answer\": 42}", "", false},
		{"llama call", "llama3.1", auto, true, nil, llama, "", false},
		{"llama call with other spaces", "llama3.1", auto, true, nil, "\n{ \"name\":\"clock\", \"parameters\": {}}", "", false},
		{"llama unknown", "llama3.1", auto, true, nil, "{\"name\": \"Bob", "Bob", false},
		{"llama calls once", "llama3.1", auto, true, nil, llama + llama, llama, false},
		{"llama tag", "llama3.1", auto, true, []string{"<|python_tag|>"}, "<|python_tag|>" + llama, "", false},
		{"llama tag and text", "llama3.1", auto, true, []string{"<|python_tag|>"}, "<|python_tag|>print", "print", false},
		{"llama required", "llama3.1", required, true, []string{"<|python_tag|>"}, llama, "", false},
		{"llama required takes no text", "llama3.1", required, true, nil, "Hello", "Hello", false},
		{"llama named", "llama3.1", clock, true, nil, llama, "book\"" + strings.SplitN(llama, "book\"", 2)[1], false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := constrain(t, test.family, prompt.ChatOptions{Tools: json.RawMessage(bookingTools), ToolChoice: test.choice, ParallelToolCalls: test.parallel}, test.control...)
			taken, complete := c.accepts(t, test.text)
			if test.text[taken:] != test.stop {
				t.Fatalf("takes %q but not %q, which should be %q, of\n%s", test.text[:taken], test.text[taken:], test.stop, c.prompt.Constraint.Text)
			}
			if test.stop == "" && complete == test.unfinished {
				t.Errorf("may end: %v", complete)
			}
		})
	}
}

// A grammar holds what constrains arguments and nothing else; keywords that llguidance does not know are an error of
// strict tools only.
func TestArgumentSchemas(t *testing.T) {
	t.Parallel()
	const schema = `{"title": "T", "description": "a %json /x/i", "type": "object", "properties": {"title": {"type": "string", "description": "D", "default": "x"}, "n": {"type": "integer", "multipleOf": 2},
		"list": {"type": "array", "items": {"description": "I", "oneOf": [{"title": "A", "const": "a"}, {"const": "b"}]}, "uniqueItems": true}}, "required": ["title"], "$comment": "C"}`
	const want = `"type": "object", "properties": {"title": {"type": "string"}, "n": {"type": "integer", "multipleOf": 2}, ` +
		`"list": {"type": "array", "items": {"oneOf": [{"const": "a"}, {"const": "b"}]}, "uniqueItems": true}}, "required": ["title"], "additionalProperties": false}`
	options := func(strict string) prompt.ChatOptions {
		return prompt.ChatOptions{ToolChoice: required, Tools: json.RawMessage(`[{"type": "function", "function": {"name": "f", "strict": ` + strict + `, "parameters": ` + schema + `}}]`)}
	}
	for _, strict := range []string{"false", "null"} {
		c := constrain(t, "qwen2.5-instruct", options(strict))
		if !strings.HasSuffix(c.prompt.Constraint.Text, want+"\n") {
			t.Errorf("the grammar is\n%s\nexpected at its end\n%s", c.prompt.Constraint.Text, want)
		}
		text := "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"title\": \"北\", \"n\": 4, \"list\": [\"b\", \"a\"]}}\n</tool_call>"
		if taken, complete := c.accepts(t, text); taken != len(text) || !complete {
			t.Errorf("takes %q of %q", text[:taken], text)
		}
	}
	b, _ := chatModel(t, "qwen2.5-instruct")
	p, err := b.ChatPrompt(t.Context(), []wire.Message{user("Q")}, options("true"))
	if err != nil {
		t.Fatal(err)
	}
	refused := new(llguidance.GrammarError)
	if _, err := constrain(t, "qwen2.5-instruct", options("false")).tokenizer.New(p.Constraint.Kind, p.Constraint.Text); !errors.As(err, &refused) {
		t.Errorf("a strict tool with keywords that are not supported: %v", err)
	}
}

// Whatever the model picks, its calls are of tools, with arguments of their schemas.
func TestCallsAreValid(t *testing.T) {
	t.Parallel()
	var definitions []struct {
		Function struct {
			Name       string
			Parameters any
		}
	}
	if err := json.Unmarshal([]byte(bookingTools), &definitions); err != nil {
		t.Fatal(err)
	}
	schemas := map[string]*jsonschema.Schema{}
	for _, d := range definitions {
		if d.Function.Parameters == nil {
			d.Function.Parameters = map[string]any{"type": "object", "additionalProperties": false}
		}
		compiler := jsonschema.NewCompiler()
		if err := compiler.AddResource("schema.json", d.Function.Parameters); err != nil {
			t.Fatal(err)
		}
		schema, err := compiler.Compile("schema.json")
		if err != nil {
			t.Fatal(err)
		}
		schemas[d.Function.Name] = schema
	}
	for _, family := range families {
		called := 0
		for seed := range uint64(12) {
			choice := required
			if seed%3 == 0 && family != "deepseek-r1-distill-llama" {
				choice = auto
			}
			c := constrain(t, family, prompt.ChatOptions{Tools: json.RawMessage(bookingTools), ToolChoice: choice, ParallelToolCalls: true}, "<tool_call>", "</tool_call>")
			text, ended := c.walk(t, rand.New(rand.NewPCG(seed, 1)), choice == auto)
			m := read(c.prompt.NewParser(), text, nil)
			called += len(m.calls)
			if ended && choice == required && (len(m.calls) == 0 || m.text != "") {
				t.Errorf("%s: required, but %q is read as %+v", family, text, m)
			}
			for i, call := range m.calls {
				if !ended && i == len(m.calls)-1 {
					continue // cut off
				}
				arguments, err := jsonschema.UnmarshalJSON(strings.NewReader(call.arguments))
				if err != nil {
					t.Fatalf("%s: arguments %q of %q: %v", family, call.arguments, text, err)
				}
				if err := schemas[call.name].Validate(arguments); err != nil {
					t.Errorf("%s: call of %q: %v", family, call.name, err)
				}
			}
		}
		if called == 0 {
			t.Errorf("%s: no walk calls anything", family)
		}
	}
}

// walk picks allowed tokens at random, rather those that end something; an automatic choice begins with a call.
func (c constrained) walk(t *testing.T, random *rand.Rand, begin bool) (text string, ended bool) {
	t.Helper()
	if begin {
		text = "<tool_call>"
		if strings.Contains(c.prompt.Constraint.Text, "parameters") && !strings.Contains(c.prompt.Constraint.Text, "tool_call") && !strings.Contains(c.prompt.Constraint.Text, "<[") {
			text = `{"name": "`
		}
		if taken, _ := c.accepts(t, text); taken != len(text) {
			t.Fatalf("%q is not taken by\n%s", text, c.prompt.Constraint.Text)
		}
	}
	for range 600 {
		mask, err := c.constraint.Mask()
		if err != nil {
			t.Fatal(err)
		}
		var allowed []engine.Token
		for i := range c.vocabulary.VocabularySize() {
			if llguidance.Allowed(mask, engine.Token(i)) {
				allowed = append(allowed, engine.Token(i))
			}
		}
		token := allowed[random.IntN(len(allowed))]
		for _, end := range []engine.Token{256, '"', '}', ']'} {
			if slices.Contains(allowed, end) && random.IntN(3) == 0 {
				token = end
			}
		}
		if token == 256 {
			return text, true
		}
		text += string(c.vocabulary.Piece(token))
		if err := c.constraint.Accept(token); err != nil {
			t.Fatal(err)
		}
	}
	return text, false
}
