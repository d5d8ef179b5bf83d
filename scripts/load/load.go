package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// load is many clients that ask at once, and a steady rate of small requests beside them.
type load struct {
	clients, sequences, tokens, rate int
	duration                         time.Duration

	mu                               sync.Mutex
	firsts, gaps, streams, questions []time.Duration // of answers: to a stream's first token, between two, whole
	failures                         []error
	probes                           map[string][]time.Duration // by path
	refused                          atomic.Int64               // 429, each asked again
	streaming, most                  atomic.Int64               // streams between their first token and their end
}

// maxFailures is how many failures are shown.
const maxFailures = 10

func (l *load) fail(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failures = append(l.failures, fmt.Errorf(format, args...))
}

func (l *load) run(ctx context.Context, s *server) error {
	l.probes = map[string][]time.Duration{}
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: l.clients}}
	// The model is loaded, and its first tokens are computed, before the clock runs.
	if _, _, err := l.ask(ctx, client, s, true, 0); err != nil {
		return err
	}
	l.firsts, l.gaps, l.streams = nil, nil, nil
	l.most.Store(0)
	fmt.Printf("%d clients for %v: three of four stream %d tokens, one asks for a choice; beside them %d requests/s\n", l.clients, l.duration, l.tokens, l.rate)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	began := time.Now()
	var probing, asking sync.WaitGroup
	probing.Go(func() { l.probe(ctx, s) })
	for c := range l.clients {
		asking.Go(func() {
			for n := 0; time.Since(began) < l.duration && ctx.Err() == nil; n++ {
				l.patiently(ctx, client, s, c%4 != 3, c*1000+n)
			}
		})
	}
	asking.Wait()
	took := time.Since(began)
	cancel()
	probing.Wait()

	tokens := len(l.streams) * l.tokens
	fmt.Printf("in %v: %d streams and %d questions answered, %.0f tokens/s of streams; at most %d streamed at once; %d times told to come back (429)\n",
		took.Round(time.Second), len(l.streams), len(l.questions), float64(tokens)/took.Seconds(), l.most.Load(), l.refused.Load())
	fmt.Println("to the first token, without refusals:", percentiles(l.firsts))
	fmt.Println("between tokens:                      ", percentiles(l.gaps))
	fmt.Println("whole stream:                        ", percentiles(l.streams))
	fmt.Println("whole question:                      ", percentiles(l.questions))
	sent := 0
	for path, took := range l.probes {
		sent += len(took)
		fmt.Printf("%-37s %s (%d requests)\n", path+":", percentiles(took), len(took))
	}
	fmt.Printf("beside: %.0f requests/s\n", float64(sent)/took.Seconds())
	if n := l.most.Load(); n < 64 {
		l.fail("at most %d streams were served at once, promised are 64", n)
	}
	if got := float64(sent) / took.Seconds(); got < 0.97*float64(l.rate) {
		l.fail("%.0f requests/s for /health and /v1/models were answered, promised are %d", got, l.rate)
	}
	if len(l.failures) > maxFailures {
		l.failures = append(l.failures[:maxFailures], fmt.Errorf("and %d more", len(l.failures)-maxFailures))
	}
	return errors.Join(l.failures...)
}

// patiently asks until the server does not tell to come back.
func (l *load) patiently(ctx context.Context, client *http.Client, s *server, stream bool, number int) {
	for {
		began := time.Now()
		status, header, err := l.ask(ctx, client, s, stream, number)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil && !stream:
			l.mu.Lock()
			l.questions = append(l.questions, time.Since(began))
			l.mu.Unlock()
			return
		case err == nil:
			return
		case status != http.StatusTooManyRequests:
			l.fail("request %d: %w", number, err)
			return
		}
		l.refused.Add(1)
		wait, err := strconv.Atoi(header.Get("Retry-After"))
		if err != nil || wait <= 0 {
			l.fail("request %d: 429 with Retry-After %q", number, header.Get("Retry-After"))
			return
		}
		// As OpenAI's clients do, some of the time more, so that not all come back at once.
		select {
		case <-time.After(time.Duration((1 + rand.Float64()) * float64(wait) * float64(time.Second))):
		case <-ctx.Done():
			return
		}
	}
}

// ask sends one request and reads its answer to the end. The status is that of a reply.
func (l *load) ask(ctx context.Context, client *http.Client, s *server, stream bool, number int) (status int, header http.Header, err error) {
	body := map[string]any{
		"model": s.model, "temperature": 0,
		"messages": []any{
			map[string]string{"role": "system", "content": "You are a careful assistant. Answer briefly, and say it if you do not know."},
			map[string]string{"role": "user", "content": fmt.Sprintf("Question %d: which of the numbers %d and %d is larger? (A) the first (B) the second", number, number*7%1000, number*13%1000)},
		},
	}
	if stream {
		body["stream"], body["max_tokens"], body["ignore_eos"] = true, l.tokens, true
	} else {
		body["guided_choice"] = []string{"A", "B"}
	}
	data, err := json.Marshal(body)
	if err != nil {
		return 0, nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+"/v1/chat/completions", bytes.NewReader(data))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	began := time.Now()
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return resp.StatusCode, resp.Header, fmt.Errorf("%s: %s", resp.Status, text)
	}
	if !stream {
		var answer struct{ Choices []json.RawMessage }
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || len(answer.Choices) != 1 {
			return resp.StatusCode, resp.Header, fmt.Errorf("an answer with %d choices: %w", len(answer.Choices), err)
		}
		_, err := io.Copy(io.Discard, resp.Body) // the connection is used again
		return resp.StatusCode, resp.Header, err
	}
	return resp.StatusCode, resp.Header, l.read(resp.Body, began)
}

