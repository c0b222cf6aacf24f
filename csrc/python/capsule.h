// What every binding needs: C++ objects held by Python capsules, and arguments taken apart.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <memory>
#include <utility>

namespace ringfold {

template <typename T>
void DeleteCapsule(PyObject* capsule) {
  delete static_cast<std::shared_ptr<T>*>(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
}

template <typename T>
PyObject* MakeCapsule(std::shared_ptr<T> value, const char* name) {
  return PyCapsule_New(new std::shared_ptr<T>(std::move(value)), name, DeleteCapsule<T>);
}

template <typename T>
const std::shared_ptr<T>* FromCapsule(PyObject* capsule, const char* name) {
  return static_cast<const std::shared_ptr<T>*>(PyCapsule_GetPointer(capsule, name));
}

inline bool Expect(Py_ssize_t given, Py_ssize_t wanted) {
  if (given == wanted) return true;
  PyErr_Format(PyExc_TypeError, "%zd arguments expected, %zd given", wanted, given);
  return false;
}

inline char* Address(PyObject* number) { return static_cast<char*>(PyLong_AsVoidPtr(number)); }

}  // namespace ringfold
