package server

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Fields that a request may not carry, because leaving them out of account would change its answer without a word.

// unavailable lists fields that hone does not implement, OpenAI's and other servers', each with the values (compact JSON)
// that ask for nothing. null always asks for nothing.
var unavailable = map[string][]string{
	"audio":              nil,
	"chat_template":      nil, // a template from a request is code from a request
	"function_call":      {`"none"`},
	"functions":          {"[]"},
	"hone":               {"{}"},
	"modalities":         {`["text"]`},
	"moderation":         nil,
	"prediction":         nil,
	"suffix":             {`""`},
	"verbosity":          {`"medium"`},
	"web_search_options": nil,

	// vLLM's, llama-server's and SGLang's.
	"dry_multiplier":             {"0", "0.0"},
	"enable_thinking":            nil,
	"include_stop_str_in_output": {"false"},
	"length_penalty":             {"1", "1.0"},
	"lora":                       {"[]"},
	"mirostat":                   {"0"},
	"prompt_logprobs":            {"false"},
	"repeat_penalty":             {"1", "1.0"},
	"stop_regex":                 {`""`, "[]"},
	"stop_token_ids":             {"[]"},
	"tfs_z":                      {"1", "1.0"},
	"truncate_prompt_tokens":     nil,
	"typical_p":                  {"1", "1.0"},
	"use_beam_search":            {"false"},
	"xtc_probability":            {"0", "0.0"},
}

// advice says what to send instead of an unavailable field.
var advice = map[string]string{
	"enable_thinking": `; send "chat_template_kwargs": {"enable_thinking": ...}`,
	"functions":       "; OpenAI has given it up, send tools",
	"function_call":   "; OpenAI has given it up, send tool_choice",
	"hone":            " in completions; leave it out. It holds the options of fine-tuning jobs",
	"json_schema":     `; send "response_format": {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}`,
	"lora":            "; a tuned model is chosen by its name, in model",
	"prompt_logprobs": "; POST /v1/completions takes echo with logprobs",
	"regex":           "; send guided_regex",
	"ebnf":            "; send grammar, in Lark's syntax",
	"repeat_penalty":  "; send repetition_penalty",
	"stop_token_ids":  "; send stop",
}

// constraintFields are those that are honoured.
var constraintFields = []string{
	"guided_choice", "guided_json", "guided_regex", "guided_grammar", "grammar", "structured_outputs", "response_format",
}

// constraintWords are parts of the names of fields that constrain a completion in some server's dialect: guided_decoding_backend,
// json_schema, grammar_lazy... constraintNames are those that have none of them.
var (
	constraintWords = []string{"guided", "grammar", "schema", "structured", "regex", "ebnf", "constraint", "structural_tag"}
	constraintNames = []string{"allowed_token_ids", "bad_words", "banned_tokens", "choice", "choices", "format", "logits_processors", "guidance", "logprob_token_ids"}
)

// knownParts lists the fields of objects that are honoured in part; the others are refused.
var knownParts = map[string][]string{
	"chat_template_kwargs": {"enable_thinking"},
	"response_format":      {"type", "json_schema", "schema"},
	"structured_outputs":   {"json", "regex", "choice", "grammar", "json_object"},
}

// refuseUnavailable returns a 400 that names the first field that would be left out of account.
func refuseUnavailable(fields map[string]json.RawMessage) error {
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		raw := fields[name]
		if isNull(raw) {
			continue
		}
		if known, ok := knownParts[name]; ok {
			if err := refuseParts(name, raw, known); err != nil {
				return err
			}
			continue
		}
		if slices.Contains(constraintFields, name) {
			continue
		}
		if harmless, ok := unavailable[name]; ok {
			if !slices.Contains(harmless, compacted(raw)) {
				return invalid(name, "%s is not available%s", name, instead(name, harmless))
			}
			continue
		}
		lower := strings.ToLower(name)
		if slices.Contains(constraintNames, lower) || slices.ContainsFunc(constraintWords, func(word string) bool { return strings.Contains(lower, word) }) {
			text, ok := advice[lower]
			if !ok {
				text = ": the completion would not be constrained as asked; the constraints that are available are " + strings.Join(constraintFields, ", ")
			}
			return invalid(name, "%s is not available%s", name, text)
		}
	}
	return nil
}

// refuseParts refuses fields of the object called name that are not known. false asks for nothing.
func refuseParts(name string, raw json.RawMessage, known []string) error {
	var parts map[string]json.RawMessage
	if json.Unmarshal(raw, &parts) != nil {
		return nil //nolint:nilerr // decode says what is wrong with it
	}
	for _, part := range slices.Sorted(maps.Keys(parts)) {
		if value := compacted(parts[part]); slices.Contains(known, part) || value == "null" || value == "false" {
			continue
		}
		path := name + "." + part
		return invalid(path, "%s is not available; %s has %s", path, name, strings.Join(known, ", "))
	}
	return nil
}

// refuseInCompletions refuses fields of chats.
func refuseInCompletions(fields map[string]json.RawMessage) error {
	for name, harmless := range map[string][]string{
		"tools": {"[]"}, "tool_choice": {`"none"`, `"auto"`}, "messages": nil, "reasoning_effort": nil, "chat_template_kwargs": {"{}"},
		"continue_final_message": {"false"}, "add_generation_prompt": {"true"}, "top_logprobs": nil,
	} {
		if raw := fields[name]; len(raw) > 0 && !isNull(raw) && !slices.Contains(harmless, compacted(raw)) {
			return invalid(name, "%s is a field of /v1/chat/completions and not available here; leave it out", name)
		}
	}
	return nil
}

// refuseFunctionCalls finds the form of tool calls that OpenAI has given up, which would be left out of the prompt.
func refuseFunctionCalls(messages json.RawMessage) error {
	if !bytes.Contains(messages, []byte(`"function_call"`)) {
		return nil
	}
	var calls []struct {
		FunctionCall json.RawMessage `json:"function_call"`
	}
	if json.Unmarshal(messages, &calls) != nil {
		return nil //nolint:nilerr // decode says what is wrong with it
	}
	for i, m := range calls {
		if len(m.FunctionCall) > 0 && !isNull(m.FunctionCall) {
			path := pathOf("messages", i) + ".function_call"
			return invalid(path, "%s is not available; OpenAI has given it up, send tool_calls", path)
		}
	}
	return nil
}

func compacted(raw json.RawMessage) string {
	var compact bytes.Buffer
	if err := json.Compact(&compact, raw); err != nil {
		panic(fmt.Sprintf("a field that is not JSON: %v", err)) // it was decoded
	}
	return compact.String()
}

func instead(name string, harmless []string) string {
	if text, ok := advice[name]; ok {
		return text
	}
	if len(harmless) == 0 {
		return "; leave it out"
	}
	return "; leave it out or send " + harmless[0]
}
