#include "kernels.h"
#include "vector.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

bool hone_watch_callback(void *data) {
	struct hone_watch *w = data;
	__atomic_add_fetch(&w->nodes, 1, __ATOMIC_RELAXED);
	return __atomic_load_n(&w->stop, __ATOMIC_RELAXED) != 0;
}

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static __thread float *scratch_data;
static __thread size_t scratch_size;
static void scratch_init(void) { pthread_key_create(&scratch_key, free); }

float *hone_scratch(size_t n) {
	if (n > scratch_size) {
		pthread_once(&scratch_once, scratch_init);
		free(scratch_data);
		scratch_data = aligned_alloc(64, ((n + W - 1) / W * W) * sizeof(float));
		if (!scratch_data) abort();
		scratch_size = n;
		pthread_setspecific(scratch_key, scratch_data);
	}
	return scratch_data;
}

// ---- one small matrix product -----------------------------------------------------------------------------------
// C[m][n] = (acc ? C : 0) + alpha * sum over k of A[m*am + k*ak] * B[k*ldb + n]; N is a multiple of 16.

// A tile is MR rows and NV vectors of C. The sizes are constants in macros, so that the sums are kept in registers: an
// array of a size that is a parameter lies in memory.
#define TILE(MR, NV)                                                                                                                  \
	static void tile_##MR##_##NV(int K, const float *A, size_t am, size_t ak, const float *B, size_t ldb, float *C, size_t ldc, float alpha, int acc) { \
		vec c[MR][NV];                                                                                                                  \
		_Pragma("GCC unroll 16") for (int i = 0; i < MR; i++) _Pragma("GCC unroll 4") for (int j = 0; j < NV; j++) c[i][j] = splat(0.f); \
		for (int k = 0; k < K; k++, A += ak, B += ldb) {                                                                                \
			vec b[NV];                                                                                                                  \
			_Pragma("GCC unroll 4") for (int j = 0; j < NV; j++) b[j] = load(B + j * W);                                                \
			_Pragma("GCC unroll 16") for (int i = 0; i < MR; i++) {                                                                     \
				float a = A[i * am];                                                                                                    \
				_Pragma("GCC unroll 4") for (int j = 0; j < NV; j++) c[i][j] += a * b[j];                                               \
			}                                                                                                                           \
		}                                                                                                                               \
		_Pragma("GCC unroll 16") for (int i = 0; i < MR; i++) _Pragma("GCC unroll 4") for (int j = 0; j < NV; j++) {                     \
			float *p = C + i * ldc + j * W;                                                                                             \
			vec v = alpha * c[i][j];                                                                                                    \
			store(p, acc ? load(p) + v : v);                                                                                            \
		}                                                                                                                               \
	}

#if defined(__AVX512F__) // 32 registers of one vec
TILE(6, 4)
TILE(4, 4)
TILE(2, 4)
TILE(1, 4)
TILE(12, 2)
TILE(6, 2)
TILE(2, 2)
TILE(1, 2)
TILE(14, 1)
TILE(7, 1)
TILE(3, 1)
TILE(1, 1)
#define ROWS(MR, NV) \
	for (; m + MR <= M; m += MR) tile_##MR##_##NV(K, A + m * am, am, ak, B + n, ldb, C + m * ldc + n, ldc, alpha, acc);
static void gemm(int M, int N, int K, const float *A, size_t am, size_t ak, const float *B, size_t ldb, float *C, size_t ldc, float alpha, int acc) {
	int n = 0;
	for (; n + 4 * W <= N; n += 4 * W) {
		int m = 0;
		ROWS(6, 4) ROWS(4, 4) ROWS(2, 4) ROWS(1, 4)
	}
	for (; n + 2 * W <= N; n += 2 * W) {
		int m = 0;
		ROWS(12, 2) ROWS(6, 2) ROWS(2, 2) ROWS(1, 2)
	}
	for (; n < N; n += W) {
		int m = 0;
		ROWS(14, 1) ROWS(7, 1) ROWS(3, 1) ROWS(1, 1)
	}
}
#else // 16 registers of half a vec (AVX2), or 32 of a quarter (NEON)
TILE(6, 1)
TILE(3, 1)
TILE(1, 1)
#define ROWS(MR, NV) \
	for (; m + MR <= M; m += MR) tile_##MR##_##NV(K, A + m * am, am, ak, B + n, ldb, C + m * ldc + n, ldc, alpha, acc);
