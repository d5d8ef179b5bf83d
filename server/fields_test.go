package server

import (
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	openai "github.com/sashabaranov/go-openai"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/wire"
)

// TestChatAccepts checks what the runner is asked for, field by field.
func TestChatAccepts(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	seed := int64(-3)
	schema := func(text string) *child.Constraint {
		return &child.Constraint{Kind: child.ConstraintJSONSchema, Text: text}
	}
	const tools = `"tools":[{"type":"function","function":{"name":"weather","description":"d","parameters":{"type":"object"}}},{"type":"function","function":{"name":"time"}}]`
	rawTools := []byte(strings.TrimPrefix(tools, `"tools":`))
	for _, test := range []struct {
		fields string
		want   child.GenerateRequest // with temperature and top_p 1 where they are 0 and -1
	}{
		{`"max_tokens":5,"max_completion_tokens":5`, child.GenerateRequest{MaxTokens: 5}},
		{`"temperature":0,"seed":-3,"stop":"x"`, child.GenerateRequest{Temperature: -1, Seed: &seed, Stop: []string{"x"}}},
		{`"top_p":0`, child.GenerateRequest{Temperature: -1}},
		{`"temperature":null,"stop":null,"logprobs":null,"user":"u","tool_choice":"none"`, child.GenerateRequest{}},
		{`"logprobs":false,"top_logprobs":0`, child.GenerateRequest{}},
		{`"n":8,"logprobs":true,"top_logprobs":20`, child.GenerateRequest{N: 8, LogProbs: true, TopLogProbs: 20}},
		{`"n":1`, child.GenerateRequest{}},
		{`"presence_penalty":-2,"frequency_penalty":2,"repetition_penalty":1.1`, child.GenerateRequest{PresencePenalty: -2, FrequencyPenalty: 2, RepetitionPenalty: 1.1}},
		{`"top_k":40,"min_p":0.05,"top_p":0.9,"temperature":2`, child.GenerateRequest{TopK: 40, MinP: 0.05, TopP: 0.9, Temperature: 2}},
		{`"top_k":-1`, child.GenerateRequest{}},
		{`"logit_bias":{"50256":-100,"0":1.5}`, child.GenerateRequest{LogitBias: map[engine.Token]float64{50256: -100, 0: 1.5}}},
		{`"min_tokens":3,"max_tokens":3,"ignore_eos":true`, child.GenerateRequest{MinTokens: 3, MaxTokens: 3, IgnoreEOS: true}},

		{`"guided_choice":["A","B"]`, child.GenerateRequest{Temperature: -1, Constraint: &child.Constraint{Kind: child.ConstraintChoice, Choices: []string{"A", "B"}}}},
		{`"structured_outputs":{"choice":["是","否"]},"temperature":0.7`,
			child.GenerateRequest{Temperature: 0.7, Constraint: &child.Constraint{Kind: child.ConstraintChoice, Choices: []string{"是", "否"}}}},
		{`"guided_json":{ "type": "object" }`, child.GenerateRequest{Constraint: schema(`{"type":"object"}`)}},
		{`"guided_json":"{\"type\": \"object\"}"`, child.GenerateRequest{Constraint: schema(`{"type":"object"}`)}},
		{`"structured_outputs":{"json":"true"}`, child.GenerateRequest{Constraint: schema(`true`)}},
		{`"structured_outputs":{"json":{"enum":["a b"]},"regex":null,"json_object":false}`, child.GenerateRequest{Constraint: schema(`{"enum":["a b"]}`)}},
		{`"structured_outputs":{"json_object":true}`, child.GenerateRequest{Constraint: &child.Constraint{Kind: child.ConstraintJSONObject}}},
		{`"structured_outputs":{}`, child.GenerateRequest{}},
		{`"guided_regex":"[ab]+"`, child.GenerateRequest{Constraint: &child.Constraint{Kind: child.ConstraintRegex, Text: "[ab]+"}}},
		{`"structured_outputs":{"regex":"a"}`, child.GenerateRequest{Constraint: &child.Constraint{Kind: child.ConstraintRegex, Text: "a"}}},
		{`"guided_grammar":"start: \"a\""`, child.GenerateRequest{Constraint: &child.Constraint{Kind: child.ConstraintLark, Text: `start: "a"`}}},
		{`"grammar":"start: \"a\""`, child.GenerateRequest{Constraint: &child.Constraint{Kind: child.ConstraintLark, Text: `start: "a"`}}},
		{`"structured_outputs":{"grammar":"start: \"a\""}`, child.GenerateRequest{Constraint: &child.Constraint{Kind: child.ConstraintLark, Text: `start: "a"`}}},
		{`"response_format":{"type":"text"}`, child.GenerateRequest{}},
		{`"response_format":{"type":"json_object"}`, child.GenerateRequest{Constraint: &child.Constraint{Kind: child.ConstraintJSONObject}}},
		{`"response_format":{"type":"json_object","schema":{"type":"array"}}`, child.GenerateRequest{Constraint: schema(`{"type":"array"}`)}},
		{`"response_format":{"type":"json_schema","json_schema":{"name":"x","strict":true,"schema":{"type":"string", "enum":["A"]}}},"guided_json":null`,
			child.GenerateRequest{Constraint: schema(`{"type":"string","enum":["A"]}`)}},

		{tools, child.GenerateRequest{Tools: rawTools, ToolChoice: child.ToolChoice{Mode: "auto"}, ParallelToolCalls: true}},
		{tools + `,"tool_choice":"none","guided_regex":"a"`, child.GenerateRequest{
			Tools: rawTools, ToolChoice: child.ToolChoice{Mode: "none"}, ParallelToolCalls: true, Constraint: &child.Constraint{Kind: child.ConstraintRegex, Text: "a"},
		}},
		{tools + `,"tool_choice":"required","parallel_tool_calls":false`, child.GenerateRequest{Tools: rawTools, ToolChoice: child.ToolChoice{Mode: "required"}}},
		{tools + `,"tool_choice":{"type":"function","function":{"name":"time"}}`, child.GenerateRequest{
			Tools: rawTools, ToolChoice: child.ToolChoice{Mode: "function", Name: "time"}, ParallelToolCalls: true,
		}},
		{`"tools":[],"tool_choice":"auto","parallel_tool_calls":true`, child.GenerateRequest{}},

		{`"reasoning_effort":"low"`, child.GenerateRequest{ReasoningEffort: "low"}},
		{`"reasoning_effort":"none"`, child.GenerateRequest{ReasoningEffort: "none"}},
		{`"chat_template_kwargs":{"enable_thinking":true}`, child.GenerateRequest{EnableThinking: new(true)}},
		{`"chat_template_kwargs":{}`, child.GenerateRequest{}},
		{`"add_generation_prompt":true,"continue_final_message":false`, child.GenerateRequest{}},
	} {
		status, body := r.do(t, "POST", "/v1/chat/completions", `{"model":"smol","messages":[{"role":"developer","content":[{"type":"text","text":"hi"}],"weight":1}],`+test.fields+`}`)
		if status != 200 {
			t.Errorf("%s: %d %s", test.fields, status, body)
			continue
		}
		got, _ := r.echo.last()
		if got.Client != "addr:127.0.0.1" {
			t.Errorf("%s: the client is %q, want its address", test.fields, got.Client)
		}
		got.ID, got.Client = "", ""
		test.want.Messages = []wire.Message{{Role: "system", Content: "hi"}}
		switch test.want.Temperature {
		case 0:
			test.want.Temperature = 1
		case -1:
			test.want.Temperature = 0
		}
		if test.want.TopP == 0 {
			test.want.TopP = 1
		}
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s (-want +got)\n%s", test.fields, diff)
		}
	}
}

