package gguf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// raw builds a GGUF file byte by byte, so that tests can build wrong ones.
type raw []byte

func (r raw) u32(n uint32) raw { return binary.LittleEndian.AppendUint32(r, n) }
func (r raw) u64(n uint64) raw { return binary.LittleEndian.AppendUint64(r, n) }
func (r raw) str(s string) raw { return append(r.u64(uint64(len(s))), s...) }
func (r raw) zero(n int) raw   { return append(r, make([]byte, n)...) }
func (r raw) pad() raw         { return r.zero(int(pad(int64(len(r)), 32)) - len(r)) }
func (r raw) info(name string, typ Type, offset uint64, shape ...uint64) raw {
	r = r.str(name).u32(uint32(len(shape)))
	for _, n := range shape {
		r = r.u64(n)
	}
	return r.u32(uint32(typ)).u64(offset)
}

func header(tensors, keys uint64) raw { return raw("GGUF").u32(3).u64(tensors).u64(keys) }

// handcrafted are broken files, each with a part of the error it must give. The cases are those of the
// HANDCRAFTED_* kinds of llama.cpp's tests/test-gguf.cpp and some more.
var handcrafted = []struct {
	name string
	file raw
	want string
}{
	{"empty", raw(""), "magic"},
	{"magic cut", raw("GGU"), "magic"},
	{"bad magic", raw("GGML").u32(3).u64(0).u64(0), "no GGUF file"},
	{"no version", raw("GGUF"), "version"},
	{"version 0", raw("GGUF").u32(0).u64(0).u64(0), "version: is 0"},
	{"version 1", raw("GGUF").u32(1).u64(0).u64(0), "version: is 1"},
	{"version 4", raw("GGUF").u32(4).u64(0).u64(0), "version: is 4"},
	{"big-endian", raw("GGUF").u32(3 << 24).u64(0).u64(0), "big-endian"},
	{"no counts", raw("GGUF").u32(3), "number of tensors"},
	{"negative number of tensors", header(math.MaxUint64, 0), "number of tensors"},
	{"huge number of tensors", header(1<<60, 0), "number of tensors"},
	{"more tensors than bytes", header(1000, 0), "tensor 0"},
	{"huge number of keys", header(0, math.MaxUint64/8), "number of keys"},
	{"more keys than bytes", header(0, 4000), "key 0"},
	{"key of 2^63 bytes", header(0, 1).u64(1 << 63), "key 0: has a name of"},
	{"key longer than the file", header(0, 1).u64(60000).zero(8), "60000 x 1 bytes"},
	{"empty key", header(0, 1).str("").u32(4).u32(1), "key 0"},
	{"key with NUL", header(0, 1).str("a\x00b").u32(4).u32(1), "NUL"},
	{"unknown value type", header(0, 1).str("a").u32(13).u64(0), "unknown type 13"},
	{"value type -1", header(0, 1).str("a").u32(math.MaxUint32).u64(0), "unknown type"},
	{"no value", header(0, 1).str("a").u32(uint32(Uint64)), `key "a"`},
	{"string longer than the file", header(0, 1).str("a").u32(uint32(String)).u64(1 << 40), "file has only"},
	{"string of -1 bytes", header(0, 1).str("a").u32(uint32(String)).u64(math.MaxUint64), "file has only"},
	{"array of arrays", header(0, 1).str("a").u32(uint32(Array)).u32(uint32(Array)).u64(1).zero(64), "array of arrays"},
	{"array of unknown type", header(0, 1).str("a").u32(uint32(Array)).u32(77).u64(1).zero(64), "unknown type 77"},
	{"array whose size overflows", header(0, 1).str("a").u32(uint32(Array)).u32(uint32(Uint64)).u64(1<<61 + 1).zero(64), "x 8 bytes"},
	{"array of too many strings", header(0, 1).str("a").u32(uint32(Array)).u32(uint32(String)).u64(1 << 32).zero(64), "x 8 bytes"},
	{"string in array too long", header(0, 1).str("a").u32(uint32(Array)).u32(uint32(String)).u64(1).u64(1 << 33).zero(9), `key "a"`},
	{"duplicate key", header(0, 2).str("a").u32(4).u32(1).str("a").u32(4).u32(1), "twice"},
	{"alignment 0", header(0, 1).str(alignmentKey).u32(4).u32(0), "power of two"},
	{"alignment 13", header(0, 1).str(alignmentKey).u32(4).u32(13), "power of two"},
	{"alignment 2^31", header(0, 1).str(alignmentKey).u32(4).u32(1 << 31), "power of two"},
	{"alignment is a string", header(0, 1).str(alignmentKey).u32(8).str("32"), "expected uint32"},
	{"tensor without name", header(1, 0).info("", F32, 0, 4), "tensor 0"},
	{"tensor name of 64 bytes", header(1, 0).info(strings.Repeat("n", 64), F32, 0, 4), "64 bytes, expected 1 to 63"},
	{"tensor name with NUL", header(1, 0).info("a\x00", F32, 0, 4), "NUL"},
	{"duplicate tensor", header(2, 0).info("a", F32, 0, 8).info("a", F32, 32, 8).pad().zero(64), "twice"},
	{"no dimensions", header(1, 0).info("a", F32, 0), "0 dimensions"},
	{"5 dimensions", header(1, 0).info("a", F32, 0, 1, 1, 1, 1, 1), "5 dimensions"},
	{"dimension 0", header(1, 0).info("a", F32, 0, 4, 0), "size 0 in dimension 1"},
	{"negative dimension", header(1, 0).info("a", F32, 0, math.MaxUint64), "size -1"},
	{"elements overflow", header(1, 0).info("a", F32, 0, 1<<32, 1<<32, 1<<32), "overflows"},
	{"elements overflow to small", header(1, 0).info("a", F32, 0, 1<<62, 4), "overflows"},
	{"bytes overflow", header(1, 0).info("a", F64, 0, 1<<61), "overflows"},
	{"unknown tensor type", header(1, 0).info("a", 40, 0, 32).pad().zero(64), "element type 40"},
	{"removed tensor type", header(1, 0).info("a", 4, 0, 32).pad().zero(64), "element type 4"},
	{"row is no multiple of the block", header(1, 0).info("a", Q4_0, 0, 33).pad().zero(64), "block of 32"},
	{"offset not aligned", header(1, 0).info("a", F32, 4, 8).pad().zero(64), "alignment 32"},
	{"offset beyond any file", header(1, 0).info("a", F32, 1<<63, 8).pad().zero(64), "beyond any file"},
	{"offset beyond the file", header(1, 0).info("a", F32, 1<<20, 8).pad().zero(64), "right behind"},
	{"tensors overlap", header(2, 0).info("a", F32, 0, 16).info("b", F32, 32, 8).pad().zero(128), "inside that of the tensor before"},
	{"gap between tensors", header(2, 0).info("a", F32, 0, 8).info("b", F32, 64, 8).pad().zero(128), "right behind"},
	{"data truncated", header(1, 0).info("a", F32, 0, 8).pad().zero(31), "truncated"},
	{"no data at all", header(1, 0).info("a", F32, 0, 8), "truncated"},
	{"data in a far corner of the address space", header(1, 0).info("a", F32, 0, 1<<58).pad().zero(64), "truncated"},
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	for _, tt := range handcrafted {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "bad.gguf")
			if err := os.WriteFile(path, tt.file, 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := Open(path)
			if err == nil {
				f.Close()
				t.Fatal("Open accepted the file")
			}
			var format *FormatError
			if !errors.As(err, &format) {
				t.Fatalf("error %v is a %T, want *FormatError", err, err)
			}
			if format.Path != path || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q, want the path and %q", err, tt.want)
			}
		})
	}
}

