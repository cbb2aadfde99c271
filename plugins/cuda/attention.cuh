// Relay attention in one launch: prefix and context tiles from one work list, tensor-core products, the new
// tokens rotated and appended on the way, and a merge by log-sum-exp behind one barrier of the whole grid.
//
// Schedule: every block derives the work list from the lengths (schedule.cuh).
// Copy: keys and values stream through a ring of shared-memory buffers, across tile borders without draining.
// Attend: online softmax over the blocks of one tile; the normalised result and its lse are a partial.
// Merge: after the barrier, each row's partials are summed in the order of the workers that made them, so two
// runs agree bit for bit; the rows are dealt out over the whole grid.
//
// The barrier needs all blocks resident at once: launch.cu launches cooperatively.
#pragma once

#include "merge.cuh"
#include "rotary.cuh"
#include "schedule.cuh"

namespace relay::cuda {

// A tile row is head_dim elements in 16-byte chunks. Within each group of 8 chunks (4 for head_dim 96) they
// are permuted by the row, so that eight rows of one column meet all 32 banks.
template <int kHeadDim>
struct Swizzle {
  static constexpr int kGroup = kHeadDim % 64 == 0 ? 8 : 4;
  static constexpr int kVariants = kGroup / 2;  // places of a pair of chunks in its group

  __device__ __forceinline__ static int of_row(int row) { return kGroup == 8 ? row & 7 : (row >> 1) & 3; }

  // Byte offset in the tile. Rows 16 apart are permuted alike.
  __device__ __forceinline__ static int offset(int row, int chunk) {
    return (row * (kHeadDim / 8) + (chunk ^ of_row(row))) * 16;
  }
};

// Which block of keys or values is copied next. Kept in shared memory, twice: while all threads read one,
// thread 0 writes the next into the other, and a barrier lies between two uses of the same.
struct Cursor {
  // Where the keys and values of the tile lie. Rows below `cached` are row cache_row + i of the prefix or of
  // present (which holds past by then; this launch writes beyond it only), those up to `limit` chunk
  // fresh_chunk + (i - cached) * (chunks of a token) of the new tokens, the rest are zero.
  int64_t cache_row;
  int64_t fresh_chunk;
  int cached;
  int limit;
  int is_context;
  int request;
  int block, block_end;
  int unit, end;
  int values;  // 0: the keys of this block, 1: its values
  int unused[3];
};

template <class T, int kHeadDim, int kPrefixRows, int kContextRows>
class Attention {
 public:
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kBufferBytes = kBlockKeys * kRowBytes;
  static constexpr int kRows = kPrefixRows > kContextRows ? kPrefixRows : kContextRows;
  // Also the scratch of the sum over the four warps of a 16-row tile: 4 warps x 8 rows x D/2 floats.
  static constexpr int kQueryBytes = kRows * kRowBytes > 64 * kHeadDim ? kRows * kRowBytes : 64 * kHeadDim;

  // Shared memory; plan.cpp's shared_bytes adds up the same.
  static constexpr int kCursorOffset = sizeof(ScheduleTotals);
  static constexpr int kRowsOffset = kCursorOffset + 2 * sizeof(Cursor);
  static constexpr int kScratchOffset = kRowsOffset + 2 * kRows * 4;
  static constexpr int kQueryOffset = kScratchOffset + 32 * 4;
  static constexpr int kRingOffset = kQueryOffset + kQueryBytes;
  static constexpr int kFourRowsAhead = kHeadDim > 128 ? 2 : 4;  // for merge()

  __device__ __forceinline__ explicit Attention(const KernelArguments& arguments)
      : a(arguments),
        p(arguments.params),
        rotary{p.cos_cache, p.sin_cache, p.rotary_dim, p.rotary_interleaved != 0},
        schedule{{&arguments, kRingOffset + arguments.depth * kBufferBytes}} {}

