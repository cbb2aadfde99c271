// The host twin of plugins/cuda/hopper_ptx.cuh, on the machine of cuda_on_host.h.
//
// Shared memory is laid out to the byte as on the chip: copies swizzle it by its addresses, and products find
// their operands through descriptors of the same bits. Made to hurt:
// - copies land as Options::copies says, late ones in any order;
// - products read shared memory when they are issued, or not before they are waited for; until then their
//   results are NaN, and what ordinary code wrote without a fence behind it is NaN to them;
// - a warp's products do not wait for those of its warpgroup, but all four must issue the same;
// - a barrier in shared memory ends the launch when more arrives than it expects.
#pragma once

#include <deque>
#include <limits>

#include "cuda_on_host.h"

namespace cuda_on_host {

// ---- barriers in shared memory: all their state is in the 8 bytes ----
struct SharedBarrier {
  static constexpr uint64_t kMagic = 0x5ba11;
  uint64_t magic : 20, parity : 1, expected : 11, pending : 11, bytes : 21;

  static SharedBarrier load(const char* address) {
    const Unseen unseen;
    SharedBarrier b;
    static_assert(sizeof(b) == 8);
    std::memcpy(&b, address, 8);
    if (b.magic != kMagic) die("this is no barrier in shared memory, or it has been overwritten");
    return b;
  }
  // Ends the phase when all is there.
  void store(char* address) {
    const Unseen unseen;
    Machine& m = *machine();
    if (pending == 0 && bytes == 0) {
      parity ^= 1;
      pending = expected;
      ++m.progress;
      if (Races* r = races()) r->end_phase(shared_offset(address));
      for (Thread& t : m.block->threads)
        if (t.state == State::kAtBarrier && t.waits_for == address) t.state = State::kReady;
    }
    std::memcpy(address, this, 8);
  }
};

inline void check_shared(const char* address, size_t bytes, size_t alignment) {
  const Block& block = *machine()->block;
  if (address < block.shared_base || address + bytes > block.shared_base + block.shared_bytes)
    die("an address outside the block's shared memory");
  if ((address - block.shared_base) % alignment != 0) die("an address in shared memory is not aligned");
}

[[gnu::always_inline]] inline void arrive(char* address, uint32_t arrivals, uint32_t bytes) {
  check_shared(address, 8, 8);
  if (Races* r = races()) r->arrive(machine()->thread, shared_offset(address), here());
  SharedBarrier b = SharedBarrier::load(address);
  if (arrivals == 0 || arrivals > b.pending) die("more arrivals at a barrier than it expects");
  if (b.bytes + bytes >= 1 << 20) die("too many bytes expected at a barrier");
  b.bytes += bytes;
  b.pending -= arrivals;
  b.store(address);
}

// Lets others run, now and then.
inline void preempt() {
  Machine& m = *machine();
  if (m.chance(8)) leave(m.random() % 8 == 0 ? State::kPaused : State::kYielded);
}

// Waits for so many threads at the named barrier.
inline void meet(int name, int threads) {
  Machine& m = *machine();
  Block& block = *m.block;
  if (++block.at_meeting[name] < threads) {
    m.current().waits_for = block.shared_base + name;
    leave(State::kAtMeeting);
    return;
  }
  block.at_meeting[name] = 0;
  ++m.progress;
  std::vector<int> met{m.thread};
  for (size_t i = 0; i < block.threads.size(); ++i) {
    Thread& t = block.threads[i];
    if (t.state != State::kAtMeeting || t.waits_for != block.shared_base + name) continue;
    t.state = State::kReady;
    met.push_back(static_cast<int>(i));
  }
  if (Races* r = races()) r->meet(met, kByNamedBarrier << name);
}

// ---- shared memory as the copy engine and the products see it ----
// Where the dynamic shared memory begins on the chip; a multiple of the swizzle pattern.
constexpr uint32_t kWindow = 1024;

// Byte address -> byte address: 16-byte chunks are permuted by the row in a pattern of eight rows.
inline uint32_t swizzled(uint32_t address, int row_bytes) {
  return row_bytes == 128 ? address ^ (address >> 7 & 7) << 4 : address ^ (address >> 7 & 3) << 4;
}

// 16 bytes as a product reads them: NaN where ordinary code wrote and no fence followed.
inline void read_piece(uint32_t address, uint16_t (&piece)[8]) {
  const Unseen unseen;
  const Block& block = *machine()->block;
  const char* from = block.shared_base + address - kWindow;
  check_shared(from, 16, 16);
  if (!block.pieces[(address - kWindow) / 16].fenced)
    std::memset(piece, 0x7f, 16);
  else
    std::memcpy(piece, from, 16);
}

// ---- products of a warpgroup, warp by warp ----
struct Product {
  void (*execute)(struct Products&, Product&);
  bool values;      // a from registers, b's rows in shared memory; else rows of both in shared memory
  bool accumulate;  // else c is overwritten
  int columns;
  uint64_t a, b;  // descriptors
  int accumulator;
  int group;
  int number;     // of those of the warp
  int lanes = 0;  // that have issued it
  bool done = false;
  const void* where = nullptr;  // it was issued
  uint32_t registers[32][4];
  const uint32_t* sources[32];
};

// Registers that products are adding to.
struct Accumulator {
  bool used = false;
  int columns;
  int pending = 0;  // products
  float* homes[32];
  float rows[16][128];
};

struct Products : WarpState {
  std::deque<Product> queue;
  std::vector<Accumulator> accumulators{4};
  int issued[32] = {}, groups[32] = {};
  bool begun[32] = {};
  int first = 0;  // number of the queue's first product
  int warp = 0;
  std::vector<uint64_t>* agreed = nullptr;  // what the warpgroup issues

