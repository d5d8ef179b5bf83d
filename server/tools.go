package server

import (
	"bytes"
	"encoding/json"
	"regexp"
	"slices"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// Bounds of a request's tools, OpenAI's.
const (
	maxTools     = 128
	maxToolBytes = 256 << 10
)

var toolName = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,64}$`)

// applyTools checks the tools and the choice among them, and writes them into req.
func applyTools(f *wire.ChatCompletionRequest, req *child.GenerateRequest) error {
	names, err := toolNames(f.Tools)
	if err != nil {
		return err
	}
	choice, err := toolChoice(f.ToolChoice)
	if err != nil {
		return err
	}
	if len(names) == 0 {
		if choice.Mode == child.ToolRequired || choice.Mode == child.ToolFunction {
			return invalid("tool_choice", "tool_choice asks for a call, and there are no tools")
		}
		return nil
	}
	if choice.Mode == "" {
		choice.Mode = child.ToolAuto
	}
	if choice.Mode == child.ToolFunction && !slices.Contains(names, choice.Name) {
		return invalid("tool_choice", "tool_choice names the function %q, which is none of the tools", choice.Name)
	}
	req.Tools, req.ToolChoice = f.Tools, choice
	req.ParallelToolCalls = f.ParallelToolCalls == nil || *f.ParallelToolCalls
	return nil
}

// toolNames checks tools, an array as the template will see it, and returns the names of its functions.
func toolNames(raw json.RawMessage) ([]string, error) {
	if len(raw) == 0 || isNull(raw) {
		return nil, nil
	}
	if len(raw) > maxToolBytes {
		return nil, invalid("tools", "tools has %d bytes, expected at most %d", len(raw), maxToolBytes)
	}
	var elements []json.RawMessage
	if err := json.Unmarshal(raw, &elements); err != nil {
		return nil, invalid("tools", "tools: expected an array, not %s", kindOf(raw))
	}
	if len(elements) > maxTools {
		return nil, invalid("tools", "tools has %d elements, expected at most %d", len(elements), maxTools)
	}
	names := make([]string, len(elements))
	for i, element := range elements {
		tool, path := wire.Tool{}, pathOf("tools", i)
		if err := json.Unmarshal(element, &tool); err != nil {
			return nil, invalid(path, "%s: expected {type: function, function: {name, description, parameters}}: %v", path, err)
		}
		switch parameters := bytes.TrimSpace(tool.Function.Parameters); {
		case tool.Type != "function":
			return nil, invalid(path+".type", "%s.type is %q; only tools of type function are available", path, tool.Type)
		case !toolName.MatchString(tool.Function.Name):
			return nil, invalid(path+".function.name", "%s.function.name is %.80q, expected 1 to 64 letters, digits, _ and -", path, tool.Function.Name)
		case slices.Contains(names[:i], tool.Function.Name):
			return nil, invalid(path+".function.name", "two tools have the name %q", tool.Function.Name)
		case len(parameters) > 0 && !isNull(parameters) && parameters[0] != '{':
			return nil, invalid(path+".function.parameters", "%s.function.parameters: expected a JSON schema, an object, not %s", path, kindOf(parameters))
		}
		names[i] = tool.Function.Name
	}
	return names, nil
}

// toolChoice reads tool_choice; its Mode is "" if it is absent.
func toolChoice(raw json.RawMessage) (child.ToolChoice, error) {
	var choice child.ToolChoice
	if len(raw) == 0 || isNull(raw) {
		return choice, nil
	}
	if json.Unmarshal(raw, &choice.Mode) == nil {
		switch choice.Mode {
		case child.ToolNone, child.ToolAuto, child.ToolRequired:
			return choice, nil
		}
		return choice, invalid("tool_choice", `tool_choice is %.40q, expected none, auto, required or {"type":"function","function":{"name":...}}`, choice.Mode)
	}
	var named wire.Tool
	if err := json.Unmarshal(raw, &named); err != nil {
		return choice, invalid("tool_choice", "tool_choice: expected a string or an object, not %s", kindOf(raw))
	}
	switch {
	case named.Type != "function":
		return choice, invalid("tool_choice", "tool_choice of type %q is not available; expected none, auto, required or type function", named.Type)
	case named.Function.Name == "":
		return choice, invalid("tool_choice", `tool_choice has no function name, expected {"type":"function","function":{"name":...}}`)
	}
	return child.ToolChoice{Mode: child.ToolFunction, Name: named.Function.Name}, nil
}

// checkMessages checks the roles of a conversation, and that every result of a tool answers a call.
func checkMessages(messages []wire.Message) error {
	if len(messages) == 0 {
		return invalid("messages", "messages is required: a list of at least one {role, content}")
	}
	if len(messages) > maxMessages {
		return invalid("messages", "messages has %d elements, expected at most %d", len(messages), maxMessages)
	}
	calls := map[string]bool{}
	for i, m := range messages {
		path := pathOf("messages", i)
		switch m.Role {
		case "system", "developer", "user", "assistant":
		case "tool":
			if !calls[m.ToolCallID] {
				return invalid(path+".tool_call_id", "%s.tool_call_id is %q, and no assistant message before it has a tool call of this id", path, m.ToolCallID)
			}
		case "function":
			return invalid(path+".role", "%s.role is function, which OpenAI has given up; send the result as a message of role tool with the call's tool_call_id", path)
		case "":
			return invalid(path+".role", "%s.role is required: system, user, assistant or tool", path)
		default:
			return invalid(path+".role", "%s.role is %q, expected system, developer, user, assistant or tool", path, m.Role)
		}
		if len(m.ToolCalls) > 0 && m.Role != "assistant" {
			return invalid(path+".tool_calls", "%s.tool_calls: only a message of role assistant has tool calls", path)
		}
		if len(m.ToolCalls) > maxTools {
			return invalid(path+".tool_calls", "%s.tool_calls has %d elements, expected at most %d", path, len(m.ToolCalls), maxTools)
		}
		for j, call := range m.ToolCalls {
			switch at := pathOf(path+".tool_calls", j); {
			case call.Type != "function" && call.Type != "":
				return invalid(at+".type", "%s.type is %q; only calls of type function are available", at, call.Type)
			case !toolName.MatchString(call.Function.Name):
				return invalid(at+".function.name", "%s.function.name is %.80q, expected 1 to 64 letters, digits, _ and -", at, call.Function.Name)
			case call.ID == "":
				return invalid(at+".id", "%s.id is required; the tool's result names it as tool_call_id", at)
			}
			calls[call.ID] = true
		}
	}
	return nil
}

// conversation is messages as the runner gets them.
func conversation(messages []wire.Message) []wire.Message {
	out := make([]wire.Message, len(messages))
	for i, m := range messages {
		if m.Role == "developer" { // OpenAI's newer word, which no template knows
			m.Role = "system"
		}
		m.Weight = nil
		m.ToolCalls = slices.Clone(m.ToolCalls)
		for j := range m.ToolCalls {
			m.ToolCalls[j].Type = "function"
		}
		out[i] = m
	}
	return out
}
