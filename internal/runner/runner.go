// Package runner is one loaded base model that answers requests: it renders prompts, decodes the sequences of several
// requests in one batch, attaches adapters, samples and constrains. `hone runner` is Run; serve starts it as a child.
//
//	r, err := runner.New(runner.Options{ModelDir: "models/smollm2"})
//	defer r.Close()
//	err = r.Generate(ctx, request, func(e child.GenerateEvent) error { ... })
//
// # Scheduling
//
// One goroutine owns the decoder (engine.Decoder: hone's own graph, or llama.cpp). In each step it gives places to waiting
// sequences, puts the next token of every stream and as much of the prompts as may be computed beside them into one batch,
// decodes it, and hands the outputs to the sequences' readers, in goroutines beside each other: a completion samples, a
// choice scores, an embedding sums up. Masks of constraints are computed meanwhile.
//
//   - Prompts are computed in chunks. While streams run, a chunk is so small that the time between their tokens stays
//     under three times what it is alone (pace).
//   - Places go to the client that was served least, counted in tokens; a client's first sequence does not wait for
//     another's second (queue.go). More requests than the queue may hold are refused at once.
//   - Where the decoder mixes adapters, a batch has parts of all of them. Elsewhere the adapters take turns of a bounded
//     number of steps. Adapters are loaded beside, within a budget of memory (adapters).
//
// # Prefix cache
//
// The cache is a pool of cells that all sequences share, under a radix tree over token ids for each adapter. What a
// sequence leaves there stays until the room is needed, and a new one begins with the longest prefix that any sequence
// has computed, running ones included; its cells are shared, not copied. A prompt that shares its beginning with one
// being computed waits for that. Where cells run out, what was not used for longest goes first, then the sequence that was
// admitted last waits.
package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/prompt"
)

// Limits and defaults.
const (
	defaultContextTokens = 8192 // at most; a longer one is asked for in the configuration
	defaultSequences     = 8
	maxSequences         = 64
	defaultQueue         = 256
	defaultAdapterBytes  = 256 << 20
	poolTokens           = 16384 // cells of the cache when a full context for every sequence would be more
	maxTopLogProbs       = 20
	maxStops             = 16
	maxStopBytes         = 1024
	maxChoices           = 1000
	maxCompletions       = 8
	maxInputs            = 2048
	maxInputTokens       = 300_000 // as OpenAI
)

// ErrStopping is the cause with which Close ends requests.
var ErrStopping = errors.New("the runner is stopping")

// Options of New. The zero value of each but ModelDir means its default.
type Options struct {
	ModelDir      string       // base.gguf, tokenizer.json?, chat_template.jinja?
	ContextTokens int          // longest prompt + completion; 0 takes the model's own, at most 8192
	Sequences     int          // decoded in one batch; 0 means 8, at most 64
	Threads       int          // 0 means all cores
	Device        string       // cpu ("" too), cuda, or auto: a GPU if there is one and the model fits into it
	CacheTokens   int          // cells of the key-value cache; 0: for a full context of every sequence, at most 16384 and one context
	CacheType     string       // f16 ("" too), q8_0
	GPUWeights    string       // stored ("" too), bf16
	Engine        string       // auto ("" too): hone's own where it can; own, llama
	Queue         int          // requests that may wait; 0 means 256
	AdapterBytes  int64        // of idle adapters kept in memory; 0 means 256 MiB
	Logger        *slog.Logger // nil discards
}

