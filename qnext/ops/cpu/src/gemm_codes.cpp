// Rows times integer weights in panels of sixteen outputs, one lane each. Inside a group the products are exact
// integers; groups are added up in fp32 from the first to the last, whatever the shape of the tile.
#include "gemm.h"
#include "pool.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int kUnpackedSlot = 0;

struct Panels {
  const uint8_t* codes;
  int64_t panel_bytes;
  const uint8_t* scales;
  int64_t panel_scales;  // scales, and zeros, of a panel
  const uint8_t* zeros;
  ScaleKind scale_kind;
  int64_t num_inputs, group_size;
};

struct TileRows {
  const int8_t* codes[kMaxTileRows];
  const float* scales[kMaxTileRows];
  const int32_t* corrections[kMaxTileRows];
};

QNEXT_INLINE int64_t scale_bytes(ScaleKind kind) { return kind == ScaleKind::f32 ? 4 : 2; }

QNEXT_INLINE f32x16 load_scales(const uint8_t* base, ScaleKind kind, int64_t at) {
  if (kind == ScaleKind::bf16) return load(reinterpret_cast<const bf16*>(base) + at);
  if (kind == ScaleKind::f16) return load(reinterpret_cast<const f16*>(base) + at);
  return load(reinterpret_cast<const float*>(base) + at);
}

QNEXT_INLINE i32x16 load_zeros(const uint8_t* p) {
#if defined(__AVX512F__)
  return (i32x16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  typedef uint8_t u8x16 __attribute__((vector_size(16)));
  u8x16 v;
  memcpy(&v, p, 16);
  return __builtin_convertvector(v, i32x16);
#endif
}

QNEXT_INLINE int32_t four(const int8_t* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return v;
}

// Products of kRows rows with kPanels panels. With kIsPacked a byte holds two 4-bit codes, otherwise one code.
template <bool kIsPacked, int kRows, int kPanels>
void tile(const Panels& w, const TileRows& rows, f32x16 (*out)[kPanels]) {
  f32x16 acc[kRows][kPanels];
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) acc[r][p] = splat(0.0f);
  const int64_t num_groups = w.num_inputs / w.group_size;
  const uint8_t* at = w.codes;
  int64_t d = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    i32x16 dots[kRows][kPanels];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      i32x16 correction = splat(rows.corrections[r][g]);
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        dots[r][p] = correction;
        if (w.zeros) dots[r][p] *= load_zeros(w.zeros + p * w.panel_scales + g * kLanes);
      }
    }
    for (const int64_t end = d + w.group_size; d < end; d += kIsPacked ? 8 : 4, at += 64) {
      u8x64 codes[kPanels];
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        const uint8_t* from = at + p * w.panel_bytes;
        if constexpr (kRows <= 2) prefetch(from + kPrefetchBytes);
        codes[p] = load_bytes(from);
      }
      if constexpr (kIsPacked) {
        u8x64 low[kPanels];
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) low[p] = codes[p] & (u8x64{} + (uint8_t)15);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
          for (int p = 0; p < kPanels; ++p) dots[r][p] = dot_codes(dots[r][p], low[p], four(rows.codes[r] + d));
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) codes[p] = (u8x64)((u32x16)codes[p] >> 4) & (u8x64{} + (uint8_t)15);
      }
      const int64_t second = d + (kIsPacked ? 4 : 0);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) dots[r][p] = dot_codes(dots[r][p], codes[p], four(rows.codes[r] + second));
    }
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      f32x16 scale = load_scales(w.scales, w.scale_kind, p * w.panel_scales + g * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r)
        acc[r][p] = fma(to_float(dots[r][p]), scale * splat(rows.scales[r][g]), acc[r][p]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) out[r][p] = acc[r][p];
}

struct Target {
  float* out;  // of the first row and the first panel
  int64_t stride;
  int64_t num_columns;  // that are wanted, from the first panel on
};

template <bool kIsPacked, int kRows, int kPanels>
void tile_to(const Panels& w, const TileRows& rows, const Target& target) {
  f32x16 result[kRows][kPanels];
  tile<kIsPacked, kRows, kPanels>(w, rows, result);
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) {
      int64_t columns = smaller<int64_t>(kLanes, target.num_columns - p * kLanes);
      float* place = target.out + r * target.stride + p * kLanes;
      if (columns == kLanes)
        store(place, result[r][p]);
      else
        memcpy(place, &result[r][p], columns * sizeof(float));
    }
}

