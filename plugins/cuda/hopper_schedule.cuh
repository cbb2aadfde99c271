// Who does what on Hopper; schedule.cuh says what rows, tiles and units are. Here the prefix's units are
// numbered by (tile, kv head, key block): all tiles read the same keys, and blocks that begin with different
// tiles then do so at about the same time, out of L2.
//
// A tile of more than 64 rows is wide: both warpgroups of a block attend to all its keys, each for half of
// its rows. Other tiles are narrow, and one warpgroup's own. Wide units are all those of the prefix (a batch
// of more than 64 rows) or all units (a long chunk of a prompt). Some blocks of the grid share the wide units
// evenly, each of the other blocks' warpgroups is a worker of its own, and these share the narrow units
// evenly.
#pragma once

#include "hopper_ptx.cuh"
#include "tables.cuh"

namespace relay::cuda {

// As good as x / y, and sooner: exact where both are small, else for estimates.
__device__ __forceinline__ int quotient(int x, int y) {
  return static_cast<int>(__fdividef(static_cast<float>(x) + 0.5f, static_cast<float>(y)));
}

// Units shared out evenly: the first `longer` workers take one more than `each`.
struct Region {
  int first_unit;
  int workers;
  int each, longer;

  __device__ __forceinline__ int begin(int worker) const {
    return first_unit + worker * each + min(worker, longer);
  }
  __device__ __forceinline__ int owner(int unit) const {
    const int own = unit - first_unit, split = longer * (each + 1);
    const bool is_longer = own < split;
    return (is_longer ? 0 : longer) + static_cast<int>(static_cast<uint32_t>(is_longer ? own : own - split) /
                                                       static_cast<uint32_t>(is_longer ? each + 1 : each));
  }
};

struct HopperTotals {
  int group;
  int tokens;
  int prefix_tiles;        // per kv head
  int prefix_block_begin;  // the first key block that the window leaves visible to any row
  int prefix_blocks;
  int prefix_units;
  int wide_units;  // the first so many
  // Where the prefix's wide tiles are shared out alike, of each; `wide` is then the first tile. Else 0.
  int tile_units, tile_workers;
  Region wide;  // workers are blocks
  Region narrow;
};

// A tile as its workers walk over it.
struct Walk {
  int unit, end;
  bool is_context;
  int request;  // of a context tile
  int kv_head;
  int index;  // of the tile among those of its kv head
  int tiles;
  int first_unit;   // of the tile
  int blocks;       // of the tile
  int block_begin;  // key block of its first unit
};

// unit_start: counted from the launch's first unit.
struct HopperSchedule : RequestTables {
  // At the start of the dynamic shared memory.
  __device__ __forceinline__ HopperTotals& totals() const {
    return *reinterpret_cast<HopperTotals*>(dynamic_shared());
  }
  __device__ __forceinline__ int context_tiles(int request) const {
    return tiles_of(request_tokens(request));
  }

  // Narrow units are those of workers first_narrow_block() + w % so many blocks, warpgroup w / so many.
  __device__ __forceinline__ int narrow_worker(int block, int warpgroup) const {
    const int first = totals().wide.workers;
    return block - first + warpgroup * (static_cast<int>(gridDim.x) - first);
  }

  // The first tile of a walk, whose unit and end are set.
  __device__ __forceinline__ void start(Walk& walk) const {
    walk.is_context = walk.unit >= totals().prefix_units;
    walk.request = 0;
    if (!walk.is_context) {
      const int tile = walk.unit / static_cast<uint32_t>(totals().prefix_blocks);
      walk.index = arguments->by_kv_heads.divide(tile);
      walk.kv_head = tile - walk.index * arguments->params.kv_num_heads;
      walk.first_unit = tile * totals().prefix_blocks;
      describe(walk);
      return;
    }
    int high = arguments->params.batch;  // the last request whose units begin at or before this one
    while (high - walk.request > 1) {
      const int middle = (walk.request + high) / 2;
      if (unit_start()[middle] <= walk.unit)
        walk.request = middle;
      else
        high = middle;
    }
    describe(walk);
    const int tile = (walk.unit - unit_start()[walk.request]) / static_cast<uint32_t>(walk.blocks);
    walk.kv_head = tile / static_cast<uint32_t>(walk.tiles);
    walk.index = tile - walk.kv_head * walk.tiles;
    walk.first_unit = unit_start()[walk.request] + tile * walk.blocks;
  }

