// Prints what repacked.c computes out of pseudo-random weights and activations, one line a product, so that builds for
// different instruction sets can be compared bit for bit. The weights are random bytes, but for the high bits of what may
// be float16 scales.
#include "../repacked.c"

#include <stdio.h>
#include <stdlib.h>

// The fused producers are not part of the comparison.
float hone_norm_inverse(const float *x, int64_t n, float eps) { return x[0] * n * eps; }
void hone_norm_scale(const float *x, float inverse, const float *gamma, float *y, int64_t n) {
	for (int64_t i = 0; i < n; i++) y[i] = x[i] * inverse * gamma[i];
}
void hone_swiglu(const float *gate, const float *up, float *y, int64_t n) {
	for (int64_t i = 0; i < n; i++) y[i] = gate[i] * up[i];
}

static uint32_t state = 1;
static uint32_t next(void) {
	state ^= state << 13;
	state ^= state >> 17;
	return state ^= state << 5;
}

static void *memory(size_t n) {
	void *p = aligned_alloc(64, (n + 63) / 64 * 64);
	if (!p) abort();
	memset(p, 0xff, (n + 63) / 64 * 64);
	return p;
}

int main(void) {
	static const struct { unsigned int type; int bytes, elements, halves[2]; } types[] = {
		{Q4_0, 18, 32, {0, 0}}, {Q4_1, 20, 32, {0, 2}}, {Q5_0, 22, 32, {0, 0}}, {Q5_1, 24, 32, {0, 2}}, {Q8_0, 34, 32, {0, 0}},
		{Q4_K, 144, 256, {0, 2}}, {Q5_K, 176, 256, {0, 2}}, {Q6_K, 210, 256, {208, 208}}, {IQ4_NL, 18, 32, {0, 0}},
	};
	const int64_t in = 768, out = 43;
	for (size_t k = 0; k < sizeof types / sizeof *types; k++) {
		int64_t row = in / types[k].elements * types[k].bytes;
		uint8_t *stored = memory(row * out);
		for (int64_t i = 0; i < row * out; i++) stored[i] = next();
		for (int64_t i = 0; i < row * out; i += types[k].bytes)
			for (int h = 0; h < 2; h++) stored[i + types[k].halves[h] + 1] &= 0xbf; // below 2 in magnitude, no infinity
		int kind = hone_repacked_kind(types[k].type);
		void *w = memory(hone_repacked_bytes(kind, in, out));
		hone_repack(types[k].type, stored, w, 0, out, in, out);
		for (int64_t tokens = 1; tokens < 14; tokens++) {
			float *x = memory(in * tokens * sizeof *x), *y = memory(out * tokens * sizeof *y);
			for (int64_t i = 0; i < in * tokens; i++) x[i] = ((int32_t)next() % 65536) * (1.f / (1 << i / 32 % 9));
			struct ggml_tensor v = {.ne = {in, tokens, 1, 1}, .data = x}, matrix = {.data = w};
			struct ggml_tensor groups = {.src = {&v}, .data = memory(hone_groups_bytes(in, tokens))};
			struct ggml_tensor result = {.src = {&matrix, &groups}, .ne = {out, tokens, 1, 1}, .data = y};
			result.op_params[HONE_PARAM] = kind;
			result.op_params[HONE_PARAM + 1] = in;
			hone_op_quantize_bytes(&groups, 0, 1, NULL);
			hone_op_repacked_matmul(&result, 0, 1, NULL);
			uint64_t hash = 14695981039346656037u; // FNV-1a
			for (size_t i = 0; i < out * tokens * sizeof *y; i++) hash = (hash ^ ((uint8_t *)y)[i]) * 1099511628211u;
			printf("type %u, %d tokens: %016llx, first %a\n", types[k].type, (int)tokens, (unsigned long long)hash, y[0]);
			free(groups.data);
			free(x);
			free(y);
		}
		free(stored);
		free(w);
	}
	return 0;
}
