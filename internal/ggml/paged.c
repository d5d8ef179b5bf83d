#include "paged.h"

#include "kernels.h"
#include "vector.h"

#include <math.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { PAGE = HONE_PAGE, Q8_BLOCK = 32 };
_Static_assert((int)PAGE == (int)W, "the keys of a page are one vector");

// ---- float16 -----------------------------------------------------------------------------------------------------

#if !defined(__F16C__)
static float from_half(uint16_t h) {
	uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, bits;
	float f;
	if (rest >= 0x7c00) {
		bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
	} else if (rest >= 0x400) {
		bits = sign | ((rest << 13) + (112u << 23));
	} else { // subnormal: rest * 2^-24
		f = (float)rest * 0x1p-24f;
		memcpy(&bits, &f, 4);
		bits |= sign;
	}
	memcpy(&f, &bits, 4);
	return f;
}
static uint16_t to_half(float f) { // round to nearest even, as vcvtps2ph
	uint32_t bits;
	memcpy(&bits, &f, 4);
	uint16_t sign = bits >> 16 & 0x8000;
	bits &= 0x7fffffff;
	if (bits > 0x7f800000) return sign | 0x7e00;
	if (bits >= 0x477ff000) return sign | 0x7c00;
	if (bits < 0x38800000) { // subnormal: adding 0.5 leaves its mantissa, rounded, in the low bits
		float a;
		memcpy(&a, &bits, 4);
		a += 0.5f;
		memcpy(&bits, &a, 4);
		return sign | (bits - 0x3f000000);
	}
	return sign | (uint16_t)((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}
#else
INLINE float from_half(uint16_t h) { return _cvtsh_ss(h); }
INLINE uint16_t to_half(float f) { return _cvtss_sh(f, 0); }
#endif

INLINE vec load_half(const uint16_t *p) {
#if defined(__AVX512F__)
	return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
	vec v;
	for (int i = 0; i < W; i++) v[i] = from_half(p[i]);
	return v;
#endif
}

INLINE void store_half(uint16_t *p, vec v) {
#if defined(__AVX512F__)
	_mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, 0));
#else
	for (int i = 0; i < W; i++) p[i] = to_half(v[i]);
#endif
}

INLINE vec load_codes(const int8_t *p) {
#if defined(__AVX512F__)
	return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
	vec v;
	for (int i = 0; i < W; i++) v[i] = p[i];
	return v;
#endif
}

// ---- pages -------------------------------------------------------------------------------------------------------

static size_t head_bytes(int d, bool q8) { return (size_t)2 * PAGE * d * (q8 ? 1 : 2) + (q8 ? (size_t)2 * PAGE * d / Q8_BLOCK * 2 : 0); }

int64_t hone_page_bytes(int d, int heads, bool q8) { return head_bytes(d, q8) * heads; }

void hone_page_copy(void *layer, int32_t from, int32_t to, int d, int heads, bool q8) {
	size_t bytes = hone_page_bytes(d, heads, q8);
	memcpy((char *)layer + to * bytes, (const char *)layer + from * bytes, bytes);
}

void hone_rope_table(float *dst, const int32_t *positions, int64_t n, int dims, float base, float scale, const float *factors) {
	float step = powf(base, -2.f / dims);
	for (int64_t t = 0; t < n; t++) {
		float theta = positions[t];
		for (int i = 0; i < dims / 2; i++, dst += 2) {
			float angle = scale * (theta / (factors ? factors[i] : 1.f));
			dst[0] = cosf(angle);
			dst[1] = sinf(angle);
			theta *= step;
		}
	}
}

static const int32_t *params(const struct ggml_tensor *t) { return t->op_params + HONE_PARAM; }

static void share(int64_t n, int ith, int nth, int64_t *from, int64_t *to) { *from = n * ith / nth, *to = n * (ith + 1) / nth; }

static void rotate(float *x, const float *table, int dims, int neox) {
	int near = neox ? 1 : 2, far = neox ? dims / 2 : 1; // pair i is elements i*near and i*near+far
	for (int i = 0; i < dims / 2; i++) {
		float c = table[2 * i], s = table[2 * i + 1], a = x[i * near], b = x[i * near + far];
		x[i * near] = a * c - b * s;
		x[i * near + far] = a * s + b * c;
	}
}

