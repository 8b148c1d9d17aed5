// What the machine can do at most: loops that only read, and loops that only multiply. For measuring, not for models.
#pragma once

#include <cstdint>

#include "isa.h"

namespace qnext {

enum class Arithmetic { fp32 = 0, bf16 = 1, int8 = 2 };

struct LimitKernels {
  // Reads `bytes` (a multiple of 64) from the first to the last; the result depends on every byte.
  uint64_t (*read)(const uint8_t* data, int64_t bytes);
  // Does `rounds` rounds of multiply-adds on registers alone and returns the operations done, a multiply-add counting
  // two; 0 where the CPU has no such instruction. `out` keeps the compiler from dropping the work.
  int64_t (*multiply)(Arithmetic kind, int64_t rounds, float* out);
};

}  // namespace qnext

QNEXT_DISPATCH(LimitKernels, limit_kernels)
