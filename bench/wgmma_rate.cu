// How fast one SM's tensor cores take m64nNk16 products from shared memory for several N, A from registers
// and B with its N index running fastest, as csrc/window_attention multiplies weights and values: whether N =
// 112 costs 112 / 128 of N = 128. One JSON list on stdout; bench/wgmma_rate.py builds and runs it.
#include <cstdio>

#include "common/hopper.cuh"

namespace {

constexpr int kTrips = 4096, kProducts = 8, kWarpgroups = 2;
using infimm::Tile;

template <int N>
__global__ void __launch_bounds__(kWarpgroups * 128, 1) rate(float* out, long long* clocks) {
  using Values = Tile<128, 128>;
  const Values values{(infimm::ptx::shared_window() + 1023) / 1024 * 1024};
  for (int i = threadIdx.x; i < 128 * 16; i += blockDim.x) {
    // bfloat16 of random size: zeros would be faster than real numbers
    uint32_t word = i * 2654435761u;
    uint4 piece;
    uint32_t* words = reinterpret_cast<uint32_t*>(&piece);
    for (int j = 0; j < 4; ++j) {
      word = word * 1664525u + 1013904223u;
      words[j] = (word & 0x807f807fu) | 0x3f003f00u;
    }
    infimm::ptx::store_shared_16(values.piece(i / 16, i % 16), piece);
  }
  infimm::ptx::fence_async_proxy();
  __syncthreads();
  float acc[N / 2] = {};
  uint32_t a[4];
  for (int j = 0; j < 4; ++j) a[j] = 0x3e803f00u + threadIdx.x * 0x10001u;
  const long long begin = clock64();
  for (int trip = 0; trip < kTrips; ++trip) {
    infimm::ptx::hold(acc);
    infimm::ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kProducts; ++step)
      infimm::ptx::wgmma_transposed<__nv_bfloat16, N>(acc, a, values.by_row(step));
    infimm::ptx::wgmma_commit();
    infimm::ptx::wgmma_wait<0>();
    infimm::ptx::hold(acc);
  }
  const long long end = clock64();
  float sum = 0.0f;
  for (int i = 0; i < N / 2; ++i) sum += acc[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0) clocks[blockIdx.x] = end - begin;
}

template <int N>
bool measure(bool first) {
  constexpr int kBytes = Tile<128, 128>::kBytes + 1024;
  int sms = 0;
  float* out;
  long long* clocks;
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
  cudaMallocManaged(&out, sizeof(float) * sms * kWarpgroups * 128);
  cudaMallocManaged(&clocks, sizeof(long long) * sms);
  cudaFuncSetAttribute(rate<N>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  for (int i = 0; i < 3; ++i) rate<N><<<sms, kWarpgroups * 128, kBytes>>>(out, clocks);
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) {
    std::fprintf(stderr, "n = %d: %s\n", N, cudaGetErrorString(error));
    return false;
  }
  double slowest = 0;
  for (int i = 0; i < sms; ++i) slowest = slowest > clocks[i] ? slowest : static_cast<double>(clocks[i]);
  const double macs = static_cast<double>(kTrips) * kProducts * kWarpgroups * 64 * N * 16;
  std::printf("%s{\"n\": %d, \"macs_per_clock_per_sm\": %.1f}", first ? "[" : ", ", N, macs / slowest);
  cudaFree(out);
  cudaFree(clocks);
  return true;
}

}  // namespace

int main() {
  const bool ok = measure<64>(true) && measure<112>(false) && measure<128>(false);
  if (ok) std::printf("]\n");
  return ok ? 0 : 1;
}
