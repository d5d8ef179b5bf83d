package child

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"sync"
	"time"
)

// ErrStopping refuses a completion because the server is stopping.
var ErrStopping = errors.New("the server is stopping")

// Base names the base model that a runner loads. Two files under one name are two bases: the digest tells them apart.
type Base struct {
	Name   string
	Dir    string // models/<name>
	Digest string // sha256 of base.gguf, hex
}

// RunnersOptions configures the runners of all base models.
type RunnersOptions struct {
	Exe           string   // "": this binary
	Args          []string // nil: runner
	Env           []string
	Stderr        io.Writer
	SocketDir     string        // see RunnerOptions
	ContextTokens int           // 0: see RunnerConfig
	Sequences     int           // 0: see RunnerConfig
	Threads       int           // 0: all cores
	Device        string        // see RunnerConfig
	ReadyTimeout  time.Duration // 0: 5 minutes; loading a large model from a slow disk takes some
	Logger        *slog.Logger  // nil drops the log
}

// Runners keeps one runner for each base model in use: the first request starts it, later ones share it, and one that
// ended is started again by the next request. The zero value is not usable; call NewRunners.
type Runners struct {
	opts   RunnersOptions
	ctx    context.Context // ends when Stop is called
	cancel context.CancelFunc

	mu     sync.Mutex
	byBase map[Base]*loading
	work   sync.WaitGroup // goroutines of loadings
}

// loading is a runner that is being started or runs. runner and err are set before ready is closed.
type loading struct {
	ready  chan struct{}
	runner *Runner
	err    error
}

// NewRunners returns Runners that has started nothing yet.
func NewRunners(opts RunnersOptions) *Runners {
	if opts.ReadyTimeout == 0 {
		opts.ReadyTimeout = 5 * time.Minute
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Runners{opts: opts, byBase: map[Base]*loading{}}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// Generate is Runner.Generate with the runner of base, which is started if need be.
func (r *Runners) Generate(ctx context.Context, base Base, req GenerateRequest) iter.Seq2[GenerateEvent, error] {
	return func(yield func(GenerateEvent, error) bool) {
		runner, err := r.runner(ctx, base)
		if err != nil {
			yield(GenerateEvent{}, err)
			return
		}
		for event, err := range runner.Generate(ctx, req) {
			if err != nil && r.ctx.Err() != nil {
				err = ErrStopping
			}
			if !yield(event, err) {
				return
			}
		}
	}
}

// Embed is Runner.Embed with the runner of base, which is started if need be.
func (r *Runners) Embed(ctx context.Context, base Base, req EmbedRequest) (EmbedResponse, error) {
	runner, err := r.runner(ctx, base)
	if err != nil {
		return EmbedResponse{}, err
	}
	return runner.Embed(ctx, req)
}

// Tokenize is Runner.Tokenize with the runner of base, which is started if need be.
func (r *Runners) Tokenize(ctx context.Context, base Base, req TokenizeRequest) (TokenizeResponse, error) {
	runner, err := r.runner(ctx, base)
	if err != nil {
		return TokenizeResponse{}, err
	}
	return runner.Tokenize(ctx, req)
}

// Loaded returns the process ids of the runners that are ready, by base model name.
func (r *Runners) Loaded() map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	pids := map[string]int{}
	for base, l := range r.byBase {
		select {
		case <-l.ready:
			if l.err == nil {
				pids[base.Name] = l.runner.PID()
			}
		default:
		}
	}
	return pids
}

// runner returns the running runner of base, waiting for its start, which goes on for others when ctx ends.
func (r *Runners) runner(ctx context.Context, base Base) (*Runner, error) {
	r.mu.Lock()
	if r.ctx.Err() != nil {
		r.mu.Unlock()
		return nil, ErrStopping
	}
	l := r.byBase[base]
	if l == nil || l.ended() {
		l = &loading{ready: make(chan struct{})}
		r.byBase[base] = l
		r.work.Go(func() { r.keep(base, l) }) //nolint:contextcheck // others wait for it too, when ctx has ended
	}
	r.mu.Unlock()
	select {
	case <-l.ready:
		return l.runner, l.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (l *loading) ended() bool {
	select {
	case <-l.ready:
	default:
		return false
	}
	if l.err != nil {
		return true
	}
	select {
	case <-l.runner.Done():
		return true
	default:
		return false
	}
}

// keep starts the runner of l, waits for its end, and cleans up.
func (r *Runners) keep(base Base, l *loading) {
	log := r.opts.Logger.With("base_model", base.Name)
	began := time.Now()
	ctx, cancel := context.WithTimeoutCause(r.ctx, r.opts.ReadyTimeout,
		fmt.Errorf("not ready after %s", r.opts.ReadyTimeout))
	defer cancel()
	l.runner, l.err = StartRunner(ctx, RunnerOptions{
		Exe: r.opts.Exe, Args: r.opts.Args, Env: r.opts.Env, Stderr: r.opts.Stderr, SocketDir: r.opts.SocketDir,
		Config: RunnerConfig{ModelDir: base.Dir, ContextTokens: r.opts.ContextTokens, Sequences: r.opts.Sequences, Threads: r.opts.Threads, Device: r.opts.Device},
	})
	if l.err != nil {
		if r.ctx.Err() != nil {
			l.err = ErrStopping
		} else {
			l.err = fmt.Errorf("start the runner of %s: %w", base.Name, l.err)
		}
		r.forget(base, l)
		close(l.ready)
		return
	}
	log.Info("runner ready", "pid", l.runner.PID(), "context_tokens", l.runner.ContextTokens, "took", time.Since(began).Round(time.Millisecond))
	close(l.ready)
	<-l.runner.Done()
	if r.ctx.Err() == nil {
		log.Error("runner ended; the next request starts it again", "error", l.runner.process.Wait())
	}
	r.forget(base, l)
	l.runner.Close()
}

func (r *Runners) forget(base Base, l *loading) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byBase[base] == l {
		delete(r.byBase, base)
	}
}

// Stop refuses new completions and ends all runners: softly until ctx ends, then at once. It returns when they are gone.
func (r *Runners) Stop(ctx context.Context) {
	r.mu.Lock()
	r.cancel()
	var running []*Runner
	for _, l := range r.byBase {
		select {
		case <-l.ready:
			if l.err == nil {
				running = append(running, l.runner)
			}
		default:
			// Being started: its context has just ended, which ends it. One that becomes ready at this very moment
			// is caught below.
			r.work.Go(func() {
				if <-l.ready; l.err == nil {
					_ = l.runner.process.Stop(ctx)
				}
			})
		}
	}
	r.mu.Unlock()
	for _, runner := range running {
		r.work.Go(func() { _ = runner.process.Stop(ctx) })
	}
	r.work.Wait()
}
