package child

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

// roles are what this test binary does when it is started as a child: its first argument names one.
var roles = map[string]func(config *bufio.Reader) int{
	"echo":    echoRole,
	"crash":   crashRole,
	"deaf":    deafRole,
	"parent":  parentRole,
	"runner":  runnerRole,
	"nice":    niceRole,
	"trainer": trainerRole,
	"planner": plannerRole,
}

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && roles[os.Args[1]] != nil {
		os.Exit(roles[os.Args[1]](bufio.NewReader(os.Stdin)))
	}
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/hone-llm/hone/internal/child.forkThread"))
}

func echoRole(in *bufio.Reader) int {
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return 0
		}
		fmt.Print("got " + line)
	}
}

func crashRole(in *bufio.Reader) int {
	_, _ = in.ReadString('\n')
	fmt.Println(strings.Repeat("x", 300_000))
	fmt.Fprintln(os.Stderr, "loading\nGGML_ASSERT(a > b) failed")
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// deafRole ignores the soft ways to be stopped.
func deafRole(in *bufio.Reader) int {
	signal.Ignore(syscall.SIGTERM)
	fmt.Println("ready")
	time.Sleep(time.Minute)
	return 0
}

// parentRole starts a child, says its process id and waits to be killed.
func parentRole(in *bufio.Reader) int {
	p, err := Start(context.Background(), Options{Args: []string{"deaf"}})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if _, err := p.Next(); err != nil {
		return 1
	}
	fmt.Println(p.PID())
	select {}
}

func niceRole(in *bufio.Reader) int {
	// Every thread of the child must have it, not only the first.
	threads, _ := os.ReadDir("/proc/self/task")
	for _, thread := range threads {
		id, _ := strconv.Atoi(thread.Name())
		raw, _ := syscall.Getpriority(syscall.PRIO_PROCESS, id)
		fmt.Println(20 - raw) // the system call returns 20 - nice
	}
	return 0
}

// trainerRole reports until it is asked to stop, and then that it saved its state.
func trainerRole(in *bufio.Reader) int {
	var config TrainerConfig
	line, _ := in.ReadBytes('\n')
	if err := json.Unmarshal(line, &config); err != nil {
		return 1
	}
	out := json.NewEncoder(os.Stdout)
	fmt.Println("not an event")
	for i := range 1000 { // more than any buffer between holds
		_ = out.Encode(TrainerEvent{Type: EventStep, Step: i, Message: strings.Repeat("x", 1000)})
	}
	line, _ = in.ReadBytes('\n')
	if string(line) == "{\"op\":\"stop\"}\n" {
		_ = out.Encode(TrainerEvent{Type: EventSaved, Message: config.JobID})
	}
	return 0
}

// plannerRole is a trainer that plans to take 500 bytes of what it is given, and ends.
func plannerRole(in *bufio.Reader) int {
	var config TrainerConfig
	line, _ := in.ReadBytes('\n')
	_ = json.Unmarshal(line, &config)
	_ = json.NewEncoder(os.Stdout).Encode(TrainerEvent{Type: EventMemory, Memory: &MemoryPlan{Device: "cpu", TotalBytes: 500, FreeBytes: config.HostMemoryBytes}})
	return 0
}

// runnerRole is a runner whose model repeats the prompt word by word. These words of a prompt are orders: die (by SIGKILL),
// abort (as a failed assertion does), stop (until somebody continues the process), refuse, overload, wait (for the client to
// go away; then the last word is a file to make) and sleep (a moment).
//
// These words of the model's directory are orders too: broken (it says so), abort, slow (a minute), late (a second), and a
// number, which is the memory that it reports.
func runnerRole(in *bufio.Reader) int {
	line, _ := in.ReadBytes('\n')
	var config RunnerConfig
	if err := json.Unmarshal(line, &config); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	out := json.NewEncoder(os.Stdout)
	ready := RunnerEvent{Type: "ready", ContextTokens: max(config.ContextTokens, 99)}
	for word := range strings.FieldsSeq(config.ModelDir) {
		switch word {
		case "broken":
			_ = out.Encode(RunnerEvent{Type: "failed", Error: &Error{Code: CodeInvalidModel, Message: "base.gguf: bad magic"}})
			return 1
		case "abort":
			abort()
		case "slow":
			time.Sleep(time.Minute)
		case "late":
			time.Sleep(time.Second)
		default:
			ready.MemoryBytes, _ = strconv.ParseInt(word, 10, 64)
		}
	}
	listener, err := new(net.ListenConfig).Listen(context.Background(), "unix", config.Socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	go func() {
		_, _ = io.Copy(io.Discard, in)
		os.Exit(0)
	}()
	_ = out.Encode(ready)
	mux := http.NewServeMux()
	mux.HandleFunc("POST /generate", repeat)
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("{}")) })
	mux.HandleFunc("POST /embed", func(w http.ResponseWriter, r *http.Request) {
		var req EmbedRequest
		_ = json.NewDecoder(r.Body).Decode(&req)
		resp := EmbedResponse{PromptTokens: len(req.Inputs)}
		for _, input := range req.Inputs {
			if input.Text == "overload" {
				w.WriteHeader(http.StatusTooManyRequests)
				_ = json.NewEncoder(w).Encode(GenerateEvent{Error: &Error{Code: CodeOverloaded, Message: "256 requests wait"}})
				return
			}
			resp.Vectors = append(resp.Vectors, []float32{1, 0})
		}
		_ = json.NewEncoder(w).Encode(resp)
	})
	mux.HandleFunc("POST /tokenize", func(w http.ResponseWriter, r *http.Request) {
		var req TokenizeRequest
		_ = json.NewDecoder(r.Body).Decode(&req)
		_ = json.NewEncoder(w).Encode(TokenizeResponse{Text: *req.Text, ContextTokens: config.ContextTokens})
	})
	_ = http.Serve(listener, mux)
	return 1
}

