// Gated attention between its projections with its gradient: one task per sequence and KV head. Its keys and values lie
// in panels of 64 keys, each [head_dim, 64] for scores and [64, head_dim] for sums; queries come in blocks of 32.
#include <algorithm>

#include "pool.h"
#include "train.h"
#include "train_products.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int64_t kQueries = 32, kKeys = 64;

// One sequence and KV head.
struct Group {
  Group(const AttentionTraining& a, int64_t task, bool has_gradient) : a(a), size(a.head_dim) {
    const int64_t sequence = task / a.num_kv_heads;
    kv_head = task % a.num_kv_heads;
    repeats = a.num_heads / a.num_kv_heads;
    first = a.starts[sequence];
    length = a.starts[sequence + 1] - first;
    num_keys = (length + kKeys - 1) / kKeys * kKeys;
    score_stride = num_keys + kLanes;  // no power of two
    const int64_t all_keys = num_keys * size, block = kQueries * size, tile = kQueries * kKeys;
    const int64_t count = (has_gradient ? 6 : 4) * all_keys + kQueries * score_stride + 4 * block + 2 * tile + 1024;
    Arena memory(static_cast<float*>(scratch(kTrainSlot, count * sizeof(float))));
    k = memory.take(all_keys);
    v = memory.take(all_keys);
    k_t = memory.take(all_keys);
    v_t = memory.take(all_keys);
    scores = memory.take(kQueries * score_stride);
    q = memory.take(block);
    out = memory.take(block);
    grad_q = memory.take(block);
    weights = memory.take(tile);
    grad_scores = memory.take(tile);
    grad_k = has_gradient ? memory.take(all_keys) : nullptr;
    grad_v = has_gradient ? memory.take(all_keys) : nullptr;
  }

  int64_t head(int64_t r) const { return kv_head * repeats + r; }
  int64_t kv_place(int64_t token) const { return ((first + token) * a.num_kv_heads + kv_head) * size; }
  // Of the query of a head; its gate lies `size` behind.
  int64_t q_place(int64_t token, int64_t r) const {
    return ((first + token) * a.num_heads + head(r)) * size * (a.has_gate ? 2 : 1);
  }
  int64_t out_place(int64_t token, int64_t r) const { return ((first + token) * a.num_heads + head(r)) * size; }
  int64_t sum_place(int64_t token, int64_t r) const { return (first + token) * a.num_heads + head(r); }

  const AttentionTraining& a;
  int64_t size, kv_head, repeats, first, length, num_keys, score_stride;
  float *k, *v, *k_t, *v_t;  // [num_keys, K] and panels
  float *scores;             // [kQueries, score_stride]
  float *q, *out, *grad_q;   // [kQueries, K]
  float *weights, *grad_scores;  // [kQueries, kKeys]
  float *grad_k, *grad_v;        // [num_keys, K]
};

// Turns the pairs (i, i + half) of y by their angles, or back for sign -1.
void rotate(const AttentionTraining& a, int64_t token, float sign, float* __restrict y) {
  const float *__restrict cos = a.cos + token * a.half, *__restrict sin = a.sin + token * a.half;
  const int64_t half = a.half;
#pragma GCC ivdep
  for (int64_t i = 0; i < half; ++i) {
    const float low = y[i], high = y[i + half], turn = sign * sin[i];
    y[i] = low * cos[i] - high * turn;
    y[i + half] = high * cos[i] + low * turn;
  }
}

float inverse_rms(const AttentionTraining& a, const float* x) {
  return 1.0f / sqrtf(dot_registers(x, x, a.head_dim) / static_cast<float>(a.head_dim) + a.eps);
}

// y = scale * rotated(norm(x)) for the token of that number in the batch.
void norm_and_rotate(const AttentionTraining& a, const float* x, const float* weight, int64_t token, float scale, float* y) {
  const f32reg inverse = splat_register(inverse_rms(a, x) * scale), offset = splat_register(a.zero_centered ? 1.0f : 0.0f);
  for (int64_t i = 0; i < a.head_dim; i += kRegisterLanes)
    store(y + i, load_register(x + i) * inverse * (load_register(weight + i) + offset));
  rotate(a, token, 1.0f, y);
}

// The gradient of x; `grad` is that of y and is overwritten. That of the weight is added.
void norm_and_rotate_gradient(const AttentionTraining& a, const float* x, const float* weight, int64_t token, float scale,
                              float* grad, float* grad_x, float* grad_weight) {
  rotate(a, token, -1.0f, grad);
  const float inverse = inverse_rms(a, x);
  const f32reg offset = splat_register(a.zero_centered ? 1.0f : 0.0f), factor = splat_register(scale);
  f32reg along{};
  for (int64_t i = 0; i < a.head_dim; i += kRegisterLanes) {
    const f32reg upper = factor * load_register(grad + i), normed = splat_register(inverse) * load_register(x + i);
    const f32reg inner = upper * (load_register(weight + i) + offset);
    store(grad_weight + i, fma(upper, normed, load_register(grad_weight + i)));
    along = fma(inner, normed, along);
    store(grad + i, inner);
  }
  const f32reg mean = splat_register(-sum(along) * inverse / static_cast<float>(a.head_dim));
  for (int64_t i = 0; i < a.head_dim; i += kRegisterLanes)
    store(grad_x + i, splat_register(inverse) * fma(mean, load_register(x + i), load_register(grad + i)));
}

