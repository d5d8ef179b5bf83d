// Conversion of float32 to 16 bits, four elements a thread: several times as fast as ggml's one element a thread, which
// takes longer than some of the products that it feeds.
#pragma once

#include "common.cuh"

template <typename T> struct narrow4;
template <> struct narrow4<half> {
    static __device__ __forceinline__ uint2 of(const float4 v) {
        const half2 a = __floats2half2_rn(v.x, v.y), b = __floats2half2_rn(v.z, v.w);
        return make_uint2(*(const uint32_t *) &a, *(const uint32_t *) &b);
    }
};
template <> struct narrow4<nv_bfloat16> {
    static __device__ __forceinline__ uint2 of(const float4 v) {
        const nv_bfloat162 a = __floats2bfloat162_rn(v.x, v.y), b = __floats2bfloat162_rn(v.z, v.w);
        return make_uint2(*(const uint32_t *) &a, *(const uint32_t *) &b);
    }
};

template <typename T>
static __global__ void k_narrow(const float4 * __restrict__ x, uint2 * __restrict__ y, const int64_t n) {
    for (int64_t i = (int64_t) blockIdx.x*blockDim.x + threadIdx.x; i < n; i += (int64_t) gridDim.x*blockDim.x) {
        y[i] = narrow4<T>::of(x[i]);
    }
}

// Returns false where ggml's own conversion has to do it.
template <typename T>
static inline bool ggml_cuda_narrow(const float * x, void * y, const int64_t n, cudaStream_t stream) {
    if (n%4 != 0 || (size_t) x%16 != 0 || (size_t) y%8 != 0) {
        return false;
    }
    const int64_t blocks = (n/4 + 255)/256;
    k_narrow<T><<<(int) (blocks < 65535 ? blocks : 65535), 256, 0, stream>>>((const float4 *) x, (uint2 *) y, n/4);
    return true;
}
