// Package runner is one loaded base model that answers requests: it renders prompts, decodes the sequences of several
// requests in one batch, attaches adapters, samples and constrains. `hone runner` is Run; serve starts it as a child.
//
//	r, err := runner.New(runner.Options{ModelDir: "models/smollm2"})
//	defer r.Close()
//	err = r.Generate(ctx, request, func(e child.GenerateEvent) error { ... })
//
// # Scheduling
//
// One goroutine owns the engine's context. In each step it admits waiting sequences, puts the next token of every
// generating sequence and as much of the new prompts as fits into one batch, decodes it, and samples one token for
// each sequence whose last token was in it. All sequences of a batch have the same adapter; while sequences of another
// one wait, the adapters take turns of a bounded number of steps.
//
// # Prefix cache
//
// The cache is a pool of cells that all sequences share. What a sequence leaves there stays until the room is needed,
// and a new prompt begins with the longest prefix that any sequence of the same adapter has computed, its cells being
// shared, not copied. A prompt that shares its beginning with one being computed waits for that.
package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"path/filepath"
	"sync"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/prompt"
)

// Limits and defaults.
const (
	defaultContextTokens = 8192 // at most; a longer one is asked for in the configuration
	defaultSequences     = 8
	maxSequences         = 32    // the engine has 64 sequence numbers; half of them keep prefixes
	poolTokens           = 16384 // cells of the cache when a full context for every sequence would be more
	maxTopLogProbs       = 20
	maxStops             = 16
	maxStopBytes         = 1024
	maxChoices           = 1000
)

// ErrStopping is the cause with which Close ends requests.
var ErrStopping = errors.New("the runner is stopping")

// Options of New. The zero value of each but ModelDir means its default.
type Options struct {
	ModelDir      string       // base.gguf, tokenizer.json?, chat_template.jinja?
	ContextTokens int          // longest prompt + completion; 0 takes the model's own, at most 8192
	Sequences     int          // decoded in one batch; 0 means 8, at most 32
	Threads       int          // 0 means all cores
	Device        string       // cpu ("" too), cuda, or auto: a GPU if there is one and the model fits into it
	Logger        *slog.Logger // nil discards

	poolTokens int // cells of the cache; tests make it small
}

// Runner is one loaded base model. Its methods may be called from several goroutines.
type Runner struct {
	model         *llama.Model
	base          *gguf.File
	prompts       *prompt.Builder
	contextTokens int
	logger        *slog.Logger
	scheduler     *scheduler
	adapters      *adapters
	constraints   *constraints
	ends          []engine.Token // end a turn

	calls   sync.RWMutex // held for reading by Generate, for writing by Close
	closed  bool
	stopped chan struct{} // closed when the scheduler's goroutine has ended
}

