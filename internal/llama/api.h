// The part of llama.h (ollama module v0.24.0, llama.cpp ec98e2002) that this package calls. The module's own headers
// are not on the include path of packages outside of it, so they are declared again here; header_test.go compares
// every line with them. Rules of internal/headercheck: structs are written with HONE_STRUCT, one field a line;
// a constant is the original name with the prefix HONE_.
#ifndef HONE_LLAMA_API_H
#define HONE_LLAMA_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef HONE_STRUCT
#define HONE_STRUCT(name) struct name
#endif

struct llama_vocab;
struct llama_model;
struct llama_context;
struct llama_adapter_lora;
struct llama_memory_i;

enum {
    HONE_GGML_LOG_LEVEL_DEBUG = 1,
    HONE_GGML_LOG_LEVEL_INFO  = 2,
    HONE_GGML_LOG_LEVEL_WARN  = 3,
    HONE_GGML_LOG_LEVEL_ERROR = 4,
    HONE_GGML_LOG_LEVEL_CONT  = 5,
    HONE_LLAMA_FLASH_ATTN_TYPE_AUTO     = -1,
    HONE_LLAMA_FLASH_ATTN_TYPE_DISABLED = 0,
    HONE_LLAMA_FLASH_ATTN_TYPE_ENABLED  = 1,
    HONE_LLAMA_POOLING_TYPE_NONE = 0,
    HONE_LLAMA_TOKEN_NULL = -1,
    HONE_GGML_TYPE_F16  = 1,
    HONE_GGML_TYPE_Q8_0 = 8,
};

HONE_STRUCT(llama_batch) {
    int32_t    n_tokens;
    int32_t  * token;
    float    * embd;
    int32_t  * pos;
    int32_t  * n_seq_id;
    int32_t ** seq_id;
    int8_t   * logits;
};

HONE_STRUCT(llama_model_params) {
    void        * devices;
    const void  * tensor_buft_overrides;
    int32_t       n_gpu_layers;
    int32_t       split_mode;
    int32_t       main_gpu;
    const float * tensor_split;
    void        * progress_callback;
    void        * progress_callback_user_data;
    const void  * kv_overrides;
    bool          vocab_only;
    bool          use_mmap;
    bool          use_mlock;
    bool          check_tensors;
    bool          use_extra_bufts;
    bool          no_host;
    bool          no_alloc;
};

HONE_STRUCT(llama_context_params) {
    uint32_t n_ctx;
    uint32_t n_batch;
    uint32_t n_ubatch;
    uint32_t n_seq_max;
    int32_t  n_threads;
    int32_t  n_threads_batch;
    int32_t  rope_scaling_type;
    int32_t  pooling_type;
    int32_t  attention_type;
    int32_t  flash_attn_type;
    float    rope_freq_base;
    float    rope_freq_scale;
    float    yarn_ext_factor;
    float    yarn_attn_factor;
    float    yarn_beta_fast;
    float    yarn_beta_slow;
    uint32_t yarn_orig_ctx;
    float    defrag_thold;
    void   * cb_eval;
    void   * cb_eval_user_data;
    int32_t  type_k;
    int32_t  type_v;
    bool  (* abort_callback)(void *);
    void   * abort_callback_data;
    bool     embeddings;
    bool     offload_kqv;
    bool     no_perf;
    bool     op_offload;
    bool     swa_full;
    bool     kv_unified;
};

void llama_log_set(void (*log_callback)(unsigned int level, const char * text, void * user_data), void * user_data);
void llama_backend_init(void);

struct llama_model_params   llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);

struct llama_model * llama_model_load_from_file(const char * path_model, struct llama_model_params params);
void    llama_model_free(struct llama_model * model);
int32_t llama_model_n_ctx_train(const struct llama_model * model);
int32_t llama_model_n_embd(const struct llama_model * model);
int32_t llama_model_meta_val_str(const struct llama_model * model, const char * key, char * buf, size_t buf_size);
int32_t llama_model_desc(const struct llama_model * model, char * buf, size_t buf_size);
bool    llama_model_has_encoder(const struct llama_model * model);
bool    llama_model_is_recurrent(const struct llama_model * model);
bool    llama_model_is_hybrid(const struct llama_model * model);
uint64_t llama_model_size(const struct llama_model * model);
const char * llama_model_chat_template(const struct llama_model * model, const char * name);
const struct llama_vocab * llama_model_get_vocab(const struct llama_model * model);

int32_t llama_vocab_n_tokens(const struct llama_vocab * vocab);
bool    llama_vocab_is_eog(const struct llama_vocab * vocab, int32_t token);
bool    llama_vocab_is_control(const struct llama_vocab * vocab, int32_t token);
int32_t llama_vocab_bos(const struct llama_vocab * vocab);
int32_t llama_vocab_eos(const struct llama_vocab * vocab);
bool    llama_vocab_get_add_bos(const struct llama_vocab * vocab);
int32_t llama_tokenize(const struct llama_vocab * vocab, const char * text, int32_t text_len, int32_t * tokens,
                       int32_t n_tokens_max, bool add_special, bool parse_special);
int32_t llama_token_to_piece(const struct llama_vocab * vocab, int32_t token, char * buf, int32_t length,
                             int32_t lstrip, bool special);

struct llama_context * llama_init_from_model(struct llama_model * model, struct llama_context_params params);
void     llama_free(struct llama_context * ctx);
uint32_t llama_n_ctx(const struct llama_context * ctx);
uint32_t llama_n_batch(const struct llama_context * ctx);
uint32_t llama_n_seq_max(const struct llama_context * ctx);
struct llama_memory_i * llama_get_memory(const struct llama_context * ctx);
void     llama_memory_clear(struct llama_memory_i * mem, bool data);
bool     llama_memory_seq_rm(struct llama_memory_i * mem, int32_t seq_id, int32_t p0, int32_t p1);
void     llama_memory_seq_cp(struct llama_memory_i * mem, int32_t seq_id_src, int32_t seq_id_dst, int32_t p0, int32_t p1);
void     llama_memory_seq_keep(struct llama_memory_i * mem, int32_t seq_id);
int32_t  llama_memory_seq_pos_max(struct llama_memory_i * mem, int32_t seq_id);

struct llama_batch llama_batch_init(int32_t n_tokens, int32_t embd, int32_t n_seq_max);
void     llama_batch_free(struct llama_batch batch);
int32_t  llama_decode(struct llama_context * ctx, struct llama_batch batch);
void     llama_synchronize(struct llama_context * ctx);
float  * llama_get_logits_ith(struct llama_context * ctx, int32_t i);
float  * llama_get_embeddings_ith(struct llama_context * ctx, int32_t i);
void     llama_set_embeddings(struct llama_context * ctx, bool embeddings);
void     llama_set_abort_callback(struct llama_context * ctx, bool (*abort_callback)(void *), void * abort_callback_data);

struct llama_adapter_lora * llama_adapter_lora_init(struct llama_model * model, const char * path_lora);
void     llama_adapter_lora_free(struct llama_adapter_lora * adapter);
int32_t  llama_set_adapter_lora(struct llama_context * ctx, struct llama_adapter_lora * adapter, float scale);
void     llama_clear_adapter_lora(struct llama_context * ctx);

#endif
