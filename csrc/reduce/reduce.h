// Elementwise reductions of vectors, at the speed of memory.
//
// Rounding: f32 and f64 round after each operation, in their own type. f16 and bf16 are widened to f32, reduced there over all sources of
// the call, and rounded once, to nearest even (NaN stays NaN, infinity and subnormals are right). Integers wrap. Bool: sum and max are
// "or", prod and min are "and", xor is "not equal". min and max give NaN where any source has one. Which NaN comes out of several is not specified.
//
// Pointers need no alignment. A destination may be exactly a source; vectors that overlap in any other way are not allowed.
// Nothing allocates, nothing throws.
#pragma once

#include <cstddef>

#include "common/dtype.h"

namespace ringfold {

// dst[i] = a[i] op b[i], then divided by `divisor` if that is more than 1. Avg is Sum here: the caller passes the divisor with the last
// operation. Floating point division is IEEE division; integers truncate toward zero.
void ReducePair(DType dtype, Reduction reduction, void* dst, const void* a, const void* b, size_t count, unsigned divisor);

// Every dst[i] = srcs[0][i] op srcs[1][i] op ... (from the left), then divided as in ReducePair. Each source is read once, each destination
// written once, all with the same bits. With one source this is a copy (and a division); with none, nothing happens.
void Fold(DType dtype, Reduction reduction, void* const* dsts, size_t n_dst, const void* const* srcs, size_t n_src, size_t count,
          unsigned divisor);

// dst[i] /= divisor, in place.
void Divide(DType dtype, void* dst, size_t count, unsigned divisor);

}  // namespace ringfold
