// The race detector, and what g++ -fsanitize=thread calls in front of every access, in place of its run-time
// library. Never compiled with that option itself.
#include "races.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cuda_on_host.h"

namespace cuda_on_host {

namespace {

constexpr int kMostBarriers = 128;

// Source lines of an instruction, innermost first where functions were inlined.
std::string source_of(const void* where) {
  Dl_info info;
  if (where == nullptr || dladdr(where, &info) == 0) return "an unknown place";
  char offset[32];
  std::snprintf(offset, sizeof(offset), "0x%zx",
                static_cast<const char*>(where) - static_cast<const char*>(info.dli_fbase) - size_t{1});
  const std::string file = info.dli_fname;
  std::string lines;
  if (FILE* pipe = popen(("addr2line -ise '" + file + "' " + offset + " 2>/dev/null").c_str(), "r")) {
    char line[512];
    while (std::fgets(line, sizeof(line), pipe) != nullptr) {
      line[std::strcspn(line, " \n")] = '\0';
      lines += (lines.empty() ? "" : " < ") + std::string(line);
    }
    pclose(pipe);
  }
  return lines.empty() ? file + "+" + offset : lines;
}

}  // namespace

// ---- the log ----
void RaceLog::add(const Access& before, bool before_writes, const Access& after, bool after_writes,
                  size_t offset, int block, const std::string& before_name, const std::string& after_name) {
  Race& race = races_[{before.where, before_writes, after.where, after_writes}];
  if (race.count++ > 0) return;
  race.first = "block " + std::to_string(block) + ", byte " + std::to_string(offset) +
               " of shared memory:\n    " + before_name;
  race.second = after_name;
}

std::string RaceLog::describe() const {
  constexpr int kMost = 24;
  std::string text;
  int number = 0;
  for (const auto& [key, race] : races_) {
    if (++number > kMost) return text + "  and " + std::to_string(races_.size() - kMost) + " more\n";
    const auto& [before, before_writes, after, after_writes] = key;
    text += "  " + race.first + (before_writes ? " wrote: " : " read: ") + source_of(before) + "\n    " +
            race.second + (after_writes ? " writes: " : " reads: ") + source_of(after) + "\n    (" +
            std::to_string(race.count) + " times)\n";
  }
  return text;
}

// ---- actors and clocks ----
Races::Races(RaceLog* log, int block, int threads, size_t bytes, const char* memory, unsigned disregarded,
             bool equal_writes)
    : log_(log),
      block_(block),
      threads_(threads),
      memory_(memory),
      disregarded_(disregarded),
      equal_writes_(equal_writes),
      capacity_(2 * threads + threads / 32 + kMostBarriers),
      clocks_(static_cast<size_t>(threads) * capacity_),
      copies_of_thread_(threads, -1),
      products_of_warp_(threads / 32, -1),
      cells_((bytes + 3) / 4) {
  for (int t = 0; t < threads; ++t) {
    add_actor("warp " + std::to_string(t / 32) + ", lane " + std::to_string(t % 32));
    clock(t)[t] = 1;
  }
}

int Races::add_actor(const std::string& name) {
  if (static_cast<int>(names_.size()) == capacity_) die("too many barriers for the race detector");
  names_.push_back(name);
  return static_cast<int>(names_.size()) - 1;
}

void Races::join(uint32_t* into, const uint32_t* from) const {
  for (size_t i = 0; i < names_.size(); ++i) into[i] = std::max(into[i], from[i]);
}

Races::Barrier& Races::barrier(size_t offset) {
  Barrier& b = barriers_[offset];
  if (b.engine < 0) {
    b.engine = add_actor("a tensor copy for the barrier at byte " + std::to_string(offset));
    b.gathering.resize(capacity_);
    b.complete.resize(capacity_);
  }
  return b;
}

// ---- synchronisation ----
void Races::meet(const std::vector<int>& threads, unsigned order) {
  if (disregards(order)) return;
  std::vector<uint32_t> all(names_.size());
  for (int t : threads) join(all.data(), clock(t));
  for (int t : threads) {
    std::copy(all.begin(), all.end(), clock(t));
    ++clock(t)[t];
  }
}
void Races::meet(int first, int count, unsigned order) {
  std::vector<int> threads(count);
  for (int i = 0; i < count; ++i) threads[i] = first + i;
  meet(threads, order);
}
void Races::arrive(int thread, size_t offset, const void* where) {
  access(thread, offset, 8, false, where);  // after its initialisation, and not while it is overwritten
  Barrier& b = barrier(offset);
  if (disregards(kByArrival)) return;
  join(b.gathering.data(), clock(thread));
  ++clock(thread)[thread];
}
void Races::end_phase(size_t offset) {
  Barrier& b = barrier(offset);
  b.complete.swap(b.gathering);
  std::fill(b.gathering.begin(), b.gathering.end(), 0);
}
void Races::wait(int thread, size_t offset, const void* where) {
  access(thread, offset, 8, false, where);
  join(clock(thread), barrier(offset).complete.data());
}

// ---- accesses ----
void Races::access(int thread, size_t offset, size_t bytes, bool write, const void* where,
                   const void* value) {
  access({{thread, clock(thread)[thread], where}, thread, 1, write}, offset, bytes, value);
}
void Races::copy_started(int thread, int group, size_t offset, size_t bytes, const void* where) {
  int& actor = copies_of_thread_[thread];
  if (actor < 0) actor = add_actor("a copy by " + names_[thread]);
  access({{actor, static_cast<uint32_t>(group) + 1, where}, thread, 1, true}, offset, bytes, nullptr);
}
void Races::copies_waited_for(int thread, int through) {
  const int actor = copies_of_thread_[thread];
  if (actor < 0 || through <= 0 || disregards(kByCopyWait)) return;
  clock(thread)[actor] = std::max(clock(thread)[actor], static_cast<uint32_t>(through));
}
uint32_t Races::tensor_copy_started(int thread, size_t at, size_t offset, size_t bytes, const void* where) {
  access(thread, at, 8, false, where);
  Barrier& b = barrier(at);
  access({{b.engine, ++b.copies, where}, thread, 1, true}, offset, bytes, nullptr);
  return b.copies;
}
void Races::tensor_copy_landed(size_t at, uint32_t number) {
  if (disregards(kByLanding)) return;
  Barrier& b = barrier(at);
  b.gathering[b.engine] = std::max(b.gathering[b.engine], number);
}
void Races::product_read(int warp, int number, size_t offset, size_t bytes, const void* where) {
  int& actor = products_of_warp_[warp];
  if (actor < 0) {
    actor = add_actor("a product of warp " + std::to_string(warp));
    warp_of_products_[actor] = warp;
  }
  access({{actor, static_cast<uint32_t>(number) + 1, where}, warp * 32, 32, false}, offset, bytes, nullptr);
}
void Races::products_waited_for(int warp, int count) {
  const int actor = products_of_warp_[warp];
  if (actor < 0 || disregards(kByProductWait)) return;
  for (int t = warp * 32; t < warp * 32 + 32; ++t) clock(t)[actor] = static_cast<uint32_t>(count);
}

bool Races::ordered(const Access& before, const Attempt& attempt) {
  for (int t = attempt.first; t < attempt.first + attempt.count; ++t)
    if (clock(t)[before.actor] >= before.clock) return true;
  return false;
}

int Races::keep(Accesses accesses) {
  accesses_.push_back(std::move(accesses));
  return static_cast<int>(accesses_.size()) - 1;
}

void Races::access(const Attempt& attempt, size_t offset, size_t bytes, const void* value) {
  const auto is_equal = [&](size_t at, size_t size) {
    return value != nullptr && !equal_writes_ &&
           std::memcmp(memory_ + at, static_cast<const char*>(value) + (at - offset), size) == 0;
  };
  for (size_t at = offset; at < offset + bytes;) {
    Cell& word = cells_.at(at / 4);
    if (!word.split && (at % 4 != 0 || at + 4 > offset + bytes)) {
      for (Cell& byte : bytes_[at / 4]) {
        byte = word;
        if (word.many >= 0) byte.many = keep(Accesses(accesses_[word.many]));
        if (word.equal >= 0) byte.equal = keep(Accesses(accesses_[word.equal]));
      }
      word.split = true;
    }
    if (word.split) {
      visit(bytes_[at / 4][at % 4], attempt, at, is_equal(at, 1));
      ++at;
    } else {
      visit(word, attempt, at, is_equal(at, 4));
      at += 4;
    }
  }
}

void Races::visit(Cell& cell, const Attempt& attempt, size_t at, bool equal) {
  if (!attempt.write) {
    if (cell.read.actor == attempt.by.actor && cell.read.clock == attempt.by.clock) return;
    if (cell.write.actor >= 0 && !ordered(cell.write, attempt)) {
      bool after_equal = false;  // the value is the same, whichever write came last
      if (cell.equal >= 0)
        for (const Access& x : accesses_[cell.equal]) after_equal = after_equal || ordered(x, attempt);
      if (!after_equal) report(cell.write, true, attempt, at);
    }
    add_read(cell, attempt);
    return;
  }
  if (equal && cell.write.actor >= 0) {
    // A read that is not ordered after this write sees the same value, so that it does not replace the other.
    if (cell.equal < 0) cell.equal = keep({});
    add(accesses_[cell.equal], attempt);
    return;
  }
  if (cell.write.actor >= 0 && !ordered(cell.write, attempt)) report(cell.write, true, attempt, at);
  if (cell.equal >= 0) {
    for (const Access& x : accesses_[cell.equal])
      if (!ordered(x, attempt)) report(x, true, attempt, at);
    accesses_[cell.equal].clear();
  }
  if (cell.many >= 0 && !accesses_[cell.many].empty()) {
    for (const Access& x : accesses_[cell.many])
      if (!ordered(x, attempt)) report(x, false, attempt, at);
    accesses_[cell.many].clear();
  } else if (cell.read.actor >= 0 && !ordered(cell.read, attempt)) {
    report(cell.read, false, attempt, at);
  }
  cell.read = Access{};
  cell.write = attempt.by;
}

void Races::add_read(Cell& cell, const Attempt& attempt) {
  const bool several = cell.many >= 0 && !accesses_[cell.many].empty();
  if (several || (cell.read.actor >= 0 && !ordered(cell.read, attempt))) {
    if (cell.many < 0) cell.many = keep({});
    if (!several) accesses_[cell.many].push_back(cell.read);
    add(accesses_[cell.many], attempt);
  }
  cell.read = attempt.by;
}

// What is ordered after this access is ordered after those before it too: they can go.
void Races::add(Accesses& accesses, const Attempt& attempt) {
  accesses.erase(
      std::remove_if(accesses.begin(), accesses.end(), [&](const Access& x) { return ordered(x, attempt); }),
      accesses.end());
  accesses.push_back(attempt.by);
}

void Races::report(const Access& before, bool before_writes, const Attempt& attempt, size_t at) {
  for (const Access* x : {&before, &attempt.by}) {
    const auto found = warp_of_products_.find(x->actor);
    if (found == warp_of_products_.end()) continue;
    log_->product_reads.insert(product_read_key(block_, found->second, static_cast<int>(x->clock) - 1, at));
    return;
  }
  log_->add(before, before_writes, attempt.by, attempt.write, at, block_, names_[before.actor],
            names_[attempt.by.actor]);
}

void Races::check_complete() const {
  for (size_t word = 0; word < cells_.size(); ++word) {
    uint32_t content;
    std::memcpy(&content, memory_ + 4 * word, 4);
    if (content != ~0u && !cells_[word].split && cells_[word].write.actor < 0)
      die("the race detector missed a write to byte " + std::to_string(4 * word) + " of shared memory");
  }
}

}  // namespace cuda_on_host

