// What training asks of the CUDA backend beyond ggml's own kernels; changes.cmake includes it in ggml-cuda.cu.
#pragma once

#include "common.cuh"
#include "narrow.cuh"

// The product of few rows with many columns, as LoRA's first one is: y[r, t] = sum over k of w[k, r] x[k, t], in float32.
// x is read once, at the speed of the memory; cuBLAS takes several times as long. A block computes TOKENS columns, in an
// order that depends on k alone.
template <int R, int TOKENS>
static __global__ void __launch_bounds__(256, 1) k_narrow_product(
        const float4 * __restrict__ w, const float4 * __restrict__ x, float * __restrict__ y, const int k4, const int tokens) {
    const int first = blockIdx.x*TOKENS;
    float sums[R][TOKENS] = {{0.0f}};
    const float4 * columns[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        columns[t] = x + (int64_t) min(first + t, tokens - 1)*k4;
    }
    for (int k = threadIdx.x; k < k4; k += 256) {
        float4 a[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            a[r] = w[(int64_t) r*k4 + k];
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const float4 b = columns[t][k];
#pragma unroll
            for (int r = 0; r < R; r++) {
                sums[r][t] += a[r].x*b.x + a[r].y*b.y + a[r].z*b.z + a[r].w*b.w;
            }
        }
    }
    __shared__ float partial[8][R*TOKENS];
    const int warp = threadIdx.x/32;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float sum = warp_reduce_sum(sums[r][t]);
            if (threadIdx.x%32 == 0) {
                partial[warp][t*R + r] = sum;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < R*TOKENS; i += 256) {
        const int t = first + i/R;
        if (t < tokens) {
            float sum = 0.0f;
            for (int j = 0; j < 8; j++) {
                sum += partial[j][i];
            }
            y[(int64_t) t*R + i%R] = sum;
        }
    }
}

// Returns false where the kernel is not made for the sizes.
static bool ggml_cuda_narrow_product(const float * w, const float * x, float * y, int64_t rows, int64_t k, int64_t tokens, cudaStream_t stream) {
    if ((rows != 8 && rows != 16) || tokens < 32 || k%4 != 0 || ((size_t) w | (size_t) x)%16 != 0) {
        return false;
    }
    if (rows == 8) {
        k_narrow_product<8, 8><<<(tokens + 7)/8, 256, 0, stream>>>((const float4 *) w, (const float4 *) x, y, k/4, tokens);
    } else {
        k_narrow_product<16, 4><<<(tokens + 3)/4, 256, 0, stream>>>((const float4 *) w, (const float4 *) x, y, k/4, tokens);
    }
    return true;
}

// y = x times the rows of a pool that are picked for each column: dropout without a mask in memory. y may be x.
static __global__ void k_mul_rows(
        const float4 * x, const char * __restrict__ pool, const int32_t * __restrict__ rows, float4 * y,
        const uint32_t n, const uint3 width, const size_t stride) {
    const uint32_t i = blockIdx.x*blockDim.x + threadIdx.x;
    if (i >= n) {
        return;
    }
    const uint2 at = fast_div_modulo(i, width);
    const float4 m = ((const float4 *) (pool + rows[at.x]*stride))[at.y];
    const float4 v = x[i];
    y[i] = make_float4(v.x*m.x, v.y*m.y, v.z*m.z, v.w*m.w);
}

// Computes node i, a GET_ROWS, and the MUL behind it as one, if it can.
static bool ggml_cuda_mul_rows(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    const ggml_op ops[] = { GGML_OP_GET_ROWS, GGML_OP_MUL };
    if (!ggml_can_fuse(cgraph, i, ops, 2)) {
        return false;
    }
    const ggml_tensor * mask = cgraph->nodes[i];
    const ggml_tensor * mul = cgraph->nodes[i + 1];
    const ggml_tensor * pool = mask->src[0];
    const ggml_tensor * rows = mask->src[1];
    const ggml_tensor * x = mul->src[0];
    if (mul->src[1] != mask || pool->type != GGML_TYPE_F32 || x->type != GGML_TYPE_F32 || mul->type != GGML_TYPE_F32 ||
        !ggml_are_same_shape(x, mul) || !ggml_is_contiguous(x) || !ggml_is_contiguous(mul) || ggml_nrows(mul) != mul->ne[1] ||
        rows->nb[0] != sizeof(int32_t) || ggml_nelements(rows) != rows->ne[0] || mul->ne[0]%4 != 0 || ggml_nelements(mul) >= 2147483647 ||
        ((size_t) x->data | (size_t) mul->data | (size_t) pool->data | pool->nb[1])%16 != 0) {
        return false;
    }
    const uint32_t n = ggml_nelements(mul)/4;
    k_mul_rows<<<(n + 255)/256, 256, 0, ctx.stream()>>>((const float4 *) x->data, (const char *) pool->data, (const int32_t *) rows->data,
        (float4 *) mul->data, n, init_fastdiv_values(mul->ne[0]/4), pool->nb[1]);
    return true;
}

// A product whose op_params say so is added to what its memory holds.
static const int GGML_CUDA_ADDS = 15;

static bool ggml_cuda_adds(const ggml_tensor * product) { return product->op_params[GGML_CUDA_ADDS] == 1; }

static bool ggml_cuda_overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * a0 = (const char *) a->data;
    const char * b0 = (const char *) b->data;
    return a0 < b0 + ggml_nbytes(b) && b0 < a0 + ggml_nbytes(a);
}

// Says whether node i is a product of cuBLAS and the node behind it adds it to its own memory: then the product does.
static bool ggml_cuda_can_add(const ggml_cgraph * cgraph, int i) {
    const ggml_tensor * product = cgraph->nodes[i];
    if (product->op != GGML_OP_MUL_MAT && product->op != GGML_OP_OUT_PROD) {
        return false;
    }
    const ggml_op ops[] = { product->op, GGML_OP_ADD };
    if (!ggml_can_fuse(cgraph, i, ops, 2)) {
        return false;
    }
    const ggml_tensor * sum = cgraph->nodes[i + 1];
    const ggml_tensor * to = sum->src[0];
    const ggml_tensor * a = product->src[0];
    const ggml_tensor * b = product->src[1];
    if (sum->src[1] != product || to == product || to->data != sum->data || !ggml_are_same_shape(to, sum) || to->type != GGML_TYPE_F32 || sum->type != GGML_TYPE_F32 ||
        !ggml_is_contiguous(to) || !ggml_is_contiguous(sum) || ggml_cuda_overlap(sum, a) || ggml_cuda_overlap(sum, b)) {
        return false;
    }
    // Products of fewer columns, and those with quantised weights, may take kernels that do not add.
    return product->op == GGML_OP_OUT_PROD ||
        ((a->type == GGML_TYPE_F16 || a->type == GGML_TYPE_BF16) && ggml_is_contiguous(a) && ggml_is_contiguous(b) && ggml_nrows(b) == b->ne[1] && b->ne[1] > 64);
}
