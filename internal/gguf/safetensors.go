package gguf

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"
	"os"
	"slices"
)

// maxSafetensorsHeader is the limit of the reference implementation.
const maxSafetensorsHeader = 100 << 20

// safetensorsMetadata is the header's entry that is no tensor.
const safetensorsMetadata = "__metadata__"

// Float32Tensor is a tensor of a safetensors file. Shape is in PyTorch's order: the last size is the row length.
type Float32Tensor struct {
	Name  string
	Shape []int64
	Data  []float32
}

// safetensorsEntry is one tensor of a safetensors header; the offsets count from the end of the header.
type safetensorsEntry struct {
	DType       string   `json:"dtype"`
	Shape       []int64  `json:"shape"`
	DataOffsets [2]int64 `json:"data_offsets"`
}

// WriteSafetensors writes F32 tensors as a safetensors file: sorted by name, data in that order and aligned to 8 bytes.
// metadata may be nil; PyTorch's readers want {"format": "pt"}.
func WriteSafetensors(w io.Writer, metadata map[string]string, tensors []Float32Tensor) error {
	sorted := slices.Clone(tensors)
	slices.SortFunc(sorted, func(a, b Float32Tensor) int { return bytes.Compare([]byte(a.Name), []byte(b.Name)) })

	header := map[string]any{} // encoding/json sorts the keys
	if len(metadata) > 0 {
		header[safetensorsMetadata] = metadata
	}
	offset := int64(0)
	for _, t := range sorted {
		elements, ok := product(t.Shape)
		if !ok || elements != int64(len(t.Data)) {
			return fmt.Errorf("write tensor %q: %d elements of data, shape %v takes %d", t.Name, len(t.Data), t.Shape, elements)
		}
		if _, dup := header[t.Name]; dup || t.Name == "" {
			return fmt.Errorf("write tensor %q: the name is empty or occurs twice", t.Name)
		}
		shape := t.Shape
		if shape == nil {
			shape = []int64{} // a scalar; null would be invalid
		}
		header[t.Name] = safetensorsEntry{"F32", shape, [2]int64{offset, offset + 4*elements}}
		offset += 4 * elements
	}
	head, err := json.Marshal(header)
	if err != nil {
		return fmt.Errorf("write safetensors header: %w", err)
	}
	head = append(head, bytes.Repeat([]byte(" "), int(pad(int64(len(head)), 8))-len(head))...)
	if _, err := w.Write(append(binary.LittleEndian.AppendUint64(nil, uint64(len(head))), head...)); err != nil {
		return fmt.Errorf("write safetensors header: %w", err)
	}
	for _, t := range sorted {
		if _, err := w.Write(Float32Bytes(t.Data)); err != nil {
			return fmt.Errorf("write tensor %q: %w", t.Name, err)
		}
	}
	return nil
}

// WriteSafetensorsFile writes a safetensors file and fsyncs it, without any temporary name, as WriteFile does.
func WriteSafetensorsFile(path string, metadata map[string]string, tensors []Float32Tensor) error {
	return writeFile(path, func(w io.Writer) error { return WriteSafetensors(w, metadata, tensors) })
}

// ReadSafetensors reads a safetensors file of F32, F16 or BF16 tensors, in the order of their data, as float32. The
// header is validated first; the result takes at most twice the file's bytes of memory.
func ReadSafetensors(path string) ([]Float32Tensor, map[string]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, nil, fmt.Errorf("open safetensors file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, nil, &FormatError{Path: path, Offset: -1, What: "file", Reason: "is not a regular file"}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, fmt.Errorf("open safetensors file: %w", err)
	}
	defer f.Close()
	tensors, metadata, err := parseSafetensors(f, info.Size())
	if format, ok := errors.AsType[*FormatError](err); ok {
		format.Path = path
	}
	return tensors, metadata, err
}

