// Experts and the head in training: products on blocks of rows that stay in the caches, and what stands between them.
#include "train_weights.h"

#include "dense.h"
#include "pool.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int kBlockSlot = 28, kOrderSlot = 29, kLogitsSlot = 30;
constexpr int64_t kBlockRows = 256;
constexpr int64_t kTokensPerTask = 64;

template <typename Body>
QNEXT_INLINE void share(bool is_shared, int64_t num_tasks, Body&& body) {
  if (is_shared) return parallel_for(num_tasks, body);
  for (int64_t task = 0; task < num_tasks; ++task) body(task);
}

// Assignments sorted by expert, those of an expert in the order of the tokens.
struct Order {
  int32_t *assignments, *places, *starts;  // [T A] of each sorted row; its inverse; [E + 1] where each expert begins

  explicit Order(const ExpertsTraining& a) {
    const int64_t count = a.num_tokens * a.top_k, num_experts = a.routed.num_experts;
    assignments = static_cast<int32_t*>(scratch(kOrderSlot, (2 * count + num_experts + 2) * sizeof(int32_t)));
    places = assignments + count;
    int32_t* next = places + count;  // one place further than starts
    starts = next;
    for (int64_t e = 0; e < num_experts + 2; ++e) next[e] = 0;
    for (int64_t i = 0; i < count; ++i) ++next[a.experts[i] + 2];
    for (int64_t e = 2; e < num_experts + 2; ++e) next[e] += next[e - 1];
    for (int64_t i = 0; i < count; ++i) {
      const int32_t place = next[a.experts[i] + 1]++;
      assignments[place] = static_cast<int32_t>(i);
      places[i] = place;
    }
  }
};

// Rows [begin, end) of one expert.
struct Block {
  const ExpertsTraining& a;
  const TrainedExperts& group;
  const int32_t* assignments;  // null: row i is token i
  int64_t expert, begin, end;
  float* rows;  // [rows of the group, D]

  int64_t count() const { return end - begin; }
  int64_t token(int64_t row) const { return assignments ? assignments[row] / a.top_k : row; }
  float weight(int64_t row) const {
    if (assignments) return a.weights[assignments[row]];
    return a.gate_vector ? a.shared_scales[row] : 1.0f;
  }
  float* hidden() const { return group.hidden + begin * 2 * group.width; }
  const float* gate_up() const { return group.gate_up + expert * 2 * group.width * a.size; }
  const float* down() const { return group.down + expert * a.size * group.width; }

  // The rows of a matrix [T, D], side by side: in `to` where they have to be gathered.
  const float* gather(const float* from, float* to) const {
    if (!assignments) return from + begin * a.size;
    for (int64_t i = 0; i < count(); ++i)
      memcpy(to + i * a.size, from + token(begin + i) * a.size, a.size * sizeof(float));
    return to;
  }
};

int64_t numbers_of_block(const ExpertsTraining& a, const TrainedExperts& group) {
  return kBlockRows * (2 * a.size + 4 * group.width);
}

void forward_block(const Block& b) {
  const int64_t size = b.a.size, width = b.group.width, count = b.count();
  auto* memory = static_cast<float*>(scratch(kBlockSlot, numbers_of_block(b.a, b.group) * sizeof(float)));
  float* inner = memory + kBlockRows * size;
  const float* x = b.gather(b.a.x, memory);
  multiply_dense({count, 2 * width, size}, {x, size}, {b.gate_up(), size, true}, b.hidden(), 2 * width, false);
  for (int64_t i = 0; i < count; ++i) {
    const float *gate = b.hidden() + i * 2 * width, *up = gate + width;
    const f32reg weight = splat_register(b.weight(b.begin + i));
    for (int64_t f = 0; f < width; f += kRegisterLanes)
      store(inner + i * width + f, silu(load_register(gate + f)) * load_register(up + f) * weight);
  }
  multiply_dense({count, size, width}, {inner, width}, {b.down(), width, true}, b.rows + b.begin * size, size, false);
}

// From d(silu(gate) up weight): the gradient of gate and up, silu(gate) up weight itself, and the gradient of the weight.
float backward_row(const float* hidden, const float* grad, float weight, int64_t width, float* grad_hidden, float* inner) {
  const f32reg w = splat_register(weight), one = splat_register(1.0f);
  f32reg of_weight{};
  for (int64_t f = 0; f < width; f += kRegisterLanes) {
    const f32reg gate = load_register(hidden + f), up = load_register(hidden + width + f), s = sigmoid(gate);
    const f32reg activated = gate * s, both = activated * up, g = load_register(grad + f), scaled = g * w;
    of_weight = fma(g, both, of_weight);
    store(inner + f, both * w);
    store(grad_hidden + f, scaled * up * (s * (one + gate * (one - s))));
    store(grad_hidden + width + f, scaled * activated);
  }
  return sum(of_weight);
}

