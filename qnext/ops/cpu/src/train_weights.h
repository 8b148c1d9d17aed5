// What training multiplies in fp32: dense layers, experts and the head, each with its gradients.
//
// Weights lie as the optimiser keeps them and nothing of them is kept between calls. `is_shared` lets the threads of the
// pool take part; the bits do not depend on it.
#pragma once

#include <cstdint>

#include "isa.h"

namespace qnext {

// A matrix as it lies, or read transposed: the number at (row, column) is data[column * stride + row] then.
struct Dense {
  const float* data;
  int64_t stride;
  bool is_transposed = false;
};

struct DenseSize {
  int64_t rows, columns, inner;
};

struct DenseProduct {
  DenseSize size;
  Dense a, b;
  float* out;
  int64_t out_stride;
  bool is_shared;
};

// Experts of one width, each with two matrices: gate and up [2 F, D], down [D, F].
struct TrainedExperts {
  int64_t num_experts, width;
  const float *gate_up, *down;
  float* hidden;                     // [rows, 2 F]: what gate_up makes; kept from the forward pass for the backward one
  float *grad_gate_up, *grad_down;   // null where they are not wanted
};

struct ExpertsTraining {
  int64_t num_tokens, top_k, size;  // T, A, D
  const float* x;                   // [T, D]
  const float* weights;             // [T, A]
  const int64_t* experts;           // [T, A], checked to lie in [0, num_experts)
  TrainedExperts routed;            // its rows: the assignments, sorted by expert
  TrainedExperts shared;            // its rows: the tokens; num_experts is one, or zero where there is none
  const float* gate_vector;         // [D]; null where the output of the shared expert is added as it is
  float* shared_scales;             // [T]: sigmoid(gate x)
  float* rows;                      // [T A + T, D]: the experts' outputs, and the gradients of their inputs
  float* out;                       // [T, D]
  const float* grad_out;            // [T, D]
  float *grad_x, *grad_weights, *grad_gate_vector;
  bool is_shared;
};

// The sum over rows of -log softmax(x W^T)[label]; the gradients for a sum that counts once.
struct HeadTraining {
  int64_t num_rows, size, num_labels, chunk_rows;  // logits of `chunk_rows` rows exist at a time
  const float *x, *weight;                         // [R, D], [Y, D]
  const int64_t* labels;                           // negative: the row counts nothing
  float *grad_x, *grad_weight;                     // null where they are not wanted
  bool is_shared;
};

struct TrainingKernels {
  void (*multiply)(const DenseProduct& product);
  void (*experts_forward)(const ExpertsTraining& arguments);
  void (*experts_backward)(const ExpertsTraining& arguments);
  double (*head)(const HeadTraining& arguments);
};

}  // namespace qnext

QNEXT_DISPATCH(TrainingKernels, training_kernels)
