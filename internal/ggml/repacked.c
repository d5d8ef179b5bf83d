#include "repacked.h"

#include "kernels.h"

#include <math.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { G = HONE_GROUP, P = HONE_OUTPUTS };

static void *aligned(const void *p) { return (void *)(((uintptr_t)p + 63) / 64 * 64); }

// ---- layouts -----------------------------------------------------------------------------------------------------

struct layout {
	int nibbles; // 1: codes of 4 bits
	int shift;   // offset of the codes as a power of two; 0: none
	int floats;  // 1: scales and minima are float32
	int minimum; // 1: there are minima
	int halves;  // 2: the group has two scales
};

static const struct layout layouts[] = {
	[HONE_NIBBLES] = {1, 3, 0, 0, 1},     [HONE_NIBBLES_MINIMUM] = {1, 0, 0, 1, 1}, [HONE_NIBBLES_FLOAT] = {1, 0, 1, 1, 1},
	[HONE_BYTES] = {0, 7, 0, 0, 1},       [HONE_BYTES_FLOAT] = {0, 0, 1, 1, 1},     [HONE_BYTES_HALVES] = {0, 5, 1, 0, 2},
};

INLINE int64_t code_bytes(struct layout l) { return G * P / (l.nibbles ? 2 : 1); }
INLINE int64_t scale_bytes(struct layout l) { return P * (l.floats ? 4 : 2); }
INLINE int64_t group_bytes(struct layout l) { return code_bytes(l) + scale_bytes(l) * (l.halves + l.minimum); }

static int64_t panels(int64_t out) { return (out + P - 1) / P; }

int64_t hone_repacked_bytes(int kind, int64_t in, int64_t out) { return panels(out) * (in / G) * group_bytes(layouts[kind]) + 64; }

int64_t hone_groups_bytes(int64_t in, int64_t tokens) { return tokens * (in / G) * (int64_t)sizeof(struct hone_group) + 64; }

// ---- repacking: the file's types, as ggml-common.h and ggml-quants.c define them -----------------------------------

enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = HONE_GGML_TYPE_Q8_0, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = HONE_GGML_TYPE_IQ4_NL };

int hone_repacked_kind(unsigned int stored) {
	switch (stored) {
	case Q4_0: return HONE_NIBBLES;
	case Q4_1: return HONE_NIBBLES_MINIMUM;
	case Q4_K: return HONE_NIBBLES_FLOAT;
	case Q8_0:
	case Q5_0:
	case IQ4_NL: return HONE_BYTES;
	case Q5_1:
	case Q5_K: return HONE_BYTES_FLOAT;
	case Q6_K: return HONE_BYTES_HALVES;
	}
	return -1;
}

static float half(uint16_t h) { // exact
	uint32_t sign = (uint32_t)(h >> 15) << 31, exponent = h >> 10 & 31, fraction = h & 1023, bits;
	float f;
	if (exponent == 0) {
		f = (float)fraction * 0x1p-24f;
		return sign ? -f : f;
	}
	bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
	memcpy(&f, &bits, sizeof f);
	return f;
}

static float half_at(const uint8_t *p) {
	uint16_t h;
	memcpy(&h, p, sizeof h);
	return half(h);
}

// A group of one row, taken out of the file: its codes as they lie in the layout, its scales and its minimum.
struct group {
	uint8_t codes[G];     // with nibbles 16 bytes, byte i: elements i and i + 16
	uint16_t half[2];     // scale and minimum
	float scale[2], minimum;
};

// scale_K and minimum_K are the 6-bit factors of group j of the eight of a block of Q4_K or Q5_K.
static int scale_K(const uint8_t *q, int j) { return j < 4 ? q[j] & 63 : (q[j + 4] & 15) | q[j - 4] >> 6 << 4; }
static int minimum_K(const uint8_t *q, int j) { return j < 4 ? q[j + 4] & 63 : q[j + 4] >> 4 | q[j] >> 6 << 4; }

