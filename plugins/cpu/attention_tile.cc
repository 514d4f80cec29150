// Inner loops of attention on compiler vectors. CMake compiles this file once for each instruction set, with
// TRIMKV_TARGET naming it; dispatch.cc picks one at run time. Everything is in a namespace of that name, so that no
// function of one set can be linked into another.
#include "cpu/attention_tile.h"

#include <math.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define TRIMKV_JOIN2(a, b) a##b
#define TRIMKV_JOIN(a, b) TRIMKV_JOIN2(a, b)

namespace trimkv::cpu {
namespace TRIMKV_TARGET {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));

inline Vec Load(const float* from) {
  Vec out;
  memcpy(&out, from, sizeof out);
  return out;
}
inline void Store(float* to, Vec value) { memcpy(to, &value, sizeof value); }
inline Vec Splat(float value) { return value - Vec{}; }

// Sums of neighbouring lanes, of a and then of b.
inline Vec PairSums(Vec a, Vec b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// Lane i is the sum of the lanes of values[i]: kWidth sums for the price of a few.
inline Vec Sums(Vec* values) {
  for (int count = kWidth; count > 1; count /= 2) {
    for (int i = 0; i < count / 2; ++i) values[i] = PairSums(values[2 * i], values[2 * i + 1]);
  }
  return values[0];
}

inline float Sum(Vec value) {
  Vec values[kWidth] = {value};
  return Sums(values)[0];
}

// Rows are gathered, so the processor cannot foresee them.
constexpr int kAhead = 8;  // rows; the distance at which memory keeps up

inline void Prefetch(const char* row, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

// exp(x) for x <= 0, to 2 ulp: x = n ln 2 + r, a polynomial for exp(r) (Cephes), 2^n through the exponent bits.
inline Vec Exp(Vec x) {
  x = x < Splat(-87.0f) ? Splat(-87.0f) : x;
  const Vec scaled = x * 1.44269504088896341f - 0.5f;
  const IntVec n = __builtin_convertvector(scaled, IntVec);  // towards zero, which is to nearest here
  const Vec nf = __builtin_convertvector(n, Vec);
  const Vec r = (x - nf * 0.693359375f) + nf * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVec bits = (n + 127) << 23;
  Vec power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

float ExpOne(float x) { return Exp(Splat(x))[0]; }

inline float FromBits(uint32_t bits) {
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}
inline uint32_t ToBits(float value) {
  uint32_t out;
  memcpy(&out, &value, sizeof out);
  return out;
}

inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return FromBits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Multiplying by 2^112 moves the exponent bias and makes subnormal numbers normal.
  return FromBits(sign | ToBits(FromBits(rest << 13) * FromBits(0x77800000u)));
}

inline uint16_t FloatToHalf(float value) {
  const uint32_t bits = ToBits(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds beyond 65504
  if (rest < 0x38800000u) {  // subnormal: adding 0.5 leaves the wanted bits, rounded, at the end
    return static_cast<uint16_t>(sign | (ToBits(FromBits(rest) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
}

inline uint16_t FloatToBfloat(float value) {
  const uint32_t bits = ToBits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

void ToFloat(const void* from, DataType type, int count, float* to) {
  if (type == DataType::kFloat32) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const char* bytes = static_cast<const char*>(from);
  int i = 0;
#if defined(__F16C__)
  if (type == DataType::kFloat16) {
    for (; i + 8 <= count; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 2 * i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
    }
  }
#endif
  for (; i < count; ++i) {
    uint16_t half;
    memcpy(&half, bytes + 2 * i, sizeof half);
    to[i] = type == DataType::kFloat16 ? HalfToFloat(half) : FromBits(static_cast<uint32_t>(half) << 16);
  }
}

void FromFloat(const float* from, DataType type, int count, void* to) {
  if (type == DataType::kFloat32) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int i = 0; i < count; ++i) {
    const uint16_t half = type == DataType::kFloat16 ? FloatToHalf(from[i]) : FloatToBfloat(from[i]);
    memcpy(static_cast<char*>(to) + 2 * i, &half, sizeof half);
  }
}

inline const char* RowOf(const char* base, const Entries& entries, int i) {
  return base + (entries.index ? static_cast<size_t>(entries.index[i]) : static_cast<size_t>(i)) * entries.stride;
}

// Rows of a tile as floats: where they lie, or converted into `buffer` [kTile, D].
inline void Locate(const char* base, const Entries& entries, int dim, DataType type, float* buffer,
                   const float** rows) {
  for (int i = 0; i < entries.count; ++i) {
    const char* row = RowOf(base, entries, i);
    if (type == DataType::kFloat32) {
      rows[i] = reinterpret_cast<const float*>(row);
    } else {
      ToFloat(row, type, dim, buffer + static_cast<size_t>(i) * dim);
      rows[i] = buffer + static_cast<size_t>(i) * dim;
    }
  }
}

// Dot products of kRows query rows with kWidth / kRows key rows, to out[r · kTile + key].
template <int kRows>
inline void Dots(const float* query, int dim, const float* const* keys, float* out) {
  constexpr int kKeys = kWidth / kRows;
  Vec sums[kWidth] = {};  // row by row
  int d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    Vec k[kKeys];
    for (int j = 0; j < kKeys; ++j) k[j] = Load(keys[j] + d);
    for (int r = 0; r < kRows; ++r) {
      const Vec q = Load(query + r * dim + d);
      for (int j = 0; j < kKeys; ++j) sums[r * kKeys + j] += q * k[j];
    }
  }
  float lanes[kWidth];
  Store(lanes, Sums(sums));
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kKeys; ++j) {
      float sum = lanes[r * kKeys + j];
      for (int rest = d; rest < dim; ++rest) sum += query[r * dim + rest] * keys[j][rest];
      out[r * kTile + j] = sum;
    }
  }
}

// acc[r] = acc[r] · decay[r] + Σ weights[r][i] · value[i], for kRows rows.
template <int kRows>
inline void Accumulate(const float* weights, const float* decay, int count, const float* const* values, int dim,
                       float* acc) {
  constexpr int kVecs = kWidth == 16 ? 4 : 2;  // as many sums as there are registers for
  int d = 0;
  for (; d + kVecs * kWidth <= dim; d += kVecs * kWidth) {
    Vec sums[kRows][kVecs];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) sums[r][v] = Load(acc + r * dim + d + v * kWidth) * decay[r];
    }
    for (int i = 0; i < count; ++i) {
      Vec value[kVecs];
      for (int v = 0; v < kVecs; ++v) value[v] = Load(values[i] + d + v * kWidth);
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVecs; ++v) sums[r][v] += value[v] * weights[r * kTile + i];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) Store(acc + r * dim + d + v * kWidth, sums[r][v]);
    }
  }
  for (; d < dim; ++d) {
    for (int r = 0; r < kRows; ++r) {
      float sum = acc[r * dim + d] * decay[r];
      for (int i = 0; i < count; ++i) sum += weights[r * kTile + i] * values[i][d];
      acc[r * dim + d] = sum;
    }
  }
}

