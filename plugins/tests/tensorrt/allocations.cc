// A file of its own, so that no allocation is compiled into its callers.
#include "allocations.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {
std::atomic<long> g_allocations{0};
std::atomic<int> g_emulating{0};
}  // namespace

namespace trimkv::test {

long Allocations() { return g_allocations; }

}  // namespace trimkv::test

// Called by the stand-in for CUDA.
extern "C" __attribute__((visibility("default"))) void TrimkvEmulating(bool running) {
  g_emulating += running ? 1 : -1;
}

#if !defined(__SANITIZE_ADDRESS__)
void* operator new(size_t size) {
  if (g_emulating == 0) ++g_allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
#endif
