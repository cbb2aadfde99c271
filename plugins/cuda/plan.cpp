#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>

namespace relay::cuda {
namespace {

constexpr size_t kAlign = 256;

size_t align_up(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

__attribute__((format(printf, 4, 5))) Status fail(Status status, char* message, size_t size,
                                                  const char* format, ...) {
  if (message != nullptr && size > 0) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, size, format, arguments);
    va_end(arguments);
  }
  return status;
}

bool overlap(const void* a, const void* b, size_t bytes) {
  const uintptr_t x = reinterpret_cast<uintptr_t>(a), y = reinterpret_cast<uintptr_t>(b);
  return x < y + bytes && y < x + bytes;
}

// An upper bound of the units of work of one launch: blocks of keys summed over all tiles.
int64_t max_units(const RelayParams& p, const Plan& plan) {
  const int64_t tokens = std::min<int64_t>(plan.tokens_per_launch, int64_t{p.batch} * p.sequence);
  const int64_t group = p.num_heads / p.kv_num_heads;
  const int64_t prefix = divide_up(tokens * group, plan.prefix_rows) * divide_up(p.prefix_length, kBlockKeys);
  const int64_t tiles = tokens * group / plan.context_rows + std::min<int64_t>(tokens, p.batch);
  const int64_t context = tiles * divide_up(p.max_context, kBlockKeys);
  return p.kv_num_heads * (prefix + context);
}

// Rows of all tails, whichever kernel: see kernel_arguments.
int64_t tail_rows(bool hopper, int grid, int prefix_rows) {
  return hopper ? int64_t{grid} * 2 * 64 : int64_t{grid} * prefix_rows;
}
int64_t max_tail_rows(const RelayParams& p, int sm_count) {
  const int rows = p.head_dim <= kMaxWideHeadDim ? 128 : 64;
  return std::max(tail_rows(true, sm_count, 0), tail_rows(false, sm_count * kMaxBlocksPerSm, rows));
}

// The kernel of attention.cuh, for compute capability 8.0 and later.
Status plan_portable(const RelayParams& p, const RelayTuning& tuning, const DeviceLimits& device, Plan* plan,
                     char* message, size_t size) {
  const int group = p.num_heads / p.kv_num_heads;
  const int64_t rows = int64_t{p.batch} * p.sequence * group;
  // A request's own rows fill 16 while decoding; a chunk of a prompt fills more. The wider a prefix tile, the
  // less often shared memory is read for each product; the narrower, the more tiles there are to share out.
  // Measured on an H100 (docs/performance_gpu.md): 128 rows spill and are slower than 64 everywhere.
  plan->context_rows = int64_t{p.sequence} * group <= 16 ? 16 : 64;
  if (tuning.context_rows > 0) plan->context_rows = tuning.context_rows <= 16 ? 16 : 64;
  plan->prefix_rows = rows <= 64 ? 16 : 64;
  if (tuning.prefix_rows > 0)
    plan->prefix_rows = tuning.prefix_rows <= 16 ? 16 : (tuning.prefix_rows <= 64 ? 64 : 128);
  if (p.head_dim > kMaxWideHeadDim) plan->prefix_rows = std::min(plan->prefix_rows, 64);
  plan->prefix_rows = std::max(plan->prefix_rows, plan->context_rows);

  const auto bytes = [&](int depth) {
    return shared_bytes(p.head_dim, plan->prefix_rows, plan->context_rows, depth, p.batch,
                        plan->tokens_per_launch);
  };
  const size_t reserved = 1024;  // the driver keeps so much of each block's shared memory for itself
  if (bytes(2) > device.shared_bytes_per_block) plan->prefix_rows = std::min(plan->prefix_rows, 64);
  if (bytes(2) > device.shared_bytes_per_block) plan->prefix_rows = plan->context_rows = 16;
  if (bytes(2) > device.shared_bytes_per_block)
    return fail(Status::kUnsupported, message, size,
                "head_dim %d with a batch of %d needs %zu bytes of shared memory; this GPU gives a block %zu",
                p.head_dim, p.batch, bytes(2), device.shared_bytes_per_block);
  // Two resident blocks hide each other's barriers; below that, as deep as one block's memory goes.
  const int blocks = tuning.blocks_per_sm > 0 ? std::min(tuning.blocks_per_sm, kMaxBlocksPerSm) : 2;
  int depth = tuning.pipeline_depth > 0 ? std::clamp(tuning.pipeline_depth, 2, kMaxDepth) : kMaxDepth;
  const auto resident = [&](int d) {
    return static_cast<int>(std::min<size_t>(device.shared_bytes_per_sm / (bytes(d) + reserved), blocks));
  };
  while (depth > 2 && (bytes(depth) > device.shared_bytes_per_block ||
                       (tuning.pipeline_depth == 0 && depth > 4 && resident(depth) < blocks)))
    --depth;
  if (tuning.pipeline_depth == 0 && resident(depth) < blocks) {
    // Two blocks do not fit at four buffers either: give all to one, unless three buffers let both in.
    if (resident(3) >= blocks) {
      depth = 3;
    } else {
      depth = kMaxDepth;
      while (depth > 2 && bytes(depth) > device.shared_bytes_per_block) --depth;
    }
  }
  plan->append_before = plan->context_rows == 64 && p.rotary_dim > 0;
  plan->depth = depth;
  plan->shared_bytes = bytes(depth);
  plan->grid = device.sm_count * std::max(1, resident(depth));
  return Status::kOk;
}

// Whether the Hopper kernel serves the call, and how. Its tiles have 64 rows, or 128 where there are more.
bool plan_hopper(const RelayParams& p, const RelayTuning& tuning, const DeviceLimits& device, Plan* plan) {
  if (device.major != 9 || p.head_dim > kMaxHopperHeadDim) return false;
  if (tuning.algorithm != 0 && tuning.algorithm != 3) return false;
  const int64_t own_rows = int64_t{p.sequence} * (p.num_heads / p.kv_num_heads);
  plan->context_rows = own_rows <= 64 ? 64 : 128;
  plan->prefix_rows = own_rows * p.batch <= 64 ? 64 : 128;
  if (tuning.prefix_rows > 0 && plan->context_rows == 64)
    plan->prefix_rows = tuning.prefix_rows <= 64 ? 64 : 128;
  if (device.sm_count < 2) plan->prefix_rows = plan->context_rows;  // a block has tiles of one kind only
  // Of 128 keys a block waits half as often, but they are shared out less evenly. Measured on an H100
  // (docs/performance_gpu.md), by the number of such units that a multiprocessor gets: head_dim 128 and 4
  // tiles or more 1.1 times as fast from 31 on, the same at 15, 0.8 to 1 at 4; two tiles 0.9 to 1 at 31;
  // head_dim 64 1.15 at 15.
  const int64_t tokens = std::min<int64_t>(plan->tokens_per_launch, int64_t{p.batch} * p.sequence);
  const int64_t tiles = divide_up(tokens * (p.num_heads / p.kv_num_heads), 128);
  const int64_t units = p.kv_num_heads * tiles * divide_up(p.prefix_length, 128);
  const bool small = p.head_dim <= 64;
  plan->wide_keys = tiles > (small ? 1 : 2) && units >= int64_t{small ? 12 : 24} * device.sm_count ? 128 : 64;
  if (tuning.wide_keys > 0) plan->wide_keys = tuning.wide_keys <= 64 ? 64 : 128;
  int stages = tuning.pipeline_depth > 0 ? std::clamp(tuning.pipeline_depth, 4, kMaxStages) : kMaxStages;
  const auto bytes = [&](int n) {
    return hopper_bytes(p.head_dim, n, p.batch, plan->tokens_per_launch, &plan->ring_offset);
  };
  while (stages > 4 && bytes(stages) > device.shared_bytes_per_block) --stages;
  if (bytes(stages) > device.shared_bytes_per_block) return false;
  plan->hopper = true;
  // Copies are kept few, so that queries need not wait behind them, but for where contexts are most of the
  // work, the units of wide tiles large or the copies of narrow ones small.
  const bool many = int64_t{p.batch} * p.kv_num_heads >= int64_t{6} * device.sm_count;
  const int copies = many || plan->wide_keys == 128 || (small && plan->prefix_rows == 64) ? 4 : 3;
  plan->copies_in_flight =
      std::min(tuning.copies_in_flight > 0 ? tuning.copies_in_flight : copies, stages / 2 * 2);
  plan->depth = stages;
  plan->shared_bytes = bytes(stages);
  plan->grid = device.sm_count;
  // Only one new token of a request is patched into what the copy engine reads.
  plan->append_before = p.sequence > 1;
  return true;
}

}  // namespace

