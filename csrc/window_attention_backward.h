#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "window_attention.h"

namespace infimm {

// The main part of the backward of window_attention: dk and dv of the keys behind each segment's prefix, and
// their share of dq. What it takes is what infimm_kernels/attention/triton_launch.py gives to its Triton
// kernel: delta = rowsum(out * dout) - dlse, and dq_sum, to which it adds (unscaled). Strides are in
// elements; every last stride is 1; addresses and strides of q, k, v and dout are multiples of 16 bytes.
struct WindowAttentionBackwardParams {
  const void* q;                // [total_q, num_heads, head_dim]
  const void* k;                // [total_k, num_kv_heads, head_dim]
  const void* v;                // [total_k, num_kv_heads, head_dim]
  const void* dout;             // [total_q, num_heads, head_dim]
  const float* lse;             // [num_heads, total_q], contiguous
  const float* delta;           // [num_heads, total_q], contiguous
  float* dq_sum;                // [total_q, num_heads, head_dim], contiguous
  void* dk;                     // [total_k, num_kv_heads, head_dim]; prefix rows are left alone
  void* dv;                     // [total_k, num_kv_heads, head_dim]; prefix rows are left alone
  const int32_t* cu_seqlens_q;  // [num_segments + 1]; null: segments of seqlen tokens, of queries and keys
  const int32_t* cu_seqlens_k;  // as cu_seqlens_q
  DType dtype;                  // float16 or bfloat16
  int64_t total_q;
  int64_t total_k;
  int64_t num_segments;
  int64_t seqlen;  // 0 with cu_seqlens
  int64_t num_heads;
  int64_t num_kv_heads;       // divides num_heads
  int64_t head_dim;           // 64 or 112
  int64_t num_prefix_tokens;  // keys of each segment whose gradients the caller computes, at most 8
  int64_t q_stride_token;
  int64_t q_stride_head;
  int64_t k_stride_token;
  int64_t k_stride_head;
  int64_t v_stride_token;
  int64_t v_stride_head;
  int64_t dout_stride_token;
  int64_t dout_stride_head;
  int64_t dk_stride_token;  // these four are even
  int64_t dk_stride_head;
  int64_t dv_stride_token;
  int64_t dv_stride_head;
  float softmax_scale;  // positive
};

// Asynchronous on `stream`; the caller has made the device, one of compute capability 9.0, current.
cudaError_t launch_window_attention_backward(const WindowAttentionBackwardParams& params,
                                             cudaStream_t stream);

}  // namespace infimm
