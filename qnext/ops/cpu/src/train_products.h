// Products of matrices that lie in the caches: a chunk of tokens, or the state of one head.
//
// Rows lie side by side or `stride` apart. Rows come in multiples of four, columns in multiples of sixteen, so nothing
// is packed and nothing is left over. A sum runs over its terms in order.
#pragma once

#include "simd.h"

namespace qnext::QNEXT_ISA {

namespace {

constexpr int kTrainSlot = 21;  // of scratch(): the memory of a task, which calls nobody else

// Memory of one task, handed out piece by piece.
class Arena {
 public:
  explicit Arena(float* memory) : next_(memory) {}
  float* take(int64_t count) {
    float* piece = next_;
    next_ += (count + kLanes - 1) / kLanes * kLanes;
    return piece;
  }

 private:
  float* next_;
};

constexpr int kTileRows = 4;
constexpr int kTileVectors = kRegisterLanes == 16 ? 4 : 2;  // as many sums as registers hold beside their factors

// The left factor, or the transposed of a matrix: element (row, term) lies at row * row_step + term * term_step.
struct Left {
  const float* numbers;
  int64_t row_step, term_step;
};
QNEXT_INLINE Left rows_of(const float* numbers, int64_t stride) { return {numbers, stride, 1}; }
QNEXT_INLINE Left columns_of(const float* numbers, int64_t stride) { return {numbers, 1, stride}; }

// Where a product goes: out = keep * base + product, or the product alone where there is no base.
struct Into {
  float* numbers;
  int64_t stride;
  const float* base = nullptr;
  float keep = 1.0f;
};
QNEXT_INLINE Into onto(float* numbers, int64_t stride, float keep = 1.0f) { return {numbers, stride, numbers, keep}; }

template <int kVectors>
QNEXT_INLINE void multiply_tile(Left a, const float* b, int64_t b_stride, int64_t num_terms, float* out,
                                const float* base, int64_t stride, float keep) {
  f32reg sums[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r)
    for (int c = 0; c < kVectors; ++c)
      sums[r][c] = base ? splat_register(keep) * load_register(base + r * stride + c * kRegisterLanes) : f32reg{};
  for (int64_t term = 0; term < num_terms; ++term) {
    f32reg right[kVectors];
    for (int c = 0; c < kVectors; ++c) right[c] = load_register(b + term * b_stride + c * kRegisterLanes);
    for (int r = 0; r < kTileRows; ++r) {
      const f32reg left = splat_register(a.numbers[r * a.row_step + term * a.term_step]);
      for (int c = 0; c < kVectors; ++c) sums[r][c] = fma(left, right[c], sums[r][c]);
    }
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int c = 0; c < kVectors; ++c) store(out + r * stride + c * kRegisterLanes, sums[r][c]);
}

// Which terms a row of the left factor has: all, those up to its own number, or those from its own number on.
enum class Terms { all, to_diagonal, from_diagonal };

template <int kVectors, Terms kTerms>
__attribute__((noinline)) void multiply_columns(Left a, const float* b, int64_t b_stride, int64_t num_rows,
                                                int64_t num_terms, Into out, int64_t column) {
  for (int64_t row = 0; row < num_rows; row += kTileRows) {
    int64_t first = 0, last = num_terms;
    if constexpr (kTerms == Terms::to_diagonal) last = row + kTileRows;
    if constexpr (kTerms == Terms::from_diagonal) first = row;
    const Left block{a.numbers + row * a.row_step + first * a.term_step, a.row_step, a.term_step};
    const int64_t place = row * out.stride + column;
    multiply_tile<kVectors>(block, b + first * b_stride + column, b_stride, last - first, out.numbers + place,
                            out.base ? out.base + place : nullptr, out.stride, out.keep);
  }
}

// out = keep * base + a b. Rows of b are `b_stride` apart.
template <Terms kTerms = Terms::all>
void multiply(Left a, const float* b, int64_t b_stride, int64_t num_rows, int64_t num_terms, int64_t num_columns,
              Into out) {
  int64_t column = 0;
  for (; column + kTileVectors * kRegisterLanes <= num_columns; column += kTileVectors * kRegisterLanes)
    multiply_columns<kTileVectors, kTerms>(a, b, b_stride, num_rows, num_terms, out, column);
  for (; column + 2 * kRegisterLanes <= num_columns; column += 2 * kRegisterLanes)
    multiply_columns<2, kTerms>(a, b, b_stride, num_rows, num_terms, out, column);
  for (; column < num_columns; column += kRegisterLanes)
    multiply_columns<1, kTerms>(a, b, b_stride, num_rows, num_terms, out, column);
}

// to += factor * from, over a multiple of sixteen numbers.
QNEXT_INLINE void add_scaled(float factor, const float* from, float* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kRegisterLanes)
    store(to + i, fma(splat_register(factor), load_register(from + i), load_register(to + i)));
}

// x <- (1 - N)^-1 x for the strictly lower triangular N [num_rows, num_rows]: x_i += sum over j < i of N_ij x_j.
void solve_lower(const float* n, int64_t num_rows, float* x, int64_t num_columns) {
  for (int64_t row = 0; row < num_rows; row += kTileRows) {
    if (row)
      multiply(rows_of(n + row * num_rows, num_rows), x, num_columns, kTileRows, row, num_columns,
               onto(x + row * num_columns, num_columns));
    for (int64_t i = row + 1; i < row + kTileRows; ++i)
      for (int64_t j = row; j < i; ++j)
        add_scaled(n[i * num_rows + j], x + j * num_columns, x + i * num_columns, num_columns);
  }
}

// x <- (1 - N^T)^-1 x: x_j += sum over i > j of N_ij x_i.
void solve_lower_transposed(const float* n, int64_t num_rows, float* x, int64_t num_columns) {
  for (int64_t row = num_rows - kTileRows; row >= 0; row -= kTileRows) {
    const int64_t end = row + kTileRows;
    if (end < num_rows)
      multiply(columns_of(n + end * num_rows + row, num_rows), x + end * num_columns, num_columns, kTileRows,
               num_rows - end, num_columns, onto(x + row * num_columns, num_columns));
    for (int64_t j = end - 2; j >= row; --j)
      for (int64_t i = j + 1; i < end; ++i)
        add_scaled(n[i * num_rows + j], x + i * num_columns, x + j * num_columns, num_columns);
  }
}

// Swaps, in every pair of rows `kStep` apart, the off-diagonal blocks of kStep lanes; all steps together transpose.
template <int kStep>
QNEXT_INLINE void swap_blocks(f32reg* rows) {
  i32reg low, high;
  for (int lane = 0; lane < kRegisterLanes; ++lane) {
    low[lane] = lane & kStep ? kRegisterLanes + lane - kStep : lane;
    high[lane] = lane & kStep ? kRegisterLanes + lane : lane + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRegisterLanes; ++i) {
    if (i & kStep) continue;
    const f32reg a = rows[i], b = rows[i + kStep];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kStep] = __builtin_shuffle(a, b, high);
  }
}

