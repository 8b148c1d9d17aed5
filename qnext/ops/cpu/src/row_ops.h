// Operations on rows that multiply with no matrix. Each row of a result is made by one thread from its own row alone.
#pragma once

#include <cstdint>

#include "isa.h"

namespace qnext {

struct RowKernels {
  // out[t] = table[ids[t]], widened to fp32; ids are checked to lie in the table. Sizes are multiples of 16.
  void (*embed)(const void* table, bool is_bf16, int64_t size, const int64_t* ids, int64_t num_rows, float* out);
  // cos and sin [T, half] of position * frequency, times `factor`.
  void (*rope)(const int64_t* positions, int64_t num_rows, const float* frequencies, int64_t half, float factor,
               float* cos, float* sin);
  // table[index[t]] = rows[t]; the indices differ and lie in the table.
  void (*put_rows)(const float* rows, const int64_t* index, int64_t num_rows, int64_t size, float* table);
  // ids[t] = where row t is highest, the lowest place of equal ones.
  void (*argmax)(const float* rows, int64_t num_rows, int64_t size, int64_t* ids);
  // out[t] = a[t] beside b[t], each of `size` numbers.
  void (*concat)(const float* a, const float* b, int64_t num_rows, int64_t size, float* out);
  void (*rms_norm)(const float* x, const float* weight, int64_t num_rows, int64_t size, float eps, bool zero_centered,
                   float* out);
  void (*add)(const float* a, const float* b, int64_t count, float* out);       // a + b; multiples of 16
  void (*swiglu)(const float* gate, const float* up, int64_t count, float* out);  // silu(gate) up; multiples of 16
  // Softmax over E scores, the top_k best in falling order (ties: the lower index first), renormalised on demand.
  // load[e], unless load is null, grows by the number of tokens that chose expert e.
  void (*route)(const float* logits, int64_t num_tokens, int64_t num_experts, int64_t top_k, bool renormalize,
                float* weights, int64_t* experts, int64_t* load);
  // Whether all numbers of 16 (bf16, f16) or 32 bits are finite: `exponent` is the exponent's field, all ones.
  bool (*are_finite_16)(const uint16_t* numbers, int64_t count, uint16_t exponent);
  bool (*are_finite_32)(const uint32_t* numbers, int64_t count, uint32_t exponent);
};

}  // namespace qnext

QNEXT_DISPATCH(RowKernels, row_kernels)
