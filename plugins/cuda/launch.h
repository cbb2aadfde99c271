// The one door to the CUDA kernels. The ONNX Runtime adapter, the TensorRT plugin and the C entry point
// (capi.h) all come through here; nothing behind it knows an engine, and nothing before it knows a kernel.
//
// Needs no CUDA header. No function here allocates device memory or synchronises, lengths are read on the
// device only, and every launch can be captured into a CUDA graph and replayed.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;  // cudaStream_t is CUstream_st*

namespace relay::cuda {

enum class DataType : int32_t { kFloat16 = 0, kBFloat16 = 1 };

enum class Status : int32_t {
  kOk = 0,
  kInvalidArgument = 1,  // a shape, pointer or attribute contradicts the contract
  kUnsupported = 2,      // a valid request these kernels do not serve; message says which part
  kWorkspaceTooSmall = 3,
  kCudaError = 4,  // message holds cudaGetErrorString
};

// One call of relay::RelayAttention. All tensors are dense, row-major and 16-byte aligned; sizes count
// elements. B = batch, S = sequence, Hq = num_heads, Hkv = kv_num_heads, D = head_dim, C = max_context, P =
// prefix_length, R = rotary_dim. Plain old data of a fixed layout: ctypes mirrors it field by field.
struct RelayParams {
  const void* query;     // [B, S, Hq*D]
  const void* key;       // [B, S, Hkv*D]   new tokens, not rotated
  const void* value;     // [B, S, Hkv*D]
  const void* past_key;  // [B, Hkv, C, D]  rotated when they were written
  const void* past_value;
  void* present_key;  // [B, Hkv, C, D]  == past: appended in place; else copied from past first. No partial
                      // overlap
  void* present_value;
  const int32_t* context_lens;  // [B] device; tokens in past before this call
  const int32_t* query_lens;    // [B] device; valid new tokens of each row, 0 = idle
  const void* prefix_key;       // [Hkv, P, D]; may be null when P == 0
  const void* prefix_value;
  const void* cos_cache;  // [max_positions, R/2], or null: no rotary (then rotary_dim == 0)
  const void* sin_cache;
  void* output;  // [B, S, Hq*D]; every element is written
  int32_t batch;
  int32_t sequence;
  int32_t num_heads;
  int32_t kv_num_heads;
  int32_t head_dim;  // 32, 64, 96, 128, 192 or 256
  int32_t max_context;
  int32_t prefix_length;
  int32_t rotary_dim;         // 0 = none; else a multiple of 16, at most head_dim
  int32_t max_positions;      // rows of the rotary caches
  float scale;                // 0 = 1/sqrt(head_dim)
  float softcap;              // 0 = none
  int32_t local_window_size;  // -1 = none; else >= 1, counted in absolute positions, prefix included
  int32_t rotary_interleaved;
  DataType dtype;  // of every tensor that is not a length
};

// Knobs for benchmarks and tests; all zero = chosen by make_plan (plan.h).
struct RelayTuning {
  int32_t algorithm;       // 0 = auto, 1 = the slow reference kernel, 2 = tensor cores, 3 = Hopper
  int32_t prefix_rows;     // rows of a prefix tile: 16, 64 or (head_dim <= 128) 128; Hopper: 64 or 128
  int32_t context_rows;    // rows of a context tile: 16 or 64
  int32_t pipeline_depth;  // buffers in the copy pipeline, of 64 keys or 64 values each: 2..6; Hopper: 4..24
  int32_t blocks_per_sm;   // blocks resident on one multiprocessor, at most
  int32_t prefix_cost;     // weights by which blocks share out the work (per 64 keys of one tile), 1..64
  int32_t context_cost;
  int32_t l2_prefetch_mb;     // prefix megabytes asked into L2 while the work is shared out; -1 = none
  int32_t copies_in_flight;   // buffers that a block waits for at once (Hopper)
  int32_t tokens_per_launch;  // cut a long prefill into launches of at most so many tokens
  int32_t wide_keys;          // keys that a tile of 128 rows takes at a time: 64 or 128 (Hopper)
};

// Refuses what launch() would refuse, without touching the device. `message` (may be null) receives one
// sentence. Pointers are checked only where check_pointers is set, so that engines can ask at build time.
//
// What cannot be checked here, because it is known on the device only: a row whose lengths are out of range
// (negative; query_lens > S; context_lens + query_lens > C; a position beyond the rotary caches) is not
// computed: all its output is NaN and its cache is left alone. Other rows are not affected and nothing is
// written out of bounds.
Status check(const RelayParams& params, bool check_pointers, char* message, size_t message_size);

// Scratch that launch() needs, in bytes; never shrinks when batch or sequence grow, so the largest shape
// serves all. sm_count: multiprocessors of the device (sm_count()). Contents need not be kept or cleared
// between calls.
size_t workspace_bytes(const RelayParams& params, int sm_count);

// A few words of device memory that outlive a call: cleared once by the owner (cudaMemset), left ready by
// each launch. One set may serve every layer whose launches follow each other on one stream, never two
// streams at once.
constexpr size_t kBarrierBytes = 256;

// Multiprocessors of the current device, or 0 (no device, no driver).
int sm_count();

// Enqueues the op on `stream`. barrier may be null: then its words are carved from the workspace and cleared
// by a memset in front of each launch (right, but one more node in the graph).
Status launch(const RelayParams& params, const RelayTuning& tuning, void* workspace, size_t workspace_size,
              void* barrier, CUstream_st* stream, char* message, size_t message_size);

}  // namespace relay::cuda