func parseSafetensors(r io.Reader, size int64) ([]Float32Tensor, map[string]string, error) {
	bad := func(what, format string, args ...any) ([]Float32Tensor, map[string]string, error) {
		return nil, nil, &FormatError{Offset: -1, What: what, Reason: fmt.Sprintf(format, args...)}
	}
	var length [8]byte
	if size < 8 {
		return bad("header", "has %d bytes of a length of 8: the file is truncated", size)
	}
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, nil, fmt.Errorf("read safetensors header: %w", err)
	}
	n := binary.LittleEndian.Uint64(length[:])
	if n < 2 || n > maxSafetensorsHeader || n > uint64(size-8) {
		return bad("header", "claims %d bytes, but the file has %d and %d are allowed", n, size-8, maxSafetensorsHeader)
	}
	head := make([]byte, n)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, nil, fmt.Errorf("read safetensors header: %w", err)
	}
	header, err := objectOf(head)
	if err != nil {
		return bad("header", "is not a JSON object: %v", err)
	}

	var metadata map[string]string
	type named struct {
		name string
		safetensorsEntry
	}
	var entries []named
	for name, raw := range header {
		what := fmt.Sprintf("tensor %q", name)
		if name == safetensorsMetadata {
			if err := json.Unmarshal(raw, &metadata); err != nil {
				return bad(name, "is not an object of strings: %v", err)
			}
			continue
		}
		var e safetensorsEntry
		dec := json.NewDecoder(bytes.NewReader(raw))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&e); err != nil {
			return bad(what, "is not {dtype, shape, data_offsets}: %v", err)
		}
		entries = append(entries, named{name, e})
	}
	slices.SortFunc(entries, func(a, b named) int {
		if a.DataOffsets != b.DataOffsets {
			return slices.Compare(a.DataOffsets[:], b.DataOffsets[:])
		}
		return bytes.Compare([]byte(a.name), []byte(b.name))
	})
	data := size - 8 - int64(n)
	next := int64(0)
	for _, e := range entries {
		what := fmt.Sprintf("tensor %q", e.name)
		width := map[string]int64{"F32": 4, "F16": 2, "BF16": 2}[e.DType]
		elements, ok := product(e.Shape)
		begin, end := e.DataOffsets[0], e.DataOffsets[1]
		switch {
		case width == 0:
			return bad(what, "is of type %q, expected F32, F16 or BF16", e.DType)
		case !ok:
			return bad(what, "has the shape %v, which is negative or overflows", e.Shape)
		case begin != next || end < begin || end > data:
			return bad(what, "has its data at [%d, %d), expected it to begin at %d, right behind the tensor before it, and end by %d",
				begin, end, next, data)
		case (end-begin)/width != elements || (end-begin)%width != 0:
			return bad(what, "has %d bytes of data, shape %v of %s takes %d elements", end-begin, e.Shape, e.DType, elements)
		}
		next = end
	}
	if next != data {
		return bad("data", "is %d bytes long, but the tensors end at %d", data, next)
	}

	tensors := make([]Float32Tensor, 0, len(entries))
	for _, e := range entries {
		raw := make([]byte, e.DataOffsets[1]-e.DataOffsets[0])
		if _, err := io.ReadFull(r, raw); err != nil {
			return nil, nil, fmt.Errorf("read tensor %q: %w", e.name, err)
		}
		tensors = append(tensors, Float32Tensor{e.name, e.Shape, floats(raw, e.DType)})
	}
	return tensors, metadata, nil
}

// objectOf splits a JSON object into its values. Unlike json.Unmarshal it refuses a key that occurs twice: readers
// differ in which of the two they take.
func objectOf(data []byte) (map[string]json.RawMessage, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	if tok, err := dec.Token(); err != nil {
		return nil, err
	} else if tok != json.Delim('{') {
		return nil, fmt.Errorf("it begins with %v", tok)
	}
	out := map[string]json.RawMessage{}
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return nil, err
		}
		key := tok.(string) // the decoder allows nothing else before a colon
		if _, dup := out[key]; dup {
			return nil, fmt.Errorf("the key %q occurs twice", key)
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return nil, err
		}
		out[key] = value
	}
	if _, err := dec.Token(); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("something follows it")
	}
	return out, nil
}

// floats decodes little-endian F32, F16 or BF16.
func floats(raw []byte, dtype string) []float32 {
	if dtype == "F32" {
		out := make([]float32, len(raw)/4)
		for i := range out {
			out[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:]))
		}
		return out
	}
	out := make([]float32, len(raw)/2)
	for i := range out {
		h := binary.LittleEndian.Uint16(raw[2*i:])
		if dtype == "BF16" {
			out[i] = math.Float32frombits(uint32(h) << 16)
		} else {
			out[i] = half(h)
		}
	}
	return out
}

// half converts an IEEE 754 half-precision number, exactly.
func half(h uint16) float32 {
	sign := uint32(h&0x8000) << 16
	exponent, fraction := uint32(h>>10&0x1f), uint32(h&0x3ff)
	switch exponent {
	case 0x1f: // infinity and NaN
		return math.Float32frombits(sign | 0xff<<23 | fraction<<13)
	case 0: // zero and subnormal: fraction * 2^-24
		return math.Float32frombits(sign | math.Float32bits(float32(fraction)/(1<<24)))
	}
	return math.Float32frombits(sign | (exponent+127-15)<<23 | fraction<<13)
}

// product multiplies sizes; ok is false if one is negative or the product exceeds 2^60, beyond any file.
func product(shape []int64) (n int64, ok bool) {
	total := uint64(1)
	for _, d := range shape {
		if d < 0 {
			return 0, false
		}
		hi, lo := bits.Mul64(total, uint64(d))
		if hi != 0 || lo > 1<<60 {
			return 0, false
		}
		total = lo
	}
	return int64(total), true
}
