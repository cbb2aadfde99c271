// Relay attention in one launch on Hopper: as attention.cuh, with the copy engine and products of four warps.
//
// Warps 0 to 3 and 4 to 7 are warpgroups 0 and 1: they multiply.
// Warps 8 and 9 stream keys and values through rings of buffers, one thread of each.
// Warps 10 and 11 find the tiles of warpgroups 0 and 1 ahead of them, load the queries of small ones (up to
// 16 rows: decoding), find what the block will merge, then append the new tokens to the cache.
//
// Who does what: hopper_schedule.cuh. Nearly all of a short launch is latency, and code that runs once is
// fetched from far away: what is not in the inner loop is kept small rather than unrolled.
#pragma once

#include "hopper.h"
#include "hopper_ptx.cuh"
#include "hopper_schedule.cuh"
#include "merge.cuh"
#include "rotary.cuh"

namespace relay::cuda {

// Tiles that were found but not attended to yet, of each warpgroup. While decoding each has its own 16 query
// rows.
constexpr int kSegments = 4;
constexpr int kSmallRows = 16;
constexpr int kFoundAhead = 2;  // segments that are found before one's queries must have arrived
constexpr float kSlack = 8;     // weights of keys are at most 2^kSlack
constexpr int kMergeRows = 32;  // that a block merges first: up to four of each multiplying warp

// A warpgroup's part of a tile, as warps 10 and 11 hand it over.
struct Segment {
  int blocks;     // 0: no more
  int first_key;  // of the first block
  int last_key;   // of a context: the last there is; of the prefix: INT32_MAX
  int rows;       // valid rows, of 64
  int high;       // last key that a row sees: this (prefix), or its position in the context where -1
  int partial;    // row of the partial results
  int small;      // queries are loaded, into rows 16 * slot..; else the warpgroup loads them
  int last;       // no other follows
  int packed;     // first row, counted over the tokens of the launch
  int kv_head;
  int request;  // -1: each row's own (prefix)
  int unused;
};

// kWideKeys: keys of a unit of a wide tile, 64 or 128. Of 128 a block waits half as often; but the kernel
// that has both loops compiles to a slower one of 64.
template <class T, int kHeadDim, int kWideKeys>
class HopperAttention {
 public:
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kPairs = kChunks / 2;  // of chunks that rotate together
  static constexpr int kBufferBytes = kBlockKeys * kRowBytes;
  // A buffer is atoms of 64 rows (128 where a unit has so many keys), each row 128 bytes of a key (64 where
  // head_dim is no multiple of 64).
  static constexpr int kAtomElements = atom_elements(kHeadDim);
  static constexpr int kAtomRowBytes = kAtomElements * 2;
  static constexpr int kWorkerRows = 64;

  // Shared memory; plan.cpp's hopper_bytes adds up the same. The queries, [2 warpgroups, 64 rows], and the
  // ring begin at a.ring_offset.
  static constexpr int kBarrierOffset = 128;
  static constexpr int kSegmentOffset = kBarrierOffset + (kMaxStages * 2 + 2 * kSegments * 2 + 4) * 8;
  static constexpr int kRowsOffset =
      kSegmentOffset + 2 * kSegments * sizeof(Segment);                       // of queries: 2 x 64 ...
  static constexpr int kFreshOffset = kRowsOffset + 2 * 2 * kWorkerRows * 4;  // ... sources, positions
  static constexpr int kAnglesOffset = kFreshOffset + 2 * kSegments * 2 * kMaxHopperHeadDim * 2;
  static constexpr int kMergeOffset = kAnglesOffset + 2 * kSegments * 2 * kMaxHopperHeadDim;
  static constexpr int kArraysOffset = kMergeOffset + kMergeRows * sizeof(MergeRow);
  static constexpr int kQueryBytes = 2 * kBufferBytes;
  static_assert(sizeof(HopperTotals) <= kBarrierOffset && kArraysOffset == kHopperFixedBytes);
  static_assert(kQueryBytes >= kHopperConsumers / 32 * kHeadDim * 4);  // also the sums of merge()
  static constexpr int kFourRowsAhead = 8;                             // for merge()

  __device__ __forceinline__ explicit HopperAttention(const HopperArguments& arguments)
      : maps(arguments),
        a(arguments.base),
        p(arguments.base.params),
        rotary{p.cos_cache, p.sin_cache, p.rotary_dim, p.rotary_interleaved != 0},
        schedule{{&arguments.base, kArraysOffset}} {}

