// Grouped-query attention over pages of keys and values, with its norms and rotary positions.
#pragma once

#include <cstdint>

#include "isa.h"

namespace qnext {

struct AttentionKernels {
};

}  // namespace qnext

QNEXT_DISPATCH(AttentionKernels, attention_kernels)
