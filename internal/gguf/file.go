// Package gguf reads and writes GGUF files (models and adapters) and safetensors files.
//
// It is the gate in front of the engine: a file is checked here, in Go, before any C code sees it. Every count, length,
// offset and product is compared with what the file holds, and memory is bounded whatever the file claims.
//
//	f, err := gguf.Open("base.gguf")
//	if err != nil { ... } // *gguf.FormatError says what is wrong and where
//	defer f.Close()
//	if err := gguf.CheckModel(f); err != nil { ... }
//	t, ok := f.Tensor("token_embd.weight")
//	weights := f.Data(t)
package gguf

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"
	"os"
	"slices"
	"strings"
	"syscall"
)

// Limits on headers. Real models have some 50 keys, 1000 tensors and 10 MiB of vocabulary; the engine's own check for
// duplicates takes quadratic time in both counts, and memory is proportional to the header.
const (
	maxKeys        = 4096
	maxTensors     = 32768
	maxHeaderBytes = 64 << 20
	maxKeyBytes    = 65535
	maxNameBytes   = 63 // GGML_MAX_NAME - 1
	maxDims        = 4  // GGML_MAX_DIMS
	maxAlignment   = 1 << 20

	defaultAlignment = 32
	alignmentKey     = "general.alignment"
)

// FormatError says that a file is not a valid GGUF or safetensors file, or not a model that the engine can run.
type FormatError struct {
	Path   string // "" if the data came from no file
	Offset int64  // byte where reading stopped, -1 if the error is about no single place
	What   string // the part of the file: "header", `key "general.alignment"`, `tensor "output.weight"`
	Reason string // what is wrong with it, and what was expected
}

func (e *FormatError) Error() string {
	var b strings.Builder
	if e.Path != "" {
		fmt.Fprintf(&b, "%s: ", e.Path)
	}
	fmt.Fprintf(&b, "%s: %s", e.What, e.Reason)
	if e.Offset >= 0 {
		fmt.Fprintf(&b, " (at byte %d)", e.Offset)
	}
	return b.String()
}

// Tensor describes one tensor of a file.
type Tensor struct {
	Name   string
	Shape  []int64 // ggml order: Shape[0] is the row length, the fastest index; 1 to 4 sizes, each at least 1
	Type   Type
	Offset int64 // of the data, from the file's start
	Bytes  int64 // of the data, without padding
}

// Elements is the product of Shape.
func (t Tensor) Elements() int64 {
	n := int64(1)
	for _, d := range t.Shape {
		n *= d
	}
	return n
}

// File is an open, validated GGUF file. It may be used by several goroutines; Close must come after all use.
type File struct {
	Path      string
	Version   uint32
	Alignment int64
	Size      int64 // bytes of the file
	Metadata  Metadata
	Keys      []string // of Metadata, in the file's order
	Tensors   []Tensor // in the file's order, which is also that of their data

	byName map[string]int
	data   []byte // the whole file, mapped read-only; nil if the file came from Parse
}

// Open validates the header of the file at path and maps its data. The pages of the mapping are the system's page
// cache and are shared with every process that maps the file.
//
// The header is read, not mapped: only Data can meet a file that is truncated while it is in use.
func Open(path string) (*File, error) {
	// Stat first: opening a FIFO would wait for its writer.
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("open model file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, &FormatError{Path: path, Offset: -1, What: "file", Reason: "is not a regular file"}
	}
	handle, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open model file: %w", err)
	}
	defer handle.Close()
	if info, err = handle.Stat(); err != nil {
		return nil, fmt.Errorf("open model file: %w", err)
	}
	f, err := Parse(handle, info.Size())
	if err != nil {
		if format, ok := errors.AsType[*FormatError](err); ok {
			format.Path = path
		}
		return nil, err
	}
	f.Path = path
	f.data, err = syscall.Mmap(int(handle.Fd()), 0, int(info.Size()), syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	return f, nil
}

// Close unmaps the data; slices from Data are invalid afterwards. Closing twice or closing nil does nothing.
func (f *File) Close() error {
	if f == nil || f.data == nil {
		return nil
	}
	data := f.data
	f.data = nil
	if err := syscall.Munmap(data); err != nil {
		return fmt.Errorf("unmap %s: %w", f.Path, err)
	}
	return nil
}

