// The end of a launch: a barrier of the whole grid, then each row's partial results are summed, weighed by
// log-sum-exp, in the order of the keys, so that two runs agree bit for bit.
#pragma once

#include "lengths.cuh"
#include "plan.h"

namespace relay::cuda {

constexpr float kLog2e = 1.4426950408889634f;

// All blocks of the grid arrive; those that read what others wrote wait. Needs all of them resident at once.
// The word is left ready for the next launch, of whatever grid: the arrivals of one launch add up to 2^31, so
// the top bit turns once all are there and the other bits return to 0. One thread of a block arrives, one,
// `waiter`, waits.
class GridBarrier {
 public:
  // Early: the top bit cannot turn before this block has arrived. Nothing waits for this read.
  __device__ __forceinline__ GridBarrier(uint32_t* word, int waiter) : word_(word) {
    if (static_cast<int>(threadIdx.x) == waiter) before_ = load_relaxed(word);
  }
  // After a barrier of the block, behind all that it wrote.
  __device__ __forceinline__ void arrive() const {
    add_release(word_, blockIdx.x == 0 ? kTop - (gridDim.x - 1) : 1);
  }
  __device__ __forceinline__ void wait() const {
    while (((load_acquire(word_) ^ before_) & kTop) == 0) {
    }
  }

 private:
  static constexpr uint32_t kTop = 0x80000000u;
  uint32_t* word_;
  uint32_t before_ = 0;
};

// The partial results of one row of a tile, each a row of KernelArguments::partial_output: first the one by
// packed row, then those of later workers.
struct Partials {
  int count;
  int head;
  int first_tail;  // partial k (k >= 1) is row first_tail + k * stride
  int stride;

  __device__ __forceinline__ int row(int k) const { return k == 0 ? head : first_tail + k * stride; }
};

// A row of the output and what it is made of: all of it is known from the lengths, before any block is done.
struct MergeRow {
  int output_row;  // -1: there is none
  Partials prefix, context;
};

// Rows are dealt out over the grid. A warp takes kRows at a time, its lanes 32 / kRows of the partials of
// each; where rows are few (kRows = 1), 2, 4 or 8 warps of a block take equal shares of one row's partials.
template <int kWarps, int kRows>
struct MergeShares {
  int rows;  // in all
  int ways_log2 = 0;