static void gemm(int M, int N, int K, const float *A, size_t am, size_t ak, const float *B, size_t ldb, float *C, size_t ldc, float alpha, int acc) {
	for (int n = 0; n < N; n += W) {
		int m = 0;
		ROWS(6, 1) ROWS(3, 1) ROWS(1, 1)
	}
}
#endif

#if __has_builtin(__builtin_shufflevector)
INLINE void transpose16(const float *src, size_t lds, float *dst, size_t ldd) {
	vec r[W], t[W];
#pragma GCC unroll 16
	for (int i = 0; i < W; i++) r[i] = load(src + i * lds);
		// Four rounds, each merging row i of the upper half with row i of the lower half, transpose 2^4 x 2^4 elements.
#define ROUND(from, to)                                                                                                                  \
	_Pragma("GCC unroll 8") for (int i = 0; i < W / 2; i++) {                                                                             \
		to[2 * i] = __builtin_shufflevector(from[i], from[i + W / 2], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);            \
		to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + W / 2], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);  \
	}
	ROUND(r, t) ROUND(t, r) ROUND(r, t) ROUND(t, r)
#pragma GCC unroll 16
	for (int i = 0; i < W; i++) store(dst + i * ldd, r[i]);
}
#else
INLINE void transpose16(const float *src, size_t lds, float *dst, size_t ldd) {
	for (int r = 0; r < W; r++)
		for (int c = 0; c < W; c++) dst[c * ldd + r] = src[r * lds + c];
}
#endif

static void transpose(const float *src, size_t lds, int rows, int cols, float *dst, size_t ldd) {
	for (int r = 0; r < rows; r += W)
		for (int c = 0; c < cols; c += W) {
			if (rows - r >= W && cols - c >= W) {
				transpose16(src + r * lds + c, lds, dst + c * ldd + r, ldd);
				continue;
			}
			for (int i = c; i < cols && i < c + W; i++)
				for (int j = r; j < rows && j < r + W; j++) dst[i * ldd + j] = src[j * lds + i];
		}
}

// ---- helpers of the operations ----------------------------------------------------------------------------------

static const int32_t *params(const struct ggml_tensor *t) { return t->op_params + HONE_PARAM; }
static float paramf(const struct ggml_tensor *t, int i) {
	float f;
	memcpy(&f, params(t) + i, sizeof f);
	return f;
}

// share is the part [*from, *to) of n, in units of `unit`, that task ith of nth does.
static void share(int64_t n, int64_t unit, int ith, int nth, int64_t *from, int64_t *to) {
	int64_t units = (n + unit - 1) / unit;
	*from = units * ith / nth * unit;
	*to = units * (ith + 1) / nth * unit;
	if (*from > n) *from = n;
	if (*to > n) *to = n;
}

float hone_norm_inverse(const float *x, int64_t n, float eps) {
	vec s = splat(0.f);
	for (int64_t i = 0; i < n; i += W) s += load(x + i) * load(x + i);
	return 1.f / sqrtf(sum(s) / n + eps);
}

void hone_norm_scale(const float *x, float inverse, const float *gamma, float *y, int64_t n) {
	for (int64_t i = 0; i < n; i += W) store(y + i, load(x + i) * inverse * load(gamma + i));
}

static void op_rms_norm(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	const struct ggml_tensor *x = dst->src[0];
	int64_t D = x->ne[0], from, to;
	float eps = paramf(dst, 0);
	share(x->ne[1], 1, ith, nth, &from, &to);
	for (int64_t t = from; t < to; t++) {
		const float *row = (const float *)x->data + t * D;
		hone_norm_scale(row, hone_norm_inverse(row, D, eps), dst->src[1]->data, (float *)dst->data + t * D, D);
	}
}

static void op_rms_norm_back(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	const struct ggml_tensor *x = dst->src[0];
	const float *gamma = dst->src[1]->data, *dy = dst->src[2]->data;
	const float *residual = dst->src[3] ? dst->src[3]->data : NULL;
	int64_t D = x->ne[0], from, to;
	float eps = paramf(dst, 0);
	share(x->ne[1], 1, ith, nth, &from, &to);
	for (int64_t t = from; t < to; t++) {
		const float *xr = (const float *)x->data + t * D, *g = dy + t * D;
		float *out = (float *)dst->data + t * D;
		vec s = splat(0.f), p = splat(0.f);
		for (int64_t i = 0; i < D; i += W) {
			vec v = load(xr + i);
			s += v * v;
			p += v * load(gamma + i) * load(g + i);
		}
		float inv = 1.f / sqrtf(sum(s) / D + eps);
		float c = sum(p) * inv * inv * inv / D;
		for (int64_t i = 0; i < D; i += W) {
			vec v = load(gamma + i) * load(g + i) * inv - load(xr + i) * c;
			store(out + i, residual ? v + load(residual + t * D + i) : v);
		}
	}
}