Status check(const RelayParams& p, bool check_pointers, char* message, size_t size) {
  const auto invalid = Status::kInvalidArgument;
  const auto unsupported = Status::kUnsupported;
  if (p.dtype != DataType::kFloat16 && p.dtype != DataType::kBFloat16)
    return fail(
        unsupported, message, size,
        "the CUDA kernels of RelayAttention take float16 and bfloat16 only (data type code %d); export the "
        "model with --dtype float16 or run it on the CPU",
        static_cast<int>(p.dtype));
  if (p.batch < 0 || p.sequence < 0 || p.prefix_length < 0 || p.max_context < 0)
    return fail(invalid, message, size,
                "negative size: batch %d, sequence %d, prefix length %d, max context %d", p.batch, p.sequence,
                p.prefix_length, p.max_context);
  if (p.num_heads < 1 || p.kv_num_heads < 1 || p.num_heads % p.kv_num_heads != 0)
    return fail(invalid, message, size, "num_heads (%d) must be a positive multiple of kv_num_heads (%d)",
                p.num_heads, p.kv_num_heads);
  if (p.head_dim != 32 && p.head_dim != 64 && p.head_dim != 96 && p.head_dim != 128 && p.head_dim != 192 &&
      p.head_dim != 256)
    return fail(unsupported, message, size,
                "the CUDA kernels of RelayAttention serve head_dim 32, 64, 96, 128, 192 and 256, not %d",
                p.head_dim);
  if (p.batch > kMaxBatch)
    return fail(unsupported, message, size,
                "the CUDA kernels of RelayAttention take a batch of at most %d, not %d", kMaxBatch, p.batch);
  if (!std::isfinite(p.scale) || p.scale < 0)
    return fail(invalid, message, size, "scale must be positive, or 0 for 1/sqrt(head_dim), not %g", p.scale);
  if (!std::isfinite(p.softcap) || p.softcap < 0)
    return fail(invalid, message, size, "softcap must be positive, or 0 for none, not %g", p.softcap);
  if (p.local_window_size != -1 && p.local_window_size < 1)
    return fail(invalid, message, size, "local_window_size must be -1 (none) or at least 1, not %d",
                p.local_window_size);
  if (p.rotary_dim < 0 || p.rotary_dim > p.head_dim || p.rotary_dim % 2 != 0)
    return fail(invalid, message, size, "rotary dimensions must be even and at most head_dim (%d), not %d",
                p.head_dim, p.rotary_dim);
  if (p.rotary_dim % 16 != 0)
    return fail(unsupported, message, size,
                "the CUDA kernels of RelayAttention rotate multiples of 16 dimensions, not %d", p.rotary_dim);
  if (p.rotary_dim > 0 && p.max_positions < 1)
    return fail(invalid, message, size, "the rotary caches are empty");
  // Offsets inside one request's tensors are 64-bit; positions and row numbers are 32-bit.
  if (int64_t{p.prefix_length} + p.max_context > INT32_MAX / 2 ||
      int64_t{p.batch} * p.sequence * p.num_heads > INT32_MAX / 2)
    return fail(unsupported, message, size,
                "too large for 32-bit positions: batch %d, sequence %d, prefix %d", p.batch, p.sequence,
                p.prefix_length);
  if (!check_pointers || p.batch == 0 || p.sequence == 0) return Status::kOk;

  const struct {
    const char* name;
    const void* pointer;
    bool needed;
    size_t alignment;
  } tensors[] = {{"query", p.query, true, 16},
                 {"key", p.key, true, 16},
                 {"value", p.value, true, 16},
                 {"past_key", p.past_key, p.max_context > 0, 16},
                 {"past_value", p.past_value, p.max_context > 0, 16},
                 {"present_key", p.present_key, p.max_context > 0, 16},
                 {"present_value", p.present_value, p.max_context > 0, 16},
                 {"context_lens", p.context_lens, true, 4},
                 {"query_lens", p.query_lens, true, 4},
                 {"prefix_key", p.prefix_key, p.prefix_length > 0, 16},
                 {"prefix_value", p.prefix_value, p.prefix_length > 0, 16},
                 {"cos_cache", p.cos_cache, p.rotary_dim > 0, 16},
                 {"sin_cache", p.sin_cache, p.rotary_dim > 0, 16},
                 {"output", p.output, true, 16}};
  for (const auto& tensor : tensors) {
    if (tensor.needed && tensor.pointer == nullptr)
      return fail(invalid, message, size, "%s is null", tensor.name);
    if (tensor.needed && reinterpret_cast<uintptr_t>(tensor.pointer) % tensor.alignment != 0)
      return fail(invalid, message, size, "%s must be aligned to %zu bytes", tensor.name, tensor.alignment);
  }
  const size_t cache = size_t{2} * p.batch * p.kv_num_heads * p.max_context * p.head_dim;
  if (p.present_key != p.past_key && overlap(p.present_key, p.past_key, cache))
    return fail(invalid, message, size, "present_key overlaps past_key without being the same buffer");
  if (p.present_value != p.past_value && overlap(p.present_value, p.past_value, cache))
    return fail(invalid, message, size, "present_value overlaps past_value without being the same buffer");
  return Status::kOk;
}

