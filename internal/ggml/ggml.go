// Package ggml is the only cgo of ggml: tensors, graphs, a backend and the fused CPU operations of training
// (kernels.c). ggml itself is linked out of the ollama module, whose Go package compiles it.
//
//	backend, err := ggml.NewCPU(threads)
//	ctx := ggml.NewContext(64)          // tensors without memory
//	x := ctx.New(ggml.F32, 576, 128)    // ne order: the first dimension is contiguous
//	buffer, err := ctx.Allocate(backend)
//
// A GGML_ASSERT ends the process, so the callers in internal/graph check shapes in Go before they build a node.
// Nothing here may be shared between goroutines without a lock.
package ggml

/*
#cgo LDFLAGS: -lm -lpthread
#include <stdlib.h>
#include "kernels.h"

static void to_float(unsigned int type, const void *src, float *dst, int64_t n) { ggml_get_type_traits(type)->to_float(src, dst, n); }
static void from_float(unsigned int type, const float *src, void *dst, int64_t n) { ggml_get_type_traits(type)->from_float_ref(src, dst, n); }
static bool has_to_float(unsigned int type) { return ggml_get_type_traits(type)->to_float != 0; }
static struct ggml_context *new_context(size_t bytes) {
	struct ggml_init_params p = { bytes, NULL, true };
	return ggml_init(p);
}
*/
import "C"

import (
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"unsafe"

	_ "github.com/ollama/ollama/llama/llama.cpp/src"      // compiles llama.cpp, so that one program holds one ggml
	_ "github.com/ollama/ollama/ml/backend/ggml/ggml/src" // compiles ggml

	"github.com/hone-llm/hone/internal/engine"
)

// Type is ggml's enum ggml_type, the same numbers as in GGUF files.
type Type int32

// The types that tensors of our own have; a model's weights may have any type of the file format.
const (
	F32   Type = C.HONE_GGML_TYPE_F32
	I8    Type = C.HONE_GGML_TYPE_I8 // also raw bytes
	I32   Type = C.HONE_GGML_TYPE_I32
	F16   Type = C.HONE_GGML_TYPE_F16
	BF16  Type = C.HONE_GGML_TYPE_BF16
	Q8_0  Type = C.HONE_GGML_TYPE_Q8_0
	IQ4NL Type = C.HONE_GGML_TYPE_IQ4_NL
)

// ErrAborted reports a computation that Backend.Abort ended.
var ErrAborted = errors.New("computation aborted")

// ErrMemory reports that a buffer could not be allocated.
var ErrMemory = errors.New("out of memory")

// HasBF16 reports whether the CPU multiplies bfloat16 directly (AVX512-BF16).
func HasBF16() bool { return C.ggml_cpu_has_avx512_bf16() != 0 }

// HasVNNI reports whether the CPU multiplies packed weights with AVX512-VNNI.
func HasVNNI() bool { return C.ggml_cpu_has_avx512_vnni() != 0 }

// Dequantizable reports whether rows of the type can be expanded to float32.
func Dequantizable(t Type) bool { return t == F32 || bool(C.has_to_float(C.uint(t))) }

// Dequantize expands len(dst) elements of src, which holds whole blocks of type t, to float32.
func Dequantize(dst []float32, t Type, src []byte) {
	if len(dst) == 0 {
		return
	}
	if t == F32 {
		copy(dst, unsafe.Slice((*float32)(unsafe.Pointer(&src[0])), len(dst)))
		return
	}
	C.to_float(C.uint(t), unsafe.Pointer(&src[0]), (*C.float)(&dst[0]), C.int64_t(len(dst)))
}

// Quantize stores src, whole blocks of type t, in dst. BF16 rounds to nearest; the quantised types are ggml's
// reference quantisations without an importance matrix.
func Quantize(dst []byte, t Type, src []float32) {
	if len(src) == 0 {
		return
	}
	if t == F32 {
		copy(unsafe.Slice((*float32)(unsafe.Pointer(&dst[0])), len(src)), src)
		return
	}
	C.from_float(C.uint(t), (*C.float)(&src[0]), unsafe.Pointer(&dst[0]), C.int64_t(len(src)))
}

