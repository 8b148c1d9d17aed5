#include "bind.h"
#include "limits.h"
#include "pool.h"

namespace nb = nanobind;

namespace qnext {
namespace {

constexpr int64_t kChunk = 1 << 20;

}  // namespace

void bind_limits(nb::module_& m) {
  m.def(
      "read_all",
      [](uintptr_t address, int64_t bytes) {
        const auto* data = pointer<const uint8_t>(address);
        uint64_t mixed = 0;
        const int64_t num_chunks = bytes / kChunk;
        parallel_for(num_chunks, [&](int64_t chunk) {
          __atomic_fetch_xor(&mixed, active_limit_kernels().read(data + chunk * kChunk, kChunk), __ATOMIC_RELAXED);
        });
        return mixed;
      },
      nb::call_guard<nb::gil_scoped_release>(), "Read whole mebibytes with all threads; what is beyond them is left.");
  m.def(
      "multiply",
      [](int kind, int64_t rounds) {
        const int64_t num_tasks = num_threads();
        int64_t operations = 0;
        parallel_for(num_tasks, [&](int64_t) {
          float out[1] = {0.0f};
          int64_t done = active_limit_kernels().multiply(static_cast<Arithmetic>(kind), rounds, out);
          __atomic_fetch_add(&operations, done, __ATOMIC_RELAXED);
          volatile float keep = out[0];
          (void)keep;
        });
        return operations;
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "Multiply-adds on registers by every thread, of fp32 (0), bf16 (1) or int8 (2); the operations done, 0 where the "
      "CPU has none of the kind.");
}

}  // namespace qnext