  __device__ __forceinline__ void run() {
    // Everything waits for the lengths.
    const HopperSchedule::Asked lengths = schedule.ask_lengths();
    const GridBarrier barrier(a.barrier, kGridWaiter);
    if (threadIdx.x == kHopperThreads - 32) schedule.prefetch_prefix();
    if (threadIdx.x % 32 == 0) {
      constexpr int kWarps = kHopperThreads / 32;
      const int warp = threadIdx.x / 32;
#pragma unroll 1
      for (int i = warp; i < a.depth; i += kWarps) {
        barrier_init(full_barrier(i), 1);
        barrier_init(free_barrier(i), 2 * 4);  // four warps of each warpgroup
      }
      if (warp < 2 * kSegments) {
        // All lanes that write for others arrive: racecheck does not follow __syncwarp and one lane's
        // arrival.
        barrier_init(segment_barrier(warp, 0), 32);
        barrier_init(segment_barrier(warp, 1), 4);
      } else if (warp == 2 * kSegments) {
        barrier_init(merge_barrier(), 32);
        barrier_init(exchange_barrier(), kHopperConsumers);
        barrier_init(grid_barrier(), 1);
      }
      barrier_init_fence();
    }
    // The queries are asked for before keys and values flood the memory, or they would arrive behind them.
    for (int64_t line = blockIdx.x + int64_t{gridDim.x} * threadIdx.x; line < a.query_lines;
         line += int64_t{gridDim.x} * kHopperThreads) {
      prefetch_l2(static_cast<const char*>(p.query) + line * 128);
      if (line < a.new_lines) {
        prefetch_l2(static_cast<const char*>(p.key) + line * 128);
        prefetch_l2(static_cast<const char*>(p.value) + line * 128);
      }
    }
    schedule.build(lengths);  // ends with a barrier of the block
    const int warp = uniform(threadIdx.x / 32);
    // A kernel starts with equal shares of the registers; those who multiply need more of them.
    if (warp >= kHopperConsumers / 32) {
      give_up_registers<72>();
      if (warp < 10) {
        if (threadIdx.x % 32 == 0) copy(warp - 8);
        // While those who merge prepare for it: waiting alone takes as long as a read of memory.
        if (threadIdx.x == kGridWaiter) {
          barrier.wait();
          barrier_arrive(grid_barrier(), 1);
        }
      } else {
        find(warp - 10);
        if (warp == 10) prepare_merge();
        // Not read by this launch: no need to wait for the other blocks.
        const int thread = threadIdx.x - 10 * 32;
        if (!a.appended_before)
          append_tokens<T, kHeadDim>(schedule, rotary, schedule.totals().tokens, thread, 64);
        if (a.token_begin == 0) fill_idle_rows<T, kHeadDim>(p, schedule.totals().tokens, thread, 64);
      }
    } else {
      take_registers<216>();
      consume(warp / 4);
      consumer_barrier();
      if (threadIdx.x == 0) barrier.arrive();
      merge<T, kHeadDim, kHopperConsumers / 32>(a, schedule, *this, barrier,
                                                reinterpret_cast<float*>(dynamic_shared() + a.ring_offset),
                                                reinterpret_cast<float*>(dynamic_shared() + kRowsOffset));
    }
  }

  // ---- for merge() ----
  __device__ __forceinline__ static void wait_for_grid(const GridBarrier&) {
    barrier_wait(grid_barrier(), 0);
  }
  // compute-sanitizer's racecheck does not follow a barrier of some of the block's warps.
  __device__ __forceinline__ static void exchange(uint32_t& turn) {
    barrier_arrive(exchange_barrier(), 1);
    barrier_wait(exchange_barrier(), turn);
    turn ^= 1;
  }
  __device__ __forceinline__ MergeRow first_merge_row(int number, int, int) const {
    barrier_wait(merge_barrier(), 0);
    return merge_rows()[number];
  }
  __device__ __forceinline__ Partials prefix_partials(int kv_head, int packed) const {
    const int blocks = schedule.totals().prefix_blocks;
    const int tile = packed >> a.prefix_rows_log2;
    return partials_of((tile * p.kv_num_heads + kv_head) * blocks, blocks, tile, 0, kv_head, packed,
                       packed - tile * a.prefix_rows);
  }
  __device__ __forceinline__ Partials context_partials(int request, int kv_head, int packed) const {
    const int row = packed - schedule.token_start()[request] * schedule.totals().group;
    const int blocks = schedule.context_blocks(request);
    const int tile = row >> a.context_rows_log2;
    return partials_of(
        schedule.unit_start()[request] + (kv_head * schedule.context_tiles(request) + tile) * blocks, blocks,
        0, 1, kv_head, packed, row - tile * a.context_rows);
  }

 private:
  static constexpr int kWarpgroup = 128;
  static constexpr int kGridWaiter = kHopperConsumers + 32;  // the thread that waits for all blocks

  const HopperArguments& maps;
  const KernelArguments& a;
  const RelayParams& p;
  const Rotary rotary;
  HopperSchedule schedule;

