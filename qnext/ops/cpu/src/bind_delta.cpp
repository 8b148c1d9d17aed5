#include <stdexcept>
#include <string>

#include "bind.h"
#include "delta.h"
#include "recording.h"

namespace nb = nanobind;

namespace qnext {

namespace {

// Raises std::out_of_range, IndexError in Python.
void check_range(const char* what, int64_t value, int64_t most) {
  if (value < 0 || value > most)
    throw std::out_of_range(what + std::to_string(value) + " lies outside of 0 to " + std::to_string(most));
}

void check_slot(const DeltaSlots& memory, int64_t num_slots, int64_t slot, bool is_fresh) {
  check_range("slot ", slot, num_slots - 1);
  if (memory.pending.num_drafts && !is_fresh)
    check_range("a number of accepted tokens of ", memory.pending.num_accepted[slot], memory.pending.num_drafts);
}

void check(const DeltaMixerArguments& a, int64_t num_slots) {
  for (int64_t n = 0; n < a.num_sequences; ++n) {
    check_slot(a, num_slots, a.slots[n], a.is_fresh && a.is_fresh[n]);
    const int64_t count = a.starts[n + 1] - a.starts[n];
    if (a.is_draft && a.is_draft[n] && count > a.pending.num_drafts)
      throw std::invalid_argument("a draft of " + std::to_string(count) + " tokens: slots hold at most " +
                                  std::to_string(a.pending.num_drafts));
  }
}

}  // namespace

void bind_delta(nb::module_& m) {
  m.attr("MAX_CONV_WIDTH") = kMaxConvWidth;
  m.attr("MAX_DRAFT_TOKENS") = kMaxDraftTokens;
  nb::class_<DeltaSlots>(m, "DeltaSlots")
      .def(
          "__init__",
          [](DeltaSlots* self, int64_t num_key_heads, int64_t num_value_heads, int64_t key_dim, int64_t value_dim,
             int64_t conv_width, uintptr_t conv, uintptr_t state, bool has_bf16_state, int64_t num_drafts, uintptr_t pending_conv,
             uintptr_t k, uintptr_t u, uintptr_t decay, uintptr_t num_accepted) {
            new (self) DeltaSlots{
                num_key_heads, num_value_heads, key_dim, value_dim, conv_width, pointer<float>(conv),
                pointer<void>(state), has_bf16_state,
                {num_drafts, pointer<float>(pending_conv), pointer<float>(k), pointer<float>(u), pointer<float>(decay),
                 pointer<int64_t>(num_accepted)}};
          });
  m.def(
      "gated_delta_mixer",
      [](uintptr_t qkvz, uintptr_t ba, uintptr_t conv_weight, uintptr_t A_log, uintptr_t dt_bias, uintptr_t norm_weight,
         float eps, int64_t num_sequences, uintptr_t starts, uintptr_t slots, uintptr_t is_fresh, uintptr_t is_draft,
         uintptr_t context_lengths, uintptr_t prompt_lengths, int64_t num_slots, const DeltaSlots& memory, uintptr_t out) {
        const DeltaMixerArguments arguments{
            memory, pointer<const float>(qkvz), pointer<const float>(ba), pointer<const float>(conv_weight),
            pointer<const float>(A_log), pointer<const float>(dt_bias), pointer<const float>(norm_weight), eps,
            num_sequences, pointer<const int64_t>(starts), pointer<const int64_t>(slots),
            pointer<const bool>(is_fresh), pointer<const bool>(is_draft), pointer<const int64_t>(context_lengths),
            pointer<const int64_t>(prompt_lengths), pointer<float>(out)};
        perform([=] {
          check(arguments, num_slots);
          active_delta_kernels().mixer(arguments);
        });
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "IndexError where a slot or its number of accepted tokens is out of range, ValueError for a draft that is too "
      "long; nothing is written then.");
  m.def(
      "apply_pending",
      [](const DeltaSlots& memory, uintptr_t slots, int64_t num_sequences, int64_t num_slots) {
        perform([=] {
          const auto* ids = pointer<const int64_t>(slots);
          for (int64_t n = 0; n < num_sequences; ++n) check_slot(memory, num_slots, ids[n], false);
          active_delta_kernels().apply_pending(memory, ids, num_sequences);
        });
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "IndexError where a slot or its number of accepted tokens is out of range; nothing is written then.");
}

}  // namespace qnext