void hone_swiglu(const float *gate, const float *up, float *y, int64_t n) {
	for (int64_t i = 0; i < n; i += W) {
		vec g = load(gate + i);
		store(y + i, g / (1.f + vexp(-g)) * load(up + i));
	}
}

static void op_swiglu(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	int64_t from, to;
	share(dst->ne[0] * dst->ne[1], W, ith, nth, &from, &to);
	hone_swiglu((const float *)dst->src[0]->data + from, (const float *)dst->src[1]->data + from, (float *)dst->data + from, to - from);
}

void hone_swiglu_back(const float *gate, const float *up, const float *dy, float *dgate, float *dup, int64_t n) {
	for (int64_t i = 0; i < n; i += W) {
		vec g = load(gate + i), d = load(dy + i);
		vec s = 1.f / (1.f + vexp(-g));
		store(dup + i, d * g * s);
		store(dgate + i, d * load(up + i) * s * (1.f + g * (1.f - s)));
	}
}

static void op_swiglu_back(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	const float *gate = dst->src[0]->data, *up = dst->src[1]->data, *dy = dst->src[2]->data;
	int64_t n = dst->src[0]->ne[0] * dst->src[0]->ne[1], from, to;
	float *dgate = dst->data, *dup = dgate + n;
	share(n, W, ith, nth, &from, &to);
	hone_swiglu_back(gate + from, up + from, dy + from, dgate + from, dup + from, to - from);
}

// ---- attention over a forest of segments --------------------------------------------------------------------------
// A query sees the keys of its segment's ancestors, root first, and those before it in its own segment: its path. The
// transposed keys of the current path are kept in scratch as a stack, so that segments that share ancestors share them.
//
// The units of work are a segment and a query head (forward), a tree and a query head (backward). A thread takes a run of
// units of about its share of the cost. In the backward pass the query heads of one key-value head each write keys' and
// values' gradients of their own, which HONE_SUM_HEADS adds: every sum has one order, whatever the number of threads.
// The probabilities are recomputed in the backward pass, QB queries at a time.

enum { QB = 32 };

struct attention {
	int d, H, K, group;
	size_t ldq, ldk;
	const float *q, *k, *v;
	const int32_t *table; // (start, end, parent) of each segment
	int n;                // segments
	int *base, *depth;    // tokens before the segment on its path; its number of ancestors
	int *order;           // segments tree by tree
	int *tree;            // the root of a segment
	int most;             // tokens of the longest path
	// The path whose keys lie in kt (and vt): segments path[0..levels).
	int *path, levels, kv;
	size_t ld; // of kt, vt and P
	float *kt, *vt, *P, *dP;
};

INLINE int start(const struct attention *a, int s) { return a->table[3 * s]; }
INLINE int length(const struct attention *a, int s) { return a->table[3 * s + 1] - a->table[3 * s]; }
INLINE int parent(const struct attention *a, int s) { return a->table[3 * s + 2]; }

