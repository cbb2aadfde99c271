// CUDA on a CPU, as far as plugins/cuda needs it: the host twin of plugins/cuda/ptx.cuh, and a machine that
// runs a grid. hopper_on_host.h adds the twin of hopper_ptx.cuh.
//
// This tests the LOGIC of the kernels (indexing, fragment layouts, barriers, races between copies and use,
// the order of blocks). It is no GPU run: it says nothing of speed, of the compiler's output, or of the
// memory model.
//
// Every CUDA thread is a fiber. A warp collective (shuffle, ldmatrix, mma) waits for its 32 lanes, which must
// all call the same one; __syncthreads waits for the block; all blocks are resident, as in a cooperative
// launch. Made to hurt:
// - warps run in random order, each as far as the next barrier, so that a missing barrier shows;
// - blocks run in random order and can be preempted at atomics;
// - an asynchronous copy lands as late as allowed (at its wait), at once, or at random, so that a missing
//   wait and a buffer refilled too early both show; one of the copy engine is as late as it can be when
//   nothing else in its block can go on;
// - threads that wait for one another for ever end the launch, and who waits for what is said;
// - lanes of a warp fall behind;
// - shared memory starts as NaN, and what plan.cpp did not ask for is not there;
// - data races in shared memory end the launch, where asked for (races.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "races.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct int2 {
  int x, y;
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

