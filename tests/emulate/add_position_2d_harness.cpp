// A C function for ctypes around csrc's launcher, compiled against cuda_shim.
#include "add_position_2d.h"

namespace {

shim::Range bytes(const void* address, std::int64_t count) {
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  return {begin, begin + static_cast<std::uintptr_t>(count)};
}

}  // namespace

extern "C" int emulate_add_position_2d(const void* x, std::int64_t x_bytes, void* out, std::int64_t out_bytes,
                                       const void* positions, const std::int64_t* numbers,
                                       unsigned grid_limit) {
  infimm::AddPosition2dParams params;
  params.x = x;
  params.out = out;
  params.positions = positions;
  params.dtype = static_cast<infimm::DType>(numbers[0]);
  params.positions_are_int64 = numbers[1] != 0;
  params.num_windows = numbers[2];
  params.seqlen = numbers[3];
  params.hidden = numbers[4];
  params.x_stride_window = numbers[5];
  params.x_stride_token = numbers[6];
  params.out_stride_window = numbers[7];
  params.out_stride_token = numbers[8];
  params.positions_stride_window = numbers[9];
  params.positions_stride_axis = numbers[10];
  params.per_token = numbers[11] != 0;
  params.window_height = numbers[12];
  params.window_width = numbers[13];
  params.num_prefix_tokens = numbers[14];
  shim::readable = {bytes(x, x_bytes)};
  shim::writable = {bytes(out, out_bytes)};
  shim::grid_limit = grid_limit;
  return infimm::launch_add_position_2d(params, nullptr);
}
