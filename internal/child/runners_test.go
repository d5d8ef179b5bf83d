package child

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// base names a model of the small runner, whose directory is orders for it.
func base(name, orders string) Base { return Base{Name: name, Dir: orders, Digest: name} }

// stateOf is the state of a model; the zero value is of one that has no runner.
func stateOf(r *Runners, name string) ModelState {
	states := r.Models()
	if i := slices.IndexFunc(states, func(s ModelState) bool { return s.Model == name }); i >= 0 {
		return states[i]
	}
	return ModelState{}
}

func runnerOf(r *Runners, b Base) *Runner {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.models[b].life.runner
}

// eventually waits until something holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// say is collect of a prompt that must be answered.
func say(t *testing.T, r *Runners, b Base, prompt string) {
	t.Helper()
	if text, _, err := collect(t.Context(), r, b, prompt); err != nil || text != prompt+" " {
		t.Errorf("%s answers %q to %q, %v", b.Name, text, prompt, err)
	}
}

func TestIdleRunnerEnds(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{IdleTimeout: 300 * time.Millisecond})
	b := base("a", "")
	say(t, r, b, "one")
	pid := stateOf(r, "a").PID
	say(t, r, b, "sleep sleep sleep sleep") // longer than the timeout
	if got := stateOf(r, "a"); got.PID != pid {
		t.Errorf("while it served it became %+v", got)
	}
	eventually(t, "the idle runner ends", func() bool { return stateOf(r, "a").State == "" && !alive(pid) })
	say(t, r, b, "two")
	if again := stateOf(r, "a").PID; again == pid || again == 0 {
		t.Errorf("process %d again", again)
	}
}

// TestMemoryBudget has three models of 400 bytes each in 1000.
func TestMemoryBudget(t *testing.T) {
	t.Parallel()
	memory := NewMemory(1000)
	r := newRunners(t, RunnersOptions{Memory: memory, Wait: 500 * time.Millisecond, Estimate: func(b Base, _ RunnerConfig) (int64, error) {
		if b.Name == "huge" {
			return 2000, nil
		}
		return 300, nil // the runners report more
	}})
	models := map[string]Base{}
	for _, name := range []string{"a", "b", "c"} {
		models[name] = base(name, "400")
	}
	say(t, r, models["a"], "one")
	say(t, r, models["b"], "one")
	say(t, r, models["a"], "one")
	pid := stateOf(r, "a").PID
	say(t, r, models["c"], "one")
	if a, b := stateOf(r, "a"), stateOf(r, "b"); a.PID != pid || b.State != "" || a.MemoryBytes != 400 {
		t.Errorf("a is %+v, b is %+v: the one that was used longest ago had to go, and no other", a, b)
	}
	if budget, taken, err := memory.Budget(); err != nil || budget != 1000 || taken != 800 {
		t.Errorf("%d of %d bytes are granted, %v", taken, budget, err)
	}

	// Neither a nor c may go while it serves.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var streams sync.WaitGroup
	for _, name := range []string{"a", "c"} {
		streams.Go(func() { _, _, _ = collect(ctx, r, models[name], "wait /dev/null") })
		eventually(t, name+" serves", func() bool { return stateOf(r, name).Requests == 1 })
	}
	_, _, err := collect(t.Context(), r, models["b"], "one")
	var unavailable *UnavailableError
	if !errors.As(err, &unavailable) || !errors.Is(err, ErrNoMemory) || unavailable.RetryAfter <= 0 {
		t.Fatalf("with both serving, b got %v", err)
	}
	for _, part := range []string{"b needs about 400 B", "1000 B", "800 B are taken", "a 400 B", "c 400 B"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q is not in %q", part, err)
		}
	}
	if a := stateOf(r, "a"); a.PID != pid || a.Requests != 1 {
		t.Errorf("a is %+v", a)
	}
	cancel()
	streams.Wait()
	say(t, r, models["b"], "one") // now one of them can

	var refused *Error
	if _, _, err := collect(t.Context(), r, base("huge", ""), "one"); !errors.As(err, &refused) || refused.Code != CodeInsufficientMemory || !strings.Contains(refused.Message, "2.0 KiB") {
		t.Errorf("a model that never fits: %v", err)
	}
}

