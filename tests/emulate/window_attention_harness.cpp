// A C function for ctypes around csrc's launcher, compiled against cuda_shim. With EMULATE_MAIN a program
// that runs one problem in buffers without slack, for the sanitizers.
#include "window_attention.h"

#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "hopper.h"
#include "window_attention_shared.cuh"

namespace {

shim::Range extent(const void* address, std::int64_t tokens, std::int64_t heads, std::int64_t channels,
                   std::int64_t stride_token, std::int64_t stride_head) {
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  const std::int64_t elements =
      tokens == 0 ? 0 : (tokens - 1) * stride_token + (heads - 1) * stride_head + channels;
  return {begin, begin + static_cast<std::uintptr_t>(elements) * 2};
}

int run(const infimm::WindowAttentionParams& p, unsigned num_sms, std::uint64_t seed) {
  const std::int64_t bounds = p.cu_seqlens_q == nullptr ? 0 : p.num_segments + 1;
  const auto cu_q = reinterpret_cast<std::uintptr_t>(p.cu_seqlens_q);
  const auto cu_k = reinterpret_cast<std::uintptr_t>(p.cu_seqlens_k);
  shim::readable = {
      extent(p.q, p.total_q, p.num_heads, p.head_dim, p.q_stride_token, p.q_stride_head),
      extent(p.k, p.total_k, p.num_kv_heads, p.head_dim, p.k_stride_token, p.k_stride_head),
      extent(p.v, p.total_k, p.num_kv_heads, p.head_dim, p.v_stride_token, p.v_stride_head),
      {cu_q, cu_q + static_cast<std::uintptr_t>(4 * bounds)},
      {cu_k, cu_k + static_cast<std::uintptr_t>(4 * bounds)},
  };
  shim::num_sms = num_sms;
  shim::shared_limit = 227 << 10;  // what a block of sm_90 can have
  shim::scheduler_seed = seed;
  shim::error = cudaSuccess;
  const shim::HopperLaunch hopper(seed);
  const cudaError_t launched = infimm::launch_window_attention(p, nullptr);
  if (!shim::complaint.empty()) std::fprintf(stderr, "%s\n", shim::complaint.c_str());
  return launched != cudaSuccess ? launched : shim::error;
}

}  // namespace

// numbers: the integers of WindowAttentionParams, in the order of the Python binding.
extern "C" int emulate_window_attention(void* const* pointers, const std::int64_t* numbers, float scale,
                                        unsigned num_sms, std::uint64_t seed) {
  infimm::WindowAttentionParams p;
  p.q = pointers[0];
  p.k = pointers[1];
  p.v = pointers[2];
  p.out = pointers[3];
  p.lse = static_cast<float*>(pointers[4]);
  p.cu_seqlens_q = static_cast<const std::int32_t*>(pointers[5]);
  p.cu_seqlens_k = static_cast<const std::int32_t*>(pointers[6]);
  p.dtype = static_cast<infimm::DType>(*numbers++);
  for (std::int64_t* number :
       {&p.total_q, &p.total_k, &p.num_segments, &p.seqlen, &p.num_heads, &p.num_kv_heads, &p.head_dim,
        &p.num_prefix_tokens, &p.q_stride_token, &p.q_stride_head, &p.k_stride_token, &p.k_stride_head,
        &p.v_stride_token, &p.v_stride_head}) {
    *number = *numbers++;
  }
  p.softmax_scale = scale;
  return run(p, num_sms, seed);
}

extern "C" int emulate_window_shared_bytes(int head_dim, bool prefix) {
  return head_dim == 64    ? infimm::WindowShared<64>::bytes(prefix)
         : head_dim == 112 ? infimm::WindowShared<112>::bytes(prefix)
                           : infimm::WindowShared<128>::bytes(prefix);
}

extern "C" const char* emulate_complaint() { return shim::complaint.c_str(); }

#ifdef EMULATE_MAIN
// Arguments: head_dim heads kv_heads prefix seed, then lengths of segments (of queries, keys).
int main(int argc, char** argv) {
  const auto number = [&](int i) { return std::strtoll(argv[i], nullptr, 10); };
  infimm::WindowAttentionParams p = {};
  p.dtype = infimm::DType::kBFloat16;
  p.head_dim = number(1);
  p.num_heads = number(2);
  p.num_kv_heads = number(3);
  p.num_prefix_tokens = number(4);
  const auto seed = static_cast<std::uint64_t>(number(5));
  std::vector<std::int32_t> cu_q = {0}, cu_k = {0};
  for (int i = 6; i + 1 < argc; i += 2) {
    cu_q.push_back(cu_q.back() + static_cast<std::int32_t>(number(i)));
    cu_k.push_back(cu_k.back() + static_cast<std::int32_t>(number(i + 1)));
  }
  p.num_segments = static_cast<std::int64_t>(cu_q.size()) - 1;
  p.total_q = cu_q.back();
  p.total_k = cu_k.back();
  const auto tensor = [](std::int64_t elements) {
    auto* memory = static_cast<std::uint16_t*>(
        std::aligned_alloc(16, static_cast<std::size_t>(elements * 2 + 15) / 16 * 16));
    for (std::int64_t i = 0; i < elements; ++i)
      memory[i] = static_cast<std::uint16_t>(0x3e00 + i * 7 % 0x180);
    return memory;
  };
  const std::int64_t q_row = p.num_heads * p.head_dim, k_row = p.num_kv_heads * p.head_dim;
  auto *q = tensor(p.total_q * q_row), *k = tensor(p.total_k * k_row), *v = tensor(p.total_k * k_row);
  std::vector<std::uint16_t> out(static_cast<std::size_t>(p.total_q * q_row), 0xffff);
  std::vector<float> lse(static_cast<std::size_t>(p.total_q * p.num_heads), NAN);
  p.q = q;
  p.k = k;
  p.v = v;
  p.out = out.data();
  p.lse = lse.data();
  p.cu_seqlens_q = cu_q.data();
  p.cu_seqlens_k = cu_k.data();
  p.q_stride_token = q_row;
  p.k_stride_token = p.v_stride_token = k_row;
  p.q_stride_head = p.k_stride_head = p.v_stride_head = p.head_dim;
  p.softmax_scale = 0.1f;
  const int error = run(p, 2, seed);
  bool complete = true;
  for (const std::uint16_t element : out) complete = complete && element != 0xffff;
  for (const float element : lse) complete = complete && element == element;
  std::free(q);
  std::free(k);
  std::free(v);
  if (!complete) std::printf("rows that nobody wrote\n");
  return error != 0 || !complete;
}
#endif
