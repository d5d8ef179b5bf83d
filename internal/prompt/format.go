package prompt

import (
	"context"
	"regexp"
	"strings"

	"github.com/hone-llm/hone/internal/wire"
	"github.com/hone-llm/hone/third_party/jinja"
)

// toolForm is how a model family writes a call.
type toolForm int

const (
	// unknownForm is none that a Parser reads; tools are then stated in Hermes' form.
	unknownForm toolForm = iota
	// hermesForm is <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>, once for each call: Hermes, Qwen 2.5, Qwen 3.
	hermesForm
	// llamaForm is {"name": ..., "parameters": {...}} as the whole answer, possibly after <|python_tag|>: Llama 3.1 and later.
	llamaForm
)

// Tags that models put around calls and reasoning.
const (
	callStart  = "<tool_call>"
	callEnd    = "</tool_call>"
	thinkStart = "<think>"
	thinkEnd   = "</think>"
	pythonTag  = "<|python_tag|>"
)

var (
	hermesCall = regexp.MustCompile(`<tool_call>\s*\{\s*"name":\s*"probedcall",\s*"arguments":\s*\{\s*"probedkey":\s*"probedvalue"\s*\}\s*\}\s*</tool_call>`)
	llamaCall  = regexp.MustCompile(`\{\s*"name":\s*"probedcall",\s*"parameters":\s*\{\s*"probedkey":\s*"probedvalue"\s*\}\s*\}`)
)

// formOf recognises the form in which probeTools' call is written.
func formOf(text string) toolForm {
	switch {
	case hermesCall.MatchString(text):
		return hermesForm
	case llamaCall.MatchString(text):
		return llamaForm
	}
	return unknownForm
}

// thinking is what a template does about <think> blocks.
type thinking struct {
	thinks   bool // the model's answers may begin with a block
	switches bool // enable_thinking changes the prompt
	systems  bool // it writes system messages
}

// probeThinking renders small conversations. A template of a model that thinks opens a block in its generation prompt,
// or closes one there when thinking is off, or writes an empty one into an answer without reasoning, or drops the
// reasoning of earlier answers.
func (b *Builder) probeThinking() thinking {
	ctx := context.Background() // bounded by the limits of a rendering
	question := wire.Message{Role: "user", Content: "x"}
	text := func(vars variables, generationPrompt bool, messages ...wire.Message) string {
		text, err := b.render(ctx, Chat{Messages: messages}, generationPrompt, vars)
		if err != nil {
			return ""
		}
		return text
	}
	var t thinking
	plain := text(nil, true, question)
	on := text(variables{"enable_thinking": jinja.NewBool(true)}, true, question)
	off := text(variables{"enable_thinking": jinja.NewBool(false)}, true, question)
	t.switches = on != off
	for _, prompt := range []string{plain, on, off} {
		prompt = strings.TrimSpace(prompt)
		t.thinks = t.thinks || strings.HasSuffix(prompt, thinkStart) || strings.HasSuffix(prompt, thinkEnd)
	}
	answered := text(nil, false, question, wire.Message{Role: "assistant", Content: "probedanswer"})
	earlier := text(nil, true, question, wire.Message{Role: "assistant", Content: "<think>\nprobedreason\n</think>\n\nprobedanswer"}, question)
	t.thinks = t.thinks || strings.Contains(answered, thinkStart) ||
		strings.Contains(earlier, "probedanswer") && !strings.Contains(earlier, "probedreason")
	t.systems = strings.Contains(text(nil, true, wire.Message{Role: "system", Content: "probedsystem"}, question), "probedsystem")
	return t
}
