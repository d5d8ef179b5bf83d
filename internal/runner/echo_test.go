package runner

import (
	"math"
	"strings"
	"testing"

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
