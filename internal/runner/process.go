package runner

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/hone-llm/hone/internal/child"
)

const (
	maxConfigBytes = 1 << 20
	// drainTime is how long running requests may take to finish after a soft stop.
	drainTime = 10 * time.Second
	// stopNotice is how long after the end of standard input a soft stop may still be announced: serve sends SIGTERM
	// and closes the pipe, in any order as seen from here.
	stopNotice = 200 * time.Millisecond
)

// Run is the runner as a child process. It reads child.RunnerConfig from the first line of in, loads the model, serves
// its Handler on the configured unix socket, and writes child.RunnerEvent lines to out, ready or failed first.
//
// It returns when ctx ends, after the running requests or drainTime, or at once when in ends: then the parent is gone.
// A model that cannot be served is reported as failed and returned.
func Run(ctx context.Context, in io.Reader, out io.Writer, logger *slog.Logger) error {
	events := json.NewEncoder(out)
	failed := func(err error) error {
		var report *child.Error
		if !errors.As(err, &report) {
			report = &child.Error{Code: child.CodeInternal, Message: err.Error()}
		}
		if writeErr := events.Encode(child.RunnerEvent{Type: "failed", Error: report}); writeErr != nil {
			return errors.Join(err, writeErr)
		}
		return err
	}
	input := bufio.NewReaderSize(in, 64<<10)
	config, err := readConfig(input)
	if err != nil {
		return failed(fmt.Errorf("read the runner's configuration from standard input: %w", err))
	}

	orphaned := make(chan struct{})
	go func() {
		defer close(orphaned)
		_, _ = io.Copy(io.Discard, input) // nothing follows; an error is an end too
	}()

	// A load cannot be interrupted. Who must not wait for it leaves it behind: the process ends with Run.
	type loaded struct {
		runner *Runner
		err    error
	}
	loading := make(chan loaded, 1)
	go func() {
		r, err := New(Options{
			ModelDir: config.ModelDir, ContextTokens: config.ContextTokens, Sequences: config.Sequences, Threads: config.Threads, Device: config.Device,
			CacheTokens: config.CacheTokens, CacheType: config.CacheType, GPUWeights: config.GPUWeights, Engine: config.Engine, Queue: config.Queue, AdapterBytes: config.AdapterBytes, Logger: logger,
		})
		loading <- loaded{r, err}
	}()
	var r *Runner
	select {
	case l := <-loading:
		if l.err != nil {
			return failed(l.err)
		}
		r = l.runner
	case <-ctx.Done():
		return nil
	case <-orphaned:
		return nil
	}
	defer r.Close()

	listener, err := net.Listen("unix", config.Socket) //nolint:noctx // listening on a unix socket does not block
	if err != nil {
		return failed(fmt.Errorf("listen for requests: %w", err))
	}
	defer os.Remove(config.Socket)
	requests, cancel := requestsOf(ctx)
	defer cancel(ErrStopping)
	server := &http.Server{
		Handler:           r.Handler(),
		BaseContext:       func(net.Listener) context.Context { return requests },
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	if err := events.Encode(child.RunnerEvent{Type: "ready", ContextTokens: r.ContextTokens(), MemoryBytes: r.MemoryBytes()}); err != nil {
		return errors.Join(fmt.Errorf("report ready: %w", err), server.Close())
	}
	logger.Info("runner is ready", slog.String("model_dir", config.ModelDir), slog.Int("context_tokens", r.ContextTokens()))

	soft := true
	select {
	case err := <-served:
		return fmt.Errorf("serve requests: %w", err)
	case <-ctx.Done():
	case <-orphaned:
		select {
		case <-ctx.Done():
		case <-time.After(stopNotice):
			soft = false
		}
	}
	if soft {
		drain, done := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
		_ = server.Shutdown(drain) // an error is the timeout; what is left ends below
		done()
	}
	cancel(ErrStopping)
	return server.Close()
}

func readConfig(in *bufio.Reader) (child.RunnerConfig, error) {
	var config child.RunnerConfig
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		line = append(line, part...)
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return config, err
		}
		if len(line) > maxConfigBytes {
			return config, fmt.Errorf("the first line is longer than %d bytes", maxConfigBytes)
		}
	}
	if err := json.Unmarshal(line, &config); err != nil {
		return config, err
	}
	if config.Socket == "" || config.ModelDir == "" {
		return config, errors.New("socket and model_dir must be set")
	}
	return config, nil
}
