package wire

import "encoding/json"

// TokenizeRequest is the body of POST /tokenize, in vLLM's shape: a text, or messages with the model's chat template.
type TokenizeRequest struct {
	Model            string          `json:"model,omitempty"` // absent: the only one
	Prompt           *string         `json:"prompt,omitempty"`
	AddSpecialTokens *bool           `json:"add_special_tokens,omitempty"` // of Prompt; absent means true
	Messages         []Message       `json:"messages,omitempty"`
	Tools            json.RawMessage `json:"tools,omitempty"`
	ReturnTokenStrs  *bool           `json:"return_token_strs,omitempty"`
}

// TokenizeResponse answers it.
type TokenizeResponse struct {
	Count       int      `json:"count"`
	MaxModelLen int      `json:"max_model_len"`
	Tokens      []int32  `json:"tokens"`
	TokenStrs   []string `json:"token_strs"` // null unless asked for
}

// DetokenizeRequest is the body of POST /detokenize.
type DetokenizeRequest struct {
	Model  string   `json:"model,omitempty"`
	Tokens TokenIDs `json:"tokens"`
}

// DetokenizeResponse answers it.
type DetokenizeResponse struct {
	Prompt string `json:"prompt"`
}

// TokenizerInfo answers GET /tokenizer_info.
type TokenizerInfo struct {
	BOSToken       *string `json:"bos_token"` // null if there is none
	EOSToken       *string `json:"eos_token"`
	ModelMaxLength int     `json:"model_max_length"`
}