static void quantize(const float *x, int8_t *code, size_t step, uint16_t *scale) { // as Q8_0
	float most = 0;
	for (int i = 0; i < Q8_BLOCK; i++) most = fmaxf(most, fabsf(x[i]));
	float d = most / 127, inverse = d > 0 ? 1 / d : 0;
	*scale = to_half(d);
	for (int i = 0; i < Q8_BLOCK; i++) code[i * step] = (int8_t)lrintf(x[i] * inverse);
}

// hone_op_paged_store: in place on q: (q, k, v, bias [d*(H+2K)] or anything, gamma [2d] of q's and k's heads or anything,
// rope table [dims,T], cells i32 [T], cache of the layer; d, H, K, dims, flags, eps) -> q rotated; keys rotated and
// values are in the cache. k and v may be the same tensor as q: a stacked product.
void hone_op_paged_store(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const int32_t *p = params(dst), *cells = dst->src[6]->data;
	int d = p[0], H = p[1], K = p[2], dims = p[3], flags = p[4];
	float eps;
	memcpy(&eps, p + 5, sizeof eps);
	bool q8 = flags & HONE_STORE_Q8;
	struct ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2];
	size_t k0 = k->data == q->data ? (size_t)d * H : 0, v0 = v->data == q->data ? (size_t)d * (H + K) : 0;
	const float *bias = flags & HONE_STORE_BIAS ? dst->src[3]->data : NULL, *gamma = flags & HONE_STORE_NORM ? dst->src[4]->data : NULL;
	size_t head = head_bytes(d, q8), values = (size_t)PAGE * d * (q8 ? 1 : 2), scales = 2 * values;
	int64_t from, to;
	share(q->ne[1], ith, nth, &from, &to);
	for (int64_t t = from; t < to; t++) {
		float *qr = (float *)q->data + t * q->ne[0], *kr = (float *)k->data + t * k->ne[0] + k0, *vr = (float *)v->data + t * v->ne[0] + v0;
		const float *table = (const float *)dst->src[5]->data + t * dims;
		if (bias) {
			for (int i = 0; i < d * H; i += W) store(qr + i, load(qr + i) + load(bias + i));
			for (int i = 0; i < d * K; i += W) store(kr + i, load(kr + i) + load(bias + d * H + i));
			for (int i = 0; i < d * K; i += W) store(vr + i, load(vr + i) + load(bias + d * (H + K) + i));
		}
		for (int h = 0; h < H; h++) {
			if (gamma) hone_norm_scale(qr + h * d, hone_norm_inverse(qr + h * d, d, eps), gamma, qr + h * d, d);
			rotate(qr + h * d, table, dims, flags & HONE_STORE_NEOX);
		}
		char *page = (char *)dst->src[7]->data + (size_t)(cells[t] / PAGE) * K * head;
		int slot = cells[t] % PAGE;
		for (int h = 0; h < K; h++, page += head, kr += d, vr += d) {
			if (gamma) hone_norm_scale(kr, hone_norm_inverse(kr, d, eps), gamma + d, kr, d);
			rotate(kr, table, dims, flags & HONE_STORE_NEOX);
			if (q8) {
				int blocks = d / Q8_BLOCK;
				uint16_t *scale = (uint16_t *)(page + scales);
				for (int b = 0; b < blocks; b++) {
					quantize(kr + b * Q8_BLOCK, (int8_t *)page + b * Q8_BLOCK * PAGE + slot, PAGE, scale + b * PAGE + slot);
					quantize(vr + b * Q8_BLOCK, (int8_t *)page + values + slot * d + b * Q8_BLOCK, 1, scale + blocks * PAGE + slot * blocks + b);
				}
				continue;
			}
			uint16_t *keys = (uint16_t *)page + slot, *value = (uint16_t *)(page + values) + slot * d, half[W];
			for (int i = 0; i < d; i += W) {
				store_half(half, load(kr + i));
				for (int j = 0; j < W; j++) keys[(i + j) * PAGE] = half[j];
				store_half(value + i, load(vr + i));
			}
		}
	}
}

// ---- attention ---------------------------------------------------------------------------------------------------
// The queries of a unit and its heads are rows. Scores [rows][positions] are products of the rows with whole pages,
// each a sum over d in order; softmax goes over a row's own pages in order; the result is a sum over the row's own
// positions in order. Rows and pages that are computed together only share loads.

struct pages {
	const char *base; // of the key-value head in page 0
	const int32_t *table;
	size_t page;      // bytes
	int d;
	size_t values, scales; // offsets inside a head
};

INLINE const char *page_at(const struct pages *g, int i) { return g->base + g->table[i] * g->page; }

