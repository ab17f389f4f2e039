#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace infimm {

// What a launch serves; nothing that is computed from such sizes overflows.
constexpr int64_t kDecodeMaxBatch = 2048;  // the running sum of the key counts lies in shared memory
constexpr int64_t kDecodeMaxTextLen = 8;
constexpr int64_t kDecodeMaxHeads = 4096;
constexpr int64_t kDecodeMaxHeadDim = 256;
constexpr int64_t kDecodeMaxTokens = 1 << 30;
constexpr int64_t kDecodeMaxBlocks = 512;

// out = x + tanh(attn_gate) * (attention(query, key, value) @ out_weight^T), where a sample's text attends to
// the keys [first, end) that key_ranges gives for it. Strides are in elements; every last stride is 1.
struct DecodeAttentionParams {
  const void* x;              // [batch, text_len, hidden], x_dtype
  void* out;                  // [batch, text_len, hidden], x_dtype, contiguous, no overlap with an input
  const void* query;          // [batch, text_len, num_heads, head_dim], dtype
  const void* key;            // [total, num_kv_heads, head_dim], dtype
  const void* value;          // [total, num_kv_heads, head_dim], dtype
  const void* out_weight;     // [hidden, num_heads * head_dim], dtype
  const void* attn_gate;      // [hidden], gate_dtype
  const int32_t* key_ranges;  // [batch, 2] = (first, end), clamped to [0, total]; empty: x is copied
  float* workspace;           // decode_workspace_floats of them, of any content
  int64_t workspace_floats;
  DType dtype;
  DType x_dtype;
  DType gate_dtype;
  float softmax_scale;
  int64_t max_blocks;  // the workspace is made for that many; fewer run where fewer fit
  int64_t batch;
  int64_t text_len;
  int64_t hidden;
  int64_t total;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;  // a multiple of 8
  int64_t x_stride_sample;
  int64_t x_stride_row;
  int64_t query_stride_sample;
  int64_t query_stride_row;
  int64_t query_stride_head;
  int64_t key_stride_token;
  int64_t key_stride_head;
  int64_t value_stride_token;
  int64_t value_stride_head;
  int64_t out_weight_stride_row;
  int64_t key_ranges_stride_sample;
  int64_t key_ranges_stride_bound;
};

// Partial results of the blocks (each one more slot than a neighbour shares), then the attention rows.
inline int64_t decode_workspace_floats(const DecodeAttentionParams& p) {
  const int64_t slots = p.max_blocks + p.batch * p.num_kv_heads;
  const int64_t slot_rows = p.text_len * (p.num_heads / p.num_kv_heads);
  return slots * slot_rows * (p.head_dim + 2) + p.batch * p.text_len * p.num_heads * p.head_dim;
}

// Asynchronous on `stream`; the caller has made the device current.
cudaError_t launch_decode_attention(const DecodeAttentionParams& params, cudaStream_t stream);

}  // namespace infimm
