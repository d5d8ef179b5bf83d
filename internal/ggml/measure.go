package ggml

/*
#include "kernels.h"

static char nowhere; // stands for the memory of tensors that have none
static void set_nowhere(struct ggml_tensor *t) { t->data = &nowhere; }
*/
import "C"

// Measure returns the memory that Allocate would take, in bytes, and makes the context's tensors pass for allocated:
// graphs over them can be measured, never computed.
func (x *Context) Measure(b *Backend) int {
	size := C.ggml_backend_alloc_ctx_tensors_from_buft_size(x.c, C.ggml_backend_get_default_buffer_type(b.c))
	for t := C.ggml_get_first_tensor(x.c); t != nil; t = C.ggml_get_next_tensor(x.c, t) {
		if t.data == nil {
			C.set_nowhere(t)
		}
	}
	return int(size)
}

// Measure returns the memory that the graph's intermediate tensors take, in bytes. An allocator that has computed
// graphs loses what it holds.
func (a *Allocator) Measure(g *Graph) int {
	var size C.size_t
	C.ggml_gallocr_reserve_n_size(a.c, g.c, nil, nil, &size)
	return int(size)
}
