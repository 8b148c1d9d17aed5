// Rows times integer weights in panels of sixteen outputs, one lane each. Inside a group the products are exact
// integers; groups are added up in fp32 from the first to the last, whatever the shape of the tile.
#include "gemm.h"
#include "gemm_tiles.h"

namespace qnext::QNEXT_ISA {
namespace {

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

// What the next tiles read, asked for while this one is computed: memory is a stream only if somebody looks ahead. Tiles
// that share a weight ask for a part of every group each.
struct Ahead {
  const uint8_t* codes = nullptr;  // null: nothing
  const uint8_t* scales = nullptr;
  int64_t code_bytes = 0, scale_bytes = 0;  // per group
  int64_t first_byte = 0, end_byte = 0;     // of a group's codes

  // Tile number `turn` of `count`.
  void take_turn(int64_t turn, int64_t count) {
    first_byte = turn * (code_bytes / 64) / count * 64;
    end_byte = (turn + 1) * (code_bytes / 64) / count * 64;
  }

  QNEXT_INLINE void ask(int64_t group) const {
    if (codes == nullptr) return;
    for (int64_t i = first_byte; i < end_byte; i += 64) prefetch(codes + group * code_bytes + i);
    if (first_byte == 0) prefetch(scales + group * scale_bytes);
  }
};

#if defined(__AVX512VNNI__)
// A single row is bound by memory: panel after panel is one stream, whose start is always asked for in time.
QNEXT_INLINE int64_t parts_of_tile(int64_t num_rows, bool) { return num_rows == 1 ? 1 : 2; }

QNEXT_INLINE i32x16 load_zeros(const uint8_t* p) {
  return (i32x16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}

QNEXT_INLINE int32_t four(const int8_t* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return v;
}

// Products of kRows rows with kParts registers of outputs: panels. With kIsPacked a byte holds two 4-bit codes, otherwise one code.
template <bool kIsPacked, int kRows, int kParts>
void tile(const Panels& w, const TileRows& rows, const Ahead& ahead, f32x16 (*out)[kParts]) {
  constexpr int64_t kStep = kIsPacked ? 8 : 4;  // inputs in a register of codes
  constexpr int64_t kBlock = 32;                // inputs without a branch between them
  f32x16 acc[kRows][kParts];
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kParts; ++p) acc[r][p] = splat(0.0f);
  const int64_t num_groups = w.num_inputs / w.group_size;
  const uint8_t* at = w.codes;
  int64_t d = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    if constexpr (kRows > 1) ahead.ask(g);
    i32x16 dots[kRows][kParts];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      i32x16 correction = splat(rows.corrections[r][g]);
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        dots[r][p] = correction;
        if (w.zeros) dots[r][p] *= load_zeros(w.zeros + p * w.panel_scales + g * kLanes);
      }
    }
    const auto take = [&](int64_t step) __attribute__((always_inline)) {
      const int64_t input = d + step * kStep;
      u8x64 codes[kParts];
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        const uint8_t* from = at + p * w.panel_bytes + step * 64;
        if constexpr (kRows == 1) prefetch(from + kPrefetchBytes);
        codes[p] = load_bytes(from);
      }
      if constexpr (kIsPacked) {
        u8x64 low[kParts];
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) low[p] = codes[p] & (u8x64{} + (uint8_t)15);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
          for (int p = 0; p < kParts; ++p) dots[r][p] = dot_codes(dots[r][p], low[p], four(rows.codes[r] + input));
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) codes[p] = (u8x64)((u32x16)codes[p] >> 4) & (u8x64{} + (uint8_t)15);
      }
      const int64_t second = input + (kIsPacked ? 4 : 0);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) dots[r][p] = dot_codes(dots[r][p], codes[p], four(rows.codes[r] + second));
    };
    const int64_t end = d + w.group_size;
    for (; d + kBlock <= end; d += kBlock, at += 64 * (kBlock / kStep)) {
#pragma GCC unroll 8
      for (int64_t step = 0; step < kBlock / kStep; ++step) take(step);
    }
    for (; d < end; d += kStep, at += 64) take(0);
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) {
      f32x16 scale = load_scales(w.scale_kind, w.scales, p * w.panel_scales + g * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r)
        acc[r][p] = fma(to_float(dots[r][p]), scale * splat(rows.scales[r][g]), acc[r][p]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kParts; ++p) out[r][p] = acc[r][p];
}
#else
// Whole bytes take two sums each, which leaves no registers for a second part of six rows.
QNEXT_INLINE int64_t parts_of_tile(int64_t num_rows, bool is_packed) { return is_packed || num_rows <= 2 ? 2 : 1; }

