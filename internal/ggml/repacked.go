package ggml

/*
#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

static void huge_pages(void *base, size_t size) {
#if defined(MADV_HUGEPAGE)
	uintptr_t page = (uintptr_t)2 << 20, from = ((uintptr_t)base + page - 1) / page * page, to = ((uintptr_t)base + size) / page * page;
	if (from < to) madvise((void *)from, to - from, MADV_HUGEPAGE);
#endif
}
*/
import "C"

import (
	"fmt"
	"unsafe"
)

// Repacked is a layout of frozen 4- or 8-bit weights for serving (repacked.h): the codes of the file's type, unchanged,
// in panels of outputs. Products round the activations to int8 in blocks of 32, as llama.cpp does for the same types.
type Repacked int

// RepackedKind returns the layout that holds a stored type exactly; false: none does. F32, F16 and BF16 are served by
// Packed weights.
func RepackedKind(t Type) (Repacked, bool) {
	kind := C.hone_repacked_kind(C.uint(t))
	return Repacked(kind), kind >= 0
}

// RepackedBytes is the size of the I8 tensor that holds a matrix of out rows of in elements, in a multiple of 32.
func RepackedBytes(k Repacked, in, out int) int {
	return int(C.hone_repacked_bytes(C.int(k), C.int64_t(in), C.int64_t(out)))
}

// SetRepacked puts rows of a matrix [out, in] into the tensor of RepackedBytes(k, in, out), k the layout of the stored
// type, from row row0 on: as many as data holds. So matrices of the same layout can be stacked. Goroutines may put
// different rows at the same time.
//
//	data  the file's own bytes of whole rows of the stored type
func (t Tensor) SetRepacked(data []byte, stored Type, row0, in, out int) {
	k, ok := RepackedKind(stored)
	row := 0
	if ok && in > 0 {
		row = RowBytes(stored, in)
	}
	if row == 0 || in%C.HONE_GROUP != 0 || len(data) == 0 || len(data)%row != 0 || row0 < 0 || row0+len(data)/row > out || Type(t.c._type) != I8 || t.Elements() != RepackedBytes(k, in, out) {
		panic(fmt.Sprintf("ggml: repack %d bytes of type %d at row %d of %d x %d into a tensor of %d elements", len(data), stored, row0, out, in, t.Elements()))
	}
	C.hone_repack(C.uint(stored), unsafe.Pointer(&data[0]), t.c.data, C.int64_t(row0), C.int64_t(len(data)/row), C.int64_t(in), C.int64_t(out))
}

// HugePages asks the system to back memory outside of Go's heap, not written yet, with pages of 2 MiB. Reading weights
// from end to end, as every decoded token does, is then up to 1.7 times faster on virtual machines, whose page tables
// are nested, and so is repacking. Where the system has none, nothing changes.
func HugePages(memory []byte) {
	if len(memory) > 0 {
		C.huge_pages(unsafe.Pointer(&memory[0]), C.size_t(len(memory)))
	}
}

func groupsBytes(in, tokens int) int {
	if in%C.HONE_GROUP != 0 {
		panic(fmt.Sprintf("ggml: quantise rows of %d elements, want a multiple of %d", in, C.HONE_GROUP))
	}
	return int(C.hone_groups_bytes(C.int64_t(in), C.int64_t(tokens)))
}

// QuantizeBytes rounds v [K, T] to int8 codes that share a float32 scale in blocks of 32 along K, the largest becoming
// 127, for one or more RepackedMatMul. K is a multiple of 32. A block with an infinity or a NaN makes its products NaN.
func (x *Context) QuantizeBytes(v Tensor) Tensor {
	return x.customOf(I8, groupsBytes(v.Size(0), v.Size(1)), 1, C.HONE_QUANTIZE_BYTES, nil, v)
}

// NormQuantizeBytes is QuantizeBytes of RMSNorm of v, in one node and bit for bit the same.
func (x *Context) NormQuantizeBytes(v, gamma Tensor, eps float32) Tensor {
	return x.customOf(I8, groupsBytes(v.Size(0), v.Size(1)), 1, C.HONE_NORM_QUANTIZE_BYTES, []C.int32_t{param(eps)}, v, gamma)
}

// SwiGLUQuantizeBytes is QuantizeBytes of SwiGLU of gate and up, which lie behind one another for each token: gateUp
// [2F, T], as a product with both matrices stacked leaves them. The bits are those of the two nodes.
func (x *Context) SwiGLUQuantizeBytes(gateUp Tensor) Tensor {
	return x.customOf(I8, groupsBytes(gateUp.Size(0)/2, gateUp.Size(1)), 1, C.HONE_SWIGLU_QUANTIZE_BYTES, nil, gateUp)
}

// RepackedMatMul is W x + residual [out, T]: w holds W [out, in] in layout k, v is QuantizeBytes of x [in, T]; residual
// may be the zero Tensor. Every element is the same, bit for bit, whatever else is in the batch, for any number of
// threads and with any instruction set.
func (x *Context) RepackedMatMul(w, v, residual Tensor, k Repacked, in, out, tokens int) Tensor {
	if w.Elements() != RepackedBytes(k, in, out) || v.Elements() != groupsBytes(in, tokens) {
		panic(fmt.Sprintf("ggml: repacked product of %d x %d with %d tokens: %d and %d bytes", out, in, tokens, w.Elements(), v.Elements()))
	}
	return x.custom(out, tokens, C.HONE_REPACKED_MATMUL, []C.int32_t{C.int32_t(k), C.int32_t(in)}, w, v, residual)
}
