// Every kernel of this processor against a scalar reference that shares no code with it: one element at a time, conversions by double
// arithmetic.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "reduce/kernels.h"
#include "reduce/reduce.h"
#include "test/check.h"

namespace ringfold {
namespace {

using FoldFunction = void (*)(DType, Reduction, const FoldJob&);

// Every instruction set that this processor has, and what the public function chose.
std::vector<FoldFunction> Kernels() {
  std::vector<FoldFunction> kernels = {baseline::Fold};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) kernels.push_back(avx2::Fold);
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    kernels.push_back(avx512::Fold);
  }
#endif
  kernels.push_back([](DType dtype, Reduction reduction, const FoldJob& job) {
    Fold(dtype, reduction, job.dsts, job.n_dst, job.srcs, job.n_src, job.count, job.divisor);
  });
  return kernels;
}

// ---- the reference

// A 16-bit float with this many mantissa bits and this smallest normal exponent.
struct Format {
  int mantissa;
  int smallest;
};
constexpr Format kF16 = {10, -14};
constexpr Format kBF16 = {7, -126};

float Decode(uint16_t bits, Format format) {
  const int exponent = (bits & 0x7fff) >> format.mantissa;
  const int fraction = bits & ((1 << format.mantissa) - 1);
  const int special = (0x7fff >> format.mantissa);
  double value = 0;
  if (exponent == special) {
    value = fraction != 0 ? std::nan("") : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    value = std::ldexp(fraction, format.smallest - format.mantissa);
  } else {
    value = std::ldexp(fraction + (1 << format.mantissa), exponent - 1 + format.smallest - format.mantissa);
  }
  return static_cast<float>((bits & 0x8000) != 0 ? -value : value);
}

uint16_t Encode(float value, Format format) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const int infinity = 0x7fff & ~((1 << format.mantissa) - 1);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | infinity | (1 << (format.mantissa - 1)));
  if (std::isinf(value)) return static_cast<uint16_t>(sign | infinity);
  int exponent = 0;
  std::frexp(value, &exponent);
  exponent = value == 0 ? format.smallest : std::max(exponent - 1, format.smallest);
  // Units of the last place; exact in double, rounded to even by the default mode.
  const double units = std::nearbyint(std::ldexp(std::fabs(static_cast<double>(value)), format.mantissa - exponent));
  const int biased = exponent - format.smallest;  // one less than the field of a normal number, whose leading bit adds the one
  return static_cast<uint16_t>(sign | std::min(infinity, (biased << format.mantissa) + static_cast<int>(units)));
}

template <class T>
T FoldScalar(Reduction reduction, T a, T b) {
  switch (reduction) {
    case Reduction::Sum:
    case Reduction::Avg:
      if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
      return a + b;
    case Reduction::Prod:
      if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
      return a * b;
    case Reduction::Min:
      if (a != a || b != b) return a != a ? a : b;
      return a < b ? a : b;
    case Reduction::Max:
      if (a != a || b != b) return a != a ? a : b;
      return a > b ? a : b;
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (reduction == Reduction::BitAnd) return static_cast<T>(a & b);
    if (reduction == Reduction::BitOr) return static_cast<T>(a | b);
    if (reduction == Reduction::BitXor) return static_cast<T>(a ^ b);
  }
  return T();
}

template <class T>
T DivideScalar(T value, unsigned divisor) {
  if (divisor <= 1) return value;
  if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<int64_t>(value) / static_cast<int64_t>(divisor));
  return value / static_cast<T>(divisor);
}

using Bytes = std::vector<unsigned char>;

// Element i of `bytes`, which begin at any address.
template <class T>
T At(const unsigned char* bytes, size_t i) {
  T value;
  std::memcpy(&value, bytes + i * sizeof(T), sizeof(T));
  return value;
}

template <class T>
void Put(Bytes* bytes, size_t i, T value) {
  std::memcpy(bytes->data() + i * sizeof(T), &value, sizeof(T));
}

template <class T>
void ReferencePlain(Reduction reduction, const std::vector<const unsigned char*>& srcs, size_t count, unsigned divisor, Bytes* out) {
  for (size_t i = 0; i < count; ++i) {
    T value = At<T>(srcs[0], i);
    for (size_t s = 1; s < srcs.size(); ++s) value = FoldScalar(reduction, value, At<T>(srcs[s], i));
    Put(out, i, DivideScalar(value, divisor));
  }
}