  __device__ __forceinline__ void run() {
    prefetch_prefix();
    const GridBarrier barrier(a.barrier, 0);
    schedule.build(scratch());
    const int worker = blockIdx.x;
    int unit = worker < schedule.totals().workers ? schedule.begin(worker) : schedule.totals().units;
    const int end = worker < schedule.totals().workers ? schedule.begin(worker + 1) : schedule.totals().units;

    Tile tile{};
    if (unit < end)
      tile = schedule.find(unit, unit < schedule.totals().prefix_units ? 0 : schedule.find_request(unit));
    if (threadIdx.x == 0) cursor(0) = start_of(tile, unit, end);
    copy_turn = use_slot = 0;
    for (int i = 0; i < a.depth - 1; ++i) {
      __syncthreads();
      copy_next(i);
    }
    const int tokens = schedule.totals().tokens;
    // Its loads travel together with the first blocks of keys.
    if (!a.appended_before) append_tokens<T, kHeadDim>(schedule, rotary, tokens, threadIdx.x, kThreads);
    if (a.token_begin == 0) fill_idle_rows<T, kHeadDim>(p, tokens, threadIdx.x, kThreads);

    while (unit < end) {
      const int blocks = min(end - unit, tile.block_end - tile.block);
      const bool is_head = unit == tile.first_unit;
      if constexpr (kPrefixRows == kContextRows) {
        attend<kPrefixRows>(tile, blocks, is_head);
      } else if (tile.is_context) {
        attend<kContextRows>(tile, blocks, is_head);
      } else {
        attend<kPrefixRows>(tile, blocks, is_head);
      }
      unit += blocks;
      if (unit < end) tile = schedule.find(unit, tile.request);
    }
    copy_async_wait<0>();
    synchronize();
    if (threadIdx.x == 0) barrier.arrive();
    float* sums = reinterpret_cast<float*>(query_tile());
    float* weights = reinterpret_cast<float*>(scratch());
    merge<T, kHeadDim, kWarps>(a, schedule, *this, barrier, sums, weights);
  }

 private:
  const KernelArguments& a;
  const RelayParams& p;
  const Rotary rotary;
  Schedule<kPrefixRows, kContextRows> schedule;
  int copy_turn;  // which cursor is current: it runs ahead of the attention by depth - 1 buffers
  int use_slot;   // the buffer that the attention reads next

  __device__ __forceinline__ static Cursor& cursor(int turn) {
    return reinterpret_cast<Cursor*>(dynamic_shared() + kCursorOffset)[turn];
  }
  // The keys [low, high] of the tile's own numbering that each row of the tile sees.
  __device__ __forceinline__ static int* row_low() {
    return reinterpret_cast<int*>(dynamic_shared() + kRowsOffset);
  }
  __device__ __forceinline__ static int* row_high() { return row_low() + kRows; }
  __device__ __forceinline__ static int* scratch() {
    return reinterpret_cast<int*>(dynamic_shared() + kScratchOffset);
  }
  __device__ __forceinline__ static char* query_tile() { return dynamic_shared() + kQueryOffset; }
  __device__ __forceinline__ static SharedAddress ring() {
    return shared_address(dynamic_shared() + kRingOffset);
  }

  __device__ __forceinline__ void prefetch_prefix() const {
    const int64_t step = int64_t{gridDim.x} * kThreads * 128;
    for (int64_t line = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 128; line < a.l2_prefetch_bytes;
         line += step) {
      prefetch_l2(static_cast<const char*>(p.prefix_key) + line);
      prefetch_l2(static_cast<const char*>(p.prefix_value) + line);
    }
  }

  // ---- copy ----
  __device__ __forceinline__ Cursor start_of(const Tile& tile, int unit, int end) const {
    Cursor c{};
    c.is_context = tile.is_context;
    c.request = tile.request;
    c.block = tile.block;
    c.block_end = tile.block_end;
    c.unit = unit;
    c.end = end;
    if (unit < end && !tile.is_context) {
      c.cache_row = int64_t{tile.kv_head} * p.prefix_length;
      c.cached = c.limit = p.prefix_length;
    } else if (unit < end) {
      c.cache_row = (int64_t{tile.request} * p.kv_num_heads + tile.kv_head) * p.max_context;
      c.fresh_chunk = (int64_t{tile.request} * p.sequence * p.kv_num_heads + tile.kv_head) * kChunks;
      c.limit = schedule.context_keys(tile.request);
      c.cached = a.appended_before ? c.limit : schedule.context_len()[tile.request];
    }
    return c;
  }