QNEXT_INLINE i32reg load_zeros(const uint8_t* p) {
#if defined(__AVX2__)
  return (i32reg)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  i32reg zeros;
  for (int i = 0; i < kRegisterLanes; ++i) zeros[i] = p[i];
  return zeros;
#endif
}

// Products of kRows rows with kParts registers of outputs, neighbours in a panel. With kIsPacked a byte holds two 4-bit
// codes; otherwise one code, whose nibbles are multiplied apart: products of whole bytes would not fit into 16 bits.
template <bool kIsPacked, int kRows, int kParts>
void tile(const Panels& w, const TileRows& rows, const Ahead& ahead, f32reg (*out)[kParts]) {
  constexpr int64_t kInputsIn16Bits = 32;
  constexpr int kSums = kIsPacked ? 1 : 2;  // one for all nibbles, or those of low and high nibbles
  f32reg acc[kRows][kParts];
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kParts; ++p) acc[r][p] = f32reg{};
  const int64_t num_groups = w.num_inputs / w.group_size;
  const uint8_t* at = w.codes;
  int64_t d = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    if constexpr (kRows > 2) ahead.ask(g);
    i32reg dots[kRows][kParts];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        dots[r][p] = i32reg{} + rows.corrections[r][g];
        if (w.zeros) dots[r][p] *= load_zeros(w.zeros + g * kLanes + p * kRegisterLanes);
      }
    for (const int64_t group_end = d + w.group_size; d < group_end;) {
      i16reg sums[kRows][kParts][kSums];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p)
#pragma GCC unroll 2
          for (int s = 0; s < kSums; ++s) sums[r][p][s] = i16reg{};
      for (const int64_t end = smaller(group_end, d + kInputsIn16Bits); d < end; d += kIsPacked ? 8 : 4, at += 64) {
        if constexpr (kRows <= 2) prefetch(at + kPrefetchBytes);
        u8reg low[kParts], high[kParts];
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) {
          u8reg codes;
          memcpy(&codes, at + p * sizeof codes, sizeof codes);
          low[p] = codes & 15;
          high[p] = (u8reg)((u16reg)codes >> 4) & 15;
        }
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          const FourBytes x = four_bytes(rows.codes[r] + d);
          const FourBytes x_high = kIsPacked ? four_bytes(rows.codes[r] + d + 4) : x;
#pragma GCC unroll 2
          for (int p = 0; p < kParts; ++p) {
            sums[r][p][0] = dot_nibbles(sums[r][p][0], low[p], x);
            sums[r][p][kSums - 1] = dot_nibbles(sums[r][p][kSums - 1], high[p], x_high);
          }
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) {
          dots[r][p] += add_pairs(sums[r][p][0], 1);
          if constexpr (!kIsPacked) dots[r][p] += add_pairs(sums[r][p][1], 16);
        }
    }
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) {
      const f32reg scale = load_scales(w.scale_kind, w.scales, g * kLanes + p * kRegisterLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r)
        acc[r][p] = fma(__builtin_convertvector(dots[r][p], f32reg), scale * splat_register(rows.scales[r][g]), acc[r][p]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kParts; ++p) out[r][p] = acc[r][p];
}
#endif

struct Target {
  float* out;  // of the first row and the first column
  int64_t stride;
  int64_t num_columns;  // that are wanted, from the first on
};

template <bool kIsPacked, int kRows, int kParts>
void tile_to(const Panels& w, const TileRows& rows, const Ahead& ahead, const Target& target) {
  f32reg result[kRows][kParts];
  tile<kIsPacked, kRows, kParts>(w, rows, ahead, result);
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kParts; ++p) {
      int64_t columns = smaller<int64_t>(kRegisterLanes, target.num_columns - p * kRegisterLanes);
      float* place = target.out + r * target.stride + p * kRegisterLanes;
      if (columns == kRegisterLanes)
        store(place, result[r][p]);
      else if (columns > 0)
        memcpy(place, &result[r][p], columns * sizeof(float));
    }
}

