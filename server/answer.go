package server

import (
	"net/http"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// answer writes a completion in an endpoint's own shape.
type answer interface {
	whole(all collected) any
	chunks(event child.GenerateEvent) []any // of one event, in order
}

// answerHead is what the whole and every chunk of an answer have in common.
type answerHead struct {
	id, model, fingerprint string
	created                int64
	usage                  bool // wanted in the stream
}

// answer computes what req, which has its ID, asks of the model of this name, and sends it, streamed or whole, in the
// shape that newAnswer gives it.
func (s *Server) answer(c *gin.Context, model string, req child.GenerateRequest, streamed *bool, options *wire.StreamOptions, newAnswer func(answerHead) answer) error {
	target, err := s.resolve(c.Request.Context(), model)
	if err != nil {
		return err
	}
	defer target.release()
	req.Adapter = target.adapter
	shape := newAnswer(answerHead{
		id: req.ID, model: model, fingerprint: target.fingerprint(), created: s.now().Unix(),
		usage: options != nil && options.IncludeUsage,
	})
	events := s.generator.Generate(c.Request.Context(), target.base, req)
	if streamed != nil && *streamed {
		return stream(c, events, shape.chunks)
	}
	all, err := collect(events)
	if err != nil {
		return err
	}
	return encode(c, http.StatusOK, shape.whole(all))
}
