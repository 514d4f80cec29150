// Expectations of the host tests: counted, printed, never fatal.
#pragma once

#include <cstdio>

namespace trimkv::test {

inline int g_checks = 0;
inline int g_failed = 0;

}  // namespace trimkv::test

#define EXPECT(condition, ...)                                             \
  do {                                                                     \
    ++trimkv::test::g_checks;                                              \
    if (!(condition)) {                                                    \
      ++trimkv::test::g_failed;                                            \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
    }                                                                      \
  } while (false)
