#include "bind.h"
#include "train.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace qnext {

void bind_train(nb::module_& m) {
  // By name alone: twelve addresses and sizes in a row would be mixed up.
  nb::class_<DeltaTraining>(m, "DeltaTraining", "A training step's call of the mixer: sizes, inputs, what is kept.")
      .def(
          "__init__",
          [](DeltaTraining* self, int64_t num_sequences, int64_t num_key_heads, int64_t repeats, int64_t key_dim,
             int64_t value_dim, int64_t conv_width, float eps, uintptr_t starts, uintptr_t qkvz, uintptr_t ba,
             uintptr_t conv, uintptr_t A_log, uintptr_t dt_bias, uintptr_t norm, uintptr_t states, uintptr_t writes,
             uintptr_t reads) {
            new (self) DeltaTraining{num_sequences, num_key_heads, repeats, key_dim, value_dim, conv_width, eps,
                                     pointer<const int64_t>(starts), pointer<const float>(qkvz),
                                     pointer<const float>(ba), pointer<const float>(conv), pointer<const float>(A_log),
                                     pointer<const float>(dt_bias), pointer<const float>(norm), pointer<float>(states),
                                     pointer<float>(writes), pointer<float>(reads)};
          },
          nb::kw_only(), "num_sequences"_a, "num_key_heads"_a, "repeats"_a, "key_dim"_a, "value_dim"_a, "conv_width"_a,
          "eps"_a, "starts"_a, "qkvz"_a, "ba"_a, "conv"_a, "A_log"_a, "dt_bias"_a, "norm"_a, "states"_a, "writes"_a,
          "reads"_a)
      .def_prop_ro("partial_size", [](const DeltaTraining& self) { return delta_partial_size(self); });
  m.def("delta_training_chunk", [] { return active_train_kernels().delta_chunk; });
  m.def(
      "delta_training_forward",
      [](const DeltaTraining& arguments, uintptr_t out) {
        active_train_kernels().delta_forward(arguments, pointer<float>(out));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "delta_training_backward",
      [](const DeltaTraining& arguments, uintptr_t grad_out, uintptr_t grad_qkvz, uintptr_t grad_ba, uintptr_t partial) {
        active_train_kernels().delta_backward(
            arguments, DeltaTrainingGradients{pointer<const float>(grad_out), pointer<float>(grad_qkvz),
                                              pointer<float>(grad_ba), pointer<float>(partial)});
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace qnext