namespace cuda_on_host {

// Ends the launch: launch() throws it, its other fibers are abandoned.
[[noreturn]] inline void die(const std::string& what) { throw std::runtime_error("cuda_on_host: " + what); }

// ---- fibers ----
#if defined(__x86_64__)
extern "C" void cuda_on_host_switch(void** save, void* load);
asm(R"(
.text
.weak cuda_on_host_switch
.hidden cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
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
.size cuda_on_host_switch, .-cuda_on_host_switch
)");
#elif defined(__aarch64__)
extern "C" void cuda_on_host_switch(void** save, void* load);
asm(R"(
.text
.weak cuda_on_host_switch
.hidden cuda_on_host_switch
.type cuda_on_host_switch, %function
cuda_on_host_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "cuda_on_host.h knows how to switch stacks on x86-64 and aarch64"
#endif

struct Options {
  uint64_t seed = 0;
  bool shuffle = true;            // blocks and warps in random order, preemption at atomics; else in order
  int copies = 2;                 // asynchronous copies land: 0 late, 1 at once, 2 at random
  bool hopper = false;            // watch what ordinary code writes into shared memory without a fence
  bool races = false;             // look for data races in shared memory
  unsigned disregarded = 0;       // bits of Order
  bool equal_writes = false;      // are races too
  ProductReads* raced = nullptr;  // gets the products' reads that race
  // Products' reads that give NaN: those that raced in a launch of the same seed. If its results stay the
  // same, they do not depend on them.
  const ProductReads* spoiled = nullptr;
};

struct Copy {
  void* target;
  const void* source;  // null: zeros
  int group;
};

// kAtMeeting: for a named barrier; kAtBarrier: for one in shared memory; kYielded: to the other warps of the
// block; kPaused: to the other blocks too.
enum class State { kReady, kAtWarp, kAtBlock, kAtMeeting, kAtBarrier, kYielded, kPaused, kDone };

constexpr size_t kStackBytes = 64 << 10;

struct Thread {
  void* stack_pointer = nullptr;
  State state = State::kReady;
  std::vector<Copy> copies;
  int group = 0;                    // groups committed so far
  const char* waits_for = nullptr;  // kAtBarrier, kAtMeeting
  // 16-byte pieces of shared memory that it wrote since its last shared_write_fence, and their version
  std::vector<std::pair<int, int>> written;
};

// What hopper_on_host.h keeps of a warp.
struct WarpState {
  virtual ~WarpState() = default;
  virtual void finish() = 0;  // dies of what is not done
};

struct Warp {
  int arrived = 0;
  int operation = 0;
  void* arguments[32];
  std::shared_ptr<WarpState> state;
};

// 16 bytes of shared memory.
struct Piece {
  int version = 0;  // counts changes
  bool fenced = true;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<char> shared;
  char* shared_base = nullptr;
  size_t shared_bytes = 0;
  std::unique_ptr<char[]> stacks;
  int at_barrier = 0;
  int done = 0;
  // Of hopper_on_host.h.
  std::vector<std::function<void()>> landings;  // copies under way
  std::vector<Piece> pieces;                    // only where Options::hopper
  int at_meeting[16] = {};
  std::vector<uint64_t> products[8];  // of each warpgroup, for its warps to agree on
  std::unique_ptr<Races> races;       // only where Options::races
  bool finished() const { return done == static_cast<int>(threads.size()); }
};

constexpr size_t kSharedAlign = 1024;  // the copy engine's swizzle pattern
constexpr size_t kSharedGuard = 1024;

struct Index {
  unsigned x;
};

struct Machine {
  Options options;
  std::mt19937_64 random;
  std::function<void()> kernel;
  std::vector<std::unique_ptr<Block>> blocks;
  void* scheduler_stack = nullptr;
  Block* block = nullptr;
  int thread = 0;
  Index thread_index, block_index, grid_size, block_size;
  int progress = 0;
  std::string failure;  // of a fiber
  RaceLog race_log;
  int unseen = 0;  // Unseen objects

  Thread& current() { return block->threads[thread]; }
  Warp& warp() { return block->warps[thread / 32]; }
  bool chance(int one_in) { return options.shuffle && random() % one_in == 0; }
};

inline Machine*& machine() {
  static Machine* instance = nullptr;
  return instance;
}

// The accesses of the machine itself while there is one: they are no thread's, or reported by hand.
struct Unseen {
  Unseen() { ++machine()->unseen; }
  ~Unseen() { --machine()->unseen; }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};
// Of the current block, or null.
inline Races* races() { return machine()->block->races.get(); }
inline size_t shared_offset(const void* address) {
  return static_cast<size_t>(static_cast<const char*>(address) - machine()->block->shared_base);
}
// An address in the function that this is called in, or in the one that it is inlined into.
[[gnu::noinline]] inline const void* here() {
  asm volatile("");
  return __builtin_return_address(0);
}

// Leaves the current fiber until the scheduler resumes it.
inline void leave(State state) {
  Machine& m = *machine();
  Thread& t = m.current();
  t.state = state;
  cuda_on_host_switch(&t.stack_pointer, m.scheduler_stack);
}

inline void fiber_main() {
  Machine& m = *machine();
  try {
    m.kernel();
    if (!m.current().copies.empty()) die("a thread ended with asynchronous copies in flight");
  } catch (const std::exception& e) {
    m.failure = e.what();
  }
  ++m.block->done;
  leave(State::kDone);
  std::abort();  // nobody resumes a finished thread
}

inline void make_fiber(Thread& thread, char* stack) {
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + kStackBytes) & ~uintptr_t{15};
#if defined(__x86_64__)
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;                               // keeps the stack aligned as after a call
  *--sp = reinterpret_cast<void*>(&fiber_main);  // popped by ret
  for (int i = 0; i < 6; ++i) *--sp = nullptr;   // callee-saved registers
#else
  void** sp = reinterpret_cast<void**>(top) - 20;
  for (int i = 0; i < 20; ++i) sp[i] = nullptr;
  sp[11] = reinterpret_cast<void*>(&fiber_main);  // x30
#endif
  thread.stack_pointer = sp;
}

// Lands one of the copies under way.
inline void land_one(Machine& m, size_t index) {
  std::vector<std::function<void()>>& landings = m.block->landings;
  const std::function<void()> land = std::move(landings[index]);
  landings.erase(landings.begin() + static_cast<std::ptrdiff_t>(index));
  land();
  ++m.progress;
}

// Runs a block until none of its threads can go on.
inline void run_block(Machine& m, int index) {
  Block& block = *m.blocks[index];
  m.block = &block;
  m.block_index.x = index;
  const int warps = static_cast<int>(block.warps.size());
  for (Thread& t : block.threads)
    if (t.state == State::kPaused) t.state = State::kReady;
  std::vector<int> order(warps);
  for (int w = 0; w < warps; ++w) order[w] = w;
  for (bool again = true; again;) {
    again = false;
    for (Thread& t : block.threads)
      if (t.state == State::kYielded) t.state = State::kReady;
    if (m.options.shuffle) std::shuffle(order.begin(), order.end(), m.random);
    for (int w : order) {
      for (bool warp_ran = true; warp_ran;) {
        warp_ran = false;
        for (int lane = 0; lane < 32; ++lane) {
          m.thread = w * 32 + lane;
          Thread& t = block.threads[m.thread];
          if (t.state != State::kReady) continue;
          if (m.chance(64)) {  // falls behind the other lanes, perhaps until they cannot go on
            const bool far = m.random() % 2 == 0;
            t.state = far ? State::kPaused : State::kYielded;
            again |= !far;
            continue;
          }
          m.thread_index.x = m.thread;
          cuda_on_host_switch(&m.scheduler_stack, t.stack_pointer);
          if (!m.failure.empty()) throw std::runtime_error(m.failure);
          warp_ran = again = true;
        }
      }
      if (m.options.copies == 2 && !block.landings.empty() && m.random() % 4 == 0)
        land_one(m, m.random() % block.landings.size());
    }
    if (!again && !block.landings.empty() && !block.finished()) {
      land_one(m, m.options.shuffle ? m.random() % block.landings.size() : 0);
      again = true;
    }
  }
}

// Who waits for what.
inline std::string describe(const Machine& m) {
  std::string text;
  static const char* const kNames[] = {"ready",
                                       "at a collective of the warp",
                                       "at __syncthreads",
                                       "at named barrier",
                                       "at the barrier in shared memory at byte",
                                       "yielded",
                                       "spinning",
                                       "done"};
  for (size_t b = 0; b < m.blocks.size(); ++b) {
    const Block& block = *m.blocks[b];
    if (block.finished()) continue;
    text += "block " + std::to_string(b) + ":\n";
    for (size_t i = 0; i < block.threads.size();) {
      const Thread& t = block.threads[i];
      size_t end = i;
      while (end < block.threads.size() && block.threads[end].state == t.state &&
             (end == i || end % 32 != 0) && block.threads[end].waits_for == t.waits_for)
        ++end;
      text += "  warp " + std::to_string(i / 32) + ", lanes " + std::to_string(i % 32) + " to " +
              std::to_string((end - 1) % 32) + ": " + kNames[static_cast<int>(t.state)];
      if (t.state == State::kAtMeeting || t.state == State::kAtBarrier)
        text += " " + std::to_string(t.waits_for - block.shared_base);
      text += "\n";
      i = end;
    }
  }
  return text;
}

// Runs `kernel` on grid x threads fibers with shared_bytes of shared memory a block.
inline void launch(const Options& options, int grid, int threads, size_t shared_bytes,
                   std::function<void()> kernel) {
  static std::vector<std::pair<int, std::unique_ptr<char[]>>> spare_stacks;  // of so many threads
  Machine m;
  struct Current {
    explicit Current(Machine* m) { machine() = m; }
    ~Current() { machine() = nullptr; }
  } current(&m);
  m.options = options;
  m.random.seed(options.seed);
  m.kernel = std::move(kernel);
  m.grid_size.x = grid;
  m.block_size.x = threads;
  for (int b = 0; b < grid; ++b) {
    auto block = std::make_unique<Block>();
    block->threads.resize(threads);
    block->warps.resize((threads + 31) / 32);
    block->shared_bytes = shared_bytes;
    if (options.hopper) block->pieces.resize(shared_bytes / 16 + 1);
    block->shared.assign(shared_bytes + kSharedAlign + 2 * kSharedGuard, '\xff');
    block->shared_base =
        reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block->shared.data()) + 2 * kSharedGuard - 1) &
                                ~uintptr_t{kSharedAlign - 1});
    const auto spare = std::find_if(spare_stacks.begin(), spare_stacks.end(),
                                    [&](const auto& s) { return s.first == threads; });
    if (spare != spare_stacks.end()) {
      block->stacks = std::move(spare->second);
      spare_stacks.erase(spare);
    } else {
      block->stacks.reset(new char[kStackBytes * threads]);
    }
    if (options.races)
      block->races = std::make_unique<Races>(&m.race_log, b, threads, shared_bytes, block->shared_base,
                                             options.disregarded, options.equal_writes);
    for (int t = 0; t < threads; ++t) make_fiber(block->threads[t], block->stacks.get() + kStackBytes * t);
    m.blocks.push_back(std::move(block));
  }
  std::vector<int> running(grid);
  for (int b = 0; b < grid; ++b) running[b] = b;
  int idle = 0;
  while (!running.empty()) {
    if (options.shuffle) std::shuffle(running.begin(), running.end(), m.random);
    bool progress = false;
    for (int b : running) {
      const int done = m.blocks[b]->done;
      m.progress = 0;
      run_block(m, b);
      progress |= m.progress > 0 || m.blocks[b]->done != done;
    }
    running.erase(
        std::remove_if(running.begin(), running.end(), [&](int b) { return m.blocks[b]->finished(); }),
        running.end());
    // A spinning block makes no progress by itself; if none makes any for long, they wait for one another.
    idle = progress ? 0 : idle + 1;
    if (idle > 100) {
      die("deadlock: threads wait at a barrier or collective that not all reach\n" + describe(m));
    }
  }
  for (const auto& block : m.blocks) {
    if (!block->landings.empty()) die("a block ended with tensor copies under way");
    for (const Warp& warp : block->warps)
      if (warp.state != nullptr) warp.state->finish();
    for (const char* byte = block->shared.data(); byte < block->shared.data() + block->shared.size(); ++byte)
      if ((byte < block->shared_base || byte >= block->shared_base + shared_bytes) && *byte != '\xff')
        die("a kernel wrote outside its shared memory");
    if (block->races != nullptr) block->races->check_complete();
    spare_stacks.emplace_back(threads, std::move(block->stacks));
  }
  if (options.raced != nullptr) *options.raced = std::move(m.race_log.product_reads);
  if (!m.race_log.empty()) die("data races in shared memory\n" + m.race_log.describe());
}

