package runner

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/child"
)

// childMain is this test binary in the role of `hone runner`.
func childMain() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := Run(ctx, os.Stdin, os.Stdout, slog.New(slog.NewTextHandler(os.Stderr, nil))); err != nil {
		return 1
	}
	return 0
}

func startChild(t *testing.T, config child.RunnerConfig) (*child.Runner, error) {
	t.Helper()
	return child.StartRunner(t.Context(), child.RunnerOptions{
		Args: []string{"-test.run=none"}, Env: []string{runAsChild + "=1"}, Config: config,
	})
}

// The runner as serve uses it: a process, its socket, its end.
func TestChildProcess(t *testing.T) {
	dir := modelDir(t)
	r, err := startChild(t, child.RunnerConfig{ModelDir: dir, ContextTokens: 512, Sequences: 2, Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if r.ContextTokens != 512 {
		t.Errorf("context of %d tokens, want 512", r.ContextTokens)
	}
	var text strings.Builder
	var last child.GenerateEvent
	for e, err := range r.Generate(t.Context(), child.GenerateRequest{Prompt: &series[0], MaxTokens: 12, TopP: 1}) {
		if err != nil {
			t.Fatal(err)
		}
		text.WriteString(e.Text)
		last = e
	}
	if !strings.Contains(text.String(), "Saturday") || last.Usage == nil {
		t.Errorf("answer %q, last event %+v", text.String(), last)
	}
	for _, err := range r.Generate(t.Context(), child.GenerateRequest{Messages: chat(strings.Repeat("word ", 600)), TopP: 1}) {
		var refusal *child.Error
		if !errors.As(err, &refusal) || refusal.Code != child.CodeContextLength {
			t.Errorf("an over-long prompt gave %v", err)
		}
	}
	// Killed in the middle of a stream: the stream ends with an error.
	var broken error
	for e, err := range r.Generate(t.Context(), child.GenerateRequest{Messages: chat("Tell me a long story."), TopP: 1}) {
		if broken = err; err == nil && e.Text != "" {
			if killErr := syscall.Kill(r.PID(), syscall.SIGKILL); killErr != nil && !errors.Is(killErr, syscall.ESRCH) {
				t.Fatal(killErr)
			}
		}
	}
	if broken == nil {
		t.Error("the stream of a killed runner ended without an error")
	}
}

func TestSoftStop(t *testing.T) {
	r, err := startChild(t, child.RunnerConfig{ModelDir: modelDir(t), ContextTokens: 512, Sequences: 2, Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	stopped := make(chan struct{})
	finish := ""
	for e, err := range r.Generate(t.Context(), child.GenerateRequest{Messages: chat("Tell me a story."), MaxTokens: 20, TopP: 1}) {
		if err != nil {
			t.Fatalf("a running request was broken off by a soft stop: %v", err)
		}
		if finish == "" && e.Text != "" {
			finish = "none yet"
			go func() {
				defer close(stopped)
				ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
				defer cancel()
				r.Stop(ctx)
			}()
		}
		if e.FinishReason != "" {
			finish = e.FinishReason
		}
	}
	if finish != "length" && finish != "stop" {
		t.Errorf("the request finished with %q", finish)
	}
	<-stopped
}

// The end of standard input means that the parent is gone, whatever is running.
func TestInputEndsRunner(t *testing.T) {
	config, err := json.Marshal(child.RunnerConfig{Socket: t.TempDir() + "/s", ModelDir: modelDir(t), ContextTokens: 512, Sequences: 1, Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	in, parent, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	events, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer events.Close()
	ended := make(chan error, 1)
	go func() {
		defer out.Close()
		ended <- Run(t.Context(), in, out, slog.New(slog.DiscardHandler))
	}()
	if _, err := parent.Write(append(config, '\n')); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(events).ReadString('\n')
	if err != nil || !strings.Contains(line, `"ready"`) {
		t.Fatalf("first event %q, %v", line, err)
	}
	parent.Close()
	start := time.Now()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
		t.Logf("ended after %v", time.Since(start))
	case <-time.After(2 * time.Second):
		t.Fatal("the runner goes on 2 s after its input ended")
	}
}

func TestChildReportsFailure(t *testing.T) {
	_, err := startChild(t, child.RunnerConfig{ModelDir: t.TempDir()})
	var refusal *child.Error
	if !errors.As(err, &refusal) || refusal.Code != child.CodeInvalidModel {
		t.Errorf("got %v, want %s", err, child.CodeInvalidModel)
	}
}
