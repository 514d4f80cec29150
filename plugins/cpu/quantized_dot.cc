// Dot products of 4-bit and 8-bit numbers with rounded inputs, by AVX-512 VNNI, 64 bytes of a matrix row at a time: two
// instructions multiply and add up what a block has on a lane, in whole numbers; then it is scaled and added as float.
// So decoding takes as long as reading the matrix.
#include "cpu/quantized_dot.h"

#include <immintrin.h>

namespace trimkv::cpu {
namespace avx512vnni {
namespace {

constexpr int kLanes = 16;
constexpr int kPrefetchBytes = 4096;  // ahead: mostly later rows, which lie behind

template <bool kHalf>
constexpr size_t kScaleBytes = kHalf ? 2 : 4;

// How the blocks of a matrix row fall on the lanes of a chunk.
class Blocks {
 public:
  template <int kBits>
  static Blocks Make(const QuantizedMatrix& matrix) {
    Blocks out;
    constexpr int kColumns = kChunkBytes * 8 / kBits;
    out.chunk_shift_ = __builtin_ctz(kColumns);
    out.block_shift_ = __builtin_ctz(matrix.block_size);
    const int per_chunk = matrix.block_size < kColumns ? kColumns / matrix.block_size : 1;
    int32_t lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane * per_chunk / kLanes;
    out.lanes_ = _mm512_loadu_si512(lanes);
    const int tail = matrix.columns % kColumns;
    out.whole_ = matrix.columns / kColumns;
    out.mask_ = static_cast<__mmask8>((1 << per_chunk) - 1);
    out.tail_mask_ = static_cast<__mmask8>((1 << (tail + matrix.block_size - 1) / matrix.block_size) - 1);
    out.tail_bytes_ = (uint64_t{1} << tail * kBits / 8) - 1;
    return out;
  }

  int whole() const { return whole_; }                 // chunks that are full
  uint64_t tail_bytes() const { return tail_bytes_; }  // of the last one, if it is not; a mask
  template <bool kTail>
  __mmask8 mask() const {
    return kTail ? tail_mask_ : mask_;
  }
  int first(int chunk) const { return chunk << chunk_shift_ >> block_shift_; }
  __m512i lanes() const { return lanes_; }

 private:
  __m512i lanes_;
  uint64_t tail_bytes_;
  int chunk_shift_, block_shift_, whole_;
  __mmask8 mask_, tail_mask_;
};

template <int kBits, bool kTail>
inline __m512i Numbers(const uint8_t* from, const Blocks& blocks) {
  return kTail ? _mm512_maskz_loadu_epi8(blocks.tail_bytes(), from) : _mm512_loadu_si512(from);
}

// The scales of a chunk, each on its block's lanes.
template <bool kHalf, bool kTail>
inline __m512 Scales(const char* row, const Blocks& blocks, int chunk) {
  const char* const from = row + blocks.first(chunk) * kScaleBytes<kHalf>;
  __m128 found;
  if constexpr (kHalf) {
    found = _mm_cvtph_ps(_mm_maskz_loadu_epi16(blocks.mask<kTail>(), from));
  } else {
    found = _mm_maskz_loadu_ps(blocks.mask<kTail>(), from);
  }
  return _mm512_permutexvar_ps(blocks.lanes(), _mm512_castps128_ps512(found));
}

// The same of the zero points: a byte holds two of 4 bits or one of 8, and a chunk has up to 4 or 2.
template <int kBits, bool kTail>
inline __m512i Zeros(const uint8_t* row, const Blocks& blocks, int chunk) {
  const int first = blocks.first(chunk);
  const int last = first + __builtin_popcount(blocks.mask<kTail>()) - 1;
  const uint8_t* const from = row + first * kBits / 8;
  uint32_t bytes = from[0];
  if (last * kBits / 8 > first * kBits / 8) bytes |= static_cast<uint32_t>(from[1]) << 8;
  const uint32_t each = kBits == 4 ? _pdep_u32(bytes >> first % 2 * 4, 0x0f0f0f0f) : bytes;
  const __m128i found = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(static_cast<int>(each)));
  return _mm512_permutexvar_epi32(blocks.lanes(), _mm512_castsi128_si512(found));
}

// kRows matrix rows by kInputs input rows, chunk by chunk.
template <int kBits, bool kZeros, bool kHalf, int kRows, int kInputs>
class Tile {
  using Chunk = InputChunk<kBits>;

