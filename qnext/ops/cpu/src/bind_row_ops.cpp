#include <stdexcept>
#include <string>

#include "bind.h"
#include "recording.h"
#include "row_ops.h"

namespace nb = nanobind;

namespace qnext {

void bind_row_ops(nb::module_& m) {
  const nb::call_guard<nb::gil_scoped_release> without_lock;
  m.def(
      "embed",
      [](uintptr_t table, bool is_bf16, int64_t num_entries, int64_t size, uintptr_t ids, int64_t num_rows,
         uintptr_t out) {
        perform([=] {
          const auto* rows = pointer<const int64_t>(ids);
          for (int64_t t = 0; t < num_rows; ++t)
            if (rows[t] < 0 || rows[t] >= num_entries)
              throw std::out_of_range("token " + std::to_string(rows[t]) + " lies outside of 0 to " +
                                      std::to_string(num_entries - 1));
          active_row_kernels().embed(pointer<const void>(table), is_bf16, size, rows, num_rows, pointer<float>(out));
        });
      },
      without_lock, "IndexError where a token id is out of range; nothing is written then.");
  m.def(
      "rope",
      [](uintptr_t positions, int64_t num_rows, uintptr_t frequencies, int64_t half, float factor, uintptr_t cos,
         uintptr_t sin) {
        perform([=] {
          active_row_kernels().rope(pointer<const int64_t>(positions), num_rows, pointer<const float>(frequencies),
                                    half, factor, pointer<float>(cos), pointer<float>(sin));
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
      [](uintptr_t x, uintptr_t weight, int64_t num_rows, int64_t size, float eps, bool zero_centered, uintptr_t out) {
        perform([=] {
          active_row_kernels().rms_norm(pointer<const float>(x), pointer<const float>(weight), num_rows, size, eps,
                                        zero_centered, pointer<float>(out));
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
      [](uintptr_t logits, int64_t num_tokens, int64_t num_experts, int64_t top_k, bool renormalize, uintptr_t weights,
         uintptr_t experts, uintptr_t load) {
        perform([=] {
          active_row_kernels().route(pointer<const float>(logits), num_tokens, num_experts, top_k, renormalize,
                                     pointer<float>(weights), pointer<int64_t>(experts), pointer<int64_t>(load));
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
