// The few CUDA names csrc uses, for g++. The blocks and threads of an ordinary launch run one after another
// on the CPU: only kernels without barriers, shuffles and shared memory can. Those of a cooperative launch
// are fibers. Loads are checked for alignment and bounds, stores of vectors for alignment (guards around the
// output show stray ones).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchTimeout = 702,
  cudaErrorIllegalInstruction = 715,
  cudaErrorMisalignedAddress = 716,
  cudaErrorSymbolNotFound = 500,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
namespace shim {

struct Range {
  std::uintptr_t begin, end;
};
inline std::vector<Range> readable, writable;
inline std::vector<Range> scratch;  // written and read by one launch: not through the read-only cache
inline unsigned num_sms = 1, blocks_per_sm = 1;
inline int shared_limit = 163 << 10;  // what a block of sm_80 can have
inline cudaError_t error = cudaSuccess;
inline unsigned grid_limit = ~0u;  // fewer blocks than asked for: a grid-stride kernel must not care

template <typename T>
bool may_load(const T* address, const std::vector<Range>& ranges) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  if (at % sizeof(T) != 0) {
    error = cudaErrorMisalignedAddress;
    return false;
  }
  for (const Range& range : ranges) {
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

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

template <typename T>
T __ldg(const T* address) {
  return shim::may_load(address, shim::readable) ? *address : T{};
}
template <typename T>
T __ldcg(const T* address) {
  return shim::may_load(address, shim::scratch) ? *address : T{};
}
inline void __syncwarp() {
  shim::meet(shim::current->block->warps[shim::current->thread / shim::kWarp].rendezvous, shim::kWarp);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < shim::kWarp; ++lane)
    votes |= static_cast<unsigned>(shim::from_lane(vote, lane)) << lane;
  return votes;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __syncthreads() { shim::meet(shim::current->block->rendezvous, shim::machine->threads); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return shim::from_lane(value, static_cast<unsigned>(lane));
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shim::from_lane(value, shim::current->thread % shim::kWarp ^ static_cast<unsigned>(mask));
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = shim::current->thread % shim::kWarp;
  return shim::from_lane(value, lane >= delta ? lane - delta : lane);
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= shim::shared_limit ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(shim::num_sms);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
  *blocks = static_cast<int>(shim::blocks_per_sm);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(shim::error, cudaSuccess); }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 block = config->blockDim, asked = config->gridDim;
  if (asked.x == 0 || block.x == 0 || block.y == 0 || block.x * block.y * block.z > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  if (config->numAttrs > 0 && config->attrs[0].val.cooperative) {
    if (asked.x > shim::num_sms * shim::blocks_per_sm) return cudaErrorCooperativeLaunchTooLarge;
    if (block.x % shim::kWarp != 0 || block.y * block.z != 1) return cudaErrorInvalidConfiguration;
    blockDim = block;
    gridDim = asked;
    const bool finished = shim::run_blocks(
        asked.x, block.x, config->dynamicSmemBytes, [&] { kernel(arguments...); },
        [](unsigned b, unsigned t) {
          blockIdx = dim3(b);
          threadIdx = dim3(t);
        });
    return finished ? cudaSuccess : cudaErrorLaunchTimeout;
  }
  blockDim = block;
  if (config->dynamicSmemBytes > 0) {  // threads that wait for each other, a block after the other
    gridDim = asked;
    for (unsigned b = 0; b < asked.x; ++b) {
      const bool finished = shim::run_blocks(
          1, block.x, config->dynamicSmemBytes, [&] { kernel(arguments...); },
          [b](unsigned, unsigned t) {
            blockIdx = dim3(b);
            threadIdx = dim3(t);
          });
      if (!finished) return cudaErrorLaunchTimeout;
    }
    return std::exchange(shim::error, cudaSuccess);
  }
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
