package runner

import (
	"cmp"
	"context"
	"errors"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hone-llm/hone/internal/engine"
)

const (
	// turnSteps is how many steps the sequences of one adapter take while those of another wait, where a batch has one.
	turnSteps = 32
	// sharedPrefix is how many more prompt tokens a waiting sequence must be able to take over from one that is being
	// computed, to wait for them.
	sharedPrefix = 16
	// outputBytes bounds the logits of one batch where those of every token are wanted.
	outputBytes = 64 << 20
	// maskPatience bounds how long a batch waits for the masks of the tokens after it. Most take some 30 µs: computed beside
	// the batch, they would take a core from one of the decoder's threads, for which the others then wait. A slow one must
	// not hold up other streams and is computed beside the batch all the same.
	maskPatience = 400 * time.Microsecond
)

var errNoToken = errors.New("the constraint allows no token of the model's vocabulary")

// scheduler owns the decoder; only the goroutine of run touches what is not guarded by mu.
type scheduler struct {
	decoder engine.Decoder
	limits  engine.Limits
	limit   int // running sequences, not counting branches and those of the background, which have half as many
	rows    int // of logits in a batch where those of every token are wanted
	slots   []*slot
	cache   *radix
	running []*sequence // those with a place, in order of admission
	waiting []*sequence // in order of arrival
	clients clients
	pace    pace
	loaded  *adapters
	whole   bool // only whole sequences can be shared, as a failed Share has shown
	crowded bool // the cache is full: nobody is admitted until a running sequence has ended

	// Where a batch has one adapter:
	current *adapter
	turn    int                // steps since sequences of another adapter began to wait
	served  map[*adapter]int64 // step of each adapter's last turn

	step       int64
	arrivals   int64
	foreground time.Time // when something was computed last that is not of the background
	counters   Status

	mu       sync.Mutex
	incoming []*request
	work     []func()
	ended    bool // run returns, or has returned
	wake     chan struct{}

	stopping context.Context // ends with stop
	stop     context.CancelFunc
}

// newScheduler takes over the decoder: free closes it.
func newScheduler(d engine.Decoder, running int, adapterBytes int64) *scheduler {
	limits := d.Limits()
	s := &scheduler{
		decoder: d, limits: limits, limit: running,
		rows:    max(16, outputBytes/4/limits.Vocabulary),
		cache:   newRadix(),
		clients: clients{byName: map[string]*client{}},
		served:  map[*adapter]int64{},
		wake:    make(chan struct{}, 1),
	}
	s.loaded = newAdapters(s, adapterBytes)
	for i := range limits.Sequences {
		s.slots = append(s.slots, &slot{number: engine.Sequence(i)})
	}
	s.stopping, s.stop = context.WithCancel(context.Background())
	return s
}

// free closes the decoder. run must have returned, or never have been called.
func (s *scheduler) free() {
	s.stop()
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.loaded.close()
	s.decoder.Close()
}

// submit hands in a request with its first sequences. Its done is closed when the scheduler has let go of all of them.
func (s *scheduler) submit(r *request, sequences ...*sequence) error {
	r.first = sequences
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return ErrStopping
	}
	s.incoming = append(s.incoming, r)
	s.notify()
	return nil
}

// do runs f between two steps and waits for it.
func (s *scheduler) do(ctx context.Context, f func()) error {
	done := make(chan struct{})
	if !s.later(func() { defer close(done); f() }) {
		return ErrStopping
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// later runs f between two steps; false if there are none any more, and f does not run.
func (s *scheduler) later(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return false
	}
	s.work = append(s.work, f)
	s.notify()
	return true
}

// notify makes the scheduler look again at what waits.
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
		s.prepare()
		s.rotate()
		s.admit()
		if !s.decode() {
			// Nothing to compute: no sequence, or all wait for their adapters to load.
			select {
			case <-s.wake:
			case <-s.stopping.Done():
			}
			continue
		}
		s.step++
	}
	s.receive()
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
	for _, r := range incoming {
		r.client = s.clients.get(r.clientName)
		for _, q := range r.first {
			s.enter(q)
		}
		r.first = nil
	}
	for _, f := range work {
		f()
	}
}