// Tensor is a node or a leaf. It belongs to its Context and is invalid after Context.Free.
type Tensor struct{ c *C.struct_ggml_tensor }

// Valid reports whether the tensor exists; the zero Tensor stands for "none".
func (t Tensor) Valid() bool { return t.c != nil }

// Size is the number of elements of dimension i, i in [0, 4).
func (t Tensor) Size(i int) int { return int(t.c.ne[i]) }

// Elements is the number of elements.
func (t Tensor) Elements() int {
	return t.Size(0) * t.Size(1) * t.Size(2) * t.Size(3)
}

// Floats is the memory of an allocated float32 tensor in host memory; it stays valid as long as its buffer.
func (t Tensor) Floats() []float32 {
	return unsafe.Slice((*float32)(t.c.data), t.Elements())
}

// Ints is the memory of an allocated int32 tensor in host memory.
func (t Tensor) Ints() []int32 { return unsafe.Slice((*int32)(t.c.data), t.Elements()) }

// Bytes is the first n bytes of an allocated tensor in host memory.
func (t Tensor) Bytes(n int) []byte { return unsafe.Slice((*byte)(t.c.data), n) }

// SetTranspose writes rows [row0, row0+len(src)/cols) of a matrix into the tensor, which holds the matrix's transpose
// [rows, cols] as BF16 or F32: element (r, c) of the matrix becomes element (c, r).
//
//	src  [n, cols] float32, row-major
func (t Tensor) SetTranspose(src []float32, row0, cols, rows int) {
	n := C.int64_t(len(src) / cols)
	if Type(t.c._type) == BF16 {
		C.hone_transpose_bf16((*C.float)(&src[0]), (*C.uint16_t)(t.c.data), C.int64_t(row0), n, C.int64_t(cols), C.int64_t(rows))
		return
	}
	C.hone_transpose_f32((*C.float)(&src[0]), (*C.float)(t.c.data), C.int64_t(row0), n, C.int64_t(cols), C.int64_t(rows))
}

// SetRows writes src into the tensor from element offset on, as BF16 or F32.
func (t Tensor) SetRows(src []float32, offset int) {
	if Type(t.c._type) == BF16 {
		C.hone_to_bf16((*C.float)(&src[0]), (*C.uint16_t)(unsafe.Add(t.c.data, 2*offset)), C.int64_t(len(src)))
		return
	}
	copy(t.Floats()[offset:], src)
}

// Context holds the descriptions of tensors; their memory comes from Allocate or from an Allocator.
type Context struct{ c *C.struct_ggml_context }

// NewContext makes room for a number of tensors and, if nodes is not 0, for one graph of that many nodes.
func NewContext(tensors, nodes int) *Context {
	size := C.size_t(tensors+8) * C.ggml_tensor_overhead()
	if nodes > 0 {
		size += C.ggml_graph_overhead_custom(C.size_t(nodes), false)
	}
	return &Context{C.new_context(size)}
}

// Free releases the context; it may be called twice.
func (x *Context) Free() {
	if x != nil && x.c != nil {
		C.ggml_free(x.c)
		x.c = nil
	}
}

// New describes a tensor; sizes are in ne order (first dimension contiguous), up to four.
func (x *Context) New(t Type, sizes ...int) Tensor {
	ne := [4]C.int64_t{1, 1, 1, 1}
	for i, s := range sizes {
		ne[i] = C.int64_t(s)
	}
	return Tensor{C.ggml_new_tensor_4d(x.c, C.uint(t), ne[0], ne[1], ne[2], ne[3])}
}

