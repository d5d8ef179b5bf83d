package server

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

const maxInputs = 2048 // OpenAI's

// embeddings answers POST /v1/embeddings.
func (s *Server) embeddings(c *gin.Context) error {
	var req wire.EmbeddingRequest
	if err := decode(c, &req); err != nil {
		return err
	}
	format := "float"
	if req.EncodingFormat != nil {
		format = *req.EncodingFormat
	}
	switch {
	case len(req.Input) == 0:
		return invalid("input", "input is required: a string, an array of token ids, or an array of either")
	case len(req.Input) > maxInputs:
		return invalid("input", "input has %d elements, expected at most %d", len(req.Input), maxInputs)
	case format != "float" && format != "base64":
		return invalid("encoding_format", "encoding_format is %.40q, expected float or base64", format)
	}
	embed := child.EmbedRequest{ID: newID("embd-"), Client: clientOf(c.Request), Background: ofBatch(c.Request), Inputs: make([]child.Input, len(req.Input))}
	for i, text := range req.Input {
		path := pathOf("input", i)
		if text.Tokens == nil && text.String == "" {
			return invalid(path, "%s is empty; an embedding needs at least one token", path)
		}
		prompt, tokens, err := promptOf(path, text)
		if err != nil {
			return err
		}
		if embed.Inputs[i].Tokens = tokens; prompt != nil {
			embed.Inputs[i].Text = *prompt
		}
	}
	target, err := s.resolve(c.Request.Context(), req.Model)
	if err != nil {
		return err
	}
	defer target.release()
	embed.Adapter = target.adapter
	resp, err := s.generator.Embed(c.Request.Context(), target.base, embed)
	if err != nil {
		return blameInput(err)
	}
	if len(resp.Vectors) != len(req.Input) {
		return fmt.Errorf("the runner sent %d vectors for %d inputs", len(resp.Vectors), len(req.Input))
	}
	list := wire.EmbeddingList{
		Object: "list", Model: req.Model, Data: make([]wire.Embedding, len(resp.Vectors)),
		Usage: wire.EmbeddingUsage{PromptTokens: resp.PromptTokens, TotalTokens: resp.PromptTokens},
	}
	for i, vector := range resp.Vectors {
		if req.Dimensions != nil && *req.Dimensions != len(vector) {
			return invalid("dimensions", "dimensions is %d, and the vectors of %s have %d: they cannot be shortened; leave it out", *req.Dimensions, req.Model, len(vector))
		}
		list.Data[i] = wire.Embedding{Object: "embedding", Index: i, Embedding: wire.Vector{Values: vector, Base64: format == "base64"}}
	}
	return encode(c, http.StatusOK, list)
}

// blameInput names the field input in a refusal of a text that is too long.
func blameInput(err error) error {
	if refused := new(child.Error); errors.As(err, &refused) && refused.Code == child.CodeContextLength {
		named := *refused
		named.Param = "input"
		return &named
	}
	return err
}