// TestFieldRefusals checks the param of each refusal, and a part of its message.
func TestFieldRefusals(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const tools = `"tools":[{"type":"function","function":{"name":"weather"}}]`
	for _, test := range []struct{ fields, param, message string }{
		{`"n":0`, "n", "expected 1 to 8"},
		{`"n":9`, "n", "expected 1 to 8"},
		{`"n":1.5`, "n", "an integer"},
		{`"presence_penalty":2.1`, "presence_penalty", "expected -2 to 2"},
		{`"frequency_penalty":-2.1`, "frequency_penalty", "expected -2 to 2"},
		{`"repetition_penalty":0`, "repetition_penalty", "more than 0"},
		{`"repetition_penalty":11`, "repetition_penalty", "at most 10"},
		{`"min_p":1.5`, "min_p", "expected 0 to 1"},
		{`"top_k":-2`, "top_k", "-1 for all"},
		{`"min_tokens":-1`, "min_tokens", "at least 0"},
		{`"min_tokens":6,"max_tokens":5`, "min_tokens", "more than the 5"},
		{`"ignore_eos":1`, "ignore_eos", "true or false"},
		{`"logit_bias":{"hello":1}`, "logit_bias", `key "hello"`},
		{`"logit_bias":{"-1":1}`, "logit_bias", `key "-1"`},
		{`"logit_bias":{"99999999999":1}`, "logit_bias", "id of a token"},
		{`"logit_bias":{"5":101}`, "logit_bias", "-100 to 100"},
		{`"logit_bias":[5]`, "logit_bias", "expected an object"},
		{`"echo":true`, "echo", "/v1/completions"},
		{`"best_of":2`, "best_of", "/v1/completions"},

		{`"guided_json":{},"guided_regex":"a"`, "guided_regex", "guided_json and guided_regex both"},
		{`"guided_choice":["A","B"],"response_format":{"type":"json_object"}`, "response_format", "guided_choice and response_format both"},
		{`"structured_outputs":{"json":{},"choice":["a","b"]}`, "structured_outputs.json", "structured_outputs.choice and structured_outputs.json both"},
		{`"grammar":"a","guided_grammar":"b"`, "grammar", "guided_grammar and grammar both"},
		{tools + `,"guided_json":{}`, "guided_json", "tools and guided_json both"},
		{`"guided_json":[1]`, "guided_json", "not a JSON schema"},
		{`"guided_json":"{"`, "guided_json", "not a JSON schema"},
		{`"guided_json":""`, "guided_json", "not a JSON schema"},
		{`"guided_json":5`, "guided_json", "not a JSON schema"},
		{`"guided_regex":""`, "guided_regex", "is empty"},
		{`"guided_regex":5`, "guided_regex", "expected a string"},
		{`"grammar":"` + strings.Repeat("a", maxConstraintBytes+1) + `"`, "grammar", "at most 262144"},
		{`"structured_outputs":{"choice":["a"]}`, "structured_outputs.choice", "expected 2 to 256"},
		{`"structured_outputs":{"structural_tag":"x"}`, "structured_outputs.structural_tag", "not available"},
		{`"structured_outputs":"x"`, "structured_outputs", "expected an object"},
		{`"response_format":{"type":"structural_tag"}`, "response_format.type", "structural_tag"},
		{`"response_format":{}`, "response_format.type", "expected text"},
		{`"response_format":{"type":"json_schema"}`, "response_format.json_schema.schema", "required"},
		{`"response_format":{"type":"json_schema","json_schema":{"name":"x"}}`, "response_format.json_schema.schema", "required"},
		{`"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":"x"}}`, "response_format.json_schema.schema", "not a JSON schema"},

		{`"tools":{}`, "tools", "expected an array"},
		{`"tools":[1]`, "tools[0]", "expected {type"},
		{`"tools":[{"type":"custom","custom":{}}]`, "tools[0].type", `"custom"`},
		{`"tools":[{"type":"function","function":{"name":"a b"}}]`, "tools[0].function.name", `"a b"`},
		{`"tools":[{"type":"function","function":{"name":"a"}},{"type":"function","function":{"name":"a"}}]`, "tools[1].function.name", "two tools"},
		{`"tools":[{"type":"function","function":{"name":"a","parameters":[]}}]`, "tools[0].function.parameters", "an array"},
		{`"tool_choice":"required"`, "tool_choice", "there are no tools"},
		{tools + `,"tool_choice":"maybe"`, "tool_choice", `"maybe"`},
		{tools + `,"tool_choice":5`, "tool_choice", "the number 5"},
		{tools + `,"tool_choice":{"type":"allowed_tools","allowed_tools":{}}`, "tool_choice", `"allowed_tools" is not available`},
		{tools + `,"tool_choice":{"type":"function","function":{"name":"time"}}`, "tool_choice", `"time", which is none`},
		{tools + `,"tool_choice":{"type":"function"}`, "tool_choice", "no function name"},
		{`"functions":[{"name":"a"}]`, "functions", "send tools"},
		{`"function_call":"auto"`, "function_call", "send tool_choice"},

		{`"messages":[{"role":"tool","content":"x","tool_call_id":"call_1"}]`, "messages[0].tool_call_id", `"call_1"`},
		{`"messages":[{"role":"function","name":"f","content":"x"}]`, "messages[0].role", "role tool"},
		{`"messages":[{"role":"assistant","function_call":{"name":"f"}}]`, "messages[0].function_call", "send tool_calls"},
		{`"messages":[{"role":"user","tool_calls":[{"id":"a","type":"function","function":{"name":"f","arguments":"{}"}}]}]`, "messages[0].tool_calls", "assistant"},
		{`"messages":[{"role":"assistant","tool_calls":[{"type":"function","function":{"name":"f","arguments":"{}"}}]}]`, "messages[0].tool_calls[0].id", "required"},
		{`"messages":[{"role":"assistant","tool_calls":[{"id":"a","type":"custom","function":{"name":"f"}}]}]`, "messages[0].tool_calls[0].type", "custom"},
		{`"messages":[{"role":"assistant","tool_calls":[{"id":"a","type":"function","function":{"name":"f","arguments":{}}}]}]`, "messages[0].tool_calls[0].function.arguments", "a string"},
		{`"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]`, "messages[0].content[0]", `"image_url" is not supported, only text`},

		{`"reasoning_effort":"huge"`, "reasoning_effort", "expected one of"},
		{`"chat_template_kwargs":{"enable_thinking":true,"date_string":"x"}`, "chat_template_kwargs.date_string", "not available"},
		{`"chat_template_kwargs":{"enable_thinking":"yes"}`, "chat_template_kwargs.enable_thinking", "true or false"},
		{`"continue_final_message":true`, "continue_final_message", "role assistant"},
		{`"add_generation_prompt":false`, "add_generation_prompt", "continue_final_message"},
		{`"messages":[{"role":"assistant","content":"x"}],"continue_final_message":true,"add_generation_prompt":true`, "add_generation_prompt", "both true"},
	} {
		body := `{"model":"smol",` + test.fields
		if !strings.Contains(test.fields, `"messages"`) {
			body += `,"messages":[{"role":"user","content":"hi"}]`
		}
		status, answer := r.do(t, "POST", "/v1/chat/completions", body+"}")
		name := test.fields
		if len(name) > 200 {
			name = name[:200]
		}
		wantError(t, name, status, answer, 400, test.param, "", test.message)
	}
}

