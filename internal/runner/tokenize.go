package runner

import (
	"context"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/prompt"
)

// Tokenize turns a text, or messages with their template, into tokens, or tokens into text. The error is a *child.Error or
// the context's cause.
func (r *Runner) Tokenize(ctx context.Context, req child.TokenizeRequest) (child.TokenizeResponse, error) {
	r.calls.RLock()
	defer r.calls.RUnlock()
	response := child.TokenizeResponse{Tokens: []engine.Token{}, Pieces: [][]byte{}, ContextTokens: r.contextTokens}
	if r.closed {
		return response, &child.Error{Code: child.CodeInternal, Message: ErrStopping.Error()}
	}
	var tokens []engine.Token
	var err error
	switch {
	case req.Messages != nil && req.Text == nil && req.Tokens == nil:
		var chat *prompt.ChatPrompt
		chat, err = r.prompts.ChatPrompt(ctx, req.Messages, prompt.ChatOptions{Tools: req.Tools})
		if err == nil {
			tokens = chat.Tokens
		}
	case req.Text != nil && req.Messages == nil && req.Tokens == nil:
		if req.AddSpecialTokens {
			tokens, err = r.prompts.Encode(*req.Text)
		} else {
			tokens, err = r.prompts.Continuation(*req.Text)
		}
	case req.Tokens != nil && req.Messages == nil && req.Text == nil:
		tokens, err = r.textTokens(ctx, "tokens", nil, req.Tokens)
		if err != nil {
			return response, err
		}
	default:
		return response, &child.Error{Code: child.CodeInvalidRequest, Param: "text", Message: "text, messages or tokens must be set, one of the three"}
	}
	if err != nil {
		return response, refusedPrompt(ctx, "text", err)
	}
	response.Tokens = append(response.Tokens, tokens...)
	if bos, ok := r.model.BOS(); ok {
		response.BOS = validUTF8(r.model.Piece(bos))
	}
	if eos, ok := r.model.EOS(); ok {
		response.EOS = validUTF8(r.model.Piece(eos))
	}
	var text []byte
	for _, t := range tokens {
		piece := r.model.Piece(t)
		response.Pieces = append(response.Pieces, piece)
		text = append(text, piece...)
	}
	response.Text = validUTF8(text)
	return response, nil
}
