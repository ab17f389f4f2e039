// Threads whose blocks are all alive at once, for kernels that wait for each other: each is a fiber with a
// stack of its own, and one runs at a time until it must wait. A seed decides who runs next: fixed
// priorities, so that some warps run far ahead of the others, or another warp at random after every wait.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
// Saves the callee-saved registers on the old stack and takes them from the new one: ucontext's switch makes
// two system calls. (The sanitizer knows ucontext's.)
#define SHIM_FAST_SWITCH 1
asm(R"(
.text
.type shim_switch, @function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shim_switch, .-shim_switch
)");
extern "C" void shim_switch(void** save_stack, void* load_stack) asm("shim_switch");
#endif

namespace shim {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 32 << 10;

// What a fiber waits for: everyone of `count` has arrived, which ends a round.
struct Rendezvous {
  long round = 0;
  unsigned arrived = 0;
};

struct Block;

struct Fiber {
  Block* block;
  unsigned thread;
  const Rendezvous* waits_for = nullptr;
  long waits_round = 0;
  bool done = false;
  std::unique_ptr<char[]> stack;
#ifdef SHIM_FAST_SWITCH
  void* top = nullptr;
#else
  ucontext_t context;
#endif
  bool may_run() const { return !done && (waits_for == nullptr || waits_for->round > waits_round); }
};

struct Warp {
  Rendezvous rendezvous;
  std::uint64_t exchanged[2][kWarp];  // by parity of the round: no lane is two rounds ahead
};

struct Block {
  unsigned index;
  Rendezvous rendezvous;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;  // exactly as large as asked for, so that the sanitizer sees an overrun
  std::size_t shared_bytes;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  Rendezvous grid;
  unsigned threads = 0;
  std::function<void()> kernel;
  std::uint64_t random = 1;
  bool pausing = false;
#ifdef SHIM_FAST_SWITCH
  void* top = nullptr;
#else
  ucontext_t context;
#endif
};
inline Machine* machine = nullptr;
inline Fiber* current = nullptr;
inline std::uint64_t scheduler_seed = 0;
// What goes on beside the threads, a copy engine say: does one thing, or returns false. It is called now and
// then (`lazy`: it may wait) and when no thread can run.
inline std::function<bool(bool lazy)> beside_threads = [](bool) { return false; };

inline std::uint64_t next_random() {
  machine->random ^= machine->random << 13;
  machine->random ^= machine->random >> 7;
  machine->random ^= machine->random << 17;
  return machine->random;
}

inline void leave_fiber() {
#ifdef SHIM_FAST_SWITCH
  shim_switch(&current->top, machine->top);
#else
  swapcontext(&current->context, &machine->context);
#endif
}

inline void enter_fiber(Fiber& fiber) {
  current = &fiber;
#ifdef SHIM_FAST_SWITCH
  shim_switch(&machine->top, fiber.top);
#else
  swapcontext(&machine->context, &fiber.context);
#endif
}

inline void fiber_main() {
  machine->kernel();
  current->done = true;
  leave_fiber();
}

inline void prepare_fiber(Fiber& fiber) {
  fiber.stack.reset(new char[kStack]);
#ifdef SHIM_FAST_SWITCH
  auto top = reinterpret_cast<std::uintptr_t>(fiber.stack.get() + kStack) & ~std::uintptr_t{15};
  auto* frame =
      reinterpret_cast<void**>(top) - 8;  // six registers, fiber_main, and its unused return address
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(&fiber_main);
  fiber.top = frame;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

// Arrives; `count` arrivals end the round.
inline long arrive(Rendezvous& rendezvous, unsigned count) {
  const long round = rendezvous.round;
  if (++rendezvous.arrived == count) {
    rendezvous.arrived = 0;
    ++rendezvous.round;
  }
  return round;
}

inline void wait(const Rendezvous& rendezvous, long round) {
  if (rendezvous.round > round) return;
  current->waits_for = &rendezvous;
  current->waits_round = round;
  leave_fiber();
  current->waits_for = nullptr;
}

// Lets another warp run first: what this one has just told others, they may act on before it goes on.
inline void pause() {
  machine->pausing = true;
  leave_fiber();
}

inline void meet(Rendezvous& rendezvous, unsigned count) { wait(rendezvous, arrive(rendezvous, count)); }

inline long arrive_at_grid_barrier() {
  return arrive(machine->grid, static_cast<unsigned>(machine->fibers.size()));
}
inline void wait_for_grid(long round) { wait(machine->grid, round); }

inline void* shared_memory() { return current->block->shared.get(); }

// The value that lane `source` of the warp gives at the same call.
template <typename T>
T from_lane(T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t), "a lane gives up to 8 bytes");
  Warp& warp = current->block->warps[current->thread / kWarp];
  const int parity = static_cast<int>(warp.rendezvous.round & 1);
  std::memcpy(&warp.exchanged[parity][current->thread % kWarp], &value, sizeof(T));
  meet(warp.rendezvous, kWarp);
  std::memcpy(&value, &warp.exchanged[parity][source], sizeof(T));
  return value;
}

