// Kernels of the training step: forward passes that keep what their gradients need, and the gradients.
#pragma once

#include <cstdint>

#include "isa.h"

namespace qnext {

// The token mixer of Gated DeltaNet without a cache; see ops.gated_delta_mixer for the layout of its rows.
struct DeltaTraining {
  int64_t num_sequences, num_key_heads, repeats, key_dim, value_dim, conv_width;  // dims are multiples of 16
  float eps;
  const int64_t* starts;  // [N + 1] first token of each sequence
  const float *qkvz, *ba;
  const float *conv, *A_log, *dt_bias, *norm;  // [channels, width], [H], [H], [V]
  // Kept from the forward pass: the state before every chunk but the first of each sequence [chunks, H, K, V], what the
  // tokens write to it and what they read of it [T, H, V].
  float *states, *writes, *reads;
};

struct DeltaTrainingGradients {
  const float* out;
  float *qkvz, *ba;
  float* partial;  // one row of delta_partial_size() per sequence and key head, written
};

// Gradients of the parameters that one task adds up: conv [channels of a key head, width], norm [V], A_log, dt_bias [R].
inline int64_t delta_partial_size(const DeltaTraining& a) {
  return (2 * a.key_dim + a.repeats * a.value_dim) * a.conv_width + a.value_dim + 2 * a.repeats;
}

struct TrainKernels {
  int64_t delta_chunk;  // tokens in a chunk
  void (*delta_forward)(const DeltaTraining& arguments, float* out);
  void (*delta_backward)(const DeltaTraining& arguments, const DeltaTrainingGradients& gradients);
};

}  // namespace qnext

QNEXT_DISPATCH(TrainKernels, train_kernels)
