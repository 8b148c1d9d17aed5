#include <stdexcept>

#include "attention.h"
#include "bind.h"
#include "recording.h"

namespace nb = nanobind;
using namespace nb::literals;

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

// Python's side of AttentionArguments, in parts that are made by name.
struct AttentionRows {
  int64_t num_tokens, num_heads, num_kv_heads, head_dim;
  bool has_gate;
  const float *q, *k, *v;
  float* out;
};

struct AttentionNorms {
  const float *q_weight, *k_weight;
  float eps;
  bool zero_centered;
  float scale;
};

struct AttentionRope {
  int64_t rotary_dim;
  const float *cos, *sin;
};

struct AttentionPages {
  PageKind kind;
  void *k, *v;
  float *k_scales, *v_scales;
  int64_t num_pages, page_size;
};

struct AttentionSequences {
  int64_t num_sequences;
  const int64_t *starts, *contexts, *tables;
  int64_t table_stride;
  const int64_t* write_index;
};

AttentionArguments arguments_of(const AttentionRows& rows, const AttentionNorms& norms, const AttentionRope& rope,
                                const AttentionPages& pages, const AttentionSequences& sequences) {
  AttentionArguments a{};
  a.num_tokens = rows.num_tokens;
  a.num_heads = rows.num_heads;
  a.num_kv_heads = rows.num_kv_heads;
  a.head_dim = rows.head_dim;
  a.has_gate = rows.has_gate;
  a.q = rows.q;
  a.k = rows.k;
  a.v = rows.v;
  a.out = rows.out;
  a.q_norm_weight = norms.q_weight;
  a.k_norm_weight = norms.k_weight;
  a.eps = norms.eps;
  a.zero_centered = norms.zero_centered;
  a.scale = norms.scale;
  a.rotary_dim = rope.rotary_dim;
  a.cos = rope.cos;
  a.sin = rope.sin;
  a.kind = pages.kind;
  a.k_pages = pages.k;
  a.v_pages = pages.v;
  a.k_scales = pages.k_scales;
  a.v_scales = pages.v_scales;
  a.page_size = pages.page_size;
  a.num_sequences = sequences.num_sequences;
  a.starts = sequences.starts;
  a.contexts = sequences.contexts;
  a.tables = sequences.tables;
  a.table_stride = sequences.table_stride;
  a.write_index = sequences.write_index;
  return a;
}

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<AttentionRows>(m, "AttentionRows")
      .def(
          "__init__",
          [](AttentionRows* self, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
             bool has_gate, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out) {
            new (self) AttentionRows{
                num_tokens, num_heads, num_kv_heads, head_dim, has_gate, pointer<const float>(q),
                pointer<const float>(k), pointer<const float>(v), pointer<float>(out)};
          },
          nb::kw_only(), "num_tokens"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "has_gate"_a, "q"_a, "k"_a,
          "v"_a, "out"_a);
  nb::class_<AttentionNorms>(m, "AttentionNorms")
      .def(
          "__init__",
          [](AttentionNorms* self, uintptr_t q_weight, uintptr_t k_weight, float eps, bool zero_centered, float scale) {
            new (self) AttentionNorms{pointer<const float>(q_weight), pointer<const float>(k_weight), eps,
                                      zero_centered, scale};
          },
          nb::kw_only(), "q_weight"_a, "k_weight"_a, "eps"_a, "zero_centered"_a, "scale"_a);
  nb::class_<AttentionRope>(m, "AttentionRope")
      .def(
          "__init__",
          [](AttentionRope* self, int64_t rotary_dim, uintptr_t cos, uintptr_t sin) {
            new (self) AttentionRope{rotary_dim, pointer<const float>(cos), pointer<const float>(sin)};
          },
          nb::kw_only(), "rotary_dim"_a, "cos"_a, "sin"_a);
  nb::class_<AttentionPages>(m, "AttentionPages")
      .def(
          "__init__",
          [](AttentionPages* self, int kind, uintptr_t k, uintptr_t v, uintptr_t k_scales, uintptr_t v_scales,
             int64_t num_pages, int64_t page_size) {
            new (self) AttentionPages{static_cast<PageKind>(kind), pointer<void>(k), pointer<void>(v),
                                      pointer<float>(k_scales), pointer<float>(v_scales), num_pages, page_size};
          },
          nb::kw_only(), "kind"_a, "k"_a, "v"_a, "k_scales"_a, "v_scales"_a, "num_pages"_a, "page_size"_a);
  nb::class_<AttentionSequences>(m, "AttentionSequences")
      .def(
          "__init__",
          [](AttentionSequences* self, int64_t num_sequences, uintptr_t starts, uintptr_t contexts, uintptr_t tables,
             int64_t table_stride, uintptr_t write_index) {
            new (self) AttentionSequences{
                num_sequences, pointer<const int64_t>(starts), pointer<const int64_t>(contexts),
                pointer<const int64_t>(tables), table_stride, pointer<const int64_t>(write_index)};
          },
          nb::kw_only(), "num_sequences"_a, "starts"_a, "contexts"_a, "tables"_a, "table_stride"_a, "write_index"_a);
  m.def(
      "attention_mixer",
      [](const AttentionRows& rows, const AttentionNorms& norms, const AttentionRope& rope, const AttentionPages& pages,
         const AttentionSequences& sequences) {
        perform([arguments = arguments_of(rows, norms, rope, pages, sequences), num_pages = pages.num_pages] {
          check(arguments, num_pages);
          active_attention_kernels().mixer(arguments);
        });
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "ValueError or IndexError, and nothing written, where lengths, pages or places do not fit.");
}

}  // namespace qnext