func TestParseMemoryIsBounded(t *testing.T) {
	// A sparse file of 1 TiB whose array claims all of it. Not parallel: it measures the process's allocations.
	path := filepath.Join(t.TempDir(), "huge.gguf")
	for name, file := range map[string]raw{
		"array":   header(0, 1).str("a").u32(uint32(Array)).u32(uint32(Uint64)).u64(1 << 36),
		"strings": header(0, 1).str("a").u32(uint32(Array)).u32(uint32(String)).u64(1 << 36),
		"string":  header(0, 1).str("a").u32(uint32(String)).u64(1 << 39),
	} {
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, 1<<40); err != nil {
			t.Skipf("this file system has no sparse files of 1 TiB: %v", err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Open(path)
		runtime.ReadMemStats(&after)
		if err == nil {
			t.Errorf("%s: Open accepted the file", name)
		}
		if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
			t.Errorf("%s: Open allocated %d bytes, want less than 1 MiB", name, got)
		}
	}
}

func TestWriteThenOpen(t *testing.T) {
	t.Parallel()
	metadata := []KeyValue{
		{"general.architecture", "llama"},
		{"u8", uint8(200)}, {"i8", int8(-5)}, {"u16", uint16(60000)}, {"i16", int16(-3)},
		{"u32", uint32(7)}, {"i32", int32(-7)}, {"u64", uint64(1 << 40)}, {"i64", int64(-1 << 40)},
		{"f32", float32(0.5)}, {"f64", 0.25}, {"yes", true}, {"no", false},
		{"words", []string{"a", "", "ccc"}}, {"ints", []int32{1, -2, 3}}, {"floats", []float32{0.5, -1}},
		{"nothing", []string{}},
	}
	tensors := []TensorData{
		{"a", []int64{3, 2}, F32, Float32Bytes([]float32{1, 2, 3, 4, 5, 6}), nil},
		{"b", []int64{32, 2}, Q4_1, bytes.Repeat([]byte{9}, 40), nil},
		{"c", []int64{1}, F16, []byte{1, 2}, nil},
	}
	path := filepath.Join(t.TempDir(), "a.gguf")
	if err := WriteFile(path, metadata, tensors); err != nil {
		t.Fatal(err)
	}
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m := f.Metadata
	ints := map[string]int64{}
	for _, k := range []string{"u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"} {
		n, ok := m.Int(k)
		if !ok {
			t.Errorf("Int(%q) is missing", k)
		}
		ints[k] = n
	}
	want := map[string]int64{"u8": 200, "i8": -5, "u16": 60000, "i16": -3, "u32": 7, "i32": -7, "u64": 1 << 40, "i64": -1 << 40}
	if diff := cmp.Diff(want, ints); diff != "" {
		t.Errorf("integers (-want +got):\n%s", diff)
	}
	if _, ok := m.Uint("i8"); ok {
		t.Error("Uint of a negative value is ok")
	}
	if s, ok := m.String("general.architecture"); !ok || s != "llama" {
		t.Errorf("String = %q, %v", s, ok)
	}
	if x, ok := m.Float("f32"); !ok || x != 0.5 {
		t.Errorf("Float = %v, %v", x, ok)
	}
	if b, ok := m.Bool("yes"); !ok || !b {
		t.Errorf("Bool = %v, %v", b, ok)
	}
	if s, ok := m.Strings("words"); !ok || !slices.Equal(s, []string{"a", "", "ccc"}) {
		t.Errorf("Strings = %q, %v", s, ok)
	}
	if n, ok := m.Ints("ints"); !ok || !slices.Equal(n, []int64{1, -2, 3}) {
		t.Errorf("Ints = %v, %v", n, ok)
	}
	if x, ok := m.Floats("floats"); !ok || !slices.Equal(x, []float64{0.5, -1}) {
		t.Errorf("Floats = %v, %v", x, ok)
	}
	for _, missing := range []string{"gone", "u32", "nothing"} {
		if _, ok := m.String(missing); ok {
			t.Errorf("String(%q) is ok", missing)
		}
		if _, ok := m.Ints(missing); ok {
			t.Errorf("Ints(%q) is ok", missing)
		}
		if _, ok := m.Bool(missing); ok {
			t.Errorf("Bool(%q) is ok", missing)
		}
	}
	for _, want := range tensors {
		got, ok := f.Tensor(want.Name)
		if !ok || !slices.Equal(got.Shape, want.Shape) || got.Type != want.Type {
			t.Errorf("Tensor(%q) = %v, %v", want.Name, got, ok)
			continue
		}
		if got.Offset%32 != 0 || !bytes.Equal(f.Data(got), want.Data) {
			t.Errorf("tensor %q at %d has data %v, want %v", want.Name, got.Offset, f.Data(got), want.Data)
		}
	}
	if err := errors.Join(f.Close(), f.Close(), (*File)(nil).Close()); err != nil {
		t.Error(err)
	}
}

