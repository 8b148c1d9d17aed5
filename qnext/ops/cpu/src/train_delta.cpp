// The token mixer of Gated DeltaNet with its gradient: one task per sequence and key head walks its chunks, forward and
// in reverse, with everything of a chunk in the caches. What is cheap to compute again is not kept.
#include <algorithm>

#include "delta.h"
#include "pool.h"
#include "train.h"
#include "train_chunk.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr float kL2Eps = 1e-6f;
constexpr int kBlockRows = 4;  // tokens of the convolution at once

// One sequence and key head: its columns in the rows of the tokens, its parameters, and memory for a chunk.
struct Group {
  Group(const DeltaTraining& a, int64_t sequence, int64_t key_head)
      : a(a), sizes{a.key_dim, a.value_dim}, key_head(key_head), repeats(a.repeats) {
    num_heads = a.num_key_heads * repeats;
    mixed = 2 * a.key_dim + repeats * a.value_dim;
    row_size = a.num_key_heads * (mixed + repeats * a.value_dim);
    first = a.starts[sequence];
    length = a.starts[sequence + 1] - first;
    first_chunk = 0;
    for (int64_t n = 0; n < sequence; ++n) first_chunk += num_chunks(a.starts[n + 1] - a.starts[n]);
    const int64_t key_size = kChunk * a.key_dim, value_size = kChunk * a.value_dim, square = kChunk * kChunk;
    const int64_t state_size = a.key_dim * a.value_dim;
    width = a.conv_width <= 4 ? 4 : kMaxConvWidth;
    const int64_t count = (2 * width + 1) * mixed + 2 * kChunk * mixed + (kChunk + kMaxConvWidth) * mixed + 3 * key_size +
                          5 * value_size + 8 * square + (repeats + 1) * state_size + 5 * key_size + 2 * kChunk + 512;
    Arena memory(static_cast<float*>(scratch(kTrainSlot, count * sizeof(float))));
    taps = memory.take(width * mixed);
    grad_taps = memory.take(width * mixed);
    zeros = memory.take(mixed);
    active = memory.take(kChunk * mixed);
    slopes = memory.take(kChunk * mixed);
    grad_before = memory.take((kChunk + kMaxConvWidth) * mixed);
    keys = {memory.take(key_size), memory.take(key_size), memory.take(square), memory.take(square)};
    inverse = memory.take(2 * kChunk);
    values = memory.take(value_size);
    outputs = memory.take(value_size);
    written = memory.take(value_size);
    grad_states = memory.take(repeats * state_size);
    chunk = {memory.take(key_size), memory.take(key_size),   memory.take(key_size), memory.take(value_size),
             memory.take(value_size), memory.take(state_size), memory.take(square),   memory.take(square)};
    grad = {memory.take(key_size), memory.take(key_size), memory.take(square), memory.take(square), nullptr, {}, {}};
    gather_taps();
  }

  static int64_t num_chunks(int64_t length) { return (length + kChunk - 1) / kChunk; }

  // Channel of the convolution of a column of the group: all q, then all k, then all v.
  int64_t channel(int64_t column) const {
    const int64_t all_keys = a.num_key_heads * sizes.key_dim;
    if (column < sizes.key_dim) return key_head * sizes.key_dim + column;
    if (column < 2 * sizes.key_dim) return all_keys + key_head * sizes.key_dim + column - sizes.key_dim;
    return 2 * all_keys + key_head * repeats * sizes.value_dim + column - 2 * sizes.key_dim;
  }

  // A shorter convolution has zeros before its taps.
  void gather_taps() {
    memset(taps, 0, width * mixed * sizeof(float));
    memset(grad_taps, 0, width * mixed * sizeof(float));
    memset(zeros, 0, mixed * sizeof(float));
    for (int64_t c = 0; c < mixed; ++c)
      for (int64_t j = 0; j < a.conv_width; ++j)
        taps[(width - a.conv_width + j) * mixed + c] = a.conv[channel(c) * a.conv_width + j];
  }

