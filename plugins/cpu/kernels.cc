// Compiled once per instruction set: Highway includes this file again for each of them (foreach_target.h).
// Only Highway's headers are used; the choice at run time is ours (ChooseKernels), as the distribution's
// Highway has its own only as a shared library.
#include "plugins/cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "plugins/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "plugins/cpu/kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#ifndef RELAY_CPU_KERNELS_ONCE
#define RELAY_CPU_KERNELS_ONCE
#if defined(__clang__)
#define RELAY_UNROLL _Pragma("clang loop unroll(full)")
#else
#define RELAY_UNROLL _Pragma("GCC unroll 32")
#endif

namespace relay::cpu {
// One thread's scratch. Its size serves every instruction set: rows are padded to 16 floats.
struct Workspace {
  static int64_t Padded(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }
  static int64_t Floats(int64_t head_dim) {
    return Padded(head_dim) * (3 * kTileRows + 2 * kBlockKeys) + kTileRows * (kBlockKeys + 5);
  }

  Workspace(float* memory, int64_t head_dim) {
    const auto take = [&memory](int64_t floats) { return std::exchange(memory, memory + floats); };
    const int64_t padded = Padded(head_dim);
    rows = take(kTileRows * padded);
    query = take(kTileRows * padded);
    o = take(kTileRows * padded);
    key = take(kBlockKeys * padded);
    value = take(kBlockKeys * padded);
    scores = take(kTileRows * kBlockKeys);
    m = take(kTileRows);
    d = take(kTileRows);
    block_max = take(kTileRows);
    lo = reinterpret_cast<int32_t*>(take(kTileRows));
    hi = reinterpret_cast<int32_t*>(take(kTileRows));
  }

  float *rows, *query, *o, *key, *value, *scores, *m, *d, *block_max;
  int32_t *lo, *hi;
};
}  // namespace relay::cpu
#endif  // RELAY_CPU_KERNELS_ONCE

#if RELAY_CPU_HAS_KERNELS(HWY_TARGET)

#include "plugins/cpu/math-inl.h"
#include "plugins/cpu/narrow-inl.h"
#include "plugins/cpu/rows-inl.h"
#include "plugins/cpu/state-inl.h"
#include "plugins/cpu/wide-inl.h"