void ReferenceHalf(Format format, Reduction reduction, const std::vector<const unsigned char*>& srcs, size_t count, unsigned divisor,
                   Bytes* out) {
  for (size_t i = 0; i < count; ++i) {
    float value = Decode(At<uint16_t>(srcs[0], i), format);
    for (size_t s = 1; s < srcs.size(); ++s) value = FoldScalar(reduction, value, Decode(At<uint16_t>(srcs[s], i), format));
    Put(out, i, Encode(DivideScalar(value, divisor), format));
  }
}

void ReferenceBool(Reduction reduction, const std::vector<const unsigned char*>& srcs, size_t count, Bytes* out) {
  const bool all = reduction == Reduction::Min || reduction == Reduction::Prod || reduction == Reduction::BitAnd;
  const bool parity = reduction == Reduction::BitXor;
  for (size_t i = 0; i < count; ++i) {
    size_t trues = 0;
    for (const unsigned char* src : srcs) trues += src[i] != 0 ? 1 : 0;
    (*out)[i] = srcs.size() == 1 ? srcs[0][i] : parity ? trues % 2 : all ? trues == srcs.size() : trues > 0;
  }
}

Bytes Reference(DType dtype, Reduction reduction, const std::vector<const unsigned char*>& srcs, size_t count, unsigned divisor) {
  Bytes out(count * SizeOf(dtype));
  switch (dtype) {
    case DType::F32:
      ReferencePlain<float>(reduction, srcs, count, divisor, &out);
      break;
    case DType::F64:
      ReferencePlain<double>(reduction, srcs, count, divisor, &out);
      break;
    case DType::F16:
      ReferenceHalf(kF16, reduction, srcs, count, divisor, &out);
      break;
    case DType::BF16:
      ReferenceHalf(kBF16, reduction, srcs, count, divisor, &out);
      break;
    case DType::I32:
      ReferencePlain<int32_t>(reduction, srcs, count, divisor, &out);
      break;
    case DType::I64:
      ReferencePlain<int64_t>(reduction, srcs, count, divisor, &out);
      break;
    case DType::U8:
      ReferencePlain<uint8_t>(reduction, srcs, count, divisor, &out);
      break;
    case DType::I8:
      ReferencePlain<int8_t>(reduction, srcs, count, divisor, &out);
      break;
    case DType::I16:
      ReferencePlain<int16_t>(reduction, srcs, count, divisor, &out);
      break;
    case DType::Bool:
      ReferenceBool(reduction, srcs, count, &out);
      break;
  }
  return out;
}

bool IsNan(DType dtype, const unsigned char* bytes, size_t i) {
  switch (dtype) {
    case DType::F32:
      return std::isnan(At<float>(bytes, i));
    case DType::F64:
      return std::isnan(At<double>(bytes, i));
    case DType::F16:
      return std::isnan(Decode(At<uint16_t>(bytes, i), kF16));
    case DType::BF16:
      return std::isnan(Decode(At<uint16_t>(bytes, i), kBF16));
    default:
      return false;
  }
}

// Equal bits, or NaN in both places.
bool Same(DType dtype, const unsigned char* a, const unsigned char* b, size_t count) {
  const size_t size = SizeOf(dtype);
  for (size_t i = 0; i < count; ++i) {
    if (std::memcmp(a + i * size, b + i * size, size) != 0 && !(IsNan(dtype, a, i) && IsNan(dtype, b, i))) return false;
  }
  return true;
}

// ---- vectors

// Of exactly the needed length, `shift` bytes off any alignment: AddressSanitizer sees one byte too many.
struct Vector {
  Vector(size_t nbytes, size_t shift) : bytes(nbytes + shift), begin(bytes.data() + shift) {}
  Vector(const Vector& from) : bytes(from.bytes), begin(bytes.data() + (from.begin - from.bytes.data())) {}
  Vector& operator=(const Vector&) = delete;

  Bytes bytes;
  unsigned char* begin;
};