// enter makes a new sequence wait.
func (s *scheduler) enter(q *sequence) {
	q.arrival = s.arrivals
	s.arrivals++
	q.request.open++
	s.wait(q)
}

func (s *scheduler) wait(q *sequence) {
	q.request.client.waiting++
	at, _ := slices.BinarySearchFunc(s.waiting, q, func(a, b *sequence) int { return cmp.Compare(a.arrival, b.arrival) })
	s.waiting = slices.Insert(s.waiting, at, q)
}

// reap lets go of the sequences whose requests were cancelled.
func (s *scheduler) reap() {
	s.remove(func(q *sequence) bool { return q.request.ctx.Err() != nil })
}

// remove lets go of sequences.
func (s *scheduler) remove(which func(*sequence) bool) {
	s.running = slices.DeleteFunc(s.running, func(q *sequence) bool {
		if !which(q) {
			return false
		}
		q.request.client.running--
		s.leave(q)
		return true
	})
	s.waiting = slices.DeleteFunc(s.waiting, func(q *sequence) bool {
		if !which(q) {
			return false
		}
		q.request.client.waiting--
		s.leave(q)
		return true
	})
}

// leave ends a sequence's time here; its slot keeps its tokens.
func (s *scheduler) leave(q *sequence) {
	s.crowded = s.crowded && q.slot == nil
	s.giveUp(q)
	if q.holds {
		q.holds = false
		s.loaded.drop(q.request.adapter)
	}
	if q.parent == nil {
		s.counters.Completions++
		s.counters.PromptTokens += int64(q.prompt)
		s.counters.ReusedTokens += int64(max(q.cached, 0))
		s.counters.Generated += int64(len(q.tokens) - q.prompt)
	}
	r := q.request
	if r.open--; r.open == 0 {
		close(r.done)
	}
}

func (s *scheduler) giveUp(q *sequence) {
	if q.slot == nil {
		return
	}
	q.slot.owner = nil
	if q.slot.node == nil {
		s.decoder.Truncate(q.slot.number, 0) // what it computed is of no use to others
	}
	q.slot = nil
}

// prepare begins to load the adapters of the sequences that come next, and ends those whose adapter cannot be loaded.
func (s *scheduler) prepare() {
	if !slices.ContainsFunc(s.waiting, func(q *sequence) bool { return q.request.adapter != nil }) {
		return
	}
	held := 0 // by sequences that wait: as many as may run, and some whose turn has moved
	for _, q := range s.waiting {
		if q.holds {
			held++
		}
	}
	next := 0
	failed := map[*sequence]error{}
	for q := range turns(s.waiting) {
		switch {
		case q.request.adapter == nil:
			continue
		case q.holds:
		case q.parent != nil || next < s.limit && held < 2*s.limit: // a branch's are in memory, for its parent
			q.holds = true
			held++
			s.loaded.hold(q.request.adapter)
		default:
			continue
		}
		if q.parent == nil {
			next++
		}
		if _, err := s.loaded.weights(q.request.adapter); err != nil {
			failed[q] = err
		}
	}
	if len(failed) > 0 {
		for q, err := range failed {
			q.request.fail(err)
		}
		s.remove(func(q *sequence) bool { return failed[q] != nil })
	}
}

// ready tells whether the sequence's adapter is loaded.
func (s *scheduler) ready(q *sequence) bool {
	if q.request.adapter == nil {
		return true
	}
	if !q.holds {
		return false
	}
	weights, err := s.loaded.weights(q.request.adapter)
	return weights != nil && err == nil
}

// rotate chooses the adapter of this step where a batch can have only one: the current one until its sequences are done,
// or, while others wait, until its turn is over. Its sequences then wait too; their slots keep what they have computed.
func (s *scheduler) rotate() {
	if s.limits.MixedAdapters {
		return
	}
	var next *sequence // of the adapter whose turn is longest ago
	mine := len(s.running) > 0
	for _, q := range s.waiting {
		switch {
		case !s.ready(q):
		case q.request.adapter == s.current:
			mine = true
		case next == nil || s.served[q.request.adapter] < s.served[next.request.adapter]:
			next = q
		}
	}
	if next == nil {
		s.turn = 0
		return
	}
	// The background has a single step while others wait.
	steps := turnSteps
	if !next.request.background && !slices.ContainsFunc(s.running, func(q *sequence) bool { return !q.request.background }) {
		steps = 1
	}
	if s.turn++; mine && s.turn <= steps {
		return
	}
	for len(s.running) > 0 {
		s.displace(s.running[len(s.running)-1])
	}
	s.served[s.current] = s.step
	s.turn, s.crowded = 0, false
	s.current = next.request.adapter
	if len(s.served) > 4*len(s.slots) { // adapters that are not asked for any more
		clear(s.served)
	}
}