// View is a contiguous part of t with the given sizes, from element offset on. t must not be quantised.
func (x *Context) View(t Tensor, offset int, sizes ...int) Tensor {
	ne := [3]C.int64_t{1, 1, 1}
	for i, s := range sizes {
		ne[i] = C.int64_t(s)
	}
	element := C.size_t(t.c.nb[0])
	nb1 := element * C.size_t(ne[0])
	return Tensor{C.ggml_view_3d(x.c, t.c, ne[0], ne[1], ne[2], nb1, nb1*C.size_t(ne[1]), element*C.size_t(offset))}
}

// Buffer is memory of tensors.
type Buffer struct{ c *C.struct_ggml_backend_buffer }

// Allocate gives memory to every tensor of the context that has none. It returns ErrMemory.
func (x *Context) Allocate(b *Backend) (*Buffer, error) {
	buffer := C.ggml_backend_alloc_ctx_tensors(x.c, b.c)
	if buffer == nil {
		return nil, fmt.Errorf("allocate tensors: %w", ErrMemory)
	}
	if !b.GPU() {
		hugePages(buffer)
	}
	return &Buffer{buffer}, nil
}

func hugePages(b *C.struct_ggml_backend_buffer) {
	HugePages(unsafe.Slice((*byte)(C.ggml_backend_buffer_get_base(b)), int(C.ggml_backend_buffer_get_size(b))))
}

// Size is the buffer's length in bytes.
func (b *Buffer) Size() int { return int(C.ggml_backend_buffer_get_size(b.c)) }

// Free releases the memory; it may be called twice.
func (b *Buffer) Free() {
	if b != nil && b.c != nil {
		C.ggml_backend_buffer_free(b.c)
		b.c = nil
	}
}

// MulMat is b times the transpose of a: a [k, m], b [k, n] -> [m, n] in ne order.
func (x *Context) MulMat(a, b Tensor) Tensor { return Tensor{C.ggml_mul_mat(x.c, a.c, b.c)} }

// Add is the element-wise sum; b may repeat along higher dimensions.
func (x *Context) Add(a, b Tensor) Tensor { return Tensor{C.ggml_add(x.c, a.c, b.c)} }

// GetRows picks the rows of a whose numbers are in index (int32) and expands them to float32.
func (x *Context) GetRows(a, index Tensor) Tensor { return Tensor{C.ggml_get_rows(x.c, a.c, index.c)} }

// Copy writes a into b, converting the type; the result is b.
func (x *Context) Copy(a, b Tensor) Tensor { return Tensor{C.ggml_cpy(x.c, a.c, b.c)} }

// Rope describes rotary position embedding, https://arxiv.org/abs/2104.09864.
type Rope struct {
	Dimensions int  // rotated elements of a head
	NeoX       bool // halves are paired (Hugging Face order) instead of neighbours
	Base       float32
	Scale      float32 // 1, or 1/factor of linear scaling
	Factors    Tensor  // [Dimensions/2] frequency divisors (Llama 3), or none
}

func (r Rope) mode() C.int {
	if r.NeoX {
		return C.HONE_GGML_ROPE_TYPE_NEOX
	}
	return 0
}

// Rope rotates x [d, heads, T] by the positions (int32 [T]).
func (x *Context) Rope(t, positions Tensor, r Rope) Tensor {
	return Tensor{C.ggml_rope_ext(x.c, t.c, positions.c, r.Factors.c, C.int(r.Dimensions), r.mode(), 0, C.float(r.Base), C.float(r.Scale), 0, 1, 32, 1)}
}

// RopeBack is the gradient of Rope.
func (x *Context) RopeBack(t, positions Tensor, r Rope) Tensor {
	return Tensor{C.ggml_rope_ext_back(x.c, t.c, positions.c, r.Factors.c, C.int(r.Dimensions), r.mode(), 0, C.float(r.Base), C.float(r.Scale), 0, 1, 32, 1)}
}

func param(f float32) C.int32_t { return C.int32_t(int32(math.Float32bits(f))) }

