// Registered memory for Python: the functions of the module that deal with the pool, and its tensors as DLPack.
#pragma once

#include "python/capsule.h"

namespace ringfold {

constexpr char kPoolName[] = "ringfold.pool";

PyObject* NewPool(PyObject*, PyObject*);
// allocate(pool, nbytes, dlpack code, dlpack bits, shape) -> dltensor capsule
PyObject* Allocate(PyObject*, PyObject* const* args, Py_ssize_t n);
// is_registered(pool, address, nbytes) -> bool
PyObject* IsRegistered(PyObject*, PyObject* const* args, Py_ssize_t n);
// pool_stats(pool) -> (reserved bytes, allocated bytes, regions)
PyObject* Stats(PyObject*, PyObject* capsule);

}  // namespace ringfold