// TestMemoryWaits has a request wait until a running model becomes idle, and a second until a job has planned.
func TestMemoryWaits(t *testing.T) {
	t.Parallel()
	memory := NewMemory(1000)
	r := newRunners(t, RunnersOptions{Memory: memory, Wait: 20 * time.Second, Estimate: func(Base, RunnerConfig) (int64, error) { return 600, nil }})
	var stream sync.WaitGroup
	stream.Go(func() { say(t, r, base("a", ""), "sleep sleep") })
	eventually(t, "a serves", func() bool { return stateOf(r, "a").State == Ready })
	say(t, r, base("b", ""), "one")
	stream.Wait()
	if got := stateOf(r, "a"); got.State != "" {
		t.Errorf("a is %+v beside b", got)
	}

	eventually(t, "b ends", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		if l := r.models[base("b", "")].life; l.state == Ready {
			r.end(l)
		}
		return len(r.lives) == 0
	})
	grant, err := memory.ReserveRest("the job", 0)
	if err != nil || grant.Bytes() != 1000 {
		t.Fatalf("the job got %d bytes, %v", grant.Bytes(), err)
	}
	stream.Go(func() { say(t, r, base("c", ""), "one") })
	eventually(t, "c waits", func() bool { return strings.Contains(stateOf(r, "c").Error, "the job 1000 B") })
	if got := stateOf(r, "c"); got.State != Waiting || got.Requests != 1 {
		t.Errorf("c is %+v", got)
	}
	grant.Resize(300)
	stream.Wait()
	grant.Release()
	grant.Release()
	if _, taken, _ := memory.Budget(); taken != 600 {
		t.Errorf("%d bytes are granted", taken)
	}
}

func TestAutomaticBudget(t *testing.T) {
	t.Parallel()
	memory := NewMemory(0)
	free := int64(1 << 40)
	memory.free = func() (int64, error) { return free, nil }
	first, err := memory.Reserve("a", free/2)
	if err != nil {
		t.Fatal(err)
	}
	first.Use(os.Getpid()) // what it has of its own is no longer free, and counts as it does
	if budget, _, err := memory.Budget(); err != nil || budget <= free*9/10 || budget > free {
		t.Errorf("the budget is %d of %d, %v", budget, free, err)
	}
	var short *ShortError
	if _, err := memory.Reserve("b", free/2); !errors.As(err, &short) || short.Taken != free/2 {
		t.Errorf("a second half: %v", err)
	}
	memory.free = func() (int64, error) { return 0, errors.New("no /proc") }
	if _, err := memory.ReserveRest("b", 0); err == nil || !strings.Contains(err.Error(), "memory:") {
		t.Errorf("without /proc: %v", err)
	}
	if _, _, err := NewMemory(0).Budget(); err != nil {
		t.Error(err)
	}
}

// TestTrainerHasAGrant starts a trainer, which is told its part, and gives it back at the end.
func TestTrainerHasAGrant(t *testing.T) {
	t.Parallel()
	memory := NewMemory(1000)
	grant, err := memory.ReserveRest("the job", 700)
	if err != nil {
		t.Fatal(err)
	}
	trainer, err := StartTrainer(TrainerOptions{Grant: grant, Args: []string{"planner"}})
	if err != nil {
		t.Fatal(err)
	}
	if e := <-trainer.Events(); e.Memory == nil || e.Memory.FreeBytes != 700 {
		t.Errorf("the trainer was told of %+v", e.Memory)
	}
	if got := grant.Bytes(); got != 500 {
		t.Errorf("after its plan it has %d bytes, want 500", got)
	}
	for range trainer.Events() {
	}
	if err := trainer.Wait(); err != nil {
		t.Error(err)
	}
	if _, taken, _ := memory.Budget(); taken != 0 {
		t.Errorf("%d bytes are still granted", taken)
	}
	grant, err = memory.ReserveRest("the job", 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := StartTrainer(TrainerOptions{Grant: grant, Exe: "/does/not/exist"}); err == nil {
		t.Error("started nothing")
	}
	if _, taken, _ := memory.Budget(); taken != 0 {
		t.Errorf("%d bytes are granted to what did not start", taken)
	}
}

// TestLoadGoesOn has a request give up on a model that loads for a second, and another have it.
func TestLoadGoesOn(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{Wait: 300 * time.Millisecond})
	b := base("a", "late")
	_, _, err := collect(t.Context(), r, b, "one")
	var unavailable *UnavailableError
	if !errors.As(err, &unavailable) || !errors.Is(err, ErrLoading) || unavailable.RetryAfter <= 0 {
		t.Fatalf("got %v", err)
	}
	loading := stateOf(r, "a")
	if loading.State != Loading || loading.PID == 0 || loading.Seconds <= 0 {
		t.Errorf("it is %+v", loading)
	}
	eventually(t, "the model is ready", func() bool { return stateOf(r, "a").State == Ready })
	say(t, r, b, "one")
	if got := stateOf(r, "a"); got.PID != loading.PID {
		t.Errorf("process %d loaded and %d answers", loading.PID, got.PID)
	}
}

