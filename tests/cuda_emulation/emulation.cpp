// The CUDA kernels on fibers, behind a C function that test_kernels.py calls. Not a GPU run: see
// cuda_on_host.h.
//
// Every tensor is handed to the kernels in a mapping of its own that ends at (or begins after) an
// inaccessible page, so that an access out of bounds ends the process.
#include <sys/mman.h>
#include <unistd.h>

#include <string>

#include "cuda_on_host.h"
#include "hopper.h"
#include "kernels.h"

namespace {

using namespace relay::cuda;

// Whether and how to look for data races.
cuda_on_host::Options race_options;
std::vector<cuda_on_host::ProductReads> raced;  // of each launch of the last call that looked for them
bool spoil = false;                             // Options::spoiled

class Guarded {
 public:
  Guarded(const void* content, size_t bytes, bool at_end) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t pages = (bytes + page - 1) / page;
    mapped_ = (pages + 2) * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) cuda_on_host::die("mmap failed");
    if (pages > 0) mprotect(base_ + page, pages * page, PROT_READ | PROT_WRITE);
    data = base_ + page + (at_end ? pages * page - bytes : 0);
    if (content != nullptr)
      std::memcpy(data, content, bytes);
    else
      std::memset(data, 0xff, bytes);
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  void protect_from_writes() {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page * page;
    if (bytes_ > 0)
      mprotect(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(data) + bytes_ - begin, PROT_READ);
  }

  char* data;

 private:
  size_t bytes_, mapped_;
  char* base_;
};

// As launch.cu's.
TensorMap tensor_map(const void* tensor, const RelayParams& p, int64_t heads, int64_t rows, int keys_log2) {
  if (heads == 0 || rows == 0) return TensorMap{};
  const uint64_t atom = atom_elements(p.head_dim), row_bytes = uint64_t{2} * p.head_dim;
  const uint32_t atoms = static_cast<uint32_t>(p.head_dim / atom);
  return encode_tensor_map(tensor, {atom, static_cast<uint64_t>(rows), atoms, static_cast<uint64_t>(heads)},
                           {row_bytes, 2 * atom, row_bytes * rows},
                           {static_cast<uint32_t>(atom), 1u << keys_log2, atoms, 1});
}

void run(const Kernels& kernels, const KernelArguments& arguments, const Plan& plan,
         cuda_on_host::Options options) {
  if (!plan.hopper) {
    cuda_on_host::launch(options, plan.grid, kThreads, plan.shared_bytes,
                         [&] { kernels.attention(arguments); });
    return;
  }
  const RelayParams& p = arguments.params;
  const int64_t caches = int64_t{p.batch} * p.kv_num_heads;
  const int prefix = arguments.prefix_keys_log2, context = arguments.context_keys_log2;
  const HopperArguments hopper{arguments,
                               tensor_map(p.prefix_key, p, p.kv_num_heads, p.prefix_length, prefix),
                               tensor_map(p.prefix_value, p, p.kv_num_heads, p.prefix_length, prefix),
                               tensor_map(p.present_key, p, caches, p.max_context, context),
                               tensor_map(p.present_value, p, caches, p.max_context, context)};
  const HopperKernel kernel = find_hopper_kernel(p, plan.wide_keys);
  options.hopper = true;
  cuda_on_host::launch(options, plan.grid, kHopperThreads, plan.shared_bytes, [&] { kernel(hopper); });
}

}  // namespace

