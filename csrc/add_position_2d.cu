#include "add_position_2d.cuh"

#include <algorithm>
#include <climits>
#include <cmath>

namespace infimm {
namespace {

constexpr int kLanes = 32;            // channel chunks of a block: one warp reads 512 consecutive bytes
constexpr int kMaxTokensPerRun = 16;  // enough to spread the cost of sin and cos
constexpr int64_t kMaxBlocks = 1 << 20;
constexpr int64_t kMaxHidden = 1 << 30;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
bool aligned(const AddPosition2dParams& p, int64_t bytes) {
  const int64_t all =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.out)) |
      ((p.x_stride_window | p.x_stride_token | p.out_stride_window | p.out_stride_token) *
       static_cast<int64_t>(sizeof(T)));
  return all % bytes == 0;
}

template <typename T, int SIZE, int BYTES>
cudaError_t launch(const AddPosition2dParams& p, cudaStream_t stream) {
  const int64_t chunks = p.hidden / SIZE;
  unsigned lanes = kLanes;
  while (lanes / 2 >= chunks) lanes /= 2;  // small hidden: the threads go to tokens instead
  const unsigned runs = kAddPosition2dThreads / lanes;

  AddPosition2dPlan plan;
  plan.chunk_groups = static_cast<int>(ceil_div(chunks, lanes));
  const int64_t full_slabs = ceil_div(p.seqlen, static_cast<int64_t>(runs) * kMaxTokensPerRun);
  plan.tokens_per_run =
      static_cast<int>(ceil_div(p.seqlen, full_slabs * runs));  // equal runs, no short last slab
  plan.token_slabs = ceil_div(p.seqlen, static_cast<int64_t>(plan.tokens_per_run) * runs);
  const double log_step = -4.0 * std::log(10000.0) / static_cast<double>(p.hidden);
  plan.log_step_high = static_cast<float>(log_step);
  plan.log_step_low = static_cast<float>(log_step - static_cast<double>(plan.log_step_high));

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(
      std::min<int64_t>(p.num_windows * plan.token_slabs * plan.chunk_groups, kMaxBlocks)));
  config.blockDim = dim3(lanes, runs);
  config.stream = stream;
  const cudaError_t launched = cudaLaunchKernelEx(&config, add_position_2d_kernel<T, SIZE, BYTES>, p, plan);
  const cudaError_t last = cudaGetLastError();
  return launched != cudaSuccess ? launched : last;
}

// The widest access that hidden, the pointers and the strides allow; the last choice always works.
template <typename T>
cudaError_t launch_widest(const AddPosition2dParams& p, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  if (p.hidden % kWide == 0 && aligned<T>(p, 16)) return launch<T, kWide, 16>(p, stream);
  if (kWide != 4 && aligned<T>(p, 4 * sizeof(T))) return launch<T, 4, 4 * sizeof(T)>(p, stream);
  return launch<T, 4, sizeof(T)>(p, stream);
}

}  // namespace

cudaError_t launch_add_position_2d(const AddPosition2dParams& p, cudaStream_t stream) {
  // Channels and patches are counted in 32 bits, windows and offsets in 64.
  if (p.hidden <= 0 || p.hidden % 4 != 0 || p.hidden > kMaxHidden || p.seqlen > INT_MAX)
    return cudaErrorInvalidValue;
  if (p.num_windows == 0 || p.seqlen == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_widest<float>(p, stream);
    case DType::kFloat16:
      return launch_widest<__half>(p, stream);
    case DType::kBFloat16:
      return launch_widest<__nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace infimm
