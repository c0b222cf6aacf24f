// The Python module ringfold._core: plain functions over capsules, limited API, so that one binary serves every Python from 3.11.
//
// Only collectives/_native.py imports it and knows the argument lists. Failures of an operation come back as (code, world rank, text); misuse raises.
// The GIL is released wherever a call may wait.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <vector>

#include "common/deadline.h"
#include "executor/context.h"
#include "executor/program.h"
#include "python/capsule.h"
#include "python/memory.h"

namespace ringfold {
namespace {

constexpr char kContextName[] = "ringfold.context";
constexpr char kCommunicatorName[] = "ringfold.communicator";
constexpr char kWorkName[] = "ringfold.work";
// Python's signal handlers run at least this often during a wait.
constexpr uint64_t kSignalSlice = 50 * kMillisecond;

struct ContextHandle {
  std::shared_ptr<Pool> pool;
  std::unique_ptr<Context> context;
  pid_t owner = getpid();
  uint64_t waited_ns = 0;
  bool closed = false;

  ~ContextHandle() {
    // A forked child has neither the thread nor the right to the descriptors' numbers.
    if (getpid() != owner) [[maybe_unused]] auto* leaked = context.release();
  }
};

struct CommunicatorHandle {
  std::shared_ptr<ContextHandle> owner;
  Communicator* communicator;
  uint64_t waited_ns = 0;
  bool closed = false;
};

struct WorkHandle {
  std::shared_ptr<CommunicatorHandle> owner;
  std::shared_ptr<Operation> operation;
};

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

// None for success, else (code, world rank at fault or -1, text).
PyObject* Outcome(const Error& error) {
  if (error.ok()) Py_RETURN_NONE;
  return Py_BuildValue("(iis#)", static_cast<int>(error.code), error.peer, error.text.data(), static_cast<Py_ssize_t>(error.text.size()));
}

uint64_t Nanoseconds(PyObject* seconds) { return static_cast<uint64_t>(PyFloat_AsDouble(seconds) * 1e9); }

// Waits with the GIL released, letting signal handlers run. False with an exception set if one of them raised.
bool Finish(CommunicatorHandle* handle, const Operation& operation) {
  if (operation.finished()) return true;
  Context* context = handle->owner->context.get();
  for (;;) {
    bool finished;
    uint64_t waited_ns;
    Py_BEGIN_ALLOW_THREADS;
    const uint64_t start = NowNs();
    finished = context->Wait(operation, start + kSignalSlice);
    waited_ns = NowNs() - start;
    Py_END_ALLOW_THREADS;
    handle->waited_ns += waited_ns;
    handle->owner->waited_ns += waited_ns;
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

// --- context ------------------------------------------------------------------------------------------------------------------------

// context(pool, rank, size, label, page fd (taken), spin seconds)
PyObject* NewContext(PyObject*, PyObject* args) {
  PyObject* pool_capsule;
  int rank, size, page_fd;
  const char* label;
  double spin_s;
  if (!PyArg_ParseTuple(args, "Oiisid", &pool_capsule, &rank, &size, &label, &page_fd, &spin_s)) return nullptr;
  const auto* pool = FromCapsule<Pool>(pool_capsule, kPoolName);
  if (pool == nullptr) return nullptr;
  auto handle = std::make_shared<ContextHandle>();
  handle->pool = *pool;
  handle->context = std::make_unique<Context>(rank, size, label, page_fd, static_cast<uint64_t>(spin_s * 1e9), pool->get());
  return MakeCapsule(std::move(handle), kContextName);
}

// add_peer(context, rank, socket fd (taken), near, label)
PyObject* AddPeer(PyObject*, PyObject* args) {
  PyObject* capsule;
  int peer, fd, near;
  const char* label;
  if (!PyArg_ParseTuple(args, "Oiiis", &capsule, &peer, &fd, &near, &label)) return nullptr;
  const auto* handle = OpenContext(capsule);
  if (handle == nullptr) return nullptr;
  (*handle)->context->AddPeer(peer, fd, near != 0, label);
  Py_RETURN_NONE;
}

PyObject* Start(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 2)) return nullptr;
  const auto* handle = OpenContext(args[0]);
  if (handle == nullptr) return nullptr;
  const uint64_t timeout_ns = Nanoseconds(args[1]);
  Error error;
  Py_BEGIN_ALLOW_THREADS;
  error = (*handle)->context->Start(timeout_ns);
  Py_END_ALLOW_THREADS;
  return Outcome(error);
}

// close_context(context, farewell): without a farewell the peers take it for a death, as they should where this rank has failed
PyObject* CloseContext(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 2)) return nullptr;
  const auto* handle = FromCapsule<ContextHandle>(args[0], kContextName);
  if (handle == nullptr) return nullptr;
  const bool farewell = PyObject_IsTrue(args[1]) != 0;
  if (!(*handle)->closed && getpid() == (*handle)->owner) {
    (*handle)->closed = true;
    Py_BEGIN_ALLOW_THREADS;
    (*handle)->context->Close(farewell);
    Py_END_ALLOW_THREADS;
  }
  Py_RETURN_NONE;
}