// TestConversation sends tools' calls and results, and the beginning of the answer.
func TestConversation(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const history = `{"role":"user","content":"?"},{"role":"assistant","content":null,"tool_calls":[{"id":"a","type":"function","function":{"name":"f","arguments":"{\"x\":1}"}}]},` +
		`{"role":"tool","tool_call_id":"a","content":"7"}`
	want := []wire.Message{
		{Role: "user", Content: "?"},
		{Role: "assistant", ToolCalls: []wire.ToolCall{{ID: "a", Type: "function", Function: wire.FunctionCall{Name: "f", Arguments: `{"x":1}`}}}},
		{Role: "tool", ToolCallID: "a", Content: "7"},
	}
	for _, test := range []struct {
		messages, fields string
		want             []wire.Message
		continues        bool
	}{
		{history, "", want, false},
		{history + `,{"role":"assistant","content":"It is"}`, `,"continue_final_message":true,"add_generation_prompt":false`, append(want, wire.Message{Role: "assistant", Content: "It is"}), true},
	} {
		if status, body := r.do(t, "POST", "/v1/chat/completions", `{"model":"smol","messages":[`+test.messages+`]`+test.fields+`}`); status != 200 {
			t.Fatalf("%d %s", status, body)
		}
		got, _ := r.echo.last()
		if diff := cmp.Diff(test.want, got.Messages); diff != "" || got.ContinueFinalMessage != test.continues {
			t.Errorf("continues %v (-want +got)\n%s", got.ContinueFinalMessage, diff)
		}
	}
}

