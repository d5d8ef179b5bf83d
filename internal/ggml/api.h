// The part of ggml's C interface that this package uses, declared again because a dependency's headers are out of
// reach of cgo. header_test.go compiles it together with the module's own headers and compares every declaration.
#ifndef HONE_GGML_API_H
#define HONE_GGML_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef HONE_STRUCT
#define HONE_STRUCT(name) struct name
#endif

struct ggml_context;
struct ggml_cgraph;
struct ggml_gallocr;
struct ggml_backend;
struct ggml_backend_buffer;
struct ggml_backend_buffer_type;
struct ggml_tensor;
struct ggml_type_traits;

enum {
	HONE_GGML_TYPE_F32 = 0,
	HONE_GGML_TYPE_Q8_0 = 8,
	HONE_GGML_TYPE_IQ4_NL = 20,
	HONE_GGML_TYPE_I8 = 24,
	HONE_GGML_TYPE_I32 = 26,
	HONE_GGML_TYPE_F16 = 1,
	HONE_GGML_TYPE_BF16 = 30,
	HONE_GGML_STATUS_ALLOC_FAILED = -2,
	HONE_GGML_STATUS_SUCCESS = 0,
	HONE_GGML_STATUS_ABORTED = 1,
	HONE_GGML_ROPE_TYPE_NEOX = 2,
	HONE_GGML_N_TASKS_MAX = -1,
	HONE_GGML_BACKEND_BUFFER_USAGE_WEIGHTS = 1,
	HONE_GGML_PREC_F32 = 10,
};

// Enums of the library are unsigned int here, which is the type that they have.
HONE_STRUCT(ggml_tensor) {
	unsigned int type;
	struct ggml_backend_buffer *buffer;
	int64_t ne[4];
	size_t nb[4];
	unsigned int op;
	int32_t op_params[16];
	int32_t flags;
	struct ggml_tensor *src[10];
	struct ggml_tensor *view_src;
	size_t view_offs;
	void *data;
	char name[64];
	void *extra;
	char padding[8];
};

HONE_STRUCT(ggml_init_params) {
	size_t mem_size;
	void *mem_buffer;
	bool no_alloc;
};

typedef void (*ggml_to_float_t)(const void *x, float *y, int64_t k);
typedef void (*ggml_from_float_t)(const float *x, void *y, int64_t k);

HONE_STRUCT(ggml_type_traits) {
	const char *type_name;
	int64_t blck_size;
	int64_t blck_size_interleave;
	size_t type_size;
	bool is_quantized;
	ggml_to_float_t to_float;
	ggml_from_float_t from_float_ref;
};

typedef void (*ggml_custom_op_t)(struct ggml_tensor *dst, int ith, int nth, void *userdata);
typedef bool (*ggml_abort_callback)(void *data);

struct ggml_context *ggml_init(struct ggml_init_params params);
void ggml_free(struct ggml_context *ctx);
struct ggml_tensor *ggml_get_first_tensor(const struct ggml_context *ctx);
struct ggml_tensor *ggml_get_next_tensor(const struct ggml_context *ctx, struct ggml_tensor *tensor);
size_t ggml_tensor_overhead(void);
size_t ggml_graph_overhead_custom(size_t size, bool grads);
const struct ggml_type_traits *ggml_get_type_traits(unsigned int type);

struct ggml_tensor *ggml_new_tensor_4d(struct ggml_context *ctx, unsigned int type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3);
struct ggml_tensor *ggml_view_3d(struct ggml_context *ctx, struct ggml_tensor *a, int64_t ne0, int64_t ne1, int64_t ne2, size_t nb1, size_t nb2, size_t offset);
struct ggml_tensor *ggml_set_name(struct ggml_tensor *tensor, const char *name);
struct ggml_tensor *ggml_add(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b);
struct ggml_tensor *ggml_mul_mat(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b);
struct ggml_tensor *ggml_get_rows(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b);
struct ggml_tensor *ggml_cpy(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b);
struct ggml_tensor *ggml_rope_ext(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b, struct ggml_tensor *c, int n_dims, int mode,
	int n_ctx_orig, float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast, float beta_slow);
struct ggml_tensor *ggml_rope_ext_back(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b, struct ggml_tensor *c, int n_dims, int mode,
	int n_ctx_orig, float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast, float beta_slow);
struct ggml_tensor *ggml_custom_4d(struct ggml_context *ctx, unsigned int type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3,
	struct ggml_tensor **args, int n_args, ggml_custom_op_t fun, int n_tasks, void *userdata);
struct ggml_tensor *ggml_custom_inplace(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor **args, int n_args,
	ggml_custom_op_t fun, int n_tasks, void *userdata);

// Operations of graphs that run on every kind of device.
const char *ggml_type_name(unsigned int type);
void ggml_mul_mat_set_prec(struct ggml_tensor *a, unsigned int prec);
const char *ggml_op_desc(const struct ggml_tensor *t);
void ggml_set_output(struct ggml_tensor *tensor);
struct ggml_tensor *ggml_add_inplace(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b);
struct ggml_tensor *ggml_sub(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b);
struct ggml_tensor *ggml_mul(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b);
struct ggml_tensor *ggml_scale_bias(struct ggml_context *ctx, struct ggml_tensor *a, float s, float b);
struct ggml_tensor *ggml_clamp(struct ggml_context *ctx, struct ggml_tensor *a, float min, float max);
struct ggml_tensor *ggml_log(struct ggml_context *ctx, struct ggml_tensor *a);
struct ggml_tensor *ggml_concat(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b, int dim);
struct ggml_tensor *ggml_cont(struct ggml_context *ctx, struct ggml_tensor *a);
struct ggml_tensor *ggml_cast(struct ggml_context *ctx, struct ggml_tensor *a, unsigned int type);
struct ggml_tensor *ggml_out_prod(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b);
struct ggml_tensor *ggml_transpose(struct ggml_context *ctx, struct ggml_tensor *a);
struct ggml_tensor *ggml_view_4d(struct ggml_context *ctx, struct ggml_tensor *a, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3,
	size_t nb1, size_t nb2, size_t nb3, size_t offset);
