package prompt_test

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/prompt"
	"github.com/hone-llm/hone/internal/wire"
)

// call is an assistant's message that calls a tool.
func call(arguments string) wire.Message {
	return wire.Message{Role: "assistant", ToolCalls: []wire.ToolCall{{ID: "c1", Type: "function", Function: wire.FunctionCall{Name: "weather", Arguments: arguments}}}}
}

var (
	weather = json.RawMessage(`[{"type": "function", "function": {"name": "weather", "parameters": {}}}]`)
	sunny   = wire.Message{Role: "tool", ToolCallID: "c1", Content: "sunny"}
)

// Calls and the answers that follow from their results are trained, definitions and results are not.
func TestRowsWithTools(t *testing.T) {
	t.Parallel()
	b, v := model(t, "qwen2.5")
	chat := prompt.Chat{Messages: []wire.Message{user("Q"), call(`{"city": "北京", "days": 2.0}`), sunny, assistant("A")}, Tools: weather}
	rows, err := b.Rows(t.Context(), chat)
	if err != nil || len(rows) != 1 {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	want := []string{"<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"北京\", \"days\": 2.0}}\n</tool_call><|im_end|>", "A<|im_end|>"}
	if diff := cmp.Diff(want, trained(v, rows[0])); diff != "" {
		t.Errorf("trained (-want +got):\n%s", diff)
	}
	text := v.text(rows[0].Tokens)
	for _, part := range []string{"<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"weather\"", "<tool_response>\nsunny\n</tool_response>"} {
		if !strings.Contains(text, part) {
			t.Errorf("no %q in %q", part, text)
		}
	}
}

// A template that puts the arguments of a call into text takes them as the text that they come as.
func TestArgumentsAsText(t *testing.T) {
	t.Parallel()
	template := `{% for m in messages %}{{ m.role }}: {% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name + '(' + c.function.arguments + ')' }}{% endfor %}{% else %}{{ m.content }}{% endif %}</s>{% endfor %}` +
		`{% if add_generation_prompt %}assistant: {% endif %}`
	v := byteVocabulary{special: []string{"</s>"}, eos: "</s>", ends: []string{"</s>"}}
	b := builder(t, prompt.Options{Template: template, Vocabulary: v})
	rows, err := b.Rows(t.Context(), prompt.Chat{Messages: []wire.Message{user("Q"), call(`{"b":1, "a":2}`)}})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := trained(v, rows[0]), []string{`weather({"b":1, "a":2})</s>`}; !slices.Equal(got, want) {
		t.Errorf("trained are %q, expected %q", got, want)
	}
	if _, err := b.Rows(t.Context(), prompt.Chat{Messages: []wire.Message{user("Q"), call(`{`)}}); err == nil || !strings.Contains(err.Error(), "is not JSON") {
		t.Errorf("arguments that are no JSON: %v", err)
	}
}

// A model must not learn from a conversation without the tools that it had.
func TestToolsThatTheTemplateLeavesOut(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"smollm2", "llama3", "qwen3", "deepseek-r1-distill", "mistral"} {
		b, _ := model(t, name)
		for what, chat := range map[string]prompt.Chat{
			"does not write tools":      {Messages: []wire.Message{user("Q"), assistant("A")}, Tools: weather},
			"does not write tool_calls": {Messages: []wire.Message{user("Q"), call("{}"), user("R"), assistant("A")}},
			`role "tool"`:               {Messages: []wire.Message{user("Q"), assistant("A"), sunny, assistant("B")}},
		} {
			if strings.HasPrefix(what, "role") && (name == "smollm2" || name == "llama3") {
				continue // these write messages of every role
			}
			_, err := b.Rows(t.Context(), chat)
			var message *prompt.MessageError
			if !errors.As(err, &message) || !strings.Contains(err.Error(), what) {
				t.Errorf("%s: error is %v, expected %q", name, err, what)
			}
		}
	}
	b, _ := model(t, "qwen2.5")
	if _, err := b.Rows(t.Context(), prompt.Chat{Messages: []wire.Message{user("Q"), assistant("A")}, Tools: json.RawMessage(`{}`)}); err == nil {
		t.Error("tools that are no array are taken")
	}
	for _, none := range []string{"[]", "null"} {
		b, _ := model(t, "mistral")
		if _, err := b.Rows(t.Context(), prompt.Chat{Messages: []wire.Message{user("Q"), assistant("A")}, Tools: json.RawMessage(none)}); err != nil {
			t.Errorf("tools %s: %v", none, err)
		}
	}
}