// All 32 lanes meet; the last one runs body(arguments of lane 0..31).
template <class Arguments, class Body>
inline void collective(int operation, Arguments& mine, Body body) {
  Machine& m = *machine();
  Warp& warp = m.warp();
  if (warp.arrived == 0) warp.operation = operation;
  if (warp.operation != operation) die("the lanes of a warp meet in different collectives");
  warp.arguments[m.thread % 32] = &mine;
  if (++warp.arrived < 32) {
    leave(State::kAtWarp);
    return;
  }
  body(reinterpret_cast<Arguments**>(warp.arguments));
  warp.arrived = 0;
  ++m.progress;
  const int first = m.thread / 32 * 32;
  for (int lane = 0; lane < 32; ++lane) m.block->threads[first + lane].state = State::kReady;
}

inline void barrier() {
  Machine& m = *machine();
  Block& block = *m.block;
  if (++block.at_barrier < static_cast<int>(block.threads.size())) {
    leave(State::kAtBlock);
    return;
  }
  block.at_barrier = 0;
  ++m.progress;
  if (Races* races = block.races.get())
    races->meet(0, static_cast<int>(block.threads.size()), kBySyncThreads);
  for (Thread& t : block.threads) t.state = State::kReady;
}

inline void perform(const Copy& copy) {
  const Unseen unseen;
  if (copy.source != nullptr)
    std::memcpy(copy.target, copy.source, 16);
  else
    std::memset(copy.target, 0, 16);
}