struct ggml_tensor *ggml_set_rows(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b, struct ggml_tensor *c);
struct ggml_tensor *ggml_argmax(struct ggml_context *ctx, struct ggml_tensor *a);
struct ggml_tensor *ggml_rms_norm(struct ggml_context *ctx, struct ggml_tensor *a, float eps);
struct ggml_tensor *ggml_rms_norm_back(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b, float eps);
struct ggml_tensor *ggml_swiglu_split(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b);
struct ggml_tensor *ggml_silu_back(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b);
struct ggml_tensor *ggml_soft_max_ext(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *mask, float scale, float max_bias);
struct ggml_tensor *ggml_soft_max_ext_back(struct ggml_context *ctx, struct ggml_tensor *a, struct ggml_tensor *b, float scale, float max_bias);

// Devices other than the CPU: backends in shared libraries.
struct ggml_backend_reg;
struct ggml_backend_device;
struct ggml_backend_reg *ggml_backend_load(const char *path);
size_t ggml_backend_reg_dev_count(struct ggml_backend_reg *reg);
struct ggml_backend_device *ggml_backend_reg_dev_get(struct ggml_backend_reg *reg, size_t index);
const char *ggml_backend_dev_name(struct ggml_backend_device *device);
const char *ggml_backend_dev_description(struct ggml_backend_device *device);
void ggml_backend_dev_memory(struct ggml_backend_device *device, size_t *free, size_t *total);
struct ggml_backend *ggml_backend_dev_init(struct ggml_backend_device *device, const char *params);
struct ggml_backend_buffer_type *ggml_backend_dev_host_buffer_type(struct ggml_backend_device *device);
struct ggml_backend_buffer *ggml_backend_buft_alloc_buffer(struct ggml_backend_buffer_type *buft, size_t size);
void ggml_backend_buffer_set_usage(struct ggml_backend_buffer *buffer, unsigned int usage);
int ggml_backend_graph_compute_async(struct ggml_backend *backend, struct ggml_cgraph *cgraph, int batch_size);
void ggml_backend_synchronize(struct ggml_backend *backend);
size_t ggml_row_size(unsigned int type, int64_t ne);

struct ggml_cgraph *ggml_new_graph_custom(struct ggml_context *ctx, size_t size, bool grads);
void ggml_build_forward_expand(struct ggml_cgraph *cgraph, struct ggml_tensor *tensor);
void ggml_graph_add_node(struct ggml_cgraph *cgraph, struct ggml_tensor *tensor);
int ggml_graph_n_nodes(struct ggml_cgraph *cgraph);
struct ggml_tensor *ggml_graph_node(struct ggml_cgraph *cgraph, int i);

struct ggml_gallocr *ggml_gallocr_new(struct ggml_backend_buffer_type *buft);
void ggml_gallocr_free(struct ggml_gallocr *galloc);
bool ggml_gallocr_alloc_graph(struct ggml_gallocr *galloc, struct ggml_cgraph *graph);
void ggml_gallocr_reserve_n_size(struct ggml_gallocr *galloc, struct ggml_cgraph *graph, const int *node_buffer_ids, const int *leaf_buffer_ids, size_t *sizes);
bool ggml_gallocr_reserve(struct ggml_gallocr *galloc, struct ggml_cgraph *graph);
size_t ggml_gallocr_get_buffer_size(struct ggml_gallocr *galloc, int buffer_id);

struct ggml_backend *ggml_backend_cpu_init(void);
void ggml_backend_cpu_set_n_threads(struct ggml_backend *backend_cpu, int n_threads);
void ggml_backend_cpu_set_abort_callback(struct ggml_backend *backend_cpu, ggml_abort_callback abort_callback, void *abort_callback_data);
void ggml_backend_free(struct ggml_backend *backend);
struct ggml_backend_buffer_type *ggml_backend_get_default_buffer_type(struct ggml_backend *backend);
size_t ggml_backend_alloc_ctx_tensors_from_buft_size(struct ggml_context *ctx, struct ggml_backend_buffer_type *buft);
struct ggml_backend_buffer *ggml_backend_alloc_ctx_tensors(struct ggml_context *ctx, struct ggml_backend *backend);
void ggml_backend_buffer_free(struct ggml_backend_buffer *buffer);
void *ggml_backend_buffer_get_base(struct ggml_backend_buffer *buffer);
size_t ggml_backend_buffer_get_size(struct ggml_backend_buffer *buffer);
void ggml_backend_tensor_set(struct ggml_tensor *tensor, const void *data, size_t offset, size_t size);
void ggml_backend_tensor_get(const struct ggml_tensor *tensor, void *data, size_t offset, size_t size);
bool ggml_backend_supports_op(struct ggml_backend *backend, const struct ggml_tensor *op);
int ggml_backend_graph_compute(struct ggml_backend *backend, struct ggml_cgraph *cgraph);
int ggml_cpu_has_avx512_bf16(void);
int ggml_cpu_has_avx512_vnni(void);

#endif
