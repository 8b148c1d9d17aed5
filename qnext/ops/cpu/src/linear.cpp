#include "linear.h"

#include "gemm.h"
#include "gemm_tiles.h"
#include "pool.h"

namespace qnext::QNEXT_ISA {

// ---- rows ----

namespace {

enum Slot : int { kRowsSlot, kSharedRowsSlot, kProductsSlot, kHiddenSlot, kPreparedSlot, kListSlot, kDownSlot, kGuessSlot };

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Rounds one group to int8: scale = largest magnitude / 127. A NaN or infinity makes the scale NaN.
QNEXT_INLINE void quantize_group(const float* x, int64_t size, int32_t zero, int8_t* codes, float* scale,
                                 int32_t* correction) {
  f32reg largest{}, poison{};
  for (int64_t i = 0; i < size; i += kRegisterLanes) {
    f32reg v = load_register(x + i);
    largest = vmax(largest, vabs(v));
    poison = fma(v, f32reg{}, poison);
  }
  const float magnitude = max_lane(largest);
  const float inverse = magnitude > 0.0f ? 127.0f / magnitude : 0.0f;
  i32reg total{};
  for (int64_t i = 0; i < size; i += kRegisterLanes) {
    i32reg q = round_to_int(load_register(x + i) * splat_register(inverse));
    total += q;
    store(codes + i, q);
  }
  int32_t sum_of_codes = 0;
  for (int i = 0; i < kRegisterLanes; ++i) sum_of_codes += total[i];
  *scale = magnitude / 127.0f + sum(poison);
  *correction = -zero * sum_of_codes;
}

int32_t zero_code(const Weight& weight) {
  if (weight.has_zeros()) return 1;  // the kernel multiplies with the zeros themselves
  return weight.kind == WeightKind::codes4 ? 8 : 128;
}

bool wants_bf16(const Weight& weight) { return kHasBf16 && weight.kind == WeightKind::bf16; }

bool wants_f32(const Weight& weight) { return weight.is_float() && !wants_bf16(weight); }

}  // namespace

int64_t prepared_bytes(const Weight& weight, int64_t num_rows) {
  const int64_t size = num_rows * weight.num_inputs;
  if (wants_bf16(weight)) return round_up(size * 2);
  if (weight.is_float()) return 0;
  return round_up(size) + 2 * round_up(num_rows * weight.num_groups() * 4);
}

Rows prepared_rows_at(const Weight& weight, int64_t num_rows, void* buffer, const float* x) {
  Rows rows;
  rows.num_inputs = weight.num_inputs;
  rows.f32 = x;
  if (wants_bf16(weight)) {
    rows.bf16 = buffer;
  } else if (!weight.is_float()) {
    rows.num_groups = weight.num_groups();
    auto* at = static_cast<uint8_t*>(buffer);
    rows.codes = reinterpret_cast<int8_t*>(at);
    at += round_up(num_rows * weight.num_inputs);
    rows.scales = reinterpret_cast<float*>(at);
    at += round_up(num_rows * rows.num_groups * 4);
    rows.corrections = reinterpret_cast<int32_t*>(at);
  }
  return rows;
}

void prepare_row(const Weight& weight, const float* x, int64_t row, const Rows& rows) {
  const int64_t size = weight.num_inputs;
  if (wants_bf16(weight)) {
    bf16* to = const_cast<bf16*>(static_cast<const bf16*>(rows.bf16)) + row * size;
    for (int64_t i = 0; i < size; i += kLanes) store(to + i, load(x + i));
  } else if (!weight.is_float()) {
    const int32_t zero = zero_code(weight);
    auto* codes = const_cast<int8_t*>(rows.codes) + row * size;
    auto* scales = const_cast<float*>(rows.scales) + row * rows.num_groups;
    auto* corrections = const_cast<int32_t*>(rows.corrections) + row * rows.num_groups;
    for (int64_t g = 0; g < rows.num_groups; ++g) {
      const int64_t at = g * weight.group_size;
      quantize_group(x + at, weight.group_size, zero, codes + at, scales + g, corrections + g);
    }
  }
}

Rows prepare_rows(const Weight& weight, const float* x, int64_t num_rows, int slot) {
  void* buffer = scratch(slot, larger<int64_t>(64, prepared_bytes(weight, num_rows)));
  const Rows rows = prepared_rows_at(weight, num_rows, buffer, x);
  if (wants_f32(weight)) return rows;
  constexpr int64_t kRowsPerTask = 8;
  parallel_for((num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const int64_t end = smaller(num_rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row)
      prepare_row(weight, x + row * weight.num_inputs, row, rows);
  });
  return rows;
}

bool share_rows(const Weight& a, const Weight& b) {
  if (a.num_inputs != b.num_inputs) return false;
  if (a.is_float() || b.is_float()) return a.is_float() && b.is_float() && wants_bf16(a) == wants_bf16(b);
  return a.group_size == b.group_size && zero_code(a) == zero_code(b);
}

void multiply(const Weight& weight, int64_t expert, int64_t begin, int64_t end, const Rows& rows, const int32_t* index,
              int64_t num_rows, float* out, int64_t out_stride) {
  if (weight.is_float())
    multiply_floats(weight, expert, begin, end, rows, index, num_rows, out, out_stride);
  else
    multiply_codes(weight, expert, begin, end, rows, index, num_rows, out, out_stride);
}

namespace {

// Outputs per task: enough tasks to share evenly, blocks large enough to stream, at most what fits in a level-2 cache.
int64_t columns_per_task(const Weight& weight, int64_t num_rows) {
  const int64_t many = tiles_serve(weight, num_rows) ? kTileColumns : 64;
  const int64_t most = num_rows <= 2 ? 128 : num_rows <= kFewRows ? 256 : many;
  const int64_t even = weight.num_outputs / (num_threads() * 6) / 32 * 32;
  return larger<int64_t>(32, smaller(most, even));
}

void linear(const Weight& weight, const float* x, int64_t num_rows, float* out, int64_t out_stride) {
  const Rows rows = prepare_rows(weight, x, num_rows, kRowsSlot);
  const int64_t step = columns_per_task(weight, num_rows);
  parallel_for((weight.num_outputs + step - 1) / step, [&](int64_t task) {
    multiply(weight, 0, task * step, smaller(weight.num_outputs, (task + 1) * step), rows, nullptr, num_rows, out,
             out_stride);
  });
}

// ---- experts ----

constexpr int64_t kRowsOfExpert = 32;  // on average in a pass: enough to read each weight seldom
constexpr int64_t kRowsOfWave = 2048;   // of experts that come from disk: what lies between their products stays in a cache
constexpr int64_t kTokensOfGuess = 4, kGuesses = 6;  // tokens of a decoding step, and experts that are guessed of each
constexpr int64_t kExpertColumns = 128;
constexpr int64_t kStreamBytes = 192 << 10;  // of a task that is bound by memory: long enough to hide its start

// Outputs of one task of a product.
int64_t expert_columns(const Weight& weight, int64_t num_rows) {
  if (num_rows > kFewRows) return tiles_serve(weight, num_rows) ? kTileColumns : kExpertColumns;
  const int64_t bits = weight.kind == WeightKind::codes4 ? 4 : weight.kind == WeightKind::codes8 ? 8 : 16;
  return larger<int64_t>(2 * kLanes, kStreamBytes * 8 / (bits * weight.num_inputs) / (2 * kLanes) * (2 * kLanes));
}

// One product of an operation that consists of several: a matrix with the rows that go through it.
struct Product {
  const Weight* weight;
  int64_t expert;
  const Rows* rows;
  const int32_t* index;
  int64_t num_rows;
  float* out;
  int64_t out_stride;
  int64_t first_task;
  int64_t columns;  // per task
};

// All tasks of all products in one parallel loop.
void run_products(Product* products, int64_t count) {
  int64_t num_tasks = 0;
  for (int64_t i = 0; i < count; ++i) {
    products[i].first_task = num_tasks;
    products[i].columns = expert_columns(*products[i].weight, products[i].num_rows);
    num_tasks += (products[i].weight->num_outputs + products[i].columns - 1) / products[i].columns;
  }
  parallel_for(num_tasks, [&](int64_t task) {
    int64_t low = 0, high = count;  // the last product that starts at or before the task
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (products[middle].first_task <= task ? low : high) = middle;
    }
    const Product& p = products[low];
    const int64_t begin = (task - p.first_task) * p.columns;
    multiply(*p.weight, p.expert, begin, smaller(p.weight->num_outputs, begin + p.columns), *p.rows, p.index,
             p.num_rows, p.out, p.out_stride);
  });
}

void swiglu_row(const float* gate, const float* up, int64_t size, float* out) {
  for (int64_t i = 0; i < size; i += kRegisterLanes)
    store(out + i, silu(load_register(gate + i)) * load_register(up + i));
}

// Some of the experts, computed together: with all their rows, which lie one expert behind the other in its buffers.
struct Wave {
  const int32_t* experts;
  int64_t num_experts;
  int64_t num_rows;
  bool has_shared;
};

// Each token's experts are added in the order of its routing, then the shared one.
template <typename Index>
void combine_rows(const CombineArguments& a, const Index* places) {
  parallel_for(a.num_tokens, [&](int64_t t) {
    float shared_weight = 1.0f;
    if (a.gate_vector) shared_weight = sigmoid(dot_registers(a.x + t * a.hidden, a.gate_vector, a.hidden));
    for (int64_t d = 0; d < a.hidden; d += kRegisterLanes) {
      f32reg acc{};
      for (int64_t j = t * a.top_k; j < (t + 1) * a.top_k; ++j)
        acc = fma(splat_register(a.weights[j]), load_register(a.rows + places[j] * a.hidden + d), acc);
      if (a.shared) acc = fma(splat_register(shared_weight), load_register(a.shared + t * a.hidden + d), acc);
      store(a.out + t * a.hidden + d, acc);
    }
  });
}

// The buffers of one call, all in the caller's scratch.
struct Experts {
  const ExpertsArguments& a;
  int64_t num_tokens, num_rows, width, shared_width, hidden;
  int32_t* starts;    // [E + 1] first sorted row of each expert
  int32_t* tokens;    // [A] token of each sorted row
  int32_t* places;    // [T, top_k] sorted row of each assignment
  int32_t* identity;  // [A] 0, 1, 2, ...
  int32_t* used;      // [E] experts that have rows, ascending, and how many rows
  int32_t* uses;
  int64_t num_used = 0;
  Product* products;
  Rows x_rows, shared_x_rows;
  float *down, *shared_down;

