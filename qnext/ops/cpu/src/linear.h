// Products with weights: dense layers and mixtures of experts.
//
// Batch-invariant by construction: every number of the result is computed by one thread from one row and one output of
// the weight, in one order of summation, whatever other rows and outputs are computed beside it.
#pragma once

#include <cstdint>

#include "expert_source.h"
#include "isa.h"

namespace qnext {

enum class WeightKind : int { f32 = 0, bf16 = 1, codes4 = 2, codes8 = 3 };
enum class ScaleKind : int { f32 = 0, bf16 = 1, f16 = 2 };

// Matrices [num_experts, F, D]. Floats lie row by row. Codes lie in panels of 16 outputs, the last one padded with
// zeros: [panel][D / 4][16][4] bytes for 8 bits; for 4 bits [panel][D / 8][16][4] bytes, whose low nibbles are inputs
// 8 i + j and whose high nibbles are inputs 8 i + 4 + j. Scales are [panel][D / group][16], zeros likewise in uint8 or
// absent, which means 2 ** (bits - 1).
//
// The experts of a stack lie one behind the other from the addresses on, or, where there are `records`, each in a record
// of its own, at these distances from its start: gate_up and down of an expert share a record.
struct Weight {
  WeightKind kind;
  int64_t num_experts, num_outputs, num_inputs;
  const uint8_t* data;
  const uint8_t* scales;
  const uint8_t* zeros;
  ScaleKind scale_kind;
  int64_t group_size;

  const uint8_t* const* records;  // [num_experts], null for one that is not in memory; or null
  int64_t data_at, scales_at;
  int64_t zeros_at;       // negative where there are none
  ExpertSource* source;  // brings records that are not in memory; null where all are

  bool is_float() const { return kind == WeightKind::f32 || kind == WeightKind::bf16; }
  bool has_zeros() const { return records ? zeros_at >= 0 : zeros != nullptr; }
  int64_t num_panels() const { return (num_outputs + 15) / 16; }
  int64_t num_groups() const { return num_inputs / group_size; }
};

// Rows that are multiplied with a weight, made ready once by prepare_rows: fp32, bf16, or int8 with a scale per group
// and the sum of the group times -zero (the term that takes the zero of the codes out of the integer products).
struct Rows {
  const float* f32 = nullptr;
  const void* bf16 = nullptr;
  const int8_t* codes = nullptr;
  const float* scales = nullptr;
  const int32_t* corrections = nullptr;
  int64_t num_inputs = 0;
  int64_t num_groups = 0;
};

struct SharedExpert {
  const Weight* gate;
  const Weight* up;
  const Weight* down;
  const float* gate_vector;  // [D]; null where its output is added as it is
};

struct ExpertsArguments {
  const float* x;  // [T, D]
  int64_t num_tokens, top_k;
  const float* routing_weights;   // [T, top_k]
  const int64_t* routed_experts;  // [T, top_k], checked to lie in [0, num_experts)
  const Weight* gate_up;          // [E, 2 F, D]
  const Weight* down;             // [E, D, F]
  const SharedExpert* shared;     // or null
  float* out;                     // [T, D]
};

// What experts made of tokens, in rows, to be added up for each token.
struct CombineArguments {
  const float* rows;        // [.., D]
  int64_t num_tokens, top_k, hidden;
  const float* weights;     // [T, top_k]
  const float* x;           // [T, D], what the shared expert's gate reads; null without a shared expert
  const float* shared;      // [T, D], what the shared expert made
  const float* gate_vector; // [D]; null where that is added as it is
  float* out;               // [T, D]
};

struct LinearKernels {
  // out[t, f] = sum over d of x[t, d] * w[f, d]; out has a row stride of its own.
  void (*linear)(const Weight& weight, const float* x, int64_t num_rows, float* out, int64_t out_stride);
  void (*experts)(const ExpertsArguments& arguments);
  // The last part of `experts`: the same bits. `places` [T, top_k] are the rows of each token's experts, checked.
  void (*combine)(const CombineArguments& arguments, const int64_t* places);
  // Rows of codes as on disk -> panels; see Weight. The last panel is padded with zeros.
  void (*write_panels)(const uint8_t* codes, int64_t num_outputs, int64_t row_bytes, int bits, uint8_t* panels);
};

}  // namespace qnext

QNEXT_DISPATCH(LinearKernels, linear_kernels)
