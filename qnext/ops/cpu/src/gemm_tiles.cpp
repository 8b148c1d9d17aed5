#include "gemm_tiles.h"

#include "isa.h"
#include "pool.h"

namespace qnext::QNEXT_ISA {

#if defined(__AVX512BF16__)  // every CPU with AMX multiplies bf16 too
namespace {

enum Slot : int { kBlocksSlot = 24, kPanelSlot };

constexpr int kTileRows = 16;                // rows of a block, whose sums stay in registers
constexpr int64_t kBlocksBytes = 512 << 10;  // of rows that are packed together: they stay in a level-2 cache

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Inputs of one multiplication of tiles: as many as divide a group.
int64_t piece_of(int64_t group_size) { return group_size % 64 == 0 ? 64 : group_size % 32 == 0 ? 32 : 16; }

// Tiles 0 to 3 take sums, 4 and 5 rows, 6 and 7 weights.
void configure(int num_rows, int64_t piece) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(i < 6 ? num_rows : piece / 4);
    config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? piece : 64);
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}

// One panel of sixteen outputs: a byte for every code, [D / 4][16][4], less their zero unless the weight has zeros.
struct Panel {
  const int8_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;  // or null
  ScaleKind scale_kind;
};

// Rows of a block, [D / piece][rows][piece], with what belongs to each group, [groups][rows].
struct Block {
  int8_t* codes;
  float* scales;
  int32_t* corrections;
};

struct Shape {
  int64_t num_inputs, num_groups, piece, pieces_of_group;
};

template <typename Number>
QNEXT_INLINE void copy_pieces(const int8_t* from, const Shape& shape, int num_rows, int8_t* to) {
  for (int64_t i = 0; i < shape.num_inputs / shape.piece; ++i)
    memcpy(to + i * num_rows * sizeof(Number), from + i * sizeof(Number), sizeof(Number));
}

void pack_row(const Rows& rows, int64_t row, const Shape& shape, int place, int num_rows, const Block& block) {
  const int8_t* from = rows.codes + row * shape.num_inputs;
  int8_t* to = block.codes + place * shape.piece;
  if (shape.piece == 64)
    copy_pieces<__m512i>(from, shape, num_rows, to);
  else if (shape.piece == 32)
    copy_pieces<__m256i>(from, shape, num_rows, to);
  else
    copy_pieces<__m128i>(from, shape, num_rows, to);
  for (int64_t g = 0; g < shape.num_groups; ++g) {
    block.scales[g * num_rows + place] = rows.scales[row * shape.num_groups + g];
    block.corrections[g * num_rows + place] = rows.corrections[row * shape.num_groups + g];
  }
}

void unpack_panel(const uint8_t* codes, int64_t num_inputs, bool is_packed, bool has_zeros, int8_t* to) {
  const uint8_t zero_code = has_zeros ? 0 : is_packed ? 8 : 128;
  const u8x64 zero = u8x64{} + zero_code;
  auto* bytes = reinterpret_cast<uint8_t*>(to);
  if (!is_packed) {
    for (int64_t i = 0; i < num_inputs / 4; ++i) store_bytes(bytes + 64 * i, load_bytes(codes + 64 * i) - zero);
    return;
  }
  const u8x64 low = u8x64{} + (uint8_t)15;
  for (int64_t i = 0; i < num_inputs / 8; ++i) {
    const u8x64 both = load_bytes(codes + 64 * i);
    store_bytes(bytes + 128 * i, (both & low) - zero);
    store_bytes(bytes + 128 * i + 64, ((u8x64)((u32x16)both >> 4) & low) - zero);
  }
}

// GCC's own functions take the number of a tile as text, which a template cannot give.
template <int kTile>
QNEXT_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
QNEXT_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1, %2, 1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
QNEXT_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1, %2, 1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}
template <int kSums, int kRows, int kCodes, bool kIsSigned>
QNEXT_INLINE void multiply_tiles() {
  if constexpr (kIsSigned)
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRows), "i"(kCodes));
  else
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRows), "i"(kCodes));
}

