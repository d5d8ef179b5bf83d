package prompt_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hone-llm/hone/internal/prompt"
	"github.com/hone-llm/hone/internal/wire"
	"pgregory.net/rapid"
)

// message is what a parser's deltas come to.
type message struct {
	text, reasoning string
	calls           []calledTool
}

type calledTool struct{ name, arguments string }

// read gives a completion to a parser, cut at the given places, and checks the order of its deltas.
func read(p *prompt.Parser, completion string, cuts []int) message {
	var m message
	ids := map[string]bool{}
	take := func(deltas []prompt.Delta) {
		for _, d := range deltas {
			m.text += d.Text
			m.reasoning += d.Reasoning
			if d.Text == "" && d.Reasoning == "" && len(d.ToolCalls) == 0 {
				panic("an empty delta")
			}
			for _, c := range d.ToolCalls {
				switch {
				case c.ID != "" || c.Name != "":
					if c.Index != len(m.calls) || !strings.HasPrefix(c.ID, "call_") || c.Name == "" || ids[c.ID] {
						panic(fmt.Sprintf("call %d begins with %+v", len(m.calls), c))
					}
					ids[c.ID] = true
					m.calls = append(m.calls, calledTool{c.Name, c.Arguments})
				case c.Index != len(m.calls)-1:
					panic(fmt.Sprintf("after call %d comes %+v", len(m.calls)-1, c))
				default:
					m.calls[c.Index].arguments += c.Arguments
				}
			}
		}
	}
	at := 0
	for _, cut := range cuts {
		take(p.Add(completion[at:cut]))
		at = cut
	}
	take(p.Add(completion[at:]))
	take(p.End())
	if p.Called() != (len(m.calls) > 0) {
		panic("Called is wrong")
	}
	return m
}

const tools = `[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}},
	{"type": "function", "function": {"name": "clock"}}]`

// parserOf returns makers of parsers for completions of a family's prompt.
func parserOf(t *testing.T, template string) func() *prompt.Parser {
	t.Helper()
	b, _ := chatModel(t, template)
	p, err := b.ChatPrompt(t.Context(), []wire.Message{user("Q")}, prompt.ChatOptions{Tools: json.RawMessage(tools), ParallelToolCalls: true})
	if err != nil {
		t.Fatal(err)
	}
	return p.NewParser
}

const hermesWeather = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"北京\", \"days\": 2}}\n</tool_call>"

var weatherCall = calledTool{"weather", `{"city": "北京", "days": 2}`}