PyObject* Forked(PyObject*, PyObject* capsule) {
  const auto* handle = FromCapsule<ContextHandle>(capsule, kContextName);
  if (handle == nullptr) return nullptr;
  if (!(*handle)->closed) (*handle)->context->Forked();
  (*handle)->closed = true;
  Py_RETURN_NONE;
}

// --- communicator -------------------------------------------------------------------------------------------------------------------

// communicator(context, id, name, members)
PyObject* NewCommunicator(PyObject*, PyObject* args) {
  PyObject* capsule;
  unsigned id;
  const char* name;
  PyObject* members;
  if (!PyArg_ParseTuple(args, "OIsO!", &capsule, &id, &name, &PyTuple_Type, &members)) return nullptr;
  const auto* context = OpenContext(capsule);
  if (context == nullptr) return nullptr;
  std::vector<int> ranks;
  for (Py_ssize_t i = 0; i < PyTuple_Size(members); ++i) ranks.push_back(static_cast<int>(PyLong_AsLong(PyTuple_GetItem(members, i))));
  if (PyErr_Occurred()) return nullptr;
  auto handle = std::make_shared<CommunicatorHandle>();
  handle->owner = *context;
  handle->communicator = (*context)->context->AddCommunicator(id, name, std::move(ranks));
  return MakeCapsule(std::move(handle), kCommunicatorName);
}

// add_socket(communicator, peer, lane, fd (taken))
PyObject* AddSocket(PyObject*, PyObject* args) {
  PyObject* capsule;
  int peer, lane, fd;
  if (!PyArg_ParseTuple(args, "Oiii", &capsule, &peer, &lane, &fd)) return nullptr;
  const auto* handle = OpenCommunicator(capsule);
  if (handle == nullptr) return nullptr;
  (*handle)->communicator->AddSocket(peer, static_cast<Lane>(lane), fd);
  Py_RETURN_NONE;
}

// open(communicator, ring bytes, timeout seconds)
PyObject* Open(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 3)) return nullptr;
  const auto* handle = OpenCommunicator(args[0]);
  if (handle == nullptr) return nullptr;
  const size_t ring_nbytes = PyLong_AsSize_t(args[1]);
  const uint64_t timeout_ns = Nanoseconds(args[2]);
  Error error;
  Py_BEGIN_ALLOW_THREADS;
  error = (*handle)->owner->context->Open((*handle)->communicator, ring_nbytes, timeout_ns);
  Py_END_ALLOW_THREADS;
  return Outcome(error);
}

PyObject* Drop(PyObject*, PyObject* capsule) {
  const auto* handle = FromCapsule<CommunicatorHandle>(capsule, kCommunicatorName);
  if (handle == nullptr) return nullptr;
  if (!(*handle)->closed && !(*handle)->owner->closed) {
    (*handle)->closed = true;
    Py_BEGIN_ALLOW_THREADS;
    (*handle)->owner->context->Drop((*handle)->communicator);
    Py_END_ALLOW_THREADS;
  }
  Py_RETURN_NONE;
}