  Experts(const ExpertsArguments& arguments, int64_t count)
      : a(arguments), num_tokens(count), num_rows(count * arguments.top_k), width(arguments.down->num_inputs),
        shared_width(arguments.shared ? arguments.shared->down->num_inputs : 0), hidden(arguments.down->num_outputs) {
    const int64_t num_experts = a.gate_up->num_experts;
    const int64_t ints = round_up((3 * num_experts + 1 + 3 * num_rows) * 4);
    auto* list = static_cast<uint8_t*>(scratch(kListSlot, ints + (num_experts + 4) * sizeof(Product)));
    starts = reinterpret_cast<int32_t*>(list);
    used = starts + num_experts + 1;
    uses = used + num_experts;
    tokens = uses + num_experts;
    places = tokens + num_rows;
    identity = places + num_rows;
    products = reinterpret_cast<Product*>(list + ints);
  }

  int64_t rows_of(int32_t expert) const { return starts[expert + 1] - starts[expert]; }

  void sort(const int64_t* routed) {
    const int64_t num_experts = a.gate_up->num_experts;
    memset(starts, 0, (num_experts + 1) * sizeof(int32_t));
    for (int64_t i = 0; i < num_rows; ++i) ++starts[routed[i] + 1];
    for (int64_t e = 0; e < num_experts; ++e) starts[e + 1] += starts[e];
    for (int64_t i = 0; i < num_rows; ++i) {  // starts[e] moves to the end of e, then back
      const int32_t place = starts[routed[i]]++;
      places[i] = place;
      tokens[place] = static_cast<int32_t>(i / a.top_k);
      identity[i] = static_cast<int32_t>(i);
    }
    for (int64_t e = num_experts; e > 0; --e) starts[e] = starts[e - 1];
    starts[0] = 0;
    for (int32_t e = 0; e < num_experts; ++e)
      if (rows_of(e) > 0) {
        used[num_used] = e;
        uses[num_used++] = static_cast<int32_t>(rows_of(e));
      }
  }