// Replaces logits by weights for one row; returns what earlier sums must be multiplied by.
inline float Weigh(float* logits, int count, int visible, float* max, float* sum) {
  for (int i = visible; i < count; ++i) logits[i] = -INFINITY;
  float highest = *max;
  for (int i = 0; i < visible; ++i) highest = logits[i] > highest ? logits[i] : highest;
  if (highest == -INFINITY) {  // nothing visible so far
    for (int i = 0; i < count; ++i) logits[i] = 0;
    return 1;
  }
  const float decay = *max == -INFINITY ? 0 : ExpOne(*max - highest);
  for (int i = count; i < kTile; ++i) logits[i] = -INFINITY;
  Vec total = {};
  for (int i = 0; i < kTile; i += kWidth) {
    const Vec logit = Load(logits + i);
    Vec weight = Exp(logit - highest);
    weight = logit == Splat(-INFINITY) ? Vec{} : weight;
    Store(logits + i, weight);
    total += weight;
  }
  *sum = *sum * decay + Sum(total);
  *max = highest;
  return decay;
}

template <int kRows>
inline void AttendRows(const float* query, int dim, const float* const* keys, const float* const* values,
                       const Entries& entries, const int* visible, const RunningSoftmax& state, int first) {
  constexpr int kKeys = kWidth / kRows;
  static_assert(kTile % kKeys == 0);
  const int count = entries.count;
  float weights[kRows * kTile], decay[kRows];
  for (int i = 0; i < count; i += kKeys) {
    const float* block[kKeys];  // the last key again where there are no more; its columns are not looked at
    for (int j = 0; j < kKeys; ++j) block[j] = keys[i + j < count ? i + j : count - 1];
    if (first == 0) {
      for (int j = 0; j < kKeys; ++j) {
        // Keys of this tile or the next arrive while these are used, values while the weights are computed.
        const int ahead = i + j + kAhead;
        if (ahead < count + entries.following) Prefetch(RowOf(entries.key, entries, ahead), entries.bytes);
        if (i + j < count) Prefetch(RowOf(entries.value, entries, i + j), entries.bytes);
      }
    }
    Dots<kRows>(query + first * dim, dim, block, weights + i);
  }
  for (int r = 0; r < kRows; ++r) {
    decay[r] = Weigh(weights + r * kTile, count, visible[first + r], state.max + first + r, state.sum + first + r);
  }
  Accumulate<kRows>(weights, decay, count, values, dim, state.acc + first * dim);
}

void Attend(const float* query, int rows, int dim, DataType type, const Entries& entries, const int* visible,
            const RunningSoftmax& state) {
  alignas(64) float key_buffer[kTile * kMaxHeadDim], value_buffer[kTile * kMaxHeadDim];
  const float *keys[kTile], *values[kTile];
  Locate(entries.key, entries, dim, type, key_buffer, keys);
  Locate(entries.value, entries, dim, type, value_buffer, values);
  int r = 0;
  for (; r + 4 <= rows; r += 4) AttendRows<4>(query, dim, keys, values, entries, visible, state, r);
  for (; r + 2 <= rows; r += 2) AttendRows<2>(query, dim, keys, values, entries, visible, state, r);
  for (; r < rows; ++r) AttendRows<1>(query, dim, keys, values, entries, visible, state, r);
}

}  // namespace

extern const TileKernels kKernels;
const TileKernels kKernels = {Attend, ExpOne, ToFloat, FromFloat};

}  // namespace TRIMKV_TARGET
}  // namespace trimkv::cpu
