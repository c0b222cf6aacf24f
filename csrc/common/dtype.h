// Element types and reductions, by the codes that Python's ops.py and the wire use.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ringfold {

enum class DType : uint8_t {
  F32 = 0,
  F64 = 1,
  F16 = 2,
  BF16 = 3,
  I32 = 4,
  I64 = 5,
  U8 = 6,
  I8 = 7,
  I16 = 8,
  Bool = 9,
};

enum class Reduction : uint8_t {
  Sum = 0,
  Avg = 1,
  Min = 2,
  Max = 3,
  Prod = 4,
  BitAnd = 5,
  BitOr = 6,
  BitXor = 7,
};

constexpr uint8_t kDTypeCount = 10;
constexpr uint8_t kReductionCount = 8;

// Codes come from Python and from peers: ask before casting.
constexpr bool ValidDType(unsigned code) { return code < kDTypeCount; }
constexpr bool ValidReduction(unsigned code) { return code < kReductionCount; }

constexpr bool IsFloating(DType dtype) { return dtype == DType::F32 || dtype == DType::F64 || dtype == DType::F16 || dtype == DType::BF16; }
constexpr bool IsBitwise(Reduction reduction) { return reduction >= Reduction::BitAnd; }

// Every pair is defined but the average of truth values and the bits of floating-point numbers.
constexpr bool Supports(DType dtype, Reduction reduction) {
  return !(dtype == DType::Bool && reduction == Reduction::Avg) && !(IsFloating(dtype) && IsBitwise(reduction));
}

// Bytes of one element.
constexpr size_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::F64:
    case DType::I64:
      return 8;
    case DType::F32:
    case DType::I32:
      return 4;
    case DType::F16:
    case DType::BF16:
    case DType::I16:
      return 2;
    case DType::U8:
    case DType::I8:
    case DType::Bool:
      return 1;
  }
  return 0;
}

// Names as torch writes them, for messages.
constexpr const char* NameOf(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return "float32";
    case DType::F64:
      return "float64";
    case DType::F16:
      return "float16";
    case DType::BF16:
      return "bfloat16";
    case DType::I32:
      return "int32";
    case DType::I64:
      return "int64";
    case DType::U8:
      return "uint8";
    case DType::I8:
      return "int8";
    case DType::I16:
      return "int16";
    case DType::Bool:
      return "bool";
  }
  return "unknown dtype";
}

constexpr const char* NameOf(Reduction reduction) {
  switch (reduction) {
    case Reduction::Sum:
      return "sum";
    case Reduction::Avg:
      return "avg";
    case Reduction::Min:
      return "min";
    case Reduction::Max:
      return "max";
    case Reduction::Prod:
      return "prod";
    case Reduction::BitAnd:
      return "band";
    case Reduction::BitOr:
      return "bor";
    case Reduction::BitXor:
      return "bxor";
  }
  return "unknown reduction";
}

}  // namespace ringfold
