#include "packed.h"

#include "kernels.h"

#include <math.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { B = HONE_BLOCK, P = HONE_PANEL, G = HONE_TOKENS };

static int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

static void *aligned(const void *p) { return (void *)(((uintptr_t)p + 63) / 64 * 64); }

int64_t hone_packed_bytes(int64_t in, int64_t out) { return parts(out, P) * parts(in, B) * (int64_t)sizeof(struct hone_weights) + 64; }

int64_t hone_quantized_bytes(int64_t in, int64_t tokens) { return parts(tokens, G) * parts(in, B) * (int64_t)sizeof(struct hone_activations) + 64; }

// quantize rounds 64 values to the nearest integers m * scale, the largest of which becomes `most`, and returns the scale:
// 0 for a block of zeros (also one below 1e-34, whose inverse is no float32). A block with an infinity or NaN has scale
// NaN and mantissas 0, which make every product with it NaN, and is never converted to integers.
INLINE float quantize(const float *x, float most, int16_t *m) {
	// As integers, magnitudes are ordered like the floats, with infinity and NaN above all.
	uint32_t largest = 0;
#if defined(__AVX512BW__)
	__m512 v[B / 16];
	__m512i top = _mm512_setzero_si512();
	for (int i = 0; i < B / 16; i++) {
		v[i] = _mm512_loadu_ps(x + 16 * i);
		top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_castps_si512(v[i]), _mm512_set1_epi32(0x7fffffff)));
	}
	largest = _mm512_reduce_max_epu32(top);
#else
	for (int i = 0; i < B; i++) {
		uint32_t bits;
		memcpy(&bits, x + i, sizeof bits);
		bits &= 0x7fffffff;
		largest = largest > bits ? largest : bits;
	}
#endif
	float a;
	memcpy(&a, &largest, sizeof a);
	if (largest >= 0x7f800000 || a < 1e-34f) {
		memset(m, 0, B * sizeof *m);
		return largest >= 0x7f800000 ? NAN : 0;
	}
	float inverse = most / a;
#if defined(__AVX512BW__)
	for (int i = 0; i < B / 16; i++) _mm256_storeu_si256((__m256i *)(m + 16 * i), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v[i] * inverse)));
#else
	for (int i = 0; i < B; i++) {
		float shifted = x[i] * inverse + 12582912.f; // 1.5 * 2^23: rounds, and leaves the integer in the low bits
		int32_t bits;
		memcpy(&bits, &shifted, sizeof bits);
		m[i] = (int16_t)(bits - 0x4b400000);
	}
#endif
	return a * (1 / most);
}

// ---- weights -----------------------------------------------------------------------------------------------------

// put writes one output's block of K.
static void put(struct hone_weights *w, int64_t output, const float *values) {
	int16_t m[B];
	int at = output % P;
	w->scale[at] = quantize(values, HONE_WEIGHT_MOST, m);
	for (int i = 0; i < B / 2; i++) memcpy(w->m[i][at], m + 2 * i, 2 * sizeof *m);
}

void hone_pack_rows(const float *src, void *dst, int64_t row0, int64_t n, int64_t in, int64_t out) {
	struct hone_weights *w = aligned(dst);
	int64_t blocks = parts(in, B), end = row0 + n == out ? parts(out, P) * P : row0 + n;
	for (int64_t r = row0; r < end; r++)
		for (int64_t b = 0; b < blocks; b++) {
			float values[B] = {0};
			if (r < out) memcpy(values, src + (r - row0) * in + b * B, (in - b * B < B ? in - b * B : B) * sizeof(float));
			put(w + r / P * blocks + b, r, values);
		}
}

void hone_pack_transpose(const float *src, void *dst, int64_t row0, int64_t n, int64_t in, int64_t out) {
	struct hone_weights *w = aligned(dst);
	int64_t blocks = parts(out, B), b = row0 / B;
	float values[16][B]; // a few columns at a time: their neighbours share cache lines
	for (int64_t c0 = 0; c0 < parts(in, P) * P; c0 += 16) {
		memset(values, 0, sizeof values);
		for (int64_t r = 0; r < n; r++)
			for (int64_t c = c0; c < in && c < c0 + 16; c++) values[c - c0][r] = src[r * in + c];
		for (int64_t c = c0; c < c0 + 16; c++) put(w + c / P * blocks + b, c, values[c - c0]);
	}
}