// Runner is one loaded base model. Its methods may be called from several goroutines.
type Runner struct {
	model         *llama.Model
	base          *gguf.File
	prompts       *prompt.Builder
	contextTokens int
	logger        *slog.Logger
	scheduler     *scheduler
	engine        string // own, llama
	memory        int64  // bytes, see MemoryBytes
	constraints   *constraints
	ends          []engine.Token // end a turn
	places        atomic.Int64   // left: how many more requests may come

	calls   sync.RWMutex // held for reading by requests, for writing by Close
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
	if o.Queue == 0 {
		o.Queue = defaultQueue
	}
	if o.AdapterBytes == 0 {
		o.AdapterBytes = defaultAdapterBytes
	}
	if o.Sequences < 0 || o.Sequences > maxSequences || o.ContextTokens < 0 || o.Threads < 0 || o.CacheTokens < 0 || o.Queue < 0 || o.AdapterBytes < 0 {
		return nil, &child.Error{Code: child.CodeInvalidRequest, Message: fmt.Sprintf(
			"runner: sequences %d (0 to %d), context_tokens %d, cache_tokens %d, threads %d, queue %d and adapter_bytes %d (0 or more) are out of range",
			o.Sequences, maxSequences, o.ContextTokens, o.CacheTokens, o.Threads, o.Queue, o.AdapterBytes)}
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
	if err := r.load(path, o); err != nil {
		return nil, err
	}
	if r.prompts, err = prompt.Open(o.ModelDir, r.model.ChatTemplate(), r.model); err != nil {
		return nil, invalid(fmt.Errorf("model %s: %w", o.ModelDir, err))
	}
	r.constraints = newConstraints(r.model)
	r.ends = endTokens(r.model)
	r.places.Store(int64(o.Sequences + o.Queue))
	go func() {
		defer close(r.stopped)
		r.scheduler.run()
	}()
	return r, nil
}

// MemoryBytes is what the runner holds and may still fill: weights laid out anew, cache, buffers; not the mapped file. 0: not known.
func (r *Runner) MemoryBytes() int64 { return r.memory }

// ContextTokens is the longest prompt + completion of one sequence.
func (r *Runner) ContextTokens() int { return r.contextTokens }

// UnloadAdapter frees an adapter when the sequences that use it have ended; a later request loads it again. It reports
// whether the adapter was loaded.
func (r *Runner) UnloadAdapter(id string) bool { return r.scheduler.loaded.unload(id) }

// Status is what the runner holds now, counted by sequences, tokens and adapter ids.
type Status struct {
	Engine          string   `json:"engine"` // own, llama
	ContextTokens   int      `json:"context_tokens"`
	PoolTokens      int      `json:"pool_tokens"`      // cells of the cache
	FreeTokens      int      `json:"free_tokens"`      // of these, cells that nothing holds
	Running         int      `json:"running"`          // sequences that have a place
	Waiting         int      `json:"waiting"`          // sequences that wait for a place, their adapter, or its turn
	Places          int      `json:"places"`           // how many more requests would be taken now
	CachedTokens    int      `json:"cached_tokens"`    // kept of sequences that have ended, shared prefixes counted once for each
	CachedSequences int      `json:"cached_sequences"` // that these are
	Adapters        []string `json:"adapters"`         // in memory
	AdapterBytes    int64    `json:"adapter_bytes"`    // that they take
	StepSeconds     float64  `json:"step_seconds"`     // of the next token of one stream alone, as measured; 0: not yet
	PromptTokens    int64    `json:"prompt_tokens"`    // of all sequences since the start
	ReusedTokens    int64    `json:"reused_tokens"`    // of these, found in the prefix cache
	Completions     int64    `json:"completions"`      // sequences that ended, in whatever way
	Generated       int64    `json:"generated"`        // tokens sampled
	Decodes         int64    `json:"decodes"`          // batches
	ComputeSeconds  float64  `json:"compute_seconds"`  // that these took in the decoder
	Displaced       int64    `json:"displaced"`        // times that a running sequence had to wait because the cache was full
}

// Status returns a snapshot taken between two batches.
func (r *Runner) Status(ctx context.Context) (Status, error) {
	var status Status
	if err := r.scheduler.do(ctx, func() { status = r.scheduler.status() }); err != nil {
		return Status{}, err
	}
	status.Engine, status.ContextTokens, status.Places = r.engine, r.contextTokens, int(r.places.Load())
	status.Adapters, status.AdapterBytes = r.scheduler.loaded.inMemory()
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
		r.free()
	}
}

func (r *Runner) free() {
	r.constraints.free()
	if r.scheduler != nil {
		r.scheduler.free()
	}
	_ = r.prompts.Close() // frees memory; there is nothing to do about an error
	r.model.Close()
	if r.base != nil {
		_ = r.base.Close() // opened for reading
	}
}