// Tensor returns the tensor of that name.
func (f *File) Tensor(name string) (Tensor, bool) {
	i, ok := f.byName[name]
	if !ok {
		return Tensor{}, false
	}
	return f.Tensors[i], true
}

// Data is the encoded content of one of f's tensors, a read-only view that is valid until Close. Writing to it faults.
func (f *File) Data(t Tensor) []byte {
	if f.data == nil {
		panic("gguf: Data of a file that is closed or was never mapped")
	}
	return f.data[t.Offset : t.Offset+t.Bytes : t.Offset+t.Bytes]
}

// Forget takes the pages of a tensor's data out of the process's memory, as far as the system follows the advice;
// whatever is touched later is read again, from the system's page cache as long as it holds it.
func (f *File) Forget(t Tensor) {
	page := int64(os.Getpagesize())
	from, to := pad(t.Offset, page), (t.Offset+t.Bytes)/page*page // its neighbours may be in use
	if f.data != nil && from < to {
		_ = syscall.Madvise(f.data[from:to], syscall.MADV_DONTNEED)
	}
}

// Floats decodes the data of an F32, F16 or BF16 tensor of an opened file.
func (f *File) Floats(t Tensor) ([]float32, error) {
	names := map[Type]string{F32: "F32", F16: "F16", BF16: "BF16"}
	if names[t.Type] == "" {
		return nil, &FormatError{Path: f.Path, Offset: -1, What: fmt.Sprintf("tensor %q", t.Name), Reason: fmt.Sprintf("is of type %s, expected F32, F16 or BF16", t.Type)}
	}
	return floats(f.Data(t), names[t.Type]), nil
}

// Parse validates the header of a GGUF file of size bytes. The File has no Data. Errors are *FormatError without a
// path, or r's own.
func Parse(r io.ReaderAt, size int64) (*File, error) {
	d := &decoder{r: bufio.NewReaderSize(io.NewSectionReader(r, 0, size), 1<<16), size: size}
	f := &File{Size: size, Metadata: Metadata{}, byName: map[string]int{}}

	magic := d.bytes("magic", 4)
	if d.err == nil && string(magic) != "GGUF" {
		d.failAt(0, "magic", "is %q, expected \"GGUF\": this is no GGUF file", magic)
	}
	f.Version = d.uint32("version")
	switch {
	case d.err != nil:
	case f.Version&0xffff == 0 && f.Version != 0:
		d.failAt(4, "version", "is %#x: the file is big-endian; only little-endian files can be read", f.Version)
	case f.Version != 2 && f.Version != 3:
		d.failAt(4, "version", "is %d, expected 2 or 3", f.Version)
	}
	tensors := d.count("number of tensors", maxTensors)
	keys := d.count("number of keys", maxKeys)

	for i := 0; i < keys && d.err == nil; i++ {
		d.keyValue(f, i)
	}
	f.Alignment = d.alignment(f.Metadata)
	for i := 0; i < tensors && d.err == nil; i++ {
		d.tensor(f, i)
	}
	d.layOut(f)
	if d.err != nil {
		return nil, d.err
	}
	return f, nil
}

// decoder reads a header. The first error sticks and turns every later read into a no-op that returns zero.
type decoder struct {
	r      *bufio.Reader
	offset int64
	size   int64
	err    error
}

func (d *decoder) failAt(offset int64, what, format string, args ...any) {
	if d.err == nil {
		d.err = &FormatError{Offset: offset, What: what, Reason: fmt.Sprintf(format, args...)}
	}
}

func (d *decoder) fail(what, format string, args ...any) { d.failAt(d.offset, what, format, args...) }

