#pragma once

#include <cstddef>

#include "cpu/parallel.h"
#include "trimkv/kernels.h"

namespace trimkv::cpu {

// Bytes of workspace for one call.
size_t PoolAttentionWorkspaceBytes(const PoolAttentionArgs& args);

// PoolAttention on the CPU; `args` must have passed Check.
void PoolAttention(const PoolAttentionArgs& args, const Parallel& parallel);

}  // namespace trimkv::cpu