// Lands every copy of the groups before `through`.
inline void land(int through) {
  std::vector<Copy>& copies = machine()->current().copies;
  size_t kept = 0;
  for (const Copy& copy : copies) {
    if (copy.group < through)
      perform(copy);
    else
      copies[kept++] = copy;
  }
  copies.resize(kept);
  if (Races* r = races()) r->copies_waited_for(machine()->thread, through);
}

}  // namespace cuda_on_host

#define threadIdx (::cuda_on_host::machine()->thread_index)
#define blockIdx (::cuda_on_host::machine()->block_index)
#define gridDim (::cuda_on_host::machine()->grid_size)
#define blockDim (::cuda_on_host::machine()->block_size)

inline void __syncthreads() { cuda_on_host::barrier(); }
inline void __threadfence() {}
inline float __fdividef(float a, float b) { return std::isinf(b) ? 0.0f : a / b; }

inline void __syncwarp() {
  int none = 0;
  cuda_on_host::collective(7, none, [](int**) {
    if (cuda_on_host::Races* races = cuda_on_host::races())
      races->meet(cuda_on_host::machine()->thread / 32 * 32, 32, cuda_on_host::kBySyncWarp);
  });
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

template <class T>
struct ShuffleArguments {
  T value;
  int lane;
  T result;
};

template <class T>
inline T shuffle(int operation, T value, int from) {
  ShuffleArguments<T> mine{value, from, value};
  cuda_on_host::collective(operation, mine, [](ShuffleArguments<T>** all) {
    for (int i = 0; i < 32; ++i)
      if (all[i]->lane >= 0 && all[i]->lane < 32) all[i]->result = all[all[i]->lane]->value;
  });
  return mine.result;
}
inline int lane_id() { return cuda_on_host::machine()->thread % 32; }
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  return shuffle(1, value, lane_id() ^ mask);
}
template <class T>
inline T __shfl_up_sync(unsigned, T value, int delta) {
  return shuffle(2, value, lane_id() - delta);
}
template <class T>
inline T __shfl_sync(unsigned, T value, int lane) {
  return shuffle(3, value, lane);
}