// Runs the kernel; false when the threads that are left wait for something that cannot happen.
template <typename SetIndices>
bool run_blocks(unsigned num_blocks, unsigned threads, std::size_t shared_bytes, std::function<void()> kernel,
                SetIndices set_indices) {
  Machine mine;
  machine = &mine;
  mine.kernel = std::move(kernel);
  mine.threads = threads;
  mine.random = scheduler_seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
  mine.blocks.resize(num_blocks);
  mine.fibers.resize(static_cast<std::size_t>(num_blocks) * threads);
  std::vector<unsigned> warps;  // the first fiber of each
  for (unsigned b = 0; b < num_blocks; ++b) {
    Block& block = mine.blocks[b];
    block.index = b;
    block.warps.resize(threads / kWarp);
    block.shared.reset(new char[shared_bytes]);
    block.shared_bytes = shared_bytes;
    std::memset(block.shared.get(), 0xff, shared_bytes);  // NaN, and -1 as an integer
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = mine.fibers[b * threads + t];
      fiber.block = &block;
      fiber.thread = t;
      prepare_fiber(fiber);
      if (t % kWarp == 0) warps.push_back(b * threads + t);
    }
  }
  for (std::size_t i = warps.size(); i > 1; --i) std::swap(warps[i - 1], warps[next_random() % i]);
  const bool fixed_priorities = scheduler_seed % 2 == 1;
  unsigned paused = ~0u;  // the warp that lets the others go first, once
  // The lanes of a warp run until each waits for more than the other lanes.
  const auto run_warp = [&](unsigned first) {
    bool ran = false;
    for (bool again = true; again;) {
      again = false;
      for (unsigned lane = 0; lane < kWarp; ++lane) {
        Fiber& fiber = mine.fibers[first + lane];
        if (!fiber.may_run()) continue;
        set_indices(fiber.block->index, fiber.thread);
        enter_fiber(fiber);
        ran = again = true;
        if (std::exchange(mine.pausing, false)) {
          paused = first;
          return true;
        }
        if (!fixed_priorities && next_random() % 64 == 0) return true;
      }
    }
    return ran;
  };
  bool ran = true;
  while (ran) {
    ran = false;
    const std::size_t start = fixed_priorities ? 0 : next_random() % warps.size();
    beside_threads(true);
    const unsigned last = std::exchange(paused, ~0u);
    for (std::size_t i = 0; i < warps.size() && !ran; ++i) {
      const unsigned first = warps[(start + i) % warps.size()];
      if (first != last) ran = run_warp(first);
    }
    if (!ran && last != ~0u) ran = run_warp(last);
    if (!ran) ran = beside_threads(false);
  }
  bool finished = true;
  for (const Fiber& fiber : mine.fibers) finished = finished && fiber.done;
  machine = nullptr;
  return finished;
}

}  // namespace shim
