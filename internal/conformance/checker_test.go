//go:build cgo

package conformance_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
)

// checker is a transport that holds every answer to the documents.
type checker struct {
	t         *testing.T
	documents []*document
	mu        sync.Mutex
	answers   int
	events    int
}

// RoundTrip sends a request and validates the whole answer before it is handed on.
func (c *checker) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil {
		return nil, err
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answers++
	if err := c.check(req, resp, body); err != nil {
		c.t.Errorf("%s %s: %s: %v\n%.1500s", req.Method, req.URL.Path, resp.Status, err, body)
	}
	return resp, nil
}

func (c *checker) check(req *http.Request, resp *http.Response, body []byte) error {
	if resp.Header.Get("X-Request-Id") == "" {
		return errors.New("no x-request-id")
	}
	if req.Method == http.MethodHead {
		return nil
	}
	if resp.StatusCode >= http.StatusBadRequest {
		return c.checkError(resp, body)
	}
	var errs []error
	for _, d := range c.documents {
		if path, ok := strings.CutPrefix(req.URL.Path, d.prefix); ok {
			errs = append(errs, c.checkAnswer(d, req.Method, path, resp, body))
		}
	}
	return errors.Join(errs...)
}

// checkError wants OpenAI's envelope with its four keys and no other, and says what a client could not handle.
func (c *checker) checkError(resp *http.Response, body []byte) error {
	if media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); media != "application/json" {
		return fmt.Errorf("an error of type %q", media)
	}
	if resp.StatusCode == http.StatusMethodNotAllowed && resp.Header.Get("Allow") == "" {
		return errors.New("405 without Allow")
	}
	if resp.StatusCode == http.StatusServiceUnavailable && resp.Header.Get("Retry-After") == "" {
		return errors.New("503 without Retry-After")
	}
	return c.checkEnvelope(body)
}

func (c *checker) checkEnvelope(body []byte) error {
	var envelope map[string]map[string]any
	if err := json.Unmarshal(body, &envelope); err != nil {
		return err
	}
	keys := []string{}
	for key := range envelope["error"] {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	if len(envelope) != 1 || !slices.Equal(keys, []string{"code", "message", "param", "type"}) {
		return fmt.Errorf("an error with the keys %v", keys)
	}
	if !bytes.HasPrefix(body, []byte(`{"error":{`)) {
		return errors.New(`an error that does not begin with {"error":{, which go-openai looks for`)
	}
	return c.documents[0].validate("/components/schemas/ErrorResponse", body)
}

func (c *checker) checkAnswer(d *document, method, path string, resp *http.Response, body []byte) error {
	op, ok := d.find(method, path)
	if !ok {
		if d.name == openaiDocument {
			return nil // hone's own
		}
		return fmt.Errorf("%s has no %s %s", d.name, method, path)
	}
	media, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil {
		return err
	}
	content := fmt.Sprintf("%s/responses/%d/content/", op.pointer, resp.StatusCode)
	declared, _ := d.at(strings.TrimSuffix(content, "/")).(map[string]any)
	d.seen[op.method+" "+op.path] = true
	switch media {
	case "application/json":
		return c.checkBody(d, content+escape(media)+"/schema", body, op.path)
	case "text/event-stream":
		pointer := content + escape(media) + "/schema"
		if declared[media] == nil { // OpenAI's document does not say what a completion's stream holds: the same objects
			pointer = content + "application~1json/schema"
		}
		d.seen[op.method+" "+op.path+" stream"] = true
		return c.checkStream(d, pointer, body, op.path)
	}
	if d.name == openaiDocument && strings.HasSuffix(path, "/content") {
		return nil // bytes; the document says a string
	}
	if declared[media] == nil && declared["*/*"] == nil {
		return fmt.Errorf("%s: %s %s answers with %s, which is not declared", d.name, op.method, op.path, media)
	}
	return nil
}

func (c *checker) checkBody(d *document, pointer string, body []byte, path string) error {
	if d.at(pointer) == nil {
		return fmt.Errorf("%s declares no schema at %s", d.name, pointer)
	}
	if err := d.validate(pointer, body); err != nil {
		return fmt.Errorf("%s: %w", d.name, err)
	}
	var errs []error
	d.unexpected(d.at(pointer), decoded(body), "", func(at string) {
		if _, ours := extensions[at]; d.name != openaiDocument || !ours {
			errs = append(errs, fmt.Errorf("%s: the answer has %s, which the schema of %s does not", d.name, at, path))
		}
	})
	return errors.Join(errs...)
}

// checkStream validates each event: a chunk or an error, and at the end [DONE], unless there was an error.
func (c *checker) checkStream(d *document, pointer string, body []byte, path string) error {
	done, failed := false, false
	for line := range strings.Lines(string(body)) {
		line = strings.TrimSuffix(line, "\n")
		data, ok := strings.CutPrefix(line, "data: ")
		switch {
		case line == "" || strings.HasPrefix(line, ":"):
		case !ok:
			return fmt.Errorf("the line %q in a stream", line)
		case done || failed:
			return fmt.Errorf("%q after the end of the stream", line)
		case data == "[DONE]":
			done = true
		case strings.HasPrefix(data, `{"error"`):
			failed = true
			if err := c.checkEnvelope([]byte(data)); err != nil {
				return err
			}
		default:
			c.events++
			if err := c.checkBody(d, pointer, []byte(data), path); err != nil {
				return fmt.Errorf("event %s: %w", data, err)
			}
		}
	}
	if !done && !failed {
		return errors.New("a stream that ends without [DONE]")
	}
	return nil
}