// New loads the model. The error is a *child.Error with CodeInvalidModel if the model directory is at fault.
func New(o Options) (_ *Runner, err error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Sequences == 0 {
		o.Sequences = defaultSequences
	}
	if o.Sequences < 0 || o.Sequences > maxSequences || o.ContextTokens < 0 || o.Threads < 0 {
		return nil, &child.Error{Code: child.CodeInvalidRequest, Message: fmt.Sprintf(
			"runner: sequences %d (0 to %d), context_tokens %d and threads %d (0 or more) are out of range", o.Sequences, maxSequences, o.ContextTokens, o.Threads)}
	}
	invalid := func(err error) error {
		return &child.Error{Code: child.CodeInvalidModel, Message: err.Error()}
	}
	path := filepath.Join(o.ModelDir, "base.gguf")
	r := &Runner{logger: o.Logger, stopped: make(chan struct{})}
	defer func() {
		if err != nil {
			r.free()
		}
	}()
	if r.base, err = gguf.Open(path); err != nil {
		return nil, invalid(fmt.Errorf("model %s: %w", path, err))
	}
	if err := gguf.CheckModel(r.base); err != nil {
		return nil, invalid(fmt.Errorf("model %s: %w", path, err))
	}
	llama.Open(llama.Options{Logger: o.Logger})
	gpu, err := placement(o.Device, r.base.Size, o.Logger)
	if err != nil {
		return nil, err
	}
	model := llama.ModelOptions{}
	if gpu {
		model.GPULayers = llama.AllLayers
	}
	if r.model, err = llama.LoadModel(path, model); err != nil {
		return nil, invalid(err)
	}
	if r.prompts, err = prompt.Open(o.ModelDir, r.model.ChatTemplate(), r.model); err != nil {
		return nil, invalid(fmt.Errorf("model %s: %w", o.ModelDir, err))
	}
	r.contextTokens = o.ContextTokens
	if r.contextTokens == 0 {
		r.contextTokens = defaultContextTokens
		if trained := r.model.TrainingContext(); trained > 0 {
			r.contextTokens = min(trained, r.contextTokens)
		}
	}
	if trained := r.model.TrainingContext(); trained > 0 && r.contextTokens > trained {
		o.Logger.Warn("context_tokens is more than the model was trained with: long sequences may come out as nonsense",
			slog.Int("context_tokens", r.contextTokens), slog.Int("trained_context_tokens", trained))
	}
	r.constraints = newConstraints(r.model)
	r.ends = endTokens(r.model)
	if o.poolTokens == 0 {
		o.poolTokens = min(o.Sequences*r.contextTokens, max(r.contextTokens, poolTokens))
	}
	if r.scheduler, err = newScheduler(r.model, schedulerOptions{poolTokens: o.poolTokens, sequences: o.Sequences, threads: o.Threads, gpu: gpu}); err != nil {
		return nil, fmt.Errorf("model %s: %w", path, err)
	}
	r.adapters = newAdapters(r.model, r.base, r.scheduler)
	go func() {
		defer close(r.stopped)
		r.scheduler.run()
	}()
	return r, nil
}

// placement decides whether a model of so many bytes is computed on a GPU. Its error is a *child.Error: the GPU that was
// asked for is not there.
func placement(device string, bytes int64, logger *slog.Logger) (gpu bool, err error) {
	if device == "" || device == "cpu" {
		return false, nil
	}
	devices, err := ggml.Devices("")
	switch {
	case err != nil && device == "cuda":
		return false, &child.Error{Code: child.CodeInvalidRequest, Param: "device", Message: fmt.Sprintf("device cuda: %v", err)}
	case err != nil:
		logger.Debug("no GPU", slog.Any("reason", err))
		return false, nil
	}
	// The cache and the buffers of computation take about a quarter of a model's size again.
	need := bytes + bytes/4
	for _, d := range devices {
		if device == "cuda" || int64(d.FreeBytes) > need {
			logger.Info("answers are computed on the GPU", slog.String("device", d.Description), slog.Int("free_bytes", d.FreeBytes))
			return true, nil
		}
	}
	logger.Info("the model does not fit into the GPU", slog.Int64("needed_bytes", need))
	return false, nil
}

// ContextTokens is the longest prompt + completion of one sequence.
func (r *Runner) ContextTokens() int { return r.contextTokens }