// TestToolsThroughGoOpenAI checks what go-openai reads of calls, whole and streamed, and of n completions.
func TestToolsThroughGoOpenAI(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	request := openai.ChatCompletionRequest{
		Model: "smol", Messages: userSays("think call"), N: 2, ParallelToolCalls: false, ReasoningEffort: "high",
		Tools:              []openai.Tool{{Type: openai.ToolTypeFunction, Function: &openai.FunctionDefinition{Name: "weather", Parameters: map[string]any{"type": "object"}}}},
		ToolChoice:         openai.ToolChoice{Type: openai.ToolTypeFunction, Function: openai.ToolFunction{Name: "weather"}},
		ChatTemplateKwargs: map[string]any{"enable_thinking": true}, LogitBias: map[string]int{"5": -100},
		PresencePenalty: 0.5, FrequencyPenalty: -0.5,
	}
	calls := []openai.ToolCall{
		{ID: "call_a", Type: "function", Function: openai.FunctionCall{Name: "weather", Arguments: `{"city":"Köln"}`}},
		{ID: "call_b", Type: "function", Function: openai.FunctionCall{Name: "time", Arguments: "{}"}},
	}
	resp, err := r.client().CreateChatCompletion(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	for i, choice := range resp.Choices {
		if diff := cmp.Diff(calls, choice.Message.ToolCalls); diff != "" || choice.Index != i || choice.FinishReason != openai.FinishReasonToolCalls ||
			choice.Message.Content != "" || choice.Message.ReasoningContent != "hm" {
			t.Errorf("choice %+v (-want +got)\n%s", choice, diff)
		}
	}
	got, _ := r.echo.last()
	want := child.GenerateRequest{
		ID: got.ID, Client: got.Client, Messages: got.Messages, N: 2, Temperature: 1, TopP: 1, PresencePenalty: 0.5, FrequencyPenalty: -0.5,
		LogitBias: map[engine.Token]float64{5: -100}, ReasoningEffort: "high", EnableThinking: new(true),
		Tools:      []byte(`[{"function":{"name":"weather","parameters":{"type":"object"}},"type":"function"}]`),
		ToolChoice: child.ToolChoice{Mode: child.ToolFunction, Name: "weather"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the runner's request (-want +got)\n%s", diff)
	}

	stream, err := r.client().CreateChatCompletionStream(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	streamed := make([][]openai.ToolCall, 2)
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, choice := range chunk.Choices {
			for _, delta := range choice.Delta.ToolCalls {
				if *delta.Index == len(streamed[choice.Index]) {
					streamed[choice.Index] = append(streamed[choice.Index], openai.ToolCall{ID: delta.ID, Type: delta.Type, Function: openai.FunctionCall{Name: delta.Function.Name}})
				}
				streamed[choice.Index][*delta.Index].Function.Arguments += delta.Function.Arguments
			}
		}
	}
	if diff := cmp.Diff([][]openai.ToolCall{calls, calls}, streamed); diff != "" {
		t.Errorf("streamed (-want +got)\n%s", diff)
	}

	// The calls and their results are the next request's messages.
	messages := append(userSays("weather?"), resp.Choices[0].Message,
		openai.ChatCompletionMessage{Role: openai.ChatMessageRoleTool, ToolCallID: "call_a", Content: "rain"},
		openai.ChatCompletionMessage{Role: openai.ChatMessageRoleTool, ToolCallID: "call_b", Content: "noon"})
	if _, err := r.client().CreateChatCompletion(t.Context(), openai.ChatCompletionRequest{Model: "smol", Messages: messages}); err != nil {
		t.Fatal(err)
	}
	if got, _ := r.echo.last(); len(got.Messages) != 5 || got.Messages[2].ToolCalls[0].Function.Arguments != `{"city":"Köln"}` || got.Messages[4].ToolCallID != "call_b" {
		t.Errorf("the runner's messages %+v", got.Messages)
	}
}

// TestSchemaThroughGoOpenAI sends OpenAI's structured output.
func TestSchemaThroughGoOpenAI(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	request := openai.ChatCompletionRequest{Model: "smol", Messages: userSays("?"), ResponseFormat: &openai.ChatCompletionResponseFormat{
		Type:       openai.ChatCompletionResponseFormatTypeJSONSchema,
		JSONSchema: &openai.ChatCompletionResponseFormatJSONSchema{Name: "letter", Strict: true, Schema: json.RawMessage(`{"type":"string","enum":["A","B"]}`)},
	}}
	if _, err := r.client().CreateChatCompletion(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	if got, _ := r.echo.last(); got.Constraint == nil || got.Constraint.Kind != child.ConstraintJSONSchema || got.Constraint.Text != `{"type":"string","enum":["A","B"]}` {
		t.Errorf("constraint %+v", got.Constraint)
	}
}
