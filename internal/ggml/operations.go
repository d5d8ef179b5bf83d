package ggml

/*
#include "kernels.h"
*/
import "C"

// The operations below are ggml's own: every kind of device has them, and each method's result is a node of the graph.
// Shapes are in ne order, tensors contiguous unless said.

// Strided is a view of t with sizes and with the strides of dimensions 1 to 3, both in elements, from element offset
// on. t must not be quantised.
func (x *Context) Strided(t Tensor, offset int, sizes [4]int, strides [3]int) Tensor {
	element := C.size_t(t.c.nb[0])
	return Tensor{C.ggml_view_4d(x.c, t.c, C.int64_t(sizes[0]), C.int64_t(sizes[1]), C.int64_t(sizes[2]), C.int64_t(sizes[3]),
		element*C.size_t(strides[0]), element*C.size_t(strides[1]), element*C.size_t(strides[2]), element*C.size_t(offset))}
}

// Reshape is all of t with other sizes.
func (x *Context) Reshape(t Tensor, sizes ...int) Tensor {
	ne := [4]int{1, 1, 1, 1}
	copy(ne[:], sizes)
	return x.Strided(t, 0, ne, [3]int{ne[0], ne[0] * ne[1], ne[0] * ne[1] * ne[2]})
}

// Transpose exchanges the first two dimensions, in new memory.
func (x *Context) Transpose(t Tensor) Tensor {
	return Tensor{C.ggml_cont(x.c, C.ggml_transpose(x.c, t.c))}
}

// TransposedView exchanges the first two dimensions of t without moving anything; few operations take it.
func (x *Context) TransposedView(t Tensor) Tensor { return Tensor{C.ggml_transpose(x.c, t.c)} }

// OutProduct is the sum over k of a[:, k] (outer) b[:, k]: a [n, k], b [m, k] -> [n, m] in ne order, for each of the
// further dimensions. b may be a TransposedView. Vulkan and Metal lack it.
func (x *Context) OutProduct(a, b Tensor) Tensor { return Tensor{C.ggml_out_prod(x.c, a.c, b.c)} }

// Convert is a as another type, in new memory.
func (x *Context) Convert(a Tensor, t Type) Tensor {
	return Tensor{C.ggml_cast(x.c, a.c, C.uint(t))}
}

// AddInPlace adds b to a and returns a, which may be a view of a tensor outside of the graph.
func (x *Context) AddInPlace(a, b Tensor) Tensor { return Tensor{C.ggml_add_inplace(x.c, a.c, b.c)} }

// Sub is a - b.
func (x *Context) Sub(a, b Tensor) Tensor { return Tensor{C.ggml_sub(x.c, a.c, b.c)} }

// Mul is the element-wise product; b may repeat along higher dimensions, and along the first where its size is 1.
func (x *Context) Mul(a, b Tensor) Tensor { return Tensor{C.ggml_mul(x.c, a.c, b.c)} }

// Scale is a * scale + bias.
func (x *Context) Scale(a Tensor, scale, bias float32) Tensor {
	return Tensor{C.ggml_scale_bias(x.c, a.c, C.float(scale), C.float(bias))}
}

// LogAtLeast is the natural logarithm of a's elements, those below least taken as least.
func (x *Context) LogAtLeast(a Tensor, least float32) Tensor {
	return Tensor{C.ggml_log(x.c, C.ggml_clamp(x.c, a.c, C.float(least), C.float(3e38)))}
}

// Concat is a followed by b along the dimension.
func (x *Context) Concat(a, b Tensor, dimension int) Tensor {
	return Tensor{C.ggml_concat(x.c, a.c, b.c, C.int(dimension))}
}

// Precise asks that the product a of MulMat is summed in float32 and its factors rounded as little as the device can:
// a device may otherwise trade precision for the range that small gradients need.
func (x *Context) Precise(a Tensor) { C.ggml_mul_mat_set_prec(a.c, C.HONE_GGML_PREC_F32) }

// SetRows writes row i of rows [n, m] over row index[i] (int32 [m], all different) of into [n, ...] and returns into.
func (x *Context) SetRows(into, rows, index Tensor) Tensor {
	return Tensor{C.ggml_set_rows(x.c, into.c, rows.c, index.c)}
}

// ArgMax is the index of each row's largest element: a [n, m] -> int32 [m].
func (x *Context) ArgMax(a Tensor) Tensor { return Tensor{C.ggml_argmax(x.c, a.c)} }

// Norm is a / sqrt(mean(a^2) + eps) for each row.
func (x *Context) Norm(a Tensor, eps float32) Tensor {
	return Tensor{C.ggml_rms_norm(x.c, a.c, C.float(eps))}
}

// NormBack is the gradient of Norm with respect to a, given that of its result. The CPU's must not take gradient's
// place: see Keep.
func (x *Context) NormBack(gradient, a Tensor, eps float32) Tensor {
	return Tensor{C.ggml_rms_norm_back(x.c, gradient.c, a.c, C.float(eps))}
}

// Keep stops the allocator from giving t's memory to another tensor of the graph.
func (x *Context) Keep(t Tensor) Tensor {
	C.ggml_set_output(t.c)
	return t
}

// Gate is silu(a) * b.
func (x *Context) Gate(a, b Tensor) Tensor { return Tensor{C.ggml_swiglu_split(x.c, a.c, b.c)} }

// SiluBack is the gradient of silu(a) with respect to a, given that of its result.
func (x *Context) SiluBack(gradient, a Tensor) Tensor {
	return Tensor{C.ggml_silu_back(x.c, gradient.c, a.c)}
}

// SoftMax is softmax(scale * a + mask) for each row of a [n, m, heads, groups]; mask is [n, m, 1, groups] or none.
func (x *Context) SoftMax(a, mask Tensor, scale float32) Tensor {
	return Tensor{C.ggml_soft_max_ext(x.c, a.c, mask.c, C.float(scale), 0)}
}

// SoftMaxBack is the gradient of SoftMax with respect to a, given that of its result and the result. It may take the
// place of gradient, never that of result.
func (x *Context) SoftMaxBack(gradient, result Tensor, scale float32) Tensor {
	return Tensor{C.ggml_soft_max_ext_back(x.c, gradient.c, result.c, C.float(scale), 0)}
}

// Operations names the operation of every node, as ggml does ("MUL_MAT", "SILU").
func (g *Graph) Operations() []string {
	names := make([]string, g.Nodes())
	for i := range names {
		names[i] = C.GoString(C.ggml_op_desc(C.ggml_graph_node(g.c, C.int(i))))
	}
	return names
}
