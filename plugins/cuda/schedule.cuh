// Who does what. Every block of the grid derives the same schedule from the lengths, so nothing has to be
// handed out.
//
// Rows. The valid tokens of the launch are counted over requests in order; token t and query head h*G+g (G =
// group size) make packed row t*G+g of kv head h. A prefix tile is kPrefixRows consecutive packed rows of one
// kv head, from as many requests as they reach over; a context tile is kContextRows consecutive packed rows
// of one request and kv head.
//
// Units. A tile's work is its blocks of 64 keys. Units are numbered: all prefix tiles by (kv head, tile, key
// block), then all context tiles by (request, kv head, tile, key block). Each block of the grid takes a
// contiguous range of equal cost, which may begin and end inside tiles; the partial results of a tile are
// merged by log-sum-exp in the order of the blocks that made them.
#pragma once

#include "tables.cuh"

namespace relay::cuda {

struct Tile {
  bool is_context;
  int kv_head;
  int request;     // of a context tile
  int packed_row;  // first row
  int rows;        // valid rows
  int block;       // key block of the unit asked for
  int block_end;
  int first_unit;  // of the tile
};

// Kept in shared memory rather than in every thread's registers, which the attention needs.
struct ScheduleTotals {
  int group;
  int tokens;
  int prefix_tiles;        // per kv head
  int prefix_block_begin;  // the first key block that the window leaves visible to any row
  int prefix_blocks;
  int prefix_units;
  int units;
  int workers;  // blocks of the grid that have work: 0..workers-1
  int cost_quotient, cost_remainder;
  int unused[6];
};

// unit_start: counted from prefix_units.
template <int kPrefixRows, int kContextRows>
struct Schedule : RequestTables {
  // At the start of the dynamic shared memory.
  __device__ __forceinline__ ScheduleTotals& totals() const {
    return *reinterpret_cast<ScheduleTotals*>(dynamic_shared());
  }
  __device__ __forceinline__ int context_tiles(int request) const {
    return (request_tokens(request) * totals().group + kContextRows - 1) / kContextRows;
  }

  // First unit of worker `worker`; begin(workers) == units.
  __device__ __forceinline__ int begin(int worker) const {
    const int cost = worker * totals().cost_quotient + min(worker, totals().cost_remainder);
    const int prefix_cost = totals().prefix_units * arguments->prefix_cost;
    return cost < prefix_cost ? cost / arguments->prefix_cost
                              : totals().prefix_units + (cost - prefix_cost) / arguments->context_cost;
  }
  // The worker in whose range a unit lies: the last one whose first unit is not beyond it.
  __device__ __forceinline__ int owner(int unit) const {
    const int prefix_cost = totals().prefix_units * arguments->prefix_cost;
    const int cost = unit < totals().prefix_units
                         ? (unit + 1) * arguments->prefix_cost - 1
                         : prefix_cost + (unit + 1 - totals().prefix_units) * arguments->context_cost - 1;
    const int longer = totals().cost_remainder * (totals().cost_quotient + 1);
    return cost < longer ? cost / (totals().cost_quotient + 1)
                         : totals().cost_remainder + (cost - longer) / totals().cost_quotient;
  }

  // The tile that a unit belongs to; `request`: any request not after the tile's (the search goes on from
  // there).
  __device__ __forceinline__ Tile find(int unit, int request) const {
    Tile tile;
    tile.is_context = unit >= totals().prefix_units;
    if (!tile.is_context) {
      const int tile_number = unit / totals().prefix_blocks;
      const int index = tile_number % totals().prefix_tiles;
      tile.kv_head = tile_number / totals().prefix_tiles;
      tile.request = 0;
      tile.packed_row = index * kPrefixRows;
      tile.rows = min(kPrefixRows, totals().tokens * totals().group - tile.packed_row);
      tile.first_unit = tile_number * totals().prefix_blocks;
      tile.block = totals().prefix_block_begin + unit - tile.first_unit;
      tile.block_end = totals().prefix_block_begin + totals().prefix_blocks;
    } else {
      const int rest = unit - totals().prefix_units;
      while (unit_start()[request + 1] <= rest) ++request;
      const int blocks = context_blocks(request), tiles = context_tiles(request);
      const int tile_number = (rest - unit_start()[request]) / blocks;
      const int index = tile_number % tiles;
      tile.kv_head = tile_number / tiles;
      tile.request = request;
      tile.packed_row = token_start()[request] * totals().group + index * kContextRows;
      tile.rows = min(kContextRows, request_tokens(request) * totals().group - index * kContextRows);
      tile.first_unit = totals().prefix_units + unit_start()[request] + tile_number * blocks;
      tile.block = context_block_begin(request) + unit - tile.first_unit;
      tile.block_end = context_block_begin(request) + blocks;
    }
    return tile;
  }
  // The last request whose context units begin at or before `unit`.
  __device__ __forceinline__ int find_request(int unit) const {
    int low = 0, high = arguments->params.batch;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (unit_start()[middle] <= unit - totals().prefix_units)
        low = middle;
      else
        high = middle;
    }
    return low;
  }

