// Compares what paged.c computes with double loops, for the instruction set that it was compiled for. The cache is full of
// NaN where nothing was stored, and its pages are out of order.
#include "../paged.c"

#include <stdio.h>
#include <stdlib.h>

float hone_norm_inverse(const float *x, int64_t n, float eps) {
	double s = 0;
	for (int64_t i = 0; i < n; i++) s += x[i] * x[i];
	return 1 / sqrt(s / n + eps);
}
void hone_norm_scale(const float *x, float inverse, const float *gamma, float *y, int64_t n) {
	for (int64_t i = 0; i < n; i++) y[i] = x[i] * inverse * gamma[i];
}
void hone_swiglu(const float *gate, const float *up, float *y, int64_t n) {
	for (int64_t i = 0; i < n; i++) y[i] = gate[i] * up[i];
}
float *hone_scratch(size_t n) {
	static float *p;
	free(p);
	return p = malloc(n * sizeof *p);
}

static uint32_t state = 1;
static float next(void) {
	state ^= state << 13;
	state ^= state >> 17;
	state ^= state << 5;
	return (int32_t)state * 0x1p-31f;
}

static void *memory(size_t n) {
	void *p = aligned_alloc(64, (n + 63) / 64 * 64);
	if (!p) abort();
	memset(p, 0xff, (n + 63) / 64 * 64);
	return p;
}

static void check(const char *what, int d, double error, double bound) {
	printf("%s, heads of %d: relative error %.2g\n", what, d, error);
	if (!(error < bound)) exit(1);
}

// T tokens of one sequence, the last ones as a part of their own.
static void attention(int d, bool q8) {
	enum { H = 6, K = 2, T = 53, LAST = 3, PAGES = 9 };
	int width = d * (H + 2 * K), dims = d / 2, bytes = hone_page_bytes(d, K, q8);
	float *x = memory(T * width * sizeof *x), *y = memory(T * width * sizeof *y), *table = memory(T * dims * sizeof *table), *out = memory(T * d * H * sizeof *out);
	int32_t cells[T], positions[T], pages[PAGES] = {7, 2, 0, 5}, index[2 * HONE_PLAN_HEADER + 8 * T * H];
	for (int t = 0; t < T; t++) cells[t] = pages[t / PAGE] * PAGE + t % PAGE, positions[t] = t;
	for (int i = 0; i < T * width; i++) x[i] = y[i] = next() * 2;
	hone_rope_table(table, positions, T, dims, 10000, 1, NULL);
	struct ggml_tensor product = {.ne = {width, T, 1, 1}, .data = y}, rope = {.data = table}, cell = {.data = cells}, cache = {.data = memory(PAGES * bytes)};
	struct ggml_tensor stored = {.ne = {width, T, 1, 1}, .data = y, .src = {&product, &product, &product, &rope, &rope, &rope, &cell, &cache}};
	int32_t p[] = {d, H, K, dims, HONE_STORE_NEOX | (q8 ? HONE_STORE_Q8 : 0), 0};
	memcpy(stored.op_params + HONE_PARAM, p, sizeof p);
	for (int i = 0; i < 3; i++) hone_op_paged_store(&stored, i, 3, NULL);
	struct ggml_tensor tables = {.ne = {PAGES, 1, 1, 1}, .data = pages}, plan = {.data = index};
	struct ggml_tensor result = {.ne = {d * H, T, 1, 1}, .data = out, .src = {&stored, &cache, &tables, &plan}};
	int32_t r[] = {d, H, K, q8};
	memcpy(result.op_params + HONE_PARAM, r, sizeof r);
	struct hone_unit *units = (struct hone_unit *)(index + HONE_PLAN_HEADER);
	index[0] = 0;
	for (int from = 0; from < T; from += 13)
		for (int kv = 0; kv < K; kv++)
			for (int h = 0; h < 3; h += 1 + kv) // single heads, or two and one
				units[index[0]++] = (struct hone_unit){from, T - from < 13 ? T - from : 13, from, 0, kv, h, kv == 1 && h == 0 ? 2 : 1, 0};
	for (int i = 0; i < 4; i++) hone_op_paged_attention(&result, i, 4, NULL);
	double worst = 0;
	for (int t = 0; t < T; t++)
		for (int h = 0; h < H; h++) {
			double s[T], sum = 0, top = -1e30, difference = 0, size = 0;
			for (int j = 0; j <= t; j++) {
				s[j] = 0;
				for (int i = 0; i < d; i++) s[j] += y[t * width + h * d + i] * y[j * width + (H + h / 3) * d + i] / sqrt(d);
				top = s[j] > top ? s[j] : top;
			}
			for (int j = 0; j <= t; j++) sum += s[j] = exp(s[j] - top);
			for (int i = 0; i < d; i++) {
				double want = 0, got = out[(t * H + h) * d + i];
				for (int j = 0; j <= t; j++) want += s[j] / sum * x[j * width + (H + K + h / 3) * d + i];
				difference += (got - want) * (got - want), size += want * want;
			}
			double e = sqrt(difference / size);
			worst = e > worst || e != e ? e : worst;
		}
	check(q8 ? "q8_0" : "f16", d, worst, q8 ? 0.03 : 2e-3);
}

static void halves(void) { // float16 and back, for all that are numbers
	for (uint32_t h = 0; h < 0x10000; h++)
		if ((h & 0x7fff) <= 0x7c00 && to_half(from_half(h)) != h) {
			printf("float16 %04x becomes %04x\n", h, to_half(from_half(h)));
			exit(1);
		}
}

static void adapter(int rank) {
	enum { IN = 48, OUT = 80, T = 7 };
	float *x = memory(T * IN * sizeof *x), *y = memory(T * OUT * sizeof *y), *a = memory(rank * IN * sizeof *a), *b = memory(rank * OUT * sizeof *b), before[T * OUT];
	for (int i = 0; i < T * IN; i++) x[i] = next();
	for (int i = 0; i < T * OUT; i++) before[i] = y[i] = next();
	for (int i = 0; i < rank * IN; i++) a[i] = next();
	for (int i = 0; i < rank * OUT; i++) b[i] = next();
	struct hone_pair pairs[] = {{a, b, rank, IN, OUT, 1.5f}};
	struct hone_adapter adapter = {pairs};
	struct { int32_t tasks, slices; struct hone_rows rows[2]; } table = {4, 2, {{0, 5, &adapter}, {6, 1, &adapter}}};
	struct ggml_tensor tx = {.ne = {IN, T, 1, 1}, .data = x}, ty = {.ne = {OUT, T, 1, 1}, .data = y}, tt = {.data = &table};
	struct ggml_tensor result = {.ne = {OUT, T, 1, 1}, .data = y, .src = {&ty, &tx, &tt}};
	result.op_params[HONE_PARAM + 1] = 1;
	for (int i = 0; i < 4; i++) hone_op_adapt(&result, i, 4, NULL);
	double worst = 0;
	for (int t = 0; t < T; t++)
		for (int o = 0; o < OUT; o++) {
			double want = before[t * OUT + o];
			for (int r = 0; r < rank && t != 5; r++)
				for (int i = 0; i < IN; i++) want += 1.5 * b[r * OUT + o] * a[r * IN + i] * x[t * IN + i];
			double e = fabs(y[t * OUT + o] - want);
			worst = e > worst || e != e ? e : worst;
		}
	check("adapter", rank, worst, 1e-4);
}

int main(void) {
	halves();
	for (int d = 16; d <= 160; d += 16) {
		attention(d, false);
		if (d % 32 == 0) attention(d, true);
	}
	for (int rank = 1; rank < 20; rank += 3) adapter(rank);
}
