package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// DecisionRequest is the body of POST /v1/decisions: questions about one input, each answered with probabilities.
type DecisionRequest struct {
	Model     string             `json:"model"`
	Input     DecisionInput      `json:"input"`
	Questions []DecisionQuestion `json:"questions"`
}

// DecisionInput is what the questions are about: a string, or user messages.
type DecisionInput []Message

// MarshalJSON writes one message as a string.
func (in DecisionInput) MarshalJSON() ([]byte, error) {
	if len(in) == 1 && in[0].Role == "user" {
		return plainJSON(in[0].Content)
	}
	return plainJSON([]Message(in))
}

// UnmarshalJSON accepts both forms.
func (in *DecisionInput) UnmarshalJSON(data []byte) error {
	data = bytes.TrimSpace(data)
	if len(data) > 0 && data[0] == '"' {
		var text string
		if err := json.Unmarshal(data, &text); err != nil {
			return err
		}
		*in = DecisionInput{{Role: "user", Content: text}}
		return nil
	}
	return json.Unmarshal(data, (*[]Message)(in))
}

// Types of DecisionQuestion and DecisionAnswer.
const (
	DecisionChoiceType    = "choice"
	DecisionPredicateType = "predicate"
	DecisionScoreType     = "score"
)

// DecisionQuestion is a choice among Choices, a predicate that holds or not, or a score on the scale of Levels.
type DecisionQuestion struct {
	Type         string           `json:"type"`
	Name         *string          `json:"name,omitempty"`
	Instructions string           `json:"instructions"`
	Choices      []DecisionChoice `json:"choices,omitempty"`
	Levels       []DecisionLevel  `json:"levels,omitempty"`
}

// DecisionChoice is one of the answers to a choice.
type DecisionChoice struct {
	Value       ChoiceValue `json:"value"`
	Description string      `json:"description,omitempty"`
}

// DecisionLevel is a step of a score's scale, from the lowest.
type DecisionLevel struct {
	Label       string `json:"label"`
	Description string `json:"description,omitempty"`
}

// ChoiceValue is a string or, written as JSON's true and false, a boolean: "true" and true are two values.
type ChoiceValue struct {
	Text    string
	Boolean bool // Text is true or false
}

// MarshalJSON writes the value as it was sent.
func (v ChoiceValue) MarshalJSON() ([]byte, error) {
	if v.Boolean {
		return []byte(v.Text), nil
	}
	return plainJSON(v.Text)
}

// UnmarshalJSON accepts a string and a boolean.
func (v *ChoiceValue) UnmarshalJSON(data []byte) error {
	switch text := string(bytes.TrimSpace(data)); {
	case text == "true", text == "false":
		*v = ChoiceValue{Text: text, Boolean: true}
		return nil
	case len(text) > 0 && text[0] == '"':
		*v = ChoiceValue{}
		return json.Unmarshal(data, &v.Text)
	default:
		return fmt.Errorf("expected a string, true or false, not %.40s", text)
	}
}

// Decision answers the questions in their order.
type Decision struct {
	Model   string           `json:"model"`
	Answers []DecisionAnswer `json:"answers"`
	Usage   DecisionUsage    `json:"usage"`
}

// DecisionAnswer is one of Predicate, Choice and Score.
type DecisionAnswer struct {
	Predicate *PredicateAnswer
	Choice    *ChoiceAnswer
	Score     *ScoreAnswer
}

// PredicateAnswer is the probability that the predicate holds.
type PredicateAnswer struct {
	Type        string  `json:"type"`
	Name        *string `json:"name"`
	Probability float64 `json:"probability"`
}

// ChoiceAnswer is the likeliest of the choices; Confidence is its probability.
type ChoiceAnswer struct {
	Type          string             `json:"type"`
	Name          *string            `json:"name"`
	Choice        ChoiceValue        `json:"choice"`
	Probabilities []ValueProbability `json:"probabilities"`
	Confidence    float64            `json:"confidence"`
}

// ValueProbability is that of a choice.
type ValueProbability struct {
	Value       ChoiceValue `json:"value"`
	Probability float64     `json:"probability"`
}

// ScoreAnswer is the expected level, counted from 0; Confidence is the probability of the likeliest one.
type ScoreAnswer struct {
	Type          string             `json:"type"`
	Name          *string            `json:"name"`
	Score         float64            `json:"score"`
	Probabilities []LevelProbability `json:"probabilities"`
	Confidence    float64            `json:"confidence"`
}

// LevelProbability is that of a level.
type LevelProbability struct {
	Value       int     `json:"value"`
	Label       string  `json:"label"`
	Probability float64 `json:"probability"`
}

// MarshalJSON writes the one that is set.
func (a DecisionAnswer) MarshalJSON() ([]byte, error) {
	switch {
	case a.Predicate != nil:
		return plainJSON(a.Predicate)
	case a.Choice != nil:
		return plainJSON(a.Choice)
	case a.Score != nil:
		return plainJSON(a.Score)
	}
	return nil, errors.New("an answer to a decision that is none of predicate, choice and score")
}

// UnmarshalJSON reads an answer by its type.
func (a *DecisionAnswer) UnmarshalJSON(data []byte) error {
	var head struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return err
	}
	*a = DecisionAnswer{}
	switch head.Type {
	case DecisionPredicateType:
		return json.Unmarshal(data, &a.Predicate)
	case DecisionChoiceType:
		return json.Unmarshal(data, &a.Choice)
	case DecisionScoreType:
		return json.Unmarshal(data, &a.Score)
	}
	return fmt.Errorf("expected an answer of type predicate, choice or score, not %q", head.Type)
}

// DecisionUsage counts the tokens of all questions, under the names that OpenAI gives them here.
type DecisionUsage struct {
	InputTokens         int                  `json:"input_tokens"`
	InputTokensDetails  DecisionInputTokens  `json:"input_tokens_details"`
	OutputTokens        int                  `json:"output_tokens"`
	OutputTokensDetails DecisionOutputTokens `json:"output_tokens_details"`
	TotalTokens         int                  `json:"total_tokens"`
}

// DecisionInputTokens says how many input tokens needed no computation.
type DecisionInputTokens struct {
	CachedTokens     int `json:"cached_tokens"`
	CacheWriteTokens int `json:"cache_write_tokens"`
}

// DecisionOutputTokens is in OpenAI's schema; decisions do not reason.
type DecisionOutputTokens struct {
	ReasoningTokens int `json:"reasoning_tokens"`
}
