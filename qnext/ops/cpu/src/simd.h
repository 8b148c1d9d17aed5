// Sixteen-lane vectors for every instruction set that the kernels are compiled for.
//
// The sources of the kernels are compiled once per instruction set (see CMakeLists.txt), each time in a namespace of its
// own: QNEXT_ISA. Vectors are the compiler's own (GCC and Clang), so every target compiles, ARM included; intrinsics
// stand only where the compiler cannot find the instruction by itself. Nothing here may be contracted or reassociated
// (-ffp-contract=off): equal code must give equal bits wherever it is inlined.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef QNEXT_ISA
#error "compile with -DQNEXT_ISA=<name of the instruction set>"
#endif

#define QNEXT_INLINE inline __attribute__((always_inline))

namespace qnext::QNEXT_ISA {

constexpr int kLanes = 16;
constexpr int64_t kPrefetchBytes = 4096;  // how far ahead a stream of weights is asked for

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

template <typename T>
QNEXT_INLINE T smaller(T a, T b) { return a < b ? a : b; }
template <typename T>
QNEXT_INLINE T larger(T a, T b) { return a > b ? a : b; }

QNEXT_INLINE f32x16 splat(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
QNEXT_INLINE i32x16 splat(int32_t x) { return i32x16{} + x; }

QNEXT_INLINE f32x16 load(const float* p) {
  f32x16 v;
  memcpy(&v, p, sizeof v);
  return v;
}
QNEXT_INLINE void store(float* p, f32x16 v) { memcpy(p, &v, sizeof v); }

QNEXT_INLINE u8x64 load_bytes(const uint8_t* p) {
  u8x64 v;
  memcpy(&v, p, sizeof v);
  return v;
}
QNEXT_INLINE void store_bytes(uint8_t* p, u8x64 v) { memcpy(p, &v, sizeof v); }

QNEXT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// a * b + c, rounded once where the CPU can.
QNEXT_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  __m256 parts[3][2];
  memcpy(parts[0], &a, 64);
  memcpy(parts[1], &b, 64);
  memcpy(parts[2], &c, 64);
  __m256 sums[2] = {_mm256_fmadd_ps(parts[0][0], parts[1][0], parts[2][0]),
                    _mm256_fmadd_ps(parts[0][1], parts[1][1], parts[2][1])};
  f32x16 out;
  memcpy(&out, sums, 64);
  return out;
#else
  return a * b + c;
#endif
}

QNEXT_INLINE f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }

// The widest vector that a register holds, for loops whose sums must stay in registers: sixteen lanes are two or four
// registers elsewhere, and the compiler moves those through memory.
#if defined(__AVX512F__)
constexpr int kRegisterLanes = 16;
#elif defined(__AVX2__)
constexpr int kRegisterLanes = 8;
#else
constexpr int kRegisterLanes = 4;
#endif
typedef float f32reg __attribute__((vector_size(4 * kRegisterLanes)));
typedef int32_t i32reg __attribute__((vector_size(4 * kRegisterLanes)));
typedef uint32_t u32reg __attribute__((vector_size(4 * kRegisterLanes)));

