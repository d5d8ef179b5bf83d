package gguf

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"os"
)

// KeyValue is one metadata entry to be written. Value is a string, bool, uint8..uint64, int8..int64, float32, float64,
// a slice of one of string, bool, uint8, int8, uint32, int32, uint64, int64, float32, float64, or a Value of another file.
type KeyValue struct {
	Key   string
	Value any
}

// TensorData is one tensor to be written.
type TensorData struct {
	Name  string
	Shape []int64 // ggml order: Shape[0] is the row length
	Type  Type
	Data  []byte // encoded, exactly as long as Shape and Type say
	// Stream, where Data is nil, writes it: a file may be larger than the memory.
	Stream func(io.Writer) error
}

// bytes is the size of the tensor's data.
func (t TensorData) bytes() int64 {
	if t.Stream == nil || t.Data != nil {
		return int64(len(t.Data))
	}
	n := int64(1)
	for _, size := range t.Shape {
		n *= size
	}
	return n / t.Type.BlockSize() * t.Type.TypeBytes()
}

// Write writes a GGUF file of version 3 with the default alignment of 32, or the one in a uint32 value of
// general.alignment. Metadata and tensors keep their order. What Write accepts, Parse accepts.
func Write(w io.Writer, metadata []KeyValue, tensors []TensorData) error {
	head := []byte("GGUF")
	head = binary.LittleEndian.AppendUint32(head, 3)
	head = binary.LittleEndian.AppendUint64(head, uint64(len(tensors)))
	head = binary.LittleEndian.AppendUint64(head, uint64(len(metadata)))
	alignment := int64(defaultAlignment)
	for _, kv := range metadata {
		v, err := encode(kv.Value)
		if err != nil {
			return fmt.Errorf("write key %q: %w", kv.Key, err)
		}
		if kv.Key == alignmentKey && v.Type == Uint32 {
			alignment, _ = v.integer(0)
		}
		head = appendString(head, kv.Key)
		head = binary.LittleEndian.AppendUint32(head, uint32(v.Type))
		if v.Type == Array {
			head = binary.LittleEndian.AppendUint32(head, uint32(v.Elem))
			head = binary.LittleEndian.AppendUint64(head, uint64(v.Count))
		}
		head = append(head, v.raw...)
	}
	if alignment < 1 || alignment&(alignment-1) != 0 {
		return fmt.Errorf("write key %q: %d is not a power of two", alignmentKey, alignment)
	}
	offset := int64(0)
	for _, t := range tensors {
		head = appendString(head, t.Name)
		head = binary.LittleEndian.AppendUint32(head, uint32(len(t.Shape)))
		for _, n := range t.Shape {
			head = binary.LittleEndian.AppendUint64(head, uint64(n))
		}
		head = binary.LittleEndian.AppendUint32(head, uint32(t.Type))
		head = binary.LittleEndian.AppendUint64(head, uint64(offset))
		offset = pad(offset+t.bytes(), alignment)
	}
	headEnd := int64(len(head))
	head = append(head, make([]byte, pad(headEnd, alignment)-headEnd)...)

	// The reader is the one list of rules: what it would refuse is not written.
	f, err := Parse(&headerAt{head}, int64(len(head))+offset)
	if err != nil {
		return fmt.Errorf("write GGUF: %w", err)
	}
	for i, t := range tensors {
		if want := f.Tensors[i].Bytes; t.bytes() != want {
			return fmt.Errorf("write tensor %q: %d bytes of data, shape %v of %s takes %d",
				t.Name, t.bytes(), t.Shape, t.Type, want)
		}
	}

	out := bufio.NewWriterSize(w, 1<<20)
	if _, err := out.Write(head); err != nil {
		return fmt.Errorf("write GGUF header: %w", err)
	}
	for _, t := range tensors {
		n := t.bytes()
		if err := t.write(out); err != nil {
			return fmt.Errorf("write tensor %q: %w", t.Name, err)
		}
		if _, err := out.Write(make([]byte, pad(n, alignment)-n)); err != nil {
			return fmt.Errorf("write tensor %q: %w", t.Name, err)
		}
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("write GGUF: %w", err)
	}
	return nil
}

// write writes the data, which must be as long as bytes says.
func (t TensorData) write(w io.Writer) error {
	if t.Stream == nil || t.Data != nil {
		_, err := w.Write(t.Data)
		return err
	}
	counted := &counter{w: w}
	if err := t.Stream(counted); err != nil {
		return err
	}
	if counted.n != t.bytes() {
		return fmt.Errorf("%d bytes were streamed, shape %v of %s takes %d", counted.n, t.Shape, t.Type, t.bytes())
	}
	return nil
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// WriteFile writes a GGUF file and fsyncs it. It replaces what is at path without any temporary name: the caller who
// needs an atomic replacement writes into a temporary directory and renames that.
func WriteFile(path string, metadata []KeyValue, tensors []TensorData) error {
	return writeFile(path, func(w io.Writer) error { return Write(w, metadata, tensors) })
}

func writeFile(path string, write func(io.Writer) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	return err
}

// headerAt is a file of which only the header exists.
type headerAt struct{ head []byte }

func (h *headerAt) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(h.head)) {
		return 0, io.EOF
	}
	n := copy(p, h.head[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func appendString(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(len(s)))
	return append(b, s...)
}

// encode turns a Go value into its GGUF form.
func encode(value any) (Value, error) {
	one := func(t ValueType) (Value, error) {
		raw, err := binary.Append(nil, binary.LittleEndian, value)
		return Value{Type: t, Count: 1, raw: raw}, err
	}
	many := func(elem ValueType, count int) (Value, error) {
		raw, err := binary.Append(nil, binary.LittleEndian, value)
		return Value{Type: Array, Elem: elem, Count: count, raw: raw}, err
	}
	switch v := value.(type) {
	case Value:
		return v, nil
	case string:
		return Value{Type: String, Count: 1, raw: appendString(nil, v)}, nil
	case []string:
		out := Value{Type: Array, Elem: String, Count: len(v)}
		for _, s := range v {
			out.raw = appendString(out.raw, s)
		}
		return out, nil
	case bool:
		return one(Bool)
	case uint8:
		return one(Uint8)
	case int8:
		return one(Int8)
	case uint16:
		return one(Uint16)
	case int16:
		return one(Int16)
	case uint32:
		return one(Uint32)
	case int32:
		return one(Int32)
	case uint64:
		return one(Uint64)
	case int64:
		return one(Int64)
	case float32:
		return one(Float32)
	case float64:
		return one(Float64)
	case []bool:
		return many(Bool, len(v))
	case []uint8:
		return many(Uint8, len(v))
	case []int8:
		return many(Int8, len(v))
	case []uint32:
		return many(Uint32, len(v))
	case []int32:
		return many(Int32, len(v))
	case []uint64:
		return many(Uint64, len(v))
	case []int64:
		return many(Int64, len(v))
	case []float32:
		return many(Float32, len(v))
	case []float64:
		return many(Float64, len(v))
	}
	return Value{}, fmt.Errorf("a %T has no GGUF type", value)
}

// Float32Bytes is the little-endian encoding of v, for TensorData.Data.
func Float32Bytes(v []float32) []byte {
	out := make([]byte, 4*len(v))
	for i, x := range v {
		binary.LittleEndian.PutUint32(out[4*i:], math.Float32bits(x))
	}
	return out
}
