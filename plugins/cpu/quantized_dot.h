// The inner loops of quantised matrices, for processors with 8-bit dot products; see quantized_dot.cc.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trimkv::cpu {

// Rows of numbers without sign, one scale for each block of a row; value = (number - zero point) * scale. Nothing needs
// to be aligned.
struct QuantizedMatrix {
  const uint8_t* numbers;  // [rows, columns * bits / 8]: 4 bits two to a byte, the even column in the low half
  const void* scales;      // [rows, blocks] float32 or, with half_scales, float16
  const uint8_t* zeros;    // [rows, bytes of blocks numbers], packed like them; null: 8 (4 bits) or 128 (8 bits)
  bool half_scales;
  int64_t rows;
  int32_t columns;     // a multiple of block_size
  int32_t bits;        // 4 or 8
  int32_t block_size;  // a power of two, at least kInputBlock

  int32_t blocks() const { return columns / block_size; }
};

// Inputs are rounded to signed 8-bit numbers, with one scale for so many columns.
inline constexpr int32_t kInputBlock = 32;
// So many bytes of a matrix row, and the inputs of their columns, are one chunk.
inline constexpr int32_t kChunkBytes = 64;

inline int32_t ChunkColumns(int32_t bits) { return kChunkBytes * 8 / bits; }
inline int32_t Chunks(const QuantizedMatrix& matrix) {
  return (matrix.columns + ChunkColumns(matrix.bits) - 1) / ChunkColumns(matrix.bits);
}

// One chunk of an input row: its numbers, those of even columns before those of odd ones where the matrix has 4 bits;
// for each lane of four (or twice four) numbers its part of -zero point * sum, and the scale.
template <int kBits>
struct InputChunk {
  static constexpr int kParts = 8 / kBits;
  int8_t numbers[kParts][kChunkBytes];
  int32_t start[kChunkBytes / 4];
  float scale[kChunkBytes / 4];
};

inline size_t InputRowBytes(const QuantizedMatrix& matrix) {
  return Chunks(matrix) * (matrix.bits == 4 ? sizeof(InputChunk<4>) : sizeof(InputChunk<8>));
}

struct QuantizedKernels {
  // Rounds an input row x [columns] to chunks, 64-byte aligned.
  void (*round)(const QuantizedMatrix& matrix, const float* x, void* chunks);
  // y[i, row] for matrix rows [first, first + count), and each of `inputs` rounded rows. y is [inputs, rows]. What an
  // element is does not depend on what is asked for beside it.
  void (*multiply)(const QuantizedMatrix& matrix, int64_t first, int64_t count, const void* chunks, int64_t inputs,
                   float* y);
};

// The kernels of this processor; null if it has none.
const QuantizedKernels* GetQuantizedKernels();

}  // namespace trimkv::cpu