INLINE void take(unsigned int stored, const uint8_t *row, int64_t b, struct group *g) {
	static const int8_t iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
	const uint8_t *p;
	int j = b % 8;
	switch (stored) {
	case Q4_0:
		p = row + b * 18;
		memcpy(g->half, p, 2);
		memcpy(g->codes, p + 2, 16);
		break;
	case Q4_1:
		p = row + b * 20;
		memcpy(g->half, p, 4);
		memcpy(g->codes, p + 4, 16);
		break;
	case Q8_0:
		p = row + b * 34;
		memcpy(g->half, p, 2);
		for (int i = 0; i < G; i++) g->codes[i] = p[2 + i] ^ 128;
		break;
	case IQ4_NL:
		p = row + b * 18;
		memcpy(g->half, p, 2);
		for (int i = 0; i < 16; i++) {
			g->codes[i] = iq4[p[2 + i] & 15] + 128;
			g->codes[i + 16] = iq4[p[2 + i] >> 4] + 128;
		}
		break;
	case Q5_0:
	case Q5_1: {
		int offset = stored == Q5_0 ? 128 - 16 : 0;
		uint32_t high;
		p = row + b * (stored == Q5_0 ? 22 : 24);
		memcpy(g->half, p, stored == Q5_0 ? 2 : 4);
		p += stored == Q5_0 ? 2 : 4;
		memcpy(&high, p, 4);
		for (int i = 0; i < 16; i++) {
			g->codes[i] = (p[4 + i] & 15) + (high >> i & 1) * 16 + offset;
			g->codes[i + 16] = (p[4 + i] >> 4) + (high >> (i + 16) & 1) * 16 + offset;
		}
		if (stored == Q5_1) {
			g->scale[0] = half(g->half[0]);
			g->minimum = half(g->half[1]);
		}
		break;
	}
	case Q4_K:
		p = row + b / 8 * 144;
		g->scale[0] = half_at(p) * scale_K(p + 4, j);
		g->minimum = -(half_at(p + 2) * minimum_K(p + 4, j));
		p += 16 + j / 2 * 32;
		for (int i = 0; i < 16; i++) g->codes[i] = j % 2 ? p[i] >> 4 | (p[i + 16] & 0xf0) : (p[i] & 15) | p[i + 16] << 4;
		break;
	case Q5_K:
		p = row + b / 8 * 176;
		g->scale[0] = half_at(p) * scale_K(p + 4, j);
		g->minimum = -(half_at(p + 2) * minimum_K(p + 4, j));
		for (int i = 0; i < G; i++) {
			int q = p[48 + j / 2 * 32 + i];
			g->codes[i] = (j % 2 ? q >> 4 : q & 15) + (p[16 + i] >> j & 1) * 16;
		}
		break;
	case Q6_K:
		// 128 elements lie together: their low bits in 64 bytes, the two high bits in 32.
		p = row + b / 8 * 210;
		for (int i = 0; i < G; i++) {
			int low = p[j / 4 * 64 + j % 2 * 32 + i], high = p[128 + j / 4 * 32 + i] >> j % 4 * 2 & 3;
			g->codes[i] = (j % 4 < 2 ? low & 15 : low >> 4) + high * 16;
		}
		for (int i = 0; i < 2; i++) g->scale[i] = half_at(p + 208) * (int8_t)p[192 + 2 * j + i];
		break;
	}
}

INLINE void put(struct layout l, uint8_t *w, int o, const struct group *g) {
	int words = l.nibbles ? 4 : 8;
	for (int i = 0; i < words; i++) memcpy(w + (i * P + o) * 4, g->codes + 4 * i, 4);
	w += code_bytes(l);
	if (l.floats) {
		memcpy(w + 4 * o, &g->scale[0], 4);
		if (l.halves == 2) memcpy(w + 4 * (P + o), &g->scale[1], 4);
		if (l.minimum) memcpy(w + 4 * (P + o), &g->minimum, 4);
	} else {
		memcpy(w + 2 * o, &g->half[0], 2);
		if (l.minimum) memcpy(w + 2 * (P + o), &g->half[1], 2);
	}
}

