// A block of GPU threads on the host, for testing kernel bodies without a GPU: each thread is a fiber that runs until
// it reaches a barrier or a warp collective. Between barriers threads run one after another in a random order, and
// warps run ahead of each other, so a missing barrier shows as a wrong result for some seed; threads that wait for
// different things are reported as a deadlock. Asynchronous copies land at once or only when waited for, by seed: the
// two ends of what hardware may do.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "block.h"

namespace trimkv::cuda {

class EmulatedBlock;

class Emulator {
 public:
  Emulator(int threads, uint32_t seed) : threads_(threads), random_(seed), lazy_copies_(seed % 2 != 0) {
    fibers_.resize(threads);
    lanes_.resize(threads);
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStackBytes]);  // not zeroed: most is never touched
  }

  // Runs `body(block)` on every thread, to the end.
  void Run(const std::function<void(EmulatedBlock&)>& body);

 private:
  friend class EmulatedBlock;
  enum class Wait { kNone, kBlock, kWarp, kDone };
  struct Copy {
    void* to;
    const void* from;
    bool valid;
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Wait wait = Wait::kNone;
    int operation = 0;
    std::deque<std::vector<Copy>> copies;  // committed groups, oldest first
    std::vector<Copy> open;
  };
  struct Lane {
    uint64_t words[8];
  };
  static constexpr size_t kStackBytes = 128 * 1024;

  static void Enter();
  void Yield(int thread, Wait wait, int operation) {
    fibers_[thread].wait = wait;
    fibers_[thread].operation = operation;
    swapcontext(&fibers_[thread].context, &scheduler_);
  }
  [[noreturn]] void Fail(const char* what) const {
    std::fprintf(stderr, "emulated block: %s\n", what);
    std::abort();
  }
  bool Release(int first, int count, Wait wait);
  bool Round(std::vector<int>& order, uint32_t resting);

  int threads_;
  std::mt19937 random_;
  bool lazy_copies_;
  std::vector<Fiber> fibers_;
  std::vector<Lane> lanes_;
  ucontext_t scheduler_;
  const std::function<void(EmulatedBlock&)>* body_ = nullptr;
  int starting_ = 0;
  inline static Emulator* current_ = nullptr;
};

class EmulatedBlock {
 public:
  EmulatedBlock(Emulator* emulator, int thread) : emulator_(emulator), thread_(thread) {}

  int Thread() const { return thread_; }
  int Threads() const { return emulator_->threads_; }
  int Lane() const { return thread_ % kWarpSize; }
  int Warp() const { return thread_ / kWarpSize; }
  int Warps() const { return Threads() / kWarpSize; }

  void Sync() const { emulator_->Yield(thread_, Emulator::Wait::kBlock, 0); }
  void SyncWarp() const { Meet(1); }

  template <class T>
  T Shuffle(T value, int lane) const {
    return Exchange(2, value, [&](const auto& of) { return of(lane); });
  }
  template <class T>
  T ShuffleXor(T value, int mask) const {
    return Exchange(3, value, [&](const auto& of) { return of(Lane() ^ mask); });
  }
  template <class T>
  T ShuffleUp(T value, int by) const {
    return Exchange(4, value, [&](const auto& of) { return of(Lane() < by ? Lane() : Lane() - by); });
  }
  uint32_t Ballot(bool vote) const {
    return Exchange(5, static_cast<uint32_t>(vote), [&](const auto& of) {
      uint32_t bits = 0;
      for (int lane = 0; lane < kWarpSize; ++lane) bits |= of(lane) << lane;
      return bits;
    });
  }
  uint32_t MatchAny(int32_t value) const {
    return static_cast<uint32_t>(Exchange(6, value, [&](const auto& of) {
      uint32_t bits = 0;
      for (int lane = 0; lane < kWarpSize; ++lane) bits |= static_cast<uint32_t>(of(lane) == value) << lane;
      return static_cast<int32_t>(bits);
    }));
  }

  int PopCount(uint32_t bits) const { return __builtin_popcount(bits); }
  void AtomicAdd(int32_t* at, int32_t by) const { *at += by; }
  float Exp2(float x) const { return std::exp2(x); }

