// A C function for ctypes around csrc's launcher, compiled against cuda_shim. With EMULATE_MAIN a program
// that runs one problem in buffers without slack, for the sanitizers.
#include "window_attention_backward.h"

#include "window_attention_backward_shared.cuh"
#include "window_problem.h"

using harness::bytes_at;
using harness::extent;

namespace {

int run(const infimm::WindowAttentionBackwardParams& p, std::uint64_t seed) {
  const std::int64_t bounds = p.cu_seqlens_q == nullptr ? 0 : p.num_segments + 1;
  const std::int64_t rows = p.total_q * p.num_heads;
  shim::readable = {
      extent(p.q, p.total_q, p.num_heads, p.head_dim, p.q_stride_token, p.q_stride_head),
      extent(p.dout, p.total_q, p.num_heads, p.head_dim, p.dout_stride_token, p.dout_stride_head),
      extent(p.k, p.total_k, p.num_kv_heads, p.head_dim, p.k_stride_token, p.k_stride_head),
      extent(p.v, p.total_k, p.num_kv_heads, p.head_dim, p.v_stride_token, p.v_stride_head),
      bytes_at(p.lse, 4 * rows),
      bytes_at(p.delta, 4 * rows),
      bytes_at(p.cu_seqlens_q, 4 * bounds),
      bytes_at(p.cu_seqlens_k, 4 * bounds),
  };
  shim::scratch = {bytes_at(p.dq_sum, 4 * rows * p.head_dim)};
  shim::shared_limit = 227 << 10;  // what a block of sm_90 can have
  shim::scheduler_seed = seed;
  shim::error = cudaSuccess;
  const shim::HopperLaunch hopper(seed);
  const cudaError_t launched = infimm::launch_window_attention_backward(p, nullptr);
  if (!shim::complaint.empty()) std::fprintf(stderr, "%s\n", shim::complaint.c_str());
  return launched != cudaSuccess ? launched : shim::error;
}

}  // namespace

// numbers: the integers of WindowAttentionBackwardParams, in the order of the Python binding.
extern "C" int emulate_window_attention_backward(void* const* pointers, const std::int64_t* numbers,
                                                 float scale, std::uint64_t seed) {
  infimm::WindowAttentionBackwardParams p;
  p.q = pointers[0];
  p.k = pointers[1];
  p.v = pointers[2];
  p.dout = pointers[3];
  p.lse = static_cast<const float*>(pointers[4]);
  p.delta = static_cast<const float*>(pointers[5]);
  p.dq_sum = static_cast<float*>(pointers[6]);
  p.dk = pointers[7];
  p.dv = pointers[8];
  p.cu_seqlens_q = static_cast<const std::int32_t*>(pointers[9]);
  p.cu_seqlens_k = static_cast<const std::int32_t*>(pointers[10]);
  p.dtype = static_cast<infimm::DType>(*numbers++);
  for (std::int64_t* number :
       {&p.total_q,         &p.total_k,        &p.num_segments,      &p.seqlen,
        &p.num_heads,       &p.num_kv_heads,   &p.head_dim,          &p.num_prefix_tokens,
        &p.q_stride_token,  &p.q_stride_head,  &p.k_stride_token,    &p.k_stride_head,
        &p.v_stride_token,  &p.v_stride_head,  &p.dout_stride_token, &p.dout_stride_head,
        &p.dk_stride_token, &p.dk_stride_head, &p.dv_stride_token,   &p.dv_stride_head}) {
    *number = *numbers++;
  }
  p.softmax_scale = scale;
  return run(p, seed);
}

extern "C" int emulate_window_backward_shared_bytes(int head_dim) {
  return head_dim == 64 ? infimm::BackwardShared<64>::kBytes : infimm::BackwardShared<112>::kBytes;
}

extern "C" const char* emulate_complaint() { return shim::complaint.c_str(); }

#ifdef EMULATE_MAIN
int main(int argc, char** argv) {
  harness::Problem<infimm::WindowAttentionBackwardParams> problem(argc, argv);
  infimm::WindowAttentionBackwardParams& p = problem.params;
  const std::int64_t rows = p.total_q * p.num_heads, k_row = problem.k_row;
  harness::Elements q(p.total_q * problem.q_row, false), dout(p.total_q * problem.q_row, false),
      k(p.total_k * k_row, false), v(p.total_k * k_row, false), dk(p.total_k * k_row, true),
      dv(p.total_k * k_row, true);
  std::vector<float> lse(static_cast<std::size_t>(rows), 3.0f), delta(lse.size(), 0.5f);
  std::vector<float> sum(static_cast<std::size_t>(rows * p.head_dim), 0.0f);
  p.q = q.data();
  p.dout = dout.data();
  p.k = k.data();
  p.v = v.data();
  p.dk = dk.data();
  p.dv = dv.data();
  p.lse = lse.data();
  p.delta = delta.data();
  p.dq_sum = sum.data();
  p.dout_stride_token = problem.q_row;
  p.dk_stride_token = p.dv_stride_token = k_row;
  p.dout_stride_head = p.dk_stride_head = p.dv_stride_head = p.head_dim;
  const int error = run(p, problem.seed);
  bool complete = true;
  for (std::size_t segment = 0; segment + 1 < problem.cu_k.size(); ++segment) {
    const std::int64_t begin = problem.cu_k[segment] + p.num_prefix_tokens, end = problem.cu_k[segment + 1];
    for (std::int64_t i = begin * k_row; i < end * k_row; ++i)
      complete = complete && dk[i] != dk.kUnwritten && dv[i] != dv.kUnwritten;
  }
  if (!complete) std::printf("rows that nobody wrote\n");
  return error != 0 || !complete;
}
#endif
