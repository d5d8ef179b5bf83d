// Vectors of sixteen floats for the operations in C, which the compiler splits as the target needs.
#ifndef HONE_GGML_VECTOR_H
#define HONE_GGML_VECTOR_H

#include <stddef.h>
#include <stdint.h>

// Sixteen floats: one AVX-512 register, two of AVX2, four of NEON.
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

// vexp is e^x to about 1e-7 relative (Cephes expf's polynomial); x below -87 gives 0, NaN stays NaN.
INLINE vec vexp(vec x) {
	x = pick(x > splat(88.f), splat(88.f), x);
	ivec tiny = x < splat(-87.f);
	x = pick(tiny, splat(-87.f), x);
	// Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits, so that nothing is converted.
	vec shifted = x * splat(1.44269504088896341f) + splat(12582912.f);
	vec n = shifted - splat(12582912.f);
	x = x - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
	vec p = splat(1.9875691500e-4f);
	p = p * x + splat(1.3981999507e-3f);
	p = p * x + splat(8.3334519073e-3f);
	p = p * x + splat(4.1665795894e-2f);
	p = p * x + splat(1.6666665459e-1f);
	p = p * x + splat(5.0000001201e-1f);
	p = p * x * x + x + splat(1.f);
	uvec e = ((uvec)shifted - 0x4b400000u + 127u) << 23;
	return pick(tiny, splat(0.f), p * (vec)e);
}

INLINE float largest(vec v) {
	float m = v[0];
	for (int i = 1; i < W; i++) m = m > v[i] ? m : v[i];
	return m;
}

// hone_scratch is memory of the calling thread, at least n floats, kept for its next call and freed when the thread ends.
float *hone_scratch(size_t n);

#endif
