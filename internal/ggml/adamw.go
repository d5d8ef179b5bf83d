package ggml

/*
#include <math.h>
#include <stdint.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

// sqrtf that sets no errno is one instruction for many elements.
__attribute__((optimize("no-math-errno"))) static void adamw(float *restrict p, const float *restrict g, float *restrict m, float *restrict v, int64_t n,
		float scale, float decay, float size, float root, float b1, float b2, float eps) {
#ifdef __SSE__
	// Moments below 1e-38, which change nothing, are a hundred times slower than 0.
	unsigned int mode = _mm_getcsr();
	_mm_setcsr(mode | 0x8040);
#endif
	for (int64_t i = 0; i < n; i++) {
		float gi = g[i] * scale;
		m[i] += (gi - m[i]) * (1 - b1);
		v[i] = v[i] * b2 + gi * gi * (1 - b2);
		p[i] = p[i] * decay - size * m[i] / (sqrtf(v[i]) * root + eps);
	}
#ifdef __SSE__
	_mm_setcsr(mode);
#endif
}
*/
import "C"

// AdamW does one step of the optimizer on parameters with their gradients and moments, all of one length:
//
//	g = scale * gradient; first += (g - first)(1 - beta1); second = beta2 second + g^2 (1 - beta2)
//	parameter = decay * parameter - size * first / (root * sqrt(second) + epsilon)
func AdamW(parameters, gradients, first, second []float32, scale, decay, size, root, beta1, beta2, epsilon float32) {
	if n := len(parameters); n > 0 && len(gradients) == n && len(first) == n && len(second) == n {
		C.adamw((*C.float)(&parameters[0]), (*C.float)(&gradients[0]), (*C.float)(&first[0]), (*C.float)(&second[0]), C.int64_t(n),
			C.float(scale), C.float(decay), C.float(size), C.float(root), C.float(beta1), C.float(beta2), C.float(epsilon))
	}
}
