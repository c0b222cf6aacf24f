// The fold, written once over GCC vector types and compiled once per instruction set: kernels_*.cpp set RINGFOLD_ISA, _TARGET,
// _VECTOR_NBYTES and _F16C and include this. No include guard, for no one else includes it.
//
// A group of kUnroll vectors is accumulated in registers over all sources, then stored to all destinations. So each source is read once,
// each destination is written once, and every read of a group precedes its writes: a destination may be a source. Tails go through a
// zero-padded vector and the same code.
//
// Every function has the target attribute: a lambda or an undecorated function would be compiled for the baseline and not be inlined.

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__aarch64__)
#include <arm_neon.h>
#elif RINGFOLD_F16C
#include <immintrin.h>
#endif

#include "reduce/kernels.h"

#define RINGFOLD_INLINE RINGFOLD_TARGET inline __attribute__((always_inline))

namespace ringfold {
namespace RINGFOLD_ISA {
namespace {

constexpr size_t kVectorNBytes = RINGFOLD_VECTOR_NBYTES;
constexpr size_t kGroupNBytes = 256;  // of each source, if that is at most 8 vectors: half the registers of AVX2
// Measured on Sapphire Rapids, 64 MiB, in place: 1 to 4 KiB ahead is 5 to 10 % faster than none for f32, 20 to 25 % for 16-bit types.
// Prefetching for writing was no better, non-temporal stores a quarter slower.
constexpr size_t kPrefetchNBytes = 2048;

template <class T, size_t kLanes>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kLanes * sizeof(T))));
};

