// The instructions of sm_90a that CUDA C++ has no names for, one function each; PTX ISA 8.0, chapters
// "mbarrier", "cp.async.bulk.tensor", "wgmma" and "setmaxnreg". Shared memory is addressed by its 32-bit
// window. tests/emulate/cuda_shim has a file of this name that does the same on a CPU.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace infimm::ptx {

// 2^x as the hardware has it, 0 below the normal numbers: exp2f spends three more instructions on those.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- shared memory ------------------------------------------------------

// The dynamic shared memory of the block. The launcher asks for 1024 bytes more than it uses.
__device__ __forceinline__ uint32_t shared_window() {
  extern __shared__ uint4 dynamic_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ int load_shared_int(uint32_t address) {
  int v;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_int(uint32_t address, int value) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ float load_shared_float(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_float(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_shared_16(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// Adds to two neighbouring floats in global memory, whose address is a multiple of 8.
__device__ __forceinline__ void add_global_pair(float* address, float x, float y) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(address)), "f"(x),
               "f"(y)
               : "memory");
}

// Ordinary stores of this thread become visible to wgmma and the copy engine; before the barrier that tells
// others of them.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- barriers -----------------------------------------------------------

// Waits for `threads` threads of the block at hardware barrier `id`, 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Initialised barriers become visible to the copy engine; a __syncthreads must follow.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives and lets the phase wait for `bytes` of copies too.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity has ended; true at once for the parity before the first phase (1).
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --- tensor memory access -----------------------------------------------

// Copies the map's box at (channel, head, token) to shared memory; completion counts bytes at `barrier`.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int channel,
                                         int head, int token) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(channel), "r"(head), "r"(token)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// --- register allocation ------------------------------------------------

template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// --- wgmma --------------------------------------------------------------

// Registers written before it are visible to the wgmma behind it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most PENDING committed groups are in flight.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Registers that a wgmma in flight reads or writes: no move of them crosses this line. Without it ptxas waits
// for every wgmma by itself (warning C7510 and its neighbours).
template <int N>
__device__ __forceinline__ void hold(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int N>
__device__ __forceinline__ void hold(uint32_t (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

#define INFIMM_ACC8(d, i)                                                                     \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define INFIMM_ACC32(d) INFIMM_ACC8(d, 0), INFIMM_ACC8(d, 8), INFIMM_ACC8(d, 16), INFIMM_ACC8(d, 24)
#define INFIMM_ACC56(d) INFIMM_ACC32(d), INFIMM_ACC8(d, 32), INFIMM_ACC8(d, 40), INFIMM_ACC8(d, 48)
#define INFIMM_ACC64(d) INFIMM_ACC56(d), INFIMM_ACC8(d, 56)
#define INFIMM_NAMES32                                                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define INFIMM_NAMES56                                                                                \
  INFIMM_NAMES32                                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55"
#define INFIMM_NAMES64 INFIMM_NAMES56 ", %56, %57, %58, %59, %60, %61, %62, %63"

// The instruction with both operands in shared memory, N / 2 accumulators a thread; operands that come after
// the accumulators are numbered from N / 2. `accumulate` false: the product replaces what d holds.
#define INFIMM_WGMMA_SHARED(N, HALF, TYPE, TRANSPOSE_A, TRANSPOSE_B, A, B, FLAG)                       \
  asm volatile("{.reg .pred accumulate; setp.ne.b32 accumulate, %" FLAG                                \
               ", 0;\n"                                                                                \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" INFIMM_NAMES##HALF \
               "}, %" A ", %" B ", accumulate, 1, 1, " TRANSPOSE_A ", " TRANSPOSE_B ";}\n"             \
               : INFIMM_ACC##HALF(d)                                                                   \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define INFIMM_WGMMA_REGISTERS(N, HALF, TYPE, TRANSPOSE_B, A0, A1, A2, A3, B)                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" INFIMM_NAMES##HALF \
               "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B ", 1, 1, 1, " TRANSPOSE_B ";\n"          \
               : INFIMM_ACC##HALF(d)                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d[64, N] (+)= A[64, 16] B[16, N]: both from shared memory, stored with their K index running fastest.
template <typename T, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128, "shapes that the kernels use");
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (N == 64 && kBFloat16) INFIMM_WGMMA_SHARED(64, 32, "bf16", "0", "0", "32", "33", "34");
  if constexpr (N == 64 && !kBFloat16) INFIMM_WGMMA_SHARED(64, 32, "f16", "0", "0", "32", "33", "34");
  if constexpr (N == 128 && kBFloat16) INFIMM_WGMMA_SHARED(128, 64, "bf16", "0", "0", "64", "65", "66");
  if constexpr (N == 128 && !kBFloat16) INFIMM_WGMMA_SHARED(128, 64, "f16", "0", "0", "64", "65", "66");
}

// d[64, N] (+)= A[64, 16] B[16, N]: both from shared memory, with their M and N index running fastest.
template <typename T, int N>
__device__ __forceinline__ void wgmma_both_transposed(float (&d)[N / 2], uint64_t a, uint64_t b,
                                                      bool accumulate) {
  static_assert(N == 64 || N == 112, "shapes that the kernels use");
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (N == 64 && kBFloat16) INFIMM_WGMMA_SHARED(64, 32, "bf16", "1", "1", "32", "33", "34");
  if constexpr (N == 64 && !kBFloat16) INFIMM_WGMMA_SHARED(64, 32, "f16", "1", "1", "32", "33", "34");
  if constexpr (N == 112 && kBFloat16) INFIMM_WGMMA_SHARED(112, 56, "bf16", "1", "1", "56", "57", "58");
  if constexpr (N == 112 && !kBFloat16) INFIMM_WGMMA_SHARED(112, 56, "f16", "1", "1", "56", "57", "58");
}

// d[64, N] += A[64, 16] B[16, N]: A from registers, B from shared memory with its N index running fastest.
template <typename T, int N>
__device__ __forceinline__ void wgmma_transposed(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N == 64 || N == 112 || N == 128, "shapes that the kernels use");
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (N == 64 && kBFloat16)
    INFIMM_WGMMA_REGISTERS(64, 32, "bf16", "1", "32", "33", "34", "35", "36");
  if constexpr (N == 64 && !kBFloat16)
    INFIMM_WGMMA_REGISTERS(64, 32, "f16", "1", "32", "33", "34", "35", "36");
  if constexpr (N == 112 && kBFloat16)
    INFIMM_WGMMA_REGISTERS(112, 56, "bf16", "1", "56", "57", "58", "59", "60");
  if constexpr (N == 112 && !kBFloat16)
    INFIMM_WGMMA_REGISTERS(112, 56, "f16", "1", "56", "57", "58", "59", "60");
  if constexpr (N == 128 && kBFloat16)
    INFIMM_WGMMA_REGISTERS(128, 64, "bf16", "1", "64", "65", "66", "67", "68");
  if constexpr (N == 128 && !kBFloat16)
    INFIMM_WGMMA_REGISTERS(128, 64, "f16", "1", "64", "65", "66", "67", "68");
}

}  // namespace infimm::ptx