// SCORE computes R rows times NP pages from page `at` on.
#define SCORE(NAME, R, NP, BLOCK, BEFORE, KEY)                                                                                            \
	static void NAME##_##R##_##NP(const struct pages *g, int at, const float *q, float *s, size_t ld, float scale) {                     \
		vec c[R][NP];                                                                                                                     \
		const char *page[NP];                                                                                                             \
		_Pragma("GCC unroll 8") for (int n = 0; n < NP; n++) page[n] = page_at(g, at + n);                                                \
		_Pragma("GCC unroll 12") for (int i = 0; i < R; i++) _Pragma("GCC unroll 8") for (int n = 0; n < NP; n++) c[i][n] = splat(0.f);   \
		for (int block = 0; block < g->d; block += BLOCK) {                                                                               \
			BEFORE(NP)                                                                                                                    \
			for (int k = block; k < block + BLOCK; k++) {                                                                                 \
				vec key[NP];                                                                                                              \
				_Pragma("GCC unroll 8") for (int n = 0; n < NP; n++) key[n] = KEY(n);                                                     \
				_Pragma("GCC unroll 12") for (int i = 0; i < R; i++) {                                                                    \
					float a = q[i * g->d + k];                                                                                            \
					_Pragma("GCC unroll 8") for (int n = 0; n < NP; n++) c[i][n] += a * key[n];                                           \
				}                                                                                                                         \
			}                                                                                                                             \
		}                                                                                                                                 \
		_Pragma("GCC unroll 12") for (int i = 0; i < R; i++) _Pragma("GCC unroll 8") for (int n = 0; n < NP; n++)                         \
			store(s + i * ld + (at + n) * PAGE, c[i][n] * scale);                                                                         \
	}
#define HALF_BEFORE(NP)
#define HALF_KEY(n) load_half((const uint16_t *)page[n] + k * PAGE)
#define Q8_BEFORE(NP)                                                                                                                     \
	vec scales[NP];                                                                                                                       \
	_Pragma("GCC unroll 8") for (int n = 0; n < NP; n++) scales[n] = load_half((const uint16_t *)(page[n] + g->scales) + block / Q8_BLOCK * PAGE);
#define Q8_KEY(n) (load_codes((const int8_t *)page[n] + k * PAGE) * scales[n])

// MIX computes R rows of the result, NV vectors of them from element `column` on: sums over the first `count` positions.
#define MIX(NAME, R, NV, BEFORE, VALUE)                                                                                                   \
	static void NAME##_##R##_##NV(const struct pages *g, int count, int column, const float *s, size_t ld, const float *inverse, float *const *out) { \
		vec c[R][NV];                                                                                                                     \
		_Pragma("GCC unroll 12") for (int i = 0; i < R; i++) _Pragma("GCC unroll 4") for (int n = 0; n < NV; n++) c[i][n] = splat(0.f);   \
		for (int at = 0; at < count; at += PAGE) {                                                                                        \
			const char *page = page_at(g, at / PAGE);                                                                                     \
			int stop = count - at < PAGE ? count - at : PAGE;                                                                             \
			for (int j = 0; j < stop; j++) {                                                                                              \
				BEFORE                                                                                                                    \
				vec value[NV];                                                                                                            \
				_Pragma("GCC unroll 4") for (int n = 0; n < NV; n++) value[n] = VALUE(n);                                                 \
				_Pragma("GCC unroll 12") for (int i = 0; i < R; i++) {                                                                    \
					float a = s[i * ld + at + j];                                                                                         \
					_Pragma("GCC unroll 4") for (int n = 0; n < NV; n++) c[i][n] += a * value[n];                                         \
				}                                                                                                                         \
			}                                                                                                                             \
		}                                                                                                                                 \
		_Pragma("GCC unroll 12") for (int i = 0; i < R; i++) _Pragma("GCC unroll 4") for (int n = 0; n < NV; n++)                         \
			store(out[i] + column + n * W, c[i][n] * inverse[i]);                                                                         \
	}
#define HALF_VALUE(n) load_half((const uint16_t *)(page + g->values) + j * g->d + column + n * W)
#define Q8_VALUES const uint16_t *scales = (const uint16_t *)(page + g->scales) + g->d / Q8_BLOCK * (PAGE + j);
#define Q8_VALUE(n) (load_codes((const int8_t *)(page + g->values) + j * g->d + column + n * W) * from_half(scales[(column + n * W) / Q8_BLOCK]))

