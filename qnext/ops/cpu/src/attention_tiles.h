// The inner products of attention, in registers: scores of a few rows and keys, and weighted sums of values.
//
// A row is one query head of one token. Rows come padded to kRowPad: the padding repeats the last row.
#pragma once

#include <cfloat>

#include "simd.h"

namespace qnext::QNEXT_ISA {

constexpr int kKeyBlock = 64;     // keys between two rescalings of the running sums
constexpr int kKeyChunk = 1024;   // keys whose sums are made apart and then added in order
constexpr int kRowPad = 8;
constexpr int kSliceDims = 32;    // head dims of a slice of packed values
constexpr float kLowest = -1e30f;  // below every score; finite, so that differences of it are no NaN

typedef int8_t i8x16 __attribute__((vector_size(16)));

QNEXT_INLINE f32x16 load(const int8_t* p) {
#if defined(__AVX512F__)
  return to_float((i32x16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  i8x16 v;
  memcpy(&v, p, sizeof v);
  return to_float(__builtin_convertvector(v, i32x16));
#endif
}

// Numbers that are multiplied: fp32, or pairs of bf16 where the CPU multiplies those.
template <typename A>
struct Product {
  typedef f32x16 Vector;
  static constexpr int kStep = 16;     // numbers in a vector
  static constexpr int kKeysEach = 1;  // keys that one multiplication of weights and values takes
  static QNEXT_INLINE Vector fetch(const float* p) { return load(p); }
  static QNEXT_INLINE Vector repeat(const float* p) { return splat(*p); }
  static QNEXT_INLINE f32x16 add(f32x16 acc, Vector a, Vector b) { return fma(a, b, acc); }
};

#if defined(__AVX512BF16__)
template <>
struct Product<bf16> {
  typedef __m512bh Vector;
  static constexpr int kStep = 32;
  static constexpr int kKeysEach = 2;
  static QNEXT_INLINE Vector fetch(const bf16* p) {
    Vector v;
    memcpy(&v, p, 64);
    return v;
  }
  static QNEXT_INLINE Vector repeat(const bf16* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return (Vector)_mm512_set1_epi32(pair);
  }
  static QNEXT_INLINE f32x16 add(f32x16 acc, Vector a, Vector b) {
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, a, b);
  }
};
#endif

// 2^x for x <= 0, and 0 below the range of fp32. Relative error about 2e-7. NaN stays NaN.
QNEXT_INLINE f32x16 exp2_below(f32x16 x) {
  x = vmax(splat(-200.0f), x);
#if defined(__AVX512F__)
  f32x16 n = (f32x16)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, 0);
#else
  const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves whole numbers only
  f32x16 n = (x + magic) - magic;
#endif
  f32x16 f = x - n;
  f32x16 p = splat(1.54035304e-4f);
  p = fma(p, f, splat(1.33335581e-3f));
  p = fma(p, f, splat(9.61812911e-3f));
  p = fma(p, f, splat(5.55041087e-2f));
  p = fma(p, f, splat(2.40226507e-1f));
  p = fma(p, f, splat(6.93147181e-1f));
  p = fma(p, f, splat(1.0f));
#if defined(__AVX512F__)
  return (f32x16)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  i32x16 exponent = __builtin_convertvector(n, i32x16);
  f32x16 scaled = p * (f32x16)((exponent + 127) << 23);
  u32x16 is_zero = (u32x16)(n < splat(-126.0f)), is_nan = (u32x16)(x != x);
  return (f32x16)(((u32x16)scaled & ~is_zero & ~is_nan) | ((u32x16)x & is_nan));
#endif
}

// ---- scores ----

#if defined(__AVX512F__)
// Sums of sixteen vectors, each added up in the order of sum(): lane i of the result belongs to vector i.
QNEXT_INLINE f32x16 sum_each(const f32x16* acc) {
  __m512 quarters[4];
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {  // vectors m, m + 4, m + 8, m + 12
    __m512 a = (__m512)acc[m], b = (__m512)acc[m + 4], c = (__m512)acc[m + 8], d = (__m512)acc[m + 12];
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    quarters[m] = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  }
  __m512 even = _mm512_add_ps(_mm512_shuffle_ps(quarters[0], quarters[1], 0x44),
                              _mm512_shuffle_ps(quarters[0], quarters[1], 0xee));
  __m512 odd = _mm512_add_ps(_mm512_shuffle_ps(quarters[2], quarters[3], 0x44),
                             _mm512_shuffle_ps(quarters[2], quarters[3], 0xee));
  return (f32x16)_mm512_add_ps(_mm512_shuffle_ps(even, odd, 0x88), _mm512_shuffle_ps(even, odd, 0xdd));
}
constexpr int kScoreTile = 4;
#else
constexpr int kScoreTile = 2;
#endif

template <typename A, typename Page, bool kAhead>
QNEXT_INLINE void score_tile_(const A* const* rows, const A* const* keys, int64_t head_dim, float* scores,
                              const char* ahead0, const char* ahead1) {
  for (int r = 0; r < 4; r += kScoreTile)
    for (int t = 0; t < 4; t += kScoreTile) {
      f32x16 acc[kScoreTile * kScoreTile] = {};
      for (int64_t d = 0; d < head_dim; d += Product<A>::kStep) {
        if constexpr (kAhead) {
          prefetch(ahead0 + d * sizeof(Page));
          prefetch(ahead1 + d * sizeof(Page));
        }
        typename Product<A>::Vector key[kScoreTile];
#pragma GCC unroll 4
        for (int j = 0; j < kScoreTile; ++j) key[j] = Product<A>::fetch(keys[t + j] + d);
#pragma GCC unroll 4
        for (int i = 0; i < kScoreTile; ++i) {
          auto row = Product<A>::fetch(rows[r + i] + d);
#pragma GCC unroll 4
          for (int j = 0; j < kScoreTile; ++j)
            acc[i * kScoreTile + j] = Product<A>::add(acc[i * kScoreTile + j], row, key[j]);
        }
      }
#if defined(__AVX512F__)
      f32x16 sums = sum_each(acc);
      for (int i = 0; i < 4; ++i) memcpy(scores + i * kKeyBlock, reinterpret_cast<const float*>(&sums) + 4 * i, 16);
#else
      for (int i = 0; i < kScoreTile; ++i)
        for (int j = 0; j < kScoreTile; ++j) scores[(r + i) * kKeyBlock + t + j] = sum(acc[i * kScoreTile + j]);
#endif
    }
}

// Products of four rows and four keys into scores[row * kKeyBlock + key]. `ahead`, unless null, names two keys among the
// pages that are asked for on the way.
template <typename A, typename Page>
QNEXT_INLINE void score_tile(const A* const* rows, const A* const* keys, int64_t head_dim, float* scores,
                             const char* const* ahead) {
  if (ahead) return score_tile_<A, Page, true>(rows, keys, head_dim, scores, ahead[0], ahead[1]);
  score_tile_<A, Page, false>(rows, keys, head_dim, scores, nullptr, nullptr);
}
// ---- values ----

#if defined(__AVX512F__)
constexpr int kValueRows = 8;
#else
constexpr int kValueRows = 2;
#endif

// acc[row, 32 dims] = acc * factor + sum over keys of weight * value, for kValueRows rows and one slice of packed
// values [num_steps][2][Product<A>::kStep].
template <typename A, typename Page, bool kAhead>
QNEXT_INLINE void value_tile_(const A* weights, const A* values, int num_steps, const float* factors, float* acc,
                              int64_t acc_stride, const char* const* ahead, int64_t d) {
  f32x16 sums[kValueRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kValueRows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) sums[r][j] = load(acc + r * acc_stride + j * kLanes) * splat(factors[r]);
  for (int step = 0; step < num_steps; ++step) {
    if constexpr (kAhead)
      for (int i = 0; i < Product<A>::kKeysEach; ++i)
        prefetch(ahead[step * Product<A>::kKeysEach + i] + d * static_cast<int64_t>(sizeof(Page)));
    auto first = Product<A>::fetch(values + step * 2 * Product<A>::kStep);
    auto second = Product<A>::fetch(values + (step * 2 + 1) * Product<A>::kStep);
#pragma GCC unroll 8
    for (int r = 0; r < kValueRows; ++r) {
      auto weight = Product<A>::repeat(weights + r * kKeyBlock + step * Product<A>::kKeysEach);
      sums[r][0] = Product<A>::add(sums[r][0], weight, first);
      sums[r][1] = Product<A>::add(sums[r][1], weight, second);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kValueRows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) store(acc + r * acc_stride + j * kLanes, sums[r][j]);
}

template <typename A, typename Page>
QNEXT_INLINE void value_tile(const A* weights, const A* values, int num_steps, const float* factors, float* acc,
                             int64_t acc_stride, const char* const* ahead, int64_t d) {
  if (ahead) return value_tile_<A, Page, true>(weights, values, num_steps, factors, acc, acc_stride, ahead, d);
  value_tile_<A, Page, false>(weights, values, num_steps, factors, acc, acc_stride, ahead, d);
}

// Values of one step (a key, or a pair of keys for bf16) into every slice of the packed block. A key that is null
// counts as zeros.
QNEXT_INLINE void pack_values(const float* const* keys, int64_t head_dim, int step, float* packed) {
  for (int64_t d = 0; d < head_dim; d += kSliceDims) {
    float* to = packed + d * kKeyBlock + step * kSliceDims;
    for (int j = 0; j < kSliceDims; j += kLanes) store(to + j, keys[0] ? load(keys[0] + d + j) : splat(0.0f));
  }
}

#if defined(__AVX512BF16__)
QNEXT_INLINE void pack_values(const bf16* const* keys, int64_t head_dim, int step, bf16* packed) {
  alignas(64) uint16_t order[2][32];  // numbers of one key and of the other in turn, dims in their order
  for (int i = 0; i < 32; ++i)
    for (int half = 0; half < 2; ++half) order[half][i] = static_cast<uint16_t>(16 * half + i / 2 + 32 * (i % 2));
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  for (int64_t d = 0; d < head_dim; d += kSliceDims) {
    __m512i a = keys[0] ? _mm512_loadu_si512(keys[0] + d) : _mm512_setzero_si512();
    __m512i b = keys[1] ? _mm512_loadu_si512(keys[1] + d) : _mm512_setzero_si512();
    bf16* to = packed + d * kKeyBlock + step * 2 * kSliceDims;
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(to + kSliceDims, _mm512_permutex2var_epi16(a, high, b));
  }
}
#endif

}  // namespace qnext::QNEXT_ISA
