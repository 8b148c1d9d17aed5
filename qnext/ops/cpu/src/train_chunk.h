// The gated delta rule of one value head over one chunk of C tokens, and its gradient.
//
// With G the running sum of the log decay, D_ij = exp(G_i - G_j) for i >= j, P = (q k^T) D, M = (k k^T) D under the
// diagonal, A = beta M and S the state before the chunk (arXiv 2412.06464, section 3.3):
//     U = (1 + A)^-1 (beta v - beta exp(G) k S);   o = exp(G) q S + P U;   S' = exp(G_C) S + (exp(G_C - G) k)^T U
// Tokens that a chunk lacks are rows of zeros with beta = 0 and g = 0: they change nothing.
#pragma once

#include "train_products.h"

namespace qnext::QNEXT_ISA {

namespace {

constexpr int64_t kChunk = 32;  // state products cost the same per token for any; a longer one has more inside

struct HeadSizes {
  int64_t key_dim, value_dim;
};

// A chunk as all value heads of a key head see it. q is scaled.
struct ChunkKeys {
  float *q, *k;                    // [C, K]
  float *query_key, *key_key;      // [C, C] products of q and k, k and k: on and under the diagonal
};

struct ChunkGates {
  float g[kChunk], beta[kChunk];
  float growth[kChunk], outflow[kChunk];  // exp(G), exp(G_C - G)
  float inflow[kChunk];                   // -beta exp(G)
};

// Products with the decay between their tokens.
struct ChunkProducts {
  float decay[kChunk * kChunk], scores[kChunk * kChunk], mixing[kChunk * kChunk];  // D, P, M
  float negative[kChunk * kChunk];                                                // -A
};

// Gradients that the value heads of a key head add up, and those of one head.
struct ChunkGradients {
  float *q, *k;                // [C, K], added to
  float *query_key, *key_key;  // [C, C], added to
  float* v;                    // [C, V]
  float g[kChunk], beta[kChunk];
};

// out [C, C] = a b on and under the diagonal, and some above it; b is [K, C].
void multiply_lower(const float* a, const float* b, int64_t num_terms, float* out) {
  for (int64_t row = 0; row < kChunk; row += kLanes)
    multiply(rows_of(a + row * num_terms, num_terms), b, kChunk, kLanes, num_terms, row + kLanes,
             {out + row * kChunk, kChunk});
}

void multiply_keys(const HeadSizes& sizes, const ChunkKeys& keys, float* k_t) {
  transpose(keys.k, kChunk, sizes.key_dim, k_t);
  multiply_lower(keys.q, k_t, sizes.key_dim, keys.query_key);
  multiply_lower(keys.k, k_t, sizes.key_dim, keys.key_key);
}

// g and beta are there.
void decay_products(const ChunkKeys& keys, ChunkGates& gates, ChunkProducts& out) {
  alignas(64) float sums[kChunk], lanes[kChunk];
  float total = 0.0f;
  for (int64_t i = 0; i < kChunk; ++i) {
    sums[i] = total += gates.g[i];
    lanes[i] = static_cast<float>(i);
  }
  for (int64_t i = 0; i < kChunk; i += kRegisterLanes) {
    const f32reg growth = exp(load_register(sums + i));
    store(gates.growth + i, growth);
    store(gates.outflow + i, exp(splat_register(total) - load_register(sums + i)));
    store(gates.inflow + i, -load_register(gates.beta + i) * growth);
  }
  for (int64_t i = 0; i < kChunk; ++i)
    for (int64_t j = 0; j < kChunk; j += kRegisterLanes) {
      const int64_t place = i * kChunk + j;
      f32reg decay{}, scores{}, mixing{};
      if (j <= i) {  // above the diagonal differences are positive: taken as zero, then masked
        const f32reg lane = load_register(lanes + j), row = splat_register(static_cast<float>(i));
        const f32reg all = exp(vmin(splat_register(sums[i]) - load_register(sums + j), f32reg{}));
        decay = (f32reg)((u32reg)all & (u32reg)(lane <= row));
        scores = decay * load_register(keys.query_key + place);
        mixing = (f32reg)((u32reg)(decay * load_register(keys.key_key + place)) & (u32reg)(lane < row));
      }
      store(out.decay + place, decay);
      store(out.scores + place, scores);
      store(out.mixing + place, mixing);
      store(out.negative + place, splat_register(-gates.beta[i]) * mixing);
    }
}

// v [C, V] becomes U. Writes o [C, V] and, unless it is null, the state after the chunk. A null `state` is zero.
// `scaled` is [C, K].
void forward_chunk(const HeadSizes& sizes, const ChunkKeys& keys, const ChunkGates& gates,
                   const ChunkProducts& products, const float* state, float* v, float* o, float* next, float* scaled) {
  const int64_t key_dim = sizes.key_dim, value_dim = sizes.value_dim;
  Into reads{o, value_dim};
  scale_rows(gates.beta, v, kChunk, value_dim, v);
  if (state) {
    scale_rows(gates.inflow, keys.k, kChunk, key_dim, scaled);
    multiply(rows_of(scaled, key_dim), state, value_dim, kChunk, key_dim, value_dim, onto(v, value_dim));
    scale_rows(gates.growth, keys.q, kChunk, key_dim, scaled);
    multiply(rows_of(scaled, key_dim), state, value_dim, kChunk, key_dim, value_dim, reads);
    reads = onto(o, value_dim);
  }
  solve_lower(products.negative, kChunk, v, value_dim);
  multiply<Terms::to_diagonal>(rows_of(products.scores, kChunk), v, value_dim, kChunk, kChunk, value_dim, reads);
  if (!next) return;
  scale_rows(gates.outflow, keys.k, kChunk, key_dim, scaled);
  multiply(columns_of(scaled, key_dim), v, value_dim, key_dim, kChunk, value_dim,
           {next, value_dim, state, gates.growth[kChunk - 1]});
}

// Memory for the gradient of one head: [C, K] three times, [C, V], [V, C], [V, K], [C, C] twice.
struct ChunkScratch {
  float *scaled, *from_state, *from_exit, *right, *writes_t, *state_t, *scores, *matrix;
};

// Gradients of q, k and the gates through the states: rows of exp(G) q, -beta exp(G) k and exp(G_C - G) k.
void backward_rows(const HeadSizes& sizes, const ChunkKeys& keys, const ChunkGates& gates, float carried,
                   const ChunkScratch& scratch, const float* grad_q_in, ChunkGradients& out, float* grad_sums) {
  const int64_t size = sizes.key_dim;
  float total = carried;
  for (int64_t i = 0; i < kChunk; ++i) {
    const float *q = keys.q + i * size, *k = keys.k + i * size;
    const float* grad_k_in = scratch.from_state + i * size;  // of -beta exp(G) k
    const float* grad_k_out = scratch.from_exit + i * size;
    const float along_in = gates.inflow[i] * dot_registers(grad_k_in, k, size);
    const float along_out = gates.outflow[i] * dot_registers(grad_k_out, k, size);
    const float along_q = gates.growth[i] * dot_registers(grad_q_in + i * size, q, size);
    out.beta[i] -= gates.growth[i] * dot_registers(grad_k_in, k, size);
    grad_sums[i] += along_in - along_out + along_q;
    total += along_out;
    for (int64_t c = 0; c < size; c += kRegisterLanes) {
      const f32reg in = splat_register(gates.inflow[i]) * load_register(grad_k_in + c);
      const f32reg from = fma(splat_register(gates.outflow[i]), load_register(grad_k_out + c), in);
      store(out.k + i * size + c, load_register(out.k + i * size + c) + from);
    }
    add_scaled(gates.growth[i], grad_q_in + i * size, out.q + i * size, size);
  }
  grad_sums[kChunk - 1] += total;
}

// Gradients through P and M, of which `scratch` holds the gradients: of P and of -A.
void backward_products(const ChunkGates& gates, const ChunkProducts& products, const ChunkScratch& scratch,
                       ChunkGradients& out, float* grad_sums) {
  alignas(64) float down[kChunk] = {};
  for (int64_t i = 0; i < kChunk; ++i) {
    f32reg flow_sum{}, mixing_sum{};
    const f32reg beta = splat_register(gates.beta[i]);
    for (int64_t j = 0; j <= i; j += kRegisterLanes) {
      const int64_t place = i * kChunk + j;
      const f32reg decay = load_register(products.decay + place);
      const f32reg mixing = load_register(products.mixing + place);  // zero on and above the diagonal
      const f32reg grad_scores = load_register(scratch.scores + place);
      const f32reg grad_matrix = -load_register(scratch.matrix + place);
      mixing_sum = fma(grad_matrix, mixing, mixing_sum);
      const f32reg grad_mixing = beta * grad_matrix;
      const f32reg flow = fma(grad_mixing, mixing, grad_scores * load_register(products.scores + place));
      flow_sum += flow;
      store(down + j, load_register(down + j) + flow);
      store(out.query_key + place, fma(grad_scores, decay, load_register(out.query_key + place)));
      store(out.key_key + place, fma(grad_mixing, decay, load_register(out.key_key + place)));
    }
    out.key_key[i * kChunk + i] = 0.0f;  // M has no diagonal
    out.beta[i] += sum(mixing_sum);
    grad_sums[i] += sum(flow_sum);
  }
  for (int64_t j = 0; j < kChunk; ++j) grad_sums[j] -= down[j];
}

// What one head keeps of a chunk, or is given: S or null for zero, U [C, V], v [C, V], the gradient of o [C, V].
struct ChunkRecord {
  const float *state, *writes, *v, *grad_o;
};

// `grad_state` [K, V] is the gradient of the state after the chunk and becomes that of the state before it.
void backward_chunk(const HeadSizes& sizes, const ChunkKeys& keys, const ChunkGates& gates,
                    const ChunkProducts& products, const ChunkRecord& record, float* grad_state,
                    const ChunkScratch& scratch, ChunkGradients& out) {
  const int64_t key_dim = sizes.key_dim, value_dim = sizes.value_dim, state_size = key_dim * value_dim;
  const float *grad_o = record.grad_o, last_growth = gates.growth[kChunk - 1];
  alignas(64) float grad_sums[kChunk] = {};
  // of U, then of the right side of the system
  multiply<Terms::from_diagonal>(columns_of(products.scores, kChunk), grad_o, value_dim, kChunk, kChunk, value_dim,
                                 {scratch.right, value_dim});
  scale_rows(gates.outflow, keys.k, kChunk, key_dim, scratch.scaled);
  multiply(rows_of(scratch.scaled, key_dim), grad_state, value_dim, kChunk, key_dim, value_dim,
           onto(scratch.right, value_dim));
  solve_lower_transposed(products.negative, kChunk, scratch.right, value_dim);
  transpose(record.writes, kChunk, value_dim, scratch.writes_t);
  multiply_lower(grad_o, scratch.writes_t, value_dim, scratch.scores);
  multiply_lower(scratch.right, scratch.writes_t, value_dim, scratch.matrix);

  transpose(grad_state, key_dim, value_dim, scratch.state_t);
  multiply(rows_of(record.writes, value_dim), scratch.state_t, key_dim, kChunk, value_dim, key_dim,
           {scratch.from_exit, key_dim});
  float carried = 0.0f;
  if (record.state) {
    carried = last_growth * dot_registers(record.state, grad_state, state_size);
    scale_rows(gates.inflow, keys.k, kChunk, key_dim, scratch.scaled);
    multiply(columns_of(scratch.scaled, key_dim), scratch.right, value_dim, key_dim, kChunk, value_dim,
             onto(grad_state, value_dim, last_growth));
    scale_rows(gates.growth, keys.q, kChunk, key_dim, scratch.scaled);
    multiply(columns_of(scratch.scaled, key_dim), grad_o, value_dim, key_dim, kChunk, value_dim,
             onto(grad_state, value_dim));
    transpose(record.state, key_dim, value_dim, scratch.state_t);
    multiply(rows_of(scratch.right, value_dim), scratch.state_t, key_dim, kChunk, value_dim, key_dim,
             {scratch.from_state, key_dim});
    multiply(rows_of(grad_o, value_dim), scratch.state_t, key_dim, kChunk, value_dim, key_dim,
             {scratch.scaled, key_dim});
  } else {
    memset(scratch.from_state, 0, kChunk * key_dim * sizeof(float));
    memset(scratch.scaled, 0, kChunk * key_dim * sizeof(float));
  }
  for (int64_t i = 0; i < kChunk; ++i)
    out.beta[i] = dot_registers(scratch.right + i * value_dim, record.v + i * value_dim, value_dim);
  scale_rows(gates.beta, scratch.right, kChunk, value_dim, out.v);
  backward_rows(sizes, keys, gates, carried, scratch, scratch.scaled, out, grad_sums);
  backward_products(gates, products, scratch, out, grad_sums);
  float total = 0.0f;
  for (int64_t i = kChunk - 1; i >= 0; --i) out.g[i] = total += grad_sums[i];
}

// Gradients of q and k through their products, added to those through the states.
void backward_keys(const HeadSizes& sizes, const ChunkKeys& keys, ChunkGradients& out) {
  const int64_t size = sizes.key_dim;
  multiply<Terms::to_diagonal>(rows_of(out.query_key, kChunk), keys.k, size, kChunk, kChunk, size, onto(out.q, size));
  multiply<Terms::from_diagonal>(columns_of(out.query_key, kChunk), keys.q, size, kChunk, kChunk, size,
                                 onto(out.k, size));
  multiply<Terms::to_diagonal>(rows_of(out.key_key, kChunk), keys.k, size, kChunk, kChunk, size, onto(out.k, size));
  multiply<Terms::from_diagonal>(columns_of(out.key_key, kChunk), keys.k, size, kChunk, kChunk, size,
                                 onto(out.k, size));
}

}  // namespace

}  // namespace qnext::QNEXT_ISA
