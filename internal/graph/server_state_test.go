package graph_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/engine/enginetest"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/modeltest"
)

// TestServerSequences drives a small cache with random batches, shares and truncations. Whatever a sequence holds by then,
// the last token's logits are those of the same tokens computed at once in an empty server.
func TestServerSequences(t *testing.T) {
	path := enginetest.Models[0].Write(t)
	fresh := newServer(t, path, graph.ServerOptions{Threads: 1, Sequences: 1, CacheTokens: 512})
	const sequences, cells = 6, 300
	rapid.Check(t, func(rt *rapid.T) {
		s := newServer(t, path, graph.ServerOptions{Threads: rapid.IntRange(1, 3).Draw(rt, "threads"), Sequences: sequences, CacheTokens: cells, BatchTokens: 64})
		defer s.Close()
		held := make([][]engine.Token, sequences)
		sequence := func(name string) int { return rapid.IntRange(0, sequences-1).Draw(rt, name) }
		rt.Repeat(map[string]func(*rapid.T){
			"decode": func(rt *rapid.T) {
				var parts []engine.Part
				left, before := 64, s.FreeTokens()
				for _, i := range rapid.Permutation([]int{0, 1, 2, 3, 4, 5}).Draw(rt, "order")[:rapid.IntRange(1, 6).Draw(rt, "parts")] {
					n := min(left-6, rapid.IntRange(1, 40).Draw(rt, "tokens"))
					if n < 1 {
						break
					}
					left -= n
					tokens := rapid.SliceOfN(rapid.Custom(func(rt *rapid.T) engine.Token { return engine.Token(rapid.IntRange(0, 100).Draw(rt, "token")) }), n, n).Draw(rt, "tokens")
					parts = append(parts, engine.Part{Sequence: engine.Sequence(i), Position: len(held[i]), Tokens: tokens, Want: engine.WantLast})
				}
				err := s.Decode(parts)
				if errors.Is(err, engine.ErrNoRoom) {
					if 64-left <= before || s.FreeTokens() != before {
						rt.Fatalf("no room for %d tokens; %d were free and %d are", 64-left, before, s.FreeTokens())
					}
					return
				}
				if err != nil {
					rt.Fatal(err)
				}
				for i, p := range parts {
					held[p.Sequence] = append(slices.Clone(held[p.Sequence]), p.Tokens...)
					got := slices.Clone(s.Output(i, 0))
					fresh.Truncate(0, 0)
					if err := fresh.Decode([]engine.Part{{Tokens: held[p.Sequence], Want: engine.WantLast}}); err != nil {
						rt.Fatal(err)
					}
					if !slices.Equal(got, fresh.Output(0, 0)) {
						rt.Fatalf("sequence %d of %d tokens has other logits than alone", p.Sequence, len(held[p.Sequence]))
					}
				}
			},
			"share": func(rt *rapid.T) {
				from, to := sequence("from"), sequence("to")
				n := rapid.IntRange(0, len(held[from])).Draw(rt, "n")
				may := from != to && len(held[to]) == 0
				if s.Share(engine.Sequence(from), engine.Sequence(to), n) != may {
					rt.Fatalf("share %d tokens of %d with %d, which holds %d", n, from, to, len(held[to]))
				}
				if may {
					held[to] = held[from][:n:n]
				}
			},
			"truncate": func(rt *rapid.T) {
				i := sequence("sequence")
				n := rapid.IntRange(0, len(held[i])).Draw(rt, "n")
				if !s.Truncate(engine.Sequence(i), n) {
					rt.Fatal("not truncated")
				}
				held[i] = held[i][:n:n]
			},
		})
		for i := range sequences {
			s.Truncate(engine.Sequence(i), 0)
		}
		if free := s.FreeTokens(); free != cells {
			rt.Fatalf("%d cells are free in the end, expected %d", free, cells)
		}
	})
}

