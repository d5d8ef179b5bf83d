package gguf

import (
	"encoding/binary"
	"fmt"
	"math"
)

// ValueType is the type of a metadata value (enum gguf_type of gguf.h).
type ValueType uint32

// The metadata types of GGUF.
const (
	Uint8   ValueType = 0
	Int8    ValueType = 1
	Uint16  ValueType = 2
	Int16   ValueType = 3
	Uint32  ValueType = 4
	Int32   ValueType = 5
	Float32 ValueType = 6
	Bool    ValueType = 7
	String  ValueType = 8
	Array   ValueType = 9
	Uint64  ValueType = 10
	Int64   ValueType = 11
	Float64 ValueType = 12
)

var valueTypeNames = [...]string{"uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string",
	"array", "uint64", "int64", "float64"}

// valueBytes is the size of one value of fixed size; 0 for strings, arrays and unknown types.
var valueBytes = [...]int64{1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8}

// String returns the name that the GGUF specification uses.
func (t ValueType) String() string {
	if int(t) < len(valueTypeNames) {
		return valueTypeNames[t]
	}
	return fmt.Sprintf("value type %d", uint32(t))
}

func (t ValueType) size() int64 {
	if int(t) < len(valueBytes) {
		return valueBytes[t]
	}
	return 0
}

// Value is one metadata value. Arrays stay in their encoded form until a getter decodes them, so that opening a file
// costs no more memory than its header has bytes.
type Value struct {
	Type  ValueType
	Elem  ValueType // element type if Type is Array
	Count int       // number of elements if Type is Array, else 1
	raw   []byte    // little-endian encoding without the type and count; strings keep their 8-byte lengths
}

// element is the type of the value's parts: Elem of an array, Type of anything else.
func (v Value) element() ValueType {
	if v.Type == Array {
		return v.Elem
	}
	return v.Type
}

// describe names the value's type in messages: "uint32", "array of string".
func (v Value) describe() string {
	if v.Type == Array {
		return "array of " + v.Elem.String()
	}
	return v.Type.String()
}

// integer decodes element i as an integer; ok is false if it is none or does not fit int64.
func (v Value) integer(i int) (n int64, ok bool) {
	t := v.element()
	b := v.raw[int64(i)*t.size():]
	switch t {
	case Uint8:
		return int64(b[0]), true
	case Int8:
		return int64(int8(b[0])), true
	case Uint16:
		return int64(binary.LittleEndian.Uint16(b)), true
	case Int16:
		return int64(int16(binary.LittleEndian.Uint16(b))), true
	case Uint32:
		return int64(binary.LittleEndian.Uint32(b)), true
	case Int32:
		return int64(int32(binary.LittleEndian.Uint32(b))), true
	case Uint64:
		u := binary.LittleEndian.Uint64(b)
		return int64(u), u <= math.MaxInt64
	case Int64:
		return int64(binary.LittleEndian.Uint64(b)), true
	}
	return 0, false
}

// float decodes element i as a float; ok is false if it is none.
func (v Value) float(i int) (f float64, ok bool) {
	t := v.element()
	b := v.raw[int64(i)*t.size():]
	switch t {
	case Float32:
		return float64(math.Float32frombits(binary.LittleEndian.Uint32(b))), true
	case Float64:
		return math.Float64frombits(binary.LittleEndian.Uint64(b)), true
	}
	return 0, false
}

// Metadata are a file's values by key. Each getter returns false if the key is missing or its value is of another kind.
type Metadata map[string]Value

// scalar returns the value of a key that is no array.
func (m Metadata) scalar(key string) (Value, bool) {
	v, ok := m[key]
	return v, ok && v.Type != Array
}

// String returns a string value.
func (m Metadata) String(key string) (string, bool) {
	v, ok := m.scalar(key)
	if !ok || v.Type != String {
		return "", false
	}
	return string(v.raw[8:]), true
}

// Uint returns a non-negative integer value of any width.
func (m Metadata) Uint(key string) (uint64, bool) {
	n, ok := m.Int(key)
	return uint64(n), ok && n >= 0
}

// Int returns an integer value of any width that fits int64.
func (m Metadata) Int(key string) (int64, bool) {
	v, ok := m.scalar(key)
	if !ok {
		return 0, false
	}
	return v.integer(0)
}

// Float returns a float32 or float64 value.
func (m Metadata) Float(key string) (float64, bool) {
	v, ok := m.scalar(key)
	if !ok {
		return 0, false
	}
	return v.float(0)
}

// Bool returns a bool value.
func (m Metadata) Bool(key string) (value, ok bool) {
	v, ok := m.scalar(key)
	if !ok || v.Type != Bool {
		return false, false
	}
	return v.raw[0] != 0, true
}

// Strings returns an array of strings. The strings are copies and stay valid after the file is closed.
func (m Metadata) Strings(key string) ([]string, bool) {
	v, ok := m[key]
	if !ok || v.Type != Array || v.Elem != String {
		return nil, false
	}
	out := make([]string, v.Count)
	raw := v.raw
	for i := range out {
		n := binary.LittleEndian.Uint64(raw)
		out[i] = string(raw[8 : 8+n])
		raw = raw[8+n:]
	}
	return out, true
}

// Ints returns an array of integers of any width that all fit int64.
func (m Metadata) Ints(key string) ([]int64, bool) {
	v, ok := m[key]
	if !ok || v.Type != Array || v.Elem == String {
		return nil, false
	}
	out := make([]int64, v.Count)
	for i := range out {
		if out[i], ok = v.integer(i); !ok {
			return nil, false
		}
	}
	return out, true
}

// Floats returns an array of float32 or float64.
func (m Metadata) Floats(key string) ([]float64, bool) {
	v, ok := m[key]
	if !ok || v.Type != Array || v.Elem == String {
		return nil, false
	}
	out := make([]float64, v.Count)
	for i := range out {
		if out[i], ok = v.float(i); !ok {
			return nil, false
		}
	}
	return out, true
}
