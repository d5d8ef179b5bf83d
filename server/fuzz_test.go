package server

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// Whatever the body, a request is answered or refused as OpenAI's clients can read it: never with a 5xx, never with a
// status without an envelope, and a stream's every line is JSON.
func FuzzRequests(f *testing.F) {
	paths := []string{
		"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/decisions", "/v1/tokenize", "/v1/fine_tuning/jobs", "/v1/batches", "/v1/uploads",
	}
	of := []uint8{0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7} // paths of the bodies
	for i, body := range []string{
		`{"model":"smol","messages":[{"role":"user","content":"Q"}],"max_tokens":3,"n":2,"logprobs":true,"top_logprobs":2}`,
		`{"model":"smol","messages":[{"role":"user","content":"Q"}],"stream":true,"stream_options":{"include_usage":true}}`,
		`{"model":"smol","messages":[{"role":"user","content":[{"type":"text","text":"Q"}]}],"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}],"tool_choice":"required"}`,
		`{"model":"smol","messages":[{"role":"user","content":"Q"}],"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":{"$ref":"#"}}}}`,
		`{"model":"smol","messages":[{"role":"user","content":"Q"}],"temperature":1e308,"seed":-9223372036854775808,"top_p":-0,"logit_bias":{"1":100}}`,
		`{"model":"smol","messages":[{"role":"user","content":"` + "\\ud800" + `"}],"stop":["",""]}`,
		`{"model":"smol","prompt":[1,2,2147483648],"echo":true,"suffix":"a"}`,
		`{"model":"smol","prompt":["a","b"],"n":128,"best_of":1}`,
		`{"model":"smol","input":["a",""],"encoding_format":"base64","dimensions":1}`,
		`{"model":"smol","messages":[{"role":"user","content":"Q"}],"choices":["A","B"]}`,
		`{"model":"smol","choices":["A","A"],"prompt":"Q"}`,
		`{"model":"smol","text":"a"}`,
		`{"model":"smol","training_file":"../../etc/passwd","suffix":"$(id)","hyperparameters":{"n_epochs":"auto"},"method":{"type":"dpo"}}`,
		`{"model":"smol","training_file":"file-1","seed":99999999999999999999,"metadata":{"a":1}}`,
		`{"input_file_id":"file-1","endpoint":"/v1/chat/completions","completion_window":"24h"}`,
		`{"filename":"..","purpose":"batch","bytes":-1,"mime_type":""}`,
		strings.Repeat(`{"messages":[`, 300), strings.Repeat("[", 20000), "\xff\xfe{}", "null", `{"model":"smol","model":"other"}`, "{\"a\":\x00}",
	} {
		which := uint8(0)
		if i < len(of) {
			which = of[i]
		}
		f.Add(which, body)
		f.Add(uint8(0), body)
		// Every field with every odd value.
		var fields map[string]json.RawMessage
		if json.Unmarshal([]byte(body), &fields) != nil {
			continue
		}
		for name, value := range fields {
			for _, odd := range []string{
				"null", "true", "0", "-1", "1.5", "1e308", "1e999", "2147483648", "-9223372036854775809", `""`, `"\u0000"`, `"../../etc/passwd"`, "[]", "[null]", "[[]]",
				"{}", `{"":{}}`, `{"type":1}`, "NaN", strings.Repeat("[", 5000) + strings.Repeat("]", 5000),
			} {
				fields[name] = json.RawMessage(odd)
				if odd, err := json.Marshal(fields); err == nil {
					f.Add(which, string(odd))
				}
			}
			fields[name] = value
		}
	}
	r := newRig(f)
	f.Fuzz(func(t *testing.T, which uint8, body string) {
		path := paths[int(which)%len(paths)]
		// Words with which the small model ends its process or waits for ever.
		for _, word := range []string{"die", "wait", "hold", "panic", "cut", "busy", "loading"} {
			if strings.Contains(body, word) {
				return
			}
		}
		req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, path, strings.NewReader(body))
		req.Host = "127.0.0.1"
		req.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		r.Config.Handler.ServeHTTP(w, req)
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
	})
}
