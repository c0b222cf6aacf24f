#include "python/handles.h"

namespace ringfold {

const std::shared_ptr<ContextHandle>* OpenContext(PyObject* capsule) {
  const auto* handle = FromCapsule<ContextHandle>(capsule, kContextName);
  if (handle != nullptr && (*handle)->closed) {
    PyErr_SetString(PyExc_RuntimeError, "the context is closed");
    return nullptr;
  }
  return handle;
}

const std::shared_ptr<CommunicatorHandle>* OpenCommunicator(PyObject* capsule) {
  const auto* handle = FromCapsule<CommunicatorHandle>(capsule, kCommunicatorName);
  if (handle == nullptr) return nullptr;
  if ((*handle)->closed || (*handle)->owner->closed || getpid() != (*handle)->owner->owner) {
    PyErr_SetString(PyExc_RuntimeError, "the communicator is closed");
    return nullptr;
  }
  return handle;
}

bool OwnerIsClosed(const WorkHandle& work) { return work.owner->closed || work.owner->owner->closed || getpid() != work.owner->owner->owner; }

bool ParseOffsets(PyObject* from, std::vector<uint64_t>* offsets) {
  if (from == Py_None) return true;
  char* bytes;
  Py_ssize_t nbytes;
  if (PyBytes_AsStringAndSize(from, &bytes, &nbytes) != 0) return false;
  const uint64_t* words = reinterpret_cast<const uint64_t*>(bytes);
  offsets->assign(words, words + static_cast<size_t>(nbytes) / sizeof(uint64_t));
  return true;
}

PyObject* Outcome(const Error& error) {
  if (error.ok()) Py_RETURN_NONE;
  return Py_BuildValue("(iis#)", static_cast<int>(error.code), error.peer, error.text.data(), static_cast<Py_ssize_t>(error.text.size()));
}

bool Finish(CommunicatorHandle* handle, const Operation& operation) {
  if (operation.finished()) return true;
  Context* context = handle->owner->context.get();
  for (;;) {
    bool finished;
    uint64_t waited_ns = 0;
    Py_BEGIN_ALLOW_THREADS;
    finished = context->Wait(operation, kSignalSlice, &waited_ns);
    Py_END_ALLOW_THREADS;
    handle->Waited(waited_ns);
    if (finished) return true;
    if (PyErr_CheckSignals() != 0) {
      Py_BEGIN_ALLOW_THREADS;
      context->Cancel(handle->communicator, "interrupted by a signal while it waited");
      Py_END_ALLOW_THREADS;
      return false;
    }
    if (handle->owner->closed) return true;
  }
}

}  // namespace ringfold