  // Starts the copy of the next block of keys or values, and commits it as one group; an empty group when
  // none is left.
  __device__ __forceinline__ void copy_next(int slot) {
    const Cursor& c = cursor(copy_turn);
    if (c.unit < c.end) {
      const void* prefix = c.values ? p.prefix_value : p.prefix_key;
      const void* own = c.values ? p.present_value : p.present_key;
      const int first = c.block * kBlockKeys;
      const uint4* cache = static_cast<const uint4*>(c.is_context ? own : prefix) +
                           (c.cache_row + first) * kChunks + threadIdx.x;
      const SharedAddress buffer = ring() + slot * kBufferBytes;
      if (first + kBlockKeys <= c.cached) {
#pragma unroll
        for (int i = 0; i < kBlockKeys * kChunks / kThreads; ++i) {
          const int index = i * kThreads + threadIdx.x;
          copy_async_16(buffer + Swizzle<kHeadDim>::offset(index / kChunks, index % kChunks),
                        cache + i * kThreads, true);
        }
      } else {
        const int cached = c.cached - first, limit = c.limit - first;
        const uint4* fresh = static_cast<const uint4*>(c.values ? p.value : p.key) + c.fresh_chunk;
#pragma unroll 1
        for (int index = threadIdx.x; index < kBlockKeys * kChunks; index += kThreads, cache += kThreads) {
          const int row = index / kChunks, chunk = index % kChunks;
          const uint4* from = cache;
          if (row >= cached)
            from = row < limit ? fresh + (int64_t{row - cached} * p.kv_num_heads * kChunks + chunk)
                               : static_cast<const uint4*>(p.query);  // a valid address that is not read
          copy_async_16(buffer + Swizzle<kHeadDim>::offset(row, chunk), from, row < limit);
        }
      }
    }
    copy_async_commit();
    if (threadIdx.x == 0) {
      Cursor next = c;
      if (next.values && next.unit < next.end) {
        ++next.unit;
        if (++next.block == next.block_end && next.unit < next.end)
          next = start_of(schedule.find(next.unit, next.request), next.unit, next.end);
      }
      next.values = !c.values;
      cursor(copy_turn ^ 1) = next;
    }
    copy_turn ^= 1;
  }

  // Waits for the oldest buffer, refills the one that all threads have finished with, and returns the former.
  __device__ __forceinline__ SharedAddress next_buffer() {
    switch (a.depth) {
      case 2:
        copy_async_wait<0>();
        break;
      case 3:
        copy_async_wait<1>();
        break;
      case 4:
        copy_async_wait<2>();
        break;
      case 5:
        copy_async_wait<3>();
        break;
      default:
        copy_async_wait<4>();
        break;
    }
    __syncthreads();
    copy_next(use_slot == 0 ? a.depth - 1 : use_slot - 1);
    const SharedAddress buffer = ring() + use_slot * kBufferBytes;
    use_slot = use_slot + 1 == a.depth ? 0 : use_slot + 1;
    return buffer;
  }

  // ---- the new tokens ----
  // Rotates the keys of a buffer that came from `key`, as copied. Between two barriers. While decoding these
  // are few; where they are many (kContextRows = 64) they were rotated and appended before this launch.
  __device__ __forceinline__ void rotate_fresh_keys(SharedAddress buffer, int first, const Tile& tile) const {
    const int begin = max(schedule.context_len()[tile.request] - first, 0);
    const int end = min(schedule.context_keys(tile.request) - first, kBlockKeys);
    const int chunks = rotary.dim / 8;
    for (int i = threadIdx.x; i < (end - begin) * chunks; i += kThreads) {
      const int row = begin + i / chunks, chunk = i % chunks;
      RotaryChunk x;
      rotary.read(x, chunk, p.prefix_length + first + row,
                  [&](int c) { return load_shared_16(buffer + Swizzle<kHeadDim>::offset(row, c)); });
      rotary.write<T>(x, chunk, [&](int c, const uint4& rotated) {
        store_shared_16(buffer + Swizzle<kHeadDim>::offset(row, c), rotated);
      });
    }
  }