  __device__ __forceinline__ explicit MergeShares(int rows) : rows(rows) {
#pragma unroll
    for (int ways = 2; ways <= kWarps; ways *= 2)
      ways_log2 += kRows == 1 && rows * ways <= static_cast<int>(gridDim.x) * kWarps;
  }
  // Consecutive rows (groups of kRows of them) go to different blocks.
  __device__ __forceinline__ int first_row(int warp) const {
    return ((warp >> ways_log2) * gridDim.x + blockIdx.x) * kRows;
  }
  __device__ __forceinline__ int step() const { return (kWarps >> ways_log2) * gridDim.x * kRows; }
};
template <int kWarps>
__device__ __forceinline__ bool merges_four_rows(int rows) {
  return rows > 2 * static_cast<int>(gridDim.x) * kWarps;
}

template <class Schedule, class Worker>
__device__ __forceinline__ MergeRow merge_row(const KernelArguments& a, const Schedule& schedule,
                                              const Worker& worker, int index, int rows) {
  MergeRow row{-1, {}, {}};
  if (index >= rows) return row;
  const int token = a.by_heads.divide(index), head = index - token * a.params.num_heads;
  const int kv_head = a.by_group.divide(head);
  const int packed = token * a.group + head - kv_head * a.group;
  const int request = schedule.request_of_token()[token];
  if (schedule.totals().prefix_blocks > 0) row.prefix = worker.prefix_partials(kv_head, packed);
  row.context = worker.context_partials(request, kv_head, packed);
  const int s = schedule.first_token()[request] + token - schedule.token_start()[request];
  row.output_row = (request * a.params.sequence + s) * a.params.num_heads + head;
  return row;
}

// Waits for the grid and merges the rows that are this block's.
// sums: [kWarps, kHeadDim] words of shared memory, scratch: 2 * kWarps of them.
template <class T, int kHeadDim, int kWarps, int kRows, class Schedule, class Worker>
__device__ __forceinline__ void merge_rows(const KernelArguments& a, const Schedule& schedule,
                                           const Worker& worker, const GridBarrier& barrier, float* sums,
                                           float* scratch) {
  constexpr int kVector = kHeadDim % 128 == 0 ? 4 : (kHeadDim % 64 == 0 ? 2 : 1);
  constexpr int kVectors = kHeadDim / (32 * kVector);  // of each lane
  // Partials of a row read at a time, and what of those is read or left out together.
  constexpr int kAhead = kRows == 4 ? Worker::kFourRowsAhead : (kHeadDim > 128 ? 8 : 16);
  constexpr int kGroup = kAhead < 4 ? kAhead : 4;
  constexpr int kLanes = 32 / kRows;
  const RelayParams& p = a.params;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows = schedule.totals().tokens * p.num_heads;
  const MergeShares<kWarps, kRows> shares(rows);
  const int ways_log2 = shares.ways_log2, ways = 1 << ways_log2, way = warp & (ways - 1);
  const int step = shares.step(), mine = shares.first_row(warp) + lane / kLanes;
  uint32_t turn = 0;
#pragma unroll 1
  for (int first = 0; first < rows; first += step) {
    // Each group of kLanes lanes looks after one row.
    const MergeRow of = first == 0 ? worker.first_merge_row(warp * kRows + lane / kLanes, mine, rows)
                                   : merge_row(a, schedule, worker, first + mine, rows);
    const bool any = of.output_row >= 0;
    const Partials &prefix = of.prefix, &context = of.context;
    const int count = prefix.count + context.count;
    const int begin = way * count >> ways_log2, end = (way + 1) * count >> ways_log2;
    int most = end - begin;
    for (int distance = kLanes; distance < 32; distance *= 2)
      most = max(most, __shfl_xor_sync(kAllLanes, most, distance));
    // All of the above needs the lengths alone; what follows needs the other blocks.
    if (first == 0) worker.wait_for_grid(barrier);

    float highest = -INFINITY, total = 0;
    float x[kRows][kVectors][kVector] = {};
#pragma unroll 1
    for (int base = 0; base < most; base += kLanes) {
      const int own = base + lane % kLanes;
      const bool there = own < end - begin;
      const int k = there ? begin + own : 0;
      const int row = k < prefix.count ? prefix.row(k) : context.row(k - prefix.count);
      const float found_lse = load_other_block(a.partial_lse + row);
      float weight = 0;
#pragma unroll 1
      for (int ahead = 0; ahead < min(kLanes, most - base); ahead += kAhead) {
        // Partials that there are not weigh nothing, and are not read: but of four rows those that another
        // has, in whose place the first is.
        const int left = most - base - ahead;
        float part[kAhead][kRows][kVectors][kVector];
#pragma unroll
        for (int group = 0; group < kAhead; group += kGroup) {
          if (group >= left) continue;
          int at[kGroup][kRows];
#pragma unroll
          for (int j = 0; j < kGroup; ++j)
#pragma unroll
            for (int r = 0; r < kRows; ++r)
              at[j][r] = __shfl_sync(kAllLanes, row, r * kLanes + ahead + group + j);
#pragma unroll
          for (int j = 0; j < kGroup; ++j)
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
              for (int v = 0; v < kVectors; ++v) {
                float (&into)[kVector] = part[group + j][r][v];
#pragma unroll
                for (int i = 0; i < kVector; ++i) into[i] = 0;
                load_other_block_if(
                    group + j < left, into,
                    a.partial_output + int64_t{at[j][r]} * kHeadDim + (v * 32 + lane) * kVector);
              }
        }
        if (ahead == 0) {  // under way together with the first of them
          const float lse = there ? found_lse : -INFINITY;
          float new_highest = fmaxf(highest, lse);
          for (int distance = kLanes / 2; distance > 0; distance /= 2)
            new_highest = fmaxf(new_highest, __shfl_xor_sync(kAllLanes, new_highest, distance));
          const float shift = new_highest == -INFINITY ? 0 : new_highest;
          const float decay = exp2_fast(highest - shift);
          weight = exp2_fast(lse - shift);
          highest = new_highest;
          float more = weight;
          for (int distance = kLanes / 2; distance > 0; distance /= 2)
            more += __shfl_xor_sync(kAllLanes, more, distance);
          total = total * decay + more;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float of_row = __shfl_sync(kAllLanes, decay, r * kLanes);
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
#pragma unroll
              for (int i = 0; i < kVector; ++i) x[r][v][i] *= of_row;
          }
        }
#pragma unroll
        for (int group = 0; group < kAhead; group += kGroup) {
          if (group >= left) continue;
#pragma unroll
          for (int j = group; j < group + kGroup; ++j)
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              const float w = __shfl_sync(kAllLanes, weight, r * kLanes + ahead + j);
#pragma unroll
              for (int v = 0; v < kVectors; ++v)
#pragma unroll
                for (int i = 0; i < kVector; ++i) x[r][v][i] += w * part[j][r][v][i];
            }
        }
      }
    }

