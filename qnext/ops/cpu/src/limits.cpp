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

// As many sums as hide the latency of two instructions a cycle and still fit in the registers.
#if defined(__AVX512F__)
constexpr int kSums = 16;
#else
constexpr int kSums = 5;
#endif

// The compiler must believe that operands in memory may have changed: else it would compute a product once for all.
QNEXT_INLINE void forget() { asm volatile("" ::: "memory"); }

template <typename Sum, typename Step>
QNEXT_INLINE void repeat(int64_t rounds, float* out, Step step) {
  Sum sums[kSums] = {};
  for (int64_t round = 0; round < rounds; ++round) {
    forget();
    for (int i = 0; i < kSums; ++i) sums[i] = step(sums[i]);
  }
  for (int i = 0; i < kSums; ++i)
    for (int lane = 0; lane < kLanes; ++lane) out[0] += (float)sums[i][lane];
}

struct Operands {
  float f32[2][kLanes];
  bf16 narrow[2][2 * kLanes];
  uint8_t codes[4 * kLanes];
  int32_t x4;
};

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
  if (kind == Arithmetic::fp32) {
    repeat<f32x16>(rounds, out, [p](f32x16 sum) __attribute__((always_inline)) {
      return fma(sum, load(p->f32[0]), load(p->f32[1]));
    });
    return rounds * kSums * kLanes * 2;
  }
  if (kind == Arithmetic::int8) {
    repeat<i32x16>(rounds, out, [p](i32x16 sum) __attribute__((always_inline)) {
#if !defined(__AVX512VNNI__)
      forget();  // where the product is several instructions, those that do not depend on the sum
#endif
      return dot_codes(sum, load_bytes(p->codes), p->x4);
    });
    return rounds * kSums * 4 * kLanes * 2;
  }
#if defined(__AVX512BF16__)
  repeat<f32x16>(rounds, out, [p](f32x16 sum) __attribute__((always_inline)) {
    return dot_bf16(sum, p->narrow[0], p->narrow[1]);
  });
  return rounds * kSums * 2 * kLanes * 2;
#else
  return 0;
#endif
}

}  // namespace

extern const LimitKernels limit_kernels;
const LimitKernels limit_kernels = {read, multiply};

}  // namespace qnext::QNEXT_ISA
