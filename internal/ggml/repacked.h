// Products of frozen quantised weights with activations in int8: the codes of the file, 4 or 8 bits, in panels of outputs,
// times int8 codes of the activations, in blocks of 32 along the inner dimension K. The products of a block are summed
// exactly in int32, the blocks in float32 in the order of K, so that an element of the result depends on its row of W
// and its token alone, bit for bit: neither on the other tokens of the batch nor on threads or the instruction set.
#ifndef HONE_GGML_REPACKED_H
#define HONE_GGML_REPACKED_H

#include "api.h"

enum {
	HONE_GROUP = 32,   // elements of K that share the activations' scale, and (but for halves) the weights' scale
	HONE_OUTPUTS = 32, // outputs (rows of W) of a panel
};

// Layouts. A weight is scale * (code - offset) + minimum, exactly as the file's type defines it (rounded once less).
enum hone_repacked {
	HONE_NIBBLES,         // 4 bits, offset 8, scale float16                     (Q4_0)            18 bytes a group
	HONE_NIBBLES_MINIMUM, // 4 bits, scale and minimum float16                   (Q4_1)            20
	HONE_NIBBLES_FLOAT,   // 4 bits, scale and minimum float32                   (Q4_K)            24
	HONE_BYTES,           // 8 bits, offset 128, scale float16                   (Q8_0, Q5_0, IQ4_NL) 34
	HONE_BYTES_FLOAT,     // 8 bits, scale and minimum float32                   (Q5_1, Q5_K)      40
	HONE_BYTES_HALVES,    // 8 bits, offset 32, a scale float32 for each 16      (Q6_K)            40
	HONE_REPACKED_KINDS,
};

// The group of a panel begins with its codes, in vectors of 64 bytes: 4 neighbours along K of 16 outputs, [vector][half of
// the panel][output][4]. With bytes, vector i holds elements 4i to 4i+3 of the group; with nibbles, the low halves of
// vector i hold those and the high halves elements 16+4i to 16+4i+3. Behind the codes come the scales of the 32 outputs
// (two rows of them with halves), then the minima. A matrix is [panel][group]; K is a multiple of 32, and outputs that
// fill up the last panel are zeros.

// A group of one token's activations: x = scale * code, rounded to nearest as in Q8_1. A matrix is [token][group].
struct hone_group {
	int8_t code[HONE_GROUP];
	float scale, sum;     // sum: of the group's scale * code
	int32_t less[2];      // less the sums of the codes of the first and the second half
};

// Both kinds of matrices begin at the first multiple of 64 bytes of a tensor of bytes.
int64_t hone_repacked_bytes(int kind, int64_t in, int64_t out);
int64_t hone_groups_bytes(int64_t in, int64_t tokens);

// hone_repacked_kind is the layout that serves a type of ggml, or -1.
int hone_repacked_kind(unsigned int stored);

// hone_repack puts n rows of the file's own bytes at row0 of the matrix. Different rows may be put at the same time.
void hone_repack(unsigned int stored, const void *src, void *dst, int64_t row0, int64_t n, int64_t in, int64_t out);

void hone_op_quantize_bytes(struct ggml_tensor *dst, int ith, int nth, void *userdata);
void hone_op_norm_quantize_bytes(struct ggml_tensor *dst, int ith, int nth, void *userdata);
void hone_op_swiglu_quantize_bytes(struct ggml_tensor *dst, int ith, int nth, void *userdata);
void hone_op_repacked_matmul(struct ggml_tensor *dst, int ith, int nth, void *userdata);

#endif
