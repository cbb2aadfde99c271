// What the host decides before a launch, as plain C++ (no CUDA header), so that it is tested without a GPU.
#pragma once

#include "launch.h"

namespace relay::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kBlockKeys =
    64;  // keys (or values) in one buffer of the copy pipeline: the unit in which work is shared
constexpr int kMaxBatch = 1024;
constexpr int kMaxTokensPerLaunch = 1024;
constexpr int kMaxDepth = 6;
constexpr int kMaxBlocksPerSm = 3;
constexpr int kMaxWideHeadDim = 128;  // beyond it, a prefix tile of 128 rows does not fit the registers

// What the kernel receives by value.
struct KernelArguments {
  RelayParams params;  // scale filled in
  int token_begin;     // this launch serves the valid tokens [token_begin, token_end) of the batch, counted
  int token_end;       //   over requests in order; the bounds are the host's, the tokens the device's
  int max_rows;        // token_end - token_begin times group size: rows per kv head, at most
  int prefix_cost;     // weights of one block of keys of a prefix / context tile
  int context_cost;
  int depth;                  // buffers in the copy pipeline
  int tail_rows;              // rows of one tail slot
  int appended_before;        // the new tokens are in present already, rotated (see Plan)
  int64_t l2_prefetch_bytes;  // of prefix_key and of prefix_value, each
  // Partial results, float32. A tile is shared by consecutive blocks of the grid: the first one's partial is
  // a head, kept by packed row; every later one's is a tail, of which a block has at most one.
  float* head_output;  // [2 (prefix, context), Hkv, max_rows, D] normalised
  float* head_lse;     // [2, Hkv, max_rows] log2 of the sum of 2^score; -inf where no key was visible
  float* tail_output;  // [grid, tail_rows, D]
  float* tail_lse;     // [grid, tail_rows]
  uint32_t* barrier;   // kBarrierBytes
};

// How one call is cut into launches, and which kernel serves it.
struct Plan {
  int prefix_rows;  // template arguments
  int context_rows;
  int depth;
  int grid;
  size_t shared_bytes;
  int tokens_per_launch;
  int launches;
  int prefix_cost;
  int context_cost;
  int64_t l2_prefetch_bytes;
  // A long chunk's new keys are rotated and appended by a small launch of their own, once and not once per
  // tile that reads them; otherwise the one launch does it.
  bool append_before;
};

// The limits of a device that a plan depends on.
struct DeviceLimits {
  int sm_count;
  size_t shared_bytes_per_block;  // opt-in maximum
  size_t shared_bytes_per_sm;
};

// Offsets into the workspace, in bytes.
struct WorkspaceLayout {
  size_t head_output, head_lse, tail_output, tail_lse, barrier, total;
};

int tokens_per_launch(const RelayParams& params, int requested);
WorkspaceLayout workspace_layout(const RelayParams& params, int tokens_per_launch, int grid);
size_t shared_bytes(int head_dim, int prefix_rows, int context_rows, int depth, int batch,
                    int tokens_per_launch);
Status make_plan(const RelayParams& params, const RelayTuning& tuning, const DeviceLimits& device, Plan* plan,
                 char* message, size_t message_size);
KernelArguments kernel_arguments(const RelayParams& params, const Plan& plan, int launch_index,
                                 void* workspace, void* barrier);

}  // namespace relay::cuda
