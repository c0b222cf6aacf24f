#include "python/tensor.h"

#include <cstdint>

#include "python/capsule.h"

namespace ringfold {
namespace {

// dlpack.h 1.3, as far as it is used here; its layout is fixed within a major version.
struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  ExchangeApi* older;
  void* allocator;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void*, void*);
  void* current_stream;
};

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;

bool DTypeOf(const DLTensor& t, DType* dtype) {
  enum : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };
  if (t.lanes != 1) return false;
  switch (t.code << 8 | t.bits) {
    case kFloat << 8 | 32: *dtype = DType::F32; return true;
    case kFloat << 8 | 64: *dtype = DType::F64; return true;
    case kFloat << 8 | 16: *dtype = DType::F16; return true;
    case kBfloat << 8 | 16: *dtype = DType::BF16; return true;
    case kInt << 8 | 32: *dtype = DType::I32; return true;
    case kInt << 8 | 64: *dtype = DType::I64; return true;
    case kInt << 8 | 16: *dtype = DType::I16; return true;
    case kInt << 8 | 8: *dtype = DType::I8; return true;
    case kUInt << 8 | 8: *dtype = DType::U8; return true;
    case kBool << 8 | 8: *dtype = DType::Bool; return true;
    default: return false;
  }
}

// The number of elements of what has no gaps, else false.
bool CountOf(const DLTensor& t, size_t* count) {
  int64_t elements = 1;
  bool dense = true;
  for (int32_t d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] != 1 && t.strides != nullptr && t.strides[d] != elements) dense = false;
    elements *= t.shape[d];
  }
  *count = static_cast<size_t>(elements);
  return dense || elements == 0;
}

// The answer of a method without arguments, or of a property, is True.
bool Says(PyObject* object, const Reference& name, bool is_property) {
  const Reference answer(is_property ? PyObject_GetAttr(object, name.get()) : PyObject_CallMethodObjArgs(object, name.get(), nullptr));
  return answer.get() == Py_True;
}

}  // namespace

bool TensorReader::Init(PyObject* tensor_type) {
  type_ = Reference::To(tensor_type);
  const std::pair<Reference*, const char*> names[] = {{&dtype_, "dtype"},   {&is_cpu_, "is_cpu"}, {&is_contiguous_, "is_contiguous"},
                                                      {&is_neg_, "is_neg"}, {&numel_, "numel"},   {&data_ptr_, "data_ptr"}};
  for (const auto& [reference, name] : names) {
    *reference = Reference::Interned(name);
    if (reference->get() == nullptr) return false;
  }
  type_is_neg_ = Reference(PyObject_GetAttr(tensor_type, is_neg_.get()));
  const Reference capsule(PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__"));
  if (capsule.get() != nullptr) {
    const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
    if (api != nullptr && api->major == kMajor) describe_ = api->tensor_from_object;
  }
  PyErr_Clear();
  return true;
}

void TensorReader::Learn(PyObject* object, DType dtype) { dtypes_.try_emplace(object, Reference::To(object), dtype); }

bool TensorReader::Read(PyObject* tensor, TensorView* view) const {
  bool read;
  // A negated view (of a conjugate's imaginary part) has gaps, unless it is of one element.
  if (describe_ == nullptr || reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != type_.get()) {
    read = ReadAttributes(tensor, view) && (view->count != 1 || !Says(tensor, is_neg_, false));
  } else {
    DLTensor t;
    read = describe_(tensor, &t) == 0 && t.device_type == kCpu && DTypeOf(t, &view->dtype) && CountOf(t, &view->count);
    if (read && view->count == 1) read = Reference(PyObject_CallFunctionObjArgs(type_is_neg_.get(), tensor, nullptr)).get() == Py_False;
    if (read) view->data = static_cast<char*>(t.data) + t.byte_offset;
  }
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    return false;
  }
  return read;
}

bool TensorReader::ReadAttributes(PyObject* tensor, TensorView* view) const {
  if (!Says(tensor, is_contiguous_, false) || !Says(tensor, is_cpu_, true)) return false;
  const Reference numel(PyObject_CallMethodObjArgs(tensor, numel_.get(), nullptr));
  const Reference type(PyObject_GetAttr(tensor, dtype_.get()));
  const Reference address(PyObject_CallMethodObjArgs(tensor, data_ptr_.get(), nullptr));
  if (numel.get() == nullptr || type.get() == nullptr || address.get() == nullptr) return false;
  const auto known = dtypes_.find(type.get());
  if (known == dtypes_.end()) return false;
  *view = {Address(address.get()), PyLong_AsSize_t(numel.get()), known->second.second};
  return true;
}

}  // namespace ringfold