// attention_of describes the operation and takes scratch memory for one thread.
static struct attention attention_of(const struct ggml_tensor *dst, int backward) {
	const int32_t *p = params(dst);
	struct attention a = {.d = p[0], .H = p[1], .K = p[2], .group = p[1] / p[2], .ldq = (size_t)p[0] * p[1], .ldk = (size_t)p[0] * p[2],
		.q = dst->src[0]->data, .k = dst->src[1]->data, .v = dst->src[2]->data, .table = dst->src[3]->data, .n = dst->src[3]->ne[1], .kv = -1};
	// The longest path decides how much scratch is needed, so it is found with the ancestors walked for each segment.
	for (int s = 0; s < a.n; s++) {
		int tokens = 0;
		for (int i = s; i >= 0; i = parent(&a, i)) tokens += length(&a, i);
		if (tokens > a.most) a.most = tokens;
	}
	a.ld = (a.most + W - 1) / W * W;
	size_t ints = ((size_t)6 * a.n + W - 1) / W * W, square = a.ld * a.d, strip = QB * a.ld;
	float *memory = hone_scratch(ints + (backward ? 2 : 1) * (square + strip));
	a.base = (int *)memory, a.depth = a.base + a.n, a.order = a.depth + a.n, a.tree = a.order + a.n, a.path = a.tree + a.n;
	a.kt = memory + ints, a.P = a.kt + square;
	if (backward) a.vt = a.P + strip, a.dP = a.vt + square;
	int *first = a.path + a.n; // of a tree's segments, in order
	for (int s = 0; s < a.n; s++) {
		int up = parent(&a, s);
		a.base[s] = up < 0 ? 0 : a.base[up] + length(&a, up);
		a.depth[s] = up < 0 ? 0 : a.depth[up] + 1;
		a.tree[s] = up < 0 ? s : a.tree[up];
		first[s] = 0;
	}
	for (int s = 0; s < a.n; s++) first[a.tree[s]]++;
	for (int s = 0, at = 0; s < a.n; s++) {
		int count = first[s];
		first[s] = at;
		at += count;
	}
	for (int s = 0; s < a.n; s++) a.order[first[a.tree[s]]++] = s;
	return a;
}

// enter makes kt (and vt) hold the transposed keys (and values) of the path to segment s for one key-value head.
static void enter(struct attention *a, int s, int kv) {
	if (kv != a->kv) a->levels = 0;
	a->kv = kv;
	int from = a->depth[s] + 1;
	for (int i = s; i >= 0 && !(a->depth[i] < a->levels && a->path[a->depth[i]] == i); i = parent(a, i)) a->path[from = a->depth[i]] = i;
	a->levels = a->depth[s] + 1;
	for (int l = from; l < a->levels; l++) {
		int i = a->path[l];
		size_t at = start(a, i) * a->ldk + (size_t)kv * a->d;
		transpose(a->k + at, a->ldk, length(a, i), a->d, a->kt + a->base[i], a->ld);
		if (a->vt) transpose(a->v + at, a->ldk, length(a, i), a->d, a->vt + a->base[i], a->ld);
	}
	size_t end = a->base[s] + length(a, s);
	if (end % W == 0) return;
	for (int c = 0; c < a->d; c++) // columns beyond the path are multiplied too
		for (size_t j = end; j % W; j++) {
			a->kt[c * a->ld + j] = 0;
			if (a->vt) a->vt[c * a->ld + j] = 0;
		}
}

// cost of a segment's queries for one head, in multiplications by d.
static double cost(const struct attention *a, int s) { return length(a, s) * (a->base[s] + 0.5 * length(a, s) + 16); }

// probabilities fills P [nq][ld] for the queries q0.. of one head, the first of which sees `seen` keys:
// softmax of q k^T / sqrt(d), zero beyond a query's own keys up to a multiple of W.
static void probabilities(const struct attention *a, const float *q, int nq, int seen) {
	int n = (seen + nq - 1 + W - 1) / W * W;
	gemm(nq, n, a->d, q, a->ldq, 1, a->kt, a->ld, a->P, a->ld, 1.f / sqrtf((float)a->d), 0);
	for (int i = 0; i < nq; i++) {
		float *p = a->P + i * a->ld;
		for (int j = seen + i; j < n; j++) p[j] = -INFINITY;
		vec m = load(p);
		for (int j = W; j < n; j += W) m = pick(m > load(p + j), m, load(p + j));
		float max = largest(m);
		vec s = splat(0.f);
		for (int j = 0; j < n; j += W) {
			vec e = vexp(load(p + j) - max);
			store(p + j, e);
			s += e;
		}
		float inv = 1.f / sum(s);
		for (int j = 0; j < n; j += W) store(p + j, load(p + j) * inv);
	}
}