  void finish() override {
    if (!queue.empty()) die("a warp ended with products under way");
    for (int i = 0; i < 32; ++i)
      if (issued[i] != static_cast<int>(agreed->size())) die("a warpgroup did not issue the same products");
  }
  // Executes all up to this number.
  void execute(int through) {
    for (int i = 0; i < through - first; ++i) {
      if (queue[i].done) continue;
      queue[i].execute(*this, queue[i]);
      queue[i].done = true;
    }
  }
};

inline Products& products() {
  Machine& m = *machine();
  Warp& warp = m.warp();
  if (warp.state == nullptr) {
    auto state = std::make_shared<Products>();
    state->warp = m.thread / 32 % 4;
    state->agreed = &m.block->products[m.thread / 128];
    warp.state = state;
  }
  return static_cast<Products&>(*warp.state);
}

// c[4n + i] of a lane is row g + i / 2 * 8, column 8n + 2t + i % 2, as in multiply_accumulate.
template <class Visit>
inline void each_element(int lane, int columns, Visit visit) {
  for (int i = 0; i < columns / 2; ++i) visit(i, lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2);
}

struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  int row_bytes;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        row_bytes(bits >> 62 == 1 ? 128 : 64) {
    if (bits >> 62 != 1 && bits >> 62 != 2) die("a matrix descriptor of another swizzle");
    if ((bits >> 49 & 7) != 0 || start % (8 * row_bytes) >= static_cast<uint32_t>(row_bytes))
      die("a matrix does not start with the first row of a swizzle pattern");
  }
  // 16-byte chunk of a row of 16 elements that a product multiplies with another such (K-major).
  uint32_t of_row(int row, int chunk) const {
    return swizzled(start + row / 8 * stride + row % 8 * row_bytes + chunk * 16, row_bytes);
  }
  // Columns 8 * chunk.. of the row whose elements multiply element `row` of another's (MN-major).
  uint32_t across(int row, int chunk) const {
    const int chunks = row_bytes / 16;
    return swizzled(
        start + chunk / chunks * leading + row / 8 * stride + row % 8 * row_bytes + chunk % chunks * 16,
        row_bytes);
  }
};

