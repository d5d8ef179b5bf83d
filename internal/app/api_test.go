//go:build cgo

package app_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"

	openai "github.com/sashabaranov/go-openai"

	"github.com/hone-llm/hone/client"
)

// TestAPI sends what docs/api.md describes to the real engine: its own examples, and requests whose answers can be checked.
func TestAPI(t *testing.T) {
	h := serve(t, home(t))
	c := client.New(h.url+"/v1", "key")
	ctx := t.Context()
	send := func(path, body string) (int, []byte) {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.url+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, answer
	}

	t.Run("examples", func(t *testing.T) {
		page, err := os.ReadFile("../../docs/api.md")
		if err != nil {
			t.Fatal(err)
		}
		examples := regexp.MustCompile(`(?s)curl http://127\.0\.0\.1:8080(\S+) (?:-H '[^']*' )?-d '(.*?)'\n`).FindAllSubmatch(page, -1)
		if len(examples) < 9 {
			t.Fatalf("found %d examples", len(examples))
		}
		for _, example := range examples {
			if bytes.Contains(example[1], []byte("...")) {
				continue // of an object that the reader has made
			}
			if status, body := send(string(example[1]), string(example[2])); status != http.StatusOK || !json.Valid(body) {
				t.Errorf("%s %s: %d %s", example[1], example[2], status, body)
			}
		}
	})

	t.Run("choice", func(t *testing.T) {
		choices := []string{"red", "a colour like the sky", "a colour"} // the last is the beginning of another
		resp, chosen, err := c.Choose(ctx, openai.ChatCompletionRequest{Model: model, Messages: say("Which?"), LogProbs: true,
			ChatCompletionRequestExtensions: openai.ChatCompletionRequestExtensions{GuidedChoice: choices}})
		if err != nil {
			t.Fatal(err)
		}
		answer, sum, own, best := resp.Choices[0].Message.Content, 0.0, 0.0, 0.0
		for i, p := range chosen[0] {
			if p.Choice != choices[i] {
				t.Errorf("probability %d is of %q", i, p.Choice)
			}
			if p.Choice == answer {
				own = p.Probability
			}
			sum, best = sum+p.Probability, max(best, p.Probability)
		}
		var logProb float64
		for _, token := range resp.Choices[0].LogProbs.Content {
			logProb += token.LogProb
		}
		if math.Abs(sum-1) > 1e-6 || own != best || own == 0 || logProb > 0 {
			t.Errorf("%q of %v, which sum to %v; its tokens' to %v", answer, chosen[0], sum, math.Exp(logProb))
		}
	})

	t.Run("constraints", func(t *testing.T) {
		for name, set := range map[string]func(*client.ChatCompletionRequest){
			`^\[(true|false)(, ?(true|false)){2}\]$`: func(r *client.ChatCompletionRequest) {
				r.GuidedJSON = json.RawMessage(`{"type":"array","items":{"type":"boolean"},"minItems":3,"maxItems":3}`)
			},
			`^[0-9]{4}-[0-9]{2}$`: func(r *client.ChatCompletionRequest) { r.GuidedRegex = new("[0-9]{4}-[0-9]{2}") },
			`^(yes|no)!$`:         func(r *client.ChatCompletionRequest) { r.Grammar = new("start: (\"yes\" | \"no\") \"!\"\n") },
			`^"[AB]"$`: func(r *client.ChatCompletionRequest) {
				r.ResponseFormat = &client.ResponseFormat{Type: "json_schema", JSONSchema: &client.JSONSchema{Name: "x", Schema: json.RawMessage(`{"type":"string","enum":["A","B"]}`)}}
			},
		} {
			request := client.ChatCompletionRequest{Model: model, Messages: []client.Message{{Role: "user", Content: "Go."}}}
			request.Temperature, request.N = new(0.8), new(2)
			set(&request)
			answer, err := c.Chat(ctx, request)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			for i, choice := range answer.Choices {
				if compact := regexp.MustCompile(`\s+`).ReplaceAllString(*choice.Message.Content, ""); choice.Index != i || !regexp.MustCompile(name).MatchString(compact) {
					t.Errorf("%s: %+v, %q", name, choice, *choice.Message.Content)
				}
			}
			if len(answer.Choices) != 2 {
				t.Errorf("%s: %d choices", name, len(answer.Choices))
			}
		}
		for _, test := range []struct{ field, value, param string }{
			{"guided_regex", `"(["`, "guided_regex"},
			{"guided_json", `{"type":"nope"}`, "guided_json"},
			{"grammar", `"root ::= \"a\""`, "grammar"},
			{"structured_outputs", `{"grammar":"start: nowhere"}`, "structured_outputs.grammar"},
			{"logit_bias", `{"9999999":1}`, "logit_bias"},
		} {
			status, body := send("/v1/chat/completions", fmt.Sprintf(`{"model":%q,"messages":[{"role":"user","content":"x"}],%q:%s}`, model, test.field, test.value))
			var refused struct{ Error client.APIError }
			if err := json.Unmarshal(body, &refused); err != nil || status != http.StatusBadRequest || refused.Error.Param != test.param || !strings.Contains(refused.Error.Message, test.param) {
				t.Errorf("%s: %s: %d %s", test.field, test.value, status, body)
			}
		}
	})

	t.Run("tools", func(t *testing.T) {
		request := openai.ChatCompletionRequest{Model: model, Messages: say("How is the weather in Paris?"), MaxCompletionTokens: 200, ToolChoice: "required", ParallelToolCalls: false, Temperature: math.SmallestNonzeroFloat32,
			Tools: []openai.Tool{{Type: openai.ToolTypeFunction, Function: &openai.FunctionDefinition{Name: "weather",
				Parameters: json.RawMessage(`{"type":"object","properties":{"city":{"type":"string","maxLength":12}},"required":["city"],"additionalProperties":false}`)}}}}
		resp, err := h.client.CreateChatCompletion(ctx, request)
		if err != nil {
			t.Fatal(err)
		}
		choice := resp.Choices[0]
		var arguments struct{ City *string }
		if len(choice.Message.ToolCalls) != 1 || choice.FinishReason != openai.FinishReasonToolCalls || choice.Message.ToolCalls[0].Function.Name != "weather" ||
			json.Unmarshal([]byte(choice.Message.ToolCalls[0].Function.Arguments), &arguments) != nil || arguments.City == nil {
			t.Fatalf("answer %+v", choice)
		}
		stream, err := h.client.CreateChatCompletionStream(ctx, request)
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		name, text := "", ""
		for {
			chunk, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, call := range chunk.Choices[0].Delta.ToolCalls {
				if *call.Index == 0 {
					name, text = name+call.Function.Name, text+call.Function.Arguments
				}
			}
		}
		if call := choice.Message.ToolCalls[0].Function; name != call.Name || text != call.Arguments {
			t.Errorf("streamed %s(%s), whole %s(%s)", name, text, call.Name, call.Arguments)
		}
		messages := append(request.Messages, choice.Message)
		for _, call := range choice.Message.ToolCalls {
			messages = append(messages, openai.ChatCompletionMessage{Role: openai.ChatMessageRoleTool, ToolCallID: call.ID, Content: "rain"})
		}
		if _, err := h.client.CreateChatCompletion(ctx, openai.ChatCompletionRequest{Model: model, Messages: messages, MaxCompletionTokens: 4}); err != nil {
			t.Errorf("the call's result: %v", err)
		}
	})

	t.Run("echo", func(t *testing.T) {
		resp, err := h.client.CreateCompletion(ctx, openai.CompletionRequest{Model: model, Prompt: []string{"The capital of France is Paris", "1, 2, 3, 4"}, Echo: true, LogProbs: 3, MaxTokens: 1, Temperature: math.SmallestNonzeroFloat32})
		if err != nil {
			t.Fatal(err)
		}
		for i, prompt := range []string{"The capital of France is Paris", "1, 2, 3, 4"} {
			choice := resp.Choices[i]
			p := choice.LogProbs
			if choice.Index != i || !strings.HasPrefix(choice.Text, prompt) || len(p.Tokens) < 5 || len(p.TokenLogprobs) != len(p.Tokens) || len(p.TopLogprobs) != len(p.Tokens) {
				t.Fatalf("choice %+v", choice)
			}
			for j := 1; j < len(p.Tokens); j++ {
				if own, ok := p.TopLogprobs[j][p.Tokens[j]]; !ok || own != p.TokenLogprobs[j] || own > 0 {
					t.Errorf("token %q has %v, among its alternatives %v", p.Tokens[j], p.TokenLogprobs[j], own)
				}
				if end := p.TextOffset[j] + len(p.Tokens[j]); end <= len(choice.Text) && choice.Text[p.TextOffset[j]:end] != p.Tokens[j] {
					t.Errorf("token %q is not at %d of %q", p.Tokens[j], p.TextOffset[j], choice.Text)
				}
			}
		}
	})

	t.Run("embeddings", func(t *testing.T) {
		resp, err := h.client.CreateEmbeddings(ctx, openai.EmbeddingRequestStrings{Model: model, Input: []string{"a cat", "the economy", "a cat"}, EncodingFormat: openai.EmbeddingEncodingFormatBase64})
		if err != nil {
			t.Fatal(err)
		}
		same, err := resp.Data[0].DotProduct(&resp.Data[2])
		if err != nil {
			t.Fatal(err)
		}
		other, err := resp.Data[0].DotProduct(&resp.Data[1])
		if err != nil || math.Abs(float64(same)-1) > 1e-3 || other >= same || resp.Usage.PromptTokens == 0 {
			t.Errorf("products %v and %v, %v, usage %+v", same, other, err, resp.Usage)
		}
	})

	t.Run("tokens", func(t *testing.T) {
		const text = "Hello, 世界! <b>"
		tokens, err := c.Tokenize(ctx, client.TokenizeRequest{Model: model, Prompt: new(text)})
		if err != nil {
			t.Fatal(err)
		}
		if back, err := c.Detokenize(ctx, model, tokens.Tokens); err != nil || back != text || tokens.Count != len(tokens.Tokens) || tokens.MaxModelLen == 0 {
			t.Errorf("%+v is %q, %v", tokens, back, err)
		}
	})
}
