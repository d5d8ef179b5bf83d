package runner

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/child"
)

// held is what a runner's process holds.
type held struct{ goroutines, files, resident int }

func measureHeld(t *testing.T) held {
	t.Helper()
	debug.FreeOSMemory()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(statm))[1])
	if err != nil {
		t.Fatal(err)
	}
	return held{runtime.NumGoroutine(), len(files), pages * os.Getpagesize()}
}

// A thousand streams over HTTP, of the base model and two adapters, free and constrained, half of them cancelled at a
// random point: the others say what they say alone, and afterwards everything is given back.
func TestThousandStreams(t *testing.T) {
	const streams, inFlight = 1000, 200
	const slack = 48 << 20 // bytes: Go's heap and C's arenas do not shrink at once; a leak of 50 KB a stream would show
	r, err := New(Options{ModelDir: modelDir(t), ContextTokens: 256, Sequences: 16, Threads: 2, CacheTokens: 2048})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	server := httptest.NewServer(r.Handler())
	defer server.Close()
	adapters := []*child.Adapter{nil, nil, {ID: "one", Path: randomAdapter(t, 5)}, {ID: "two", Path: randomAdapter(t, 6)}}
	random := rand.New(rand.NewPCG(8, 9))
	var kinds []child.GenerateRequest
	for i := range 40 {
		text := series[i%len(series)] + " " + strings.Repeat(fmt.Sprint(i, " "), i%4)
		req := child.GenerateRequest{Prompt: &text, MaxTokens: 4 + i%6, TopP: 1, Adapter: adapters[i%4], Client: fmt.Sprint("client", i%3)}
		switch i % 7 {
		case 3:
			req.Constraint = choose("red", "blue and green", "blue")
		case 5:
			req.Constraint = &child.Constraint{Kind: child.ConstraintRegex, Text: "[a-z ]{3,20}"}
		case 6:
			req.N = 2
		}
		kinds = append(kinds, req)
	}
	// say asks over HTTP and cancels with the event number at; -1: never.
	say := func(req child.GenerateRequest, at int, after time.Duration) (texts [2]string, finished bool, err error) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		if at == 0 {
			timer := time.AfterFunc(after, cancel)
			defer timer.Stop()
		}
		body, err := json.Marshal(req)
		if err != nil {
			return texts, false, err
		}
		post, err := http.NewRequestWithContext(ctx, http.MethodPost, server.URL+"/generate", bytes.NewReader(body))
		if err != nil {
			return texts, false, err
		}
		response, err := server.Client().Do(post)
		if err != nil {
			return texts, false, err
		}
		defer response.Body.Close()
		lines := bufio.NewScanner(response.Body)
		for n := 1; lines.Scan(); n++ {
			var e child.GenerateEvent
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				return texts, false, err
			}
			if e.Error != nil {
				return texts, false, e.Error
			}
			texts[e.Index] += e.Text
			finished = e.Usage != nil
			if n == at {
				cancel()
			}
		}
		return texts, finished, lines.Err()
	}
	want := make([][2]string, len(kinds))
	for i, req := range kinds {
		var finished bool
		if want[i], finished, err = say(req, -1, 0); err != nil || !finished {
			t.Fatalf("alone, stream %d: %v, finished %v", i, err, finished)
		}
	}
	var mu sync.Mutex
	survivors, broken := 0, 0
	run := func(n int) {
		var wg sync.WaitGroup
		places := make(chan struct{}, inFlight)
		for i := range n {
			kind, at, after := random.IntN(len(kinds)), -1, time.Duration(random.IntN(200))*time.Millisecond
			if i%2 == 1 {
				at = random.IntN(6)
			}
			places <- struct{}{}
			wg.Go(func() {
				defer func() { <-places }()
				got, finished, err := say(kinds[kind], at, after)
				mu.Lock()
				defer mu.Unlock()
				if at >= 0 && !finished {
					broken++
					return
				}
				survivors++
				if err != nil && at < 0 || got != want[kind] {
					t.Errorf("stream of kind %d: %q and %v, alone %q", kind, got, err, want[kind])
				}
			})
		}
		wg.Wait()
		server.CloseClientConnections()
		server.Client().CloseIdleConnections()
	}
	run(100) // fills the cache, and what the libraries keep
	idle := func() held {
		// Cancelled requests have left within a batch, connections soon after.
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if s, err := r.Status(t.Context()); err == nil && s.Running+s.Waiting == 0 && s.Places == 16+defaultQueue {
				break
			}
		}
		now := measureHeld(t)
		for range 100 { // connections are being closed
			time.Sleep(20 * time.Millisecond)
			next := measureHeld(t)
			if next.goroutines >= now.goroutines && next.files >= now.files {
				return next
			}
			now = next
		}
		return now
	}
	before := idle()
	survivors, broken = 0, 0
	began := time.Now()
	run(streams)
	after := idle()
	status, err := r.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d streams in %v: %d went to their end, %d were broken off; before %+v, after %+v; %+v", streams, time.Since(began), survivors, broken, before, after, status)
	if status.Running != 0 || status.Waiting != 0 || status.Places != 16+defaultQueue {
		t.Errorf("after all: %+v", status)
	}
	if survivors < streams/2 || broken < streams/8 {
		t.Errorf("%d streams went to their end, %d were broken off", survivors, broken)
	}
	if after.goroutines > before.goroutines+2 || after.files > before.files+2 || after.resident > before.resident+slack {
		t.Errorf("before %+v, after %+v", before, after)
	}
	if err := r.scheduler.do(t.Context(), func() {
		for _, slot := range r.scheduler.slots {
			if slot.owner != nil {
				t.Errorf("sequence %d has an owner", slot.number)
			}
			r.scheduler.clear(slot)
		}
		if free, all := r.scheduler.decoder.FreeTokens(), r.scheduler.limits.CacheTokens; free != all || len(r.scheduler.cache.roots) != 0 {
			t.Errorf("with nothing cached, %d of %d cells are free and %d trees are left", free, all, len(r.scheduler.cache.roots))
		}
	}); err != nil {
		t.Fatal(err)
	}
}

