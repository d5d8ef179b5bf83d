package runner

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
)

func tokensFrom(random *rand.Rand, n int) []engine.Token {
	tokens := make([]engine.Token, n)
	for i := range tokens {
		tokens[i] = engine.Token(random.IntN(toyVocabulary))
	}
	return tokens
}

// Whatever is shared, cut, displaced, aborted and cancelled, every stream that ends says what it says alone, and afterwards
// nothing is held.
func TestSchedulerKeepsStreamsApart(t *testing.T) {
	t.Parallel()
	for name, make := range map[string]func() *toyDecoder{
		"mixed":     func() *toyDecoder { return newToyDecoder(16, 4096, 64, true) },
		"one":       func() *toyDecoder { return newToyDecoder(16, 4096, 64, false) },
		"crowded":   func() *toyDecoder { return newToyDecoder(16, 200, 64, true) },
		"few slots": func() *toyDecoder { return newToyDecoder(8, 4096, 64, true) },
		"whole": func() *toyDecoder {
			d := newToyDecoder(16, 400, 64, false)
			d.whole = true
			return d
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := make()
			s, stop := newToyScheduler(t, d, 8, 250) // of adapters of 100 bytes each
			random := rand.New(rand.NewPCG(3, 4))
			prefixes := [][]engine.Token{tokensFrom(random, 40), tokensFrom(random, 70), nil}
			var wg sync.WaitGroup
			cancelled := 0
			for i := range 300 {
				prompt := slices.Concat(prefixes[random.IntN(3)], tokensFrom(random, 1+random.IntN(30)))
				n, client, id := 1+random.IntN(12), fmt.Sprint("c", random.IntN(5)), random.IntN(5)
				at := -1
				if i%2 == 1 {
					at = random.IntN(8)
					cancelled++
				}
				wg.Go(func() {
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					path := ""
					var a *adapter
					if id > 0 {
						path = fmt.Sprint("adapter", id)
						a = s.loaded.acquire(child.Adapter{ID: path, Path: path})
						defer s.loaded.release(a)
					}
					st := &stream{n: n}
					if at == 0 {
						time.AfterFunc(time.Duration(len(prompt))*time.Microsecond, cancel)
					}
					st.each = func(n int) {
						if n == at {
							cancel()
						}
					}
					r, err := st.submit(ctx, s, client, a, prompt)
					if err != nil {
						t.Error(err)
						return
					}
					select {
					case <-r.done:
					case <-ctx.Done():
						s.notify()
						<-r.done
					}
					want := toyAnswer(path, prompt, n)
					if at < 0 && len(st.got) != n || !slices.Equal(st.got, want[:len(st.got)]) {
						t.Errorf("got %v, want %v", st.got, want)
					}
				})
			}
			wg.Wait()
			status := Status{}
			if err := s.do(t.Context(), func() {
				status = s.status()
				for _, slot := range s.slots {
					if slot.owner != nil || slot.held() != len(d.held[slot.number]) {
						t.Errorf("slot %d is owned by %v, holds %d tokens by the cache, %d by the decoder", slot.number, slot.owner, slot.held(), len(d.held[slot.number]))
					}
				}
				for name, c := range s.clients.byName {
					if c.running != 0 || c.waiting != 0 {
						t.Errorf("client %s still has %d running and %d waiting sequences", name, c.running, c.waiting)
					}
				}
			}); err != nil {
				t.Fatal(err)
			}
			if status.Running != 0 || status.Waiting != 0 {
				t.Errorf("after all: %+v", status)
			}
			if name == "crowded" && status.Displaced == 0 {
				t.Error("the cache was never full, so that was not tested")
			}
			if name == "mixed" && status.ReusedTokens == 0 {
				t.Error("no prefix was reused")
			}
			stop()
			if n := d.open.Load(); n != 0 {
				t.Errorf("%d adapters were not closed", n)
			}
		})
	}
}