func abort() {
	fmt.Fprintln(os.Stderr, "ops.c:1: GGML_ASSERT(a > b) failed")
	_ = syscall.Kill(os.Getpid(), syscall.SIGABRT)
	select {}
}

func repeat(w http.ResponseWriter, r *http.Request) {
	var req GenerateRequest
	events := json.NewEncoder(w)
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil || req.Prompt == nil {
		w.WriteHeader(http.StatusBadRequest)
		_ = events.Encode(GenerateEvent{Error: &Error{Code: CodeInvalidRequest, Message: "no prompt"}})
		return
	}
	words := strings.Fields(*req.Prompt)
	for _, word := range words {
		switch word {
		case "die":
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		case "abort":
			abort()
		case "stop":
			_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
			time.Sleep(time.Second) // it does not stop at once
		case "sleep":
			time.Sleep(200 * time.Millisecond)
		case "refuse":
			_ = events.Encode(GenerateEvent{Error: &Error{Code: CodeContextLength, Message: "too long"}})
			return
		}
		_ = events.Encode(GenerateEvent{Text: word + " "})
		w.(http.Flusher).Flush()
		if word == "wait" {
			<-r.Context().Done()
			_ = os.WriteFile(words[len(words)-1], nil, 0o600)
			return
		}
	}
	_ = events.Encode(GenerateEvent{FinishReason: "stop", Usage: &Usage{CompletionTokens: len(words)}})
}

func start(t *testing.T, opts Options) *Process {
	t.Helper()
	p, err := Start(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

func TestProcessTalks(t *testing.T) {
	t.Parallel()
	p := start(t, Options{Args: []string{"echo"}, Config: RunnerConfig{Socket: "s"}})
	if err := p.Send(TrainerCommand{Op: "stop"}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`got {"socket":"s","model_dir":"","context_tokens":0,"sequences":0,"threads":0}`,
		`got {"op":"stop"}`,
	} {
		line, err := p.Next()
		if err != nil || string(line) != want {
			t.Fatalf("read %q, %v, want %q", line, err, want)
		}
	}
	if err := p.Stop(t.Context()); err == nil {
		// The Go runtime ends on SIGTERM; a child that catches it exits with 0. Either is a stop.
		t.Log("ended with code 0")
	}
	if _, err := p.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("after the end Next returned %v, want EOF", err)
	}
}

func TestProcessCrash(t *testing.T) {
	t.Parallel()
	p := start(t, Options{Args: []string{"crash"}})
	line, err := p.Next()
	if err != nil || len(line) != 300_000 {
		t.Fatalf("read %d bytes, %v, want a line of 300000", len(line), err)
	}
	if _, err := p.Next(); !errors.Is(err, io.EOF) {
		t.Fatalf("Next returned %v, want EOF", err)
	}
	var exit *ExitError
	if err := p.Wait(); !errors.As(err, &exit) {
		t.Fatalf("Wait returned %v, want an *ExitError", err)
	}
	want := &ExitError{Name: "crash", Code: -1, Signal: syscall.SIGKILL, Stderr: []string{"loading", "GGML_ASSERT(a > b) failed"}}
	if diff := cmp.Diff(want, exit); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if want := "the crash was ended by signal 9 (killed); it last said: GGML_ASSERT(a > b) failed"; exit.Error() != want {
		t.Errorf("error is %q, want %q", exit, want)
	}
}

func TestStopTurnsIntoKill(t *testing.T) {
	t.Parallel()
	p := start(t, Options{Args: []string{"deaf"}})
	if _, err := p.Next(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var exit *ExitError
	if err := p.Stop(ctx); !errors.As(err, &exit) || exit.Signal != syscall.SIGKILL {
		t.Errorf("Stop returned %v, want an end by SIGKILL", err)
	}
}

func TestContextKills(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	p, err := Start(ctx, Options{Args: []string{"deaf"}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	cancel()
	if err := p.Wait(); err == nil {
		t.Error("the child ended with code 0")
	}
}

func TestStartNothing(t *testing.T) {
	t.Parallel()
	if _, err := Start(t.Context(), Options{Exe: "/does/not/exist", Args: []string{"runner"}}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Start returned %v", err)
	}
}

// TestChildDiesWithParent kills a process with SIGKILL, which leaves it no moment to end its child.
func TestChildDiesWithParent(t *testing.T) {
	t.Parallel()
	parent := exec.CommandContext(t.Context(), os.Args[0], "parent")
	parent.Stderr = os.Stderr
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	if !alive(pid) {
		t.Fatal("the child does not run")
	}
	_ = parent.Process.Kill()
	_ = parent.Wait()
	for deadline := time.Now().Add(5 * time.Second); alive(pid); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			t.Fatal("the child outlived its parent")
		}
	}
}

func TestNiceOfEveryThread(t *testing.T) {
	t.Parallel()
	own, err := syscall.Getpriority(syscall.PRIO_PROCESS, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, Options{Args: []string{"nice"}, Nice: 10})
	want := strconv.Itoa(max(10, 20-own))
	lines := 0
	for {
		line, err := p.Next()
		if err != nil {
			break
		}
		lines++
		if string(line) != want {
			t.Errorf("a thread of the child has niceness %s, want %s", line, want)
		}
	}
	if lines == 0 {
		t.Error("no thread reported")
	}
}

// alive reports whether pid runs; one that ended and that nobody has waited for does not.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(after, "Z") && !strings.HasPrefix(after, "X")
}
