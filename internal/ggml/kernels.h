// Fused CPU operations of the training graph (GGML_OP_CUSTOM), and the one abort flag of a computation.
// Every tensor is float32 and contiguous unless said; T is the number of tokens, one token is one row.
#ifndef HONE_GGML_KERNELS_H
#define HONE_GGML_KERNELS_H

#include "packed.h"
#include "paged.h"
#include "repacked.h"

// hone_watch counts the nodes that a computation has done and tells it to stop.
struct hone_watch {
	int32_t stop;  // set to 1 to abort
	int32_t nodes; // nodes done
};
bool hone_watch_callback(void *data);

// Parameters of a custom node sit in the op_params that ggml's own custom parameters leave free.
enum { HONE_PARAM = 8 };

struct ggml_tensor *hone_custom(struct ggml_context *ctx, unsigned int type, int64_t ne0, int64_t ne1, struct ggml_tensor **args, int n_args, int op, const int32_t *params, int n_params);
struct ggml_tensor *hone_custom_inplace(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor **args, int n_args, int op, const int32_t *params, int n_params);

enum hone_op {
	HONE_RMS_NORM,      // (x [D,T], gamma [D]; eps) -> [D,T]
	HONE_RMS_NORM_BACK, // (x, gamma, dy, residual or none; eps) -> dx + residual
	HONE_SWIGLU,        // (gate [F,T], up [F,T]) -> silu(gate) * up
	HONE_SWIGLU_BACK,   // (gate, up, dy) -> [F, 2T]: dgate, then dup
	HONE_ATTENTION,     // (q [d*H,T], k [d*K,T], v [d*K,T], segments i32 [3,n]: start, end, parent or -1; d, H, K) -> [d*H,T]
	HONE_ATTENTION_BACK, // (q, k, v, segments, dout; d, H, K) -> flat: dq, then dk and dv of each of the H/K heads of a group
	HONE_SUM_HEADS,     // in place on HONE_ATTENTION_BACK's result (d, H, K): the first dk and dv += the others
	HONE_LORA_DOWN,     // (x [in,T], w [in,r], seeds i32 [T] or none; module, threshold) -> [r,T]
	HONE_LORA_UP,       // in place on y [n,T]: (y, u [r,T], w [n,r] as r rows of n, seeds or none; scale, module, threshold)
	HONE_LORA_OUTER,    // in place on g [n,r]: (g, u [r,T], x [n,T], seeds or none; scale, module, threshold): g += scale u^T x
	HONE_CROSS_ENTROPY, // in place on logits [V,c]: (logits, columns i32 [n], labels i32 [n], stats [2,n], weights [n] or none; scale, first column)
	HONE_SCATTER_ROWS,  // in place or new [D,T]: (x [D,n], index i32 [n]; new)
	HONE_QUANTIZE,      // (x [K,T]) -> bytes of hone_activations
	HONE_MATMUL,        // (bytes of hone_weights, bytes of hone_activations, residual [M,T] or none; K) -> W x + residual [M,T]
	HONE_PACK,          // (W [in,out] of any type; transpose) -> bytes of hone_weights of W or of its transpose
	HONE_NORM_QUANTIZE,         // (x [D,T], gamma [D]; eps) -> HONE_QUANTIZE of HONE_RMS_NORM
	HONE_SWIGLU_QUANTIZE,       // (gate and up of each token [2F,T], or gate [F,T] and up [F,T]) -> HONE_QUANTIZE of HONE_SWIGLU
	HONE_SWIGLU_BACK_QUANTIZE,  // (gate, up, dy) -> HONE_QUANTIZE of dgate, then that of dup
	HONE_QUANTIZE_BYTES,        // (x [K,T]) -> bytes of hone_group
	HONE_NORM_QUANTIZE_BYTES,   // (x [D,T], gamma [D]; eps) -> HONE_QUANTIZE_BYTES of HONE_RMS_NORM
	HONE_SWIGLU_QUANTIZE_BYTES, // (gate and up of each token [2F,T]) -> HONE_QUANTIZE_BYTES of HONE_SWIGLU
	HONE_REPACKED_MATMUL,       // (repacked W, bytes of hone_group, residual [M,T] or none; layout, K) -> W x + residual [M,T]
	HONE_PAGED_STORE, // of serving: see paged.c
	HONE_PAGED_ATTENTION,
	HONE_ADAPT,
	HONE_PICK_ROWS,
	HONE_SWIGLU_ROWS,
};

// The float steps of operations that round their results: RMSNorm is hone_norm_scale(x, hone_norm_inverse(x, D, eps),
// gamma, y, D) for each token. All n are multiples of 16.
float hone_norm_inverse(const float *x, int64_t n, float eps);
void hone_norm_scale(const float *x, float inverse, const float *gamma, float *y, int64_t n);
void hone_swiglu(const float *gate, const float *up, float *y, int64_t n);
void hone_swiglu_back(const float *gate, const float *up, const float *dy, float *dgate, float *dup, int64_t n);

void hone_op_pack(struct ggml_tensor *dst, int ith, int nth, void *userdata);

// hone_transpose_bf16 writes the transpose of the [rows, cols] matrix src as bfloat16 (dst [cols, rows]).
void hone_to_bf16(const float *src, uint16_t *dst, int64_t n);
void hone_transpose_bf16(const float *src, uint16_t *dst, int64_t row0, int64_t nrows, int64_t cols, int64_t rows);
void hone_transpose_f32(const float *src, float *dst, int64_t row0, int64_t nrows, int64_t cols, int64_t rows);

#endif
