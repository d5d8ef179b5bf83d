package runner

import (
	"math"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
)

// TestEchoScoresWhatWasSampled holds the list of log-probabilities to what lm-evaluation-harness takes it for: one entry for
// each token of the prompt, and one for the token that max_tokens 1 asks for, also where that ends the turn.
func TestEchoScoresWhatWasSampled(t *testing.T) {
	t.Parallel()
	r := sharedRunner(t)
	const prompt = "<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\nHello! How can I help you today?"
	tokens, err := r.Tokenize(t.Context(), child.TokenizeRequest{Text: new(prompt)})
	if err != nil {
		t.Fatal(err)
	}
	if tokens.EOS != "<|im_end|>" {
		t.Errorf("EOS %q", tokens.EOS)
	}
	for name, req := range map[string]child.GenerateRequest{
		"text":   {Prompt: new(prompt)},
		"tokens": {PromptTokens: tokens.Tokens},
	} {
		req.Echo, req.LogProbs, req.TopLogProbs, req.MaxTokens, req.TopP = true, true, 1, 1, 1
		got := ask(t, r, req)
		if got.Finish != "stop" || got.Text != prompt {
			t.Errorf("%s: ends with %s after %q, want the prompt and the end of the turn", name, got.Finish, got.Text)
		}
		if len(got.LogProbs) != len(tokens.Tokens)+1 || got.LogProbs[0].LogProb != child.NoLogProb {
			t.Fatalf("%s: %d log-probabilities of %d tokens, the first %v", name, len(got.LogProbs), len(tokens.Tokens), got.LogProbs[0])
		}
		last := got.LogProbs[len(tokens.Tokens)]
		if last.Token != "<|im_end|>" || last.LogProb > 0 || last.LogProb < math.Log(0.2) || len(last.Top) != 1 {
			t.Errorf("%s: the last entry is %+v", name, last)
		}
		var all strings.Builder
		for _, p := range got.LogProbs[:len(tokens.Tokens)] {
			all.Write(p.Bytes)
		}
		if all.String() != prompt {
			t.Errorf("%s: the tokens are %q", name, all.String())
		}
	}
	if got := ask(t, r, child.GenerateRequest{PromptTokens: []engine.Token{tokens.Tokens[0]}, MaxTokens: 1, TopP: 1, LogProbs: true}); len(got.LogProbs) > 1 {
		t.Errorf("without echo: %+v", got.LogProbs)
	}
}

// Continuations of one context, as lm-evaluation-harness asks for those of a multiple-choice question: the context is
// computed once, whether they come together or one after the other, and every log-probability is what it is alone.
func TestScoredContextIsShared(t *testing.T) {
	r, err := New(Options{ModelDir: modelDir(t), ContextTokens: 1024, Sequences: 8, Threads: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	context := strings.Repeat("Question: which of these is a kind of fruit?\nAnswer: apple\n\n", 20) + "Question: which of these is a kind of metal?\nAnswer:"
	adapter := &child.Adapter{ID: "a", Path: randomAdapter(t, 41)}
	var requests []child.GenerateRequest
	for _, continuation := range []string{" copper", " a hammer", " violin", " apple pie"} {
		requests = append(requests, child.GenerateRequest{Prompt: new(context + continuation), PromptOnly: true, Echo: true, LogProbs: true, TopLogProbs: 1, TopP: 1})
	}
	one := requests[0]
	one.PromptOnly, one.MaxTokens = false, 1
	more := requests[1]
	more.TopLogProbs = 3 // than are kept
	other := requests[2]
	other.Adapter = adapter
	requests = append(requests, one, more, other)
	forget := func() {
		t.Helper()
		if err := r.scheduler.do(t.Context(), func() {
			for _, slot := range r.scheduler.slots {
				r.scheduler.clear(slot)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	computed := func(f func()) int {
		t.Helper()
		before, err := r.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		f()
		after, err := r.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return int(after.PromptTokens - before.PromptTokens - after.ReusedTokens + before.ReusedTokens)
	}
	var alone []answer
	for _, request := range requests {
		forget()
		alone = append(alone, ask(t, r, request))
		if got := alone[len(alone)-1]; got.Usage.CachedTokens != 0 {
			t.Errorf("nothing was in the cache: %+v", got.Usage)
		}
	}
	same := func(how string, i int, got answer) {
		t.Helper()
		if diff := cmp.Diff(alone[i].LogProbs, got.LogProbs); diff != "" || got.Text != alone[i].Text || got.Finish != alone[i].Finish {
			t.Errorf("%s, request %d: %q (%s), alone %q (%s); log-probabilities (-alone +got):\n%s", how, i, got.Text, got.Finish, alone[i].Text, alone[i].Finish, diff)
		}
	}
	prompt := alone[0].Usage.PromptTokens
	forget()
	if n := computed(func() {
		for i := range 4 {
			got := ask(t, r, requests[i])
			same("one after the other", i, got)
			if i > 0 && got.Usage.CachedTokens < prompt-10 {
				t.Errorf("continuation %d: %+v", i, got.Usage)
			}
		}
		same("sampled too", 4, ask(t, r, one))
	}); n > prompt+30 {
		t.Errorf("%d prompt tokens were computed for five requests of some %d", n, prompt)
	}
	same("with more alternatives", 5, ask(t, r, more))
	same("with an adapter", 6, ask(t, r, other))
	same("with fewer alternatives", 1, ask(t, r, requests[1]))
	forget()
	if n := computed(func() {
		var wg sync.WaitGroup
		for i := range 5 {
			wg.Go(func() {
				got, err := generate(t.Context(), r, requests[i])
				if err != nil {
					t.Error(err)
				}
				same("together", i, got)
			})
		}
		wg.Wait()
	}); n > prompt+5*sharedPrefix { // nobody waits for fewer
		t.Errorf("%d prompt tokens were computed for five requests of some %d together", n, prompt)
	}
	// What a completion has computed has no scores: it is computed again, for them.
	forget()
	ask(t, r, child.GenerateRequest{Prompt: new(context), MaxTokens: 2})
	same("after a completion", 3, ask(t, r, requests[3]))
}
