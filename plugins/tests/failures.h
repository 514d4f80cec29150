// Expectations of the kernels' tests: counted and printed; many are fatal.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace trimkv::test {

inline int g_failures = 0;

}  // namespace trimkv::test

#define EXPECT(condition, ...)                                    \
  do {                                                            \
    if (!(condition)) {                                           \
      ++trimkv::test::g_failures;                                 \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      if (trimkv::test::g_failures > 20) std::exit(1);            \
    }                                                             \
  } while (false)