// program(communicator, bytes of Schedule.compile()) -> number
PyObject* AddProgram(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 2)) return nullptr;
  const auto* handle = OpenCommunicator(args[0]);
  if (handle == nullptr) return nullptr;
  char* bytes;
  Py_ssize_t nbytes;
  if (PyBytes_AsStringAndSize(args[1], &bytes, &nbytes) != 0) return nullptr;
  std::string why;
  auto program = Program::Parse(bytes, static_cast<size_t>(nbytes), (*handle)->communicator->size(), &why);
  if (program == nullptr) {
    PyErr_SetString(PyExc_ValueError, why.c_str());
    return nullptr;
  }
  return PyLong_FromSize_t((*handle)->owner->context->Keep((*handle)->communicator, std::move(program)));
}

// (communicator, program, op, dtype, reduction, root, count, offsets or None, input, output, timeout seconds)
constexpr Py_ssize_t kRequestArguments = 11;

bool ParseRequest(PyObject* const* args, Communicator* communicator, Request* request) {
  request->program = communicator->program(PyLong_AsSize_t(args[1]));
  request->op = static_cast<OpCode>(PyLong_AsLong(args[2]));
  request->dtype = static_cast<DType>(PyLong_AsLong(args[3]));
  request->reduction = static_cast<Reduction>(PyLong_AsLong(args[4]));
  request->root = static_cast<int>(PyLong_AsLong(args[5]));
  request->count = PyLong_AsSize_t(args[6]);
  if (args[7] != Py_None) {
    char* bytes;
    Py_ssize_t nbytes;
    if (PyBytes_AsStringAndSize(args[7], &bytes, &nbytes) != 0) return false;
    const uint64_t* offsets = reinterpret_cast<const uint64_t*>(bytes);
    request->offsets.assign(offsets, offsets + static_cast<size_t>(nbytes) / sizeof(uint64_t));
  }
  request->input = Address(args[8]);
  request->output = Address(args[9]);
  request->timeout_ns = Nanoseconds(args[10]);
  if (PyErr_Occurred()) return false;
  const bool sane = request->program != nullptr && ValidDType(static_cast<unsigned>(request->dtype)) &&
                    ValidReduction(static_cast<unsigned>(request->reduction)) &&
                    (request->offsets.empty() || request->offsets.size() == request->program->chunks + 1);
  if (!sane) PyErr_SetString(PyExc_ValueError, "malformed request");
  return sane;
}

PyObject* Run(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, kRequestArguments)) return nullptr;
  const auto* handle = OpenCommunicator(args[0]);
  Request request;
  if (handle == nullptr || !ParseRequest(args, (*handle)->communicator, &request)) return nullptr;
  std::shared_ptr<Operation> operation;
  Context* context = (*handle)->owner->context.get();
  Py_BEGIN_ALLOW_THREADS;
  operation = context->Issue((*handle)->communicator, std::move(request), -1, true);
  Py_END_ALLOW_THREADS;
  if (!Finish(handle->get(), *operation)) return nullptr;
  return Outcome(operation->error());
}

PyObject* Begin(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, kRequestArguments)) return nullptr;
  const auto* handle = OpenCommunicator(args[0]);
  Request request;
  if (handle == nullptr || !ParseRequest(args, (*handle)->communicator, &request)) return nullptr;
  std::shared_ptr<Operation> operation;
  Py_BEGIN_ALLOW_THREADS;
  operation = (*handle)->owner->context->Issue((*handle)->communicator, std::move(request), -1, false);
  Py_END_ALLOW_THREADS;
  return MakeCapsule(std::make_shared<WorkHandle>(WorkHandle{*handle, std::move(operation)}), kWorkName);
}