// to [num_columns, num_rows] = the transposed of from [num_rows, num_columns], multiples of sixteen.
void transpose(const float* from, int64_t num_rows, int64_t num_columns, float* to) {
  for (int64_t row = 0; row < num_rows; row += kRegisterLanes)
    for (int64_t column = 0; column < num_columns; column += kRegisterLanes) {
      f32reg block[kRegisterLanes];
      for (int i = 0; i < kRegisterLanes; ++i) block[i] = load_register(from + (row + i) * num_columns + column);
      swap_blocks<1>(block);
      swap_blocks<2>(block);
      if constexpr (kRegisterLanes > 4) swap_blocks<4>(block);
      if constexpr (kRegisterLanes > 8) swap_blocks<8>(block);
      for (int i = 0; i < kRegisterLanes; ++i) store(to + (column + i) * num_rows + row, block[i]);
    }
}

// Row r of `to` is factors[r] times row r of `from`.
void scale_rows(const float* factors, const float* from, int64_t num_rows, int64_t size, float* to) {
  for (int64_t row = 0; row < num_rows; ++row)
    for (int64_t i = 0; i < size; i += kRegisterLanes)
      store(to + row * size + i, splat_register(factors[row]) * load_register(from + row * size + i));
}

}  // namespace

}  // namespace qnext::QNEXT_ISA
