#include "attention.h"

#include "attention_tiles.h"
#include "pool.h"

namespace qnext::QNEXT_ISA {
namespace {

enum Slot { kQuerySlot = 8, kTilesSlot, kStateSlot, kBlockSlot, kGroupSlot, kRowsSlot, kHeadSlot, kPartsSlot };

constexpr int64_t kTileRows = 128;        // rows of a task: enough to pay for packing a block of keys and values
constexpr int kGroupRows = 32;            // rows whose queries, scores and weights stay in the nearest cache
constexpr int64_t kPartsBytes = 8 << 20;  // of chunks whose sums wait to be merged
constexpr int64_t kLeastParts = 4;        // of a task, however large
constexpr int64_t kPreparedTokens = 8;    // tokens of a task that prepares heads

QNEXT_INLINE int64_t pad(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// ---- heads: norm, rotation, storage ----

void normalize(const float* x, const float* weight, int64_t size, float eps, float offset, float* out) {
  f32x16 squares[2] = {};
  for (int64_t d = 0; d < size; d += 2 * kLanes)
    for (int j = 0; j < 2; ++j) {
      const f32x16 part = load(x + d + j * kLanes);
      squares[j] = fma(part, part, squares[j]);
    }
  const f32x16 inverse = splat(1.0f / sqrtf(sum(squares[0] + squares[1]) / static_cast<float>(size) + eps));
  for (int64_t d = 0; d < size; d += kLanes)
    store(out + d, load(x + d) * inverse * (load(weight + d) + splat(offset)));
}

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const f32x16 a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

template <typename From, typename To>
QNEXT_INLINE void convert(const From* from, int64_t size, To* to) {
  for (int64_t d = 0; d < size; d += kLanes) store(to + d, load(from + d));
}

// One head of one token into its place among the pages.
template <typename Page>
void store_head(const float* x, int64_t size, void* pages, int64_t place, float*) {
  convert(x, size, static_cast<Page*>(pages) + place * size);
}

template <>
void store_head<int8_t>(const float* x, int64_t size, void* pages, int64_t place, float* scales) {
  f32x16 largest = splat(0.0f);
  for (int64_t d = 0; d < size; d += kLanes) largest = vmax(largest, vabs(load(x + d)));
  const float scale = max_lane(largest) / 127.0f;
  scales[place] = scale;
  auto* page = static_cast<int8_t*>(pages) + place * size;
  const f32x16 inverse = splat(scale > 0.0f ? 1.0f / scale : 0.0f);
  for (int64_t d = 0; d < size; d += kLanes) {
    const i32x16 codes = round_to_int(load(x + d) * inverse);
    for (int i = 0; i < kLanes; ++i) page[d + i] = static_cast<int8_t>(smaller(127, larger(-127, (int)codes[i])));
  }
}

// ---- the work ----

struct Tile {  // consecutive tokens of one sequence
  int64_t sequence, first_token, num_tokens, first_position;
};

// Running sums of the rows of a tile. `total` keeps sixteen partial sums of weights per row.
struct Sums {
  float* values;   // [rows, K]
  float* total;    // [rows, 16]
  float* highest;  // [rows]
};

template <typename Page, typename A>
class Mixer {
 public:
  explicit Mixer(const AttentionArguments& arguments)
      : a(arguments),
        group(a.num_heads / a.num_kv_heads),
        query_stride(a.head_dim * (a.has_gate ? 2 : 1)),
        steepness(a.scale * 1.44269504f) {}

  void run() {
    prepare();
    plan();
    const int64_t num_tasks = num_tiles * a.num_kv_heads;
    int64_t most_chunks = 0;
    for (int64_t i = 0; i < num_tiles; ++i) most_chunks = larger(most_chunks, num_chunks(tiles[i]));
    if (most_chunks > 1 && num_tasks < 4 * num_threads()) return run_split(num_tasks, most_chunks);
    parallel_for(num_tasks, [&](int64_t task) {
      const Tile& tile = tiles[task / a.num_kv_heads];
      const int64_t head = task % a.num_kv_heads, size = sums_floats(tile);
      auto* memory = static_cast<float*>(scratch(kStateSlot, 2 * size * 4));
      const Sums whole = sums_at(memory, tile), part = sums_at(memory + size, tile);
      attend(tile, head, 0, whole);
      for (int64_t chunk = 1; chunk < num_chunks(tile); ++chunk) {
        attend(tile, head, chunk, part);
        merge(tile, whole, part);
      }
      finish(tile, head, whole);
    });
  }

 private:
  // Few tiles with long contexts: chunks are tasks of their own, merged in the same order. So many at a time that memory
  // does not grow with the context; place 0 of a task holds what has been merged.
  void run_split(int64_t num_tasks, int64_t most_chunks) {
    int64_t size = 0;
    for (int64_t i = 0; i < num_tiles; ++i) size = larger(size, sums_floats(tiles[i]));
    const int64_t places = smaller(most_chunks, larger<int64_t>(kLeastParts, kPartsBytes / (num_tasks * size * 4)));
    auto* memory = static_cast<float*>(scratch(kPartsSlot, num_tasks * places * size * 4));
    for (int64_t first = 0; first < most_chunks;) {
      const int64_t merged = first > 0, count = smaller(places - merged, most_chunks - first);
      parallel_for(num_tasks * count, [&](int64_t task) {
        const Tile& tile = tiles[task / count / a.num_kv_heads];
        const int64_t head = task / count % a.num_kv_heads, chunk = first + task % count;
        float* place = memory + (task / count * places + merged + task % count) * size;
        if (chunk < num_chunks(tile)) attend(tile, head, chunk, sums_at(place, tile));
      });
      const bool is_last = first + count == most_chunks;
      parallel_for(num_tasks, [&](int64_t task) {
        const Tile& tile = tiles[task / a.num_kv_heads];
        float* parts = memory + task * places * size;
        const int64_t end = merged + smaller(count, num_chunks(tile) - first);
        for (int64_t place = 1; place < end; ++place) merge(tile, sums_at(parts, tile), sums_at(parts + place * size, tile));
        if (is_last) finish(tile, task % a.num_kv_heads, sums_at(parts, tile));
      });
      first += count;
    }
  }

  // Norms and rotation of all queries and keys; keys and values go to their pages.
  void prepare() {
    query = static_cast<A*>(scratch(kQuerySlot, a.num_tokens * a.num_heads * a.head_dim * sizeof(A)));
    const int64_t per_task = a.num_tokens < 4 * kPreparedTokens ? 1 : kPreparedTokens;
    parallel_for((a.num_tokens + per_task - 1) / per_task * a.num_kv_heads, [&](int64_t task) {
      const int64_t first = task / a.num_kv_heads * per_task;
      for (int64_t t = first; t < smaller(a.num_tokens, first + per_task); ++t) prepare_heads(t, task % a.num_kv_heads);
    });
  }

  void prepare_heads(int64_t t, int64_t head) {
    const int64_t size = a.head_dim, half = a.rotary_dim / 2;
    const float offset = a.zero_centered ? 1.0f : 0.0f;
    const float *cos = a.cos + t * half, *sin = a.sin + t * half;
    auto* buffer = static_cast<float*>(scratch(kHeadSlot, size * 4));
    const int64_t row = t * a.num_kv_heads + head, index = a.write_index[t];
    const int64_t place = (index / a.page_size * a.num_kv_heads + head) * a.page_size + index % a.page_size;
    normalize(a.k + row * size, a.k_norm_weight, size, a.eps, offset, buffer);
    rotate(buffer, cos, sin, half);
    store_head<Page>(buffer, size, a.k_pages, place, a.k_scales);
    store_head<Page>(a.v + row * size, size, a.v_pages, place, a.v_scales);
    for (int64_t h = head * group; h < (head + 1) * group; ++h) {
      normalize(a.q + (t * a.num_heads + h) * query_stride, a.q_norm_weight, size, a.eps, offset, buffer);
      rotate(buffer, cos, sin, half);
      convert(buffer, size, query + (t * a.num_heads + h) * size);
    }
  }

  // Tiles of all sequences; the ones with the longest contexts come first within a sequence.
  void plan() {
    const int64_t most = larger<int64_t>(1, kTileRows / group);
    int64_t count = 0;
    for (int64_t n = 0; n < a.num_sequences; ++n) count += (a.length(n) + most - 1) / most;
    tiles = static_cast<Tile*>(scratch(kTilesSlot, larger<int64_t>(1, count) * sizeof(Tile)));
    for (int64_t n = 0; n < a.num_sequences; ++n)
      for (int64_t first = (a.length(n) - 1) / most * most; first >= 0; first -= most)
        tiles[num_tiles++] = Tile{n, a.starts[n] + first, smaller(most, a.length(n) - first),
                                  a.contexts[n] - a.length(n) + first};
  }

  int64_t num_rows(const Tile& tile) const { return pad(tile.num_tokens * group, kRowPad); }
  int64_t num_chunks(const Tile& tile) const { return (last_position(tile) + kKeyChunk) / kKeyChunk; }
  int64_t last_position(const Tile& tile) const { return tile.first_position + tile.num_tokens - 1; }
  int64_t sums_floats(const Tile& tile) const { return pad(num_rows(tile) * (a.head_dim + kLanes + 1), kLanes); }
  Sums sums_at(float* memory, const Tile& tile) const {
    const int64_t rows = num_rows(tile);
    return Sums{memory, memory + rows * a.head_dim, memory + rows * (a.head_dim + kLanes)};
  }

  // The keys of one chunk that the rows of a tile may see.
  void attend(const Tile& tile, int64_t head, int64_t chunk, const Sums& sums) {
    const int64_t rows = num_rows(tile), last = last_position(tile);
    memset(sums.values, 0, rows * (a.head_dim + kLanes) * 4);
    for (int64_t r = 0; r < rows; ++r) sums.highest[r] = kLowest;
    auto* positions = static_cast<int64_t*>(scratch(kRowsSlot, rows * (sizeof(A*) + sizeof(int64_t))));
    auto* queries = reinterpret_cast<const A**>(positions + rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = smaller(r, tile.num_tokens * group - 1), token = row / group;
      positions[r] = tile.first_position + token;
      queries[r] = query + ((tile.first_token + token) * a.num_heads + head * group + row % group) * a.head_dim;
    }
    const int64_t end = smaller((chunk + 1) * kKeyChunk, last + 1);
    for (int64_t block = chunk * kKeyChunk; block < end; block += kKeyBlock) {
      Block keys;
      const int64_t* table = a.tables + tile.sequence * a.table_stride;
      gather(table, head, block, smaller<int64_t>(kKeyBlock, last + 1 - block), rows > kGroupRows, keys);
      aim(table, head, block + kKeyBlock, smaller<int64_t>(kKeyBlock, last + 1 - block - kKeyBlock), keys);
      for (int64_t first = 0; first < rows; first += kGroupRows) {
        const int count = static_cast<int>(smaller<int64_t>(kGroupRows, rows - first));
        meet(keys, block, count, queries + first, positions + first, first == 0,
             Sums{sums.values + first * a.head_dim, sums.total + first * kLanes, sums.highest + first});
      }
    }
  }

  struct Block {
    const A* keys[kKeyBlock];
    const A* values;  // packed, see value_tile
    alignas(64) float key_scales[kKeyBlock];
    alignas(64) float value_scales[kKeyBlock];
    const char* next_keys[kKeyBlock];  // of the following block, to be asked for in time
    const char* next_values[kKeyBlock];
  };

  // Places of positions [first, first + count) among the rows of one head, walked page by page: divisions are slow.
  void find(const int64_t* table, int64_t head, int64_t first, int64_t count, int64_t* places) const {
    int64_t page = first / a.page_size, offset = first % a.page_size;
    for (int64_t i = 0; i < count; ++i) {
      places[i] = (table[page] * a.num_kv_heads + head) * a.page_size + offset;
      if (++offset == a.page_size) {
        ++page;
        offset = 0;
      }
    }
  }

  // `count` keys and values from position `first` on. Keys are copied where many rows will read them: among the pages
  // their addresses lie so that they would push one another out of the cache.
  void gather(const int64_t* table, int64_t head, int64_t first, int64_t count, bool copy, Block& block) {
    constexpr bool is_converted = sizeof(Page) != sizeof(A);
    constexpr int kEach = Product<A>::kKeysEach;
    const int64_t size = a.head_dim;
    auto* memory = static_cast<A*>(scratch(kBlockSlot, 2 * (kKeyBlock + 1) * size * sizeof(A)));
    A *keys = memory, *values = memory + kKeyBlock * size, *converted = values + kKeyBlock * size;
    block.values = values;
    const A* pair[2] = {nullptr, nullptr};
    int64_t places[kKeyBlock];
    find(table, head, first, count, places);
    for (int64_t i = 0; i < kKeyBlock; ++i) {
      if (i >= count) {
        block.keys[i] = block.keys[count - 1];
        block.key_scales[i] = block.value_scales[i] = 0.0f;
      } else {
        const int64_t at = places[i];
        const Page* key = static_cast<const Page*>(a.k_pages) + at * size;
        const Page* value = static_cast<const Page*>(a.v_pages) + at * size;
        if constexpr (is_converted) {
          convert(key, size, keys + i * size);
          convert(value, size, converted + i % kEach * size);
          block.keys[i] = keys + i * size;
          pair[i % kEach] = converted + i % kEach * size;
        } else {
          if (copy) memcpy(keys + i * size, key, size * sizeof(A));
          block.keys[i] = copy ? keys + i * size : key;
          pair[i % kEach] = value;
        }
        if constexpr (sizeof(Page) == 1) {
          block.key_scales[i] = a.k_scales[at];
          block.value_scales[i] = a.v_scales[at];
        }
      }
      if (i % kEach == kEach - 1) {
        if (i - i % kEach < count) pack_values(pair, size, static_cast<int>(i / kEach), values);
        pair[0] = pair[1] = nullptr;
      }
    }
  }

  // The block that comes after, as far as there is one.
  void aim(const int64_t* table, int64_t head, int64_t first, int64_t count, Block& block) const {
    int64_t places[kKeyBlock];
    find(table, head, first, count, places);
    for (int i = 0; i < kKeyBlock; ++i) {
      const int64_t at = i < count ? places[i] * a.head_dim * static_cast<int64_t>(sizeof(Page)) : 0;
      block.next_keys[i] = static_cast<const char*>(a.k_pages) + at;
      block.next_values[i] = static_cast<const char*>(a.v_pages) + at;
    }
  }

  // One block of keys and up to kGroupRows rows: scores, weights, weighted values.
  void meet(const Block& block, int64_t first_key, int count, const A* const* queries, const int64_t* positions,
            bool ahead, const Sums& sums) {
    const int num_keys = static_cast<int>(smaller<int64_t>(kKeyBlock, positions[count - 1] + 1 - first_key));
    if (num_keys <= 0) return;
    auto* scores = static_cast<float*>(scratch(kGroupSlot, kGroupRows * kKeyBlock * (4 + sizeof(A))));
    A* weights = reinterpret_cast<A*>(scores + kGroupRows * kKeyBlock);
    for (int key = 0; key < num_keys; key += 4) {
      for (int row = 0; row < count; row += 4)
        score_tile<A, Page>(queries + row, block.keys + key, a.head_dim, scores + row * kKeyBlock + key,
                            ahead && row < 8 ? block.next_keys + key + row / 2 : nullptr);
    }
    alignas(64) float factors[kGroupRows];
    weigh(block, first_key, count, (num_keys + kLanes - 1) / kLanes, positions, scores, weights, factors, sums);
    const int num_steps = (num_keys + Product<A>::kKeysEach - 1) / Product<A>::kKeysEach;
    for (int64_t d = 0; d < a.head_dim; d += kSliceDims)
      for (int row = 0; row < count; row += kValueRows)
        value_tile<A, Page>(weights + row * kKeyBlock, block.values + d * kKeyBlock, num_steps, factors + row,
                            sums.values + row * a.head_dim + d, a.head_dim, ahead && row == 0 ? block.next_values : nullptr, d);
  }

  // Scores to weights 2^(steepness * (score - highest)), and the factors that earlier sums take.
  void weigh(const Block& block, int64_t first_key, int count, int num_vectors, const int64_t* positions, float* scores,
             A* weights, float* factors, const Sums& sums) {
    alignas(64) float highest[kGroupRows];
    alignas(64) float before[kGroupRows];
    i32x16 lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    for (int row = 0; row < count; ++row) {
      const int64_t visible = positions[row] + 1 - first_key;
      float* at = scores + row * kKeyBlock;
      f32x16 best = splat(sums.highest[row]);
      for (int v = 0; v < num_vectors; ++v) {
        f32x16 score = load(at + v * kLanes);
        if constexpr (sizeof(Page) == 1) score *= load(block.key_scales + v * kLanes);
        if (visible < (v + 1) * kLanes) {
          const int limit = static_cast<int>(larger<int64_t>(0, visible)) - v * kLanes;
          score = lanes < splat(limit) ? score : splat(-INFINITY);
        }
        store(at + v * kLanes, score);
        best = vmax(best, score);
      }
      before[row] = sums.highest[row];
      sums.highest[row] = highest[row] = max_lane(best);
    }
    for (int row = 0; row < count; row += kLanes)
      store(factors + row, exp2_below((load(before + row) - load(highest + row)) * splat(steepness)));
    for (int row = 0; row < count; ++row) {
      const f32x16 shift = splat(-highest[row] * steepness);
      f32x16 total = load(sums.total + row * kLanes) * splat(factors[row]);
      for (int v = 0; v < num_vectors; ++v) {
        f32x16 weight = exp2_below(fma(load(scores + row * kKeyBlock + v * kLanes), splat(steepness), shift));
        total += weight;
        if constexpr (sizeof(Page) == 1) weight *= load(block.value_scales + v * kLanes);
        store(weights + row * kKeyBlock + v * kLanes, weight);
      }
      store(sums.total + row * kLanes, total);
    }
  }

  void merge(const Tile& tile, const Sums& whole, const Sums& part) {
    for (int64_t r = 0; r < tile.num_tokens * group; ++r) {
      const float highest = larger(whole.highest[r], part.highest[r]);
      const f32x16 keep = exp2_below(splat((whole.highest[r] - highest) * steepness));
      const f32x16 add = exp2_below(splat((part.highest[r] - highest) * steepness));
      whole.highest[r] = highest;
      auto combine = [&](float* to, const float* from, int64_t size) {
        for (int64_t d = 0; d < size; d += kLanes) store(to + d, fma(load(from + d), add, load(to + d) * keep));
      };
      combine(whole.values + r * a.head_dim, part.values + r * a.head_dim, a.head_dim);
      combine(whole.total + r * kLanes, part.total + r * kLanes, kLanes);
    }
  }

  void finish(const Tile& tile, int64_t head, const Sums& sums) {
    for (int64_t r = 0; r < tile.num_tokens * group; ++r) {
      const int64_t row = (tile.first_token + r / group) * a.num_heads + head * group + r % group;
      const f32x16 inverse = splat(1.0f / sum(load(sums.total + r * kLanes)));
      const float* gate = a.q + row * query_stride + a.head_dim;
      for (int64_t d = 0; d < a.head_dim; d += kLanes) {
        f32x16 out = load(sums.values + r * a.head_dim + d) * inverse;
        if (a.has_gate) out *= sigmoid(load(gate + d));
        store(a.out + row * a.head_dim + d, out);
      }
    }
  }

  const AttentionArguments& a;
  const int64_t group;  // query heads of a KV head
  const int64_t query_stride;
  const float steepness;  // scale * log2(e)
  A* query = nullptr;     // [T, H, K] ready for the products
  Tile* tiles = nullptr;
  int64_t num_tiles = 0;
};

#if defined(__AVX512BF16__)
typedef bf16 Narrow;
#else
typedef float Narrow;
#endif

void mixer(const AttentionArguments& a) {
  switch (a.kind) {
    case PageKind::f32: return Mixer<float, float>(a).run();
    case PageKind::bf16: return Mixer<bf16, Narrow>(a).run();
    case PageKind::int8: return Mixer<int8_t, Narrow>(a).run();
  }
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels{mixer};

}  // namespace qnext::QNEXT_ISA