  // Called by all threads; scratch: 2 * kWarps ints. Ends with a barrier.
  __device__ __forceinline__ void build(int* scratch) const {
    const KernelArguments& a = *arguments;
    const RelayParams& p = a.params;
    const int group = p.num_heads / p.kv_num_heads;
    const int per_thread = (p.batch + kThreads - 1) / kThreads;
    const int begin_request = min(static_cast<int>(threadIdx.x) * per_thread, p.batch);
    const int end_request = min(begin_request + per_thread, p.batch);

    int mine = 0, total;
    for (int b = begin_request; b < end_request; ++b) {
      const Lengths n = read_lengths(p, b);
      token_start()[b] = n.query;
      context_len()[b] = n.context;
      mine += n.query;
    }
    int start = scan(mine, scratch, &total);

    int my_units = 0, lowest = INT32_MAX;
    for (int b = begin_request; b < end_request; ++b) {
      const int end = start + token_start()[b];
      const int clipped_begin = min(max(start, a.token_begin), a.token_end);
      const int clipped_end = min(max(end, a.token_begin), a.token_end);
      const int count = clipped_end - clipped_begin;
      token_start()[b] = clipped_begin - a.token_begin;
      first_token()[b] = clipped_begin - start;
      if (count > 0) {
        lowest = min(lowest, context_len()[b] + first_token()[b]);
        const int position = context_len()[b] + first_token()[b];
        const int blocks = blocks_of(position + count) - first_block(position);
        my_units += p.kv_num_heads * ((count * group + kContextRows - 1) / kContextRows) * blocks;
      }
      for (int t = 0; t < count; ++t)
        request_of_token()[clipped_begin - a.token_begin + t] = static_cast<uint16_t>(b);
      unit_start()[b] = my_units;  // for now: counted inside this thread's requests, its own included
      start = end;
    }
    const int tokens = min(max(total, a.token_begin), a.token_end) - a.token_begin;
    int context_units;
    int units_before = scan(my_units, scratch, &context_units);
    for (int b = begin_request; b < end_request; ++b) {
      const int through = units_before + unit_start()[b];
      unit_start()[b] = b == begin_request ? units_before : mine;
      mine = through;
    }
    if (threadIdx.x == 0) {
      token_start()[p.batch] = tokens;
      unit_start()[p.batch] = context_units;
    }
    for (int distance = 16; distance > 0; distance /= 2)
      lowest = min(lowest, __shfl_xor_sync(kAllLanes, lowest, distance));
    if (threadIdx.x % 32 == 0) scratch[kWarps + threadIdx.x / 32] = lowest;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) lowest = min(lowest, scratch[kWarps + w]);

    ScheduleTotals t{};
    t.group = group;
    t.tokens = tokens;
    t.prefix_tiles = (tokens * group + kPrefixRows - 1) / kPrefixRows;
    if (p.local_window_size > 0 && tokens > 0)
      t.prefix_block_begin = max(0, p.prefix_length + lowest - p.local_window_size + 1) / kBlockKeys;
    t.prefix_blocks = max(0, (p.prefix_length + kBlockKeys - 1) / kBlockKeys - t.prefix_block_begin);
    t.prefix_units = p.kv_num_heads * t.prefix_tiles * t.prefix_blocks;
    t.units = t.prefix_units + context_units;
    const int cost = t.prefix_units * a.prefix_cost + context_units * a.context_cost;
    // At least one unit each, so that no worker inside a tile is without a partial.
    t.workers = min(static_cast<int>(gridDim.x), cost / max(a.prefix_cost, a.context_cost));
    if (t.units > 0) t.workers = max(t.workers, 1);
    if (t.workers > 0) {
      t.cost_quotient = cost / t.workers;
      t.cost_remainder = cost - t.cost_quotient * t.workers;
    }
    if (threadIdx.x == 0) totals() = t;
    __syncthreads();
  }

 private:
  // Exclusive prefix sum over the threads of the block.
  __device__ __forceinline__ static int scan(int value, int* scratch, int* total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int inclusive = value;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(kAllLanes, inclusive, distance);
      if (lane >= distance) inclusive += below;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = inclusive;
    __syncthreads();
    int before = 0, sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += scratch[w];
      sum += scratch[w];
    }
    *total = sum;
    return before + inclusive - value;
  }
};

}  // namespace relay::cuda
