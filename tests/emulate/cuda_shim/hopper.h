// What a block of sm_90a has beside its threads: barriers in shared memory that count arrivals and bytes, a
// copy engine, and matrix instructions that read shared memory long after they were issued. Whatever the
// hardware may do early or late is done at the worst moment for some seed: see `Patience`.
#pragma once

#include <deque>
#include <map>
#include <set>
#include <string>

#include "cuda.h"
#include "cuda_runtime_api.h"

namespace shim {

constexpr std::uint32_t kWindow = 1040;  // where the block's shared memory starts: aligned to 16 bytes alone

enum class Patience {
  kRandom,
  kEager,  // a copy lands as soon as it is asked for, a product is computed as soon as it is committed
  kLate,   // both only when somebody must wait for them
};

struct CountingBarrier {
  Rendezvous phase;
  int expected = 0, pending = 0;
  std::int64_t bytes = 0;
};

struct BoxCopy {
  std::uint32_t to, barrier;
  CUtensorMap map;
  int at[3];
};

// One matrix instruction of a warp: 16 rows of the 64.
struct Product {
  int columns = 0;
  std::uint64_t a = 0, b = 0;
  bool a_in_registers = false, a_by_row = false, b_by_row = false, accumulate = true;
  float (*to_float)(std::uint16_t) = nullptr;
  std::uint32_t registers[kWarp][4];
  float* d[kWarp] = {};
};

struct WarpProducts {
  std::deque<Product> products;                           // those nobody has waited for, oldest first
  std::size_t issued[kWarp] = {};                         // by each lane, counted from the first product ever
  std::size_t first = 0;                                  // number of products.front()
  std::size_t computed = 0;                               // those before it are
  std::deque<std::size_t> committed;                      // ends of the groups
  std::map<float*, std::vector<float>> in_flight[kWarp];  // accumulators, which hold NaN meanwhile
  bool fenced = false;
};

struct Hopper {
  Patience patience = Patience::kRandom;
  std::map<std::uint32_t, CountingBarrier> barriers;
  std::map<int, Rendezvous> named;
  std::vector<BoxCopy> copies;
  std::map<unsigned, WarpProducts> warps;
  std::vector<const Fiber*> unfenced;  // who wrote each 16 bytes by an ordinary store
};
inline Hopper* hopper = nullptr;
inline std::string complaint;  // the first rule broken

inline void complain(const char* what) {
  if (complaint.empty()) complaint = what;
  error = cudaErrorIllegalInstruction;
}

// The copy engine works while no thread does.
inline Block& current_block() { return machine->blocks[0]; }

inline char* shared_bytes(std::uint32_t address, std::size_t size) {
  static char nowhere[64];
  if (address < kWindow || address + size > kWindow + current_block().shared_bytes) {
    complain("outside shared memory");
    return nowhere;
  }
  if (address % size != 0) complain("misaligned shared access");
  return current_block().shared.get() + (address - kWindow);
}

inline const Fiber*& written_by(std::uint32_t address) {
  auto& writers = hopper->unfenced;
  const std::size_t piece = address / 16;
  if (piece >= writers.size()) writers.resize(piece + 1024, nullptr);
  return writers[piece];
}

template <typename T>
T load_shared(std::uint32_t address) {
  T value;
  std::memcpy(&value, shared_bytes(address, sizeof(T)), sizeof(T));
  return value;
}

template <typename T>
void store_shared(std::uint32_t address, T value) {
  std::memcpy(shared_bytes(address, sizeof(T)), &value, sizeof(T));
  written_by(address) = current;
}

inline std::uint32_t swizzled(std::uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline CountingBarrier& barrier_at(std::uint32_t address) {
  if (address % 8 != 0) complain("misaligned barrier");
  CountingBarrier& barrier = hopper->barriers[address];
  if (barrier.expected == 0) complain("barrier that nobody has initialised");
  return barrier;
}

inline void advance_if_complete(CountingBarrier& barrier) {
  if (barrier.pending < 0) complain("more arrivals than a phase has");
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  ++barrier.phase.round;
}

inline void arrive_at(std::uint32_t address, std::int64_t bytes) {
  CountingBarrier& barrier = barrier_at(address);
  barrier.bytes += bytes;
  --barrier.pending;
  advance_if_complete(barrier);
  if (next_random() % 2 == 0) pause();
}

inline void wait_for_parity(std::uint32_t address, int parity) {
  const CountingBarrier& barrier = barrier_at(address);
  while ((barrier.phase.round & 1) == parity) wait(barrier.phase, barrier.phase.round);
}

// --- the copy engine ------------------------------------------------------

inline void land(const BoxCopy& copy) {
  const CUtensorMap& map = copy.map;
  std::uint32_t to = copy.to;
  for (std::int64_t token = 0; token < map.box[2]; ++token) {
    for (std::int64_t channel = 0; channel < map.box[0]; ++channel, to += 2) {
      const std::int64_t at[3] = {copy.at[0] + channel, copy.at[1], copy.at[2] + token};
      std::uint16_t element = 0;
      bool inside = true;
      const char* from = map.address;
      for (int i = 0; i < 3; ++i) {
        inside = inside && at[i] >= 0 && at[i] < map.sizes[i];
        from += at[i] * map.strides[i];
      }
      if (inside) {
        if (!may_load(reinterpret_cast<const std::uint16_t*>(from), readable))
          complain("copy of foreign memory");
        else
          std::memcpy(&element, from, 2);
      }
      const std::uint32_t place = map.swizzled ? swizzled(to) : to;
      std::memcpy(shared_bytes(place, 2), &element, 2);
      written_by(place) = nullptr;
    }
  }
  CountingBarrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= map.box[0] * map.box[1] * map.box[2] * 2;
  advance_if_complete(barrier);
}

inline bool land_one() {
  if (hopper == nullptr || hopper->copies.empty()) return false;
  const std::size_t which = next_random() % hopper->copies.size();
  const BoxCopy copy = hopper->copies[which];
  hopper->copies.erase(hopper->copies.begin() + static_cast<std::ptrdiff_t>(which));
  land(copy);
  return true;
}

// --- matrix instructions ----------------------------------------------------

inline std::uint16_t operand(std::uint64_t descriptor, bool by_row, int index, int k) {
  const auto field = [&](int bit) { return static_cast<std::uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  if (descriptor >> 62 != 1) complain("descriptor without the 128-byte swizzle");
  const auto i = static_cast<std::uint32_t>(index), kk = static_cast<std::uint32_t>(k);
  const std::uint32_t at = by_row ? i / 64 * field(16) + kk / 8 * field(32) + kk % 8 * 128 + i % 64 * 2
                                  : i / 8 * field(32) + i % 8 * 128 + kk * 2;
  const std::uint32_t place = swizzled(field(0) + at);
  if (written_by(place) != nullptr) complain("wgmma reads what no proxy fence has published");
  return load_shared<std::uint16_t>(place);
}

inline void compute(Product& product, WarpProducts& warp, int warp_in_group) {
  const int n = product.columns;
  std::vector<float> a(16 * 16), b(static_cast<std::size_t>(16) * n);
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      std::uint16_t bits;
      if (product.a_in_registers) {
        const std::uint32_t word = product.registers[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
        bits = static_cast<std::uint16_t>(word >> 16 * (k % 2));
      } else {
        bits = operand(product.a, product.a_by_row, warp_in_group * 16 + row, k);
      }
      a[row * 16 + k] = product.to_float(bits);
    }
  }
  for (int k = 0; k < 16; ++k)
    for (int j = 0; j < n; ++j) b[k * n + j] = product.to_float(operand(product.b, product.b_by_row, j, k));
  std::vector<float> d(static_cast<std::size_t>(16) * n, 0.0f);
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < n; ++j) d[row * n + j] += a[row * 16 + k] * b[k * n + j];
  for (int lane = 0; lane < kWarp; ++lane) {
    std::vector<float>& to = warp.in_flight[lane][product.d[lane]];
    for (int i = 0; i < n / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      to[i] = d[row * n + column] + (product.accumulate ? to[i] : 0.0f);
    }
  }
}

inline WarpProducts& my_products() { return hopper->warps[current->thread / kWarp]; }
inline int my_warp_in_group() { return static_cast<int>(current->thread / kWarp % 4); }

// A lane's share of an instruction that all lanes of the warp issue.
inline void issue(float* d, const Product& mine) {
  WarpProducts& warp = my_products();
  const unsigned lane = current->thread % kWarp;
  if (!warp.fenced) complain("wgmma without a fence before it");
  const std::size_t number = warp.issued[lane]++;
  if (number - warp.first == warp.products.size()) warp.products.push_back(mine);
  Product& product = warp.products[number - warp.first];
  if (product.b != mine.b || product.a != mine.a) complain("lanes differ about an operand");
  std::memcpy(product.registers[lane], mine.registers[0], sizeof(mine.registers[0]));
  product.d[lane] = d;
  auto [entry, is_new] = warp.in_flight[lane].try_emplace(d);
  if (is_new) entry->second.assign(d, d + mine.columns / 2);
  std::fill(d, d + mine.columns / 2, NAN);
}

inline void compute_until(WarpProducts& warp, std::size_t end) {
  for (; warp.computed < end; ++warp.computed)
    compute(warp.products[warp.computed - warp.first], warp, my_warp_in_group());
}

inline void commit_products() {
  __syncwarp();
  if (current->thread % kWarp == 0) {
    WarpProducts& warp = my_products();
    warp.committed.push_back(warp.issued[0]);
    const bool now = hopper->patience == Patience::kEager ||
                     (hopper->patience == Patience::kRandom && next_random() % 2 == 0);
    if (now) compute_until(warp, warp.issued[0]);
  }
  __syncwarp();
}

inline void wait_for_products(std::size_t groups_left) {
  __syncwarp();
  WarpProducts& warp = my_products();
  if (current->thread % kWarp == 0) {
    while (warp.committed.size() > groups_left) {
      compute_until(warp, warp.committed.front());
      for (; warp.first < warp.committed.front(); ++warp.first) warp.products.pop_front();
      warp.committed.pop_front();
    }
    warp.fenced = false;
  }
  __syncwarp();
  // Accumulators that no instruction has any longer get their values.
  const unsigned lane = current->thread % kWarp;
  std::set<float*> busy;
  for (const Product& product : warp.products) busy.insert(product.d[lane]);
  for (auto entry = warp.in_flight[lane].begin(); entry != warp.in_flight[lane].end();) {
    if (busy.count(entry->first)) {
      ++entry;
      continue;
    }
    std::copy(entry->second.begin(), entry->second.end(), entry->first);
    entry = warp.in_flight[lane].erase(entry);
  }
  __syncwarp();
}

// --- a launch ---------------------------------------------------------------

// For one launch: seeds 0, 1, 2 and so on take turns.
struct HopperLaunch {
  Hopper state;
  explicit HopperLaunch(std::uint64_t seed) {
    hopper = &state;
    complaint.clear();
    state.patience = static_cast<Patience>(seed / 2 % 3);
    beside_threads = [this](bool lazy) {
      if (!lazy) return land_one();
      if (state.patience == Patience::kRandom && !state.copies.empty() && next_random() % 4 == 0)
        return land_one();
      return false;
    };
  }
  ~HopperLaunch() {
    hopper = nullptr;
    beside_threads = [](bool) { return false; };
  }
};

}  // namespace shim
