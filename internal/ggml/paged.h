// Operations of serving on the CPU: a key-value cache in pages, attention over it, and adapters that differ from row to row
// of a batch. What a row of a result holds depends on the row's own sequence and adapter alone, bit for bit: every
// sum has an order that neither the batch nor the threads change.
#ifndef HONE_GGML_PAGED_H
#define HONE_GGML_PAGED_H

#include "api.h"

// A page holds the keys and values of HONE_PAGE consecutive positions of one sequence, from a multiple of it on, for all
// key-value heads of a layer: [head]{keys, values}. A cell is a position in the cache: page * HONE_PAGE + slot.
//
//	float16  keys [d][HONE_PAGE], values [HONE_PAGE][d]
//	Q8_0     codes int8 of the same shapes, keys then values; then scales float16: keys [d/32][HONE_PAGE], values [HONE_PAGE][d/32]
enum { HONE_PAGE = 16 };
int64_t hone_page_bytes(int d, int heads, bool q8);

// hone_page_copy copies the first slots of a page of one layer.
void hone_page_copy(void *layer, int32_t from, int32_t to, int d, int heads, bool q8);

// hone_rope_table writes cosine and sine of each pair of rotated elements, [n][dims/2][2], as ggml_rope_ext computes them.
void hone_rope_table(float *dst, const int32_t *positions, int64_t n, int dims, float base, float scale, const float *factors);

enum { HONE_STORE_NEOX = 1, HONE_STORE_BIAS = 2, HONE_STORE_NORM = 4, HONE_STORE_Q8 = 8 };

// A unit of attention: queries of consecutive positions of one sequence, for some query heads of one key-value head.
struct hone_unit {
	int32_t row, queries;      // rows of the batch
	int32_t position;          // of the first query
	int32_t table;             // of its sequence's pages, an index into the tables
	int32_t kv, head, heads;   // key-value head; query heads [head, head+heads) in its group
	int32_t unused;
};
enum { HONE_PLAN_HEADER = 8 }; // int32: the number of units, then unused

// One module of an adapter: y += scale * B A x.
struct hone_pair {
	const float *a, *b;     // a [rank][in], b [rank][out] (the transpose of B)
	int32_t rank, in, out;  // rank 0: the adapter does not change the module
	float scale;
};
struct hone_adapter { struct hone_pair *pairs; };

// Rows of a batch that have one adapter; HONE_ADAPT's table begins with int32 {tasks, slices}, 8 bytes, then these.
struct hone_rows {
	int32_t from, n;
	const struct hone_adapter *adapter;
};

void hone_op_paged_store(struct ggml_tensor *dst, int ith, int nth, void *userdata);
void hone_op_paged_attention(struct ggml_tensor *dst, int ith, int nth, void *userdata);
void hone_op_adapt(struct ggml_tensor *dst, int ith, int nth, void *userdata);
void hone_op_pick_rows(struct ggml_tensor *dst, int ith, int nth, void *userdata);
void hone_op_swiglu_rows(struct ggml_tensor *dst, int ith, int nth, void *userdata);

#endif