HWY_BEFORE_NAMESPACE();
namespace relay::cpu {
namespace HWY_NAMESPACE {

// From so many rows on the wide kernel is the faster one (measured, docs/performance.md).
inline constexpr int kMinWideRows = kLanes >= 16 ? 13 : kLanes >= 8 ? 7 : 8;

// Writes the states of a unit's rows, o [rows, stride], to its slot, or the finished rows to the output.
template <typename T>
HWY_INLINE void StoreStates(const Call& call, const Unit& unit, int64_t kv_head, float* o, int64_t stride,
                            const float* m, const float* d) {
  const Geometry& g = call.params.geometry;
  if (unit.slot < 0) {
    for (int64_t r = 0; r < unit.rows; ++r) {
      State state{o + r * stride, m[r], d[r], g.head_dim};
      state.Normalize();
      const Row& row = call.plan.rows[unit.first_row + r];
      Store(state.o, g.head_dim, static_cast<T*>(call.params.output) + RowOffset(g, row, kv_head));
    }
    return;
  }
  float* slot = call.partials + unit.slot + kv_head * StateFloats(unit.rows, g.head_dim);
  for (int64_t r = 0; r < unit.rows; ++r) Store(o + r * stride, g.head_dim, slot + r * g.head_dim);
  Store(m, unit.rows, slot + unit.rows * g.head_dim);
  Store(d, unit.rows, slot + unit.rows * (g.head_dim + 1));
}

template <typename T>
void Attend(const Call& call, const Unit& unit, int64_t kv_head, float* scratch) {
  const RelayParams& params = call.params;
  const Geometry& g = params.geometry;
  const int64_t head_dim = g.head_dim;
  const Workspace ws(scratch, head_dim);

  // scores are in base 2; with a softcap, tanh comes between the two factors
  constexpr double kLog2E = 1.4426950408889634;
  const double scale = params.attributes.scale != 0.0f ? params.attributes.scale : 1.0 / std::sqrt(head_dim);
  const double softcap = params.attributes.softcap;
  const float query_scale = static_cast<float>(softcap > 0 ? scale / softcap : scale * kLog2E);
  const float cap = static_cast<float>(softcap * kLog2E);

  const int64_t prefix = kv_head * g.prefix_length * head_dim;
  const T* prefix_key = static_cast<const T*>(params.prefix_key) + prefix;
  const T* prefix_value = static_cast<const T*>(params.prefix_value) + prefix;
  const int64_t batch = call.plan.rows[unit.first_row].batch;
  const int64_t cache = (batch * g.kv_num_heads + kv_head) * g.max_context * head_dim;
  const T* context_key = static_cast<const T*>(params.present_key) + cache;
  const T* context_value = static_cast<const T*>(params.present_value) + cache;

  const int64_t stride = (head_dim + kLanes - 1) / kLanes * kLanes;
  const int64_t wide_stride = (unit.rows + kLanes - 1) / kLanes * kLanes;
  const bool wide = unit.rows >= kMinWideRows;
  float* natural = wide ? ws.rows : ws.query;
  for (int64_t r = 0; r < unit.rows; ++r) {
    const Row& row = call.plan.rows[unit.first_row + r];
    LoadQuery<T>(params, row, kv_head, query_scale, stride, natural + r * stride);
  }
  const auto set_ranges = [&](bool context) HWY_ATTR {
    for (int64_t r = 0; r < wide_stride; ++r) {  // lanes past the last row repeat it
      const Row& row = call.plan.rows[unit.first_row + HWY_MIN(r, int64_t{unit.rows} - 1)];
      ws.lo[r] = static_cast<int32_t>(context ? FirstContextKey(params, row) : FirstPrefixKey(params, row));
      ws.hi[r] = context ? row.context_hi : static_cast<int32_t>(g.prefix_length);
    }
  };
  std::fill_n(ws.o, (wide ? head_dim * wide_stride : unit.rows * stride), 0.0f);
  std::fill_n(ws.m, wide_stride, -std::numeric_limits<float>::infinity());
  std::fill_n(ws.d, wide_stride, 0.0f);

  if (wide) {
    std::fill(natural + unit.rows * stride, natural + wide_stride * stride, 0.0f);
    Transpose(natural, wide_stride, head_dim, stride, ws.query, wide_stride);
    const WideTile tile{head_dim, wide_stride, ws.query, ws.o,      ws.m,
                        ws.d,     ws.lo,       ws.hi,    ws.scores, ws.block_max};
    if (unit.prefix_begin < unit.prefix_end) {
      set_ranges(false);
      AttendWide(tile, prefix_key, prefix_value, unit.prefix_begin, unit.prefix_end, g.prefix_length, cap,
                 ws.key, ws.value);
    }
    if (unit.context_begin < unit.context_end) {
      set_ranges(true);
      AttendWide(tile, context_key, context_value, unit.context_begin, unit.context_end, unit.context_end,
                 cap, ws.key, ws.value);
    }
    Transpose(ws.o, head_dim, wide_stride, wide_stride, ws.rows, stride);
    StoreStates<T>(call, unit, kv_head, ws.rows, stride, ws.m, ws.d);
  } else {
    const NarrowRows rows{head_dim, stride, ws.query, ws.o, ws.m, ws.d, ws.lo, ws.hi, ws.scores};
    if (unit.prefix_begin < unit.prefix_end) {
      set_ranges(false);
      AttendNarrow(rows, unit.rows, prefix_key, prefix_value, unit.prefix_begin, unit.prefix_end, cap);
    }
    if (unit.context_begin < unit.context_end) {
      set_ranges(true);
      AttendNarrow(rows, unit.rows, context_key, context_value, unit.context_begin, unit.context_end, cap);
    }
    StoreStates<T>(call, unit, kv_head, ws.o, stride, ws.m, ws.d);
  }
}

template <typename T>
void MergeRows(const Call& call, const Merge& merge, int64_t kv_head, float* scratch) {
  const Geometry& g = call.params.geometry;
  for (int64_t r = 0; r < merge.rows; ++r) {
    const int64_t row = merge.first_row + r;
    std::fill_n(scratch, g.head_dim, 0.0f);
    State state{scratch, -std::numeric_limits<float>::infinity(), 0.0f, g.head_dim};
    // row i of the `count` states that begin at slot, for the first kv head
    const auto add = [&](int64_t slot, int64_t count, int64_t i) HWY_ATTR {
      const float* states = call.partials + slot + kv_head * StateFloats(count, g.head_dim);
      state.Merge(states + i * g.head_dim, states[count * g.head_dim + i],
                  states[count * (g.head_dim + 1) + i]);
    };
    for (int64_t split = 0; split < merge.splits; ++split) {
      add(merge.slot + split * g.kv_num_heads * StateFloats(merge.rows, g.head_dim), merge.rows, r);
    }
    const ContextGroup& group = call.plan.groups[call.plan.group_of_row[row]];
    for (int64_t chunk = 0; chunk < group.chunks; ++chunk) {
      add(group.slot + chunk * g.kv_num_heads * StateFloats(group.rows, g.head_dim), group.rows,
          row - group.first_row);
    }
    state.Normalize();
    Store(state.o, g.head_dim,
          static_cast<T*>(call.params.output) + RowOffset(g, call.plan.rows[row], kv_head));
  }
}

const Kernels& GetKernels(DataType dtype) {
  static constexpr const char* kTarget = HWY_TARGET == HWY_AVX3   ? "avx512"
                                         : HWY_TARGET == HWY_AVX2 ? "avx2"
                                         : HWY_ARCH_ARM_A64       ? "neon"
                                                                  : "sse4";
  static const Kernels kFloat32 = {kTarget, Prepare<float>, Attend<float>, MergeRows<float>};
  static const Kernels kFloat16 = {kTarget, Prepare<hwy::float16_t>, Attend<hwy::float16_t>,
                                   MergeRows<hwy::float16_t>};
  return dtype == DataType::kFloat32 ? kFloat32 : kFloat16;
}

}  // namespace HWY_NAMESPACE
}  // namespace relay::cpu
HWY_AFTER_NAMESPACE();