  // The tile's rotated queries into shared memory, and the keys that each row sees.
  template <int kTileRows>
  __device__ __forceinline__ void load_queries(const Tile& tile) const {
    constexpr int kItems = (kTileRows * kChunks + kThreads - 1) / kThreads;       // of each thread
    constexpr int kBatch = kItems % 4 == 0 ? 4 : (kItems % 3 == 0 ? 3 : kItems);  // read together
    static_assert(kItems % kBatch == 0);
    const SharedAddress target = shared_address(query_tile());
#pragma unroll 1
    for (int base = 0; base < kTileRows * kChunks; base += kBatch * kThreads) {
      RotaryChunk x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int index = base + i * kThreads + threadIdx.x;
        const int row = index / kChunks, chunk = index % kChunks;
        if (row >= tile.rows) {
          if (chunk == 0 && row < kTileRows) {
            row_low()[row] = 0;  // its result is never stored: nothing to mask
            row_high()[row] = INT32_MAX;
          }
          continue;
        }
        const int packed = tile.packed_row + row;
        const int token = packed / schedule.totals().group;
        const int head = tile.kv_head * schedule.totals().group + packed - token * schedule.totals().group;
        const int request = schedule.request_of_token()[token];
        const int s = schedule.first_token()[request] + token - schedule.token_start()[request];
        const int position = schedule.context_len()[request] + s;  // counted from the end of the prefix
        const uint4* query = static_cast<const uint4*>(p.query) +
                             ((int64_t{request} * p.sequence + s) * p.num_heads + head) * kChunks;
        rotary.read(x[i], chunk, p.prefix_length + position, [&](int c) { return query[c]; });
        if (chunk == 0) {
          const int low = position - p.local_window_size + 1 + (tile.is_context ? 0 : p.prefix_length);
          row_low()[row] = p.local_window_size > 0 ? low : 0;
          row_high()[row] = tile.is_context ? position : p.prefix_length - 1;
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int index = base + i * kThreads + threadIdx.x;
        const int row = index / kChunks, chunk = index % kChunks;
        if (row >= kTileRows)
          continue;
        else if (row >= tile.rows)
          store_shared_16(target + Swizzle<kHeadDim>::offset(row, chunk), make_uint4(0, 0, 0, 0));
        else
          rotary.write<T>(x[i], chunk, [&](int c, const uint4& rotated) {
            store_shared_16(target + Swizzle<kHeadDim>::offset(row, c), rotated);
          });
      }
    }
  }