template <class Result, class T, class Fold>
inline Result fold(int operation, T value, Result first, Fold combine) {
  struct Arguments {
    T value;
    Result result;
  } mine{value, first};
  cuda_on_host::collective(operation, mine, [&](Arguments** all) {
    Result result = first;
    for (int i = 0; i < 32; ++i) result = combine(result, all[i]->value, i);
    for (int i = 0; i < 32; ++i) all[i]->result = result;
  });
  return mine.result;
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  return fold<unsigned>(8, predicate, 0u,
                        [](unsigned r, int x, int i) { return r | (x != 0 ? 1u << i : 0u); });
}
inline int __any_sync(unsigned, int predicate) {
  return fold<int>(9, predicate, 0, [](int r, int x, int) { return r | (x != 0); });
}
inline int __reduce_add_sync(unsigned, int value) {
  return fold<int>(11, value, 0, [](int r, int x, int) { return r + x; });
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  return fold<unsigned>(10, value, ~0u, [](unsigned r, unsigned x, int) { return min(r, x); });
}

inline int __reduce_min_sync(unsigned, int value) {
  return fold<int>(12, value, INT32_MAX, [](int r, int x, int) { return min(r, x); });
}
inline int __reduce_max_sync(unsigned, int value) {
  return fold<int>(13, value, INT32_MIN, [](int r, int x, int) { return max(r, x); });
}

// ---- the host twin of ptx.cuh ----
namespace relay::cuda {

struct Float16 {
  static uint32_t pack(float low, float high) { return bits(low) | static_cast<uint32_t>(bits(high)) << 16; }
  static float2 unpack(uint32_t pair) { return {value(pair & 0xffff), value(pair >> 16)}; }
  static constexpr uint32_t kNaN = 0x7e007e00u;

 private:
  static uint16_t bits(float x) {
    const _Float16 half = static_cast<_Float16>(x);
    uint16_t word;
    std::memcpy(&word, &half, 2);
    return word;
  }
  static float value(uint16_t word) {
    _Float16 half;
    std::memcpy(&half, &word, 2);
    return static_cast<float>(half);
  }
};

struct BFloat16 {
  static uint32_t pack(float low, float high) { return bits(low) | static_cast<uint32_t>(bits(high)) << 16; }
  static float2 unpack(uint32_t pair) { return {value(pair & 0xffff), value(pair >> 16)}; }
  static constexpr uint32_t kNaN = 0x7fc07fc0u;