INLINE void repack(unsigned int stored, struct layout l, int64_t row_bytes, const uint8_t *src, uint8_t *dst, int64_t row0, int64_t n, int64_t in, int64_t out) {
	int64_t groups = in / G, end = row0 + n == out ? panels(out) * P : row0 + n;
	for (int64_t r = row0; r < end;) {
		int64_t stop = (r / P + 1) * P < end ? (r / P + 1) * P : end;
		uint8_t *w = dst + r / P * groups * group_bytes(l);
		for (int64_t b = 0; b < groups; b++, w += group_bytes(l))
			for (int64_t i = r; i < stop; i++) {
				struct group g = {0};
				if (i < out) take(stored, src + (i - row0) * row_bytes, b, &g);
				put(l, w, i % P, &g);
			}
		r = stop;
	}
}

void hone_repack(unsigned int stored, const void *src, void *dst, int64_t row0, int64_t n, int64_t in, int64_t out) {
	const uint8_t *p = src;
	uint8_t *w = aligned(dst);
	// The same function with constants, so that each type gets its own loop.
#define TYPE(type, kind, bytes, per) \
	case type: repack(type, layouts[kind], in / per * bytes, p, w, row0, n, in, out); break;
	switch (stored) {
		TYPE(Q4_0, HONE_NIBBLES, 18, 32)
		TYPE(Q4_1, HONE_NIBBLES_MINIMUM, 20, 32)
		TYPE(Q4_K, HONE_NIBBLES_FLOAT, 144, 256)
		TYPE(Q8_0, HONE_BYTES, 34, 32)
		TYPE(Q5_0, HONE_BYTES, 22, 32)
		TYPE(IQ4_NL, HONE_BYTES, 18, 32)
		TYPE(Q5_1, HONE_BYTES_FLOAT, 24, 32)
		TYPE(Q5_K, HONE_BYTES_FLOAT, 176, 256)
		TYPE(Q6_K, HONE_BYTES_HALVES, 210, 256)
	}
#undef TYPE
}

// ---- activations -------------------------------------------------------------------------------------------------

// quantize rounds a group to codes of at most 127. A group of zeros (also one below 1e-34, whose inverse is no float32)
// has scale 0; one with an infinity or NaN has scale NaN and codes 0, which make every product with it NaN, and is never
// converted to integers.
INLINE void quantize(const float *x, struct hone_group *g) {
	uint32_t largest = 0; // as integers, magnitudes are ordered like the floats, with infinity and NaN above all
#if defined(__AVX512BW__)
	__m512 v0 = _mm512_loadu_ps(x), v1 = _mm512_loadu_ps(x + 16);
	__m512i sign = _mm512_set1_epi32(0x7fffffff);
	largest = _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(v0), sign), _mm512_and_si512(_mm512_castps_si512(v1), sign)));
#else
	for (int i = 0; i < G; i++) {
		uint32_t bits;
		memcpy(&bits, x + i, sizeof bits);
		bits &= 0x7fffffff;
		largest = largest > bits ? largest : bits;
	}
#endif
	float a;
	memcpy(&a, &largest, sizeof a);
	if (largest >= 0x7f800000 || a < 1e-34f) {
		memset(g, 0, sizeof *g);
		g->scale = g->sum = largest >= 0x7f800000 ? NAN : 0;
		return;
	}
	float inverse = 127 / a;
	int32_t sums[2];
#if defined(__AVX512BW__)
	__m128i c0 = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v0 * inverse)), c1 = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v1 * inverse));
	_mm_storeu_si128((__m128i *)g->code, c0);
	_mm_storeu_si128((__m128i *)(g->code + 16), c1);
	// Sums of 8 codes, each 128 too large, in four integers of 64 bits.
	__m256i eights = _mm256_sad_epu8(_mm256_xor_si256(_mm256_set_m128i(c1, c0), _mm256_set1_epi8((char)128)), _mm256_setzero_si256());
	__m256i halves = _mm256_add_epi64(eights, _mm256_unpackhi_epi64(eights, eights));
	sums[0] = _mm256_extract_epi32(halves, 0) - 16 * 128;
	sums[1] = _mm256_extract_epi32(halves, 4) - 16 * 128;
#else
	for (int h = 0; h < 2; h++) {
		sums[h] = 0;
		for (int i = 16 * h; i < 16 * h + 16; i++) {
			g->code[i] = (int8_t)rintf(x[i] * inverse);
			sums[h] += g->code[i];
		}
	}