// completions are texts that models of a family may write, and how they are read.
var completions = map[string][]struct {
	name, text string
	want       message
}{
	"qwen2.5-instruct": {
		{"text", "Hello <b>\n", message{text: "Hello <b>\n"}},
		{"nothing", "", message{}},
		{"a call", hermesWeather, message{calls: []calledTool{weatherCall}}},
		{"text and a call", "Let me see.\n" + hermesWeather, message{text: "Let me see.", calls: []calledTool{weatherCall}}},
		{"several calls", hermesWeather + "\n<tool_call>\n{\"name\": \"clock\", \"arguments\": {}}\n</tool_call>\n" + hermesWeather + "\n",
			message{calls: []calledTool{weatherCall, {"clock", "{}"}, weatherCall}}},
		{"text after a call", hermesWeather + "\nDone.", message{text: "\nDone.", calls: []calledTool{weatherCall}}},
		{"on one line", `<tool_call>{"name":"weather","arguments":{"city":"}{"}}</tool_call>`, message{calls: []calledTool{{"weather", `{"city":"}{"}`}}}},
		{"braces, tags and quotes in strings", "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"\\\"}</tool_call>{\\\\\"}}\n</tool_call>",
			message{calls: []calledTool{{"weather", `{"city": "\"}</tool_call>{\\"}`}}}},
		{"nested arguments", "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"a\": [{\"b\": {}}, [\"]\"]], \"c\": {\"d\": null}}}\n</tool_call>",
			message{calls: []calledTool{{"weather", `{"a": [{"b": {}}, ["]"]], "c": {"d": null}}`}}}},
		{"arguments first", "<tool_call>{\"arguments\": {\"city\": \"上海\"}, \"name\": \"weather\"}</tool_call>", message{calls: []calledTool{{"weather", `{"city": "上海"}`}}}},
		{"parameters", "<tool_call>{\"name\": \"weather\", \"parameters\": {\"days\": 1}}</tool_call>", message{calls: []calledTool{{"weather", `{"days": 1}`}}}},
		{"arguments as text", `<tool_call>{"name": "weather", "arguments": "{\"days\": 1}"}</tool_call>`, message{calls: []calledTool{{"weather", `{"days": 1}`}}}},
		{"no arguments", `<tool_call>{"name": "clock"}</tool_call>`, message{calls: []calledTool{{"clock", "{}"}}}},
		{"without the closing tag", "<tool_call>\n{\"name\": \"clock\", \"arguments\": {}}", message{calls: []calledTool{{"clock", "{}"}}}},
		{"the next tag instead of the closing one", "<tool_call>{\"name\": \"clock\", \"arguments\": {}}<tool_call>{\"name\": \"clock\", \"arguments\": {}}</tool_call>",
			message{calls: []calledTool{{"clock", "{}"}, {"clock", "{}"}}}},
		{"no JSON", "x <tool_call>\nweather(\"北京\")\n</tool_call> y", message{text: "x <tool_call>\nweather(\"北京\")\n</tool_call> y"}},
		{"an unknown name", "<tool_call>\n{\"name\": \"rm\", \"arguments\": {}}\n</tool_call>", message{text: "<tool_call>\n{\"name\": \"rm\", \"arguments\": {}}\n</tool_call>"}},
		{"arguments that are no object", "<tool_call>{\"name\": \"clock\", \"arguments\": [1]}</tool_call>", message{text: "<tool_call>{\"name\": \"clock\", \"arguments\": [1]}</tool_call>"}},
		{"an object with a newline in a string", "<tool_call>{\"name\": \"cl\nock\"}</tool_call>", message{text: "<tool_call>{\"name\": \"cl\nock\"}</tool_call>"}},
		{"a newline in arguments", "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"a\nb\"}}\n</tool_call>\n" + hermesWeather,
			message{calls: []calledTool{{"weather", "{\"city\": \"a\nb\"}}"}, weatherCall}}},
		{"a call in an unfinished call", "<tool_call>\n" + hermesWeather, message{text: "<tool_call>", calls: []calledTool{weatherCall}}},
		{"cut in the tag", "so <tool_", message{text: "so <tool_"}},
		{"cut before the object", "<tool_call>\n", message{text: "<tool_call>\n"}},
		{"cut in the name", "<tool_call>\n{\"name\": \"wea", message{text: "<tool_call>\n{\"name\": \"wea"}},
		{"cut in the arguments", "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"北", message{calls: []calledTool{{"weather", `{"city": "北`}}}},
		{"cut after the arguments", "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"北\"}", message{calls: []calledTool{{"weather", `{"city": "北"}`}}}},
		{"cut in the closing tag", "<tool_call>\n{\"name\": \"clock\", \"arguments\": {}}\n</tool_", message{calls: []calledTool{{"clock", "{}"}}}},
		{"JSON in the text", "{\"name\": \"weather\", \"arguments\": {}}", message{text: "{\"name\": \"weather\", \"arguments\": {}}"}},
	},
	"qwen3-0.6b": {
		{"reasoning and a call", "<think>\nThey ask <tool_call>.\n</think>\n\n" + hermesWeather, message{reasoning: "They ask <tool_call>.", calls: []calledTool{weatherCall}}},
		{"reasoning, text and a call", "<think>\nHm.\n\nSo.\n</think>\n\nSee:\n" + hermesWeather, message{reasoning: "Hm.\n\nSo.", text: "See:", calls: []calledTool{weatherCall}}},
		{"an empty block", "<think>\n\n</think>\n\nYes.", message{text: "Yes."}},
		{"no block", "Yes. <think>", message{text: "Yes. <think>"}},
		{"cut in the block", "<think>\nHm. </thin", message{reasoning: "Hm. </thin"}},
		{"cut in the beginning", "<thin", message{text: "<thin"}},
		{"white space alone", " \n", message{text: " \n"}},
	},
	"deepseek-r1-distill-llama": {
		{"reasoning", "Okay.\n</think>\n\nYes.", message{reasoning: "Okay.", text: "Yes."}},
		{"a call in stated form", "Okay.\n</think>\n\n" + hermesWeather, message{reasoning: "Okay.", calls: []calledTool{weatherCall}}},
	},
	"llama3.1": {
		{"text", "Hello {", message{text: "Hello {"}},
		{"a call", `{"name": "weather", "parameters": {"city": "北京", "days": 2}}`, message{calls: []calledTool{weatherCall}}},
		{"with the tag", `<|python_tag|>{"name": "weather", "parameters": {"city": "北京", "days": 2}}`, message{calls: []calledTool{weatherCall}}},
		{"with a type", `{"type": "function", "name": "weather", "parameters": {"city": "北京", "days": 2}}`, message{calls: []calledTool{weatherCall}}},
		{"parameters first", `{"parameters": {"city": "北京", "days": 2}, "name": "weather"}`, message{calls: []calledTool{weatherCall}}},
		{"several", `{"name": "weather", "parameters": {"city": "北京", "days": 2}}; {"name": "clock", "parameters": {}}`, message{calls: []calledTool{weatherCall, {"clock", "{}"}}}},
		{"white space around", "\n{\"name\": \"clock\", \"parameters\": {}}\n", message{calls: []calledTool{{"clock", "{}"}}}},
		{"built-in form", `<|python_tag|>weather.call(city="北京, \"(x)\"", days=2)`, message{calls: []calledTool{{"weather", `{"city": "北京, \"(x)\"", "days": 2}`}}}},
		{"built-in form without arguments", `<|python_tag|>clock.call()`, message{calls: []calledTool{{"clock", `{}`}}}},
		{"Python", "<|python_tag|>print(1)", message{text: "<|python_tag|>print(1)"}},
		{"an unknown built-in", `<|python_tag|>brave_search.call(query="x")`, message{text: `<|python_tag|>brave_search.call(query="x")`}},
		{"an answer in JSON", "{\"answer\": 42}", message{text: "{\"answer\": 42}"}},
		{"an answer that has a name", "{\"name\": \"Bob\", \"age\": 3}", message{text: "{\"name\": \"Bob\", \"age\": 3}"}},
		{"an unknown function", "{\"name\": \"rm\", \"parameters\": {}}", message{text: "{\"name\": \"rm\", \"parameters\": {}}"}},
		{"cut in the name", "{\"name\": \"wea", message{text: "{\"name\": \"wea"}},
		{"cut in the parameters", "{\"name\": \"weather\", \"parameters\": {\"city\": \"北", message{calls: []calledTool{{"weather", `{"city": "北`}}}},
		{"Python code that begins like JSON", "{1: 2}", message{text: "{1: 2}"}},
		{"text after a call", "{\"name\": \"clock\", \"parameters\": {}} ok", message{text: " ok", calls: []calledTool{{"clock", "{}"}}}},
		{"white space alone", "  ", message{text: "  "}},
	},
}

func TestParser(t *testing.T) {
	t.Parallel()
	for _, family := range slices.Sorted(maps.Keys(completions)) {
		newParser := parserOf(t, family)
		for _, c := range completions[family] {
			t.Run(family+"/"+c.name, func(t *testing.T) {
				if diff := cmp.Diff(c.want, read(newParser(), c.text, nil), cmp.AllowUnexported(message{}, calledTool{})); diff != "" {
					t.Errorf("%q (-want +got):\n%s", c.text, diff)
				}
				for cut := range len(c.text) { // each byte by itself
					if got := read(newParser(), c.text, []int{cut}); !cmp.Equal(got, c.want, cmp.AllowUnexported(message{}, calledTool{})) {
						t.Errorf("cut at %d: %+v", cut, got)
					}
				}
			})
		}
	}
}

// However a text is cut into parts, the deltas come to the same message, and none of a text without tags is lost.
func TestPartsDoNotMatter(t *testing.T) {
	t.Parallel()
	var fragments []string
	parsers := map[string]func() *prompt.Parser{}
	for family, list := range completions {
		parsers[family] = parserOf(t, family)
		for _, c := range list {
			fragments = append(fragments, c.text)
		}
	}
	slices.Sort(fragments)
	fragments = append(fragments, "<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "{", "}", "\"", "\\", "\n", " ", ";", "<", "北", `{"name": "clock", "arguments": {`)
	families := slices.Sorted(maps.Keys(parsers))
	rapid.Check(t, func(t *rapid.T) {
		newParser := parsers[rapid.SampledFrom(families).Draw(t, "family")]
		text := strings.Join(rapid.SliceOfN(rapid.SampledFrom(fragments), 0, 4).Draw(t, "text"), "")
		if n := len(text); n > 0 && rapid.Bool().Draw(t, "cut off") {
			text = strings.ToValidUTF8(text[:rapid.IntRange(0, n).Draw(t, "end")], "")
		}
		cuts := rapid.SliceOfN(rapid.IntRange(0, len(text)), 0, 20).Draw(t, "cuts")
		slices.Sort(cuts)
		whole, parts := read(newParser(), text, nil), read(newParser(), text, cuts)
		if diff := cmp.Diff(whole, parts, cmp.AllowUnexported(message{}, calledTool{})); diff != "" {
			t.Fatalf("%q in parts at %v (-whole +parts):\n%s", text, cuts, diff)
		}
		// What is not white space or a tag is somewhere.
		if !strings.Contains(text, "tool_call") && !strings.Contains(text, "{") && len(whole.calls) == 0 {
			bare := func(s string) string {
				return strings.NewReplacer("<think>", "", "</think>", "", " ", "", "\n", "").Replace(s)
			}
			if want, got := bare(text), bare(whole.reasoning+whole.text); want != got {
				t.Fatalf("%q is read as %q", want, got)
			}
		}
	})
}

// A call that the template writes is read as the same call.
func TestRenderedCallsAreRead(t *testing.T) {
	t.Parallel()
	value := rapid.OneOf(
		rapid.Map(rapid.StringOf(rapid.RuneFrom([]rune("ab \"\\{}[]<>/\n\té北京，。𝄞"))), func(s string) any { return s }),
		rapid.Map(rapid.IntRange(-1e6, 1e6), func(i int) any { return i }),
		rapid.SampledFrom([]any{true, false, nil, 1.5, []any{}, map[string]any{}, "</tool_call>", "<tool_call>", []any{"}", map[string]any{"{": "]"}}}),
	)
	for _, family := range []string{"llama3.1", "qwen2.5-instruct", "qwen3-0.6b", "hermes", "smollm2"} {
		b, v := chatModel(t, family)
		newParser := parserOf(t, family)
		rapid.Check(t, func(t *rapid.T) {
			names := rapid.SliceOfN(rapid.SampledFrom([]string{"weather", "clock"}), 1, 3).Draw(t, "names")
			if family == "llama3.1" {
				names = names[:1]
			}
			m := wire.Message{Role: "assistant"}
			for _, name := range names {
				arguments := rapid.MapOfN(rapid.StringMatching(`[a-z{"]{1,3}`), value, 0, 3).Draw(t, "arguments")
				text, err := json.Marshal(arguments)
				if err != nil {
					t.Fatal(err)
				}
				m.ToolCalls = append(m.ToolCalls, wire.ToolCall{Type: "function", Function: wire.FunctionCall{Name: name, Arguments: string(text)}})
			}
			o := prompt.ChatOptions{Tools: json.RawMessage(tools)}
			before, err := b.ChatPrompt(t.Context(), []wire.Message{user("Q")}, o)
			if err != nil {
				t.Fatal(err)
			}
			after, err := b.ChatPrompt(t.Context(), []wire.Message{user("Q"), m, user("R")}, o)
			if err != nil {
				t.Fatal(err)
			}
			completion, ok := strings.CutPrefix(v.text(after.Tokens), v.text(before.Tokens))
			if !ok {
				t.Fatalf("%q does not go on with %q", v.text(after.Tokens), v.text(before.Tokens))
			}
			completion, _, _ = strings.Cut(completion, v.eos)
			got := read(newParser(), completion, nil)
			if got.text != "" || len(got.calls) != len(names) {
				t.Fatalf("%q is read as %+v", completion, got)
			}
			for i, c := range got.calls {
				var want, have any
				if json.Unmarshal([]byte(m.ToolCalls[i].Function.Arguments), &want) != nil || json.Unmarshal([]byte(c.arguments), &have) != nil ||
					c.name != names[i] || !cmp.Equal(want, have) {
					t.Fatalf("call %d of %q is read as %+v", i, completion, c)
				}
			}
		})
	}
}

// Arguments are passed on as they come.
func TestArgumentsStream(t *testing.T) {
	t.Parallel()
	p := parserOf(t, "qwen2.5-instruct")()
	var shown []string
	for _, part := range []string{"<tool", "_call>\n{\"name\": \"weath", "er\", \"arguments\": ", "{\"city\"", ": \"北", "京\"}", "}\n</tool_call>"} {
		var now string
		for _, d := range p.Add(part) {
			for _, c := range d.ToolCalls {
				now += c.Name + c.Arguments
			}
		}
		shown = append(shown, now)
	}
	if diff := cmp.Diff([]string{"", "", "", `weather{"city"`, `: "北`, `京"}`, ""}, shown); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
