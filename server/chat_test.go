package server

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	openai "github.com/sashabaranov/go-openai"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

func userSays(text string) []openai.ChatCompletionMessage {
	return []openai.ChatCompletionMessage{{Role: "system", Content: "be brief"}, {Role: "user", Content: text}}
}

func TestChatThroughGoOpenAI(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	resp, err := r.client().CreateChatCompletion(t.Context(), openai.ChatCompletionRequest{Model: "smol", Messages: userSays("one two"), LogProbs: true, TopLogProbs: 2})
	if err != nil {
		t.Fatal(err)
	}
	choice := resp.Choices[0]
	if choice.Message.Content != "one two" || choice.Message.Role != "assistant" || choice.FinishReason != "stop" || resp.Model != "smol" ||
		resp.Object != "chat.completion" || !strings.HasPrefix(resp.ID, "chatcmpl-") || resp.Created != 1700000000 || resp.SystemFingerprint != "fp_abababababab" {
		t.Errorf("answer %+v", resp)
	}
	if resp.Usage.TotalTokens != 9 || resp.Usage.PromptTokensDetails.CachedTokens != 3 {
		t.Errorf("usage %+v", resp.Usage)
	}
	tokens := choice.LogProbs.Content
	if len(tokens) != 2 || tokens[1].Token != " two" || tokens[1].LogProb != -0.5 || string(tokens[1].Bytes) != " two" || len(tokens[1].TopLogProbs) != 2 {
		t.Errorf("log-probabilities %+v", tokens)
	}
	req, base := r.echo.last()
	if !strings.HasPrefix(req.Client, "key:") || len(req.Client) != 20 {
		t.Errorf("the client is %q, want the hash of its key", req.Client)
	}
	req.Client = ""
	want := child.GenerateRequest{ID: resp.ID, Messages: []wire.Message{{Role: "system", Content: "be brief"}, {Role: "user", Content: "one two"}}, Temperature: 1, TopP: 1, LogProbs: true, TopLogProbs: 2}
	if diff := cmp.Diff(want, req); diff != "" {
		t.Errorf("the runner's request (-want +got)\n%s", diff)
	}
	if want := (child.Base{Name: "smol", Dir: "/models/smol", Digest: smolDigest}); base != want {
		t.Errorf("the base is %+v, want %+v", base, want)
	}
}