// Values of ordinary size, with random bits (NaN, infinity, subnormal, extremes) in one of eight places.
template <class T>
T Draw(DType dtype, std::mt19937_64* random) {
  const uint64_t bits = (*random)();
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  if (bits >> 61 == 0) return value;
  const double ordinary = static_cast<double>(static_cast<int64_t>(bits >> 20) % 4000 - 2000) / 64;
  if (dtype == DType::F16) return static_cast<T>(Encode(static_cast<float>(ordinary), kF16));
  if (dtype == DType::BF16) return static_cast<T>(Encode(static_cast<float>(ordinary), kBF16));
  if constexpr (std::is_floating_point_v<T>) return static_cast<T>(ordinary);
  return static_cast<T>(static_cast<int64_t>(ordinary));
}

void Fill(DType dtype, Vector* vector, std::mt19937_64* random) {
  const size_t count = (vector->bytes.size() - static_cast<size_t>(vector->begin - vector->bytes.data())) / SizeOf(dtype);
  for (size_t i = 0; i < count; ++i) {
    unsigned char* const at = vector->begin + i * SizeOf(dtype);
    const auto put = [at](auto value) { std::memcpy(at, &value, sizeof(value)); };
    switch (SizeOf(dtype)) {
      case 8:
        dtype == DType::F64 ? put(Draw<double>(dtype, random)) : put(Draw<int64_t>(dtype, random));
        break;
      case 4:
        dtype == DType::F32 ? put(Draw<float>(dtype, random)) : put(Draw<int32_t>(dtype, random));
        break;
      case 2:
        put(Draw<uint16_t>(dtype, random));
        break;
      default:
        put(static_cast<uint8_t>(dtype == DType::Bool ? (*random)() % 3 : (*random)()));
    }
  }
}

std::vector<Vector> Draws(DType dtype, size_t n, size_t count, std::mt19937_64* random) {
  std::vector<Vector> vectors;
  vectors.reserve(n);
  for (size_t s = 0; s < n; ++s) {
    vectors.emplace_back(count * SizeOf(dtype), (*random)() % 16);
    Fill(dtype, &vectors.back(), random);
  }
  return vectors;
}

std::vector<const unsigned char*> Begins(const std::vector<Vector>& vectors) {
  std::vector<const unsigned char*> begins;
  for (const Vector& vector : vectors) begins.push_back(vector.begin);
  return begins;
}

template <class Case>
void ForEveryCase(const Case& run) {
  for (unsigned dtype_code = 0; dtype_code < kDTypeCount; ++dtype_code) {
    for (unsigned reduction_code = 0; reduction_code < kReductionCount; ++reduction_code) {
      const auto dtype = static_cast<DType>(dtype_code);
      const auto reduction = static_cast<Reduction>(reduction_code);
      if (Supports(dtype, reduction)) run(dtype, reduction);
    }
  }
}

constexpr size_t kCounts[] = {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 1000, 4099};
constexpr unsigned kDivisors[] = {1, 2, 3, 4, 7, 300};

unsigned DivisorFor(DType dtype, size_t i) { return dtype == DType::Bool ? 1 : kDivisors[i % std::size(kDivisors)]; }

// ---- claims

void KnownConversionsHold() {
  CHECK(Encode(65504.0f, kF16) == 0x7bff && Encode(65519.0f, kF16) == 0x7bff && Encode(65520.0f, kF16) == 0x7c00);
  CHECK(Encode(0x1p-25f, kF16) == 0 && Encode(0x1.8p-25f, kF16) == 1 && Encode(-0x1p-24f, kF16) == 0x8001);
  CHECK(Encode(0x1.ffcp-15f, kF16) == 0x0400);
  CHECK(Encode(1.0f + 0x1p-8f, kBF16) == 0x3f80 && Encode(1.0f + 0x3p-8f, kBF16) == 0x3f82 && Encode(0x1.ffp127f, kBF16) == 0x7f80);
  for (unsigned bits = 0; bits < 65536; ++bits) {
    for (const Format format : {kF16, kBF16}) {
      const float value = Decode(static_cast<uint16_t>(bits), format);
      CHECK(std::isnan(value) ? std::isnan(Decode(Encode(value, format), format)) : Encode(value, format) == bits);
    }
  }
}

