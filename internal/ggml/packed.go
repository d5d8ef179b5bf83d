package ggml

// #include "kernels.h"
import "C"

import "fmt"

// PackedBytes is the size of the I8 tensor that holds a packed matrix of out rows of in elements: about 2.06 bytes an
// element. Packed weights are block floating point (see packed.h): 12-bit mantissas that share a scale in blocks of 64
// along the inner dimension.
func PackedBytes(in, out int) int { return int(C.hone_packed_bytes(C.int64_t(in), C.int64_t(out))) }

// SetPackedRows packs rows [row0, row0+len(src)/in) of the matrix [out, in] into the tensor of PackedBytes(in, out).
//
//	src  [n, in] float32, row-major
//
// A block with an infinity or a NaN makes all that it is multiplied with NaN.
func (t Tensor) SetPackedRows(src []float32, row0, in, out int) {
	n := len(src) / in
	t.checkPacked(PackedBytes(in, out), row0, n, out)
	C.hone_pack_rows((*C.float)(&src[0]), t.c.data, C.int64_t(row0), C.int64_t(n), C.int64_t(in), C.int64_t(out))
}

// SetPackedTranspose packs the transpose [in, out] of the same rows into the tensor of PackedBytes(out, in). Blocks
// now lie along out, so a band must begin at a multiple of 64 rows and have 64, or all that are left.
func (t Tensor) SetPackedTranspose(src []float32, row0, in, out int) {
	n := len(src) / in
	t.checkPacked(PackedBytes(out, in), row0, n, out)
	if row0%C.HONE_BLOCK != 0 || n != min(C.HONE_BLOCK, out-row0) {
		panic(fmt.Sprintf("ggml: pack rows %d to %d of %d: a band must be %d rows from a multiple of it", row0, row0+n, out, C.HONE_BLOCK))
	}
	C.hone_pack_transpose((*C.float)(&src[0]), t.c.data, C.int64_t(row0), C.int64_t(n), C.int64_t(in), C.int64_t(out))
}

func (t Tensor) checkPacked(bytes, row0, n, rows int) {
	if Type(t.c._type) != I8 || t.Elements() != bytes || n <= 0 || row0 < 0 || row0+n > rows {
		panic(fmt.Sprintf("ggml: pack rows %d to %d of %d into a tensor of type %d and %d elements, want I8 and %d", row0, row0+n, rows, t.c._type, t.Elements(), bytes))
	}
}

func quantizedBytes(in, tokens int) int {
	return int(C.hone_quantized_bytes(C.int64_t(in), C.int64_t(tokens)))
}

// Quantize rounds x [K, T] to block floating point with 13-bit mantissas, for one or more PackedMatMul. Elements more
// than 2^13 times smaller than the largest of their block of 64 vanish, and so do blocks below 1e-34.
func (x *Context) Quantize(v Tensor) Tensor {
	return x.customOf(I8, quantizedBytes(v.Size(0), v.Size(1)), 1, C.HONE_QUANTIZE, nil, v)
}

// NormQuantize is Quantize of RMSNorm of v [D, T], in one node and bit for bit the same; D is a multiple of 16.
func (x *Context) NormQuantize(v, gamma Tensor, eps float32) Tensor {
	return x.customOf(I8, quantizedBytes(v.Size(0), v.Size(1)), 1, C.HONE_NORM_QUANTIZE, []C.int32_t{param(eps)}, v, gamma)
}

// SwiGLUQuantize is Quantize of SwiGLU of gate and up [F, T]. Without up, gate [2F, T] has both behind one another for
// each token, as a product with both matrices stacked leaves them. The bits are those of the two nodes; F is a multiple
// of 16.
func (x *Context) SwiGLUQuantize(gate, up Tensor) Tensor {
	f := gate.Size(0)
	if !up.Valid() {
		return x.customOf(I8, quantizedBytes(f/2, gate.Size(1)), 1, C.HONE_SWIGLU_QUANTIZE, nil, gate)
	}
	return x.customOf(I8, quantizedBytes(f, gate.Size(1)), 1, C.HONE_SWIGLU_QUANTIZE, nil, gate, up)
}

// SwiGLUBackQuantize is Quantize of both gradients of SwiGLU of gate and up [F, T], given dy [F, T], in one node, which
// is to be added to the graph. The bits are those of the three nodes; F is a multiple of 16.
func (x *Context) SwiGLUBackQuantize(gate, up, dy Tensor) (dgate, dup, node Tensor) {
	n := quantizedBytes(gate.Size(0), gate.Size(1))
	node = x.customOf(I8, 2*n, 1, C.HONE_SWIGLU_BACK_QUANTIZE, nil, gate, up, dy)
	return x.View(node, 0, n), x.View(node, n, n), node
}

// PackedMatMul is W x + residual [out, T]: w holds W [out, in] packed, v is Quantize of x [in, T]; residual may be the
// zero Tensor. The error is about 1e-4 of the norms; the result does not depend on the number of threads.
func (x *Context) PackedMatMul(w, v, residual Tensor, in, out, tokens int) Tensor {
	if w.Elements() != PackedBytes(in, out) || v.Elements() != quantizedBytes(in, tokens) {
		panic(fmt.Sprintf("ggml: packed product of %d x %d with %d tokens: %d and %d bytes", out, in, tokens, w.Elements(), v.Elements()))
	}
	return x.custom(out, tokens, C.HONE_MATMUL, []C.int32_t{C.int32_t(in)}, w, v, residual)
}
