# What is different in the copied sources, each with its reason. A text that is not found stops the build: then the ollama
# module has changed, and the reason is to be looked at again. `cmake -DFROM=... -DTO=... -P changes.cmake` copies only.

function(change file old new)
  file(READ ${file} text)
  string(FIND "${text}" "${old}" at)
  if (at EQUAL -1)
    message(FATAL_ERROR "${file} has no such text, the module has changed:\n${old}")
  endif()
  string(REPLACE "${old}" "${new}" text "${text}")
  file(WRITE ${file} "${text}")
endfunction()

function(copy_ggml from to)
  if (EXISTS ${to}/copied)
    return()
  endif()
  file(REMOVE_RECURSE ${to})
  file(COPY ${from}/ DESTINATION ${to} PATTERN ggml-vulkan EXCLUDE PATTERN ggml-metal EXCLUDE)
  file(GLOB_RECURSE files ${to}/*)
  foreach (f ${files}) # the module cache is read-only
    file(CHMOD ${f} PERMISSIONS OWNER_READ OWNER_WRITE GROUP_READ WORLD_READ)
  endforeach()
  set(cuda ${to}/src/ggml-cuda)
  file(COPY ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/training.cuh ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/narrow.cuh DESTINATION ${cuda})

  if (NOT FLASH_ATTENTION)
    file(GLOB files ${cuda}/fattn*.cu ${cuda}/template-instances/fattn*.cu)
    file(REMOVE ${files})
    file(WRITE ${cuda}/fattn.cu "#include \"common.cuh\"
#include \"fattn.cuh\"
void ggml_cuda_flash_attn_ext(ggml_backend_cuda_context &, ggml_tensor *) { GGML_ABORT(\"built without flash attention\"); }
bool ggml_cuda_flash_attn_ext_supported(int, const ggml_tensor *) { return false; }
")
  endif()

  # Products with BF16 or F16 weights sum and write in float32, as cuBLAS can, instead of rounding to 16 bits and
  # converting: more exact, and faster. Where the second change below has quantised weights come here, they are expanded,
  # at most 32 Mi weights at a time, to F16 if float32 precision is asked for (forward: the more exact type, but small
  # gradients would be 0), else to BF16.
  change(${cuda}/ggml-cuda.cu "    if (supports_bf16 && src0->type == GGML_TYPE_BF16 && ggml_is_contiguous(src0)" "    const bool quantized = ggml_is_quantized(src0->type);
    const bool as_f16 = src0->type == GGML_TYPE_F16 || (quantized && dst->op_params[0] == GGML_PREC_F32);
    const to_bf16_cuda_t expand_bf16 = quantized && !as_f16 ? ggml_get_to_bf16_cuda(src0->type) : nullptr;
    const to_fp16_cuda_t expand_f16 = quantized && as_f16 ? ggml_get_to_fp16_cuda(src0->type) : nullptr;
    if (supports_bf16 && (src0->type == GGML_TYPE_BF16 || src0->type == GGML_TYPE_F16 || expand_bf16 || expand_f16) && ggml_is_contiguous(src0)")
  change(${cuda}/ggml-cuda.cu "        ggml_cuda_pool_alloc<nv_bfloat16> src1_as_bf16(ctx.pool(id));
        if (src1->type != GGML_TYPE_BF16) {
            const to_bf16_cuda_t to_bf16_cuda = ggml_get_to_bf16_cuda(src1->type);
            GGML_ASSERT(to_bf16_cuda != nullptr);
            size_t ne = src1_ncols*ne10;
            src1_as_bf16.alloc(ne);
            to_bf16_cuda(src1_ddf_i, src1_as_bf16.get(), ne, stream);
        }
        const nv_bfloat16 * src1_ptr = src1->type == GGML_TYPE_BF16 ? (const nv_bfloat16 *) src1_ddf_i : src1_as_bf16.get();
        const nv_bfloat16 * src0_ptr = (const nv_bfloat16 *)src0_dd_i;
        ggml_cuda_pool_alloc<nv_bfloat16> dst_bf16(ctx.pool(id), row_diff*src1_ncols);
" "        const ggml_type half_type = as_f16 ? GGML_TYPE_F16 : GGML_TYPE_BF16;
        const cudaDataType_t cuda_type = as_f16 ? CUDA_R_16F : CUDA_R_16BF;
        ggml_cuda_pool_alloc<nv_bfloat16> src1_converted(ctx.pool(id)); // 16 bits of either type
        if (src1->type != half_type) {
            size_t ne = src1_ncols*ne10;
            src1_converted.alloc(ne);
            const bool narrowed = src1->type == GGML_TYPE_F32 && (as_f16 ?
                ggml_cuda_narrow<half>(src1_ddf_i, src1_converted.get(), ne, stream) : ggml_cuda_narrow<nv_bfloat16>(src1_ddf_i, src1_converted.get(), ne, stream));
            if (narrowed) {
            } else if (as_f16) {
                ggml_get_to_fp16_cuda(src1->type)(src1_ddf_i, (half *) src1_converted.get(), ne, stream);
            } else {
                ggml_get_to_bf16_cuda(src1->type)(src1_ddf_i, src1_converted.get(), ne, stream);
            }
        }
        const void * src1_ptr = src1->type == half_type ? (const void *) src1_ddf_i : src1_converted.get();
        const int64_t band = quantized ? std::min<int64_t>(row_diff, std::max<int64_t>(256, (32 << 20)/ne00)) : row_diff;
        ggml_cuda_pool_alloc<nv_bfloat16> expanded(ctx.pool(id));
        if (quantized) {
            expanded.alloc(band*ne00);
        }
")
  change(${cuda}/ggml-cuda.cu "        CUBLAS_CHECK(
            cublasGemmEx(ctx.cublas_handle(id), CUBLAS_OP_T, CUBLAS_OP_N,
                    row_diff, src1_ncols, ne10,
                    &alpha_f32,  src0_ptr,       CUDA_R_16BF, ne00,
                                 src1_ptr,       CUDA_R_16BF, ne10,
                    &beta_f32,   dst_bf16.get(), CUDA_R_16BF, ldc,
                    CUBLAS_COMPUTE_32F,
                    CUBLAS_GEMM_DEFAULT_TENSOR_OP));

        const to_fp32_cuda_t to_fp32_cuda = ggml_get_to_fp32_cuda(GGML_TYPE_BF16);
        to_fp32_cuda(dst_bf16.get(), dst_dd_i, row_diff*src1_ncols, stream);
" "        for (int64_t row = 0; row < row_diff; row += band) {
            const int64_t rows = std::min(band, row_diff - row);
            const char * stored = src0_dd_i + row*ggml_row_size(src0->type, ne00);
            if (expand_f16) {
                expand_f16(stored, (half *) expanded.get(), rows*ne00, stream);
            } else if (expand_bf16) {
                expand_bf16(stored, expanded.get(), rows*ne00, stream);
            }
            CUBLAS_CHECK(
                cublasGemmEx(ctx.cublas_handle(id), CUBLAS_OP_T, CUBLAS_OP_N,
                        rows, src1_ncols, ne10,
                        &alpha_f32,  quantized ? (const void *) expanded.get() : stored, cuda_type, ne00,
                                     src1_ptr,       cuda_type,  ne10,
                        &beta_f32,   dst_dd_i + row, CUDA_R_32F, ldc,
                        CUBLAS_COMPUTE_32F,
                        CUBLAS_GEMM_DEFAULT_TENSOR_OP));
        }
")

  # A product may be added to what is there, and LoRA's narrow products have a kernel of their own: see training.cuh.
  change(${cuda}/ggml-cuda.cu "#include \"ggml-cuda/out-prod.cuh\"
" "#include \"ggml-cuda/out-prod.cuh\"
#include \"ggml-cuda/training.cuh\"
")
  change(${cuda}/ggml-cuda.cu "        const float beta_f32  = 0.0f;
" "        const float beta_f32  = ggml_cuda_adds(dst) ? 1.0f : 0.0f;
")
  change(${cuda}/ggml-cuda.cu "    } else {
        ggml_cuda_pool_alloc<float> src0_ddq_as_f32(ctx.pool(id));
" "    } else if (src0->type == GGML_TYPE_F32 && src1->type == GGML_TYPE_F32 && ldc == row_diff &&
            ggml_cuda_narrow_product((const float *) src0_dd_i, src1_ddf_i, dst_dd_i, row_diff, ne00, src1_ncols, stream)) {
    } else {
        ggml_cuda_pool_alloc<float> src0_ddq_as_f32(ctx.pool(id));
")
  change(${cuda}/ggml-cuda.cu "                if (!disable_fusion) {

" "                if (!disable_fusion) {
                    if (node->op == GGML_OP_GET_ROWS && ggml_cuda_mul_rows(*cuda_ctx, cgraph, i)) {
                        i++;
                        continue;
                    }
                    if (ggml_cuda_can_add(cgraph, i)) {
                        ggml_tensor product = *node;
                        product.data = cgraph->nodes[i + 1]->data;
                        product.op_params[GGML_CUDA_ADDS] = 1;
                        GGML_ASSERT(ggml_cuda_compute_forward(*cuda_ctx, &product));
                        i++;
                        continue;
                    }

")
  # llama.cpp frees its backends before the scheduler, which would then reset the freed one: a crash when a runner ends.
  change(${cuda}/ggml-cuda.cu "/* .reset                   = */ ggml_backend_cuda_reset," "/* .reset                   = */ true ? nullptr : ggml_backend_cuda_reset,")

  # CUDA graphs, as newer versions of ggml have them: also for steps of several streams; recorded when the same graph comes
  # for the second time, so that a change costs nothing and never turns them off for good; and only the same where
  # everything is that a kernel is launched with: types, parameters, and shapes of what is read, too.
  change(${cuda}/ggml-cuda.cu "node->src[1] && node->src[1]->ne[1] > 1 &&" "node->src[1] && node->src[1]->ne[1] > 64 &&")
  change(${cuda}/common.cuh "    void * src_address[GGML_MAX_SRC];
    int32_t op_params" "    void * src_address[GGML_MAX_SRC];
    ggml_type node_type;
    ggml_type src_type[GGML_MAX_SRC];
    int64_t src_ne[GGML_MAX_SRC][GGML_MAX_DIMS];
    size_t src_nb[GGML_MAX_SRC][GGML_MAX_DIMS];
    int32_t op_params")
  change(${cuda}/common.cuh "    bool disable_due_to_gpu_arch = false;
" "    bool recorded = false; // instance is of the graph that came last
    bool disable_due_to_gpu_arch = false;
")
  change(${cuda}/ggml-cuda.cu "    for (int i = 0; i < GGML_MAX_SRC; i++) {
        graph_node_properties->src_address[i] = node->src[i] ? node->src[i]->data : nullptr;
    }
" "    graph_node_properties->node_type = node->type;
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        const ggml_tensor * src = node->src[i];
        graph_node_properties->src_address[i] = src ? src->data : nullptr;
        graph_node_properties->src_type[i] = src ? src->type : GGML_TYPE_COUNT;
        for (int d = 0; src && d < GGML_MAX_DIMS; d++) {
            graph_node_properties->src_ne[i][d] = src->ne[d];
            graph_node_properties->src_nb[i][d] = src->nb[d];
        }
    }
")
  change(${cuda}/ggml-cuda.cu "    for (int i = 0; i < GGML_MAX_SRC; i++) {
        if (node->src[i] &&
            node->src[i]->data != graph_node_properties->src_address[i] &&
            node->op != GGML_OP_VIEW
        ) {
            return false;
        }
    }

    if ((node->op == GGML_OP_SCALE || node->op == GGML_OP_GLU) &&
        memcmp(" "    if (node->type != graph_node_properties->node_type) {
        return false;
    }
    for (int i = 0; i < GGML_MAX_SRC && node->op != GGML_OP_VIEW; i++) {
        const ggml_tensor * src = node->src[i];
        if ((src ? src->data : nullptr) != graph_node_properties->src_address[i] ||
            (src ? src->type : GGML_TYPE_COUNT) != graph_node_properties->src_type[i]) {
            return false;
        }
        for (int d = 0; src && d < GGML_MAX_DIMS; d++) {
            if (src->ne[d] != graph_node_properties->src_ne[i][d] || src->nb[d] != graph_node_properties->src_nb[i][d]) {
                return false;
            }
        }
    }

    if (node->op != GGML_OP_VIEW &&
        memcmp(")
  change(${cuda}/ggml-cuda.cu "    if (cuda_ctx->cuda_graph->instance == nullptr) {
        cuda_graph_update_required = true;
    }

    // Check if the graph size" "    // Check if the graph size")
  change(${cuda}/ggml-cuda.cu "        if (use_cuda_graph && cuda_graph_update_required) {
            cuda_ctx->cuda_graph->number_consecutive_updates++;
        } else {
            cuda_ctx->cuda_graph->number_consecutive_updates = 0;
        }

        if (cuda_ctx->cuda_graph->number_consecutive_updates >= 4) {
            cuda_ctx->cuda_graph->disable_due_to_too_many_updates = true;
#ifndef NDEBUG
            GGML_LOG_DEBUG(\"%s: disabling CUDA graphs due to too many consecutive updates\\n\", __func__);
#endif
        }
" "        use_cuda_graph = use_cuda_graph && !cuda_graph_update_required; // launched one by one for the first time
        cuda_graph_update_required = use_cuda_graph && !cuda_ctx->cuda_graph->recorded;
        cuda_ctx->cuda_graph->recorded = use_cuda_graph;
")

  # float32 becomes 16 bits four elements at a time: see narrow.cuh.
  change(${cuda}/cpy.cu "#include \"cpy.cuh\"
" "#include \"cpy.cuh\"
#include \"narrow.cuh\"
")
  change(${cuda}/cpy.cu "    } else if (src0->type == GGML_TYPE_F32 && src1->type == GGML_TYPE_F16) {
        if (contiguous_srcs) {
" "    } else if (src0->type == GGML_TYPE_F32 && src1->type == GGML_TYPE_F16) {
        if (contiguous_srcs && ggml_cuda_narrow<half>((const float *) src0_ddc, src1_ddc, ne, main_stream)) {
        } else if (contiguous_srcs) {
")

  # The transpose of a weight as it is stored, quantised or of 16 bits, is multiplied without being kept: expanded, at most
  # 32 Mi weights at a time, and taken by columns.
  change(${cuda}/ggml-cuda.cu "            return op->type == GGML_TYPE_F32 && op->src[0]->type == GGML_TYPE_F32 && op->src[1]->type == GGML_TYPE_F32;
        case GGML_OP_GET_ROWS:" "            return op->type == GGML_TYPE_F32 && op->src[1]->type == GGML_TYPE_F32 && (op->src[0]->type == GGML_TYPE_F32 ||
                (op->src[0]->ne[2]*op->src[0]->ne[3]*op->ne[2]*op->ne[3] == 1 && ggml_is_contiguous(op->src[0]) && ggml_is_transposed(op->src[1]) &&
                    (op->src[0]->type == GGML_TYPE_BF16 || ggml_get_to_bf16_cuda(op->src[0]->type) != nullptr)));
        case GGML_OP_GET_ROWS:")
  change(${cuda}/out-prod.cu "#include \"out-prod.cuh\"
" "#include \"out-prod.cuh\"
#include \"convert.cuh\"
#include \"narrow.cuh\"

// dst [n, T] = sum over k of the weights' row k (outer) src1[:, k], where src1 is the transposed view of [k, T].
static void out_prod_weights(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * weights = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const int64_t n = weights->ne[0], k = weights->ne[1], tokens = dst->ne[1];
    GGML_ASSERT(ggml_is_transposed(src1) && src1->nb[1] == sizeof(float) && src1->nb[0] == k*sizeof(float) && ggml_is_contiguous(dst));
    cudaStream_t stream = ctx.stream();
    cublasHandle_t handle = ctx.cublas_handle();
    ggml_cuda_pool_alloc<nv_bfloat16> x(ctx.pool(), k*tokens);
    if (!ggml_cuda_narrow<nv_bfloat16>((const float *) src1->data, x.get(), k*tokens, stream)) {
        ggml_get_to_bf16_cuda(GGML_TYPE_F32)(src1->data, x.get(), k*tokens, stream);
    }
    const to_bf16_cuda_t expand = weights->type == GGML_TYPE_BF16 ? nullptr : ggml_get_to_bf16_cuda(weights->type);
    const int64_t band = expand ? std::min<int64_t>(k, std::max<int64_t>(256, (32 << 20)/n)) : k;
    ggml_cuda_pool_alloc<nv_bfloat16> expanded(ctx.pool());
    if (expand) {
        expanded.alloc(band*n);
    }
    const float alpha = 1.0f;
    float beta = dst->op_params[15] == 1 ? 1.0f : 0.0f; // see training.cuh
    CUBLAS_CHECK(cublasSetStream(handle, stream));
    for (int64_t row = 0; row < k; row += band) {
        const int64_t rows = std::min(band, k - row);
        const char * stored = (const char *) weights->data + row*weights->nb[1];
        if (expand) {
            expand(stored, expanded.get(), rows*n, stream);
        }
        CUBLAS_CHECK(
            cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N,
                    n, tokens, rows,
                    &alpha, expand ? (const void *) expanded.get() : stored, CUDA_R_16BF, n,
                            x.get() + row,                                   CUDA_R_16BF, k,
                    &beta,  (float *) dst->data,                             CUDA_R_32F,  n,
                    CUBLAS_COMPUTE_32F,
                    CUBLAS_GEMM_DEFAULT_TENSOR_OP));
        beta = 1.0f;
    }
}
")
  change(${cuda}/out-prod.cu "    GGML_TENSOR_BINARY_OP_LOCALS

    GGML_ASSERT(src0->type == GGML_TYPE_F32);
" "    GGML_TENSOR_BINARY_OP_LOCALS

    if (src0->type != GGML_TYPE_F32) {
        out_prod_weights(ctx, dst);
        return;
    }
")
  change(${cuda}/out-prod.cu "    const float beta = 0.0f;
" "    const float beta = dst->op_params[15] == 1 ? 1.0f : 0.0f; // see training.cuh
")
  change(${cuda}/out-prod.cu "    // TODO batched matrix multiplication
" "    if (ne3 == 1 && dps2 == 1) {
        CUBLAS_CHECK(
            cublasSgemmStridedBatched(handle, CUBLAS_OP_N, src1_cublas_op,
                    ne0, ne1, ne01,
                    &alpha, src0_d, lda, s02,
                            src1_d, ldb, s12,
                    &beta,  dst_d,  ldc, s2, ne2));
        return;
    }
")

  # On Hopper (and the data centre Blackwells) the int8 kernels reach less than half of what cuBLAS does. From 192 tokens
  # on, quantised weights take the way above there, which also keeps gradients of every size.
  # Where float32 precision is asked for, as training does, they take that way whatever their number: the int8 kernels
  # would round the activations to 8 bits.
  change(${cuda}/ggml-cuda.cu "ggml_cuda_should_use_mmq(src0->type, cc, src1->ne[1]);" "(dst->op_params[0] != GGML_PREC_F32 || src1->ne[1] <= MMVQ_MAX_BATCH_SIZE) && ggml_cuda_should_use_mmq(src0->type, cc, src1->ne[1]);")
  change(${cuda}/mmq.cu "    if (turing_mma_available(cc)) {
        return true;" "    if (GGML_CUDA_CC_IS_NVIDIA(cc) && (cc == 900 || cc == 1000 || cc == 1030) && ne11 >= 192) {
        return false;
    }
    if (turing_mma_available(cc)) {
        return true;")

  # Rows of float32 are copied 16 bytes a thread, three times faster than element by element.
  change(${cuda}/getrows.cu "template<typename src0_t, typename dst_t>
static void get_rows_cuda_float(" "static __global__ void k_get_rows_f32x4(
        const char * __restrict__ src0, const int32_t * __restrict__ rows, char * __restrict__ dst,
        const uint32_t n, const uint3 width, const size_t nb01, const size_t nb1) {
    const uint32_t i = blockIdx.x*blockDim.x + threadIdx.x;
    if (i >= n) {
        return;
    }
    const uint2 at = fast_div_modulo(i, width);
    ((float4 *) (dst + at.x*nb1))[at.y] = ((const float4 *) (src0 + rows[at.x]*nb01))[at.y];
}

template<typename src0_t, typename dst_t>
static void get_rows_cuda_float(")
  change(${cuda}/getrows.cu "    k_get_rows_float<<<block_nums, block_dims, 0, stream>>>(" "    if constexpr (std::is_same_v<src0_t, float> && std::is_same_v<dst_t, float>) {
        const bool aligned = ((size_t) src0_d | (size_t) dst_d | nb01 | nb1) % 16 == 0 && ne00 % 4 == 0;
        if (aligned && ne11*ne12 == 1 && nb10 == sizeof(int32_t) && ne10*ne00 < 2147483647) {
            const uint32_t n = ne10*(ne00/4);
            k_get_rows_f32x4<<<(n + 255)/256, 256, 0, stream>>>((const char *) src0_d, src1_d, (char *) dst_d, n, init_fastdiv_values(ne00/4), nb01, nb1);
            return;
        }
    }
    k_get_rows_float<<<block_nums, block_dims, 0, stream>>>(")

  change(${cuda}/convert.cu "to_bf16_cuda_t ggml_get_to_bf16_cuda(ggml_type type) {
    switch (type) {
" "to_bf16_cuda_t ggml_get_to_bf16_cuda(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:
            return dequantize_row_q4_0_cuda;
        case GGML_TYPE_Q4_1:
            return dequantize_row_q4_1_cuda;
        case GGML_TYPE_Q5_0:
            return dequantize_block_cont_cuda<QK5_0, QR5_0, dequantize_q5_0>;
        case GGML_TYPE_Q5_1:
            return dequantize_block_cont_cuda<QK5_1, QR5_1, dequantize_q5_1>;
        case GGML_TYPE_Q8_0:
            return dequantize_block_cont_cuda<QK8_0, QR8_0, dequantize_q8_0>;
        case GGML_TYPE_Q4_K:
            return dequantize_row_q4_K_cuda;
        case GGML_TYPE_Q5_K:
            return dequantize_row_q5_K_cuda;
        case GGML_TYPE_Q6_K:
            return dequantize_row_q6_K_cuda;
        case GGML_TYPE_IQ4_NL:
            return dequantize_row_iq4_nl_cuda;
")
  file(WRITE ${to}/copied "")
endfunction()

if (CMAKE_SCRIPT_MODE_FILE AND FROM)
  copy_ggml(${FROM} ${TO})
endif()
