// A C function for ctypes around csrc's launcher, compiled against cuda_shim. With EMULATE_MAIN a program
// that runs one problem in buffers without slack, for the address sanitizer.
#include "decode_attention.h"

#include <array>
#include <cstdio>
#include <initializer_list>

namespace {

// A tensor that a launch may read: sizes * strides, in elements, of at most three dimensions.
shim::Range extent(const void* address, std::int64_t bytes, std::initializer_list<std::int64_t> sizes,
                   std::initializer_list<std::int64_t> strides) {
  std::int64_t elements = 1;
  for (auto size = sizes.begin(), stride = strides.begin(); size != sizes.end(); ++size, ++stride) {
    if (*size == 0) elements = INT64_MIN / 4;
    elements += (*size - 1) * *stride;
  }
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  return {begin, begin + static_cast<std::uintptr_t>(elements > 0 ? elements * bytes : 0)};
}

std::int64_t size_of(infimm::DType dtype) { return dtype == infimm::DType::kFloat32 ? 4 : 2; }

infimm::DecodeAttentionParams params_of(void* const* pointers, const std::int64_t* numbers, float scale) {
  infimm::DecodeAttentionParams p;
  p.x = pointers[0];
  p.out = pointers[1];
  p.query = pointers[2];
  p.key = pointers[3];
  p.value = pointers[4];
  p.out_weight = pointers[5];
  p.attn_gate = pointers[6];
  p.key_ranges = static_cast<const std::int32_t*>(pointers[7]);
  p.workspace = static_cast<float*>(pointers[8]);
  p.softmax_scale = scale;
  p.workspace_floats = *numbers++;
  p.dtype = static_cast<infimm::DType>(*numbers++);
  p.x_dtype = static_cast<infimm::DType>(*numbers++);
  p.gate_dtype = static_cast<infimm::DType>(*numbers++);
  for (std::int64_t* number : {&p.max_blocks,
                               &p.batch,
                               &p.text_len,
                               &p.hidden,
                               &p.total,
                               &p.num_heads,
                               &p.num_kv_heads,
                               &p.head_dim,
                               &p.x_stride_sample,
                               &p.x_stride_row,
                               &p.query_stride_sample,
                               &p.query_stride_row,
                               &p.query_stride_head,
                               &p.key_stride_token,
                               &p.key_stride_head,
                               &p.value_stride_token,
                               &p.value_stride_head,
                               &p.out_weight_stride_row,
                               &p.key_ranges_stride_sample,
                               &p.key_ranges_stride_bound}) {
    *number = *numbers++;
  }
  return p;
}

}  // namespace

// numbers: the rest of DecodeAttentionParams, in the order of the Python binding.
extern "C" int emulate_decode_attention(void* const* pointers, const std::int64_t* numbers, float scale,
                                        unsigned num_sms, unsigned blocks_per_sm, std::uint64_t seed) {
  const infimm::DecodeAttentionParams p = params_of(pointers, numbers, scale);
  const std::int64_t bytes = size_of(p.dtype), x_bytes = size_of(p.x_dtype);
  shim::readable = {
      extent(p.x, x_bytes, {p.batch, p.text_len, p.hidden}, {p.x_stride_sample, p.x_stride_row, 1}),
      extent(p.query, bytes, {p.batch, p.text_len, p.num_heads, p.head_dim},
             {p.query_stride_sample, p.query_stride_row, p.query_stride_head, 1}),
      extent(p.key, bytes, {p.total, p.num_kv_heads, p.head_dim}, {p.key_stride_token, p.key_stride_head, 1}),
      extent(p.value, bytes, {p.total, p.num_kv_heads, p.head_dim},
             {p.value_stride_token, p.value_stride_head, 1}),
      extent(p.out_weight, bytes, {p.hidden, p.num_heads * p.head_dim}, {p.out_weight_stride_row, 1}),
      extent(p.attn_gate, size_of(p.gate_dtype), {p.hidden}, {1}),
      extent(p.key_ranges, 4, {p.batch, 2}, {p.key_ranges_stride_sample, p.key_ranges_stride_bound}),
  };
  shim::scratch = {extent(p.workspace, 4, {p.workspace_floats}, {1})};
  shim::writable = {
      extent(p.out, x_bytes, {p.batch, p.text_len, p.hidden}, {p.text_len * p.hidden, p.hidden, 1})};
  shim::num_sms = num_sms;
  shim::blocks_per_sm = blocks_per_sm;
  shim::scheduler_seed = seed;
  return infimm::launch_decode_attention(p, nullptr);
}

#ifdef EMULATE_MAIN
// Arguments: dtype code, batch, text_len, hidden, num_heads, num_kv_heads, head_dim, keys per sample, seed.
int main(int count, char** arguments) {
  if (count != 10) return 2;
  std::int64_t n[9];
  for (int i = 0; i < 9; ++i) n[i] = std::atoll(arguments[i + 1]);
  const auto [dtype, batch, text_len, hidden, heads, kv_heads, head_dim, keys, seed] =
      std::array<std::int64_t, 9>{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8]};
  const std::int64_t bytes = size_of(static_cast<infimm::DType>(dtype)), inner = heads * head_dim;
  const std::int64_t total = batch * keys, max_blocks = 6;
  infimm::DecodeAttentionParams sizes;
  sizes.max_blocks = max_blocks;
  sizes.batch = batch;
  sizes.text_len = text_len;
  sizes.num_heads = heads;
  sizes.num_kv_heads = kv_heads;
  sizes.head_dim = head_dim;
  const std::int64_t floats = infimm::decode_workspace_floats(sizes);
  std::vector<std::unique_ptr<char[]>> buffers;
  std::vector<void*> pointers;
  for (const std::int64_t size :
       {batch * text_len * hidden * bytes, batch * text_len * hidden * bytes,
        batch * text_len * inner * bytes, total * kv_heads * head_dim * bytes,
        total * kv_heads * head_dim * bytes, hidden * inner * bytes, hidden * bytes, batch * 8, floats * 4}) {
    buffers.emplace_back(new char[static_cast<std::size_t>(size)]);
    std::memset(buffers.back().get(), 0x3c, static_cast<std::size_t>(size));  // near 1 in 16 bits
    pointers.push_back(buffers.back().get());
  }
  auto* ranges = static_cast<std::int32_t*>(pointers[7]);
  for (std::int64_t i = 0; i < batch; ++i) {
    ranges[2 * i] = static_cast<std::int32_t>(i * keys) - (i == 0);  // clamped
    ranges[2 * i + 1] = static_cast<std::int32_t>((i + 1) * keys) + (i == batch - 1);
  }
  const std::int64_t numbers[] = {floats,
                                  dtype,
                                  dtype,
                                  dtype,
                                  max_blocks,
                                  batch,
                                  text_len,
                                  hidden,
                                  total,
                                  heads,
                                  kv_heads,
                                  head_dim,
                                  text_len * hidden,
                                  hidden,
                                  text_len * inner,
                                  inner,
                                  head_dim,
                                  kv_heads * head_dim,
                                  head_dim,
                                  kv_heads * head_dim,
                                  head_dim,
                                  inner,
                                  2,
                                  1};
  const int error =
      emulate_decode_attention(pointers.data(), numbers, 0.125f, 3, 2, static_cast<std::uint64_t>(seed));
  if (error != 0) std::printf("CUDA error %d\n", error);
  return error != 0;
}
#endif
