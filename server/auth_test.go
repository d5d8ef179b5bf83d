package server

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// secrets are the keys of withKeys, by name.
var secrets = map[string]string{
	"chatter": "sk-hone-chatter-secret", "tuner": "sk-hone-tuner-secret", "watcher": "sk-hone-watcher-secret", "owner": "sk-hone-owner-secret",
}

func withKeys(o *Options) {
	scopes := map[string][]string{
		"chatter": {ScopeInfer}, "tuner": {ScopeTrain}, "watcher": {ScopeAdmin}, "owner": {ScopeInfer, ScopeTrain, ScopeAdmin},
	}
	for _, name := range slices.Sorted(maps.Keys(secrets)) {
		o.Keys = append(o.Keys, Key{Name: name, Hash: sha256.Sum256([]byte(secrets[name])), Scopes: scopes[name]})
	}
}

// registered are the patterns of all routes with a path that each takes. None of them does anything: the ids do not exist.
func registered(s *Server) map[string]string {
	paths := map[string]string{}
	for _, route := range s.engine.Routes() {
		path := route.Path
		for _, part := range strings.Split(route.Path, "/") {
			if strings.HasPrefix(part, ":") || strings.HasPrefix(part, "*") {
				path = strings.Replace(path, part, "none", 1)
			}
		}
		paths[route.Method+" "+route.Path] = path
	}
	return paths
}

func TestEveryRouteHasAccess(t *testing.T) {
	t.Parallel()
	there := registered(newRig(t).server)
	for route := range there {
		if _, ok := routes[route]; !ok {
			t.Errorf("%s has no row in the table routes of auth.go: say which scope and which body it takes", route)
		}
	}
	for route, a := range routes {
		if _, ok := there[route]; !ok {
			t.Errorf("the table routes of auth.go has %s, which is not registered", route)
		}
		if method, _, _ := strings.Cut(route, " "); method == http.MethodGet && a.body != noBody {
			t.Errorf("%s takes a body", route)
		}
	}
}

// TestScopes sends requests of every key, of none and of a wrong one to every route, in several forms.
func TestScopes(t *testing.T) {
	t.Parallel()
	r := newRig(t, withKeys)
	for route, path := range registered(r.server) {
		method, _, _ := strings.Cut(route, " ")
		need := routes[route].scopes
		for _, test := range []struct {
			name, header string
			scopes       []string // nil: no valid key
		}{
			{"no key", "", nil},
			{"wrong key", "Bearer sk-hone-wrong", nil},
			{"empty key", "Bearer ", nil},
			{"the hash as the key", fmt.Sprintf("Bearer %x", sha256.Sum256([]byte(secrets["owner"]))), nil},
			{"key without a scheme", secrets["owner"], nil},
			{"basic", "Basic " + secrets["owner"], nil},
			{"beginning of a key", "Bearer " + secrets["owner"][:19], nil},
			{"infer", "Bearer " + secrets["chatter"], []string{ScopeInfer}},
			{"train", "bearer " + secrets["tuner"], []string{ScopeTrain}},
			{"admin", "Bearer " + secrets["watcher"], []string{ScopeAdmin}},
			{"all", "Bearer  " + secrets["owner"], []string{ScopeInfer, ScopeTrain, ScopeAdmin}},
		} {
			headers := []string{"Authorization", test.header, "X-Api-Key", secrets["owner"], "Api-Key", secrets["owner"]}
			status, body := r.do(t, method, path+"?api_key="+secrets["owner"], "{}", headers...)
			name := test.name + " for " + route
			missing := slices.DeleteFunc(slices.Clone(need), func(s string) bool { return slices.Contains(test.scopes, s) })
			switch {
			case need == nil || test.scopes != nil && len(missing) == 0:
				if status == http.StatusUnauthorized || status == http.StatusForbidden {
					t.Errorf("%s: %d %s", name, status, body)
				}
			case test.scopes == nil:
				wantError(t, name, status, body, http.StatusUnauthorized, "", "invalid_api_key", "key")
			default:
				wantError(t, name, status, body, http.StatusForbidden, "", "insufficient_scope", "the scope "+missing[0])
			}
		}
	}
	// What there is not is told to those only who have a key.
	status, body := r.do(t, "GET", "/v1/nothing", "")
	wantError(t, "unknown path without a key", status, body, http.StatusUnauthorized, "", "invalid_api_key", "HONE_API_KEY")
	status, body = r.do(t, "PUT", "/v1/files", "", "Authorization", "Bearer "+secrets["watcher"])
	wantError(t, "wrong method with a key", status, body, http.StatusMethodNotAllowed, "", "method_not_allowed", "PUT")
}

