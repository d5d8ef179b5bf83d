package child

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var baseForTests = Base{Name: "base", Dir: "dir", Digest: "00"}

func newRunners(t *testing.T, opts RunnersOptions) *Runners {
	t.Helper()
	r := NewRunners(opts)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		r.Stop(ctx)
	})
	return r
}

// collect returns the text, the last event and the error of a completion.
func collect(ctx context.Context, r *Runners, base Base, prompt string) (text string, last GenerateEvent, err error) {
	for event, err := range r.Generate(ctx, base, GenerateRequest{Prompt: &prompt}) {
		if err != nil {
			return text, last, err
		}
		text += event.Text
		last = event
	}
	return text, last, nil
}

func TestGenerate(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{})
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			text, last, err := collect(t.Context(), r, baseForTests, "one two")
			if err != nil || text != "one two " || last.FinishReason != "stop" || last.Usage.CompletionTokens != 2 {
				t.Errorf("got %q, %+v, %v", text, last, err)
			}
		})
	}
	group.Wait()
	if loaded := r.Models(); len(loaded) != 1 || loaded[0].Model != "base" || loaded[0].State != Ready || loaded[0].PID == 0 {
		t.Errorf("loaded %+v, want one runner for all requests", loaded)
	}
	var refused *Error
	if _, _, err := collect(t.Context(), r, baseForTests, "refuse"); !errors.As(err, &refused) || refused.Code != CodeContextLength {
		t.Errorf("error %v, want the runner's refusal", err)
	}
}

// TestSocketDir puts sockets where they are wanted, and elsewhere if their paths would be too long.
func TestSocketDir(t *testing.T) {
	t.Parallel()
	short, err := os.MkdirTemp("/tmp", "s") //nolint:usetesting // t.TempDir may be too long
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(short)
	long := filepath.Join(t.TempDir(), strings.Repeat("x", 100))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	for parent, below := range map[string]bool{short: true, long: false, "": false} {
		dir, err := socketDir(parent)
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		if got := parent != "" && strings.HasPrefix(dir, parent+"/"); got != below {
			t.Errorf("below %q: %s", parent, dir)
		}
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 || len(dir) > 85 {
			t.Errorf("%s: %v, %v", dir, info.Mode(), err)
		}
	}
}

func TestRunnerDiesAndIsStartedAgain(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{})
	text, _, err := collect(t.Context(), r, baseForTests, "one die two")
	var exit *ExitError
	if !errors.As(err, &exit) || exit.Signal != syscall.SIGKILL || text != "one " {
		t.Fatalf("got %q, %v, want the text before the end and how the runner ended", text, err)
	}
	if text, _, err := collect(t.Context(), r, baseForTests, "three"); err != nil || text != "three " {
		t.Errorf("the next request got %q, %v", text, err)
	}
}

func TestCancelReachesTheRunner(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{})
	seen := filepath.Join(t.TempDir(), "seen")
	prompt := "wait " + seen
	for event, err := range r.Generate(t.Context(), baseForTests, GenerateRequest{Prompt: &prompt}) {
		if err != nil {
			t.Fatal(err)
		}
		if event.Text == "wait " {
			break
		}
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(seen); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the runner did not see that its client was gone")
		}
	}
}

func TestRunnerThatCannotStart(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{ReadyTimeout: 300 * time.Millisecond})
	var refused *Error
	if _, _, err := collect(t.Context(), r, Base{Name: "x", Dir: "broken"}, "hi"); !errors.As(err, &refused) || refused.Code != CodeInvalidModel {
		t.Errorf("error %v, want invalid_model", err)
	}
	if _, _, err := collect(t.Context(), r, Base{Name: "x", Dir: "slow"}, "hi"); err == nil {
		t.Error("a runner that never became ready answered")
	}
	for _, loaded := range r.Models() {
		if loaded.State != Failed || !strings.Contains(loaded.Error, "not ready after") {
			t.Errorf("still loaded: %+v", loaded)
		}
	}
}

func TestStopEndsStreamsAndRunners(t *testing.T) {
	t.Parallel()
	r := newRunners(t, RunnersOptions{})
	if _, _, err := collect(t.Context(), r, baseForTests, "hi"); err != nil {
		t.Fatal(err)
	}
	pid := r.Models()[0].PID
	go func() {
		time.Sleep(50 * time.Millisecond)
		r.Stop(t.Context())
	}()
	if _, _, err := collect(t.Context(), r, baseForTests, "wait /dev/null"); !errors.Is(err, ErrStopping) {
		t.Errorf("the open stream ended with %v, want ErrStopping", err)
	}
	r.Stop(t.Context())
	if alive(pid) {
		t.Error("the runner still runs")
	}
	if _, _, err := collect(t.Context(), r, baseForTests, "hi"); !errors.Is(err, ErrStopping) {
		t.Errorf("a new request got %v, want ErrStopping", err)
	}
}