// open are prompts after which the model hesitates between words.
var open = []string{
	"Once upon a time", "The meaning of life is", "My favourite dish is", "In the year 2050,", "The doctor said that", "Dear Sir or Madam,",
	"Three reasons to learn a language:", "It was raining when", "The best thing about music is", "从前有一个人，", "A poem about the sea:", "If I were a bird,",
}

// Greedy text is the same alone and in a full batch: always with the own engine, whose bits do not depend on the batch;
// with llama.cpp but where the two best logits lie closer together than its rounding.
func TestGreedyInFullBatch(t *testing.T) {
	for _, c := range []struct {
		engine string
		gap    float64 // between the two best log-probabilities where the texts part
	}{{engineOwn, 0}, {engineLlama, 0.5}} {
		t.Run(c.engine, func(t *testing.T) {
			r, err := New(Options{ModelDir: modelDir(t), ContextTokens: 512, Sequences: len(open), Threads: 2, Engine: c.engine})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			request := func(text string) child.GenerateRequest {
				return child.GenerateRequest{Prompt: &text, MaxTokens: 12, LogProbs: true, TopLogProbs: 2}
			}
			alone, together := make([]answer, len(open)), make([]answer, len(open))
			for i, text := range open {
				alone[i] = ask(t, r, request(text))
			}
			if err := r.scheduler.do(t.Context(), func() { // so that prompts are computed in the batch
				for _, slot := range r.scheduler.slots {
					r.scheduler.clear(slot)
				}
			}); err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for i, text := range open {
				wg.Go(func() { together[i], _ = generate(t.Context(), r, request(text)) })
			}
			wg.Wait()
			different, tokens, rounding := 0, 0, 0.0
			for i := range open {
				for j, want := range alone[i].LogProbs {
					if j >= len(together[i].LogProbs) {
						t.Errorf("%q: together %q, alone %q", open[i], together[i].Text, alone[i].Text)
						break
					}
					got := together[i].LogProbs[j]
					if got.Token == want.Token {
						tokens++
						rounding = max(rounding, want.LogProb-got.LogProb, got.LogProb-want.LogProb)
						continue
					}
					different++
					gap := want.Top[0].LogProb - want.Top[1].LogProb
					t.Logf("%q: token %d is %q alone and %q together; the two best are %.3f apart", open[i], j, want.Token, got.Token, gap)
					if gap > c.gap {
						t.Errorf("%q: the texts part at token %d, where the two best are %.3f apart, more than %.3f", open[i], j, gap, c.gap)
					}
					break // what follows follows from that
				}
			}
			if c.engine == engineOwn && rounding != 0 {
				t.Errorf("the log-probabilities differ by up to %v, want the same bits", rounding)
			}
			t.Logf("%d of %d texts part after %d equal tokens; log-probabilities differ by up to %.3g", different, len(open), tokens, rounding)
		})
	}
}