func TestBackOff(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{})
	b := base("a", "abort")
	for i := range freeStarts - 1 {
		if _, _, err := collect(t.Context(), r, b, "one"); !errors.As(err, new(*ExitError)) || !strings.Contains(err.Error(), "GGML_ASSERT(a > b) failed") {
			t.Errorf("start %d: %v", i, err)
		}
	}
	for range 3 { // none but the first of these starts it
		_, _, err := collect(t.Context(), r, b, "one")
		var unavailable *UnavailableError
		if !errors.As(err, &unavailable) || !errors.Is(err, ErrBackOff) || unavailable.RetryAfter <= 0 || unavailable.RetryAfter > minBackOff {
			t.Fatalf("got %v", err)
		}
		for _, part := range []string{"3 times in a row", "GGML_ASSERT(a > b) failed", "server's log", "base_model=a"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%q is not in %q", part, err)
			}
		}
	}
	if got := stateOf(r, "a"); got.State != Failed || got.Seconds <= 0 || got.Error == "" {
		t.Errorf("it is %+v", got)
	}
	say(t, r, base("b", ""), "one")
	r.mu.Lock()
	r.models[b].retry = time.Now()
	r.mu.Unlock()
	_, _, err := collect(t.Context(), r, b, "one")
	var unavailable *UnavailableError
	if !errors.As(err, &unavailable) || unavailable.RetryAfter <= minBackOff {
		t.Errorf("after the fourth failure: %v", err)
	}
}

// TestDeadlyRequest sends a request that ends the engine until it is refused, while another model goes on.
func TestDeadlyRequest(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{})
	b, other := base("a", ""), base("b", "")
	say(t, r, other, "one")
	pid := stateOf(r, "b").PID
	var stream sync.WaitGroup
	stream.Go(func() { say(t, r, other, strings.TrimSpace(strings.Repeat("sleep ", 8))) })
	for i := range maxEnds {
		text, _, err := collect(t.Context(), r, b, "one abort")
		var exit *ExitError
		if !errors.As(err, &exit) || text != "one " || !strings.Contains(err.Error(), "GGML_ASSERT") {
			t.Errorf("time %d: %q, %v", i, text, err)
		}
		say(t, r, b, "two")
	}
	prompt := "one abort"
	for event, err := range r.Generate(t.Context(), b, GenerateRequest{ID: "another", Client: "another", Prompt: &prompt}) {
		var refused *Error
		if !errors.As(err, &refused) || refused.Code != CodeEndsEngine || !strings.Contains(err.Error(), "3 times in a row") || !strings.Contains(err.Error(), "GGML_ASSERT") {
			t.Errorf("after %d ends: %+v, %v", maxEnds, event, err)
		}
	}
	alive := stateOf(r, "a").PID
	say(t, r, b, "two")
	if got := stateOf(r, "a").PID; got != alive {
		t.Error("the refused request ended the runner")
	}
	if _, _, err := collect(t.Context(), r, Base{Name: "b", Digest: "other"}, "one abort"); !errors.As(err, new(*ExitError)) {
		t.Errorf("of another model: %v", err)
	}
	stream.Wait()
	if got := stateOf(r, "b"); got.PID != pid {
		t.Errorf("the other model is %+v, and was process %d", got, pid)
	}
}

// TestSuspectsRunAlone repeats a deadly request together with harmless ones, as a client with retries does: these are
// answered in the end.
func TestSuspectsRunAlone(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{})
	b := base("a", "")
	say(t, r, b, "one")
	var clients sync.WaitGroup
	for i := range 5 {
		prompt := fmt.Sprintf("%d sleep sleep", i)
		if i == 4 {
			prompt = "sleep die"
		}
		clients.Go(func() {
			var refused *Error
			for range 8 {
				_, _, err := collect(t.Context(), r, b, prompt)
				if err == nil || errors.As(err, &refused) {
					break
				}
			}
			if deadly := refused != nil && refused.Code == CodeEndsEngine; deadly != strings.Contains(prompt, "die") {
				t.Errorf("%q is refused: %v", prompt, refused)
			}
		})
	}
	clients.Wait()
}

func TestBlame(t *testing.T) {
	t.Parallel()
	var b blame
	key := func(n int) fingerprint { return fingerprintOf(Base{}, n) }
	for i := range maxBlamed + 10 {
		b.add(key(i), ErrEnded)
	}
	if len(b.entries) != maxBlamed {
		t.Errorf("%d requests are remembered, want %d", len(b.entries), maxBlamed)
	}
	last := key(maxBlamed + 9)
	for ends := 1; ends < maxEnds; ends++ {
		if suspected, err := b.look(last); suspected != (ends == maxEnds-1) || err != nil {
			t.Errorf("after %d ends: %v, %v", ends, suspected, err)
		}
		b.add(last, ErrEnded)
	}
	if _, err := b.look(last); err == nil {
		t.Error("not refused")
	}
	entry := b.entries[last]
	entry.at = time.Now().Add(-blameLasts)
	b.entries[last] = entry
	if suspected, err := b.look(last); suspected || err != nil {
		t.Errorf("later: %v, %v", suspected, err)
	}
	b.add(last, ErrEnded)
	b.clear(last)
	if suspected, _ := b.look(last); suspected {
		t.Error("suspected after it was answered")
	}
}

