#include "attention.h"

#include "pool.h"
#include "simd.h"

namespace qnext::QNEXT_ISA {

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels{};

}  // namespace qnext::QNEXT_ISA
