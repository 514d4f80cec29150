#pragma once

#include <cstddef>

#include "cpu/parallel.h"
#include "trimkv/kernels.h"

namespace trimkv::cpu {

// Bytes of workspace for one call.
size_t PoolUpdateWorkspaceBytes(const PoolUpdateArgs& args);

// PoolUpdate on the CPU; `args` must have passed Check. Rows are taken one after the other, each with all threads.
void PoolUpdate(const PoolUpdateArgs& args, const Parallel& parallel);

}  // namespace trimkv::cpu
