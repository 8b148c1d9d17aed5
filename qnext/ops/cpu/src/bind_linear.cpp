#include <stdexcept>
#include <string>

#include "bind.h"
#include "linear.h"
#include "recording.h"

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
        perform([=] {
          active_linear_kernels().linear(weight, pointer<const float>(x), num_rows, pointer<float>(out), out_stride);
        });
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "experts",
      [](uintptr_t x, int64_t num_tokens, int64_t top_k, uintptr_t routing_weights, uintptr_t routed_experts,
         const Weight& gate_up, const Weight& down, const Weight* gate, const Weight* up, const Weight* shared_down,
         uintptr_t gate_vector, uintptr_t out) {
        const bool has_shared = gate != nullptr;
        perform([=, gate = has_shared ? *gate : Weight{}, up = has_shared ? *up : Weight{},
                 shared_down = has_shared ? *shared_down : Weight{}] {
          const auto* ids = pointer<const int64_t>(routed_experts);
          for (int64_t i = 0; i < num_tokens * top_k; ++i)
            if (ids[i] < 0 || ids[i] >= gate_up.num_experts)
              throw std::out_of_range("expert " + std::to_string(ids[i]) + " lies outside of 0 to " +
                                      std::to_string(gate_up.num_experts - 1));
          const SharedExpert shared{&gate, &up, &shared_down, pointer<const float>(gate_vector)};
          active_linear_kernels().experts(ExpertsArguments{
              pointer<const float>(x), num_tokens, top_k, pointer<const float>(routing_weights), ids, &gate_up, &down,
              has_shared ? &shared : nullptr, pointer<float>(out)});
        });
      },
      nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(),
      nb::arg().none(), nb::arg(), nb::arg(), nb::call_guard<nb::gil_scoped_release>(),
      "IndexError where an expert id is out of range; nothing is written then.");
  m.def(
      "write_panels",
      [](uintptr_t codes, int64_t num_outputs, int64_t row_bytes, int bits, uintptr_t panels) {
        active_linear_kernels().write_panels(pointer<const uint8_t>(codes), num_outputs, row_bytes, bits,
                                             pointer<uint8_t>(panels));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace qnext