static void op_attention(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	struct attention a = attention_of(dst, 0);
	double total = 0, done = 0;
	for (int s = 0; s < a.n; s++) total += a.H * cost(&a, s);
	for (int kv = 0; kv < a.K; kv++)
		for (int o = 0; o < a.n; o++)
			for (int h = kv * a.group, s = a.order[o]; h < (kv + 1) * a.group; h++) {
				int mine = done * nth >= total * ith && (done * nth < total * (ith + 1) || ith == nth - 1);
				done += cost(&a, s);
				if (!mine) continue;
				enter(&a, s, kv);
				size_t head = (size_t)h * a.d;
				for (int i = 0; i < length(&a, s); i += QB) {
					int nq = length(&a, s) - i < QB ? length(&a, s) - i : QB, seen = a.base[s] + i + 1, n = seen + nq - 1;
					size_t at = (start(&a, s) + i) * a.ldq + head;
					probabilities(&a, a.q + at, nq, seen);
					for (int l = 0; l < a.levels; l++) {
						int p = a.path[l], keys = length(&a, p) < n - a.base[p] ? length(&a, p) : n - a.base[p];
						gemm(nq, a.d, keys, a.P + a.base[p], a.ld, 1, a.v + start(&a, p) * a.ldk + (size_t)kv * a.d, a.ldk, (float *)dst->data + at, a.ldq, 1.f, l > 0);
					}
				}
			}
}

static void op_attention_back(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	struct attention a = attention_of(dst, 1);
	const float *dout = dst->src[4]->data;
	int64_t T = dst->src[0]->ne[1];
	float *dq = dst->data, *first = dq + T * a.ldq; // then dk and dv of each query head of a group
	float scale = 1.f / sqrtf((float)a.d);
	double total = 0, done = 0;
	for (int s = 0; s < a.n; s++) total += a.H * cost(&a, s);
	for (int o = 0, end; o < a.n; o = end) {
		double tree = 0;
		for (end = o; end < a.n && a.tree[a.order[end]] == a.tree[a.order[o]]; end++) tree += cost(&a, a.order[end]);
		for (int h = 0; h < a.H; h++) {
			int mine = done * nth >= total * ith && (done * nth < total * (ith + 1) || ith == nth - 1);
			done += tree;
			if (!mine) continue;
			int kv = h / a.group;
			size_t head = (size_t)h * a.d, khead = (size_t)kv * a.d;
			float *dk = first + (size_t)(h % a.group) * 2 * T * a.ldk, *dv = dk + T * a.ldk;
			for (int i = o; i < end; i++) {
				int s = a.order[i];
				for (int t = start(&a, s); t < start(&a, s) + length(&a, s); t++) {
					memset(dk + t * a.ldk + khead, 0, a.d * sizeof(float));
					memset(dv + t * a.ldk + khead, 0, a.d * sizeof(float));
				}
			}
			for (int segment = o; segment < end; segment++) {
				int s = a.order[segment];
				enter(&a, s, kv);
				for (int i = 0; i < length(&a, s); i += QB) {
					int nq = length(&a, s) - i < QB ? length(&a, s) - i : QB, seen = a.base[s] + i + 1, n = seen + nq - 1, np = (n + W - 1) / W * W;
					size_t at = (start(&a, s) + i) * a.ldq + head;
					probabilities(&a, a.q + at, nq, seen);
					gemm(nq, np, a.d, dout + at, a.ldq, 1, a.vt, a.ld, a.dP, a.ld, 1.f, 0);
					for (int l = 0; l < a.levels; l++) {
						int p = a.path[l], keys = length(&a, p) < n - a.base[p] ? length(&a, p) : n - a.base[p];
						gemm(keys, a.d, nq, a.P + a.base[p], 1, a.ld, dout + at, a.ldq, dv + start(&a, p) * a.ldk + khead, a.ldk, 1.f, 1);
					}
					for (int j = 0; j < nq; j++) {
						float *p = a.P + j * a.ld, *dp = a.dP + j * a.ld;
						vec dot = splat(0.f);
						for (int c = 0; c < np; c += W) dot += load(p + c) * load(dp + c);
						float mean = sum(dot);
						for (int c = 0; c < np; c += W) store(dp + c, load(p + c) * (load(dp + c) - mean));
					}
					for (int l = 0; l < a.levels; l++) {
						int p = a.path[l], keys = length(&a, p) < n - a.base[p] ? length(&a, p) : n - a.base[p];
						size_t key = start(&a, p) * a.ldk + khead;
						gemm(nq, a.d, keys, a.dP + a.base[p], a.ld, 1, a.k + key, a.ldk, dq + at, a.ldq, scale, l > 0);
						gemm(keys, a.d, nq, a.dP + a.base[p], 1, a.ld, a.q + at, a.ldq, dk + key, a.ldk, scale, 1);
					}
				}
			}
		}
	}
}