// displace makes a running sequence wait. What it has computed stays in the prefix cache.
func (s *scheduler) displace(q *sequence) {
	s.running = slices.DeleteFunc(s.running, func(o *sequence) bool { return o == q })
	q.request.client.running--
	s.giveUp(q)
	s.wait(q)
}

// admit gives places to waiting sequences.
func (s *scheduler) admit() {
	if len(s.waiting) == 0 || s.places(false) <= 0 && !s.clients.unserved() &&
		!slices.ContainsFunc(s.waiting, func(q *sequence) bool { return q.parent != nil || q.request.background }) {
		return
	}
	admitted := map[*sequence]bool{}
	for q := range turns(s.waiting) {
		var displaced *sequence
		if q.parent == nil && s.places(q.request.background) <= 0 {
			// A client's first sequence need not wait for another's second, nor for the end of a long one.
			if q.request.client.running == 0 && !q.request.background {
				displaced = s.lastOf(s.clients.greediest(q.request.client))
			}
			if displaced == nil {
				continue
			}
		}
		if !s.admissible(q) {
			continue
		}
		if displaced != nil {
			// Not s.displace: the list of those that wait must not change here.
			s.running = slices.DeleteFunc(s.running, func(o *sequence) bool { return o == displaced })
			displaced.request.client.running--
			s.giveUp(displaced)
			defer s.wait(displaced)
		}
		if !s.place(q) {
			continue
		}
		admitted[q] = true
		q.request.client.waiting--
		q.request.client.running++
		s.running = append(s.running, q)
	}
	if len(admitted) > 0 {
		s.waiting = slices.DeleteFunc(s.waiting, func(q *sequence) bool { return admitted[q] })
	}
}

// places is how many more sequences may run, of the background or of the others: neither takes the other's places.
func (s *scheduler) places(background bool) int {
	n := s.limit
	if background {
		n = (n + 1) / 2
	}
	for _, q := range s.running {
		if q.parent == nil && q.request.background == background {
			n--
		}
	}
	return n
}

// lastOf returns the sequence of a client that was admitted last and that nothing waits for, nil if there is none.
func (s *scheduler) lastOf(c *client) *sequence {
	if c == nil {
		return nil
	}
	for _, q := range slices.Backward(s.running) {
		if q.request.client == c && q.parent == nil && q.branches == 0 && !q.request.background {
			return q
		}
	}
	return nil
}

// admissible tells whether a sequence could begin now.
func (s *scheduler) admissible(q *sequence) bool {
	if !s.ready(q) || !s.limits.MixedAdapters && q.request.adapter != s.current {
		return false
	}
	// What is computed of the background is no reason to wait, but for its like.
	goesOn := func(r *sequence) bool { return r.left() > 0 && (q.request.background || !r.request.background) }
	if s.crowded && slices.ContainsFunc(s.running, goesOn) {
		return false
	}
	wanted, unscored := q.tokens[:q.from], q.scored && len(q.scores) == 0
	if unscored {
		wanted = q.tokens[:len(q.tokens)-1]
	}
	if s.whole || len(wanted) < sharedPrefix {
		return true
	}
	have, _ := s.cache.match(q.request.adapter, wanted)
	if unscored {
		have = len(s.cache.scores(q.request.adapter, wanted, q.alternatives))
	}
	for _, r := range s.running {
		// Not yet computed there, so the tokens would be computed twice in the same batch.
		if r.request.adapter == q.request.adapter && r.shared && goesOn(r) && (!unscored || r.scored && r.alternatives >= q.alternatives) {
			if n := commonPrefix(r.tokens, wanted); n > r.slot.held() && n >= have+sharedPrefix {
				return false
			}
		}
	}
	return true
}

