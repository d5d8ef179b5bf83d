package server

import (
	"encoding/json"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// chatCompletion answers POST /v1/chat/completions, streamed or whole.
func (s *Server) chatCompletion(c *gin.Context) error {
	var req wire.ChatCompletionRequest
	if err := decode(c, &req, refuseUnavailable, refuseLogProbNumber); err != nil {
		return err
	}
	generate, err := chatRequest(&req)
	if err != nil {
		return err
	}
	generate.ID = newID("chatcmpl-")
	return s.answer(c, req.Model, generate, req.Stream, req.StreamOptions, func(head answerHead) answer { return &chatAnswer{answerHead: head} })
}

// refuseLogProbNumber helps those who send the number that /v1/completions takes.
func refuseLogProbNumber(fields map[string]json.RawMessage) error {
	if raw := fields["logprobs"]; len(raw) > 0 && raw[0] >= '0' && raw[0] <= '9' {
		return invalid("logprobs", "logprobs is true or false in chat completions; the number of alternatives is top_logprobs")
	}
	return nil
}

// chatRequest checks a request's fields and turns them into the runner's.
func chatRequest(req *wire.ChatCompletionRequest) (child.GenerateRequest, error) {
	var generate child.GenerateRequest
	if err := checkMessages(req.Messages); err != nil {
		return generate, err
	}
	generate.Messages = make([]wire.Message, len(req.Messages))
	for i, m := range req.Messages {
		if m.Role == "developer" { // OpenAI's newer word, which no template knows
			m.Role = "system"
		}
		m.Weight = nil
		generate.Messages[i] = m
	}
	if req.MaxTokens != nil && req.MaxCompletionTokens != nil && *req.MaxTokens != *req.MaxCompletionTokens {
		return generate, invalid("max_tokens", "max_tokens is %d and max_completion_tokens is %d: they mean the same, send one", *req.MaxTokens, *req.MaxCompletionTokens)
	}
	for name, limit := range map[string]*int{"max_tokens": req.MaxTokens, "max_completion_tokens": req.MaxCompletionTokens} {
		if limit == nil {
			continue
		}
		if *limit < 1 {
			return generate, invalid(name, "%s is %d, expected at least 1", name, *limit)
		}
		generate.MaxTokens = *limit
	}
	generate.LogProbs = req.LogProbs != nil && *req.LogProbs
	if req.TopLogProbs != nil {
		generate.TopLogProbs = *req.TopLogProbs
		switch {
		case generate.TopLogProbs < 0 || generate.TopLogProbs > maxTopLogProbs:
			return generate, invalid("top_logprobs", "top_logprobs is %d, expected 0 to %d", generate.TopLogProbs, maxTopLogProbs)
		case !generate.LogProbs && generate.TopLogProbs > 0:
			return generate, invalid("top_logprobs", "top_logprobs needs logprobs: true")
		}
	}
	if err := checkStreamOptions(req.Stream, req.StreamOptions); err != nil {
		return generate, err
	}
	fields := sampling{temperature: req.Temperature, topP: req.TopP, seed: req.Seed, stop: req.Stop, choices: req.GuidedChoice}
	return generate, fields.apply(&generate)
}

func checkStreamOptions(stream *bool, options *wire.StreamOptions) error {
	if options != nil && (stream == nil || !*stream) {
		return invalid("stream_options", "stream_options needs stream: true")
	}
	return nil
}

func checkMessages(messages []wire.Message) error {
	if len(messages) == 0 {
		return invalid("messages", "messages is required: a list of at least one {role, content}")
	}
	if len(messages) > maxMessages {
		return invalid("messages", "messages has %d elements, expected at most %d", len(messages), maxMessages)
	}
	for i, m := range messages {
		switch m.Role {
		case "system", "developer", "user", "assistant":
		case "tool", "function":
			return invalid(indexed("messages", i, "role"), "messages[%d].role is %q, and tools are not available", i, m.Role)
		case "":
			return invalid(indexed("messages", i, "role"), "messages[%d].role is required: system, user or assistant", i)
		default:
			return invalid(indexed("messages", i, "role"), "messages[%d].role is %q, expected system, developer, user or assistant", i, m.Role)
		}
		if len(m.ToolCalls) > 0 {
			return invalid(indexed("messages", i, "tool_calls"), "messages[%d].tool_calls: tools are not available", i)
		}
	}
	return nil
}

// chatAnswer makes a completion's chunks, or the whole.
type chatAnswer struct {
	answerHead
	begun bool
}

func (a *chatAnswer) whole(all collected) any {
	return wire.ChatCompletion{
		ID: a.id, Object: "chat.completion", Created: a.created, Model: a.model, SystemFingerprint: a.fingerprint, Usage: &all.usage,
		Choices: []wire.ChatChoice{{
			Message:      wire.ChatMessage{Role: "assistant", Content: all.text},
			LogProbs:     chatLogProbs(all.logProbs),
			FinishReason: wire.FinishReason(all.finishReason),
		}},
	}
}

// chunks are those of one event: the role first of all, then text, then the reason for the end, then the usage.
func (a *chatAnswer) chunks(event child.GenerateEvent) []any {
	var chunks []any
	add := func(choices ...wire.ChunkChoice) *wire.ChatCompletionChunk {
		chunk := &wire.ChatCompletionChunk{
			ID: a.id, Object: "chat.completion.chunk", Created: a.created, Model: a.model, SystemFingerprint: a.fingerprint,
			Choices: choices, Usage: wire.Nullable[wire.Usage]{Set: a.usage},
		}
		chunks = append(chunks, chunk)
		return chunk
	}
	if !a.begun {
		a.begun = true
		add(wire.ChunkChoice{Delta: wire.ChatDelta{Role: "assistant", Content: new("")}})
	}
	if event.Text != "" || len(event.LogProbs) > 0 {
		add(wire.ChunkChoice{Delta: wire.ChatDelta{Content: &event.Text}, LogProbs: chatLogProbs(event.LogProbs)})
	}
	if event.FinishReason != "" {
		add(wire.ChunkChoice{FinishReason: wire.FinishReason(event.FinishReason)})
		if a.usage {
			last := add()
			last.Choices = []wire.ChunkChoice{}
			usage := usageToWire(event.Usage)
			last.Usage.Value = &usage
		}
	}
	return chunks
}
