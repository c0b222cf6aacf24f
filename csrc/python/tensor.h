// What the core needs to know of a torch tensor: where its memory is, how much, of which dtype. No torch header is included.
//
// torch 2.10 and later say it by one C call (DLPack 1.3's exchange interface, found as an attribute of torch.Tensor); of an older torch, and of what is a
// subclass, Python attributes are asked, which takes ten times as long.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstddef>
#include <unordered_map>
#include <utility>

#include "common/dtype.h"

namespace ringfold {

// A reference to a Python object, given up with the GIL held.
class Reference {
 public:
  explicit Reference(PyObject* stolen = nullptr) : object_(stolen) {}
  Reference(Reference&& from) noexcept : object_(std::exchange(from.object_, nullptr)) {}
  Reference& operator=(Reference&& from) noexcept {
    std::swap(object_, from.object_);
    return *this;
  }
  ~Reference() { Py_XDECREF(object_); }
  static Reference To(PyObject* borrowed) {
    Py_XINCREF(borrowed);
    return Reference(borrowed);
  }
  // The one string of these characters: what Python's own literals are, so that they are compared by identity.
  static Reference Interned(const char* text) { return Reference(PyUnicode_InternFromString(text)); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

struct TensorView {
  char* data;
  size_t count;
  DType dtype;
};

class TensorReader {
 public:
  // False with an exception set.
  bool Init(PyObject* tensor_type);

  // torch's object for a dtype, which the attributes give; it is kept.
  void Learn(PyObject* object, DType dtype);

  // Whether the core can work on the tensor's memory as it is. No exception is left behind.
  bool Read(PyObject* tensor, TensorView* view) const;

 private:
  bool ReadAttributes(PyObject* tensor, TensorView* view) const;

  Reference type_, dtype_, is_cpu_, is_contiguous_, is_neg_, numel_, data_ptr_;
  Reference type_is_neg_;  // the method itself, which is found faster
  std::unordered_map<PyObject*, std::pair<Reference, DType>> dtypes_;
  int (*describe_)(void*, void*) = nullptr;  // DLPack's DLTensor of a Python object
};

}  // namespace ringfold