  // On to the next tile: walk.unit is its first.
  __device__ __forceinline__ void next(Walk& walk) const {
    walk.first_unit = walk.unit;
    if (!walk.is_context) {
      if (++walk.kv_head < arguments->params.kv_num_heads) return;
      walk.kv_head = 0;
      if (++walk.index < walk.tiles) return;
      walk.index = 0;
      walk.is_context = true;
      walk.request = -1;
    } else {
      if (++walk.index < walk.tiles) return;
      walk.index = 0;
      if (++walk.kv_head < arguments->params.kv_num_heads) return;
      walk.kv_head = 0;
    }
    do ++walk.request;
    while (walk.request + 1 < arguments->params.batch && unit_start()[walk.request + 1] <= walk.unit);
    describe(walk);
  }

  // The lengths of one request or, of up to 64, of a lane's two; not checked yet.
  struct Asked {
    int context[2], query[2];
  };
  __device__ __forceinline__ Asked ask_lengths() const {
    const RelayParams& p = arguments->params;
    Asked asked{};
    const int request = p.batch <= 64 ? first_of_lane() : threadIdx.x;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (request + i < p.batch && (i == 0 || p.batch > 32)) {
        asked.context[i] = p.context_lens[request + i];
        asked.query[i] = p.query_lens[request + i];
      }
    return asked;
  }

  // Until the work is shared out the memory has nothing to do, and where the prefix lies is known without the
  // lengths. Asked for evenly over it, so that all who begin anywhere in it find their share in L2. By one
  // thread, behind ask_lengths().
  __device__ __forceinline__ void prefetch_prefix() const {
    const KernelArguments& a = *arguments;
    const RelayParams& p = a.params;
    constexpr int kPiece = 16384;
    const int64_t tensor = int64_t{2} * p.kv_num_heads * p.prefix_length * p.head_dim;
    const int pieces = static_cast<int>(tensor / kPiece),
              wanted = static_cast<int>(a.l2_prefetch_bytes / kPiece);
#pragma unroll 1
    for (int i = blockIdx.x; i < 2 * wanted; i += gridDim.x) {
      const int piece = static_cast<int>(int64_t{i / 2} * pieces / wanted);
      prefetch_l2_bulk(
          static_cast<const char*>(i % 2 == 0 ? p.prefix_key : p.prefix_value) + int64_t{piece} * kPiece,
          kPiece);
    }
  }

  // Called by all threads of the block, with ask_lengths(); ends with a barrier.
  __device__ __forceinline__ void build(const Asked& asked) const {
    const KernelArguments& a = *arguments;
    const RelayParams& p = a.params;
    const int warp = threadIdx.x / 32;
    // A lane for each request or two: one warp shares out the work while another fills the tables.
    const bool few = p.batch <= 64 && !is_cut(a, p);
    Sums sums{};
    if (few) {
      if (warp < 2) {
        Lengths n[2];
        int units[2];
        sums.lowest = INT32_MAX;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          n[i] = check_lengths(p, asked.context[i], asked.query[i]);
          units[i] = context_units(n[i].context, n[i].query);
          if (n[i].query > 0) sums.lowest = min(sums.lowest, n[i].context);
        }
        if (warp == 0) {
          sums.tokens = __reduce_add_sync(kAllLanes, n[0].query + n[1].query);
          sums.units = __reduce_add_sync(kAllLanes, units[0] + units[1]);
        } else {
          fill_tables(a, p, n, units, sums.lowest);
        }
      }
    } else {
      for (int b = threadIdx.x; b < p.batch; b += kHopperThreads) {
        const Lengths n = b < kHopperThreads && p.batch > 64
                              ? check_lengths(p, asked.context[0], asked.query[0])
                              : read_lengths(p, b);
        context_len()[b] = n.context;
        token_start()[b] = n.query;  // for now
        first_token()[b] = 0;
        unit_start()[b] = context_units(n.context, n.query);  // for now
        prefetch_angles(p, n);
      }
      __syncthreads();
      if (warp == 0) sums = count(a, p);
    }
    if (warp == 0) {
      const int first_unit = share_out(a, p, sums);
      if (!few) fill_tables(p, sums, first_unit);
    }
    __syncthreads();
  }