#if defined(__AVX512F__) // 32 registers of one vec
#define SCORES(X, NAME, ...) X(NAME, 12, 2, __VA_ARGS__) X(NAME, 12, 1, __VA_ARGS__) X(NAME, 6, 4, __VA_ARGS__) X(NAME, 6, 1, __VA_ARGS__) X(NAME, 3, 4, __VA_ARGS__) X(NAME, 3, 1, __VA_ARGS__) X(NAME, 1, 8, __VA_ARGS__) X(NAME, 1, 1, __VA_ARGS__)
#define MIXES(X, NAME, ...) X(NAME, 6, 4, __VA_ARGS__) X(NAME, 3, 4, __VA_ARGS__) X(NAME, 1, 4, __VA_ARGS__) X(NAME, 12, 1, __VA_ARGS__) X(NAME, 3, 1, __VA_ARGS__) X(NAME, 1, 1, __VA_ARGS__)
#define SCORE_ROWS(NAME) ROWS(NAME, 12, 2) ROWS(NAME, 6, 4) ROWS(NAME, 3, 4) ROWS(NAME, 1, 8)
#define MIX_ROWS(NAME) COLUMNS(NAME, 6, 4) COLUMNS(NAME, 3, 4) COLUMNS(NAME, 1, 4)
#define MIX_REST(NAME) COLUMNS(NAME, 12, 1) COLUMNS(NAME, 3, 1) COLUMNS(NAME, 1, 1)
#else // 16 registers of half a vec
#define SCORES(X, NAME, ...) X(NAME, 6, 1, __VA_ARGS__) X(NAME, 3, 2, __VA_ARGS__) X(NAME, 3, 1, __VA_ARGS__) X(NAME, 1, 4, __VA_ARGS__) X(NAME, 1, 1, __VA_ARGS__)
#define MIXES(X, NAME, ...) X(NAME, 3, 2, __VA_ARGS__) X(NAME, 1, 2, __VA_ARGS__) X(NAME, 6, 1, __VA_ARGS__) X(NAME, 1, 1, __VA_ARGS__)
#define SCORE_ROWS(NAME) ROWS(NAME, 6, 1) ROWS(NAME, 3, 2) ROWS(NAME, 1, 4)
#define MIX_ROWS(NAME) COLUMNS(NAME, 3, 2) COLUMNS(NAME, 1, 2)
#define MIX_REST(NAME) COLUMNS(NAME, 6, 1) COLUMNS(NAME, 1, 1)
#endif

SCORES(SCORE, half_score, W, HALF_BEFORE, HALF_KEY)
SCORES(SCORE, q8_score, Q8_BLOCK, Q8_BEFORE, Q8_KEY)
MIXES(MIX, half_mix, , HALF_VALUE)
MIXES(MIX, q8_mix, Q8_VALUES, Q8_VALUE)

// A batch of rows sees what its last row sees; `seen` says how much that is.
#define ROWS(NAME, R, NP)                                                                                                                 \
	for (; row + R <= rows; row += R) {                                                                                                   \
		int pages = (seen[row + R - 1] + PAGE - 1) / PAGE, at = 0;                                                                        \
		for (; at + NP <= pages; at += NP) NAME##_##R##_##NP(g, at, q + (size_t)row * g->d, s + row * ld, ld, scale);                     \
		for (; NP > 1 && at < pages; at++) NAME##_##R##_1(g, at, q + (size_t)row * g->d, s + row * ld, ld, scale);                        \
	}
#define COLUMNS(NAME, R, NV)                                                                                                              \
	for (; row + R <= rows; row += R)                                                                                                     \
		for (int c = column; c + NV * W <= end; c += NV * W) NAME##_##R##_##NV(g, seen[row + R - 1], c, s + row * ld, ld, inverse + row, out + row);

#define SCORING(NAME)                                                                                                                     \
	static void NAME##s(const struct pages *g, int rows, const int *seen, const float *q, float *s, size_t ld, float scale) {             \
		int row = 0;                                                                                                                      \
		SCORE_ROWS(NAME)                                                                                                                  \
	}
#define MIXING(NAME, NV)                                                                                                                  \
	static void NAME##es(const struct pages *g, int rows, const int *seen, const float *s, size_t ld, const float *inverse, float *const *out) { \
		int row = 0, column = 0, end = g->d / (NV * W) * (NV * W);                                                                        \
		if (end > 0) { MIX_ROWS(NAME) }                                                                                                   \
		row = 0, column = end, end = g->d;                                                                                                \
		if (column < end) { MIX_REST(NAME) }                                                                                              \
	}