  __device__ __forceinline__ static int uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }
  __device__ __forceinline__ static SharedAddress shared(int offset) {
    return shared_address(dynamic_shared()) + offset;
  }
  __device__ __forceinline__ static SharedAddress full_barrier(int stage) {
    return shared(kBarrierOffset) + stage * 16;
  }
  __device__ __forceinline__ static SharedAddress free_barrier(int stage) { return full_barrier(stage) + 8; }
  // signal 0: found, 1: done with. slot: kSegments * warpgroup + its own
  __device__ __forceinline__ static SharedAddress segment_barrier(int slot, int signal) {
    return shared(kBarrierOffset + kMaxStages * 16) + (slot * 2 + signal) * 8;
  }
  // merge_rows() are there.
  __device__ __forceinline__ static SharedAddress merge_barrier() {
    return segment_barrier(2 * kSegments, 0);
  }
  __device__ __forceinline__ static SharedAddress exchange_barrier() {
    return segment_barrier(2 * kSegments, 1);
  }
  // All blocks of the grid have arrived.
  __device__ __forceinline__ static SharedAddress grid_barrier() {
    return segment_barrier(2 * kSegments + 1, 0);
  }
  __device__ __forceinline__ static MergeRow* merge_rows() {
    return reinterpret_cast<MergeRow*>(dynamic_shared() + kMergeOffset);
  }
  __device__ __forceinline__ static Segment& segment(int slot) {
    return reinterpret_cast<Segment*>(dynamic_shared() + kSegmentOffset)[slot];
  }
  // Of each row of a warpgroup's queries: its row in `query`, and its position from the start of the prefix.
  __device__ __forceinline__ static int* query_row(int warpgroup) {
    return reinterpret_cast<int*>(dynamic_shared() + kRowsOffset) + warpgroup * 2 * kWorkerRows;
  }
  __device__ __forceinline__ static int* query_position(int warpgroup) {
    return query_row(warpgroup) + kWorkerRows;
  }
  // The new token of a segment: its rotated key, then its value.
  __device__ __forceinline__ static SharedAddress fresh_row(int slot) {
    return shared(kFreshOffset) + slot * 2 * kMaxHopperHeadDim * 2;
  }
  // The cosines of its position, then the sines.
  __device__ __forceinline__ static SharedAddress fresh_angles(int slot) {
    return shared(kAnglesOffset) + slot * 2 * kMaxHopperHeadDim;
  }
  __device__ __forceinline__ SharedAddress query_buffer(int warpgroup) const {
    return shared(a.ring_offset) + warpgroup * kBufferBytes;
  }
  __device__ __forceinline__ SharedAddress buffer(int stage, int keys) const {
    return shared(a.ring_offset + kQueryBytes) + stage * keys * kRowBytes;
  }
  // Byte offset of a 16-byte chunk in a buffer of so many keys, values or queries.
  template <int kRows>
  __device__ __forceinline__ static int chunk_offset(int row, int chunk) {
    constexpr int kAtomChunks = kAtomRowBytes / 16;
    const int swizzle = kAtomChunks == 8 ? row & 7 : row >> 1 & 3;
    return (chunk / kAtomChunks * kRows + row) * kAtomRowBytes + ((chunk % kAtomChunks) ^ swizzle) * 16;
  }
  // Byte offset of columns 16k..16k+15 in it.
  template <int kRows>
  __device__ __forceinline__ static constexpr int step_offset(int k) {
    return k * 16 / kAtomElements * kRows * kAtomRowBytes + k * 16 % kAtomElements * 2;
  }

  // ---- who does what ----
  // The units of a warpgroup; of a wide block, both have the same.
  __device__ __forceinline__ Walk walk_of(int warpgroup, bool& wide) const {
    const HopperTotals& t = schedule.totals();
    Walk walk{};
    wide = static_cast<int>(blockIdx.x) < t.wide.workers;
    int worker = wide ? blockIdx.x : schedule.narrow_worker(blockIdx.x, warpgroup), before = 0;
    const Region& region = wide ? t.wide : t.narrow;
    if (worker < region.workers) {
      if (wide && t.tile_workers > 0) {
        const int tile = quotient(worker, t.tile_workers);
        worker -= tile * t.tile_workers;
        before = tile * t.tile_units;
      }
      walk.unit = before + region.begin(worker);
      walk.end = before + region.begin(worker + 1);
      schedule.start(walk);
    }
    return walk;
  }
  // tile: of the prefix
  __device__ __forceinline__ Partials partials_of(int first_unit, int units, int tile, int kind, int kv_head,
                                                  int packed_row, int row_in_tile) const {
    const HopperTotals& t = schedule.totals();
    const bool wide = first_unit < t.wide_units;
    const Region& region = wide ? t.wide : t.narrow;
    const int like = wide && t.tile_workers > 0 ? tile : 0;  // so many tiles before are shared out like it
    first_unit -= like * t.tile_units;
    const int first = like * t.tile_workers + region.owner(first_unit);
    const int last = like * t.tile_workers + region.owner(first_unit + units - 1);
    Partials partials;
    partials.count = last - first + 1;
    partials.head = (kind * p.kv_num_heads + kv_head) * a.max_rows + packed_row;
    partials.first_tail = tail_row(wide, first, row_in_tile / kWorkerRows) + row_in_tile % kWorkerRows;
    partials.stride = wide ? 2 * kWorkerRows : kWorkerRows;
    return partials;
  }
  __device__ __forceinline__ int tail_row(bool wide, int worker, int half) const {
    return a.first_tail +
           (wide ? 2 * worker + half : 2 * schedule.totals().wide.workers + worker) * kWorkerRows;
  }