// read reads a stream to its end.
func (l *load) read(body io.Reader, began time.Time) error {
	var last time.Time
	var first time.Duration
	var gaps []time.Duration
	finished, done := false, false
	defer func() {
		if !last.IsZero() {
			l.streaming.Add(-1)
		}
	}()
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		line := lines.Bytes()
		now := time.Now()
		switch {
		case bytes.HasPrefix(line, []byte(`data: {"error"`)):
			return fmt.Errorf("the stream ended with %s", line)
		case bytes.Equal(line, []byte("data: [DONE]")):
			done = true
		case bytes.HasPrefix(line, []byte("data: ")):
			finished = finished || bytes.Contains(line, []byte(`"finish_reason":"`))
			if !bytes.Contains(line, []byte(`"content":"`)) || bytes.Contains(line, []byte(`"content":""`)) {
				continue // the role, or the end
			}
			if last.IsZero() {
				first = now.Sub(began)
				n := l.streaming.Add(1)
				for most := l.most.Load(); n > most && !l.most.CompareAndSwap(most, n); most = l.most.Load() {
				}
			} else {
				gaps = append(gaps, now.Sub(last))
			}
			last = now
		}
	}
	if err := lines.Err(); err != nil {
		return err
	}
	if !finished || !done || last.IsZero() {
		return fmt.Errorf("the stream ended without text, finish_reason or [DONE]")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.firsts, l.gaps, l.streams = append(l.firsts, first), append(l.gaps, gaps...), append(l.streams, time.Since(began))
	return nil
}

// probeConnections is how many connections the small requests share, and probeTick how often they are sent.
const (
	probeConnections = 64
	probeTick        = 5 * time.Millisecond
)

// probe sends /health and /v1/models in turn, at the rate, whether they are answered or not: a time is from the moment when a
// request was to be sent.
func (l *load) probe(ctx context.Context, s *server) {
	paths := []string{"/health", "/v1/models"}
	var due [2]chan time.Time
	var working sync.WaitGroup
	for i, path := range paths {
		due[i] = make(chan time.Time, 60*l.rate)
		for range probeConnections / len(paths) {
			working.Go(func() { l.ping(ctx, s, path, due[i]) })
		}
	}
	began := time.Now()
	ticks := time.NewTicker(probeTick)
	defer ticks.Stop()
	for n := 0; ctx.Err() == nil; {
		for ; n < int(time.Since(began).Seconds()*float64(l.rate)); n++ {
			select {
			case due[n%2] <- began.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second))):
			default:
				l.fail("%s: %d requests wait to be sent", paths[n%2], cap(due[n%2]))
				return
			}
		}
		select {
		case <-ticks.C:
		case <-ctx.Done():
		}
	}
	for _, c := range due {
		close(c)
	}
	working.Wait()
}

// ping sends a request over one connection for each time that it is handed. It is no http.Client, which would take more of the
// machine than the server does.
func (l *load) ping(ctx context.Context, s *server, path string, due <-chan time.Time) {
	var took []time.Duration
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.probes[path] = append(l.probes[path], took...)
	}()
	host := strings.TrimPrefix(s.url, "http://")
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", host)
	if err != nil {
		l.fail("%s: %w", path, err)
		return
	}
	defer conn.Close()
	request := []byte("GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n")
	from := bufio.NewReader(conn)
	for at := range due {
		if _, err := conn.Write(request); err != nil {
			l.fail("%s: %w", path, err)
			return
		}
		if err := readReply(from); err != nil {
			l.fail("%s: %w", path, err)
			return
		}
		took = append(took, time.Since(at))
	}
}

// readReply reads a reply that must be a 200.
func readReply(from *bufio.Reader) error {
	length := -1
	for first := true; ; first = false {
		line, err := from.ReadSlice('\n')
		switch {
		case err != nil:
			return err
		case first && !bytes.HasPrefix(line, []byte("HTTP/1.1 200 ")):
			return fmt.Errorf("answered %q", line)
		case len(line) == 2:
			if length < 0 {
				return errors.New("a reply without Content-Length")
			}
			_, err := from.Discard(length)
			return err
		case len(line) > 16 && bytes.EqualFold(line[:15], []byte("Content-Length:")):
			if length, err = strconv.Atoi(string(bytes.TrimSpace(line[15:]))); err != nil {
				return err
			}
		}
	}
}
