// plugins/cuda/launch.h over tests/cuda_emulation: the kernels' own source, thread by thread on the CPU. Not
// a GPU run. check() and workspace_bytes() are the kernels' own, from the emulation library.
#include "plugins/cuda/launch.h"

extern "C" int relay_emulate(const relay::cuda::RelayParams* params, const relay::cuda::RelayTuning* tuning,
                             int major, int sm_count, size_t shared_limit, uint64_t seed, int shuffle,
                             int copies, int guard_at_end, int dry_run, int* plan_out, char* message,
                             size_t message_size);

static int launches_with_barrier = 0;
extern "C" __attribute__((visibility("default"))) int host_launches_with_barrier() {
  return launches_with_barrier;
}

namespace relay::cuda {

int sm_count() { return 4; }

Status launch(const RelayParams& params, const RelayTuning& tuning, void* workspace, size_t workspace_size,
              void* barrier, CUstream_st*, char* message, size_t message_size) {
  if (!workspace || workspace_size < workspace_bytes(params, sm_count())) return Status::kWorkspaceTooSmall;
  launches_with_barrier += barrier != nullptr;
  constexpr size_t kSharedBytesOfSm90 = 227 << 10;
  return static_cast<Status>(relay_emulate(&params, &tuning, 9, sm_count(), kSharedBytesOfSm90, 1, 1, 0, 1, 0,
                                           nullptr, message, message_size));
}

}  // namespace relay::cuda