// Requests of the base model and of several adapters in one batch each say what they say alone.
func TestAdaptersInOneBatch(t *testing.T) {
	r := sharedRunner(t)
	adapters := []*child.Adapter{nil, {ID: "x", Path: randomAdapter(t, 21)}, {ID: "y", Path: randomAdapter(t, 22)}, {ID: "z", Path: randomAdapter(t, 23)}}
	request := func(i int) child.GenerateRequest {
		return child.GenerateRequest{Prompt: &open[i/2], MaxTokens: 8, Adapter: adapters[i%4], LogProbs: true}
	}
	want := make([]answer, 8)
	texts := map[string]bool{}
	for i := range want {
		want[i] = ask(t, r, request(i))
		texts[want[i].Text] = true
	}
	if len(texts) < 6 {
		t.Errorf("the adapters change too little for this test: %d different texts", len(texts))
	}
	before, err := r.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range want {
		wg.Go(func() {
			got, err := generate(t.Context(), r, request(i))
			if err != nil || got.Text != want[i].Text || !slices.EqualFunc(got.LogProbs, want[i].LogProbs, func(a, b child.TokenLogProb) bool { return a.LogProb == b.LogProb }) {
				t.Errorf("request %d in a mixed batch: %q, %v; alone %q", i, got.Text, err, want[i].Text)
			}
		})
	}
	wg.Wait()
	after, err := r.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// 64 tokens one sequence at a time would take as many batches.
	if n := after.Decodes - before.Decodes; n > 50 {
		t.Errorf("64 tokens of 8 sequences took %d batches", n)
	}
	for _, a := range adapters[1:] {
		r.UnloadAdapter(a.ID)
	}
}

// Adapters beyond the budget come and go beside a running stream, which says what it says alone. How long loading and
// dropping one takes is logged: the promise is 50 ms.
func TestAdaptersComeAndGo(t *testing.T) {
	var paths []string
	for i := range 4 {
		paths = append(paths, randomAdapter(t, uint64(51+i)))
	}
	r, err := New(Options{ModelDir: modelDir(t), ContextTokens: 512, Sequences: 2, Threads: 1, AdapterBytes: 1}) // none may idle
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	stream := child.GenerateRequest{Prompt: &open[0], MaxTokens: 200, IgnoreEOS: true}
	want := ask(t, r, stream)
	text := make(chan answer, 1)
	go func() { a, _ := generate(t.Context(), r, stream); text <- a }()
	first := map[string]string{}
	for range 2 {
		for i, path := range paths {
			got := ask(t, r, child.GenerateRequest{Prompt: &open[1], MaxTokens: 2, Adapter: &child.Adapter{ID: fmt.Sprint(i), Path: path}})
			if before, ok := first[path]; ok && before != got.Text {
				t.Errorf("adapter %d loaded again says %q, at first %q", i, got.Text, before)
			}
			first[path] = got.Text
		}
	}
	if got := <-text; got.Text != want.Text {
		t.Errorf("beside adapters that come and go %q, alone %q", got.Text, want.Text)
	}
	if s, err := r.Status(t.Context()); err != nil || len(s.Adapters) != 0 || s.AdapterBytes != 0 {
		t.Errorf("beyond the budget: %+v, %v", s, err)
	}
	best := time.Hour
	for _, path := range paths {
		began := time.Now()
		a, err := r.scheduler.loaded.load(path, "")
		if err != nil {
			t.Fatal(err)
		}
		a.Close()
		best = min(best, time.Since(began))
	}
	t.Logf("an adapter is loaded and dropped in %v", best)
}

