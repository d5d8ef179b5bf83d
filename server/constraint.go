package server

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// Bounds of a request's constraint. The runner has more: depth, and the cost of compiling.
const (
	minChoices         = 2
	maxChoices         = 256
	maxChoiceBytes     = 4096
	maxConstraintBytes = 256 << 10
)

// constraint is one of the ways to ask for a child.Constraint, and the field that asks.
type constraint struct {
	field string
	child.Constraint
}

// constraintOf finds the request's constraint, nil if there is none. Two are refused, as no field says which one wins.
func constraintOf(f *wire.Constraints) (*constraint, error) {
	var found []constraint
	text := func(field, kind string, value *string) {
		if value != nil {
			found = append(found, constraint{field, child.Constraint{Kind: kind, Text: *value}})
		}
	}
	choices := func(field string, values []string) {
		if values != nil {
			found = append(found, constraint{field, child.Constraint{Kind: child.ConstraintChoice, Choices: values}})
		}
	}
	schema := func(field string, raw json.RawMessage) error {
		if len(raw) == 0 || isNull(raw) {
			return nil
		}
		text, err := schemaText(field, raw)
		if err == nil {
			found = append(found, constraint{field, child.Constraint{Kind: child.ConstraintJSONSchema, Text: text}})
		}
		return err
	}
	choices("guided_choice", f.GuidedChoice)
	if err := schema("guided_json", f.GuidedJSON); err != nil {
		return nil, err
	}
	text("guided_regex", child.ConstraintRegex, f.GuidedRegex)
	text("guided_grammar", child.ConstraintLark, f.GuidedGrammar)
	text("grammar", child.ConstraintLark, f.Grammar)
	if o := f.StructuredOutputs; o != nil {
		choices("structured_outputs.choice", o.Choice)
		if err := schema("structured_outputs.json", o.JSON); err != nil {
			return nil, err
		}
		text("structured_outputs.regex", child.ConstraintRegex, o.Regex)
		text("structured_outputs.grammar", child.ConstraintLark, o.Grammar)
		if o.JSONObject != nil && *o.JSONObject {
			found = append(found, constraint{"structured_outputs.json_object", child.Constraint{Kind: child.ConstraintJSONObject}})
		}
	}
	if r := f.ResponseFormat; r != nil {
		switch {
		case r.Type == "text":
		case r.Type == "json_object" && len(r.Schema) > 0:
			if err := schema("response_format.schema", r.Schema); err != nil {
				return nil, err
			}
		case r.Type == "json_object":
			found = append(found, constraint{"response_format", child.Constraint{Kind: child.ConstraintJSONObject}})
		case r.Type == "json_schema" && (r.JSONSchema == nil || len(r.JSONSchema.Schema) == 0 || isNull(r.JSONSchema.Schema)):
			return nil, invalid("response_format.json_schema.schema", "response_format.json_schema.schema is required: a JSON schema")
		case r.Type == "json_schema":
			if err := schema("response_format.json_schema.schema", r.JSONSchema.Schema); err != nil {
				return nil, err
			}
		default:
			return nil, invalid("response_format.type", "response_format.type is %q, expected text, json_object or json_schema", r.Type)
		}
	}
	if len(found) == 0 {
		return nil, nil //nolint:nilnil // most requests have none, which is no error
	}
	if len(found) > 1 {
		return nil, twoConstraints(found[0].field, found[1].field)
	}
	only := &found[0]
	if len(only.Text) > maxConstraintBytes {
		return nil, invalid(only.field, "%s has %d bytes, expected at most %d", only.field, len(only.Text), maxConstraintBytes)
	}
	if only.Text == "" && (only.Kind == child.ConstraintRegex || only.Kind == child.ConstraintLark) {
		return nil, invalid(only.field, "%s is empty: nothing but the empty text would match it", only.field)
	}
	return only, nil
}

// twoConstraints refuses what no completion may be able to match, and no field orders.
func twoConstraints(first, second string) error {
	return invalid(second, "%s and %s both constrain the completion; send one of them", first, second)
}

// schemaText is a schema as compact JSON text, from the schema itself or from a string that holds it. Equal schemas have
// equal texts, however they are laid out.
func schemaText(field string, raw json.RawMessage) (string, error) {
	if raw = bytes.TrimSpace(raw); raw[0] == '"' {
		var text string
		if err := json.Unmarshal(raw, &text); err != nil {
			return "", invalid(field, "%s: %v", field, err)
		}
		raw = []byte(strings.TrimSpace(text))
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, raw); err != nil || !slices.Contains([]byte("{tf"), compact.Bytes()[0]) {
		return "", invalid(field, "%s is not a JSON schema: expected an object, or a string that holds one", field)
	}
	return compact.String(), nil
}

// applyConstraint checks the request's constraint and writes it into req, whose other fields are set.
func applyConstraint(f *wire.Sampling, req *child.GenerateRequest) (field string, err error) {
	found, err := constraintOf(&f.Constraints)
	if err != nil || found == nil {
		return "", err
	}
	if mode := req.ToolChoice.Mode; len(req.Tools) > 0 && mode != child.ToolNone {
		return "", twoConstraints("tools", found.field)
	}
	if req.PromptOnly {
		return "", invalid(found.field, "%s constrains a completion, and max_tokens is 0", found.field)
	}
	req.Constraint = &found.Constraint
	if found.Kind != child.ConstraintChoice {
		return found.field, nil
	}
	if err := checkChoices(found.field, found.Choices, f.Stop); err != nil {
		return "", err
	}
	req.Stop = nil // it is in none of the choices, so it cannot occur
	if f.Temperature == nil {
		// Clients that mean 0 may be unable to send it, and the likeliest choice is what is asked for.
		req.Temperature = 0
	}
	return found.field, nil
}

func checkChoices(field string, choices, stops []string) error {
	if len(choices) < minChoices || len(choices) > maxChoices {
		return invalid(field, "%s has %d strings, expected %d to %d", field, len(choices), minChoices, maxChoices)
	}
	seen := make(map[string]int, len(choices))
	for i, choice := range choices {
		if choice == "" || len(choice) > maxChoiceBytes {
			return invalid(field, "%s[%d] has %d bytes, expected 1 to %d", field, i, len(choice), maxChoiceBytes)
		}
		if j, again := seen[choice]; again {
			return invalid(field, "%s[%d] and [%d] are both %q", field, j, i, choice)
		}
		seen[choice] = i
		for _, stop := range stops {
			if strings.Contains(choice, stop) {
				return invalid("stop", "the stop string %q is part of %s[%d], %q, and would cut it off", stop, field, i, choice)
			}
		}
	}
	return nil
}
