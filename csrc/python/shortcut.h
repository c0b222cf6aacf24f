// The short way of operations that were issued in the same form before: from the user's call to the core without a line of Python.
//
// A communicator's methods of such operations are C functions, which read the arguments and the tensors, find the form, note the call site, issue and
// wait. Whatever they do not know takes the long way, the Python method of the same name, which tells what it has done (`remember`).
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace ringfold {

// shortcut(communicator, row_of, torch.Tensor) -> capsule. row_of(frame): the row of a frame in the table of call sites, or its complement.
PyObject* NewShortcut(PyObject*, PyObject* const* args, Py_ssize_t n);
// remember(shortcut, operation, reduction, algorithm, dtype, root, count, program, op, dtype code, reduction code, offsets)
PyObject* Remember(PyObject*, PyObject* const* args, Py_ssize_t n);
// method(shortcut, operation, communicator as a weak reference, function) -> what is called instead of the function, without the communicator
PyObject* NewMethod(PyObject*, PyObject* const* args, Py_ssize_t n);

}  // namespace ringfold
