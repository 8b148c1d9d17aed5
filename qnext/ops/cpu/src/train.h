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
  float* gates;  // kept too: beta and the log decay of each token and head [T, H, 2]
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

struct DeltaTrainKernels {
  int64_t chunk;  // tokens in a chunk
  void (*forward)(const DeltaTraining& arguments, float* out);
  void (*backward)(const DeltaTraining& arguments, const DeltaTrainingGradients& gradients);
};

// Causal attention inside each sequence without a cache, with norms, rotation and gate; see ops.attention_mixer.
struct AttentionTraining {
  int64_t num_sequences, num_heads, num_kv_heads, head_dim, half;  // head_dim: of 16; half the rotated dims
  bool has_gate, zero_centered;
  float eps, scale;
  const int64_t* starts;           // [N + 1] first token of each sequence
  const float *q, *k, *v;          // [T, H * K or H * 2 K], [T, G * K] twice
  const float *q_norm, *k_norm;    // [K]
  const float *cos, *sin;          // [T, half]
  // Kept from the forward pass: what a head reads before its gate [T, H, K], and the logarithm of its sum of
  // exponentials [T, H].
  float *reads, *log_sums;
};

struct AttentionTrainingGradients {
  const float* out;
  float *q, *k, *v;
  float* partial;  // of the norms' weights, [2, K] per sequence and KV head, written
};

struct AttentionTrainKernels {
  void (*forward)(const AttentionTraining& arguments, float* out);
  void (*backward)(const AttentionTraining& arguments, const AttentionTrainingGradients& gradients);
};

// RMSNorm of rows of a multiple of sixteen numbers.
struct NormTraining {
  int64_t num_rows, size;
  float eps;
  bool zero_centered;
  const float *x, *weight;
  float* inverse;  // kept from the forward pass: 1 / root mean square of each row
};

struct NormTrainKernels {
  int64_t rows;  // that share a gradient of the weight: one row of `partial`
  void (*forward)(const NormTraining& arguments, float* out);
  void (*backward)(const NormTraining& arguments, const float* grad_out, float* grad_x, float* partial);
};

}  // namespace qnext

QNEXT_DISPATCH(DeltaTrainKernels, delta_train_kernels)
QNEXT_DISPATCH(AttentionTrainKernels, attention_train_kernels)
QNEXT_DISPATCH(NormTrainKernels, norm_train_kernels)
