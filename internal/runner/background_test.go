package runner

import (
	"context"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hone-llm/hone/internal/engine"
)

// background submits a stream that yields.
func (s *stream) background(ctx context.Context, sc *scheduler, prompt []engine.Token) (*request, error) {
	s.d = sc.decoder.(*toyDecoder)
	r := newRequest(ctx, "batch", nil, 1)
	r.background = true
	return r, sc.submit(r, newSequence(r, slices.Clone(prompt), s))
}

// The background has all batches while it is alone, one of backgroundSteps beside endless streams that hold every place, and
// takes no place from them; what it says does not depend on it.
func TestBackgroundYields(t *testing.T) {
	t.Parallel()
	for name, d := range map[string]*toyDecoder{
		"mixed":   newToyDecoder(16, 10000, 128, true),
		"one":     newToyDecoder(16, 10000, 128, false),
		"crowded": newToyDecoder(16, 1200, 128, true),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				d.abort = make(chan struct{}, 1)
				d.cost = func(tokens, parts int) time.Duration { return time.Millisecond }
				s, stop := newToyScheduler(t, d, 4, 1000)
				defer stop()
				ctx, cancel := context.WithCancel(t.Context())
				random := rand.New(rand.NewPCG(1, 1))
				var requests []*request
				var rows []*stream
				var prompts [][]engine.Token
				for range 4 {
					st, prompt := &stream{n: 1 << 30}, tokensFrom(random, 20)
					r, err := st.background(ctx, s, prompt)
					if err != nil {
						t.Fatal(err)
					}
					requests, rows, prompts = append(requests, r), append(rows, st), append(prompts, prompt)
				}
				time.Sleep(200 * time.Millisecond)
				alone := len(rows[0].got)
				if alone < 150 {
					t.Errorf("alone, the background had %d tokens in 200 batches", alone)
				}
				var streams []*stream
				began := d.batches
				for range 4 {
					st := &stream{n: 1 << 30}
					r, err := st.submit(ctx, s, "user", nil, tokensFrom(random, 20))
					if err != nil {
						t.Fatal(err)
					}
					streams, requests = append(streams, st), append(requests, r)
				}
				time.Sleep(200 * time.Millisecond)
				for i, st := range streams {
					// A batch that was under way, and the four prompts, a quarter of a batch each.
					if len(st.steps) == 0 || st.steps[0]-began > 5 {
						t.Fatalf("the first token of stream %d came after %v batches", i, st.steps)
					}
					if n := len(st.got); n < d.batches-began-12 {
						t.Errorf("stream %d had %d tokens in %d batches", i, n, d.batches-began)
					}
				}
				beside := len(rows[0].got) - alone
				if most := (d.batches-began)/backgroundSteps + 2; beside < 3 || beside > most {
					t.Errorf("beside streams, the background had %d tokens in %d batches, want 3 to %d", beside, d.batches-began, most)
				}
				cancel()
				s.notify()
				for _, r := range requests {
					<-r.done
				}
				for i, st := range rows {
					if !slices.Equal(st.got, toyAnswer("", prompts[i], len(st.got))) {
						t.Errorf("row %d has other tokens than alone", i)
					}
				}
			})
		})
	}
}

// After a request that is not of the background, prompts of the background are computed in small pieces for a while.
func TestBackgroundPrompts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := newToyDecoder(16, 100000, 512, true)
		most := 0
		d.cost = func(tokens, parts int) time.Duration {
			most = max(most, tokens)
			return time.Millisecond
		}
		s, stop := newToyScheduler(t, d, 4, 1000)
		defer stop()
		random := rand.New(rand.NewPCG(1, 1))
		ask := func() {
			t.Helper()
			most = 0
			r, err := (&stream{n: 1}).background(t.Context(), s, tokensFrom(random, 2000))
			if err != nil {
				t.Fatal(err)
			}
			<-r.done
		}
		if ask(); most != 512 {
			t.Errorf("a prompt of the background, with nobody here, had at most %d tokens in a batch", most)
		}
		r, err := (&stream{n: 1}).submit(t.Context(), s, "user", nil, tokensFrom(random, 5))
		if err != nil {
			t.Fatal(err)
		}
		<-r.done
		if ask(); most > backgroundChunk+1 {
			t.Errorf("after a user's request it had %d", most)
		}
		time.Sleep(2 * recently)
		if ask(); most != 512 {
			t.Errorf("long after it, it had %d", most)
		}
	})
}