QNEXT_INLINE f32reg load_register(const float* p) {
  f32reg v;
  memcpy(&v, p, sizeof v);
  return v;
}
QNEXT_INLINE f32reg splat_register(float x) {
#if defined(__AVX512F__)
  return splat(x);
#elif defined(__AVX2__)
  return f32reg{x, x, x, x, x, x, x, x};
#else
  return f32reg{x, x, x, x};
#endif
}
#if !defined(__AVX512F__)
QNEXT_INLINE void store(float* p, f32reg v) { memcpy(p, &v, sizeof v); }
QNEXT_INLINE f32reg fma(f32reg a, f32reg b, f32reg c) {
#if defined(__FMA__)
  return (f32reg)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
#endif

// Sum of all lanes: halves are added, then quarters, and so on. One order for every caller.
QNEXT_INLINE float sum(f32x16 v) {
  float x[16];
  memcpy(x, &v, 64);
#if defined(__AVX512F__)
  __m256 low = _mm512_castps512_ps256((__m512)v);
  __m256 high = _mm512_extractf32x8_ps((__m512)v, 1);
  __m256 s8 = _mm256_add_ps(low, high);
  __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
#else
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
#endif
}

#if !defined(__AVX512F__)
// The same, of the register-wide vector.
QNEXT_INLINE float sum(f32reg v) {
  float x[kRegisterLanes];
  memcpy(x, &v, sizeof v);
  for (int width = kRegisterLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

QNEXT_INLINE f32reg vmax(f32reg a, f32reg b) { return a > b ? a : b; }
QNEXT_INLINE f32reg vmin(f32reg a, f32reg b) { return a < b ? a : b; }
QNEXT_INLINE f32reg vabs(f32reg v) { return (f32reg)((u32reg)v & 0x7fffffffu); }
QNEXT_INLINE f32reg to_float(i32reg v) { return __builtin_convertvector(v, f32reg); }
QNEXT_INLINE float max_lane(f32reg v) {
  float x[kRegisterLanes];
  memcpy(x, &v, sizeof v);
  for (int width = kRegisterLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] = larger(x[i], x[i + width]);
  return x[0];
}

// f of each register of v and of `others`: the compiler makes comparisons of wider vectors lane by lane.
template <typename F, typename... Others>
QNEXT_INLINE f32x16 by_register(F f, f32x16 v, Others... others) {
  float x[1 + sizeof...(others)][kLanes];
  int count = 0;
  memcpy(x[count++], &v, sizeof v);
  (memcpy(x[count++], &others, sizeof others), ...);
  for (int i = 0; i < kLanes; i += kRegisterLanes) {
    if constexpr (sizeof...(others) == 0)
      store(x[0] + i, f(load_register(x[0] + i)));
    else
      store(x[0] + i, f(load_register(x[0] + i), load_register(x[1] + i)));
  }
  return load(x[0]);
}
#endif

QNEXT_INLINE f32x16 vmax(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return by_register([](f32reg x, f32reg y) { return vmax(x, y); }, a, b);
#endif
}
QNEXT_INLINE f32x16 vmin(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return by_register([](f32reg x, f32reg y) { return vmin(x, y); }, a, b);
#endif
}

QNEXT_INLINE float max_lane(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  f32reg best = load_register((const float*)&v);
  for (int i = kRegisterLanes; i < kLanes; i += kRegisterLanes) best = vmax(best, load_register((const float*)&v + i));
  return max_lane(best);
#endif
}
QNEXT_INLINE f32x16 vabs(f32x16 v) { return (f32x16)((u32x16)v & (u32x16{} + 0x7fffffffu)); }

// To the nearest integer, ties to even.
QNEXT_INLINE i32reg round_to_int(f32reg v) {
#if defined(__AVX512F__)
  return (i32reg)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (i32reg)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (i32reg)_mm_cvtps_epi32((__m128)v);
#else
  i32reg out;
  for (int i = 0; i < kRegisterLanes; ++i) out[i] = (int32_t)__builtin_nearbyintf(v[i]);
  return out;
#endif
}

#if !defined(__AVX512F__)
QNEXT_INLINE i32x16 round_to_int(f32x16 v) {
  i32reg parts[kLanes / kRegisterLanes];
  for (int i = 0; i < kLanes / kRegisterLanes; ++i)
    parts[i] = round_to_int(load_register((const float*)&v + i * kRegisterLanes));
  i32x16 out;
  memcpy(&out, parts, sizeof out);
  return out;
}
#endif

// Numbers from -128 to 127.
QNEXT_INLINE void store(int8_t* p, i32reg v) {
#if defined(__AVX512F__)
  __m128i narrow = _mm512_cvtepi32_epi8((__m512i)v);
  memcpy(p, &narrow, 16);
#elif defined(__AVX2__)
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  words = _mm_packs_epi16(words, words);
  memcpy(p, &words, 8);
#elif defined(__SSE2__)
  __m128i words = _mm_packs_epi32((__m128i)v, (__m128i)v);
  words = _mm_packs_epi16(words, words);
  memcpy(p, &words, 4);
#else
  for (int i = 0; i < kRegisterLanes; ++i) p[i] = (int8_t)v[i];
#endif
}

// ---- 16-bit floats ----

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

QNEXT_INLINE f32x16 load(const bf16* p) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  u16x16 v;
  memcpy(&v, p, sizeof v);
  return (f32x16)(__builtin_convertvector(v, u32x16) << 16);
#endif
}

QNEXT_INLINE f32reg load_register(const bf16* p) {
#if defined(__AVX512F__)
  return load(p);
#elif defined(__AVX2__)
  return (f32reg)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#elif defined(__SSE2__)
  return (f32reg)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)p));