  // ---- attend ----
  // `blocks` key blocks of one tile, from tile.block on. Of kTileRows rows, four warps take a quarter each
  // and all keys (64 and 128 rows), or all rows and a quarter of each block's keys (16 rows).
  template <int kTileRows>
  __device__ __forceinline__ void attend(const Tile& tile, int blocks, bool is_head) {
    constexpr int kKeyWarps = kTileRows == 16 ? kWarps : 1;
    constexpr int kKeys = kBlockKeys / kKeyWarps;
    constexpr int kBands =
        kTileRows < 128 ? 1 : kTileRows / 64;  // of 16 rows, of each warp: they share what it reads
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row0 = kKeyWarps == 1 ? warp * 16 * kBands : 0;
    const int key0 = kKeyWarps == 1 ? 0 : warp * kKeys;

    // No barrier needed in front: every thread has passed one since it last read the queries of the tile
    // before.
    load_queries<kTileRows>(tile);
    __syncthreads();
    // Keys that all of this thread's rows see; what lies outside is looked at row by row.
    int all_low = 0, all_high = INT32_MAX;
#pragma unroll
    for (int i = 0; i < 2 * kBands; ++i) {
      all_low = max(all_low, row_low()[row0 + i * 8 + lane / 4]);
      all_high = min(all_high, row_high()[row0 + i * 8 + lane / 4]);
    }

    // Where this lane finds its row of the matrices that it loads: pair 2k, 2k+1 of a row's chunks lies at
    // offset[k % kVariants] + k / kVariants groups, and all else is a constant. One for operands whose
    // lanes 16..31 hold the second chunk (queries, values), one for those whose lanes 8..15 and 24..31 do
    // (keys).
    using Chunks = Swizzle<kHeadDim>;
    constexpr int kVariants = Chunks::kVariants;
    const auto group_of = [](int pair) { return pair / kVariants * Chunks::kGroup * 16; };
    int by_row[kVariants], by_key[kVariants];
#pragma unroll
    for (int i = 0; i < kVariants; ++i) {
      by_row[i] = Chunks::offset(lane % 16, i * 2 + lane / 16);
      by_key[i] = Chunks::offset(lane % 8 + lane / 16 * 8, i * 2 + lane / 8 % 2);
    }

    const SharedAddress queries = shared_address(query_tile()) + row0 * kRowBytes;
    const bool capped = p.softcap > 0;
    // exp(score) = 2^(factor * s), s being the product or, capped, the whole score.
    const float factor = capped ? kLog2e : p.scale * kLog2e;
    const float cap_slope = capped ? 2 * kLog2e * p.scale / p.softcap : 0;
    float maximum[kBands][2], sum[kBands][2];
    float output[kBands][kHeadDim / 8][4];
#pragma unroll
    for (int m = 0; m < kBands; ++m) {
      maximum[m][0] = maximum[m][1] = -INFINITY;
      sum[m][0] = sum[m][1] = 0;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
        output[m][n][0] = output[m][n][1] = output[m][n][2] = output[m][n][3] = 0;
    }

    for (int block = tile.block; block < tile.block + blocks; ++block) {
      // scores = queries * keys^T
      SharedAddress buffer = next_buffer();
      if constexpr (kTileRows == kContextRows) {
        if (tile.is_context && rotary.dim > 0 && !a.appended_before &&
            (block + 1) * kBlockKeys > schedule.context_len()[tile.request]) {
          rotate_fresh_keys(buffer, block * kBlockKeys, tile);
          __syncthreads();
        }
      }
      buffer += key0 * kRowBytes;
      float score[kBands][kKeys / 8][4];
#pragma unroll
      for (int m = 0; m < kBands; ++m)
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
          score[m][n][0] = score[m][n][1] = score[m][n][2] = score[m][n][3] = 0;
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        uint32_t q[kBands][4];
#pragma unroll
        for (int m = 0; m < kBands; ++m)
          load_matrix_x4(q[m], queries + by_row[k % kVariants] + (m * 16 * kRowBytes + group_of(k)));
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
          uint32_t keys[4];
          load_matrix_x4(keys, buffer + by_key[k % kVariants] + (n * 16 * kRowBytes + group_of(k)));
#pragma unroll
          for (int m = 0; m < kBands; ++m) {
            multiply_accumulate<T>(score[m][2 * n], q[m], keys[0], keys[1]);
            multiply_accumulate<T>(score[m][2 * n + 1], q[m], keys[2], keys[3]);
          }
        }
      }

      // online softmax
      uint32_t weights[kBands][kKeys / 8][2];
      const int first_key = block * kBlockKeys + key0;
#pragma unroll
      for (int m = 0; m < kBands; ++m) {
        if (capped) {
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              // tanh(x) = 1 - 2 / (e^2x + 1)
              const float power = exp2_fast(score[m][n][i] * cap_slope);
              score[m][n][i] = p.softcap - __fdividef(2 * p.softcap, power + 1);
            }
        }
        if (first_key < all_low || first_key + kKeys - 1 > all_high) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int low = row_low()[row0 + m * 16 + r * 8 + lane / 4];
            const int high = row_high()[row0 + m * 16 + r * 8 + lane / 4];
#pragma unroll
            for (int i = 0; i < kKeys / 4; ++i) {
              const int key = first_key + i / 2 * 8 + lane % 4 * 2 + i % 2;
              if (key < low || key > high) score[m][i / 2][2 * r + i % 2] = -INFINITY;
            }
          }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float block_maximum = maximum[m][r];
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
            block_maximum = fmaxf(block_maximum, fmaxf(score[m][n][2 * r], score[m][n][2 * r + 1]));
          block_maximum = fmaxf(block_maximum, __shfl_xor_sync(kAllLanes, block_maximum, 1));
          block_maximum = fmaxf(block_maximum, __shfl_xor_sync(kAllLanes, block_maximum, 2));
          // No key seen yet: subtract 0, so that 2^(-inf - 0) = 0 and not NaN.
          const float shift = block_maximum == -INFINITY ? 0 : block_maximum * factor;
          const float decay = exp2_fast(maximum[m][r] * factor - shift);
          maximum[m][r] = block_maximum;
          sum[m][r] *= decay;
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
            const float w0 = exp2_fast(score[m][n][2 * r] * factor - shift);
            const float w1 = exp2_fast(score[m][n][2 * r + 1] * factor - shift);
            sum[m][r] += w0 + w1;
            weights[m][n][r] = T::pack(w0, w1);
          }