// Answers and choices begin with the tokens that the model is asked with, and end where the objective needs it.
func TestAnswersAndChoices(t *testing.T) {
	t.Parallel()
	for _, name := range templates {
		b, v := model(t, name)
		chat := prompt.Chat{Messages: []wire.Message{user("Q")}}
		asked, err := b.Prompt(t.Context(), chat.Messages)
		if err != nil {
			t.Fatal(err)
		}
		answers, err := b.Answers(t.Context(), chat, assistant("yes"), assistant("no, never"))
		if err != nil {
			t.Fatal(err)
		}
		for i, text := range []string{"yes", "no, never"} {
			if !slices.Equal(answers[i].Tokens[:len(asked)], asked) {
				t.Errorf("%s: answer %d does not begin with the prompt", name, i)
			}
			if got := trained(v, answers[i]); len(got) != 1 || !strings.HasSuffix(got[0], text+v.eos) {
				t.Errorf("%s: answer %d trains %q", name, i, got)
			}
		}
		constrained, err := b.AnswerPrompt(t.Context(), chat.Messages)
		if err != nil {
			t.Fatal(err)
		}
		for _, test := range []struct{ choices, trained []string }{
			{[]string{"A", "B", "CD"}, []string{"A", "B", "CD"}},
			{[]string{"A", "B", "AB"}, []string{"A" + v.eos, "B" + v.eos, "AB" + v.eos}},
		} {
			rows, err := b.Choices(t.Context(), chat, test.choices)
			if err != nil {
				t.Fatal(err)
			}
			for i, r := range rows {
				if got := trained(v, r); !slices.Equal(got, test.trained[i:i+1]) {
					t.Errorf("%s: choice %q trains %q, expected %q", name, test.choices[i], got, test.trained[i])
				}
				if !slices.Equal(r.Tokens[:len(constrained)], constrained) {
					t.Errorf("%s: choice %q does not follow the prompt of a constrained answer", name, test.choices[i])
				}
			}
		}
	}
}

func TestCompletions(t *testing.T) {
	t.Parallel()
	v := byteVocabulary{special: []string{"<s>", "</s>"}, bos: "<s>", eos: "</s>", ends: []string{"</s>"}, addBOS: true, space: true}
	b := builder(t, prompt.Options{Vocabulary: v})
	show := func(r prompt.Row) []string { return append([]string{v.text(r.Tokens)}, trained(v, r)...) }
	rows, err := b.Completions("Q:", " A", "B")
	if err != nil {
		t.Fatal(err)
	}
	// SentencePiece's space stands before the prompt and before nothing else.
	if diff := cmp.Diff([][]string{{"<s> Q: A</s>", " A</s>"}, {"<s> Q:B</s>", "B</s>"}}, [][]string{show(rows[0]), show(rows[1])}); diff != "" {
		t.Errorf("completions (-want +got):\n%s", diff)
	}
	if rows, err = b.Completions("", "A</s>"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"<s> A</s>", " A</s>"}, show(rows[0])); diff != "" {
		t.Errorf("without a prompt (-want +got):\n%s", diff)
	}
	text, err := b.PlainText("once\nupon")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"<s> once\nupon</s>", " once\nupon</s>"}, show(text)); diff != "" {
		t.Errorf("text (-want +got):\n%s", diff)
	}
	if rows, err = b.CompletionChoices("Q:", " ", []string{"A", "B"}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"<s> Q: B", " B"}, show(rows[1])); diff != "" {
		t.Errorf("choice (-want +got):\n%s", diff)
	}
	if bos, ok := b.BOS(); !ok || bos != engine.Token(256) {
		t.Errorf("BOS is %d, %v", bos, ok)
	}
	if _, err := builder(t, prompt.Options{Vocabulary: byteVocabulary{}}).PlainText("x"); err == nil || !strings.Contains(err.Error(), "EOS") {
		t.Errorf("a vocabulary without EOS: %v", err)
	}
}

func TestDigestNamesTemplateAndVocabulary(t *testing.T) {
	t.Parallel()
	digest := func(template string, v byteVocabulary) string {
		t.Helper()
		d, err := builder(t, prompt.Options{Template: template, Vocabulary: v}).Digest()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := digest("x", byteVocabulary{})
	if first != digest("x", byteVocabulary{}) {
		t.Error("the same model has two digests")
	}
	for name, other := range map[string]string{
		"template": digest("y", byteVocabulary{}), "pieces": digest("x", byteVocabulary{special: []string{"</s>"}}),
		"spaces": digest("x", byteVocabulary{space: true}), "merges": digest("x", byteVocabulary{pairs: []string{"He"}}),
	} {
		if other == first {
			t.Errorf("another %s, the same digest", name)
		}
	}
}
