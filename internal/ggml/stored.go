package ggml

// #include "kernels.h"
import "C"

import "unsafe"

// NewAt describes a tensor whose data lie in host memory outside of any buffer, such as a mapped file: only the CPU
// reads it, and data must stay where they are as long as the context. Sizes are as New's.
func (x *Context) NewAt(t Type, data []byte, sizes ...int) Tensor {
	tensor := x.New(t, sizes...)
	tensor.c.data = unsafe.Pointer(&data[0])
	return tensor
}

// Pack packs W [in, out] of any type, or its transpose, for one or more PackedMatMul: the same bytes as SetPackedRows
// and SetPackedTranspose give.
func (x *Context) Pack(w Tensor, transpose bool) Tensor {
	in, out, flag := w.Size(0), w.Size(1), C.int32_t(0)
	if transpose {
		in, out, flag = out, in, 1
	}
	return x.customOf(I8, PackedBytes(in, out), 1, C.HONE_PACK, []C.int32_t{flag}, w)
}
