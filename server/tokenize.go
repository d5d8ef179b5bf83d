package server

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// tokenize answers POST /tokenize: the tokens of a text, or of messages as a chat completion sees them.
func (s *Server) tokenize(c *gin.Context) error {
	var req wire.TokenizeRequest
	if err := decode(c, &req, refuseInTokenize); err != nil {
		return err
	}
	if _, err := toolNames(req.Tools); err != nil {
		return err
	}
	ask := child.TokenizeRequest{Text: req.Prompt, AddSpecialTokens: req.AddSpecialTokens == nil || *req.AddSpecialTokens}
	switch {
	case req.Prompt == nil && len(req.Messages) == 0:
		return invalid("prompt", "prompt or messages is required")
	case req.Prompt != nil && len(req.Messages) > 0:
		return invalid("messages", "prompt and messages are both there; send one of them")
	case len(req.Messages) > 0:
		if err := checkMessages(req.Messages); err != nil {
			return err
		}
		ask.Messages, ask.AddSpecialTokens = conversation(req.Messages), false // the template has them
		if !isNull(req.Tools) {
			ask.Tools = req.Tools
		}
	}
	resp, err := s.askTokens(c, req.Model, ask)
	if err != nil {
		return err
	}
	answer := wire.TokenizeResponse{Count: len(resp.Tokens), MaxModelLen: resp.ContextTokens, Tokens: make([]int32, len(resp.Tokens))}
	for i, token := range resp.Tokens {
		answer.Tokens[i] = int32(token)
	}
	if req.ReturnTokenStrs != nil && *req.ReturnTokenStrs {
		answer.TokenStrs = make([]string, len(resp.Pieces))
		for i, piece := range resp.Pieces {
			answer.TokenStrs[i] = strings.ToValidUTF8(string(piece), "\uFFFD")
		}
	}
	return encode(c, http.StatusOK, answer)
}

// detokenize answers POST /detokenize.
func (s *Server) detokenize(c *gin.Context) error {
	var req wire.DetokenizeRequest
	if err := decode(c, &req); err != nil {
		return err
	}
	tokens, err := tokensOf("tokens", req.Tokens)
	if err != nil {
		return err
	}
	resp, err := s.askTokens(c, req.Model, child.TokenizeRequest{Tokens: tokens})
	if err != nil {
		return err
	}
	return encode(c, http.StatusOK, wire.DetokenizeResponse{Prompt: resp.Text})
}

// tokenizerInfo answers GET /tokenizer_info, which vLLM has and lm-evaluation-harness asks before it leaves the tokenizing to
// the server.
func (s *Server) tokenizerInfo(c *gin.Context) error {
	resp, err := s.askTokens(c, c.Query("model"), child.TokenizeRequest{Text: new("")})
	if err != nil {
		return err
	}
	info := wire.TokenizerInfo{ModelMaxLength: resp.ContextTokens}
	if resp.BOS != "" {
		info.BOSToken = &resp.BOS
	}
	if resp.EOS != "" {
		info.EOSToken = &resp.EOS
	}
	return encode(c, http.StatusOK, info)
}

// askTokens asks the model of this name, or without one the only base model that there is, or that is loaded: vLLM, whose
// endpoints these are, serves one.
func (s *Server) askTokens(c *gin.Context, model string, ask child.TokenizeRequest) (child.TokenizeResponse, error) {
	if model == "" {
		model = s.onlyModel(c.Request.Context())
	}
	target, err := s.resolve(c.Request.Context(), model)
	if err != nil {
		return child.TokenizeResponse{}, err
	}
	defer target.release()
	return s.generator.Tokenize(c.Request.Context(), target.base, ask)
}

// onlyModel is "" if there are several.
func (s *Server) onlyModel(ctx context.Context) string {
	if models, err := s.models.List(ctx); err == nil && len(models) == 1 {
		return models[0].Name
	}
	only := ""
	for _, state := range s.generator.Models() {
		if state.State != child.Ready {
			continue
		}
		if only != "" {
			return ""
		}
		only = state.Model
	}
	return only
}

// refuseInTokenize refuses vLLM's fields that would change the tokens, and are not available.
func refuseInTokenize(fields map[string]json.RawMessage) error {
	for name, harmless := range map[string]string{
		"add_generation_prompt": "true", "continue_final_message": "false", "chat_template": "", "chat_template_kwargs": "{}", "mm_processor_kwargs": "{}",
	} {
		if raw := fields[name]; len(raw) > 0 && !isNull(raw) && string(raw) != harmless {
			return invalid(name, "%s is not available here; leave it out", name)
		}
	}
	return nil
}
