package server

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
)

// Routes that take JSON, and bodies for them.
var (
	fuzzedRoutes = []string{
		"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/decisions", "/v1/tokenize", "/v1/fine_tuning/jobs", "/v1/batches", "/v1/uploads",
	}
	fuzzedBodies = []struct {
		route uint8 // in fuzzedRoutes
		body  string
	}{
		{0, `{"model":"smol","messages":[{"role":"user","content":"Q"}],"max_tokens":3,"n":2,"logprobs":true,"top_logprobs":2}`},
		{0, `{"model":"smol","messages":[{"role":"user","content":"Q"}],"stream":true,"stream_options":{"include_usage":true}}`},
		{0, `{"model":"smol","messages":[{"role":"user","content":[{"type":"text","text":"Q"}]}],"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}],"tool_choice":"required"}`},
		{0, `{"model":"smol","messages":[{"role":"user","content":"Q"}],"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":{"$ref":"#"}}}}`},
		{0, `{"model":"smol","messages":[{"role":"user","content":"Q"}],"temperature":1e308,"seed":-9223372036854775808,"top_p":-0,"logit_bias":{"1":100}}`},
		{0, `{"model":"smol","messages":[{"role":"user","content":"` + "\\ud800" + `"}],"stop":["",""]}`},
		{1, `{"model":"smol","prompt":[1,2,2147483648],"echo":true,"suffix":"a"}`},
		{1, `{"model":"smol","prompt":["a","b"],"n":128,"best_of":1}`},
		{2, `{"model":"smol","input":["a",""],"encoding_format":"base64","dimensions":1}`},
		{3, `{"model":"smol","messages":[{"role":"user","content":"Q"}],"choices":["A","B"]}`},
		{3, `{"model":"smol","choices":["A","A"],"prompt":"Q"}`},
		{4, `{"model":"smol","text":"a"}`},
		{5, `{"model":"smol","training_file":"../../etc/passwd","suffix":"$(id)","hyperparameters":{"n_epochs":"auto"},"method":{"type":"dpo"}}`},
		{5, `{"model":"smol","training_file":"file-1","seed":99999999999999999999,"metadata":{"a":1}}`},
		{6, `{"input_file_id":"file-1","endpoint":"/v1/chat/completions","completion_window":"24h"}`},
		{7, `{"filename":"..","purpose":"batch","bytes":-1,"mime_type":""}`},
		{0, strings.Repeat(`{"messages":[`, 300)}, {0, strings.Repeat("[", 20000)}, {0, "\xff\xfe{}"}, {0, "null"}, {0, `{"model":"smol","model":"other"}`}, {0, "{\"a\":\x00}"},
	}
)

// Whatever the body, a request is answered or refused as OpenAI's clients can read it. The seeds are few: the fuzzer takes each by
// itself, with all of the program's counters, at 30 a second. TestOddFields has the many.
func FuzzRequests(f *testing.F) {
	for _, seed := range fuzzedBodies {
		f.Add(seed.route, seed.body)
	}
	r := newRig(f)
	f.Fuzz(func(t *testing.T, route uint8, body string) {
		answered(t, r.Config.Handler, fuzzedRoutes[int(route)%len(fuzzedRoutes)], body)
	})
}

// Every field of every body with every odd value is answered or refused, too.
func TestOddFields(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, seed := range fuzzedBodies {
		answered(t, r.Config.Handler, fuzzedRoutes[0], seed.body)
		var fields map[string]json.RawMessage
		if json.Unmarshal([]byte(seed.body), &fields) != nil {
			continue
		}
		for name, value := range fields {
			for _, odd := range []string{
				"null", "true", "0", "-1", "1.5", "1e308", "1e999", "2147483648", "-9223372036854775809", `""`, `"\u0000"`, `"../../etc/passwd"`, "[]", "[null]", "[[]]",
				"{}", `{"":{}}`, `{"type":1}`, strings.Repeat("[", 5000) + strings.Repeat("]", 5000),
			} {
				fields[name] = json.RawMessage(odd)
				body, err := json.Marshal(fields)
				if err != nil {
					t.Fatalf("%s: %v", odd, err)
				}
				answered(t, r.Config.Handler, fuzzedRoutes[seed.route], string(body))
			}
			fields[name] = value
		}
	}
}

// answered checks the answer to a body: it is no 5xx, no status without an envelope, and every line of a stream is JSON.
func answered(t *testing.T, handler http.Handler, path, body string) {
	t.Helper()
	// Words with which the small model ends its process or waits for ever.
	if slices.ContainsFunc([]string{"die", "wait", "hold", "panic", "cut", "busy", "loading"}, func(word string) bool { return strings.Contains(body, word) }) {
		return
	}
	req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, path, strings.NewReader(body))
	req.Host = "127.0.0.1"
	req.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, req)
	status, answer := w.Code, w.Body.String()
	if status >= 500 || status < 200 {
		t.Fatalf("%s %q: status %d, %s", path, body, status, answer)
	}
	var whole struct {
		Error *struct{ Message, Type *string }
	}
	if strings.HasPrefix(w.Header().Get("Content-Type"), "text/event-stream") {
		for line := range strings.Lines(answer) {
			data, ok := strings.CutPrefix(strings.TrimSpace(line), "data: ")
			if ok && data != "[DONE]" && json.Unmarshal([]byte(data), &whole) != nil {
				t.Errorf("%s %q: line %q", path, body, line)
			}
		}
		return
	}
	if err := json.Unmarshal([]byte(answer), &whole); err != nil {
		t.Fatalf("%s %q: %d %q: %v", path, body, status, answer, err)
	}
	if refused := whole.Error != nil && whole.Error.Message != nil && *whole.Error.Message != "" && whole.Error.Type != nil; refused != (status >= 400) {
		t.Errorf("%s %q: %d %q", path, body, status, answer)
	}
}
