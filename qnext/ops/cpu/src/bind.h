// What each family of kernels adds to the Python module. Addresses arrive as integers.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace qnext {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_recording(nanobind::module_& m);
void bind_row_ops(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_delta(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_limits(nanobind::module_& m);
void bind_residency(nanobind::module_& m);
void bind_rounding(nanobind::module_& m);
void bind_train(nanobind::module_& m);
void bind_train_weights(nanobind::module_& m);

}  // namespace qnext
