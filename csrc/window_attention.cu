#include "window_attention.cuh"

#include <algorithm>

#include "common/tensor_map.h"

namespace infimm {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

CUtensorMapDataType element_type(DType dtype) {
  return dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

cudaError_t fill(WindowAttentionLaunch& launch) {
  const WindowAttentionParams& p = launch.params;
  const CUtensorMapDataType type = element_type(p.dtype);
  cudaError_t error = make_tensor_map(&launch.q, p.q, type, p.total_q, p.num_heads, p.head_dim,
                                      p.q_stride_token, p.q_stride_head, kQueryRows);
  // A map has at least one row. Of an empty tensor nobody copies any.
  const bool has_keys = p.total_k > 0;
  const int64_t total_k = has_keys ? p.total_k : 1;
  if (error == cudaSuccess)
    error = make_tensor_map(&launch.k, has_keys ? p.k : p.q, type, total_k, p.num_kv_heads, p.head_dim,
                            p.k_stride_token, p.k_stride_head, kKeyRows);
  if (error == cudaSuccess)
    error = make_tensor_map(&launch.v, has_keys ? p.v : p.q, type, total_k, p.num_kv_heads, p.head_dim,
                            p.v_stride_token, p.v_stride_head, kKeyRows);
  launch.scale_log2 = p.softmax_scale * kLog2E;
  if (p.cu_seqlens_q == nullptr) {
    const int64_t rows = p.seqlen - p.num_prefix_tokens;
    launch.tiles_per_segment = static_cast<int>(std::max<int64_t>(1, (rows + kQueryRows - 1) / kQueryRows));
    launch.num_slots = static_cast<int>(p.num_segments * launch.tiles_per_segment);
  } else {
    launch.tiles_per_segment = 0;
    launch.num_slots = static_cast<int>(p.total_q / kQueryRows + p.num_segments);
  }
  return error;
}

template <typename T, int HEAD_DIM>
cudaError_t launch(const WindowAttentionLaunch& launch, cudaStream_t stream) {
  const auto kernel = window_attention_kernel<T, HEAD_DIM>;
  const int bytes = WindowShared<HEAD_DIM>::bytes(launch.params.num_prefix_tokens > 0);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  int device = 0, num_sms = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // so that the next call does not find it
    return error;
  }
  const int64_t works = launch.num_slots * launch.params.num_heads;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(works, num_sms)));
  config.blockDim = dim3(kWindowThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, launch);
  const cudaError_t last = cudaGetLastError();
  return launched != cudaSuccess ? launched : last;
}

template <typename T>
cudaError_t launch_head_dim(const WindowAttentionLaunch& filled, cudaStream_t stream) {
  switch (filled.params.head_dim) {
    case 64:
      return launch<T, 64>(filled, stream);
    case 112:
      return launch<T, 112>(filled, stream);
    default:
      return launch<T, 128>(filled, stream);
  }
}

// Addresses and strides of what the copy engine reads are checked where its maps are made.
bool is_supported(const WindowAttentionParams& p) {
  const bool ragged = p.cu_seqlens_q != nullptr;
  return p.dtype != DType::kFloat32 && (p.head_dim == 64 || p.head_dim == 112 || p.head_dim == 128) &&
         p.total_q >= 0 && p.total_q <= kWindowAttentionMaxTokens && p.total_k >= 0 &&
         p.total_k <= kWindowAttentionMaxTokens && p.num_kv_heads > 0 && p.num_heads >= p.num_kv_heads &&
         p.num_heads <= kWindowAttentionMaxHeads && p.num_heads % p.num_kv_heads == 0 &&
         p.num_segments >= 0 && p.num_prefix_tokens >= 0 &&
         p.num_prefix_tokens <= kWindowAttentionMaxPrefix && ragged == (p.cu_seqlens_k != nullptr) &&
         (ragged ? p.seqlen == 0 : p.num_segments * p.seqlen == p.total_q && p.total_q == p.total_k) &&
         (p.total_q / kQueryRows + p.num_segments) * p.num_heads <= INT32_MAX / 2 && p.softmax_scale > 0;
}

}  // namespace

cudaError_t launch_window_attention(const WindowAttentionParams& params, cudaStream_t stream) {
  if (!is_supported(params)) return cudaErrorInvalidValue;
  if (params.total_q == 0 || params.num_segments == 0) return cudaSuccess;
  WindowAttentionLaunch filled = {};
  filled.params = params;
  const cudaError_t error = fill(filled);
  if (error != cudaSuccess) return error;
  return params.dtype == DType::kBFloat16 ? launch_head_dim<__nv_bfloat16>(filled, stream)
                                          : launch_head_dim<__half>(filled, stream);
}

}  // namespace infimm