 private:
  static uint16_t bits(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    if (std::isnan(x)) return 0x7fc0;
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  static float value(uint16_t word) {
    const uint32_t wide = static_cast<uint32_t>(word) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
};

using SharedAddress = char*;

inline char* dynamic_shared() { return cuda_on_host::machine()->block->shared_base; }
inline SharedAddress shared_address(const void* pointer) {
  return const_cast<char*>(static_cast<const char*>(pointer));
}

inline void check_alignment(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) cuda_on_host::die("a 16-byte access is not aligned");
}

// Reports an access of the current thread by the twin of an instruction.
[[gnu::always_inline]] inline void report(SharedAddress address, size_t bytes, bool write,
                                          const void* value = nullptr) {
  if (cuda_on_host::Races* races = cuda_on_host::races())
    races->access(cuda_on_host::machine()->thread, cuda_on_host::shared_offset(address), bytes, write,
                  cuda_on_host::here(), value);
}

[[gnu::always_inline]] inline uint4 load_shared_16(SharedAddress address) {
  check_alignment(address);
  report(address, 16, false);
  const cuda_on_host::Unseen unseen;
  uint4 value;
  std::memcpy(&value, address, 16);
  return value;
}
inline void store_piece(SharedAddress address, const uint4& value) {
  const cuda_on_host::Unseen unseen;
  cuda_on_host::Machine& m = *cuda_on_host::machine();
  if (!m.block->pieces.empty()) {
    // Not for the copy engine's and the products' eyes until a fence. Writing what is there already is
    // harmless: two warpgroups do so in a buffer that both read.
    const int index = static_cast<int>((address - m.block->shared_base) / 16);
    cuda_on_host::Piece& piece = m.block->pieces.at(index);
    if (std::memcmp(address, &value, 16) != 0) ++piece.version, piece.fenced = false;
    if (!piece.fenced) m.current().written.emplace_back(index, piece.version);
  }
  std::memcpy(address, &value, 16);
}
[[gnu::always_inline]] inline void store_shared_16(SharedAddress address, const uint4& value) {
  check_alignment(address);
  report(address, 16, true, &value);
  store_piece(address, value);
}

[[gnu::always_inline]] inline void copy_async_16(SharedAddress target, const void* source, bool valid) {
  check_alignment(target);
  check_alignment(source);
  cuda_on_host::Machine& m = *cuda_on_host::machine();
  if (cuda_on_host::Races* races = m.block->races.get())
    races->copy_started(m.thread, m.current().group, cuda_on_host::shared_offset(target), 16,
                        cuda_on_host::here());
  const cuda_on_host::Copy copy{target, valid ? source : nullptr, m.current().group};
  const int when = m.options.copies;
  if (when == 1 || (when == 2 && m.random() % 2 == 0)) {
    cuda_on_host::perform(copy);
  } else {
    if (valid) {  // the address must be readable even if the copy is never looked at
      volatile char byte = *static_cast<const char*>(source);
      (void)byte;
    }
    m.current().copies.push_back(copy);
  }
}
inline void copy_async_commit() { ++cuda_on_host::machine()->current().group; }
template <int kPending>
inline void copy_async_wait() {
  cuda_on_host::land(cuda_on_host::machine()->current().group - kPending);
}

struct MatrixArguments {
  const char* row;
  uint32_t* result;
};

template <bool kTransposed>
[[gnu::always_inline]] inline void load_matrix(int operation, uint32_t (&r)[4], SharedAddress row) {
  check_alignment(row);
  report(row, 16, false);  // by the lane that gives the address
  MatrixArguments mine{row, r};
  cuda_on_host::collective(operation, mine, [](MatrixArguments** all) {
    const cuda_on_host::Unseen unseen;
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(element[i], all[matrix * 8 + i]->row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint32_t low = kTransposed ? element[t][g] : element[g][t];
        const uint32_t high = kTransposed ? element[t + 1][g] : element[g][t + 1];
        all[lane]->result[matrix] = low | high << 16;
      }
    }
  });
}
[[gnu::always_inline]] inline void load_matrix_x4(uint32_t (&r)[4], SharedAddress row) {
  load_matrix<false>(4, r, row);
}
[[gnu::always_inline]] inline void load_matrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) {
  load_matrix<true>(5, r, row);
}

struct MultiplyArguments {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
inline void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MultiplyArguments mine{c, a, {b0, b1}};
  cuda_on_host::collective(6, mine, [](MultiplyArguments** all) {
    float a[16][16], bt[8][16];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        const float2 x = T::unpack(all[lane]->a[i]);
        a[g + i % 2 * 8][t + i / 2 * 8] = x.x;
        a[g + i % 2 * 8][t + i / 2 * 8 + 1] = x.y;
      }
      for (int i = 0; i < 2; ++i) {
        const float2 x = T::unpack(all[lane]->b[i]);
        bt[g][t + i * 8] = x.x;
        bt[g][t + i * 8 + 1] = x.y;
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * bt[column][k];
        all[lane]->c[i] += sum;
      }
  });
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }

// Read in spins: others must run in between.
inline uint32_t load_relaxed(const uint32_t* word) { return *const_cast<const volatile uint32_t*>(word); }
inline uint32_t load_acquire(const uint32_t* word) {
  cuda_on_host::leave(cuda_on_host::State::kPaused);
  return *const_cast<const volatile uint32_t*>(word);
}
inline uint32_t add_release(uint32_t* word, uint32_t value) {
  cuda_on_host::Machine& m = *cuda_on_host::machine();
  if (m.chance(2)) cuda_on_host::leave(cuda_on_host::State::kPaused);
  const uint32_t before = *word;
  *word = before + value;
  ++m.progress;
  if (m.chance(2)) cuda_on_host::leave(cuda_on_host::State::kPaused);
  return before;
}
inline float load_other_block(const float* word) { return *word; }
template <int kCount>
inline void load_other_block_if(bool there, float (&x)[kCount], const float* from) {
  if (reinterpret_cast<uintptr_t>(from) % (kCount * 4) != 0) cuda_on_host::die("a load is not aligned");
  for (int i = 0; there && i < kCount; ++i) x[i] = from[i];
}
inline void prefetch_l2(const void* line) {
  volatile char byte = *static_cast<const char*>(line);
  (void)byte;
}

}  // namespace relay::cuda