func (x *Context) custom(ne0, ne1 int, op C.int, params []C.int32_t, args ...Tensor) Tensor {
	return x.customOf(F32, ne0, ne1, op, params, args...)
}

func (x *Context) customOf(t Type, ne0, ne1 int, op C.int, params []C.int32_t, args ...Tensor) Tensor {
	list := pointers(args)
	return Tensor{C.hone_custom(x.c, C.uint(t), C.int64_t(ne0), C.int64_t(ne1), &list[0], C.int(len(list)), op, first(params), C.int(len(params)))}
}

func (x *Context) customInPlace(dst Tensor, op C.int, params []C.int32_t, args ...Tensor) Tensor {
	list := pointers(args)
	return Tensor{C.hone_custom_inplace(x.c, dst.c, &list[0], C.int(len(list)), op, first(params), C.int(len(params)))}
}

func first(params []C.int32_t) *C.int32_t {
	if len(params) == 0 {
		return nil
	}
	return &params[0]
}

// pointers drops a trailing absent argument: an operation sees it as a missing source.
func pointers(args []Tensor) []*C.struct_ggml_tensor {
	list := make([]*C.struct_ggml_tensor, 0, len(args))
	for _, a := range args {
		if a.c != nil {
			list = append(list, a.c)
		}
	}
	return list
}

// RMSNorm is x / sqrt(mean(x^2) + eps) * gamma for each token, as LlamaRMSNorm.
//
//	v [D, T], gamma [D], D a multiple of 16
func (x *Context) RMSNorm(v, gamma Tensor, eps float32) Tensor {
	return x.custom(v.Size(0), v.Size(1), C.HONE_RMS_NORM, []C.int32_t{param(eps)}, v, gamma)
}

// RMSNormBack is the gradient of RMSNorm with respect to v, plus residual [D, T] if there is one.
func (x *Context) RMSNormBack(v, gamma, dy, residual Tensor, eps float32) Tensor {
	return x.custom(v.Size(0), v.Size(1), C.HONE_RMS_NORM_BACK, []C.int32_t{param(eps)}, v, gamma, dy, residual)
}

// SwiGLU is silu(gate) * up, all [F, T], https://arxiv.org/abs/2002.05202.
func (x *Context) SwiGLU(gate, up Tensor) Tensor {
	return x.custom(gate.Size(0), gate.Size(1), C.HONE_SWIGLU, nil, gate, up)
}

// SwiGLUBack returns the gradients with respect to gate and up.
func (x *Context) SwiGLUBack(gate, up, dy Tensor) (dgate, dup, node Tensor) {
	f, t := gate.Size(0), gate.Size(1)
	both := x.custom(f, 2*t, C.HONE_SWIGLU_BACK, nil, gate, up, dy)
	return x.View(both, 0, f, t), x.View(both, f*t, f, t), both
}

// Heads is the shape of an attention: query heads, key-value heads, and elements of one head (a multiple of 16).
type Heads struct{ Query, KeyValue, Size int }

// Attention is causal softmax attention over a forest of segments: a query attends to the keys of its segment's
// ancestors, root first, and to those up to its own in its segment, softmax(q k^T / sqrt(Size)) v, query heads sharing
// a key-value head in groups.
//
//	q [Size*Query, T], k and v [Size*KeyValue, T]
//	segments int32 [3, n]: segment i is tokens [start, end) and the index of an earlier segment as its parent, or -1;
//	the segments cover all T tokens and none is empty
func (x *Context) Attention(q, k, v, segments Tensor, h Heads) Tensor {
	return x.custom(h.Size*h.Query, lastSize(q), C.HONE_ATTENTION, h.params(), q, k, v, segments)
}

