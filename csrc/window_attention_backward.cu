#include "window_attention_backward.cuh"

#include <algorithm>

#include "common/tensor_map.h"

namespace infimm {
namespace {

cudaError_t fill(WindowAttentionBackwardLaunch& launch) {
  const WindowAttentionBackwardParams& p = launch.params;
  const CUtensorMapDataType type =
      p.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto map = [&](CUtensorMap& to, const void* tensor, int64_t tokens, int64_t heads,
                       int64_t stride_token, int64_t stride_head, int rows) {
    return make_tensor_map(&to, tensor, type, tokens, heads, p.head_dim, stride_token, stride_head, rows);
  };
  cudaError_t error =
      map(launch.q, p.q, p.total_q, p.num_heads, p.q_stride_token, p.q_stride_head, kBackwardQueries);
  if (error == cudaSuccess)
    error = map(launch.dout, p.dout, p.total_q, p.num_heads, p.dout_stride_token, p.dout_stride_head,
                kBackwardQueries);
  if (error == cudaSuccess)
    error = map(launch.k, p.k, p.total_k, p.num_kv_heads, p.k_stride_token, p.k_stride_head, kBackwardKeys);
  if (error == cudaSuccess)
    error = map(launch.v, p.v, p.total_k, p.num_kv_heads, p.v_stride_token, p.v_stride_head, kBackwardKeys);
  launch.scale_log2 = p.softmax_scale * kBackwardLog2E;
  if (p.cu_seqlens_k == nullptr) {
    const int64_t rows = p.seqlen - p.num_prefix_tokens;
    launch.tiles_per_segment =
        static_cast<int>(std::max<int64_t>(1, (rows + kBackwardKeys - 1) / kBackwardKeys));
    launch.num_slots = static_cast<int>(p.num_segments * launch.tiles_per_segment);
  } else {
    launch.tiles_per_segment = 0;
    launch.num_slots = static_cast<int>(p.total_k / kBackwardKeys + p.num_segments);
  }
  return error;
}

template <typename T, int HEAD_DIM>
cudaError_t launch(const WindowAttentionBackwardLaunch& launch, cudaStream_t stream) {
  const auto kernel = window_attention_backward_kernel<T, HEAD_DIM>;
  constexpr int kBytes = BackwardShared<HEAD_DIM>::kBytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // so that the next call does not find it
    return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(launch.num_slots * launch.params.num_kv_heads));
  config.blockDim = dim3(kBackwardThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, launch);
  const cudaError_t last = cudaGetLastError();
  return launched != cudaSuccess ? launched : last;
}

template <typename T>
cudaError_t launch_head_dim(const WindowAttentionBackwardLaunch& filled, cudaStream_t stream) {
  return filled.params.head_dim == 64 ? launch<T, 64>(filled, stream) : launch<T, 112>(filled, stream);
}

// What is written in pairs. Of what the copy engine reads, this is checked where its maps are made.
bool is_aligned(const WindowAttentionBackwardParams& p) {
  const auto addresses = reinterpret_cast<uintptr_t>(p.dk) | reinterpret_cast<uintptr_t>(p.dv);
  const int64_t strides = p.dk_stride_token | p.dk_stride_head | p.dv_stride_token | p.dv_stride_head;
  return addresses % 4 == 0 && strides % 2 == 0 && reinterpret_cast<uintptr_t>(p.dq_sum) % 8 == 0;
}

bool is_supported(const WindowAttentionBackwardParams& p) {
  const bool ragged = p.cu_seqlens_q != nullptr;
  return p.dtype != DType::kFloat32 && (p.head_dim == 64 || p.head_dim == 112) && p.total_q >= 0 &&
         p.total_q <= kWindowAttentionMaxTokens && p.total_k >= 0 && p.total_k <= kWindowAttentionMaxTokens &&
         p.num_kv_heads > 0 && p.num_heads >= p.num_kv_heads && p.num_heads <= kWindowAttentionMaxHeads &&
         p.num_heads % p.num_kv_heads == 0 && p.num_segments >= 0 && p.num_prefix_tokens >= 0 &&
         p.num_prefix_tokens <= kWindowAttentionMaxPrefix && ragged == (p.cu_seqlens_k != nullptr) &&
         (ragged ? p.seqlen == 0 : p.num_segments * p.seqlen == p.total_q && p.total_q == p.total_k) &&
         (p.total_k / kBackwardKeys + p.num_segments) * p.num_kv_heads <= INT32_MAX / 2 &&
         p.softmax_scale > 0 && is_aligned(p);
}

}  // namespace

cudaError_t launch_window_attention_backward(const WindowAttentionBackwardParams& params,
                                             cudaStream_t stream) {
  if (!is_supported(params)) return cudaErrorInvalidValue;
  if (params.total_q == 0 || params.total_k == 0 || params.num_segments == 0) return cudaSuccess;
  WindowAttentionBackwardLaunch filled = {};
  filled.params = params;
  const cudaError_t error = fill(filled);
  if (error != cudaSuccess) return error;
  return params.dtype == DType::kBFloat16 ? launch_head_dim<__nv_bfloat16>(filled, stream)
                                          : launch_head_dim<__half>(filled, stream);
}

}  // namespace infimm
