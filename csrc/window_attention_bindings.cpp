#include "bindings.h"
#include "common/device_guard.h"
#include "window_attention.h"
#include "window_attention_backward.h"

namespace py = pybind11;

namespace infimm {
namespace {

// What both directions take, checked and put into their parameters.
template <typename Params>
void set_problem(Params& params, uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k, int dtype, int64_t total_q,
                 int64_t total_k, int64_t num_segments, int64_t seqlen, int64_t num_heads,
                 int64_t num_kv_heads, int64_t head_dim, int64_t num_prefix_tokens, double softmax_scale,
                 int device) {
  params.dtype = dtype_from_code(dtype);
  require(params.dtype != DType::kFloat32, "dtype must be the code of float16 or bfloat16, got float32's");
  require_within(total_q, 0, kWindowAttentionMaxTokens, "total_q");
  require_within(total_k, 0, kWindowAttentionMaxTokens, "total_k");
  require_within(num_segments, 0, kWindowAttentionMaxTokens, "num_segments");
  require_at_least(seqlen, 0, "seqlen");
  require_within(num_heads, 1, kWindowAttentionMaxHeads, "num_heads");
  require(num_kv_heads > 0 && num_heads % num_kv_heads == 0, "num_kv_heads must divide num_heads (" +
                                                                 std::to_string(num_heads) + "), got " +
                                                                 std::to_string(num_kv_heads));
  require_within(num_prefix_tokens, 0, kWindowAttentionMaxPrefix, "num_prefix_tokens");
  require(softmax_scale > 0 && static_cast<float>(softmax_scale) <= 1e38f,
          "softmax_scale must be a positive float32, got " + std::to_string(softmax_scale));
  require_at_least(device, 0, "device");
  require((cu_seqlens_q == 0) == (cu_seqlens_k == 0), "cu_seqlens_k must be given with cu_seqlens_q");
  if (cu_seqlens_q == 0) {
    require(
        num_segments == 0 ? total_q == 0 : total_q % num_segments == 0 && total_q / num_segments == seqlen,
        "num_segments * seqlen must be total_q (" + std::to_string(total_q) + "), got " +
            std::to_string(num_segments) + " * " + std::to_string(seqlen));
    require(total_k == total_q, "total_k must be total_q without cu_seqlens (" + std::to_string(total_q) +
                                    "), got " + std::to_string(total_k));
  } else {
    require(seqlen == 0, "seqlen must be 0 with cu_seqlens, got " + std::to_string(seqlen));
  }
  const int64_t longest = total_q > total_k ? total_q : total_k;
  require((longest / 128 + num_segments) * num_heads <= INT32_MAX / 2,
          "(tokens / 128 + num_segments) * num_heads must fit 30 bits, got " + std::to_string(longest) +
              " tokens, num_segments " + std::to_string(num_segments) + ", num_heads " +
              std::to_string(num_heads));
  params.cu_seqlens_q = reinterpret_cast<const int32_t*>(cu_seqlens_q);
  params.cu_seqlens_k = reinterpret_cast<const int32_t*>(cu_seqlens_k);
  params.total_q = total_q;
  params.total_k = total_k;
  params.num_segments = num_segments;
  params.seqlen = seqlen;
  params.num_heads = num_heads;
  params.num_kv_heads = num_kv_heads;
  params.head_dim = head_dim;
  params.num_prefix_tokens = num_prefix_tokens;
  params.softmax_scale = static_cast<float>(softmax_scale);
}

// A tensor that the copy engine reads.
void require_copies(const char* name, uintptr_t address, int64_t stride_token, int64_t stride_head) {
  require_pointer(address, name);
  require(address % 16 == 0 && stride_token % 8 == 0 && stride_head % 8 == 0 && stride_token >= 0 &&
              stride_head >= 0,
          std::string(name) + " must have an address and strides of whole 16 bytes, got strides of " +
              std::to_string(stride_token) + " and " + std::to_string(stride_head) + " elements");
}

// A tensor that is written in pairs of elements.
void require_pairs(const char* name, uintptr_t address, int64_t stride_token, int64_t stride_head) {
  require_pointer(address, name);
  require(address % 4 == 0 && stride_token % 2 == 0 && stride_head % 2 == 0,
          std::string(name) + " must have an address and strides of whole 4 bytes, got strides of " +
              std::to_string(stride_token) + " and " + std::to_string(stride_head) + " elements");
}

template <typename Params>
void launch(const char* op, cudaError_t (*launcher)(const Params&, cudaStream_t), const Params& params,
            int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const cudaError_t error =
      guard.error() != cudaSuccess ? guard.error() : launcher(params, reinterpret_cast<cudaStream_t>(stream));
  const auto shape = [&](int64_t total, int64_t heads) {
    return "[" + std::to_string(total) + ", " + std::to_string(heads) + ", " +
           std::to_string(params.head_dim) + "]";
  };
  throw_on_error(error, op,
                 " for q " + shape(params.total_q, params.num_heads) + ", k " +
                     shape(params.total_k, params.num_kv_heads) + " " + dtype_name(params.dtype) + " in " +
                     std::to_string(params.num_segments) + " segments on device " + std::to_string(device));
}

void window_attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse,
                      uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k, int dtype, int64_t total_q,
                      int64_t total_k, int64_t num_segments, int64_t seqlen, int64_t num_heads,
                      int64_t num_kv_heads, int64_t head_dim, int64_t num_prefix_tokens,
                      int64_t q_stride_token, int64_t q_stride_head, int64_t k_stride_token,
                      int64_t k_stride_head, int64_t v_stride_token, int64_t v_stride_head,
                      double softmax_scale, int device, uintptr_t stream) {
  require(head_dim == 64 || head_dim == 112 || head_dim == 128,
          "head_dim must be 64, 112 or 128, got " + std::to_string(head_dim));
  WindowAttentionParams params;
  set_problem(params, cu_seqlens_q, cu_seqlens_k, dtype, total_q, total_k, num_segments, seqlen, num_heads,
              num_kv_heads, head_dim, num_prefix_tokens, softmax_scale, device);
  if (total_q == 0 || num_segments == 0) return;
  require_copies("q", q, q_stride_token, q_stride_head);
  if (total_k > 0) {
    require_copies("k", k, k_stride_token, k_stride_head);
    require_copies("v", v, v_stride_token, v_stride_head);
  }
  require_pointer(out, "out");
  require_pointer(lse, "lse");
  params.q = reinterpret_cast<const void*>(q);
  params.k = reinterpret_cast<const void*>(k);
  params.v = reinterpret_cast<const void*>(v);
  params.out = reinterpret_cast<void*>(out);
  params.lse = reinterpret_cast<float*>(lse);
  params.q_stride_token = q_stride_token;
  params.q_stride_head = q_stride_head;
  params.k_stride_token = k_stride_token;
  params.k_stride_head = k_stride_head;
  params.v_stride_token = v_stride_token;
  params.v_stride_head = v_stride_head;
  launch("window_attention", &launch_window_attention, params, device, stream);
}

void window_attention_backward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t dout, uintptr_t lse,
                               uintptr_t delta, uintptr_t dq_sum, uintptr_t dk, uintptr_t dv,
                               uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k, int dtype, int64_t total_q,
                               int64_t total_k, int64_t num_segments, int64_t seqlen, int64_t num_heads,
                               int64_t num_kv_heads, int64_t head_dim, int64_t num_prefix_tokens,
                               int64_t q_stride_token, int64_t q_stride_head, int64_t k_stride_token,
                               int64_t k_stride_head, int64_t v_stride_token, int64_t v_stride_head,
                               int64_t dout_stride_token, int64_t dout_stride_head, int64_t dk_stride_token,
                               int64_t dk_stride_head, int64_t dv_stride_token, int64_t dv_stride_head,
                               double softmax_scale, int device, uintptr_t stream) {
  require(head_dim == 64 || head_dim == 112, "head_dim must be 64 or 112, got " + std::to_string(head_dim));
  WindowAttentionBackwardParams params;
  set_problem(params, cu_seqlens_q, cu_seqlens_k, dtype, total_q, total_k, num_segments, seqlen, num_heads,
              num_kv_heads, head_dim, num_prefix_tokens, softmax_scale, device);
  if (total_q == 0 || total_k == 0 || num_segments == 0) return;
  require_copies("q", q, q_stride_token, q_stride_head);
  require_copies("k", k, k_stride_token, k_stride_head);
  require_copies("v", v, v_stride_token, v_stride_head);
  require_copies("dout", dout, dout_stride_token, dout_stride_head);
  require_pairs("dk", dk, dk_stride_token, dk_stride_head);
  require_pairs("dv", dv, dv_stride_token, dv_stride_head);
  require_pointer(lse, "lse");
  require_pointer(delta, "delta");
  require_pointer(dq_sum, "dq_sum");
  require(dq_sum % 8 == 0, "dq_sum must have an address of whole 8 bytes, got " + std::to_string(dq_sum));
  params.q = reinterpret_cast<const void*>(q);
  params.k = reinterpret_cast<const void*>(k);
  params.v = reinterpret_cast<const void*>(v);
  params.dout = reinterpret_cast<const void*>(dout);
  params.lse = reinterpret_cast<const float*>(lse);
  params.delta = reinterpret_cast<const float*>(delta);
  params.dq_sum = reinterpret_cast<float*>(dq_sum);
  params.dk = reinterpret_cast<void*>(dk);
  params.dv = reinterpret_cast<void*>(dv);
  params.q_stride_token = q_stride_token;
  params.q_stride_head = q_stride_head;
  params.k_stride_token = k_stride_token;
  params.k_stride_head = k_stride_head;
  params.v_stride_token = v_stride_token;
  params.v_stride_head = v_stride_head;
  params.dout_stride_token = dout_stride_token;
  params.dout_stride_head = dout_stride_head;
  params.dk_stride_token = dk_stride_token;
  params.dk_stride_head = dk_stride_head;
  params.dv_stride_token = dv_stride_token;
  params.dv_stride_head = dv_stride_head;
  launch("window_attention_backward", &launch_window_attention_backward, params, device, stream);
}

}  // namespace