// place gives the sequence a slot that begins with as much of its tokens as the cache has: an idle one that holds nothing
// else, or one that shares the prefix. It is false if every slot is in use.
func (s *scheduler) place(q *sequence) bool {
	a := q.request.adapter
	if q.scored && len(q.scores) == 0 {
		// The logits of the last token that has a score are those of the next one's.
		q.scores = s.cache.scores(a, q.tokens, q.alternatives)
		q.from = max(0, len(q.scores)-1)
	}
	var target *slot
	common := 0
	if s.whole {
		if target = s.cache.matchWhole(a, q.tokens[:q.from]); target != nil {
			common = target.held()
		}
	} else if n, at := s.cache.match(a, q.tokens[:q.from]); n > 0 {
		common = n
		at.touch(s.step)
		if target = at.idle(); target == nil || at.depth != n {
			source := at.holder()
			switch target = s.empty(source); {
			case target == nil:
				return false
			case target == source:
				if s.decoder.Truncate(source.number, n) {
					s.cache.cut(source, n)
				} else {
					s.cache.cut(source, 0)
					common = 0
				}
			case !s.decoder.Share(source.number, target.number, n):
				s.whole, common = true, 0
			}
		}
	}
	if target == nil {
		if target = s.empty(nil); target == nil {
			return false
		}
	}
	target.owner = q
	q.slot, q.computed = target, common
	if q.shared && common > 0 && target.node == nil {
		s.cache.add(target, a, q.tokens[:common], s.step)
	}
	if q.cached < 0 {
		q.cached = min(common, q.prompt)
		s.charge(q, promptCost*float64(q.prompt-q.cached))
		s.clients.floor = max(s.clients.floor, q.request.client.served)
	}
	return true
}

func (s *scheduler) charge(q *sequence, cost float64) { q.request.client.served += cost }

// empty returns a slot without tokens, taking away those that were not used for longest; nil if every slot is in use. If
// these are the ones to be shared (source), the slot is returned as it is.
func (s *scheduler) empty(source *slot) *slot {
	for _, slot := range s.slots {
		if slot.owner == nil && slot.node == nil {
			return slot
		}
	}
	slot := victim(s.slots, s.whole)
	if slot != nil && slot != source {
		s.clear(slot)
	}
	return slot
}

// clear takes away all tokens of a slot.
func (s *scheduler) clear(slot *slot) {
	s.decoder.Truncate(slot.number, 0) // taking away all never fails
	s.cache.cut(slot, 0)
	if slot.owner != nil {
		slot.owner.computed = 0
	}
}

// part is what a batch computes of one sequence.
type part struct {
	sequence *sequence
	tokens   int
	outputs  int // of its last tokens
}