  // Keys of a unit, and of a buffer.
  __device__ __forceinline__ static int unit_keys(bool wide) { return wide ? kWideKeys : kBlockKeys; }

  // A ring of buffers, keys and values in turn: one for a wide block, else one for each warpgroup.
  struct Ring {
    int stage;
    uint32_t phase;
    int begin, end;

    __device__ __forceinline__ void advance() {
      if (++stage == end) stage = begin, phase ^= 1;
    }
  };
  __device__ __forceinline__ Ring ring_of(bool wide, int warpgroup) const {
    const int half = a.depth / 2, begin = wide ? 0 : warpgroup * half;
    return {begin, 0, begin, wide ? a.depth / (kWideKeys / kBlockKeys) : begin + half};
  }

  // ---- copies: one thread for each warpgroup; for a wide block the first alone ----
  __device__ __forceinline__ void copy(int warpgroup) const {
    bool wide;
    Walk walk = walk_of(warpgroup, wide);
    if (wide && warpgroup == 1) return;
    Ring ring = ring_of(wide, warpgroup), arriving = ring;
    // No more on their way than keep the memory busy: whatever else is read, queries first of all, queues up
    // behind them.
    const int keys = unit_keys(wide);
    int free_to_start =
        wide ? (a.copies_in_flight * kBlockKeys + keys - 1) / keys : max(a.copies_in_flight / 2, 1);
#pragma unroll 1
    while (walk.unit < walk.end) {
      const TensorMap* key = walk.is_context ? &maps.present_key : &maps.prefix_key;
      const TensorMap* value = walk.is_context ? &maps.present_value : &maps.prefix_value;
      const int head = walk.is_context ? walk.request * p.kv_num_heads + walk.kv_head : walk.kv_head;
      const int stop = min(walk.end, walk.first_unit + walk.blocks);
      int row = (walk.block_begin + walk.unit - walk.first_unit) * keys;
#pragma unroll 1
      for (; walk.unit < stop; ++walk.unit, row += keys) {
#pragma unroll 1
        for (const TensorMap* map : {key, value}) {
          if (free_to_start > 0) {
            --free_to_start;
          } else {
            barrier_wait(full_barrier(arriving.stage), arriving.phase);
            arriving.advance();
          }
          barrier_wait(free_barrier(ring.stage), ring.phase ^ 1);
          barrier_expect(full_barrier(ring.stage), keys * kRowBytes);
          tensor_copy(buffer(ring.stage, keys), map, 0, row, 0, head, full_barrier(ring.stage),
                      walk.is_context);
          ring.advance();
        }
      }
      if (walk.unit < walk.end) schedule.next(walk);
    }
  }

  // ---- tiles and queries, ahead of the warpgroup: one warp for each ----
  // The copies of a segment's queries are under way while the tiles after it are found.
  __device__ __forceinline__ void find(int warpgroup) const {
    const int lane = threadIdx.x % 32;
    bool wide;
    Walk walk = walk_of(warpgroup, wide);
    bool before_was_large = false, ended = false;
    int handed_over = 0;
#pragma unroll 1
    for (int number = 0;; ++number) {
      Segment s;
      int wait_for = number;
      if (!ended) {
        s = next_segment(walk, wide, warpgroup);
        // A large segment needs all rows of the queries, so that no other may be around.
        wait_for = !s.small || before_was_large ? number - 1 : number - kSegments;
        before_was_large = !s.small;
      }
      const int handed_over_before = ended ? number : max(number - kFoundAhead, wait_for + 1);
#pragma unroll 1
      for (; handed_over < handed_over_before; ++handed_over)
        hand_over(warpgroup, handed_over, number - 1 - handed_over);
      if (ended) return;
      if (wait_for >= 0)
        barrier_wait(segment_barrier(kSegments * warpgroup + wait_for % kSegments, 1),
                     wait_for / kSegments & 1);
      copy_queries(s, warpgroup, number);
      if (lane == 0) segment(kSegments * warpgroup + number % kSegments) = s;
      copy_async_commit();
      ended = s.last;
      if (!ended) {
        walk.unit += s.blocks;
        schedule.next(walk);
      }
    }
  }

  // A segment that has the new token of a request while decoding, which is not in the cache when the copy
  // engine reads that.
  __device__ __forceinline__ bool has_fresh(const Segment& s) const {
    return s.request >= 0 && s.blocks > 0 && !a.appended_before;
  }

