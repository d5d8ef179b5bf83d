package child

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
)

// ErrEnded says that a runner's stream stopped before its completion was finished.
var ErrEnded = errors.New("the stream ended before the completion was finished")

// errNotSent marks errors of requests that the runner has not received.
var errNotSent = errors.New("the request was not sent")

// RunnerOptions says how to start a runner.
type RunnerOptions struct {
	Exe    string
	Args   []string // nil: runner
	Env    []string
	Config RunnerConfig // Socket is chosen by StartRunner
	Stderr io.Writer
	// SocketDir is an absolute directory to put the socket below. Where it is "" or longer than a socket's path may be,
	// the socket is in a temporary directory, which stays behind if this process is killed.
	SocketDir string
	Started   func(pid int) // is told the process before it is ready; may be nil
}

// Runner is a started runner: one loaded base model. Its methods may be called from several goroutines.
type Runner struct {
	process  *Process
	dir      string // of the socket
	client   *http.Client
	read     chan struct{} // closed when standard output is read to its end
	began    time.Time
	lastSign atomic.Int64 // nanoseconds after began: the newest answer or part of one

	ContextTokens int   // longest prompt + completion, as the runner decided
	MemoryBytes   int64 // as in RunnerEvent; 0 if the runner did not say
}

// heard notes that the runner lives.
func (r *Runner) heard() { r.lastSign.Store(int64(time.Since(r.began))) }

// silence is how long ago that was.
func (r *Runner) silence() time.Duration {
	return time.Since(r.began) - time.Duration(r.lastSign.Load())
}

// probe asks the runner for a sign of life.
func (r *Runner) probe(ctx context.Context) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://runner/status", http.NoBody)
	if err != nil {
		return
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return // silence says it
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxLineBytes)); err == nil {
		r.heard()
	}
}

// StartRunner starts a runner and waits until it is ready. If ctx ends before, or the runner ends or says that it
// cannot serve the model (an *Error), the runner is gone when StartRunner returns. Later, ctx does not matter.
func StartRunner(ctx context.Context, opts RunnerOptions) (*Runner, error) {
	dir, err := socketDir(opts.SocketDir)
	if err != nil {
		return nil, err
	}
	config := opts.Config
	config.Socket = filepath.Join(dir, "runner.sock")
	args := opts.Args
	if args == nil {
		args = []string{"runner"}
	}
	process, err := Start(context.WithoutCancel(ctx), Options{Exe: opts.Exe, Args: args, Env: opts.Env, Config: config, Stderr: opts.Stderr})
	if err != nil {
		_ = os.RemoveAll(dir)
		return nil, err
	}
	r := &Runner{process: process, dir: dir, read: make(chan struct{}), began: time.Now()}
	if opts.Started != nil {
		opts.Started(process.PID())
	}
	r.client = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", config.Socket)
		},
		// A connection that was kept may be that of a runner that has ended, and a request lost on it may not be sent again.
		DisableKeepAlives:  true,
		DisableCompression: true,
	}}
	first := make(chan error, 1)
	go r.readEvents(first)
	select {
	case err = <-first:
	case <-ctx.Done():
		err = fmt.Errorf("wait until the runner of %s is ready: %w", config.ModelDir, context.Cause(ctx))
	}
	if err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// readEvents reports the first event's outcome to first and drops what follows, so that the pipe never fills.
func (r *Runner) readEvents(first chan<- error) {
	defer close(r.read)
	var event RunnerEvent
	line, err := r.process.Next()
	if err == nil {
		err = json.Unmarshal(line, &event)
	}
	switch {
	case errors.Is(err, io.EOF):
		if err = r.process.Wait(); err == nil {
			err = errors.New("the runner exited before it was ready")
		}
	case err != nil:
		err = fmt.Errorf("read the runner's first event: %w", err)
	case event.Type == "ready":
		r.ContextTokens, r.MemoryBytes = event.ContextTokens, event.MemoryBytes
		r.heard()
	case event.Error != nil:
		err = event.Error
	default:
		err = fmt.Errorf("the runner's first event is %q, not ready or failed", event.Type)
	}
	first <- err
	for err == nil {
		_, err = r.process.Next()
	}
}

// PID returns the runner's process id.
func (r *Runner) PID() int { return r.process.PID() }

// Done is closed when the runner has ended.
func (r *Runner) Done() <-chan struct{} { return r.process.Done() }

func (r *Runner) ended() bool {
	select {
	case <-r.Done():
		return true
	default:
		return false
	}
}