  void prepare(const float* x) {
    x_rows = prepare_rows(*a.gate_up, x, num_tokens, kRowsSlot);
    if (a.shared) {
      const Weight& gate = *a.shared->gate;
      shared_x_rows = share_rows(*a.gate_up, gate) ? x_rows : prepare_rows(gate, x, num_tokens, kSharedRowsSlot);
    }
  }

  int64_t shared_rows_of(const Wave& wave) const { return wave.has_shared ? num_tokens : 0; }

  // Bytes between the products of a wave, and of what comes out of all experts.
  int64_t inner_bytes(const Wave& wave) const { return 8 * (wave.num_rows * width + shared_rows_of(wave) * shared_width); }
  int64_t outer_bytes() const { return 4 * (num_rows + (a.shared ? num_tokens : 0)) * hidden; }

  void put_down_at(void* buffer) {
    down = static_cast<float*>(buffer);
    shared_down = down + num_rows * hidden;
  }

  // All experts at once; what comes out lies where gate_up was, which is no longer needed then.
  void run_all(const float* x) {
    prepare(x);
    const Wave wave{used, num_used, num_rows, a.shared != nullptr};
    void* buffer = scratch(kProductsSlot, larger(inner_bytes(wave), outer_bytes()));
    put_down_at(buffer);
    run(wave, static_cast<float*>(buffer));
  }

