package server

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestDrain stops a server while a request is computed: that one is answered, others are refused until then and after.
func TestDrain(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(o *Options) { o.DefaultModel = "smol" })
	r.echo.hold = make(chan struct{})
	body := `{"model":"smol","messages":[{"role":"user","content":"hold"}]}`
	first := make(chan int, 1)
	go func() {
		status := 0
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, r.URL+"/v1/chat/completions", strings.NewReader(body))
		if err == nil {
			resp, err := r.Client().Do(req)
			if err == nil {
				resp.Body.Close()
				status = resp.StatusCode
			}
		}
		first <- status
	}()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		r.echo.mu.Lock()
		running := r.echo.running
		r.echo.mu.Unlock()
		if running == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the request does not reach the model")
		}
	}
	answered := r.server.Drain()
	for _, request := range []struct{ method, path, message string }{
		{"POST", "/v1/chat/completions", "stopping"},
		{"GET", "/v1/models", "stopping"},
		{"GET", "/v1/nothing", "stopping"},
		{"GET", "/ready", "draining"},
	} {
		req, err := http.NewRequestWithContext(t.Context(), request.method, r.URL+request.path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		reply, err := r.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		reply.Body.Close()
		if reply.Header.Get("Retry-After") == "" {
			t.Errorf("%s %s while draining has no Retry-After", request.method, request.path)
		}
		status, text := r.do(t, request.method, request.path, body)
		wantError(t, request.path, status, text, 503, "", "shutting_down", request.message)
	}
	if status, text := r.do(t, "GET", "/health", ""); status != 200 {
		t.Errorf("/health while draining: %d %s", status, text)
	}
	select {
	case <-answered:
		t.Error("drained before the request was answered")
	default:
	}
	close(r.echo.hold)
	if status := <-first; status != 200 {
		t.Errorf("the request in progress got %d", status)
	}
	<-answered
	<-r.server.Drain() // again
}
