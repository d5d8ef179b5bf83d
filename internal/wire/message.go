// Package wire holds the JSON types of the HTTP API: OpenAI's shapes, and what hone adds to them in objects named hone.
//
//	json.NewEncoder(w).Encode(wire.Deleted{ID: id, Object: "file", Deleted: true})
//
// Clients are strict in different ways, so answers keep to one rule: integers are integers, a healthy job has error null,
// hyperparameters is an object, result_files a list, has_more is always there, and no answer is empty.
package wire

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// Message is one message of a conversation: a chat request's, a chat completion's or a training row's.
// Content parts of type text are flattened to one string when it is decoded; parts of any other type are an error.
type Message struct {
	Role       string     `json:"role"`
	Content    string     `json:"content"`
	Name       string     `json:"name,omitempty"`
	ToolCalls  []ToolCall `json:"tool_calls,omitempty"`
	ToolCallID string     `json:"tool_call_id,omitempty"`
	// ReasoningContent is an earlier answer's reasoning, for templates that write it (Qwen 3 within a chain of calls). Training
	// rows do not have it: their reasoning stands in Content.
	ReasoningContent string `json:"reasoning_content,omitempty"`
	// Weight is a training row's loss weight of an assistant message: nil (trained), 0 (not trained) or 1.
	Weight *float64 `json:"weight,omitempty"`
}

// ToolCall is one function call of an assistant message.
type ToolCall struct {
	ID       string       `json:"id,omitempty"`
	Type     string       `json:"type"`
	Function FunctionCall `json:"function"`
}

// FunctionCall names the function; Arguments is JSON text, as OpenAI sends it.
type FunctionCall struct {
	Name      string `json:"name"`
	Arguments string `json:"arguments"`
}

// UnmarshalJSON accepts content as a string, as null and as an array of text parts.
func (m *Message) UnmarshalJSON(data []byte) error {
	type plain Message
	raw := struct {
		*plain
		Content json.RawMessage `json:"content"`
	}{plain: (*plain)(m)}
	if err := json.Unmarshal(data, &raw); err != nil {
		return err
	}
	content := bytes.TrimSpace(raw.Content)
	switch {
	case len(content) == 0 || string(content) == "null":
		m.Content = ""
	case content[0] == '"':
		return json.Unmarshal(content, &m.Content)
	case content[0] == '[':
		var parts []struct {
			Type string  `json:"type"`
			Text *string `json:"text"`
		}
		if err := json.Unmarshal(content, &parts); err != nil {
			return fmt.Errorf("content parts: %w", err)
		}
		var text strings.Builder
		for i, part := range parts {
			if part.Type != "text" && part.Type != "input_text" || part.Text == nil { // input_text is the word of OpenAI's newer endpoints
				return fmt.Errorf("content[%d]: part of type %q is not supported, only text", i, part.Type)
			}
			text.WriteString(*part.Text)
		}
		m.Content = text.String()
	default:
		return fmt.Errorf("content must be a string or an array of text parts, not %.20s", content)
	}
	return nil
}