// AttentionBack returns the gradients with respect to q, k and v, given that of the output, and the node that computes
// them. A key's gradient is the sum over its segment's descendants. q must be two-dimensional.
func (x *Context) AttentionBack(q, k, v, segments, dout Tensor, h Heads) (dq, dk, dv, node Tensor) {
	t := q.Size(1)
	nq, nk := h.Size*h.Query, h.Size*h.KeyValue
	all := x.custom(nq+2*nq, t, C.HONE_ATTENTION_BACK, h.params(), q, k, v, segments, dout)
	if h.Query != h.KeyValue {
		all = x.customInPlace(all, C.HONE_SUM_HEADS, h.params(), segments)
	}
	return x.View(all, 0, nq, t), x.View(all, nq*t, nk, t), x.View(all, (nq+nk)*t, nk, t), all
}

func (h Heads) params() []C.int32_t {
	return []C.int32_t{C.int32_t(h.Size), C.int32_t(h.Query), C.int32_t(h.KeyValue)}
}

func lastSize(t Tensor) int { return t.Elements() / t.Size(0) }

// Dropout is the mask of one LoRA module: an element is kept with probability 1-P and then scaled by 1/(1-P), as
// torch.nn.Dropout. Seeds [T] int32 holds one seed a token; the zero Dropout keeps everything.
type Dropout struct {
	Seeds  Tensor
	Module int     // different modules have independent masks
	P      float64 // less than 1; rounded to a multiple of 2^-16
}

func (d Dropout) params() []C.int32_t {
	return []C.int32_t{C.int32_t(d.Module), C.int32_t(math.Round(d.P * (1 << 16)))}
}

// LoRADown is x w^T with dropout on x: x [in, T], w [in, r] (r rows of in) -> [r, T]. r is a multiple of 16.
func (x *Context) LoRADown(v, w Tensor, d Dropout) Tensor {
	return x.custom(w.Size(1), v.Size(1), C.HONE_LORA_DOWN, d.params(), v, w, d.Seeds)
}

// LoRAUp adds scale * mask(u w) to y in place and returns y: y [n, T], u [r, T], w [n, r] (r rows of n).
func (x *Context) LoRAUp(y, u, w Tensor, scale float32, d Dropout) Tensor {
	return x.customInPlace(y, C.HONE_LORA_UP, append(d.params(), param(scale)), u, w, d.Seeds)
}

// LoRAOuter adds scale * sum over tokens of u[t] (outer) mask(v[t]) to the gradient in place:
// gradient [n, r], u [r, T], v [n, T].
func (x *Context) LoRAOuter(gradient, u, v Tensor, scale float32, d Dropout) Tensor {
	return x.customInPlace(gradient, C.HONE_LORA_OUTER, append(d.params(), param(scale)), u, v, d.Seeds)
}

// CrossEntropy turns logits [V, c] in place into the gradient of scale * sum(weight * loss), and writes each target's
// loss in nats and whether its label has the largest logit (1 or 0) into stats [2, n]. Several targets may share a
// column, whose gradient is scale * sum over its targets of weight * (softmax - onehot(label)).
//
//	columns int32 [n]  the column of each target plus first, in increasing order
//	labels  int32 [n]  in [0, V)
//	weights [n]
func (x *Context) CrossEntropy(logits, columns, labels, weights, stats Tensor, first int, scale float32) Tensor {
	return x.customInPlace(logits, C.HONE_CROSS_ENTROPY, []C.int32_t{param(scale), C.int32_t(first)}, columns, labels, stats, weights)
}

// Losses is CrossEntropy without the gradient: it writes stats and returns the logits as they are.
func (x *Context) Losses(logits, columns, labels, stats Tensor, first int) Tensor {
	return x.customInPlace(logits, C.HONE_CROSS_ENTROPY, []C.int32_t{0, C.int32_t(first)}, columns, labels, stats)
}

