package runner

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llama"
)

const (
	// stepTokens is the most tokens of one batch. The engine computes 512 at a time anyway, so a longer batch is no
	// faster; it would only make generating sequences and cancelled ones wait longer.
	stepTokens = 512
	// turnSteps is how many steps the sequences of one adapter take while those of another wait.
	turnSteps = 32
	// sharedPrefix is how many more prompt tokens a waiting sequence must be able to take over from one that is being
	// computed, to wait for them.
	sharedPrefix = 16
)

var errNoToken = errors.New("the constraint allows no token of the model's vocabulary")

// slot is one of the engine's sequence numbers and what the cache holds for it.
type slot struct {
	id      int
	tokens  []engine.Token // computed
	adapter *adapter       // that computed them
	owner   *sequence      // nil: kept for its prefix
	used    int64          // step in which it was given up, for choosing which idle one goes
}

type schedulerOptions struct {
	poolTokens, sequences, threads int
	gpu                            bool // the model is on a GPU
}

// scheduler owns the engine's context; only the goroutine of run touches what is not guarded by mu.
type scheduler struct {
	context  *llama.Context
	batch    *llama.Batch
	limit    int  // running sequences
	reuse    bool // the model's cache can be cut and shared
	slots    []*slot
	running  []*sequence // of the current adapter
	waiting  []*sequence // in order of arrival
	current  *adapter
	turn     int  // steps since sequences of another adapter began to wait
	crowded  bool // the cache is full: nobody is admitted until a running sequence has ended
	step     int64
	counters Status

	mu       sync.Mutex
	incoming []*sequence
	work     []func()
	ended    bool       // run returns, or has returned
	orphans  []*adapter // forgotten after that; free frees them
	wake     chan struct{}

	stopping context.Context // ends with stop
	stop     context.CancelFunc
}

func newScheduler(m *llama.Model, o schedulerOptions) (*scheduler, error) {
	slots := 2 * o.sequences
	attention := llama.AttentionFlash
	if o.gpu {
		attention = llama.AttentionPlain // make cuda leaves the flash kernels out, which take most of its build
	}
	c, err := llama.NewContext(m, llama.ContextOptions{
		Tokens: o.poolTokens, Sequences: slots, BatchTokens: stepTokens, MicroBatchTokens: stepTokens, Threads: o.threads, Attention: attention,
	})
	if err != nil {
		return nil, err
	}
	s := &scheduler{context: c, batch: llama.NewBatch(stepTokens), limit: o.sequences, reuse: !m.Recurrent(), wake: make(chan struct{}, 1)}
	for i := range slots {
		s.slots = append(s.slots, &slot{id: i})
	}
	s.stopping, s.stop = context.WithCancel(context.Background())
	return s, nil
}

func (s *scheduler) free() {
	s.stop()
	s.batch.Close()
	s.context.Close()
	for _, x := range s.orphans {
		x.weights.Free()
	}
	s.orphans = nil
}

// submit queues a sequence. The channel is closed when the scheduler has let go of it: it ended, or its context did.
func (s *scheduler) submit(q *sequence) (done <-chan struct{}, err error) {
	q.cached = -1
	q.done = make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil, ErrStopping
	}
	s.incoming = append(s.incoming, q)
	s.notify()
	return q.done, nil
}

// do runs f between two steps and waits for it.
func (s *scheduler) do(ctx context.Context, f func()) error {
	done := make(chan struct{})
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return ErrStopping
	}
	s.work = append(s.work, func() { defer close(done); f() })
	s.mu.Unlock()
	s.notify()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// forget frees an adapter that no sequence uses, between two steps, or with the scheduler when that has stopped.
func (s *scheduler) forget(x *adapter) {
	f := func() {
		for _, slot := range s.slots {
			if slot.adapter == x && slot.owner == nil {
				s.clear(slot)
			}
		}
		if s.current == x {
			s.current = nil
			_ = s.context.SetAdapter(nil, 0) // removing fails only on a closed context, which uses none
		}
		x.weights.Free()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		s.orphans = append(s.orphans, x)
		return
	}
	s.work = append(s.work, f)
	s.notify()
}

func (s *scheduler) notify() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run serves until stop.
func (s *scheduler) run() {
	for s.stopping.Err() == nil {
		s.receive()
		s.reap()
		if len(s.running)+len(s.waiting) == 0 {
			select {
			case <-s.wake:
			case <-s.stopping.Done():
			}
			continue
		}
		s.rotate()
		s.admit()
		s.decode()
		s.step++
	}
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.receive()
	for _, q := range slices.Concat(s.running, s.waiting) {
		s.leave(q)
	}
	s.running, s.waiting = nil, nil
}