// Generate answers one request. emit gets its events in order, the last one with a FinishReason; text that a slow emit
// has not taken is joined. The error is a *child.Error if the request is refused or fails, the context's cause if it was
// cancelled, else emit's. In every case the sequence has left the batch, or does within one decode.
func (r *Runner) Generate(ctx context.Context, req child.GenerateRequest, emit func(child.GenerateEvent) error) error {
	r.calls.RLock()
	defer r.calls.RUnlock()
	if r.closed {
		return &child.Error{Code: child.CodeInternal, Message: ErrStopping.Error()}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(context.Canceled)
	defer context.AfterFunc(r.scheduler.stopping, func() { cancel(ErrStopping) })() //nolint:contextcheck // it is the runner's end, which ends the request too

	if err := check(req); err != nil {
		return err
	}
	tokens, err := r.promptTokens(ctx, req)
	if err != nil {
		return err
	}
	if len(tokens)+1 > r.contextTokens {
		return &child.Error{Code: child.CodeContextLength, Param: "messages", Message: fmt.Sprintf(
			"This model's maximum context length is %d tokens. However, your messages resulted in %d tokens, and at least one is needed for the completion. Please reduce the length of the messages.",
			r.contextTokens, len(tokens))}
	}
	s := &sequence{
		ctx:        ctx,
		tokens:     tokens,
		prompt:     len(tokens),
		limit:      r.contextTokens,
		sampler:    newSampler(req, 0, r.ends),
		text:       newText(req.Stop),
		logProbs:   req.LogProbs,
		top:        req.TopLogProbs,
		vocabulary: r.model,
		out:        newOutbox(),
	}
	if req.MaxTokens > 0 {
		s.limit = min(s.limit, s.prompt+min(req.MaxTokens, r.contextTokens))
	}
	if err := checkSampling(req, r.model.VocabularySize()); err != nil {
		return err
	}
	s.sampler.prompt(tokens)
	if req.Constraint != nil {
		if s.constraint, err = r.constraints.New(ctx, *req.Constraint); err != nil {
			return err
		}
		// Closed when the scheduler has let go of the sequence, which is what done says.
		defer s.constraint.Close()
	}
	if choices := choicesOf(req); len(choices) > 0 {
		for _, choice := range choices {
			spelling, err := r.prompts.Continuation(choice)
			if err != nil {
				return &child.Error{Code: child.CodeInvalidRequest, Param: "choices", Message: err.Error()}
			}
			s.spellings = append(s.spellings, spelling)
		}
	}
	if req.Adapter != nil {
		if s.adapter, err = r.adapters.acquire(*req.Adapter); err != nil {
			return err
		}
		defer r.adapters.release(s.adapter)
	}
	done, err := r.scheduler.submit(s)
	if err != nil {
		return &child.Error{Code: child.CodeInternal, Message: err.Error()}
	}
	defer func() {
		cancel(context.Canceled)
		<-done
	}()
	for {
		event, err := s.out.take(ctx)
		if err != nil {
			if errors.Is(err, ErrStopping) {
				return &child.Error{Code: child.CodeInternal, Message: err.Error()}
			}
			return err
		}
		if event.Error != nil {
			return event.Error
		}
		if err := emit(event); err != nil {
			return fmt.Errorf("send a completion's event: %w", err)
		}
		if event.FinishReason != "" {
			return nil
		}
	}
}

// UnloadAdapter frees an adapter when the sequences that use it have ended; a later request loads it again. It reports
// whether the adapter was loaded.
func (r *Runner) UnloadAdapter(id string) bool { return r.adapters.unload(id) }

// Status is what the runner holds now, counted by sequences, tokens and adapter ids.
type Status struct {
	ContextTokens int      `json:"context_tokens"`
	PoolTokens    int      `json:"pool_tokens"`   // cells of the cache
	Running       int      `json:"running"`       // sequences in the batch
	Waiting       int      `json:"waiting"`       // sequences that wait for a place or for their adapter's turn
	CachedTokens  int      `json:"cached_tokens"` // kept of sequences that have ended, shared prefixes counted once for each
	Adapters      []string `json:"adapters"`      // loaded
	PromptTokens  int64    `json:"prompt_tokens"` // of all requests since the start
	ReusedTokens  int64    `json:"reused_tokens"` // of these, found in the prefix cache
	Completions   int64    `json:"completions"`   // requests that ended, in whatever way
	Generated     int64    `json:"generated"`     // tokens sampled
	Decodes       int64    `json:"decodes"`       // batches
	Displaced     int64    `json:"displaced"`     // times that a running sequence had to wait because the cache was full
}

// Status returns a snapshot taken between two batches.
func (r *Runner) Status(ctx context.Context) (Status, error) {
	var status Status
	if err := r.scheduler.do(ctx, func() { status = r.scheduler.status() }); err != nil {
		return Status{}, err
	}
	status.ContextTokens = r.contextTokens
	status.Adapters = r.adapters.ids()
	return status, nil
}

// Close ends every request with ErrStopping, aborts the running batch and frees the model. It may be called twice.
func (r *Runner) Close() {
	r.scheduler.stop()
	<-r.stopped
	r.calls.Lock()
	defer r.calls.Unlock()
	if !r.closed {
		r.closed = true
		r.adapters.free()
		r.free()
	}
}

func (r *Runner) free() {
	if r.scheduler != nil {
		r.scheduler.free()
	}
	r.constraints.free()
	_ = r.prompts.Close() // frees memory; there is nothing to do about an error
	r.model.Close()
	if r.base != nil {
		_ = r.base.Close() // opened for reading
	}
}

// check refuses what no request of the server contains; every number that reaches the engine is bounded here.
func check(req child.GenerateRequest) error {
	refuse := func(param, format string, args ...any) error {
		return &child.Error{Code: child.CodeInvalidRequest, Param: param, Message: param + " " + fmt.Sprintf(format, args...)}
	}
	switch {
	case (req.Messages != nil) == (req.Prompt != nil):
		return refuse("messages", "or prompt must be set, one of the two")
	case req.MaxTokens < 0:
		return refuse("max_tokens", "is %d, expected 0 (no limit) or more", req.MaxTokens)
	case req.TopLogProbs < 0 || req.TopLogProbs > maxTopLogProbs:
		return refuse("top_logprobs", "is %d, expected 0 to %d", req.TopLogProbs, maxTopLogProbs)
	case len(req.Stop) > maxStops:
		return refuse("stop", "has %d strings, at most %d are allowed", len(req.Stop), maxStops)
	case len(choicesOf(req)) > maxChoices:
		return refuse("choices", "has %d entries, at most %d are allowed", len(choicesOf(req)), maxChoices)
	case req.Adapter != nil && (req.Adapter.ID == "" || req.Adapter.Path == ""):
		return refuse("adapter", "needs an id and a path")
	}
	for i, s := range req.Stop {
		if s == "" || len(s) > maxStopBytes {
			return refuse("stop", "[%d] has %d bytes, expected 1 to %d", i, len(s), maxStopBytes)
		}
	}
	return nil
}

func choicesOf(req child.GenerateRequest) []string {
	if req.Constraint == nil {
		return nil
	}
	return req.Constraint.Choices
}

func (r *Runner) promptTokens(ctx context.Context, req child.GenerateRequest) (tokens []engine.Token, err error) {
	param := "messages"
	switch {
	case req.Prompt != nil:
		param = "prompt"
		tokens, err = r.prompts.Encode(*req.Prompt)
		if err == nil && len(tokens) == 0 {
			// An empty text: the model needs something to continue.
			if bos, ok := r.model.BOS(); ok {
				tokens = []engine.Token{bos}
			}
		}
	case len(choicesOf(req)) > 0:
		tokens, err = r.prompts.AnswerPrompt(ctx, req.Messages)
	default:
		tokens, err = r.prompts.Prompt(ctx, req.Messages)
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, &child.Error{Code: child.CodeInvalidRequest, Param: param, Message: err.Error()}
	}
	if len(tokens) == 0 {
		return nil, &child.Error{Code: child.CodeInvalidRequest, Param: param, Message: "the prompt is empty"}
	}
	if len(tokens) > math.MaxInt32/2 {
		return nil, &child.Error{Code: child.CodeContextLength, Param: param, Message: fmt.Sprintf("the prompt has %d tokens", len(tokens))}
	}
	return tokens, nil
}
