#include "bind.h"
#include "train.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace qnext {

namespace {

void bind_delta_training(nb::module_& m) {
  nb::class_<DeltaTraining>(m, "DeltaTraining", "A training step's call of the mixer: sizes, inputs, what is kept.")
      .def(
          "__init__",
          [](DeltaTraining* self, int64_t num_sequences, int64_t num_key_heads, int64_t repeats, int64_t key_dim,
             int64_t value_dim, int64_t conv_width, float eps, uintptr_t starts, uintptr_t qkvz, uintptr_t ba,
             uintptr_t conv, uintptr_t A_log, uintptr_t dt_bias, uintptr_t norm, uintptr_t states, uintptr_t writes,
             uintptr_t reads, uintptr_t gates) {
            new (self) DeltaTraining{num_sequences, num_key_heads, repeats, key_dim, value_dim, conv_width, eps,
                                     pointer<const int64_t>(starts), pointer<const float>(qkvz),
                                     pointer<const float>(ba), pointer<const float>(conv), pointer<const float>(A_log),
                                     pointer<const float>(dt_bias), pointer<const float>(norm), pointer<float>(states),
                                     pointer<float>(writes), pointer<float>(reads), pointer<float>(gates)};
          },
          nb::kw_only(), "num_sequences"_a, "num_key_heads"_a, "repeats"_a, "key_dim"_a, "value_dim"_a, "conv_width"_a,
          "eps"_a, "starts"_a, "qkvz"_a, "ba"_a, "conv"_a, "A_log"_a, "dt_bias"_a, "norm"_a, "states"_a, "writes"_a,
          "reads"_a, "gates"_a)
      .def_prop_ro("partial_size", [](const DeltaTraining& self) { return delta_partial_size(self); });
  m.def("delta_training_chunk", [] { return active_delta_train_kernels().chunk; });
  m.def(
      "delta_training_forward",
      [](const DeltaTraining& arguments, uintptr_t out) {
        active_delta_train_kernels().forward(arguments, pointer<float>(out));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "delta_training_backward",
      [](const DeltaTraining& arguments, uintptr_t grad_out, uintptr_t grad_qkvz, uintptr_t grad_ba, uintptr_t partial) {
        active_delta_train_kernels().backward(
            arguments, DeltaTrainingGradients{pointer<const float>(grad_out), pointer<float>(grad_qkvz),
                                              pointer<float>(grad_ba), pointer<float>(partial)});
      },
      nb::call_guard<nb::gil_scoped_release>());
}

void bind_attention_training(nb::module_& m) {
  nb::class_<AttentionTraining>(m, "AttentionTraining", "A training step's call of attention: sizes, inputs, what is kept.")
      .def(
          "__init__",
          [](AttentionTraining* self, int64_t num_sequences, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
             int64_t half, bool has_gate, bool zero_centered, float eps, float scale, uintptr_t starts, uintptr_t q,
             uintptr_t k, uintptr_t v, uintptr_t q_norm, uintptr_t k_norm, uintptr_t cos, uintptr_t sin,
             uintptr_t reads, uintptr_t log_sums) {
            new (self) AttentionTraining{num_sequences, num_heads, num_kv_heads, head_dim, half, has_gate, zero_centered,
                                         eps, scale, pointer<const int64_t>(starts), pointer<const float>(q),
                                         pointer<const float>(k), pointer<const float>(v), pointer<const float>(q_norm),
                                         pointer<const float>(k_norm), pointer<const float>(cos),
                                         pointer<const float>(sin), pointer<float>(reads), pointer<float>(log_sums)};
          },
          nb::kw_only(), "num_sequences"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "half"_a, "has_gate"_a,
          "zero_centered"_a, "eps"_a, "scale"_a, "starts"_a, "q"_a, "k"_a, "v"_a, "q_norm"_a, "k_norm"_a, "cos"_a,
          "sin"_a, "reads"_a, "log_sums"_a);
  m.def(
      "attention_training_forward",
      [](const AttentionTraining& arguments, uintptr_t out) {
        active_attention_train_kernels().forward(arguments, pointer<float>(out));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "attention_training_backward",
      [](const AttentionTraining& arguments, uintptr_t grad_out, uintptr_t grad_q, uintptr_t grad_k, uintptr_t grad_v,
         uintptr_t partial) {
        active_attention_train_kernels().backward(
            arguments, AttentionTrainingGradients{pointer<const float>(grad_out), pointer<float>(grad_q),
                                                  pointer<float>(grad_k), pointer<float>(grad_v), pointer<float>(partial)});
      },
      nb::call_guard<nb::gil_scoped_release>());
}

void bind_norm_training(nb::module_& m) {
  nb::class_<NormTraining>(m, "NormTraining", "A training step's call of RMSNorm.")
      .def(
          "__init__",
          [](NormTraining* self, int64_t num_rows, int64_t size, float eps, bool zero_centered, uintptr_t x,
             uintptr_t weight, uintptr_t inverse) {
            new (self) NormTraining{num_rows,       size, eps, zero_centered, pointer<const float>(x),
                                    pointer<const float>(weight), pointer<float>(inverse)};
          },
          nb::kw_only(), "num_rows"_a, "size"_a, "eps"_a, "zero_centered"_a, "x"_a, "weight"_a, "inverse"_a);
  m.def("norm_training_rows", [] { return active_norm_train_kernels().rows; });
  m.def(
      "norm_training_forward",
      [](const NormTraining& arguments, uintptr_t out) {
        active_norm_train_kernels().forward(arguments, pointer<float>(out));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "norm_training_backward",
      [](const NormTraining& arguments, uintptr_t grad_out, uintptr_t grad_x, uintptr_t partial) {
        active_norm_train_kernels().backward(arguments, pointer<const float>(grad_out), pointer<float>(grad_x),
                                             pointer<float>(partial));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace

void bind_train(nb::module_& m) {
  bind_delta_training(m);
  bind_attention_training(m);
  bind_norm_training(m);
}

}  // namespace qnext