// receive takes what other goroutines have handed in.
func (s *scheduler) receive() {
	s.mu.Lock()
	incoming, work := s.incoming, s.work
	s.incoming, s.work = nil, nil
	s.mu.Unlock()
	s.waiting = append(s.waiting, incoming...)
	for _, f := range work {
		f()
	}
}

// reap lets go of the sequences whose requests were cancelled.
func (s *scheduler) reap() {
	cancelled := func(q *sequence) bool {
		if q.ctx.Err() == nil {
			return false
		}
		s.leave(q)
		return true
	}
	s.running = slices.DeleteFunc(s.running, cancelled)
	s.waiting = slices.DeleteFunc(s.waiting, cancelled)
}

// leave ends a sequence's time here; its slot keeps its tokens.
func (s *scheduler) leave(q *sequence) {
	s.crowded = s.crowded && q.slot == nil
	s.giveUp(q)
	s.counters.Completions++
	s.counters.PromptTokens += int64(q.prompt)
	s.counters.ReusedTokens += int64(max(q.cached, 0))
	s.counters.Generated += int64(len(q.tokens) - q.prompt)
	close(q.done)
}

func (s *scheduler) giveUp(q *sequence) {
	if q.slot != nil {
		q.slot.owner, q.slot.used = nil, s.step
		q.slot = nil
	}
}

// rotate chooses the adapter of this step: the current one until its sequences are done, or, while others wait, until
// its turn is over. Its sequences then wait too; their slots keep what they have computed.
func (s *scheduler) rotate() {
	other := slices.IndexFunc(s.waiting, func(q *sequence) bool { return q.adapter != s.current })
	mine := len(s.running) > 0 || slices.ContainsFunc(s.waiting, func(q *sequence) bool { return q.adapter == s.current })
	if other < 0 {
		s.turn = 0
		return
	}
	if s.turn++; mine && s.turn <= turnSteps {
		return
	}
	next := s.waiting[other].adapter
	for _, q := range s.running {
		s.giveUp(q)
	}
	s.waiting = append(s.waiting, s.running...)
	s.running = s.running[:0]
	s.turn, s.crowded = 0, false
	var weights *llama.Adapter
	if next != nil {
		weights = next.weights
	}
	if err := s.context.SetAdapter(weights, 1); err != nil {
		s.failWaiting(next, err)
		return
	}
	s.current = next
}

func (s *scheduler) failWaiting(a *adapter, err error) {
	_ = s.context.SetAdapter(nil, 0)
	s.current = nil
	s.waiting = slices.DeleteFunc(s.waiting, func(q *sequence) bool {
		if q.adapter != a {
			return false
		}
		q.fail(err)
		s.leave(q)
		return true
	})
}

// admit gives slots to waiting sequences of the current adapter, in order of arrival.
func (s *scheduler) admit() {
	s.waiting = slices.DeleteFunc(s.waiting, func(q *sequence) bool {
		if q.adapter != s.current || len(s.running) >= s.limit || s.crowded && len(s.running) > 0 {
			return false
		}
		source, common := s.bestPrefix(q)
		if s.reuse {
			for _, r := range s.running {
				// Not yet computed there, so the tokens would be computed twice in the same batch.
				if n := commonPrefix(r.tokens, q.tokens[:len(q.tokens)-1]); n > len(r.slot.tokens) && n >= common+sharedPrefix {
					return false
				}
			}
		}
		s.place(q, source, common)
		s.running = append(s.running, q)
		return true
	})
}

// bestPrefix returns the slot that holds most of the sequence's beginning, and how much. At least one token of the
// sequence is left over, since its logits are needed.
func (s *scheduler) bestPrefix(q *sequence) (best *slot, common int) {
	if !s.reuse {
		return nil, 0
	}
	for _, slot := range s.slots {
		if slot.adapter != q.adapter {
			continue
		}
		n := commonPrefix(slot.tokens, q.tokens[:len(q.tokens)-1])
		if n > common || n == common && n > 0 && best.owner != nil && slot.owner == nil {
			best, common = slot, n
		}
	}
	return best, common
}

// place gives the sequence a slot that begins with the common prefix: the slot it was found in, if that is idle and
// holds little else, else the one that has been idle longest, which shares the prefix's cells.
func (s *scheduler) place(q *sequence, source *slot, common int) {
	target := source
	if source == nil || source.owner != nil || common*2 < len(source.tokens) {
		target = s.longestIdle(source)
		if target == nil {
			target = source // the only idle one; there are more slots than running sequences
		}
	}
	if target == source {
		if !s.context.RemoveSequence(target.id, common) {
			s.clear(target)
			common = 0
		}
	} else {
		s.clear(target)
		if common > 0 && !s.context.CopySequence(source.id, target.id, common) {
			common = 0
		}
	}
	target.tokens = q.tokens[:common]
	target.adapter, target.owner = q.adapter, q
	q.slot = target
	if q.cached < 0 {
		q.cached = min(common, q.prompt)
	}
}