func TestWithoutKeysAnyWillDo(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for route, path := range registered(r.server) {
		method, _, _ := strings.Cut(route, " ")
		for _, header := range []string{"", "Bearer anything", "Basic x"} {
			if status, body := r.do(t, method, path, "{}", "Authorization", header); status == http.StatusUnauthorized || status == http.StatusForbidden {
				t.Errorf("%s with %q: %d %s", route, header, status, body)
			}
		}
	}
}

// TestBatchesNeedNoKey: the requests of a batch were let in with it.
func TestBatchesNeedNoKey(t *testing.T) {
	t.Parallel()
	r := newRig(t, withKeys)
	answer := r.server.Answer(t.Context(), "/v1/chat/completions", []byte(`{"model":"smol","messages":[{"role":"user","content":"hello"}]}`))
	if answer.Status != http.StatusOK || !strings.Contains(string(answer.Body), "hello") {
		t.Errorf("got %d %s", answer.Status, answer.Body)
	}
}

// TestGuardOfEveryRoute sends what browsers send for foreign pages to every route.
func TestGuardOfEveryRoute(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	paths := registered(r.server)
	paths["GET (none)"], paths["PUT (none)"] = "/v1/nothing", "/v1/files"
	for route, path := range paths {
		method, _, _ := strings.Cut(route, " ")
		writes := method != http.MethodGet
		costly := slices.Contains(routes[route].scopes, ScopeAdmin)
		for _, test := range []struct {
			name    string
			headers []string
			refused bool
		}{
			{"address", nil, false},
			{"localhost", []string{"Host", "localhost:8080"}, false},
			{"localhost with a dot", []string{"Host", "localhost."}, false},
			{"IPv6", []string{"Host", "[::1]:8080"}, false},
			{"rebound name", []string{"Host", "evil.example:8080"}, true},
			{"rebound name, its own origin", []string{"Host", "evil.example", "Origin", "http://evil.example"}, true},
			{"name that only begins so", []string{"Host", "localhost.evil.example"}, true},
			{"address that only begins so", []string{"Host", "127.0.0.1.evil.example"}, true},
			{"decimal address", []string{"Host", "2130706433"}, true},
			{"forwarded name", []string{"X-Forwarded-Host", "evil.example", "Forwarded", "host=evil.example"}, false},
			{"page of another site", []string{"Sec-Fetch-Site", "cross-site"}, writes || costly},
			{"page of the same site", []string{"Sec-Fetch-Site", "same-site"}, writes || costly},
			{"own page", []string{"Sec-Fetch-Site", "same-origin"}, false},
			{"typed address", []string{"Sec-Fetch-Site", "none"}, false},
			{"origin of another page", []string{"Origin", "http://evil.example"}, writes},
			{"no origin", []string{"Origin", "null"}, writes},
			{"own origin", []string{"Host", "localhost:80", "Origin", "http://localhost:80"}, false},
		} {
			status, body := r.do(t, method, path, "{}", test.headers...)
			if got := status == http.StatusForbidden; got != test.refused {
				t.Errorf("%s, %s: %d %s", route, test.name, status, body)
			}
		}
	}
}