// A prompt of 4,000 tokens does not stall the streams beside it.
func TestLongPromptBesideStreams(t *testing.T) {
	// The promise is three times; what else runs on the machine comes on top.
	const bound = 3.5
	r, err := New(Options{ModelDir: modelDir(t), ContextTokens: 4608, Sequences: 4, Threads: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	words := strings.Fields("river stone light under seven garden letter north winter copper morning island music paper cloud silver forest window")
	random := rand.New(rand.NewPCG(1, 2))
	best := 0.0
	for attempt := range 2 {
		var text strings.Builder
		for range 3900 {
			text.WriteString(words[random.IntN(len(words))] + " ")
		}
		long := text.String()
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex
		var times [2][]time.Time
		var wg sync.WaitGroup
		for i := range times {
			wg.Go(func() {
				prompt := open[i]
				_ = r.Generate(ctx, child.GenerateRequest{Prompt: &prompt, TopP: 1, IgnoreEOS: true}, func(child.GenerateEvent) error {
					mu.Lock()
					times[i] = append(times[i], time.Now())
					mu.Unlock()
					return nil
				})
			})
		}
		gaps := func(from, to time.Time) float64 {
			mu.Lock()
			defer mu.Unlock()
			var gaps []float64
			for _, ts := range times {
				for i := 1; i < len(ts); i++ {
					if ts[i-1].After(from) && ts[i].Before(to) {
						gaps = append(gaps, ts[i].Sub(ts[i-1]).Seconds())
					}
				}
			}
			slices.Sort(gaps)
			if len(gaps) < 20 {
				t.Fatalf("only %d tokens of the streams", len(gaps))
			}
			return gaps[len(gaps)/2]
		}
		begin := time.Now()
		time.Sleep(1500 * time.Millisecond)
		alone := gaps(begin.Add(300*time.Millisecond), time.Now())
		begin = time.Now()
		a := ask(t, r, child.GenerateRequest{Prompt: &long, MaxTokens: 1})
		beside := gaps(begin, time.Now())
		took := time.Since(begin)
		cancel()
		wg.Wait()
		ratio := beside / alone
		t.Logf("attempt %d: a token every %.1f ms alone, every %.1f ms beside a prompt of %d tokens (%v): %.2f times", attempt, alone*1e3, beside*1e3, a.Usage.PromptTokens, took, ratio)
		if best == 0 || ratio < best {
			best = ratio
		}
		if best <= bound {
			return
		}
	}
	t.Errorf("the time between two tokens of a stream was at best %.2f times what it is alone", best)
}

// A request that is cancelled, whatever is being done for it, has left after one batch, and the stream beside it says
// what it says alone.
func TestCancelAtEveryStage(t *testing.T) {
	r, err := New(Options{ModelDir: modelDir(t), ContextTokens: 1024, Sequences: 2, Threads: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	stream := child.GenerateRequest{Prompt: &open[0], MaxTokens: 400, TopP: 1, IgnoreEOS: true, Client: "survivor"}
	want := ask(t, r, stream)
	long := strings.Repeat("all different 1 2 3 ", 100)
	short := "Count:"
	running := func(n int) func(Status) bool { return func(s Status) bool { return s.Running >= n } }
	text := make(chan answer, 1)
	beside := func() { a, _ := generate(t.Context(), r, stream); text <- a }
	go beside()
	for name, c := range map[string]struct {
		req   child.GenerateRequest
		embed bool
		at    func(Status) bool // when it is cancelled; nil: with its first event
		fill  bool              // all places are taken
	}{
		"before":   {req: child.GenerateRequest{Prompt: &short}, at: func(Status) bool { return true }},
		"queued":   {req: child.GenerateRequest{Prompt: &short}, at: func(s Status) bool { return s.Waiting > 0 }, fill: true},
		"prompt":   {req: child.GenerateRequest{Prompt: &long}, at: running(2)},
		"decode":   {req: child.GenerateRequest{Prompt: &short, IgnoreEOS: true}},
		"adapter":  {req: child.GenerateRequest{Prompt: &short, IgnoreEOS: true, Adapter: &child.Adapter{ID: "a", Path: randomAdapter(t, 31)}}, at: func(s Status) bool { return s.Running+s.Waiting > 1 }},
		"choices":  {req: child.GenerateRequest{Prompt: &long, Constraint: choose("one and two", "two and three", "three and four")}, at: running(2)},
		"several":  {req: child.GenerateRequest{Prompt: &short, N: 8, IgnoreEOS: true}},
		"scoring":  {req: child.GenerateRequest{Prompt: &long, PromptOnly: true, Echo: true, LogProbs: true}, at: running(2)},
		"embedded": {embed: true, at: running(2)},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		var others sync.WaitGroup
		fill, stop := context.WithCancel(t.Context())
		if c.fill {
			for i := range 2 {
				others.Go(func() {
					_ = r.Generate(fill, child.GenerateRequest{Prompt: &open[1+i], TopP: 1, IgnoreEOS: true, Client: "survivor"}, func(child.GenerateEvent) error { return nil })
				})
			}
			for s := (Status{}); s.Waiting < 1; s, _ = r.Status(t.Context()) {
			}
		}
		ended, first := make(chan error, 1), make(chan struct{}, 1)
		go func() {
			if c.embed {
				_, err := r.Embed(ctx, child.EmbedRequest{Inputs: []child.Input{{Text: long}}})
				ended <- err
				return
			}
			c.req.TopP = 1
			ended <- r.Generate(ctx, c.req, func(child.GenerateEvent) error {
				select {
				case first <- struct{}{}:
				default:
				}
				return nil
			})
		}()
		if c.at == nil {
			<-first
		}
		for c.at != nil {
			s, err := r.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if c.at(s) {
				break
			}
		}
		cancel()
		before, err := r.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		left := 1 // the survivor
		if c.fill {
			left += 2
		}
		// Statuses are taken between batches. However late this goroutine runs: one that still has it is at most one batch later.
		for s := before; s.Running+s.Waiting > left; {
			if n := s.Decodes - before.Decodes; n > 1 {
				t.Errorf("%s: the request is still there %d batches after it was cancelled", name, n)
				break
			}
			if s, err = r.Status(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("%s: ended with %v, want it cancelled", name, err)
		}
		stop()
		others.Wait()
	}
	r.UnloadAdapter("a")
	if got := <-text; got.Text != want.Text {
		t.Errorf("beside cancelled requests %q, alone %q", got.Text, want.Text)
	}
	if s, err := r.Status(t.Context()); err != nil || s.Running != 0 || s.Waiting != 0 {
		t.Errorf("after all: %+v, %v", s, err)
	}
}