 public:
  Tile(const QuantizedMatrix& matrix, const Blocks& blocks, int64_t row, const Chunk* input, int chunks)
      : blocks_(blocks),
        stride_(static_cast<size_t>(matrix.columns) * kBits / 8),
        scale_stride_(matrix.blocks() * kScaleBytes<kHalf>),
        zero_stride_((static_cast<size_t>(matrix.blocks()) * kBits + 7) / 8),
        numbers_(matrix.numbers + row * stride_),
        scales_(static_cast<const char*>(matrix.scales) + row * scale_stride_),
        zeros_(kZeros ? matrix.zeros + row * zero_stride_ : nullptr),
        input_(input),
        chunks_(chunks) {}

  void Multiply(float* y, int64_t y_stride) {
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kInputs; ++i) sums_[r][i] = _mm512_setzero_ps();
    }
    int chunk = 0;
    for (; chunk < blocks_.whole(); ++chunk) Step<false>(chunk);
    if (chunk < chunks_) Step<true>(chunk);
    for (int i = 0; i < kInputs; ++i) {
      for (int r = 0; r < kRows; ++r) y[i * y_stride + r] = _mm512_reduce_add_ps(sums_[r][i]);
    }
  }

 private:
  template <bool kTail>
  inline __attribute__((always_inline)) void Step(int chunk) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* const from = numbers_ + r * stride_ + static_cast<size_t>(chunk) * kChunkBytes;
      _mm_prefetch(reinterpret_cast<const char*>(from) + kPrefetchBytes, _MM_HINT_T0);
      __m512i part[2];
      part[0] = Numbers<kBits, kTail>(from, blocks_);
      if constexpr (kBits == 4) {
        part[1] = _mm512_and_si512(_mm512_srli_epi16(part[0], 4), low);
        part[0] = _mm512_and_si512(part[0], low);
      }
      const __m512 scale = Scales<kHalf, kTail>(scales_ + r * scale_stride_, blocks_, chunk);
      __m512i zero;
      if constexpr (kZeros) zero = Zeros<kBits, kTail>(zeros_ + r * zero_stride_, blocks_, chunk);
      for (int i = 0; i < kInputs; ++i) {
        const Chunk& input = input_[i * chunks_ + chunk];
        __m512i sum = _mm512_load_si512(input.start);
        if constexpr (kZeros) sum = _mm512_mullo_epi32(sum, zero);
        for (int p = 0; p < Chunk::kParts; ++p) {
          sum = _mm512_dpbusd_epi32(sum, part[p], _mm512_load_si512(input.numbers[p]));
        }
        const __m512 both = _mm512_mul_ps(scale, _mm512_load_ps(input.scale));
        sums_[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, sums_[r][i]);
      }
    }
  }

  const Blocks& blocks_;
  const size_t stride_, scale_stride_, zero_stride_;
  const uint8_t* const numbers_;
  const char* const scales_;
  const uint8_t* const zeros_;
  const Chunk* const input_;
  const int chunks_;
  __m512 sums_[kRows][kInputs];
};

template <int kBits, bool kZeros, bool kHalf, int kRows>
void MultiplyRows(const QuantizedMatrix& matrix, const Blocks& blocks, int64_t row, const InputChunk<kBits>* input,
                  int64_t inputs, float* y) {
  constexpr int kInputs = 4;
  const int chunks = Chunks(matrix);
  int64_t i = 0;
  for (; i + kInputs <= inputs; i += kInputs) {
    Tile<kBits, kZeros, kHalf, kRows, kInputs>(matrix, blocks, row, input + i * chunks, chunks)
        .Multiply(y + i * matrix.rows + row, matrix.rows);
  }
  for (; i < inputs; ++i) {
    Tile<kBits, kZeros, kHalf, kRows, 1>(matrix, blocks, row, input + i * chunks, chunks)
        .Multiply(y + i * matrix.rows + row, matrix.rows);
  }
}