// room checks that count items of at least itemBytes each can follow. It divides, since the product may overflow.
func (d *decoder) room(what string, count uint64, itemBytes int64) bool {
	if d.err != nil {
		return false
	}
	if left := d.size - d.offset; count > uint64(left/itemBytes) {
		d.fail(what, "needs %d x %d bytes, but the file has only %d left: it is truncated or its header is damaged",
			count, itemBytes, left)
		return false
	}
	if int64(count)*itemBytes > maxHeaderBytes-d.offset {
		d.fail(what, "needs %d x %d bytes: headers over %d MiB are refused", count, itemBytes, maxHeaderBytes>>20)
		return false
	}
	return true
}

// appendBytes reads n bytes behind buf.
func (d *decoder) appendBytes(buf []byte, what string, n uint64) []byte {
	if !d.room(what, n, 1) {
		return buf
	}
	start := len(buf)
	buf = slices.Grow(buf, int(n))[:start+int(n)]
	if _, err := io.ReadFull(d.r, buf[start:]); err != nil {
		// The size was checked, so the file became shorter or the disk failed.
		if d.err == nil {
			d.err = fmt.Errorf("read %s at byte %d: %w", what, d.offset, err)
		}
		return buf[:start]
	}
	d.offset += int64(n)
	return buf
}

// bytes returns the next n bytes, or nil after an error.
func (d *decoder) bytes(what string, n uint64) []byte {
	b := d.appendBytes(nil, what, n)
	if d.err != nil {
		return nil
	}
	return b
}

func (d *decoder) uint32(what string) uint32 {
	b := d.bytes(what, 4)
	if d.err != nil {
		return 0
	}
	return binary.LittleEndian.Uint32(b)
}

func (d *decoder) uint64(what string) uint64 {
	b := d.bytes(what, 8)
	if d.err != nil {
		return 0
	}
	return binary.LittleEndian.Uint64(b)
}

func (d *decoder) count(what string, limit int) int {
	n := d.uint64(what)
	if n > uint64(limit) {
		d.failAt(d.offset-8, what, "is %d, expected at most %d", n, limit)
		return 0
	}
	return int(n)
}

// name reads a key or a tensor's name: 1 to limit bytes without NUL, since the engine would end it there.
func (d *decoder) name(what string, limit uint64) string {
	n := d.uint64(what)
	if d.err == nil && (n == 0 || n > limit) {
		d.failAt(d.offset-8, what, "has a name of %d bytes, expected 1 to %d", n, limit)
		return ""
	}
	s := string(d.bytes(what, n))
	if strings.IndexByte(s, 0) >= 0 {
		d.fail(what, "has a NUL byte in its name %q", s)
	}
	return s
}

func (d *decoder) keyValue(f *File, i int) {
	key := d.name(fmt.Sprintf("key %d", i), maxKeyBytes)
	what := fmt.Sprintf("key %q", key)
	if _, dup := f.Metadata[key]; dup && d.err == nil {
		d.fail(what, "occurs twice")
	}
	v := Value{Type: ValueType(d.uint32(what)), Count: 1}
	elem := v.Type
	count := uint64(1)
	if v.Type == Array {
		v.Elem = ValueType(d.uint32(what))
		elem = v.Elem
		count = d.uint64(what)
	}
	switch {
	case d.err != nil:
		return
	case elem == String:
		if !d.room(what, count, 8) {
			return
		}
		for range count {
			start := len(v.raw)
			v.raw = d.appendBytes(v.raw, what, 8)
			if d.err != nil {
				return
			}
			v.raw = d.appendBytes(v.raw, what, binary.LittleEndian.Uint64(v.raw[start:]))
			if d.err != nil {
				return
			}
		}
	case elem.size() > 0:
		if !d.room(what, count, elem.size()) {
			return
		}
		v.raw = d.bytes(what, count*uint64(elem.size()))
	case elem == Array:
		d.fail(what, "is an array of arrays, which the engine does not read")
	default:
		d.fail(what, "has the unknown type %d, expected 0 to 12", uint32(elem))
	}
	if d.err != nil {
		return
	}
	v.Count = int(count)
	f.Metadata[key] = v
	f.Keys = append(f.Keys, key)
}

