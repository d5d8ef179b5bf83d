package prompt_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/prompt"
	"github.com/hone-llm/hone/internal/wire"
)

// byteVocabulary is a small vocabulary: the 256 bytes, then special tokens, then pairs that BPE would merge.
type byteVocabulary struct {
	special  []string
	pairs    []string
	bos, eos string // names in special; "" for none
	ends     []string
	addBOS   bool
	space    bool // puts a space before a text and after a special token, as SentencePiece in llama.cpp does
}

func (v byteVocabulary) Tokenize(text string, addSpecial, parseSpecial bool) ([]engine.Token, error) {
	var tokens []engine.Token
	if bos, ok := v.BOS(); ok && addSpecial && v.addBOS {
		tokens = append(tokens, bos)
	}
	afterSpecial := true
next:
	for text != "" {
		if parseSpecial {
			for i, name := range v.special {
				if rest, ok := strings.CutPrefix(text, name); ok {
					tokens = append(tokens, engine.Token(256+i))
					text, afterSpecial = rest, true
					continue next
				}
			}
		}
		if afterSpecial && v.space {
			tokens = append(tokens, ' ')
		}
		afterSpecial = false
		for i, pair := range v.pairs {
			if rest, ok := strings.CutPrefix(text, pair); ok {
				tokens = append(tokens, engine.Token(256+len(v.special)+i))
				text = rest
				continue next
			}
		}
		tokens = append(tokens, engine.Token(text[0]))
		text = text[1:]
	}
	return tokens, nil
}

func (v byteVocabulary) Piece(token engine.Token) []byte {
	switch t := int(token) - 256; {
	case t < 0:
		return []byte{byte(token)}
	case t < len(v.special):
		return []byte(v.special[t])
	default:
		return []byte(v.pairs[t-len(v.special)])
	}
}

func (v byteVocabulary) IsEndOfGeneration(token engine.Token) bool {
	return int(token) >= 256 && slices.Contains(v.ends, string(v.Piece(token)))
}

func (v byteVocabulary) named(name string) (engine.Token, bool) {
	i := slices.Index(v.special, name)
	return engine.Token(256 + i), i >= 0
}

func (v byteVocabulary) BOS() (engine.Token, bool) { return v.named(v.bos) }
func (v byteVocabulary) EOS() (engine.Token, bool) { return v.named(v.eos) }
func (v byteVocabulary) AddBOS() bool              { return v.addBOS }
func (v byteVocabulary) VocabularySize() int       { return 256 + len(v.special) + len(v.pairs) }

func (v byteVocabulary) text(tokens []engine.Token) string {
	var b bytes.Buffer
	for _, t := range tokens {
		b.Write(v.Piece(t))
	}
	return b.String()
}

// golden is testdata/rendered.json.
type golden struct {
	Tokens        map[string][2]string
	Conversations map[string][]wire.Message
	Tools         map[string]json.RawMessage // of the conversations that have some
	Cases         []struct {
		Template         string
		Conversation     string
		GenerationPrompt bool `json:"generation_prompt"`
		Text             string
		Error            string
	}
}

func readGolden(t *testing.T) golden {
	t.Helper()
	data, err := os.ReadFile("testdata/rendered.json")
	if err != nil {
		t.Fatal(err)
	}
	var g golden
	if err := json.Unmarshal(data, &g); err != nil {
		t.Fatal(err)
	}
	return g
}

// model is one of testdata's templates with a vocabulary that has its special tokens.
func model(t *testing.T, name string) (*prompt.Builder, byteVocabulary) {
	t.Helper()
	tokens := readGolden(t).Tokens[name]
	v := byteVocabulary{bos: tokens[0], eos: tokens[1], ends: []string{tokens[1]}}
	for _, special := range []string{tokens[0], tokens[1], "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
		"<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"} {
		if special != "" && !slices.Contains(v.special, special) {
			v.special = append(v.special, special)
		}
	}
	return builder(t, prompt.Options{Template: template(t, name), Vocabulary: v}), v
}

