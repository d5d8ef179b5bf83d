package prompt_test

import (
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/prompt"
	"github.com/hone-llm/hone/internal/wire"
)

// prompts is testdata/prompts.json.
type prompts struct {
	Tokens        map[string][2]string
	Tools         json.RawMessage
	Conversations map[string][]wire.Message
	Cases         []struct {
		Template       string
		Conversation   string
		Tools          bool
		Continue       bool
		EnableThinking *bool `json:"enable_thinking"`
		Text           string
		Error          string
	}
}

func readPrompts(t testing.TB) prompts {
	t.Helper()
	data, err := os.ReadFile("testdata/prompts.json")
	if err != nil {
		t.Fatal(err)
	}
	var p prompts
	if err := json.Unmarshal(data, &p); err != nil {
		t.Fatal(err)
	}
	return p
}

// chatModel is one of the templates of prompts.json with a vocabulary of bytes and its special tokens.
func chatModel(t *testing.T, name string) (*prompt.Builder, byteVocabulary) {
	t.Helper()
	tokens := readPrompts(t).Tokens[name]
	v := byteVocabulary{bos: tokens[0], eos: tokens[1], ends: []string{tokens[1]}}
	for _, special := range []string{tokens[0], tokens[1], "<think>", "</think>"} {
		if special != "" && !slices.Contains(v.special, special) {
			v.special = append(v.special, special)
		}
	}
	return builder(t, prompt.Options{Template: template(t, name), Vocabulary: v}), v
}

// families are the templates with tools or reasoning that are tested.
var families = []string{"smollm2", "llama3.1", "qwen2.5-instruct", "qwen3-0.6b", "hermes", "deepseek-r1-distill-llama"}

// Prompts with tools, calls, results, reasoning, thinking on and off, and open turns are transformers', byte for byte.
func TestChatPromptIsTransformers(t *testing.T) {
	t.Parallel()
	p := readPrompts(t)
	models := map[string]*prompt.Builder{}
	vocabularies := map[string]byteVocabulary{}
	for _, name := range families {
		models[name], vocabularies[name] = chatModel(t, name)
	}
	for _, c := range p.Cases {
		o := prompt.ChatOptions{EnableThinking: c.EnableThinking, ContinueFinalMessage: c.Continue, ParallelToolCalls: true}
		if c.Tools {
			o.Tools = p.Tools
		}
		got, err := models[c.Template].ChatPrompt(t.Context(), p.Conversations[c.Conversation], o)
		what := []any{c.Template, c.Conversation, c.Tools, c.EnableThinking != nil && *c.EnableThinking, c.EnableThinking != nil}
		if c.Error != "" {
			if message := (*prompt.MessageError)(nil); !errors.As(err, &message) {
				t.Errorf("%v: error is %v, expected a *MessageError as transformers says %q", what, err, c.Error)
			}
			continue
		}
		if err != nil {
			t.Errorf("%v: %v", what, err)
			continue
		}
		want := c.Text
		if c.Template == "deepseek-r1-distill-llama" && c.EnableThinking != nil && !*c.EnableThinking && strings.HasSuffix(want, "<think>\n") {
			want += "\n</think>\n\n" // this template does not know enable_thinking: hone closes its block
		}
		if diff := cmp.Diff(want, vocabularies[c.Template].text(got.Tokens)); diff != "" {
			t.Errorf("%v (-transformers +hone):\n%s", what, diff)
		}
	}
}

func truth(b bool) *bool { return &b }