int tokens_per_launch(const RelayParams& p, int requested) {
  // Two float32 partials (prefix, context) per row and at most 64 MiB of them, unless a single token needs
  // more.
  const int64_t per_token = int64_t{2} * p.num_heads * (p.head_dim + 1) * 4;
  const int64_t fit = std::max<int64_t>(1, (int64_t{64} << 20) / per_token);
  const int64_t tokens =
      std::min<int64_t>({fit, kMaxTokensPerLaunch, std::max<int64_t>(1, int64_t{p.batch} * p.sequence)});
  return static_cast<int>(requested > 0 ? std::min<int64_t>(requested, tokens) : tokens);
}

WorkspaceLayout workspace_layout(const RelayParams& p, int tokens, int64_t tails) {
  const size_t rows = size_t{2} * tokens * p.num_heads + static_cast<size_t>(tails);
  WorkspaceLayout layout{};
  layout.output = 0;
  layout.lse = align_up(rows * p.head_dim * 4);
  layout.barrier = layout.lse + align_up(rows * 4);
  layout.total = layout.barrier + kBarrierBytes;
  return layout;
}

size_t workspace_bytes(const RelayParams& p, int sm_count) {
  if (p.batch <= 0 || p.sequence <= 0 || p.num_heads <= 0) return kBarrierBytes;
  return workspace_layout(p, tokens_per_launch(p, 0), max_tail_rows(p, std::max(1, sm_count))).total;
}