#endif
	g->scale = a * (1 / 127.f);
	g->sum = g->scale * (float)(sums[0] + sums[1]);
	g->less[0] = -sums[0];
	g->less[1] = -sums[1];
}

void hone_op_quantize_bytes(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const struct ggml_tensor *src = dst->src[0];
	const float *x = src->data;
	struct hone_group *g = aligned(dst->data);
	int64_t groups = src->ne[0] / G * src->ne[1];
	for (int64_t i = groups * ith / nth; i < groups * (ith + 1) / nth; i++) quantize(x + i * G, g + i);
}

// A part of a row between a float step and its rounding, which stays in the first-level cache.
enum { PART = 16 * G };

void hone_op_norm_quantize_bytes(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const struct ggml_tensor *src = dst->src[0];
	const float *gamma = dst->src[1]->data;
	int64_t K = src->ne[0], T = src->ne[1];
	float eps, y[PART];
	memcpy(&eps, dst->op_params + HONE_PARAM, sizeof eps);
	for (int64_t t = T * ith / nth; t < T * (ith + 1) / nth; t++) {
		const float *x = (const float *)src->data + t * K;
		struct hone_group *g = (struct hone_group *)aligned(dst->data) + t * (K / G);
		float inverse = hone_norm_inverse(x, K, eps);
		for (int64_t k = 0; k < K; k += PART) {
			int64_t n = K - k < PART ? K - k : PART;
			hone_norm_scale(x + k, inverse, gamma + k, y, n);
			for (int64_t i = 0; i < n; i += G) quantize(y + i, g++);
		}
	}
}

void hone_op_swiglu_quantize_bytes(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const struct ggml_tensor *src = dst->src[0];
	int64_t K = src->ne[0] / 2, groups = K / G * src->ne[1];
	struct hone_group *g = aligned(dst->data);
	float y[PART];
	for (int64_t i = groups * ith / nth, end = groups * (ith + 1) / nth; i < end;) {
		int64_t t = i / (K / G), k = i % (K / G) * G, n = K - k < PART ? K - k : PART;
		if (n > (end - i) * G) n = (end - i) * G;
		const float *gate = (const float *)src->data + t * 2 * K + k;
		hone_swiglu(gate, gate + K, y, n);
		for (int64_t j = 0; j < n; j += G) quantize(y + j, g + i++);
	}
}

// ---- product -----------------------------------------------------------------------------------------------------
// tile computes f[token][output] for n tokens and a panel. The sum of an element is, for each group (half of one) in order,
//
//	sum = fma((float)dot * scale of the weights, scale of the activations, sum), with minima then
//	sum = fma(minimum, sum of the activations, sum)
//
// with dot the exact integer sum of (code - offset) * code; every version of tile computes just this.

// What a tile fetches from memory while it computes: every `each`-th group of the next panel, so that the tiles of a
// panel together fetch the next and memory never waits. A panel's only tile fetches nothing: the processor, which sees
// one stream of weights, does better on its own.
struct ahead {
	const uint8_t *next; // of the first group to fetch
	int64_t each, wait;  // groups until the next one
};

INLINE void fetch(struct layout l, struct ahead *a) {
	if (a->wait-- > 0) return;
	for (int64_t i = 0; i < group_bytes(l); i += 64) __builtin_prefetch(a->next + i, 0, 2);
	a->next += a->each * group_bytes(l);
	a->wait = a->each - 1;
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

enum { MOST = 6 }; // tokens of a tile: 12 sums in int32 and 12 in float32 stay in registers

// step adds the products of four elements of K. In assembly, because the compiler moves the loads of several steps
// together and runs out of registers.
INLINE void step(int n, __m512i c[MOST][2], __m512i v0, __m512i v1, const char *x, int64_t stride, int k) {
#pragma GCC unroll 6
	for (int i = 0; i < n; i++)
		__asm__ volatile("vpbroadcastd %4, %%zmm31\n\tvpdpbusd %%zmm31, %2, %0\n\tvpdpbusd %%zmm31, %3, %1"
						 : "+v"(c[i][0]), "+v"(c[i][1])
						 : "v"(v0), "v"(v1), "m"(*(const int32_t(*)[1])(x + i * stride + k))
						 : "xmm31");
}

INLINE void scales(struct layout l, const uint8_t *p, __m512 v[2]) {
#pragma GCC unroll 2
	for (int j = 0; j < 2; j++) v[j] = l.floats ? _mm512_load_ps((const float *)p + 16 * j) : _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)p + j));
}

