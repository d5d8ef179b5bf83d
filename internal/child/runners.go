package child

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/hone-llm/hone/internal/memory"
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
	Exe       string   // "": this binary
	Args      []string // nil: runner
	Env       []string
	Stderr    io.Writer
	SocketDir string       // see RunnerOptions
	Logger    *slog.Logger // nil drops the log

	Config        RunnerConfig   // of every runner, but for Socket, ModelDir and MemoryBytes
	ContextTokens map[string]int // by name of the base model, in place of Config's

	ReadyTimeout time.Duration // 0: 5 minutes; loading a large model from a slow disk takes some
	Wait         time.Duration // that a request waits for its model, whose load goes on; 0: 1 minute
	IdleTimeout  time.Duration // after which a runner that serves nothing ends; 0: never
	HangTimeout  time.Duration // after which a runner that serves and gives no sign of life is killed; 0: 2 minutes

	Memory *Memory // that runners are granted a part of; nil: no bound
	// Estimate is what a runner will take, in bytes, for bases that none has reported of yet. nil: nothing.
	Estimate func(base Base, config RunnerConfig) (int64, error)
}

// Runners keeps one runner for each base model in use: the first request starts it, later ones share it, and one that
// ended is started again by the next request. It ends those that have been idle for long, or whose memory another model
// needs, and never one that serves. The zero value is not usable; call NewRunners.
type Runners struct {
	opts   RunnersOptions
	ctx    context.Context // ends when Stop is called
	cancel context.CancelFunc
	blame  blame

	mu       sync.Mutex
	stopping context.Context // Stop's own, of its patience
	models   map[Base]*model
	lives    map[*life]struct{} // that have not ended, beside the newest of each model those that are ending
	idle     chan struct{}      // closed, and replaced, when a runner has become idle or a wait was given up
	work     sync.WaitGroup     // goroutines of lives
}

// model is what is kept of a base between the lives of its runners. Fields but suspects are of Runners.mu.
type model struct {
	life     *life // the newest; nil before the first
	memory   int64 // that the last runner reported; 0: none did
	failures int   // starts in a row that failed without the runner saying why
	failed   error // the last of them
	retry    time.Time
	suspects chan struct{} // holds a token while a request runs that is refused if the runner ends with it again
}

// State is where a runner is in its life.
type State string

// The states of a runner, in their order; Failed is of a model whose runner does not start.
const (
	Waiting   State = "waiting" // for memory
	Loading   State = "loading"
	Ready     State = "ready"
	Unloading State = "unloading"
	Unloaded  State = "unloaded"
	Failed    State = "failed"
)

// life is one runner from the first request for it to its end.
type life struct {
	base   Base
	unload chan struct{} // closed to end it
	ready  chan struct{} // closed when runner or err is set
	runner *Runner
	err    error // why there is no runner

	// Of Runners.mu.
	state   State
	since   time.Time // of Ready without users: when the last one left; else when the state began
	users   int       // requests that the runner serves
	waiting int       // requests that wait for it
	pid     int
	grant   *Grant
	short   *ShortError // of Waiting, once it is known
}

// ModelState is how it stands with the runner of a base model.
type ModelState struct {
	Model       string  `json:"model"`
	State       State   `json:"state"`
	Seconds     float64 `json:"seconds"`                // since the state began; of failed, until it is tried again
	IdleSeconds float64 `json:"idle_seconds,omitempty"` // of a ready one that serves nothing
	Requests    int     `json:"requests"`               // that it serves, or that wait for it
	MemoryBytes int64   `json:"memory_bytes,omitempty"` // granted
	// Of loading: what the process has in memory so far, about, and the size of the weights' file.
	LoadedBytes int64  `json:"loaded_bytes,omitempty"`
	TotalBytes  int64  `json:"total_bytes,omitempty"`
	PID         int    `json:"pid,omitempty"`
	Error       string `json:"error,omitempty"` // what it waits for, or why it does not start
}