// op_sum_heads adds the keys' and values' gradients of a group's later query heads to those of its first one.
static void op_sum_heads(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	const int32_t *p = params(dst);
	int group = p[1] / p[2];
	int64_t T = dst->ne[1], n = 2 * T * p[0] * p[2], from, to;
	float *sum = (float *)dst->data + T * p[0] * p[1];
	share(n, W, ith, nth, &from, &to);
	for (int64_t i = from; i < to; i += W) {
		vec s = load(sum + i);
		for (int g = 1; g < group; g++) s += load(sum + g * n + i);
		store(sum + i, s);
	}
}

// ---- LoRA --------------------------------------------------------------------------------------------------------
// Dropout zeroes an element with probability p, rounded to a multiple of 2^-16, and multiplies the others by 1/(1-p), as
// torch.nn.Dropout. The mask is a hash of (token seed, module, element), so the backward pass finds it again: element
// i of a row's 32 takes the low half of hash i mod 16 if i < 16, else the high half.

INLINE uvec mix(uvec x) { // lowbias32
	x ^= x >> 16;
	x *= 0x7feb352du;
	x ^= x >> 15;
	x *= 0x846ca68bu;
	return x ^ (x >> 16);
}

struct dropout {
	const uint32_t *seeds;
	uint32_t module, threshold; // p * 2^16
	float keep;
};

static struct dropout dropout_of(const struct ggml_tensor *seeds, const int32_t *p) {
	struct dropout d = {seeds ? seeds->data : NULL, p[0], p[1], 0};
	d.keep = (float)(1.0 / (1.0 - d.threshold / 65536.0));
	return d;
}

static const uvec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// drop applies the mask of token t to elements [i0, i0+n) of its row, i0 a multiple of 32: y = x * mask / (1-p), added
// to y if acc.
INLINE void drop(const struct dropout *d, int64_t t, int64_t i0, int64_t n, const float *x, float *y, int acc) {
	uvec counter = ((uvec){} + (uint32_t)(i0 / 2) + lanes) * 0x85ebca6bu + (d->seeds[t] ^ (d->module * 0x9e3779b9u));
	uvec limit = (uvec){} + (d->threshold << 16);
	for (int64_t i = 0; i < n; i += 2 * W) {
		uvec h = mix(counter);
		counter += 0x85ebca6bu * W;
		vec v = pick((ivec)(h << 16 >= limit), load(x + i) * d->keep, splat(0.f));
		store(y + i, acc ? load(y + i) + v : v);
		if (i + W == n) break;
		v = pick((ivec)(h >= limit), load(x + i + W) * d->keep, splat(0.f));
		store(y + i + W, acc ? load(y + i + W) + v : v);
	}
}

// TB tokens at a time: their rows stay in the first or second-level cache.
enum { TB = 48, DOWN_TB = 28 };

static void op_lora_down(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	const struct ggml_tensor *x = dst->src[0], *w = dst->src[1];
	int64_t n = x->ne[0], r = w->ne[1], from, to;
	struct dropout drp = dropout_of(dst->src[2], params(dst));
	float *wt = hone_scratch(n * r + (drp.seeds ? DOWN_TB * n : 0)), *xd = wt + n * r;
	transpose(w->data, n, r, n, wt, r);
	share(x->ne[1], 1, ith, nth, &from, &to);
	for (int64_t t = from; t < to; t += DOWN_TB) {
		int m = to - t < DOWN_TB ? to - t : DOWN_TB;
		const float *xr = (const float *)x->data + t * n;
		if (drp.seeds) {
			for (int i = 0; i < m; i++) drop(&drp, t + i, 0, n, xr + i * n, xd + i * n, 0);
			xr = xd;
		}
		gemm(m, r, n, xr, n, 1, wt, r, (float *)dst->data + t * r, r, 1.f, 0);
	}
}

static void op_lora_up(struct ggml_tensor *dst, int ith, int nth, void *unused) {
	(void)unused;
	const struct ggml_tensor *u = dst->src[1], *w = dst->src[2];
	int64_t n = dst->ne[0], r = u->ne[0], from, to;
	float scale = paramf(dst, 2);
	struct dropout drp = dropout_of(dst->src[3], params(dst));
	share(dst->ne[1], 1, ith, nth, &from, &to);
	for (int64_t t = from; t < to; t += TB) {
		int m = to - t < TB ? to - t : TB;
		const float *ur = (const float *)u->data + t * r;
		float *y = (float *)dst->data + t * n;
		if (!drp.seeds) {
			gemm(m, n, r, ur, r, 1, w->data, n, y, n, scale, 1);
			continue;
		}
		float *tmp = hone_scratch(TB * n);
		gemm(m, n, r, ur, r, 1, w->data, n, tmp, n, scale, 0);
		for (int i = 0; i < m; i++) drop(&drp, t + i, 0, n, tmp + i * n, y + i * n, 1);
	}
}

