#include "kernels.h"

#include <stdlib.h>
#include <string.h>

// hone_op_pack: (W [in, out] of any type; transpose) -> bytes of hone_weights of W or of its transpose, the same as
// packing at load gives. A thread takes bands of rows.
void hone_op_pack(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
	(void)userdata;
	const struct ggml_tensor *w = dst->src[0];
	int transpose = dst->op_params[HONE_PARAM];
	int64_t in = w->ne[0], out = w->ne[1], band = transpose ? HONE_BLOCK : HONE_PANEL, bands = (out + band - 1) / band;
	int64_t from = bands * ith / nth * band, to = bands * (ith + 1) / nth * band;
	ggml_to_float_t to_float = ggml_get_type_traits(w->type)->to_float;
	float *values = malloc(band * in * sizeof(float));
	if (!values) abort();
	for (int64_t row = from; row < to && row < out; row += band) {
		int64_t n = out - row < band ? out - row : band;
		for (int64_t r = 0; r < n; r++) {
			const void *stored = (const char *)w->data + (row + r) * w->nb[1];
			if (w->type == HONE_GGML_TYPE_F32)
				memcpy(values + r * in, stored, in * sizeof(float));
			else
				to_float(stored, values + r * in, in);
		}
		if (transpose)
			hone_pack_transpose(values, dst->data, row, n, in, out);
		else
			hone_pack_rows(values, dst->data, row, n, in, out);
	}
	free(values);
}