#pragma unroll
          for (int n = 0; n < kHeadDim / 8; ++n) {
            output[m][n][2 * r] *= decay;
            output[m][n][2 * r + 1] *= decay;
          }
        }
      }

      // output += weights * values
      buffer = next_buffer() + key0 * kRowBytes;
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
        for (int n = 0; n < kHeadDim / 16; ++n) {
          uint32_t values[4];
          load_matrix_x4_transposed(values,
                                    buffer + by_row[n % kVariants] + (k * 16 * kRowBytes + group_of(n)));
#pragma unroll
          for (int m = 0; m < kBands; ++m) {
            const uint32_t w[4] = {weights[m][2 * k][0], weights[m][2 * k][1], weights[m][2 * k + 1][0],
                                   weights[m][2 * k + 1][1]};
            multiply_accumulate<T>(output[m][2 * n], w, values[0], values[1]);
            multiply_accumulate<T>(output[m][2 * n + 1], w, values[2], values[3]);
          }
        }
      }
    }

    const int64_t partial =
        is_head ? (int64_t{tile.is_context} * p.kv_num_heads + tile.kv_head) * a.max_rows + tile.packed_row
                : a.first_tail + int64_t{blockIdx.x} * a.tail_rows;
    float* partial_output = a.partial_output + partial * kHeadDim;
    float* partial_lse = a.partial_lse + partial;

