// Small kernels that the emulated machine must refuse, or compute: it is what test_kernels.py relies on.
#include <string>

#include "hopper_on_host.h"

namespace {

using namespace relay::cuda;

constexpr int kRows = 64, kBytes = kRows * 128;

// Byte offsets in shared memory: two operands and a barrier.
constexpr int kA = 0, kB = kBytes, kBarrier = 2 * kBytes;

SharedAddress at(int offset) { return shared_address(dynamic_shared()) + offset; }

// A float16 matrix [64, 64] of small whole numbers, so that products are exact.
uint16_t source[kRows][64];
float element(int row, int column) { return static_cast<float>((row * 7 + column * 3) % 32) - 15; }

TensorMap map() {
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < 64; ++c) source[r][c] = static_cast<uint16_t>(Float16::pack(element(r, c), 0));
  return encode_tensor_map(source, {64, kRows, 1, 1}, {128, 128, kBytes}, {64, kRows, 1, 1});
}

void launch(int threads, const std::function<void()>& kernel) {
  cuda_on_host::Options options;
  options.hopper = true;
  for (options.seed = 0; options.seed < 8; ++options.seed)
    for (options.copies = 0; options.copies < 3; ++options.copies)
      cuda_on_host::launch(options, 1, threads, kBarrier + 16, kernel);
}

void fill(int offset, const TensorMap& tensor) {
  if (threadIdx.x == 0) {
    barrier_expect(at(kBarrier), kBytes);
    tensor_copy(at(offset), &tensor, 0, 0, 0, 0, at(kBarrier), false);
  }
}
void start(int arrivals) {
  if (threadIdx.x == 0) barrier_init(at(kBarrier), arrivals);
  __syncthreads();
}

// Of an accumulator.
int row_of(int i) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

void check_keys(const float (&c)[32]) {
  for (int i = 0; i < 32; ++i) {
    float want = 0;
    for (int k = 0; k < 64; ++k) want += element(row_of(i), k) * element(column_of(i), k);
    if (c[i] != want) cuda_on_host::die("a product of keys is wrong");
  }
}

void test(const std::string& name) {
  const TensorMap tensor = map();
  const auto keys = [](float (&c)[32]) {
    product_begin();
    multiply_keys<Float16, false>(c, matrix_descriptor<128>(at(kA), 16), matrix_descriptor<128>(at(kA), 16));
    for (int k = 1; k < 4; ++k)
      multiply_keys<Float16, true>(c, matrix_descriptor<128>(at(kA + k * 32), 16),
                                   matrix_descriptor<128>(at(kA + k * 32), 16));
    product_commit();
  };
  if (name == "products") {
    launch(128, [&] {
      start(1);
      fill(kA, tensor);
      barrier_wait(at(kBarrier), 0);
      float c[32], d[32] = {};
      keys(c);
      product_wait<0>();
      product_pin(c);
      check_keys(c);
      // an identity of 16 rows for each warp: row r of the product is row r % 16 + 16 of the values
      const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4 * 2;
      const auto one = [&](int row, int column) { return Float16::pack(row == column, row == column + 1); };
      const uint32_t a[4] = {one(g, t), one(g + 8, t), one(g, t + 8), one(g + 8, t + 8)};
      product_begin();
      multiply_values<Float16>(d, a, matrix_descriptor<128>(at(kA + 16 * 128), kBytes), 1);
      product_commit();
      product_wait<0>();
      for (int i = 0; i < 32; ++i)
        if (d[i] != element(row_of(i) % 16 + 16, column_of(i)))
          cuda_on_host::die("a product of values is wrong");
    });
  } else if (name == "results before the wait") {
    launch(128, [&] {
      start(1);
      fill(kA, tensor);
      barrier_wait(at(kBarrier), 0);
      float c[32];
      keys(c);
      check_keys(c);
      product_wait<0>();
    });
  } else if (name == "a changed operand") {
    launch(128, [&] {
      start(1);
      fill(kA, tensor);
      barrier_wait(at(kBarrier), 0);
      float c[32] = {};
      uint32_t a[4] = {};
      product_begin();
      multiply_values<Float16>(c, a, matrix_descriptor<128>(at(kA), kBytes), 1);
      product_commit();
      a[1] = 1;
      product_wait<0>();
    });
  } else if (name == "no fence") {
    launch(128, [&] {
      for (int i = threadIdx.x; i < kBytes / 16; i += 128)
        store_shared_16(at(kA + i * 16), make_uint4(0, 0, 0, 0));
      __syncthreads();
      float c[32];
      keys(c);
      product_wait<0>();
      if (!(c[0] == 0)) cuda_on_host::die("not fenced");
    });
  } else if (name == "deadlock") {
    launch(64, [&] {
      start(2);
      if (threadIdx.x == 0) barrier_arrive(at(kBarrier), 1);
      barrier_wait(at(kBarrier), 0);
    });
  } else if (name == "too many arrivals") {
    launch(64, [&] {
      start(1);
      barrier_expect(at(kBarrier), 16);
    });
  } else if (name == "too many bytes") {
    launch(64, [&] {
      start(2);
      if (threadIdx.x == 0) {
        barrier_expect(at(kBarrier), kBytes - 16);
        tensor_copy(at(kA), &tensor, 0, 0, 0, 0, at(kBarrier), false);
      }
      barrier_wait(at(kBarrier), 0);
    });
  } else if (name == "a copy nobody waits for") {
    launch(32, [&] {
      start(1);
      fill(kA, tensor);
    });
  } else if (name == "a barrier overwritten") {
    launch(32, [&] {
      start(1);
      store_shared_16(at(kBarrier), make_uint4(1, 2, 3, 4));
      barrier_wait(at(kBarrier), 0);
    });
  } else if (name == "different products") {
    launch(128, [&] {
      start(1);
      fill(kA, tensor);
      barrier_wait(at(kBarrier), 0);
      float c[32];
      if (threadIdx.x < 96) keys(c);
      product_wait<0>();
    });
  } else {
    cuda_on_host::die("no such test");
  }
}

}  // namespace

int main(int, char** arguments) {
  try {
    test(arguments[1]);
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  return 0;
}
