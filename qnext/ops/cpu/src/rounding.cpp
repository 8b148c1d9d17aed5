#include "rounding.h"

#include "pool.h"
#include "simd.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int64_t kNumbersPerTask = 1 << 16;
constexpr int kMaxGroup = 128;
// Groups that are looked at together: whatever there is one of for each group is a vector of theirs, and no step waits for
// the one before it.
constexpr int kGroups = 8;
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));

// ---- steps ----

QNEXT_INLINE f32reg round_even(f32reg v) {
#if defined(__AVX512F__)
  return (f32reg)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (f32reg)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const f32reg magic = splat_register(0x1.8p23f);  // `v` is small: it has been held between the codes
  return (v + magic) - magic;
#endif
}

// The nearest whole number of steps that a code can express, from -zero to zero - 1.
QNEXT_INLINE f32reg nearest_step(f32reg quotient, f32reg lowest, f32reg highest) {
  return round_even(vmin(vmax(quotient, lowest), highest));
}

// ---- sums ----

// Sixteen running sums, one for each place of an input in its sixteen.
struct Lanes {
  f32reg part[kLanes / kRegisterLanes];
};

struct Add {
  QNEXT_INLINE static f32x8 of(f32x8 a, f32x8 b) { return a + b; }
};
struct Max {
  QNEXT_INLINE static f32x8 of(f32x8 a, f32x8 b) { return a > b ? a : b; }
};

// The halves of sixteen lanes, taken together.
template <typename Op>
QNEXT_INLINE f32x8 halve(const Lanes& lanes) {
  f32x8 halves[2];
  memcpy(halves, &lanes, sizeof halves);
  return Op::of(halves[0], halves[1]);
}

// Of each of eight rows: its halves are taken together, then its quarters, then the last two.
template <typename Op>
QNEXT_INLINE f32x8 finish(const f32x8* rows) {
  f32x8 pairs[4], quads[2];
  for (int i = 0; i < 4; ++i) {
    const f32x8 a = rows[2 * i], b = rows[2 * i + 1];
    pairs[i] = Op::of(__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11),
                      __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15));
  }
  for (int i = 0; i < 2; ++i) {
    const f32x8 a = pairs[2 * i], b = pairs[2 * i + 1];
    quads[i] = Op::of(__builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13),
                      __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15));
  }
  const f32x8 a = quads[0], b = quads[1];
  const f32x8 mixed = Op::of(__builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14),
                             __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15));
  return __builtin_shufflevector(mixed, mixed, 0, 4, 1, 5, 2, 6, 3, 7);
}

// ---- 16-bit scales ----

// Round to nearest, ties to even; what is too large becomes infinite. Numbers that are no number are not given.
QNEXT_INLINE f16 to_f16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t size = bits & 0x7fffffffu;
  if (size >= 0x47800000u) return f16{(uint16_t)(sign | 0x7c00u)};
  if (size < 0x38800000u) {  // below the normal numbers: added to a half, its unit is that of the last place
    float value;
    memcpy(&value, &size, 4);
    value += 0.5f;
    memcpy(&size, &value, 4);
    return f16{(uint16_t)(sign | (size - 0x3f000000u))};
  }
  size += 0xfffu + ((size >> 13) & 1) - (112u << 23);
  return f16{(uint16_t)(sign | (size >> 13))};
}