INLINE void tile(int n, struct layout l, const uint8_t *w, const struct hone_group *x, int64_t groups, struct ahead ahead, float f[][P]) {
	int64_t stride = groups * sizeof *x;
	const char *token = (const char *)x;
	__m512 sum[MOST][2];
#pragma GCC unroll 6
	for (int i = 0; i < n; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
	for (int64_t b = 0; b < groups; b++, w += group_bytes(l), token += sizeof *x) {
		fetch(l, &ahead);
#define FIELD(i, name) (token + (i) * stride + offsetof(struct hone_group, name))
		__m512 d[2], m[2];
#pragma GCC unroll 2
		for (int h = 0; h < l.halves; h++) {
			__m512i c[MOST][2];
#pragma GCC unroll 6
			for (int i = 0; i < n; i++) {
				c[i][0] = _mm512_setzero_si512();
				if (l.shift) {
					const int32_t *less = (const int32_t *)FIELD(i, less);
					c[i][0] = _mm512_slli_epi32(_mm512_set1_epi32(l.halves == 2 ? less[h] : less[0] + less[1]), l.shift);
				}
				c[i][1] = c[i][0];
			}
			if (l.nibbles) {
				const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 4
				for (int k = 0; k < 4; k++) {
					__m512i v0 = _mm512_load_si512(w + k * 128), v1 = _mm512_load_si512(w + k * 128 + 64);
					step(n, c, _mm512_and_si512(v0, low), _mm512_and_si512(v1, low), token, stride, 4 * k);
					step(n, c, _mm512_and_si512(_mm512_srli_epi16(v0, 4), low), _mm512_and_si512(_mm512_srli_epi16(v1, 4), low), token, stride, 16 + 4 * k);
				}
			} else {
				int from = h * 4, to = l.halves == 2 ? from + 4 : 8;
#pragma GCC unroll 8
				for (int k = from; k < to; k++) step(n, c, _mm512_load_si512(w + k * 128), _mm512_load_si512(w + k * 128 + 64), token, stride, 4 * k);
			}
			scales(l, w + code_bytes(l) + h * scale_bytes(l), d);
			if (l.minimum) scales(l, w + code_bytes(l) + scale_bytes(l), m);
#pragma GCC unroll 6
			for (int i = 0; i < n; i++) {
				__m512 s = _mm512_set1_ps(*(const float *)FIELD(i, scale));
#pragma GCC unroll 2
				for (int j = 0; j < 2; j++) sum[i][j] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(c[i][j]), d[j]), s, sum[i][j]);
				if (l.minimum) {
					__m512 all = _mm512_set1_ps(*(const float *)FIELD(i, sum));
#pragma GCC unroll 2
					for (int j = 0; j < 2; j++) sum[i][j] = _mm512_fmadd_ps(m[j], all, sum[i][j]);
				}
			}
		}
#undef FIELD
	}
#pragma GCC unroll 6
	for (int i = 0; i < n; i++)
#pragma GCC unroll 2
		for (int j = 0; j < 2; j++) _mm512_store_ps(f[i] + 16 * j, sum[i][j]);
}

#else

enum { MOST = 4 };

#if defined(__AVX2__)

