// Products of many rows with integer weights on the tile registers of a CPU with AMX.
#pragma once

#include "gemm.h"

namespace qnext::QNEXT_ISA {

constexpr int64_t kTileColumns = 256;  // outputs of a task: enough to pay for packing its rows

// Whether tiles are there and pay for so many rows.
bool tiles_serve(const Weight& weight, int64_t num_rows);

// What multiply_codes gives, bit for bit: inside a group the products are exact integers in any order, and groups are
// added up in the same order by the same roundings.
void multiply_by_tiles(const Weight& weight, int64_t expert, int64_t begin, int64_t end, const Rows& rows,
                       const int32_t* index, int64_t num_rows, float* out, int64_t out_stride);

}  // namespace qnext::QNEXT_ISA