template <bool kIsPacked, int kParts>
void tile_rows(int num_rows, const Panels& w, const TileRows& rows, const Ahead& ahead, const Target& target) {
  switch (num_rows) {
    case 1: return tile_to<kIsPacked, 1, kParts>(w, rows, ahead, target);
    case 2: return tile_to<kIsPacked, 2, kParts>(w, rows, ahead, target);
    case 3: return tile_to<kIsPacked, 3, kParts>(w, rows, ahead, target);
    case 4: return tile_to<kIsPacked, 4, kParts>(w, rows, ahead, target);
    case 5: return tile_to<kIsPacked, 5, kParts>(w, rows, ahead, target);
    default: return tile_to<kIsPacked, 6, kParts>(w, rows, ahead, target);
  }
}

template <int kParts>
void tile_any(bool is_packed, int num_rows, const Panels& w, const TileRows& rows, const Ahead& ahead,
              const Target& target) {
  if (is_packed)
    tile_rows<true, kParts>(num_rows, w, rows, ahead, target);
  else
    tile_rows<false, kParts>(num_rows, w, rows, ahead, target);
}

}  // namespace

void multiply_codes(const Weight& weight, int64_t expert, int64_t begin, int64_t end, const Rows& rows,
                    const int32_t* index, int64_t num_rows, float* out, int64_t out_stride) {
  if (tiles_serve(weight, num_rows))
    return multiply_by_tiles(weight, expert, begin, end, rows, index, num_rows, out, out_stride);
  const bool is_packed = weight.kind == WeightKind::codes4;
  const int64_t num_groups = weight.num_groups();
  const ExpertPlace place = place_of(weight, expert);
  Panels w{};
  w.num_inputs = weight.num_inputs;
  w.group_size = weight.group_size;
  w.scale_kind = weight.scale_kind;
  w.panel_scales = num_groups * kLanes;
  const int64_t panel_stride = w.panel_scales * scale_bytes(w.scale_kind);
  w.panel_bytes = weight.num_inputs * kLanes / (is_packed ? 2 : 1);
  const int64_t most_parts = parts_of_tile(num_rows, is_packed), step = most_parts * kRegisterLanes;
  const int64_t num_tiles = (num_rows + kMaxTileRows - 1) / kMaxTileRows;
  const int64_t panels_at_once = larger<int64_t>(1, step / kLanes);
  Ahead ahead;
  ahead.code_bytes = panels_at_once * w.panel_bytes / num_groups;
  ahead.scale_bytes = panels_at_once * kLanes * scale_bytes(w.scale_kind);
  for (int64_t column = begin; column < end; column += step) {
    const int64_t panel = column / kLanes, lane = column % kLanes;
    const int num_parts = most_parts == 2 && end - column > kRegisterLanes ? 2 : 1;
    w.codes = place.data + panel * w.panel_bytes + 4 * lane;
    w.scales = place.scales + panel * panel_stride + lane * scale_bytes(w.scale_kind);
    w.zeros = place.zeros ? place.zeros + panel * w.panel_scales + lane : nullptr;
    const bool has_next = lane == 0 && end - column > panels_at_once * kLanes;
    ahead.codes = has_next ? w.codes + panels_at_once * w.panel_bytes : nullptr;
    ahead.scales = w.scales + panels_at_once * panel_stride;
    int64_t turn = 0;
    for (int64_t first = 0, count; first < num_rows; first += count) {
      count = rows_of_tile(num_rows - first);
      ahead.take_turn(turn++, num_tiles);
      TileRows tile_of;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = index ? index[first + r] : first + r;
        tile_of.codes[r] = rows.codes + row * rows.num_inputs;
        tile_of.scales[r] = rows.scales + row * num_groups;
        tile_of.corrections[r] = rows.corrections + row * num_groups;
      }
      const Target target{out + first * out_stride + column, out_stride, end - column};
      if (num_parts == 2)
        tile_any<2>(is_packed, count, w, tile_of, ahead, target);
      else
        tile_any<1>(is_packed, count, w, tile_of, ahead, target);
    }
  }
}

}  // namespace qnext::QNEXT_ISA
