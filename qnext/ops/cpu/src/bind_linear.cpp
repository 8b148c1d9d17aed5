#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"
#include "linear.h"
#include "residency.h"
#include "recording.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace qnext {

namespace {

// What Python hands over of the shared expert: its weights by value, since a recording outlives the call.
struct SharedWeights {
  Weight gate, up, down;
  const float* gate_vector;
};

struct RecordTable {
  std::vector<const uint8_t*> records;
};

struct RecordPlaces {
  int64_t data_at, scales_at, zeros_at;
};

void use_records(Weight& weight, const uint8_t* const* records, ExpertSource* source, const RecordPlaces& places) {
  weight.records = records;
  weight.source = source;
  weight.data_at = places.data_at;
  weight.scales_at = places.scales_at;
  weight.zeros_at = places.zeros_at;
}

struct Routed {
  int64_t num_tokens, top_k;
  const float* weights;
  const int64_t* experts;
};

struct MadeByShared {
  const float* x;
  const float* rows;
  const float* gate_vector;
};

void check(const Routed& routed, int64_t num_experts) {
  for (int64_t i = 0; i < routed.num_tokens * routed.top_k; ++i)
    if (routed.experts[i] < 0 || routed.experts[i] >= num_experts)
      throw std::out_of_range("expert " + std::to_string(routed.experts[i]) + " lies outside of 0 to " +
                              std::to_string(num_experts - 1));
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<RecordTable>(m, "RecordTable", "Where the records of a layer's experts lie, all of them in memory.")
      .def(
          "__init__",
          [](RecordTable* self, uintptr_t first, int64_t record_bytes, int64_t num_experts) {
            new (self) RecordTable;
            for (int64_t e = 0; e < num_experts; ++e)
              self->records.push_back(pointer<const uint8_t>(first + e * record_bytes));
          },
          nb::kw_only(), "first"_a, "record_bytes"_a, "num_experts"_a);
  nb::class_<Weight>(m, "Weight", "A weight's addresses and sizes; whoever makes it keeps the memory alive.")
      .def(
          "__init__",
          [](Weight* self, int kind, int64_t num_experts, int64_t num_outputs, int64_t num_inputs, uintptr_t data,
             uintptr_t scales, uintptr_t zeros, int scale_kind, int64_t group_size) {
            new (self) Weight{};
            self->kind = static_cast<WeightKind>(kind);
            self->num_experts = num_experts;
            self->num_outputs = num_outputs;
            self->num_inputs = num_inputs;
            self->data = pointer<const uint8_t>(data);
            self->scales = pointer<const uint8_t>(scales);
            self->zeros = pointer<const uint8_t>(zeros);
            self->scale_kind = static_cast<ScaleKind>(scale_kind);
            self->group_size = group_size;
          },
          nb::kw_only(), "kind"_a, "num_experts"_a, "num_outputs"_a, "num_inputs"_a, "data"_a = 0, "scales"_a = 0,
          "zeros"_a = 0, "scale_kind"_a = 0, "group_size"_a = 16)
      .def(
          "use_records",
          [](Weight& self, const RecordTable& table, int64_t data_at, int64_t scales_at, int64_t zeros_at) {
            use_records(self, table.records.data(), nullptr, {data_at, scales_at, zeros_at});
          },
          nb::keep_alive<1, 2>(), "table"_a, "data_at"_a, "scales_at"_a, "zeros_at"_a)
      .def(
          "use_source",
          [](Weight& self, ResidentLayer& layer, int64_t data_at, int64_t scales_at, int64_t zeros_at) {
            use_records(self, layer.records(), &layer, {data_at, scales_at, zeros_at});
          },
          nb::keep_alive<1, 2>(), "layer"_a, "data_at"_a, "scales_at"_a, "zeros_at"_a);
  nb::class_<SharedWeights>(m, "SharedExpert")
      .def(
          "__init__",
          [](SharedWeights* self, const Weight& gate, const Weight& up, const Weight& down, uintptr_t gate_vector) {
            new (self) SharedWeights{gate, up, down, pointer<const float>(gate_vector)};
          },
          nb::kw_only(), "gate"_a, "up"_a, "down"_a, "gate_vector"_a);
  nb::class_<Routed>(m, "Routing")
      .def(
          "__init__",
          [](Routed* self, int64_t num_tokens, int64_t top_k, uintptr_t weights, uintptr_t experts) {
            new (self) Routed{num_tokens, top_k, pointer<const float>(weights), pointer<const int64_t>(experts)};
          },
          nb::kw_only(), "num_tokens"_a, "top_k"_a, "weights"_a, "experts"_a);
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
      [](uintptr_t x, const Routed& routed, const Weight& gate_up, const Weight& down, const SharedWeights* shared,
         uintptr_t out) {
        const bool has_shared = shared != nullptr;
        perform([=, of_shared = has_shared ? *shared : SharedWeights{}] {
          check(routed, gate_up.num_experts);
          const SharedExpert expert{&of_shared.gate, &of_shared.up, &of_shared.down, of_shared.gate_vector};
          active_linear_kernels().experts(ExpertsArguments{
              pointer<const float>(x), routed.num_tokens, routed.top_k, routed.weights, routed.experts, &gate_up, &down,
              has_shared ? &expert : nullptr, pointer<float>(out)});
        });
      },
      nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
      nb::call_guard<nb::gil_scoped_release>(), "IndexError where an expert id is out of range; nothing is written then.");
  nb::class_<MadeByShared>(m, "MadeByShared", "What a shared expert made of tokens x, and the gate that scales it.")
      .def(
          "__init__",
          [](MadeByShared* self, uintptr_t x, uintptr_t rows, uintptr_t gate_vector) {
            new (self) MadeByShared{pointer<const float>(x), pointer<const float>(rows), pointer<const float>(gate_vector)};
          },
          nb::kw_only(), "x"_a, "rows"_a, "gate_vector"_a);
  m.def(
      "combine",
      [](uintptr_t rows, int64_t num_rows, const Routed& routed, int64_t hidden, const MadeByShared* shared,
         uintptr_t out) {
        const MadeByShared made = shared ? *shared : MadeByShared{};
        perform([=] {
          check(routed, num_rows);
          active_linear_kernels().combine(
              CombineArguments{pointer<const float>(rows), routed.num_tokens, routed.top_k, hidden, routed.weights, made.x,
                               made.rows, made.gate_vector, pointer<float>(out)},
              routed.experts);
        });
      },
      nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::call_guard<nb::gil_scoped_release>(),
      "`routed` names rows instead of experts. IndexError where one is out of range; nothing is written then.");
  m.def(
      "write_panels",
      [](uintptr_t codes, int64_t num_outputs, int64_t row_bytes, int bits, uintptr_t panels) {
        active_linear_kernels().write_panels(pointer<const uint8_t>(codes), num_outputs, row_bytes, bits,
                                             pointer<uint8_t>(panels));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace qnext
