// The copy engine's description of a tensor, made on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace infimm {

// Of [tokens, heads, channels] with strides in elements, for copies of [rows, 1, 64] with 128-byte swizzle;
// what lies outside the tensor is read as zero. The address and both strides in bytes are multiples of 16.
inline cudaError_t make_tensor_map(CUtensorMap* map, const void* address, CUtensorMapDataType type,
                                   int64_t tokens, int64_t heads, int64_t channels, int64_t stride_token,
                                   int64_t stride_head, int rows) {
  // Through the runtime, so that nothing links against libcuda: the module loads where there is no driver.
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  constexpr int64_t kElement = 2;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(channels), static_cast<cuuint64_t>(heads),
                               static_cast<cuuint64_t>(tokens)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(stride_head * kElement),
                                 static_cast<cuuint64_t>(stride_token * kElement)};
  const cuuint32_t box[3] = {64, 1, static_cast<cuuint32_t>(rows)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = reinterpret_cast<Encode>(function)(
      map, type, 3, const_cast<void*>(address), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace infimm