// Sums of the products of group `g` into sums[row][16], by tiles that are not those of the group before.
template <int kTurn, bool kHasZeros, int kRows>
QNEXT_INLINE void sum_group(const Panel& panel, const Block& block, const Shape& shape, int64_t g, int32_t* sums) {
  zero_tile<kTurn>();
  for (int64_t i = g * shape.pieces_of_group; i < (g + 1) * shape.pieces_of_group; ++i) {
    load_tile<4 + kTurn % 2>(block.codes + i * kRows * shape.piece, shape.piece);
    load_tile<6 + kTurn % 2>(panel.codes + i * shape.piece * kLanes, 64);
    multiply_tiles<kTurn, 4 + kTurn % 2, 6 + kTurn % 2, !kHasZeros>();
  }
  store_tile<kTurn>(sums, 64);
}

QNEXT_INLINE i32x16 load_sums(const int32_t* p) {
  i32x16 v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <bool kHasZeros, int kRows>
QNEXT_INLINE void add_group(const Panel& panel, const Block& block, int64_t g, const int32_t* sums, f32x16* acc) {
  const f32x16 scale = load_scales(panel.scale_kind, panel.scales, g * kLanes);
  i32x16 zeros{};
  if constexpr (kHasZeros) zeros = (i32x16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(panel.zeros + g * kLanes)));
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    i32x16 dots = load_sums(sums + r * kLanes);
    if constexpr (kHasZeros) dots += splat(block.corrections[g * kRows + r]) * zeros;
    acc[r] = fma(to_float(dots), scale * splat(block.scales[g * kRows + r]), acc[r]);
  }
}

// Products of kRows rows with one panel. The tiles of two groups are under way while those before them are added up.
template <bool kHasZeros, int kRows>
void multiply_block(const Panel& panel, const Block& block, const Shape& shape, f32x16* out) {
  alignas(64) int32_t sums[4][kRows * kLanes];
  f32x16 acc[kRows];
  for (int r = 0; r < kRows; ++r) acc[r] = splat(0.0f);
  const int64_t num_groups = shape.num_groups, whole = num_groups / 4 * 4;
  for (int64_t g = 0; g < whole; g += 4) {
    sum_group<0, kHasZeros, kRows>(panel, block, shape, g, sums[0]);
    sum_group<1, kHasZeros, kRows>(panel, block, shape, g + 1, sums[1]);
    sum_group<2, kHasZeros, kRows>(panel, block, shape, g + 2, sums[2]);
    sum_group<3, kHasZeros, kRows>(panel, block, shape, g + 3, sums[3]);
    for (int64_t i = 0; i < 4; ++i) add_group<kHasZeros, kRows>(panel, block, g + i, sums[i], acc);
  }
  for (int64_t g = whole; g < num_groups; ++g) {
    sum_group<0, kHasZeros, kRows>(panel, block, shape, g, sums[0]);
    add_group<kHasZeros, kRows>(panel, block, g, sums[0], acc);
  }
  for (int r = 0; r < kRows; ++r) out[r] = acc[r];
}

template <bool kHasZeros>
void multiply_any(int num_rows, const Panel& panel, const Block& block, const Shape& shape, f32x16* out) {
  switch (num_rows) {
    case 4: return multiply_block<kHasZeros, 4>(panel, block, shape, out);
    case 8: return multiply_block<kHasZeros, 8>(panel, block, shape, out);
    case 12: return multiply_block<kHasZeros, 12>(panel, block, shape, out);
    default: return multiply_block<kHasZeros, 16>(panel, block, shape, out);
  }
}

}  // namespace

bool tiles_serve(const Weight& weight, int64_t num_rows) {
  // From so many rows on they were measured to be faster than multiply_codes.
  if (active_isa() != Isa::avx512_amx || weight.group_size % 16 != 0) return false;
  return num_rows >= (piece_of(weight.group_size) == 64 ? 12 : 28);
}

