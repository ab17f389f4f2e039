#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace infimm {

constexpr int64_t kWindowAttentionMaxPrefix = 8;
constexpr int64_t kWindowAttentionMaxTokens = 1 << 30;
constexpr int64_t kWindowAttentionMaxHeads = 4096;

// Softmax attention inside segments of packed tokens, as varlen_attention in infimm_kernels/attention/op.py
// defines it. Strides are in elements; every last stride is 1; addresses and strides of q, k and v are
// multiples of 16 bytes.
struct WindowAttentionParams {
  const void* q;                // [total_q, num_heads, head_dim]
  const void* k;                // [total_k, num_kv_heads, head_dim]
  const void* v;                // [total_k, num_kv_heads, head_dim]
  void* out;                    // [total_q, num_heads, head_dim], contiguous, no overlap with an input
  float* lse;                   // [num_heads, total_q], contiguous
  const int32_t* cu_seqlens_q;  // [num_segments + 1]; null: segments of seqlen tokens, of queries and keys
  const int32_t* cu_seqlens_k;  // as cu_seqlens_q
  DType dtype;                  // float16 or bfloat16
  int64_t total_q;
  int64_t total_k;
  int64_t num_segments;
  int64_t seqlen;  // 0 with cu_seqlens
  int64_t num_heads;
  int64_t num_kv_heads;       // divides num_heads
  int64_t head_dim;           // 64, 112 or 128
  int64_t num_prefix_tokens;  // leading tokens of each segment outside the tiles, at most 8
  int64_t q_stride_token;
  int64_t q_stride_head;
  int64_t k_stride_token;
  int64_t k_stride_head;
  int64_t v_stride_token;
  int64_t v_stride_head;
  float softmax_scale;  // positive
};

// Asynchronous on `stream`; the caller has made the device, one of compute capability 9.0, current.
cudaError_t launch_window_attention(const WindowAttentionParams& params, cudaStream_t stream);

}  // namespace infimm
