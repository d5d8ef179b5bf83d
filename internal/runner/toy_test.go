package runner

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/engine"
)

// toyDecoder is a small engine.Decoder whose logits follow from a hash of an adapter and all tokens before, so that any
// confusion of sequences, positions or adapters changes what is generated.
type toyDecoder struct {
	limits engine.Limits
	whole  bool                                  // sequences can be neither cut nor shared in part
	cost   func(tokens, parts int) time.Duration // of a batch; nil: none
	load   time.Duration                         // of an adapter

	held    [][]*toyCell
	used    int // cells
	outputs [][][]float32
	abort   chan struct{} // capacity 1: full while aborted
	open    atomic.Int64  // adapters
	batches int
	tokens  int // computed
}

type toyCell struct {
	hash  uint64
	users int
}

type toyAdapter struct {
	decoder *toyDecoder
	path    string
	bytes   int
}

func (a *toyAdapter) Bytes() int { return a.bytes }
func (a *toyAdapter) Close()     { a.decoder.open.Add(-1) }

const toyVocabulary = 32

func newToyDecoder(sequences, cells, batch int, mixed bool) *toyDecoder {
	return &toyDecoder{
		limits: engine.Limits{Sequences: sequences, CacheTokens: cells, BatchTokens: batch, Vocabulary: toyVocabulary, Embedding: 4, MixedAdapters: mixed},
		held:   make([][]*toyCell, sequences),
		abort:  make(chan struct{}, 1),
	}
}

func (d *toyDecoder) Limits() engine.Limits { return d.limits }

func (d *toyDecoder) LoadAdapter(path string) (engine.Adapter, error) {
	time.Sleep(d.load)
	if path == "bad" {
		return nil, errors.New("a bad adapter")
	}
	d.open.Add(1)
	return &toyAdapter{d, path, 100}, nil
}

func (d *toyDecoder) Share(from, to engine.Sequence, n int) bool {
	if len(d.held[to]) > 0 || n <= 0 || n > len(d.held[from]) {
		panic(fmt.Sprintf("toy: share %d of %d tokens with a sequence of %d", n, len(d.held[from]), len(d.held[to])))
	}
	if d.whole && n != len(d.held[from]) {
		return false
	}
	for _, c := range d.held[from][:n] {
		c.users++
		d.held[to] = append(d.held[to], c)
	}
	return true
}

func (d *toyDecoder) Truncate(s engine.Sequence, n int) bool {
	kept := true
	if d.whole && n < len(d.held[s]) && n > 0 {
		n, kept = 0, false
	}
	for _, c := range d.held[s][min(n, len(d.held[s])):] {
		if c.users--; c.users == 0 {
			d.used--
		}
	}
	d.held[s] = d.held[s][:min(n, len(d.held[s]))]
	return kept
}

func (d *toyDecoder) FreeTokens() int { return d.limits.CacheTokens - d.used }

func (d *toyDecoder) Decode(parts []engine.Part) error {
	n := 0
	seen := map[engine.Sequence]bool{}
	for _, p := range parts {
		n += len(p.Tokens)
		if seen[p.Sequence] || p.Position != len(d.held[p.Sequence]) || len(p.Tokens) == 0 || !d.limits.MixedAdapters && p.Adapter != parts[0].Adapter {
			panic(fmt.Sprintf("toy: a wrong batch %+v", parts))
		}
		seen[p.Sequence] = true
	}
	if n > d.limits.BatchTokens {
		panic("toy: the batch is too long")
	}
	if n > d.FreeTokens() {
		return engine.ErrNoRoom
	}
	if d.cost != nil {
		select {
		case d.abort <- struct{}{}:
			<-d.abort
			time.Sleep(d.cost(n, len(parts)))
		default:
			return engine.ErrAborted
		}
	}
	d.batches++
	d.tokens += n
	d.outputs = d.outputs[:0]
	for _, p := range parts {
		path := ""
		if p.Adapter != nil {
			path = p.Adapter.(*toyAdapter).path
		}
		var outputs [][]float32
		for i, t := range p.Tokens {
			h := toyHash(path)
			if before := d.held[p.Sequence]; len(before) > 0 {
				h = before[len(before)-1].hash
			}
			h = toyNext(h, path, t)
			d.held[p.Sequence] = append(d.held[p.Sequence], &toyCell{h, 1})
			d.used++
			if p.Want == engine.WantAll || p.Want == engine.WantLast && i == len(p.Tokens)-1 {
				outputs = append(outputs, toyLogits(h))
			}
			if p.Want == engine.WantState {
				outputs = append(outputs, []float32{1, 2, 3, float32(h % 7)})
			}
		}
		d.outputs = append(d.outputs, outputs)
	}
	return nil
}

func (d *toyDecoder) Output(part, i int) []float32 { return d.outputs[part][i] }

func (d *toyDecoder) Abort() {
	select {
	case d.abort <- struct{}{}:
	default:
	}
}

func (d *toyDecoder) ResetAbort() {
	select {
	case <-d.abort:
	default:
	}
}

func (d *toyDecoder) Close() {}

func toyHash(adapter string) uint64 {
	h := uint64(14695981039346656037)
	for _, c := range []byte(adapter) {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return h
}

func toyNext(h uint64, adapter string, t engine.Token) uint64 {
	h = (h ^ uint64(t+1) ^ toyHash(adapter)) * 1099511628211
	return h ^ h>>29
}

func toyLogits(h uint64) []float32 {
	logits := make([]float32, toyVocabulary)
	logits[h%toyVocabulary] = 1
	return logits
}

// toyAnswer is what a stream generates.
func toyAnswer(adapter string, prompt []engine.Token, n int) []engine.Token {
	h := toyHash(adapter)
	for _, t := range prompt {
		h = toyNext(h, adapter, t)
	}
	var answer []engine.Token
	for range n {
		t := engine.Token(h % toyVocabulary)
		answer = append(answer, t)
		h = toyNext(h, adapter, t)
	}
	return answer
}

// stream is a reader that generates n tokens greedily.
type stream struct {
	n     int
	times []time.Time // of its tokens
	steps []int       // the decoder's batches before each token
	d     *toyDecoder
	got   []engine.Token
	each  func(n int) // is called after each token; may be nil
}

func (s *stream) read(q *sequence, outputs [][]float32) (finished bool, spawned []*sequence) {
	t := argmax(outputs[len(outputs)-1], nil)
	q.tokens = append(q.tokens, t)
	q.from = len(q.tokens) - 1
	s.got = append(s.got, t)
	s.times, s.steps = append(s.times, time.Now()), append(s.steps, s.d.batches)
	if s.each != nil {
		s.each(len(s.got))
	}
	return len(s.got) == s.n, nil
}

// newToyScheduler starts a scheduler over a decoder; it is stopped with the test, or by stop.
func newToyScheduler(t testing.TB, d *toyDecoder, running int, adapterBytes int64) (s *scheduler, stop func()) {
	t.Helper()
	s = newScheduler(d, running, adapterBytes)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.run()
	}()
	return s, func() {
		s.stop()
		<-stopped
		s.free()
	}
}

// submit starts a stream; wait returns when the scheduler has let go of it.
func (s *stream) submit(ctx context.Context, sc *scheduler, client string, a *adapter, prompt []engine.Token) (r *request, err error) {
	s.d = sc.decoder.(*toyDecoder)
	r = newRequest(ctx, client, a, 1)
	return r, sc.submit(r, newSequence(r, append([]engine.Token(nil), prompt...), s))
}
