package prompt_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llguidance"
	"github.com/hone-llm/hone/internal/prompt"
	"github.com/hone-llm/hone/internal/wire"
)

// BenchmarkToolGrammar measures, with the default model's vocabulary, what an automatic choice of tools costs: making the prompt
// with its grammar, compiling it, and the mask of each token of free text, of reasoning and of a string in a call.
func BenchmarkToolGrammar(b *testing.B) {
	v := vocabulary(b)
	pieces, special := make([][]byte, v.VocabularySize()), make([]bool, v.VocabularySize())
	for i := range pieces {
		pieces[i], special[i] = v.Piece(engine.Token(i)), v.IsControl(engine.Token(i))
	}
	eos, _ := v.EOS()
	tokenizer, err := llguidance.NewTokenizer(pieces, special, eos)
	if err != nil {
		b.Fatal(err)
	}
	defer tokenizer.Close()
	for _, family := range []string{"qwen2.5-instruct", "qwen3-0.6b", "llama3.1"} {
		builder, err := prompt.New(prompt.Options{Template: template(b, family), Vocabulary: v})
		if err != nil {
			b.Fatal(err)
		}
		defer builder.Close()
		messages := []wire.Message{user("What is the weather in Rome?")}
		options := prompt.ChatOptions{Tools: json.RawMessage(bookingTools), ParallelToolCalls: true}
		make := func() *prompt.ChatPrompt {
			p, err := builder.ChatPrompt(b.Context(), messages, options)
			if err != nil {
				b.Fatal(err)
			}
			return p
		}
		make()
		b.Run(family+"/prompt", func(b *testing.B) {
			for b.Loop() {
				make()
			}
		})
		grammar := make().Constraint
		b.Run(family+"/compile", func(b *testing.B) {
			for b.Loop() {
				c, err := tokenizer.New(grammar.Kind, grammar.Text)
				if err != nil {
					b.Fatal(err)
				}
				c.Close()
			}
		})
		call := "<tool_call>\n{\"name\": \"note-it\", \"arguments\": {\"tag\": \"甲"
		if family == "llama3.1" {
			call = "{\"name\": \"note-it\", \"parameters\": {\"tag\": \"甲"
		}
		for what, text := range map[string]string{
			"text": "The weather in Rome is fine, as it has been since the beginning of the week, and will stay so.", "call": call,
			"reasoning": "<think>\nThe user wants to know the weather in Rome; I may call a tool or not, so let me think.",
		} {
			tokens, err := v.Tokenize(text, false, true)
			if err != nil {
				b.Fatal(err)
			}
			b.Run(family+"/"+what, func(b *testing.B) {
				masks, took := 0, time.Duration(0)
				for b.Loop() {
					c, err := tokenizer.New(grammar.Kind, grammar.Text)
					if err != nil {
						b.Fatal(err)
					}
					begun := time.Now()
					for _, token := range tokens {
						if _, err := c.Mask(); err != nil {
							b.Fatal(err)
						}
						if err := c.Accept(token); err != nil {
							b.Fatal(err)
						}
						masks++
					}
					took += time.Since(begun)
					c.Close()
				}
				b.ReportMetric(float64(took.Microseconds())/float64(masks), "µs/token")
			})
		}
	}
}
