#include "reduce/reduce.h"

#include <cstring>

#include "reduce/kernels.h"

namespace ringfold {
namespace {

using FoldFunction = void (*)(DType, Reduction, const FoldJob&);

FoldFunction Choose() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512::Fold;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return avx2::Fold;
#endif
  return baseline::Fold;
}

FoldFunction Chosen() {
  static const FoldFunction chosen = Choose();
  return chosen;
}

}  // namespace

void ReducePair(DType dtype, Reduction reduction, void* dst, const void* a, const void* b, size_t count, unsigned divisor) {
  const void* srcs[] = {a, b};
  Chosen()(dtype, reduction, {&dst, 1, srcs, 2, count, divisor});
}

void Fold(DType dtype, Reduction reduction, void* const* dsts, size_t n_dst, const void* const* srcs, size_t n_src, size_t count,
          unsigned divisor) {
  if (n_src == 0 || n_dst == 0 || count == 0) return;
  if (n_src > 1 || divisor > 1) return Chosen()(dtype, reduction, {dsts, n_dst, srcs, n_src, count, divisor});
  for (size_t d = 0; d < n_dst; ++d) {
    if (dsts[d] != srcs[0]) std::memcpy(dsts[d], srcs[0], count * SizeOf(dtype));
  }
}

void Divide(DType dtype, void* dst, size_t count, unsigned divisor) {
  const void* src = dst;
  if (divisor > 1) Chosen()(dtype, Reduction::Sum, {&dst, 1, &src, 1, count, divisor});
}

}  // namespace ringfold