func TestWriteRefuses(t *testing.T) {
	t.Parallel()
	one := []TensorData{{"a", []int64{4}, F32, make([]byte, 16), nil}}
	for name, tt := range map[string]struct {
		metadata []KeyValue
		tensors  []TensorData
		want     string
	}{
		"no type":       {[]KeyValue{{"a", struct{}{}}}, nil, "no GGUF type"},
		"duplicate key": {[]KeyValue{{"a", "x"}, {"a", "y"}}, nil, "twice"},
		"short data":    {nil, []TensorData{{"a", []int64{4}, F32, make([]byte, 12), nil}}, "takes 16"},
		"long data":     {nil, []TensorData{{"a", []int64{4}, F32, make([]byte, 20), nil}}, "takes 16"},
		"long name":     {nil, []TensorData{{strings.Repeat("a", 64), []int64{4}, F32, make([]byte, 16), nil}}, "64 bytes"},
		"alignment":     {[]KeyValue{{alignmentKey, uint32(3)}}, one, "power of two"},
	} {
		var buf bytes.Buffer
		if err := Write(&buf, tt.metadata, tt.tensors); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want %q", name, err, tt.want)
		}
		if buf.Len() != 0 {
			t.Errorf("%s: %d bytes were written", name, buf.Len())
		}
	}
}