// Generate yields the events of a request; the last one has Usage. A refusal by the runner is
// yielded as an *Error. If the runner ends meanwhile, the error says how: an *ExitError, or ErrEnded.
// Breaking off the loop or ending ctx cancels the completion in the runner.
func (r *Runner) Generate(ctx context.Context, req GenerateRequest) iter.Seq2[GenerateEvent, error] {
	return func(yield func(GenerateEvent, error) bool) {
		fail := func(err error) { yield(GenerateEvent{}, err) }
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		resp, err := r.post(ctx, "/generate", req)
		if err != nil {
			fail(err)
			return
		}
		defer resp.Body.Close()
		lines := bufio.NewReaderSize(resp.Body, 16<<10)
		for {
			line, err := readLine(lines)
			if err != nil {
				if errors.Is(err, io.EOF) {
					err = ErrEnded
				}
				fail(r.endOf(ctx, err))
				return
			}
			r.heard()
			if len(line) == 0 {
				continue
			}
			var event GenerateEvent
			switch err := json.Unmarshal(line, &event); {
			case err != nil && resp.StatusCode != http.StatusOK:
				fail(fmt.Errorf("the runner answered %s: %.200s", resp.Status, line))
				return
			case err != nil:
				fail(fmt.Errorf("read an event of the runner: %w", err))
				return
			case event.Error != nil:
				fail(event.Error)
				return
			case resp.StatusCode != http.StatusOK:
				fail(fmt.Errorf("the runner answered %s", resp.Status))
				return
			}
			if !yield(event, nil) || event.Usage != nil {
				return
			}
		}
	}
}

// UnloadAdapter frees an adapter's weights, if the runner has them, and what it has computed with them.
func (r *Runner) UnloadAdapter(ctx context.Context, id string) error {
	resp, err := r.post(ctx, "/adapters/unload", map[string]string{"id": id})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the runner answered %s", resp.Status)
	}
	return nil
}

// Embed returns the vectors of the request's inputs. Errors are those of Generate.
func (r *Runner) Embed(ctx context.Context, req EmbedRequest) (EmbedResponse, error) {
	var resp EmbedResponse
	err := r.call(ctx, "/embed", req, &resp)
	return resp, err
}

// Tokenize turns text or messages into tokens, or tokens into text. Errors are those of Generate.
func (r *Runner) Tokenize(ctx context.Context, req TokenizeRequest) (TokenizeResponse, error) {
	var resp TokenizeResponse
	err := r.call(ctx, "/tokenize", req, &resp)
	return resp, err
}

// call posts req and decodes the one object of the answer into resp.
func (r *Runner) call(ctx context.Context, path string, req, resp any) error {
	httpResp, err := r.post(ctx, path, req)
	if err != nil {
		return err
	}
	defer httpResp.Body.Close()
	if httpResp.StatusCode == http.StatusOK {
		if err := json.NewDecoder(httpResp.Body).Decode(resp); err != nil {
			return r.endOf(ctx, fmt.Errorf("read the runner's answer: %w", err))
		}
		r.heard()
		return nil
	}
	line, err := readLine(bufio.NewReader(httpResp.Body))
	if err != nil && !errors.Is(err, io.EOF) {
		return r.endOf(ctx, err)
	}
	var event GenerateEvent
	if json.Unmarshal(line, &event) == nil && event.Error != nil {
		return event.Error
	}
	return fmt.Errorf("the runner answered %s: %.200s", httpResp.Status, line)
}

// post sends v as JSON. The caller closes the answer's body.
func (r *Runner) post(ctx context.Context, path string, v any) (*http.Response, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode a request for the runner: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://runner"+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("make a request for the runner: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := r.client.Do(req)
	if err != nil {
		var dial *net.OpError
		sent := !errors.As(err, &dial) || dial.Op != "dial"
		if err = r.endOf(ctx, err); !sent && ctx.Err() == nil {
			err = fmt.Errorf("%w: %w", errNotSent, err)
		}
		return nil, err
	}
	r.heard()
	return resp, nil
}

// endOf explains err by the caller's own cancelling, else by the runner's end if it ended.
func (r *Runner) endOf(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	// The socket closes a moment before the process can be waited for.
	select {
	case <-r.process.Done():
		if exit := r.process.Wait(); exit != nil {
			return exit
		}
		return ErrEnded
	case <-time.After(2 * time.Second):
		return err
	}
}

// Stop ends the runner softly until ctx ends, then hard, and frees all that StartRunner made.
func (r *Runner) Stop(ctx context.Context) {
	_ = r.process.Stop(ctx) // how a runner that is not wanted any more ends is of no interest
	r.Close()
}

// Close ends the runner at once and frees all that StartRunner made.
func (r *Runner) Close() {
	_ = r.process.Kill()
	<-r.read
	r.process.Close()
	r.client.CloseIdleConnections()
	_ = os.RemoveAll(r.dir)
}