template <class T>
inline void execute_product(Products& all, Product& p) {
  const auto read = [&p](uint32_t address, float* to, int step) {
    uint16_t piece[8];
    read_piece(address, piece);
    const Machine& m = *machine();
    if (m.options.spoiled != nullptr && m.options.spoiled->count(product_read_key(
                                            m.block_index.x, m.thread / 32, p.number, address - kWindow)) > 0)
      std::fill(piece, piece + 8, 0x7fff);  // a NaN of both types
    for (int i = 0; i < 8; ++i) to[i * step] = T::unpack(piece[i]).x;
  };
  float a[16][16], b[16][128];  // b: [k, column]
  const Descriptor of_b(p.b);
  if (p.values) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const float2 x = T::unpack(p.registers[lane][i]);
        float* to = &a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8];
        to[0] = x.x, to[1] = x.y;
      }
    for (int k = 0; k < 16; ++k)
      for (int chunk = 0; chunk < p.columns / 8; ++chunk) read(of_b.across(k, chunk), &b[k][chunk * 8], 1);
  } else {
    const Descriptor of_a(p.a);
    for (int row = 0; row < 16; ++row)
      for (int chunk = 0; chunk < 2; ++chunk)
        read(of_a.of_row(all.warp * 16 + row, chunk), &a[row][chunk * 8], 1);
    for (int column = 0; column < p.columns; ++column)
      for (int chunk = 0; chunk < 2; ++chunk) read(of_b.of_row(column, chunk), &b[chunk * 8][column], 128);
  }
  auto& c = all.accumulators[p.accumulator].rows;
  for (int row = 0; row < 16; ++row) {
    if (!p.accumulate) std::fill(c[row], c[row] + p.columns, 0.0f);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < p.columns; n += 8)
        for (int i = 0; i < 8; ++i) c[row][n + i] += a[row][k] * b[k][n + i];
  }
}

// Bytes of shared memory that a warp's product reads, by pieces of 16.
template <class Visit>
inline void each_piece(const Product& p, int warp, Visit visit) {
  const Descriptor of_b(p.b);
  if (p.values) {
    for (int k = 0; k < 16; ++k)
      for (int chunk = 0; chunk < p.columns / 8; ++chunk) visit(of_b.across(k, chunk));
    return;
  }
  const Descriptor of_a(p.a);
  for (int chunk = 0; chunk < 2; ++chunk) {
    for (int row = 0; row < 16; ++row) visit(of_a.of_row(warp * 16 + row, chunk));
    for (int column = 0; column < p.columns; ++column) visit(of_b.of_row(column, chunk));
  }
}

inline void issue(Product mine, float* c, const uint32_t* registers) {
  Machine& m = *machine();
  Products& all = products();
  const int lane = m.thread % 32, number = all.issued[lane]++;
  if (!all.begun[lane]) die("a product without product_begin since the last wait");
  mine.group = all.groups[lane];
  mine.number = number;

  int index = -1;
  for (int i = 0; i < static_cast<int>(all.accumulators.size()); ++i)
    if (all.accumulators[i].used && all.accumulators[i].homes[lane] == c) index = i;
  if (number == all.first + static_cast<int>(all.queue.size())) {  // the first lane
    if (index < 0) {
      for (index = 0; all.accumulators.at(index).used;) ++index;
      all.accumulators[index].used = true;
      all.accumulators[index].columns = mine.columns;
      std::fill(all.accumulators[index].homes, all.accumulators[index].homes + 32, nullptr);
    }
    ++all.accumulators[index].pending;
    mine.accumulator = index;
    all.queue.push_back(mine);
    const uint64_t signature =
        ((mine.b * 31 + mine.a) * 31 + mine.group) * 4 + mine.values * 2 + mine.accumulate;
    if (number == static_cast<int>(all.agreed->size())) all.agreed->push_back(signature);
    if ((*all.agreed)[number] != signature) die("the warps of a warpgroup issue different products");
  }
  Product& p = all.queue.at(number - all.first);
  Accumulator& accumulator = all.accumulators[p.accumulator];
  if (p.a != mine.a || p.b != mine.b || p.values != mine.values || p.columns != mine.columns ||
      p.accumulate != mine.accumulate || p.group != mine.group || (index >= 0 && index != p.accumulator))
    die("the lanes of a warp issue different products");
  if (accumulator.homes[lane] == nullptr) {
    accumulator.homes[lane] = c;
    each_element(lane, p.columns, [&](int i, int row, int column) { accumulator.rows[row][column] = c[i]; });
    std::fill(c, c + p.columns / 2, std::numeric_limits<float>::quiet_NaN());
  }
  if (registers != nullptr) std::memcpy(p.registers[lane], registers, 16);
  p.sources[lane] = registers;
  if (++p.lanes < 32) return;
  if (Races* r = races())
    each_piece(p, all.warp,
               [&](uint32_t piece) { r->product_read(m.thread / 32, number, piece - kWindow, 16, p.where); });
  if (m.chance(2)) all.execute(number + 1);
}