#else
  f32reg v;
  for (int i = 0; i < kRegisterLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
QNEXT_INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{(uint16_t)((bits >> 16) | 0x40)};
  return bf16{(uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

QNEXT_INLINE void store(bf16* p, f32x16 v) {
#if defined(__AVX512BF16__)
  __m256bh out = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &out, 32);
#else
  u32x16 bits = (u32x16)v;
  u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  u32x16 is_nan = (u32x16)((i32x16)(bits & 0x7fffffffu) > (i32x16{} + 0x7f800000));
  rounded = (is_nan & ((bits >> 16) | 0x40)) | (~is_nan & rounded);
  u16x16 out = __builtin_convertvector(rounded, u16x16);
  memcpy(p, &out, 32);
#endif
}

// The same, widened again.
QNEXT_INLINE f32reg round_to_bf16(f32reg v) {
#if defined(__AVX512BF16__)
  return (f32reg)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)), 16);
#else
  const u32reg bits = (u32reg)v;
  const u32reg is_nan = (u32reg)((i32reg)(bits & 0x7fffffffu) > (i32reg{} + 0x7f800000));
  const u32reg rounded = bits + 0x7fffu + ((bits >> 16) & 1);
  return (f32reg)(((is_nan & (bits | 0x400000u)) | (~is_nan & rounded)) & 0xffff0000u);
#endif
}

#if !defined(__AVX512F__)
QNEXT_INLINE void store(bf16* p, f32reg v) {
  typedef uint16_t u16half __attribute__((vector_size(2 * kRegisterLanes)));
  const u16half out = __builtin_convertvector((u32reg)round_to_bf16(v) >> 16, u16half);
  memcpy(p, &out, sizeof out);
}
#endif

