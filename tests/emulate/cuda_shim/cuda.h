// The driver's tensor maps, for g++: a map keeps what it was made of.
#pragma once

#include <cstdint>

#include "cuda_runtime_api.h"

using cuuint32_t = std::uint32_t;
using cuuint64_t = std::uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(64) CUtensorMap {
  const char* address;
  std::int64_t sizes[3], strides[3], box[3];  // strides in bytes, fastest dimension first
  bool swizzled;
};

namespace shim {

// The rules of cuTensorMapEncodeTiled that a launch could break.
inline CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* address,
                                  const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                  const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                  CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const auto invalid = CUDA_ERROR_INVALID_VALUE;
  if (rank != 3 || reinterpret_cast<std::uintptr_t>(address) % 16 != 0) return invalid;
  if (reinterpret_cast<std::uintptr_t>(map) % 64 != 0) return invalid;
  map->address = static_cast<const char*>(address);
  map->swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  for (int i = 0; i < 3; ++i) {
    if (sizes[i] == 0 || sizes[i] > 1ull << 32 || box[i] == 0 || box[i] > 256 || steps[i] != 1)
      return invalid;
    map->sizes[i] = static_cast<std::int64_t>(sizes[i]);
    map->box[i] = box[i];
    map->strides[i] = i == 0 ? 2 : static_cast<std::int64_t>(strides[i - 1]);
    if (i > 0 && (strides[i - 1] % 16 != 0 || strides[i - 1] >= 1ull << 40)) return invalid;
  }
  return box[0] * 2 % 16 == 0 && (!map->swizzled || box[0] * 2 <= 128) ? CUDA_SUCCESS : invalid;
}

}  // namespace shim

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
enum { cudaEnableDefault = 0 };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&shim::encode_tensor_map);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