  bool has(int64_t token) const { return token >= 0 && token < length; }
  // Columns of the group in the row of a token of the sequence.
  int64_t place(int64_t token) const { return (first + token) * row_size + key_head * (mixed + repeats * sizes.value_dim); }
  const float* row(int64_t token) const { return a.qkvz + place(token); }
  const float* gate_row(int64_t token, int64_t r) const { return row(token) + mixed + r * sizes.value_dim; }
  int64_t head(int64_t r) const { return key_head * repeats + r; }
  int64_t head_place(int64_t token, int64_t r) const { return ((first + token) * num_heads + head(r)) * sizes.value_dim; }
  // b of the token; a lies `repeats` behind.
  int64_t ba_place(int64_t token, int64_t r) const { return (first + token) * 2 * num_heads + key_head * 2 * repeats + r; }
  float* kept_gates(int64_t token, int64_t r) const { return a.gates + ((first + token) * num_heads + head(r)) * 2; }
  float* state(int64_t chunk, int64_t r) const {
    return a.states + ((first_chunk + chunk) * num_heads + head(r)) * sizes.key_dim * sizes.value_dim;
  }

  const DeltaTraining& a;
  HeadSizes sizes;
  int64_t key_head, repeats, num_heads, mixed, row_size, first, length, first_chunk;
  int64_t width;  // of the convolution, as computed
  float *taps, *grad_taps, *zeros;        // [width, mixed] twice, [mixed]
  float *active, *slopes, *grad_before;  // [C, mixed] after silu, its derivative, the gradient before silu
  ChunkKeys keys;
  float* inverse;  // 1 / length of q, then of k, per token
  float *values, *outputs, *written, *grad_states;
  ChunkScratch chunk;
  ChunkGradients grad;
};

// Asks for what the same place of the next chunk will read: rows of a head lie too far apart for the processor to see.
QNEXT_INLINE void prefetch_row(const float* row, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) prefetch(row + i);
}

// Rows that a block of the convolution reads, oldest first: zeros outside of the sequence.
template <int kWidth>
struct InputRows {
  InputRows(const Group& g, int64_t token) {
    for (int i = 0; i < kBlockRows + kWidth - 1; ++i) {
      const int64_t from = token - kWidth + 1 + i;
      rows[i] = g.has(from) ? g.row(from) : g.zeros;
    }
  }
  const float* rows[kBlockRows + kWidth - 1];
};

// active = silu of the convolution, with its derivative in `slopes`; rows from `count` on are zero. The chunk after it
// is `ahead` tokens away.
template <int kWidth>
void convolve(const Group& g, int64_t token, int64_t count, int64_t ahead) {
  const int64_t mixed = g.mixed, row_size = mixed + g.repeats * g.sizes.value_dim;
  const float* taps = g.taps;
  for (int64_t t = 0; t < count; t += kBlockRows) {
    const InputRows<kWidth> inputs(g, token + t);
    for (int64_t next = token + t + ahead; next < token + t + ahead + kBlockRows; ++next)
      if (g.has(next)) prefetch_row(g.row(next), row_size);
    float *active = g.active + t * mixed, *slopes = g.slopes + t * mixed;
    for (int64_t c = 0; c < mixed; c += kRegisterLanes) {
      f32reg x[kBlockRows + kWidth - 1], totals[kBlockRows] = {};
      for (int i = 0; i < kBlockRows + kWidth - 1; ++i) x[i] = load_register(inputs.rows[i] + c);
      for (int j = 0; j < kWidth; ++j) {
        const f32reg tap = load_register(taps + j * mixed + c);
        for (int r = 0; r < kBlockRows; ++r) totals[r] = fma(tap, x[r + j], totals[r]);
      }
      for (int r = 0; r < kBlockRows; ++r) {
        const f32reg open = sigmoid(totals[r]), result = totals[r] * open;
        store(active + r * mixed + c, result);
        store(slopes + r * mixed + c, fma(result, splat_register(1.0f) - open, open));
      }
    }
  }
  memset(g.active + count * mixed, 0, (kChunk - count) * mixed * sizeof(float));
}