void multiply_by_tiles(const Weight& weight, int64_t expert, int64_t begin, int64_t end, const Rows& rows,
                       const int32_t* index, int64_t num_rows, float* out, int64_t out_stride) {
  const bool is_packed = weight.kind == WeightKind::codes4;
  const ExpertPlace place = place_of(weight, expert);
  Shape shape{weight.num_inputs, weight.num_groups(), piece_of(weight.group_size), 0};
  shape.pieces_of_group = weight.group_size / shape.piece;
  // Blocks take about as many rows each, in fours.
  const int64_t num_blocks = (num_rows + kTileRows - 1) / kTileRows;
  const int block_rows = static_cast<int>(((num_rows + num_blocks - 1) / num_blocks + 3) / 4 * 4);
  const int64_t block_bytes = (block_rows * (shape.num_inputs + 8 * shape.num_groups) + 63) / 64 * 64;
  const int64_t at_once = larger<int64_t>(1, smaller(num_blocks, kBlocksBytes / block_bytes));
  auto* memory = static_cast<int8_t*>(scratch(kBlocksSlot, at_once * block_bytes));
  auto* unpacked = static_cast<int8_t*>(scratch(kPanelSlot, shape.num_inputs * kLanes));
  const auto block_at = [&](int64_t b) {
    int8_t* codes = memory + b * block_bytes;
    auto* scales = reinterpret_cast<float*>(codes + block_rows * shape.num_inputs);
    return Block{codes, scales, reinterpret_cast<int32_t*>(scales + block_rows * shape.num_groups)};
  };
  configure(block_rows, shape.piece);
  for (int64_t first = 0; first < num_rows; first += at_once * block_rows) {
    const int64_t count = smaller(at_once * block_rows, num_rows - first);
    const int64_t blocks = (count + block_rows - 1) / block_rows;
    for (int64_t r = 0; r < blocks * block_rows; ++r) {  // the last row again where there are no more
      const int64_t nth = first + smaller(r, count - 1);
      pack_row(rows, index ? index[nth] : nth, shape, static_cast<int>(r % block_rows), block_rows, block_at(r / block_rows));
    }
    for (int64_t column = begin; column < end; column += kLanes) {
      const int64_t number = column / kLanes, groups = number * shape.num_groups * kLanes;
      const int64_t codes_of_byte = is_packed ? 2 : 1;
      unpack_panel(place.data + number * shape.num_inputs * kLanes / codes_of_byte, shape.num_inputs, is_packed,
                   place.zeros != nullptr, unpacked);
      const Panel panel{unpacked, place.scales + groups * scale_bytes(weight.scale_kind),
                        place.zeros ? place.zeros + groups : nullptr, weight.scale_kind};
      const int64_t columns = smaller<int64_t>(kLanes, end - column);
      for (int64_t b = 0; b < blocks; ++b) {
        f32x16 result[kTileRows];
        if (panel.zeros)
          multiply_any<true>(block_rows, panel, block_at(b), shape, result);
        else
          multiply_any<false>(block_rows, panel, block_at(b), shape, result);
        const int64_t rows_left = smaller<int64_t>(block_rows, count - b * block_rows);
        for (int64_t r = 0; r < rows_left; ++r) {
          float* to = out + (first + b * block_rows + r) * out_stride + column;
          if (columns == kLanes)
            store(to, result[r]);
          else
            memcpy(to, &result[r], columns * sizeof(float));
        }
      }
    }
  }
  asm volatile("tilerelease");
}

#else
bool tiles_serve(const Weight&, int64_t) { return false; }
void multiply_by_tiles(const Weight&, int64_t, int64_t, int64_t, const Rows&, const int32_t*, int64_t, float*, int64_t) {}
#endif

}  // namespace qnext::QNEXT_ISA