SCORING(half_score)
SCORING(q8_score)
#if defined(__AVX512F__)
MIXING(half_mix, 4)
MIXING(q8_mix, 4)
#else
MIXING(half_mix, 2)
MIXING(q8_mix, 2)
#endif

// softmax leaves e^(s - max) of a row's own positions and zeros up to `width`, and returns one over their sum.
static float softmax(float *s, int seen, int width) {
	int n = (seen + PAGE - 1) / PAGE * PAGE;
	for (int j = seen; j < n; j++) s[j] = -INFINITY;
	vec m = load(s);
	for (int j = W; j < n; j += W) m = pick(m > load(s + j), m, load(s + j));
	float max = largest(m);
	vec total = splat(0.f);
	for (int j = 0; j < n; j += W) {
		vec e = vexp(load(s + j) - max);
		store(s + j, e);
		total += e;
	}
	for (int j = n; j < width; j += W) store(s + j, splat(0.f));
	return 1.f / sum(total);
}

static void attend(const struct ggml_tensor *dst, const struct hone_unit *u) {
	const int32_t *p = params(dst);
	int d = p[0], H = p[1], K = p[2], group = H / K, rows = u->queries * u->heads;
	bool q8 = p[3];
	const struct ggml_tensor *q = dst->src[0], *tables = dst->src[2];
	struct pages g = {.table = (const int32_t *)tables->data + u->table * tables->ne[0], .page = hone_page_bytes(d, K, q8), .d = d,
		.values = (size_t)PAGE * d * (q8 ? 1 : 2)};
	g.base = (const char *)dst->src[1]->data + u->kv * head_bytes(d, q8), g.scales = 2 * g.values;
	size_t ld = (size_t)(u->position + u->queries + PAGE - 1) / PAGE * PAGE;
	int seen[rows];
	float inverse[rows], *out[rows];
	float *x = hone_scratch(rows * (ld + d)), *s = x + (size_t)rows * d;
	for (int r = 0; r < rows; r++) {
		int64_t row = u->row + r / u->heads, head = u->kv * group + u->head + r % u->heads;
		seen[r] = u->position + r / u->heads + 1;
		out[r] = (float *)dst->data + row * dst->ne[0] + head * d;
		memcpy(x + (size_t)r * d, (const float *)q->data + row * q->ne[0] + head * d, d * sizeof(float));
	}
	(q8 ? q8_scores : half_scores)(&g, rows, seen, x, s, ld, 1.f / sqrtf((float)d));
	for (int r = 0; r < rows; r++) inverse[r] = softmax(s + r * ld, seen[r], ld);
	(q8 ? q8_mixes : half_mixes)(&g, rows, seen, s, ld, inverse, out);
}

// hone_op_paged_attention: (q, cache of the layer, page tables i32 [pages, sequences], plan; d, H, K, q8) -> [d*H, T].
void hone_op_paged_attention(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const int32_t *plan = dst->src[3]->data;
	const struct hone_unit *units = (const struct hone_unit *)(plan + HONE_PLAN_HEADER);
	for (int i = ith; i < plan[0]; i += nth) attend(dst, units + i);
}

// ---- adapters ----------------------------------------------------------------------------------------------------

// DOTS: R rows of x times M rows of a, over n elements: 16 partial sums each, added in their order.
#define DOTS(R, M)                                                                                                                        \
	static void dots_##R##_##M(const float *x, size_t ldx, const float *a, size_t lda, int n, float *u, size_t ldu) {                     \
		vec c[R][M];                                                                                                                      \
		_Pragma("GCC unroll 4") for (int i = 0; i < R; i++) _Pragma("GCC unroll 8") for (int m = 0; m < M; m++) c[i][m] = splat(0.f);     \
		for (int k = 0; k < n; k += W)                                                                                                    \
			_Pragma("GCC unroll 8") for (int m = 0; m < M; m++) {                                                                         \
				vec v = load(a + m * lda + k);                                                                                            \
				_Pragma("GCC unroll 4") for (int i = 0; i < R; i++) c[i][m] += load(x + i * ldx + k) * v;                                 \
			}                                                                                                                             \
		for (int i = 0; i < R; i++)                                                                                                       \
			for (int m = 0; m < M; m++) u[i * ldu + m] = sum(c[i][m]);                                                                    \
	}
DOTS(4, 4)
DOTS(4, 1)
DOTS(1, 8)
DOTS(1, 1)