// NewRunners returns Runners that has started nothing yet.
func NewRunners(opts RunnersOptions) *Runners {
	opts.ReadyTimeout = cmp.Or(opts.ReadyTimeout, 5*time.Minute)
	opts.Wait = cmp.Or(opts.Wait, time.Minute)
	opts.HangTimeout = cmp.Or(opts.HangTimeout, 2*time.Minute)
	if opts.Memory == nil {
		opts.Memory = NewMemory(math.MaxInt64)
	}
	if opts.Estimate == nil {
		opts.Estimate = func(Base, RunnerConfig) (int64, error) { return 0, nil }
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Runners{opts: opts, models: map[Base]*model{}, lives: map[*life]struct{}{}, idle: make(chan struct{})}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// Generate is Runner.Generate with the runner of base, which is started if need be. It yields an *UnavailableError if the
// model cannot answer now, and an *Error with CodeEndsEngine for a request with which the runner has ended again and again.
func (r *Runners) Generate(ctx context.Context, base Base, req GenerateRequest) iter.Seq2[GenerateEvent, error] {
	content := req
	content.ID, content.Client, content.Background = "", "", false
	return func(yield func(GenerateEvent, error) bool) {
		for try := 0; ; try++ {
			use, err := r.begin(ctx, base, content)
			if err != nil {
				yield(GenerateEvent{}, err)
				return
			}
			again := use.generate(ctx, req, try == 0, yield)
			use.leave()
			if !again {
				return
			}
		}
	}
}

// generate yields the events. It reports whether to try again, if that is allowed: the runner was gone before the request
// reached it.
func (u *use) generate(ctx context.Context, req GenerateRequest, mayTry bool, yield func(GenerateEvent, error) bool) (again bool) {
	for event, err := range u.life.runner.Generate(ctx, req) {
		if mayTry && errors.Is(err, errNotSent) {
			return true
		}
		if err != nil || event.Usage != nil {
			err = u.outcome(err)
		}
		if !yield(event, err) {
			return false
		}
	}
	return false
}

// Embed is Runner.Embed with the runner of base. Errors are those of Generate.
func (r *Runners) Embed(ctx context.Context, base Base, req EmbedRequest) (EmbedResponse, error) {
	content := req
	content.ID, content.Client, content.Background = "", "", false
	return call(ctx, r, base, content, func(runner *Runner) (EmbedResponse, error) { return runner.Embed(ctx, req) })
}

// Tokenize is Runner.Tokenize with the runner of base. Errors are those of Generate.
func (r *Runners) Tokenize(ctx context.Context, base Base, req TokenizeRequest) (TokenizeResponse, error) {
	return call(ctx, r, base, req, func(runner *Runner) (TokenizeResponse, error) { return runner.Tokenize(ctx, req) })
}

func call[T any](ctx context.Context, r *Runners, base Base, content any, ask func(*Runner) (T, error)) (answer T, err error) {
	for try := 0; ; try++ {
		use, err := r.begin(ctx, base, content)
		if err != nil {
			return answer, err
		}
		answer, err = ask(use.life.runner)
		if try > 0 || !errors.Is(err, errNotSent) {
			err = use.outcome(err)
			use.leave()
			return answer, err
		}
		use.leave()
	}
}

// use is a request that a runner serves.
type use struct {
	runners *Runners
	life    *life
	key     func() fingerprint
	release func() // of the place of suspects
}

// begin waits for the runner of base. A request that will be refused if the runner ends with it once more waits for others
// like it too, so that those that only ran beside the deadly one are answered. The caller calls leave.
func (r *Runners) begin(ctx context.Context, base Base, content any) (*use, error) {
	u := &use{runners: r, key: sync.OnceValue(func() fingerprint { return fingerprintOf(base, content) }), release: func() {}}
	if !r.blame.empty() {
		suspected, err := r.blame.look(u.key())
		if err != nil {
			return nil, err
		}
		if suspected {
			suspects := r.model(base).suspects
			select {
			case suspects <- struct{}{}:
				u.release = func() { <-suspects }
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			case <-r.ctx.Done():
				return nil, ErrStopping
			}
			if _, err := r.blame.look(u.key()); err != nil {
				u.release()
				return nil, err
			}
		}
	}
	var err error
	if u.life, err = r.wait(ctx, base); err != nil {
		u.release()
		return nil, err
	}
	return u, nil
}

// outcome notes how the request ended, and returns the error for its client.
func (u *use) outcome(err error) error {
	r := u.runners
	switch {
	case err != nil && r.ctx.Err() != nil:
		return ErrStopping
	case errors.Is(err, errNotSent): // it had no part in the runner's end
	case u.life.runner.ended() && (errors.As(err, new(*ExitError)) || errors.Is(err, ErrEnded)):
		r.blame.add(u.key(), err)
	case err == nil || errors.As(err, new(*Error)): // it was answered
		if !r.blame.empty() {
			r.blame.clear(u.key())
		}
	}
	return err
}

func (u *use) leave() {
	u.release()
	r := u.runners
	r.mu.Lock()
	defer r.mu.Unlock()
	if u.life.users--; u.life.users == 0 {
		u.life.since = time.Now()
		r.becameIdle()
	}
}

// becameIdle wakes those who wait for memory. The caller holds r.mu.
func (r *Runners) becameIdle() {
	close(r.idle)
	r.idle = make(chan struct{})
}

func (r *Runners) model(base Base) *model {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.modelLocked(base)
}

func (r *Runners) modelLocked(base Base) *model {
	m := r.models[base]
	if m == nil {
		m = &model{suspects: make(chan struct{}, 1)}
		r.models[base] = m
	}
	return m
}

// wait returns the life of base's runner, which is ready and counts this request among its users. The start goes on for
// others, and for later requests, when the wait is over.
func (r *Runners) wait(ctx context.Context, base Base) (*life, error) {
	r.mu.Lock()
	l, err := r.join(base)
	r.mu.Unlock()
	if err != nil {
		return nil, err
	}
	patience := time.NewTimer(r.opts.Wait)
	defer patience.Stop()
	late := false
	select {
	case <-l.ready:
	case <-patience.C:
		late = true
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	l.waiting--
	switch {
	case err != nil:
	case late && l.state == Waiting && l.short != nil:
		err = &UnavailableError{Reason: ErrNoMemory, RetryAfter: retryLater, Message: l.short.Error() + ", and nothing idle is left to unload"}
	case late && (l.state == Waiting || l.state == Loading):
		err = &UnavailableError{Reason: ErrLoading, RetryAfter: retrySoon, Message: fmt.Sprintf(
			"%s is loading since %s; the load goes on, and GET /health shows it", base.Name, time.Since(l.since).Round(time.Second))}
	case l.err != nil:
		err = l.err
	case l.state != Ready: // it ended in this moment
		if err = l.runner.process.Wait(); err == nil || r.ctx.Err() != nil {
			err = ErrStopping
		}
	default:
		if l.users++; l.users == 1 {
			l.runner.heard() // its silence while it was idle means nothing
		}
		return l, nil
	}
	if l.waiting == 0 {
		r.becameIdle()
	}
	return nil, err
}

// Times after which a client is told to come back.
const (
	retrySoon  = 5 * time.Second
	retryLater = 15 * time.Second
)

// join returns the runner's life, begun if need be, and counts one more that waits for it. The caller holds r.mu.
func (r *Runners) join(base Base) (*life, error) {
	if r.ctx.Err() != nil {
		return nil, ErrStopping
	}
	m := r.modelLocked(base)
	l := m.life
	if l == nil || l.state == Unloading || l.state == Unloaded || l.state == Ready && l.runner.ended() {
		if wait := time.Until(m.retry); wait > 0 {
			return nil, backOff(base, m, wait)
		}
		l = &life{base: base, state: Waiting, since: time.Now(), ready: make(chan struct{}), unload: make(chan struct{})}
		m.life = l
		r.lives[l] = struct{}{}
		r.work.Go(func() { r.run(m, l) }) //nolint:contextcheck // others wait for it too, when a request's context has ended
	}
	l.waiting++
	return l, nil
}

// Starts that may fail before the next waits, and how long it waits at least and at most.
const (
	freeStarts = 3
	minBackOff = 10 * time.Second
	maxBackOff = 5 * time.Minute
)

func backOff(base Base, m *model, wait time.Duration) error {
	return &UnavailableError{Reason: ErrBackOff, RetryAfter: wait, Message: fmt.Sprintf(
		"the runner of %s has failed %d times in a row at its start (%v); it is started again in %s at the earliest. The server's log has what it said, under base_model=%s",
		base.Name, m.failures, m.failed, wait.Round(time.Second), base.Name)}
}

// run is a runner's life.
func (r *Runners) run(m *model, l *life) {
	log := r.opts.Logger.With("base_model", l.base.Name)
	began := time.Now()
	config := r.opts.Config
	config.ModelDir = l.base.Dir
	if tokens, ok := r.opts.ContextTokens[l.base.Name]; ok {
		config.ContextTokens = tokens
	}
	grant, err := r.reserve(m, l, config)
	var runner *Runner
	if err == nil {
		if r.opts.Memory.bounded() {
			config.MemoryBytes = grant.Bytes()
		}
		if runner, err = r.start(l, config); err != nil {
			grant.Release()
		}
	}
	if err != nil {
		r.notStarted(m, l, err, log)
		return
	}
	reported := runner.MemoryBytes
	if reported > 0 {
		grant.Resize(reported)
	}
	r.mu.Lock()
	m.failures, m.failed, m.memory = 0, nil, reported
	l.runner = runner
	r.enter(l, Ready)
	r.mu.Unlock()
	close(l.ready)
	log.Info("runner ready", "pid", runner.PID(), "context_tokens", runner.ContextTokens, "memory_bytes", grant.Bytes(), "took", time.Since(began).Round(time.Millisecond))

	wanted := r.watch(l)
	if wanted {
		ctx, cancel := r.patience()
		_ = runner.process.Stop(ctx) // how a runner that is not wanted any more ends is of no interest
		cancel()
		log.Info("runner unloaded")
	} else {
		log.Error("runner ended; the next request starts it again", "error", runner.process.Wait())
	}
	runner.Close()
	grant.Release()
	r.mu.Lock()
	r.leave(l)
	r.mu.Unlock()
}

// leave ends a life. The caller holds r.mu.
func (r *Runners) leave(l *life) {
	r.enter(l, Unloaded)
	delete(r.lives, l)
}

// softStop is what an idle runner may take to end.
const softStop = 5 * time.Second

// patience is how long a runner may take to end: as long as Stop says, if it was called.
func (r *Runners) patience() (context.Context, context.CancelFunc) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopping != nil {
		return context.WithCancel(r.stopping)
	}
	return context.WithTimeout(context.Background(), softStop)
}

// enter changes the state. The caller holds r.mu.
func (r *Runners) enter(l *life, state State) {
	l.state, l.since = state, time.Now()
}

// start starts the process and waits until it is ready.
func (r *Runners) start(l *life, config RunnerConfig) (*Runner, error) {
	ctx, cancel := context.WithTimeoutCause(r.ctx, r.opts.ReadyTimeout, fmt.Errorf("not ready after %s", r.opts.ReadyTimeout))
	defer cancel()
	r.mu.Lock()
	r.enter(l, Loading)
	r.mu.Unlock()
	return StartRunner(ctx, RunnerOptions{
		Exe: r.opts.Exe, Args: r.opts.Args, Env: r.opts.Env, Stderr: r.opts.Stderr, SocketDir: r.opts.SocketDir, Config: config,
		Started: func(pid int) {
			l.grant.Use(pid)
			r.mu.Lock()
			defer r.mu.Unlock()
			l.pid = pid
		},
	})
}

// notStarted ends a life that never began.
func (r *Runners) notStarted(m *model, l *life, err error, log *slog.Logger) {
	r.mu.Lock()
	switch {
	case r.ctx.Err() != nil:
		err = ErrStopping
	case errors.As(err, new(*UnavailableError)):
	case errors.As(err, new(*Error)): // it has said why
		err = fmt.Errorf("start the runner of %s: %w", l.base.Name, err)
		log.Error("runner not started", "error", err)
	default:
		m.failed = err
		err = fmt.Errorf("start the runner of %s: %w", l.base.Name, err)
		if m.failures++; m.failures >= freeStarts {
			wait := min(minBackOff<<min(m.failures-freeStarts, 10), maxBackOff)
			m.retry = time.Now().Add(wait)
			err = backOff(l.base, m, wait)
		}
		log.Error("runner not started", "error", err, "failures", m.failures)
	}
	l.err = err
	r.leave(l)
	r.mu.Unlock()
	close(l.ready)
}

// reserve waits until the model fits into the memory, ending idle runners for it, the one that was used longest ago
// first. It gives up when no request waits for the model any more.
func (r *Runners) reserve(m *model, l *life, config RunnerConfig) (*Grant, error) {
	r.mu.Lock()
	need := m.memory
	r.mu.Unlock()
	if need == 0 {
		var err error
		if need, err = r.opts.Estimate(l.base, config); err != nil {
			return nil, fmt.Errorf("estimate its memory: %w", err)
		}
	}
	for {
		changed := r.opts.Memory.Changed()
		grant, err := r.opts.Memory.Reserve(l.base.Name, need)
		var short *ShortError
		switch {
		case err == nil:
			r.mu.Lock()
			l.grant = grant
			r.mu.Unlock()
			return grant, nil
		case !errors.As(err, &short):
			return nil, err
		case need > short.Budget:
			return nil, &Error{Code: CodeInsufficientMemory, Param: "model", Message: err.Error() +
				"; memory: in the configuration sets the budget, and runner.cache_tokens, sequences and context_tokens lower the need"}
		}
		r.mu.Lock()
		l.short = short
		r.makeRoom(need - (short.Budget - short.Taken))
		abandoned, idle := l.waiting == 0, r.idle
		r.mu.Unlock()
		if abandoned {
			return nil, &UnavailableError{Reason: ErrNoMemory, Message: short.Error(), RetryAfter: retryLater}
		}
		select {
		case <-changed:
		case <-idle:
		case <-r.ctx.Done():
			return nil, ErrStopping
		case <-time.After(time.Second): // other programs give memory back unannounced
		}
	}
}

// makeRoom ends idle runners until, with those that are ending, so many bytes come back, or none is left. The caller holds r.mu.
func (r *Runners) makeRoom(bytes int64) {
	var idle []*life
	for l := range r.lives {
		switch {
		case l.grant == nil:
		case l.state == Unloading:
			bytes -= l.grant.Bytes()
		case l.state == Ready && l.users == 0 && l.waiting == 0:
			idle = append(idle, l)
		}
	}
	slices.SortFunc(idle, func(a, b *life) int { return a.since.Compare(b.since) })
	for _, l := range idle {
		if bytes <= 0 {
			return
		}
		bytes -= l.grant.Bytes()
		r.opts.Logger.Info("unloading a model for the memory of another", "base_model", l.base.Name, "bytes", l.grant.Bytes())
		r.end(l)
	}
}

// end asks the goroutine of a life to end it. The caller holds r.mu.
func (r *Runners) end(l *life) {
	r.enter(l, Unloading)
	close(l.unload)
}

// watch returns when the runner has ended, false, or is to end, true: it was idle for long, or the server stops. It kills
// one that serves and gives no sign of life.
func (r *Runners) watch(l *life) (wanted bool) {
	hang := r.opts.HangTimeout
	for {
		look := hang / 4
		r.mu.Lock()
		free := l.users == 0 && l.waiting == 0
		if r.opts.IdleTimeout > 0 {
			left := r.opts.IdleTimeout
			if free {
				left -= time.Since(l.since)
			}
			if free && left <= 0 && l.state == Ready {
				r.end(l)
			}
			look = min(look, max(left, time.Millisecond))
		}
		r.mu.Unlock()
		if silence := l.runner.silence(); !free && silence >= hang*3/4 {
			ctx, cancel := context.WithTimeout(r.ctx, hang/4)
			l.runner.probe(ctx)
			cancel()
			if l.runner.silence() >= silence && r.ctx.Err() == nil {
				l.runner.process.killBecause(fmt.Sprintf("gave no sign of life for %s and was killed", hang))
			}
		}
		select {
		case <-l.runner.Done():
			return false
		case <-l.unload:
			return true
		case <-r.ctx.Done():
			return true
		case <-time.After(look):
		}
	}
}

// Models returns the states of the models that have a runner, or whose runner does not start, by name; all others are unloaded.
func (r *Runners) Models() []ModelState {
	r.mu.Lock()
	defer r.mu.Unlock()
	var states []ModelState
	for base, m := range r.models {
		l := m.life
		if l == nil {
			continue
		}
		s := ModelState{Model: base.Name, State: l.state, Seconds: time.Since(l.since).Seconds(), Requests: l.users + l.waiting, PID: l.pid}
		if l.grant != nil {
			s.MemoryBytes = l.grant.Bytes()
		}
		switch {
		case l.state == Unloaded && m.failed == nil, l.state == Ready && l.runner.ended():
			continue
		case l.state == Unloaded:
			s = ModelState{Model: base.Name, State: Failed, Seconds: max(0, time.Until(m.retry).Seconds()), Error: m.failed.Error()}
		case l.state == Waiting && l.short != nil:
			s.Error = l.short.Error()
		case l.state == Loading:
			s.LoadedBytes, s.TotalBytes = loadProgress(base, l.pid)
		case l.state == Ready && l.users == 0:
			s.IdleSeconds = s.Seconds
		}
		states = append(states, s)
	}
	slices.SortFunc(states, func(a, b ModelState) int { return cmp.Compare(a.Model, b.Model) })
	return states
}

// loadProgress is what a process has in memory, no more than the weights have, and what these have.
func loadProgress(base Base, pid int) (loaded, total int64) {
	if info, err := os.Stat(filepath.Join(base.Dir, "base.gguf")); err == nil {
		total = info.Size()
	}
	if own, files, err := memory.Of(pid); err == nil && pid != 0 {
		loaded = min(own+files, total)
	}
	return loaded, total
}

// unloadTimeout is for a runner between two long batches.
const unloadTimeout = 10 * time.Second

// UnloadAdapter lets runners forget an adapter that was deleted, once nobody uses it there. It does not wait.
func (r *Runners) UnloadAdapter(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopping != nil {
		return
	}
	for l := range r.lives {
		if l.state != Ready || l.runner == nil || l.runner.ended() {
			continue
		}
		runner := l.runner
		r.work.Go(func() {
			ctx, cancel := context.WithTimeout(r.ctx, unloadTimeout)
			defer cancel()
			if err := runner.UnloadAdapter(ctx, id); err != nil && r.ctx.Err() == nil {
				r.opts.Logger.Warn("unload a deleted adapter; it goes when its memory is needed", "adapter_id", id, "error", err)
			}
		})
	}
}

// Stop refuses new completions and ends all runners: softly until ctx ends, then at once. It returns when they are gone.
func (r *Runners) Stop(ctx context.Context) {
	r.mu.Lock()
	if r.stopping == nil {
		r.stopping = ctx
	}
	r.cancel()
	r.mu.Unlock()
	r.work.Wait()
}
