// The token mixer of Gated DeltaNet.
#pragma once

#include <cstdint>

#include "isa.h"

namespace qnext {

struct DeltaKernels {
};

}  // namespace qnext

QNEXT_DISPATCH(DeltaKernels, delta_kernels)
