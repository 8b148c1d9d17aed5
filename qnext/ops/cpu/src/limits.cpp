#include "limits.h"

#include "simd.h"

namespace qnext::QNEXT_ISA {
namespace {

typedef uint64_t u64x8 __attribute__((vector_size(64)));

uint64_t read(const uint8_t* data, int64_t bytes) {
  u64x8 mixed = {};
  for (int64_t i = 0; i < bytes; i += 64) {
    prefetch(data + i + kPrefetchBytes);
    mixed ^= (u64x8)load_bytes(data + i);
  }
  uint64_t out = 0;
  for (int i = 0; i < 8; ++i) out ^= mixed[i];
  return out;
}

// As many sums as hide the latency of two instructions a cycle and still fit in sixteen registers, each a register wide.
constexpr int kSums = 12;
#if defined(__AVX512F__)
typedef f32x16 Floats;
typedef i32x16 Integers;
#elif defined(__AVX2__)
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));
#else
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
#endif
constexpr int64_t kWidth = sizeof(Floats) / 4;

template <typename T>
QNEXT_INLINE T load_as(const void* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}

QNEXT_INLINE Floats multiply_add(Floats sum, Floats a, Floats b) {
#if defined(__AVX512F__)
  return fma(sum, a, b);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)sum, (__m256)a, (__m256)b);
#else
  return sum * a + b;
#endif
}

// Four products of bytes are added to each sum.
QNEXT_INLINE Integers dot_bytes(Integers sum, const uint8_t* codes, int32_t x4) {
#if defined(__AVX512F__)
  return dot_codes(sum, load_bytes(codes), x4);
#elif defined(__AVX2__)
  __m256i pairs = _mm256_maddubs_epi16(load_as<__m256i>(codes), _mm256_set1_epi32(x4));
  return (Integers)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  (void)x4;
  for (int i = 0; i < kWidth; ++i)
    for (int j = 0; j < 4; ++j) sum[i] += codes[4 * i + j];
  return sum;
#endif
}

// The compiler must believe that operands in memory may have changed: else it would compute a product once for all.
QNEXT_INLINE void forget() { asm volatile("" ::: "memory"); }

struct Operands {
  float f32[2][kLanes];
  bf16 narrow[2][2 * kLanes];
  uint8_t codes[4 * kLanes];
  int32_t x4;
  uint8_t starts[kSums][4 * kLanes];
};

// The sums are variables of their own: the compiler keeps an array in memory.
template <typename Sum, typename Step>
QNEXT_INLINE void repeat(int64_t rounds, const Operands* p, float* out, Step step) {
  forget();  // equal beginnings would make twelve sums one
  const auto start = [p](int i) __attribute__((always_inline)) { return load_as<Sum>(p->starts[i]); };
  Sum s0 = start(0), s1 = start(1), s2 = start(2), s3 = start(3), s4 = start(4), s5 = start(5);
  Sum s6 = start(6), s7 = start(7), s8 = start(8), s9 = start(9), s10 = start(10), s11 = start(11);
  for (int64_t round = 0; round < rounds; ++round) {
    forget();
    s0 = step(s0), s1 = step(s1), s2 = step(s2), s3 = step(s3), s4 = step(s4), s5 = step(s5);
    s6 = step(s6), s7 = step(s7), s8 = step(s8), s9 = step(s9), s10 = step(s10), s11 = step(s11);
  }
  Sum all = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + s10 + s11;
  for (int lane = 0; lane < kWidth; ++lane) out[0] += (float)all[lane];
}

int64_t multiply(Arithmetic kind, int64_t rounds, float* out) {
  Operands operands;
  const Operands* volatile escaped = &operands;
  const Operands* p = escaped;
  for (int i = 0; i < 2 * kLanes; ++i) {
    operands.f32[i / kLanes][i % kLanes] = 1.0f;
    operands.narrow[0][i] = operands.narrow[1][i] = to_bf16(1.0f);
  }
  for (uint8_t& code : operands.codes) code = 1;
  operands.x4 = 0x01010101;
  memset(operands.starts, 0, sizeof operands.starts);
  if (kind == Arithmetic::fp32) {
    repeat<Floats>(rounds, p, out, [p](Floats sum) __attribute__((always_inline)) {
      return multiply_add(sum, load_as<Floats>(p->f32[0]), load_as<Floats>(p->f32[1]));
    });
    return rounds * kSums * kWidth * 2;
  }
  if (kind == Arithmetic::int8) {
    repeat<Integers>(rounds, p, out, [p](Integers sum) __attribute__((always_inline)) {
#if !defined(__AVX512VNNI__)
      forget();  // where the product is several instructions, those that do not depend on the sum
#endif
      return dot_bytes(sum, p->codes, p->x4);
    });
    return rounds * kSums * 4 * kWidth * 2;
  }
#if defined(__AVX512BF16__)
  repeat<f32x16>(rounds, p, out, [p](f32x16 sum) __attribute__((always_inline)) {
    return dot_bf16(sum, p->narrow[0], p->narrow[1]);
  });
  return rounds * kSums * 2 * kWidth * 2;
#else
  return 0;
#endif
}

}  // namespace

extern const LimitKernels limit_kernels;
const LimitKernels limit_kernels = {read, multiply};

}  // namespace qnext::QNEXT_ISA
