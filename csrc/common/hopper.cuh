// What kernels for sm_90a are written in: barriers, rings of buffers, and tiles that the copy engine brings
// and wgmma reads.
#pragma once

#include <ptx/sm90.cuh>  // not "ptx/...": the emulation puts its own before it

#include <cstring>

namespace infimm {

constexpr int kWarpgroup = 128;

// A barrier in shared memory whose phases end after a fixed number of arrivals and all announced bytes.
struct Barrier {
  static constexpr int kBytes = 8;
  uint32_t address;

  __device__ __forceinline__ void init(int arrivals) const { ptx::mbarrier_init(address, arrivals); }
  __device__ __forceinline__ void arrive() const { ptx::mbarrier_arrive(address); }
  __device__ __forceinline__ void arrive_expect(int bytes) const {
    ptx::mbarrier_arrive_expect(address, bytes);
  }
  __device__ __forceinline__ void wait(int parity) const { ptx::mbarrier_wait(address, parity); }
};

// A full and an empty barrier for each of STAGES buffers that some threads fill and others read.
template <int STAGES>
struct BarrierRing {
  static constexpr int kBytes = 2 * STAGES * Barrier::kBytes;
  uint32_t address;

  __device__ __forceinline__ Barrier full(int stage) const { return {address + 16 * stage}; }
  __device__ __forceinline__ Barrier empty(int stage) const { return {address + 16 * stage + 8}; }
  __device__ __forceinline__ void init(int readers, int writers = 1) const {
    for (int stage = 0; stage < STAGES; ++stage) {
      full(stage).init(writers);
      empty(stage).init(readers);
    }
  }
};

// Where a producer or a reader stands in a ring. Barriers change parity every time around.
template <int STAGES>
struct RingPosition {
  int stage = 0;
  int parity = 0;  // of the full barrier that a reader waits for; a producer waits for the other one's

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A tile of ROWS rows of 16-bit elements in shared memory, as the copy engine leaves it: boxes of 64
// channels, a row of a box is 128 bytes, and the eight 16-byte pieces of a row change places with the row's
// number
// ("128-byte swizzle"), so that eight rows of one column lie in different banks. Addresses are multiples of
// 1024.
template <int ROWS, int CHANNELS>
struct Tile {
  static constexpr int kBoxChannels = 64;
  static constexpr int kBoxes = (CHANNELS + kBoxChannels - 1) / kBoxChannels;
  static constexpr int kRowBytes = 128;
  static constexpr int kBoxBytes = ROWS * kRowBytes;
  static constexpr int kBytes = kBoxes * kBoxBytes;
  static constexpr int kSteps = CHANNELS / 16;  // wgmma multiplies 16 channels at a time
  static_assert(CHANNELS % 16 == 0 && ROWS % 8 == 0, "whole steps of wgmma and whole swizzle patterns");

  uint32_t address;

  // The 16 bytes with channels 8 * piece to 8 * piece + 7 of a row.
  __device__ __forceinline__ uint32_t piece(int row, int piece) const {
    return address + piece / 8 * kBoxBytes + row * kRowBytes + ((piece % 8 ^ row % 8) << 4);
  }

  // Operand with 16 channels, those of `step`, as its K index: rows from `row` on are its M or N index.
  __device__ __forceinline__ uint64_t by_channel(int row, int step) const {
    constexpr int kStepBytes = 16 * 2, kStepsPerBox = kBoxChannels / 16;
    const uint32_t start =
        address + step / kStepsPerBox * kBoxBytes + row * kRowBytes + step % kStepsPerBox * kStepBytes;
    return descriptor(start, 16);
  }

  // Operand with rows 16 * step to 16 * step + 15 as its K index: all channels are its N index.
  __device__ __forceinline__ uint64_t by_row(int step) const {
    return descriptor(address + step * 16 * kRowBytes, kBoxBytes);
  }

  // Brings the rows from `token` on of one head; those and the channels beyond the tensor become zero.
  __device__ __forceinline__ void copy(const CUtensorMap* map, Barrier barrier, int head, int token) const {
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      ptx::copy_box(address + box * kBoxBytes, map, barrier.address, box * kBoxChannels, head, token);
    }
  }

 private:
  // wgmma's matrix descriptor with 128-byte swizzle: 8 rows of 128 bytes are one unit, the next 8 rows lie
  // 1024 bytes on. next_box: from one box to the next where an operand spans boxes, else ignored.
  static __device__ __forceinline__ uint64_t descriptor(uint32_t start, uint32_t next_box) {
    constexpr uint64_t kSwizzle128 = 1ull << 62;
    constexpr uint64_t kNext8Rows = 8 * kRowBytes;
    return kSwizzle128 | (kNext8Rows >> 4) << 32 | static_cast<uint64_t>(next_box >> 4) << 16 |
           (start & 0x3ffff) >> 4;
  }
};

template <typename Pair>
__device__ __forceinline__ uint32_t as_word(Pair pair) {
  uint32_t word;
  static_assert(sizeof(pair) == sizeof(word), "two elements of 16 bits");
  memcpy(&word, &pair, sizeof(word));
  return word;
}

// Two floats as one register of 16-bit elements, `low` first.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  return as_word(__floats2bfloat162_rn(low, high));
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  return as_word(__floats2half2_rn(low, high));
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(uint32_t pair) {
  __half2 halves;
  memcpy(&halves, &pair, sizeof(pair));
  return __half22float2(halves);
}

// The layout of an accumulator is that of wgmma's A in registers, pair by pair.
template <typename T, int N>
__device__ __forceinline__ void pack(const float (&values)[N], uint32_t (&packed)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) packed[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
}

// 2^(a - b); b = -inf, which only a row without any number has, counts as 0 and so gives 0 for a = -inf.
__device__ __forceinline__ float shifted_exp2(float a, float b) {
  return ptx::exp2_approx(a - (b == -INFINITY ? 0.0f : b));
}

}  // namespace infimm
