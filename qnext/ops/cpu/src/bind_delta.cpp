#include <stdexcept>
#include <string>

#include "bind.h"
#include "delta.h"
#include "recording.h"

namespace nb = nanobind;

namespace qnext {

void bind_delta(nb::module_& m) {
  m.attr("MAX_CONV_WIDTH") = kMaxConvWidth;
  m.def(
      "gated_delta_mixer",
      [](uintptr_t qkvz, uintptr_t ba, uintptr_t conv_weight, uintptr_t A_log, uintptr_t dt_bias, uintptr_t norm_weight,
         float eps, int64_t num_key_heads, int64_t num_value_heads, int64_t key_dim, int64_t value_dim,
         int64_t conv_width, int64_t num_sequences, uintptr_t starts, uintptr_t slots, uintptr_t is_fresh,
         int64_t num_slots, uintptr_t conv, uintptr_t state, uintptr_t out) {
        perform([=] {
          const auto* ids = pointer<const int64_t>(slots);
          for (int64_t n = 0; n < num_sequences; ++n)
            if (ids[n] < 0 || ids[n] >= num_slots)
              throw std::out_of_range("slot " + std::to_string(ids[n]) + " lies outside of 0 to " +
                                      std::to_string(num_slots - 1));
          active_delta_kernels().mixer(DeltaMixerArguments{
              pointer<const float>(qkvz), pointer<const float>(ba), pointer<const float>(conv_weight),
              pointer<const float>(A_log), pointer<const float>(dt_bias), pointer<const float>(norm_weight), eps,
              num_key_heads, num_value_heads, key_dim, value_dim, conv_width, num_sequences,
              pointer<const int64_t>(starts), ids, pointer<const bool>(is_fresh), pointer<float>(conv),
              pointer<float>(state), pointer<float>(out)});
        });
      },
      nb::call_guard<nb::gil_scoped_release>(), "IndexError where a slot is out of range; nothing is written then.");
}

}  // namespace qnext
