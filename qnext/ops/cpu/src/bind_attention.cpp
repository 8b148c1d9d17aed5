#include <stdexcept>

#include "attention.h"
#include "bind.h"
#include "recording.h"

namespace nb = nanobind;

namespace qnext {
namespace {

// Everything that could lead a kernel outside of its memory and that no shape shows.
void check(const AttentionArguments& a, int64_t num_pages) {
  if (a.starts[0] != 0 || a.starts[a.num_sequences] != a.num_tokens)
    throw std::invalid_argument("lengths do not add up to the tokens of the call");
  for (int64_t n = 0; n < a.num_sequences; ++n) {
    if (a.length(n) < 1 || a.contexts[n] < a.length(n))
      throw std::invalid_argument("a context must hold at least the tokens of the call, one or more");
    const int64_t used = (a.contexts[n] - 1) / a.page_size + 1;
    if (used > a.table_stride) throw std::out_of_range("a context is longer than the pages of its block table");
    for (int64_t i = 0; i < used; ++i)
      if (a.tables[n * a.table_stride + i] < 0 || a.tables[n * a.table_stride + i] >= num_pages)
        throw std::out_of_range("a block table names a page that does not exist");
  }
  for (int64_t t = 0; t < a.num_tokens; ++t)
    if (a.write_index[t] < 0 || a.write_index[t] >= num_pages * a.page_size)
      throw std::out_of_range("a write index lies outside of the pages");
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def(
      "attention_mixer",
      [](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, int64_t num_tokens, int64_t num_heads,
         int64_t num_kv_heads, int64_t head_dim, int64_t rotary_dim, bool has_gate, uintptr_t q_norm_weight,
         uintptr_t k_norm_weight, float eps, bool zero_centered, uintptr_t cos, uintptr_t sin, float scale, int kind,
         uintptr_t k_pages, uintptr_t v_pages, uintptr_t k_scales, uintptr_t v_scales, int64_t num_pages,
         int64_t page_size, int64_t num_sequences, uintptr_t starts, uintptr_t contexts, uintptr_t tables,
         int64_t table_stride, uintptr_t write_index) {
        const AttentionArguments arguments{
            num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, pointer<const float>(q), pointer<const float>(k),
            pointer<const float>(v), has_gate, pointer<const float>(q_norm_weight), pointer<const float>(k_norm_weight),
            eps, zero_centered, pointer<const float>(cos), pointer<const float>(sin), scale,
            static_cast<PageKind>(kind), pointer<void>(k_pages), pointer<void>(v_pages), pointer<float>(k_scales),
            pointer<float>(v_scales), page_size, num_sequences, pointer<const int64_t>(starts),
            pointer<const int64_t>(contexts), pointer<const int64_t>(tables), table_stride,
            pointer<const int64_t>(write_index), pointer<float>(out)};
        perform([=] {
          check(arguments, num_pages);
          active_attention_kernels().mixer(arguments);
        });
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "ValueError or IndexError, and nothing written, where lengths, pages or places do not fit.");
}

}  // namespace qnext
