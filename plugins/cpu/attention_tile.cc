// Inner loops of attention on compiler vectors. CMake compiles this file once for each instruction set, with
// TRIMKV_TARGET naming it; dispatch.cc picks one at run time. Everything is in a namespace of that name, so that no
// function of one set can be linked into another.
#include "cpu/attention_tile.h"

#include <math.h>
#include <string.h>

#include <type_traits>

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

struct Plus {
  Vec operator()(Vec a, Vec b) const { return a + b; }
};
struct Max {
  Vec operator()(Vec a, Vec b) const { return a > b ? a : b; }
};

// One step of Reduce: the lanes of `a` and `b` combined by halves and put into one vector. kStep counts from 0; the
// first two stay within 128 bits, where shuffles are cheapest.
template <int kStep, typename Op>
inline Vec Fold(Vec a, Vec b, Op op) {
#if defined(__AVX512F__)
  if constexpr (kStep == 0) {
    return op(__builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29),
              __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31));
  } else if constexpr (kStep == 1) {
    return op(__builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
              __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  } else {
    return op(__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
              __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
  }
#elif defined(__AVX2__)
  if constexpr (kStep == 0) {
    return op(__builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13),
              __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15));
  } else if constexpr (kStep == 1) {
    return op(__builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13),
              __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15));
  } else {
    return op(__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11),
              __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15));
  }
#else
  if constexpr (kStep == 0) {
    return op(__builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(a, b, 2, 6, 3, 7));
  } else {
    return op(__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7));
  }
#endif
}

// Lane i is the lanes of values[i] in one: kWidth sums, say, for the price of a few.
template <typename Op, int kStep = 0>
inline Vec Reduce(Vec* values, Op op) {
  constexpr int kCount = kWidth >> kStep;
  if constexpr (kCount == 1) {
    return values[0];
  } else {
    for (int i = 0; i < kCount / 2; ++i) values[i] = Fold<kStep>(values[2 * i], values[2 * i + 1], op);
    return Reduce<Op, kStep + 1>(values, op);
  }
}

// Rows are gathered, so the processor cannot foresee them. Lines are asked for one by one between the arithmetic: a
// burst would fill the processor's queue of misses and hold it up.
constexpr int kAhead = 64;  // rows; far, and into the second-level cache: most lines are on their way at once
constexpr int kLine = 64;   // bytes

inline void Prefetch(const char* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at, 0, 2);
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

// Where the rows of a tile lie: row i of the keys at key + offset[i], as floats, and of the values at value +
// offset[i].
struct Tile {
  const char *key, *value;
  size_t offset[kTile];
  const char *key_source, *value_source;  // of the rows to ask for meanwhile, at ahead[i]
  size_t ahead[kTile];
};

inline size_t OffsetOf(const Entries& entries, int i) {
  return (entries.index ? static_cast<size_t>(entries.index[i]) : static_cast<size_t>(i)) * entries.stride;
}

// Float rows are used where they lie; others are converted into `key` and `value`, each [kTile, D], and their
// successors asked for here. To ask for: the row kAhead behind each, or the last there is.
inline void Locate(const Entries& entries, int dim, DataType type, float* key, float* value, Tile* tile) {
  const int last = entries.count + entries.following - 1;
  for (int i = 0; i < entries.count; ++i) {
    tile->offset[i] = OffsetOf(entries, i);
    tile->ahead[i] = OffsetOf(entries, i + kAhead < last ? i + kAhead : last);
  }
  tile->key = tile->key_source = entries.key;
  tile->value = tile->value_source = entries.value;
  if (type != DataType::kFloat32) {
    for (int i = 0; i < entries.count; ++i) {
      Prefetch(entries.key + tile->ahead[i], entries.bytes);
      Prefetch(entries.value + tile->ahead[i], entries.bytes);
      ToFloat(entries.key + tile->offset[i], type, dim, key + i * dim);
      ToFloat(entries.value + tile->offset[i], type, dim, value + i * dim);
      tile->offset[i] = static_cast<size_t>(i) * dim * sizeof(float);
    }
    tile->key = reinterpret_cast<const char*>(key);
    tile->value = reinterpret_cast<const char*>(value);
  }
  // Dots takes whole blocks of keys: the last one again where there are no more; its columns are not looked at.
  for (int i = entries.count; i % kWidth != 0; ++i) {
    tile->offset[i] = tile->offset[entries.count - 1];
    tile->ahead[i] = tile->ahead[entries.count - 1];
  }
}

inline const float* Floats(const char* base, size_t offset) { return reinterpret_cast<const float*>(base + offset); }

// Dot products of kRows query rows with the kWidth / kRows keys from `first` on, to out[r · kTile + key]. With
// kPrefetch, the tile's next keys are asked for meanwhile.
template <int kRows, bool kPrefetch>
inline void Dots(const float* query, int dim, const Tile& tile, int first, float* out) {
  constexpr int kKeys = kWidth / kRows;
  const float* keys[kKeys];
  for (int j = 0; j < kKeys; ++j) keys[j] = Floats(tile.key, tile.offset[first + j]);
  Vec sums[kWidth] = {};  // row by row
  int d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    Vec k[kKeys];
    for (int j = 0; j < kKeys; ++j) k[j] = Load(keys[j] + d);
    if constexpr (kPrefetch) {
      for (int j = 0; j < kKeys; ++j) {
        Prefetch(tile.key_source + tile.ahead[first + j] + d * sizeof(float), kWidth * sizeof(float));
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec q = Load(query + r * dim + d);
      for (int j = 0; j < kKeys; ++j) sums[r * kKeys + j] += q * k[j];
    }
  }
  float lanes[kWidth];
  Store(lanes, Reduce(sums, Plus()));
  for (int rest = d; rest < dim; ++rest) {
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kKeys; ++j) lanes[r * kKeys + j] += query[r * dim + rest] * keys[j][rest];
    }
  }
  for (int r = 0; r < kRows; ++r) memcpy(out + r * kTile + first, lanes + r * kKeys, kKeys * sizeof(float));
}

