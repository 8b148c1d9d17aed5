#include <stdexcept>
#include <string>

#include "bind.h"
#include "recording.h"
#include "row_ops.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace qnext {

namespace {

struct EmbeddingTable {
  const void* rows;
  bool is_bf16;
  int64_t num_entries, size;
};

struct RopeRows {
  int64_t num_rows, half;
  float *cos, *sin;
};

struct RmsNorm {
  const float* weight;
  int64_t size;
  float eps;
  bool zero_centered;
};

struct RouterChoice {
  int64_t num_tokens, num_experts, top_k;
  bool renormalize;
};

void bind_row_arguments(nb::module_& m) {
  nb::class_<EmbeddingTable>(m, "EmbeddingTable", "Rows of fp32 or bf16 that token ids choose from.")
      .def(
          "__init__",
          [](EmbeddingTable* self, uintptr_t rows, bool is_bf16, int64_t num_entries, int64_t size) {
            new (self) EmbeddingTable{pointer<const void>(rows), is_bf16, num_entries, size};
          },
          nb::kw_only(), "rows"_a, "is_bf16"_a, "num_entries"_a, "size"_a);
  nb::class_<RopeRows>(m, "RopeRows", "Where cos and sin go, num_rows rows of half the rotated dims.")
      .def(
          "__init__",
          [](RopeRows* self, int64_t num_rows, int64_t half, uintptr_t cos, uintptr_t sin) {
            new (self) RopeRows{num_rows, half, pointer<float>(cos), pointer<float>(sin)};
          },
          nb::kw_only(), "num_rows"_a, "half"_a, "cos"_a, "sin"_a);
  nb::class_<RmsNorm>(m, "RmsNorm", "A norm over rows of `size` numbers.")
      .def(
          "__init__",
          [](RmsNorm* self, uintptr_t weight, int64_t size, float eps, bool zero_centered) {
            new (self) RmsNorm{pointer<const float>(weight), size, eps, zero_centered};
          },
          nb::kw_only(), "weight"_a, "size"_a, "eps"_a, "zero_centered"_a);
  nb::class_<RouterChoice>(m, "RouterChoice", "How many experts each token gets, of how many.")
      .def(
          "__init__",
          [](RouterChoice* self, int64_t num_tokens, int64_t num_experts, int64_t top_k, bool renormalize) {
            new (self) RouterChoice{num_tokens, num_experts, top_k, renormalize};
          },
          nb::kw_only(), "num_tokens"_a, "num_experts"_a, "top_k"_a, "renormalize"_a);
}

}  // namespace

void bind_row_ops(nb::module_& m) {
  const nb::call_guard<nb::gil_scoped_release> without_lock;
  bind_row_arguments(m);
  m.def(
      "embed",
      [](const EmbeddingTable& table, uintptr_t ids, int64_t num_rows, uintptr_t out) {
        perform([=] {
          const auto* rows = pointer<const int64_t>(ids);
          for (int64_t t = 0; t < num_rows; ++t)
            if (rows[t] < 0 || rows[t] >= table.num_entries)
              throw std::out_of_range("token " + std::to_string(rows[t]) + " lies outside of 0 to " +
                                      std::to_string(table.num_entries - 1));
          active_row_kernels().embed(table.rows, table.is_bf16, table.size, rows, num_rows, pointer<float>(out));
        });
      },
      without_lock, "IndexError where a token id is out of range; nothing is written then.");
  m.def(
      "rope",
      [](uintptr_t positions, uintptr_t frequencies, float factor, const RopeRows& out) {
        perform([=] {
          active_row_kernels().rope(pointer<const int64_t>(positions), out.num_rows, pointer<const float>(frequencies),
                                    out.half, factor, out.cos, out.sin);
        });
      },
      without_lock);
  m.def(
      "put_rows",
      [](uintptr_t rows, uintptr_t index, int64_t num_rows, int64_t size, uintptr_t table, int64_t num_entries) {
        perform([=] {
          const auto* places = pointer<const int64_t>(index);
          for (int64_t t = 0; t < num_rows; ++t)
            if (places[t] < 0 || places[t] >= num_entries)
              throw std::out_of_range("row " + std::to_string(places[t]) + " lies outside of 0 to " +
                                      std::to_string(num_entries - 1));
          active_row_kernels().put_rows(pointer<const float>(rows), places, num_rows, size, pointer<float>(table));
        });
      },
      without_lock, "IndexError where an index is out of range; nothing is written then.");
  m.def(
      "argmax",
      [](uintptr_t rows, int64_t num_rows, int64_t size, uintptr_t ids) {
        perform([=] {
          active_row_kernels().argmax(pointer<const float>(rows), num_rows, size, pointer<int64_t>(ids));
        });
      },
      without_lock);
  m.def(
      "concat",
      [](uintptr_t a, uintptr_t b, int64_t num_rows, int64_t size, uintptr_t out) {
        perform([=] {
          active_row_kernels().concat(pointer<const float>(a), pointer<const float>(b), num_rows, size,
                                      pointer<float>(out));
        });
      },
      without_lock);
  m.def(
      "rms_norm",
      [](const RmsNorm& norm, uintptr_t x, int64_t num_rows, uintptr_t out) {
        perform([=] {
          active_row_kernels().rms_norm(pointer<const float>(x), norm.weight, num_rows, norm.size, norm.eps,
                                        norm.zero_centered, pointer<float>(out));
        });
      },
      without_lock);
  m.def(
      "add",
      [](uintptr_t a, uintptr_t b, int64_t count, uintptr_t out) {
        perform([=] {
          active_row_kernels().add(pointer<const float>(a), pointer<const float>(b), count, pointer<float>(out));
        });
      },
      without_lock);
  m.def(
      "swiglu",
      [](uintptr_t gate, uintptr_t up, int64_t count, uintptr_t out) {
        perform([=] {
          active_row_kernels().swiglu(pointer<const float>(gate), pointer<const float>(up), count, pointer<float>(out));
        });
      },
      without_lock);
  m.def(
      "route",
      [](const RouterChoice& choice, uintptr_t logits, uintptr_t weights, uintptr_t experts, uintptr_t load) {
        perform([=] {
          active_row_kernels().route(pointer<const float>(logits), choice.num_tokens, choice.num_experts, choice.top_k,
                                     choice.renormalize, pointer<float>(weights), pointer<int64_t>(experts),
                                     pointer<int64_t>(load));
        });
      },
      without_lock);
  m.def(
      "are_finite",
      [](uintptr_t numbers, int64_t count, int bits, uint32_t exponent) {
        const RowKernels& kernels = active_row_kernels();
        return bits == 16 ? kernels.are_finite_16(pointer<const uint16_t>(numbers), count, (uint16_t)exponent)
                          : kernels.are_finite_32(pointer<const uint32_t>(numbers), count, exponent);
      },
      without_lock);
}

}  // namespace qnext