template <int kBits, bool kZeros, bool kHalf>
void MultiplyAll(const QuantizedMatrix& matrix, int64_t first, int64_t count, const void* chunks, int64_t inputs,
                 float* y) {
  constexpr int kRows = 4;
  const Blocks blocks = Blocks::Make<kBits>(matrix);
  const auto* const input = static_cast<const InputChunk<kBits>*>(chunks);
  int64_t row = first;
  for (; row + kRows <= first + count; row += kRows) {
    MultiplyRows<kBits, kZeros, kHalf, kRows>(matrix, blocks, row, input, inputs, y);
  }
  for (; row < first + count; ++row) MultiplyRows<kBits, kZeros, kHalf, 1>(matrix, blocks, row, input, inputs, y);
}

template <int kBits>
void MultiplyOf(const QuantizedMatrix& matrix, int64_t first, int64_t count, const void* chunks, int64_t inputs,
                float* y) {
  const auto multiply = matrix.zeros
                            ? matrix.half_scales ? MultiplyAll<kBits, true, true> : MultiplyAll<kBits, true, false>
                        : matrix.half_scales ? MultiplyAll<kBits, false, true>
                                             : MultiplyAll<kBits, false, false>;
  multiply(matrix, first, count, chunks, inputs, y);
}

void Multiply(const QuantizedMatrix& matrix, int64_t first, int64_t count, const void* chunks, int64_t inputs,
              float* y) {
  (matrix.bits == 4 ? MultiplyOf<4> : MultiplyOf<8>)(matrix, first, count, chunks, inputs, y);
}

// Rounds kInputBlock floats: as 32-bit numbers, the first half and the second. Returns the scale.
inline float RoundBlock(const float* x, __m512i* first, __m512i* second) {
  const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + kLanes);
  const float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
  const __m512 inverse = _mm512_set1_ps(top > 0 ? 127.0f / top : 0.0f);
  *first = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
  *second = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
  return top / 127.0f;
}

template <int kBits>
void RoundRow(const QuantizedMatrix& matrix, const float* x, void* chunks) {
  using Chunk = InputChunk<kBits>;
  constexpr int kColumns = kChunkBytes * 8 / kBits, kBlocks = kColumns / kInputBlock, kOfBlock = kLanes / kBlocks;
  static_assert(kInputBlock == 2 * kLanes);
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  // Of a symmetric matrix all zero points are one number.
  const __m512i factor = _mm512_set1_epi32(matrix.zeros ? -1 : -(1 << (kBits - 1)));
  const __m512i ones = _mm512_set1_epi8(1);
  auto* out = static_cast<Chunk*>(chunks);
  for (int32_t column = 0; column < matrix.columns; column += kColumns, ++out) {
    for (int block = 0; block < kBlocks; ++block) {
      const int32_t at = column + block * kInputBlock;
      __m512i first = _mm512_setzero_si512(), second = first;
      float scale = 0;
      if (at < matrix.columns) scale = RoundBlock(x + at, &first, &second);
      for (int lane = 0; lane < kOfBlock; ++lane) out->scale[block * kOfBlock + lane] = scale;
      __m128i halves[2];
      if (kBits == 4) {
        halves[0] = _mm512_cvtepi32_epi8(_mm512_permutex2var_epi32(first, even, second));
        halves[1] = _mm512_cvtepi32_epi8(_mm512_permutex2var_epi32(first, odd, second));
      } else {
        halves[0] = _mm512_cvtepi32_epi8(first);
        halves[1] = _mm512_cvtepi32_epi8(second);
      }
      // 4 bits: each half its part; 8 bits: one behind the other.
      int8_t* const to = out->numbers[0] + block * kOfBlock * 4;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves[0]);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(kBits == 4 ? to + kChunkBytes : to + kLanes), halves[1]);
    }
    __m512i sum = _mm512_setzero_si512();
    for (int p = 0; p < Chunk::kParts; ++p) {
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_load_si512(out->numbers[p]));
    }
    _mm512_store_si512(out->start, _mm512_mullo_epi32(sum, factor));
  }
}

void Round(const QuantizedMatrix& matrix, const float* x, void* chunks) {
  matrix.bits == 4 ? RoundRow<4>(matrix, x, chunks) : RoundRow<8>(matrix, x, chunks);
}

}  // namespace

extern const QuantizedKernels kKernels;
const QuantizedKernels kKernels = {Round, Multiply};

}  // namespace avx512vnni
}  // namespace trimkv::cpu