// message(communicator, is send, peer, dtype, count, address, timeout seconds) -> work
PyObject* Message(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 7)) return nullptr;
  const auto* handle = OpenCommunicator(args[0]);
  if (handle == nullptr) return nullptr;
  const bool is_send = PyObject_IsTrue(args[1]) != 0;
  const int peer = static_cast<int>(PyLong_AsLong(args[2]));
  Request request;
  request.op = is_send ? OpCode::kSend : OpCode::kRecv;
  request.dtype = static_cast<DType>(PyLong_AsLong(args[3]));
  request.count = PyLong_AsSize_t(args[4]);
  request.output = Address(args[5]);
  request.timeout_ns = Nanoseconds(args[6]);
  if (PyErr_Occurred()) return nullptr;
  Communicator* communicator = (*handle)->communicator;
  if (peer < 0 || peer >= communicator->size() || peer == communicator->rank() || !ValidDType(static_cast<unsigned>(request.dtype))) {
    PyErr_SetString(PyExc_ValueError, "malformed message");
    return nullptr;
  }
  std::shared_ptr<Operation> operation;
  Py_BEGIN_ALLOW_THREADS;
  operation = (*handle)->owner->context->Issue(communicator, std::move(request), peer, false);
  Py_END_ALLOW_THREADS;
  return MakeCapsule(std::make_shared<WorkHandle>(WorkHandle{*handle, std::move(operation)}), kWorkName);
}

PyObject* WaitWork(PyObject*, PyObject* capsule) {
  const auto* work = FromCapsule<WorkHandle>(capsule, kWorkName);
  if (work == nullptr || !Finish((*work)->owner.get(), *(*work)->operation)) return nullptr;
  return Outcome((*work)->operation->error());
}

PyObject* WorkDone(PyObject*, PyObject* capsule) {
  const auto* work = FromCapsule<WorkHandle>(capsule, kWorkName);
  return work == nullptr ? nullptr : PyBool_FromLong((*work)->operation->finished());
}

PyObject* WaitedSeconds(PyObject*, PyObject* capsule) {
  const auto* handle = FromCapsule<CommunicatorHandle>(capsule, kCommunicatorName);
  return handle == nullptr ? nullptr : PyFloat_FromDouble(static_cast<double>((*handle)->waited_ns) / 1e9);
}

PyObject* WaitedSecondsInAll(PyObject*, PyObject* capsule) {
  const auto* handle = FromCapsule<ContextHandle>(capsule, kContextName);
  return handle == nullptr ? nullptr : PyFloat_FromDouble(static_cast<double>((*handle)->waited_ns) / 1e9);
}

PyCFunction Fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef kMethods[] = {
    {"pool", NewPool, METH_NOARGS, nullptr},
    {"allocate", Fast(Allocate), METH_FASTCALL, nullptr},
    {"is_registered", Fast(IsRegistered), METH_FASTCALL, nullptr},
    {"pool_stats", Stats, METH_O, nullptr},
    {"context", NewContext, METH_VARARGS, nullptr},
    {"add_peer", AddPeer, METH_VARARGS, nullptr},
    {"start", Fast(Start), METH_FASTCALL, nullptr},
    {"close_context", Fast(CloseContext), METH_FASTCALL, nullptr},
    {"forked", Forked, METH_O, nullptr},
    {"communicator", NewCommunicator, METH_VARARGS, nullptr},
    {"add_socket", AddSocket, METH_VARARGS, nullptr},
    {"open", Fast(Open), METH_FASTCALL, nullptr},
    {"drop", Drop, METH_O, nullptr},
    {"program", Fast(AddProgram), METH_FASTCALL, nullptr},
    {"run", Fast(Run), METH_FASTCALL, nullptr},
    {"begin", Fast(Begin), METH_FASTCALL, nullptr},
    {"message", Fast(Message), METH_FASTCALL, nullptr},
    {"wait", WaitWork, METH_O, nullptr},
    {"done", WorkDone, METH_O, nullptr},
    {"waited_seconds", WaitedSeconds, METH_O, nullptr},
    {"waited_seconds_in_all", WaitedSecondsInAll, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "ringfold._core", "The C++ core of ringfold.", 0, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace ringfold

PyMODINIT_FUNC PyInit__core(void) { return PyModule_Create(&ringfold::kModule); }
