//go:build cgo

package conformance_test

import (
	"context"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hone-llm/hone/configs"
)

// TestBusy validates what a server answers whose queue is full, and one that drains: 429 and 503, both with Retry-After.
func TestBusy(t *testing.T) {
	s := start(t, func(c *configs.Config) {
		c.Sequences, c.Runner.Queue, c.ShutdownGrace = 1, 1, 20*time.Second
	})
	const ask = `{"model":"` + model + `","max_tokens":1,"messages":[{"role":"user","content":"Hi"}]}`
	s.send(http.StatusOK, http.MethodPost, "/v1/chat/completions", ask)

	// One is computed and one waits; the others are refused.
	long := strings.Replace(ask, `"max_tokens":1`, `"max_tokens":4000,"ignore_eos":true,"stream":true`, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	refused := make(chan int, 4)
	var asking sync.WaitGroup
	for range cap(refused) {
		asking.Go(func() {
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+"/v1/chat/completions", strings.NewReader(long))
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Content-Type", "application/json")
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				return // it was broken off before it was answered
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				refused <- resp.StatusCode
			}
			_, _ = io.Copy(io.Discard, resp.Body)
		})
	}
	for range cap(refused) - 2 {
		if status := <-refused; status != http.StatusTooManyRequests {
			t.Errorf("one too many was answered %d", status)
		}
	}
	wantRetry := func(a answer) {
		t.Helper()
		if a.header.Get("Retry-After") == "" {
			t.Errorf("%d without Retry-After: %s", a.status, a.body)
		}
	}
	wantRetry(s.send(http.StatusTooManyRequests, http.MethodPost, "/v1/chat/completions", ask))

	var stopping sync.WaitGroup
	stopping.Go(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		if err := s.app.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	deadline := time.Now().Add(10 * time.Second)
	for {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.url+"/v1/chat/completions", strings.NewReader(ask))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		a := s.do(req)
		if a.status == http.StatusServiceUnavailable {
			wantRetry(a)
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a server that drains answers %d %s", a.status, a.body)
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	asking.Wait()
	stopping.Wait()
}
