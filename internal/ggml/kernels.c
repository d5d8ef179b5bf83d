#include "kernels.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

// Sixteen floats: one AVX-512 register, two of AVX2, four of NEON; the compiler splits as the target needs.
typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(4)));
enum { W = 16 };

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec splat(float x) { return x - (vec){}; }

INLINE float sum(vec v) {
	float s = 0;
	for (int i = 0; i < W; i++) s += v[i];
	return s;
}

INLINE vec pick(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

// vexp is e^x to about 1e-7 relative (Cephes expf's polynomial); x below -87 gives 0.
INLINE vec vexp(vec x) {
	x = pick(x < splat(88.f), x, splat(88.f));
	ivec tiny = x < splat(-87.f);
	x = pick(tiny, splat(-87.f), x);
	vec t = x * splat(1.44269504088896341f);
	vec magic = splat(12582912.f); // 1.5 * 2^23: rounds to nearest
	vec n = (t + magic) - magic;
	x = x - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
	vec p = splat(1.9875691500e-4f);
	p = p * x + splat(1.3981999507e-3f);
	p = p * x + splat(8.3334519073e-3f);
	p = p * x + splat(4.1665795894e-2f);
	p = p * x + splat(1.6666665459e-1f);
	p = p * x + splat(5.0000001201e-1f);
	p = p * x * x + x + splat(1.f);
	ivec e = (__builtin_convertvector(n, ivec) + 127) << 23;
	return pick(tiny, splat(0.f), p * (vec)e);
}

bool hone_watch_callback(void *data) {
	struct hone_watch *w = data;
	__atomic_add_fetch(&w->nodes, 1, __ATOMIC_RELAXED);
	return __atomic_load_n(&w->stop, __ATOMIC_RELAXED) != 0;
}

// Scratch memory of the calling thread, at least n floats, kept for its next call and freed when the thread ends.
static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static __thread float *scratch_data;
static __thread size_t scratch_size;
static void scratch_init(void) { pthread_key_create(&scratch_key, free); }
static float *scratch(size_t n) {
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

INLINE void tile(const int MR, const int NV, int K, const float *A, size_t am, size_t ak, const float *B, size_t ldb, float *C, size_t ldc, float alpha, int acc) {
	vec c[MR][NV];
	for (int i = 0; i < MR; i++)
		for (int j = 0; j < NV; j++) c[i][j] = splat(0.f);
	for (int k = 0; k < K; k++) {
		vec b[NV];
		for (int j = 0; j < NV; j++) b[j] = load(B + k * ldb + j * W);
		for (int i = 0; i < MR; i++) {
			float a = A[i * am + k * ak];
			for (int j = 0; j < NV; j++) c[i][j] += a * b[j];
		}
	}
	for (int i = 0; i < MR; i++)
		for (int j = 0; j < NV; j++) {
			float *p = C + i * ldc + j * W;
			vec v = alpha * c[i][j];
			store(p, acc ? load(p) + v : v);
		}
}

#define COLUMNS(NV, MR)                                                                       \
	for (; n + NV * W <= N; n += NV * W) {                                                    \
		int m = 0;                                                                            \
		for (; m + MR <= M; m += MR) tile(MR, NV, K, A + m * am, am, ak, B + n, ldb, C + m * ldc + n, ldc, alpha, acc); \
		for (; m < M; m++) tile(1, NV, K, A + m * am, am, ak, B + n, ldb, C + m * ldc + n, ldc, alpha, acc); \
	}

static void gemm(int M, int N, int K, const float *A, size_t am, size_t ak, const float *B, size_t ldb, float *C, size_t ldc, float alpha, int acc) {
	int n = 0;
	COLUMNS(4, 6)
	COLUMNS(2, 8)
	COLUMNS(1, 12)
}

static void transpose(const float *src, size_t lds, int rows, int cols, float *dst, size_t ldd) {
	for (int r0 = 0; r0 < rows; r0 += W)
		for (int c = 0; c < cols; c++)
			for (int r = r0; r < rows && r < r0 + W; r++) dst[c * ldd + r] = src[r * lds + c];
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

static void op_rms_norm(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	const struct ggml_tensor *x = dst->src[0];
	const float *gamma = dst->src[1]->data;
	int64_t D = x->ne[0], from, to;
	float eps = paramf(dst, 0);
	share(x->ne[1], 1, ith, nth, &from, &to);
	for (int64_t t = from; t < to; t++) {
		const float *xr = (const float *)x->data + t * D;
		float *y = (float *)dst->data + t * D;
		vec s = splat(0.f);
		for (int64_t i = 0; i < D; i += W) s += load(xr + i) * load(xr + i);
		float inv = 1.f / sqrtf(sum(s) / D + eps);
		for (int64_t i = 0; i < D; i += W) store(y + i, load(xr + i) * inv * load(gamma + i));
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

static void op_swiglu(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	const float *gate = dst->src[0]->data, *up = dst->src[1]->data;
	float *y = dst->data;
	int64_t from, to;
	share(dst->ne[0] * dst->ne[1], W, ith, nth, &from, &to);
	for (int64_t i = from; i < to; i += W) {
		vec g = load(gate + i);
		store(y + i, g / (1.f + vexp(-g)) * load(up + i));
	}
}

static void op_swiglu_back(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	const float *gate = dst->src[0]->data, *up = dst->src[1]->data, *dy = dst->src[2]->data;
	int64_t n = dst->src[0]->ne[0] * dst->src[0]->ne[1], from, to;
	float *dgate = dst->data, *dup = dgate + n;
	share(n, W, ith, nth, &from, &to);
	for (int64_t i = from; i < to; i += W) {
		vec g = load(gate + i), d = load(dy + i);
		vec s = 1.f / (1.f + vexp(-g));
		store(dup + i, d * g * s);
		store(dgate + i, d * load(up + i) * s * (1.f + g * (1.f - s)));
	}
}

// ---- attention: causal, inside each row only ---------------------------------------------------------------------
// One task is one row and one key-value head with its group of query heads, so that nothing is summed across tasks.
// The probabilities are recomputed in the backward pass, 32 queries at a time.

enum { QB = 32 };

struct attention {
	int d, H, K;
	const float *q, *k, *v;
	const int32_t *rows;
	int64_t nrows;
};

static struct attention attention_of(const struct ggml_tensor *dst) {
	const int32_t *p = params(dst);
	struct attention a = {p[0], p[1], p[2], dst->src[0]->data, dst->src[1]->data, dst->src[2]->data, dst->src[3]->data, dst->src[3]->ne[0] - 1};
	return a;
}

// probabilities fills P [nq][ld] for queries i0.. of one head: softmax over keys 0..i of q k^T / sqrt(d); zero beyond.
static void probabilities(const struct attention *a, const float *q, size_t ldq, const float *kt, int i0, int nq, int ld, float *P) {
	int n = (i0 + nq + W - 1) / W * W;
	gemm(nq, n, a->d, q + i0 * ldq, ldq, 1, kt, ld, P, ld, 1.f / sqrtf((float)a->d), 0);
	for (int i = 0; i < nq; i++) {
		float *p = P + (size_t)i * ld;
		int len = i0 + i + 1;
		for (int j = len; j < n; j++) p[j] = -INFINITY;
		vec m = load(p);
		for (int j = W; j < n; j += W) m = pick(m > load(p + j), m, load(p + j));
		float max = m[0];
		for (int j = 1; j < W; j++) max = max > m[j] ? max : m[j];
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
	struct attention a = attention_of(dst);
	int group = a.H / a.K, d = a.d;
	for (int64_t task = ith; task < a.nrows * a.K; task += nth) {
		int64_t row = task / a.K, kv = task % a.K;
		int64_t t0 = a.rows[row];
		int L = a.rows[row + 1] - t0, ld = (L + W - 1) / W * W;
		size_t ldq = (size_t)d * a.H, ldk = (size_t)d * a.K;
		float *kt = scratch((size_t)ld * d + (size_t)QB * ld), *P = kt + (size_t)ld * d;
		memset(kt, 0, (size_t)ld * d * sizeof(float));
		transpose(a.k + t0 * ldk + kv * d, ldk, L, d, kt, ld);
		for (int h = 0; h < group; h++) {
			size_t off = t0 * ldq + (kv * group + h) * d;
			for (int i0 = 0; i0 < L; i0 += QB) {
				int nq = L - i0 < QB ? L - i0 : QB;
				probabilities(&a, a.q + off, ldq, kt, i0, nq, ld, P);
				gemm(nq, d, i0 + nq, P, ld, 1, a.v + t0 * ldk + kv * d, ldk, (float *)dst->data + off + i0 * ldq, ldq, 1.f, 0);
			}
		}
	}
}

static void op_attention_back(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	struct attention a = attention_of(dst);
	const float *dout = dst->src[4]->data;
	int64_t T = dst->src[0]->ne[1];
	int group = a.H / a.K, d = a.d;
	size_t ldq = (size_t)d * a.H, ldk = (size_t)d * a.K;
	float *dq = dst->data, *dk = dq + T * ldq, *dv = dk + T * ldk;
	float scale = 1.f / sqrtf((float)d);
	for (int64_t task = ith; task < a.nrows * a.K; task += nth) {
		int64_t row = task / a.K, kv = task % a.K;
		int64_t t0 = a.rows[row];
		int L = a.rows[row + 1] - t0, ld = (L + W - 1) / W * W;
		size_t square = (size_t)ld * d, strip = (size_t)QB * ld;
		float *kt = scratch(2 * square + 2 * strip), *vt = kt + square, *P = vt + square, *dP = P + strip;
		const float *k = a.k + t0 * ldk + kv * d, *v = a.v + t0 * ldk + kv * d;
		float *dkr = dk + t0 * ldk + kv * d, *dvr = dv + t0 * ldk + kv * d;
		memset(kt, 0, 2 * square * sizeof(float));
		transpose(k, ldk, L, d, kt, ld);
		transpose(v, ldk, L, d, vt, ld);
		for (int i = 0; i < L; i++) {
			memset(dkr + i * ldk, 0, d * sizeof(float));
			memset(dvr + i * ldk, 0, d * sizeof(float));
		}
		for (int h = 0; h < group; h++) {
			size_t off = t0 * ldq + (kv * group + h) * d;
			const float *q = a.q + off, *g = dout + off;
			for (int i0 = 0; i0 < L; i0 += QB) {
				int nq = L - i0 < QB ? L - i0 : QB, n = i0 + nq, np = (n + W - 1) / W * W;
				probabilities(&a, q, ldq, kt, i0, nq, ld, P);
				gemm(n, d, nq, P, 1, ld, g + i0 * ldq, ldq, dvr, ldk, 1.f, 1);
				gemm(nq, np, d, g + i0 * ldq, ldq, 1, vt, ld, dP, ld, 1.f, 0);
				for (int i = 0; i < nq; i++) {
					float *p = P + (size_t)i * ld, *dp = dP + (size_t)i * ld;
					vec s = splat(0.f);
					for (int j = 0; j < np; j += W) s += load(p + j) * load(dp + j);
					float mean = sum(s);
					for (int j = 0; j < np; j += W) store(dp + j, load(p + j) * (load(dp + j) - mean));
				}
				gemm(nq, d, n, dP, ld, 1, k, ldk, dq + off + i0 * ldq, ldq, scale, 0);
				gemm(n, d, nq, dP, 1, ld, q + i0 * ldq, ldq, dkr, ldk, scale, 1);
			}
		}
	}
}

// ---- LoRA --------------------------------------------------------------------------------------------------------
// Dropout zeroes an element with probability p = threshold / 2^32 and multiplies the others by 1/(1-p), as
// torch.nn.Dropout. The mask is a hash of (token seed, module, element), so the backward pass finds it again.

INLINE uvec mix(uvec x) { // lowbias32
	x ^= x >> 16;
	x *= 0x7feb352du;
	x ^= x >> 15;
	x *= 0x846ca68bu;
	return x ^ (x >> 16);
}

struct dropout {
	const uint32_t *seeds;
	uint32_t module, threshold;
	float keep;
};

static struct dropout dropout_of(const struct ggml_tensor *seeds, const int32_t *p) {
	struct dropout d = {seeds ? seeds->data : NULL, p[0], p[1], 0};
	d.keep = (float)(1.0 / (1.0 - d.threshold / 4294967296.0));
	return d;
}

static const uvec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// drop applies the mask of token t to elements [i0, i0+n) of its row: y = x * mask / (1-p), added to y if acc.
static void drop(const struct dropout *d, int64_t t, int64_t i0, int64_t n, const float *x, float *y, int acc) {
	uint32_t key = d->seeds[t] ^ (d->module * 0x9e3779b9u);
	for (int64_t i = 0; i < n; i += W) {
		uvec h = mix(((uvec){} + (uint32_t)(i0 + i) + lanes) * 0x85ebca6bu + key);
		vec v = pick((ivec)(h >= d->threshold), load(x + i) * d->keep, splat(0.f));
		store(y + i, acc ? load(y + i) + v : v);
	}
}

enum { TB = 48 }; // tokens at a time: their rows stay in the second-level cache

static void op_lora_down(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	const struct ggml_tensor *x = dst->src[0], *w = dst->src[1];
	int64_t n = x->ne[0], r = w->ne[1], from, to;
	struct dropout drp = dropout_of(dst->src[2], params(dst));
	float *wt = scratch(n * r + (drp.seeds ? TB * n : 0)), *xd = wt + n * r;
	transpose(w->data, n, r, n, wt, r);
	share(x->ne[1], 1, ith, nth, &from, &to);
	for (int64_t t = from; t < to; t += TB) {
		int m = to - t < TB ? to - t : TB;
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
		float *tmp = scratch(TB * n);
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
	share(n, W, ith, nth, &from, &to); // columns: each task sums over all tokens, in order
	if (from == to) return;
	for (int64_t t = 0; t < T; t += TB) {
		int m = T - t < TB ? T - t : TB;
		const float *xr = (const float *)x->data + t * n + from;
		size_t ldx = n;
		if (drp.seeds) {
			float *xd = scratch(TB * n);
			for (int i = 0; i < m; i++) drop(&drp, t + i, from, to - from, xr + i * n, xd + i * (to - from), 0);
			xr = xd;
			ldx = to - from;
		}
		gemm(r, to - from, m, (const float *)u->data + t * r, 1, r, xr, ldx, (float *)dst->data + from, n, scale, 1);
	}
}

// ---- loss --------------------------------------------------------------------------------------------------------

static void op_cross_entropy(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	const int32_t *labels = dst->src[1]->data;
	const float *weights = dst->src[2]->data;
	float *stats = dst->src[3]->data;
	int64_t V = dst->ne[0], from, to;
	float scale = paramf(dst, 0);
	share(dst->ne[1], 1, ith, nth, &from, &to);
	for (int64_t t = from; t < to; t++) {
		float *x = (float *)dst->data + t * V;
		float max = x[0];
		for (int64_t i = 1; i < V; i++) max = x[i] > max ? x[i] : max;
		float label = x[labels[t]];
		double z = 0;
		int64_t i = 0;
		for (; i + W <= V; i += W) {
			vec e = vexp(load(x + i) - max);
			store(x + i, e);
			z += sum(e);
		}
		for (; i < V; i++) z += x[i] = expf(x[i] - max);
		stats[2 * t] = (float)(log(z) + max - label);
		stats[2 * t + 1] = label >= max;
		float c = (float)(weights[t] * scale / z);
		for (i = 0; i < V; i++) x[i] *= c;
		x[labels[t]] -= weights[t] * scale;
	}
}

static void op_scatter_rows(struct ggml_tensor *dst, int ith, int nth, void *u) {
	(void)u;
	int fresh = params(dst)[0]; // a new tensor is zeroed; in place, rows are written over what is there
	const struct ggml_tensor *x = dst->src[fresh ? 0 : 1];
	const int32_t *index = dst->src[fresh ? 1 : 2]->data;
	int64_t D = dst->ne[0], from, to;
	share(dst->ne[1], 1, ith, nth, &from, &to);
	if (fresh) memset((float *)dst->data + from * D, 0, (to - from) * D * sizeof(float));
	for (int64_t i = 0; i < x->ne[1]; i++)
		if (index[i] >= from && index[i] < to) memcpy((float *)dst->data + index[i] * D, (const float *)x->data + i * D, D * sizeof(float));
}

static const ggml_custom_op_t ops[] = {
	[HONE_RMS_NORM] = op_rms_norm,         [HONE_RMS_NORM_BACK] = op_rms_norm_back, [HONE_SWIGLU] = op_swiglu,
	[HONE_SWIGLU_BACK] = op_swiglu_back,   [HONE_ATTENTION] = op_attention,         [HONE_ATTENTION_BACK] = op_attention_back,
	[HONE_LORA_DOWN] = op_lora_down,       [HONE_LORA_UP] = op_lora_up,             [HONE_LORA_OUTER] = op_lora_outer,
	[HONE_CROSS_ENTROPY] = op_cross_entropy, [HONE_SCATTER_ROWS] = op_scatter_rows,
};

static struct ggml_tensor *with_params(struct ggml_tensor *t, const int32_t *p, int n) {
	memcpy(t->op_params + HONE_PARAM, p, n * sizeof(int32_t));
	return t;
}

struct ggml_tensor *hone_custom(struct ggml_context *ctx, int64_t ne0, int64_t ne1, struct ggml_tensor **args, int n_args, int op, const int32_t *p, int n_params) {
	return with_params(ggml_custom_4d(ctx, HONE_GGML_TYPE_F32, ne0, ne1, 1, 1, args, n_args, ops[op], HONE_GGML_N_TASKS_MAX, NULL), p, n_params);
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
