#include "delta.h"

#include "delta_state.h"
#include "pool.h"
#include "simd.h"

namespace qnext::QNEXT_ISA {

namespace {

constexpr int64_t kRowsAhead = 3;      // rows lie pages apart, where the CPU does not look ahead by itself
constexpr float kNormEps = 1e-6f;      // of the L2 norm of q and k
static_assert(kMaxDraftTokens <= kTokensAtOnce);

enum Slot : int { kMixedSlot = 16, kGatesSlot, kWeightSlot, kHistorySlot };
static_assert(kHistorySlot < kStateSlot);

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

// What a slot holds for one key head with its value heads. Channels of the convolution are counted within the group, as
// they lie in qkvz: q, k, v.
struct SlotGroup {
  const DeltaSlots& memory;
  int64_t slot, head;
  int64_t repeats, key_dim, value_width, channels;

  SlotGroup(const DeltaSlots& slots, int64_t slot, int64_t head)
      : memory(slots), slot(slot), head(head), repeats(slots.num_value_heads / slots.num_key_heads),
        key_dim(slots.key_dim), value_width(repeats * slots.value_dim), channels(2 * key_dim + value_width) {}

  // Calls body(channel in the group, channel of the layer, count) for q, k and v.
  template <typename Body>
  QNEXT_INLINE void for_each_part(Body&& body) const {
    const int64_t key_channels = memory.num_key_heads * key_dim;
    body(0, head * key_dim, key_dim);
    body(key_dim, key_channels + head * key_dim, key_dim);
    body(2 * key_dim, 2 * key_channels + head * value_width, value_width);
  }

  int64_t num_accepted() const { return memory.pending.num_drafts ? memory.pending.num_accepted[slot] : 0; }

  // Calls body(address of the state of one value head), which is of the type of its numbers.
  template <typename Body>
  QNEXT_INLINE void with_state(int64_t repeat, Body&& body) const {
    const int64_t first = (slot * memory.num_value_heads + head * repeats + repeat) * key_dim * memory.value_dim;
    if (memory.has_bf16_state)
      body(static_cast<bf16*>(memory.state) + first);
    else
      body(static_cast<float*>(memory.state) + first);
  }

  // Carried inputs of the convolution, oldest first, and behind them the pending ones.
  float* conv_row(int64_t row) const {
    const int64_t layer_channels = 2 * memory.num_key_heads * key_dim + memory.num_value_heads * memory.value_dim;
    const int64_t history = memory.conv_width - 1;
    if (row < history) return memory.conv + (slot * history + row) * layer_channels;
    return memory.pending.conv + (slot * memory.pending.num_drafts + row - history) * layer_channels;
  }

  float* pending_k(int64_t t) const {
    return memory.pending.k + ((slot * memory.pending.num_drafts + t) * memory.num_key_heads + head) * key_dim;
  }

  float* pending_decay(int64_t t) const {
    return memory.pending.decay + (slot * memory.pending.num_drafts + t) * memory.num_value_heads + head * repeats;
  }

  float* pending_u(int64_t repeat) const {
    const int64_t first = slot * memory.pending.num_drafts * memory.num_value_heads + head * repeats + repeat;
    return memory.pending.u + first * memory.value_dim;
  }

  // The first `count` pending tokens of one value head.
  Updates pending_updates(int64_t repeat, int64_t count) const {
    if (!memory.pending.num_drafts) return {};
    return {count, pending_k(0), pending_u(repeat), pending_decay(0) + repeat, memory.num_key_heads * key_dim,
            memory.num_value_heads * memory.value_dim, memory.num_value_heads};
  }

  // The accepted pending tokens become a part of the carried states.
  void apply_pending() const {
    const int64_t count = num_accepted();
    if (count == 0) return;
    for (int64_t row = 0; row < memory.conv_width - 1; ++row)
      for_each_part([&](int64_t, int64_t channel, int64_t size) {
        memcpy(conv_row(row) + channel, conv_row(row + count) + channel, size * 4);
      });
    for (int64_t r = 0; r < repeats; ++r)
      with_state(r, [&](auto* state) { update_head(pending_updates(r, count), state, key_dim, memory.value_dim); });
  }
};

// One sequence and one key head with its value heads.
struct Group : SlotGroup {
  const DeltaMixerArguments& a;
  int64_t sequence, row_size;
  const float* x;     // q, k, v, z of the sequence's first token
  const float* taps;  // [W, channels]
  float* history;     // [W - 1, channels] what lies to the left of the first token
  float* mixed;       // [kTokensAtOnce, channels] q, k, v after convolution and norm; v becomes the output
  Gates* gates;       // [kTokensAtOnce, R]

