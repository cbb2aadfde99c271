// How one call is cut into units of work. A plan depends on shapes and lengths alone, never on the number of
// threads, so the same call gives the same bits on any machine of one instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "plugins/cpu/launch.h"

namespace relay::cpu {

inline constexpr int kTileRows = 64;   // query rows of one tile: they share each key and value that is read
inline constexpr int kBlockKeys = 96;  // keys whose scores are held at a time
inline constexpr int kMinSplitKeys = 2 * kBlockKeys;  // prefix keys of one unit, where the prefix is split
inline constexpr int kContextKeys = 6 * kBlockKeys;   // context keys of one unit, at most
inline constexpr int kTargetTiles = 64;               // the prefix is split until there are so many units

// A query row: one token and one of the heads that share a kv head.
struct Row {
  int64_t offset;  // of its head_dim elements in query and output, for the first kv head; +G*D for the next
  int32_t batch;
  int32_t context_hi;  // one past the last context key it sees; its absolute position is P + context_hi - 1
};

// Rows [first_row, first_row + rows) of Plan::rows against some keys, once for every kv head.
struct Unit {
  int32_t first_row = 0;
  int32_t rows = 0;  // at most kTileRows
  int32_t prefix_begin = 0, prefix_end = 0;
  int32_t context_begin = 0, context_end = 0;  // where not empty, all rows belong to one request
  int64_t slot =
      -1;  // where partial states go, in floats; -1: these are all the keys, the result is the output
};

// The context of up to kTileRows rows of one request, in `chunks` units.
struct ContextGroup {
  int32_t first_row = 0;
  int32_t rows = 0;
  int32_t chunks = 0;
  int64_t slot = -1;  // of the first chunk
};

// Rows whose partial states are fused at the end.
struct Merge {
  int32_t first_row = 0;
  int32_t rows = 0;
  int32_t splits = 0;  // units of the prefix
  int64_t slot = -1;   // of the first split
};

struct Plan {
  std::vector<Row> rows;            // every valid query row
  std::vector<Unit> prefix_units;   // a tile of rows of any requests; with a context too if slot is -1
  std::vector<Unit> context_units;  // rows of one request
  std::vector<Merge> merges;
  std::vector<ContextGroup> groups;
  std::vector<int32_t> group_of_row;  // index into groups, parallel to rows; -1: done by a unit with slot -1
  int64_t partial_floats = 0;
};

// Floats of the partial states of `rows` rows: o [rows, D], then m [rows], then d [rows].
inline int64_t StateFloats(int64_t rows, int64_t head_dim) { return rows * (head_dim + 2); }

Plan MakePlan(const RelayParams& params);

}  // namespace relay::cpu
