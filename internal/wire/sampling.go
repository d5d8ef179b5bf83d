package wire

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// Sampling holds the fields that chat and plain completions share. Pointers separate an absent field from a zero:
// temperature 0 is greedy, an absent temperature is OpenAI's default.
type Sampling struct {
	N             *int           `json:"n,omitempty"`
	Stop          StringList     `json:"stop,omitempty"`
	Seed          *int64         `json:"seed,omitempty"`
	Stream        *bool          `json:"stream,omitempty"`
	StreamOptions *StreamOptions `json:"stream_options,omitempty"`

	Temperature      *float64           `json:"temperature,omitempty"`
	TopP             *float64           `json:"top_p,omitempty"`
	PresencePenalty  *float64           `json:"presence_penalty,omitempty"`
	FrequencyPenalty *float64           `json:"frequency_penalty,omitempty"`
	LogitBias        map[string]float64 `json:"logit_bias,omitempty"` // by token id

	// vLLM's names, which llama-server and SGLang share.
	TopK              *int     `json:"top_k,omitempty"` // 0 and -1 keep all
	MinP              *float64 `json:"min_p,omitempty"`
	RepetitionPenalty *float64 `json:"repetition_penalty,omitempty"`
	MinTokens         *int     `json:"min_tokens,omitempty"`
	IgnoreEOS         *bool    `json:"ignore_eos,omitempty"`

	Constraints
}

// Constraints are the fields that say what a completion must match as a whole; a request may use one of them.
type Constraints struct {
	ResponseFormat    *ResponseFormat    `json:"response_format,omitempty"`    // OpenAI's
	StructuredOutputs *StructuredOutputs `json:"structured_outputs,omitempty"` // vLLM's from 0.12
	GuidedChoice      []string           `json:"guided_choice,omitempty"`      // vLLM's before, as all guided_*
	GuidedJSON        json.RawMessage    `json:"guided_json,omitempty"`        // a schema, or a string that holds one
	GuidedRegex       *string            `json:"guided_regex,omitempty"`
	GuidedGrammar     *string            `json:"guided_grammar,omitempty"` // Lark, as Grammar
	Grammar           *string            `json:"grammar,omitempty"`        // llama-server's name
}

// ResponseFormat is OpenAI's: type text, json_object or json_schema. Schema beside json_object is llama-server's.
type ResponseFormat struct {
	Type       string          `json:"type"`
	JSONSchema *JSONSchema     `json:"json_schema,omitempty"`
	Schema     json.RawMessage `json:"schema,omitempty"`
}

// JSONSchema is a named schema. Strict or not, every answer matches it.
type JSONSchema struct {
	Name        string          `json:"name"`
	Description string          `json:"description,omitempty"`
	Schema      json.RawMessage `json:"schema"`
	Strict      *bool           `json:"strict,omitempty"`
}

// StructuredOutputs holds one constraint.
type StructuredOutputs struct {
	JSON       json.RawMessage `json:"json,omitempty"` // a schema, or a string that holds one
	Regex      *string         `json:"regex,omitempty"`
	Choice     []string        `json:"choice,omitempty"`
	Grammar    *string         `json:"grammar,omitempty"`
	JSONObject *bool           `json:"json_object,omitempty"`
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

// TokenIDs are the ids of tokens.
type TokenIDs []int32

// UnmarshalJSON refuses null among the ids, which encoding/json would read as token 0.
func (ids *TokenIDs) UnmarshalJSON(data []byte) error {
	if data = bytes.TrimSpace(data); string(data) == "null" {
		*ids = nil
		return nil
	}
	var elements []*int32
	if err := json.Unmarshal(data, &elements); err != nil {
		return err
	}
	*ids = make(TokenIDs, len(elements))
	for i, id := range elements {
		if id == nil {
			return fmt.Errorf("[%d]: expected an integer, not null", i)
		}
		(*ids)[i] = *id
	}
	return nil
}

// Text is a string, or its token ids if Tokens is not nil.
type Text struct {
	String string
	Tokens TokenIDs
}

// MarshalJSON writes the string or the array of ids.
func (t Text) MarshalJSON() ([]byte, error) {
	if t.Tokens != nil {
		return plainJSON(t.Tokens)
	}
	return plainJSON(t.String)
}

// UnmarshalJSON accepts both.
func (t *Text) UnmarshalJSON(data []byte) error {
	*t = Text{}
	switch data = bytes.TrimSpace(data); {
	case len(data) > 0 && data[0] == '"':
		return json.Unmarshal(data, &t.String)
	case len(data) > 0 && data[0] == '[':
		t.Tokens = TokenIDs{}
		if err := json.Unmarshal(data, &t.Tokens); err == nil {
			return nil
		}
	}
	return fmt.Errorf("expected a string or an array of token ids, not %.40s", data)
}

// Texts are the prompts of a completion and the inputs of embeddings: one text or several.
type Texts []Text

// MarshalJSON writes one text as itself and several as an array.
func (t Texts) MarshalJSON() ([]byte, error) {
	if len(t) == 1 {
		return plainJSON(t[0])
	}
	return plainJSON([]Text(t))
}

// UnmarshalJSON accepts "x", ["x", "y"], [1, 2] and [[1, 2], [3]].
func (t *Texts) UnmarshalJSON(data []byte) error {
	if data = bytes.TrimSpace(data); string(data) == "null" {
		*t = nil
		return nil
	}
	var elements []json.RawMessage
	if json.Unmarshal(data, &elements) == nil && (len(elements) == 0 || elements[0][0] == '"' || elements[0][0] == '[') {
		*t = make(Texts, len(elements))
		for i, element := range elements {
			if err := (*t)[i].UnmarshalJSON(element); err != nil {
				return err
			}
		}
		return nil
	}
	var one Text
	if err := one.UnmarshalJSON(data); err != nil {
		return fmt.Errorf("expected a string, an array of token ids, or an array of either, not %.40s", data)
	}
	*t = Texts{one}
	return nil
}
