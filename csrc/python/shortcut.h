// The short way of an operation that was issued in the same form before: same operation, reduction, algorithm, root, dtype and count.
//
// What Python looks up and checks for a small operation takes longer than the operation. The first of a form goes that way and is remembered; for every
// later one a single call asks the tensors what may have changed (dtype, device, layout, count, address), finds the form and runs it.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace ringfold {

// shortcut(communicator, row_of) -> shortcut; `row_of(frame)` is CallSites.row_of, whose answers are kept here too
PyObject* NewShortcut(PyObject*, PyObject* const* args, Py_ssize_t n);
// remember(shortcut, operation, reduction, algorithm, dtype, root, count, program, three codes, offsets or None)
PyObject* Remember(PyObject*, PyObject* const* args, Py_ssize_t n);
// again(shortcut, operation, reduction, algorithm, root, input or None, output or None, timeout seconds, caller's frame) -> NotImplemented if it has to
// go the long way, None for success, else an outcome
PyObject* Again(PyObject*, PyObject* const* args, Py_ssize_t n);

}  // namespace ringfold