// `of_weights`: where the gradients of the weights of the group's rows go, by assignment or by token; or null.
void backward_block(const Block& b, float* of_weights, bool is_first) {
  const int64_t size = b.a.size, width = b.group.width, count = b.count();
  auto* memory = static_cast<float*>(scratch(kBlockSlot, numbers_of_block(b.a, b.group) * sizeof(float)));
  float *inner = memory + 2 * kBlockRows * size, *grad_hidden = inner + kBlockRows * width;
  float* grad_inner = grad_hidden + 2 * kBlockRows * width;
  const float* grad = b.gather(b.a.grad_out, memory);
  const float* x = b.gather(b.a.x, memory + kBlockRows * size);
  multiply_dense({count, width, size}, {grad, size}, {b.down(), width}, grad_inner, width, false);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = b.begin + i;
    const float of_weight = backward_row(b.hidden() + i * 2 * width, grad_inner + i * width, b.weight(row), width,
                                         grad_hidden + i * 2 * width, inner + i * width);
    if (of_weights) of_weights[b.assignments ? b.assignments[row] : row] = of_weight;
  }
  const int64_t matrix = b.expert * width * size;
  if (b.group.grad_down)
    multiply_dense({size, width, count}, {grad, size, true}, {inner, width}, b.group.grad_down + matrix, width,
                   !is_first);
  if (b.group.grad_gate_up)
    multiply_dense({2 * width, size, count}, {grad_hidden, 2 * width, true}, {x, size},
                   b.group.grad_gate_up + 2 * matrix, size, !is_first);
  multiply_dense({count, size, 2 * width}, {grad_hidden, 2 * width}, {b.gate_up(), size}, b.rows + b.begin * size, size,
                 false);
}

// Calls `body(block, is_first)` on the blocks of all experts; those of one expert in order on one thread.
template <typename Body>
void for_blocks(const ExpertsTraining& a, const Order& order, Body&& body) {
  const int64_t num_shared = a.shared.num_experts;
  share(a.is_shared, num_shared + a.routed.num_experts, [&](int64_t task) {
    const bool is_routed = task >= num_shared;
    const int64_t expert = is_routed ? task - num_shared : 0;
    Block block{a, is_routed ? a.routed : a.shared, is_routed ? order.assignments : nullptr, expert, 0, 0,
                is_routed ? a.rows : a.rows + a.num_tokens * a.top_k * a.size};
    const int64_t first = is_routed ? order.starts[expert] : 0;
    const int64_t last = is_routed ? order.starts[expert + 1] : a.num_tokens;
    int64_t at = first;
    do {  // an expert without rows has gradients of zero
      block.begin = at;
      block.end = smaller(last, at + kBlockRows);
      body(block, at == first);
      at = block.end;
    } while (at < last);
  });
}

// to[t] = the sum of the rows of token t, plus factors[t] * vector where there is one.
void sum_rows(const ExpertsTraining& a, const Order& order, float* to, const float* factors) {
  const float* shared = a.shared.num_experts ? a.rows + a.num_tokens * a.top_k * a.size : nullptr;
  share(a.is_shared, (a.num_tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task) {
    for (int64_t t = task * kTokensPerTask; t < smaller(a.num_tokens, (task + 1) * kTokensPerTask); ++t) {
      const int32_t* places = order.places + t * a.top_k;
      for (int64_t d = 0; d < a.size; d += kRegisterLanes) {
        f32reg sum{};
        for (int64_t i = 0; i < a.top_k; ++i) sum = sum + load_register(a.rows + places[i] * a.size + d);
        if (shared) sum = sum + load_register(shared + t * a.size + d);
        if (factors) sum = fma(splat_register(factors[t]), load_register(a.gate_vector + d), sum);
        store(to + t * a.size + d, sum);
      }
    }
  });
}

void experts_forward(const ExpertsTraining& a) {
  const Order order(a);
  if (a.shared.num_experts && a.gate_vector)
    for (int64_t t = 0; t < a.num_tokens; ++t)
      a.shared_scales[t] = sigmoid(dot_registers(a.x + t * a.size, a.gate_vector, a.size));
  for_blocks(a, order, [](const Block& block, bool) { forward_block(block); });
  sum_rows(a, order, a.out, nullptr);
}

void experts_backward(const ExpertsTraining& a) {
  const Order order(a);
  const bool has_scales = a.shared.num_experts && a.gate_vector;
  float* of_scores = nullptr;
  if (has_scales) of_scores = static_cast<float*>(scratch(kLogitsSlot, a.num_tokens * sizeof(float)));
  for_blocks(a, order, [&](const Block& block, bool is_first) {
    backward_block(block, block.assignments ? a.grad_weights : of_scores, is_first);
  });
  if (has_scales) {
    for (int64_t d = 0; d < a.size; ++d) a.grad_gate_vector[d] = 0.0f;
    for (int64_t t = 0; t < a.num_tokens; ++t) {
      of_scores[t] *= a.shared_scales[t] * (1.0f - a.shared_scales[t]);
      for (int64_t d = 0; d < a.size; d += kRegisterLanes)
        store(a.grad_gate_vector + d, fma(splat_register(of_scores[t]), load_register(a.x + t * a.size + d),
                                          load_register(a.grad_gate_vector + d)));
    }
  }
  sum_rows(a, order, a.grad_x, of_scores);
}

void multiply(const DenseProduct& p) {
  multiply_dense_shared(p.size, p.a, p.b, p.out, p.out_stride, false, p.is_shared);
}

}  // namespace

double head(const HeadTraining& arguments);

extern const TrainingKernels training_kernels;
const TrainingKernels training_kernels = {multiply, experts_forward, experts_backward, head};

}  // namespace qnext::QNEXT_ISA