 private:
  // Over the requests of all lanes. lowest: of this lane's, the position of a first new token.
  struct Sums {
    int tokens, units, lowest;
    int begin, end;                 // requests of this lane
    int token_before, unit_before;  // of those of the lanes before
  };

  // Of up to 64 requests.
  __device__ __forceinline__ int first_of_lane() const {
    const int lane = threadIdx.x % 32;
    return arguments->params.batch <= 32 ? lane : 2 * lane;
  }
  // Whether the call may take more launches than this one.
  __device__ __forceinline__ static bool is_cut(const KernelArguments& a, const RelayParams& p) {
    return a.token_end - a.token_begin < p.batch * p.sequence;
  }
  __device__ __forceinline__ int tiles_of(int tokens) const {
    return (tokens * arguments->group + arguments->context_rows - 1) >> arguments->context_rows_log2;
  }
  __device__ __forceinline__ void describe(Walk& walk) const {
    if (walk.is_context) {
      walk.tiles = context_tiles(walk.request);
      walk.blocks = context_blocks(walk.request);
      walk.block_begin = context_block_begin(walk.request);
    } else {
      walk.tiles = totals().prefix_tiles;
      walk.blocks = totals().prefix_blocks;
      walk.block_begin = totals().prefix_block_begin;
    }
  }

  // Of a request's context, given its first token's position in it.
  __device__ __forceinline__ int context_units(int position, int tokens) const {
    if (tokens == 0) return 0;
    return arguments->params.kv_num_heads * tiles_of(tokens) *
           (blocks_of(position + tokens) - first_block(position));
  }

  // As the queries: before the flood of keys and values.
  __device__ __forceinline__ void prefetch_angles(const RelayParams& p, const Lengths& n) const {
    if (p.rotary_dim == 0 || n.query == 0) return;
    const int64_t row = int64_t{p.prefix_length + n.context} * p.rotary_dim;
    prefetch_l2(static_cast<const char*>(p.cos_cache) + row);
    prefetch_l2(static_cast<const char*>(p.sin_cache) + row);
  }

  // One warp, each lane consecutive requests.
  __device__ __forceinline__ Sums count(const KernelArguments& a, const RelayParams& p) const {
    const int lane = threadIdx.x;
    const int per_lane = (p.batch + 31) / 32;
    Sums s{0, 0, INT32_MAX, min(lane * per_lane, p.batch), 0, 0, 0};
    s.end = min(s.begin + per_lane, p.batch);
    if (is_cut(a, p)) clip(a, p, s.begin, s.end);
#pragma unroll 2
    for (int b = s.begin; b < s.end; ++b) {
      const int tokens = token_start()[b];
      s.token_before += tokens;
      s.unit_before += unit_start()[b];
      if (p.local_window_size > 0 && tokens > 0)
        s.lowest = min(s.lowest, context_len()[b] + first_token()[b]);
    }
    scan(s.token_before, s.unit_before, &s.tokens, &s.units);
    return s;
  }
  __device__ __forceinline__ void fill_tables(const RelayParams& p, const Sums& s, int first_unit) const {
    int token = s.token_before, unit = first_unit + s.unit_before;
#pragma unroll 1
    for (int b = s.begin; b < s.end; ++b) {
      const int tokens_of_b = token_start()[b], units_of_b = unit_start()[b];
      token_start()[b] = token;
      unit_start()[b] = unit;
      for (int i = 0; i < tokens_of_b; ++i) request_of_token()[token + i] = static_cast<uint16_t>(b);
      token += tokens_of_b;
      unit += units_of_b;
    }
  }

