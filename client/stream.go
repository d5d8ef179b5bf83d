package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	openai "github.com/sashabaranov/go-openai"
)

// StreamChat sends a chat request and calls each with the pieces of the answer's text as they come. It returns the whole
// text and why it ended. A stream that ends without a finish reason is an error: go-openai cannot tell a broken connection
// from the end.
func (c *Client) StreamChat(ctx context.Context, request openai.ChatCompletionRequest, each func(text string) error) (string, openai.FinishReason, error) {
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
			if choice.Delta.Content == "" {
				continue
			}
			answer.WriteString(choice.Delta.Content)
			if err := each(choice.Delta.Content); err != nil {
				return answer.String(), "", err
			}
		}
	}
}
