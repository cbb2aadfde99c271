#include "plugins/cpu/plan.h"

#include <algorithm>

namespace relay::cpu {
namespace {

struct Range {
  int32_t begin, end;
  int32_t size() const { return end - begin; }
};

class Planner {
 public:
  explicit Planner(const RelayParams& params) : params_(params), g_(params.geometry) {}

  Plan Make() {
    const int64_t group = g_.group();
    int64_t total_rows = 0;
    for (int64_t b = 0; b < g_.batch; ++b) total_rows += params_.query_lens[b] * group;
    plan_.rows.reserve(total_rows);
    plan_.group_of_row.reserve(total_rows);

    const int64_t tiles = (total_rows + kTileRows - 1) / kTileRows * g_.kv_num_heads;
    const bool enough = tiles >= kTargetTiles;
    const int64_t most_splits = std::max<int64_t>(1, g_.prefix_length / kMinSplitKeys);
    splits_ = enough || tiles == 0 ? 1 : std::min((kTargetTiles + tiles - 1) / tiles, most_splits);

    // Full tiles of one request take prefix and context in one go. What is left of each request is pooled, so
    // that few rows share a tile. Where there are few tiles, everything is pooled and the keys are split.
    for (int64_t b = 0; b < g_.batch && enough; ++b) {
      const int64_t rows = params_.query_lens[b] * group;
      for (int64_t r = 0; r + kTileRows <= rows; r += kTileRows) AddWholeTile(b, r);
    }
    const int32_t pool = static_cast<int32_t>(plan_.rows.size());
    for (int64_t b = 0; b < g_.batch; ++b) {
      const int64_t rows = params_.query_lens[b] * group;
      for (int64_t r = enough ? rows / kTileRows * kTileRows : 0; r < rows; r += kTileRows) {
        AddContextGroup(b, r, std::min<int64_t>(kTileRows, rows - r));
      }
    }
    AddPrefixTiles(pool);
    return std::move(plan_);
  }

 private:
  // Positions of row r of request b, counted from the start of the prefix.
  int64_t Position(int64_t b, int64_t r) const {
    return g_.prefix_length + params_.context_lens[b] + r / g_.group();
  }
  int64_t FirstVisible(int64_t position) const {
    const int64_t window = params_.attributes.local_window_size;
    return window < 0 ? 0 : std::max<int64_t>(0, position - window + 1);
  }
  Range PrefixKeys(int64_t lowest_position) const {
    const int64_t begin = std::min(FirstVisible(lowest_position), g_.prefix_length);
    return {static_cast<int32_t>(begin), static_cast<int32_t>(g_.prefix_length)};
  }
  Range ContextKeys(int64_t b, int64_t r, int64_t rows) const {
    const int64_t begin = std::max<int64_t>(0, FirstVisible(Position(b, r)) - g_.prefix_length);
    const int64_t end = Position(b, r + rows - 1) - g_.prefix_length + 1;
    return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
  }

  int32_t AddRows(int64_t b, int64_t r, int64_t rows, int32_t group) {
    const int32_t first = static_cast<int32_t>(plan_.rows.size());
    for (int64_t i = r; i < r + rows; ++i) {
      const int64_t token = i / g_.group();
      const int64_t head = i % g_.group();
      Row row;
      row.offset = ((b * g_.sequence + token) * g_.num_heads + head) * g_.head_dim;
      row.batch = static_cast<int32_t>(b);
      row.context_hi = static_cast<int32_t>(params_.context_lens[b] + token + 1);
      plan_.rows.push_back(row);
      plan_.group_of_row.push_back(group);
    }
    return first;
  }

  int64_t AddSlot(int64_t rows) {
    const int64_t slot = plan_.partial_floats;
    plan_.partial_floats += g_.kv_num_heads * StateFloats(rows, g_.head_dim);
    return slot;
  }

  void AddWholeTile(int64_t b, int64_t r) {
    Unit unit;
    unit.first_row = AddRows(b, r, kTileRows, -1);
    unit.rows = kTileRows;
    const Range prefix = PrefixKeys(Position(b, r));
    const Range context = ContextKeys(b, r, kTileRows);
    unit.prefix_begin = prefix.begin, unit.prefix_end = prefix.end;
    unit.context_begin = context.begin, unit.context_end = context.end;
    plan_.prefix_units.push_back(unit);
  }

  void AddContextGroup(int64_t b, int64_t r, int64_t rows) {
    ContextGroup group;
    group.first_row = AddRows(b, r, rows, static_cast<int32_t>(plan_.groups.size()));
    group.rows = static_cast<int32_t>(rows);
    const Range keys = ContextKeys(b, r, rows);
    group.chunks = (keys.size() + kContextKeys - 1) / kContextKeys;
    for (int32_t chunk = 0; chunk < group.chunks; ++chunk) {
      Unit unit;
      unit.first_row = group.first_row;
      unit.rows = group.rows;
      unit.context_begin = keys.begin + chunk * kContextKeys;
      unit.context_end = std::min(unit.context_begin + kContextKeys, keys.end);
      unit.slot = AddSlot(rows);
      if (chunk == 0) group.slot = unit.slot;
      plan_.context_units.push_back(unit);
    }
    plan_.groups.push_back(group);
    lowest_position_.push_back(Position(b, r));
  }

  // Tiles over the pooled rows, which begin at `pool`.
  void AddPrefixTiles(int32_t pool) {
    const int32_t end = static_cast<int32_t>(plan_.rows.size());
    std::vector<std::vector<Unit>> tiles;
    for (int32_t first = pool; first < end; first += kTileRows) {
      Merge merge;
      merge.first_row = first;
      merge.rows = std::min(kTileRows, end - first);
      int64_t lowest = INT64_MAX;
      for (int32_t g = plan_.group_of_row[first]; g <= plan_.group_of_row[first + merge.rows - 1]; ++g) {
        lowest = std::min(lowest, lowest_position_[g]);
      }
      const Range keys = PrefixKeys(lowest);
      const int32_t splits = static_cast<int32_t>(std::clamp<int64_t>(
          splits_, keys.size() > 0 ? 1 : 0, (keys.size() + kMinSplitKeys - 1) / kMinSplitKeys));
      merge.splits = splits;
      const int32_t blocks = (keys.size() + kBlockKeys - 1) / kBlockKeys;
      tiles.emplace_back();
      for (int32_t split = 0; split < splits; ++split) {
        Unit unit;
        unit.first_row = first;
        unit.rows = merge.rows;
        unit.prefix_begin = keys.begin + blocks * split / splits * kBlockKeys;
        unit.prefix_end = std::min(keys.begin + blocks * (split + 1) / splits * kBlockKeys, keys.end);
        unit.slot = AddSlot(merge.rows);
        if (split == 0) merge.slot = unit.slot;
        tiles.back().push_back(unit);
      }
      plan_.merges.push_back(merge);
    }
    // split by split, so that tiles that follow each other read the same keys
    for (int64_t split = 0; split < splits_; ++split) {
      for (const std::vector<Unit>& tile : tiles) {
        if (split < static_cast<int64_t>(tile.size())) plan_.prefix_units.push_back(tile[split]);
      }
    }
  }

  const RelayParams& params_;
  const Geometry& g_;
  Plan plan_;
  int64_t splits_ = 1;
  std::vector<int64_t> lowest_position_;  // parallel to plan_.groups
};

}  // namespace

Plan MakePlan(const RelayParams& params) { return Planner(params).Make(); }

}  // namespace relay::cpu
