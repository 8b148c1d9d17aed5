// The recurrence of Gated DeltaNet for one value head.
//
// Per token and column of the state, with u = beta (v - g S^T k):
//     o = g S^T q + (k . q) u,    S <- g S + k u^T
// so one pass over S writes the update of a token and reads S^T k, S^T q for the next one: four operations per vector.
// Sums run over the rows of S in order, whatever number of columns is taken at a time.
//
// S lies in memory as fp32 or bf16. Arithmetic is fp32, and in bf16 it is rounded where it would have been stored.
#pragma once

#include <type_traits>

#include "pool.h"
#include "simd.h"

namespace qnext::QNEXT_ISA {

namespace {

constexpr int kStateSlot = 20;

struct Gates {
  float decay, beta, key_query;
};

// Tokens of one sequence, ready for the recurrence of one value head.
struct HeadTokens {
  int64_t count, key_dim;
  const float* q;  // rows of `stride` floats
  const float* k;
  float* v;  // replaced by the output
  int64_t stride;
  const Gates* gates;
  int64_t gate_stride;
};

// Tokens that were computed and are not part of S: S <- decay S + k u^T for each, in order.
struct Updates {
  int64_t count;
  const float* k;
  const float* u;
  const float* decay;
  int64_t k_stride, u_stride, decay_stride;
};

// What a number of S is after it was stored and read.
QNEXT_INLINE f32reg as_stored(const float*, f32reg s) { return s; }
QNEXT_INLINE f32reg as_stored(const bf16*, f32reg s) { return round_to_bf16(s); }

// reads[c] = sum over rows of S[row, c] k[row], and the same for q. With `copy`, S is written there, rows side by side.
template <int kVectors, typename State>
QNEXT_INLINE void read_state(const State* state, int64_t stride, float* copy, int64_t rows, const float* k,
                             const float* q, f32reg* key_reads, f32reg* query_reads) {
  for (int c = 0; c < kVectors; ++c) key_reads[c] = query_reads[c] = f32reg{};
  for (int64_t row = 0; row < rows; ++row) {
    const f32reg key = splat_register(k[row]), query = splat_register(q[row]);
    for (int c = 0; c < kVectors; ++c) {
      const f32reg s = load_register(state + row * stride + c * kRegisterLanes);
      if (copy) store(copy + (row * kVectors + c) * kRegisterLanes, s);
      key_reads[c] = fma(s, key, key_reads[c]);
      query_reads[c] = fma(s, query, query_reads[c]);
    }
  }
}

// As read_state, after `updates`. S after them is written where it was, if `writes`, and to `copy`.
template <int kVectors, typename State>
QNEXT_INLINE void read_updated(State* state, int64_t stride, bool writes, float* copy, int64_t rows,
                               const Updates& updates, int64_t column, const float* k, const float* q,
                               f32reg* key_reads, f32reg* query_reads) {
  for (int c = 0; c < kVectors; ++c) key_reads[c] = query_reads[c] = f32reg{};
  for (int64_t row = 0; row < rows; ++row) {
    f32reg s[kVectors];
    for (int c = 0; c < kVectors; ++c) s[c] = load_register(state + row * stride + c * kRegisterLanes);
    for (int64_t t = 0; t < updates.count; ++t) {
      const f32reg now = splat_register(updates.k[t * updates.k_stride + row]);
      const f32reg g = splat_register(updates.decay[t * updates.decay_stride]);
      const float* u = updates.u + t * updates.u_stride + column;
      for (int c = 0; c < kVectors; ++c)
        s[c] = as_stored(state, fma(now, load_register(u + c * kRegisterLanes), g * s[c]));
    }
    const f32reg key = splat_register(k[row]), query = splat_register(q[row]);
    for (int c = 0; c < kVectors; ++c) {
      if (writes) store(state + row * stride + c * kRegisterLanes, s[c]);
      if (copy) store(copy + (row * kVectors + c) * kRegisterLanes, s[c]);
      key_reads[c] = fma(s[c], key, key_reads[c]);
      query_reads[c] = fma(s[c], query, query_reads[c]);
    }
  }
}

// S <- decay S + k u^T, then as read_state with the next token's k and q.
template <int kVectors>
QNEXT_INLINE void step_state(float* state, int64_t rows, float decay, const float* k, const f32reg* u,
                             const float* next_k, const float* next_q, f32reg* key_reads, f32reg* query_reads) {
  const f32reg g = splat_register(decay);
  for (int c = 0; c < kVectors; ++c) key_reads[c] = query_reads[c] = f32reg{};
  for (int64_t row = 0; row < rows; ++row) {
    const f32reg now = splat_register(k[row]), key = splat_register(next_k[row]), query = splat_register(next_q[row]);
    for (int c = 0; c < kVectors; ++c) {
      const f32reg s = fma(now, u[c], g * load_register(state + (row * kVectors + c) * kRegisterLanes));
      store(state + (row * kVectors + c) * kRegisterLanes, s);
      key_reads[c] = fma(s, key, key_reads[c]);
      query_reads[c] = fma(s, query, query_reads[c]);
    }
  }
}

// to <- decay from + k u^T
template <int kVectors, typename From, typename State>
QNEXT_INLINE void write_state(const From* from, int64_t from_stride, State* to, int64_t to_stride, int64_t rows,
                              float decay, const float* k, const f32reg* u) {
  const f32reg g = splat_register(decay);
  for (int64_t row = 0; row < rows; ++row) {
    const f32reg now = splat_register(k[row]);
    for (int c = 0; c < kVectors; ++c)
      store(to + row * to_stride + c * kRegisterLanes, fma(now, u[c], g * load_register(from + row * from_stride + c * kRegisterLanes)));
  }
}

// What a token writes, and its output in the place of v.
template <int kVectors>
QNEXT_INLINE void finish_token(const Gates& gates, const f32reg* key_reads, const f32reg* query_reads, float* v,
                               f32reg* u) {
  const f32reg g = splat_register(gates.decay), beta = splat_register(gates.beta), key_query = splat_register(gates.key_query);
  for (int c = 0; c < kVectors; ++c) {
    u[c] = beta * (load_register(v + c * kRegisterLanes) - g * key_reads[c]);
    store(v + c * kRegisterLanes, fma(key_query, u[c], g * query_reads[c]));
  }
}

// All tokens for kVectors registers of columns. The block of the state moves to `block`, side by side, so that it stays in the
// level-1 cache; a single token works in place.
template <int kVectors, typename State>
__attribute__((noinline)) void walk_columns(const HeadTokens& tokens, const Updates& accepted, State* state,
                                            int64_t value_dim, int64_t column, float* block) {
  f32reg key_reads[kVectors], query_reads[kVectors], u[kVectors];
  const int64_t rows = tokens.key_dim, last = tokens.count - 1, stride = tokens.stride;
  float *v = tokens.v + column, *copy = last > 0 ? block : nullptr;
  state += column;
  if (accepted.count > 0)
    read_updated<kVectors>(state, value_dim, last == 0, copy, rows, accepted, column, tokens.k, tokens.q, key_reads,
                           query_reads);
  else
    read_state<kVectors>(state, value_dim, copy, rows, tokens.k, tokens.q, key_reads, query_reads);
  for (int64_t t = 0; t < last; ++t) {
    const Gates& gates = tokens.gates[t * tokens.gate_stride];
    const float* k = tokens.k + t * stride;
    finish_token<kVectors>(gates, key_reads, query_reads, v + t * stride, u);
    step_state<kVectors>(block, rows, gates.decay, k, u, k + stride, tokens.q + (t + 1) * stride, key_reads,
                         query_reads);
  }
  const Gates& gates = tokens.gates[last * tokens.gate_stride];
  finish_token<kVectors>(gates, key_reads, query_reads, v + last * stride, u);
  const float* k = tokens.k + last * stride;
  if (last > 0)
    write_state<kVectors>(block, kVectors * kRegisterLanes, state, value_dim, rows, gates.decay, k, u);
  else
    write_state<kVectors>(state, value_dim, state, value_dim, rows, gates.decay, k, u);
}

// The same for a draft: the state takes up what was accepted and nothing else, and every token's u is kept in rows of
// `drafted`. A token makes those before it again in registers: for a few tokens cheaper than a second state.
template <int kVectors, typename State>
__attribute__((noinline)) void draft_columns(const HeadTokens& tokens, const Updates& accepted, float* drafted,
                                             State* state, int64_t value_dim, int64_t column) {
  f32reg key_reads[kVectors], query_reads[kVectors], u[kVectors];
  const int64_t rows = tokens.key_dim, stride = tokens.stride;
  constexpr int64_t kGateFloats = sizeof(Gates) / sizeof(float);
  state += column;
  for (int64_t t = 0; t < tokens.count; ++t) {
    const float *k = tokens.k + t * stride, *q = tokens.q + t * stride;
    if (t > 0) {
      const Updates before{t,      tokens.k,          drafted, &tokens.gates->decay,
                           stride, accepted.u_stride, tokens.gate_stride * kGateFloats};
      read_updated<kVectors>(state, value_dim, false, nullptr, rows, before, column, k, q, key_reads, query_reads);
    } else if (accepted.count > 0) {
      read_updated<kVectors>(state, value_dim, true, nullptr, rows, accepted, column, k, q, key_reads, query_reads);
    } else {
      read_state<kVectors>(state, value_dim, nullptr, rows, k, q, key_reads, query_reads);
    }
    finish_token<kVectors>(tokens.gates[t * tokens.gate_stride], key_reads, query_reads, tokens.v + t * stride + column, u);
    float* kept = drafted + t * accepted.u_stride + column;
    for (int c = 0; c < kVectors; ++c) store(kept + c * kRegisterLanes, u[c]);
  }
}

// 64 columns of 128 rows are 32 KiB. With sixteen registers, half as many columns as they hold lanes.
constexpr int64_t kMostVectors = kRegisterLanes == 16 ? 4 : 2;

// Calls body(column, number of registers as a constant) for all columns, as many registers at a time as may be.
template <typename Body>
QNEXT_INLINE void for_each_columns(int64_t value_dim, bool in_whole_rows, Body&& body) {
  int64_t column = 0;
  const auto take = [&](auto vectors) {
    constexpr int64_t kWidth = decltype(vectors)::value * kRegisterLanes;
    for (; column + kWidth <= value_dim; column += kWidth) body(column, vectors);
  };
  if constexpr (kMostVectors >= 4) {
    if (in_whole_rows) take(std::integral_constant<int, 8>{});
    take(std::integral_constant<int, 4>{});
  }
  take(std::integral_constant<int, 2>{});
  take(std::integral_constant<int, 1>{});
}

// With `drafted`, rows for u as far apart as those of `accepted`, the tokens are a draft.
template <typename State>
void walk_head(const HeadTokens& tokens, const Updates& accepted, float* drafted, State* state, int64_t value_dim) {
  auto* block = static_cast<float*>(scratch(kStateSlot, tokens.key_dim * kMostVectors * kRegisterLanes * 4));
  // Whole rows, where no block is needed: the state is read once, from first to last.
  for_each_columns(value_dim, tokens.count == 1 || drafted, [&](int64_t column, auto vectors) {
    if (drafted)
      draft_columns<decltype(vectors)::value>(tokens, accepted, drafted, state, value_dim, column);
    else
      walk_columns<decltype(vectors)::value>(tokens, accepted, state, value_dim, column, block);
  });
}

// S after the updates, written where it was.
template <typename State>
void update_head(const Updates& updates, State* state, int64_t key_dim, int64_t value_dim) {
  for_each_columns(value_dim, false, [&](int64_t column, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    f32reg u[kVectors];
    for (int64_t t = 0; t < updates.count; ++t) {
      for (int c = 0; c < kVectors; ++c)
        u[c] = load_register(updates.u + t * updates.u_stride + column + c * kRegisterLanes);
      write_state<kVectors>(state + column, value_dim, state + column, value_dim, key_dim,
                            updates.decay[t * updates.decay_stride], updates.k + t * updates.k_stride, u);
    }
  });
}

}  // namespace

}  // namespace qnext::QNEXT_ISA
