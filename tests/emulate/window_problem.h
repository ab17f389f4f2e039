// What the harnesses of window_attention and its backward share: extents of tensors, and the problem that a
// program for the sanitizers makes of its arguments.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "hopper.h"

namespace harness {

inline shim::Range extent(const void* address, std::int64_t tokens, std::int64_t heads, std::int64_t channels,
                          std::int64_t stride_token, std::int64_t stride_head) {
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  const std::int64_t elements =
      tokens == 0 ? 0 : (tokens - 1) * stride_token + (heads - 1) * stride_head + channels;
  return {begin, begin + static_cast<std::uintptr_t>(elements) * 2};
}

inline shim::Range bytes_at(const void* address, std::int64_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  return {begin, begin + static_cast<std::uintptr_t>(bytes)};
}

// Elements of 16 bits at a multiple of 16 bytes and without slack behind them.
class Elements {
 public:
  Elements(std::int64_t count, bool unwritten)
      : memory_(static_cast<std::uint16_t*>(
            std::aligned_alloc(16, static_cast<std::size_t>(count * 2 + 15) / 16 * 16))) {
    for (std::int64_t i = 0; i < count; ++i)
      memory_[i] = unwritten ? kUnwritten : static_cast<std::uint16_t>(0x3e00 + i * 7 % 0x180);
  }
  ~Elements() { std::free(memory_); }
  Elements(const Elements&) = delete;
  Elements& operator=(const Elements&) = delete;

  static constexpr std::uint16_t kUnwritten = 0xffff;
  std::uint16_t* data() { return memory_; }
  std::uint16_t operator[](std::int64_t i) const { return memory_[i]; }

 private:
  std::uint16_t* memory_;
};

// Arguments: head_dim heads kv_heads prefix seed, then lengths of segments (of queries, keys).
template <typename Params>
struct Problem {
  Params params = {};
  std::uint64_t seed = 0;
  std::vector<std::int32_t> cu_q = {0}, cu_k = {0};
  std::int64_t q_row = 0, k_row = 0;  // elements of a token

  Problem(int argc, char** argv) {
    const auto number = [&](int i) { return std::strtoll(argv[i], nullptr, 10); };
    params.dtype = infimm::DType::kBFloat16;
    params.head_dim = number(1);
    params.num_heads = number(2);
    params.num_kv_heads = number(3);
    params.num_prefix_tokens = number(4);
    seed = static_cast<std::uint64_t>(number(5));
    for (int i = 6; i + 1 < argc; i += 2) {
      cu_q.push_back(cu_q.back() + static_cast<std::int32_t>(number(i)));
      cu_k.push_back(cu_k.back() + static_cast<std::int32_t>(number(i + 1)));
    }
    params.num_segments = static_cast<std::int64_t>(cu_q.size()) - 1;
    params.total_q = cu_q.back();
    params.total_k = cu_k.back();
    params.cu_seqlens_q = cu_q.data();
    params.cu_seqlens_k = cu_k.data();
    params.softmax_scale = 0.1f;
    q_row = params.num_heads * params.head_dim;
    k_row = params.num_kv_heads * params.head_dim;
    params.q_stride_token = q_row;
    params.k_stride_token = params.v_stride_token = k_row;
    params.q_stride_head = params.k_stride_head = params.v_stride_head = params.head_dim;
  }
};

}  // namespace harness