// Each of the 65,536 values, against factors that make the result fall anywhere between two values, below the smallest and above the
// largest.
void EveryHalfConvertsExactly() {
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  std::mt19937_64 random(1);
  for (const DType dtype : {DType::F16, DType::BF16}) {
    const Format format = dtype == DType::F16 ? kF16 : kBF16;
    for (int round = 0; round < 12; ++round) {
      std::vector<uint16_t> factors(all.size(), Encode(1.0f, format));
      if (round > 0) {
        for (auto& factor : factors) factor = round < 6 ? static_cast<uint16_t>(random()) : Draw<uint16_t>(dtype, &random);
      }
      const std::vector<const unsigned char*> srcs = {reinterpret_cast<const unsigned char*>(all.data()),
                                                      reinterpret_cast<const unsigned char*>(factors.data())};
      const Reduction reduction = round % 2 == 0 ? Reduction::Prod : Reduction::Sum;
      const Bytes expected = Reference(dtype, reduction, srcs, all.size(), 1);
      for (const FoldFunction kernel : Kernels()) {
        std::vector<uint16_t> result(all.size());
        void* dst = result.data();
        const void* from[] = {all.data(), factors.data()};
        kernel(dtype, reduction, {&dst, 1, from, 2, all.size(), 1});
        CHECK(Same(dtype, reinterpret_cast<const unsigned char*>(result.data()), expected.data(), all.size()));
      }
    }
  }
}

// Python code may have asked the processor to flush subnormals to zero (torch.set_flush_denormal).
void HalfSubnormalsSurviveFlushingToZero() {
#if defined(__x86_64__)
  std::vector<uint16_t> small(1024);
  for (size_t i = 0; i < small.size(); ++i) small[i] = static_cast<uint16_t>(i);
  const std::vector<uint16_t> zeros(1024);
  const unsigned before = _mm_getcsr();
  for (const FoldFunction kernel : Kernels()) {
    std::vector<uint16_t> result(1024);
    void* dst = result.data();
    const void* srcs[] = {small.data(), zeros.data()};
    _mm_setcsr(before | 0x8040);
    kernel(DType::F16, Reduction::Sum, {&dst, 1, srcs, 2, small.size(), 1});
    _mm_setcsr(before);
    CHECK(result == small);
  }
#endif
}

void FoldEqualsTheReference() {
  std::mt19937_64 random(2);
  ForEveryCase([&](DType dtype, Reduction reduction) {
    for (const size_t count : kCounts) {
      for (size_t n_src = 1; n_src <= 9; ++n_src) {
        if (count >= 1000 && n_src != 2 && n_src != 3 && n_src != 9) continue;
        const std::vector<Vector> srcs = Draws(dtype, n_src, count, &random);
        const unsigned divisor = DivisorFor(dtype, n_src + count);
        const Bytes expected = Reference(dtype, reduction, Begins(srcs), count, divisor);
        for (const FoldFunction kernel : Kernels()) {
          const size_t n_dst = 1 + random() % 3;
          const std::vector<Vector> dsts = Draws(DType::U8, n_dst, count * SizeOf(dtype), &random);
          std::vector<void*> to;
          for (const Vector& dst : dsts) to.push_back(dst.begin);
          const auto from = Begins(srcs);
          kernel(dtype, reduction, {to.data(), n_dst, reinterpret_cast<const void* const*>(from.data()), n_src, count, divisor});
          for (const Vector& dst : dsts) CHECK(Same(dtype, dst.begin, expected.data(), count));
          for (const Vector& dst : dsts) CHECK(count == 0 || std::memcmp(dst.begin, dsts[0].begin, count * SizeOf(dtype)) == 0);
        }
      }
    }
  });
}

// All sources are destinations, in another order, and there is one destination more.
void FoldWorksInPlace() {
  std::mt19937_64 random(3);
  ForEveryCase([&](DType dtype, Reduction reduction) {
    for (const size_t count : {size_t{5}, size_t{130}, size_t{1031}}) {
      for (size_t n_src = 1; n_src <= 5; ++n_src) {
        const std::vector<Vector> drawn = Draws(dtype, n_src, count, &random);
        const unsigned divisor = DivisorFor(dtype, n_src);
        const Bytes expected = Reference(dtype, reduction, Begins(drawn), count, divisor);
        for (const FoldFunction kernel : Kernels()) {
          std::vector<Vector> vectors(drawn);
          Vector extra(count * SizeOf(dtype), 1);
          const auto from = Begins(vectors);
          std::vector<void*> to;
          for (const Vector& vector : vectors) to.push_back(vector.begin);
          std::shuffle(to.begin(), to.end(), random);
          to.push_back(extra.begin);
          kernel(dtype, reduction, {to.data(), to.size(), reinterpret_cast<const void* const*>(from.data()), n_src, count, divisor});
          for (const void* dst : to) CHECK(Same(dtype, static_cast<const unsigned char*>(dst), expected.data(), count));
        }
      }
    }
  });
}

