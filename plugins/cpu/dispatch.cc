// Picks the instruction set at run time.
#include "cpu/attention_tile.h"

namespace trimkv::cpu {

namespace baseline {
extern const TileKernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const TileKernels kKernels;
}
namespace avx512 {
extern const TileKernels kKernels;
}
#endif

const TileKernels& GetTileKernels() {
#if defined(__x86_64__)
  static const TileKernels& kernels = [&]() -> const TileKernels& {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      return avx512::kKernels;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      return avx2::kKernels;
    }
    return baseline::kKernels;
  }();
  return kernels;
#else
  return baseline::kKernels;
#endif
}

}  // namespace trimkv::cpu