  // Those in memory first, and the others as they come.
  void run_from(ExpertSource& source, const float* x) {
    put_down_at(scratch(kDownSlot, outer_bytes()));
    const int64_t num_resident = source.begin(used, uses, num_used, num_tokens);
    if (num_tokens <= kTokensOfGuess) guess(source, x);
    prepare(x);
    for (int64_t first = 0, count; first < num_resident || first == 0; first += count) {
      const Wave wave = wave_of(first, num_resident - first, first == 0 && a.shared);
      count = larger<int64_t>(1, wave.num_experts);
      run(wave, static_cast<float*>(scratch(kProductsSlot, larger<int64_t>(64, inner_bytes(wave)))));
    }
    for (int64_t first = num_resident, count; (count = source.arrived(num_used - first)) > 0;) {
      const Wave wave = wave_of(first, count, false);
      run(wave, static_cast<float*>(scratch(kProductsSlot, inner_bytes(wave))));
      source.finish(wave.num_experts);
      first += wave.num_experts;
    }
  }

  // Asks the next layer's router about this layer's input, and has the likeliest experts of each token read.
  void guess(ExpertSource& source, const float* x) {
    const Weight* router = source.next_router();
    if (router == nullptr) return;
    const int64_t num_experts = router->num_outputs;
    auto* scores = static_cast<float*>(scratch(kGuessSlot, num_tokens * num_experts * sizeof(float)));
    linear(*router, x, num_tokens, scores, num_experts);
    int32_t likely[kTokensOfGuess * kGuesses];
    int64_t count = 0;
    for (int64_t n = 0; n < kGuesses; ++n)
      for (int64_t t = 0; t < num_tokens; ++t) {
        float* row = scores + t * num_experts;
        int64_t best = 0;
        for (int64_t e = 1; e < num_experts; ++e)
          if (row[e] > row[best]) best = e;
        row[best] = -__builtin_inff();
        likely[count++] = static_cast<int32_t>(best);
      }
    source.expect(likely, count);
  }