// acc[r] = acc[r] · decay[r] + Σ weights[r][i] · value[i], for kRows rows. kPrefetch as for Dots.
template <int kRows, bool kPrefetch>
inline void Accumulate(const float* weights, const float* decay, int count, const Tile& tile, int dim, float* acc) {
  constexpr int kVecs = kWidth == 16 ? 4 : 2;  // as many sums as there are registers for
  int d = 0;
  for (; d + kVecs * kWidth <= dim; d += kVecs * kWidth) {
    Vec sums[kRows][kVecs];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) sums[r][v] = Load(acc + r * dim + d + v * kWidth) * decay[r];
    }
    for (int i = 0; i < count; ++i) {
      Vec value[kVecs];
      const float* const row = Floats(tile.value, tile.offset[i]) + d;
      for (int v = 0; v < kVecs; ++v) value[v] = Load(row + v * kWidth);
      if constexpr (kPrefetch) {
        Prefetch(tile.value_source + tile.ahead[i] + d * sizeof(float), kVecs * kWidth * sizeof(float));
      }
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
      for (int i = 0; i < count; ++i) sum += weights[r * kTile + i] * Floats(tile.value, tile.offset[i])[d];
      acc[r * dim + d] = sum;
    }
  }
}

// Replaces logits [kRows, kTile] by weights, and takes them into `max` and `sum`. Row r sees the first visible[r]
// entries. `decay`: what each row's earlier sums must be multiplied by.
template <int kRows>
inline void Weigh(float* logits, const int* visible, float* max, float* sum, float* decay) {
  const Vec nothing = Splat(-INFINITY);
  Vec lanes[kWidth];
  for (int r = 0; r < kWidth; ++r) lanes[r] = nothing;
  for (int r = 0; r < kRows; ++r) {
    float* const row = logits + r * kTile;
    for (int i = visible[r]; i < kTile; ++i) row[i] = -INFINITY;
    for (int i = 0; i < kTile; i += kWidth) lanes[r] = Max()(lanes[r], Load(row + i));
  }
  const Vec highest = Reduce(lanes, Max());
  for (int r = 0; r < kWidth; ++r) lanes[r] = Vec{};
  for (int r = 0; r < kRows; ++r) {
    float* const row = logits + r * kTile;
    const float top = highest[r] > max[r] ? highest[r] : max[r];
    decay[r] = max[r] == -INFINITY ? 0 : ExpOne(max[r] - top);
    max[r] = top;
    const float shift = top == -INFINITY ? 0 : top;  // nothing visible so far
    for (int i = 0; i < kTile; i += kWidth) {
      const Vec logit = Load(row + i);
      const Vec weight = logit == nothing ? Vec{} : Exp(logit - shift);
      Store(row + i, weight);
      lanes[r] += weight;
    }
  }
  const Vec total = Reduce(lanes, Plus());
  for (int r = 0; r < kRows; ++r) sum[r] = sum[r] * decay[r] + total[r];
}

template <int kRows, bool kPrefetch>
inline void AttendRows(const float* query, int dim, const Tile& tile, int count, const int* visible,
                       const RunningSoftmax& state, int first) {
  constexpr int kKeys = kWidth / kRows;
  static_assert(kTile % kKeys == 0);
  float weights[kRows * kTile], decay[kRows];
  for (int i = 0; i < count; i += kKeys) Dots<kRows, kPrefetch>(query + first * dim, dim, tile, i, weights);
  Weigh<kRows>(weights, visible + first, state.max + first, state.sum + first, decay);
  Accumulate<kRows, kPrefetch>(weights, decay, count, tile, dim, state.acc + first * dim);
}

void Attend(const float* query, int rows, int dim, DataType type, const Entries& entries, const int* visible,
            const RunningSoftmax& state) {
  alignas(64) float key[kTile * kMaxHeadDim], value[kTile * kMaxHeadDim];
  Tile tile;
  Locate(entries, dim, type, key, value, &tile);
  bool prefetch = type == DataType::kFloat32;  // the first pass over the rows brings the next ones
  const auto attend = [&](auto count_of_rows, int first) {
    constexpr int kRows = decltype(count_of_rows)::value;
    if (prefetch) {
      AttendRows<kRows, true>(query, dim, tile, entries.count, visible, state, first);
    } else {
      AttendRows<kRows, false>(query, dim, tile, entries.count, visible, state, first);
    }
    prefetch = false;
  };
  int r = 0;
  for (; r + 4 <= rows; r += 4) attend(std::integral_constant<int, 4>(), r);
  for (; r + 2 <= rows; r += 2) attend(std::integral_constant<int, 2>(), r);
  for (; r < rows; ++r) attend(std::integral_constant<int, 1>(), r);
}

}  // namespace

extern const TileKernels kKernels;
const TileKernels kKernels = {Attend, ExpOne, ToFloat, FromFloat};

}  // namespace TRIMKV_TARGET
}  // namespace trimkv::cpu
