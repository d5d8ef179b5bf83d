//go:build cgo

package conformance_test

import (
	"net/http"
	"strings"
	"testing"
)

// TestChecker gives the checker answers that are wrong, and the same ones right.
func TestChecker(t *testing.T) {
	t.Parallel()
	openai, err := newDocument(openaiDocument, "/v1", openaiJSON, deviate(t))
	if err != nil {
		t.Fatal(err)
	}
	const (
		file  = `{"id":"file-1","object":"file","bytes":1,"created_at":1,"filename":"a","purpose":"batch","status":"processed"}`
		chunk = `data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{},"finish_reason":null}]}` + "\n\n"
		fault = `{"error":{"message":"m","type":"t","param":null,"code":null}}`
	)
	for _, test := range []struct {
		name, method, path, media, body string
		status                          int
		right                           bool
	}{
		{"an object", "GET", "/v1/files/file-1", "application/json", file, 200, true},
		{"a missing key", "GET", "/v1/files/file-1", "application/json", strings.Replace(file, `"bytes":1,`, "", 1), 200, false},
		{"a wrong type", "GET", "/v1/files/file-1", "application/json", strings.Replace(file, `"created_at":1`, `"created_at":1.5`, 1), 200, false},
		{"a key too many", "GET", "/v1/files/file-1", "application/json", strings.Replace(file, `"bytes"`, `"size":1,"bytes"`, 1), 200, false},
		{"a key too many in a list", "GET", "/v1/files", "application/json", `{"object":"list","first_id":null,"last_id":null,"has_more":false,"data":[` + strings.Replace(file, `"bytes"`, `"size":1,"bytes"`, 1) + `]}`, 200, false},
		{"a stream", "POST", "/v1/chat/completions", "text/event-stream", chunk + "data: [DONE]\n\n", 200, true},
		{"a stream without an end", "POST", "/v1/chat/completions", "text/event-stream", chunk, 200, false},
		{"a stream that ends with an error", "POST", "/v1/chat/completions", "text/event-stream", chunk + "data: " + fault + "\n\n", 200, true},
		{"an event after the end", "POST", "/v1/chat/completions", "text/event-stream", chunk + "data: [DONE]\n\n" + chunk, 200, false},
		{"a wrong event", "POST", "/v1/chat/completions", "text/event-stream", strings.Replace(chunk, `"created":1`, `"created":"1"`, 1) + "data: [DONE]\n\n", 200, false},
		{"an error", "GET", "/v1/files/file-1", "application/json", fault, 404, true},
		{"an error without code", "GET", "/v1/files/file-1", "application/json", strings.Replace(fault, `,"code":null`, "", 1), 404, false},
		{"an error of no object", "GET", "/v1/files/file-1", "application/json", `{"error":"m"}`, 404, false},
		{"an error as a page", "GET", "/v1/files/file-1", "text/plain", "not found", 404, false},
		{"405 without Allow", "GET", "/v1/files/file-1", "application/json", fault, 405, false},
	} {
		req, err := http.NewRequestWithContext(t.Context(), test.method, "http://localhost"+test.path, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		resp := &http.Response{StatusCode: test.status, Header: http.Header{"X-Request-Id": {"req_1"}, "Content-Type": {test.media}}}
		c := &checker{t: t, documents: []*document{openai}}
		if err := c.check(req, resp, []byte(test.body)); (err == nil) != test.right {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}