// q and k of length one, q scaled, with 1 / length in `inverse`: zero for rows of zeros, which get no gradient.
void normalize_keys(const Group& g) {
  const int64_t size = g.sizes.key_dim;
  const float scale = 1.0f / sqrtf(static_cast<float>(size));
  for (int64_t t = 0; t < kChunk; ++t)
    for (int which = 0; which < 2; ++which) {
      const float* from = g.active + t * g.mixed + which * size;
      float* to = (which ? g.keys.k : g.keys.q) + t * size;
      const float squares = dot_registers(from, from, size), inverse = 1.0f / sqrtf(squares + kL2Eps);
      const f32reg factor = splat_register(which ? inverse : inverse * scale);
      for (int64_t i = 0; i < size; i += kRegisterLanes) store(to + i, factor * load_register(from + i));
      g.inverse[which * kChunk + t] = squares > 0.0f ? inverse : 0.0f;
    }
}

// beta and g of the tokens of one head, kept for the gradient.
void make_gates(const Group& g, int64_t token, int64_t count, int64_t r) {
  const float rate = -expf(g.a.A_log[g.head(r)]), bias = g.a.dt_bias[g.head(r)];
  for (int64_t t = token; t < token + count; ++t) {
    const float* b = g.a.ba + g.ba_place(t, r);
    float* kept = g.kept_gates(t, r);
    kept[0] = sigmoid(b[0]);
    kept[1] = rate * softplus(b[g.repeats] + bias);
  }
}

// Neutral ones from `count` on.
void read_gates(const Group& g, int64_t token, int64_t count, int64_t r, ChunkGates& gates) {
  for (int64_t t = 0; t < kChunk; ++t) {
    gates.beta[t] = t < count ? g.kept_gates(token + t, r)[0] : 0.0f;
    gates.g[t] = t < count ? g.kept_gates(token + t, r)[1] : 0.0f;
  }
}

// Everything of a chunk that its heads share.
void prepare_chunk(const Group& g, int64_t token, int64_t count, int64_t ahead) {
  g.width == 4 ? convolve<4>(g, token, count, ahead) : convolve<kMaxConvWidth>(g, token, count, ahead);
  normalize_keys(g);
  multiply_keys(g.sizes, g.keys, g.chunk.scaled);
}

void read_values(const Group& g, int64_t r) {
  const float* from = g.active + 2 * g.sizes.key_dim + r * g.sizes.value_dim;
  for (int64_t t = 0; t < kChunk; ++t)
    memcpy(g.values + t * g.sizes.value_dim, from + t * g.mixed, g.sizes.value_dim * sizeof(float));
}

// out = weight * rms_norm(o) * silu(z)
void gated_norm(const Group& g, int64_t token, int64_t count, int64_t r, float* out) {
  const int64_t size = g.sizes.value_dim;
  for (int64_t t = 0; t < count; ++t) {
    const float *o = g.outputs + t * size, *z = g.gate_row(token + t, r);
    const float inverse = 1.0f / sqrtf(dot_registers(o, o, size) / static_cast<float>(size) + g.a.eps);
    float* to = out + g.head_place(token + t, r);
    for (int64_t i = 0; i < size; i += kRegisterLanes) {
      const f32reg normed = load_register(o + i) * splat_register(inverse);
      store(to + i, normed * load_register(g.a.norm + i) * silu(load_register(z + i)));
    }
  }
}