// ---- activations -------------------------------------------------------------------------------------------------

// hone_op_quantize: (x [K, T]) -> bytes. A thread takes groups of tokens.
void hone_op_quantize(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const struct ggml_tensor *src = dst->src[0];
	const float *x = src->data;
	struct hone_activations *a = aligned(dst->data);
	int64_t K = src->ne[0], T = src->ne[1], blocks = parts(K, B), groups = parts(T, G);
	for (int64_t g = groups * ith / nth; g < groups * (ith + 1) / nth; g++)
		for (int64_t b = 0; b < blocks; b++) {
			struct hone_activations *block = a + g * blocks + b;
			int64_t size = K - b * B < B ? K - b * B : B;
			for (int i = 0; i < G; i++) {
				const float *values = x + (g * G + i) * K + b * B;
				float copy[B] = {0};
				if (g * G + i >= T) {
					values = copy;
				} else if (size < B) {
					memcpy(copy, values, size * sizeof(float));
					values = copy;
				}
				block->scale[i] = quantize(values, HONE_ACTIVATION_MOST, block->m[i][0]);
			}
		}
}

// put_values rounds a part of token i of a group into consecutive blocks; the last one is filled up with zeros.
INLINE void put_values(struct hone_activations *block, int i, const float *values, int64_t n) {
	for (; n > 0; n -= B, values += B, block++) {
		float copy[B] = {0};
		if (n < B) {
			memcpy(copy, values, n * sizeof(float));
			values = copy;
		}
		block->scale[i] = quantize(values, HONE_ACTIVATION_MOST, block->m[i][0]);
	}
}

INLINE void put_zeros(struct hone_activations *block, int i, int64_t blocks) {
	for (; blocks > 0; blocks--, block++) {
		memset(block->m[i], 0, sizeof block->m[i]);
		block->scale[i] = 0;
	}
}

// A part of a row between a float step and its rounding, which stays in the first-level cache.
enum { PART = 8 * B };

void hone_op_norm_quantize(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const struct ggml_tensor *src = dst->src[0];
	const float *gamma = dst->src[1]->data;
	int64_t K = src->ne[0], T = src->ne[1], blocks = parts(K, B), groups = parts(T, G);
	float eps, y[PART];
	memcpy(&eps, dst->op_params + HONE_PARAM, sizeof eps);
	for (int64_t g = groups * ith / nth; g < groups * (ith + 1) / nth; g++) {
		struct hone_activations *a = (struct hone_activations *)aligned(dst->data) + g * blocks;
		for (int64_t t = g * G; t < (g + 1) * G; t++) {
			if (t >= T) {
				put_zeros(a, t % G, blocks);
				continue;
			}
			const float *x = (const float *)src->data + t * K;
			float inverse = hone_norm_inverse(x, K, eps);
			for (int64_t k = 0; k < K; k += PART) {
				int64_t n = K - k < PART ? K - k : PART;
				hone_norm_scale(x + k, inverse, gamma + k, y, n);
				put_values(a + k / B, t % G, y, n);
			}
		}
	}
}

// hone_op_swiglu_quantize: a thread takes blocks of groups of tokens.
void hone_op_swiglu_quantize(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const struct ggml_tensor *src = dst->src[0], *apart = dst->src[1];
	int64_t stride = src->ne[0], K = apart ? stride : stride / 2, T = src->ne[1], blocks = parts(K, B), units = parts(T, G) * blocks;
	const float *gates = src->data, *ups = apart ? apart->data : gates + K;
	struct hone_activations *a = aligned(dst->data);
	float y[B];
	for (int64_t unit = units * ith / nth; unit < units * (ith + 1) / nth; unit++) {
		int64_t k = unit % blocks * B, n = K - k < B ? K - k : B;
		for (int i = 0; i < G; i++) {
			int64_t t = unit / blocks * G + i;
			if (t >= T) {
				put_zeros(a + unit, i, 1);
				continue;
			}
			hone_swiglu(gates + t * stride + k, ups + t * stride + k, y, n);
			put_values(a + unit, i, y, n);
		}
	}
}