func TestCORS(t *testing.T) {
	t.Parallel()
	r := newRig(t, withKeys, func(o *Options) { o.CORSOrigins = []string{"https://app.example"} })
	ask := func(method, origin, path string, headers ...string) (int, http.Header) {
		req, err := http.NewRequestWithContext(t.Context(), method, r.URL+path, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Origin", origin)
		req.Header.Set("Sec-Fetch-Site", "cross-site")
		for i := 0; i < len(headers); i += 2 {
			req.Header.Set(headers[i], headers[i+1])
		}
		resp, err := r.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode, resp.Header
	}
	preflight := []string{"Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "authorization,content-type,x-stainless-os"}
	status, h := ask("OPTIONS", "https://app.example", "/v1/chat/completions", preflight...)
	if status != http.StatusNoContent || h.Get("Access-Control-Allow-Origin") != "https://app.example" ||
		h.Get("Access-Control-Allow-Headers") != preflight[3] || !strings.Contains(h.Get("Access-Control-Allow-Methods"), "POST") || h.Get("Vary") != "Origin" ||
		h.Get("Access-Control-Allow-Credentials") != "" {
		t.Errorf("preflight: %d %v", status, h)
	}
	status, h = ask("POST", "https://app.example", "/v1/tokenize", "Authorization", "Bearer "+secrets["chatter"])
	if status != http.StatusBadRequest || h.Get("Access-Control-Allow-Origin") != "https://app.example" {
		t.Errorf("request: %d %v", status, h)
	}
	if status, _ = ask("POST", "https://app.example", "/v1/tokenize"); status != http.StatusUnauthorized {
		t.Errorf("request without a key: %d", status)
	}
	for _, origin := range []string{"https://app.example.evil.example", "http://app.example", "https://app.example:444", "null", "https://APP.example"} {
		for _, method := range []string{"OPTIONS", "POST"} {
			status, h := ask(method, origin, "/v1/chat/completions", append(preflight, "Authorization", "Bearer "+secrets["owner"])...)
			if status < 400 || h.Get("Access-Control-Allow-Origin") != "" {
				t.Errorf("%s of %s: %d %v", method, origin, status, h)
			}
		}
	}
	r = newRig(t)
	if status, h := ask("OPTIONS", "https://app.example", "/v1/models", preflight...); h.Get("Access-Control-Allow-Origin") != "" || h.Get("Vary") != "" {
		t.Errorf("not configured: %d %v", status, h)
	}
}

// TestBodyLimits sends bodies around the limit of every route that takes JSON, with and without their length.
func TestBodyLimits(t *testing.T) {
	t.Parallel()
	const limit = 2000
	r := newRig(t, func(o *Options) { o.MaxBodyBytes = limit })
	for route, path := range registered(r.server) {
		method, _, _ := strings.Cut(route, " ")
		if routes[route].body != jsonBody {
			continue
		}
		for _, chunked := range []bool{false, true} {
			for length, want := range map[int]bool{limit - 1: false, limit: false, limit + 1: true, 10 * limit: true} {
				var body io.Reader = strings.NewReader(`{"x":"` + strings.Repeat("x", length-len(`{"x":""}`)) + `"}`)
				if chunked {
					body = io.MultiReader(body)
				}
				req, err := http.NewRequestWithContext(t.Context(), method, r.URL+path, body)
				if err != nil {
					t.Fatal(err)
				}
				resp, err := r.Client().Do(req)
				if err != nil {
					t.Fatal(err)
				}
				text, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if chunked && resp.StatusCode == http.StatusNotFound { // it need not be read to be told so
					continue
				}
				if got := resp.StatusCode == http.StatusRequestEntityTooLarge; err != nil || got != want {
					t.Errorf("%s with %d bytes (chunked %v): %s %s %v", route, length, chunked, resp.Status, text, err)
				}
			}
		}
	}
}

func TestSlowBodyIsCut(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(o *Options) { o.BodyTimeout = 200 * time.Millisecond })
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", r.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n{") // more than comes while the test runs
	done := make(chan struct{})
	defer func() { <-done }()
	stop := make(chan struct{})
	defer close(stop)
	go func() { // a byte now and then
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
				if _, err := conn.Write([]byte(" ")); err != nil {
					return
				}
			}
		}
	}()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	wantError(t, "slow body", resp.StatusCode, string(body), http.StatusRequestTimeout, "", "request_timeout", "too slowly")
}

// TestUnreadBodyIsNotWaitedFor answers before a body that never comes.
func TestUnreadBodyIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	r := newRig(t, withKeys, func(o *Options) { o.BodyTimeout = 200 * time.Millisecond })
	for _, path := range []string{"/v1/chat/completions", "/v1/files", "/v1/nothing", "/v1/models", "/health"} {
		for _, length := range []int{100, 1 << 20, 1 << 30} {
			conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", r.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n{", path, length)
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Errorf("%s with %d bytes to come: %v", path, length, err)
			} else if resp.Body.Close(); resp.StatusCode < 400 || resp.StatusCode >= 500 {
				t.Errorf("%s with %d bytes to come: %s", path, length, resp.Status)
			}
			conn.Close()
		}
	}
}