// compose chooses what the next batch computes: the next token of every stream, then as much of the prompts as may be
// computed beside them. The background waits while there is anything else, but for one of backgroundSteps batches.
func (s *scheduler) compose() (parts []part, batch []engine.Part, streams, prompt int) {
	budget, rows := s.limits.BatchTokens, s.rows
	add := func(q *sequence, most int) int {
		n := min(q.left(), most)
		want := engine.WantNone
		outputs := 0
		switch {
		case n <= 0:
			return 0
		case q.computed < q.from: // up to the first output that is wanted, which may be that of the last token alone
			if q.computed+n > q.from && q.from < len(q.tokens)-1 {
				n = q.from - q.computed
			}
			if q.computed+n == len(q.tokens) {
				want, outputs = engine.WantLast, 1
			}
		case q.want == engine.WantState:
			want, outputs = engine.WantState, n
		case n == 1:
			want, outputs = engine.WantLast, 1
		default:
			if n = min(n, rows); n <= 0 {
				return 0
			}
			want, outputs = engine.WantAll, n
			rows -= n
		}
		p := engine.Part{Sequence: q.slot.number, Position: q.computed, Tokens: q.tokens[q.computed : q.computed+n], Want: want}
		if q.request.adapter != nil {
			p.Adapter, _ = s.loaded.weights(q.request.adapter)
		}
		parts, batch = append(parts, part{q, n, outputs}), append(batch, p)
		budget -= n
		return n
	}
	foreground := slices.ContainsFunc(s.running, func(q *sequence) bool { return !q.request.background && q.left() > 0 })
	switch {
	case foreground:
		s.foreground = time.Now()
	case time.Since(s.foreground) < recently:
		budget = min(budget, len(s.running)+backgroundChunk)
	}
	var prompts []*sequence
	for _, q := range s.running {
		switch {
		case foreground && q.request.background && s.step%backgroundSteps != 0:
		case q.left() == 1:
			add(q, 1)
			if len(q.tokens) > q.prompt && q.parent == nil {
				streams++
			}
		case q.left() > 1:
			prompts = append(prompts, q)
		}
	}
	if len(prompts) == 0 {
		return parts, batch, streams, 0
	}
	if streams > 0 {
		budget = min(budget, s.pace.chunk(streams))
	}
	// The one that waits for longest goes on in any case, with a quarter of the batch. Of the rest, the client that was
	// served least is next, and its shortest prompt: it is done soonest. The background, which is here once in a while, has that
	// quarter for its own.
	oldest := slices.MinFunc(prompts, func(a, b *sequence) int { return cmp.Or(yields(b, a), cmp.Compare(a.arrival, b.arrival)) })
	reserved := min(oldest.left(), (budget+3)/4)
	budget -= reserved
	slices.SortStableFunc(prompts, func(a, b *sequence) int {
		return cmp.Or(yields(a, b), cmp.Compare(a.request.client.served, b.request.client.served), cmp.Compare(a.left(), b.left()))
	})
	for _, q := range prompts {
		most := budget
		if q == oldest {
			most += reserved
			budget += reserved
		}
		prompt += add(q, most)
	}
	return parts, batch, streams, prompt
}

// yields orders the background after the others.
func yields(a, b *sequence) int {
	switch {
	case a.request.background == b.request.background:
		return 0
	case a.request.background:
		return 1
	}
	return -1
}

// decode computes one batch of the running sequences and reads from it; false if there is nothing to compute.
func (s *scheduler) decode() bool {
	parts, batch, streams, prompt := s.compose()
	if len(parts) == 0 {
		return false
	}
	began := time.Now()
	err := s.compute(parts, batch, prompt > 0)
	took := time.Since(began)
	s.counters.Decodes++
	s.counters.ComputeSeconds += took.Seconds()
	switch {
	case err == nil:
		s.pace.observe(streams, prompt, took)
	case errors.Is(err, engine.ErrNoRoom) && s.makeRoom():
		return true
	default:
		// What a failed batch left in the cache is not known.
		failed := map[*sequence]bool{}
		for _, p := range parts {
			q := p.sequence
			if errors.Is(err, engine.ErrAborted) {
				if !s.decoder.Truncate(q.slot.number, q.computed) {
					s.clear(q.slot)
				}
				continue
			}
			s.clear(q.slot)
			q.request.fail(err)
			failed[q] = true
		}
		s.remove(func(q *sequence) bool { return failed[q] })
		return true
	}
	s.read(parts)
	return true
}

// compute decodes a batch. If it is long and every request in it was cancelled, nobody waits for it any more: it is aborted.
func (s *scheduler) compute(parts []part, batch []engine.Part, long bool) error {
	if !long {
		return s.decoder.Decode(batch)
	}
	var left atomic.Int64
	left.Store(int64(len(parts)))
	var aborting sync.WaitGroup
	var stops []func() bool
	for _, p := range parts {
		aborting.Add(1)
		stops = append(stops, context.AfterFunc(p.sequence.request.ctx, func() {
			defer aborting.Done()
			if left.Add(-1) == 0 {
				s.decoder.Abort()
			}
		}))
	}
	err := s.decoder.Decode(batch)
	for _, stop := range stops {
		if stop() {
			aborting.Done()
		}
	}
	aborting.Wait()
	s.decoder.ResetAbort()
	return err
}