// Keys and values of the sequence, zeros behind its end.
void read_keys(const Group& g) {
  const AttentionTraining& a = g.a;
  for (int64_t t = 0; t < g.length; ++t) {
    norm_and_rotate(a, a.k + g.kv_place(t), a.k_norm, g.first + t, 1.0f, g.k + t * g.size);
    memcpy(g.v + t * g.size, a.v + g.kv_place(t), g.size * sizeof(float));
  }
  for (float* rows : {g.k, g.v})
    memset(rows + g.length * g.size, 0, (g.num_keys - g.length) * g.size * sizeof(float));
  for (int64_t t = 0; t < g.num_keys; t += kKeys) transpose(g.k + t * g.size, kKeys, g.size, g.k_t + t * g.size);
}

void read_queries(const Group& g, int64_t token, int64_t count, int64_t r) {
  for (int64_t t = 0; t < count; ++t)
    norm_and_rotate(g.a, g.a.q + g.q_place(token + t, r), g.a.q_norm, g.first + token + t, g.a.scale, g.q + t * g.size);
  memset(g.q + count * g.size, 0, (kQueries - count) * g.size * sizeof(float));
}

// Scores become their exponentials, to `last_key`, where those that the query does not see are zero. Returns 1 / sum
// and keeps the logarithm of the sum.
float softmax_row(float* scores, int64_t num_seen, int64_t last_key, float* log_sum) {
  for (int64_t j = num_seen; j < last_key; ++j) scores[j] = -3e38f;
  f32reg highest = splat_register(-3e38f), total{};
  for (int64_t j = 0; j < last_key; j += kRegisterLanes) highest = vmax(highest, load_register(scores + j));
  const float most = max_lane(highest);
  for (int64_t j = 0; j < last_key; j += kRegisterLanes) {
    const f32reg x = exp(load_register(scores + j) - splat_register(most));
    total += x;
    store(scores + j, x);
  }
  const float all = sum(total);
  *log_sum = most + logf(all);
  return 1.0f / all;
}

void forward_block(const Group& g, int64_t token, int64_t r, float* out) {
  const int64_t count = std::min(kQueries, g.length - token), size = g.size;
  const int64_t last_key = (token + kQueries + kKeys - 1) / kKeys * kKeys;
  alignas(64) float inverses[kQueries] = {};
  read_queries(g, token, count, r);
  for (int64_t j = 0; j < last_key; j += kKeys)
    multiply(rows_of(g.q, size), g.k_t + j * size, kKeys, kQueries, size, kKeys, {g.scores + j, g.score_stride});
  for (int64_t t = 0; t < kQueries; ++t) {
    float unused;
    inverses[t] = softmax_row(g.scores + t * g.score_stride, token + t + 1, last_key,
                              t < count ? g.a.log_sums + g.sum_place(token + t, r) : &unused);
  }
  memset(g.out, 0, kQueries * size * sizeof(float));
  for (int64_t j = 0; j < last_key; j += kKeys)  // a panel of values stays in the level-1 cache
    multiply(rows_of(g.scores + j, g.score_stride), g.v + j * size, size, kQueries, kKeys, size, onto(g.out, size));
  for (int64_t t = 0; t < count; ++t) {
    const float* gate = g.a.q + g.q_place(token + t, r) + size;
    float *kept = g.a.reads + g.out_place(token + t, r), *to = out + g.out_place(token + t, r);
    for (int64_t i = 0; i < size; i += kRegisterLanes) {
      const f32reg read = load_register(g.out + t * size + i) * splat_register(inverses[t]);
      store(kept + i, read);
      store(to + i, g.a.has_gate ? read * sigmoid(load_register(gate + i)) : read);
    }
  }
}

void attention_forward(const AttentionTraining& a, float* out) {
  parallel_for(a.num_sequences * a.num_kv_heads, [&](int64_t task) {
    const Group g(a, task, false);
    read_keys(g);
    for (int64_t r = 0; r < g.repeats; ++r)
      for (int64_t token = 0; token < g.length; token += kQueries) forward_block(g, token, r, out);
  });
}

// ---- gradients ----

