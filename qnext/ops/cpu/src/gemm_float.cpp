// Rows times float weights, both read along the inputs: a register of inputs (bf16 on AVX-512: pairs of sixteen) is
// summed side by side and the lanes added up once at the end. Weights are read as they lie on disk.
#include "gemm.h"

namespace qnext::QNEXT_ISA {
namespace {

// Outputs of a tile: sums, weights and a row must fit into 32 registers on AVX-512 and into 16 elsewhere.
constexpr int kTileOutputs = kRegisterLanes == 16 ? 4 : 2;
// A single row is bound by memory, which gives most when one stream after the other is read. But narrow registers need
// several sums at once to keep up with it.
constexpr int kSingleRowOutputs = kRegisterLanes == 16 ? 1 : 4;

// How a weight of type T meets a prepared row.
template <typename T>
struct Operand {
  using Row = float;
  static constexpr int64_t kStep = kRegisterLanes;
  static QNEXT_INLINE const Row* row(const Rows& rows, int64_t i) { return rows.f32 + i * rows.num_inputs; }
};

#if defined(__AVX512BF16__)
template <>
struct Operand<bf16> {
  using Row = bf16;
  static constexpr int64_t kStep = 32;
  static QNEXT_INLINE const Row* row(const Rows& rows, int64_t i) {
    return static_cast<const bf16*>(rows.bf16) + i * rows.num_inputs;
  }
};
typedef __m512bh Packed;
QNEXT_INLINE Packed fetch(const bf16* p, const bf16*) {
  Packed v;
  memcpy(&v, p, 64);
  return v;
}
QNEXT_INLINE f32x16 accumulate(f32x16 acc, Packed w, Packed x) { return (f32x16)_mm512_dpbf16_ps((__m512)acc, w, x); }
#else
QNEXT_INLINE f32reg fetch(const bf16* p, const float*) { return load_register(p); }
#endif
QNEXT_INLINE f32reg fetch(const float* p, const float*) { return load_register(p); }
QNEXT_INLINE f32reg accumulate(f32reg acc, f32reg w, f32reg x) { return fma(w, x, acc); }

// With `asks` the next tile's weights are asked for.
template <typename T, int kRows, int kOutputs>
void tile(const T* weight, int64_t num_inputs, const typename Operand<T>::Row* const* x, bool asks, float* const* out) {
  using Row = typename Operand<T>::Row;
  f32reg acc[kRows][kOutputs];
  for (int r = 0; r < kRows; ++r)
    for (int o = 0; o < kOutputs; ++o) acc[r][o] = f32reg{};
  for (int64_t d = 0; d < num_inputs; d += Operand<T>::kStep) {
    decltype(fetch(weight, (const Row*)nullptr)) w[kOutputs];
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) {
      const T* at = weight + o * num_inputs + d;
      if (kRows == 1 || asks) prefetch(at + kOutputs * num_inputs);  // the same place in the next tile
      w[o] = fetch(at, (const Row*)nullptr);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      auto row = fetch(x[r] + d, (const Row*)nullptr);
#if defined(__AVX2__) && !defined(__AVX512F__)
      asm("" : "+x"(row));  // else each product reads it again, and reads are what the loop waits for
#endif
#pragma GCC unroll 8
      for (int o = 0; o < kOutputs; ++o) acc[r][o] = accumulate(acc[r][o], w[o], row);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int o = 0; o < kOutputs; ++o) out[r][o] = sum(acc[r][o]);
}

template <typename T, int kOutputs>
void tile_rows(int num_rows, const T* weight, int64_t num_inputs, const typename Operand<T>::Row* const* x,
               bool asks, float* const* out) {
  switch (num_rows) {
    case 1: return tile<T, 1, kOutputs>(weight, num_inputs, x, asks, out);
    case 2: return tile<T, 2, kOutputs>(weight, num_inputs, x, asks, out);
    case 3: return tile<T, 3, kOutputs>(weight, num_inputs, x, asks, out);
    case 4: return tile<T, 4, kOutputs>(weight, num_inputs, x, asks, out);
    case 5: return tile<T, 5, kOutputs>(weight, num_inputs, x, asks, out);
    default: return tile<T, 6, kOutputs>(weight, num_inputs, x, asks, out);
  }
}

template <typename T>
void multiply_as(const Weight& weight, int64_t expert, int64_t begin, int64_t end, const Rows& rows,
                 const int32_t* index, int64_t num_rows, float* out, int64_t out_stride) {
  const int64_t num_inputs = weight.num_inputs;
  const T* matrix = reinterpret_cast<const T*>(place_of(weight, expert).data);
  // Few rows: all of them meet a few outputs at a time, so that weights are read once. Many: a few rows stay in the level-1
  // cache and the task's weights in the level-2 cache.
  const bool is_few = num_rows <= kFewRows;
  const int64_t block = is_few ? num_rows : kMaxTileRows;
  const int64_t most_outputs = num_rows == 1 ? kSingleRowOutputs : kTileOutputs;
  for (int64_t start = 0; start < num_rows; start += block) {
    const int64_t stop = smaller(num_rows, start + block);
    for (int64_t o = begin, num_outputs; o < end; o += num_outputs) {
      num_outputs = end - o < most_outputs ? 1 : most_outputs;
      for (int64_t first = start, count; first < stop; first += count) {
        count = rows_of_tile(stop - first);
        const typename Operand<T>::Row* x[kMaxTileRows];
        float* places[kMaxTileRows];
        for (int64_t r = 0; r < count; ++r) {
          x[r] = Operand<T>::row(rows, index ? index[first + r] : first + r);
          places[r] = out + (first + r) * out_stride + o;
        }
        const bool asks = is_few && first == start;
        if (num_outputs == 1)
          tile_rows<T, 1>(count, matrix + o * num_inputs, num_inputs, x, asks, places);
        else if (num_rows == 1)
          tile<T, 1, kSingleRowOutputs>(matrix + o * num_inputs, num_inputs, x, asks, places);
        else
          tile_rows<T, kTileOutputs>(count, matrix + o * num_inputs, num_inputs, x, asks, places);
      }
    }
  }
}

}  // namespace

void multiply_floats(const Weight& weight, int64_t expert, int64_t begin, int64_t end, const Rows& rows,
                     const int32_t* index, int64_t num_rows, float* out, int64_t out_stride) {
  if (weight.kind == WeightKind::bf16)
    multiply_as<bf16>(weight, expert, begin, end, rows, index, num_rows, out, out_stride);
  else
    multiply_as<float>(weight, expert, begin, end, rows, index, num_rows, out, out_stride);
}

}  // namespace qnext::QNEXT_ISA
