package runner

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/prompt"
)

// Generate answers one request. emit gets its events in order, the last one with Usage; text that a slow emit has not
// taken is joined. The error is a *child.Error if the request is refused or fails, the context's cause if it was
// cancelled, else emit's. In every case its sequences have left the batch, or do within one decode.
//
// A choice constraint answers with a whole choice, whatever MaxTokens, Stop and the penalties say.
func (r *Runner) Generate(ctx context.Context, req child.GenerateRequest, emit func(child.GenerateEvent) error) error {
	return r.serve(ctx, func(ctx context.Context) error { return r.generate(ctx, req, emit) })
}

// serve runs a request that takes a place in the queue, under a context that ends with the runner.
func (r *Runner) serve(ctx context.Context, f func(context.Context) error) error {
	r.calls.RLock()
	defer r.calls.RUnlock()
	if r.closed {
		return &child.Error{Code: child.CodeInternal, Message: ErrStopping.Error()}
	}
	if r.places.Add(-1) < 0 {
		r.places.Add(1)
		return r.overloaded()
	}
	defer r.places.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(context.Canceled)
	defer context.AfterFunc(r.scheduler.stopping, func() { cancel(ErrStopping) })() //nolint:contextcheck // it is the runner's end, which ends the request too
	err := f(ctx)
	if errors.Is(err, ErrStopping) {
		return &child.Error{Code: child.CodeInternal, Message: err.Error()}
	}
	return err
}

func (r *Runner) overloaded() error {
	return &child.Error{Code: child.CodeOverloaded, Message: "the model's queue is full; try again later"}
}

// submit hands sequences to the scheduler, calls f, and waits until the scheduler has let go of them.
func (r *Runner) submit(ctx context.Context, req *request, sequences []*sequence, f func() error) error {
	// The sequences must have left before what they use is freed.
	own, cancel := context.WithCancelCause(ctx)
	req.ctx = own
	if err := r.scheduler.submit(req, sequences...); err != nil {
		cancel(err)
		return err
	}
	defer func() {
		cancel(context.Canceled)
		r.scheduler.notify()
		<-req.done
	}()
	return f()
}

func (r *Runner) generate(ctx context.Context, req child.GenerateRequest, emit func(child.GenerateEvent) error) error {
	if err := r.check(req); err != nil {
		return err
	}
	chat, err := r.promptOf(ctx, req)
	if err != nil {
		return err
	}
	completions := max(req.N, 1)
	request := newRequest(ctx, req.Client, nil, completions)
	request.background = req.Background
	if req.Adapter != nil {
		request.adapter = r.scheduler.loaded.acquire(*req.Adapter)
		defer r.scheduler.loaded.release(request.adapter)
	}
	var first *sequence
	if req.Constraint != nil && req.Constraint.Kind == child.ConstraintChoice {
		first, err = r.choice(request, req, chat)
	} else {
		var all []*completion
		first, all, err = r.completions(ctx, request, req, chat)
		for _, c := range all {
			defer c.constraint.Close() // when the scheduler has let go of it
		}
	}
	if err != nil {
		return err
	}
	return r.submit(ctx, request, []*sequence{first}, func() error {
		for {
			event, err := request.out.take(ctx)
			if err != nil {
				return err
			}
			if err := emit(event); err != nil {
				return fmt.Errorf("send a completion's event: %w", err)
			}
			if event.Usage != nil {
				return nil
			}
		}
	})
}

// completions returns the first sequence of sampled completions, and all of them: also beside an error, for Close.
func (r *Runner) completions(ctx context.Context, request *request, req child.GenerateRequest, chat *prompt.ChatPrompt) (*sequence, []*completion, error) {
	constraint := req.Constraint
	if constraint == nil {
		constraint = chat.Constraint
	}
	limit := r.contextTokens
	if req.MaxTokens > 0 {
		limit = min(limit, len(chat.Tokens)+min(req.MaxTokens, r.contextTokens))
	}
	var all []*completion
	for i := range max(req.N, 1) {
		c := &completion{
			request: request, vocabulary: r.model, index: i, limit: limit,
			sampler: newSampler(req, i, r.ends), text: newText(req.Stop, req.MinTokens),
			logProbs: req.LogProbs, top: req.TopLogProbs,
			score: req.Echo && req.LogProbs, only: req.PromptOnly,
		}
		c.sampler.prompt(chat.Tokens)
		if req.Messages != nil {
			c.parser = chat.NewParser()
		}
		all = append(all, c)
		if constraint != nil && !req.PromptOnly {
			var err error
			if c.constraint, err = r.constraints.New(ctx, *constraint); err != nil {
				return nil, all, err
			}
			c.constraint.Start()
		}
	}
	first := all[0]
	first.next = all[1:]
	if req.Echo {
		first.echo = []byte{} // also of a prompt without text
		if req.Prompt != nil {
			first.echo = append(first.echo, *req.Prompt...)
		} else {
			for _, t := range chat.Tokens {
				first.echo = append(first.echo, r.model.Piece(t)...)
			}
		}
	}
	q := newSequence(request, chat.Tokens, first)
	if first.score {
		q.from, q.scored, q.alternatives = 0, true, req.TopLogProbs
	}
	return q, all, nil
}

