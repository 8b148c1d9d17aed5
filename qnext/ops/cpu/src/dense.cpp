// Blocks of b are packed into panels that are as wide as a tile; they stay in the level-2 cache. A tile of the result is
// held in registers while a few rows of a, which stay in the level-1 cache, run along a panel.
#include "dense.h"

#include "pool.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int kPanelSlot = 26, kRowsSlot = 27;
constexpr int kVectors = 2;                              // registers of a full panel
constexpr int kTileRows = kRegisterLanes == 16 ? 14 : 6;  // 32 registers on AVX-512, 16 elsewhere
constexpr int64_t kPanel = kVectors * kRegisterLanes;
constexpr int64_t kInnerBlock = 384;         // a tile's rows take half of the level-1 cache
constexpr int64_t kBlockNumbers = 1 << 17;   // of b: half of a level-2 cache of 1 MB
constexpr int64_t kPackedTiles = 8;          // tiles of a transposed a that are packed together
constexpr int64_t kCacheWay = 4096;          // bytes; rows as far apart displace each other in the level-1 cache

QNEXT_INLINE int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Length of the next of equal pieces of `left`, none longer than `most`.
QNEXT_INLINE int64_t next_piece(int64_t left, int64_t most) { return pieces(left, pieces(left, most)); }

template <int kHalf>
QNEXT_INLINE f32reg interleaved(f32reg a, f32reg b) {
#if defined(__clang__)
#define QNEXT_SHUFFLE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define QNEXT_SHUFFLE(...) __builtin_shuffle(a, b, i32reg{__VA_ARGS__})
#endif
#if defined(__AVX512F__)
  if constexpr (kHalf == 0)
    return QNEXT_SHUFFLE(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  else
    return QNEXT_SHUFFLE(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  if constexpr (kHalf == 0)
    return QNEXT_SHUFFLE(0, 8, 1, 9, 2, 10, 3, 11);
  else
    return QNEXT_SHUFFLE(4, 12, 5, 13, 6, 14, 7, 15);
#else
  if constexpr (kHalf == 0)
    return QNEXT_SHUFFLE(0, 4, 1, 5);
  else
    return QNEXT_SHUFFLE(2, 6, 3, 7);
#endif
#undef QNEXT_SHUFFLE
}

template <int kStep = 1>
QNEXT_INLINE void transpose(f32reg (&v)[kRegisterLanes]) {
  if constexpr (kStep < kRegisterLanes) {
    f32reg w[kRegisterLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kRegisterLanes / 2; ++i) {
      w[2 * i] = interleaved<0>(v[i], v[i + kRegisterLanes / 2]);
      w[2 * i + 1] = interleaved<1>(v[i], v[i + kRegisterLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRegisterLanes; ++i) v[i] = w[i];
    transpose<kStep * 2>(v);
  }
}

// to[k][lane] = from[lane * stride + k] for up to a register of lanes; missing lanes are zero.
void pack_transposed(const float* from, int64_t stride, int64_t lanes, int64_t inner, float* to, int64_t to_stride) {
  int64_t k = 0;
  if (lanes == kRegisterLanes)
    for (; k + kRegisterLanes <= inner; k += kRegisterLanes) {
      f32reg v[kRegisterLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kRegisterLanes; ++i) v[i] = load_register(from + i * stride + k);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kRegisterLanes; ++i) store(to + (k + i) * to_stride, v[i]);
    }
  for (; k < inner; ++k)
    for (int64_t i = 0; i < kRegisterLanes; ++i) to[k * to_stride + i] = i < lanes ? from[i * stride + k] : 0.0f;
}

QNEXT_INLINE int64_t width_of_panel(int64_t columns) { return columns > kRegisterLanes ? kPanel : kRegisterLanes; }

// Columns [0, columns) and rows [0, inner) of b, from its corner `from`, as panels [inner][width], padded with zeros.
void pack_panels(const Dense& b, const float* from, int64_t columns, int64_t inner, float* to) {
  for (int64_t n = 0; n < columns; n += kPanel) {
    const int64_t left = columns - n, width = width_of_panel(left);
    for (int64_t v = 0; v < width; v += kRegisterLanes) {
      const int64_t lanes = larger<int64_t>(0, smaller<int64_t>(kRegisterLanes, left - v));
      if (b.is_transposed) {
        pack_transposed(from + (n + v) * b.stride, b.stride, lanes, inner, to + v, width);
      } else if (lanes == kRegisterLanes) {
        for (int64_t k = 0; k < inner; ++k) store(to + k * width + v, load_register(from + k * b.stride + n + v));
      } else {
        for (int64_t k = 0; k < inner; ++k)
          for (int64_t i = 0; i < kRegisterLanes; ++i)
            to[k * width + v + i] = i < lanes ? from[k * b.stride + n + v + i] : 0.0f;
      }
    }
    to += inner * width;
  }
}

// What all tiles of a block share.
struct Block {
  int64_t inner;
  float* out;
  int64_t out_stride;
  bool adds;
};

// The numbers of a: packed [inner][kRows], or kRows rows as they lie.
template <int kRows, bool kIsPacked>
struct RowsOfA {
  const float* at[(kRows + 2) / 3];
  int64_t stride;

  QNEXT_INLINE RowsOfA(const float* a, int64_t stride) : stride(stride) {
    for (int i = 0; i < (kRows + 2) / 3; ++i) at[i] = kIsPacked ? a : a + 3 * i * stride;
  }
  QNEXT_INLINE float number(int row) const { return kIsPacked ? at[0][row] : at[row / 3][row % 3 * stride]; }
  QNEXT_INLINE void advance() {
    if constexpr (kIsPacked) {
      at[0] += kRows;
    } else {
      for (int i = 0; i < (kRows + 2) / 3; ++i) ++at[i];
    }
  }
};

template <int kRows, int kWidth, bool kIsPacked>
void tile(const Block& block, const float* a, int64_t a_stride, const float* panel, float* out, int64_t columns) {
  f32reg acc[kRows][kWidth];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kWidth; ++v) acc[r][v] = f32reg{};
  RowsOfA<kRows, kIsPacked> rows(a, a_stride);
  for (int64_t k = 0; k < block.inner; ++k) {
    f32reg b[kWidth];
#pragma GCC unroll 2
    for (int v = 0; v < kWidth; ++v) b[v] = load_register(panel + v * kRegisterLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const f32reg x = splat_register(rows.number(r));
#pragma GCC unroll 2
      for (int v = 0; v < kWidth; ++v) acc[r][v] = fma(x, b[v], acc[r][v]);
    }
    panel += kWidth * kRegisterLanes;
    rows.advance();
  }
  if (columns == kWidth * kRegisterLanes) {
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kWidth; ++v) {
        float* to = out + r * block.out_stride + v * kRegisterLanes;
        store(to, block.adds ? load_register(to) + acc[r][v] : acc[r][v]);
      }
    return;
  }
  float row[kWidth * kRegisterLanes];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kWidth; ++v) store(row + v * kRegisterLanes, acc[r][v]);
    float* to = out + r * block.out_stride;
    for (int64_t i = 0; i < columns; ++i) to[i] = block.adds ? to[i] + row[i] : row[i];
  }
}

