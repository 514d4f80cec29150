#pragma once

#include "cpu/parallel.h"
#include "cpu/quantized_dot.h"

namespace trimkv::cpu {

inline constexpr int kMaxMatrices = 3;

// Matrices of one format, and one input of them all.
struct QuantizedLinearArgs {
  QuantizedMatrix matrix[kMaxMatrices];
  int matrices;
  const float* x;  // [inputs, columns]
  int64_t inputs;
  float* y[kMaxMatrices];  // [inputs, rows] of each matrix

  void* workspace;  // of QuantizedLinearWorkspaceBytes, 64-byte aligned
};

// Null if the arguments can be used, else what is wrong with them (a literal).
const char* Check(const QuantizedLinearArgs& args);

size_t QuantizedLinearWorkspaceBytes(const QuantizedLinearArgs& args);

// y = x · Wᵀ of each matrix W, on a processor that has the kernels; `args` must have passed Check.
void QuantizedLinear(const QuantizedLinearArgs& args, const Parallel& parallel);

}  // namespace trimkv::cpu
