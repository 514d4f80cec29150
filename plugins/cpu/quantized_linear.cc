// A quantised matrix times inputs, which are rounded first. The matrix is read where it lies, once for each call: no
// copy of it in another order is kept.
#include "cpu/quantized_linear.h"

#include <algorithm>

namespace trimkv::cpu {
namespace {

constexpr int64_t kTasks = 32, kLeastRows = 16;

}  // namespace

const char* Check(const QuantizedLinearArgs& args) {
  if (args.matrices < 1 || args.matrices > kMaxMatrices) return "there must be 1 to 3 matrices";
  if (args.inputs < 0) return "the number of inputs is negative";
  const QuantizedMatrix& first = args.matrix[0];
  if (first.bits != 4 && first.bits != 8) return "bits must be 4 or 8";
  if (first.block_size < kInputBlock || (first.block_size & (first.block_size - 1)) != 0) {
    return "block_size must be a power of two, at least 32";
  }
  if (first.columns < 1 || first.columns % first.block_size != 0) return "the columns must divide into blocks";
  for (int i = 0; i < args.matrices; ++i) {
    const QuantizedMatrix& matrix = args.matrix[i];
    if (matrix.rows < 1) return "a matrix needs rows";
    if (matrix.columns != first.columns || matrix.bits != first.bits || matrix.block_size != first.block_size ||
        matrix.half_scales != first.half_scales || (matrix.zeros == nullptr) != (first.zeros == nullptr)) {
      return "the matrices must have one format";
    }
  }
  return nullptr;
}

size_t QuantizedLinearWorkspaceBytes(const QuantizedLinearArgs& args) {
  return args.inputs * InputRowBytes(args.matrix[0]);
}

void QuantizedLinear(const QuantizedLinearArgs& args, const Parallel& parallel) {
  const QuantizedKernels& kernels = *GetQuantizedKernels();
  const size_t input_bytes = InputRowBytes(args.matrix[0]);
  char* const chunks = static_cast<char*>(args.workspace);
  parallel.For(args.inputs, [&](size_t i) {
    kernels.round(args.matrix[0], args.x + i * args.matrix[0].columns, chunks + i * input_bytes);
  });
  int64_t all_rows = 0;
  for (int m = 0; m < args.matrices; ++m) all_rows += args.matrix[m].rows;
  const int64_t rows = std::max(kLeastRows, (all_rows + kTasks - 1) / kTasks);  // of a task, of whatever matrices
  parallel.For((all_rows + rows - 1) / rows, [&](size_t task) {
    int64_t first = task * rows, count = std::min(rows, all_rows - first);
    for (int m = 0; m < args.matrices && count > 0; ++m) {
      const QuantizedMatrix& matrix = args.matrix[m];
      const int64_t here = std::min(count, matrix.rows - first);
      if (here > 0) {
        kernels.multiply(matrix, first, here, chunks, args.inputs, args.y[m]);
        first += here;
        count -= here;
      }
      first -= matrix.rows;
    }
  });
}

}  // namespace trimkv::cpu