// The rows of one tile with all panels of the block.
template <int kRows, bool kIsPacked>
void tiles(const Block& block, const float* a, int64_t a_stride, const float* panels, float* out, int64_t columns) {
  int64_t n = 0;
  for (; columns - n > kRegisterLanes; n += kPanel) {
    tile<kRows, kVectors, kIsPacked>(block, a, a_stride, panels, out + n, smaller(kPanel, columns - n));
    panels += block.inner * kPanel;
  }
  if (n < columns) tile<kRows, 1, kIsPacked>(block, a, a_stride, panels, out + n, columns - n);
}

template <bool kIsPacked, int kRows = kTileRows>
QNEXT_INLINE void tiles_of(int64_t rows, const Block& block, const float* a, int64_t a_stride, const float* panels,
                           float* out, int64_t columns) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tiles_of<kIsPacked, kRows - 1>(rows, block, a, a_stride, panels, out, columns);
  }
  tiles<kRows, kIsPacked>(block, a, a_stride, panels, out, columns);
}

// Rows [0, rows) of a transposed matrix as tiles [inner][rows of the tile]. Whole registers are copied: what they hold too
// much is written over by the next copy.
void pack_tiles(const float* a, int64_t stride, int64_t rows, int64_t inner, int64_t readable, float* to) {
  for (int64_t m = 0, count; m < rows; m += count) {
    count = next_piece(rows - m, kTileRows);
    for (int64_t k = 0; k < inner; ++k, to += count) {
      const int64_t at = k * stride + m;
      if (at + pieces(count, kRegisterLanes) * kRegisterLanes <= readable)
        for (int64_t r = 0; r < count; r += kRegisterLanes) store(to + r, load_register(a + at + r));
      else
        for (int64_t r = 0; r < count; ++r) to[r] = a[at + r];
    }
  }
}

