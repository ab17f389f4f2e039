#include "decode_attention.cuh"

#include <algorithm>

namespace infimm {
namespace {

// The kernel's blocks wait for each other, so all of them must run at once. A cooperative launch guarantees
// that or fails; an ordinary one of the same size could hang when two such kernels on two streams get half of
// the GPU each. The grid barrier's counter is the driver's: nothing to clear before a launch or a replay of a
// CUDA graph.
template <typename T, int LANES, int ROWS, int BYTES>
cudaError_t launch(const DecodeAttentionParams& p, cudaStream_t stream) {
  const auto kernel = decode_attention_kernel<T, LANES, ROWS, BYTES>;
  const int bytes = decode_shared<LANES, ROWS>(p).bytes;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  int device = 0, num_sms = 0, blocks_per_sm = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, kDecodeThreads, bytes);
  if (error == cudaSuccess && blocks_per_sm == 0) error = cudaErrorInvalidConfiguration;
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // so that the next call does not find it
    return error;
  }

  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(
      static_cast<unsigned>(std::min<int64_t>(p.max_blocks, static_cast<int64_t>(num_sms) * blocks_per_sm)));
  config.blockDim = dim3(kDecodeThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, p);
  const cudaError_t last = cudaGetLastError();
  return launched != cudaSuccess ? launched : last;
}

template <typename T>
bool aligned(const DecodeAttentionParams& p) {
  const auto addresses = reinterpret_cast<uintptr_t>(p.key) | reinterpret_cast<uintptr_t>(p.value) |
                         reinterpret_cast<uintptr_t>(p.out_weight);
  const int64_t strides = p.key_stride_token | p.key_stride_head | p.value_stride_token |
                          p.value_stride_head | p.out_weight_stride_row;
  return (static_cast<int64_t>(addresses) | (strides * static_cast<int64_t>(sizeof(T)))) % 16 == 0;
}

// One query row for each key head is the usual step of a generation, for which the half-precision types have
// a kernel of their own; float32 has none, for the time it takes to compile.
template <typename T, int LANES>
cudaError_t launch_rows(const DecodeAttentionParams& p, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2)
    if (p.text_len * p.num_heads == p.num_kv_heads) return launch<T, LANES, 1, 16>(p, stream);
  return launch<T, LANES, 8, 16>(p, stream);
}

// Accesses of 16 bytes where pointers and strides allow them. The rare rest moves single elements, and one
// kernel for every head_dim does.
template <typename T>
cudaError_t launch_head_dim(const DecodeAttentionParams& p, cudaStream_t stream) {
  if (!aligned<T>(p)) return launch<T, kDecodeMaxHeadDim / kDecodeChunk, 8, sizeof(T)>(p, stream);
  if (p.head_dim <= 64) return launch_rows<T, 8>(p, stream);
  if (p.head_dim <= 128) return launch_rows<T, 16>(p, stream);
  return launch_rows<T, 32>(p, stream);
}

bool is_supported(const DecodeAttentionParams& p) {
  return p.batch >= 0 && p.batch <= kDecodeMaxBatch && p.text_len >= 0 && p.text_len <= kDecodeMaxTextLen &&
         p.hidden >= 0 && p.total >= 0 && p.total <= kDecodeMaxTokens && p.num_kv_heads > 0 &&
         p.num_heads >= p.num_kv_heads && p.num_heads <= kDecodeMaxHeads &&
         p.num_heads % p.num_kv_heads == 0 && p.head_dim > 0 && p.head_dim <= kDecodeMaxHeadDim &&
         p.head_dim % kDecodeChunk == 0 && p.max_blocks > 0 && p.max_blocks <= kDecodeMaxBlocks &&
         p.workspace_floats >= decode_workspace_floats(p);
}

}  // namespace

cudaError_t launch_decode_attention(const DecodeAttentionParams& p, cudaStream_t stream) {
  if (!is_supported(p)) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.text_len == 0 || p.hidden == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_head_dim<float>(p, stream);
    case DType::kFloat16:
      return launch_head_dim<__half>(p, stream);
    case DType::kBFloat16:
      return launch_head_dim<__nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace infimm