template <class V>
RINGFOLD_INLINE V LoadAs(const char* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V>
RINGFOLD_INLINE void StoreAs(char* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

// A codec says how elements lie in memory (kElement bytes each), as which vector they are computed with, and in which type sums wrap.

template <class T, class U>
struct Plain {
  static constexpr size_t kElement = sizeof(T);
  static constexpr size_t kLanes = kVectorNBytes / sizeof(T);
  using Scalar = T;
  using Vector = typename VectorOf<T, kLanes>::Type;
  using Wrapping = typename VectorOf<U, kLanes>::Type;

  static RINGFOLD_INLINE Vector Load(const char* from) { return LoadAs<Vector>(from); }
  static RINGFOLD_INLINE void Store(char* to, Vector v) { StoreAs<Vector>(to, v); }
};

using F32 = Plain<float, float>;
using F64 = Plain<double, double>;
using I32 = Plain<int32_t, uint32_t>;
using I64 = Plain<int64_t, uint64_t>;
using U8 = Plain<uint8_t, uint8_t>;
using I8 = Plain<int8_t, uint8_t>;
using I16 = Plain<int16_t, uint16_t>;

// Computes with f32; the memory holds 16 bits.
struct Half {
  static constexpr size_t kElement = 2;
  static constexpr size_t kLanes = kVectorNBytes / 4;
  using Scalar = float;
  using Vector = VectorOf<float, kLanes>::Type;
  using Wrapping = Vector;
  using Bits = VectorOf<uint32_t, kLanes>::Type;
  using Stored = VectorOf<uint16_t, kLanes>::Type;

  // The compiler's own conversion of these lengths goes by way of quarters.
#if RINGFOLD_VECTOR_NBYTES == 64
  static RINGFOLD_INLINE Bits LoadBits(const char* from) { return (Bits)_mm512_maskz_cvtepu16_epi32(0xffff, LoadAs<__m256i>(from)); }
  static RINGFOLD_INLINE void StoreBits(char* to, Bits bits) { StoreAs<__m256i>(to, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits)); }
#elif RINGFOLD_VECTOR_NBYTES == 32
  static RINGFOLD_INLINE Bits LoadBits(const char* from) { return (Bits)_mm256_cvtepu16_epi32(LoadAs<__m128i>(from)); }
  static RINGFOLD_INLINE void StoreBits(char* to, Bits bits) {
    const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);  // inside each half
    StoreAs<__m128i>(to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
  }
#else
  static RINGFOLD_INLINE Bits LoadBits(const char* from) { return __builtin_convertvector(LoadAs<Stored>(from), Bits); }
  static RINGFOLD_INLINE void StoreBits(char* to, Bits bits) { StoreAs<Stored>(to, __builtin_convertvector(bits, Stored)); }
#endif
};

struct BF16 : Half {
  static RINGFOLD_INLINE Vector Load(const char* from) { return (Vector)(LoadBits(from) << 16); }

  // Adding just under half of the last place, and one more if the result would be odd, carries exactly when rounding to nearest even
  // goes up. A NaN made of widened sources has 16 zeros at its end, so it loses nothing and nothing carries.
  static RINGFOLD_INLINE void Store(char* to, Vector v) {
    const Bits bits = (Bits)v;
    StoreBits(to, (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

#if defined(__aarch64__)

struct F16 : Half {
  static RINGFOLD_INLINE Vector Load(const char* from) { return (Vector)vcvt_f32_f16(LoadAs<float16x4_t>(from)); }
  static RINGFOLD_INLINE void Store(char* to, Vector v) { StoreAs<float16x4_t>(to, vcvt_f16_f32((float32x4_t)v)); }
};

#elif RINGFOLD_F16C

struct F16 : Half {
#if RINGFOLD_VECTOR_NBYTES == 64
  static RINGFOLD_INLINE Vector Load(const char* from) { return (Vector)_mm512_maskz_cvtph_ps(0xffff, LoadAs<__m256i>(from)); }
  static RINGFOLD_INLINE void Store(char* to, Vector v) {
    StoreAs<__m256i>(to, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static RINGFOLD_INLINE Vector Load(const char* from) { return (Vector)_mm256_cvtph_ps(LoadAs<__m128i>(from)); }
  static RINGFOLD_INLINE void Store(char* to, Vector v) { StoreAs<__m128i>(to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#endif
};

#else

// The same bits as the instructions of F16C give, also for NaN.
struct F16 : Half {
  static RINGFOLD_INLINE Vector Load(const char* from) {
    const Bits half = LoadBits(from);
    const Bits sign = (half & 0x8000) << 16;
    const Bits magnitude = half & 0x7fff;
    // Normal, infinite or NaN: move exponent and mantissa into place, and rebias by 112; the exponent 31 must become 255 (another 112).
    const Bits widened = (magnitude << 13) + (112u << 23);
    const Bits quiet = (Bits)(magnitude > 0x7c00) & 0x400000;
    const Bits normal = magnitude >= 0x7c00 ? (widened + (112u << 23)) | quiet : widened;
    // Subnormal: m * 2^-24 is exact as (0.5 + m * 2^-24) - 0.5, since 0.5 has its last place at 2^-24.
    const Bits subnormal = (Bits)((Vector)(magnitude | (126u << 23)) - 0.5f);
    return (Vector)(sign | (magnitude < 0x400 ? subnormal : normal));
  }

  static RINGFOLD_INLINE void Store(char* to, Vector v) {
    const Bits bits = (Bits)v;
    const Bits sign = (bits >> 16) & 0x8000;
    const Bits magnitude = bits & 0x7fffffff;
    // Normal result: rebias, then round to nearest even on the 13 bits that go. A carry out of the mantissa is the next exponent, up to
    // infinity.
    const Bits rounded = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14: adding 0.5 lets the processor round to multiples of 2^-24.
    const Bits subnormal = (Bits)((Vector)magnitude + 0.5f) - (126u << 23);
    const Bits infinity = (magnitude & 0) | 0x7c00;
    const Bits nan = ((magnitude >> 13) & 0x3ff) | 0x7e00;
    Bits half = magnitude < (113u << 23) ? subnormal : rounded;
    half = magnitude >= (143u << 23) ? infinity : half;
    half = v != v ? nan : half;
    StoreBits(to, half | sign);
  }
};

#endif

// Elements are 0 or not 0; results are 0 or 1.
struct Truth : U8 {};

struct Sum {
  template <class C>
  static RINGFOLD_INLINE typename C::Vector Apply(typename C::Vector a, typename C::Vector b) {
    using W = typename C::Wrapping;
    return (typename C::Vector)((W)a + (W)b);
  }
};

struct Prod {
  template <class C>
  static RINGFOLD_INLINE typename C::Vector Apply(typename C::Vector a, typename C::Vector b) {
    using W = typename C::Wrapping;
    return (typename C::Vector)((W)a * (W)b);
  }
};

// A NaN in `a` is kept by a != a; a NaN in `b` because no comparison with it holds.
struct Min {
  template <class C>
  static RINGFOLD_INLINE typename C::Vector Apply(typename C::Vector a, typename C::Vector b) {
    return ((a < b) | (a != a)) ? a : b;
  }
};

struct Max {
  template <class C>
  static RINGFOLD_INLINE typename C::Vector Apply(typename C::Vector a, typename C::Vector b) {
    return ((a > b) | (a != a)) ? a : b;
  }
};

struct Or {
  template <class C>
  static RINGFOLD_INLINE typename C::Vector Apply(typename C::Vector a, typename C::Vector b) {
    return (typename C::Vector)((a | b) != 0) & 1;
  }
};

struct And {
  template <class C>
  static RINGFOLD_INLINE typename C::Vector Apply(typename C::Vector a, typename C::Vector b) {
    return (typename C::Vector)((a != 0) & (b != 0)) & 1;
  }
};

struct BitAnd {
  template <class C>
  static RINGFOLD_INLINE typename C::Vector Apply(typename C::Vector a, typename C::Vector b) {
    return a & b;
  }
};

struct BitOr {
  template <class C>
  static RINGFOLD_INLINE typename C::Vector Apply(typename C::Vector a, typename C::Vector b) {
    return a | b;
  }
};

struct BitXor {
  template <class C>
  static RINGFOLD_INLINE typename C::Vector Apply(typename C::Vector a, typename C::Vector b) {
    return a ^ b;
  }
};

struct Differ {
  template <class C>
  static RINGFOLD_INLINE typename C::Vector Apply(typename C::Vector a, typename C::Vector b) {
    return (typename C::Vector)((a != 0) ^ (b != 0)) & 1;
  }
};

// Division by a power of two is multiplication by its exact reciprocal; any other divisor needs the division itself.
template <class C>
struct FloatDivider {
  using Scalar = typename C::Scalar;

  RINGFOLD_TARGET explicit FloatDivider(unsigned by)
      : divisor(static_cast<Scalar>(by)), reciprocal(1 / divisor), exact((by & (by - 1)) == 0) {}

  RINGFOLD_INLINE typename C::Vector Apply(typename C::Vector v) const { return exact ? v * reciprocal : v / divisor; }

  Scalar divisor;
  Scalar reciprocal;
  bool exact;
};

// No instruction set divides vectors of integers. 64 bits, since the divisor need not fit the elements' type.
template <class C>
struct IntegerDivider {
  RINGFOLD_TARGET explicit IntegerDivider(unsigned by) : divisor(by) {}

  RINGFOLD_TARGET __attribute__((noinline)) typename C::Vector Apply(typename C::Vector v) const {
    typename C::Scalar lanes[C::kLanes];
    std::memcpy(lanes, &v, sizeof(v));
    for (auto& lane : lanes) lane = static_cast<typename C::Scalar>(lane / divisor);
    std::memcpy(&v, lanes, sizeof(v));
    return v;
  }

  int64_t divisor;
};

template <class C>
using Divider = std::conditional_t<std::is_floating_point_v<typename C::Scalar>, FloatDivider<C>, IntegerDivider<C>>;

template <class C, class Op, size_t kVectors>
RINGFOLD_INLINE void FoldGroup(char* const* dsts, size_t n_dst, const char* const* srcs, size_t n_src, size_t at, bool divide,
                               const Divider<C>& divider) {
  constexpr size_t kStride = C::kLanes * C::kElement;
  if constexpr (kVectors > 1) {
    for (size_t s = 0; s < n_src; ++s) {
      for (size_t line = 0; line < kVectors * kStride; line += 64) __builtin_prefetch(srcs[s] + at + kPrefetchNBytes + line);
    }
  }
  typename C::Vector folded[kVectors];
#pragma GCC unroll 8
  for (size_t v = 0; v < kVectors; ++v) folded[v] = C::Load(srcs[0] + at + v * kStride);
  for (size_t s = 1; s < n_src; ++s) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) folded[v] = Op::template Apply<C>(folded[v], C::Load(srcs[s] + at + v * kStride));
  }
  if (divide) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) folded[v] = divider.Apply(folded[v]);
  }
  for (size_t d = 0; d < n_dst; ++d) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) C::Store(dsts[d] + at + v * kStride, folded[v]);
  }
}

// kSrc and kDst are the numbers of sources and destinations where they are known at compile time, else 0.
template <class C, class Op, size_t kSrc, size_t kDst>
RINGFOLD_TARGET void FoldAll(const FoldJob& job) {
  constexpr size_t kStride = C::kLanes * C::kElement;
  constexpr size_t kUnroll = kGroupNBytes / kStride < 8 ? kGroupNBytes / kStride : 8;
  const size_t n_src = kSrc != 0 ? kSrc : job.n_src;
  const size_t n_dst = kDst != 0 ? kDst : job.n_dst;
  const auto* dsts = reinterpret_cast<char* const*>(job.dsts);
  const auto* srcs = reinterpret_cast<const char* const*>(job.srcs);
  const bool divide = job.divisor > 1;
  const Divider<C> divider(job.divisor);
  const size_t nbytes = job.count * C::kElement;
  size_t at = 0;
  for (; nbytes - at >= kUnroll * kStride; at += kUnroll * kStride) {
    FoldGroup<C, Op, kUnroll>(dsts, n_dst, srcs, n_src, at, divide, divider);
  }
  for (; nbytes - at >= kStride; at += kStride) FoldGroup<C, Op, 1>(dsts, n_dst, srcs, n_src, at, divide, divider);
  if (at == nbytes) return;

  const size_t rest = nbytes - at;
  char padded[kStride] = {};
  std::memcpy(padded, srcs[0] + at, rest);
  typename C::Vector folded = C::Load(padded);
  for (size_t s = 1; s < n_src; ++s) {
    std::memcpy(padded, srcs[s] + at, rest);
    folded = Op::template Apply<C>(folded, C::Load(padded));
  }
  if (divide) folded = divider.Apply(folded);
  C::Store(padded, folded);
  for (size_t d = 0; d < n_dst; ++d) std::memcpy(dsts[d] + at, padded, rest);
}

template <class C, class Op>
RINGFOLD_TARGET void FoldWith(const FoldJob& job) {
  if constexpr (std::is_floating_point_v<typename C::Scalar> && std::is_same_v<Op, Sum>) {
    if (job.n_src == 2 && job.n_dst == 1) return FoldAll<C, Op, 2, 1>(job);
    if (job.n_src == 2 && job.n_dst == 2) return FoldAll<C, Op, 2, 2>(job);
  }
  FoldAll<C, Op, 0, 0>(job);
}

template <class C>
RINGFOLD_TARGET void FoldElements(Reduction reduction, const FoldJob& job) {
  switch (reduction) {
    case Reduction::Sum:
    case Reduction::Avg:
      return FoldWith<C, Sum>(job);
    case Reduction::Min:
      return FoldWith<C, Min>(job);
    case Reduction::Max:
      return FoldWith<C, Max>(job);
    case Reduction::Prod:
      return FoldWith<C, Prod>(job);
    default:
      break;
  }
  if constexpr (!std::is_floating_point_v<typename C::Scalar>) {  // Supports() keeps the bits of floating-point numbers away
    if (reduction == Reduction::BitAnd) return FoldWith<C, BitAnd>(job);
    if (reduction == Reduction::BitOr) return FoldWith<C, BitOr>(job);
    FoldWith<C, BitXor>(job);
  }
}

template <>
RINGFOLD_TARGET void FoldElements<Truth>(Reduction reduction, const FoldJob& job) {
  const bool all = reduction == Reduction::Min || reduction == Reduction::Prod || reduction == Reduction::BitAnd;
  if (reduction == Reduction::BitXor) return FoldWith<Truth, Differ>(job);
  if (all) return FoldWith<Truth, And>(job);
  FoldWith<Truth, Or>(job);
}

}  // namespace

RINGFOLD_TARGET void Fold(DType dtype, Reduction reduction, const FoldJob& job) {
  switch (dtype) {
    case DType::F32:
      return FoldElements<F32>(reduction, job);
    case DType::F64:
      return FoldElements<F64>(reduction, job);
    case DType::F16:
      return FoldElements<F16>(reduction, job);
    case DType::BF16:
      return FoldElements<BF16>(reduction, job);
    case DType::I32:
      return FoldElements<I32>(reduction, job);
    case DType::I64:
      return FoldElements<I64>(reduction, job);
    case DType::U8:
      return FoldElements<U8>(reduction, job);
    case DType::I8:
      return FoldElements<I8>(reduction, job);
    case DType::I16:
      return FoldElements<I16>(reduction, job);
    case DType::Bool:
      return FoldElements<Truth>(reduction, job);
  }
}

}  // namespace RINGFOLD_ISA
}  // namespace ringfold
