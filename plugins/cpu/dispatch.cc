// Picks the instruction set at run time.
#include "cpu/attention_tile.h"
#include "cpu/quantized_dot.h"

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
namespace avx512vnni {
extern const QuantizedKernels kKernels;
}

namespace {

bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace
#endif

const TileKernels& GetTileKernels() {
#if defined(__x86_64__)
  static const TileKernels& kernels = [&]() -> const TileKernels& {
    __builtin_cpu_init();
    if (HasAvx512()) return avx512::kKernels;
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

const QuantizedKernels* GetQuantizedKernels() {
#if defined(__x86_64__)
  static const bool supported = [] {
    __builtin_cpu_init();
    return HasAvx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2");
  }();
  return supported ? &avx512vnni::kKernels : nullptr;
#else
  return nullptr;
#endif
}

}  // namespace trimkv::cpu
