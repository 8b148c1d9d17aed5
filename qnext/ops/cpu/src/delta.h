// The token mixer of Gated DeltaNet: convolution, norms, gates, delta rule and gated norm in one operation.
//
// One task walks all tokens of one sequence for one key head and the value heads that use it, and every number is made
// in one order of operations: the bits do not depend on how tokens are cut into calls, on which of them were drafts, on
// what else is in the batch, or on the number of threads. A state in bf16 is rounded at fixed positions of its sequence,
// and where a call ends: of the cuts, only those elsewhere can be seen.
#pragma once

#include <cstdint>

#include "isa.h"

namespace qnext {

constexpr int64_t kMaxConvWidth = 8;
constexpr int64_t kTokensAtOnce = 64;    // q, k, v of a block of tokens stay in a level-2 cache
constexpr int64_t kMaxDraftTokens = 64;  // a draft lies in one block of tokens

// What drafts computed and nothing was decided about: the first num_accepted tokens of a slot are applied to its
// states before anything else, the others are never read.
struct DeltaPending {
  int64_t num_drafts;     // L, at most kMaxDraftTokens; 0 and null addresses where there are no drafts
  float* conv;            // [slots, L, C] inputs of the convolution
  float* k;               // [slots, L, J, K] normalised
  float* u;               // [slots, L, H, V]
  float* decay;           // [slots, L, H]
  int64_t* num_accepted;  // [slots]
};

struct DeltaSlots {
  int64_t num_key_heads, num_value_heads, key_dim, value_dim;  // J, H, K, V; K and V multiples of 16
  int64_t conv_width;                                          // W, at most kMaxConvWidth
  float* conv;                                                 // [slots, W - 1, C] last inputs, oldest first
  void* state;                                                 // [slots, H, K, V]
  bool has_bf16_state;                                         // else fp32
  DeltaPending pending;
};

// Per key head a row of qkvz holds q (K), k (K), v (R V), z (R V), and a row of ba holds b (R), a (R); R = H / J.
struct DeltaMixerArguments : DeltaSlots {
  const float* qkvz;         // [T, 2 J K + 2 H V]
  const float* ba;           // [T, 2 H]
  const float* conv_weight;  // [C, W], channels: all q, all k, all v
  const float* A_log;        // [H]
  const float* dt_bias;      // [H]
  const float* norm_weight;  // [V]
  float eps;
  int64_t num_sequences;  // N
  const int64_t* starts;  // [N + 1] first row of each sequence
  const int64_t* slots;   // [N], all different
  const bool* is_fresh;   // [N] sequences whose slot is not read, or null for none
  const bool* is_draft;   // [N] sequences whose tokens become pending, at most L of them, or null for none
  // [N] tokens of each sequence with those of the call, or null where the call begins at a multiple of kTokensAtOnce,
  // and tokens of its prompt, or null where the call has no others. Only for states in bf16.
  const int64_t* context_lengths;
  const int64_t* prompt_lengths;
  float* out;             // [T, H V]
};

struct DeltaKernels {
  void (*mixer)(const DeltaMixerArguments& arguments);
  // Applies the accepted pending tokens of `count` slots.
  void (*apply_pending)(const DeltaSlots& memory, const int64_t* slots, int64_t count);
};

}  // namespace qnext

QNEXT_DISPATCH(DeltaKernels, delta_kernels)
