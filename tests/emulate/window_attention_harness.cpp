// A C function for ctypes around csrc's launcher, compiled against cuda_shim. With EMULATE_MAIN a program
// that runs one problem in buffers without slack, for the sanitizers.
#include "window_attention.h"

#include "window_attention_shared.cuh"
#include "window_problem.h"

using harness::bytes_at;
using harness::extent;

namespace {

int run(const infimm::WindowAttentionParams& p, unsigned num_sms, std::uint64_t seed) {
  const std::int64_t bounds = p.cu_seqlens_q == nullptr ? 0 : p.num_segments + 1;
  shim::readable = {
      extent(p.q, p.total_q, p.num_heads, p.head_dim, p.q_stride_token, p.q_stride_head),
      extent(p.k, p.total_k, p.num_kv_heads, p.head_dim, p.k_stride_token, p.k_stride_head),
      extent(p.v, p.total_k, p.num_kv_heads, p.head_dim, p.v_stride_token, p.v_stride_head),
      bytes_at(p.cu_seqlens_q, 4 * bounds),
      bytes_at(p.cu_seqlens_k, 4 * bounds),
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
int main(int argc, char** argv) {
  harness::Problem<infimm::WindowAttentionParams> problem(argc, argv);
  infimm::WindowAttentionParams& p = problem.params;
  const std::int64_t rows = p.total_q * p.num_heads;
  harness::Elements q(p.total_q * problem.q_row, false), k(p.total_k * problem.k_row, false),
      v(p.total_k * problem.k_row, false);
  std::vector<std::uint16_t> out(static_cast<std::size_t>(rows * p.head_dim), harness::Elements::kUnwritten);
  std::vector<float> lse(static_cast<std::size_t>(rows), NAN);
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.out = out.data();
  p.lse = lse.data();
  const int error = run(p, 2, problem.seed);
  bool complete = true;
  for (const std::uint16_t element : out) complete = complete && element != harness::Elements::kUnwritten;
  for (const float element : lse) complete = complete && element == element;
  if (!complete) std::printf("rows that nobody wrote\n");
  return error != 0 || !complete;
}
#endif
