package ggml

/*
#include <stdlib.h>
#include "kernels.h"
*/
import "C"

import (
	"fmt"
	"unsafe"
)

// PageTokens is the number of positions of a page of the key-value cache.
const PageTokens = C.HONE_PAGE

// Paged describes a key-value cache in pages for one layer's heads.
type Paged struct {
	Heads
	Q8 bool // int8 with a scale for each 32 elements instead of float16; the heads' size is a multiple of 32
}

// PageBytes is the size of a page of one layer.
func (p Paged) PageBytes() int {
	return int(C.hone_page_bytes(C.int(p.Size), C.int(p.KeyValue), C.bool(p.Q8)))
}

// CopyPage copies a page inside the memory of a layer.
func (p Paged) CopyPage(layer []byte, from, to int32) {
	if n := (int(max(from, to)) + 1) * p.PageBytes(); from < 0 || to < 0 || n > len(layer) {
		panic(fmt.Sprintf("ggml: copy page %d to %d of %d bytes", from, to, len(layer)))
	}
	C.hone_page_copy(unsafe.Pointer(&layer[0]), C.int32_t(from), C.int32_t(to), C.int(p.Size), C.int(p.KeyValue), C.bool(p.Q8))
}

// Table writes the cosines and sines that the rotation of these positions takes, [len(positions)][Dimensions].
func (r Rope) Table(dst []float32, positions []int32) {
	if len(positions) == 0 {
		return
	}
	if len(dst) < len(positions)*r.Dimensions || r.Factors.Valid() && r.Factors.Elements() < r.Dimensions/2 {
		panic(fmt.Sprintf("ggml: rope table of %d values for %d positions of %d dimensions", len(dst), len(positions), r.Dimensions))
	}
	var factors *C.float
	if r.Factors.Valid() {
		factors = (*C.float)(r.Factors.c.data)
	}
	C.hone_rope_table((*C.float)(&dst[0]), (*C.int32_t)(&positions[0]), C.int64_t(len(positions)), C.int(r.Dimensions), C.float(r.Base), C.float(r.Scale), factors)
}

// Projections are q [Size*Query, T], k and v [Size*KeyValue, T] as an attention's three products leave them: three tensors, or
// one of stacked rows three times.
type Projections struct {
	Q, K, V Tensor
	Bias    Tensor // [Size*(Query+2*KeyValue)] of all three, or none
	Gamma   Tensor // [2*Size] of RMSNorm of q's and of k's heads, or none
	Epsilon float32
}

// PagedStore adds the biases, normalises and rotates q, in place, and k, and puts k and v into their cells of a layer's cache.
// It returns q, for PagedAttention.
//
//	table [Dimensions, T] of Rope.Table; cells int32 [T]; cache I8, pages
func (x *Context) PagedStore(p Projections, table, cells, cache Tensor, g Paged, neoX bool) Tensor {
	flags := C.int32_t(0)
	for _, f := range []struct {
		set  bool
		flag C.int32_t
	}{{neoX, C.HONE_STORE_NEOX}, {p.Bias.Valid(), C.HONE_STORE_BIAS}, {p.Gamma.Valid(), C.HONE_STORE_NORM}, {g.Q8, C.HONE_STORE_Q8}} {
		if f.set {
			flags |= f.flag
		}
	}
	bias, gamma := p.Bias, p.Gamma
	if !bias.Valid() { // something in its place: operands are counted
		bias = table
	}
	if !gamma.Valid() {
		gamma = table
	}
	params := append(g.params(), C.int32_t(table.Size(0)), flags, param(p.Epsilon))
	return x.customInPlace(p.Q, C.HONE_PAGED_STORE, params, p.K, p.V, bias, gamma, table, cells, cache)
}

// Unit is queries of consecutive positions of one sequence, for some query heads of one key-value head.
type Unit struct {
	Row, Queries       int32 // rows of the batch
	Position           int32 // of the first query
	Table              int32 // its sequence's column of the page tables
	KeyValue           int32
	Head, HeadsOfGroup int32 // query heads [Head, Head+HeadsOfGroup) of those that share the key-value head
	_                  int32
}

// PlanInts is the size of a plan of so many units.
func PlanInts(units int) int { return C.HONE_PLAN_HEADER + units*int(unsafe.Sizeof(Unit{})/4) }

// SetPlan writes the units of an attention into an int32 tensor of PlanInts, in the order in which threads take them.
func (t Tensor) SetPlan(units []Unit) {
	ints := t.Ints()
	ints[0] = int32(len(units))
	copy(unsafe.Slice((*Unit)(unsafe.Pointer(&ints[C.HONE_PLAN_HEADER])), (len(ints)-C.HONE_PLAN_HEADER)/8), units)
}

// PagedAttention is causal softmax attention of each query over its own sequence's pages: [Size*Query, T]. Its tasks are counted
// by the plan.
//
//	q of PagedStore; tables int32 [pages, sequences], the pages of each sequence in order
func (x *Context) PagedAttention(q, cache, tables, plan Tensor, g Paged) Tensor {
	q8 := C.int32_t(0)
	if g.Q8 {
		q8 = 1
	}
	return x.custom(g.Size*g.Query, q.Size(1), C.HONE_PAGED_ATTENTION, append(g.params(), q8), q, cache, tables, plan)
}

