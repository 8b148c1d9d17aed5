#include <stdexcept>
#include <string>

#include "bind.h"
#include "train_weights.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace qnext {
namespace {

void check_range(const int64_t* ids, int64_t count, int64_t end, const char* what) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] >= end) throw std::out_of_range(std::string(what) + " " + std::to_string(ids[i]) + " is out of range");
}

void check_experts(const ExpertsTraining& a) {
  const int64_t count = a.num_tokens * a.top_k;
  check_range(a.experts, count, a.routed.num_experts, "expert");
  for (int64_t i = 0; i < count; ++i)
    if (a.experts[i] < 0) throw std::out_of_range("a negative expert");
}

}  // namespace

void bind_train_weights(nb::module_& m) {
  nb::class_<Dense>(m, "Dense")
      .def(
          "__init__",
          [](Dense* self, uintptr_t data, int64_t stride, bool is_transposed) {
            new (self) Dense{pointer<const float>(data), stride, is_transposed};
          },
          "data"_a, nb::kw_only(), "stride"_a, "is_transposed"_a);
  m.def(
      "multiply_dense",
      [](const Dense& a, const Dense& b, int64_t rows, int64_t columns, int64_t inner, uintptr_t out, bool is_shared) {
        active_training_kernels().multiply({{rows, columns, inner}, a, b, pointer<float>(out), columns, is_shared});
      },
      "a"_a, "b"_a, nb::kw_only(), "rows"_a, "columns"_a, "inner"_a, "out"_a, "is_shared"_a,
      nb::call_guard<nb::gil_scoped_release>());
  nb::class_<TrainedExperts>(m, "TrainedExperts")
      .def(
          "__init__",
          [](TrainedExperts* self, int64_t num_experts, int64_t width, uintptr_t gate_up, uintptr_t down,
             uintptr_t hidden, uintptr_t grad_gate_up, uintptr_t grad_down) {
            new (self) TrainedExperts{num_experts,
                                      width,
                                      pointer<const float>(gate_up),
                                      pointer<const float>(down),
                                      pointer<float>(hidden),
                                      pointer<float>(grad_gate_up),
                                      pointer<float>(grad_down)};
          },
          nb::kw_only(), "num_experts"_a, "width"_a, "gate_up"_a = 0, "down"_a = 0, "hidden"_a = 0,
          "grad_gate_up"_a = 0, "grad_down"_a = 0);
  nb::class_<ExpertsTraining>(m, "ExpertsTraining")
      .def(
          "__init__",
          [](ExpertsTraining* self, int64_t num_tokens, int64_t top_k, int64_t size, uintptr_t x, uintptr_t weights,
             uintptr_t experts, const TrainedExperts& routed, const TrainedExperts& shared, uintptr_t gate_vector,
             uintptr_t shared_scales, uintptr_t rows, bool is_shared) {
            new (self) ExpertsTraining{num_tokens,
                                       top_k,
                                       size,
                                       pointer<const float>(x),
                                       pointer<const float>(weights),
                                       pointer<const int64_t>(experts),
                                       routed,
                                       shared,
                                       pointer<const float>(gate_vector),
                                       pointer<float>(shared_scales),
                                       pointer<float>(rows),
                                       nullptr,
                                       nullptr,
                                       nullptr,
                                       nullptr,
                                       nullptr,
                                       is_shared};
          },
          nb::kw_only(), "num_tokens"_a, "top_k"_a, "size"_a, "x"_a, "weights"_a, "experts"_a, "routed"_a, "shared"_a,
          "gate_vector"_a, "shared_scales"_a, "rows"_a, "is_shared"_a);
  m.def(
      "experts_forward",
      [](ExpertsTraining a, uintptr_t out) {
        check_experts(a);
        a.out = pointer<float>(out);
        active_training_kernels().experts_forward(a);
      },
      "arguments"_a, nb::kw_only(), "out"_a, nb::call_guard<nb::gil_scoped_release>(),
      "IndexError where an expert id is out of range; nothing is written then.");
  m.def(
      "experts_backward",
      [](ExpertsTraining a, uintptr_t grad_out, uintptr_t grad_x, uintptr_t grad_weights, uintptr_t grad_gate_vector) {
        check_experts(a);
        a.grad_out = pointer<const float>(grad_out);
        a.grad_x = pointer<float>(grad_x);
        a.grad_weights = pointer<float>(grad_weights);
        a.grad_gate_vector = pointer<float>(grad_gate_vector);
        active_training_kernels().experts_backward(a);
      },
      "arguments"_a, nb::kw_only(), "grad_out"_a, "grad_x"_a, "grad_weights"_a, "grad_gate_vector"_a,
      nb::call_guard<nb::gil_scoped_release>());
  nb::class_<HeadTraining>(m, "HeadTraining")
      .def(
          "__init__",
          [](HeadTraining* self, int64_t num_rows, int64_t size, int64_t num_labels, int64_t chunk_rows, uintptr_t x,
             uintptr_t weight, uintptr_t labels, uintptr_t grad_x, uintptr_t grad_weight, bool is_shared) {
            new (self) HeadTraining{num_rows,
                                    size,
                                    num_labels,
                                    chunk_rows,
                                    pointer<const float>(x),
                                    pointer<const float>(weight),
                                    pointer<const int64_t>(labels),
                                    pointer<float>(grad_x),
                                    pointer<float>(grad_weight),
                                    is_shared};
          },
          nb::kw_only(), "num_rows"_a, "size"_a, "num_labels"_a, "chunk_rows"_a, "x"_a, "weight"_a, "labels"_a,
          "grad_x"_a, "grad_weight"_a, "is_shared"_a);
  m.def(
      "cross_entropy_sum",
      [](const HeadTraining& a) {
        check_range(a.labels, a.num_rows, a.num_labels, "label");
        return active_training_kernels().head(a);
      },
      "arguments"_a, nb::call_guard<nb::gil_scoped_release>(),
      "The gradients are written too, where they are wanted. IndexError where a label is out of range.");
}

}  // namespace qnext
