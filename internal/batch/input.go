package batch

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"unicode/utf8"

	"github.com/hone-llm/hone/internal/store"
)

// request is one line of an input file.
type request struct {
	CustomID string          `json:"custom_id"`
	Method   string          `json:"method"`
	URL      string          `json:"url"`
	Body     json.RawMessage `json:"body"`
}

// lines yields the lines of an input file that are not blank, with their numbers from 1.
type lines struct {
	ctx  context.Context
	r    *bufio.Reader
	line int
}

func newLines(ctx context.Context, r io.Reader) *lines {
	return &lines{ctx: ctx, r: bufio.NewReaderSize(r, 64<<10)}
}

var errTooLong = errors.New("the line is too long")

// next returns io.EOF after the last line, and errTooLong for one of more than maxLineBytes, which it passes over.
func (l *lines) next() (line int, content []byte, err error) {
	for {
		if err := context.Cause(l.ctx); err != nil {
			return 0, nil, err
		}
		content, err := l.read()
		if err != nil {
			return l.line, nil, err
		}
		if l.line == 1 {
			content = bytes.TrimPrefix(content, []byte("\ufeff"))
		}
		if content = bytes.TrimSpace(content); len(content) > 0 {
			return l.line, content, nil
		}
	}
}

func (l *lines) read() (content []byte, err error) {
	l.line++
	for long := false; ; {
		part, err := l.r.ReadSlice('\n')
		if long = long || len(content)+len(part) > maxLineBytes; !long {
			content = append(content, part...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err != nil && (!errors.Is(err, io.EOF) || len(content) == 0 && !long):
			return nil, err
		case long:
			return nil, errTooLong
		}
		return content, nil
	}
}

// checked is what check finds.
type checked struct {
	requests int
	model    string // of the first
	errors   []store.BatchError
}

func (c *checked) add(line int, param, code, format string, args ...any) {
	c.errors = append(c.errors, store.BatchError{Code: code, Message: fmt.Sprintf(format, args...), Param: param, Line: line})
}

// check reads an input file and reports up to maxErrors lines that cannot be asked for. What is wrong with a body beyond its
// being an object for a model is the endpoint's to say, in the error file.
func check(ctx context.Context, r io.Reader, endpoint string) (found checked, err error) {
	input := newLines(ctx, r)
	seen := map[string]int{}
	for len(found.errors) < maxErrors {
		line, content, err := input.next()
		switch {
		case errors.Is(err, io.EOF):
			if found.requests == 0 && len(found.errors) == 0 {
				found.add(0, "", "empty_file", "the file has no requests")
			}
			return found, nil
		case errors.Is(err, errTooLong):
			found.add(line, "", "invalid_line", "the line is longer than %d MiB", maxLineBytes>>20)
			continue
		case err != nil:
			return found, err
		}
		if found.requests++; found.requests > maxRequests {
			found.add(line, "", "too_many_requests", "the file has more than %d requests", maxRequests)
			return found, nil
		}
		found.line(line, content, endpoint, seen)
	}
	return found, nil
}

// line checks one line; seen has the lines of the custom ids before it.
func (c *checked) line(line int, content []byte, endpoint string, seen map[string]int) {
	var fields struct {
		CustomID json.RawMessage `json:"custom_id"`
		Method   json.RawMessage `json:"method"`
		URL      json.RawMessage `json:"url"`
		Body     json.RawMessage `json:"body"`
	}
	if !utf8.Valid(content) {
		c.add(line, "", "invalid_json_line", "the line is not UTF-8")
		return
	}
	if err := json.Unmarshal(content, &fields); err != nil || content[0] != '{' {
		if err == nil {
			err = errors.New("it is no object")
		}
		c.add(line, "", "invalid_json_line", "the line is not a JSON object: %v", err)
		return
	}
	id, ok := text(fields.CustomID)
	switch before, twice := seen[id]; {
	case !ok || id == "":
		c.add(line, "custom_id", "missing_required_parameter", "custom_id is missing: a string that names the request")
	case twice:
		c.add(line, "custom_id", "duplicate_custom_id", "custom_id %.80q stands in line %d too", id, before)
	default:
		seen[id] = line
	}
	if method, ok := text(fields.Method); !ok || method != "POST" {
		c.add(line, "method", "invalid_method", "method is %.40s, expected \"POST\"", orMissing(fields.Method))
	}
	if url, ok := text(fields.URL); !ok || url != endpoint {
		c.add(line, "url", "invalid_url", "url is %.80s, expected %q, the batch's endpoint", orMissing(fields.URL), endpoint)
	}
	var body struct {
		Model  json.RawMessage `json:"model"`
		Stream json.RawMessage `json:"stream"`
	}
	if err := json.Unmarshal(fields.Body, &body); err != nil || fields.Body[0] != '{' {
		c.add(line, "body", "invalid_body", "body is %.40s, expected the JSON object of a request", orMissing(fields.Body))
		return
	}
	model, ok := text(body.Model)
	if !ok || model == "" {
		c.add(line, "body.model", "missing_required_parameter", "body.model is %.40s, expected the name of a model", orMissing(body.Model))
	}
	if string(body.Stream) == "true" {
		c.add(line, "body.stream", "invalid_body", "body.stream is true: the answers of a batch are not streamed; leave it out")
	}
	if c.model == "" {
		c.model = model
	}
}

func text(raw json.RawMessage) (value string, ok bool) {
	ok = len(raw) > 0 && raw[0] == '"' && json.Unmarshal(raw, &value) == nil
	return value, ok
}

func orMissing(raw json.RawMessage) string {
	if len(raw) == 0 {
		return "missing"
	}
	return string(raw)
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