// hone_op_swiglu_back_quantize: a thread takes blocks of groups of tokens of both gradients.
void hone_op_swiglu_back_quantize(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const float *gate = dst->src[0]->data, *up = dst->src[1]->data, *dy = dst->src[2]->data;
	int64_t K = dst->src[0]->ne[0], T = dst->src[0]->ne[1], blocks = parts(K, B), units = parts(T, G) * blocks;
	struct hone_activations *dgate = aligned(dst->data), *dup = aligned((char *)dst->data + hone_quantized_bytes(K, T));
	float g[B], u[B];
	for (int64_t unit = units * ith / nth; unit < units * (ith + 1) / nth; unit++) {
		int64_t k = unit % blocks * B, n = K - k < B ? K - k : B;
		for (int i = 0; i < G; i++) {
			int64_t t = unit / blocks * G + i, at = t * K + k;
			if (t >= T) {
				put_zeros(dgate + unit, i, 1);
				put_zeros(dup + unit, i, 1);
				continue;
			}
			hone_swiglu_back(gate + at, up + at, dy + at, g, u, n);
			put_values(dgate + unit, i, g, n);
			put_values(dup + unit, i, u, n);
		}
	}
}

// ---- product -----------------------------------------------------------------------------------------------------
// tile computes f[token][output] for a group of tokens and a panel of outputs over the given blocks in order; with `more`
// it adds to f. With AVX-512
// VNNI, one multiplies 32 pairs with one instruction and sums in 24 registers.

#if defined(__AVX512VNNI__)

// step adds the products of one pair of K. In assembly, because the compiler moves the loads of several steps together,
// runs out of registers and loses half of the speed.
INLINE void step(__m512i c[G][3], const struct hone_weights *w, const struct hone_activations *x, int k) {
	__m512i v0 = _mm512_load_si512(w->m[k][0]), v1 = _mm512_load_si512(w->m[k][16]), v2 = _mm512_load_si512(w->m[k][32]);
#pragma GCC unroll 8
	for (int i = 0; i < G; i++)
		__asm__ volatile("vpbroadcastd %6, %%zmm31\n\tvpdpwssd %%zmm31, %3, %0\n\tvpdpwssd %%zmm31, %4, %1\n\tvpdpwssd %%zmm31, %5, %2"
						 : "+v"(c[i][0]), "+v"(c[i][1]), "+v"(c[i][2])
						 : "v"(v0), "v"(v1), "v"(v2), "m"(x->m[i][k])
						 : "xmm31");
}

// Not inlined: the compiler would keep f in registers, too.
static __attribute__((noinline)) void tile(const struct hone_weights *w, const struct hone_activations *x, int64_t blocks, int more, float f[G][P]) {
	for (; blocks > 0; blocks--, w++, x++, more = 1) {
		__m512i c[G][3];
#pragma GCC unroll 8
		for (int i = 0; i < G; i++) c[i][0] = c[i][1] = c[i][2] = _mm512_setzero_si512();
		for (int k = 0; k < B / 2; k += 2) {
			step(c, w, x, k);
			step(c, w, x, k + 1);
		}
#pragma GCC unroll 3
		for (int j = 0; j < 3; j++) {
			__m512 scale = _mm512_load_ps(w->scale + 16 * j);
#pragma GCC unroll 8
			for (int i = 0; i < G; i++) {
				__m512 sum = more ? _mm512_load_ps(f[i] + 16 * j) : _mm512_setzero_ps();
				_mm512_store_ps(f[i] + 16 * j, _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[i][j]) * scale, _mm512_set1_ps(x->scale[i]), sum));
			}
		}
	}
}