size_t hopper_bytes(int head_dim, int stages, int batch, int tokens, int* ring_offset) {
  // As hopper.cuh lays it out.
  const size_t arrays = size_t{16} * (static_cast<size_t>(batch) + 1) + 2 * static_cast<size_t>(tokens);
  const size_t offset = (kHopperFixedBytes + arrays + 1023) / 1024 * 1024;
  if (ring_offset != nullptr) *ring_offset = static_cast<int>(offset);
  return offset + (size_t{2} * 64 + size_t{1} * stages * kBlockKeys) * head_dim * 2;
}

size_t shared_bytes(int head_dim, int prefix_rows, int context_rows, int depth, int batch, int tokens) {
  // As attention.cuh lays it out.
  const size_t rows = std::max(prefix_rows, context_rows);
  const size_t query = std::max<size_t>(rows * head_dim * 2, size_t{64} * head_dim);
  const size_t ring = size_t{2} * depth * kBlockKeys * head_dim;
  const size_t words = 16 + 32 + 2 * rows + 32 + 4 * (static_cast<size_t>(batch) + 1);
  return query + ring + 4 * words + (2 * static_cast<size_t>(tokens) + 15) / 16 * 16;
}

Status make_plan(const RelayParams& p, const RelayTuning& tuning, const DeviceLimits& device, Plan* plan,
                 char* message, size_t size) {
  plan->tokens_per_launch = tokens_per_launch(p, tuning.tokens_per_launch);
  plan->launches = static_cast<int>(divide_up(int64_t{p.batch} * p.sequence, plan->tokens_per_launch));
  plan->hopper = false;
  plan->wide_keys = kBlockKeys;
  plan->ring_offset = 0;
  if (!plan_hopper(p, tuning, device, plan)) {
    if (tuning.algorithm == 3)
      return fail(Status::kUnsupported, message, size,
                  "the Hopper kernel needs compute capability 9.x (here %d.x), head_dim up to %d (here %d) "
                  "and a batch "
                  "that fits its shared memory (here %d)",
                  device.major, kMaxHopperHeadDim, p.head_dim, p.batch);
    const Status status = plan_portable(p, tuning, device, plan, message, size);
    if (status != Status::kOk) return status;
  }
  // What 64 keys of a narrow tile cost beside as many of a wide one (16), measured on an H100.
  const int64_t tiles = divide_up(int64_t{p.batch} * p.sequence * (p.num_heads / p.kv_num_heads), 128);
  const int narrow_cost = plan->wide_keys > kBlockKeys
                              ? 16
                              : (tiles <= 2 ? 18 : static_cast<int>(std::max<int64_t>(12, 17 - tiles / 2)));
  const int usual[] = {plan->hopper ? 16 : 1, plan->hopper ? narrow_cost : 1};
  plan->prefix_cost = tuning.prefix_cost > 0 ? std::min(tuning.prefix_cost, 64) : usual[0];
  plan->context_cost = tuning.context_cost > 0 ? std::min(tuning.context_cost, 64) : usual[1];
  if (max_units(p, *plan) > INT32_MAX / 2 / 64) plan->prefix_cost = plan->context_cost = 1;
  if (max_units(p, *plan) > INT32_MAX / 2)
    return fail(Status::kUnsupported, message, size,
                "too much work for 32-bit counts: batch %d, prefix %d, context %d", p.batch, p.prefix_length,
                p.max_context);
  // Until the lengths are read and the work is shared out, some of the prefix can be asked into L2. Measured
  // on an H100 (docs/performance_gpu.md): 6 MB, what the memory gives meanwhile, save the Hopper kernel up
  // to 1.1 us at up to 256 rows; beyond that, and for the portable kernel, it never helped. A window may hide
  // them.
  const bool helps = plan->hopper && tiles <= 2 && p.local_window_size < 0;
  const int64_t megabytes =
      tuning.l2_prefetch_mb > 0 ? tuning.l2_prefetch_mb : (tuning.l2_prefetch_mb == 0 && helps ? 6 : 0);
  const int64_t prefix_bytes = int64_t{2} * p.kv_num_heads * p.prefix_length * p.head_dim;
  plan->l2_prefetch_bytes = std::min(prefix_bytes, (megabytes << 20) / 2);
  return Status::kOk;
}