  // As many of `count` experts, from used[first] on, as have kRowsOfWave rows together; one at least.
  Wave wave_of(int64_t first, int64_t count, bool has_shared) const {
    Wave wave{used + first, 0, 0, has_shared};
    for (; wave.num_experts < count && wave.num_rows < kRowsOfWave; ++wave.num_experts)
      wave.num_rows += rows_of(used[first + wave.num_experts]);
    return wave;
  }

  void run(const Wave& wave, float* gate_up) {
    run_gate_up(wave, gate_up);
    float* activated = gate_up;  // for kernels that read fp32, apart
    if (wants_f32(*a.down) || (a.shared && wants_f32(*a.shared->down)))
      activated = static_cast<float*>(scratch(kHiddenSlot, larger<int64_t>(64, inner_bytes(wave) / 2)));
    const int64_t routed_bytes = prepared_bytes(*a.down, wave.num_rows);
    const int64_t shared_bytes = wave.has_shared ? prepared_bytes(*a.shared->down, num_tokens) : 0;
    auto* buffer = static_cast<uint8_t*>(scratch(kPreparedSlot, larger<int64_t>(64, routed_bytes + shared_bytes)));
    const Rows rows = prepared_rows_at(*a.down, wave.num_rows, buffer, activated);
    Rows shared_rows;
    if (wave.has_shared)
      shared_rows = prepared_rows_at(*a.shared->down, num_tokens, buffer + routed_bytes, activated + wave.num_rows * width);
    activate(wave, gate_up, activated, rows, shared_rows);
    run_down(wave, rows, shared_rows);
  }

  void run_gate_up(const Wave& wave, float* gate_up) {
    int64_t count = 0, row = 0;
    for (int64_t i = 0; i < wave.num_experts; ++i) {
      const int32_t e = wave.experts[i];
      products[count++] = {a.gate_up, e, &x_rows, tokens + starts[e], rows_of(e), gate_up + row * 2 * width, 2 * width, 0, 0};
      row += rows_of(e);
    }
    if (wave.has_shared) {
      const Weight &gate = *a.shared->gate, &up = *a.shared->up;
      float* to = gate_up + row * 2 * width;
      products[count++] = {&gate, 0, &shared_x_rows, nullptr, num_tokens, to, 2 * shared_width, 0, 0};
      products[count++] = {&up, 0, &shared_x_rows, nullptr, num_tokens, to + shared_width, 2 * shared_width, 0, 0};
    }
    run_products(products, count);
  }

  void activate(const Wave& wave, float* gate_up, float* activated, const Rows& rows, const Rows& shared_rows) {
    const auto one = [](const Weight& weight, float* gate, float* to, int64_t row, const Rows& prepared) {
      swiglu_row(gate, gate + weight.num_inputs, weight.num_inputs, to);
      prepare_row(weight, to, row, prepared);
    };
    const bool is_apart = activated != gate_up;
    parallel_for(wave.num_rows + shared_rows_of(wave), [&](int64_t row) {
      if (row < wave.num_rows) {
        float* gate = gate_up + row * 2 * width;
        one(*a.down, gate, is_apart ? activated + row * width : gate, row, rows);
      } else {
        row -= wave.num_rows;
        float* gate = gate_up + wave.num_rows * 2 * width + row * 2 * shared_width;
        float* to = is_apart ? activated + wave.num_rows * width + row * shared_width : gate;
        one(*a.shared->down, gate, to, row, shared_rows);
      }
    });
  }