#else

// dot adds the products of a pair of one token with the pairs of the panel's outputs.
INLINE void dot(int32_t c[P], const int16_t w[P][2], const int16_t x[2]) {
#if defined(__AVX2__)
	int32_t pair;
	memcpy(&pair, x, sizeof pair);
	for (int j = 0; j < P; j += 8) {
		__m256i *sum = (__m256i *)(c + j), v = _mm256_loadu_si256((const __m256i *)w[j]), a = _mm256_set1_epi32(pair);
#if defined(__AVXVNNI__)
		_mm256_storeu_si256(sum, _mm256_dpwssd_avx_epi32(_mm256_loadu_si256(sum), v, a));
#else
		_mm256_storeu_si256(sum, _mm256_add_epi32(_mm256_loadu_si256(sum), _mm256_madd_epi16(v, a)));
#endif
	}
#else
	for (int j = 0; j < P; j++) c[j] += w[j][0] * x[0] + w[j][1] * x[1];
#endif
}

INLINE void tile(const struct hone_weights *w, const struct hone_activations *x, int64_t blocks, int more, float f[G][P]) {
	for (; blocks > 0; blocks--, w++, x++, more = 1)
		for (int i = 0; i < G; i += 2) {
			int32_t c[2][P] = {{0}};
			for (int k = 0; k < B / 2; k++) {
				dot(c[0], w->m[k], x->m[i][k]);
				dot(c[1], w->m[k], x->m[i + 1][k]);
			}
			for (int t = 0; t < 2; t++)
				for (int j = 0; j < P; j++) f[i + t][j] = (more ? f[i + t][j] : 0) + (float)c[t][j] * w->scale[j] * x->scale[i + t];
		}
}

#endif

// A unit of work is CHUNK groups of tokens for a panel, SLICE blocks at a time, which stay in the second-level cache.
enum { CHUNK = 16, SLICE = 12 };

INLINE void put_sums(float *y, const float *sums, const float *residual, int64_t n) {
	if (residual)
		for (int64_t j = 0; j < n; j++) y[j] = sums[j] + residual[j];
	else
		for (int64_t j = 0; j < n; j++) y[j] = sums[j];
}

// hone_op_matmul: (packed W, quantized x, residual [M, T] or none; K) -> W x + residual [M, T]. Every element is
// computed by one thread in the order of K.
void hone_op_matmul(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const struct hone_weights *w = aligned(dst->src[0]->data);
	const struct hone_activations *x = aligned(dst->src[1]->data);
	const float *residual = dst->src[2] ? dst->src[2]->data : NULL;
	float *y = dst->data;
	int64_t M = dst->ne[0], T = dst->ne[1], blocks = parts(dst->op_params[HONE_PARAM], B);
	int64_t groups = parts(T, G), chunks = parts(groups, CHUNK), units = parts(M, P) * chunks;
	for (int64_t unit = units * ith / nth; unit < units * (ith + 1) / nth; unit++) {
		int64_t panel = unit / chunks, from = unit % chunks * CHUNK, to = from + CHUNK < groups ? from + CHUNK : groups;
		int64_t width = M - panel * P < P ? M - panel * P : P;
		float f[CHUNK][G][P] __attribute__((aligned(64)));
		for (int64_t b = 0; b < blocks; b += SLICE)
			for (int64_t g = from; g < to; g++) {
				tile(w + panel * blocks + b, x + g * blocks + b, blocks - b < SLICE ? blocks - b : SLICE, b > 0, f[g - from]);
				if (b + SLICE < blocks) continue;
				for (int64_t t = g * G; t < (g + 1) * G && t < T; t++) { // a few at a time: the stores drain during the next tile
					int64_t at = t * M + panel * P;
					if (width == P) // of a known size
						put_sums(y + at, f[g - from][t % G], residual ? residual + at : NULL, P);
					else
						put_sums(y + at, f[g - from][t % G], residual ? residual + at : NULL, width);
				}
			}
	}
}
