package server

import (
	"errors"
	"net/http"
	"slices"
	"strings"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// order is what a request asks of a model: completions of one prompt or of several, whose requests are otherwise alike.
type order struct {
	id         string
	requests   []child.GenerateRequest
	n          int      // completions of each
	constraint string   // the field that asks for a constraint, "" if there is none
	choices    []string // of a constraint to choices
	stream     bool
	usage      bool // wanted in the stream
}

// newOrder checks the shared fields of a request and returns an order of prompts copies of base with them.
func newOrder(f *wire.Sampling, base *child.GenerateRequest, prompts int) (*order, error) {
	if err := applySampling(f, base); err != nil {
		return nil, err
	}
	field, err := applyConstraint(f, base)
	if err != nil {
		return nil, err
	}
	o := &order{requests: make([]child.GenerateRequest, prompts), n: max(base.N, 1), constraint: field, stream: streamed(f)}
	o.usage = f.StreamOptions != nil && f.StreamOptions.IncludeUsage
	if base.Constraint != nil {
		o.choices = base.Constraint.Choices
	}
	for p := range o.requests {
		o.requests[p] = *base
	}
	return o, nil
}

// answer writes completions in an endpoint's own shape.
type answer interface {
	whole(all collected) any
	chunks(event child.GenerateEvent) []any // of one event, in order
}

// answerHead is what the whole and every chunk of an answer have in common.
type answerHead struct {
	id, model, fingerprint string
	created                int64
	usage                  bool // wanted in the stream
	choices                []string
}

// probabilities pairs the choices of the request with the runner's numbers.
func (h *answerHead) probabilities(numbers []float64) []wire.ChoiceProbability {
	if len(numbers) != len(h.choices) {
		return nil
	}
	var list []wire.ChoiceProbability
	for i, choice := range h.choices {
		list = append(list, wire.ChoiceProbability{Choice: choice, Probability: numbers[i]})
	}
	return list
}

// answer computes what o asks of the model of this name, and sends it, streamed or whole, in the shape that newAnswer
// gives it.
func (s *Server) answer(c *gin.Context, model string, o *order, newAnswer func(answerHead) answer) error {
	target, err := s.resolve(c.Request.Context(), model)
	if err != nil {
		return err
	}
	defer target.release()
	for p := range o.requests {
		req := &o.requests[p]
		req.ID, req.Client, req.Background, req.Adapter = partID(o.id, p), clientOf(c.Request), ofBatch(c.Request), target.adapter
	}
	shape := newAnswer(answerHead{
		id: o.id, model: model, fingerprint: target.fingerprint(), created: s.now().Unix(), usage: o.usage, choices: o.choices,
	})
	events := s.generate(c.Request.Context(), target.base, o.requests)
	if o.stream {
		return o.blame(stream(c, events, shape.chunks))
	}
	all, err := collect(events, len(o.requests)*o.n)
	if err != nil {
		return o.blame(err)
	}
	return encode(c, http.StatusOK, shape.whole(all))
}

// blame names the request's own field in a refusal of its constraint or of its prompt: the runner knows these as fields of
// the protocol.
func (o *order) blame(err error) error {
	refused := new(child.Error)
	if !errors.As(err, &refused) {
		return err
	}
	named := *refused
	switch {
	case slices.Contains(constraintParams, refused.Param):
		if named.Param = o.constraint; named.Param == "" {
			named.Param = "tools" // the runner constrains calls to their schemas
		}
		named.Message = named.Param + ": " + strings.TrimPrefix(refused.Message, refused.Param+": ")
	case refused.Code == child.CodeContextLength && o.requests[0].Messages == nil:
		named.Param = "prompt"
	default:
		return err
	}
	return &named
}

// constraintParams are the runner's names of child.Constraint and its kinds.
var constraintParams = []string{
	"constraint", "choices", child.ConstraintChoice, child.ConstraintJSONObject, child.ConstraintJSONSchema, child.ConstraintRegex, child.ConstraintLark, "grammar",
}
