// Matrices to integer codes with a scale for each group of inputs; ops/reference/rounding.py is the definition.
#pragma once

#include <cstdint>

#include "isa.h"

namespace qnext {

enum class FloatKind { fp32 = 0, bf16 = 1, f16 = 2 };

// A matrix [num_outputs, num_inputs] and what is made of it. `codes` has the lower nibble first where `bits` is 4, and
// `scales` is [num_outputs, num_inputs / group_size]. A group has 32, 64 or 128 inputs.
struct RoundingArguments {
  FloatKind weight_kind, scale_kind;
  int64_t num_outputs, num_inputs, group_size;
  int bits;
  const void* weight;
  const float* importance;  // of each input, or null
  const float* divisors;    // num_divisors
  int64_t num_divisors;
  uint8_t* codes;
  void* scales;
};

struct RoundingKernels {
  // Chooses scales, then codes. Every output is made by one thread; all instruction sets give the same bits.
  void (*round)(const RoundingArguments& arguments);
  // squares [num_outputs, 2]: the sum of (weight - code's value)^2 of each output, and that of weight^2.
  void (*errors)(const RoundingArguments& arguments, double* squares);
};

}  // namespace qnext

QNEXT_DISPATCH(RoundingKernels, rounding_kernels)
