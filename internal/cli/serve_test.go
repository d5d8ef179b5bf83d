package cli

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// lockedBuffer takes the log while the test reads it.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func TestServe(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HONE_HOME", home)
	t.Setenv("HONE_LOG_LEVEL", "debug")
	if err := os.WriteFile(filepath.Join(home, "hone.yaml"), []byte("default_model: \"\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out, w := io.Pipe()
	var log lockedBuffer
	code := make(chan int)
	go func() { code <- Run(ctx, []string{"serve", "--port", "0"}, strings.NewReader(""), w, &log) }()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "listening on http://127.0.0.1:") {
		t.Fatalf("standard output %q, %v\n%s", line, err, log.String())
	}
	health := strings.TrimSpace(strings.TrimPrefix(line, "listening on ")) + "/health"
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, health, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("health: %v, %v", resp, err)
	}
	resp.Body.Close()
	cancel()
	select {
	case got := <-code:
		if got != exitOK {
			t.Errorf("exit code %d, want 0 after a stop\n%s", got, log.String())
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it does not stop")
	}
	if !strings.Contains(log.String(), `msg="stopping;`) {
		t.Errorf("the log does not say that it stops:\n%s", log.String())
	}
}

func TestServeUsage(t *testing.T) {
	t.Setenv("HONE_HOME", t.TempDir())
	for _, test := range []struct {
		args []string
		code int
		err  string
	}{
		{[]string{"serve", "here"}, exitUsage, "serve"},
		{[]string{"serve", "--port", "http"}, exitUsage, "port"},
		{[]string{"serve", "--port", "70000"}, exitError, "port: 70000, expected"},
		{[]string{"serve", "--data-dir", "serve_test.go"}, exitError, "serve_test.go is a file, expected a directory"},
		{[]string{"serve", "--data-dir", "serve_test.go/x"}, exitError, "serve_test.go/x lies below a file"},
		{[]string{"serf"}, exitUsage, "Did you mean this?\n\tserve"},
		{[]string{"predict", "--questions", "q.csv"}, exitUsage, `required flag(s) "model", "out" not set`},
		{[]string{"serve", "--host", "0.0.0.0"}, exitError, "HONE_API_KEY"},
		{[]string{"serve", "--config", "/no/such/file.yaml"}, exitError, "/no/such/file.yaml"},
	} {
		var out, err bytes.Buffer
		if code := Run(t.Context(), test.args, strings.NewReader(""), &out, &err); code != test.code || !strings.Contains(err.String(), test.err) {
			t.Errorf("%v: exit code %d, %s\nwant %d and %q", test.args, code, err.String(), test.code, test.err)
		}
	}
}