// ---- the calls of instrumented code ----
static void see(const void* address, size_t bytes, bool write, const void* where) {
  cuda_on_host::Machine* m = cuda_on_host::machine();
  if (m == nullptr || m->block == nullptr || m->unseen > 0) return;
  cuda_on_host::Block& block = *m->block;
  const size_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(block.shared_base);
  if (offset >= block.shared_bytes || block.races == nullptr) return;
  block.races->access(m->thread, offset, bytes, write, where);
}

#define WHERE __builtin_return_address(0)
#define ACCESSES(bytes)                                                                   \
  void __tsan_read##bytes(void* address) { see(address, bytes, false, WHERE); }           \
  void __tsan_write##bytes(void* address) { see(address, bytes, true, WHERE); }           \
  void __tsan_unaligned_read##bytes(void* address) { see(address, bytes, false, WHERE); } \
  void __tsan_unaligned_write##bytes(void* address) { see(address, bytes, true, WHERE); } \
  void __tsan_volatile_read##bytes(void* address) { see(address, bytes, false, WHERE); }  \
  void __tsan_volatile_write##bytes(void* address) { see(address, bytes, true, WHERE); }

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* address, size_t bytes) { see(address, bytes, false, WHERE); }
void __tsan_write_range(void* address, size_t bytes) { see(address, bytes, true, WHERE); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Of the host's own objects only: the kernels have no atomics in shared memory.
uint8_t __tsan_atomic8_load(const volatile uint8_t* word, int) { return *word; }
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* word, uint32_t value, int) {
  return __atomic_fetch_add(word, value, __ATOMIC_SEQ_CST);
}

}  // extern "C"
