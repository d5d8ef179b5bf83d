package wire

// CompletionRequest is the body of POST /v1/completions: a prompt that goes to the model as it is, with no template.
type CompletionRequest struct {
	Model         string         `json:"model"`
	Prompt        StringList     `json:"prompt"` // one prompt
	MaxTokens     *int           `json:"max_tokens,omitempty"`
	Temperature   *float64       `json:"temperature,omitempty"`
	TopP          *float64       `json:"top_p,omitempty"`
	N             *int           `json:"n,omitempty"`
	Seed          *int64         `json:"seed,omitempty"`
	Stop          StringList     `json:"stop,omitempty"`
	LogProbs      *int           `json:"logprobs,omitempty"` // how many alternatives to return, 0 to 5
	Stream        *bool          `json:"stream,omitempty"`
	StreamOptions *StreamOptions `json:"stream_options,omitempty"`
	GuidedChoice  []string       `json:"guided_choice,omitempty"`
}

// Completion answers a completion request, whole or as one event of a stream: OpenAI gives both the same shape.
type Completion struct {
	ID                string             `json:"id"`     // cmpl-...
	Object            string             `json:"object"` // text_completion
	Created           int64              `json:"created"`
	Model             string             `json:"model"`
	SystemFingerprint string             `json:"system_fingerprint"`
	Choices           []CompletionChoice `json:"choices"`
	Usage             Nullable[Usage]    `json:"usage,omitzero"`
}

// CompletionChoice is a completion's text, or what an event adds to it.
type CompletionChoice struct {
	Text         string              `json:"text"`
	Index        int                 `json:"index"`
	LogProbs     *CompletionLogProbs `json:"logprobs"`
	FinishReason FinishReason        `json:"finish_reason"`
}

// CompletionLogProbs holds one element a token in each of its lists.
type CompletionLogProbs struct {
	Tokens        []string             `json:"tokens"`
	TokenLogProbs []float64            `json:"token_logprobs"`
	TopLogProbs   []map[string]float64 `json:"top_logprobs"`
	TextOffset    []int                `json:"text_offset"` // in characters, from the start of the completion
}
