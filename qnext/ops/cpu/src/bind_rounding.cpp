#include "bind.h"
#include "recording.h"
#include "rounding.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace qnext {

void bind_rounding(nb::module_& m) {
  const nb::call_guard<nb::gil_scoped_release> without_lock;
  nb::class_<RoundingArguments>(m, "Rounding", "A matrix, its codes and scales; whoever makes it keeps the memory alive.")
      .def(
          "__init__",
          [](RoundingArguments* self, int weight_kind, int scale_kind, int64_t num_outputs, int64_t num_inputs,
             int64_t group_size, int bits, uintptr_t weight, uintptr_t codes, uintptr_t scales) {
            new (self) RoundingArguments{static_cast<FloatKind>(weight_kind), static_cast<FloatKind>(scale_kind),
                                         num_outputs, num_inputs, group_size, bits, pointer<const void>(weight),
                                         nullptr, nullptr, 0, pointer<uint8_t>(codes), pointer<void>(scales)};
          },
          nb::kw_only(), "weight_kind"_a, "scale_kind"_a, "num_outputs"_a, "num_inputs"_a, "group_size"_a, "bits"_a,
          "weight"_a, "codes"_a, "scales"_a);
  m.def(
      "round_matrix",
      [](const RoundingArguments& matrix, uintptr_t importance, uintptr_t divisors, int64_t num_divisors) {
        perform([=] {
          RoundingArguments arguments = matrix;
          arguments.importance = pointer<const float>(importance);
          arguments.divisors = pointer<const float>(divisors);
          arguments.num_divisors = num_divisors;
          active_rounding_kernels().round(arguments);
        });
      },
      without_lock);
  m.def(
      "rounding_errors",
      [](const RoundingArguments& matrix, uintptr_t squares) {
        perform([=] { active_rounding_kernels().errors(matrix, pointer<double>(squares)); });
      },
      without_lock);
}

}  // namespace qnext
