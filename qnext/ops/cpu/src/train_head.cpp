// The head with its cross entropy. The logits of a chunk become exponentials in place, and stay unnormalised: the
// gradients divide by their sum row by row, where rows are narrow.
#include "dense.h"
#include "pool.h"
#include "train_weights.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int kRowsSlot = 28, kChosenSlot = 29, kLogitsSlot = 30;
constexpr int64_t kRowsPerTask = 4;

struct Row {
  double loss;
  float factor;  // one over the sum of the exponentials
};

QNEXT_INLINE Row exponentiate(float* logits, int64_t size, int64_t label) {
  const float at_label = logits[label];
  int64_t i = kRegisterLanes;
  float highest = logits[0];
  if (size >= kRegisterLanes) {
    f32reg best = load_register(logits);
    for (; i + kRegisterLanes <= size; i += kRegisterLanes) best = vmax(best, load_register(logits + i));
    highest = max_lane(best);
    i = size / kRegisterLanes * kRegisterLanes;
  } else {
    i = 1;
  }
  for (; i < size; ++i) highest = larger(highest, logits[i]);
  f32reg sums{};
  for (i = 0; i + kRegisterLanes <= size; i += kRegisterLanes) {
    const f32reg e = exp(load_register(logits + i) - splat_register(highest));
    store(logits + i, e);
    sums = sums + e;
  }
  float total = sum(sums);
  for (; i < size; ++i) total += logits[i] = expf(logits[i] - highest);
  return {logf(total) + static_cast<double>(highest) - at_label, 1.0f / total};
}

struct Chunk {
  const HeadTraining& a;
  const int32_t* rows;
  int64_t count;
  float *logits, *x, *grad;  // [count, stride], [count, D] gathered, [count, D]
  int64_t stride;
  Row* results;

  int64_t label(int64_t i) const { return a.labels[rows[i]]; }
  template <typename Body>
  void for_rows(Body&& body) const {
    auto task = [&](int64_t t) {
      for (int64_t i = t * kRowsPerTask; i < smaller(count, (t + 1) * kRowsPerTask); ++i) body(i);
    };
    const int64_t num_tasks = (count + kRowsPerTask - 1) / kRowsPerTask;
    if (a.is_shared) return parallel_for(num_tasks, task);
    for (int64_t t = 0; t < num_tasks; ++t) task(t);
  }

  void losses() const {
    for_rows([&](int64_t i) { memcpy(x + i * a.size, a.x + rows[i] * a.size, a.size * sizeof(float)); });
    multiply_dense_shared({count, a.num_labels, a.size}, {x, a.size}, {a.weight, a.size, true}, logits, stride, false,
                          a.is_shared);
    for_rows([&](int64_t i) { results[i] = exponentiate(logits + i * stride, a.num_labels, label(i)); });
  }

  void gradient_of_x() const {
    multiply_dense_shared({count, a.size, a.num_labels}, {logits, stride}, {a.weight, a.size}, grad, a.size, false,
                          a.is_shared);
    for_rows([&](int64_t i) {
      const float *from = grad + i * a.size, *at_label = a.weight + label(i) * a.size;
      float* to = a.grad_x + rows[i] * a.size;
      for (int64_t d = 0; d < a.size; ++d) to[d] = from[d] * results[i].factor - at_label[d];
    });
  }

  void gradient_of_weight(bool adds) const {
    for_rows([&](int64_t i) {
      for (int64_t d = 0; d < a.size; ++d) grad[i * a.size + d] = x[i * a.size + d] * results[i].factor;
    });
    multiply_dense_shared({a.num_labels, a.size, count}, {logits, stride, true}, {grad, a.size}, a.grad_weight, a.size,
                          adds, a.is_shared);
    for (int64_t i = 0; i < count; ++i) {
      float* to = a.grad_weight + label(i) * a.size;
      for (int64_t d = 0; d < a.size; ++d) to[d] -= x[i * a.size + d];
    }
  }
};

}  // namespace

double head(const HeadTraining& a) {
  auto* rows = static_cast<int32_t*>(scratch(kChosenSlot, (a.num_rows + 1) * sizeof(int32_t)));
  int64_t count = 0;
  for (int64_t r = 0; r < a.num_rows; ++r) {
    if (a.labels[r] >= 0) rows[count++] = static_cast<int32_t>(r);
    else if (a.grad_x) memset(a.grad_x + r * a.size, 0, a.size * sizeof(float));
  }
  if (count == 0 && a.grad_weight) memset(a.grad_weight, 0, a.num_labels * a.size * sizeof(float));
  const int64_t chunk = smaller(a.chunk_rows, larger<int64_t>(1, count));
  const int64_t stride = (a.num_labels + kLanes) / kLanes * kLanes + kLanes;  // rows do not displace each other in a cache
  auto* memory = static_cast<float*>(scratch(kRowsSlot, chunk * (2 * a.size * sizeof(float) + sizeof(Row)) + 64));
  auto* results = reinterpret_cast<Row*>(memory + 2 * chunk * a.size);
  auto* logits = static_cast<float*>(scratch(kLogitsSlot, chunk * stride * sizeof(float)));
  double total = 0.0;
  for (int64_t start = 0; start < count; start += chunk) {
    const Chunk part{a,    rows + start, smaller(chunk, count - start), logits, memory, memory + chunk * a.size,
                     stride, results};
    part.losses();
    for (int64_t i = 0; i < part.count; ++i) total += results[i].loss;
    if (a.grad_x) part.gradient_of_x();
    if (a.grad_weight) part.gradient_of_weight(start > 0);
  }
  return total;
}

}  // namespace qnext::QNEXT_ISA