// Returns when all but the latest `pending` committed groups of the warp are done.
inline void wait_for_products(int pending) {
  int none = 0;
  collective(32 + pending, none, [&](int**) {
    Products& all = products();
    for (int i = 1; i < 32; ++i)
      if (all.issued[i] != all.issued[0] || all.groups[i] != all.groups[0])
        die("the lanes of a warp issued different products");
    while (!all.queue.empty() && all.queue.front().group < all.groups[0] - pending) {
      all.execute(all.first + 1);
      const Product& p = all.queue.front();
      if (p.values)
        for (int lane = 0; lane < 32; ++lane)
          if (std::memcmp(p.registers[lane], p.sources[lane], 16) != 0)
            die("an operand in registers changed while a product was under way");
      Accumulator& accumulator = all.accumulators[p.accumulator];
      if (--accumulator.pending == 0) {
        for (int lane = 0; lane < 32; ++lane)
          each_element(lane, accumulator.columns, [&](int i, int row, int column) {
            accumulator.homes[lane][i] = accumulator.rows[row][column];
          });
        accumulator.used = false;
      }
      all.queue.pop_front();
      ++all.first;
    }
    if (Races* r = races()) r->products_waited_for(machine()->thread / 32, all.first);
    std::fill(all.begun, all.begun + 32, false);
  });
}

}  // namespace cuda_on_host

namespace relay::cuda {

// [c3, c2, c1, c0] elements of two bytes; strides in bytes, that of c0 is two.
struct TensorMap {
  const char* base;  // null: of an empty tensor
  int64_t sizes[4];
  int64_t strides[4];
  int box[4];
};

// As cuTensorMapEncodeTiled refuses. strides: of dimensions 1..3.
inline TensorMap encode_tensor_map(const void* base, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                                   const uint32_t (&box)[4]) {
  TensorMap map{static_cast<const char*>(base), {}, {2, 0, 0, 0}, {}};
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) cuda_on_host::die("a tensor map's base is not aligned");
  for (int i = 0; i < 4; ++i) {
    map.sizes[i] = static_cast<int64_t>(sizes[i]);
    map.box[i] = static_cast<int>(box[i]);
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256)
      cuda_on_host::die("a tensor map's size or box is out of range");
    if (i == 0) continue;
    map.strides[i] = static_cast<int64_t>(strides[i - 1]);
    if (strides[i - 1] % 16 != 0 || strides[i - 1] >= uint64_t{1} << 40)
      cuda_on_host::die("a tensor map's stride is out of range");
  }
  if (box[0] != 64 && box[0] != 32) cuda_on_host::die("rows are swizzled that have not 128 or 64 bytes");
  return map;
}

