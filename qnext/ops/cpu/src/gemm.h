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

QNEXT_INLINE int64_t scale_bytes(ScaleKind kind) { return kind == ScaleKind::f32 ? 4 : 2; }

QNEXT_INLINE f32reg load_scales(ScaleKind kind, const uint8_t* scales, int64_t at) {
  if (kind == ScaleKind::bf16) return load_register(reinterpret_cast<const bf16*>(scales) + at);
  if (kind == ScaleKind::f16) return load_register(reinterpret_cast<const f16*>(scales) + at);
  return load_register(reinterpret_cast<const float*>(scales) + at);
}

// Where one expert's matrix lies; its panels are counted from there.
struct ExpertPlace {
  const uint8_t *data, *scales, *zeros;
};

QNEXT_INLINE ExpertPlace place_of(const Weight& weight, int64_t expert) {
  if (weight.records) {
    const uint8_t* record = weight.records[expert];
    return {record + weight.data_at, record + weight.scales_at, weight.has_zeros() ? record + weight.zeros_at : nullptr};
  }
  if (weight.is_float()) {
    const int64_t item = weight.kind == WeightKind::bf16 ? 2 : 4;
    return {weight.data + expert * weight.num_outputs * weight.num_inputs * item, nullptr, nullptr};
  }
  const int64_t panels = expert * weight.num_panels(), groups = panels * 16 * weight.num_groups();
  const int64_t codes = panels * 16 * weight.num_inputs / (weight.kind == WeightKind::codes4 ? 2 : 1);
  return {weight.data + codes, weight.scales + groups * scale_bytes(weight.scale_kind),
          weight.zeros ? weight.zeros + groups : nullptr};
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