func TestOpenNoFile(t *testing.T) {
	t.Parallel()
	if _, err := Open(filepath.Join(t.TempDir(), "gone.gguf")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v, want os.ErrNotExist", err)
	}
	if _, err := Open(t.TempDir()); !errors.As(err, new(*FormatError)) {
		t.Errorf("error %v for a directory, want *FormatError", err)
	}
}

// TestTypeSizes repeats the bits per weight that llama.cpp documents for each type.
func TestTypeSizes(t *testing.T) {
	t.Parallel()
	for typ, want := range map[Type]float64{F32: 32, F16: 16, BF16: 16, Q4_0: 4.5, Q4_1: 5, Q5_0: 5.5, Q5_1: 6, Q8_0: 8.5,
		Q8_1: 9, MXFP4: 4.25, Q2K: 2.625, Q3K: 3.4375, Q4K: 4.5, Q5K: 5.5, Q6K: 6.5625, Q8K: 9.125, IQ2XXS: 2.0625,
		IQ2XS: 2.3125, IQ2S: 2.5625, IQ3XXS: 3.0625, IQ3S: 3.4375, IQ1S: 1.5625, IQ1M: 1.75, IQ4NL: 4.5, IQ4XS: 4.25,
		TQ10: 1.6875, TQ20: 2.0625, I8: 8, I16: 16, I32: 32, I64: 64, F64: 64} {
		if got := 8 * float64(typ.TypeBytes()) / float64(typ.BlockSize()); got != want {
			t.Errorf("%s has %v bits per weight, want %v", typ, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, tt := range handcrafted {
		f.Add([]byte(tt.file))
	}
	var good bytes.Buffer
	if err := Write(&good, tinyMetadata(), tinyTensors()); err != nil {
		f.Fatal(err)
	}
	f.Add(good.Bytes())
	f.Add([]byte(header(2, 1).str("a").u32(9).u32(8).u64(2).str("x").str("y").
		info("t", Q8_0, 0, 32, 2).info("u", F32, 96, 8).pad().zero(128)))
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := Parse(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			if !errors.As(err, new(*FormatError)) {
				t.Fatalf("error %v is a %T, want *FormatError", err, err)
			}
			return
		}
		for _, tensor := range file.Tensors {
			if tensor.Offset < 24 || tensor.Bytes < 1 || tensor.Offset+tensor.Bytes > int64(len(data)) {
				t.Fatalf("tensor %+v lies outside the file of %d bytes", tensor, len(data))
			}
		}
		for key := range file.Metadata { // getters never panic
			file.Metadata.String(key)
			file.Metadata.Uint(key)
			file.Metadata.Float(key)
			file.Metadata.Bool(key)
			file.Metadata.Strings(key)
			file.Metadata.Ints(key)
			file.Metadata.Floats(key)
		}
		for _, err := range []error{CheckModel(file), CheckAdapter(file, file)} {
			if err != nil && !errors.As(err, new(*FormatError)) {
				t.Fatalf("error %v is a %T, want *FormatError", err, err)
			}
		}
	})
}

// TestForget expects the same data behind it, of a tensor that neither begins nor ends on a page.
func TestForget(t *testing.T) {
	t.Parallel()
	data := make([]byte, 4*50000)
	for i := range data {
		data[i] = byte(i * 7)
	}
	path := filepath.Join(t.TempDir(), "model.gguf")
	if err := WriteFile(path, nil, []TensorData{
		{Name: "a", Shape: []int64{25000}, Type: F32, Data: data[:100000]}, {Name: "b", Shape: []int64{25000}, Type: F32, Data: data[100000:]},
	}); err != nil {
		t.Fatal(err)
	}
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, tensor := range f.Tensors {
		before := bytes.Clone(f.Data(tensor))
		f.Forget(tensor)
		if !bytes.Equal(before, f.Data(tensor)) {
			t.Errorf("%s has other data", tensor.Name)
		}
	}
}
