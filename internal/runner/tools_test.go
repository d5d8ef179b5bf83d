package runner

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/prompt"
	"github.com/hone-llm/hone/internal/wire"
)

const travelTools = `[
	{"type": "function", "function": {"name": "weather", "description": "The weather of a city", "parameters": {"type": "object",
		"properties": {"city": {"enum": ["Paris", "London"]}}, "required": ["city"], "additionalProperties": false}}},
	{"type": "function", "function": {"name": "clock", "description": "The time", "parameters": {"type": "object", "properties": {}}}}]`

// The default model under the templates of other families answers in the form of each: calls of the tools that there
// are, with arguments of their schemas, in parts that a client can put together.
func TestToolCallsOfFamilies(t *testing.T) {
	for _, family := range []struct {
		template string
		several  bool // calls in one answer
	}{
		{"llama3.1", false}, {"hermes", true}, {"qwen2.5-instruct", true}, {"qwen3", true}, // read as the template writes them
		{"mistral", true}, // has no tools, so they are stated in Hermes' form
	} {
		t.Run(family.template, func(t *testing.T) {
			dir := modelDir(t)
			template, err := os.ReadFile(filepath.Join("..", "prompt", "testdata", family.template+".jinja"))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "chat_template.jinja"), template, 0o600); err != nil {
				t.Fatal(err)
			}
			r, err := New(Options{ModelDir: dir, ContextTokens: 1024, Sequences: 8, Threads: 1})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			var wg sync.WaitGroup
			for _, choice := range []child.ToolChoice{{Mode: child.ToolAuto}, {Mode: child.ToolRequired}, {Mode: child.ToolFunction, Name: "clock"}} {
				for _, parallel := range []bool{false, true} {
					wg.Go(func() { checkCalls(t, r, choice, parallel && family.several) })
				}
			}
			wg.Wait()
		})
	}
}

func checkCalls(t *testing.T, r *Runner, choice child.ToolChoice, parallel bool) {
	at := fmt.Sprintf("%s %s, parallel %v", choice.Mode, choice.Name, parallel)
	req := child.GenerateRequest{
		Messages: chat("What is the weather in Paris, and what time is it?"), Tools: json.RawMessage(travelTools),
		ToolChoice: choice, ParallelToolCalls: parallel, MaxTokens: 60, TopP: 1,
	}
	var calls []child.ToolCallDelta
	var text, finish string
	err := r.Generate(t.Context(), req, func(e child.GenerateEvent) error {
		text += e.Text
		for _, part := range e.ToolCalls {
			switch {
			case part.Index == len(calls):
				if part.ID == "" || part.Name == "" {
					t.Errorf("%s: call %d begins with %+v, expected its id and name", at, part.Index, part)
				}
				calls = append(calls, part)
			case part.Index == len(calls)-1 && part.ID == "" && part.Name == "":
				calls[part.Index].Arguments += part.Arguments
			default:
				t.Errorf("%s: %+v comes after %d calls", at, part, len(calls))
			}
		}
		if e.FinishReason != "" {
			finish = e.FinishReason
		}
		return nil
	})
	if err != nil {
		t.Errorf("%s: %v", at, err)
		return
	}
	// A further call that was cut off in its tag is text.
	if choice.Mode != child.ToolAuto && (len(calls) == 0 || text != "" && !(parallel && finish == "length" && strings.HasPrefix("\n<tool_call>\n{", text))) {
		t.Errorf("%s: called %+v and said %q", at, calls, text)
	}
	if len(calls) > 0 && finish != "tool_calls" && !(finish == "length" && (parallel || choice.Mode == child.ToolAuto)) {
		t.Errorf("%s: ended with %q after %+v", at, finish, calls)
	}
	if !parallel && choice.Mode != child.ToolAuto && len(calls) > 1 {
		t.Errorf("%s: called %d functions, expected one", at, len(calls))
	}
	for i, call := range calls {
		if finish == "length" && i == len(calls)-1 {
			continue // cut off
		}
		var arguments map[string]string
		err := json.Unmarshal([]byte(call.Arguments), &arguments)
		keys := slices.Collect(maps.Keys(arguments))
		switch {
		case err != nil:
			t.Errorf("%s: arguments %q: %v", at, call.Arguments, err)
		case call.Name == "clock" && len(keys) == 0:
		case call.Name == "weather" && choice.Name == "" && slices.Equal(keys, []string{"city"}) && slices.Contains([]string{"Paris", "London"}, arguments["city"]):
		default:
			t.Errorf("%s: called %s with %s", at, call.Name, call.Arguments)
		}
	}
}

// The grammar of a request's tools takes no more than the quarter of a second of one core that a constraint may cost: 128
// plain tools, as many as OpenAI's API takes, or 32 whose parameters are bounded in many ways.
func TestToolGrammarsAreCheap(t *testing.T) {
	const allowed = 250 * time.Millisecond
	m, constraints := defaultVocabulary(t)
	<-constraints.ready
	template, err := os.ReadFile(filepath.Join("..", "prompt", "testdata", "qwen2.5-instruct.jinja"))
	if err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	builder, err := prompt.New(prompt.Options{Template: string(template), Vocabulary: m})
	if err != nil {
		t.Fatal(err)
	}
	const (
		plain   = `"query": {"type": "string", "description": "What to look for"}, "limit": {"type": "integer"}, "order": {"enum": ["ascending", "descending"]}`
		bounded = `"query": {"type": "string", "maxLength": 200}, "limit": {"type": "integer", "minimum": 1, "maximum": 100},
			"since": {"type": "string", "format": "date-time"}, "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 10},
			"filter": {"type": "object", "properties": {"field": {"type": "string"}, "value": {"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "boolean"}]}}, "required": ["field", "value"]}`
	)
	for _, set := range []struct {
		tools      int
		properties string
	}{{1, bounded}, {8, bounded}, {32, bounded}, {32, plain}, {128, plain}} {
		n := set.tools
		var tools []string
		for i := range n {
			tools = append(tools, fmt.Sprintf(`{"type": "function", "function": {"name": "find_records_%d", "description": "Finds records",
				"parameters": {"type": "object", "required": ["query", "limit"], "properties": {%s}}}}`, i, set.properties))
		}
		for _, choice := range []string{child.ToolAuto, child.ToolRequired} {
			p, err := builder.ChatPrompt(t.Context(), []wire.Message{{Role: "user", Content: "Q"}}, prompt.ChatOptions{
				Tools: json.RawMessage("[" + strings.Join(tools, ",") + "]"), ToolChoice: child.ToolChoice{Mode: choice}, ParallelToolCalls: true,
			})
			if err != nil {
				t.Fatal(err)
			}
			var spent time.Duration
			for range 2 { // a thread that something else disturbed is given a second chance
				before := threadTime(t)
				g := constraints.compile([32]byte{}, *p.Constraint)
				spent = threadTime(t) - before + g.took
				outcome := "compiled"
				if g.err != nil {
					outcome = g.err.Error()
					t.Errorf("%d tools: %v", n, g.err)
				}
				t.Logf("%3d tools, %-8s: %7d bytes of grammar, %v of a core: %.150s", n, choice, len(p.Constraint.Text), spent.Round(100*time.Microsecond), outcome)
				g.close()
				if spent <= allowed {
					break
				}
			}
			if spent > allowed {
				t.Errorf("%d tools: took %v of a core, %v are allowed", n, spent, allowed)
			}
		}
	}
}
