// One fold per instruction set. reduce.cpp picks one at run time; each is kernels_body.h compiled for its set.
#pragma once

#include <cstddef>

#include "common/dtype.h"

namespace ringfold {

// The arguments of Fold, with its promises: at least one source, at least one destination, divisor >= 1.
struct FoldJob {
  void* const* dsts;
  size_t n_dst;
  const void* const* srcs;
  size_t n_src;
  size_t count;
  unsigned divisor;
};

namespace baseline {
void Fold(DType dtype, Reduction reduction, const FoldJob& job);
}
#if defined(__x86_64__)
namespace avx2 {
void Fold(DType dtype, Reduction reduction, const FoldJob& job);
}
namespace avx512 {
void Fold(DType dtype, Reduction reduction, const FoldJob& job);
}
#endif

}  // namespace ringfold
