// Products of fp32 matrices whose numbers are new in every step of a training, so nothing is prepared ahead.
#pragma once

#include <cstdint>

#include "simd.h"
#include "train_weights.h"

namespace qnext::QNEXT_ISA {

// out = a b, or out += a b. Every number of the result is summed in one order, which `inner` alone decides. Computed by
// the calling thread; its buffers are in the caller's scratch.
void multiply_dense(const DenseSize& size, const Dense& a, const Dense& b, float* out, int64_t out_stride, bool adds);

// The same, shared among the threads of the pool where `is_shared`; the bits are the same.
void multiply_dense_shared(const DenseSize& size, const Dense& a, const Dense& b, float* out, int64_t out_stride,
                           bool adds, bool is_shared);

}  // namespace qnext::QNEXT_ISA
