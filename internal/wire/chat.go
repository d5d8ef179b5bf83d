package wire

import (
	"bytes"
	"encoding/json"
)

// ChatCompletionRequest is the body of POST /v1/chat/completions.
type ChatCompletionRequest struct {
	Model               string    `json:"model"`
	Messages            []Message `json:"messages"`
	MaxTokens           *int      `json:"max_tokens,omitempty"`
	MaxCompletionTokens *int      `json:"max_completion_tokens,omitempty"`
	LogProbs            *bool     `json:"logprobs,omitempty"`
	TopLogProbs         *int      `json:"top_logprobs,omitempty"`
	Sampling

	Tools             json.RawMessage `json:"tools,omitempty"`       // []Tool, kept as sent for the template
	ToolChoice        json.RawMessage `json:"tool_choice,omitempty"` // a string or {type: function, function: {name}}
	ParallelToolCalls *bool           `json:"parallel_tool_calls,omitempty"`

	ReasoningEffort      *string             `json:"reasoning_effort,omitempty"`
	ChatTemplateKwargs   *ChatTemplateKwargs `json:"chat_template_kwargs,omitempty"`
	ContinueFinalMessage *bool               `json:"continue_final_message,omitempty"` // the last message is the beginning of the answer
	AddGenerationPrompt  *bool               `json:"add_generation_prompt,omitempty"`
}

// ChatTemplateKwargs are the variables of a chat template that a request may set.
type ChatTemplateKwargs struct {
	EnableThinking *bool `json:"enable_thinking,omitempty"`
}

// Tool is a function that the model may call.
type Tool struct {
	Type     string   `json:"type"` // function
	Function Function `json:"function"`
}

// Function describes what a tool does; Parameters is the JSON schema of its arguments.
type Function struct {
	Name        string          `json:"name"`
	Description string          `json:"description,omitempty"`
	Parameters  json.RawMessage `json:"parameters,omitempty"`
	Strict      *bool           `json:"strict,omitempty"`
}

// ChatCompletion answers a request that is not streamed.
type ChatCompletion struct {
	ID                string       `json:"id"`     // chatcmpl-...
	Object            string       `json:"object"` // chat.completion
	Created           int64        `json:"created"`
	Model             string       `json:"model"`
	SystemFingerprint string       `json:"system_fingerprint"` // changes with the base model's file
	Choices           []ChatChoice `json:"choices"`
	Usage             *Usage       `json:"usage"`
}

// ChatChoice is one of the n completions.
type ChatChoice struct {
	Index        int          `json:"index"`
	Message      ChatMessage  `json:"message"`
	LogProbs     *LogProbs    `json:"logprobs"`
	FinishReason FinishReason `json:"finish_reason"`
	// ChoiceProbabilities, of a constraint to choices, has one for each of them, in the request's order.
	ChoiceProbabilities []ChoiceProbability `json:"choice_probabilities,omitempty"`
}

// ChoiceProbability is the probability of a choice as a whole; those of all choices sum to 1.
type ChoiceProbability struct {
	Choice      string  `json:"choice"`
	Probability float64 `json:"probability"`
}

// ChatMessage is the assistant's answer.
type ChatMessage struct {
	Role             string     `json:"role"`
	Content          *string    `json:"content"` // null beside tool calls
	ReasoningContent string     `json:"reasoning_content,omitempty"`
	Refusal          *string    `json:"refusal"`
	ToolCalls        []ToolCall `json:"tool_calls,omitempty"`
}

// ChatCompletionChunk is one event of a streamed answer.
type ChatCompletionChunk struct {
	ID                string        `json:"id"`
	Object            string        `json:"object"` // chat.completion.chunk
	Created           int64         `json:"created"`
	Model             string        `json:"model"`
	SystemFingerprint string        `json:"system_fingerprint"`
	Choices           []ChunkChoice `json:"choices"`
	// Usage is absent unless stream_options.include_usage was sent; then it is null in all chunks but the last.
	Usage Nullable[Usage] `json:"usage,omitzero"`
}