func (d *decoder) alignment(m Metadata) int64 {
	if d.err != nil {
		return 0
	}
	v, ok := m[alignmentKey]
	if !ok {
		return defaultAlignment
	}
	what := fmt.Sprintf("key %q", alignmentKey)
	if v.Type != Uint32 {
		d.fail(what, "is of type %s, expected uint32", v.describe())
		return 0
	}
	n, _ := v.integer(0)
	if n < 1 || n > maxAlignment || n&(n-1) != 0 {
		d.fail(what, "is %d, expected a power of two up to %d", n, maxAlignment)
		return 0
	}
	return n
}

func (d *decoder) tensor(f *File, i int) {
	t := Tensor{Name: d.name(fmt.Sprintf("tensor %d", i), maxNameBytes)}
	what := fmt.Sprintf("tensor %q", t.Name)
	if _, dup := f.byName[t.Name]; dup {
		d.fail(what, "occurs twice")
	}
	dims := d.uint32(what)
	if d.err == nil && (dims < 1 || dims > maxDims) {
		d.fail(what, "has %d dimensions, expected 1 to %d", dims, maxDims)
	}
	if d.err != nil {
		return
	}
	elements := uint64(1)
	for j := range dims {
		n := d.uint64(what)
		if d.err == nil && (n == 0 || n > math.MaxInt64) {
			d.fail(what, "has size %d in dimension %d, expected 1 or more", int64(n), j)
		}
		hi, lo := bits.Mul64(elements, n)
		if d.err == nil && (hi != 0 || lo >= math.MaxInt64) {
			d.fail(what, "has a shape whose number of elements overflows 63 bits")
		}
		if d.err != nil {
			return
		}
		elements = lo
		t.Shape = append(t.Shape, int64(n))
	}
	t.Type = Type(d.uint32(what))
	if d.err == nil && !t.Type.Known() {
		d.fail(what, "has the element type %d, which the engine does not know", uint32(t.Type))
	}
	if d.err != nil {
		return
	}
	if t.Shape[0]%t.Type.BlockSize() != 0 {
		d.fail(what, "has rows of %d elements, which is not a multiple of %s's block of %d",
			t.Shape[0], t.Type, t.Type.BlockSize())
	}
	hi, lo := bits.Mul64(elements/uint64(t.Type.BlockSize()), uint64(t.Type.TypeBytes()))
	if hi != 0 || lo > math.MaxInt64 {
		d.fail(what, "has a shape whose size in bytes overflows 63 bits")
	}
	t.Bytes = int64(lo)
	offset := d.uint64(what)
	if d.err == nil && offset > math.MaxInt64/2 {
		d.failAt(d.offset-8, what, "has its data at offset %d, beyond any file", offset)
	}
	if d.err != nil {
		return
	}
	if offset%uint64(f.Alignment) != 0 {
		d.failAt(d.offset-8, what, "has its data at offset %d, which is not a multiple of the alignment %d",
			offset, f.Alignment)
	}
	t.Offset = int64(offset) // from the data section's start; layOut makes it absolute
	f.byName[t.Name] = len(f.Tensors)
	f.Tensors = append(f.Tensors, t)
}

// layOut checks that the tensors' data lie one behind the other, as the engine demands, and inside the file.
func (d *decoder) layOut(f *File) {
	if d.err != nil {
		return
	}
	start := pad(d.offset, f.Alignment)
	next := int64(0)
	for i := range f.Tensors {
		t := &f.Tensors[i]
		what := fmt.Sprintf("tensor %q", t.Name)
		switch {
		case t.Offset < next:
			d.failAt(-1, what, "has its data at offset %d, inside that of the tensor before it, which ends at %d",
				t.Offset, next)
		case t.Offset > next:
			d.failAt(-1, what, "has its data at offset %d, expected %d, right behind the tensor before it", t.Offset, next)
		case t.Bytes > f.Size-start-t.Offset:
			d.failAt(-1, what, "ends at byte %d, but the file has %d: it is truncated", start+t.Offset+t.Bytes, f.Size)
		}
		if d.err != nil {
			return
		}
		next = pad(t.Offset+t.Bytes, f.Alignment)
		t.Offset += start
	}
}

// pad rounds n up to a multiple of the alignment.
func pad(n, alignment int64) int64 { return (n + alignment - 1) / alignment * alignment }
