#include "row_ops.h"

#include "pool.h"
#include "simd.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int64_t kNumbersPerTask = 1 << 15;

void embed(const void* table, bool is_bf16, int64_t size, const int64_t* ids, int64_t num_rows, float* out) {
  constexpr int64_t kPerTask = 16;
  parallel_for((num_rows + kPerTask - 1) / kPerTask, [&](int64_t task) {
    for (int64_t t = task * kPerTask; t < smaller(num_rows, (task + 1) * kPerTask); ++t) {
      const int64_t from = ids[t] * size;
      if (is_bf16)
        for (int64_t i = 0; i < size; i += kRegisterLanes)
          store(out + t * size + i, load_register(static_cast<const bf16*>(table) + from + i));
      else
        memcpy(out + t * size, static_cast<const float*>(table) + from, size * sizeof(float));
    }
  });
}

void rope(const int64_t* positions, int64_t num_rows, const float* frequencies, int64_t half, float factor, float* cos,
          float* sin) {
  constexpr int64_t kPerTask = 16;
  constexpr double kTurn = 6.283185307179586;
  parallel_for((num_rows + kPerTask - 1) / kPerTask, [&](int64_t task) {
    for (int64_t t = task * kPerTask; t < smaller(num_rows, (task + 1) * kPerTask); ++t)
      for (int64_t i = 0; i < half; ++i) {
        // In fp32 a product of a million would be wrong by up to 0.03.
        const double product = static_cast<double>(positions[t]) * static_cast<double>(frequencies[i]);
        const float angle = static_cast<float>(product - kTurn * nearbyint(product / kTurn));
        cos[t * half + i] = cosf(angle) * factor;
        sin[t * half + i] = sinf(angle) * factor;
      }
  });
}

void put_rows(const float* rows, const int64_t* index, int64_t num_rows, int64_t size, float* table) {
  for (int64_t t = 0; t < num_rows; ++t) memcpy(table + index[t] * size, rows + t * size, size * sizeof(float));
}

void argmax(const float* rows, int64_t num_rows, int64_t size, int64_t* ids) {
  constexpr int64_t kBlock = 1024;  // first the block that holds the highest, then the place in it
  parallel_for(num_rows, [&](int64_t t) {
    const float* row = rows + t * size;
    float highest = row[0];
    int64_t block = 0;
    for (int64_t start = 0; start < size; start += kBlock) {
      const int64_t end = smaller(size, start + kBlock);
      float here = row[start];
      for (int64_t i = start; i < end; ++i) here = row[i] > here ? row[i] : here;
      if (here > highest) {
        highest = here;
        block = start;
      }
    }
    int64_t place = block;
    while (place + 1 < size && row[place] != highest) ++place;
    ids[t] = place;
  });
}

void concat(const float* a, const float* b, int64_t num_rows, int64_t size, float* out) {
  for (int64_t t = 0; t < num_rows; ++t) {
    memcpy(out + 2 * t * size, a + t * size, size * sizeof(float));
    memcpy(out + (2 * t + 1) * size, b + t * size, size * sizeof(float));
  }
}

void rms_norm(const float* x, const float* weight, int64_t num_rows, int64_t size, float eps, bool zero_centered,
              float* out) {
  constexpr int64_t kPerTask = 16;
  const f32reg offset = splat_register(zero_centered ? 1.0f : 0.0f);
  parallel_for((num_rows + kPerTask - 1) / kPerTask, [&](int64_t task) {
    for (int64_t row = task * kPerTask; row < smaller(num_rows, (task + 1) * kPerTask); ++row) {
      const float* from = x + row * size;
      const float inverse = 1.0f / sqrtf(dot_registers(from, from, size) / static_cast<float>(size) + eps);
      for (int64_t i = 0; i < size; i += kRegisterLanes)
        store(out + row * size + i,
              load_register(from + i) * splat_register(inverse) * (load_register(weight + i) + offset));
    }
  });
}

// body(i) for every register of `count` numbers.
template <typename Body>
QNEXT_INLINE void for_each_register(int64_t count, Body&& body) {
  parallel_for((count + kNumbersPerTask - 1) / kNumbersPerTask, [&](int64_t task) {
    const int64_t end = smaller(count, (task + 1) * kNumbersPerTask);
    for (int64_t i = task * kNumbersPerTask; i < end; i += kRegisterLanes) body(i);
  });
}

void add(const float* a, const float* b, int64_t count, float* out) {
  for_each_register(count, [=](int64_t i) { store(out + i, load_register(a + i) + load_register(b + i)); });
}

void swiglu(const float* gate, const float* up, int64_t count, float* out) {
  for_each_register(count, [=](int64_t i) { store(out + i, silu(load_register(gate + i)) * load_register(up + i)); });
}

void route_token(const float* logits, int64_t num_experts, int64_t top_k, bool renormalize, float* weights,
                 int64_t* experts) {
  int64_t count = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (count == top_k && !(logits[e] > weights[count - 1])) continue;
    int64_t at = count < top_k ? count++ : count - 1;
    for (; at > 0 && logits[e] > weights[at - 1]; --at) {
      weights[at] = weights[at - 1];
      experts[at] = experts[at - 1];
    }
    weights[at] = logits[e];
    experts[at] = e;
  }
  const float largest = weights[0];
  float total = 0.0f, chosen = 0.0f;
  for (int64_t e = 0; e < num_experts; ++e) total += expf(logits[e] - largest);
  for (int64_t j = 0; j < top_k; ++j) {
    weights[j] = expf(weights[j] - largest) / total;
    chosen += weights[j];
  }
  if (renormalize)
    for (int64_t j = 0; j < top_k; ++j) weights[j] /= chosen;
}

void route(const float* logits, int64_t num_tokens, int64_t num_experts, int64_t top_k, bool renormalize,
           float* weights, int64_t* experts, int64_t* load) {
  constexpr int64_t kPerTask = 16;
  parallel_for((num_tokens + kPerTask - 1) / kPerTask, [&](int64_t task) {
    for (int64_t t = task * kPerTask; t < smaller(num_tokens, (task + 1) * kPerTask); ++t)
      route_token(logits + t * num_experts, num_experts, top_k, renormalize, weights + t * top_k, experts + t * top_k);
  });
  // By one thread: exact without atomics, and little beside the experts' work.
  if (load)
    for (int64_t i = 0; i < num_tokens * top_k; ++i) ++load[experts[i]];
}

// A number without its sign, as an integer, is as large as `exponent` only where it is infinite or none.
template <typename T>
bool are_finite(const T* numbers, int64_t count, T exponent) {
  constexpr int64_t kPerTask = 1 << 18;
  bool finite = true;
  parallel_for((count + kPerTask - 1) / kPerTask, [&](int64_t task) {
    const T without_sign = static_cast<T>(~T{0}) >> 1;
    T largest = 0;
    for (int64_t i = task * kPerTask; i < smaller(count, (task + 1) * kPerTask); ++i) {
      const T size = numbers[i] & without_sign;
      largest = size > largest ? size : largest;
    }
    if (largest >= exponent) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
  });
  return finite;
}

}  // namespace

extern const RowKernels row_kernels;
const RowKernels row_kernels{embed, rope,   put_rows, argmax, concat, rms_norm, add,
                             swiglu, route, are_finite<uint16_t>, are_finite<uint32_t>};

}  // namespace qnext::QNEXT_ISA
