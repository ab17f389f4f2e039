#pragma once

#include <cuda_runtime.h>

namespace infimm {

// The dynamic shared memory of the block, aligned to 16 bytes.
__device__ __forceinline__ void* dynamic_shared_memory() {
#ifdef __CUDACC__
  extern __shared__ float4 shared_memory[];
  return shared_memory;
#else
  return shim::shared_memory();  // tests/emulate runs the blocks on a CPU
#endif
}

// Asks for a 128-byte line to be brought into L2; nothing waits for it.
__device__ __forceinline__ void prefetch_l2(const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
#else
  (void)address;
#endif
}

}  // namespace infimm
