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
		{fields: `"messages":[{"role":"tool","content":"x"}]`, param: "messages[0].role", message: "tools"},
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
		{fields: `"tools":[{"type":"function"}]`, param: "tools"},
		{fields: `"hone":{"r":8}`, param: "hone", message: "fine-tuning jobs"},
		{fields: `"guided_json":{}`, param: "guided_json", message: "guided_choice"},
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

func TestChatAccepts(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	zero, seed := 0.0, int64(-3)
	for _, test := range []struct {
		fields string
		want   child.GenerateRequest
	}{
		{`"max_tokens":5,"max_completion_tokens":5`, child.GenerateRequest{MaxTokens: 5, Temperature: 1, TopP: 1}},
		{`"temperature":0,"seed":-3,"stop":"x"`, child.GenerateRequest{Temperature: zero, TopP: 1, Seed: &seed, Stop: []string{"x"}}},
		{`"top_p":0`, child.GenerateRequest{Temperature: 0, TopP: 1}},
		{`"temperature":null,"stop":null,"logprobs":null,"user":"u","tool_choice":"none"`, child.GenerateRequest{Temperature: 1, TopP: 1}},
		{`"logprobs":false,"top_logprobs":0`, child.GenerateRequest{Temperature: 1, TopP: 1}},
	} {
		status, body := r.do(t, "POST", "/v1/chat/completions", `{"model":"smol","messages":[{"role":"developer","content":[{"type":"text","text":"hi"}],"weight":1}],`+test.fields+`}`)
		if status != 200 {
			t.Errorf("%s: %d %s", test.fields, status, body)
			continue
		}
		got, _ := r.echo.last()
		got.ID = ""
		test.want.Messages = []wire.Message{{Role: "system", Content: "hi"}}
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s (-want +got)\n%s", test.fields, diff)
		}
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

func TestCompletions(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	resp, err := r.client().CreateCompletion(t.Context(), openai.CompletionRequest{Model: "smol", Prompt: "你 two", LogProbs: 1})
	if err != nil {
		t.Fatal(err)
	}
	choice := resp.Choices[0]
	if choice.Text != "你 two" || choice.FinishReason != "stop" || resp.Object != "text_completion" || resp.Usage.TotalTokens != 9 {
		t.Errorf("answer %+v", resp)
	}
	if diff := cmp.Diff([]int{0, 1}, choice.LogProbs.TextOffset); diff != "" || choice.LogProbs.TopLogprobs[0]["0"] != -9999 {
		t.Errorf("log-probabilities %+v", choice.LogProbs)
	}
	if req, _ := r.echo.last(); *req.Prompt != "你 two" || req.Messages != nil || req.MaxTokens != 16 {
		t.Errorf("request %+v", req)
	}
	stream, err := r.client().CreateCompletionStream(t.Context(), openai.CompletionRequest{Model: "smol", Prompt: "one two"})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var text string
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		text += chunk.Choices[0].Text
	}
	if text != "one two" {
		t.Errorf("streamed %q", text)
	}
	for body, param := range map[string]string{
		`{"model":"smol"}`:                             "prompt",
		`{"model":"smol","prompt":[]}`:                 "prompt",
		`{"model":"smol","prompt":["a","b"]}`:          "prompt",
		`{"model":"smol","prompt":[1,2]}`:              "prompt[0]",
		`{"model":"smol","prompt":"a","echo":true}`:    "echo",
		`{"model":"smol","prompt":"a","logprobs":6}`:   "logprobs",
		`{"model":"smol","prompt":"a","max_tokens":0}`: "max_tokens",
	} {
		status, answer := r.do(t, "POST", "/v1/completions", body)
		wantError(t, body, status, answer, 400, param, "", "")
	}
	if status, answer := r.do(t, "POST", "/v1/completions", `{"model":"smol","prompt":["a"]}`); status != 200 {
		t.Errorf("one prompt in a list: %d %s", status, answer)
	}
}