// Rows [0, rows) of a, from its corner `a`, with the packed panels.
void multiply_block(const Block& block, const Dense& matrix, const float* a, int64_t rows, const float* panels,
                    int64_t columns) {
  constexpr int64_t kTogether = kPackedTiles * kTileRows;
  auto* packed = static_cast<float*>(scratch(kRowsSlot, (kTogether * kInnerBlock + kTileRows * kLanes) * sizeof(float)));
  const bool collides = matrix.stride * sizeof(float) % kCacheWay == 0;
  for (int64_t start = 0, together; start < rows; start += together) {
    together = matrix.is_transposed ? next_piece(rows - start, kTogether) : next_piece(rows - start, kTileRows);
    float* out = block.out + start * block.out_stride;
    if (!matrix.is_transposed) {
      const float* from = a + start * matrix.stride;
      int64_t stride = matrix.stride;
      if (collides) {
        stride = block.inner + kLanes;
        for (int64_t r = 0; r < together; ++r)
          memcpy(packed + r * stride, from + r * matrix.stride, block.inner * sizeof(float));
      }
      tiles_of<false>(together, block, collides ? packed : from, stride, panels, out, columns);
      continue;
    }
    const int64_t readable = (block.inner - 1) * matrix.stride + rows - start;
    pack_tiles(a + start, matrix.stride, together, block.inner, readable, packed);
    const float* at = packed;
    for (int64_t m = 0, count; m < together; m += count, at += count * block.inner) {
      count = next_piece(together - m, kTileRows);
      tiles_of<true>(count, block, at, 0, panels, out + m * block.out_stride, columns);
    }
  }
}

}  // namespace

void multiply_dense(const DenseSize& size, const Dense& a, const Dense& b, float* out, int64_t out_stride, bool adds) {
  if (size.inner == 0 && !adds)
    for (int64_t m = 0; m < size.rows; ++m) memset(out + m * out_stride, 0, size.columns * sizeof(float));
  for (int64_t k = 0, inner; k < size.inner; k += inner) {
    inner = next_piece(size.inner - k, kInnerBlock);
    const int64_t most = kBlockNumbers / inner / kPanel * kPanel;
    auto* panels = static_cast<float*>(scratch(kPanelSlot, (kBlockNumbers + kPanel * kInnerBlock) * sizeof(float)));
    for (int64_t n = 0; n < size.columns; n += most) {
      const int64_t columns = smaller(most, size.columns - n);
      pack_panels(b, b.data + (b.is_transposed ? n * b.stride + k : k * b.stride + n), columns, inner, panels);
      const Block block{inner, out + n, out_stride, adds || k > 0};
      multiply_block(block, a, a.data + (a.is_transposed ? k * a.stride : k), size.rows, panels, columns);
    }
  }
}

void multiply_dense_shared(const DenseSize& size, const Dense& a, const Dense& b, float* out, int64_t out_stride,
                           bool adds, bool is_shared) {
  if (!is_shared) return multiply_dense(size, a, b, out, out_stride, adds);
  // The longer side is cut, at whole tiles.
  const bool cuts_rows = size.rows >= size.columns;
  const int64_t unit = cuts_rows ? kTileRows : kPanel, length = cuts_rows ? size.rows : size.columns;
  const int64_t num_tasks = smaller<int64_t>(num_threads(), larger<int64_t>(1, length / unit));
  const int64_t share = pieces(pieces(length, num_tasks), unit) * unit;
  parallel_for(pieces(length, share), [&](int64_t task) {
    const int64_t start = task * share, count = smaller(share, length - start);
    if (cuts_rows) {
      const Dense part{a.data + start * (a.is_transposed ? 1 : a.stride), a.stride, a.is_transposed};
      multiply_dense({count, size.columns, size.inner}, part, b, out + start * out_stride, out_stride, adds);
    } else {
      const Dense part{b.data + start * (b.is_transposed ? b.stride : 1), b.stride, b.is_transposed};
      multiply_dense({size.rows, count, size.inner}, a, part, out + start, out_stride, adds);
    }
  });
}

}  // namespace qnext::QNEXT_ISA
