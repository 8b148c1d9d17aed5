#include "delta.h"

#include "pool.h"
#include "simd.h"

namespace qnext::QNEXT_ISA {

namespace {

constexpr int64_t kTokensAtOnce = 64;  // q, k, v of a block of tokens stay in a level-2 cache
constexpr int64_t kRowsAhead = 3;      // rows lie pages apart, where the CPU does not look ahead by itself
constexpr float kNormEps = 1e-6f;      // of the L2 norm of q and k

enum Slot : int { kMixedSlot = 16, kGatesSlot, kWeightSlot, kHistorySlot, kStateSlot };

// ---- the recurrence ----
//
// Per token and column of the state, with u = beta (v - g S^T k):
//     o = g S^T q + (k . q) u,    S <- g S + k u^T
// so one pass over S writes the update of a token and reads S^T k, S^T q for the next one: four operations per vector.
// Sums run over the rows of S in order, whatever number of columns is taken at a time.

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

// reads[c] = sum over rows of S[row, c] k[row], and the same for q. With `copy`, S is written there, rows side by side.
template <int kVectors>
QNEXT_INLINE void read_state(const float* state, int64_t stride, float* copy, int64_t rows, const float* k,
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
template <int kVectors>
QNEXT_INLINE void write_state(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
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
template <int kVectors>
__attribute__((noinline)) void walk_columns(const HeadTokens& tokens, float* state, int64_t value_dim, int64_t column, float* block) {
  f32reg key_reads[kVectors], query_reads[kVectors], u[kVectors];
  const int64_t rows = tokens.key_dim, last = tokens.count - 1, stride = tokens.stride;
  float* v = tokens.v + column;
  state += column;
  read_state<kVectors>(state, value_dim, last > 0 ? block : nullptr, rows, tokens.k, tokens.q, key_reads, query_reads);
  for (int64_t t = 0; t < last; ++t) {
    const Gates& gates = tokens.gates[t * tokens.gate_stride];
    const float* k = tokens.k + t * stride;
    finish_token<kVectors>(gates, key_reads, query_reads, v + t * stride, u);
    step_state<kVectors>(block, rows, gates.decay, k, u, k + stride, tokens.q + (t + 1) * stride, key_reads,
                         query_reads);
  }
  const Gates& gates = tokens.gates[last * tokens.gate_stride];
  finish_token<kVectors>(gates, key_reads, query_reads, v + last * stride, u);
  const float* from = last > 0 ? block : state;
  write_state<kVectors>(from, last > 0 ? kVectors * kRegisterLanes : value_dim, state, value_dim, rows, gates.decay,
                        tokens.k + last * stride, u);
}

// 64 columns of 128 rows are 32 KiB. With sixteen registers, half as many columns as they hold lanes.
constexpr int64_t kMostVectors = kRegisterLanes == 16 ? 4 : 2;

void walk_head(const HeadTokens& tokens, float* state, int64_t value_dim) {
  auto* block = static_cast<float*>(scratch(kStateSlot, tokens.key_dim * kMostVectors * kRegisterLanes * 4));
  int64_t column = 0;
  const auto remains = [&](int64_t vectors) { return column + vectors * kRegisterLanes <= value_dim; };
  if constexpr (kMostVectors >= 4) {
    if (tokens.count == 1)  // whole rows: the state is read once, from first to last
      for (; remains(8); column += 8 * kRegisterLanes) walk_columns<8>(tokens, state, value_dim, column, block);
    for (; remains(4); column += 4 * kRegisterLanes) walk_columns<4>(tokens, state, value_dim, column, block);
  }
  for (; remains(2); column += 2 * kRegisterLanes) walk_columns<2>(tokens, state, value_dim, column, block);
  for (; remains(1); column += kRegisterLanes) walk_columns<1>(tokens, state, value_dim, column, block);
}

// ---- around the recurrence ----

float dot(const float* a, const float* b, int64_t size) {
  f32x16 acc = splat(0.0f);
  for (int64_t i = 0; i < size; i += kLanes) acc = fma(load(a + i), load(b + i), acc);
  return sum(acc);
}

void scale_row(float* x, int64_t size, float factor) {
  for (int64_t i = 0; i < size; i += kLanes) store(x + i, load(x + i) * splat(factor));
}

// [count, width] -> [width, count] with rows of `stride` floats.
QNEXT_INLINE void transpose(const float* from, int64_t count, int64_t width, float* __restrict to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < width; ++j) to[j * stride + i] = from[i * width + j];
}

// One sequence and one key head with its value heads. Channels of the convolution are counted within the group, as they
// lie in qkvz: q, k, v.
struct Group {
  const DeltaMixerArguments& a;
  int64_t sequence, head;
  int64_t repeats, key_dim, value_width, channels, row_size;
  const float* x;     // q, k, v, z of the sequence's first token
  const float* taps;  // [W, channels]
  float* history;     // [W - 1, channels] what lies to the left of the first token
  float* mixed;       // [kTokensAtOnce, channels] q, k, v after convolution and norm; v becomes the output
  Gates* gates;       // [kTokensAtOnce, R]

  Group(const DeltaMixerArguments& arguments, int64_t task)
      : a(arguments), sequence(task / a.num_key_heads), head(task % a.num_key_heads),
        repeats(a.num_value_heads / a.num_key_heads), key_dim(a.key_dim), value_width(repeats * a.value_dim),
        channels(2 * key_dim + value_width), row_size(a.num_key_heads * (channels + value_width)) {
    x = a.qkvz + a.starts[sequence] * row_size + head * (channels + value_width);
    taps = transposed_taps();
    history = static_cast<float*>(scratch(kHistorySlot, (a.conv_width - 1) * channels * 4 + 64));
    mixed = static_cast<float*>(scratch(kMixedSlot, kTokensAtOnce * channels * 4));
    gates = static_cast<Gates*>(scratch(kGatesSlot, kTokensAtOnce * repeats * sizeof(Gates)));
  }

  bool is_fresh() const { return a.is_fresh && a.is_fresh[sequence]; }
  int64_t num_tokens() const { return a.starts[sequence + 1] - a.starts[sequence]; }
  float* state() const {
    return a.state + (a.slots[sequence] * a.num_value_heads + head * repeats) * key_dim * a.value_dim;
  }

  // Calls body(channel in the group, channel of the layer, count) for q, k and v.
  template <typename Body>
  QNEXT_INLINE void for_each_part(Body&& body) const {
    const int64_t key_channels = a.num_key_heads * key_dim;
    body(0, head * key_dim, key_dim);
    body(key_dim, key_channels + head * key_dim, key_dim);
    body(2 * key_dim, 2 * key_channels + head * value_width, value_width);
  }

  const float* transposed_taps() const {
    auto* to = static_cast<float*>(scratch(kWeightSlot, a.conv_width * channels * 4));
    for_each_part([&](int64_t channel, int64_t layer_channel, int64_t count) {
      const float* from = a.conv_weight + layer_channel * a.conv_width;
      if (a.conv_width == 4)  // a width that the compiler knows makes vectors of it
        transpose(from, count, 4, to + channel, channels);
      else
        transpose(from, count, a.conv_width, to + channel, channels);
    });
    return to;
  }

  float* conv_row(int64_t row) const {
    const int64_t layer_channels = 2 * a.num_key_heads * key_dim + a.num_value_heads * a.value_dim;
    return a.conv + (a.slots[sequence] * (a.conv_width - 1) + row) * layer_channels;
  }

  void read_history() {
    for (int64_t row = 0; row < a.conv_width - 1; ++row)
      for_each_part([&](int64_t channel, int64_t layer_channel, int64_t count) {
        if (is_fresh())
          memset(history + row * channels + channel, 0, count * 4);
        else
          memcpy(history + row * channels + channel, conv_row(row) + layer_channel, count * 4);
      });
  }

  // Input of the convolution at token t of the sequence; before the first one it is history.
  const float* input(int64_t t) const { return t < 0 ? history + (a.conv_width - 1 + t) * channels : x + t * row_size; }

  void write_history() const {
    for (int64_t row = 0; row < a.conv_width - 1; ++row) {
      const float* from = input(num_tokens() - (a.conv_width - 1) + row);
      for_each_part([&](int64_t channel, int64_t layer_channel, int64_t count) {
        memcpy(conv_row(row) + layer_channel, from + channel, count * 4);
      });
    }
  }

  void convolve(int64_t t, float* to) const {
    const float* inputs[kMaxConvWidth];
    const int64_t width = a.conv_width;
    for (int64_t j = 0; j < width; ++j) inputs[j] = input(t - width + 1 + j);
    const float* ahead = x + smaller(t + kRowsAhead, num_tokens() - 1) * row_size;
    for (int64_t i = 0; i < channels; i += kLanes) {
      prefetch(ahead + i);
      f32x16 y = load(inputs[0] + i) * load(taps + i);
      for (int64_t j = 1; j < width; ++j) y = fma(load(inputs[j] + i), load(taps + j * channels + i), y);
      store(to + i, silu(y));
    }
  }

  // q, k, v and gates of tokens [first, first + count).
  void prepare(int64_t first, int64_t count) const {
    const float query_scale = 1.0f / sqrtf(static_cast<float>(key_dim));
    const float* ba = a.ba + ((a.starts[sequence] + first) * a.num_key_heads + head) * 2 * repeats;
    for (int64_t t = 0; t < count; ++t, ba += 2 * a.num_value_heads) {
      float *q = mixed + t * channels, *k = q + key_dim;
      convolve(first + t, q);
      scale_row(q, key_dim, query_scale / sqrtf(dot(q, q, key_dim) + kNormEps));
      scale_row(k, key_dim, 1.0f / sqrtf(dot(k, k, key_dim) + kNormEps));
      const float key_query = dot(k, q, key_dim);
      for (int64_t r = 0; r < repeats; ++r) {
        const int64_t h = head * repeats + r;
        const float g = -expf(a.A_log[h]) * softplus(ba[repeats + r] + a.dt_bias[h]);
        gates[t * repeats + r] = {expf(g), sigmoid(ba[r]), key_query};
      }
    }
  }

  // The gated norm of the heads' outputs.
  void finish(int64_t first, int64_t count) const {
    const int64_t size = a.value_dim;
    for (int64_t t = 0; t < count; ++t) {
      const float *o = mixed + t * channels + 2 * key_dim, *z = x + (first + t) * row_size + channels;
      float* to = a.out + ((a.starts[sequence] + first + t) * a.num_key_heads + head) * value_width;
      const float* ahead = x + smaller(first + t + kRowsAhead, num_tokens() - 1) * row_size + channels;
      for (int64_t i = 0; i < value_width; i += kLanes) prefetch(ahead + i);
      for (int64_t r = 0; r < repeats; ++r, o += size, z += size, to += size) {
        const f32x16 inverse = splat(1.0f / sqrtf(dot(o, o, size) / static_cast<float>(size) + a.eps));
        for (int64_t i = 0; i < size; i += kLanes)
          store(to + i, load(o + i) * inverse * load(a.norm_weight + i) * silu(load(z + i)));
      }
    }
  }

  void run() {
    read_history();
    if (is_fresh()) memset(state(), 0, repeats * key_dim * a.value_dim * 4);
    const int64_t total = num_tokens();
    for (int64_t first = 0; first < total; first += kTokensAtOnce) {
      const int64_t count = smaller(kTokensAtOnce, total - first);
      prepare(first, count);
      for (int64_t r = 0; r < repeats; ++r)
        walk_head({count, key_dim, mixed, mixed + key_dim, mixed + 2 * key_dim + r * a.value_dim, channels, gates + r,
                   repeats},
                  state() + r * key_dim * a.value_dim, a.value_dim);
      finish(first, count);
    }
    write_history();
  }
};

void mixer(const DeltaMixerArguments& arguments) {
  parallel_for(arguments.num_sequences * arguments.num_key_heads, [&](int64_t task) { Group(arguments, task).run(); });
}

}  // namespace

extern const DeltaKernels delta_kernels;
const DeltaKernels delta_kernels{mixer};

}  // namespace qnext::QNEXT_ISA