func template(t testing.TB, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name+".jinja"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func builder(t *testing.T, o prompt.Options) *prompt.Builder {
	t.Helper()
	b, err := prompt.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

var templates = []string{"smollm2", "llama3", "qwen2.5", "qwen3", "deepseek-r1-distill", "mistral"}

// Every template renders every conversation as transformers does, or refuses it as it does.
func TestTextIsTransformersText(t *testing.T) {
	t.Parallel()
	g := readGolden(t)
	for _, c := range g.Cases {
		t.Run(fmt.Sprintf("%s/%s/%v", c.Template, c.Conversation, c.GenerationPrompt), func(t *testing.T) {
			b, _ := model(t, c.Template)
			text, err := prompt.Render(b, t.Context(), prompt.Chat{Messages: g.Conversations[c.Conversation], Tools: g.Tools[c.Conversation]}, c.GenerationPrompt)
			if c.Error != "" {
				var message *prompt.MessageError
				if !errors.As(err, &message) {
					t.Fatalf("error is %v (%q), want a *MessageError as Jinja2 says %q", err, text, c.Error)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.Text, text); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func user(text string) wire.Message      { return wire.Message{Role: "user", Content: text} }
func assistant(text string) wire.Message { return wire.Message{Role: "assistant", Content: text} }
func weighted(text string, weight float64) wire.Message {
	return wire.Message{Role: "assistant", Content: text, Weight: &weight}
}

// trained returns the texts of the runs of tokens with weight 1.
func trained(v byteVocabulary, r prompt.Row) []string {
	var runs []string
	for start := 0; start < len(r.Tokens); {
		end := start
		for end < len(r.Tokens) && r.Weights[end] == r.Weights[start] {
			end++
		}
		if r.Weights[start] != 0 {
			runs = append(runs, v.text(r.Tokens[start:end]))
		}
		start = end
	}
	return runs
}

func TestRows(t *testing.T) {
	t.Parallel()
	type row struct {
		Text    string
		Trained []string
	}
	tests := []struct {
		name     string
		template string
		messages []wire.Message
		want     []row
	}{
		{"one turn", "qwen3", []wire.Message{user("Q"), assistant("A")},
			[]row{{"<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA<|im_end|>", []string{"<think>\n\n</think>\n\nA<|im_end|>"}}}},
		{"chinese", "llama3", []wire.Message{user("中国的首都是哪里？"), assistant("北京。")},
			[]row{{"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n中国的首都是哪里？<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n北京。<|eot_id|>",
				[]string{"北京。<|eot_id|>"}}}},
		{"all turns by default", "llama3", []wire.Message{user("Q"), assistant("A"), user("R"), assistant("B")},
			[]row{{"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>" +
				"<|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>", []string{"A<|eot_id|>", "B<|eot_id|>"}}}},
		{"weight 0 at the end cuts the row", "llama3", []wire.Message{user("Q"), weighted("A", 1), user("R"), weighted("B", 0), user("S")},
			[]row{{"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>", []string{"A<|eot_id|>"}}}},
		{"weight 0 in the middle", "llama3", []wire.Message{user("Q"), weighted("A", 0), user("R"), weighted("B", 1)},
			[]row{{"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>" +
				"<|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>", []string{"B<|eot_id|>"}}}},
		{"no newline after the turn is trained", "smollm2", []wire.Message{{Role: "system", Content: "S"}, user("Q"), assistant("A"), user("R"), assistant("B")},
			[]row{{"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB<|im_end|>",
				[]string{"A<|im_end|>", "B<|im_end|>"}}}},
		{"the end of a turn in the answer", "smollm2", []wire.Message{{Role: "system", Content: "S"}, user("Q"), assistant("A<|im_end|>B")},
			[]row{{"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>B<|im_end|>", []string{"A<|im_end|>B<|im_end|>"}}}},
		{"empty answer", "smollm2", []wire.Message{{Role: "system", Content: "S"}, user("Q"), assistant("")},
			[]row{{"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<|im_end|>", []string{"<|im_end|>"}}}},
		{"think block that the generation prompt opens", "deepseek-r1-distill", []wire.Message{user("Q"), assistant("A")},
			[]row{{"<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜><think>\n\n</think>\n\nA<｜end▁of▁sentence｜>", []string{"\n</think>\n\nA<｜end▁of▁sentence｜>"}}}},
		{"reasoning in the answer", "deepseek-r1-distill", []wire.Message{user("Q"), assistant("<think>\nBecause.\n</think>\n\nA")},
			[]row{{"<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜><think>\nBecause.\n</think>\n\nA<｜end▁of▁sentence｜>", []string{"Because.\n</think>\n\nA<｜end▁of▁sentence｜>"}}}},
		{"empty reasoning in the answer", "deepseek-r1-distill", []wire.Message{user("Q"), assistant("<think></think>A")},
			[]row{{"<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜><think>\n\n</think>\n\nA<｜end▁of▁sentence｜>", []string{"\n</think>\n\nA<｜end▁of▁sentence｜>"}}}},
		{"reasoning that the template writes itself", "qwen3", []wire.Message{user("Q"), assistant("<think>\nBecause.\n</think>\n\nA")},
			[]row{{"<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\nBecause.\n</think>\n\nA<|im_end|>", []string{"<think>\nBecause.\n</think>\n\nA<|im_end|>"}}}},
		{"a row for each turn where earlier ones lose their block", "deepseek-r1-distill", []wire.Message{user("Q"), assistant("A"), user("R"), assistant("B")},
			[]row{
				{"<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜><think>\n\n</think>\n\nA<｜end▁of▁sentence｜>", []string{"\n</think>\n\nA<｜end▁of▁sentence｜>"}},
				{"<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜>A<｜end▁of▁sentence｜><｜User｜>R<｜Assistant｜><think>\n\n</think>\n\nB<｜end▁of▁sentence｜>", []string{"\n</think>\n\nB<｜end▁of▁sentence｜>"}},
			}},
		{"no generation prompt", "mistral", []wire.Message{user("Q"), assistant("A"), user("R"), assistant("B")},
			[]row{{"<s>[INST] Q [/INST]A</s>[INST] R [/INST]B</s>", []string{"A</s>", "B</s>"}}}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			b, v := model(t, test.template)
			rows, err := b.Rows(t.Context(), prompt.Chat{Messages: test.messages})
			if err != nil {
				t.Fatal(err)
			}
			var got []row
			for _, r := range rows {
				got = append(got, row{v.text(r.Tokens), trained(v, r)})
				if len(r.Tokens) != len(r.Weights) || r.Weights[len(r.Weights)-1] == 0 {
					t.Errorf("%d tokens, %d weights; the last token must be trained", len(r.Tokens), len(r.Weights))
				}
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// A row begins with exactly the tokens that the runner asks with, for each of its trained turns, and a constrained
// answer is asked for where the answer itself begins.
func TestRowIsPromptAndTurn(t *testing.T) {
	t.Parallel()
	contents := []string{"A", "\n\nstarts with newlines", " space", "北京。", "two\nlines\n", "</think>", "x"}
	for _, name := range templates {
		for _, content := range contents {
			for _, question := range []string{"Q", "问题\n", " trailing "} {
				b, v := model(t, name)
				messages := []wire.Message{user(question), weighted("first", 0), user("again"), assistant(content)}
				rows, err := b.Rows(t.Context(), prompt.Chat{Messages: messages})
				if err != nil {
					if content == "</think>" { // an answer that is nothing but the end of reasoning
						continue
					}
					t.Errorf("%s, %q: %v", name, content, err)
					continue
				}
				asked, err := b.Prompt(t.Context(), messages[:3])
				if err != nil {
					t.Fatal(err)
				}
				row := rows[len(rows)-1]
				if !slices.Equal(row.Tokens[:len(asked)], asked) {
					t.Errorf("%s, %q: the row does not begin with the prompt", name, content)
				}
				for i, w := range row.Weights {
					if want := i >= len(asked); (w == 1) != want {
						t.Errorf("%s, %q: weight of token %d is %v", name, content, i, w)
						break
					}
				}
				if !v.IsEndOfGeneration(row.Tokens[len(row.Tokens)-1]) {
					t.Errorf("%s, %q: the row ends with %q", name, content, v.Piece(row.Tokens[len(row.Tokens)-1]))
				}
				if content != "A" {
					continue
				}
				constrained, err := b.AnswerPrompt(t.Context(), messages[:3])
				if err != nil {
					t.Fatal(err)
				}
				if !slices.Equal(row.Tokens[:len(constrained)], constrained) {
					t.Errorf("%s: the row does not begin with the prompt of a constrained answer", name)
				}
				if rest := v.text(row.Tokens[len(constrained):]); !strings.HasPrefix(rest, "A<") {
					t.Errorf("%s: after the prompt of a constrained answer the row has %q", name, rest)
				}
			}
		}
	}
}

// A tokenizer that joins the answer's first newline to the generation prompt's: the turn is trained as it is generated.
func TestAnswerThatMergesWithTheGenerationPrompt(t *testing.T) {
	t.Parallel()
	v := byteVocabulary{special: []string{"<|im_start|>", "<|im_end|>"}, pairs: []string{"\n\n"}, eos: "<|im_end|>", ends: []string{"<|im_end|>"}}
	b := builder(t, prompt.Options{Template: template(t, "smollm2"), Vocabulary: v})
	messages := []wire.Message{user("Q"), assistant("\nA"), user("R"), assistant("\nB")}
	rows, err := b.Rows(t.Context(), prompt.Chat{Messages: messages})
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != 2 {
		t.Fatalf("%d rows, want 2: in the second the first answer is tokenized with the newline before it", len(rows))
	}
	for i, r := range rows {
		asked, err := b.Prompt(t.Context(), messages[:2*i+1])
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(r.Tokens[:len(asked)], asked) {
			t.Errorf("row %d does not begin with its prompt", i)
		}
		if got, want := trained(v, r), []string{"\n" + string("AB"[i]) + "<|im_end|>"}; !slices.Equal(got, want) {
			t.Errorf("row %d trains %q, want %q", i, got, want)
		}
	}
}

// A tokenizer that puts a space before every text must not put one into the middle of a turn.
func TestSpacePrefixIsNotRepeated(t *testing.T) {
	t.Parallel()
	v := byteVocabulary{special: []string{"<s>", "</s>"}, bos: "<s>", eos: "</s>", ends: []string{"</s>"}, addBOS: true, space: true}
	b := builder(t, prompt.Options{Template: template(t, "mistral"), Vocabulary: v})
	rows, err := b.Rows(t.Context(), prompt.Chat{Messages: []wire.Message{user("Q"), assistant("A"), user("R"), assistant("B")}})
	if err != nil || len(rows) != 1 {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	if got, want := v.text(rows[0].Tokens), "<s> [INST] Q [/INST]A</s> [INST] R [/INST]B</s>"; got != want {
		t.Errorf("row is %q, want %q", got, want)
	}
	if got, want := trained(v, rows[0]), []string{"A</s>", "B</s>"}; !slices.Equal(got, want) {
		t.Errorf("trained are %q, want %q", got, want)
	}
}

func TestEncode(t *testing.T) {
	t.Parallel()
	v := byteVocabulary{special: []string{"<s>", "</s>"}, bos: "<s>", eos: "</s>", addBOS: true}
	b := builder(t, prompt.Options{Vocabulary: v})
	tokens, err := b.Encode("hi</s>")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]engine.Token{256, 'h', 'i', 257}, tokens); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if _, err := b.Prompt(t.Context(), []wire.Message{user("Q")}); !errors.Is(err, prompt.ErrNoTemplate) {
		t.Errorf("prompt without a template: %v", err)
	}
	if b.HasTemplate() || b.TemplateDigest() != "" {
		t.Error("no template, but HasTemplate or a digest")
	}
}

func TestRefusedMessages(t *testing.T) {
	t.Parallel()
	call := func(arguments string) wire.Message {
		return wire.Message{Role: "assistant", ToolCalls: []wire.ToolCall{{Type: "function", Function: wire.FunctionCall{Name: "f", Arguments: arguments}}}}
	}
	tests := []struct {
		name     string
		template string
		messages []wire.Message
		want     string // part of the error
	}{
		{"roles out of order", "mistral", []wire.Message{user("Q"), user("R"), assistant("A")}, "roles must alternate"},
		{"no messages before the answer", "llama3", []wire.Message{assistant("A")}, "no messages before"},
		{"nothing trained", "llama3", []wire.Message{user("Q"), weighted("A", 0)}, "weight is not 0"},
		{"no assistant", "llama3", []wire.Message{user("Q")}, "no assistant message"},
		{"arguments that are no JSON", "qwen2.5", []wire.Message{user("Q"), call("{"), assistant("A")}, "messages[1]: tool_calls[0].function.arguments is not JSON"},
		{"arguments that are no object", "qwen2.5", []wire.Message{user("Q"), call(`"x"`), assistant("A")}, "must be a JSON object"},
		{"too long", "llama3", []wire.Message{user(strings.Repeat("x", 2<<20)), assistant("A")}, "limit"},
		{"reasoning without an answer", "deepseek-r1-distill", []wire.Message{user("Q"), assistant("<think>\nhm\n</think>\n")}, "no answer after </think>"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			b, _ := model(t, test.template)
			_, err := b.Rows(t.Context(), prompt.Chat{Messages: test.messages})
			var message *prompt.MessageError
			if !errors.As(err, &message) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want a *MessageError with %q", err, test.want)
			}
		})
	}
}

func TestTemplatesThatCannotBeTrained(t *testing.T) {
	t.Parallel()
	v := byteVocabulary{special: []string{"</s>"}, eos: "</s>", ends: []string{"</s>"}}
	for name, test := range map[string]struct{ template, want string }{
		"turn without an end":       {`{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}`, "never stop"},
		"another generation prompt": {`{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}bot: {% endif %}`, "differently from its generation prompt"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := builder(t, prompt.Options{Template: test.template, Vocabulary: v})
			messages := []wire.Message{user("Q"), assistant("A")}
			_, err := b.Rows(t.Context(), prompt.Chat{Messages: messages})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %q", err, test.want)
			}
			asked, err := b.Prompt(t.Context(), messages[:1])
			if err != nil {
				t.Fatal(err)
			}
			constrained, err := b.AnswerPrompt(t.Context(), messages[:1])
			if err != nil || !slices.Equal(asked, constrained) {
				t.Errorf("a constrained answer is asked for with %q (%v), want the prompt %q", v.text(constrained), err, v.text(asked))
			}
		})
	}
}

// Templates of hostile models end with an error within the limits; third_party/jinja has more of them.
func TestHostileTemplates(t *testing.T) {
	t.Parallel()
	for name, source := range map[string]string{
		"string doubling": `{% set ns = namespace(s=messages[0].content) %}{% for i in range(28) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}`,
		"long loop":       `{% for i in range(10**9) %}{% endfor %}`,
		"nested loops":    `{% for i in range(60000) %}{% for j in range(60000) %}{% for k in range(60000) %}{% endfor %}{% endfor %}{% endfor %}`,
		"recursion":       `{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}`,
		"include":         `{% include "/etc/hostname" %}`,
		"attributes":      `{{ ''.__class__.__mro__[1].__subclasses__() }}`,
		"long format":     `{{ strftime_now('%Y' * 1000000) }}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			b, err := prompt.New(prompt.Options{Template: source, Vocabulary: byteVocabulary{}, RenderTime: 300 * time.Millisecond})
			if err == nil {
				_, err = b.Prompt(t.Context(), []wire.Message{user("Q")})
			}
			if err == nil {
				t.Error("no error")
			}
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
	b := builder(t, prompt.Options{Template: `{{ messages }}`, Vocabulary: byteVocabulary{}})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.Prompt(ctx, []wire.Message{user("Q")}); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestStrftimeNow(t *testing.T) {
	t.Parallel()
	now := func() time.Time { return time.Date(2026, 3, 7, 9, 5, 0, 0, time.UTC) }
	b := builder(t, prompt.Options{Template: `{{ strftime_now('%d %b %Y %H:%M') }}`, Vocabulary: byteVocabulary{}, Now: now})
	text, err := b.Text(t.Context(), []wire.Message{user("Q")})
	if err != nil || text != "07 Mar 2026 09:05" {
		t.Errorf("got %q, %v", text, err)
	}
}