  // The tables of up to 64 requests, by one warp: a lane's have n and so many units of their contexts.
  __device__ __forceinline__ void fill_tables(const KernelArguments& a, const RelayParams& p,
                                              const Lengths (&n)[2], const int (&units)[2],
                                              int lowest) const {
    int token = n[0].query + n[1].query, unit = units[0] + units[1], all_units;
    HopperTotals t{};
    scan(token, unit, &t.tokens, &all_units);
    count_prefix(a, p, lowest, t);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int request = first_of_lane() + i;
      if (request >= p.batch || (i > 0 && p.batch <= 32)) return;
      prefetch_angles(p, n[i]);
      context_len()[request] = n[i].context;
      first_token()[request] = 0;
      token_start()[request] = token;
      unit_start()[request] = t.prefix_units + unit;
      for (int k = 0; k < n[i].query; ++k) request_of_token()[token + k] = static_cast<uint16_t>(request);
      token += n[i].query;
      unit += units[i];
    }
  }

  // What of the totals is the prefix's, given the tokens, by one warp.
  __device__ __forceinline__ void count_prefix(const KernelArguments& a, const RelayParams& p, int lowest,
                                               HopperTotals& t) const {
    t.prefix_tiles = (t.tokens * a.group + a.prefix_rows - 1) >> a.prefix_rows_log2;
    if (p.local_window_size > 0) {
      lowest = __reduce_min_sync(kAllLanes, lowest);
      if (t.tokens > 0)
        t.prefix_block_begin =
            max(0, p.prefix_length + lowest - p.local_window_size + 1) >> a.prefix_keys_log2;
    }
    t.prefix_blocks = max(
        0, ((p.prefix_length + (1 << a.prefix_keys_log2) - 1) >> a.prefix_keys_log2) - t.prefix_block_begin);
    t.prefix_units = p.kv_num_heads * t.prefix_tiles * t.prefix_blocks;
  }

  // One warp: what is to be done, and by how many workers. Returns the prefix's units, after which the
  // contexts' are numbered.
  __device__ __forceinline__ int share_out(const KernelArguments& a, const RelayParams& p,
                                           const Sums& s) const {
    const int lane = threadIdx.x;
    HopperTotals t{};
    t.group = a.group;
    t.tokens = s.tokens;
    count_prefix(a, p, s.lowest, t);
    const int all = t.prefix_units + s.units;
    t.wide_units = a.context_rows > 64 ? all : (a.prefix_rows > 64 ? t.prefix_units : 0);
    const int narrow_units = all - t.wide_units, grid = gridDim.x;
    t.wide.workers = t.wide_units > 0 ? grid : 0;
    if (t.wide_units > 0 && narrow_units > 0) t.wide.workers = wide_blocks(t, narrow_units, lane);
    t.wide.workers = min(t.wide.workers, t.wide_units);
    t.narrow.workers = min(2 * (grid - t.wide.workers), narrow_units);
    t.narrow.first_unit = t.wide_units;
    // All of a prefix's tiles are shared out alike, where they can be, so that their workers read the same
    // keys at the same time: a prefix larger than L2 is else read from memory again and again.
    if (t.wide.workers > 0 && t.wide_units == t.prefix_units) {
      const int of_tile = quotient(t.wide.workers, t.prefix_tiles);
      if (of_tile * t.prefix_tiles == t.wide.workers)
        t.tile_units = p.kv_num_heads * t.prefix_blocks, t.tile_workers = of_tile;
    }
    // Lane 1 divides for the narrow ones while lane 0 does for the wide.
    const bool alike = t.tile_workers > 0;
    const int units = lane > 0 ? narrow_units : (alike ? t.tile_units : t.wide_units);
    const int workers = max(lane > 0 ? t.narrow.workers : (alike ? t.tile_workers : t.wide.workers), 1);
    const int each = units / static_cast<uint32_t>(workers), longer = units - each * workers;
    t.wide.each = each, t.wide.longer = longer;
    t.narrow.each = __shfl_sync(kAllLanes, each, 1), t.narrow.longer = __shfl_sync(kAllLanes, longer, 1);
    if (lane == 0) {
      totals() = t;
      token_start()[p.batch] = t.tokens;
      unit_start()[p.batch] = all;
    }
    return t.prefix_units;
  }

  // Leaves of each request what is this launch's, where a call takes several.
  __device__ __forceinline__ void clip(const KernelArguments& a, const RelayParams& p, int begin,
                                       int end) const {
    int mine = 0, all;
#pragma unroll 1
    for (int b = begin; b < end; ++b) mine += token_start()[b];
    int start = scan(mine, &all);
#pragma unroll 1
    for (int b = begin; b < end; ++b) {
      const int stop = start + token_start()[b];
      const int first = min(max(start, a.token_begin), a.token_end);
      const int tokens = min(max(stop, a.token_begin), a.token_end) - first;
      first_token()[b] = first - start;
      token_start()[b] = tokens;
      unit_start()[b] = context_units(context_len()[b] + first - start, tokens);
      start = stop;
    }
  }

  // So many blocks of the grid take wide units that both kinds are done at about the same time. Each lane
  // tries one number near the proportional one, a multiple of the tiles, so that all tiles read the same keys
  // at the same time. Whole units are considered, and the tiles that a block begins: queries to be fetched
  // and results to be written, which take it as long as 2.25 units.
  __device__ __forceinline__ int wide_blocks(const HopperTotals& t, int narrow_units, int lane) const {
    const int grid = gridDim.x;
    const int wide_cost = arguments->prefix_cost << (arguments->prefix_keys_log2 - 6);
    const int narrow_cost = arguments->context_cost;
    const float wide = static_cast<float>(t.wide_units) * wide_cost;
    const float narrow = static_cast<float>(narrow_units) * narrow_cost;
    const int step = t.prefix_tiles < grid / 4 ? t.prefix_tiles : 1;
    const int near = __float2int_rn(grid * (wide / (wide + narrow)) / step);
    const int blocks = min(max((near + lane - 16) * step, 1), grid - 1), workers = 2 * (grid - blocks);
    const int each = quotient(t.wide_units + blocks - 1, blocks);
    const bool even = each * blocks == t.wide_units;
    const int whole = quotient(each, t.prefix_blocks), part = each - whole * t.prefix_blocks;
    int begun = part == 0 ? whole : whole + 2;
    if (even && whole == 0 && quotient(t.prefix_blocks, each) * each == t.prefix_blocks) begun = 1;
    if (part == 0 && !even) ++begun;
    const int wide_time = each * wide_cost + begun * arguments->prefix_cost * 9 / 4;
    const int narrow_time = quotient(narrow_units + workers - 1, workers) * 2 * narrow_cost;
    const uint32_t time = 16 * max(wide_time, narrow_time) + min(wide_time, narrow_time);
    const uint32_t least = __reduce_min_sync(kAllLanes, time);
    return __shfl_sync(kAllLanes, blocks, __ffs(__ballot_sync(kAllLanes, time == least)) - 1);
  }
  // Exclusive prefix sums over the warp, of two numbers at once.
  __device__ __forceinline__ static void scan(int& x, int& y, int* all_x, int* all_y) {
    int inclusive_x = x, inclusive_y = y;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below_x = __shfl_up_sync(kAllLanes, inclusive_x, distance);
      const int below_y = __shfl_up_sync(kAllLanes, inclusive_y, distance);
      if (static_cast<int>(threadIdx.x % 32) >= distance) inclusive_x += below_x, inclusive_y += below_y;
    }
    *all_x = __shfl_sync(kAllLanes, inclusive_x, 31);
    *all_y = __shfl_sync(kAllLanes, inclusive_y, 31);
    x = inclusive_x - x, y = inclusive_y - y;
  }
  // Exclusive prefix sum over the warp.
  __device__ __forceinline__ static int scan(int value, int* total) {
    int inclusive = value;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(kAllLanes, inclusive, distance);
      if (threadIdx.x % 32 >= distance) inclusive += below;
    }
    *total = __shfl_sync(kAllLanes, inclusive, 31);
    return inclusive - value;
  }
};

}  // namespace relay::cuda