void copy_rows(const Group& g, int64_t token, int64_t count, int64_t r, const float* from, float* to) {
  for (int64_t t = 0; t < count; ++t)
    memcpy(to + g.head_place(token + t, r), from + t * g.sizes.value_dim, g.sizes.value_dim * sizeof(float));
}

void forward_group(const DeltaTraining& a, int64_t task, float* out) {
  const Group g(a, task / a.num_key_heads, task % a.num_key_heads);
  const int64_t num_chunks = Group::num_chunks(g.length);
  ChunkGates gates;
  ChunkProducts products;
  for (int64_t c = 0; c < num_chunks; ++c) {
    const int64_t token = c * kChunk, count = std::min(kChunk, g.length - token);
    prepare_chunk(g, token, count, kChunk);
    for (int64_t r = 0; r < g.repeats; ++r) {
      make_gates(g, token, count, r);
      read_gates(g, token, count, r, gates);
      decay_products(g.keys, gates, products);
      read_values(g, r);
      forward_chunk(g.sizes, g.keys, gates, products, c ? g.state(c, r) : nullptr, g.values, g.outputs,
                    c + 1 < num_chunks ? g.state(c + 1, r) : nullptr, g.chunk.scaled);
      copy_rows(g, token, count, r, g.values, a.writes);
      copy_rows(g, token, count, r, g.outputs, a.reads);
      gated_norm(g, token, count, r, out);
    }
  }
}

// ---- gradients ----

// Gradients of the parameters of one task, in the order of delta_partial_size(); conv as [W, mixed].
struct Partial {
  Partial(const Group& g, float* memory)
      : taps(memory), norm(taps + g.mixed * g.a.conv_width), A_log(norm + g.sizes.value_dim), dt_bias(A_log + g.repeats) {
    memset(memory, 0, delta_partial_size(g.a) * sizeof(float));
  }
  float *taps, *norm, *A_log, *dt_bias;
};

// The gradient of o into `outputs`, that of z to its columns, that of the weight added.
void gated_norm_gradient(const Group& g, int64_t token, int64_t count, int64_t r, const DeltaTrainingGradients& to,
                         float* grad_weight) {
  const int64_t size = g.sizes.value_dim;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t place = g.head_place(token + t, r);
    const float *o = g.a.reads + place, *z = g.gate_row(token + t, r), *grad = to.out + place;
    float *grad_o = g.outputs + t * size, *grad_z = to.qkvz + (z - g.a.qkvz);
    if (g.has(token + t - kChunk)) {
      const int64_t next = g.head_place(token + t - kChunk, r);
      for (const float* rows : {static_cast<const float*>(g.a.reads), static_cast<const float*>(g.a.writes), to.out})
        prefetch_row(rows + next, size);
    }
    const float inverse = 1.0f / sqrtf(dot_registers(o, o, size) / static_cast<float>(size) + g.a.eps);
    f32reg along{};
    for (int64_t i = 0; i < size; i += kRegisterLanes) {
      const f32reg normed = load_register(o + i) * splat_register(inverse), gate = load_register(z + i);
      const f32reg weight = load_register(g.a.norm + i), upper = load_register(grad + i), open = sigmoid(gate);
      const f32reg activated = gate * open, slope = fma(activated, splat_register(1.0f) - open, open);
      store(grad_z + i, upper * normed * weight * slope);
      const f32reg inner = upper * activated;
      store(grad_weight + i, fma(inner, normed, load_register(grad_weight + i)));
      const f32reg scaled = inner * weight;
      along = fma(scaled, normed, along);
      store(grad_o + i, scaled);
    }
    const f32reg mean = splat_register(-sum(along) * inverse / static_cast<float>(size));
    for (int64_t i = 0; i < size; i += kRegisterLanes)
      store(grad_o + i, splat_register(inverse) * fma(mean, load_register(o + i), load_register(grad_o + i)));
  }
  memset(g.outputs + count * size, 0, (kChunk - count) * size * sizeof(float));
}