void bind_window_attention(py::module_& module) {
  module.def(
      "window_attention", &window_attention, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"),
      py::arg("out"), py::arg("lse"), py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("dtype"),
      py::arg("total_q"), py::arg("total_k"), py::arg("num_segments"), py::arg("seqlen"),
      py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("num_prefix_tokens"),
      py::arg("q_stride_token"), py::arg("q_stride_head"), py::arg("k_stride_token"),
      py::arg("k_stride_head"), py::arg("v_stride_token"), py::arg("v_stride_head"), py::arg("softmax_scale"),
      py::arg("device"), py::arg("stream"),
      "Asynchronous on `stream`, for compute capability 9.0. As add_position_2d; cu_seqlens are both 0 "
      "for segments of seqlen tokens.");
  module.def("window_attention_backward", &window_attention_backward, py::kw_only(), py::arg("q"),
             py::arg("k"), py::arg("v"), py::arg("dout"), py::arg("lse"), py::arg("delta"), py::arg("dq_sum"),
             py::arg("dk"), py::arg("dv"), py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("dtype"),
             py::arg("total_q"), py::arg("total_k"), py::arg("num_segments"), py::arg("seqlen"),
             py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("num_prefix_tokens"),
             py::arg("q_stride_token"), py::arg("q_stride_head"), py::arg("k_stride_token"),
             py::arg("k_stride_head"), py::arg("v_stride_token"), py::arg("v_stride_head"),
             py::arg("dout_stride_token"), py::arg("dout_stride_head"), py::arg("dk_stride_token"),
             py::arg("dk_stride_head"), py::arg("dv_stride_token"), py::arg("dv_stride_head"),
             py::arg("softmax_scale"), py::arg("device"), py::arg("stream"),
             "As window_attention; adds to dq_sum, and leaves the prefix rows of dk and dv alone.");
}

}  // namespace infimm
