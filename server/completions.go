package server

import (
	"fmt"
	"strings"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/wire"
)

const (
	maxPrompts      = 256
	completionLimit = 16 // max_tokens of /v1/completions when it is not sent, as OpenAI's
)

// completion answers POST /v1/completions: the prompts go to the model as they are, without a chat template.
func (s *Server) completion(c *gin.Context) error {
	var req wire.CompletionRequest
	if err := decode(c, &req, refuseUnavailable, refuseInCompletions); err != nil {
		return err
	}
	order, err := completionOrder(&req)
	if err != nil {
		return err
	}
	order.id = newID("cmpl-")
	return s.answer(c, req.Model, order, func(head answerHead) answer {
		return &completionAnswer{answerHead: head, sent: make([]characters, len(order.requests)*order.n)}
	})
}

func completionOrder(req *wire.CompletionRequest) (*order, error) {
	var generate child.GenerateRequest
	if len(req.Prompt) == 0 {
		return nil, invalid("prompt", "prompt is required: a string, an array of token ids, or an array of either")
	}
	if len(req.Prompt) > maxPrompts {
		return nil, invalid("prompt", "prompt has %d elements, expected at most %d", len(req.Prompt), maxPrompts)
	}
	generate.Echo = req.Echo != nil && *req.Echo
	generate.MaxTokens = completionLimit
	if req.MaxTokens != nil {
		switch generate.MaxTokens = *req.MaxTokens; {
		case *req.MaxTokens == 0 && generate.Echo:
			generate.PromptOnly = true
		case *req.MaxTokens < 1:
			return nil, invalid("max_tokens", "max_tokens is %d, expected at least 1, or 0 with echo: true", *req.MaxTokens)
		}
	}
	if req.LogProbs != nil {
		generate.LogProbs, generate.TopLogProbs = true, *req.LogProbs
		if *req.LogProbs < 0 || *req.LogProbs > maxTopLogProbs {
			return nil, invalid("logprobs", "logprobs is %d, expected 0 to %d", *req.LogProbs, maxTopLogProbs)
		}
	}
	order, err := newOrder(&req.Sampling, &generate, len(req.Prompt))
	if err != nil {
		return nil, err
	}
	if req.BestOf != nil && *req.BestOf != 1 && *req.BestOf != order.n {
		return nil, invalid("best_of", "best_of is %d, expected 1 or n, which is %d: all completions are returned", *req.BestOf, order.n)
	}
	for p := range order.requests {
		to := &order.requests[p]
		if to.Constraint != nil && to.Constraint.Kind == child.ConstraintChoice && req.MaxTokens == nil {
			to.MaxTokens = 0 // a choice ends by itself, and half of one is of no use
		}
		if to.Prompt, to.PromptTokens, err = promptOf(pathOf("prompt", p), req.Prompt[p]); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// promptOf turns a text on the wire into the runner's.
func promptOf(path string, text wire.Text) (*string, []engine.Token, error) {
	if text.Tokens == nil {
		return &text.String, nil, nil
	}
	tokens, err := tokensOf(path, text.Tokens)
	return nil, tokens, err
}

// tokensOf checks token ids, as far as that can be done without the vocabulary.
func tokensOf(path string, ids []int32) ([]engine.Token, error) {
	if len(ids) == 0 {
		return nil, invalid(path, "%s has no token ids, expected at least one", path)
	}
	tokens := make([]engine.Token, len(ids))
	for i, id := range ids {
		if id < 0 {
			return nil, invalid(path, "%s[%d] is %d, expected the id of a token", path, i, id)
		}
		tokens[i] = engine.Token(id)
	}
	return tokens, nil
}

// completionAnswer makes completions' chunks, or the whole.
type completionAnswer struct {
	answerHead

	sent []characters // by choice
}

func (a *completionAnswer) message(choices ...wire.CompletionChoice) wire.Completion {
	return wire.Completion{ID: a.id, Object: "text_completion", Created: a.created, Model: a.model, SystemFingerprint: a.fingerprint, Choices: choices}
}

func (a *completionAnswer) whole(all collected) any {
	choices := make([]wire.CompletionChoice, len(all.choices))
	for i, choice := range all.choices {
		choices[i] = wire.CompletionChoice{
			Text: choice.text, Index: i, LogProbs: a.logProbs(i, choice.text, choice.logProbs), FinishReason: wire.FinishReason(choice.finishReason),
			ChoiceProbabilities: a.probabilities(choice.choiceProbabilities),
		}
	}
	whole := a.message(choices...)
	whole.Usage = wire.NewNullable(all.usage)
	return whole
}

func (a *completionAnswer) chunks(event child.GenerateEvent) []any {
	var chunks []any
	if event.Text != "" || len(event.LogProbs) > 0 || event.FinishReason != "" {
		chunk := a.message(wire.CompletionChoice{
			Text: event.Text, Index: event.Index, LogProbs: a.logProbs(event.Index, event.Text, event.LogProbs), FinishReason: wire.FinishReason(event.FinishReason),
			ChoiceProbabilities: a.probabilities(event.ChoiceProbabilities),
		})
		chunk.Usage.Set = a.usage
		chunks = append(chunks, chunk)
	}
	if a.usage && event.Usage != nil {
		last := a.message()
		last.Choices = []wire.CompletionChoice{}
		last.Usage = wire.NewNullable(usageToWire(event.Usage))
		chunks = append(chunks, last)
	}
	return chunks
}

// logProbs is nil for no tokens, which is written as null. The tokens are those of text, and before it maybe one that
// begins every text of the model and is no part of the prompt that is echoed.
func (a *completionAnswer) logProbs(choice int, text string, tokens []child.TokenLogProb) *wire.CompletionLogProbs {
	if len(tokens) == 0 {
		return nil
	}
	all := &wire.CompletionLogProbs{}
	for _, token := range tokens {
		var own *float64
		var top map[string]float64
		if token.LogProb != child.NoLogProb {
			p := logProb(token.LogProb)
			own, top = &p, map[string]float64{}
			// Tokens that are a part of a character are all written as U+FFFD; the likeliest of them counts.
			for _, other := range append([]child.TokenLogProb{token}, token.Top...) {
				p := logProb(other.LogProb)
				if before, there := top[other.Token]; !there || p > before {
					top[other.Token] = p
				}
			}
		}
		all.Tokens = append(all.Tokens, token.Token)
		all.TokenLogProbs = append(all.TokenLogProbs, own)
		all.TopLogProbs = append(all.TopLogProbs, top)
		shown := token.Bytes
		if own == nil && !strings.HasPrefix(text, token.Token) {
			shown = nil
		}
		all.TextOffset = append(all.TextOffset, a.sent[choice].before(shown))
	}
	return all
}

// characters counts the characters that have begun in a text that comes as tokens.
type characters int

// before returns the offset of the character that the next token begins with, or goes on with, and counts its own.
func (c *characters) before(token []byte) int {
	offset := int(*c)
	for i, b := range token {
		if b&0xC0 != 0x80 {
			*c++
		} else if i == 0 && offset > 0 {
			offset--
		}
	}
	return offset
}

func pathOf(list string, i int) string { return fmt.Sprintf("%s[%d]", list, i) }
