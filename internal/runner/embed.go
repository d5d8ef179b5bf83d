package runner

import (
	"cmp"
	"context"
	"fmt"
	"math"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
)

// Embed returns a vector for each input: the mean of the last hidden states of its tokens after the final norm, of length 1.
// Errors are those of Generate.
func (r *Runner) Embed(ctx context.Context, req child.EmbedRequest) (response child.EmbedResponse, err error) {
	err = r.serve(ctx, func(ctx context.Context) error {
		response, err = r.embed(ctx, req)
		return err
	})
	return response, err
}

func (r *Runner) embed(ctx context.Context, req child.EmbedRequest) (response child.EmbedResponse, err error) {
	refuse := func(format string, args ...any) (child.EmbedResponse, error) {
		return response, &child.Error{Code: child.CodeInvalidRequest, Param: "input", Message: "input " + fmt.Sprintf(format, args...)}
	}
	if len(req.Inputs) == 0 || len(req.Inputs) > maxInputs {
		return refuse("has %d texts, expected 1 to %d", len(req.Inputs), maxInputs)
	}
	request := newRequest(ctx, req.Client, nil, 0)
	request.background = req.Background
	sequences := make([]*sequence, 0, len(req.Inputs))
	embeddings := make([]*embedding, 0, len(req.Inputs))
	for i, input := range req.Inputs {
		text := &input.Text
		if input.Tokens != nil {
			text = nil
		}
		tokens, err := r.textTokens(ctx, "input", text, input.Tokens)
		if err != nil {
			return response, err
		}
		if len(tokens) == 0 {
			return refuse("[%d] is empty", i)
		}
		if len(tokens) > r.contextTokens {
			return response, &child.Error{Code: child.CodeContextLength, Param: "input", Message: fmt.Sprintf(
				"This model's maximum context length is %d tokens. However, input[%d] resulted in %d tokens. Please reduce its length.", r.contextTokens, i, len(tokens))}
		}
		e := &embedding{}
		q := newSequence(request, tokens, e)
		q.from, q.want, q.shared = 0, engine.WantState, false
		sequences, embeddings = append(sequences, q), append(embeddings, e)
		if response.PromptTokens += len(tokens); response.PromptTokens > maxInputTokens {
			return refuse("has more than %d tokens in all; send it in parts", maxInputTokens)
		}
	}
	if req.Adapter != nil {
		if req.Adapter.ID == "" || req.Adapter.Path == "" {
			return response, &child.Error{Code: child.CodeInvalidRequest, Param: "adapter", Message: "adapter needs an id and a path"}
		}
		request.adapter = r.scheduler.loaded.acquire(*req.Adapter)
		defer r.scheduler.loaded.release(request.adapter)
	}
	err = r.submit(ctx, request, sequences, func() error {
		for {
			select {
			case <-request.done:
				if err := request.out.failure(); err != nil {
					return err
				}
				for _, q := range sequences {
					if q.from < len(q.tokens) {
						return cmp.Or(context.Cause(ctx), ErrStopping)
					}
				}
				return nil
			case <-request.out.wake:
				if err := request.out.failure(); err != nil {
					return err
				}
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	})
	if err != nil {
		return child.EmbedResponse{}, err
	}
	for _, e := range embeddings {
		response.Vectors = append(response.Vectors, e.vector())
	}
	return response, nil
}

// embedding sums up the hidden states of a text.
type embedding struct{ sum []float64 }

// read implements reader.
func (e *embedding) read(q *sequence, outputs [][]float32) (finished bool, spawned []*sequence) {
	for _, state := range outputs {
		if e.sum == nil {
			e.sum = make([]float64, len(state))
		}
		for i, x := range state {
			e.sum[i] += float64(x)
		}
	}
	q.from += len(outputs)
	return q.from == len(q.tokens), nil
}

// vector is the sum with length 1, as is then the mean's.
func (e *embedding) vector() []float32 {
	square := 0.0
	for _, x := range e.sum {
		square += x * x
	}
	vector := make([]float32, len(e.sum))
	for i, x := range e.sum {
		if square > 0 {
			vector[i] = float32(x / math.Sqrt(square))
		}
	}
	return vector
}
