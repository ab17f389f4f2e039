// The functions of csrc/ptx/sm90.cuh on a CPU: see hopper.h.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "hopper.h"

namespace infimm::ptx {

inline float exp2_approx(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline std::uint32_t shared_window() { return shim::kWindow; }
inline uint4 load_shared_16(std::uint32_t address) { return shim::load_shared<uint4>(address); }
inline uint2 load_shared_8(std::uint32_t address) { return shim::load_shared<uint2>(address); }
inline int load_shared_int(std::uint32_t address) { return shim::load_shared<int>(address); }
inline float load_shared_float(std::uint32_t address) { return shim::load_shared<float>(address); }
inline void store_shared_int(std::uint32_t address, int value) { shim::store_shared(address, value); }
inline void store_shared_float(std::uint32_t address, float value) { shim::store_shared(address, value); }
inline void store_shared_16(std::uint32_t address, uint4 value) { shim::store_shared(address, value); }

inline void add_global_pair(float* address, float x, float y) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  if (at % 8 != 0) shim::complain("misaligned reduction");
  for (const shim::Range& range : shim::scratch) {
    if (at < range.begin || at + 8 > range.end) continue;
    address[0] += x;
    address[1] += y;
    return;
  }
  shim::complain("reduction outside the sum");
}

inline void fence_async_proxy() {
  for (const shim::Fiber*& writer : shim::hopper->unfenced)
    if (writer == shim::current) writer = nullptr;
}

inline void named_barrier(int id, int threads) {
  if (id < 1 || id > 15 || threads % shim::kWarp != 0) shim::complain("no such barrier");
  shim::meet(shim::hopper->named[id], static_cast<unsigned>(threads));
}
inline void mbarrier_init(std::uint32_t barrier, int arrivals) {
  shim::hopper->barriers[barrier] = {{}, arrivals, arrivals, 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(std::uint32_t barrier) { shim::arrive_at(barrier, 0); }
inline void mbarrier_arrive_expect(std::uint32_t barrier, int bytes) { shim::arrive_at(barrier, bytes); }
inline void mbarrier_wait(std::uint32_t barrier, int parity) { shim::wait_for_parity(barrier, parity); }

inline void copy_box(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int channel, int head,
                     int token) {
  if (to % 1024 != 0) shim::complain("a swizzled box that is not aligned to 1024 bytes");
  shim::hopper->copies.push_back({to, barrier, *map, {channel, head, token}});
  if (shim::hopper->patience == shim::Patience::kEager) shim::land_one();
}
inline void prefetch_map(const CUtensorMap*) {}

template <int COUNT>
void take_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "rule of setmaxnreg");
}
template <int COUNT>
void give_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "rule of setmaxnreg");
}

inline void wgmma_fence() { shim::my_products().fenced = true; }
inline void wgmma_commit() { shim::commit_products(); }
template <int PENDING>
void wgmma_wait() {
  shim::wait_for_products(PENDING);
}
template <typename Registers>
void hold(Registers&) {}

template <typename T>
float element_to_float(std::uint16_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __bfloat162float({bits});
  else
    return __half2float({bits});
}

template <typename T, int N>
void wgmma(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, bool accumulate) {
  shim::Product product;
  product.columns = N;
  product.a = a;
  product.b = b;
  product.accumulate = accumulate;
  product.to_float = &element_to_float<T>;
  shim::issue(d, product);
}

template <typename T, int N>
void wgmma_both_transposed(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, bool accumulate) {
  shim::Product product;
  product.columns = N;
  product.a = a;
  product.b = b;
  product.a_by_row = product.b_by_row = true;
  product.accumulate = accumulate;
  product.to_float = &element_to_float<T>;
  shim::issue(d, product);
}

template <typename T, int N>
void wgmma_transposed(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint64_t b) {
  shim::Product product;
  product.columns = N;
  product.b = b;
  product.a_in_registers = product.b_by_row = true;
  product.to_float = &element_to_float<T>;
  std::memcpy(product.registers[0], a, sizeof(a));
  shim::issue(d, product);
}

}  // namespace infimm::ptx