  Group(const DeltaMixerArguments& arguments, int64_t task)
      : SlotGroup(arguments, arguments.slots[task / arguments.num_key_heads], task % arguments.num_key_heads),
        a(arguments), sequence(task / a.num_key_heads), row_size(a.num_key_heads * (channels + value_width)) {
    x = a.qkvz + a.starts[sequence] * row_size + head * (channels + value_width);
    taps = transposed_taps();
    history = static_cast<float*>(scratch(kHistorySlot, (a.conv_width - 1) * channels * 4 + 64));
    mixed = static_cast<float*>(scratch(kMixedSlot, kTokensAtOnce * channels * 4));
    gates = static_cast<Gates*>(scratch(kGatesSlot, kTokensAtOnce * repeats * sizeof(Gates)));
  }

  bool is_fresh() const { return a.is_fresh && a.is_fresh[sequence]; }
  bool is_draft() const { return a.is_draft && a.is_draft[sequence]; }
  int64_t num_tokens() const { return a.starts[sequence + 1] - a.starts[sequence]; }

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

  void read_history(int64_t num_accepted) {
    for (int64_t row = 0; row < a.conv_width - 1; ++row)
      for_each_part([&](int64_t channel, int64_t layer_channel, int64_t count) {
        if (is_fresh())
          memset(history + row * channels + channel, 0, count * 4);
        else
          memcpy(history + row * channels + channel, conv_row(row + num_accepted) + layer_channel, count * 4);
      });
  }

  // Input of the convolution at token t of the sequence; before the first one it is history.
  const float* input(int64_t t) const { return t < 0 ? history + (a.conv_width - 1 + t) * channels : x + t * row_size; }

  // Inputs from token `first` of the sequence on to rows of the slot: carried ones, then pending ones.
  void write_inputs(int64_t first, int64_t row, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      for_each_part([&](int64_t channel, int64_t layer_channel, int64_t size) {
        memcpy(conv_row(row + i) + layer_channel, input(first + i) + channel, size * 4);
      });
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

  // What the tokens of a draft computed, but for u, which stands there already.
  void keep_draft() const {
    for (int64_t t = 0; t < num_tokens(); ++t) {
      memcpy(pending_k(t), mixed + t * channels + key_dim, key_dim * 4);
      for (int64_t r = 0; r < repeats; ++r) pending_decay(t)[r] = gates[t * repeats + r].decay;
    }
  }

  // Tokens of the block that begins with token `first` of the call. After a block the state is stored. In bf16 that
  // rounds it, so those blocks end where the position in the sequence says: on a grid in its prompt, then at every token.
  int64_t block_size(int64_t first) const {
    const int64_t left = num_tokens() - first;
    if (!memory.has_bf16_state || is_draft()) return smaller(kTokensAtOnce, left);
    const int64_t position = a.context_lengths ? a.context_lengths[sequence] - left : first;
    const int64_t to_grid = smaller(kTokensAtOnce - position % kTokensAtOnce, left);
    if (!a.prompt_lengths) return to_grid;
    return larger<int64_t>(1, smaller(to_grid, a.prompt_lengths[sequence] - position));
  }

  void run() {
    const int64_t total = num_tokens(), carried = a.conv_width - 1;
    int64_t accepted = is_fresh() ? 0 : num_accepted();
    read_history(accepted);
    if (is_fresh())
      with_state(0, [&](auto* state) { memset(state, 0, repeats * key_dim * a.value_dim * sizeof *state); });
    for (int64_t first = 0, count; first < total; first += count, accepted = 0) {
      count = block_size(first);
      prepare(first, count);
      for (int64_t r = 0; r < repeats; ++r)
        with_state(r, [&](auto* state) {
          walk_head({count, key_dim, mixed, mixed + key_dim, mixed + 2 * key_dim + r * a.value_dim, channels, gates + r,
                     repeats},
                    pending_updates(r, accepted), is_draft() ? pending_u(r) : nullptr, state, a.value_dim);
        });
      finish(first, count);
    }
    if (is_draft()) {
      keep_draft();
      write_inputs(-carried, 0, carried + total);
    } else {
      write_inputs(total - carried, 0, carried);
    }
  }
};

// Tasks of one slot share its number, so it changes when all are done.
void forget_pending(const DeltaSlots& memory, const int64_t* slots, int64_t count) {
  if (memory.pending.num_drafts)
    for (int64_t n = 0; n < count; ++n) memory.pending.num_accepted[slots[n]] = 0;
}

void mixer(const DeltaMixerArguments& arguments) {
  parallel_for(arguments.num_sequences * arguments.num_key_heads, [&](int64_t task) { Group(arguments, task).run(); });
  forget_pending(arguments, arguments.slots, arguments.num_sequences);
}

void apply_pending(const DeltaSlots& memory, const int64_t* slots, int64_t count) {
  parallel_for(count * memory.num_key_heads, [&](int64_t task) {
    SlotGroup(memory, slots[task / memory.num_key_heads], task % memory.num_key_heads).apply_pending();
  });
  forget_pending(memory, slots, count);
}

}  // namespace

extern const DeltaKernels delta_kernels;
const DeltaKernels delta_kernels{mixer, apply_pending};

}  // namespace qnext::QNEXT_ISA