// ScatterRows adds row i of v [D, n] to row index[i] of into [D, T], in place; without into, of a zeroed new tensor of
// tokens rows. Indices may repeat.
func (x *Context) ScatterRows(into, v, index Tensor, tokens int) Tensor {
	if into.Valid() {
		return x.customInPlace(into, C.HONE_SCATTER_ROWS, []C.int32_t{0}, v, index)
	}
	return x.custom(v.Size(0), tokens, C.HONE_SCATTER_ROWS, []C.int32_t{1}, v, index)
}

// Graph is a list of nodes in the order in which they are computed.
type Graph struct {
	c       *C.struct_ggml_cgraph
	checked bool // by Backend.Check
}

// NewGraph makes a graph in the context, which NewContext made with room for as many nodes.
func (x *Context) NewGraph(nodes int) *Graph {
	return &Graph{c: C.ggml_new_graph_custom(x.c, C.size_t(nodes), false)}
}

// Add appends the node (and what it needs and is not in the graph yet) and returns it.
func (g *Graph) Add(t Tensor) Tensor {
	C.ggml_build_forward_expand(g.c, t.c)
	return t
}

// Nodes is the number of nodes.
func (g *Graph) Nodes() int { return int(C.ggml_graph_n_nodes(g.c)) }

// Backend computes graphs on one device.
type Backend struct {
	c      *C.struct_ggml_backend
	watch  *C.struct_hone_watch // in C memory: the computing threads read it
	device *Device              // none on the CPU
	nodes  atomic.Int32         // of the running graph
}

// NewCPU makes a CPU backend that computes with the given number of threads. Close frees it.
func NewCPU(threads int) (*Backend, error) {
	c := C.ggml_backend_cpu_init()
	if c == nil {
		return nil, fmt.Errorf("start the CPU backend: %w", ErrMemory)
	}
	C.ggml_backend_cpu_set_n_threads(c, C.int(threads))
	watch := (*C.struct_hone_watch)(C.calloc(1, C.sizeof_struct_hone_watch))
	C.ggml_backend_cpu_set_abort_callback(c, C.ggml_abort_callback(C.hone_watch_callback), unsafe.Pointer(watch))
	return &Backend{c: c, watch: watch}, nil
}

// SetThreads changes the number of threads of a CPU backend from the next computation on; a GPU has none.
func (b *Backend) SetThreads(threads int) {
	if b.device == nil {
		C.ggml_backend_cpu_set_n_threads(b.c, C.int(threads))
	}
}

// Close frees the backend; it may be called twice. No computation may be running.
func (b *Backend) Close() {
	if b != nil && b.c != nil {
		C.ggml_backend_free(b.c)
		C.free(unsafe.Pointer(b.watch))
		b.c, b.watch = nil, nil
	}
}

// Abort makes the running computation, and every later one, end with ErrAborted after its current node.
// It may be called from any goroutine until Close.
func (b *Backend) Abort() { atomic.StoreInt32((*int32)(unsafe.Pointer(&b.watch.stop)), 1) }

// Progress is the part of the running (or last) graph's nodes that is computed, in [0, 1]; any goroutine may ask.
func (b *Backend) Progress() float64 {
	done := atomic.LoadInt32((*int32)(unsafe.Pointer(&b.watch.nodes)))
	return min(1, float64(done)/float64(max(1, b.nodes.Load())))
}

// Allocator plans and holds the memory of a graph's intermediate tensors; it grows when a graph needs more. One that
// ran out of memory can be used for smaller graphs.
type Allocator struct {
	Limit int // bytes that a graph may take, beyond which Compute returns ErrMemory; 0: what there is

	c        *C.struct_ggml_gallocr
	huge     unsafe.Pointer // memory that was asked to have huge pages,
	hugeSize int            // and its size
}

// NewAllocator makes an allocator on the backend.
func (b *Backend) NewAllocator() *Allocator {
	return &Allocator{c: C.ggml_gallocr_new(C.ggml_backend_get_default_buffer_type(b.c))}
}

// Free releases the memory; it may be called twice.
func (a *Allocator) Free() {
	if a != nil && a.c != nil {
		C.ggml_gallocr_free(a.c)
		a.c = nil
	}
}

