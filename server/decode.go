package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strings"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/wire"
)

// decode reads the request's body, one JSON object, into dst. Each check gets the object's fields first, to refuse what
// dst has no field for. The error is a *wire.Error: 400 with the offending field, 415; 413 or 408 where guard bounds the body.
func decode(c *gin.Context, dst any, checks ...func(fields map[string]json.RawMessage) error) error {
	if media := c.ContentType(); !isJSON(media) {
		return wrongMedia("expected a JSON body (Content-Type: application/json), not %s", media)
	}
	if err := checkEncoding(c); err != nil {
		return err
	}
	body, err := io.ReadAll(c.Request.Body)
	if err != nil {
		return readError(err, "body")
	}
	digest(c, string(body))
	return decodeJSON(body, dst, checks...)
}

// checkEncoding refuses compressed bodies: how long they become is not known before.
func checkEncoding(c *gin.Context) error {
	if encoding := c.GetHeader("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return wrongMedia("the body's Content-Encoding is %q; send it uncompressed", encoding)
	}
	return nil
}

// isJSON says whether a body of this media type is read as JSON. Those that are not JSON's own are what curl -d and other
// clients send without being told.
func isJSON(media string) bool {
	switch media = strings.ToLower(media); media {
	case "", "application/json", "text/json", "text/plain", "application/x-www-form-urlencoded":
		return true
	}
	return strings.HasPrefix(media, "application/") && strings.HasSuffix(media, "+json")
}

// wrongMedia is a 415.
func wrongMedia(format string, args ...any) *wire.Error {
	e := invalid("", format, args...)
	e.Status, e.Code = http.StatusUnsupportedMediaType, new("unsupported_media_type")
	return e
}

// readError explains why a body could not be read; what names it.
func readError(err error, what string) error {
	if long := new(http.MaxBytesError); errors.As(err, &long) {
		return bodyTooLong(long.Limit)
	}
	if known := new(wire.Error); errors.As(err, &known) {
		return known
	}
	return invalid("", "the %s could not be read: %v", what, err)
}

func decodeJSON(body []byte, dst any, checks ...func(fields map[string]json.RawMessage) error) error {
	if len(bytes.TrimSpace(body)) == 0 {
		return invalid("", "the body is empty; expected a JSON object")
	}
	var fields map[string]json.RawMessage
	err := json.Unmarshal(body, &fields)
	if syntax := new(json.SyntaxError); errors.As(err, &syntax) {
		line, column := position(body, syntax.Offset)
		return invalid("", "the body is not valid JSON: %v (byte %d, line %d, column %d)", err, syntax.Offset, line, column)
	}
	if err != nil || fields == nil {
		return invalid("", "expected a JSON object as the body, not %s", kindOf(body))
	}
	for _, check := range checks {
		if err := check(fields); err != nil {
			return err
		}
	}
	if err := json.Unmarshal(body, dst); err != nil {
		return fieldError(fields, reflect.TypeOf(dst).Elem())
	}
	return nil
}

// position turns a byte offset as encoding/json counts it, after the offending byte, into line and column from 1.
func position(body []byte, offset int64) (line, column int) {
	before := body[:min(max(offset-1, 0), int64(len(body)))]
	return 1 + bytes.Count(before, []byte("\n")), len(before) - bytes.LastIndexByte(before, '\n')
}

func kindOf(raw []byte) string {
	switch raw = bytes.TrimSpace(raw); {
	case len(raw) == 0:
		return "nothing"
	case raw[0] == '{':
		return "an object"
	case raw[0] == '[':
		return "an array"
	case raw[0] == '"':
		return "a string"
	case raw[0] == 't', raw[0] == 'f':
		return "true or false"
	case raw[0] == 'n':
		return "null"
	}
	return fmt.Sprintf("the number %.30s", raw)
}

// fieldError finds the innermost value that a struct of type t refuses. encoding/json's own error names no field when a
// type decodes itself, and never the index of an array.
func fieldError(fields map[string]json.RawMessage, t reflect.Type) error {
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		wrap := func(inner []byte) []byte { return wrapKey(key, inner) }
		if path, raw, err := innermost(t, key, fields[key], wrap, maxSearchDepth); err != nil {
			message := err.Error()
			if wrong := new(json.UnmarshalTypeError); errors.As(err, &wrong) {
				message = fmt.Sprintf("expected %s, not %s", nameOf(wrong.Type), kindOf(raw))
			}
			return invalid(path, "%s: %s", path, message)
		}
	}
	return invalid("", "the body does not have the expected fields")
}

// Bounds of the search for what is wrong with a body: every step of it decodes a part of the body anew. The API's own objects are
// not as deep.
const (
	maxSearchDepth    = 8
	maxSearchElements = 10_000
)

func wrapKey(key string, inner []byte) []byte {
	name, err := json.Marshal(key)
	if err != nil {
		panic("a string that is not JSON: " + err.Error())
	}
	return slices.Concat([]byte("{"), name, []byte(":"), inner, []byte("}"))
}

// innermost returns the path, the text and the error of the deepest part of raw that t refuses on its own.
// wrap puts a part where raw stands. It looks at most depth levels into raw.
func innermost(t reflect.Type, path string, raw []byte, wrap func([]byte) []byte, depth int) (string, []byte, error) {
	err := json.Unmarshal(wrap(raw), reflect.New(t).Interface())
	if err == nil {
		return "", nil, nil
	}
	if depth == 0 {
		return path, raw, err
	}
	var object map[string]json.RawMessage
	var array []json.RawMessage
	refused := func(part string) bool { return json.Unmarshal(wrap([]byte(part)), reflect.New(t).Interface()) != nil }
	switch raw = bytes.TrimSpace(raw); {
	case raw[0] == '{' && json.Unmarshal(raw, &object) == nil && !refused("{}"):
		keys := slices.Sorted(maps.Keys(object))
		for _, key := range keys[:min(len(keys), maxSearchElements)] {
			inner := func(part []byte) []byte { return wrap(wrapKey(key, part)) }
			if path, raw, err := innermost(t, path+"."+key, object[key], inner, depth-1); err != nil {
				return path, raw, err
			}
		}
	case raw[0] == '[' && json.Unmarshal(raw, &array) == nil && !refused("[]"):
		inner := func(part []byte) []byte { return wrap(slices.Concat([]byte("["), part, []byte("]"))) }
		for i, part := range array[:min(len(array), maxSearchElements)] {
			if path, raw, err := innermost(t, fmt.Sprintf("%s[%d]", path, i), part, inner, depth-1); err != nil {
				return path, raw, err
			}
		}
	}
	return path, raw, err
}

func nameOf(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return "an integer"
	case reflect.Float32, reflect.Float64:
		return "a number"
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "a string"
	case reflect.Slice, reflect.Array:
		return "an array"
	}
	return "an object"
}

// isNull reports whether a field was sent as null, which is the same as not sent.
func isNull(raw json.RawMessage) bool { return string(bytes.TrimSpace(raw)) == "null" }