// choice returns the sequence that scores a request's choices.
func (r *Runner) choice(request *request, req child.GenerateRequest, chat *prompt.ChatPrompt) (*sequence, error) {
	c, err := newChoice(req.Constraint.Choices, r.prompts.Continuation)
	if err != nil {
		return nil, err
	}
	if n := len(chat.Tokens) + c.longest(); n > r.contextTokens {
		return nil, r.tooLong(len(chat.Tokens), c.longest())
	}
	c.request, c.vocabulary, c.ends, c.logProbs, c.top = request, r.model, r.ends, req.LogProbs, req.TopLogProbs
	c.bias = newSampler(child.GenerateRequest{LogitBias: req.LogitBias}, 0, nil)
	for i := range max(req.N, 1) {
		c.samplers = append(c.samplers, newSampler(child.GenerateRequest{
			Temperature: req.Temperature, TopP: req.TopP, TopK: req.TopK, MinP: req.MinP, Seed: req.Seed,
		}, i, nil))
	}
	return newSequence(request, chat.Tokens, c), nil
}

func (r *Runner) tooLong(prompt, completion int) error {
	return &child.Error{Code: child.CodeContextLength, Param: "messages", Message: fmt.Sprintf(
		"This model's maximum context length is %d tokens. However, your messages resulted in %d tokens, and at least %d more %s needed for the completion. Please reduce the length of the messages.",
		r.contextTokens, prompt, completion, map[bool]string{true: "is", false: "are"}[completion == 1])}
}

// check refuses what no request of the server contains; every number that reaches the engine is bounded here.
func (r *Runner) check(req child.GenerateRequest) error {
	refuse := func(param, format string, args ...any) error {
		return &child.Error{Code: child.CodeInvalidRequest, Param: param, Message: param + " " + fmt.Sprintf(format, args...)}
	}
	prompts := 0
	for _, set := range []bool{req.Messages != nil, req.Prompt != nil, req.PromptTokens != nil} {
		if set {
			prompts++
		}
	}
	choice := req.Constraint != nil && req.Constraint.Kind == child.ConstraintChoice
	switch {
	case prompts != 1:
		return refuse("messages", "or prompt must be set, one of the two")
	case req.N < 0 || req.N > maxCompletions:
		return refuse("n", "is %d, expected 1 to %d", req.N, maxCompletions)
	case req.MaxTokens < 0:
		return refuse("max_tokens", "is %d, expected 0 (no limit) or more", req.MaxTokens)
	case req.TopLogProbs < 0 || req.TopLogProbs > maxTopLogProbs:
		return refuse("top_logprobs", "is %d, expected 0 to %d", req.TopLogProbs, maxTopLogProbs)
	case len(req.Stop) > maxStops:
		return refuse("stop", "has %d strings, at most %d are allowed", len(req.Stop), maxStops)
	case req.Adapter != nil && (req.Adapter.ID == "" || req.Adapter.Path == ""):
		return refuse("adapter", "needs an id and a path")
	case choice && (req.Echo || req.PromptOnly):
		return refuse("echo", "and max_tokens 0 do not go together with choices")
	}
	for i, s := range req.Stop {
		if s == "" || len(s) > maxStopBytes {
			return refuse("stop", "[%d] has %d bytes, expected 1 to %d", i, len(s), maxStopBytes)
		}
	}
	return checkSampling(req, r.model.VocabularySize())
}

// promptOf returns the request's prompt, within the context.
func (r *Runner) promptOf(ctx context.Context, req child.GenerateRequest) (*prompt.ChatPrompt, error) {
	var chat *prompt.ChatPrompt
	var err error
	if req.Messages != nil {
		chat, err = r.prompts.ChatPrompt(ctx, req.Messages, prompt.ChatOptions{
			Tools: req.Tools, ToolChoice: req.ToolChoice, ParallelToolCalls: req.ParallelToolCalls,
			EnableThinking: req.EnableThinking, ReasoningEffort: req.ReasoningEffort,
			ContinueFinalMessage: req.ContinueFinalMessage, Answer: req.Constraint != nil,
		})
		if err != nil {
			return nil, refusedPrompt(ctx, "messages", err)
		}
	} else {
		chat = &prompt.ChatPrompt{}
		if chat.Tokens, err = r.textTokens(ctx, "prompt", req.Prompt, req.PromptTokens); err != nil {
			return nil, err
		}
	}
	if len(chat.Tokens) == 0 {
		return nil, &child.Error{Code: child.CodeInvalidRequest, Param: "prompt", Message: "the prompt is empty"}
	}
	room := 1
	if req.PromptOnly {
		room = 0
	}
	if len(chat.Tokens)+room > r.contextTokens {
		return nil, r.tooLong(len(chat.Tokens), room)
	}
	return chat, nil
}

// textTokens returns the tokens of a text, or checks the ids that were given instead.
func (r *Runner) textTokens(ctx context.Context, param string, text *string, ids []engine.Token) ([]engine.Token, error) {
	if text == nil {
		for i, t := range ids {
			if t < 0 || int(t) >= r.model.VocabularySize() {
				return nil, &child.Error{Code: child.CodeInvalidRequest, Param: param, Message: fmt.Sprintf(
					"%s[%d] is token %d; the model's vocabulary has the tokens 0 to %d", param, i, t, r.model.VocabularySize()-1)}
			}
		}
		return slices.Clip(ids), nil
	}
	tokens, err := r.prompts.Encode(*text)
	if err != nil {
		return nil, refusedPrompt(ctx, param, err)
	}
	if len(tokens) == 0 {
		// An empty text: the model needs something to continue.
		if bos, ok := r.model.BOS(); ok {
			tokens = []engine.Token{bos}
		}
	}
	if len(tokens) > math.MaxInt32/2 {
		return nil, &child.Error{Code: child.CodeContextLength, Param: param, Message: fmt.Sprintf("the prompt has %d tokens", len(tokens))}
	}
	return tokens, nil
}

func refusedPrompt(ctx context.Context, param string, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if message := (*prompt.MessageError)(nil); errors.As(err, &message) && message.Param != "" {
		param = message.Param
	}
	return &child.Error{Code: child.CodeInvalidRequest, Param: param, Message: err.Error()}
}
