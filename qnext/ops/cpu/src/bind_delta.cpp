#include <stdexcept>
#include <string>

#include "bind.h"
#include "delta.h"
#include "recording.h"

namespace nb = nanobind;
using namespace nb::literals;

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

// Python's side of DeltaMixerArguments, in parts that are made by name.
struct DeltaWeights {
  const float *conv, *A_log, *dt_bias, *norm;
  float eps;
};

struct DeltaSequences {
  int64_t num_sequences, num_slots;
  const int64_t *starts, *slots;
  const bool *is_fresh, *is_draft;
  const int64_t *context_lengths, *prompt_lengths;
};

DeltaMixerArguments arguments_of(const DeltaSlots& memory, const DeltaWeights& weights, const DeltaSequences& sequences) {
  DeltaMixerArguments a{};
  static_cast<DeltaSlots&>(a) = memory;
  a.conv_weight = weights.conv;
  a.A_log = weights.A_log;
  a.dt_bias = weights.dt_bias;
  a.norm_weight = weights.norm;
  a.eps = weights.eps;
  a.num_sequences = sequences.num_sequences;
  a.starts = sequences.starts;
  a.slots = sequences.slots;
  a.is_fresh = sequences.is_fresh;
  a.is_draft = sequences.is_draft;
  a.context_lengths = sequences.context_lengths;
  a.prompt_lengths = sequences.prompt_lengths;
  return a;
}

void bind_parts(nb::module_& m) {
  nb::class_<DeltaPending>(m, "DeltaPending")
      .def(
          "__init__",
          [](DeltaPending* self, int64_t num_drafts, uintptr_t conv, uintptr_t k, uintptr_t u, uintptr_t decay,
             uintptr_t num_accepted) {
            new (self) DeltaPending{num_drafts,        pointer<float>(conv),  pointer<float>(k),
                                    pointer<float>(u), pointer<float>(decay), pointer<int64_t>(num_accepted)};
          },
          nb::kw_only(), "num_drafts"_a, "conv"_a, "k"_a, "u"_a, "decay"_a, "num_accepted"_a);
  nb::class_<DeltaSlots>(m, "DeltaSlots")
      .def(
          "__init__",
          [](DeltaSlots* self, int64_t num_key_heads, int64_t num_value_heads, int64_t key_dim, int64_t value_dim,
             int64_t conv_width, uintptr_t conv, uintptr_t state, bool has_bf16_state, const DeltaPending* pending) {
            new (self) DeltaSlots{num_key_heads,        num_value_heads,      key_dim,        value_dim, conv_width,
                                  pointer<float>(conv), pointer<void>(state), has_bf16_state, {}};
            if (pending) self->pending = *pending;
          },
          nb::kw_only(), "num_key_heads"_a, "num_value_heads"_a, "key_dim"_a, "value_dim"_a, "conv_width"_a, "conv"_a,
          "state"_a, "has_bf16_state"_a, "pending"_a.none());
  nb::class_<DeltaWeights>(m, "DeltaWeights")
      .def(
          "__init__",
          [](DeltaWeights* self, uintptr_t conv, uintptr_t A_log, uintptr_t dt_bias, uintptr_t norm, float eps) {
            new (self) DeltaWeights{pointer<const float>(conv), pointer<const float>(A_log),
                                    pointer<const float>(dt_bias), pointer<const float>(norm), eps};
          },
          nb::kw_only(), "conv"_a, "A_log"_a, "dt_bias"_a, "norm"_a, "eps"_a);
  nb::class_<DeltaSequences>(m, "DeltaSequences")
      .def(
          "__init__",
          [](DeltaSequences* self, int64_t num_sequences, int64_t num_slots, uintptr_t starts, uintptr_t slots,
             uintptr_t is_fresh, uintptr_t is_draft, uintptr_t context_lengths, uintptr_t prompt_lengths) {
            new (self) DeltaSequences{
                num_sequences, num_slots, pointer<const int64_t>(starts), pointer<const int64_t>(slots),
                pointer<const bool>(is_fresh), pointer<const bool>(is_draft), pointer<const int64_t>(context_lengths),
                pointer<const int64_t>(prompt_lengths)};
          },
          nb::kw_only(), "num_sequences"_a, "num_slots"_a, "starts"_a, "slots"_a, "is_fresh"_a, "is_draft"_a,
          "context_lengths"_a, "prompt_lengths"_a);
}

}  // namespace

void bind_delta(nb::module_& m) {
  m.attr("MAX_CONV_WIDTH") = kMaxConvWidth;
  m.attr("MAX_DRAFT_TOKENS") = kMaxDraftTokens;
  bind_parts(m);
  m.def(
      "gated_delta_mixer",
      [](uintptr_t qkvz, uintptr_t ba, const DeltaWeights& weights, const DeltaSequences& sequences,
         const DeltaSlots& memory, uintptr_t out) {
        DeltaMixerArguments arguments = arguments_of(memory, weights, sequences);
        arguments.qkvz = pointer<const float>(qkvz);
        arguments.ba = pointer<const float>(ba);
        arguments.out = pointer<float>(out);
        perform([arguments, num_slots = sequences.num_slots] {
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