// PickRows takes the columns of index (int32 [n]) out of x [D, T]: [D, n].
func (x *Context) PickRows(v, index Tensor) Tensor {
	return x.custom(v.Size(0), index.Size(0), C.HONE_PICK_ROWS, nil, v, index)
}

// SwiGLURows is silu(gate) * up [F, T], where both may be one stacked tensor [2F, T].
func (x *Context) SwiGLURows(gate, up Tensor, f int) Tensor {
	return x.custom(f, gate.Size(1), C.HONE_SWIGLU_ROWS, nil, gate, up)
}

// Pair is a module's part of an adapter: y += Scale * B A x. A rank of 0 changes nothing.
type Pair struct {
	In, Out int
	Rank    int
	Scale   float32
	A       []float32 // [Rank, In]
	B       []float32 // [Out, Rank]
}

// Pairs is an adapter's weights in memory of its own. Close frees it.
type Pairs struct {
	c     *C.struct_hone_adapter
	bytes int
}

// NewPairs copies the pairs; their outputs are multiples of 16.
func NewPairs(pairs []Pair) (*Pairs, error) {
	align := func(n int) int { return (n + 63) / 64 * 64 }
	header := align(C.sizeof_struct_hone_adapter + len(pairs)*C.sizeof_struct_hone_pair)
	bytes := header
	for _, p := range pairs {
		if p.Rank > 0 && (len(p.A) != p.Rank*p.In || len(p.B) != p.Rank*p.Out || p.In%16 != 0) || p.Out%16 != 0 {
			return nil, fmt.Errorf("adapter of rank %d for a matrix of %d x %d: %d and %d weights", p.Rank, p.In, p.Out, len(p.A), len(p.B))
		}
		bytes += align(4*len(p.A)) + align(4*len(p.B))
	}
	memory := C.aligned_alloc(64, C.size_t(bytes))
	if memory == nil {
		return nil, fmt.Errorf("adapter of %d bytes: %w", bytes, ErrMemory)
	}
	a := (*C.struct_hone_adapter)(memory)
	a.pairs = (*C.struct_hone_pair)(unsafe.Add(memory, C.sizeof_struct_hone_adapter))
	list := unsafe.Slice(a.pairs, len(pairs))
	at := unsafe.Add(memory, header)
	take := func(n int) []float32 {
		s := unsafe.Slice((*float32)(at), n)
		at = unsafe.Add(at, align(4*n))
		return s
	}
	for i, p := range pairs {
		list[i] = C.struct_hone_pair{rank: C.int32_t(p.Rank), in: C.int32_t(p.In), out: C.int32_t(p.Out), scale: C.float(p.Scale)}
		if p.Rank == 0 {
			continue
		}
		down, up := take(len(p.A)), take(len(p.B))
		copy(down, p.A)
		for o := range p.Out {
			for r, v := range p.B[o*p.Rank : (o+1)*p.Rank] {
				up[r*p.Out+o] = v
			}
		}
		list[i].a, list[i].b = (*C.float)(unsafe.Pointer(&down[0])), (*C.float)(unsafe.Pointer(&up[0]))
	}
	return &Pairs{a, bytes}, nil
}

// Bytes is the memory held.
func (p *Pairs) Bytes() int { return p.bytes }

// Close frees the memory; it may be called twice.
func (p *Pairs) Close() {
	if p != nil && p.c != nil {
		C.free(unsafe.Pointer(p.c))
		p.c = nil
	}
}

// AdaptedRows are rows [From, From+N) of a batch that have one adapter.
type AdaptedRows struct {
	From, N int
	Pairs   *Pairs
}

// AdaptBytes is the size of Adapt's table for a batch of so many rows.
func AdaptBytes(rows int) int { return 8 + rows*C.sizeof_struct_hone_rows }

// SetAdapted writes the table of Adapt, the outputs of each entry being cut into slices.
func (t Tensor) SetAdapted(rows []AdaptedRows, slices int) {
	if AdaptBytes(len(rows)) > t.Elements() {
		panic(fmt.Sprintf("ggml: %d entries in a table of %d bytes", len(rows), t.Elements()))
	}
	head := unsafe.Slice((*int32)(t.c.data), 2)
	head[0], head[1] = int32(len(rows)*slices), int32(slices)
	entries := unsafe.Slice((*C.struct_hone_rows)(unsafe.Add(t.c.data, 8)), len(rows))
	for i, r := range rows {
		entries[i] = C.struct_hone_rows{from: C.int32_t(r.From), n: C.int32_t(r.N), adapter: r.Pairs.c}
	}
}

// Adapt adds the adapters of the table's rows (I8) to y, in place: those of pairs [first, first+pairs), whose outputs lie one
// behind the other in y. Its tasks are counted by the table.
func (x *Context) Adapt(y, v, table Tensor, first, pairs int) Tensor {
	return x.customInPlace(y, C.HONE_ADAPT, []C.int32_t{C.int32_t(first), C.int32_t(pairs)}, v, table)
}