void ReducePairMayWriteOverEitherSource() {
  std::mt19937_64 random(4);
  ForEveryCase([&](DType dtype, Reduction reduction) {
    for (const size_t count : kCounts) {
      const unsigned divisor = DivisorFor(dtype, count);
      const std::vector<Vector> drawn = Draws(dtype, 2, count, &random);
      const Bytes expected = Reference(dtype, reduction, Begins(drawn), count, divisor);
      for (int target = 0; target < 3; ++target) {
        std::vector<Vector> vectors(drawn);
        Vector apart(count * SizeOf(dtype), 3);
        unsigned char* dst = target < 2 ? vectors[static_cast<size_t>(target)].begin : apart.begin;
        ReducePair(dtype, reduction, dst, vectors[0].begin, vectors[1].begin, count, divisor);
        CHECK(Same(dtype, dst, expected.data(), count));
      }
    }
  });
}

// Multiplying by 1/3 would differ in about a third of these.
void DivisionIsDivision() {
  std::mt19937_64 random(5);
  for (unsigned dtype = 0; dtype < kDTypeCount; ++dtype) {
    const auto type = static_cast<DType>(dtype);
    if (type == DType::Bool) continue;
    for (const unsigned divisor : {1u, 2u, 3u, 5u, 8u, 49u, 128u, 1000u, 65536u, 100003u}) {
      std::vector<Vector> drawn = Draws(type, 1, 1001, &random);
      const Bytes expected = Reference(type, Reduction::Sum, Begins(drawn), 1001, divisor);
      Divide(type, drawn[0].begin, 1001, divisor);
      CHECK(Same(type, drawn[0].begin, expected.data(), 1001));
    }
  }
  int32_t odd[] = {-7, 7, std::numeric_limits<int32_t>::min(), -1};
  Divide(DType::I32, odd, 4, 2);
  CHECK(odd[0] == -3 && odd[1] == 3 && odd[2] == std::numeric_limits<int32_t>::min() / 2 && odd[3] == 0);
}

void NothingToFoldTouchesNothing() {
  float value = 3;
  void* dst = &value;
  const void* src = &value;
  Fold(DType::F32, Reduction::Sum, &dst, 1, &src, 0, 1, 2);
  Fold(DType::F32, Reduction::Sum, &dst, 0, &src, 1, 1, 2);
  Fold(DType::F32, Reduction::Sum, &dst, 1, &src, 1, 0, 2);
  ReducePair(DType::F32, Reduction::Sum, nullptr, nullptr, nullptr, 0, 2);
  CHECK(value == 3);
}

void CodesAreNamedAndSized() {
  for (unsigned code = 0; code < 256; ++code) {
    CHECK(ValidDType(code) == (SizeOf(static_cast<DType>(code)) > 0));
    CHECK(ValidReduction(code) == (std::strcmp(NameOf(static_cast<Reduction>(code)), "unknown reduction") != 0));
  }
  CHECK(std::strcmp(NameOf(DType::BF16), "bfloat16") == 0 && SizeOf(DType::BF16) == 2 && !Supports(DType::Bool, Reduction::Avg));
}

}  // namespace
}  // namespace ringfold

int main() {
  using namespace ringfold;
  RUN(CodesAreNamedAndSized);
  RUN(KnownConversionsHold);
  RUN(EveryHalfConvertsExactly);
  RUN(HalfSubnormalsSurviveFlushingToZero);
  RUN(FoldEqualsTheReference);
  RUN(FoldWorksInPlace);
  RUN(ReducePairMayWriteOverEitherSource);
  RUN(DivisionIsDivision);
  RUN(NothingToFoldTouchesNothing);
  return 0;
}