  void run_down(const Wave& wave, const Rows& rows, const Rows& shared_rows) {
    int64_t count = 0, row = 0;
    for (int64_t i = 0; i < wave.num_experts; ++i) {
      const int32_t e = wave.experts[i];
      products[count++] = {a.down, e, &rows, identity + row, rows_of(e), down + starts[e] * hidden, hidden, 0, 0};
      row += rows_of(e);
    }
    if (wave.has_shared)
      products[count++] = {a.shared->down, 0, &shared_rows, nullptr, num_tokens, shared_down, hidden, 0, 0};
    run_products(products, count);
  }

  void combine(const float* x, const float* weights, float* out) {
    const float* gate_vector = a.shared ? a.shared->gate_vector : nullptr;
    combine_rows({down, num_tokens, a.top_k, hidden, weights, x, a.shared ? shared_down : nullptr, gate_vector, out}, places);
  }
};

// Tokens of a pass, which bound the memory between the two products. What has to be read is read once for all tokens.
int64_t tokens_at_once(const ExpertsArguments& a) {
  if (a.gate_up->source) return a.num_tokens;
  const int64_t wanted = kRowsOfExpert * a.gate_up->num_experts / a.top_k;
  return smaller<int64_t>(2048, larger<int64_t>(256, wanted));
}

void experts(const ExpertsArguments& a) {
  const int64_t hidden = a.down->num_outputs, step = tokens_at_once(a);
  for (int64_t first = 0; first < a.num_tokens; first += step) {
    Experts work(a, smaller(step, a.num_tokens - first));
    const float* x = a.x + first * hidden;
    work.sort(a.routed_experts + first * a.top_k);
    if (a.gate_up->source)
      work.run_from(*a.gate_up->source, x);
    else
      work.run_all(x);
    work.combine(x, a.routing_weights + first * a.top_k, a.out + first * hidden);
  }
}

// ---- panels ----

// Nibbles 0 to 3 of each word into the low halves of its bytes, nibbles 4 to 7 into the high halves.
QNEXT_INLINE u32x16 interleave(u32x16 words) {
  u32x16 low = words & 0xffffu, high = words >> 16;
  low = (low | (low << 8)) & 0x00ff00ffu;
  low = (low | (low << 4)) & 0x0f0f0f0fu;
  high = (high | (high << 8)) & 0x00ff00ffu;
  high = (high | (high << 4)) & 0x0f0f0f0fu;
  return low | (high << 4);
}

void write_panels(const uint8_t* codes, int64_t num_outputs, int64_t row_bytes, int bits, uint8_t* panels) {
  const int64_t words = row_bytes / 4;
  parallel_for((num_outputs + kLanes - 1) / kLanes, [&](int64_t panel) {
    auto* to = reinterpret_cast<uint32_t*>(panels + panel * kLanes * row_bytes);
    const int64_t count = smaller<int64_t>(kLanes, num_outputs - panel * kLanes);
    for (int64_t first = 0; first < words; first += kLanes) {
      const int64_t num_words = smaller<int64_t>(kLanes, words - first);
      uint32_t block[kLanes][kLanes] = {};
      for (int64_t o = 0; o < count; ++o) {
        memcpy(block[o], codes + (panel * kLanes + o) * row_bytes + first * 4, num_words * 4);
        if (bits == 4) {
          u32x16 v;
          memcpy(&v, block[o], 64);
          v = interleave(v);
          memcpy(block[o], &v, 64);
        }
      }
      for (int64_t k = 0; k < num_words; ++k)
        for (int o = 0; o < kLanes; ++o) to[(first + k) * kLanes + o] = block[o][k];
    }
  });
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels{linear, experts, combine_rows<int64_t>, write_panels};

}  // namespace qnext::QNEXT_ISA