// ChunkChoice carries what a chunk adds to the answer.
type ChunkChoice struct {
	Index               int                 `json:"index"`
	Delta               ChatDelta           `json:"delta"`
	LogProbs            *LogProbs           `json:"logprobs"`
	FinishReason        FinishReason        `json:"finish_reason"`
	ChoiceProbabilities []ChoiceProbability `json:"choice_probabilities,omitempty"` // with finish_reason
}

// ChatDelta is {role, content} in a choice's first chunk, one kind of content in each of the next ones, and {} in the last.
type ChatDelta struct {
	Role             string           `json:"role,omitempty"`
	Content          Nullable[string] `json:"content,omitzero"` // null in the first chunk of a choice that begins with a tool call
	ReasoningContent string           `json:"reasoning_content,omitempty"`
	ToolCalls        []ToolCallDelta  `json:"tool_calls,omitempty"`
}

// ToolCallDelta is the beginning of a tool call, with ID, Type and Name, or a further part of its arguments.
type ToolCallDelta struct {
	Index    int               `json:"index"`
	ID       string            `json:"id,omitempty"`
	Type     string            `json:"type,omitempty"` // function
	Function FunctionCallDelta `json:"function"`
}

// FunctionCallDelta has Name in the first delta of a call.
type FunctionCallDelta struct {
	Name      string `json:"name,omitempty"`
	Arguments string `json:"arguments"`
}

// FinishReason is stop, length or tool_calls; the empty one is written as null.
type FinishReason string

// MarshalJSON writes null for a completion that goes on.
func (r FinishReason) MarshalJSON() ([]byte, error) {
	if r == "" {
		return []byte("null"), nil
	}
	return json.Marshal(string(r))
}

// NewNullable returns a field that is v.
func NewNullable[T any](v T) Nullable[T] { return Nullable[T]{Set: true, Value: &v} }

// Nullable is a field that is absent (the zero value), null (Set without Value) or a value. Its tag needs omitzero.
type Nullable[T any] struct {
	Set   bool
	Value *T
}

// IsZero says that the field is absent.
func (n Nullable[T]) IsZero() bool { return !n.Set }

// MarshalJSON writes the value or null.
func (n Nullable[T]) MarshalJSON() ([]byte, error) { return plainJSON(n.Value) }

// plainJSON is json.Marshal without the escapes of <, > and &, which whoever writes the whole may still add.
func plainJSON(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// UnmarshalJSON remembers that the field was there.
func (n *Nullable[T]) UnmarshalJSON(data []byte) error {
	n.Set = true
	return json.Unmarshal(data, &n.Value)
}

// LogProbs holds the log-probabilities of a completion's tokens.
type LogProbs struct {
	Content []TokenLogProb `json:"content"`
	Refusal []TokenLogProb `json:"refusal"`
}

// TokenLogProb is a token with its natural log-probability, -9999 standing for minus infinity.
type TokenLogProb struct {
	Token       string       `json:"token"`
	LogProb     float64      `json:"logprob"`
	Bytes       []int        `json:"bytes"` // the token's bytes, each in [0, 255]
	TopLogProbs []TopLogProb `json:"top_logprobs"`
}

// TopLogProb is one of the likeliest tokens of a position.
type TopLogProb struct {
	Token   string  `json:"token"`
	LogProb float64 `json:"logprob"`
	Bytes   []int   `json:"bytes"`
}

// Usage counts a request's tokens.
type Usage struct {
	PromptTokens            int                     `json:"prompt_tokens"`
	CompletionTokens        int                     `json:"completion_tokens"`
	TotalTokens             int                     `json:"total_tokens"`
	PromptTokensDetails     PromptTokensDetails     `json:"prompt_tokens_details"`
	CompletionTokensDetails CompletionTokensDetails `json:"completion_tokens_details"`
}

// PromptTokensDetails says how many prompt tokens needed no computation.
type PromptTokensDetails struct {
	CachedTokens int `json:"cached_tokens"`
	AudioTokens  int `json:"audio_tokens"`
}

// CompletionTokensDetails says how many tokens of the completions were reasoning.
type CompletionTokensDetails struct {
	ReasoningTokens          int `json:"reasoning_tokens"`
	AudioTokens              int `json:"audio_tokens"`
	AcceptedPredictionTokens int `json:"accepted_prediction_tokens"`
	RejectedPredictionTokens int `json:"rejected_prediction_tokens"`
}