void gates_gradient(const Group& g, int64_t token, int64_t count, int64_t r, const ChunkGates& gates,
                    const DeltaTrainingGradients& to, const Partial& partial) {
  const float rate = -expf(g.a.A_log[g.head(r)]), bias = g.a.dt_bias[g.head(r)];
  for (int64_t t = 0; t < count; ++t) {
    const int64_t place = g.ba_place(token + t, r);
    to.ba[place] = g.grad.beta[t] * gates.beta[t] * (1.0f - gates.beta[t]);
    const float grad_a = g.grad.g[t] * rate * sigmoid(g.a.ba[place + g.repeats] + bias);
    to.ba[place + g.repeats] = grad_a;
    partial.dt_bias[r] += grad_a;
    partial.A_log[r] += g.grad.g[t] * gates.g[t];
  }
}

// Gradients of q and k become those of silu's outputs, in `grad_before`.
void normalize_gradient(const Group& g) {
  const int64_t size = g.sizes.key_dim;
  const float scale = 1.0f / sqrtf(static_cast<float>(size)), length = sqrtf(static_cast<float>(size));
  for (int64_t t = 0; t < kChunk; ++t)
    for (int which = 0; which < 2; ++which) {
      const float* unit = (which ? g.keys.k : g.keys.q) + t * size;  // q is shorter by `scale`
      const float* grad = (which ? g.grad.k : g.grad.q) + t * size;
      float* to = g.grad_before + t * g.mixed + which * size;
      const float along = -dot_registers(unit, grad, size) * (which ? 1.0f : length);
      const float inverse = g.inverse[which * kChunk + t] * (which ? 1.0f : scale);
      for (int64_t i = 0; i < size; i += kRegisterLanes)
        store(to + i, splat_register(inverse) *
                          fma(splat_register(along * (which ? 1.0f : length)), load_register(unit + i), load_register(grad + i)));
    }
}

// Of silu's outputs, then of the convolution's inputs and taps. Behind the chunk `grad_before` holds the first rows of
// the next one; afterwards those of this one.
template <int kWidth>
void convolve_gradient(const Group& g, int64_t token, int64_t count, float* grad_qkvz) {
  const int64_t mixed = g.mixed;
  const float* taps = g.taps;
  float *grad_before = g.grad_before, *grad_taps = g.grad_taps;
  for (int64_t i = 0; i < count * mixed; i += kRegisterLanes)
    store(grad_before + i, load_register(g.slopes + i) * load_register(grad_before + i));
  for (int64_t t = 0; t < count; t += kBlockRows) {
    const InputRows<kWidth> inputs(g, token + t);
    float* to[kBlockRows];  // behind the end of the sequence: rows that nobody reads
    for (int r = 0; r < kBlockRows; ++r)
      to[r] = t + r < count ? grad_qkvz + g.place(token + t + r) : g.active + r * mixed;
    for (int64_t c = 0; c < mixed; c += kRegisterLanes) {
      f32reg grads[kBlockRows + kWidth - 1], x[kBlockRows + kWidth - 1], totals[kBlockRows] = {};
      for (int i = 0; i < kBlockRows + kWidth - 1; ++i) {
        grads[i] = load_register(grad_before + (t + i) * mixed + c);
        x[i] = load_register(inputs.rows[i] + c);
      }
      for (int j = 0; j < kWidth; ++j) {
        const f32reg tap = load_register(taps + j * mixed + c);
        f32reg along = load_register(grad_taps + j * mixed + c);
        for (int r = 0; r < kBlockRows; ++r) {
          totals[r] = fma(tap, grads[r + kWidth - 1 - j], totals[r]);
          along = fma(grads[r], x[r + j], along);
        }
        store(grad_taps + j * mixed + c, along);
      }
      for (int r = 0; r < kBlockRows; ++r) store(to[r] + c, totals[r]);
    }
  }
  memcpy(grad_before + kChunk * mixed, grad_before, (kWidth - 1) * mixed * sizeof(float));
}