  // Starts the copies of a small segment's queries, and of a new token with its angles.
  __device__ __forceinline__ void copy_queries(const Segment& s, int warpgroup, int number) const {
    const int lane = threadIdx.x % 32, slot = kSegments * warpgroup + number % kSegments;
    if (s.small && s.blocks > 0) {
      const int first_row = number % kSegments * kSmallRows;
      copy_rows<1>(s, warpgroup, first_row, 0, s.rows);
    }
    if (!has_fresh(s)) return;
    if (lane < kChunks) {
      const int64_t from = (int64_t{s.request} * p.kv_num_heads + s.kv_head) * kChunks + lane;
      copy_async_16(fresh_row(slot) + lane * 16, static_cast<const uint4*>(p.key) + from, true);
      copy_async_16(fresh_row(slot) + kMaxHopperHeadDim * 2 + lane * 16,
                    static_cast<const uint4*>(p.value) + from, true);
    }
    const int angle_chunks = p.rotary_dim / 16;
    if (lane % 16 < angle_chunks) {
      const void* angles = lane < 16 ? p.cos_cache : p.sin_cache;
      copy_async_16(fresh_angles(slot) + lane / 16 * kMaxHopperHeadDim + lane % 16 * 16,
                    static_cast<const uint4*>(angles) + int64_t{p.prefix_length + s.last_key} * angle_chunks +
                        lane % 16,
                    true);
    }
  }

  // Rotates what has arrived of a segment; the warpgroup may then begin. later: segments found since.
  __device__ __forceinline__ void hand_over(int warpgroup, int number, int later) const {
    const int lane = threadIdx.x % 32, slot = kSegments * warpgroup + number % kSegments;
    if (later == kFoundAhead)
      copy_async_wait<kFoundAhead>();
    else
      copy_async_wait<0>();
    __syncwarp();
    if (p.rotary_dim > 0) {
      const Segment& s = segment(slot);
      const bool fresh = has_fresh(s);
      const int rows = s.small && s.blocks > 0 ? s.rows : 0;
      const char* angles = dynamic_shared() + (fresh_angles(slot) - shared(0));
      const Rotary by{fresh ? angles : rotary.cosine, fresh ? angles + kMaxHopperHeadDim : rotary.sine,
                      rotary.dim, rotary.interleaved};
#pragma unroll 1
      for (int i = lane; i < (rows + fresh) * kPairs; i += 32) {  // the new key is the last row
        const int row = i / kPairs, pair = i % kPairs, at = number % kSegments * kSmallRows + row;
        if (pair >= rotary.dim / 16) continue;
        const auto place = [&](int c) {
          return row == rows ? fresh_row(slot) + c * 16
                             : query_buffer(warpgroup) + chunk_offset<kWorkerRows>(at, c);
        };
        by.template rotate<T>(
            by.angles(fresh ? 0 : query_position(warpgroup)[at], pair), pair,
            [&](int c) { return load_shared_16(place(c)); },
            [&](int c, const uint4& rotated) { store_shared_16(place(c), rotated); });
      }
    }
    shared_write_fence();
    barrier_arrive(segment_barrier(slot, 0), 1);
  }

  // From the walk's unit to the end of its tile or of the walk.
  __device__ __forceinline__ Segment next_segment(const Walk& walk, bool wide, int warpgroup) const {
    const int half = wide ? warpgroup * kWorkerRows : 0;  // first row of the tile that is this warpgroup's
    const int tile_rows = walk.is_context ? a.context_rows : a.prefix_rows;
    const int packed_end =
        (walk.is_context ? schedule.token_start()[walk.request + 1] : schedule.totals().tokens) * a.group;
    Segment s;
    s.packed = (walk.is_context ? schedule.token_start()[walk.request] * a.group : 0) +
               walk.index * tile_rows + half;
    s.rows = min(min(packed_end - s.packed, tile_rows - half), kWorkerRows);
    s.kv_head = walk.kv_head;
    s.request = walk.is_context ? walk.request : -1;
    s.small = walk.is_context && p.sequence * a.group <= kSmallRows;
    s.blocks = max(min(walk.end, walk.first_unit + walk.blocks) - walk.unit, 0);
    s.last = walk.unit + s.blocks >= walk.end;
    s.first_key = (walk.block_begin + walk.unit - walk.first_unit) * unit_keys(wide);
    s.last_key = walk.is_context ? schedule.context_keys(walk.request) - 1 : INT32_MAX;
    s.high = walk.is_context ? -1 : p.prefix_length - 1;
    s.partial =
        walk.unit == walk.first_unit
            ? (walk.is_context * p.kv_num_heads + walk.kv_head) * a.max_rows + s.packed
            : tail_row(wide, wide ? blockIdx.x : schedule.narrow_worker(blockIdx.x, warpgroup), warpgroup);
    s.unused = 0;
    return s;
  }

  // Where a row's query lies, and its position.
  __device__ __forceinline__ void find_query(const Segment& s, int warpgroup, int first_row, int row) const {
    const int token = a.by_group.divide(s.packed + row);
    const int request = s.request >= 0 ? s.request : schedule.request_of_token()[token];
    const int index = schedule.first_token()[request] + token - schedule.token_start()[request];
    query_row(warpgroup)[first_row + row] =
        (request * p.sequence + index) * p.num_heads + s.kv_head * a.group + s.packed + row - token * a.group;
    query_position(warpgroup)[first_row + row] = p.prefix_length + schedule.context_len()[request] + index;
  }

