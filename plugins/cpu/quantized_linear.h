#pragma once

#include "cpu/parallel.h"
#include "cpu/quantized_dot.h"

namespace trimkv::cpu {

struct QuantizedLinearArgs {
  QuantizedMatrix matrix;
  const float* x;  // [inputs, matrix.columns]
  int64_t inputs;
  float* y;  // [inputs, matrix.rows]

  void* workspace;  // of QuantizedLinearWorkspaceBytes, 64-byte aligned
};

// Null if the arguments can be used, else what is wrong with them (a literal).
const char* Check(const QuantizedLinearArgs& args);

size_t QuantizedLinearWorkspaceBytes(const QuantizedLinearArgs& args);

// y = x · Wᵀ on a processor that has the kernels; `args` must have passed Check.
void QuantizedLinear(const QuantizedLinearArgs& args, const Parallel& parallel);

}  // namespace trimkv::cpu