#endif  // RELAY_CPU_HAS_KERNELS

#if HWY_ONCE
namespace relay::cpu {
namespace {

struct Target {
  const char* name;
  bool supported;
  const Kernels& (*kernels)(DataType dtype);
};

// Best first.
const std::vector<Target>& Targets() {
  static const std::vector<Target> kTargets = {
#if HWY_TARGETS & HWY_AVX3
      {"avx512", HasAvx512(), N_AVX3::GetKernels},
#endif
#if HWY_TARGETS & HWY_AVX2
      {"avx2", HasAvx2(), N_AVX2::GetKernels},
#endif
#if HWY_TARGETS & HWY_SSE4
      {"sse4", HasSse4(), N_SSE4::GetKernels},
#endif
#if HWY_ARCH_ARM_A64
      {"neon", true, HWY_STATIC_DISPATCH(GetKernels)},
#endif
  };
  return kTargets;
}

}  // namespace

int64_t ScratchFloats(int64_t head_dim) { return Workspace::Floats(head_dim); }

const Kernels& ChooseKernels(DataType dtype) {
  const char* wanted = std::getenv("RELAY_ATTENTION_CPU_TARGET");
  std::string supported;
  for (const Target& target : Targets()) {
    if (!target.supported) continue;
    if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, target.name) == 0)
      return target.kernels(dtype);
    supported += std::string(supported.empty() ? "" : ", ") + target.name;
  }
  if (supported.empty())
    throw std::runtime_error("this CPU is too old: the kernels need SSE4.2, PCLMUL and AES");
  throw std::runtime_error("RELAY_ATTENTION_CPU_TARGET=" + std::string(wanted) +
                           " is not an instruction set of this CPU and this build; there are: " + supported);
}

}  // namespace relay::cpu
#endif  // HWY_ONCE
