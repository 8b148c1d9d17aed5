#include "bind.h"
#include "linear.h"

namespace nb = nanobind;

namespace qnext {

void bind_linear(nb::module_& m) {
  nb::class_<Weight>(m, "Weight", "A weight's addresses and sizes; whoever makes it keeps the memory alive.")
      .def("__init__", [](Weight* self, int kind, int64_t num_experts, int64_t num_outputs, int64_t num_inputs,
                          uintptr_t data, uintptr_t scales, uintptr_t zeros, int scale_kind, int64_t group_size) {
        new (self) Weight{static_cast<WeightKind>(kind), num_experts, num_outputs, num_inputs,
                          pointer<const void>(data), pointer<const void>(scales), pointer<const uint8_t>(zeros),
                          static_cast<ScaleKind>(scale_kind), group_size};
      });
  m.def(
      "linear",
      [](const Weight& weight, uintptr_t x, int64_t num_rows, uintptr_t out, int64_t out_stride) {
        active_linear_kernels().linear(weight, pointer<const float>(x), num_rows, pointer<float>(out), out_stride);
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "experts",
      [](uintptr_t x, int64_t num_tokens, int64_t top_k, uintptr_t routing_weights, uintptr_t routed_experts,
         const Weight& gate_up, const Weight& down, const Weight* gate, const Weight* up, const Weight* shared_down,
         uintptr_t gate_vector, uintptr_t out) {
        const auto* ids = pointer<const int64_t>(routed_experts);
        for (int64_t i = 0; i < num_tokens * top_k; ++i)
          if (ids[i] < 0 || ids[i] >= gate_up.num_experts) return false;
        const SharedExpert shared{gate, up, shared_down, pointer<const float>(gate_vector)};
        active_linear_kernels().experts(ExpertsArguments{
            pointer<const float>(x), num_tokens, top_k, pointer<const float>(routing_weights), ids, &gate_up, &down,
            gate ? &shared : nullptr, pointer<float>(out)});
        return true;
      },
      nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(),
      nb::arg().none(), nb::arg(), nb::arg(), nb::call_guard<nb::gil_scoped_release>(),
      "False where an expert id is out of range; nothing is written then.");
  m.def(
      "route",
      [](uintptr_t logits, int64_t num_tokens, int64_t num_experts, int64_t top_k, bool renormalize, uintptr_t weights,
         uintptr_t experts) {
        active_linear_kernels().route(pointer<const float>(logits), num_tokens, num_experts, top_k, renormalize,
                                      pointer<float>(weights), pointer<int64_t>(experts));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "rms_norm",
      [](uintptr_t x, uintptr_t weight, int64_t num_rows, int64_t size, float eps, bool zero_centered, uintptr_t out) {
        active_linear_kernels().rms_norm(pointer<const float>(x), pointer<const float>(weight), num_rows, size, eps,
                                         zero_centered, pointer<float>(out));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "write_panels",
      [](uintptr_t codes, int64_t num_outputs, int64_t row_bytes, int bits, uintptr_t panels) {
        active_linear_kernels().write_panels(pointer<const uint8_t>(codes), num_outputs, row_bytes, bits,
                                             pointer<uint8_t>(panels));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace qnext
