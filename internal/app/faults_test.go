//go:build cgo

package app_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	openai "github.com/sashabaranov/go-openai"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/models"
	"github.com/hone-llm/hone/internal/modeltest"
)

// homeOf makes a data directory with the default model under several names: as many base models, each with its own runner.
func homeOf(t *testing.T, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	store, err := models.Open(filepath.Join(dir, "models"), models.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if _, err := store.Add(t.Context(), modeltest.Path(t), models.AddOptions{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// state is what GET /health says of a model; the zero value is of an unloaded one.
func (h *hone) state(t *testing.T, model string) child.ModelState {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, h.url+"/health", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	var health struct{ Models []child.ModelState }
	h.do(t, req, &health)
	if i := slices.IndexFunc(health.Models, func(s child.ModelState) bool { return s.Model == model }); i >= 0 {
		return health.Models[i]
	}
	return child.ModelState{}
}

func (h *hone) eventually(t *testing.T, model string, holds func(child.ModelState) bool) child.ModelState {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		state := h.state(t, model)
		if holds(state) {
			return state
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s stays %+v", model, state)
		}
	}
}

func greedy(model, prompt string, tokens int) openai.ChatCompletionRequest {
	return openai.ChatCompletionRequest{Model: model, Messages: say(prompt), MaxCompletionTokens: tokens, Temperature: math.SmallestNonzeroFloat32}
}

// TestEndToEndRunnerDies ends a runner in mid-stream, as a failed assertion, the kernel and a user do it. Its streams are
// told, its model answers again, and the other model's stream is what it is alone.
func TestEndToEndRunnerDies(t *testing.T) {
	h := serve(t, homeOf(t, "one", "two"))
	long := greedy("two", "Write a story about a fox and a goose.", 100)
	alone, err := read(t, h, long, func(string) {})
	if !errors.Is(err, io.EOF) || alone == "" {
		t.Fatalf("%q, %v", alone, err)
	}
	hello := greedy("one", "Say hello.", 6)
	want, err := read(t, h, hello, func(string) {})
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	two := h.state(t, "two").PID
	files := h.files(t)
	for _, signal := range []syscall.Signal{syscall.SIGABRT, syscall.SIGKILL, syscall.SIGSEGV} {
		var streams sync.WaitGroup
		begun := make(chan struct{})
		streams.Go(func() {
			var once sync.Once
			text, err := read(t, h, long, func(string) { once.Do(func() { close(begun) }) })
			if !errors.Is(err, io.EOF) || text != alone {
				t.Errorf("%s: the other model's stream is %q, %v; alone it is %q", signal, text, err, alone)
			}
			once.Do(func() { close(begun) })
		})
		<-begun
		pid := h.state(t, "one").PID
		if pid == 0 { // kill(0) would be this test
			t.Fatal("one has no runner")
		}
		// Three streams of the same runner: two by go-openai, one as it is on the wire.
		var begins sync.WaitGroup
		begins.Add(3)
		go func() {
			begins.Wait()
			_ = syscall.Kill(pid, signal)
		}()
		for _, prompt := range []string{"Write a story about a fox", "Write a story about a goose"} {
			prompt = fmt.Sprintf("%s (%s).", prompt, signal) // no request may end the engine three times
			streams.Go(func() {
				begin := sync.OnceFunc(begins.Done)
				defer begin()
				_, err := read(t, h, greedy("one", prompt, 2000), func(string) { begin() })
				apiError := new(openai.APIError)
				if !errors.As(err, &apiError) || apiError.Code != "runner_ended" || apiError.Type == "" || apiError.Message == "" {
					t.Errorf("%s: the stream ended with %v", signal, err)
				}
			})
		}
		streams.Go(func() { h.rawError(t, "one", signal, sync.OnceFunc(begins.Done)) })
		streams.Wait()
		if text, err := read(t, h, hello, func(string) {}); !errors.Is(err, io.EOF) || text != want {
			t.Errorf("%s: the next request got %q, %v, want %q", signal, text, err, want)
		}
		if again := h.state(t, "one").PID; again == pid {
			t.Errorf("%s did not end process %d", signal, pid)
		}
	}
	for deadline := time.Now().Add(20 * time.Second); h.files(t) > files; time.Sleep(50 * time.Millisecond) {
		http.DefaultClient.CloseIdleConnections() // the server's side of them
		if time.Now().After(deadline) {
			t.Fatalf("the server has %d files open, and had %d", h.files(t), files)
		}
	}
	if got := h.state(t, "two"); got.PID != two {
		t.Errorf("the other model's runner is %+v and was process %d", got, two)
	}
}

// TestEndToEndDeadlyRequest kills the runner in the middle of one request three times: then that one is refused by name,
// and any other is answered.
func TestEndToEndDeadlyRequest(t *testing.T) {
	h := serve(t, homeOf(t, "one"))
	deadly := greedy("one", "Write a story about a fox.", 2000)
	apiError := new(openai.APIError)
	for n := range 3 {
		var once sync.Once
		_, err := read(t, h, deadly, func(string) {
			once.Do(func() { kill(t, h.state(t, "one").PID, syscall.SIGABRT) })
		})
		if !errors.As(err, &apiError) || apiError.Code != "runner_ended" {
			t.Fatalf("death %d: %v", n+1, err)
		}
	}
	if _, err := read(t, h, deadly, func(string) {}); !errors.As(err, &apiError) || apiError.HTTPStatusCode != http.StatusBadRequest || apiError.Code != "ends_engine" {
		t.Errorf("after three deaths: %v", err)
	}
	if text, err := read(t, h, greedy("one", "Say hello.", 6), func(string) {}); !errors.Is(err, io.EOF) || text == "" {
		t.Errorf("another request: %q, %v", text, err)
	}
}

// kill ends a runner.
func kill(t *testing.T, pid int, signal syscall.Signal) {
	t.Helper()
	if pid == 0 { // kill(0) would be this test
		t.Error("there is no runner")
		return
	}
	_ = syscall.Kill(pid, signal)
}

// files is how many files the server has open.
func (h *hone) files(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", h.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// rawError reads a stream that ends with an error: the last event is one, and [DONE] does not come.
func (h *hone) rawError(t *testing.T, model string, signal syscall.Signal, begin func()) {
	t.Helper()
	defer begin()
	body := `{"model":"` + model + `","stream":true,"temperature":0,"messages":[{"role":"user","content":"Write a story about a horse (` + signal.String() + `)."}]}`
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, h.url+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		t.Error(err)
		return
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Error(err)
		return
	}
	defer resp.Body.Close()
	var last string
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if line := lines.Text(); line != "" {
			last = line
			begin()
		}
	}
	for _, part := range []string{`"error":{`, `"message":"`, `"type":"server_error"`, `"param":null`, `"code":"runner_ended"`} {
		if !strings.Contains(last, part) {
			t.Errorf("%s: %s lacks %s", signal, last, part)
		}
	}
}

// TestEndToEndIdle has a model unloaded after a second without requests, and loaded again.
func TestEndToEndIdle(t *testing.T) {
	t.Setenv("HONE_RUNNER_IDLE_TIMEOUT", "1s")
	h := serve(t, homeOf(t, "one"))
	hello := greedy("one", "Say hello.", 6)
	want, err := read(t, h, hello, func(string) {})
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	h.eventually(t, "one", func(s child.ModelState) bool { return s.State == "" })
	if left := h.children(t, "runner"); len(left) > 0 {
		t.Errorf("processes %v are left", left)
	}
	if text, err := read(t, h, hello, func(string) {}); !errors.Is(err, io.EOF) || text != want {
		t.Errorf("after the reload: %q, %v, want %q", text, err, want)
	}
}

// TestEndToEndBudget has three models in a memory for two.
func TestEndToEndBudget(t *testing.T) {
	t.Setenv("HONE_CONTEXT_TOKENS", "512")
	dir := homeOf(t, "one", "two", "three")
	h := serve(t, dir)
	if _, err := read(t, h, greedy("one", "Say hello.", 2), func(string) {}); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	one := h.state(t, "one")
	h.kill()
	t.Setenv("HONE_MEMORY", fmt.Sprint(one.MemoryBytes*11/4))
	t.Setenv("HONE_RUNNER_WAIT", "1s")
	h = serve(t, dir)
	for _, name := range []string{"one", "two", "three", "one"} {
		if _, err := read(t, h, greedy(name, "Say hello.", 2), func(string) {}); !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		if n := len(h.children(t, "runner")); n > 2 {
			t.Errorf("%d runners", n)
		}
	}
	if two, three := h.state(t, "two"), h.state(t, "three"); two.State != "" || three.State != child.Ready {
		t.Errorf("two is %+v, three is %+v", two, three)
	}

	// While both stream, there is no room for the third.
	var streams sync.WaitGroup
	for _, name := range []string{"one", "three"} {
		begun := make(chan struct{})
		streams.Go(func() {
			var once sync.Once
			if _, err := read(t, h, greedy(name, "Write a long story.", 150), func(string) { once.Do(func() { close(begun) }) }); !errors.Is(err, io.EOF) {
				t.Errorf("%s: %v", name, err)
			}
		})
		<-begun
	}
	_, err := h.client.CreateChatCompletion(t.Context(), greedy("two", "Say hello.", 2))
	apiError := new(openai.APIError)
	busy := h.state(t, "one").Requests > 0 && h.state(t, "three").Requests > 0
	if busy && (!errors.As(err, &apiError) || apiError.HTTPStatusCode != http.StatusServiceUnavailable || apiError.Code != "insufficient_memory") {
		t.Errorf("without room: %v", err)
	}
	streams.Wait()
	if _, err := h.client.CreateChatCompletion(t.Context(), greedy("two", "Say hello.", 2)); err != nil {
		t.Errorf("with room: %v", err)
	}
}

// TestEndToEndDrain stops the server while a model loads: who waits for it is answered within the grace.
func TestEndToEndDrain(t *testing.T) {
	h := serve(t, homeOf(t, "one"))
	answered := make(chan error)
	go func() {
		_, err := h.client.CreateChatCompletion(t.Context(), greedy("one", "Say hello.", 2))
		answered <- err
	}()
	state := h.eventually(t, "one", func(s child.ModelState) bool { return s.State == child.Loading || s.State == child.Ready })
	if file, err := os.Stat(modeltest.Path(t)); err != nil || state.State == child.Loading && (state.TotalBytes != file.Size() || state.LoadedBytes > state.TotalBytes || state.Requests != 1) {
		t.Errorf("while it loads: %+v, %v", state, err)
	}
	if err := h.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-answered; err != nil {
		t.Errorf("the request got %v", err)
	}
	if err := h.cmd.Wait(); err != nil {
		t.Errorf("the server ended with %v, want code 0", err)
	}
}
