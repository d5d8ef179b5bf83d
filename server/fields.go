package server

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"
	"strings"
)

// Fields that a request may not carry, because leaving them out of account would change its answer without a word.

// unavailable lists OpenAI's fields that hone does not implement, each with the values (compact JSON) that ask for
// nothing. null always asks for nothing.
var unavailable = map[string][]string{
	"audio":                  nil,
	"best_of":                {"1"},
	"chat_template":          nil, // a template from a request is code from a request
	"chat_template_kwargs":   {"{}"},
	"continue_final_message": {"false"},
	"echo":                   {"false"},
	"frequency_penalty":      {"0", "0.0"},
	"function_call":          {`"none"`},
	"functions":              {"[]"},
	"hone":                   {"{}"},
	"logit_bias":             {"{}"},
	"modalities":             {`["text"]`},
	"moderation":             nil,
	"n":                      {"1"},
	"prediction":             nil,
	"presence_penalty":       {"0", "0.0"},
	"reasoning_effort":       nil,
	"response_format":        {`{"type":"text"}`},
	"suffix":                 {`""`},
	"tool_choice":            {`"none"`},
	"tools":                  {"[]"},
	"verbosity":              {`"medium"`},
	"web_search_options":     nil,
}

// constraintWords are parts of the names of fields that constrain a completion in some server's dialect: guided_regex,
// json_schema, structured_outputs, grammar_lazy... constraintNames are those that have none of them.
var (
	constraintWords = []string{"guided", "grammar", "schema", "structured", "regex", "ebnf", "constraint", "structural_tag"}
	constraintNames = []string{"allowed_token_ids", "bad_words", "banned_tokens", "choice", "choices", "format", "logits_processors", "guidance"}
)

// refuseUnavailable returns a 400 that names the first field that would be left out of account.
func refuseUnavailable(fields map[string]json.RawMessage) error {
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		raw := fields[name]
		if isNull(raw) || name == "guided_choice" {
			continue
		}
		if harmless, ok := unavailable[name]; ok {
			var compact bytes.Buffer
			if err := json.Compact(&compact, raw); err != nil || !slices.Contains(harmless, compact.String()) {
				return invalid(name, "%s is not available%s", name, instead(name, harmless))
			}
			continue
		}
		lower := strings.ToLower(name)
		if slices.Contains(constraintNames, lower) || slices.ContainsFunc(constraintWords, func(word string) bool { return strings.Contains(lower, word) }) {
			return invalid(name, "%s is not available: the completion would not be constrained as asked; the constraint that is available is guided_choice", name)
		}
	}
	return nil
}

func instead(name string, harmless []string) string {
	switch {
	case name == "response_format":
		return `; leave it out or send {"type":"text"}. To get one of a few answers, use guided_choice`
	case name == "hone":
		return " in completions; leave it out. It holds the options of fine-tuning jobs"
	case len(harmless) == 0:
		return "; leave it out"
	}
	return "; leave it out or send " + harmless[0]
}
