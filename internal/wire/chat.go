package wire

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// ChatCompletionRequest is the body of POST /v1/chat/completions. Pointers separate an absent field from a zero:
// temperature 0 is greedy, an absent temperature is OpenAI's default.
type ChatCompletionRequest struct {
	Model               string         `json:"model"`
	Messages            []Message      `json:"messages"`
	MaxTokens           *int           `json:"max_tokens,omitempty"`
	MaxCompletionTokens *int           `json:"max_completion_tokens,omitempty"`
	Temperature         *float64       `json:"temperature,omitempty"`
	TopP                *float64       `json:"top_p,omitempty"`
	N                   *int           `json:"n,omitempty"`
	Seed                *int64         `json:"seed,omitempty"`
	Stop                StringList     `json:"stop,omitempty"`
	LogProbs            *bool          `json:"logprobs,omitempty"`
	TopLogProbs         *int           `json:"top_logprobs,omitempty"`
	Stream              *bool          `json:"stream,omitempty"`
	StreamOptions       *StreamOptions `json:"stream_options,omitempty"`
	// GuidedChoice makes the completion exactly one of these strings.
	GuidedChoice []string `json:"guided_choice,omitempty"`
}

// StreamOptions asks for a last chunk with the request's token counts.
type StreamOptions struct {
	IncludeUsage bool `json:"include_usage,omitempty"`
}

// StringList is one string or an array of strings; it is written as an array.
type StringList []string

// UnmarshalJSON accepts "x", ["x", "y"] and null.
func (l *StringList) UnmarshalJSON(data []byte) error {
	if data = bytes.TrimSpace(data); len(data) > 0 && data[0] == '"' {
		var one string
		if err := json.Unmarshal(data, &one); err != nil {
			return err
		}
		*l = StringList{one}
		return nil
	}
	var many []string
	if err := json.Unmarshal(data, &many); err != nil {
		return fmt.Errorf("expected a string or an array of strings, not %.40s", data)
	}
	*l = many
	return nil
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

// ChatChoice is a completion; hone answers with exactly one.
type ChatChoice struct {
	Index        int          `json:"index"`
	Message      ChatMessage  `json:"message"`
	LogProbs     *LogProbs    `json:"logprobs"`
	FinishReason FinishReason `json:"finish_reason"`
}

// ChatMessage is the assistant's answer.
type ChatMessage struct {
	Role    string  `json:"role"`
	Content string  `json:"content"`
	Refusal *string `json:"refusal"`
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
	Index        int          `json:"index"`
	Delta        ChatDelta    `json:"delta"`
	LogProbs     *LogProbs    `json:"logprobs"`
	FinishReason FinishReason `json:"finish_reason"`
}

// ChatDelta is {role, content: ""} in the first chunk, {content} in the next ones and {} in the last.
type ChatDelta struct {
	Role    string  `json:"role,omitempty"`
	Content *string `json:"content,omitempty"`
}

// FinishReason is stop or length; the empty one is written as null.
type FinishReason string

// MarshalJSON writes null for a completion that goes on.
func (r FinishReason) MarshalJSON() ([]byte, error) {
	if r == "" {
		return []byte("null"), nil
	}
	return json.Marshal(string(r))
}

// Nullable is a field that is absent (the zero value), null (Set without Value) or a value. Its tag needs omitzero.
type Nullable[T any] struct {
	Set   bool
	Value *T
}

// IsZero says that the field is absent.
func (n Nullable[T]) IsZero() bool { return !n.Set }

// MarshalJSON writes the value or null.
func (n Nullable[T]) MarshalJSON() ([]byte, error) { return json.Marshal(n.Value) }

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

// CompletionTokensDetails is in OpenAI's schema; hone does not separate reasoning from content.
type CompletionTokensDetails struct {
	ReasoningTokens          int `json:"reasoning_tokens"`
	AudioTokens              int `json:"audio_tokens"`
	AcceptedPredictionTokens int `json:"accepted_prediction_tokens"`
	RejectedPredictionTokens int `json:"rejected_prediction_tokens"`
}
