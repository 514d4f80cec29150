// A quantised matrix times inputs, which are rounded first. The matrix is read where it lies, once for each call: no
// copy of it in another order is kept.
#include "cpu/quantized_linear.h"

#include <algorithm>

namespace trimkv::cpu {
namespace {

constexpr int64_t kTasks = 32, kLeastRows = 16;

}  // namespace

const char* Check(const QuantizedLinearArgs& args) {
  const QuantizedMatrix& matrix = args.matrix;
  if (matrix.bits != 4 && matrix.bits != 8) return "bits must be 4 or 8";
  if (matrix.block_size < kInputBlock || (matrix.block_size & (matrix.block_size - 1)) != 0) {
    return "block_size must be a power of two, at least 32";
  }
  if (matrix.columns < 1 || matrix.columns % matrix.block_size != 0) {
    return "the columns must divide into blocks";
  }
  if (matrix.rows < 1 || args.inputs < 0) return "a matrix needs rows";
  return nullptr;
}

size_t QuantizedLinearWorkspaceBytes(const QuantizedLinearArgs& args) {
  return args.inputs * InputRowBytes(args.matrix);
}

void QuantizedLinear(const QuantizedLinearArgs& args, const Parallel& parallel) {
  const QuantizedKernels& kernels = *GetQuantizedKernels();
  const QuantizedMatrix& matrix = args.matrix;
  char* const chunks = static_cast<char*>(args.workspace);
  parallel.For(args.inputs, [&](size_t i) {
    kernels.round(matrix, args.x + i * matrix.columns, chunks + i * InputRowBytes(matrix));
  });
  const int64_t rows = std::max(kLeastRows, ((matrix.rows + kTasks - 1) / kTasks + 3) / 4 * 4);
  parallel.For((matrix.rows + rows - 1) / rows, [&](size_t task) {
    const int64_t first = task * rows;
    kernels.multiply(matrix, first, std::min(rows, matrix.rows - first), chunks, args.inputs, args.y);
  });
}

}  // namespace trimkv::cpu