// What a template cannot write of tools is stated in the messages, in Hermes' form.
func TestStatedTools(t *testing.T) {
	t.Parallel()
	p := readPrompts(t)
	const statement = "You can call functions to answer the user. These are their signatures, within <tools></tools>:\n<tools>\n" +
		`{"type": "function", "function": {"name": "weather", "parameters": {}}}` + "\n</tools>\n\n" +
		"To call a function, answer with a JSON object of its name and arguments within <tool_call></tool_call>:\n" +
		"<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>\n" +
		"Its result comes within <tool_response></tool_response>."
	tests := []struct {
		name, template string
		conversation   []wire.Message
		tools          json.RawMessage
		want           string
	}{
		{"without a system message", "smollm2", []wire.Message{user("Q")}, weather,
			"<|im_start|>system\n" + statement + "<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"},
		{"after the system message", "smollm2", []wire.Message{{Role: "system", Content: "S"}, user("Q")}, weather,
			"<|im_start|>system\nS\n\n" + statement + "<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"},
		{"template without system messages", "mistral", []wire.Message{user("Q")}, weather, "<s>[INST] " + statement + "\n\nQ [/INST]"},
		{"template with calls but no definitions", "deepseek-r1-distill-llama", []wire.Message{user("Q")}, weather,
			"<｜begin▁of▁sentence｜>" + statement + "<｜User｜>Q<｜Assistant｜><think>\n"},
		{"history", "smollm2", []wire.Message{{Role: "system", Content: "S"}, user("Q"), call(`{"city":"北京","days":2.0}`), sunny, sunny, assistant("A"), user("R")}, nil,
			"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n" +
				"<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"北京\", \"days\": 2.0}}\n</tool_call><|im_end|>\n" +
				"<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nsunny\n</tool_response><|im_end|>\n" +
				"<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"},
		{"template's own form without definitions", "deepseek-r1-distill-llama", []wire.Message{user("Q"), call(`{"a": 1}`)}, nil,
			"<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"a\": 1}\n```<｜tool▁call▁end｜><｜Assistant｜><think>\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			load := chatModel
			if _, ok := p.Tokens[test.template]; !ok {
				load = model
			}
			b, v := load(t, test.template)
			got, err := b.ChatPrompt(t.Context(), test.conversation, prompt.ChatOptions{Tools: test.tools})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, v.text(got.Tokens)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// A template that cannot write some tools (this one knows no arrays, and needs descriptions) gets them as it can.
func TestToolsThatTheTemplateRefuses(t *testing.T) {
	t.Parallel()
	b, v := chatModel(t, "hermes")
	for parameters, want := range map[string]string{
		`{"type": "object", "properties": {"a": {"type": "string"}}}`:                             "f(a: str) - \n\n    Args:\n        a(str): ",
		`{"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}}}}`: "You can call functions to answer the user.",
	} {
		p, err := b.ChatPrompt(t.Context(), []wire.Message{user("Q")}, prompt.ChatOptions{Tools: json.RawMessage(`[{"type": "function", "function": {"name": "f", "parameters": ` + parameters + `}}]`)})
		if err != nil {
			t.Fatal(err)
		}
		if text := v.text(p.Tokens); !strings.Contains(text, want) || p.Constraint == nil {
			t.Errorf("no %q in %q", want, text)
		}
	}
}

// With tool_choice none the model is not told of tools.
func TestNoToolChoice(t *testing.T) {
	t.Parallel()
	for _, name := range families {
		b, v := chatModel(t, name)
		without, err := b.ChatPrompt(t.Context(), []wire.Message{user("Q")}, prompt.ChatOptions{})
		if err != nil {
			t.Fatal(err)
		}
		none, err := b.ChatPrompt(t.Context(), []wire.Message{user("Q")}, prompt.ChatOptions{Tools: weather, ToolChoice: child.ToolChoice{Mode: child.ToolNone}})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(without.Tokens, none.Tokens) || none.Constraint != nil {
			t.Errorf("%s: the prompt is %q, constraint %v", name, v.text(none.Tokens), none.Constraint)
		}
		text := "<tool_call>\n{\"name\": \"weather\", \"arguments\": {}}\n</tool_call>"
		if got := read(none.NewParser(), "hm</think>"+text, nil); len(got.calls) > 0 {
			t.Errorf("%s: a call is read: %v", name, got)
		}
	}
}

// The prompt of a constrained answer is AnswerPrompt's; so is that of an answer that must be a call.
func TestAnswerFollowsAnEmptyBlock(t *testing.T) {
	t.Parallel()
	for _, name := range append([]string{"llama3", "qwen3", "mistral", "deepseek-r1-distill"}, families...) {
		load := chatModel
		if !slices.Contains(families, name) {
			load = model
		}
		b, v := load(t, name)
		messages := []wire.Message{user("Q")}
		want, err := b.AnswerPrompt(t.Context(), messages)
		if err != nil {
			t.Fatal(err)
		}
		off := prompt.ChatOptions{EnableThinking: truth(false), Answer: true}
		for _, o := range []prompt.ChatOptions{{Answer: true}, {EnableThinking: truth(false)}, {ReasoningEffort: "none"}, off} {
			got, err := b.ChatPrompt(t.Context(), messages, o)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(got.Tokens, want) {
				t.Errorf("%s: %+v: %q, expected %q", name, o, v.text(got.Tokens), v.text(want))
			}
			if r := read(got.NewParser(), "<think>x", nil); r.reasoning != "" {
				t.Errorf("%s: %+v: reasoning %q", name, o, r.reasoning)
			}
		}
		must, err := b.ChatPrompt(t.Context(), messages, prompt.ChatOptions{Tools: weather, ToolChoice: child.ToolChoice{Mode: child.ToolRequired}})
		if err != nil {
			t.Fatal(err)
		}
		think := v.text(want[len(want)-min(len(want), 11):])
		if strings.Contains(think, "</think>") && !strings.HasSuffix(v.text(must.Tokens), "</think>\n\n") {
			t.Errorf("%s: a required call is asked for with %q", name, v.text(must.Tokens))
		}
	}
}

// Where a completion may think, its parser knows.
func TestWhereReasoningBegins(t *testing.T) {
	t.Parallel()
	thought := message{reasoning: "hm", text: "yes"}
	tests := []struct {
		template     string
		conversation []wire.Message
		options      prompt.ChatOptions
		completion   string
		want         message
	}{
		{"qwen3-0.6b", []wire.Message{user("Q")}, prompt.ChatOptions{}, "<think>\nhm\n</think>\n\nyes", thought},
		{"qwen3-0.6b", []wire.Message{user("Q")}, prompt.ChatOptions{}, "yes", message{text: "yes"}},
		{"qwen3-0.6b", []wire.Message{user("Q")}, prompt.ChatOptions{EnableThinking: truth(true)}, "<think>\nhm\n</think>\n\nyes", thought},
		{"qwen3-0.6b", []wire.Message{user("Q")}, prompt.ChatOptions{EnableThinking: truth(false)}, "yes <think>", message{text: "yes <think>"}},
		{"deepseek-r1-distill-llama", []wire.Message{user("Q")}, prompt.ChatOptions{}, "hm\n</think>\n\nyes", thought},
		{"deepseek-r1-distill-llama", []wire.Message{user("Q")}, prompt.ChatOptions{EnableThinking: truth(true)}, "hm\n</think>\n\nyes", thought},
		{"deepseek-r1-distill-llama", []wire.Message{user("Q"), assistant("<think>\nso")}, prompt.ChatOptions{ContinueFinalMessage: true}, " hm</think>yes", message{reasoning: "hm", text: "yes"}},
		{"qwen3-0.6b", []wire.Message{user("Q"), assistant("so")}, prompt.ChatOptions{ContinueFinalMessage: true}, "<think>yes", message{text: "<think>yes"}},
		{"smollm2", []wire.Message{user("Q")}, prompt.ChatOptions{}, "<think>\nhm\n</think>\n\nyes", message{text: "<think>\nhm\n</think>\n\nyes"}},
		{"llama3.1", []wire.Message{user("Q")}, prompt.ChatOptions{}, "<think>hm</think>yes", message{text: "<think>hm</think>yes"}},
	}
	for _, test := range tests {
		b, _ := chatModel(t, test.template)
		p, err := b.ChatPrompt(t.Context(), test.conversation, test.options)
		if err != nil {
			t.Fatal(err)
		}
		if got := read(p.NewParser(), test.completion, nil); !cmp.Equal(got, test.want, cmp.AllowUnexported(message{})) {
			t.Errorf("%s, %+v, %q: %+v, expected %+v", test.template, test.options, test.completion, got, test.want)
		}
	}
}

// reasoning_effort reaches a template that has it.
func TestReasoningEffort(t *testing.T) {
	t.Parallel()
	v := byteVocabulary{special: []string{"</s>"}, eos: "</s>", ends: []string{"</s>"}}
	b := builder(t, prompt.Options{Vocabulary: v, Template: `{{ reasoning_effort | default('medium') }}: {% for m in messages %}{{ m.content }}{% endfor %}`})
	for effort, want := range map[string]string{"": "medium: Q", "high": "high: Q"} {
		p, err := b.ChatPrompt(t.Context(), []wire.Message{user("Q")}, prompt.ChatOptions{ReasoningEffort: effort})
		if err != nil || v.text(p.Tokens) != want {
			t.Errorf("effort %q: %v, expected %q", effort, err, want)
		}
	}
}

func TestRefusedChats(t *testing.T) {
	t.Parallel()
	tools := func(function string) json.RawMessage {
		return json.RawMessage(`[{"type": "function", "function": ` + function + `}]`)
	}
	must := child.ToolChoice{Mode: child.ToolRequired}
	tests := []struct {
		name     string
		messages []wire.Message
		options  prompt.ChatOptions
		param    string
		want     string
	}{
		{"no messages", nil, prompt.ChatOptions{}, "", "no messages"},
		{"tools that are no array", []wire.Message{user("Q")}, prompt.ChatOptions{Tools: json.RawMessage(`{}`)}, "tools", "expected an array"},
		{"another type of tool", []wire.Message{user("Q")}, prompt.ChatOptions{Tools: json.RawMessage(`[{"type": "web_search"}]`)}, "tools", `tools[0].type is "web_search"`},
		{"no name", []wire.Message{user("Q")}, prompt.ChatOptions{Tools: tools(`{}`)}, "tools", "tools[0].function.name"},
		{"two of a name", []wire.Message{user("Q")}, prompt.ChatOptions{Tools: json.RawMessage(`[{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "f"}}]`)}, "tools", "another tool has this name"},
		{"arguments of another type", []wire.Message{user("Q")}, prompt.ChatOptions{Tools: tools(`{"name": "f", "parameters": {"type": "array"}}`)}, "tools", `parameters of "f"`},
		{"a schema that is none", []wire.Message{user("Q")}, prompt.ChatOptions{Tools: tools(`{"name": "f", "parameters": []}`)}, "tools", `parameters of "f"`},
		{"required without tools", []wire.Message{user("Q")}, prompt.ChatOptions{ToolChoice: must}, "tool_choice", "there are no tools"},
		{"an unknown function", []wire.Message{user("Q")}, prompt.ChatOptions{Tools: weather, ToolChoice: child.ToolChoice{Mode: child.ToolFunction, Name: "g"}}, "tool_choice", `"g"`},
		{"an unknown mode", []wire.Message{user("Q")}, prompt.ChatOptions{Tools: weather, ToolChoice: child.ToolChoice{Mode: "always"}}, "tool_choice", `"always"`},
		{"required and constrained", []wire.Message{user("Q")}, prompt.ChatOptions{Tools: weather, ToolChoice: must, Answer: true}, "tool_choice", "only one of the two"},
		{"calls of a user", []wire.Message{{Role: "user", ToolCalls: call("{}").ToolCalls}}, prompt.ChatOptions{}, "", `messages[0]: tool_calls in a message of role "user"`},
		{"arguments that are no JSON", []wire.Message{user("Q"), call("{")}, prompt.ChatOptions{}, "", "messages[1]: tool_calls[0].function.arguments is not JSON"},
		{"nothing to continue", []wire.Message{user("Q")}, prompt.ChatOptions{ContinueFinalMessage: true}, "", "the last message must be the assistant's"},
		{"a call to continue", []wire.Message{user("Q"), call("{}")}, prompt.ChatOptions{ContinueFinalMessage: true}, "", "no text to continue"},
	}
	for _, name := range []string{"smollm2", "qwen3-0.6b", "llama3.1"} {
		for _, test := range tests {
			b, _ := chatModel(t, name)
			_, err := b.ChatPrompt(t.Context(), test.messages, test.options)
			message := new(prompt.MessageError)
			if !errors.As(err, &message) || !strings.Contains(err.Error(), test.want) || message.Param != test.param {
				t.Errorf("%s, %s: error is %v (param %q), expected a *MessageError with %q (param %q)", name, test.name, err, message.Param, test.want, test.param)
			}
		}
	}
	b := builder(t, prompt.Options{Vocabulary: byteVocabulary{}})
	if _, err := b.ChatPrompt(t.Context(), []wire.Message{user("Q")}, prompt.ChatOptions{}); !errors.Is(err, prompt.ErrNoTemplate) {
		t.Errorf("without a template: %v", err)
	}
}
