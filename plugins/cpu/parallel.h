// The caller's threads. A kernel never starts any of its own, so it cannot oversubscribe the engine's.
#pragma once

#include <cstddef>

namespace trimkv::cpu {

// Runs task(user, index) for each index below `count`, in any order, on any of `threads` threads, and waits for them.
struct Parallel {
  void (*run)(void* context, size_t count, void (*task)(void* user, size_t index), void* user);
  void* context;
  int threads;

  template <typename Task>
  void For(size_t count, const Task& task) const {
    run(
        context, count, [](void* user, size_t index) { (*static_cast<const Task*>(user))(index); },
        const_cast<Task*>(&task));
  }
};

// Everything on the calling thread.
inline Parallel Serial() {
  return {[](void*, size_t count, void (*task)(void*, size_t), void* user) {
            for (size_t i = 0; i < count; ++i) task(user, i);
          },
          nullptr, 1};
}

}  // namespace trimkv::cpu