// TestServerNoRoom: what FreeTokens promises fits, and a batch that does not fit changes nothing.
func TestServerNoRoom(t *testing.T) {
	path := enginetest.Models[0].Write(t)
	s := newServer(t, path, graph.ServerOptions{Threads: 2, Sequences: 64, CacheTokens: 640, BatchTokens: 640})
	var parts []engine.Part
	for i := range engine.Sequence(64) {
		parts = append(parts, engine.Part{Sequence: i, Tokens: randomTokens(uint64(i), 101, 10), Want: engine.WantLast})
	}
	if free := s.FreeTokens(); free != 640 {
		t.Fatalf("%d tokens are free, expected 640", free)
	}
	before := decode(t, s, parts...)
	// The first sequence takes the rest of the cache.
	var err error
	held := 10
	for ; err == nil; held += 16 {
		if held > 5000 {
			t.Fatalf("%d tokens are in a cache of 640", held)
		}
		err = s.Decode([]engine.Part{{Position: held, Tokens: randomTokens(1, 101, 16)}})
	}
	held -= 16
	if !errors.Is(err, engine.ErrNoRoom) || held < 16 {
		t.Fatalf("%v at %d tokens, expected ErrNoRoom", err, held)
	}
	var next []engine.Part
	for i := range engine.Sequence(63) {
		next = append(next, engine.Part{Sequence: i + 1, Position: 10, Tokens: []engine.Token{5}, Want: engine.WantLast})
	}
	if err := s.Decode(append(slices.Clone(next), engine.Part{Position: held, Tokens: randomTokens(1, 101, 16)})); !errors.Is(err, engine.ErrNoRoom) {
		t.Fatalf("%v, expected ErrNoRoom", err)
	}
	after := decode(t, s, next...)
	for i := range 64 {
		s.Truncate(engine.Sequence(i), 0)
	}
	for i, p := range parts[1:] {
		whole := decode(t, s, engine.Part{Tokens: append(slices.Clone(p.Tokens), 5), Want: engine.WantAll})[0]
		same(t, "the first tokens", before[i+1], whole[9:10])
		same(t, "the next one", after[i], whole[10:])
		s.Truncate(0, 0)
	}
	if free := s.FreeTokens(); free != 640 {
		t.Errorf("%d tokens are free in the end, expected 640", free)
	}
}

// TestServerRefuses: batches and files that cannot be computed are errors, before anything changes.
func TestServerRefuses(t *testing.T) {
	path := enginetest.Models[0].Write(t)
	s := newServer(t, path, graph.ServerOptions{Sequences: 2, CacheTokens: 64, BatchTokens: 32})
	one := []engine.Token{1}
	for name, parts := range map[string][]engine.Part{
		"nothing":        nil,
		"no tokens":      {{}},
		"sequence":       {{Sequence: 2, Tokens: one}},
		"negative":       {{Sequence: -1, Tokens: one}},
		"position":       {{Position: 1, Tokens: one}},
		"token":          {{Tokens: []engine.Token{101}}},
		"twice":          {{Tokens: one}, {Position: 1, Tokens: one}},
		"too many":       {{Tokens: randomTokens(1, 101, 33)}},
		"foreign":        {{Tokens: one, Adapter: foreign{}}},
		"negative token": {{Tokens: []engine.Token{-1}}},
	} {
		if err := s.Decode(parts); err == nil {
			t.Errorf("%s: no error", name)
		}
		if s.FreeTokens() != 64 {
			t.Errorf("%s: %d tokens are free", name, s.FreeTokens())
		}
	}
	if s.Output(0, 0) != nil || s.Output(-1, 0) != nil {
		t.Error("output of a refused batch")
	}
	if s.Truncate(2, 0) || s.Truncate(0, -1) || s.Share(0, 2, 0) || s.Share(0, 0, 0) || s.Share(0, 1, 1) {
		t.Error("a sequence or length that is not there")
	}
	if _, err := s.LoadAdapter(path); err == nil {
		t.Error("a model was loaded as an adapter")
	}
	if _, err := graph.ServerBytes(openFile(t, path), graph.ServerOptions{CacheType: 8}); !errorIs[*graph.UnsupportedError](err) {
		t.Errorf("%v: expected that heads of 16 elements do not fit q8_0", err)
	}
}

