// Small kernels with and without a data race in shared memory: what the race detector (races.h) must find,
// and what it must not. Compiled as the kernels are for it.
#include <string>

#include "hopper_on_host.h"

namespace {

using namespace relay::cuda;

// Byte offsets in shared memory: two barriers, words, a matrix.
constexpr int kBarrier = 0, kWords = 16, kMatrix = 1024, kRows = 64, kBytes = kRows * 128;

int* words() { return reinterpret_cast<int*>(dynamic_shared() + kWords); }
SharedAddress at(int offset) { return shared_address(dynamic_shared()) + offset; }
SharedAddress barrier(int number = 0) { return at(kBarrier + 8 * number); }
int lane() { return threadIdx.x % 32; }
int warp() { return threadIdx.x / 32; }

void start(int arrivals) {
  if (threadIdx.x == 0) {
    barrier_init(barrier(0), arrivals);
    barrier_init(barrier(1), arrivals);
  }
  __syncthreads();
}

uint16_t source[kRows][64];
void fill(const TensorMap& map) {
  barrier_expect(barrier(), kBytes);
  tensor_copy(at(kMatrix), &map, 0, 0, 0, 0, barrier(), false);
}
void multiply(float (&c)[32]) {
  product_begin();
  multiply_keys<Float16, false>(c, matrix_descriptor<128>(at(kMatrix), 16),
                                matrix_descriptor<128>(at(kMatrix), 16));
  product_commit();
}

// Reads what it must not keep from being optimised away.
volatile int sink;
uint32_t there;  // in global memory, which orders nothing here

void test(const std::string& name, bool proper) {
  const TensorMap map = encode_tensor_map(source, {64, kRows, 1, 1}, {128, 128, kBytes}, {64, kRows, 1, 1});
  int threads = 64;
  std::function<void()> kernel;
  if (name == "block") {
    kernel = [=] {
      words()[threadIdx.x] = 1;
      if (proper) __syncthreads();
      sink = words()[63 - threadIdx.x];
    };
  } else if (name == "write after read") {
    kernel = [=] {
      words()[threadIdx.x] = 1;
      __syncthreads();
      sink = words()[63 - threadIdx.x];
      if (proper) __syncthreads();
      words()[threadIdx.x] = 2;
    };
  } else if (name == "warp") {
    kernel = [=] {
      words()[threadIdx.x] = lane();
      if (proper) __syncwarp();
      sink = words()[threadIdx.x ^ 1];
    };
  } else if (name == "shuffle is no barrier") {
    kernel = [=] {
      words()[threadIdx.x] = lane();
      if (proper)
        __syncwarp();
      else
        __shfl_sync(~0u, 0, 0);
      sink = words()[threadIdx.x ^ 1];
    };
  } else if (name == "warp is not block") {
    kernel = [=] {
      words()[threadIdx.x] = lane();
      __syncwarp();
      sink = words()[proper ? threadIdx.x ^ 1 : threadIdx.x ^ 32];
    };
  } else if (name == "one lane arrives for its warp") {  // merge rows and fresh rows in hopper.cuh
    kernel = [=] {
      start(1);
      if (warp() == 0) {
        words()[lane()] = lane();
        if (proper) __syncwarp();
        if (lane() == 0) barrier_arrive(barrier(), 1);
      } else {
        barrier_wait(barrier(), 0);
        sink = words()[lane()];
      }
    };
  } else if (name == "no wait") {
    kernel = [=] {
      start(32);
      if (warp() == 0) {
        words()[lane()] = lane();
        barrier_arrive(barrier(), 1);
      } else {
        if (proper) barrier_wait(barrier(), 0);
        sink = words()[lane()];
      }
    };
  } else if (name == "arrival before the write") {
    kernel = [=] {
      start(32);
      if (warp() == 0) {
        if (!proper) barrier_arrive(barrier(), 1);
        words()[lane()] = lane();
        if (proper) barrier_arrive(barrier(), 1);
      } else {
        barrier_wait(barrier(), 0);
        sink = words()[lane()];
      }
    };
  } else if (name == "phase before") {
    kernel = [=] {
      start(32);
      if (warp() == 0) {
        barrier_arrive(barrier(), 1);
        barrier_wait(barrier(1), 0);
        words()[lane()] = lane();
        barrier_arrive(barrier(), 1);
      } else {
        barrier_wait(barrier(), 0);
        barrier_arrive(barrier(1), 1);
        if (proper) barrier_wait(barrier(), 1);
        sink = words()[lane()];
      }
    };
  } else if (name == "barrier not known yet") {
    kernel = [=] {
      if (threadIdx.x == 0) barrier_init(barrier(), 32);
      if (threadIdx.x == 0) there = 1;
      while (!proper && load_acquire(&there) == 0) {
      }
      if (proper) __syncthreads();
      if (warp() == 0) barrier_arrive(barrier(), 1);
    };
  } else if (name == "named barrier") {  // scratch in merge.cuh
    threads = 384;
    kernel = [=] {
      if (warp() < 8) {
        if (lane() == 0) words()[warp()] = 1;
        if (proper) consumer_barrier();
        sink = words()[7 - warp()];
      }
    };
  } else if (name == "another named barrier") {
    threads = 256;
    kernel = [=] {
      words()[threadIdx.x] = 1;
      if (proper)
        consumer_barrier();
      else
        warpgroup_barrier(threadIdx.x / 128);
      sink = words()[255 - threadIdx.x];
    };
  } else if (name == "halves of a word") {
    kernel = [=] {
      uint16_t* halves = reinterpret_cast<uint16_t*>(words());
      halves[threadIdx.x] = 1;
      sink = halves[proper ? threadIdx.x : threadIdx.x ^ 1];
    };
  } else if (name == "struct") {
    kernel = [=] {
      struct Row {
        int x[9];
      };
      Row* rows = reinterpret_cast<Row*>(words());
      Row row{};
      row.x[3] = static_cast<int>(threadIdx.x);
      if (threadIdx.x < 8) rows[threadIdx.x] = row;
      if (proper) __syncthreads();
      const Row copy = rows[threadIdx.x % 8];
      sink = copy.x[lane() % 9];
    };
  } else if (name == "sixteen bytes") {
    kernel = [=] {
      store_shared_16(at(kMatrix + threadIdx.x * 16), make_uint4(1, 2, 3, threadIdx.x));
      if (proper) __syncthreads();
      sink = load_shared_16(at(kMatrix + (63 - threadIdx.x) * 16)).w;
    };
  } else if (name == "equal writes") {
    kernel = [=] {
      store_shared_16(at(kMatrix), make_uint4(1, 2, 3, proper ? 4 : warp()));
      __syncthreads();
    };
  } else if (name == "own copy") {
    kernel = [=] {
      copy_async_16(at(kMatrix + threadIdx.x * 16), source[0], true);
      copy_async_commit();
      if (proper) copy_async_wait<0>();
      sink = load_shared_16(at(kMatrix + threadIdx.x * 16)).x;
      copy_async_wait<0>();
    };
  } else if (name == "others' copies") {
    kernel = [=] {
      copy_async_16(at(kMatrix + threadIdx.x * 16), source[0], true);
      copy_async_commit();
      if (!proper) __syncthreads();
      copy_async_wait<0>();
      if (proper) __syncthreads();
      sink = load_shared_16(at(kMatrix + (63 - threadIdx.x) * 16)).x;
    };
  } else if (name == "tensor copy") {
    kernel = [=] {
      start(1);
      if (threadIdx.x == 0) fill(map);
      if (proper || threadIdx.x != 7) barrier_wait(barrier(), 0);
      sink = load_shared_16(at(kMatrix + threadIdx.x * 16)).x;
      barrier_wait(barrier(), 0);
    };
  } else if (name == "tensor copy over what is read") {
    kernel = [=] {
      start(1);
      store_shared_16(at(kMatrix + threadIdx.x * 16), make_uint4(0, 0, 0, 0));
      shared_write_fence();
      if (proper) __syncthreads();
      if (threadIdx.x == 0) fill(map);
      barrier_wait(barrier(), 0);
    };
  } else {
    cuda_on_host::die("no such test");
  }
  cuda_on_host::Options options;
  options.hopper = options.races = true;
  for (options.seed = 0; options.seed < 4; ++options.seed)
    for (options.copies = 0; options.copies < 3; ++options.copies, there = 0)
      cuda_on_host::launch(options, 1, threads, kMatrix + kBytes, kernel);
}

// A product, and what is written over its operand before the warp has waited for it.
void test_product(bool proper) {
  const TensorMap map = encode_tensor_map(source, {64, kRows, 1, 1}, {128, 128, kBytes}, {64, kRows, 1, 1});
  cuda_on_host::Options options;
  cuda_on_host::ProductReads raced;
  options.hopper = options.races = true;
  options.raced = &raced;
  cuda_on_host::launch(options, 1, 256, kMatrix + kBytes, [=] {
    start(4);
    if (warp() < 4) {
      float c[32];
      multiply(c);
      if (!proper && lane() == 0) barrier_arrive(barrier(), 1);
      product_wait<0>();
      if (proper && lane() == 0) barrier_arrive(barrier(), 1);
    } else if (threadIdx.x == 128) {
      barrier_wait(barrier(), 0);
      for (int i = 0; i < 3; ++i) barrier_arrive(barrier(1), 1);
      barrier_expect(barrier(1), kBytes);
      tensor_copy(at(kMatrix), &map, 0, 0, 0, 0, barrier(1), false);
      barrier_wait(barrier(1), 0);
    }
  });
  if (!raced.empty()) cuda_on_host::die("products raced");
}

}  // namespace

// arguments: the name of a kernel, whether it is to be proper
int main(int, char** arguments) {
  try {
    const std::string name = arguments[1];
    const bool proper = std::string(arguments[2]) == "proper";
    if (name == "product")
      test_product(proper);
    else
      test(name, proper);
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  return 0;
}