// While a long prompt is computed, the time between the tokens of running streams stays under three times what it is
// alone, whatever a prompt's token costs.
func TestPace(t *testing.T) {
	t.Parallel()
	const promised = 3
	for _, c := range []struct {
		token time.Duration
		grows bool // with the context
	}{{time.Millisecond, false}, {300 * time.Microsecond, false}, {2 * time.Millisecond, false}, {500 * time.Microsecond, true}} {
		t.Run(fmt.Sprint(c.token, c.grows), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newToyDecoder(16, 10000, 512, true)
				d.cost = func(tokens, parts int) time.Duration {
					each := c.token
					if c.grows {
						each += each * time.Duration(d.used) / 2000
					}
					return 5*time.Millisecond + time.Duration(parts)*c.token + time.Duration(tokens-parts)*each
				}
				s, stop := newToyScheduler(t, d, 8, 1000)
				random := rand.New(rand.NewPCG(1, 1))
				streams := make([]*stream, 3)
				var requests []*request
				for i := range streams {
					streams[i] = &stream{n: 2000}
					r, _ := streams[i].submit(t.Context(), s, "a", nil, tokensFrom(random, 10))
					requests = append(requests, r)
				}
				time.Sleep(500 * time.Millisecond)
				long := &stream{n: 1}
				began := time.Now()
				r, _ := long.submit(t.Context(), s, "b", nil, tokensFrom(random, 4000))
				<-r.done
				took := time.Since(began)
				for _, r := range requests {
					<-r.done
				}
				alone, beside := time.Duration(0), time.Duration(0)
				for _, st := range streams {
					for i := 1; i < len(st.times); i++ {
						gap := st.times[i].Sub(st.times[i-1])
						switch {
						case st.times[i].Before(began):
							alone = max(alone, gap)
						case i > 2 && st.times[i-2].After(began) && st.times[i].Before(began.Add(took)):
							beside = max(beside, gap) // but for the first, before anything was measured
						}
					}
				}
				if beside == 0 || beside > promised*alone {
					t.Errorf("beside a long prompt a token took up to %v, alone %v", beside, alone)
				}
				// No slower than it must be: the prompt has a good part of the time.
				if least := time.Duration(4000) * c.token; !c.grows && took > 3*least {
					t.Errorf("the prompt took %v, alone it would take %v", took, least)
				}
				t.Logf("a token took %v alone, at most %v beside the prompt, which took %v", alone, beside, took)
				stop()
			})
		})
	}
}

// A client with a hundred requests does not delay another's first, and clients that always have requests get equal shares.
func TestFairness(t *testing.T) {
	t.Parallel()
	d := newToyDecoder(32, 10000, 128, true)
	s, stop := newToyScheduler(t, d, 4, 1000)
	defer stop()
	random := rand.New(rand.NewPCG(1, 1))
	ctx, cancel := context.WithCancel(t.Context())
	var many []*request
	begun := make(chan struct{}, 1000)
	for range 100 {
		st := &stream{n: 300, each: func(int) {
			select {
			case begun <- struct{}{}:
			default:
			}
		}}
		r, err := st.submit(ctx, s, "many", nil, tokensFrom(random, 50))
		if err != nil {
			t.Fatal(err)
		}
		many = append(many, r)
	}
	<-begun
	one := &stream{n: 5}
	var before int
	if err := s.do(t.Context(), func() { before = d.batches }); err != nil {
		t.Fatal(err)
	}
	r, err := one.submit(t.Context(), s, "one", nil, tokensFrom(random, 50))
	if err != nil {
		t.Fatal(err)
	}
	<-r.done
	// Its 50 tokens beside three streams, in chunks that the machine's load decides, and a batch that was under way.
	if steps := one.steps[0] - before; steps > 50/leastChunk*(refreshSteps+1)/refreshSteps+5 {
		t.Errorf("the first token of another client came after %d batches", steps)
	}
	// Two more clients that always have requests, of different lengths: as many tokens for each.
	var mu sync.Mutex
	served := map[string]int{}
	reached := make(chan float64, 1) // tokens of long for each of short, when short has half of its own
	var others []*request
	for range 60 {
		for client, length := range map[string]int{"long": 40, "short": 10} {
			st := &stream{n: length}
			prompt := tokensFrom(random, length)
			st.each = func(int) {
				mu.Lock()
				defer mu.Unlock()
				if served[client]++; client == "short" && served[client] == 300 {
					reached <- float64(served["long"]) / 300
				}
			}
			r, err := st.submit(ctx, s, client, nil, prompt)
			if err != nil {
				t.Fatal(err)
			}
			others = append(others, r)
		}
	}
	if ratio := <-reached; ratio < 0.6 || ratio > 1.7 {
		t.Errorf("%.2f tokens for the client with long requests for each of the one with short ones", ratio)
	}
	cancel()
	s.notify()
	for _, r := range slices.Concat(many, others) {
		<-r.done
	}
}

