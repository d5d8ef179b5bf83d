package ggml

/*
#include "kernels.h"
*/
import "C"

import (
	"unsafe"
)

// SetFloats copies values into the beginning of an allocated float32 tensor, wherever its memory is.
func (t Tensor) SetFloats(values []float32) { set(t, values) }

// SetFloatsAt copies values into an allocated float32 tensor from element offset on.
func (t Tensor) SetFloatsAt(values []float32, offset int) {
	if len(values) > 0 {
		C.ggml_backend_tensor_set(t.c, unsafe.Pointer(&values[0]), C.size_t(4*offset), C.size_t(4*len(values)))
	}
}

// SetInts copies values into the beginning of an allocated int32 tensor, wherever its memory is.
func (t Tensor) SetInts(values []int32) { set(t, values) }

// SetBytes copies data into an allocated tensor from a byte offset on, wherever its memory is.
func (t Tensor) SetBytes(data []byte, offset int) {
	if len(data) > 0 {
		C.ggml_backend_tensor_set(t.c, unsafe.Pointer(&data[0]), C.size_t(offset), C.size_t(len(data)))
	}
}

// GetFloats copies the beginning of an allocated float32 tensor into values.
func (t Tensor) GetFloats(values []float32) {
	if len(values) > 0 {
		C.ggml_backend_tensor_get(t.c, unsafe.Pointer(&values[0]), 0, C.size_t(4*len(values)))
	}
}

func set[T float32 | int32](t Tensor, values []T) {
	if len(values) > 0 {
		C.ggml_backend_tensor_set(t.c, unsafe.Pointer(&values[0]), 0, C.size_t(4*len(values)))
	}
}

// ComputeParts gives the graph memory, computes its first cut nodes, calls between, and computes the rest. A cut
// outside of the graph computes it whole and calls nothing. Errors are Compute's and between's.
func (b *Backend) ComputeParts(g *Graph, a *Allocator, cut int, between func() error) error {
	if cut <= 0 || cut >= g.Nodes() {
		return b.Compute(g, a)
	}
	if err := b.prepare(g, a); err != nil {
		return err
	}
	x := NewContext(0, g.Nodes())
	defer x.Free()
	first := x.NewGraph(g.Nodes())
	for i := range cut {
		C.ggml_graph_add_node(first.c, C.ggml_graph_node(g.c, C.int(i)))
	}
	if err := b.compute(first); err != nil {
		return err
	}
	if err := between(); err != nil {
		return err
	}
	y := NewContext(0, g.Nodes())
	defer y.Free()
	rest := y.NewGraph(g.Nodes())
	for i := cut; i < g.Nodes(); i++ {
		C.ggml_graph_add_node(rest.c, C.ggml_graph_node(g.c, C.int(i)))
	}
	return b.compute(rest)
}