// Size is the memory held, in bytes.
func (a *Allocator) Size() int { return int(C.ggml_gallocr_get_buffer_size(a.c, 0)) }

// Reserve holds as much memory as the graph needs. It returns ErrMemory.
func (a *Allocator) Reserve(g *Graph) error {
	if !bool(C.ggml_gallocr_reserve(a.c, g.c)) {
		return fmt.Errorf("reserve memory for a graph of %d nodes: %w", g.Nodes(), ErrMemory)
	}
	return nil
}

// Compute gives the graph memory and computes every node. It returns ErrMemory, ErrAborted, or an *engine.Error; an
// operation that the backend lacks is an error before anything runs.
func (b *Backend) Compute(g *Graph, a *Allocator) error {
	if err := b.prepare(g, a); err != nil {
		return err
	}
	return b.compute(g)
}

func (b *Backend) prepare(g *Graph, a *Allocator) error {
	if a.Limit > 0 {
		if size := a.Measure(g); size > a.Limit {
			return fmt.Errorf("a graph of %d nodes takes %d bytes, at most %d are allowed: %w", g.Nodes(), size, a.Limit, ErrMemory)
		}
	}
	// Without it, a plan made for another graph of as many nodes would be taken for this one.
	if err := a.Reserve(g); err != nil {
		return err
	}
	if !bool(C.ggml_gallocr_alloc_graph(a.c, g.c)) {
		return fmt.Errorf("allocate a graph of %d nodes: %w", g.Nodes(), ErrMemory)
	}
	if !b.GPU() {
		a.hugePages(g)
	}
	if err := b.Check(g); err != nil {
		return err
	}
	b.nodes.Store(int32(g.Nodes()))
	atomic.StoreInt32((*int32)(unsafe.Pointer(&b.watch.nodes)), 0)
	return nil
}

// hugePages asks for huge pages under the memory of the graph's own tensors, if it is new. A page of new memory that was
// written before stays small.
func (a *Allocator) hugePages(g *Graph) {
	for i := range g.Nodes() {
		node := C.ggml_graph_node(g.c, C.int(i))
		if node.view_src != nil || node.buffer == nil || int(C.ggml_backend_buffer_get_size(node.buffer)) != a.Size() {
			continue
		}
		if base := C.ggml_backend_buffer_get_base(node.buffer); base != a.huge || a.hugeSize != a.Size() {
			a.huge, a.hugeSize = base, a.Size()
			hugePages(node.buffer)
		}
		return
	}
}

// Check returns an error if the backend lacks an operation of the finished graph. Compute checks, too; a graph that is
// made while another one is computed can be checked in that time.
func (b *Backend) Check(g *Graph) error {
	if g.checked {
		return nil
	}
	for i := range g.Nodes() {
		if node := C.ggml_graph_node(g.c, C.int(i)); !b.Supports(Tensor{node}) {
			return fmt.Errorf("node %d of the graph: operation %s is not supported by this backend", i, C.GoString(C.ggml_op_desc(node)))
		}
	}
	g.checked = true
	return nil
}

// Supports says whether the backend can compute a node.
func (b *Backend) Supports(t Tensor) bool { return bool(C.ggml_backend_supports_op(b.c, t.c)) }

func (b *Backend) compute(g *Graph) error {
	if b.device != nil {
		return b.computeOnDevice(g)
	}
	switch status := C.ggml_backend_graph_compute(b.c, g.c); status {
	case C.HONE_GGML_STATUS_SUCCESS:
		return nil
	case C.HONE_GGML_STATUS_ABORTED:
		return ErrAborted
	case C.HONE_GGML_STATUS_ALLOC_FAILED:
		return fmt.Errorf("compute: %w", ErrMemory)
	default:
		return &engine.Error{Op: "ggml_backend_graph_compute", Code: int(status)}
	}
}
