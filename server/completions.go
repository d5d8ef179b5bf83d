package server

import (
	"fmt"
	"unicode/utf8"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// maxCompletionLogProbs is OpenAI's bound of logprobs in /v1/completions.
const maxCompletionLogProbs = 5

// completion answers POST /v1/completions: the prompt goes to the model as it is, without a chat template.
func (s *Server) completion(c *gin.Context) error {
	var req wire.CompletionRequest
	if err := decode(c, &req, refuseUnavailable); err != nil {
		return err
	}
	generate, err := completionRequest(&req)
	if err != nil {
		return err
	}
	generate.ID = newID("cmpl-")
	return s.answer(c, req.Model, generate, req.Stream, req.StreamOptions, func(head answerHead) answer { return &completionAnswer{answerHead: head} })
}

func completionRequest(req *wire.CompletionRequest) (child.GenerateRequest, error) {
	var generate child.GenerateRequest
	switch {
	case len(req.Prompt) == 0:
		return generate, invalid("prompt", "prompt is required: a string")
	case len(req.Prompt) > 1:
		return generate, invalid("prompt", "prompt has %d strings, expected one; send a request for each", len(req.Prompt))
	}
	generate.Prompt = &req.Prompt[0]
	generate.MaxTokens = completionLimit
	if req.MaxTokens != nil {
		if generate.MaxTokens = *req.MaxTokens; generate.MaxTokens < 1 {
			return generate, invalid("max_tokens", "max_tokens is %d, expected at least 1", *req.MaxTokens)
		}
	}
	if req.LogProbs != nil {
		generate.LogProbs, generate.TopLogProbs = true, *req.LogProbs
		if *req.LogProbs < 0 || *req.LogProbs > maxCompletionLogProbs {
			return generate, invalid("logprobs", "logprobs is %d, expected 0 to %d", *req.LogProbs, maxCompletionLogProbs)
		}
	}
	if err := checkStreamOptions(req.Stream, req.StreamOptions); err != nil {
		return generate, err
	}
	fields := sampling{temperature: req.Temperature, topP: req.TopP, seed: req.Seed, stop: req.Stop, choices: req.GuidedChoice}
	return generate, fields.apply(&generate)
}

// completionAnswer makes a completion's chunks, or the whole.
type completionAnswer struct {
	answerHead
	characters int // sent so far
}

func (a *completionAnswer) message(choices ...wire.CompletionChoice) wire.Completion {
	return wire.Completion{ID: a.id, Object: "text_completion", Created: a.created, Model: a.model, SystemFingerprint: a.fingerprint, Choices: choices}
}

func (a *completionAnswer) whole(all collected) any {
	whole := a.message(wire.CompletionChoice{Text: all.text, LogProbs: a.logProbs(all.logProbs), FinishReason: wire.FinishReason(all.finishReason)})
	whole.Usage = wire.Nullable[wire.Usage]{Set: true, Value: &all.usage}
	return whole
}

func (a *completionAnswer) chunks(event child.GenerateEvent) []any {
	var chunks []any
	if event.Text != "" || len(event.LogProbs) > 0 || event.FinishReason != "" {
		chunk := a.message(wire.CompletionChoice{Text: event.Text, LogProbs: a.logProbs(event.LogProbs), FinishReason: wire.FinishReason(event.FinishReason)})
		chunk.Usage.Set = a.usage
		chunks = append(chunks, chunk)
	}
	if a.usage && event.FinishReason != "" {
		last := a.message()
		last.Choices = []wire.CompletionChoice{}
		usage := usageToWire(event.Usage)
		last.Usage = wire.Nullable[wire.Usage]{Set: true, Value: &usage}
		chunks = append(chunks, last)
	}
	return chunks
}

// logProbs is nil for no tokens, which is written as null.
func (a *completionAnswer) logProbs(tokens []child.TokenLogProb) *wire.CompletionLogProbs {
	if len(tokens) == 0 {
		return nil
	}
	all := &wire.CompletionLogProbs{}
	for _, token := range tokens {
		top := map[string]float64{}
		for _, other := range token.Top {
			top[other.Token] = logProb(other.LogProb)
		}
		all.Tokens = append(all.Tokens, token.Token)
		all.TokenLogProbs = append(all.TokenLogProbs, logProb(token.LogProb))
		all.TopLogProbs = append(all.TopLogProbs, top)
		all.TextOffset = append(all.TextOffset, a.characters)
		a.characters += utf8.RuneCountInString(token.Token)
	}
	return all
}

func indexed(list string, i int, field string) string {
	return fmt.Sprintf("%s[%d].%s", list, i, field)
}
