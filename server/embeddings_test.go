package server

import (
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	openai "github.com/sashabaranov/go-openai"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/wire"
)

func TestEmbeddings(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, format := range []openai.EmbeddingEncodingFormat{"", openai.EmbeddingEncodingFormatFloat, openai.EmbeddingEncodingFormatBase64} {
		resp, err := r.client().CreateEmbeddings(t.Context(), openai.EmbeddingRequestStrings{Input: []string{"four", "你"}, Model: "smol", EncodingFormat: format, Dimensions: 3})
		if err != nil {
			t.Fatal(err)
		}
		want := []openai.Embedding{{Object: "embedding", Embedding: []float32{4, 0, 0.5}}, {Object: "embedding", Index: 1, Embedding: []float32{3, 1, 0.5}}}
		if diff := cmp.Diff(want, resp.Data); diff != "" || resp.Object != "list" || resp.Model != "smol" || resp.Usage.PromptTokens != 10 || resp.Usage.TotalTokens != 10 {
			t.Errorf("%q: %+v (-want +got)\n%s", format, resp, diff)
		}
	}
	if _, err := r.client().CreateEmbeddings(t.Context(), openai.EmbeddingRequestTokens{Input: [][]int{{5, 6}, {7}}, Model: "smol"}); err != nil {
		t.Fatal(err)
	}
	got := r.echo.embeds[len(r.echo.embeds)-1]
	if diff := cmp.Diff([]child.Input{{Tokens: []engine.Token{5, 6}}, {Tokens: []engine.Token{7}}}, got.Inputs); diff != "" || !strings.HasPrefix(got.Client, "key:") {
		t.Errorf("the runner's request %+v (-want +got)\n%s", got, diff)
	}
	name := r.tuned(t, smolDigest)
	if status, body := r.do(t, "POST", "/v1/embeddings", `{"model":"`+name+`","input":"x"}`); status != 200 || r.echo.embeds[len(r.echo.embeds)-1].Adapter == nil {
		t.Errorf("of a tuned model: %d %s", status, body)
	}
	for body, param := range map[string]string{
		`{"model":"smol"}`:                                                        "input",
		`{"model":"smol","input":[]}`:                                             "input",
		`{"model":"smol","input":""}`:                                             "input[0]",
		`{"model":"smol","input":["a",""]}`:                                       "input[1]",
		`{"model":"smol","input":{}}`:                                             "input",
		`{"model":"smol","input":"a","dimensions":2}`:                             "dimensions",
		`{"model":"smol","input":"a","encoding_format":"int8"}`:                   "encoding_format",
		`{"model":"none","input":"a"}`:                                            "model",
		`{"model":"smol","input":["a","toolong"]}`:                                "input",
		`{"model":"smol","input":["` + strings.Repeat(`a","`, maxInputs) + `a"]}`: "input",
	} {
		status, answer := r.do(t, "POST", "/v1/embeddings", body)
		want, code := http.StatusBadRequest, ""
		switch {
		case param == "model":
			want, code = http.StatusNotFound, "model_not_found"
		case strings.Contains(body, "toolong"):
			code = "context_length_exceeded"
		}
		wantError(t, body[:min(len(body), 80)], status, answer, want, param, code, "")
	}
}

func TestTokenize(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, test := range []struct{ path, body, want string }{
		{"/tokenize", `{"model":"smol","prompt":"hi"}`, `{"count":3,"max_model_len":2048,"tokens":[1,104,105],"token_strs":null}`},
		{"/v1/tokenize", `{"model":"smol","prompt":"hi","add_special_tokens":false,"return_token_strs":true}`,
			`{"count":2,"max_model_len":2048,"tokens":[104,105],"token_strs":["h","i"]}`},
		{"/v1/tokenize", `{"model":"smol","prompt":"é","add_special_tokens":false,"return_token_strs":true}`,
			`{"count":2,"max_model_len":2048,"tokens":[195,169],"token_strs":["` + "\uFFFD" + `","` + "\uFFFD" + `"]}`},
		{"/v1/tokenize", `{"model":"smol","prompt":""}`, `{"count":1,"max_model_len":2048,"tokens":[1],"token_strs":null}`},
		{"/tokenize", `{"model":"smol","messages":[{"role":"user","content":"a"}],"tools":null,"add_generation_prompt":true}`,
			`{"count":1,"max_model_len":2048,"tokens":[97],"token_strs":null}`},
		{"/detokenize", `{"model":"smol","tokens":[104,60]}`, `{"prompt":"h<"}`},
		{"/v1/detokenize", `{"model":"smol","tokens":[104]}`, `{"prompt":"h"}`},
		{"/tokenize", `{"prompt":"h","add_special_tokens":false}`, `{"count":1,"max_model_len":2048,"tokens":[104],"token_strs":null}`},
		{"/detokenize", `{"tokens":[104]}`, `{"prompt":"h"}`},
	} {
		if status, body := r.do(t, "POST", test.path, test.body); status != 200 || body != test.want+"\n" {
			t.Errorf("%s %s: %d %s, want %s", test.path, test.body, status, body, test.want)
		}
	}
	for _, path := range []string{"/tokenizer_info", "/v1/tokenizer_info?model=smol"} {
		if status, body := r.do(t, "GET", path, ""); status != 200 || body != `{"bos_token":null,"eos_token":"</s>","model_max_length":2048}`+"\n" {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	if diff := cmp.Diff([]wire.Message{{Role: "user", Content: "a"}}, r.echo.tokenizes[4].Messages); diff != "" || r.echo.tokenizes[4].AddSpecialTokens {
		t.Errorf("messages (-want +got)\n%s", diff)
	}
	for _, test := range []struct{ path, body, param string }{
		{"/tokenize", `{"model":"smol"}`, "prompt"},
		{"/tokenize", `{"model":"smol","prompt":"a","messages":[{"role":"user","content":"a"}]}`, "messages"},
		{"/tokenize", `{"model":"smol","messages":[{"role":"wizard","content":"a"}]}`, "messages[0].role"},
		{"/tokenize", `{"model":"smol","messages":[{"role":"user","content":"a"}],"tools":[{}]}`, "tools[0].type"},
		{"/tokenize", `{"model":"smol","messages":[{"role":"user","content":"a"}],"add_generation_prompt":false}`, "add_generation_prompt"},
		{"/tokenize", `{"model":"smol","prompt":5}`, "prompt"},
		{"/detokenize", `{"model":"smol"}`, "tokens"},
		{"/detokenize", `{"model":"smol","tokens":[-1]}`, "tokens"},
		{"/detokenize", `{"model":"smol","tokens":["a"]}`, "tokens[0]"},
	} {
		status, body := r.do(t, "POST", test.path, test.body)
		wantError(t, test.body, status, body, 400, test.param, "", "")
	}
}