// Gradients of one head: q and k added, v to its columns of `grad_before`.
void head_gradient(Group& g, int64_t c, int64_t count, int64_t r, const DeltaTrainingGradients& to, const Partial& partial) {
  const int64_t token = c * kChunk, value_dim = g.sizes.value_dim;
  ChunkGates gates;
  ChunkProducts products;
  read_gates(g, token, count, r, gates);
  decay_products(g.keys, gates, products);
  read_values(g, r);
  gated_norm_gradient(g, token, count, r, to, partial.norm);
  for (int64_t t = 0; t < count; ++t)
    memcpy(g.written + t * value_dim, g.a.writes + g.head_place(token + t, r), value_dim * sizeof(float));
  memset(g.written + count * value_dim, 0, (kChunk - count) * value_dim * sizeof(float));
  if (c > 1) prefetch_row(g.state(c - 1, r), g.sizes.key_dim * value_dim);
  const ChunkRecord record{c ? g.state(c, r) : nullptr, g.written, g.values, g.outputs};
  g.grad.v = g.chunk.right;
  backward_chunk(g.sizes, g.keys, gates, products, record, g.grad_states + r * g.sizes.key_dim * value_dim, g.chunk,
                 g.grad);
  for (int64_t t = 0; t < kChunk; ++t)
    memcpy(g.grad_before + t * g.mixed + 2 * g.sizes.key_dim + r * value_dim, g.grad.v + t * value_dim,
           value_dim * sizeof(float));
  gates_gradient(g, token, count, r, gates, to, partial);
}

void backward_group(const DeltaTraining& a, int64_t task, const DeltaTrainingGradients& to) {
  Group g(a, task / a.num_key_heads, task % a.num_key_heads);
  const Partial partial(g, to.partial + task * delta_partial_size(a));
  const int64_t key_bytes = kChunk * g.sizes.key_dim * sizeof(float), square_bytes = kChunk * kChunk * sizeof(float);
  memset(g.grad_states, 0, g.repeats * g.sizes.key_dim * g.sizes.value_dim * sizeof(float));
  memset(g.grad_before + kChunk * g.mixed, 0, kMaxConvWidth * g.mixed * sizeof(float));
  for (int64_t c = Group::num_chunks(g.length) - 1; c >= 0; --c) {
    const int64_t token = c * kChunk, count = std::min(kChunk, g.length - token);
    prepare_chunk(g, token, count, -kChunk);
    memset(g.grad.q, 0, key_bytes);
    memset(g.grad.k, 0, key_bytes);
    memset(g.grad.query_key, 0, square_bytes);
    memset(g.grad.key_key, 0, square_bytes);
    for (int64_t r = 0; r < g.repeats; ++r) head_gradient(g, c, count, r, to, partial);
    backward_keys(g.sizes, g.keys, g.grad);
    normalize_gradient(g);
    g.width == 4 ? convolve_gradient<4>(g, token, count, to.qkvz) : convolve_gradient<kMaxConvWidth>(g, token, count, to.qkvz);
  }
  memcpy(partial.taps, g.grad_taps + (g.width - a.conv_width) * g.mixed, a.conv_width * g.mixed * sizeof(float));
}

void delta_forward(const DeltaTraining& a, float* out) {
  parallel_for(a.num_sequences * a.num_key_heads, [&](int64_t task) { forward_group(a, task, out); });
}

void delta_backward(const DeltaTraining& a, const DeltaTrainingGradients& to) {
  parallel_for(a.num_sequences * a.num_key_heads, [&](int64_t task) { backward_group(a, task, to); });
}

}  // namespace

extern const DeltaTrainKernels delta_train_kernels;
const DeltaTrainKernels delta_train_kernels{kChunk, delta_forward, delta_backward};

}  // namespace qnext::QNEXT_ISA
