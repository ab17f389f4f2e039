// The few CUDA names csrc uses, for g++: blocks and threads run one after another on the CPU. Only kernels
// without barriers, shuffles and shared memory can run this way. Loads are checked for alignment and bounds,
// stores of vectors for alignment (guards around the output show stray ones).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
  cudaErrorMisalignedAddress = 716,
};
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
namespace shim {

struct Range {
  std::uintptr_t begin, end;
};
inline std::vector<Range> readable, writable;
inline cudaError_t error = cudaSuccess;
inline unsigned grid_limit = ~0u;  // fewer blocks than asked for: a grid-stride kernel must not care

template <typename T>
bool may_load(const T* address) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  if (at % sizeof(T) != 0) {
    error = cudaErrorMisalignedAddress;
    return false;
  }
  for (const Range& range : readable) {
    if (at >= range.begin && at + sizeof(T) <= range.end) return true;
  }
  error = cudaErrorIllegalAddress;
  return false;
}

// For assignments to vectors, which may also be to local variables: those lie in no writable range.
inline void check_store(const void* address, std::uintptr_t size) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  for (const Range& range : writable) {
    if (at >= range.begin && at < range.end && at % size != 0) error = cudaErrorMisalignedAddress;
  }
}

}  // namespace shim

struct uint2 {
  unsigned x, y;
  uint2& operator=(const uint2& other) {
    shim::check_store(this, sizeof(*this));
    std::memcpy(this, &other, sizeof(*this));
    return *this;
  }
};
struct uint4 {
  unsigned x, y, z, w;
  uint4& operator=(const uint4& other) {
    shim::check_store(this, sizeof(*this));
    std::memcpy(this, &other, sizeof(*this));
    return *this;
  }
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

template <typename T>
T __ldg(const T* address) {
  return shim::may_load(address) ? *address : T{};
}
inline cudaError_t cudaGetLastError() { return std::exchange(shim::error, cudaSuccess); }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 block = config->blockDim, asked = config->gridDim;
  if (asked.x == 0 || block.x == 0 || block.y == 0 || block.x * block.y * block.z > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  blockDim = block;
  gridDim = dim3(asked.x < shim::grid_limit ? asked.x : shim::grid_limit);
  for (unsigned b = 0; b < gridDim.x; ++b) {
    for (unsigned y = 0; y < block.y; ++y) {
      for (unsigned x = 0; x < block.x; ++x) {
        blockIdx = dim3(b, 0, 0);
        threadIdx = dim3(x, y, 0);
        kernel(arguments...);
      }
    }
  }
  return cudaSuccess;
}
