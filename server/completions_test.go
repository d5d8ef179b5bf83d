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
	if diff := cmp.Diff([]int{0, 1}, choice.LogProbs.TextOffset); diff != "" || choice.LogProbs.TopLogprobs[0]["0"] != -9999 || choice.LogProbs.TopLogprobs[0]["你"] != -0.5 {
		t.Errorf("log-probabilities %+v", choice.LogProbs)
	}
	if req, _ := r.echo.last(); *req.Prompt != "你 two" || req.Messages != nil || req.MaxTokens != 16 {
		t.Errorf("request %+v", req)
	}
	stream, err := r.client().CreateCompletionStream(t.Context(), openai.CompletionRequest{Model: "smol", Prompt: []string{"one two", "three"}, N: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	texts := make([]string, 4)
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		texts[chunk.Choices[0].Index] += chunk.Choices[0].Text
	}
	if diff := cmp.Diff([]string{"one two", "one' two'", "three", "three'"}, texts); diff != "" {
		t.Errorf("streamed (-want +got)\n%s", diff)
	}
}

func TestCompletionPrompts(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	texts := func(body string) []string {
		t.Helper()
		status, answer := r.do(t, "POST", "/v1/completions", body)
		var completion wire.Completion
		if err := json.Unmarshal([]byte(answer), &completion); err != nil || status != 200 {
			t.Fatalf("%s: %d %s", body, status, answer)
		}
		list := []string{}
		for i, choice := range completion.Choices {
			if choice.Index != i || choice.FinishReason == "" {
				t.Errorf("%s: choice %d is %+v", body, i, choice)
			}
			list = append(list, choice.Text)
		}
		if want := 7 * len(completion.Choices); completion.Usage.Value.PromptTokens > want {
			t.Errorf("%s: usage %+v", body, completion.Usage.Value)
		}
		return list
	}
	for body, want := range map[string][]string{
		`{"model":"smol","prompt":["a"]}`:                              {"a"},
		`{"model":"smol","prompt":[1,2]}`:                              {"t1 t2"},
		`{"model":"smol","prompt":[[1,2],[3]]}`:                        {"t1 t2", "t3"},
		`{"model":"smol","prompt":["a","b"],"n":2,"best_of":2}`:        {"a", "a'", "b", "b'"},
		`{"model":"smol","prompt":["a b","c"],"echo":true}`:            {"a b a b", "c c"},
		`{"model":"smol","prompt":"a b","echo":true,"max_tokens":0}`:   {"a b"},
		`{"model":"smol","prompt":"a","best_of":1,"logit_bias":{}}`:    {"a"},
		`{"model":"smol","prompt":"?","guided_choice":["yes","no"]}`:   {"yes"},
		`{"model":"smol","prompt":["?","!"],"guided_regex":"[a-z ]+"}`: {"?", "!"},
	} {
		if diff := cmp.Diff(want, texts(body)); diff != "" {
			t.Errorf("%s (-want +got)\n%s", body, diff)
		}
	}
	texts(`{"model":"smol","prompt":[3,4],"guided_choice":["yes","no"],"top_k":3,"max_tokens":2}`)
	got, _ := r.echo.last()
	got.ID, got.Client = "", ""
	want := child.GenerateRequest{
		PromptTokens: []engine.Token{3, 4}, MaxTokens: 2, TopP: 1, TopK: 3,
		Constraint: &child.Constraint{Kind: child.ConstraintChoice, Choices: []string{"yes", "no"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the runner's request (-want +got)\n%s", diff)
	}
	many := make([]string, 100)
	for i := range many {
		many[i] = "x"
	}
	body, err := json.Marshal(map[string]any{"model": "smol", "prompt": many})
	if err != nil {
		t.Fatal(err)
	}
	if got := texts(string(body)); len(got) != 100 {
		t.Errorf("%d completions of 100 prompts", len(got))
	}
	if r.echo.most > maxInFlight {
		t.Errorf("%d prompts at a time, want at most %d", r.echo.most, maxInFlight)
	}
}

// TestLMEvaluation sends what lm-evaluation-harness's local-completions sends, and reads the answer as it does: it sums
// token_logprobs[context:-1], and compares each with the greatest of top_logprobs.
func TestLMEvaluation(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	status, body := r.do(t, "POST", "/v1/completions",
		`{"model":"smol","prompt":[[1,2,3],[4]],"temperature":0,"max_tokens":1,"logprobs":1,"seed":1234,"echo":true}`)
	if status != 200 || !strings.Contains(body, `"logprobs":{"tokens":["t1"," t2"," t3"," t1"],"token_logprobs":[null,-0.25,-0.25,-0.5],`+
		`"top_logprobs":[null,{" t2":-0.25,"0":-9999},{" t3":-0.25,"0":-9999},{" t1":-0.5,"0":-9999}],"text_offset":[0,2,5,8]}`) {
		t.Errorf("%d %s", status, body)
	}
	resp, err := r.client().CreateCompletion(t.Context(), openai.CompletionRequest{Model: "smol", Prompt: "a b", Echo: true, LogProbs: 5, MaxTokens: 1})
	if err != nil {
		t.Fatal(err)
	}
	if p := resp.Choices[0].LogProbs; resp.Choices[0].Text != "a b a" || !cmp.Equal(p.TokenLogprobs, []float32{0, -0.25, -0.5}) || len(p.TopLogprobs[1]) != 6 {
		t.Errorf("go-openai read %+v", resp.Choices[0])
	}
}

func TestCompletionRefusals(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for body, param := range map[string]string{
		`{"model":"smol"}`:                                                            "prompt",
		`{"model":"smol","prompt":[]}`:                                                "prompt",
		`{"model":"smol","prompt":5}`:                                                 "prompt",
		`{"model":"smol","prompt":[1,"a"]}`:                                           "prompt",
		`{"model":"smol","prompt":[[1],["a"]]}`:                                       "prompt[1][0]",
		`{"model":"smol","prompt":[1.5]}`:                                             "prompt[0]",
		`{"model":"smol","prompt":[[]]}`:                                              "prompt[0]",
		`{"model":"smol","prompt":[[-1]]}`:                                            "prompt[0]",
		`{"model":"smol","prompt":"a","logprobs":21}`:                                 "logprobs",
		`{"model":"smol","prompt":"a","logprobs":true}`:                               "logprobs",
		`{"model":"smol","prompt":"a","max_tokens":0}`:                                "max_tokens",
		`{"model":"smol","prompt":"a","max_tokens":-1,"echo":true}`:                   "max_tokens",
		`{"model":"smol","prompt":"a","best_of":2}`:                                   "best_of",
		`{"model":"smol","prompt":"a","best_of":3,"n":2}`:                             "best_of",
		`{"model":"smol","prompt":"a","n":9}`:                                         "n",
		`{"model":"smol","prompt":"a","suffix":"b"}`:                                  "suffix",
		`{"model":"smol","prompt":"a","tools":[{}]}`:                                  "tools",
		`{"model":"smol","prompt":"a","top_logprobs":1}`:                              "top_logprobs",
		`{"model":"smol","messages":[]}`:                                              "messages",
		`{"model":"smol","prompt":"a","stream_options":{}}`:                           "stream_options",
		`{"model":"smol","prompt":"a","guided_choice":["a"]}`:                         "guided_choice",
		`{"model":"smol","prompt":"toolong"}`:                                         "prompt",
		`{"model":"smol","prompt":["a","toolong"]}`:                                   "prompt",
		`{"model":"smol","prompt":["a","badregex"],"guided_regex":"("}`:               "guided_regex",
		`{"model":"smol","prompt":"a","echo":true,"max_tokens":0,"guided_regex":"a"}`: "guided_regex",
	} {
		status, answer := r.do(t, "POST", "/v1/completions", body)
		code := ""
		if strings.Contains(body, "toolong") {
			code = "context_length_exceeded"
		}
		wantError(t, body, status, answer, 400, param, code, "")
	}
	status, answer := r.do(t, "POST", "/v1/completions", `{"model":"smol","prompt":["a","panic"]}`)
	wantError(t, "a bug in one of two", status, answer, 500, "", "", "x-request-id")
}

// TestTextOffsets checks tokens that hold a part of a character.
func TestTextOffsets(t *testing.T) {
	t.Parallel()
	var c characters
	var got []int
	for _, token := range []string{"a", "你", "\xe5", "\xa5\xbd", "!", "", "x"} {
		got = append(got, c.before([]byte(token)))
	}
	if diff := cmp.Diff([]int{0, 1, 2, 2, 3, 4, 4}, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}
