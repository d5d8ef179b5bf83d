package server

import (
	"encoding/json"
	"slices"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

const maxMessages = 4096

// reasoningEfforts are OpenAI's. None means no thinking too; what the others mean is up to the model's template.
var reasoningEfforts = []string{"none", "minimal", "low", "medium", "high", "xhigh", "max"}

// chatCompletion answers POST /v1/chat/completions, streamed or whole.
func (s *Server) chatCompletion(c *gin.Context) error {
	var req wire.ChatCompletionRequest
	if err := decode(c, &req, refuseUnavailable, refuseInChat); err != nil {
		return err
	}
	order, err := chatOrder(&req)
	if err != nil {
		return err
	}
	order.id = newID("chatcmpl-")
	return s.answer(c, req.Model, order, func(head answerHead) answer {
		return &chatAnswer{answerHead: head, n: order.n}
	})
}

// chatOrder checks a request's fields and turns them into the runner's.
func chatOrder(req *wire.ChatCompletionRequest) (*order, error) {
	var generate child.GenerateRequest
	if err := checkMessages(req.Messages); err != nil {
		return nil, err
	}
	generate.Messages = conversation(req.Messages)
	if err := applyTools(req, &generate); err != nil {
		return nil, err
	}
	if req.MaxTokens != nil && req.MaxCompletionTokens != nil && *req.MaxTokens != *req.MaxCompletionTokens {
		return nil, invalid("max_tokens", "max_tokens is %d and max_completion_tokens is %d: they mean the same, send one", *req.MaxTokens, *req.MaxCompletionTokens)
	}
	for name, limit := range map[string]*int{"max_tokens": req.MaxTokens, "max_completion_tokens": req.MaxCompletionTokens} {
		if limit == nil {
			continue
		}
		if *limit < 1 {
			return nil, invalid(name, "%s is %d, expected at least 1", name, *limit)
		}
		generate.MaxTokens = *limit
	}
	generate.LogProbs = req.LogProbs != nil && *req.LogProbs
	if req.TopLogProbs != nil {
		generate.TopLogProbs = *req.TopLogProbs
		switch {
		case generate.TopLogProbs < 0 || generate.TopLogProbs > maxTopLogProbs:
			return nil, invalid("top_logprobs", "top_logprobs is %d, expected 0 to %d", generate.TopLogProbs, maxTopLogProbs)
		case !generate.LogProbs && generate.TopLogProbs > 0:
			return nil, invalid("top_logprobs", "top_logprobs needs logprobs: true")
		}
	}
	if err := applyTemplate(req, &generate); err != nil {
		return nil, err
	}
	return newOrder(&req.Sampling, &generate, 1)
}

// applyTemplate checks the fields that say how the template writes the prompt.
func applyTemplate(req *wire.ChatCompletionRequest, generate *child.GenerateRequest) error {
	if req.ReasoningEffort != nil {
		if !slices.Contains(reasoningEfforts, *req.ReasoningEffort) {
			return invalid("reasoning_effort", "reasoning_effort is %.40q, expected one of %v", *req.ReasoningEffort, reasoningEfforts)
		}
		generate.ReasoningEffort = *req.ReasoningEffort
	}
	if req.ChatTemplateKwargs != nil && req.ChatTemplateKwargs.EnableThinking != nil {
		generate.EnableThinking = req.ChatTemplateKwargs.EnableThinking
	}
	generate.ContinueFinalMessage = req.ContinueFinalMessage != nil && *req.ContinueFinalMessage
	last := req.Messages[len(req.Messages)-1]
	switch adds := req.AddGenerationPrompt; {
	case generate.ContinueFinalMessage && adds != nil && *adds:
		return invalid("add_generation_prompt", "add_generation_prompt and continue_final_message are both true: the answer begins a new message or continues the last one")
	case generate.ContinueFinalMessage && (last.Role != "assistant" || len(last.ToolCalls) > 0):
		return invalid("continue_final_message", "continue_final_message needs a last message of role assistant without tool_calls, which is the beginning of the answer")
	case !generate.ContinueFinalMessage && adds != nil && !*adds:
		return invalid("add_generation_prompt", "add_generation_prompt: false is available with continue_final_message: true only")
	}
	return nil
}

// chatAnswer makes completions' chunks, or the whole.
type chatAnswer struct {
	answerHead

	n     int
	begun bool
}

func (a *chatAnswer) whole(all collected) any {
	choices := make([]wire.ChatChoice, len(all.choices))
	for i, choice := range all.choices {
		message := wire.ChatMessage{Role: "assistant", Content: &choice.text, ReasoningContent: choice.reasoning, ToolCalls: choice.toolCalls}
		if choice.text == "" && len(choice.toolCalls) > 0 {
			message.Content = nil
		}
		choices[i] = wire.ChatChoice{
			Index: i, Message: message, LogProbs: chatLogProbs(choice.logProbs), FinishReason: wire.FinishReason(choice.finishReason),
			ChoiceProbabilities: a.probabilities(choice.choiceProbabilities),
		}
	}
	return wire.ChatCompletion{
		ID: a.id, Object: "chat.completion", Created: a.created, Model: a.model, SystemFingerprint: a.fingerprint, Usage: &all.usage, Choices: choices,
	}
}

// chunks are those of one event: the choices' role first of all, then reasoning, text and calls, then the reason for the
// choice's end; last of all the usage.
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
	deltas := deltasOf(event)
	if !a.begun {
		// All choices begin at once and in order: the stream helper of OpenAI's Python client takes them in no other.
		a.begun = true
		for i := range a.n {
			first := wire.ChatDelta{Role: "assistant", Content: wire.NewNullable("")}
			if i == event.Index && len(deltas) > 0 && len(deltas[0].ToolCalls) > 0 {
				first.Content.Value = nil
			}
			add(wire.ChunkChoice{Index: i, Delta: first})
		}
	}
	logProbs := chatLogProbs(event.LogProbs)
	for _, delta := range deltas {
		add(wire.ChunkChoice{Index: event.Index, Delta: delta, LogProbs: logProbs})
		logProbs = nil
	}
	if event.FinishReason != "" {
		add(wire.ChunkChoice{
			Index: event.Index, FinishReason: wire.FinishReason(event.FinishReason), ChoiceProbabilities: a.probabilities(event.ChoiceProbabilities),
		})
	}
	if event.Usage != nil && a.usage {
		last := add()
		last.Choices = []wire.ChunkChoice{}
		usage := usageToWire(event.Usage)
		last.Usage.Value = &usage
	}
	return chunks
}