QNEXT_INLINE f32x8 as_stored(f32x8 x, FloatKind kind) {
  if (kind == FloatKind::bf16) {
    const u32x8 bits = (u32x8)x;
    return (f32x8)((bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u);
  }
  if (kind == FloatKind::f16)
    for (int g = 0; g < kGroups; ++g) x[g] = to_float(to_f16(x[g]));
  return x;
}

// Scales as they are stored; 1 for one that cannot divide.
QNEXT_INLINE f32x8 usable_scales(f32x8 x, FloatKind kind) {
  const f32x8 one = f32x8{} + 1.0f;
  const f32x8 size = (f32x8)((u32x8)x & 0x7fffffffu);
  const f32x8 stored = as_stored(size < INFINITY ? x : one, kind);
  const f32x8 stored_size = (f32x8)((u32x8)stored & 0x7fffffffu);
  const i32x8 divides = (stored_size > 0.0f) & (stored_size < INFINITY) & (size < INFINITY);
  return divides ? stored : one;
}

// ---- groups ----

template <int kSize>
struct Groups {
  alignas(64) float values[kGroups][kSize];
  const float* importance[kGroups];  // of their inputs
};

// Of each group the first of its values with the largest magnitude.
template <int kSize>
QNEXT_INLINE f32x8 extremes_of(const Groups<kSize>& groups) {
  f32x8 lows[kGroups], highs[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    Lanes low, high;  // low: of the values with their signs turned
    for (int i = 0; i < kSize; i += kLanes)
      for (int j = 0; j < kLanes; j += kRegisterLanes) {
        const f32reg x = load_register(groups.values[g] + i + j);
        f32reg &least = low.part[j / kRegisterLanes], &most = high.part[j / kRegisterLanes];
        least = i == 0 ? -x : vmax(least, -x);
        most = i == 0 ? x : vmax(most, x);
      }
    lows[g] = halve<Max>(low);
    highs[g] = halve<Max>(high);
  }
  const f32x8 low = finish<Max>(lows), high = finish<Max>(highs);
  f32x8 extremes = high > low ? high : -low;
  for (int g = 0; g < kGroups; ++g)
    if (low[g] == high[g])
      for (int i = kSize - 1; i >= 0; --i)
        if (fabsf(groups.values[g][i]) == high[g]) extremes[g] = groups.values[g][i];
  return extremes;
}

// Calls body(x, importance, group, lane part, is the first) for every register of every group, and after each group
// `after`(group).
template <int kSize, bool kWeighted, typename Body, typename After>
QNEXT_INLINE void for_each_register(const Groups<kSize>& groups, Body&& body, After&& after) {
  for (int g = 0; g < kGroups; ++g) {
    for (int i = 0; i < kSize; i += kLanes)
      for (int j = 0; j < kLanes; j += kRegisterLanes) {
        f32reg weight{};
        if constexpr (kWeighted) weight = load_register(groups.importance[g] + i + j);
        body(load_register(groups.values[g] + i + j), weight, g, j / kRegisterLanes, i == 0);
      }
    after(g);
  }
}

template <int kSize, bool kWeighted>
QNEXT_INLINE f32x8 errors_of(const Groups<kSize>& groups, f32x8 scales, f32reg lowest, f32reg highest) {
  alignas(32) float inverses[kGroups];
  const f32x8 inverse = 1.0f / scales;
  memcpy(inverses, &inverse, sizeof inverses);
  f32x8 halves[kGroups];
  Lanes sums;
  for_each_register<kSize, kWeighted>(
      groups,
      [&](f32reg x, f32reg weight, int g, int part, bool is_first) __attribute__((always_inline)) {
        const f32reg quotient = x * splat_register(inverses[g]);
        const f32reg gap = nearest_step(quotient, lowest, highest) - quotient;
        f32reg square = gap * gap;
        if constexpr (kWeighted) square = square * weight;
        sums.part[part] = is_first ? square : sums.part[part] + square;
      },
      [&](int g) __attribute__((always_inline)) { halves[g] = halve<Add>(sums); });
  return finish<Add>(halves) * (scales * scales);
}

// The scales that fit the codes of other ones best.
template <int kSize, bool kWeighted>
QNEXT_INLINE f32x8 fit(const Groups<kSize>& groups, f32x8 scales, f32reg lowest, f32reg highest) {
  const f32x8 inverse = 1.0f / scales;
  f32x8 products[kGroups], squares[kGroups];
  Lanes product, square;
  for_each_register<kSize, kWeighted>(
      groups,
      [&](f32reg x, f32reg weight, int g, int part, bool is_first) __attribute__((always_inline)) {
        const f32reg steps = nearest_step(x * splat_register(inverse[g]), lowest, highest);
        f32reg weighted = steps;
        if constexpr (kWeighted) weighted = steps * weight;
        product.part[part] = is_first ? weighted * x : product.part[part] + weighted * x;
        square.part[part] = is_first ? weighted * steps : square.part[part] + weighted * steps;
      },
      [&](int g) __attribute__((always_inline)) {
        products[g] = halve<Add>(product);
        squares[g] = halve<Add>(square);
      });
  return finish<Add>(products) / finish<Add>(squares);
}

template <int kSize, bool kWeighted>
QNEXT_INLINE f32x8 search(const Groups<kSize>& groups, f32x8 extremes, const RoundingArguments& a, f32reg lowest,
                          f32reg highest) {
  f32x8 best = f32x8{} + 1.0f, least = f32x8{} + INFINITY;
  for (int64_t i = 0; i <= a.num_divisors; ++i) {
    const f32x8 candidates =
        i < a.num_divisors ? extremes / a.divisors[i] : fit<kSize, kWeighted>(groups, best, lowest, highest);
    const f32x8 scales = usable_scales(candidates, a.scale_kind);
    const f32x8 errors = errors_of<kSize, kWeighted>(groups, scales, lowest, highest);
    const i32x8 is_better = errors < least;
    best = is_better ? scales : best;
    least = is_better ? errors : least;
  }
  return best;
}

template <typename T>
QNEXT_INLINE void widen(const void* from, int64_t first, int size, float* out) {
  const T* values = static_cast<const T*>(from) + first;
  for (int i = 0; i < size; i += kRegisterLanes) store(out + i, load_register(values + i));
}

QNEXT_INLINE void load_group(const RoundingArguments& a, int64_t first, float* out) {
  const int size = (int)a.group_size;
  switch (a.weight_kind) {
    case FloatKind::fp32: return widen<float>(a.weight, first, size, out);
    case FloatKind::bf16: return widen<bf16>(a.weight, first, size, out);
    case FloatKind::f16: return widen<f16>(a.weight, first, size, out);
  }
}

QNEXT_INLINE void store_scale(const RoundingArguments& a, int64_t at, float scale) {
  switch (a.scale_kind) {
    case FloatKind::fp32: static_cast<float*>(a.scales)[at] = scale; return;
    case FloatKind::bf16: static_cast<bf16*>(a.scales)[at] = to_bf16(scale); return;
    case FloatKind::f16: static_cast<f16*>(a.scales)[at] = to_f16(scale); return;
  }
}

QNEXT_INLINE float load_scale(const RoundingArguments& a, int64_t at) {
  if (a.scale_kind == FloatKind::fp32) return static_cast<const float*>(a.scales)[at];
  if (a.scale_kind == FloatKind::f16) return to_float(static_cast<const f16*>(a.scales)[at]);
  const uint32_t bits = (uint32_t)static_cast<const bf16*>(a.scales)[at].bits << 16;
  float scale;
  memcpy(&scale, &bits, 4);
  return scale;
}

// Codes of a group's inputs, one to a byte here, packed where they go.
template <int kSize>
QNEXT_INLINE void store_codes(const float* values, const RoundingArguments& a, int64_t first, float scale, f32reg lowest,
                              f32reg highest) {
  int8_t signed_codes[kSize];
  for (int i = 0; i < kSize; i += kRegisterLanes)
    store(signed_codes + i,
          round_to_int(nearest_step(load_register(values + i) / splat_register(scale), lowest, highest)));
  uint8_t* out = a.codes + first * a.bits / 8;
  if (a.bits == 8) {
    for (int i = 0; i < kSize; ++i) out[i] = (uint8_t)(signed_codes[i] ^ 0x80);
    return;
  }
  // The lower byte of a word is the earlier input.
  uint16_t pairs[kSize / 2];
  memcpy(pairs, signed_codes, sizeof pairs);
  for (int i = 0; i < kSize / 2; ++i) out[i] = (uint8_t)(((pairs[i] & 15) | ((pairs[i] >> 4) & 0xf0)) ^ 0x88);
}

template <int kSize, bool kWeighted>
void round_row(const RoundingArguments& a, int64_t row) {
  const float zero = (float)(1 << (a.bits - 1));
  const f32reg lowest = splat_register(-zero), highest = splat_register(zero - 1.0f);
  const int64_t num_groups = a.num_inputs / kSize;
  Groups<kSize> groups;
  memset(groups.values, 0, sizeof groups.values);
  for (int64_t start = 0; start < num_groups; start += kGroups) {
    const int count = (int)smaller<int64_t>(kGroups, num_groups - start);
    for (int g = 0; g < kGroups; ++g) groups.importance[g] = a.importance + (g < count ? start + g : start) * kSize;
    for (int g = 0; g < count; ++g) load_group(a, (row * num_groups + start + g) * kSize, groups.values[g]);
    const f32x8 scales = search<kSize, kWeighted>(groups, extremes_of(groups), a, lowest, highest);
    for (int g = 0; g < count; ++g) {
      store_scale(a, row * num_groups + start + g, scales[g]);
      store_codes<kSize>(groups.values[g], a, (row * num_groups + start + g) * kSize, scales[g], lowest, highest);
    }
  }
}

using RoundRow = void (*)(const RoundingArguments&, int64_t);

template <bool kWeighted>
RoundRow row_function(int64_t group_size) {
  return group_size == 32 ? round_row<32, kWeighted> : group_size == 64 ? round_row<64, kWeighted>
                                                                         : round_row<128, kWeighted>;
}

template <typename Body>
QNEXT_INLINE void for_each_output(const RoundingArguments& a, Body&& body) {
  const int64_t per_task = larger<int64_t>(1, kNumbersPerTask / a.num_inputs);
  parallel_for((a.num_outputs + per_task - 1) / per_task, [&](int64_t task) {
    for (int64_t row = task * per_task; row < smaller(a.num_outputs, (task + 1) * per_task); ++row) body(row);
  });
}

void round(const RoundingArguments& a) {
  const RoundRow function = a.importance ? row_function<true>(a.group_size) : row_function<false>(a.group_size);
  for_each_output(a, [&](int64_t row) { function(a, row); });
}

void errors_of_row(const RoundingArguments& a, int64_t row, double* squares) {
  alignas(64) float values[kMaxGroup], steps[kMaxGroup];
  const int size = (int)a.group_size;
  const int zero = 1 << (a.bits - 1);
  double error = 0.0, power = 0.0;
  for (int64_t start = 0; start < a.num_inputs; start += size) {
    const int64_t first = row * a.num_inputs + start;
    load_group(a, first, values);
    const uint8_t* codes = a.codes + first * a.bits / 8;
    if (a.bits == 8)
      for (int i = 0; i < size; ++i) steps[i] = (float)(codes[i] - zero);
    else
      for (int i = 0; i < size / 2; ++i) {
        steps[2 * i] = (float)((codes[i] & 15) - zero);
        steps[2 * i + 1] = (float)((codes[i] >> 4) - zero);
      }
    const f32reg scale = splat_register(load_scale(a, first / size));
    f32reg gaps{}, numbers{};
    for (int i = 0; i < size; i += kRegisterLanes) {
      const f32reg x = load_register(values + i);
      const f32reg gap = load_register(steps + i) * scale - x;
      gaps = gaps + gap * gap;
      numbers = numbers + x * x;
    }
    error += sum(gaps);
    power += sum(numbers);
  }
  squares[0] = error;
  squares[1] = power;
}

void errors(const RoundingArguments& a, double* squares) {
  for_each_output(a, [&](int64_t row) { errors_of_row(a, row, squares + 2 * row); });
}

}  // namespace

extern const RoundingKernels rounding_kernels;
const RoundingKernels rounding_kernels{round, errors};

}  // namespace qnext::QNEXT_ISA
