package jinja

// This file is not part of the upstream package; see README.md.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// FromJSON decodes one JSON value. Objects keep the order of their keys, which FromGoValue cannot know, and numbers
// keep being integers or not: tojson then writes them as Python would.
func FromJSON(data []byte) (Value, error) {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	v, err := decodeJSON(decoder, 0)
	if err != nil {
		return Undefined(), err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return Undefined(), errors.New("text after the JSON value")
	}
	return v, nil
}

func decodeJSON(decoder *json.Decoder, depth int) (Value, error) {
	if depth > maxPrintDepth {
		return Undefined(), fmt.Errorf("more than %d nested arrays and objects", maxPrintDepth)
	}
	token, err := decoder.Token()
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return Undefined(), err
	}
	switch token {
	case json.Delim('['):
		items := []Value{}
		for decoder.More() {
			item, err := decodeJSON(decoder, depth+1)
			if err != nil {
				return Undefined(), err
			}
			items = append(items, item)
		}
		_, err := decoder.Token()
		return NewList(items), err
	case json.Delim('{'):
		d := NewDict()
		for decoder.More() {
			key, err := decoder.Token()
			if err != nil {
				return Undefined(), err
			}
			item, err := decodeJSON(decoder, depth+1)
			if err != nil {
				return Undefined(), err
			}
			d.AsDict().Set(key.(string), item)
		}
		_, err := decoder.Token()
		return d, err
	}
	return FromGoValue(token), nil
}

// ToJSON encodes a value as the filter tojson does: with Python's spaces, keys in order, HTML not escaped.
func ToJSON(v Value) (text string, err error) {
	defer func() {
		if r := recover(); r != nil {
			limit, ok := r.(*LimitError)
			if !ok {
				panic(r)
			}
			err = limit
		}
	}()
	var sb strings.Builder
	err = encodeValueJSON(&sb, v, -1, 0)
	return sb.String(), err
}