static void op_lora_outer(struct ggml_tensor *dst, int ith, int nth, void *unused) {
	(void)unused;
	const struct ggml_tensor *u = dst->src[1], *x = dst->src[2];
	int64_t n = x->ne[0], r = u->ne[0], T = x->ne[1], from, to;
	float scale = paramf(dst, 2);
	struct dropout drp = dropout_of(dst->src[3], params(dst));
	share(n, 2 * W, ith, nth, &from, &to); // columns: each task sums over all tokens, in order
	if (from == to) return;
	for (int64_t t = 0; t < T; t += TB) {
		int m = T - t < TB ? T - t : TB;
		const float *xr = (const float *)x->data + t * n + from;
		size_t ldx = n;
		if (drp.seeds) {
			float *xd = hone_scratch(TB * (to - from));
			for (int i = 0; i < m; i++) drop(&drp, t + i, from, to - from, xr + i * n, xd + i * (to - from), 0);
			xr = xd;
			ldx = to - from;
		}
		gemm(r, to - from, m, (const float *)u->data + t * r, 1, r, xr, ldx, (float *)dst->data + from, n, scale, 1);
	}
}

// ---- loss --------------------------------------------------------------------------------------------------------

// op_cross_entropy takes the logits of a column once, for all the targets that share it.
static void op_cross_entropy(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	const int32_t *columns = dst->src[1]->data, *labels = dst->src[2]->data;
	float *stats = dst->src[3]->data;
	const float *weights = dst->src[4] ? dst->src[4]->data : NULL; // none: losses only, the logits are left as they are
	int64_t V = dst->ne[0], n = dst->src[2]->ne[0], whole = V / W * W, from, to, end = 0;
	float scale = paramf(dst, 0);
	int first = params(dst)[1];
	share(dst->ne[1], 1, ith, nth, &from, &to);
	for (int64_t t = from; t < to; t++) {
		float *x = (float *)dst->data + t * V;
		vec m = splat(-INFINITY);
		for (int64_t i = 0; i < whole; i += W) m = pick(m > load(x + i), m, load(x + i));
		float max = largest(m);
		for (int64_t i = whole; i < V; i++) max = x[i] > max ? x[i] : max;
		int64_t begin = end;
		while (begin < n && columns[begin] - first < t) begin++;
		double sum_weights = 0;
		for (end = begin; end < n && columns[end] - first == t; end++) {
			stats[2 * end] = max - x[labels[end]];
			stats[2 * end + 1] = x[labels[end]] >= max;
			if (weights) sum_weights += weights[end];
		}
		double z = 0;
		for (int64_t block = 0; block < whole; block += 64 * W) { // short float sums inside, double outside
			vec part = splat(0.f);
			int64_t stop = block + 64 * W < whole ? block + 64 * W : whole;
			for (int64_t i = block; i < stop; i += W) {
				vec e = vexp(load(x + i) - max);
				if (weights) store(x + i, e);
				part += e;
			}
			z += sum(part);
		}
		for (int64_t i = whole; i < V; i++) {
			float e = expf(x[i] - max);
			if (weights) x[i] = e;
			z += e;
		}
		for (int64_t i = begin; i < end; i++) stats[2 * i] = (float)(log(z) + stats[2 * i]);
		if (!weights) continue;
		float c = (float)(sum_weights * scale / z);
		for (int64_t i = 0; i < V; i++) x[i] *= c;
		for (int64_t i = begin; i < end; i++) x[labels[i]] -= weights[i] * scale;
	}
}

static void op_scatter_rows(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	int fresh = params(dst)[0]; // a new tensor is zeroed first
	const struct ggml_tensor *x = dst->src[fresh ? 0 : 1];
	const int32_t *index = dst->src[fresh ? 1 : 2]->data;
	int64_t D = dst->ne[0], from, to;
	share(dst->ne[1], 1, ith, nth, &from, &to);
	if (fresh) memset((float *)dst->data + from * D, 0, (to - from) * D * sizeof(float));
	for (int64_t i = 0; i < x->ne[1]; i++) {
		if (index[i] < from || index[i] >= to) continue;
		float *y = (float *)dst->data + index[i] * D;
		const float *v = (const float *)x->data + i * D;
		for (int64_t j = 0; j < D; j++) y[j] += v[j];
	}
}