// SPREAD: R rows of y += scale times the sum over ranks of u times b, from element `from` to `to`.
#define SPREAD(R)                                                                                                                         \
	static void spread_##R(const float *u, size_t ldu, const float *b, int rank, int from, int to, int out, float scale, float *y, size_t ldy) { \
		for (int o = from; o < to; o += W) {                                                                                              \
			vec c[R];                                                                                                                     \
			_Pragma("GCC unroll 4") for (int i = 0; i < R; i++) c[i] = splat(0.f);                                                        \
			for (int r = 0; r < rank; r++) {                                                                                              \
				vec v = load(b + (size_t)r * out + o);                                                                                    \
				_Pragma("GCC unroll 4") for (int i = 0; i < R; i++) c[i] += u[i * ldu + r] * v;                                           \
			}                                                                                                                             \
			_Pragma("GCC unroll 4") for (int i = 0; i < R; i++) store(y + i * ldy + o, load(y + i * ldy + o) + scale * c[i]);             \
		}                                                                                                                                 \
	}
SPREAD(4)
SPREAD(1)

// hone_op_adapt: in place on y: (y, x [in,T], table; first pair, pairs): the rows of the table get their adapters' sums. The pairs'
// outputs lie one behind the other in y. Several slices of the outputs each compute A x again.
void hone_op_adapt(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const struct ggml_tensor *x = dst->src[1];
	const int32_t *table = dst->src[2]->data, *p = params(dst);
	int slices = table[1], slice = ith % slices;
	(void)nth; // the number of tasks is the table's
	struct hone_rows rows;
	memcpy(&rows, (const char *)(table + 2) + ith / slices * sizeof rows, sizeof rows);
	const float *xr = (const float *)x->data + rows.from * x->ne[0];
	float *y = (float *)dst->data + rows.from * dst->ne[0];
	size_t ldx = x->ne[0], ldy = dst->ne[0];
	for (int i = p[0]; i < p[0] + p[1]; i++) {
		struct hone_pair pair = rows.adapter->pairs[i];
		if (pair.rank > 0) {
			int rank = pair.rank, from = pair.out / W * slice / slices * W, to = pair.out / W * (slice + 1) / slices * W, t = 0;
			float *u = hone_scratch((size_t)4 * rank);
			for (; t + 4 <= rows.n; t += 4) {
				int m = 0;
				for (; m + 4 <= rank; m += 4) dots_4_4(xr + t * ldx, ldx, pair.a + (size_t)m * pair.in, pair.in, pair.in, u + m, rank);
				for (; m < rank; m++) dots_4_1(xr + t * ldx, ldx, pair.a + (size_t)m * pair.in, pair.in, pair.in, u + m, rank);
				spread_4(u, rank, pair.b, rank, from, to, pair.out, pair.scale, y + t * ldy, ldy);
			}
			for (; t < rows.n; t++) {
				int m = 0;
				for (; m + 8 <= rank; m += 8) dots_1_8(xr + t * ldx, ldx, pair.a + (size_t)m * pair.in, pair.in, pair.in, u + m, rank);
				for (; m < rank; m++) dots_1_1(xr + t * ldx, ldx, pair.a + (size_t)m * pair.in, pair.in, pair.in, u + m, rank);
				spread_1(u, rank, pair.b, rank, from, to, pair.out, pair.scale, y + t * ldy, ldy);
			}
		}
		y += pair.out;
	}
}

// ---- rows --------------------------------------------------------------------------------------------------------

// hone_op_pick_rows: (x [D,T], index i32 [N]) -> [D,N].
void hone_op_pick_rows(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const int32_t *index = dst->src[1]->data;
	int64_t D = dst->ne[0], from, to;
	share(dst->ne[1], ith, nth, &from, &to);
	for (int64_t i = from; i < to; i++) memcpy((float *)dst->data + i * D, (const float *)dst->src[0]->data + index[i] * D, D * sizeof(float));
}

// hone_op_swiglu_rows: (gate, up) -> silu(gate) * up [F,T]; both may be one stacked tensor [2F,T].
void hone_op_swiglu_rows(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const struct ggml_tensor *gate = dst->src[0], *up = dst->src[1];
	int64_t F = dst->ne[0], from, to;
	share(dst->ne[1], ith, nth, &from, &to);
	for (int64_t t = from; t < to; t++) {
		const float *g = (const float *)gate->data + t * gate->ne[0], *u = (const float *)up->data + t * up->ne[0] + (up == gate ? F : 0);
		hone_swiglu(g, u, (float *)dst->data + t * F, F);
	}
}