// deltasOf are what an event adds to its choice, one kind in each, as OpenAI streams them.
func deltasOf(event child.GenerateEvent) []wire.ChatDelta {
	var deltas []wire.ChatDelta
	if event.Reasoning != "" {
		deltas = append(deltas, wire.ChatDelta{ReasoningContent: event.Reasoning})
	}
	if event.Text != "" {
		deltas = append(deltas, wire.ChatDelta{Content: wire.NewNullable(event.Text)})
	}
	for _, call := range event.ToolCalls {
		delta := wire.ToolCallDelta{Index: call.Index, ID: call.ID, Function: wire.FunctionCallDelta{Name: call.Name, Arguments: call.Arguments}}
		if call.ID != "" {
			delta.Type = "function"
		}
		deltas = append(deltas, wire.ChatDelta{ToolCalls: []wire.ToolCallDelta{delta}})
	}
	if len(deltas) == 0 && len(event.LogProbs) > 0 { // of tokens whose text is held back
		deltas = append(deltas, wire.ChatDelta{Content: wire.NewNullable("")})
	}
	return deltas
}

// refuseInChat refuses fields of /v1/completions, and what OpenAI has given up.
func refuseInChat(fields map[string]json.RawMessage) error {
	if raw := fields["logprobs"]; len(raw) > 0 && raw[0] >= '0' && raw[0] <= '9' {
		return invalid("logprobs", "logprobs is true or false in chat completions; the number of alternatives is top_logprobs")
	}
	for name, harmless := range map[string]string{"echo": "false", "best_of": "1"} {
		if raw := fields[name]; len(raw) > 0 && !isNull(raw) && string(raw) != harmless {
			return invalid(name, "%s is a field of /v1/completions and not available in chat completions; leave it out", name)
		}
	}
	return refuseFunctionCalls(fields["messages"])
}
