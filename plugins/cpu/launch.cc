#include "plugins/cpu/launch.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "plugins/cpu/kernels.h"

namespace relay::cpu {
namespace {

// Work below this many bytes is done at once: waking threads costs more.
constexpr int64_t kSerialBytes = 128 << 10;

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

// Scratch of the calling thread, kept for the next call.
float* ThreadScratch(int64_t floats) {
  thread_local std::unique_ptr<float[], Free> memory;
  thread_local int64_t capacity = 0;
  if (capacity < floats) {
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    capacity = memory ? floats : 0;
    if (!memory) throw std::bad_alloc();
  }
  return memory.get();
}

// Calls body(i, scratch) for i < count, on the host's threads unless `serial`.
template <typename Body>
void ForEach(Host& host, int64_t count, int64_t head_dim, bool serial, const Body& body) {
  if (count == 0) return;
  struct Argument {
    const Body& body;
    int64_t scratch_floats;
    std::atomic<bool> out_of_memory{false};
  } argument{body, ScratchFloats(head_dim)};
  const auto run = [](void* pointer, size_t i) {
    auto& a = *static_cast<Argument*>(pointer);
    try {
      a.body(static_cast<int64_t>(i), ThreadScratch(a.scratch_floats));
    } catch (const std::bad_alloc&) {  // must not unwind through the host's threads
      a.out_of_memory = true;
    }
  };
  if (serial || count == 1) {
    for (int64_t i = 0; i < count; ++i) run(&argument, static_cast<size_t>(i));
  } else {
    host.ParallelFor(static_cast<size_t>(count), run, &argument);
  }
  if (argument.out_of_memory) throw std::bad_alloc();
}

}  // namespace

void RelayAttention(const Kernels& kernels, const RelayParams& params, Host& host) {
  const Geometry& g = params.geometry;
  if (g.batch == 0) return;

  const Plan plan = MakePlan(params);
  float* partials = nullptr;
  if (plan.partial_floats > 0) {
    partials = static_cast<float*>(host.Allocate(static_cast<size_t>(plan.partial_floats) * sizeof(float)));
  }
  const Call call{params, plan, partials};
  const int64_t heads = g.kv_num_heads;

  const bool in_place = params.past_key == params.present_key && params.past_value == params.present_value;
  const int64_t new_bytes = g.batch * g.sequence * (g.num_heads + 2 * heads) * g.head_dim * 4;
  ForEach(host, g.batch * heads, g.head_dim, in_place && new_bytes < kSerialBytes,
          [&](int64_t i, float* scratch) { kernels.prepare(params, i / heads, i % heads, scratch); });

  // Prefix units are bound by arithmetic, context units by memory: spread evenly over the list, they overlap.
  const int64_t prefix_units = static_cast<int64_t>(plan.prefix_units.size());
  const int64_t context_units = static_cast<int64_t>(plan.context_units.size());
  const int64_t prefix_count = prefix_units * heads;
  const int64_t count = prefix_count + context_units * heads;
  const auto prefixes_before = [&](int64_t i) { return (i * prefix_count + count - 1) / count; };
  ForEach(host, count, g.head_dim, false, [&](int64_t i, float* scratch) {
    const int64_t p = prefixes_before(i);
    if (p < prefixes_before(i + 1)) {
      kernels.attend(call, plan.prefix_units[p % prefix_units], p / prefix_units, scratch);
    } else {
      const int64_t c = i - p;
      kernels.attend(call, plan.context_units[c / heads], c % heads, scratch);
    }
  });

  const int64_t merges = static_cast<int64_t>(plan.merges.size());
  ForEach(
      host, merges * heads, g.head_dim, plan.partial_floats * 4 < kSerialBytes,
      [&](int64_t i, float* scratch) { kernels.merge(call, plan.merges[i / heads], i % heads, scratch); });
}

}  // namespace relay::cpu