// dot adds the products of four elements of one token and 8 outputs. Codes below 128 are multiplied as they are;
// larger ones less 128, as magnitudes times the activations with their signs, because sums of two products must fit int16.
INLINE __m256i dot(__m256i sum, int centred, __m256i w, const int8_t *x) {
	int32_t four;
	memcpy(&four, x, sizeof four);
	__m256i a = _mm256_set1_epi32(four), pairs;
	if (centred) {
		w = _mm256_xor_si256(w, _mm256_set1_epi8((char)128));
		pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
	} else {
		pairs = _mm256_maddubs_epi16(w, a);
	}
	return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// dots gives n tokens' sums of (code - offset) * code over a group or its half h.
INLINE void dots(int n, struct layout l, const uint8_t *w, const struct hone_group *x, int64_t groups, int h, int32_t c[MOST][P]) {
	int centred = l.shift == 7, from = h * 4, to = l.halves == 2 ? from + 4 : l.nibbles ? 4 : 8;
	const __m256i low = _mm256_set1_epi8(15);
	for (int o = 0; o < P; o += 8) {
		__m256i sum[MOST];
		for (int i = 0; i < n; i++) {
			const int32_t *less = x[i * groups].less;
			sum[i] = _mm256_set1_epi32(centred || !l.shift ? 0 : (l.halves == 2 ? less[h] : less[0] + less[1]) * (1 << l.shift));
		}
		for (int k = from; k < to; k++) {
			__m256i v = _mm256_loadu_si256((const __m256i *)(w + (k * P + o) * 4));
			if (l.nibbles) {
				__m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
				for (int i = 0; i < n; i++) sum[i] = dot(sum[i], 0, high, x[i * groups].code + 16 + 4 * k);
				v = _mm256_and_si256(v, low);
			}
			for (int i = 0; i < n; i++) sum[i] = dot(sum[i], centred, v, x[i * groups].code + 4 * k);
		}
		for (int i = 0; i < n; i++) _mm256_storeu_si256((__m256i *)(c[i] + o), sum[i]);
	}
}

#else

INLINE void dots(int n, struct layout l, const uint8_t *w, const struct hone_group *x, int64_t groups, int h, int32_t c[MOST][P]) {
	int from = l.halves == 2 ? 16 * h : 0, to = l.halves == 2 ? from + 16 : G, offset = l.shift ? 1 << l.shift : 0;
	memset(c, 0, n * sizeof *c);
	for (int k = from; k < to; k++) {
		const uint8_t *v = w + k / 4 % (l.nibbles ? 4 : 8) * P * 4 + k % 4;
		int high = l.nibbles && k >= 16;
		for (int i = 0; i < n; i++)
			for (int o = 0; o < P; o++) {
				int code = l.nibbles ? (high ? v[4 * o] >> 4 : v[4 * o] & 15) : v[4 * o];
				c[i][o] += (code - offset) * x[i * groups].code[k];
			}
	}
}

#endif

INLINE void factors(struct layout l, const uint8_t *p, float v[P]) {
	if (l.floats) {
		memcpy(v, p, P * sizeof *v);
		return;
	}
#if defined(__F16C__)
	for (int o = 0; o < P; o += 8) _mm256_storeu_ps(v + o, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 2 * o))));
#else
	for (int o = 0; o < P; o++) v[o] = half_at(p + 2 * o);
#endif
}

INLINE void tile(int n, struct layout l, const uint8_t *w, const struct hone_group *x, int64_t groups, struct ahead ahead, float f[][P]) {
	for (int i = 0; i < n; i++)
		for (int o = 0; o < P; o++) f[i][o] = 0;
	for (int64_t b = 0; b < groups; b++, w += group_bytes(l)) {
		fetch(l, &ahead);
		for (int h = 0; h < l.halves; h++) {
			float d[P], m[P];
			int32_t c[MOST][P];
			factors(l, w + code_bytes(l) + h * scale_bytes(l), d);
			if (l.minimum) factors(l, w + code_bytes(l) + scale_bytes(l), m);
			dots(n, l, w, x + b, groups, h, c);
			for (int i = 0; i < n; i++) {
				const struct hone_group *g = x + i * groups + b;
				for (int o = 0; o < P; o++) f[i][o] = fmaf((float)c[i][o] * d[o], g->scale, f[i][o]);
				if (l.minimum)
					for (int o = 0; o < P; o++) f[i][o] = fmaf(m[o], g->sum, f[i][o]);
			}
		}
	}
}

#endif

typedef void (*tile_t)(const uint8_t *w, const struct hone_group *x, int64_t groups, struct ahead ahead, float f[][P]);

#define TILE(n, kind) \
	static __attribute__((noinline)) void tile_##n##_##kind(const uint8_t *w, const struct hone_group *x, int64_t groups, struct ahead ahead, float f[][P]) { tile(n, layouts[kind], w, x, groups, ahead, f); }