// longestIdle returns the slot without an owner that was given up first, empty ones before all, but not this one; nil
// if there is none.
func (s *scheduler) longestIdle(but *slot) *slot {
	var oldest *slot
	for _, slot := range s.slots {
		if slot.owner != nil || slot == but {
			continue
		}
		if len(slot.tokens) == 0 {
			return slot
		}
		if oldest == nil || slot.used < oldest.used {
			oldest = slot
		}
	}
	return oldest
}

func (s *scheduler) clear(slot *slot) {
	s.context.RemoveSequence(slot.id, 0) // removing all of a sequence never fails
	slot.tokens, slot.adapter = nil, nil
}

// decode computes one batch of the running sequences and samples from it.
func (s *scheduler) decode() {
	type part struct {
		sequence *sequence
		tokens   int
		row      int // of the logits; -1 if the prompt goes on
	}
	var parts []part
	s.batch.Reset()
	add := func(q *sequence, n int) {
		p := part{sequence: q, tokens: n, row: -1}
		first := len(q.slot.tokens)
		for i := first; i < first+n; i++ {
			last := i == len(q.tokens)-1
			if row := s.batch.Add(q.tokens[i], i, q.slot.id, last); last {
				p.row = row
			}
		}
		parts = append(parts, p)
	}
	// Generating sequences first: they need one row each. Then prompts in order of arrival.
	for _, q := range s.running {
		if len(q.tokens)-len(q.slot.tokens) == 1 {
			add(q, 1)
		}
	}
	for _, q := range s.running {
		if left := len(q.tokens) - len(q.slot.tokens); left > 1 {
			if n := min(left, s.context.BatchTokens()-s.batch.Len()); n > 0 {
				add(q, n)
			}
		}
	}
	if len(parts) == 0 {
		return
	}

	// Nobody waits for the batch any more when every request in it was cancelled.
	var left atomic.Int64
	left.Store(int64(len(parts)))
	var aborting sync.WaitGroup
	var stops []func() bool
	for _, p := range parts {
		aborting.Add(1)
		stops = append(stops, context.AfterFunc(p.sequence.ctx, func() {
			defer aborting.Done()
			if left.Add(-1) == 0 {
				s.context.Abort()
			}
		}))
	}
	err := s.context.Decode(s.batch)
	for _, stop := range stops {
		if stop() {
			aborting.Done()
		}
	}
	aborting.Wait()
	s.context.ResetAbort()
	s.counters.Decodes++

	switch {
	case err == nil:
	case errors.Is(err, engine.ErrNoRoom) && s.makeRoom():
		return
	default:
		// What a failed batch left in the cache is not known.
		failed := map[*sequence]bool{}
		for _, p := range parts {
			s.clear(p.sequence.slot)
			p.sequence.slot.adapter = p.sequence.adapter
			if !errors.Is(err, engine.ErrAborted) {
				p.sequence.fail(err)
				failed[p.sequence] = true
			}
		}
		s.end(failed)
		return
	}
	finished := map[*sequence]bool{}
	for _, p := range parts {
		q := p.sequence
		q.slot.tokens = q.tokens[:len(q.slot.tokens)+p.tokens]
		if p.row >= 0 && q.ctx.Err() == nil && q.next(s.context.Logits(p.row)) {
			finished[q] = true
		}
	}
	s.end(finished)
}

// end lets go of running sequences.
func (s *scheduler) end(which map[*sequence]bool) {
	s.running = slices.DeleteFunc(s.running, func(q *sequence) bool {
		if which[q] {
			s.leave(q)
		}
		return which[q]
	})
}

// makeRoom frees cells: those of the slot that has been idle longest, or else those of the sequence that was admitted
// last, which waits until there is room and is computed again then. It is false if one sequence alone is left.
func (s *scheduler) makeRoom() bool {
	idle := slices.DeleteFunc(slices.Clone(s.slots), func(slot *slot) bool { return slot.owner != nil || len(slot.tokens) == 0 })
	if len(idle) > 0 {
		s.clear(slices.MinFunc(idle, func(a, b *slot) int { return cmp.Compare(a.used, b.used) }))
		return true
	}
	if len(s.running) < 2 {
		return false
	}
	last := s.running[len(s.running)-1]
	s.running = s.running[:len(s.running)-1]
	s.clear(last.slot)
	s.giveUp(last)
	s.waiting = slices.Insert(s.waiting, 0, last)
	s.crowded = true
	s.counters.Displaced++
	return true
}

func (s *scheduler) status() Status {
	status := s.counters
	status.PoolTokens = s.context.Tokens()
	status.Running, status.Waiting = len(s.running), len(s.waiting)
	for _, slot := range s.slots {
		if slot.owner == nil {
			status.CachedTokens += len(slot.tokens)
		}
	}
	return status
}

func commonPrefix(a, b []engine.Token) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}
