// Data races in a block's shared memory, found by vector clocks as FastTrack does (Flanagan and Freund, PLDI
// 2009): two accesses of which one writes must be ordered by synchronisation, whatever order they happened to
// run in. Only what CUDA promises orders them:
// - __syncthreads, __syncwarp and named barriers: the threads that take part;
// - barriers in shared memory: an arrival before a wait for the very phase that it arrived in;
// - a copy of the copy engine: after what its thread did before, and before a wait for the phase it lands in;
//   an asynchronous copy of a thread: likewise, and before that thread's wait for its group;
// - a product: after what the lanes of its warp did before issuing it, and before their wait for it.
// Shuffles, votes, ldmatrix and mma order nothing. Copies and products are actors of their own, so that not
// even the thread that started one may touch what it uses before the wait.
//
// Kernels report their accesses by the calls that g++ -fsanitize=thread puts in front of them (races.cpp);
// the twins of instructions report theirs themselves. Global memory, and fences between the copy engine's
// view and the ordinary one (Piece::fenced), are not looked at here.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace cuda_on_host {

// Kinds of synchronisation, as bits: a detector that disregards one must find what it orders.
enum Order : unsigned {
  kBySyncThreads = 1,
  kBySyncWarp = 2,
  kByArrival = 4,
  kByLanding = 8,  // of the copy engine's copies
  kByProductWait = 16,
  kByCopyWait = 32,
  kByNamedBarrier = 64,  // shifted left by its name
};

struct Access {
  int actor = -1;  // -1: none
  uint32_t clock = 0;
  const void* where = nullptr;  // return address
};

// 16-byte pieces of shared memory that products read, each as one number.
using ProductReads = std::unordered_set<uint64_t>;
inline uint64_t product_read_key(int block, int warp, int number, size_t offset) {
  return uint64_t(block) << 48 | uint64_t(warp) << 40 | uint64_t(number) << 16 | offset / 16;
}

// Races of all blocks of a launch, by the two places in the source.
class RaceLog {
 public:
  // Products may read what others write at the time if nobody looks at what comes of it. These are no faults
  // yet: see Options::spoiled.
  ProductReads product_reads;

  bool empty() const { return races_.empty(); }
  void add(const Access& before, bool before_writes, const Access& after, bool after_writes, size_t offset,
           int block, const std::string& before_name, const std::string& after_name);
  std::string describe() const;

 private:
  struct Race {
    int count = 0;
    std::string first, second;
  };
  std::map<std::tuple<const void*, bool, const void*, bool>, Race> races_;
};

// Of one block.
class Races {
 public:
  // memory: the block's. disregarded: bits of Order. equal_writes: writing the value that is there already
  // races too.
  Races(RaceLog* log, int block, int threads, size_t bytes, const char* memory, unsigned disregarded,
        bool equal_writes);
  Races(const Races&) = delete;
  Races& operator=(const Races&) = delete;

  // ---- accesses ----
  // value: what is written, or null if that is not known.
  void access(int thread, size_t offset, size_t bytes, bool write, const void* where,
              const void* value = nullptr);
  // The write of a copy that `thread` started, of its group number `group`.
  void copy_started(int thread, int group, size_t offset, size_t bytes, const void* where);
  // The thread waited for the groups before `through`.
  void copies_waited_for(int thread, int through);
  // Returns the number of the copy.
  uint32_t tensor_copy_started(int thread, size_t barrier, size_t offset, size_t bytes, const void* where);
  void tensor_copy_landed(size_t barrier, uint32_t number);
  // Product `number` (from 0) of a warp reads shared memory; all its lanes have issued it.
  void product_read(int warp, int number, size_t offset, size_t bytes, const void* where);
  // The lanes of a warp waited for its first `count` products.
  void products_waited_for(int warp, int count);

  // ---- synchronisation ----
  void meet(const std::vector<int>& threads, unsigned order);
  void meet(int first, int count, unsigned order);
  void arrive(int thread, size_t barrier, const void* where);
  void end_phase(size_t barrier);
  // After the phase has ended.
  void wait(int thread, size_t barrier, const void* where);

  // Dies if memory that was all ones changed where no write was reported: the kernel was then compiled
  // without instrumentation, or g++ did not see one of its writes.
  void check_complete() const;

 private:
  using Accesses = std::vector<Access>;
  // Four bytes, or one of those where accesses smaller than a word were seen.
  struct Cell {
    Access write, read;  // the last write; the last read since
    int many = -1;       // accesses_[many]: all reads since, where several are not ordered
    int equal = -1;      // accesses_[equal]: writes since of the same value
    bool split = false;  // bytes_ has it
  };
  struct Barrier {
    std::vector<uint32_t> gathering, complete;  // clocks: of this phase's arrivals, of the phase before
    uint32_t copies = 0;
    int engine = -1;  // actor: the copies of a phase have all landed when it ends, in whatever order
  };
  // What is ordered before any of `count` threads is ordered before the access.
  struct Attempt {
    Access by;
    int first, count;
    bool write;
  };

  uint32_t* clock(int thread) { return clocks_.data() + static_cast<size_t>(thread) * capacity_; }
  bool disregards(unsigned order) const { return (disregarded_ & order) != 0; }
  void join(uint32_t* into, const uint32_t* from) const;
  Barrier& barrier(size_t offset);
  int add_actor(const std::string& name);
  bool ordered(const Access& before, const Attempt& attempt);
  void access(const Attempt& attempt, size_t offset, size_t bytes, const void* value);
  void visit(Cell& cell, const Attempt& attempt, size_t at, bool equal);
  void add_read(Cell& cell, const Attempt& attempt);
  void add(Accesses& accesses, const Attempt& attempt);
  int keep(Accesses accesses);
  void report(const Access& before, bool before_writes, const Attempt& attempt, size_t at);

  RaceLog* log_;
  const int block_, threads_;
  const char* memory_;
  const unsigned disregarded_;
  const bool equal_writes_;
  const int capacity_;                                    // actors that there is room for
  std::vector<uint32_t> clocks_;                          // [threads, capacity]
  std::vector<std::string> names_;                        // of the actors so far; the threads come first
  std::vector<int> copies_of_thread_, products_of_warp_;  // actors, or -1
  std::unordered_map<int, int> warp_of_products_;         // by actor
  std::vector<Cell> cells_;
  std::unordered_map<size_t, std::array<Cell, 4>> bytes_;  // of a word
  std::vector<Accesses> accesses_;
  std::unordered_map<size_t, Barrier> barriers_;  // by their offset
};

}  // namespace cuda_on_host