func TestGuidedChoice(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	request := openai.ChatCompletionRequest{
		Model: "smol", Messages: userSays("which?"), LogProbs: true, TopLogProbs: 4, MaxCompletionTokens: 5, Stop: []string{"\n"},
		ChatCompletionRequestExtensions: openai.ChatCompletionRequestExtensions{GuidedChoice: []string{"B", "A"}},
	}
	resp, err := r.client().CreateChatCompletion(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	if resp.Choices[0].Message.Content != "B" || len(resp.Choices[0].LogProbs.Content) != 1 {
		t.Errorf("answer %+v", resp.Choices[0])
	}
	if req, _ := r.echo.last(); req.Temperature != 0 || req.Stop != nil || req.MaxTokens != 5 || !slices.Equal(req.Constraint.Choices, []string{"B", "A"}) {
		t.Errorf("request %+v, want it greedy", req)
	}
	request.Temperature = 0.5
	if _, err := r.client().CreateChatCompletion(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	if req, _ := r.echo.last(); req.Temperature != 0.5 {
		t.Errorf("temperature %v, want the one that was sent", req.Temperature)
	}
}

func TestTunedModel(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	name := r.tuned(t, smolDigest)
	if _, err := r.client().CreateChatCompletion(t.Context(), openai.ChatCompletionRequest{Model: name, Messages: userSays("hi")}); err != nil {
		t.Fatal(err)
	}
	req, base := r.echo.last()
	if req.Adapter == nil || !strings.HasSuffix(name, ":"+req.Adapter.ID) || !strings.HasSuffix(req.Adapter.Path, "/adapter.gguf") || base.Name != "smol" {
		t.Errorf("computed with %+v on %+v", req.Adapter, base)
	}
	other := r.tuned(t, strings.Repeat("cd", 32))
	status, body := r.do(t, "POST", "/v1/chat/completions", `{"model":"`+other+`","messages":[{"role":"user","content":"hi"}]}`)
	wantError(t, "another base", status, body, 409, "", "base_model_changed", "was trained on smol")
}

func TestChatRefusals(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, test := range []struct {
		fields, param, code, message string
		status                       int
	}{
		{fields: `"model":"none"`, status: 404, param: "model", code: "model_not_found", message: `"none" does not exist; there is smol`},
		{fields: `"model":"ft:none"`, status: 404, param: "model", code: "model_not_found"},
		{fields: `"model":""`, param: "model"},
		{fields: `"messages":[]`, param: "messages"},
		{fields: `"messages":[{"content":"x"}]`, param: "messages[0].role", message: "is required"},
		{fields: `"messages":[{"role":"user","content":"x"},{"role":"wizard","content":"x"}]`, param: "messages[1].role", message: `"wizard"`},
		{fields: `"temperature":-0.1`, param: "temperature"},
		{fields: `"temperature":2.1`, param: "temperature", message: "expected 0 to 2"},
		{fields: `"top_p":1.1`, param: "top_p"},
		{fields: `"max_tokens":0`, param: "max_tokens"},
		{fields: `"max_completion_tokens":-5`, param: "max_completion_tokens"},
		{fields: `"max_tokens":5,"max_completion_tokens":6`, param: "max_tokens", message: "they mean the same"},
		{fields: `"stop":["a","b","c","d","e"]`, param: "stop"},
		{fields: `"stop":""`, param: "stop"},
		{fields: `"top_logprobs":2`, param: "top_logprobs", message: "needs logprobs"},
		{fields: `"logprobs":true,"top_logprobs":21`, param: "top_logprobs", message: "0 to 20"},
		{fields: `"logprobs":5`, param: "logprobs", message: "top_logprobs"},
		{fields: `"stream_options":{"include_usage":true}`, param: "stream_options"},
		{fields: `"guided_choice":[]`, param: "guided_choice", message: "expected 2 to 256"},
		{fields: `"guided_choice":["A"]`, param: "guided_choice"},
		{fields: `"guided_choice":["A",""]`, param: "guided_choice", message: "guided_choice[1]"},
		{fields: `"guided_choice":["A","B","A"]`, param: "guided_choice", message: `guided_choice[0] and [2] are both "A"`},
		{fields: `"guided_choice":["yes.","no."],"stop":"."`, param: "stop", message: "would cut it off"},
		{fields: `"hone":{"r":8}`, param: "hone", message: "fine-tuning jobs"},
		{fields: `"guided_wizardry":{}`, param: "guided_wizardry", message: "guided_choice"},
		{fields: `"messages":[{"role":"user","content":"badregex"}],"guided_regex":"("`, param: "guided_regex", message: "guided_regex: unclosed group"},
		{fields: `"messages":[{"role":"user","content":"badregex"}],"structured_outputs":{"regex":"("}`, param: "structured_outputs.regex"},
		{fields: `"messages":[{"role":"user","content":"busy"}]`, status: 429, code: "rate_limit_exceeded", message: "are waiting"},
		{fields: `"messages":[{"role":"user","content":"loading"}]`, status: 503, param: "model", code: "model_loading", message: "3 of 9 GiB"},
		{fields: `"messages":[{"role":"user","content":"cut"}]`, status: 500, code: "runner_ended"},
		{fields: `"messages":[{"role":"user","content":"toolong"}]`, param: "messages", code: "context_length_exceeded"},
		{fields: `"messages":[{"role":"user","content":"toolong"}],"stream":true`, param: "messages", code: "context_length_exceeded"},
		{fields: `"messages":[{"role":"user","content":"die"}]`, status: 500, code: "runner_ended"},
	} {
		body := `{` + test.fields
		for name, field := range map[string]string{`"model"`: `"model":"smol"`, `"messages"`: `"messages":[{"role":"user","content":"hi"}]`} {
			if !strings.Contains(test.fields, name) {
				body += "," + field
			}
		}
		if test.status == 0 {
			test.status = 400
		}
		status, answer := r.do(t, "POST", "/v1/chat/completions", body+"}")
		wantError(t, test.fields, status, answer, test.status, test.param, test.code, test.message)
	}
}

// TestStreamBytes pins the stream to the byte: clients differ in what they forgive.
func TestStreamBytes(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const begin = `data: {"id":"ID","object":"chat.completion.chunk","created":1700000000,"model":"smol","system_fingerprint":"fp_abababababab","choices":[`
	for _, test := range []struct {
		name, fields, want string
	}{
		{"plain", `"messages":[{"role":"user","content":"<a> b"}]`,
			begin + `{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"content":"<a>"},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"content":" b"},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}` + "\n\n" +
				"data: [DONE]\n\n"},
		{"reasoning and calls", `"messages":[{"role":"user","content":"think call"}]`,
			begin + `{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"reasoning_content":"hm"},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"tool_calls":[{"index":0,"id":"call_a","type":"function","function":{"name":"weather","arguments":""}}]},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"city\":"}}]},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"\"Köln\"}"}}]},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"tool_calls":[{"index":1,"id":"call_b","type":"function","function":{"name":"time","arguments":"{}"}}]},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{},"logprobs":null,"finish_reason":"tool_calls"}]}` + "\n\n" +
				"data: [DONE]\n\n"},
		{"a call first, reasoned log-probabilities", `"messages":[{"role":"user","content":"call think"}],"logprobs":true`,
			begin + `{"index":0,"delta":{"role":"assistant","content":null},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"tool_calls":[{"index":0,"id":"call_a","type":"function","function":{"name":"weather","arguments":""}}]},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"city\":"}}]},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"\"Köln\"}"}}]},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"tool_calls":[{"index":1,"id":"call_b","type":"function","function":{"name":"time","arguments":"{}"}}]},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"reasoning_content":"hm"},"logprobs":{"content":[{"token":"hm","logprob":-0.5,"bytes":[104,109],"top_logprobs":[]}],"refusal":null},"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{},"logprobs":null,"finish_reason":"tool_calls"}]}` + "\n\n" +
				"data: [DONE]\n\n"},
		{"two completions, interleaved", `"messages":[{"role":"user","content":"a b"}],"n":2`,
			begin + `{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":1,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":1,"delta":{"content":"a'"},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"content":" b"},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":1,"delta":{"content":" b'"},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}` + "\n\n" +
				begin + `{"index":1,"delta":{},"logprobs":null,"finish_reason":"stop"}]}` + "\n\n" +
				"data: [DONE]\n\n"},
		{"a choice", `"messages":[{"role":"user","content":"?"}],"guided_choice":["yes","no"]`,
			begin + `{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"content":"yes"},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","choice_probabilities":[{"choice":"yes","probability":0.9},{"choice":"no","probability":0.1}]}]}` + "\n\n" +
				"data: [DONE]\n\n"},
		{"cut off by the runner", `"messages":[{"role":"user","content":"a cut"}]`,
			begin + `{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				`data: {"error":{"message":"the process that computes this model ended unexpectedly; the next request starts it again, and the server's log says why",` +
				`"type":"server_error","param":null,"code":"runner_ended"}}` + "\n\n"},
		{"usage and log-probabilities", `"messages":[{"role":"user","content":"a b"}],"max_tokens":1,"stream_options":{"include_usage":true},"logprobs":true,"top_logprobs":2`,
			begin + `{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}` + "\n\n" +
				begin + `{"index":0,"delta":{"content":"a"},"logprobs":{"content":[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":[` +
				`{"token":"0","logprob":-9999,"bytes":[200]},{"token":"1","logprob":-9999,"bytes":[201]}]}],"refusal":null},"finish_reason":null}],"usage":null}` + "\n\n" +
				begin + `{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":null}` + "\n\n" +
				begin + `],"usage":{"prompt_tokens":7,"completion_tokens":1,"total_tokens":8,"prompt_tokens_details":{"cached_tokens":3,"audio_tokens":0},` +
				`"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}}` + "\n\n" +
				"data: [DONE]\n\n"},
		{"an error after text", `"messages":[{"role":"user","content":"a die"}]`,
			begin + `{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				begin + `{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}]}` + "\n\n" +
				`data: {"error":{"message":"the process that computes this model ended unexpectedly; the next request starts it again, and the server's log says why",` +
				`"type":"server_error","param":null,"code":"runner_ended"}}` + "\n\n"},
	} {
		status, body := r.do(t, "POST", "/v1/chat/completions", `{"model":"smol","stream":true,`+test.fields+`}`)
		req, _ := r.echo.last()
		if diff := cmp.Diff(test.want, strings.ReplaceAll(body, req.ID, "ID")); status != 200 || diff != "" {
			t.Errorf("%s: %d (-want +got)\n%s", test.name, status, diff)
		}
	}
}

func TestStreamThroughGoOpenAI(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	read := func(prompt string) (text, finish string, usage *openai.Usage, err error) {
		stream, err := r.client().CreateChatCompletionStream(t.Context(), openai.ChatCompletionRequest{
			Model: "smol", Messages: userSays(prompt), StreamOptions: &openai.StreamOptions{IncludeUsage: true},
		})
		if err != nil {
			return "", "", nil, err
		}
		defer stream.Close()
		for {
			chunk, err := stream.Recv()
			if err != nil {
				return text, finish, usage, err
			}
			if chunk.Usage != nil {
				usage = chunk.Usage
			}
			for _, choice := range chunk.Choices {
				text += choice.Delta.Content
				finish += string(choice.FinishReason)
			}
		}
	}
	if text, finish, usage, err := read("one two three"); !errors.Is(err, io.EOF) || text != "one two three" || finish != "stop" || usage == nil || usage.CompletionTokens != 3 {
		t.Errorf("got %q, %q, %+v, %v", text, finish, usage, err)
	}
	apiError := new(openai.APIError)
	if text, _, _, err := read("one die"); !errors.As(err, &apiError) || text != "one" || !strings.Contains(apiError.Message, "ended unexpectedly") {
		t.Errorf("a stream that broke: %q, %v", text, err)
	}
	if _, _, _, err := read("toolong"); !errors.As(err, &apiError) || apiError.HTTPStatusCode != http.StatusBadRequest || apiError.Code != "context_length_exceeded" {
		t.Errorf("a prompt that is too long: %v", err)
	}
}

func TestClientGoneCancels(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "POST", r.URL+"/v1/chat/completions", strings.NewReader(`{"model":"smol","stream":true,"messages":[{"role":"user","content":"a wait"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := r.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if line, err := bufio.NewReader(resp.Body).ReadString('\n'); err != nil || !strings.HasPrefix(line, "data: {") {
		t.Fatalf("first line %q, %v", line, err)
	}
	cancel()
	select {
	case <-r.echo.cancelled:
	case <-time.After(5 * time.Second):
		t.Fatal("the completion goes on without its client")
	}
}