// The gradient before the gate into `out`, that of the gate to its place; along[t] = gradient . what was read.
void gate_gradient(const Group& g, int64_t token, int64_t count, int64_t r, const AttentionTrainingGradients& to,
                   float* along) {
  const int64_t size = g.size;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t place = g.q_place(token + t, r) + size;
    const float *read = g.a.reads + g.out_place(token + t, r), *grad = to.out + g.out_place(token + t, r);
    float* grad_read = g.out + t * size;
    f32reg total{};
    for (int64_t i = 0; i < size; i += kRegisterLanes) {
      f32reg upper = load_register(grad + i);
      if (g.a.has_gate) {
        const f32reg open = sigmoid(load_register(g.a.q + place + i));
        store(to.q + place + i, upper * load_register(read + i) * open * (splat_register(1.0f) - open));
        upper = upper * open;
      }
      store(grad_read + i, upper);
      total = fma(upper, load_register(read + i), total);
    }
    along[t] = sum(total);
  }
  memset(g.out + count * size, 0, (kQueries - count) * size * sizeof(float));
}

// weights = softmax of the scores of one panel, grad_scores = weights (grad_scores - along).
void softmax_gradient(const Group& g, int64_t first_key, int64_t token, int64_t count, const float* log_sums,
                      const float* along) {
  for (int64_t t = 0; t < kQueries; ++t) {
    float *weights = g.weights + t * kKeys, *grads = g.grad_scores + t * kKeys;
    const int64_t num_seen = t < count ? std::clamp<int64_t>(token + t + 1 - first_key, 0, kKeys) : 0;
    for (int64_t j = num_seen; j < kKeys; ++j) weights[j] = -3e38f;
    for (int64_t j = 0; j < kKeys; j += kRegisterLanes) {
      const f32reg weight = exp(load_register(weights + j) - splat_register(log_sums[t]));
      store(weights + j, weight);
      store(grads + j, weight * (load_register(grads + j) - splat_register(along[t])));
    }
  }
}

void backward_block(const Group& g, int64_t token, int64_t r, const AttentionTrainingGradients& to, float* grad_norm) {
  const int64_t count = std::min(kQueries, g.length - token), size = g.size;
  alignas(64) float along[kQueries] = {}, log_sums[kQueries] = {};
  read_queries(g, token, count, r);
  gate_gradient(g, token, count, r, to, along);
  for (int64_t t = 0; t < count; ++t) log_sums[t] = g.a.log_sums[g.sum_place(token + t, r)];
  memset(g.grad_q, 0, kQueries * size * sizeof(float));
  for (int64_t j = 0; j < token + count; j += kKeys) {
    multiply(rows_of(g.q, size), g.k_t + j * size, kKeys, kQueries, size, kKeys, {g.weights, kKeys});
    multiply(rows_of(g.out, size), g.v_t + j * size, kKeys, kQueries, size, kKeys, {g.grad_scores, kKeys});
    softmax_gradient(g, j, token, count, log_sums, along);
    multiply(rows_of(g.grad_scores, kKeys), g.k + j * size, size, kQueries, kKeys, size, onto(g.grad_q, size));
    multiply(columns_of(g.grad_scores, kKeys), g.q, size, kKeys, kQueries, size, onto(g.grad_k + j * size, size));
    multiply(columns_of(g.weights, kKeys), g.out, size, kKeys, kQueries, size, onto(g.grad_v + j * size, size));
  }
  for (int64_t t = 0; t < count; ++t) {
    const int64_t place = g.q_place(token + t, r);
    norm_and_rotate_gradient(g.a, g.a.q + place, g.a.q_norm, g.first + token + t, g.a.scale, g.grad_q + t * size,
                             to.q + place, grad_norm);
  }
}

void backward_group(const AttentionTraining& a, int64_t task, const AttentionTrainingGradients& to) {
  const Group g(a, task, true);
  const int64_t size = g.size;
  float *grad_q_norm = to.partial + task * 2 * size, *grad_k_norm = grad_q_norm + size;
  memset(grad_q_norm, 0, 2 * size * sizeof(float));
  for (float* rows : {g.grad_k, g.grad_v}) memset(rows, 0, g.num_keys * size * sizeof(float));
  read_keys(g);
  for (int64_t t = 0; t < g.num_keys; t += kKeys) transpose(g.v + t * size, kKeys, size, g.v_t + t * size);
  for (int64_t r = 0; r < g.repeats; ++r)
    for (int64_t token = 0; token < g.length; token += kQueries) backward_block(g, token, r, to, grad_q_norm);
  for (int64_t t = 0; t < g.length; ++t) {
    const int64_t place = g.kv_place(t);
    norm_and_rotate_gradient(a, a.k + place, a.k_norm, g.first + t, 1.0f, g.grad_k + t * size, to.k + place, grad_k_norm);
    memcpy(to.v + place, g.grad_v + t * size, size * sizeof(float));
  }
}

void attention_backward(const AttentionTraining& a, const AttentionTrainingGradients& to) {
  parallel_for(a.num_sequences * a.num_kv_heads, [&](int64_t task) { backward_group(a, task, to); });
}

}  // namespace

extern const AttentionTrainKernels attention_train_kernels;
const AttentionTrainKernels attention_train_kernels{attention_forward, attention_backward};

}  // namespace qnext::QNEXT_ISA