WorkspaceLayout plan_workspace(const RelayParams& p, const Plan& plan) {
  return workspace_layout(p, plan.tokens_per_launch, tail_rows(plan.hopper, plan.grid, plan.prefix_rows));
}

KernelArguments kernel_arguments(const RelayParams& p, const Plan& plan, int index, void* workspace,
                                 void* barrier) {
  const WorkspaceLayout layout = plan_workspace(p, plan);
  char* base = static_cast<char*>(workspace);
  KernelArguments a{};
  a.params = p;
  if (a.params.scale == 0) a.params.scale = 1.0f / std::sqrt(static_cast<float>(p.head_dim));
  a.token_begin = index * plan.tokens_per_launch;
  a.token_end =
      std::min<int64_t>(a.token_begin + int64_t{plan.tokens_per_launch}, int64_t{p.batch} * p.sequence);
  a.group = p.num_heads / p.kv_num_heads;
  a.max_rows = plan.tokens_per_launch * (p.num_heads / p.kv_num_heads);
  a.prefix_cost = plan.prefix_cost;
  a.context_cost = plan.context_cost;
  a.prefix_rows = plan.prefix_rows;
  a.context_rows = plan.context_rows;
  const auto log2 = [](int x) {
    int n = 0;
    while (x >> n > 1) ++n;
    return n;
  };
  a.prefix_rows_log2 = log2(plan.prefix_rows);
  a.context_rows_log2 = log2(plan.context_rows);
  a.prefix_keys_log2 = log2(plan.prefix_rows > 64 ? plan.wide_keys : kBlockKeys);
  a.context_keys_log2 = log2(plan.context_rows > 64 ? plan.wide_keys : kBlockKeys);
  a.by_group = divisor_of(a.group);
  a.by_heads = divisor_of(p.num_heads);
  a.by_kv_heads = divisor_of(p.kv_num_heads);
  a.depth = plan.depth;
  a.copies_in_flight = plan.copies_in_flight;
  a.ring_offset = plan.ring_offset;
  a.tail_rows = plan.prefix_rows;
  a.appended_before = plan.append_before;
  a.query_lines =
      index == 0 ? divide_up(int64_t{2} * p.batch * p.sequence * p.num_heads * p.head_dim, 128) : 0;
  a.new_lines =
      index == 0 ? divide_up(int64_t{2} * p.batch * p.sequence * p.kv_num_heads * p.head_dim, 128) : 0;
  a.l2_prefetch_bytes = index == 0 ? plan.l2_prefetch_bytes : 0;
  a.partial_output = reinterpret_cast<float*>(base + layout.output);
  a.partial_lse = reinterpret_cast<float*>(base + layout.lse);
  a.first_tail = 2 * p.kv_num_heads * a.max_rows;
  a.barrier = static_cast<uint32_t*>(barrier != nullptr ? barrier : base + layout.barrier);
  return a;
}

}  // namespace relay::cuda