static const ggml_custom_op_t ops[] = {
	[HONE_RMS_NORM] = op_rms_norm,         [HONE_RMS_NORM_BACK] = op_rms_norm_back, [HONE_SWIGLU] = op_swiglu,
	[HONE_SWIGLU_BACK] = op_swiglu_back,   [HONE_ATTENTION] = op_attention,         [HONE_ATTENTION_BACK] = op_attention_back,
	[HONE_SUM_HEADS] = op_sum_heads,
	[HONE_PAGED_STORE] = hone_op_paged_store, [HONE_PAGED_ATTENTION] = hone_op_paged_attention, [HONE_ADAPT] = hone_op_adapt,
	[HONE_PICK_ROWS] = hone_op_pick_rows,  [HONE_SWIGLU_ROWS] = hone_op_swiglu_rows,
	[HONE_LORA_DOWN] = op_lora_down,       [HONE_LORA_UP] = op_lora_up,             [HONE_LORA_OUTER] = op_lora_outer,
	[HONE_CROSS_ENTROPY] = op_cross_entropy, [HONE_SCATTER_ROWS] = op_scatter_rows,
	[HONE_QUANTIZE] = hone_op_quantize,    [HONE_MATMUL] = hone_op_matmul,       [HONE_PACK] = hone_op_pack,
	[HONE_NORM_QUANTIZE] = hone_op_norm_quantize,             [HONE_SWIGLU_QUANTIZE] = hone_op_swiglu_quantize,
	[HONE_SWIGLU_BACK_QUANTIZE] = hone_op_swiglu_back_quantize,
	[HONE_QUANTIZE_BYTES] = hone_op_quantize_bytes,           [HONE_NORM_QUANTIZE_BYTES] = hone_op_norm_quantize_bytes,
	[HONE_SWIGLU_QUANTIZE_BYTES] = hone_op_swiglu_quantize_bytes, [HONE_REPACKED_MATMUL] = hone_op_repacked_matmul,
};

static struct ggml_tensor *with_params(struct ggml_tensor *t, const int32_t *p, int n) {
	memcpy(t->op_params + HONE_PARAM, p, n * sizeof(int32_t));
	return t;
}

struct ggml_tensor *hone_custom(struct ggml_context *ctx, unsigned int type, int64_t ne0, int64_t ne1, struct ggml_tensor **args, int n_args, int op, const int32_t *p, int n_params) {
	return with_params(ggml_custom_4d(ctx, type, ne0, ne1, 1, 1, args, n_args, ops[op], HONE_GGML_N_TASKS_MAX, NULL), p, n_params);
}

struct ggml_tensor *hone_custom_inplace(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor **args, int n_args, int op, const int32_t *p, int n_params) {
	return with_params(ggml_custom_inplace(ctx, a, args, n_args, ops[op], HONE_GGML_N_TASKS_MAX, NULL), p, n_params);
}

// ---- conversion at load ------------------------------------------------------------------------------------------

static uint16_t bf16(float f) { // round to nearest even, as torch
	uint32_t u;
	memcpy(&u, &f, 4);
	if ((u & 0x7fffffff) > 0x7f800000) return (u >> 16) | 64; // quiet NaN
	return (u + (0x7fff + ((u >> 16) & 1))) >> 16;
}

void hone_to_bf16(const float *src, uint16_t *dst, int64_t n) {
	for (int64_t i = 0; i < n; i++) dst[i] = bf16(src[i]);
}

void hone_transpose_bf16(const float *src, uint16_t *dst, int64_t row0, int64_t nrows, int64_t cols, int64_t rows) {
	for (int64_t c = 0; c < cols; c++)
		for (int64_t r = 0; r < nrows; r++) dst[c * rows + row0 + r] = bf16(src[r * cols + c]);
}

void hone_transpose_f32(const float *src, float *dst, int64_t row0, int64_t nrows, int64_t cols, int64_t rows) {
	for (int64_t c = 0; c < cols; c++)
		for (int64_t r = 0; r < nrows; r++) dst[c * rows + row0 + r] = src[r * cols + c];
}