#pragma unroll
    for (int m = 0; m < kBands; ++m) {
      float lse[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sum[m][r] += __shfl_xor_sync(kAllLanes, sum[m][r], 1);
        sum[m][r] += __shfl_xor_sync(kAllLanes, sum[m][r], 2);
        lse[r] = maximum[m][r] == -INFINITY ? -INFINITY : maximum[m][r] * factor + log2f(sum[m][r]);
      }
      if constexpr (kKeyWarps == 1) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = row0 + m * 16 + lane / 4 + r * 8;
          if (row >= tile.rows) continue;
          const float inverse = sum[m][r] == 0 ? 0 : 1 / sum[m][r];
#pragma unroll
          for (int n = 0; n < kHeadDim / 8; ++n) {
            float2* target =
                reinterpret_cast<float2*>(partial_output + row * kHeadDim + n * 8 + lane % 4 * 2);
            *target = make_float2(output[m][n][2 * r] * inverse, output[m][n][2 * r + 1] * inverse);
          }
          if (lane % 4 == 0) partial_lse[row] = lse[r];
        }
      } else {
        sum_over_warps(tile, output[m], sum[m], lse, partial_output, partial_lse);
      }
    }
  }

  // The four warps of a 16-row tile saw different keys: add their results up, eight rows and half a head at a
  // time, through the shared memory of the queries.
  __device__ __forceinline__ void sum_over_warps(const Tile& tile, const float (&output)[kHeadDim / 8][4],
                                                 const float (&sum)[2], const float (&lse)[2],
                                                 float* partial_output, float* partial_lse) {
    constexpr int kHalf = kHeadDim / 2;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* parts = reinterpret_cast<float*>(query_tile());
    // row_low and row_high are done with: 16 rows of 4 warps' lse fit into their 2 * kRows >= 32 words and
    // scratch's 32.
    float* warp_lse = reinterpret_cast<float*>(row_low());
    __syncthreads();
    if (lane % 4 == 0) {
      warp_lse[warp * 16 + lane / 4] = lse[0];
      warp_lse[warp * 16 + lane / 4 + 8] = lse[1];
    }
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int r = part / 2, half = part % 2;
      if (r * 8 >= tile.rows) break;
      // Normalised by the warp's own sum, so that its lse alone is its weight. Columns are permuted against
      // bank conflicts, by multiples of 8, which keeps four neighbours together.
      const float inverse = sum[r] == 0 ? 0 : 1 / sum[r];
#pragma unroll
      for (int n = 0; n < kHalf / 8; ++n) {
        const int column = (n * 8 + lane % 4 * 2) ^ column_swizzle(lane / 4);
        float2* target = reinterpret_cast<float2*>(parts + (warp * 8 + lane / 4) * kHalf + column);
        *target = make_float2(output[half * kHalf / 8 + n][2 * r] * inverse,
                              output[half * kHalf / 8 + n][2 * r + 1] * inverse);
      }
      __syncthreads();
      for (int i = threadIdx.x; i < 8 * kHalf / 4; i += kThreads) {
        const int row = i / (kHalf / 4), column = i % (kHalf / 4) * 4;
        if (r * 8 + row >= tile.rows) continue;
        float highest = -INFINITY, total = 0;
        for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, warp_lse[w * 16 + r * 8 + row]);
        const float shift = highest == -INFINITY ? 0 : highest;
        float4 x = make_float4(0, 0, 0, 0);
        for (int w = 0; w < kWarps; ++w) {
          const float weight = exp2_fast(warp_lse[w * 16 + r * 8 + row] - shift);
          const float4 y = *reinterpret_cast<const float4*>(parts + (w * 8 + row) * kHalf +
                                                            (column ^ column_swizzle(row)));
          total += weight;
          x.x += weight * y.x;
          x.y += weight * y.y;
          x.z += weight * y.z;
          x.w += weight * y.w;
        }
        const float scale = total == 0 ? 0 : 1 / total;
        *reinterpret_cast<float4*>(partial_output + (r * 8 + row) * kHeadDim + half * kHalf + column) =
            make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale);
        if (half == 0 && column == 0)
          partial_lse[r * 8 + row] = total == 0 ? -INFINITY : shift + log2f(total);
      }
      __syncthreads();
    }
  }
  // Half a head is a multiple of 16 columns, of 32 for head_dim 64, 128, 192 and 256.
  __device__ __forceinline__ static int column_swizzle(int row) {
    return kHeadDim % 64 == 0 ? (row & 3) * 8 : (row & 1) * 8;
  }

  // ---- merge ----
  __device__ __forceinline__ Partials partials_of(int first_unit, int units, int kind, int kv_head,
                                                  int packed_row, int row_in_tile) const {
    const int first = schedule.owner(first_unit);
    Partials partials;
    partials.count = schedule.owner(first_unit + units - 1) - first + 1;
    partials.head = (kind * p.kv_num_heads + kv_head) * a.max_rows + packed_row;
    partials.first_tail = a.first_tail + first * a.tail_rows + row_in_tile;
    partials.stride = a.tail_rows;
    return partials;
  }

 public:  // for merge()
  __device__ __forceinline__ static void wait_for_grid(const GridBarrier& barrier) {
    if (threadIdx.x == 0) barrier.wait();
    synchronize();
  }
  __device__ __forceinline__ static void exchange(uint32_t&) { synchronize(); }
  __device__ __forceinline__ MergeRow first_merge_row(int, int index, int rows) const {
    return merge_row(a, schedule, *this, index, rows);
  }
  __device__ __forceinline__ Partials prefix_partials(int kv_head, int packed) const {
    const int blocks = schedule.totals().prefix_blocks;
    const int tile = kv_head * schedule.totals().prefix_tiles + packed / kPrefixRows;
    return partials_of(tile * blocks, blocks, 0, kv_head, packed, packed % kPrefixRows);
  }
  __device__ __forceinline__ Partials context_partials(int request, int kv_head, int packed) const {
    const int row = packed - schedule.token_start()[request] * schedule.totals().group;
    const int blocks = schedule.context_blocks(request);
    const int tile = kv_head * schedule.context_tiles(request) + row / kContextRows;
    return partials_of(schedule.totals().prefix_units + schedule.unit_start()[request] + tile * blocks,
                       blocks, 1, kv_head, packed, row % kContextRows);
  }
  __device__ __forceinline__ static void synchronize() { __syncthreads(); }
};

template <class T, int kHeadDim, int kPrefixRows, int kContextRows>
__global__ void __launch_bounds__(kThreads)
    attention_kernel(const __grid_constant__ KernelArguments arguments) {
  Attention<T, kHeadDim, kPrefixRows, kContextRows>(arguments).run();
}

}  // namespace relay::cuda