// Endless streams of as many clients as there are places do not keep another client out, and go on as if nothing had been.
func TestTurnsOfClients(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := newToyDecoder(16, 10000, 128, true)
		d.cost = func(tokens, parts int) time.Duration { return time.Millisecond }
		s, stop := newToyScheduler(t, d, 2, 1000)
		defer stop()
		ctx, cancel := context.WithCancel(t.Context())
		random := rand.New(rand.NewPCG(1, 1))
		var streams []*stream
		var prompts [][]engine.Token
		var requests []*request
		for _, client := range []string{"a", "b"} {
			st, prompt := &stream{n: 1 << 30}, tokensFrom(random, 5)
			r, err := st.submit(ctx, s, client, nil, prompt)
			if err != nil {
				t.Fatal(err)
			}
			streams, prompts, requests = append(streams, st), append(prompts, prompt), append(requests, r)
		}
		time.Sleep(100 * time.Millisecond)
		short, prompt := &stream{n: 10}, tokensFrom(random, 5)
		r, err := short.submit(t.Context(), s, "c", nil, prompt)
		if err != nil {
			t.Fatal(err)
		}
		<-r.done
		if !slices.Equal(short.got, toyAnswer("", prompt, 10)) {
			t.Errorf("the third client got %v", short.got)
		}
		if n := len(streams[0].got); n > 2*turnTokens {
			t.Errorf("it had to wait for %d tokens of the others", n)
		}
		time.Sleep(500 * time.Millisecond)
		cancel()
		s.notify()
		for i, r := range requests {
			<-r.done
			if got := streams[i].got; len(got) < turnTokens+100 || !slices.Equal(got, toyAnswer("", prompts[i], len(got))) {
				t.Errorf("stream %d has %d tokens, or other ones than alone", i, len(got))
			}
		}
	})
}

// Where a batch has one adapter, none waits for ever; and a bad one fails its own requests alone.
func TestTurns(t *testing.T) {
	t.Parallel()
	for _, mixed := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			d := newToyDecoder(16, 10000, 128, mixed)
			d.cost = func(tokens, parts int) time.Duration { return time.Millisecond }
			d.load = 30 * time.Millisecond
			s, stop := newToyScheduler(t, d, 4, 1000)
			defer stop()
			ctx, cancel := context.WithCancel(t.Context())
			random := rand.New(rand.NewPCG(1, 1))
			endless := &stream{n: 1 << 30}
			base, _ := endless.submit(ctx, s, "base", nil, tokensFrom(random, 5))
			time.Sleep(10 * time.Millisecond)
			bad := s.loaded.acquire(child.Adapter{ID: "bad", Path: "bad"})
			failing, _ := (&stream{n: 1}).submit(ctx, s, "a", bad, tokensFrom(random, 5))
			good := s.loaded.acquire(child.Adapter{ID: "good", Path: "good"})
			st := &stream{n: 10}
			prompt := tokensFrom(random, 5)
			r, _ := st.submit(ctx, s, "a", good, prompt)
			at := len(endless.got)
			<-r.done
			if !slices.Equal(st.got, toyAnswer("good", prompt, 10)) {
				t.Errorf("mixed %v: the adapter said %v", mixed, st.got)
			}
			// The running stream goes on while the adapter loads.
			if n := len(endless.got) - at; n < 25 {
				t.Errorf("mixed %v: the base model's stream had %d tokens meanwhile", mixed, n)
			}
			<-failing.done
			if err := failing.out.failure(); err == nil {
				t.Errorf("mixed %v: a bad adapter's request did not fail", mixed)
			}
			cancel()
			s.notify()
			<-base.done
			s.loaded.release(bad)
			s.loaded.release(good)
		})
	}
}

// Weights beyond the budget go when nobody holds them, those used longest ago first, and come back when they are asked for.
func TestAdapterBudget(t *testing.T) {
	t.Parallel()
	d := newToyDecoder(16, 10000, 128, true)
	s, stop := newToyScheduler(t, d, 4, 250)
	defer stop()
	ask := func(id string) {
		t.Helper()
		a := s.loaded.acquire(child.Adapter{ID: id, Path: id})
		defer s.loaded.release(a)
		st := &stream{n: 3}
		r, err := st.submit(t.Context(), s, "", a, []engine.Token{1, 2, 3})
		if err != nil {
			t.Fatal(err)
		}
		<-r.done
		if !slices.Equal(st.got, toyAnswer(id, []engine.Token{1, 2, 3}, 3)) {
			t.Errorf("adapter %s said %v", id, st.got)
		}
	}
	for _, id := range []string{"a", "b", "a", "c", "a", "d"} {
		ask(id)
	}
	ids, bytes := s.loaded.inMemory()
	if !slices.Equal(ids, []string{"a", "d"}) || bytes != 200 {
		t.Errorf("in memory: %v, %d bytes", ids, bytes)
	}
	ask("b")
	held := s.loaded.acquire(child.Adapter{ID: "b", Path: "b"})
	if !s.loaded.unload("b") || s.loaded.unload("b") {
		t.Error("unloading is reported wrongly")
	}
	if err := s.do(t.Context(), func() {}); err != nil || d.open.Load() != 2 {
		t.Errorf("%d adapters are open while one that was unloaded is in use, want 2", d.open.Load())
	}
	s.loaded.release(held)
	if err := s.do(t.Context(), func() {}); err != nil || d.open.Load() != 1 {
		t.Errorf("%d adapters are open after its last user, want 1", d.open.Load())
	}
}
