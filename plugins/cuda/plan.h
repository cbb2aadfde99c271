// What the host decides before a launch, as plain C++ (no CUDA header), so that it is tested without a GPU.
#pragma once

#include "launch.h"

#ifdef RELAY_CUDA_ON_HOST
#include "cuda_on_host.h"
#endif

namespace relay::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
// Keys (or values) in one buffer of the copy pipeline: the unit in which work is shared (but see wide_keys).
constexpr int kBlockKeys = 64;
constexpr int kMaxBatch = 1024;
constexpr int kMaxTokensPerLaunch = 1024;
constexpr int kMaxDepth = 6;
constexpr int kMaxBlocksPerSm = 3;
constexpr int kMaxWideHeadDim = 128;  // beyond it, a prefix tile of 128 rows does not fit the registers

// The kernels for Hopper (hopper.cuh): two warpgroups that multiply and one that copies.
constexpr int kHopperConsumers = 2 * 128;
constexpr int kHopperThreads = kHopperConsumers + 128;
constexpr int kMaxStages = 24;  // buffers of keys or values
constexpr int kMaxHopperHeadDim = 128;
constexpr int kHopperFixedBytes = 9376;  // of shared memory: what hopper.cuh keeps whatever the call

// Divides by a number that the host knows, for 0 <= n with n * divisor < 2^32.
struct Divisor {
  uint32_t magic;  // 2^32 / divisor, rounded up; 0 for 1

#if defined(__CUDACC__) || defined(RELAY_CUDA_ON_HOST)
  __device__ __forceinline__ int divide(int n) const {
    return magic == 0 ? n : static_cast<int>(__umulhi(static_cast<uint32_t>(n), magic));
  }
#endif
};
inline Divisor divisor_of(int divisor) {
  return {divisor == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + divisor - 1) / divisor)};
}

// What the kernel receives by value.
struct KernelArguments {
  RelayParams params;  // scale filled in
  int token_begin;     // this launch serves the valid tokens [token_begin, token_end) of the batch, counted
  int token_end;       //   over requests in order; the bounds are the host's, the tokens the device's
  int group;           // query heads of a kv head
  int max_rows;        // token_end - token_begin times group size: rows per kv head, at most
  int prefix_cost;     // weights of one block of keys of a prefix / context tile
  int context_cost;
  int prefix_rows;  // rows of a prefix / context tile
  int context_rows;
  int prefix_rows_log2;
  int context_rows_log2;
  int prefix_keys_log2;  // keys of a unit of a prefix / context tile
  int context_keys_log2;
  Divisor by_group, by_heads, by_kv_heads;
  int depth;             // buffers in the copy pipeline
  int copies_in_flight;  // of buffers of 64 keys, at most (Hopper)
  int ring_offset;       // of the copy pipeline in shared memory (Hopper)
  int tail_rows;         // rows of one tail slot
  int appended_before;   // the new tokens are in present already, rotated (see Plan)
  // Of 128 bytes, of query and of key: what the Hopper kernel asks into L2 at once.
  int64_t query_lines, new_lines;
  int64_t l2_prefetch_bytes;  // of prefix_key and of prefix_value, each
  // Partial results, float32, in rows. A tile is shared by consecutive workers: the first one's partial is a
  // head, kept by packed row, [2 (prefix, context), Hkv, max_rows]; every later one's is a tail, of which a
  // worker has at most one of each kind.
  float* partial_output;  // [rows, D] normalised
  float* partial_lse;     // [rows] log2 of the sum of 2^score; -inf where no key was visible
  int first_tail;         // row at which the tails begin
  uint32_t* barrier;      // kBarrierBytes
};

// How one call is cut into launches, and which kernel serves it.
struct Plan {
  bool hopper;      // which kernel
  int prefix_rows;  // template arguments
  int context_rows;
  int wide_keys;  // keys of a unit of a tile of 128 rows: 64 or 128 (Hopper)
  int depth;
  int copies_in_flight;
  int ring_offset;
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
  int major;  // compute capability
  int sm_count;
  size_t shared_bytes_per_block;  // opt-in maximum
  size_t shared_bytes_per_sm;
};

// Offsets into the workspace, in bytes.
struct WorkspaceLayout {
  size_t output, lse, barrier, total;
};

int tokens_per_launch(const RelayParams& params, int requested);
// tails: rows of all workers' tails
WorkspaceLayout workspace_layout(const RelayParams& params, int tokens_per_launch, int64_t tails);
// Shared memory of the Hopper kernel; ring_offset (may be null) receives where its query rows and ring begin.
size_t hopper_bytes(int head_dim, int stages, int batch, int tokens_per_launch, int* ring_offset);
size_t shared_bytes(int head_dim, int prefix_rows, int context_rows, int depth, int batch,
                    int tokens_per_launch);
Status make_plan(const RelayParams& params, const RelayTuning& tuning, const DeviceLimits& device, Plan* plan,
                 char* message, size_t message_size);
WorkspaceLayout plan_workspace(const RelayParams& params, const Plan& plan);
KernelArguments kernel_arguments(const RelayParams& params, const Plan& plan, int launch_index,
                                 void* workspace, void* barrier);

}  // namespace relay::cuda