QNEXT_INLINE float to_float(f16 x) {
  uint32_t half = x.bits, sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu, bits;
  if (magnitude >= 0x7c00u) {
    bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else {  // shifting the exponent as if it were a float's, then scaling, gives subnormals too
    bits = magnitude << 13;
    float scaled;
    memcpy(&scaled, &bits, 4);
    scaled *= 0x1p112f;
    memcpy(&bits, &scaled, 4);
    bits |= sign;
  }
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

QNEXT_INLINE f32reg load_register(const f16* p) {
#if defined(__AVX512F__)
  return (f32reg)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (f32reg)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  f32reg v;
  for (int i = 0; i < kRegisterLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// ---- products of narrow numbers ----

#if defined(__AVX512VNNI__)
// acc[i] += sum over j < 4 of codes[4 i + j] * x[j]: unsigned codes, signed x, exact in int32.
QNEXT_INLINE i32x16 dot_codes(i32x16 acc, u8x64 codes, int32_t x4) {
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, _mm512_set1_epi32(x4));
}
#else
typedef int16_t i16reg __attribute__((vector_size(4 * kRegisterLanes)));
typedef uint16_t u16reg __attribute__((vector_size(4 * kRegisterLanes)));
typedef uint8_t u8reg __attribute__((vector_size(4 * kRegisterLanes)));

// Four signed bytes, ready to be multiplied with nibbles.
struct FourBytes {
#if defined(__AVX2__)
  __m256i all;
#else
  i16reg even, odd;
#endif
};
QNEXT_INLINE FourBytes four_bytes(const int8_t* p) {
  int32_t word;
  memcpy(&word, p, 4);
#if defined(__AVX2__)
  return {_mm256_set1_epi32(word)};
#else
  const i16reg both = (i16reg)(i32reg{} + word);
  return {(i16reg)((u16reg)both << 8) >> 8, both >> 8};
#endif
}

// sums[2 i] += codes[4 i] * x[0] + codes[4 i + 1] * x[1], sums[2 i + 1] likewise with 2 and 3: codes 0 to 15, so that
// eight calls fit into 16 bits.
QNEXT_INLINE i16reg dot_nibbles(i16reg sums, u8reg codes, FourBytes x) {
#if defined(__AVX2__)
  return sums + (i16reg)_mm256_maddubs_epi16((__m256i)codes, x.all);
#else
  return sums + (i16reg)((u16reg)codes & 0xff) * x.even + (i16reg)((u16reg)codes >> 8) * x.odd;
#endif
}

// factor * (sums[2 i] + sums[2 i + 1]) in int32.
QNEXT_INLINE i32reg add_pairs(i16reg sums, int16_t factor) {
#if defined(__AVX2__)
  return (i32reg)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(factor));
#elif defined(__SSE2__)
  return (i32reg)_mm_madd_epi16((__m128i)sums, _mm_set1_epi16(factor));
#else
  const i32reg words = (i32reg)sums;
  return (((i32reg)((u32reg)words << 16) >> 16) + (words >> 16)) * factor;
#endif
}
#endif

// acc[i] += w[2 i] * x[2 i] + w[2 i + 1] * x[2 i + 1] for 32 bf16 numbers each.
#if defined(__AVX512BF16__)
constexpr bool kHasBf16 = true;
QNEXT_INLINE f32x16 dot_bf16(f32x16 acc, const bf16* w, const bf16* x) {
  __m512bh a, b;
  memcpy(&a, w, 64);
  memcpy(&b, x, 64);
  return (f32x16)_mm512_dpbf16_ps((__m512)acc, a, b);
}
#else
constexpr bool kHasBf16 = false;
#endif

// ---- functions ----

// e^x for x <= 88; 0 below -87.3. Relative error about 2e-7. NaN stays NaN.
QNEXT_INLINE f32reg exp(f32reg x) {
  f32reg bounded = vmin(vmax(x, splat_register(-87.33654f)), splat_register(88.37626f));
  i32reg n = round_to_int(bounded * splat_register(1.44269504f));
  f32reg nf = to_float(n);
  f32reg r = fma(nf, splat_register(-0.693359375f), bounded);
  r = fma(nf, splat_register(2.12194440e-4f), r);
  f32reg p = splat_register(1.9875691500e-4f);
  p = fma(p, r, splat_register(1.3981999507e-3f));
  p = fma(p, r, splat_register(8.3334519073e-3f));
  p = fma(p, r, splat_register(4.1665795894e-2f));
  p = fma(p, r, splat_register(1.6666665459e-1f));
  p = fma(p, r, splat_register(5.0000001201e-1f));
  f32reg y = fma(p, r * r, r) + splat_register(1.0f);
  f32reg scale = (f32reg)((n + 127) << 23);
  f32reg out = y * scale;
  out = (f32reg)((u32reg)out & ~(u32reg)(x < splat_register(-87.33654f)));
  u32reg is_nan = (u32reg)(x != x);
  return (f32reg)(((u32reg)out & ~is_nan) | ((u32reg)x & is_nan));
}

QNEXT_INLINE f32reg sigmoid(f32reg x) { return splat_register(1.0f) / (splat_register(1.0f) + exp(-x)); }
QNEXT_INLINE f32reg silu(f32reg x) { return x * sigmoid(x); }
#if !defined(__AVX512F__)
QNEXT_INLINE f32x16 exp(f32x16 x) { return by_register([](f32reg v) { return exp(v); }, x); }
QNEXT_INLINE f32x16 sigmoid(f32x16 x) { return by_register([](f32reg v) { return sigmoid(v); }, x); }
QNEXT_INLINE f32x16 silu(f32x16 x) { return by_register([](f32reg v) { return silu(v); }, x); }
#endif
QNEXT_INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
QNEXT_INLINE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// Sum of products of a multiple of 16 numbers.
QNEXT_INLINE float dot_registers(const float* a, const float* b, int64_t size) {
  f32reg acc{};
  for (int64_t i = 0; i < size; i += kRegisterLanes) acc = fma(load_register(a + i), load_register(b + i), acc);
  return sum(acc);
}

}  // namespace qnext::QNEXT_ISA
