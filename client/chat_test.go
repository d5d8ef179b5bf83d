package client

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
	openai "github.com/sashabaranov/go-openai"
)

// TestExtensions checks the calls that go-openai lacks, and that answers' extensions are read.
func TestExtensions(t *testing.T) {
	t.Parallel()
	answers := map[string]string{
		"/v1/chat/completions": `{"id":"c","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"B"},"finish_reason":"stop",
			"choice_probabilities":[{"choice":"A","probability":0.25},{"choice":"B","probability":0.75}]}],"usage":{"prompt_tokens":3}}`,
		"/v1/decisions":  `{"model":"m","answers":[{"type":"predicate","name":null,"probability":0.5},{"type":"choice","name":"x","choice":true,"probabilities":[{"value":true,"probability":1}],"confidence":1}],"usage":{}}`,
		"/v1/tokenize":   `{"count":2,"max_model_len":9,"tokens":[1,2],"token_strs":["a","b"]}`,
		"/v1/detokenize": `{"prompt":"ab"}`,
	}
	var got []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got = append(got, r.URL.Path+" "+string(body))
		fmt.Fprint(w, answers[r.URL.Path])
	}))
	defer server.Close()
	c := New(server.URL+"/v1", "")

	probabilities := []ChoiceProbability{{Choice: "A", Probability: 0.25}, {Choice: "B", Probability: 0.75}}
	response, chosen, err := c.Choose(t.Context(), openai.ChatCompletionRequest{Model: "m",
		ChatCompletionRequestExtensions: openai.ChatCompletionRequestExtensions{GuidedChoice: []string{"A", "B"}}})
	if err != nil || response.Choices[0].Message.Content != "B" || !cmp.Equal(chosen, [][]ChoiceProbability{probabilities}) {
		t.Errorf("choose: %+v, %v, %v", response, chosen, err)
	}
	request := ChatCompletionRequest{Model: "m", Messages: []Message{{Role: "user", Content: "?"}}}
	request.TopK, request.GuidedRegex = new(3), new("[AB]")
	answer, err := c.Chat(t.Context(), request)
	if err != nil || *answer.Choices[0].Message.Content != "B" || !cmp.Equal(answer.Choices[0].ChoiceProbabilities, probabilities) {
		t.Errorf("chat: %+v, %v", answer, err)
	}
	decision, err := c.Decide(t.Context(), DecisionRequest{Model: "m", Input: DecisionInput{{Role: "user", Content: "text"}}, Questions: []DecisionQuestion{
		{Type: "predicate", Instructions: "?"},
		{Type: "choice", Name: new("x"), Instructions: "?", Choices: []DecisionChoice{{Value: ChoiceValue{Text: "true", Boolean: true}}, {Value: ChoiceValue{Text: "no"}}}},
	}})
	if err != nil || decision.Answers[0].Predicate.Probability != 0.5 || !decision.Answers[1].Choice.Choice.Boolean {
		t.Errorf("decide: %+v, %v", decision, err)
	}
	tokens, err := c.Tokenize(t.Context(), TokenizeRequest{Model: "m", Prompt: new("ab")})
	if err != nil || !cmp.Equal(tokens.Tokens, []int32{1, 2}) {
		t.Errorf("tokenize: %+v, %v", tokens, err)
	}
	if text, err := c.Detokenize(t.Context(), "m", []int32{1, 2}); err != nil || text != "ab" {
		t.Errorf("detokenize: %q, %v", text, err)
	}
	want := []string{
		`/v1/chat/completions {"model":"m","messages":null,"stream":false,"guided_choice":["A","B"]}`,
		`/v1/chat/completions {"model":"m","messages":[{"role":"user","content":"?"}],"top_k":3,"guided_regex":"[AB]"}`,
		`/v1/decisions {"model":"m","input":"text","questions":[{"type":"predicate","instructions":"?"},` +
			`{"type":"choice","name":"x","instructions":"?","choices":[{"value":true},{"value":"no"}]}]}`,
		`/v1/tokenize {"model":"m","prompt":"ab"}`,
		`/v1/detokenize {"model":"m","tokens":[1,2]}`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("requests (-want +got)\n%s", diff)
	}
}

func TestStreamChat(t *testing.T) {
	t.Parallel()
	chunk := func(delta, finish string) string {
		return `data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":` + delta + `,"finish_reason":` + finish + "}]}\n\n"
	}
	body := chunk(`{"role":"assistant","content":""}`, "null") + chunk(`{"reasoning_content":"hm"}`, "null") + chunk(`{"content":"yes"}`, "null")
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, body)
		switch r.URL.Path {
		case "/whole/chat/completions":
			fmt.Fprint(w, chunk("{}", `"stop"`), "data: [DONE]\n\n")
		case "/error/chat/completions":
			fmt.Fprint(w, `data: {"error":{"message":"it ended","type":"server_error","param":null,"code":"runner_ended"}}`+"\n\n")
		}
	}))
	defer server.Close()
	for path, wantErr := range map[string]string{"whole": "", "error": "it ended", "broken": "broke off"} {
		var deltas []ChatDelta
		text, reason, err := New(server.URL+"/"+path, "").StreamChat(t.Context(), openai.ChatCompletionRequest{Model: "m"}, func(d ChatDelta) error {
			deltas = append(deltas, d)
			return nil
		})
		if text != "yes" || !cmp.Equal(deltas, []ChatDelta{{Reasoning: "hm"}, {Text: "yes"}}) {
			t.Errorf("%s: %q, %+v", path, text, deltas)
		}
		var api *APIError
		switch {
		case path == "whole" && (err != nil || reason != openai.FinishReasonStop):
			t.Errorf("whole: %q, %v", reason, err)
		case path == "error" && (!errors.As(err, &api) || api.Message != wantErr || api.Code != "runner_ended"):
			t.Errorf("error: %v", err)
		case path == "broken" && !errors.Is(err, io.ErrUnexpectedEOF):
			t.Errorf("broken: %v", err)
		}
	}
}