// read hands a batch's outputs to its sequences, beside each other.
func (s *scheduler) read(parts []part) {
	type result struct {
		finished bool
		spawned  []*sequence
	}
	results := make([]result, len(parts))
	outputs := make([][][]float32, len(parts))
	for i, p := range parts {
		q := p.sequence
		for j := range p.outputs {
			outputs[i] = append(outputs[i], s.decoder.Output(i, j))
		}
		if q.shared {
			s.extend(q, q.tokens[q.computed:q.computed+p.tokens])
		}
		q.computed += p.tokens
	}
	var reading sync.WaitGroup
	for i, p := range parts {
		q := p.sequence
		if len(outputs[i]) == 0 || q.request.ctx.Err() != nil {
			continue
		}
		do := func() { results[i].finished, results[i].spawned = q.reader.read(q, outputs[i]) }
		if i == len(parts)-1 {
			do()
		} else {
			reading.Go(do)
		}
	}
	reading.Wait()
	for i, p := range parts {
		if q := p.sequence; q.scored && len(outputs[i]) > 0 {
			s.cache.note(q.slot, q.scores)
			q.scored = len(q.scores) < q.prompt
		}
	}
	s.foresee(parts)

	finished := map[*sequence]bool{}
	for i, p := range parts {
		q := p.sequence
		if len(q.tokens) > q.prompt && q.parent == nil && len(outputs[i]) > 0 {
			s.charge(q, generatedCost)
		}
		for _, spawned := range results[i].spawned {
			if spawned.parent == q {
				q.branches++
			}
			s.enter(spawned)
		}
		if results[i].finished {
			finished[q] = true
			if q.parent != nil {
				if q.parent.branches--; q.parent.branches == 0 {
					q.parent.joined()
					finished[q.parent] = true
				}
			}
		}
	}
	if len(finished) > 0 {
		s.remove(func(q *sequence) bool { return finished[q] })
	}
}

// foresee waits a little for what readers compute in the background.
func (s *scheduler) foresee(parts []part) {
	var enough <-chan time.Time
	for _, p := range parts {
		f, ok := p.sequence.reader.(foreseer)
		if !ok {
			continue
		}
		done := f.foreseen()
		if done == nil {
			continue
		}
		if enough == nil {
			enough = time.After(maskPatience)
		}
		select {
		case <-done:
		case <-enough:
			return
		}
	}
}

func (s *scheduler) extend(q *sequence, tokens []engine.Token) {
	if q.slot.node == nil {
		s.cache.add(q.slot, q.request.adapter, tokens, s.step)
		return
	}
	s.cache.extend(q.slot, tokens, s.step)
}

// makeRoom frees cells: those of an idle slot, or else those of the sequence that was admitted last, which waits until
// there is room and is computed again then. It is false if one sequence alone is left.
func (s *scheduler) makeRoom() bool {
	if slot := victim(s.slots, s.whole); slot != nil {
		s.clear(slot)
		return true
	}
	busy := 0
	var last, parent *sequence
	for _, q := range s.running {
		switch {
		case q.left() > 0:
			busy++
			if last == nil || !last.request.background || q.request.background {
				last = q // of the background, if there is any
			}
		case q.slot != nil:
			parent = q
		}
	}
	switch {
	case busy > 1:
		s.clear(last.slot)
		s.displace(last)
		s.crowded = true
		s.counters.Displaced++
		return true
	case parent != nil:
		s.giveUp(parent) // its branches bring the prompt's tokens along
		return true
	}
	return false
}

// forget takes everything that an adapter has computed out of the cache.
func (s *scheduler) forget(a *adapter) {
	for _, slot := range s.cache.forget(a) {
		if slot.owner == nil {
			s.decoder.Truncate(slot.number, 0)
		}
	}
	delete(s.served, a)
	if s.current == a {
		s.current = nil
	}
}

func (s *scheduler) status() Status {
	status := s.counters
	status.PoolTokens = s.limits.CacheTokens
	status.FreeTokens = s.decoder.FreeTokens()
	status.Running, status.Waiting = len(s.running), len(s.waiting)
	for _, slot := range s.slots {
		if slot.owner == nil {
			status.CachedTokens += slot.held()
			if slot.node != nil {
				status.CachedSequences++
			}
		}
	}
	if alone := s.pace.alone(1); alone > 0 && !math.IsInf(alone, 0) {
		status.StepSeconds = alone
	}
	return status
}
