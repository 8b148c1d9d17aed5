// The token mixer of Gated DeltaNet with its gradient: one task per sequence and key head walks its chunks, forward and
// in reverse, with everything of a chunk in the caches. What is cheap to compute again is not kept.
#include <algorithm>

#include "delta.h"
#include "pool.h"
#include "train.h"
#include "train_chunk.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int kMemorySlot = 21;
constexpr float kL2Eps = 1e-6f;

// Memory of one task, handed out piece by piece.
class Arena {
 public:
  explicit Arena(float* memory) : next_(memory) {}
  float* take(int64_t count) {
    float* piece = next_;
    next_ += (count + kLanes - 1) / kLanes * kLanes;
    return piece;
  }

 private:
  float* next_;
};

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
    const int64_t count = a.conv_width * mixed + 2 * kChunk * mixed + (kChunk + kMaxConvWidth) * mixed + 3 * key_size +
                          5 * value_size + 8 * square + (repeats + 1) * state_size + 5 * key_size + 2 * kChunk + 512;
    Arena memory(static_cast<float*>(scratch(kMemorySlot, count * sizeof(float))));
    taps = memory.take(a.conv_width * mixed);
    before = memory.take(kChunk * mixed);
    active = memory.take(kChunk * mixed);
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

  void gather_taps() {
    for (int64_t c = 0; c < mixed; ++c)
      for (int64_t j = 0; j < a.conv_width; ++j) taps[j * mixed + c] = a.conv[channel(c) * a.conv_width + j];
  }

  // Columns of the group in the row of a token of the sequence.
  int64_t place(int64_t token) const { return (first + token) * row_size + key_head * (mixed + repeats * sizes.value_dim); }
  const float* row(int64_t token) const { return a.qkvz + place(token); }
  const float* gate_row(int64_t token, int64_t r) const { return row(token) + mixed + r * sizes.value_dim; }
  int64_t head(int64_t r) const { return key_head * repeats + r; }
  int64_t head_place(int64_t token, int64_t r) const { return ((first + token) * num_heads + head(r)) * sizes.value_dim; }
  // b of the token; a lies `repeats` behind.
  int64_t ba_place(int64_t token, int64_t r) const { return (first + token) * 2 * num_heads + key_head * 2 * repeats + r; }
  float* state(int64_t chunk, int64_t r) const {
    return a.states + ((first_chunk + chunk) * num_heads + head(r)) * sizes.key_dim * sizes.value_dim;
  }

  const DeltaTraining& a;
  HeadSizes sizes;
  int64_t key_head, repeats, num_heads, mixed, row_size, first, length, first_chunk;
  float *taps, *before, *active, *grad_before;  // [W, mixed]; [C, mixed] before silu and after; gradient before silu
  ChunkKeys keys;
  float* inverse;  // 1 / length of q, then of k, per token
  float *values, *outputs, *written, *grad_states;
  ChunkScratch chunk;
  ChunkGradients grad;
};

// before = the convolution, active = silu of it; rows from `count` on are zero.
void convolve(const Group& g, int64_t token, int64_t count) {
  const int64_t width = g.a.conv_width;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t missing = std::max<int64_t>(0, width - 1 - (token + t));
    const float* inputs[kMaxConvWidth];
    for (int64_t j = missing; j < width; ++j) inputs[j] = g.row(token + t - width + 1 + j);
    for (int64_t c = 0; c < g.mixed; c += kRegisterLanes) {
      f32reg total{};
      for (int64_t j = missing; j < width; ++j)
        total = fma(load_register(g.taps + j * g.mixed + c), load_register(inputs[j] + c), total);
      store(g.before + t * g.mixed + c, total);
      store(g.active + t * g.mixed + c, silu(total));
    }
  }
  memset(g.active + count * g.mixed, 0, (kChunk - count) * g.mixed * sizeof(float));
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

// beta and g of one head; neutral from `count` on.
void read_gates(const Group& g, int64_t token, int64_t count, int64_t r, ChunkGates& gates) {
  const float rate = -expf(g.a.A_log[g.head(r)]), bias = g.a.dt_bias[g.head(r)];
  for (int64_t t = 0; t < kChunk; ++t) {
    const float* b = g.a.ba + (t < count ? g.ba_place(token + t, r) : 0);
    gates.beta[t] = t < count ? sigmoid(b[0]) : 0.0f;
    gates.g[t] = t < count ? rate * softplus(b[g.repeats] + bias) : 0.0f;
  }
}

// Everything of a chunk that its heads share.
void prepare_chunk(const Group& g, int64_t token, int64_t count) {
  convolve(g, token, count);
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
    prepare_chunk(g, token, count);
    for (int64_t r = 0; r < g.repeats; ++r) {
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
void convolve_gradient(const Group& g, int64_t token, int64_t count, float* grad_qkvz, float* grad_taps) {
  const int64_t width = g.a.conv_width, mixed = g.mixed;
  for (int64_t i = 0; i < count * mixed; i += kRegisterLanes) {
    const f32reg open = sigmoid(load_register(g.before + i));
    const f32reg slope = fma(load_register(g.before + i) * open, splat_register(1.0f) - open, open);
    store(g.grad_before + i, slope * load_register(g.grad_before + i));
  }
  for (int64_t t = 0; t < count; ++t) {
    float* to = grad_qkvz + g.place(token + t);
    const int64_t missing = std::max<int64_t>(0, width - 1 - (token + t));
    for (int64_t c = 0; c < mixed; c += kRegisterLanes) {
      f32reg total{};
      for (int64_t j = 0; j < width; ++j)
        total = fma(load_register(g.taps + j * mixed + c),
                    load_register(g.grad_before + (t + width - 1 - j) * mixed + c), total);
      store(to + c, total);
      const f32reg grad = load_register(g.grad_before + t * mixed + c);
      for (int64_t j = missing; j < width; ++j) {
        const f32reg input = load_register(g.row(token + t - width + 1 + j) + c);
        store(grad_taps + j * mixed + c, fma(grad, input, load_register(grad_taps + j * mixed + c)));
      }
    }
  }
  memcpy(g.grad_before + kChunk * mixed, g.grad_before, (width - 1) * mixed * sizeof(float));
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
    prepare_chunk(g, token, count);
    memset(g.grad.q, 0, key_bytes);
    memset(g.grad.k, 0, key_bytes);
    memset(g.grad.query_key, 0, square_bytes);
    memset(g.grad.key_key, 0, square_bytes);
    for (int64_t r = 0; r < g.repeats; ++r) head_gradient(g, c, count, r, to, partial);
    backward_keys(g.sizes, g.keys, g.grad);
    normalize_gradient(g);
    convolve_gradient(g, token, count, to.qkvz, partial.taps);
  }
}

void delta_forward(const DeltaTraining& a, float* out) {
  parallel_for(a.num_sequences * a.num_key_heads, [&](int64_t task) { forward_group(a, task, out); });
}

void delta_backward(const DeltaTraining& a, const DeltaTrainingGradients& to) {
  parallel_for(a.num_sequences * a.num_key_heads, [&](int64_t task) { backward_group(a, task, to); });
}

}  // namespace

extern const TrainKernels train_kernels;
const TrainKernels train_kernels{kChunk, delta_forward, delta_backward};

}  // namespace qnext::QNEXT_ISA
