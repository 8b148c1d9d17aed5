// The inner products behind linear and experts.
#pragma once

#include "linear.h"
#include "simd.h"

namespace qnext::QNEXT_ISA {

constexpr int kMaxTileRows = 6;
constexpr int64_t kFewRows = 32;  // up to here reading the weights costs about as much as the arithmetic

// Rows of the next tile of `rows` that are left: all tiles take about as many, since narrow ones cost more for a row.
QNEXT_INLINE int64_t rows_of_tile(int64_t rows) {
  const int64_t num_tiles = (rows + kMaxTileRows - 1) / kMaxTileRows;
  return (rows + num_tiles - 1) / num_tiles;
}

// Make `num_rows` rows ready for `weight`, in parallel; buffers live in the caller's scratch `slot` until used again.
Rows prepare_rows(const Weight& weight, const float* x, int64_t num_rows, int slot);
bool share_rows(const Weight& a, const Weight& b);  // whether rows prepared for one serve the other
int64_t prepared_bytes(const Weight& weight, int64_t num_rows);
Rows prepared_rows_at(const Weight& weight, int64_t num_rows, void* buffer, const float* x);
void prepare_row(const Weight& weight, const float* x, int64_t row, const Rows& rows);

// Outputs [begin, end) of one expert's matrix for chosen rows: row index[i] (or i) of `rows` goes to out + i * stride.
// For codes, begin is a multiple of 16.
void multiply(const Weight& weight, int64_t expert, int64_t begin, int64_t end, const Rows& rows, const int32_t* index,
              int64_t num_rows, float* out, int64_t out_stride);
void multiply_floats(const Weight& weight, int64_t expert, int64_t begin, int64_t end, const Rows& rows,
                     const int32_t* index, int64_t num_rows, float* out, int64_t out_stride);
void multiply_codes(const Weight& weight, int64_t expert, int64_t begin, int64_t end, const Rows& rows,
                    const int32_t* index, int64_t num_rows, float* out, int64_t out_stride);

}  // namespace qnext::QNEXT_ISA
