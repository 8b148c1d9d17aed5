// RMSNorm over rows with its gradient, each one pass.
#include <algorithm>

#include "pool.h"
#include "simd.h"
#include "train.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int64_t kRowsPerTask = 128;  // a gradient of the weight per task, whatever the number of threads

int64_t num_tasks(int64_t num_rows) { return (num_rows + kRowsPerTask - 1) / kRowsPerTask; }

void norm_forward(const NormTraining& a, float* out) {
  const f32reg offset = splat_register(a.zero_centered ? 1.0f : 0.0f);
  parallel_for(num_tasks(a.num_rows), [&](int64_t task) {
    for (int64_t row = task * kRowsPerTask; row < std::min(a.num_rows, (task + 1) * kRowsPerTask); ++row) {
      const float* x = a.x + row * a.size;
      const float inverse = 1.0f / sqrtf(dot_registers(x, x, a.size) / static_cast<float>(a.size) + a.eps);
      a.inverse[row] = inverse;
      for (int64_t i = 0; i < a.size; i += kRegisterLanes)
        store(out + row * a.size + i,
              load_register(x + i) * splat_register(inverse) * (load_register(a.weight + i) + offset));
    }
  });
}

// d x = inverse (scale grad - normed mean(scale grad normed)), where scale is the weight or one more.
void norm_backward(const NormTraining& a, const float* grad_out, float* grad_x, float* partial) {
  const f32reg offset = splat_register(a.zero_centered ? 1.0f : 0.0f);
  parallel_for(num_tasks(a.num_rows), [&](int64_t task) {
    float* grad_weight = partial + task * a.size;
    memset(grad_weight, 0, a.size * sizeof(float));
    for (int64_t row = task * kRowsPerTask; row < std::min(a.num_rows, (task + 1) * kRowsPerTask); ++row) {
      const float *x = a.x + row * a.size, *grad = grad_out + row * a.size, inverse = a.inverse[row];
      f32reg along{};
      for (int64_t i = 0; i < a.size; i += kRegisterLanes) {
        const f32reg product = load_register(grad + i) * (splat_register(inverse) * load_register(x + i));
        store(grad_weight + i, load_register(grad_weight + i) + product);
        along = fma(product, load_register(a.weight + i) + offset, along);
      }
      const f32reg mean = splat_register(-sum(along) * inverse / static_cast<float>(a.size));
      for (int64_t i = 0; i < a.size; i += kRegisterLanes) {
        const f32reg scaled = load_register(grad + i) * (load_register(a.weight + i) + offset);
        store(grad_x + row * a.size + i, splat_register(inverse) * fma(mean, load_register(x + i), scaled));
      }
    }
  });
}

}  // namespace

extern const NormTrainKernels norm_train_kernels;
const NormTrainKernels norm_train_kernels{kRowsPerTask, norm_forward, norm_backward};

}  // namespace qnext::QNEXT_ISA