    if (ways == 1) {
      const float scale = total == 0 ? 0 : 1 / total;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float of_row = __shfl_sync(kAllLanes, scale, r * kLanes);
        const int to = __shfl_sync(kAllLanes, of.output_row, r * kLanes);
        if (to < 0) continue;
        uint16_t* output = static_cast<uint16_t*>(p.output) + int64_t{to} * kHeadDim;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          uint16_t* target = output + (v * 32 + lane) * kVector;
          if constexpr (kVector == 1) {
            *target = static_cast<uint16_t>(T::pack(x[r][v][0] * of_row, 0));
          } else {
#pragma unroll
            for (int i = 0; i < kVector; i += 2)
              reinterpret_cast<uint32_t*>(target)[i / 2] =
                  T::pack(x[r][v][i] * of_row, x[r][v][i + 1] * of_row);
          }
        }
      }
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[warp * kHeadDim + (v * 32 + lane) * kVector + i] = x[0][v][i];
      if (lane == 0) {
        scratch[warp] = highest;
        scratch[kWarps + warp] = total;
      }
      worker.exchange(turn);
      const int first_warp = warp - way;
      float weight[kWarps], peak = -INFINITY, sum = 0;  // of the ways; 0 beyond
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        weight[w] = w < ways ? scratch[first_warp + w] : -INFINITY;
        peak = fmaxf(peak, weight[w]);
      }
      if (peak == -INFINITY) peak = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        weight[w] = exp2_fast(weight[w] - peak);
        if (w < ways) sum += weight[w] * scratch[kWarps + first_warp + w];
      }
      const float scale = sum == 0 ? 0 : 1 / sum;
#pragma unroll 1
      for (int column = (way * 32 + lane) * 2; any && column < kHeadDim; column += ways * 64) {
        float low = 0, high = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          if (w >= ways) continue;
          const float2 part = *reinterpret_cast<const float2*>(sums + (first_warp + w) * kHeadDim + column);
          low += weight[w] * part.x;
          high += weight[w] * part.y;
        }
        uint16_t* output = static_cast<uint16_t*>(p.output) + int64_t{of.output_row} * kHeadDim;
        reinterpret_cast<uint32_t*>(output)[column / 2] = T::pack(low * scale, high * scale);
      }
      worker.exchange(turn);
    }
  }
}

// worker: prefix_partials(kv_head, packed_row), context_partials(request, kv_head, packed_row);
// kFourRowsAhead, partials of each of four rows that a warp may read at a time;
// first_merge_row(number, index, rows), merge_row() of the block's first rows, by their number in the block;
// and of the first kWarps warps of the block, which take part, wait_for_grid(barrier), until all blocks have
// arrived, and exchange(turn), a barrier for shared memory alone (turn: 0 before the first).
template <class T, int kHeadDim, int kWarps, class Schedule, class Worker>
__device__ __forceinline__ void merge(const KernelArguments& a, const Schedule& schedule,
                                      const Worker& worker, const GridBarrier& barrier, float* sums,
                                      float* scratch) {
  if (merges_four_rows<kWarps>(schedule.totals().tokens * a.params.num_heads))
    merge_rows<T, kHeadDim, kWarps, 4>(a, schedule, worker, barrier, sums, scratch);
  else
    merge_rows<T, kHeadDim, kWarps, 1>(a, schedule, worker, barrier, sums, scratch);
}

}  // namespace relay::cuda