  // The rows that this block merges first, by one warp while the others multiply.
  __device__ __forceinline__ void prepare_merge() const {
    constexpr int kWarps = kHopperConsumers / 32;
    const int lane = threadIdx.x % 32, rows = schedule.totals().tokens * p.num_heads;
    int index = rows;
    if (merges_four_rows<kWarps>(rows))
      index = MergeShares<kWarps, 4>(rows).first_row(lane / 4) + lane % 4;
    else if (lane < kWarps)
      index = MergeShares<kWarps, 1>(rows).first_row(lane);
    merge_rows()[lane] = merge_row(a, schedule, *this, index, rows);
    barrier_arrive(merge_barrier(), 1);
  }

  // Starts the copies of a segment's rows first.. into a warpgroup's rows first_row + first.. of the queries,
  // by one warp. Rows that are not valid stay as they are: each row of a product depends on its own query
  // alone.
  template <int kUnroll>
  __device__ __forceinline__ void copy_rows(const Segment& s, int warpgroup, int first_row, int first,
                                            int rows) const {
    const int lane = threadIdx.x % 32;
    if (lane < rows) find_query(s, warpgroup, first_row, first + lane);
    __syncwarp();
#pragma unroll kUnroll
    for (int i = lane; i < rows * kChunks; i += 32) {
      const int row = first_row + first + i / kChunks, chunk = i % kChunks;
      const uint4* query = static_cast<const uint4*>(p.query) + int64_t{query_row(warpgroup)[row]} * kChunks;
      copy_async_16(query_buffer(warpgroup) + chunk_offset<kWorkerRows>(row, chunk), query + chunk, true);
    }
  }

