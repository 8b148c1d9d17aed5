#include "delta.h"

#include "pool.h"
#include "simd.h"

namespace qnext::QNEXT_ISA {

extern const DeltaKernels delta_kernels;
const DeltaKernels delta_kernels{};

}  // namespace qnext::QNEXT_ISA