template <bool kIsPacked, int kPanels>
void tile_rows(int num_rows, const Panels& w, const TileRows& rows, const Target& target) {
  switch (num_rows) {
    case 1: return tile_to<kIsPacked, 1, kPanels>(w, rows, target);
    case 2: return tile_to<kIsPacked, 2, kPanels>(w, rows, target);
    case 3: return tile_to<kIsPacked, 3, kPanels>(w, rows, target);
    case 4: return tile_to<kIsPacked, 4, kPanels>(w, rows, target);
    case 5: return tile_to<kIsPacked, 5, kPanels>(w, rows, target);
    default: return tile_to<kIsPacked, 6, kPanels>(w, rows, target);
  }
}

template <int kPanels>
void tile_any(bool is_packed, int num_rows, const Panels& w, const TileRows& rows, const Target& target) {
  if (is_packed)
    tile_rows<true, kPanels>(num_rows, w, rows, target);
  else
    tile_rows<false, kPanels>(num_rows, w, rows, target);
}

// 4-bit codes to one code per byte, in the order of 8-bit panels.
void unpack(const uint8_t* packed, int64_t bytes, uint8_t* codes) {
  const u8x64 mask = u8x64{} + (uint8_t)15;
  for (int64_t i = 0; i < bytes; i += 64) {
    u8x64 v = load_bytes(packed + i);
    store_bytes(codes + 2 * i, v & mask);
    store_bytes(codes + 2 * i + 64, (u8x64)((u32x16)v >> 4) & mask);
  }
}

}  // namespace

void multiply_codes(const Weight& weight, int64_t expert, int64_t begin, int64_t end, const Rows& rows,
                    const int32_t* index, int64_t num_rows, float* out, int64_t out_stride) {
  const bool is_packed_on_disk = weight.kind == WeightKind::codes4;
  const int64_t num_groups = weight.num_groups();
  Panels w{};
  w.num_inputs = weight.num_inputs;
  w.group_size = weight.group_size;
  w.scale_kind = weight.scale_kind;
  w.panel_scales = num_groups * kLanes;
  const int64_t stored_bytes = weight.num_inputs * kLanes / (is_packed_on_disk ? 2 : 1);
  const int64_t panel_stride = w.panel_scales * scale_bytes(w.scale_kind);
  const bool unpack_first = is_packed_on_disk && num_rows > 2 * kMaxTileRows;
  const bool is_packed = is_packed_on_disk && !unpack_first;
  uint8_t* unpacked = nullptr;
  if (unpack_first) unpacked = static_cast<uint8_t*>(scratch(kUnpackedSlot, 4 * stored_bytes));
  w.panel_bytes = unpack_first ? 2 * stored_bytes : stored_bytes;
  // A single row is bound by memory: panel after panel is one stream, whose start is always asked for in time.
  const int64_t step = num_rows == 1 ? kLanes : 2 * kLanes;
  for (int64_t column = begin; column < end; column += step) {
    const int64_t panel = expert * weight.num_panels() + column / kLanes;
    const int num_panels = step > kLanes && end - column > kLanes ? 2 : 1;
    w.codes = static_cast<const uint8_t*>(weight.data) + panel * stored_bytes;
    w.scales = static_cast<const uint8_t*>(weight.scales) + panel * panel_stride;
    w.zeros = weight.zeros ? weight.zeros + panel * w.panel_scales : nullptr;
    if (unpack_first) {
      unpack(w.codes, num_panels * stored_bytes, unpacked);
      w.codes = unpacked;
    }
    for (int64_t first = 0; first < num_rows; first += kMaxTileRows) {
      const int count = static_cast<int>(smaller<int64_t>(kMaxTileRows, num_rows - first));
      TileRows tile_of;
      for (int r = 0; r < count; ++r) {
        const int64_t row = index ? index[first + r] : first + r;
        tile_of.codes[r] = rows.codes + row * rows.num_inputs;
        tile_of.scales[r] = rows.scales + row * num_groups;
        tile_of.corrections[r] = rows.corrections + row * num_groups;
      }
      const Target target{out + first * out_stride + column, out_stride, end - column};
      if (num_panels == 2)
        tile_any<2>(is_packed, count, w, tile_of, target);
      else
        tile_any<1>(is_packed, count, w, tile_of, target);
    }
  }
}

}  // namespace qnext::QNEXT_ISA
