// Products of frozen weights with activations in block floating point: int16 mantissas, one float32 scale for each block
// of 64 elements along the inner dimension K. The products of a block are summed exactly in int32, the blocks in float32.
//
// A weight's mantissa is at most 4095 and an activation's at most 8191 in magnitude, so that the 64 products of a block
// stay below 2^31 (64 * 4095 * 8191 = 2^31 - 786368). Rounding is off by at most half a unit: a block's largest element
// has 12 or 13 bits, against 8 of bfloat16, and scales have the range of float32, so small gradients do not vanish.
#ifndef HONE_GGML_PACKED_H
#define HONE_GGML_PACKED_H

#include "api.h"

enum {
	HONE_BLOCK = 64,           // elements of K that share a scale
	HONE_PANEL = 48,           // outputs (rows of W) that are computed together
	HONE_TOKENS = 8,           // tokens that are computed together
	HONE_WEIGHT_MOST = 4095,
	HONE_ACTIVATION_MOST = 8191,
};

// Pairs of neighbours along K lie together, as the dot-product instructions of int16 want them.
struct hone_weights { // one block of K for a panel of outputs
	int16_t m[HONE_BLOCK / 2][HONE_PANEL][2];
	float scale[HONE_PANEL];
};

struct hone_activations { // one block of K for a group of tokens
	int16_t m[HONE_TOKENS][HONE_BLOCK / 2][2];
	float scale[HONE_TOKENS];
};

// Matrices are arrays of these, [panel][block] and [group][block], that begin at the first multiple of 64 bytes of a
// tensor of bytes; K, outputs and tokens are filled up with zeros.
int64_t hone_packed_bytes(int64_t in, int64_t out);
int64_t hone_quantized_bytes(int64_t in, int64_t tokens);

// hone_pack_rows packs rows [row0, row0+n) of W [out, in].
void hone_pack_rows(const float *src, void *dst, int64_t row0, int64_t n, int64_t in, int64_t out);

// hone_pack_transpose packs the transpose of W [out, in], whose inner dimension is out, from rows [row0, row0+n) of W:
// row0 is a multiple of 64, and n is 64 or all that is left.
void hone_pack_transpose(const float *src, void *dst, int64_t row0, int64_t n, int64_t in, int64_t out);

void hone_op_quantize(struct ggml_tensor *dst, int ith, int nth, void *userdata);
void hone_op_norm_quantize(struct ggml_tensor *dst, int ith, int nth, void *userdata);
void hone_op_swiglu_quantize(struct ggml_tensor *dst, int ith, int nth, void *userdata);
void hone_op_swiglu_back_quantize(struct ggml_tensor *dst, int ith, int nth, void *userdata);
void hone_op_matmul(struct ggml_tensor *dst, int ith, int nth, void *userdata);

#endif