type foreign struct{}

func (foreign) Bytes() int { return 0 }
func (foreign) Close()     {}

func errorIs[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// TestServerAbort aborts batches at random moments from another goroutine; afterwards everything is as if they had never been.
func TestServerAbort(t *testing.T) {
	s := newServer(t, modeltest.Path(t), graph.ServerOptions{Threads: 2, Sequences: 2, CacheTokens: 1024})
	tokens := randomTokens(6, 40000, 60)
	want := decode(t, s, engine.Part{Tokens: tokens, Want: engine.WantLast})[0]
	s.Truncate(0, 0)
	aborted := 0
	for i := range 12 {
		var wait sync.WaitGroup
		wait.Go(func() {
			time.Sleep(time.Duration(i) * 3 * time.Millisecond)
			s.Abort()
		})
		err := s.Decode([]engine.Part{{Tokens: tokens, Want: engine.WantLast}})
		wait.Wait()
		if err != nil && !errors.Is(err, engine.ErrAborted) {
			t.Fatal(err)
		}
		if err != nil {
			aborted++
			if s.Output(0, 0) != nil {
				t.Error("output of an aborted batch")
			}
		}
		s.Truncate(0, 0)
		if err := s.Decode([]engine.Part{{Tokens: tokens}}); !errors.Is(err, engine.ErrAborted) {
			t.Fatalf("%v: expected ErrAborted until ResetAbort", err)
		}
		s.ResetAbort()
		s.Truncate(0, 0)
		same(t, fmt.Sprintf("after abort %d", i), decode(t, s, engine.Part{Tokens: tokens, Want: engine.WantLast})[0], want)
		s.Truncate(0, 0)
	}
	if aborted == 0 {
		t.Error("no batch was aborted")
	}
	if free := s.FreeTokens(); free != 1024 {
		t.Errorf("%d tokens are free", free)
	}
}

// TestServerAdapterLifetime loads and closes adapters in another goroutine while batches with and without them run.
func TestServerAdapterLifetime(t *testing.T) {
	path := modeltest.Path(t)
	file := openFile(t, path)
	s := newServer(t, path, graph.ServerOptions{Threads: 2, Sequences: 4, CacheTokens: 1024})
	lora, adapterPath := writeAdapter(t, load(t, path, graph.ExactLayout()), file, 1, 0.02, graph.LoRAOptions{Rank: 8, Alpha: 16, Modules: graph.AllLinear})
	defer lora.Close()
	a, err := s.LoadAdapter(adapterPath)
	if err != nil {
		t.Fatal(err)
	}
	if want := 4 * len(lora.Parameters) / 2; a.Bytes() < want || a.Bytes() > want*11/10 { // the trainer pads the rank to 16
		t.Errorf("%d bytes, expected about %d", a.Bytes(), want)
	}
	stop, best := make(chan struct{}), time.Hour
	var wait sync.WaitGroup
	wait.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			start := time.Now()
			other, err := s.LoadAdapter(adapterPath)
			best = min(best, time.Since(start))
			if err != nil {
				t.Error(err)
				return
			}
			other.Close()
		}
	})
	tokens := randomTokens(7, 40000, 20)
	var want [][][]float32
	for range 6 {
		s.Truncate(0, 0)
		s.Truncate(1, 0)
		got := decode(t, s, engine.Part{Tokens: tokens, Want: engine.WantLast, Adapter: a}, engine.Part{Sequence: 1, Tokens: tokens, Want: engine.WantLast})
		if want != nil {
			same(t, "with the adapter", got[0], want[0])
			same(t, "without", got[1], want[1])
		}
		want = got
	}
	close(stop)
	wait.Wait()
	t.Logf("an adapter of %d bytes was loaded in %v", a.Bytes(), best)
	a.Close()
	a.Close()
	if err := s.Decode([]engine.Part{{Sequence: 2, Tokens: tokens, Adapter: a}}); err == nil {
		t.Error("a closed adapter was used")
	}
}
