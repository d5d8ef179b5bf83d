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

  if (NOT FLASH_ATTENTION)
    file(GLOB files ${cuda}/fattn*.cu ${cuda}/template-instances/fattn*.cu)
    file(REMOVE ${files})
    file(WRITE ${cuda}/fattn.cu "#include \"common.cuh\"
#include \"fattn.cuh\"
void ggml_cuda_flash_attn_ext(ggml_backend_cuda_context &, ggml_tensor *) { GGML_ABORT(\"built without flash attention\"); }
bool ggml_cuda_flash_attn_ext_supported(int, const ggml_tensor *) { return false; }
")
  endif()

  # Products with BF16 weights write float32, as cuBLAS can, instead of rounding to BF16 and converting: more exact, and
  # faster. Quantised weights are expanded to BF16 for them, at most 64 Mi weights at a time, where the next change has
  # them come here.
  change(${cuda}/ggml-cuda.cu "    if (supports_bf16 && src0->type == GGML_TYPE_BF16 && ggml_is_contiguous(src0)" "    const to_bf16_cuda_t expand = ggml_is_quantized(src0->type) ? ggml_get_to_bf16_cuda(src0->type) : nullptr;
    if (supports_bf16 && (src0->type == GGML_TYPE_BF16 || expand) && ggml_is_contiguous(src0)")
  change(${cuda}/ggml-cuda.cu "        const nv_bfloat16 * src0_ptr = (const nv_bfloat16 *)src0_dd_i;
        ggml_cuda_pool_alloc<nv_bfloat16> dst_bf16(ctx.pool(id), row_diff*src1_ncols);
" "        const int64_t band = expand ? std::min<int64_t>(row_diff, std::max<int64_t>(256, (64 << 20)/ne00)) : row_diff;
        ggml_cuda_pool_alloc<nv_bfloat16> expanded(ctx.pool(id));
        if (expand) {
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
            if (expand) {
                expand(stored, expanded.get(), rows*ne00, stream);
            }
            CUBLAS_CHECK(
                cublasGemmEx(ctx.cublas_handle(id), CUBLAS_OP_T, CUBLAS_OP_N,
                        rows, src1_ncols, ne10,
                        &alpha_f32,  expand ? (const void *) expanded.get() : stored, CUDA_R_16BF, ne00,
                                     src1_ptr,       CUDA_R_16BF, ne10,
                        &beta_f32,   dst_dd_i + row, CUDA_R_32F,  ldc,
                        CUBLAS_COMPUTE_32F,
                        CUBLAS_GEMM_DEFAULT_TENSOR_OP));
        }
")

  # On Hopper (and the data centre Blackwells) the int8 kernels reach less than half of what cuBLAS does. From 192 tokens
  # on, quantised weights take the way above there, which also keeps gradients of every size.
  change(${cuda}/mmq.cu "    if (turing_mma_available(cc)) {
        return true;" "    if (GGML_CUDA_CC_IS_NVIDIA(cc) && (cc == 900 || cc == 1000 || cc == 1030) && ne11 >= 192) {
        return false;
    }
    if (turing_mma_available(cc)) {
        return true;")
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
