// The token mixer of Gated DeltaNet: convolution, norms, gates, delta rule and gated norm in one operation.
//
// One task walks all tokens of one sequence for one key head and the value heads that use it, and every number is made
// in one order of operations: the bits do not depend on how tokens are cut into calls, on what else is in the batch, or
// on the number of threads.
#pragma once

#include <cstdint>

#include "isa.h"

namespace qnext {

constexpr int64_t kMaxConvWidth = 8;

// Per key head a row of qkvz holds q (K), k (K), v (R V), z (R V), and a row of ba holds b (R), a (R); R = H / J.
struct DeltaMixerArguments {
  const float* qkvz;         // [T, 2 J K + 2 H V]
  const float* ba;           // [T, 2 H]
  const float* conv_weight;  // [C, W], channels: all q, all k, all v
  const float* A_log;        // [H]
  const float* dt_bias;      // [H]
  const float* norm_weight;  // [V]
  float eps;
  int64_t num_key_heads, num_value_heads, key_dim, value_dim;  // J, H, K, V; K and V multiples of 16
  int64_t conv_width;                                          // W, at most kMaxConvWidth
  int64_t num_sequences;                                       // N
  const int64_t* starts;                                       // [N + 1] first row of each sequence
  const int64_t* slots;                                        // [N], all different
  const bool* is_fresh;                                        // [N] sequences whose slot is not read, or null for none
  float* conv;                                                 // [slots, W - 1, C] last inputs, oldest first
  float* state;                                                // [slots, H, K, V]
  float* out;                                                  // [T, H V]
};

struct DeltaKernels {
  void (*mixer)(const DeltaMixerArguments& arguments);
};

}  // namespace qnext

QNEXT_DISPATCH(DeltaKernels, delta_kernels)