// TestAnswersOutliveTheBodysTime holds a stream open for longer than its body might have taken.
func TestAnswersOutliveTheBodysTime(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(o *Options) { o.BodyTimeout = 50 * time.Millisecond })
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.URL+"/v1/chat/completions",
		strings.NewReader(`{"model":"smol","stream":true,"messages":[{"role":"user","content":"a wait"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if resp, err := r.Client().Do(req); err == nil {
			_, _ = io.Copy(io.Discard, resp.Body) // until it is cancelled
			resp.Body.Close()
		}
	}()
	select {
	case <-r.echo.cancelled:
		t.Error("the request was cancelled")
	case <-time.After(500 * time.Millisecond):
	}
	cancel()
	<-ended
	<-r.echo.cancelled
}

// buffer is a log that may be read while it is written.
type buffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *buffer) String() string { b.mu.Lock(); defer b.mu.Unlock(); return b.text.String() }

// lines waits for n lines of the log that are of requests: they come after the answers.
func (b *buffer) lines(t *testing.T, n int) []map[string]any {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		var all []map[string]any
		for line := range strings.Lines(b.String()) {
			var fields map[string]any
			if err := json.Unmarshal([]byte(line), &fields); err != nil {
				t.Fatalf("%v: %s", err, line)
			}
			all = append(all, fields)
		}
		if len(all) >= n || time.Now().After(deadline) {
			return all
		}
	}
}

// TestLog checks that every request has one line with its id, and that no key is in any.
func TestLog(t *testing.T) {
	t.Parallel()
	var log buffer
	r := newRig(t, withKeys, func(o *Options) {
		o.Logger = slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	key := "Bearer " + secrets["owner"]
	chat := `{"model":"smol","messages":[{"role":"user","content":%q}]}`
	file, err := r.store.CreateFile(t.Context(), "a.jsonl", "fine-tune", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		method, path, body, key string
		level, message          string
		status                  float64
	}{
		{"GET", "/health", "", "", "DEBUG", "request", 200},
		{"GET", "/v1/models?api_key=" + secrets["owner"], "", key, "DEBUG", "request", 200},
		{"POST", "/v1/chat/completions", fmt.Sprintf(chat, "hi"), key, "INFO", "request", 200},
		{"POST", "/v1/chat/completions", fmt.Sprintf(chat, "die"), key, "ERROR", "request failed", 500},
		{"POST", "/v1/chat/completions", fmt.Sprintf(chat, "panic"), key, "ERROR", "request failed", 500},
		{"POST", "/v1/chat/completions", "{", key, "INFO", "request refused", 400},
		{"POST", "/v1/chat/completions", fmt.Sprintf(chat, "hi"), "Bearer sk-hone-guessed-secret", "INFO", "request refused", 401},
		{"GET", "/metrics", "", "Bearer " + secrets["chatter"], "INFO", "request refused", 403},
		{"POST", "/v1/fine_tuning/jobs", `{"model":"smol","training_file":"` + file.ID + `"}`, key, "INFO", "request", 200},
		{"GET", "/v1/fine_tuning/jobs/ftjob-x/events", "", key, "INFO", "request refused", 404},
	} {
		before := len(log.lines(t, 0))
		r.do(t, test.method, test.path, test.body, "Authorization", test.key, "X-Request-Id", "req_mine.1")
		lines := log.lines(t, before+1)[before:]
		if len(lines) != 1 {
			t.Errorf("%s %s: %d lines %v", test.method, test.path, len(lines), lines)
			continue
		}
		line := lines[0]
		if line["level"] != test.level || line["msg"] != test.message || line["status"] != test.status || line["request_id"] != "req_mine.1" {
			t.Errorf("%s %s: %v, want %s %q %v", test.method, test.path, line, test.level, test.message, test.status)
		}
		if wantKey := test.key == key; wantKey != (line["key"] == "owner") {
			t.Errorf("%s %s: the key is %v", test.method, test.path, line["key"])
		}
		if job, ok := line["job_id"].(string); strings.Contains(test.path, "jobs") != (ok && strings.HasPrefix(job, "ftjob-")) {
			t.Errorf("%s %s: the job is %v", test.method, test.path, line["job_id"])
		}
	}
	for _, secret := range append(slices.Collect(maps.Values(secrets)), "sk-hone") {
		if strings.Contains(log.String(), secret) {
			t.Errorf("the log has %s:\n%s", secret, log.String())
		}
	}
}

func TestRequestID(t *testing.T) {
	t.Parallel()
	for sent, taken := range map[string]bool{
		"req_1-a.B": true, strings.Repeat("a", 64): true, "": false, strings.Repeat("a", 65): false, "a b": false, "a\"b": false, "é": false, "a=b": false,
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody)
		r.Header.Set("X-Request-Id", sent)
		if got := requestID(r); (got == sent) != taken || !taken && !strings.HasPrefix(got, "req_") {
			t.Errorf("%q: the id is %q", sent, got)
		}
	}
}
