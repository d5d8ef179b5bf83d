package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	openai "github.com/sashabaranov/go-openai"
)

// ChatDelta is what a streamed answer is continued with.
type ChatDelta struct {
	Text      string
	Reasoning string // what a model that thinks writes before its answer
}

// StreamChat sends a chat request and calls each with the pieces of the answer as they come. It returns the whole text,
// without the reasoning, and why it ended. A stream that ends without a finish reason is an error: go-openai cannot tell a
// broken connection from the end.
func (c *Client) StreamChat(ctx context.Context, request openai.ChatCompletionRequest, each func(delta ChatDelta) error) (string, openai.FinishReason, error) {
	stream, err := c.CreateChatCompletionStream(ctx, request)
	if err != nil {
		return "", "", explain(err)
	}
	defer stream.Close()
	var answer strings.Builder
	var reason openai.FinishReason
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			if reason == "" {
				return answer.String(), "", fmt.Errorf("the stream broke off: %w", io.ErrUnexpectedEOF)
			}
			return answer.String(), reason, nil
		}
		if err != nil {
			return answer.String(), "", explain(err)
		}
		for _, choice := range chunk.Choices {
			if choice.FinishReason != "" {
				reason = choice.FinishReason
			}
			delta := ChatDelta{Text: choice.Delta.Content, Reasoning: choice.Delta.ReasoningContent}
			if delta == (ChatDelta{}) {
				continue
			}
			answer.WriteString(delta.Text)
			if err := each(delta); err != nil {
				return answer.String(), "", err
			}
		}
	}
}

// Chat sends a chat request with any of hone's fields, and returns an answer with all of them: go-openai's types lack the
// constraints but guided_choice, the sampling fields of other servers, and choice_probabilities.
func (c *Client) Chat(ctx context.Context, request ChatCompletionRequest) (ChatCompletion, error) {
	var answer ChatCompletion
	return answer, c.do(ctx, http.MethodPost, "/chat/completions", request, &answer)
}

// Choose is go-openai's CreateChatCompletion for a request with GuidedChoice. It also returns the probabilities of the
// choices, for each completion of the answer; none if the server sent none.
func (c *Client) Choose(ctx context.Context, request openai.ChatCompletionRequest) (openai.ChatCompletionResponse, [][]ChoiceProbability, error) {
	var body bytes.Buffer
	response, err := c.CreateChatCompletion(context.WithValue(ctx, copyBody{}, &body), request)
	if err != nil {
		return response, nil, explain(err)
	}
	var extension struct {
		Choices []struct {
			Probabilities []ChoiceProbability `json:"choice_probabilities"`
		} `json:"choices"`
	}
	if err := json.NewDecoder(&body).Decode(&extension); err != nil {
		return response, nil, fmt.Errorf("read choice_probabilities: %w", err)
	}
	probabilities := make([][]ChoiceProbability, len(extension.Choices))
	for i, choice := range extension.Choices {
		probabilities[i] = choice.Probabilities
	}
	return response, probabilities, nil
}

// Decide answers questions about one input with probabilities.
func (c *Client) Decide(ctx context.Context, request DecisionRequest) (Decision, error) {
	var decision Decision
	return decision, c.do(ctx, http.MethodPost, "/decisions", request, &decision)
}

// Tokenize returns the tokens of a text, or of messages as a chat completion sees them.
func (c *Client) Tokenize(ctx context.Context, request TokenizeRequest) (TokenizeResponse, error) {
	var tokens TokenizeResponse
	return tokens, c.do(ctx, http.MethodPost, "/tokenize", request, &tokens)
}

// Detokenize returns the text of tokens.
func (c *Client) Detokenize(ctx context.Context, model string, tokens []int32) (string, error) {
	var text struct {
		Prompt string `json:"prompt"`
	}
	return text.Prompt, c.do(ctx, http.MethodPost, "/detokenize", struct {
		Model  string  `json:"model"`
		Tokens []int32 `json:"tokens"`
	}{model, tokens}, &text)
}

// copyBody is the key of a context whose value, a *bytes.Buffer, gets a copy of the answer's body: fields of it that
// go-openai's types drop can then be read all the same.
type copyBody struct{}

type bodyCopier struct{ *http.Transport }

func (t bodyCopier) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.Transport.RoundTrip(req)
	if into, ok := req.Context().Value(copyBody{}).(*bytes.Buffer); ok && err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.TeeReader(resp.Body, into), resp.Body}
	}
	return resp, err
}