#define TILES(n) TILE(n, HONE_NIBBLES) TILE(n, HONE_NIBBLES_MINIMUM) TILE(n, HONE_NIBBLES_FLOAT) TILE(n, HONE_BYTES) TILE(n, HONE_BYTES_FLOAT) TILE(n, HONE_BYTES_HALVES)
#define ROW(n) {tile_##n##_HONE_NIBBLES, tile_##n##_HONE_NIBBLES_MINIMUM, tile_##n##_HONE_NIBBLES_FLOAT, tile_##n##_HONE_BYTES, tile_##n##_HONE_BYTES_FLOAT, tile_##n##_HONE_BYTES_HALVES}
TILES(1) TILES(2) TILES(3) TILES(4)
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
TILES(5) TILES(6)
#endif
static const tile_t tiles[MOST][HONE_REPACKED_KINDS] = {ROW(1), ROW(2), ROW(3), ROW(4),
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
	ROW(5), ROW(6),
#endif
};

// A thread computes a panel for all tokens of a chunk, whose activations stay in the second-level cache. Units of work are
// shared out evenly beforehand: taken one by one from a counter, they cost 10% at 8 tokens, because the next panel is not
// known to be fetched, and gained at most 8% at 64 beside a process that keeps a core busy, since the next operation
// waits for all threads anyway.
enum { CHUNK_BYTES = 512 << 10 };

INLINE void finish(float *y, const float *sums, const float *residual, int64_t n) {
	if (residual)
		for (int64_t j = 0; j < n; j++) y[j] = sums[j] + residual[j];
	else
		for (int64_t j = 0; j < n; j++) y[j] = sums[j];
}

// hone_op_repacked_matmul: (W, bytes of hone_group, residual [M, T] or none; kind, K) -> W x + residual [M, T].
void hone_op_repacked_matmul(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const uint8_t *w = aligned(dst->src[0]->data);
	const struct hone_group *x = aligned(dst->src[1]->data);
	const float *residual = dst->src[2] ? dst->src[2]->data : NULL;
	float *y = dst->data;
	int kind = dst->op_params[HONE_PARAM];
	int64_t M = dst->ne[0], T = dst->ne[1], groups = dst->op_params[HONE_PARAM + 1] / G;
	int64_t panel_bytes = groups * group_bytes(layouts[kind]);
	int64_t most = CHUNK_BYTES / (groups * (int64_t)sizeof *x), chunk = most < 4 * MOST ? 4 * MOST : most, chunks = (T + chunk - 1) / chunk;
	chunk = chunks ? (T + chunks - 1) / chunks : 0;
	int64_t count = panels(M), units = count * chunks;
	int64_t last = units * (ith + 1) / nth;
	for (int64_t unit = units * ith / nth; unit < last; unit++) {
		int64_t panel = unit % count, from = unit / count * chunk, to = from + chunk < T ? from + chunk : T;
		int64_t width = M - panel * P < P ? M - panel * P : P;
		// As many tiles as are needed, of about the same size.
		int64_t tile_count = (to - from + MOST - 1) / MOST;
		const uint8_t *next = w + (unit + 1 < last ? (unit + 1) % count : panel) * panel_bytes;
		for (int64_t left = tile_count, t = from; t < to; left--) {
			int64_t n = (to - t + left - 1) / left, j = tile_count - left;
			float f[MOST][P] __attribute__((aligned(64)));
			struct ahead ahead = {next + j * group_bytes(layouts[kind]), tile_count, tile_count > 1 ? j : INT64_MAX};
			// The cache lines of the result come while the tile is computed: stores that miss would wait for each other.
			for (int64_t at = t * M + panel * P; at < (t + n) * M; at += M)
				for (int64_t i = 0; i < width; i += 16) {
					__builtin_prefetch(y + at + i, 1);
					if (residual) __builtin_prefetch(residual + at + i, 0);
				}
			tiles[n - 1][kind](w + panel * panel_bytes, x + t * groups, groups, ahead, f);
			for (int64_t i = 0; i < n; i++, t++) {
				int64_t at = t * M + panel * P;
				if (width == P) // of a known size
					finish(y + at, f[i], residual ? residual + at : NULL, P);
				else
					finish(y + at, f[i], residual ? residual + at : NULL, width);
			}
		}
	}
}