// ---- barriers ----
[[gnu::always_inline]] inline void barrier_init(SharedAddress barrier, uint32_t arrivals) {
  cuda_on_host::check_shared(barrier, 8, 8);
  report(barrier, 8, true);
  const cuda_on_host::Unseen unseen;
  // A new launch's shared memory is all ones.
  for (int i = 0; i < 8; ++i)
    if (barrier[i] != '\xff') cuda_on_host::die("a barrier where something else lies");
  if (arrivals == 0 || arrivals > 2047) cuda_on_host::die("a barrier of too many arrivals");
  const cuda_on_host::SharedBarrier b{cuda_on_host::SharedBarrier::kMagic, 0, arrivals, arrivals, 0};
  std::memcpy(barrier, &b, 8);
}
inline void barrier_init_fence() {}
[[gnu::always_inline]] inline void barrier_expect(SharedAddress barrier, uint32_t bytes) {
  cuda_on_host::preempt();
  cuda_on_host::arrive(barrier, 1, bytes);
}
[[gnu::always_inline]] inline void barrier_arrive(SharedAddress barrier, uint32_t arrivals) {
  cuda_on_host::preempt();
  cuda_on_host::arrive(barrier, arrivals, 0);
  cuda_on_host::preempt();
}
[[gnu::always_inline]] inline void barrier_wait(SharedAddress barrier, uint32_t parity) {
  cuda_on_host::check_shared(barrier, 8, 8);
  if (parity > 1) cuda_on_host::die("a parity is 0 or 1");
  cuda_on_host::preempt();
  while (cuda_on_host::SharedBarrier::load(barrier).parity == parity) {
    cuda_on_host::machine()->current().waits_for = barrier;
    cuda_on_host::leave(cuda_on_host::State::kAtBarrier);
  }
  if (cuda_on_host::Races* races = cuda_on_host::races())
    races->wait(cuda_on_host::machine()->thread, cuda_on_host::shared_offset(barrier), cuda_on_host::here());
}

// ---- copies ----
inline void prefetch_l2_bulk(const void* address, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0 || bytes % 16 != 0)
    cuda_on_host::die("a bulk prefetch is not aligned");
  prefetch_l2(address);
  prefetch_l2(static_cast<const char*>(address) + bytes - 1);
}

inline void land_tensor(const TensorMap& map, SharedAddress target, const int (&at)[4], SharedAddress barrier,
                        uint32_t number) {
  const cuda_on_host::Unseen unseen;
  cuda_on_host::Block& block = *cuda_on_host::machine()->block;
  const int row_bytes = map.box[0] * 2;
  uint32_t address = static_cast<uint32_t>(target - block.shared_base) + cuda_on_host::kWindow;
  for (int i3 = 0; i3 < map.box[3]; ++i3)
    for (int i2 = 0; i2 < map.box[2]; ++i2)
      for (int i1 = 0; i1 < map.box[1]; ++i1)
        for (int i0 = 0; i0 < map.box[0]; i0 += 8, address += 16) {
          const int64_t c[4] = {at[0] + i0, at[1] + i1, at[2] + i2, at[3] + i3};
          bool inside = true;
          int64_t offset = 0;
          for (int i = 0; i < 4; ++i) {
            inside = inside && c[i] >= 0 && c[i] + (i == 0 ? 7 : 0) < map.sizes[i];
            offset += c[i] * map.strides[i];
          }
          const uint32_t to = cuda_on_host::swizzled(address, row_bytes) - cuda_on_host::kWindow;
          cuda_on_host::Piece& piece = block.pieces[to / 16];
          ++piece.version;
          if (!piece.fenced) cuda_on_host::die("a tensor copy lands where a write has no fence behind it");
          if (inside)
            std::memcpy(block.shared_base + to, map.base + offset, 16);
          else
            std::memset(block.shared_base + to, 0, 16);
        }
  cuda_on_host::SharedBarrier b = cuda_on_host::SharedBarrier::load(barrier);
  const uint32_t bytes = address - cuda_on_host::kWindow - static_cast<uint32_t>(target - block.shared_base);
  if (b.bytes < bytes) cuda_on_host::die("a tensor copy brings more bytes than its barrier expects");
  b.bytes -= bytes;
  if (cuda_on_host::Races* races = cuda_on_host::races())
    races->tensor_copy_landed(cuda_on_host::shared_offset(barrier), number);
  b.store(barrier);
}

[[gnu::always_inline]] inline void tensor_copy(SharedAddress target, const TensorMap* map, int c0, int c1,
                                               int c2, int c3, SharedAddress barrier, bool) {
  cuda_on_host::Machine& m = *cuda_on_host::machine();
  if (map->base == nullptr) cuda_on_host::die("a tensor copy of an empty tensor");
  const size_t bytes = size_t{2} * map->box[0] * map->box[1] * map->box[2] * map->box[3];
  cuda_on_host::check_shared(target, bytes, 128);
  cuda_on_host::SharedBarrier::load(barrier);
  uint32_t number = 0;
  if (cuda_on_host::Races* races = m.block->races.get()) {
    number = races->tensor_copy_started(m.thread, cuda_on_host::shared_offset(barrier),
                                        cuda_on_host::shared_offset(target), bytes, cuda_on_host::here());
  }
  const int when = m.options.copies;
  if (when == 1 || (when == 2 && m.random() % 4 == 0)) {
    land_tensor(*map, target, {c0, c1, c2, c3}, barrier, number);
    return;
  }
  // The map lies on the stack of a thread that may have ended by then.
  m.block->landings.push_back(
      [=, copied = *map] { land_tensor(copied, target, {c0, c1, c2, c3}, barrier, number); });
}