  // A large segment's rotated queries: each warp takes the 16 rows that it multiplies. All are under way at
  // once, and their angles with them.
  __device__ __forceinline__ void load_queries(const Segment& s, int warpgroup) const {
    constexpr int kEach = kSmallRows * kPairs / 32;  // pairs of a lane
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * kSmallRows;
    const int rows = min(s.rows - first, kSmallRows);
    copy_rows<4>(s, warpgroup, 0, first, rows);
    copy_async_commit();
    if (rotary.dim == 0) {
      copy_async_wait<0>();
      return;
    }
    RotaryAngles by[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int row = (lane + 32 * j) / kPairs, pair = (lane + 32 * j) % kPairs;
      if (row < rows && pair < rotary.dim / 16)
        by[j] = rotary.angles(query_position(warpgroup)[first + row], pair);
    }
    copy_async_wait<0>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int row = (lane + 32 * j) / kPairs, pair = (lane + 32 * j) % kPairs;
      if (row >= rows || pair >= rotary.dim / 16) continue;
      const auto place = [&](int c) {
        return query_buffer(warpgroup) + chunk_offset<kWorkerRows>(first + row, c);
      };
      rotary.rotate<T>(
          by[j], pair, [&](int c) { return load_shared_16(place(c)); },
          [&](int c, const uint4& rotated) { store_shared_16(place(c), rotated); });
    }
  }

  // ---- consumers ----
  __device__ __forceinline__ void consume(int warpgroup) const {
    bool wide;
    const Walk walk = walk_of(warpgroup, wide);
    if (kWideKeys > kBlockKeys && wide)
      consume<kWideKeys>(warpgroup, walk, wide);
    else
      consume<kBlockKeys>(warpgroup, walk, wide);
  }
  template <int kKeys>
  __device__ __forceinline__ void consume(int warpgroup, const Walk& walk, bool wide) const {
    Ring ring = ring_of(wide, warpgroup);
    // A first segment that is large need not be handed over: its queries are asked for before the flood of
    // keys and values.
    const Segment own = next_segment(walk, wide, warpgroup);
    const bool at_once = own.blocks > 0 && !own.small;
#pragma unroll 1
    for (int number = 0;; ++number) {
      const int slot = kSegments * warpgroup + number % kSegments;
      const bool early = at_once && number == 0;
      if (!early) barrier_wait(segment_barrier(slot, 0), number / kSegments & 1);
      const Segment s = early ? own : segment(slot);
      if (s.blocks == 0) return;
      if (!s.small) {
        load_queries(s, warpgroup);
        shared_write_fence();
        warpgroup_barrier(warpgroup);
      }
      if (early && s.request >= 0) barrier_wait(segment_barrier(slot, 0), 0);  // for a new token
      const bool last = uniform(s.last);
      attend<kKeys>(s, slot, wide, warpgroup, ring);
      if (last) return;
    }
  }

  // The key blocks of one segment, kKeys each.
  template <int kKeys>
  __device__ __forceinline__ void attend(const Segment& s, int slot, bool wide, int warpgroup,
                                         Ring& ring) const {
    const int lane = threadIdx.x % 32, thread = threadIdx.x % kWarpgroup;
    const int warp = uniform(threadIdx.x / 32 % 4), row0 = warp * 16 + lane / 4;
    const int first_row = s.small ? slot % kSegments * kSmallRows : 0;
    const int rows = uniform(s.rows), blocks = uniform(s.blocks), last_key = uniform(s.last_key);
    int first_key = uniform(s.first_key);
    const bool idle = rows <= warp * 16;  // none of this warp's rows exists
    const uint32_t arrivals = wide ? 1 : 2;

    const uint64_t queries =
        matrix_descriptor<kAtomRowBytes>(query_buffer(warpgroup) + uniform(first_row) * kAtomRowBytes, 16);
    // The keys that this thread's two rows see, counted from the first of a block and from this thread's
    // first column.
    int low[2], high[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row0 + 8 * r, column = lane % 4 * 2;
      low[r] = 0;
      high[r] = INT32_MAX;
      if (row < rows) {  // else its result is never stored: nothing to mask
        const int position = query_position(warpgroup)[first_row + row];
        const int of_tile =
            s.high < 0 ? position - p.prefix_length : position;  // in the tile's own numbering
        high[r] = (s.high < 0 ? of_tile : s.high) - column;
        if (p.local_window_size > 0) low[r] = of_tile - p.local_window_size + 1 - column;
      }
    }

    // Of blocks that begin from seen_from to seen_to this warp's rows see all keys.
    const int seen_from = __reduce_max_sync(kAllLanes, max(low[0], low[1]));
    const int seen_to = __reduce_min_sync(kAllLanes, min(high[0], high[1])) - (kKeys - 1);

    const bool capped = p.softcap > 0;
    // exp(score) = 2^(factor * s), s being the product or, capped, the whole score.
    const float factor = capped ? kLog2e : p.scale * kLog2e;
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    float output[kHeadDim / 2];
    uint32_t weights[kKeys / 16][4];
    product_undefined(output);
    product_undefined(weights);
    int values_before = 0;
    // output += weights * values of block i - 1; the first product takes output for 0
    const auto start_output = [&](SharedAddress at, int i) {
      const uint64_t values = matrix_descriptor<kAtomRowBytes>(at, kKeys * kAtomRowBytes);
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
        multiply_values<T>(output, weights[k], moved(values, k * 16 * kAtomRowBytes), k > 0 || i > 1);
      product_commit();
    };

    // A block's scores are computed first; while its softmax is, the values of the block before are
    // multiplied.
#pragma unroll 1
    for (int i = 0; i < blocks; ++i, first_key += kKeys) {
      const int keys_stage = uniform(ring.stage);
      const SharedAddress keys = buffer(keys_stage, kKeys);
      const int last_row = last_key - first_key;
      barrier_wait(full_barrier(keys_stage), ring.phase);
      ring.advance();
      if (last_row < kKeys && !a.appended_before) {  // the new token's key is not among those copied
        if (thread < kChunks)
          store_shared_16(keys + chunk_offset<kKeys>(last_row, thread),
                          load_shared_16(fresh_row(slot) + thread * 16));
        shared_write_fence();
        warpgroup_barrier(warpgroup);
      }
      // scores = queries * keys^T
      float score[kKeys / 2];
      const uint64_t keys_matrix = matrix_descriptor<kAtomRowBytes>(keys, 16);
      const auto query_step = [&](int k) { return moved(queries, step_offset<kWorkerRows>(k)); };
      const auto key_step = [&](int k) { return moved(keys_matrix, step_offset<kKeys>(k)); };
      product_pin(output);
      product_begin();
      multiply_keys<T, false>(score, query_step(0), key_step(0));
#pragma unroll
      for (int k = 1; k < kHeadDim / 16; ++k) multiply_keys<T, true>(score, query_step(k), key_step(k));
      product_commit();
      // Before the first block there are no values. Products behind a branch would be made to wait for each
      // other, so the keys are taken for them and the result is dropped.
      start_output(buffer(i == 0 ? keys_stage : values_before, kKeys), i);
      product_wait<1>();  // for the scores
      product_pin(score);
      if (lane == 0) barrier_arrive(free_barrier(keys_stage), arrivals);

      // online softmax
      float decay[2] = {1, 1};
      if (!idle) {
        if (capped) cap(score);
        if (first_key > seen_to) {
          const int at[2] = {high[0] - first_key, high[1] - first_key};
#pragma unroll
          for (int j = 0; j < kKeys / 2; ++j)
            if (j / 4 * 8 + j % 2 > at[j / 2 % 2]) score[j] = -INFINITY;
        }
        if (first_key < seen_from) {
          const int at[2] = {low[0] - first_key, low[1] - first_key};
#pragma unroll
          for (int j = 0; j < kKeys / 2; ++j)
            if (j / 4 * 8 + j % 2 < at[j / 2 % 2]) score[j] = -INFINITY;
        }
        if (kKeys == kBlockKeys && rows <= warp * 16 + 8)  // as in decoding: half the work
          weigh<1>(score, maximum, sum, decay, factor);
        else
          weigh<2>(score, maximum, sum, decay, factor);
      }
      product_wait<0>();
      product_pin(output);
      if (i > 0 && lane == 0) barrier_arrive(free_barrier(values_before), arrivals);
      if (i > 0 && __any_sync(kAllLanes, decay[0] != 1 || decay[1] != 1))
#pragma unroll
        for (int j = 0; j < kHeadDim / 2; ++j) output[j] *= decay[j / 2 % 2];
#pragma unroll
      for (int j = 0; j < kKeys / 4; ++j) weights[j / 4][j % 4] = T::pack(score[2 * j], score[2 * j + 1]);

      const int values_stage = uniform(ring.stage);
      barrier_wait(full_barrier(values_stage), ring.phase);
      ring.advance();
      values_before = values_stage;
      if (last_row < kKeys) {
        // Beyond the last key lies what earlier requests left, and 0 times that may be NaN.
        const SharedAddress values = buffer(values_stage, kKeys);
        if (!a.appended_before && thread < kChunks)
          store_shared_16(values + chunk_offset<kKeys>(last_row, thread),
                          load_shared_16(fresh_row(slot) + kMaxHopperHeadDim * 2 + thread * 16));
#pragma unroll 1
        for (int c = thread; c < (kKeys - 1 - last_row) * kChunks; c += kWarpgroup)
          store_shared_16(values + chunk_offset<kKeys>(last_row + 1 + c / kChunks, c % kChunks),
                          make_uint4(0, 0, 0, 0));
        shared_write_fence();
        warpgroup_barrier(warpgroup);
      }
    }
    product_pin(output);
    product_begin();
    start_output(buffer(values_before, kKeys), blocks);
    product_wait<0>();
    product_pin(output);
    if (lane == 0) barrier_arrive(free_barrier(values_before), arrivals);
    const int partial = s.partial + row0;
    __syncwarp();
    if (lane == 0) barrier_arrive(segment_barrier(slot, 1), 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
      if (row0 + 8 * r >= rows) continue;
      const float inverse = sum[r] == 0 ? 0 : __fdividef(1, sum[r]);
      float* target = a.partial_output + int64_t{partial + 8 * r} * kHeadDim + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
        *reinterpret_cast<float2*>(target + n * 8) =
            make_float2(output[4 * n + 2 * r] * inverse, output[4 * n + 2 * r + 1] * inverse);
      if (lane % 4 == 0)
        a.partial_lse[partial + 8 * r] =
            maximum[r] == -INFINITY ? -INFINITY : maximum[r] * factor + log2_fast(sum[r]);
    }
  }

  // Scores of a block -> weights, 2^(factor * score - maximum), of this thread's first kRows rows.
  template <int kRows, int kCount>
  __device__ __forceinline__ static void weigh(float (&score)[kCount], float (&maximum)[2], float (&sum)[2],
                                               float (&decay)[2], float factor) {
    float highest[2] = {maximum[0], maximum[1]}, shift[2], more[2][2] = {};
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        highest[r] = fmaxf(highest[r], fmaxf(score[4 * n + 2 * r], score[4 * n + 2 * r + 1]));
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(kAllLanes, highest[r], distance));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // What is subtracted need not be the maximum: while that grows by little, nothing needs to decay.
      const bool grown = highest[r] * factor > maximum[r] * factor + kSlack;
      const float before = maximum[r];
      if (grown) maximum[r] = highest[r];
      // No key seen yet: subtract 0, so that 2^(-inf - 0) = 0 and not NaN.
      shift[r] = maximum[r] == -INFINITY ? 0 : maximum[r] * factor;
      if (grown) decay[r] = exp2_fast(before * factor - shift[r]);
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int r = j / 2 % 2;
      if (r >= kRows) continue;
      score[j] = exp2_fast(score[j] * factor - shift[r]);
      more[r][j % 2] += score[j];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] = sum[r] * decay[r] + (more[r][0] + more[r][1]);
  }

  // score -> softcap * tanh(scale * score / softcap); tanh(x) = 1 - 2 / (e^2x + 1)
  template <int kCount>
  __device__ __forceinline__ void cap(float (&score)[kCount]) const {
    const float slope = 2 * kLog2e * p.scale / p.softcap;
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      score[j] = p.softcap - __fdividef(2 * p.softcap, exp2_fast(score[j] * slope) + 1);
  }
};

template <class T, int kHeadDim, int kWideKeys>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_kernel(const __grid_constant__ HopperArguments arguments) {
  HopperAttention<T, kHeadDim, kWideKeys>(arguments).run();
}

template <int kHeadDim>
HopperKernel choose_hopper_kernel(DataType dtype, int wide_keys) {
  if (wide_keys == 2 * kBlockKeys)
    return dtype == DataType::kFloat16 ? hopper_kernel<Float16, kHeadDim, 2 * kBlockKeys>
                                       : hopper_kernel<BFloat16, kHeadDim, 2 * kBlockKeys>;
  return dtype == DataType::kFloat16 ? hopper_kernel<Float16, kHeadDim, kBlockKeys>
                                     : hopper_kernel<BFloat16, kHeadDim, kBlockKeys>;
}

}  // namespace relay::cuda