static int emulate(const RelayParams* caller, const RelayTuning* tuning, int major, int sm_count,
                   size_t shared_limit, uint64_t seed, int shuffle, int copies, int guard_at_end, int dry_run,
                   int* plan_out, char* message, size_t message_size) {
  RelayParams p = *caller;
  Status status = check(p, dry_run == 0, message, message_size);
  if (status != Status::kOk) return static_cast<int>(status);
  const size_t element = 2, b = p.batch, s = p.sequence, d = p.head_dim, kv = p.kv_num_heads;
  Plan plan{};
  const DeviceLimits device{major, sm_count, shared_limit, shared_limit + 1024};
  status = make_plan(p, *tuning, device, &plan, message, message_size);
  if (status != Status::kOk) return static_cast<int>(status);
  if (plan_out != nullptr) {
    const int values[7] = {plan.prefix_rows,
                           plan.context_rows,
                           plan.depth,
                           plan.grid,
                           plan.launches,
                           plan.hopper,
                           static_cast<int>(plan.shared_bytes)};
    std::memcpy(plan_out, values, sizeof(values));
  }
  if (dry_run != 0) return 0;

  const size_t cache = b * kv * p.max_context * d * element;
  const size_t query = b * s * p.num_heads * d * element, fresh = b * s * kv * d * element;
  const size_t prefix = kv * p.prefix_length * d * element;
  const size_t angles = size_t(p.max_positions) * p.rotary_dim / 2 * element;
  const bool end = guard_at_end != 0;
  Guarded q(p.query, query, end), k(p.key, fresh, end), v(p.value, fresh, end);
  Guarded past_key(p.past_key, cache, end), past_value(p.past_value, cache, end);
  Guarded context_lens(p.context_lens, b * 4, end), query_lens(p.query_lens, b * 4, end);
  Guarded prefix_key(p.prefix_key, prefix, end), prefix_value(p.prefix_value, prefix, end);
  Guarded cosine(p.cos_cache, angles, end), sine(p.sin_cache, angles, end);
  Guarded output(nullptr, query, end);
  const bool in_place = p.past_key == p.present_key;
  // The copy that launch.cu enqueues in front when the buffers differ.
  Guarded present_key(p.past_key, cache, end), present_value(p.past_value, cache, end);
  for (Guarded* input : {&q, &k, &v, &context_lens, &query_lens, &prefix_key, &prefix_value, &cosine, &sine})
    input->protect_from_writes();
  if (!in_place) {
    past_key.protect_from_writes();
    past_value.protect_from_writes();
  }
  const RelayParams original = p;
  p.query = q.data, p.key = k.data, p.value = v.data;
  p.past_key = in_place ? present_key.data : past_key.data;
  p.past_value = in_place ? present_value.data : past_value.data;
  p.present_key = present_key.data, p.present_value = present_value.data;
  p.context_lens = reinterpret_cast<int32_t*>(context_lens.data);
  p.query_lens = reinterpret_cast<int32_t*>(query_lens.data);
  p.prefix_key = prefix_key.data, p.prefix_value = prefix_value.data;
  p.cos_cache = cosine.data, p.sin_cache = sine.data;
  p.output = output.data;

  cuda_on_host::Options options = race_options;
  options.seed = seed, options.shuffle = shuffle != 0, options.copies = copies;
  const Kernels kernels = find_kernels(p, plan);
  if (tuning->algorithm == 1) {
    if (p.scale == 0) p.scale = 1 / std::sqrt(static_cast<float>(p.head_dim));
    cuda_on_host::launch(options, 3, kThreads, 0, [&] { kernels.append(p); });
    cuda_on_host::launch(options, p.batch * p.sequence * p.num_heads, 32, 0,
                         [&] { kernels.reference_attention(p); });
  } else {
    const size_t size = plan_workspace(p, plan).total;
    if (size > workspace_bytes(p, sm_count)) cuda_on_host::die("workspace_bytes is too small for the plan");
    Guarded workspace(nullptr, size, end), barrier(nullptr, kBarrierBytes, end);
    uint32_t* words = reinterpret_cast<uint32_t*>(barrier.data);
    std::memset(words, 0, kBarrierBytes);
    words[0] = static_cast<uint32_t>(seed) << 31;  // the top bit may be either
    if (plan.append_before) cuda_on_host::launch(options, 3, kThreads, 0, [&] { kernels.append(p); });
    for (int i = 0; i < plan.launches; ++i) {
      if (options.races) {
        if (i == 0) raced.clear();
        raced.emplace_back();
        options.raced = &raced.back();
      }
      options.spoiled = spoil ? &raced.at(i) : nullptr;
      run(kernels, kernel_arguments(p, plan, i, workspace.data, words), plan, options);
      if (words[0] << 1 != 0) cuda_on_host::die("the barrier is not ready for the next launch");
    }
  }
  std::memcpy(original.output, output.data, query);
  std::memcpy(original.present_key, present_key.data, cache);
  std::memcpy(original.present_value, present_value.data, cache);
  return 0;
}

// major: compute capability; 9 lets make_plan choose the Hopper kernel. dry_run: only check and plan.
// plan_out (may be null): [prefix_rows, context_rows, depth, grid, launches, hopper, shared_bytes].
extern "C" int relay_emulate(const RelayParams* caller, const RelayTuning* tuning, int major, int sm_count,
                             size_t shared_limit, uint64_t seed, int shuffle, int copies, int guard_at_end,
                             int dry_run, int* plan_out, char* message, size_t message_size) {
  try {
    return emulate(caller, tuning, major, sm_count, shared_limit, seed, shuffle, copies, guard_at_end,
                   dry_run, plan_out, message, message_size);
  } catch (const std::exception& e) {
    std::snprintf(message, message_size, "%s", e.what());
    return -1;
  }
}

// What later calls do about data races. mode 0: nothing; 1: look for them; 2: spoil those reads of products
// that raced in the last call, whose arguments and seed this one must have. disregarded and equal_writes: of
// cuda_on_host::Options. Needs the library that conftest.py builds for it. Returns the reads that raced.
extern "C" size_t relay_emulate_races(int mode, unsigned disregarded, int equal_writes) {
  race_options.races = mode == 1;
  spoil = mode == 2;
  race_options.disregarded = disregarded;
  race_options.equal_writes = equal_writes != 0;
  size_t reads = 0;
  for (const cuda_on_host::ProductReads& launch : raced) reads += launch.size();
  return reads;
}

extern "C" size_t relay_emulate_workspace_bytes(const RelayParams* p, int sm_count) {
  return workspace_bytes(*p, sm_count);
}