  void CopyAsync(void* to, const void* from, bool valid) const {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) {
      emulator_->Fail("asynchronous copy is not aligned");
    }
    const Emulator::Copy copy = {to, from, valid};
    if (emulator_->lazy_copies_) {
      Self().open.push_back(copy);
    } else {
      Land(copy);
    }
  }
  void CommitCopies() const {
    Self().copies.push_back(std::move(Self().open));
    Self().open.clear();
  }
  template <int kPending>
  void WaitCopies() const {
    while (Self().copies.size() > kPending) {
      for (const Emulator::Copy& copy : Self().copies.front()) Land(copy);
      Self().copies.pop_front();
    }
  }

  void LoadMatrices(uint32_t (&out)[4], const void* row) const { Load(7, out, row, false); }
  void LoadMatricesTransposed(uint32_t (&out)[4], const void* row) const { Load(8, out, row, true); }

  template <class T>
  void Multiply(T, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
    Emulator::Lane& own = emulator_->lanes_[thread_];
    for (int i = 0; i < 4; ++i) own.words[i] = a[i];
    own.words[4] = b0;
    own.words[5] = b1;
    Meet(9);
    const auto element = [](uint64_t word, int i) { return ToFloat(T{static_cast<uint16_t>(word >> (16 * i))}); };
    const auto a_at = [&](int row, int k) {
      return element(Of((row % 8) * 4 + (k % 8) / 2).words[(row / 8) + 2 * (k / 8)], k % 2);
    };
    const auto b_at = [&](int k, int column) { return element(Of(column * 4 + (k % 8) / 2).words[4 + k / 8], k % 2); };
    for (int i = 0; i < 4; ++i) {
      const int row = Lane() / 4 + 8 * (i / 2);
      const int column = 2 * (Lane() % 4) + i % 2;
      for (int k = 0; k < 16; ++k) sum[i] += a_at(row, k) * b_at(k, column);
    }
    Meet(9);
  }

 private:
  Emulator::Fiber& Self() const { return emulator_->fibers_[thread_]; }
  const Emulator::Lane& Of(int lane) const { return emulator_->lanes_[Warp() * kWarpSize + lane]; }
  void Meet(int operation) const { emulator_->Yield(thread_, Emulator::Wait::kWarp, operation); }
  static void Land(const Emulator::Copy& copy) {
    if (copy.valid) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }

  template <class T, class Read>
  T Exchange(int operation, T value, const Read& read) const {
    static_assert(sizeof(T) <= 8, "one word");
    std::memcpy(&emulator_->lanes_[thread_].words[0], &value, sizeof value);
    Meet(operation);
    const T out = read([&](int lane) {
      T other;
      std::memcpy(&other, &Of(lane).words[0], sizeof other);
      return other;
    });
    Meet(operation);
    return out;
  }

  void Load(int operation, uint32_t (&out)[4], const void* row, bool transposed) const {
    const uint64_t address = reinterpret_cast<uintptr_t>(row);
    if (address % 16 != 0) emulator_->Fail("matrix row is not aligned");
    std::memcpy(emulator_->lanes_[thread_].words, row, 16);  // now: what the others are yet to copy is not seen
    Meet(operation);
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t word = 0;
      for (int i = 0; i < 2; ++i) {
        const int r = transposed ? 2 * (Lane() % 4) + i : Lane() / 4;
        const int c = transposed ? Lane() / 4 : 2 * (Lane() % 4) + i;
        const uint64_t four = Of(matrix * 8 + r).words[c / 4];
        word |= static_cast<uint32_t>(four >> (16 * (c % 4)) & 0xffff) << (16 * i);
      }
      out[matrix] = word;
    }
    Meet(operation);
  }

  Emulator* emulator_;
  int thread_;
};

inline void Emulator::Enter() {
  Emulator* emulator = current_;
  const int thread = emulator->starting_;
  EmulatedBlock block(emulator, thread);
  (*emulator->body_)(block);
  emulator->Yield(thread, Wait::kDone, 0);
}

// Lets `count` fibers go on if all that are not done wait in this way, for the same operation.
inline bool Emulator::Release(int first, int count, Wait wait) {
  int operation = -1;
  for (int i = first; i < first + count; ++i) {
    if (fibers_[i].wait == Wait::kDone) {
      if (wait == Wait::kWarp) return false;  // a collective needs every lane
      continue;
    }
    if (fibers_[i].wait != wait) return false;
    if (operation >= 0 && fibers_[i].operation != operation) Fail("lanes of a warp are in different collectives");
    operation = fibers_[i].operation;
  }
  if (operation < 0) return false;
  for (int i = first; i < first + count; ++i) {
    if (fibers_[i].wait == wait) fibers_[i].wait = Wait::kNone;
  }
  return true;
}

// Runs what can run but the resting warps (a bit each), then opens the barriers that all have reached.
inline bool Emulator::Round(std::vector<int>& order, uint32_t resting) {
  bool moved = false;
  std::shuffle(order.begin(), order.end(), random_);
  for (int thread : order) {
    if (fibers_[thread].wait != Wait::kNone || (resting >> (thread / kWarpSize % 32) & 1)) continue;
    moved = true;
    starting_ = thread;
    swapcontext(&scheduler_, &fibers_[thread].context);
  }
  moved |= Release(0, threads_, Wait::kBlock);
  for (int first = 0; first < threads_; first += kWarpSize) {
    if (!(resting >> (first / kWarpSize % 32) & 1)) moved |= Release(first, kWarpSize, Wait::kWarp);
  }
  return moved;
}

inline void Emulator::Run(const std::function<void(EmulatedBlock&)>& body) {
  body_ = &body;
  std::vector<int> order(threads_);
  for (int i = 0; i < threads_; ++i) {
    order[i] = i;
    Fiber& fiber = fibers_[i];
    fiber.wait = Wait::kNone;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Emulator::Enter, 0);
  }
  current_ = this;
  for (;;) {
    // Some warps rest for a round, unless nothing else can happen.
    bool moved = false;
    for (const uint32_t resting : {static_cast<uint32_t>(random_()), 0u}) {
      if (!moved) moved = Round(order, resting);
    }
    if (!moved) break;
  }
  for (Fiber& fiber : fibers_) {
    if (fiber.wait != Wait::kDone) Fail("deadlock: threads wait for different things");
    if (!fiber.open.empty() ||
        std::any_of(fiber.copies.begin(), fiber.copies.end(), [](const auto& group) { return !group.empty(); })) {
      Fail("a thread ended with copies under way");
    }
    fiber.copies.clear();
  }
}

}  // namespace trimkv::cuda