inline void shared_write_fence() {
  cuda_on_host::Machine& m = *cuda_on_host::machine();
  for (const auto& [index, version] : m.current().written)
    if (m.block->pieces[index].version == version) m.block->pieces[index].fenced = true;
  m.current().written.clear();
}

inline void warpgroup_barrier(int warpgroup) {
  if (cuda_on_host::machine()->thread / 128 != warpgroup)
    cuda_on_host::die("a thread waits for another warpgroup than its own");
  cuda_on_host::meet(1 + warpgroup, 128);
}
inline void consumer_barrier() {
  if (cuda_on_host::machine()->thread >= 256) cuda_on_host::die("no consumer waits for the consumers");
  cuda_on_host::meet(3, 256);
}

template <int kCount>
inline void give_up_registers() {}
template <int kCount>
inline void take_registers() {}

// ---- products ----
inline void product_begin() { cuda_on_host::products().begun[cuda_on_host::machine()->thread % 32] = true; }
inline void product_commit() { ++cuda_on_host::products().groups[cuda_on_host::machine()->thread % 32]; }
template <int kPending>
inline void product_wait() {
  cuda_on_host::wait_for_products(kPending);
}
template <int kCount>
inline void product_undefined(float (&x)[kCount]) {
  for (float& value : x) value = NAN;
}
template <int kRows, int kColumns>
inline void product_undefined(uint32_t (&x)[kRows][kColumns]) {
  for (auto& row : x)
    for (uint32_t& word : row) word = 0xffffffffu;
}
template <int kCount>
inline void product_pin(float (&x)[kCount]) {
  const int lane = cuda_on_host::machine()->thread % 32;
  for (const cuda_on_host::Accumulator& a : cuda_on_host::products().accumulators)
    if (a.used && a.homes[lane] == x) cuda_on_host::die("results are touched while products are under way");
}

template <int kRowBytes>
inline uint64_t matrix_descriptor(SharedAddress address, uint32_t atom_bytes) {
  cuda_on_host::check_shared(address, 16, 16);
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2;
  constexpr uint64_t kEightRows = 8 * kRowBytes / 16;
  const uint64_t start = address - dynamic_shared() + cuda_on_host::kWindow;
  if (start > 0x3ffff) cuda_on_host::die("an address beyond what a matrix descriptor holds");
  return kSwizzle << 62 | kEightRows << 32 | uint64_t{atom_bytes / 16} << 16 | start >> 4;
}
inline uint64_t moved(uint64_t descriptor, uint32_t bytes) { return descriptor + bytes / 16; }

template <class T, bool kAccumulate, int kCount>
[[gnu::always_inline]] inline void multiply_keys(float (&c)[kCount], uint64_t a, uint64_t b) {
  cuda_on_host::Product product{};
  product.execute = cuda_on_host::execute_product<T>;
  product.accumulate = kAccumulate;
  product.columns = 2 * kCount;
  product.a = a;
  product.b = b;
  product.where = cuda_on_host::here();
  cuda_on_host::issue(product, c, nullptr);
}

template <class T, int kCount>
[[gnu::always_inline]] inline void multiply_values(float (&c)[kCount], const uint32_t (&a)[4],
                                                   uint64_t descriptor, int accumulate) {
  cuda_on_host::Product product{};
  product.execute = cuda_on_host::execute_product<T>;
  product.values = true;
  product.accumulate = accumulate != 0;
  product.columns = 2 * kCount;
  product.b = descriptor;
  product.where = cuda_on_host::here();
  cuda_on_host::issue(product, c, a);
}

}  // namespace relay::cuda
