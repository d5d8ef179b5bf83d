package wire

// CompletionRequest is the body of POST /v1/completions: prompts that go to the model as they are, with no template.
type CompletionRequest struct {
	Model     string `json:"model"`
	Prompt    Texts  `json:"prompt"` // choices of prompt p have the indices p*n to p*n + n-1
	MaxTokens *int   `json:"max_tokens,omitempty"`
	LogProbs  *int   `json:"logprobs,omitempty"` // how many alternatives to return, 0 to 20
	Echo      *bool  `json:"echo,omitempty"`     // text and logprobs begin with the prompt's
	BestOf    *int   `json:"best_of,omitempty"`  // n, or absent
	Sampling
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
	// ChoiceProbabilities are as in ChatChoice.
	ChoiceProbabilities []ChoiceProbability `json:"choice_probabilities,omitempty"`
}

// CompletionLogProbs holds one element a token in each of its lists. The first token of an echoed prompt has none, and
// null in both.
type CompletionLogProbs struct {
	Tokens        []string             `json:"tokens"`
	TokenLogProbs []*float64           `json:"token_logprobs"`
	TopLogProbs   []map[string]float64 `json:"top_logprobs"` // the alternatives and the token itself
	TextOffset    []int                `json:"text_offset"`  // in characters, from the start of the choice's text
}
