// In place of cpu/dispatch.cc: one instruction set, whatever the processor has best, so that each is tested.
#include <cstdio>
#include <cstdlib>

#include "cpu/attention_tile.h"

namespace trimkv::cpu {
namespace TRIMKV_TARGET {
extern const TileKernels kKernels;
}

const TileKernels& GetTileKernels() {
#if defined(TRIMKV_TARGET_NEEDS)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports(TRIMKV_TARGET_NEEDS)) {
    std::puts("skipped: this processor does not have the instruction set");
    std::exit(77);
  }
#endif
  return TRIMKV_TARGET::kKernels;
}

}  // namespace trimkv::cpu
