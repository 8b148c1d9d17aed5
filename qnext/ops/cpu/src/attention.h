// Grouped-query attention over pages of keys and values, with its norms, rotary positions and gate.
//
// Batch-invariant by construction: a query meets its keys in blocks of kKeyBlock and chunks of kKeyChunk that lie on a
// grid of absolute positions, and a key that it may not see adds exact zeros. So its bits depend neither on the queries
// beside it, nor on how a prompt was cut, nor on the number of threads.
#pragma once

#include <cstdint>

#include "isa.h"

namespace qnext {

enum class PageKind : int { f32 = 0, bf16 = 1, int8 = 2 };

struct AttentionArguments {
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim;
  const float* q;  // [T, H, K], or [T, H, 2 K] with each head's gate behind its query
  const float* k;  // [T, G, K]
  const float* v;  // [T, G, K]
  bool has_gate;
  const float* q_norm_weight;  // [K]
  const float* k_norm_weight;  // [K]
  float eps;
  bool zero_centered;
  const float* cos;  // [T, R / 2]
  const float* sin;  // [T, R / 2]
  float scale;       // positive
  PageKind kind;
  void* k_pages;    // [num_pages, G, P, K]
  void* v_pages;    // [num_pages, G, P, K]
  float* k_scales;  // [num_pages, G, P] for int8, else null
  float* v_scales;  // [num_pages, G, P] for int8, else null
  int64_t page_size;
  int64_t num_sequences;
  const int64_t* starts;       // [N + 1] first row of each sequence; its rows are the last ones of its context
  const int64_t* contexts;     // [N]
  const int64_t* tables;       // [N, table_stride] page numbers, checked to lie in the pool
  int64_t table_stride;
  const int64_t* write_index;  // [T] page * P + offset, checked to lie in the pool
  float* out;                  // [T, H, K]

  int64_t length(int64_t sequence) const { return starts[sequence + 1] - starts[sequence]; }
};

struct AttentionKernels {
  void (*mixer)(const AttentionArguments& arguments);
};

}  // namespace qnext

QNEXT_DISPATCH(AttentionKernels, attention_kernels)