func TestHungRunnerIsKilled(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{HangTimeout: 2 * time.Second})
	b := base("a", "")
	text, _, err := collect(t.Context(), r, b, "one stop two")
	var exit *ExitError
	if !errors.As(err, &exit) || exit.Why == "" || !strings.HasPrefix(text, "one ") || !strings.Contains(err.Error(), "gave no sign of life for 2s and was killed") {
		t.Errorf("got %q, %v", text, err)
	}
	say(t, r, b, "three")
}

// TestSilentRunnerLives has a request that says nothing for longer than a hang: the runner's status is a sign of life.
func TestSilentRunnerLives(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{HangTimeout: 2 * time.Second})
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, _, err := collect(ctx, r, base("a", ""), "wait /dev/null"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	say(t, r, base("a", ""), "one")
}

// TestKilledWhileIdle kills a runner that serves nothing: nobody may see it.
func TestKilledWhileIdle(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{})
	b := base("a", "")
	for range 5 {
		say(t, r, b, "one")
		pid := stateOf(r, "a").PID
		if pid == 0 { // kill(0) would be this test
			t.Fatal("there is no runner")
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
		for socket := runnerOf(r, b).dir + "/runner.sock"; ; { // the server may not have noticed when nobody listens any more
			conn, err := new(net.Dialer).DialContext(t.Context(), "unix", socket)
			if err != nil {
				break
			}
			_ = conn.Close()
		}
	}
	say(t, r, b, "two")
}

func TestEmbedAndTokenize(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{Config: RunnerConfig{ContextTokens: 100}, ContextTokens: map[string]int{"b": 200}})
	resp, err := r.Embed(t.Context(), base("a", ""), EmbedRequest{Inputs: []Input{{Text: "x"}, {Text: "y"}}})
	if err != nil || len(resp.Vectors) != 2 || resp.PromptTokens != 2 {
		t.Errorf("embedded %+v, %v", resp, err)
	}
	var refused *Error
	if _, err := r.Embed(t.Context(), base("a", ""), EmbedRequest{Inputs: []Input{{Text: "overload"}}}); !errors.As(err, &refused) || refused.Code != CodeOverloaded {
		t.Errorf("a full queue: %v", err)
	}
	text := "x"
	for name, want := range map[string]int{"a": 100, "b": 200} {
		if resp, err := r.Tokenize(t.Context(), base(name, ""), TokenizeRequest{Text: &text}); err != nil || resp.Text != "x" || resp.ContextTokens != want {
			t.Errorf("%s: %+v, %v, want a context of %d", name, resp, err, want)
		}
	}
}

// TestStopWhileLoading stops the server while a model loads and another waits for memory.
func TestStopWhileLoading(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{Memory: NewMemory(1000), Estimate: func(Base, RunnerConfig) (int64, error) { return 600, nil }})
	var requests sync.WaitGroup
	for _, name := range []string{"a", "b"} {
		requests.Go(func() {
			if _, _, err := collect(t.Context(), r, base(name, "slow"), "one"); !errors.Is(err, ErrStopping) {
				t.Errorf("%s got %v", name, err)
			}
		})
		eventually(t, name+" begins", func() bool { s := stateOf(r, name); return s.PID != 0 || s.Error != "" })
	}
	pid := max(stateOf(r, "a").PID, stateOf(r, "b").PID)
	r.Stop(t.Context())
	requests.Wait()
	if alive(pid) {
		t.Error("the loading runner still runs")
	}
}

// TestNothingIsLeft has runners end in all ways and counts this process's files; TestMain counts the goroutines.
func TestNothingIsLeft(t *testing.T) { // not parallel: others open files too
	files := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	before := files()
	r := newRunners(t, RunnersOptions{Wait: 100 * time.Millisecond, ReadyTimeout: 200 * time.Millisecond, SocketDir: t.TempDir()})
	for i := range 5 {
		for _, prompt := range []string{"one", "die", "abort"} {
			_, _, _ = collect(t.Context(), r, base("a", ""), fmt.Sprint(prompt, " ", i))
		}
		for _, orders := range []string{"abort", "broken", "slow"} {
			_, _, _ = collect(t.Context(), r, base(fmt.Sprint(orders, i), orders), "one")
		}
	}
	r.Stop(t.Context())
	eventually(t, "files are closed", func() bool { return files() <= before })
}
