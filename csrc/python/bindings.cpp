// The Python module ringfold._core: plain functions over capsules, limited API, so that one binary serves every Python from 3.11.
//
// Only collectives/_native.py imports it and knows the argument lists. Failures of an operation come back as (code, world rank, text); misuse raises.
// The GIL is released wherever a call may wait.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <memory>
#include <string>
#include <vector>

#include "common/deadline.h"
#include "executor/context.h"
#include "executor/program.h"
#include "python/capsule.h"
#include "python/handles.h"
#include "python/memory.h"
#include "python/shortcut.h"

namespace ringfold {
namespace {

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

// (communicator, program, op, dtype, reduction, root, count, offsets or None, of OUTPUT where they differ or None, input, output, timeout seconds,
// call site)
constexpr Py_ssize_t kRequestArguments = 13;

bool ParseRequest(PyObject* const* args, Communicator* communicator, Request* request) {
  request->program = communicator->program(PyLong_AsSize_t(args[1]));
  request->op = static_cast<OpCode>(PyLong_AsLong(args[2]));
  request->dtype = static_cast<DType>(PyLong_AsLong(args[3]));
  request->reduction = static_cast<Reduction>(PyLong_AsLong(args[4]));
  request->root = static_cast<int>(PyLong_AsLong(args[5]));
  request->count = PyLong_AsSize_t(args[6]);
  if (!ParseOffsets(args[7], &request->offsets) || !ParseOffsets(args[8], &request->output_offsets)) return false;
  request->input = Address(args[9]);
  request->output = Address(args[10]);
  request->timeout_ns = Nanoseconds(args[11]);
  request->site = static_cast<uint16_t>(PyLong_AsLong(args[12]));
  if (PyErr_Occurred()) return false;
  const auto fit = [&](const std::vector<uint64_t>& offsets) { return offsets.empty() || offsets.size() == request->program->chunks + 1; };
  const bool sane = request->program != nullptr && ValidDType(static_cast<unsigned>(request->dtype)) &&
                    ValidReduction(static_cast<unsigned>(request->reduction)) &&
                    (!IsReduction(request->op) || Supports(request->dtype, request->reduction)) && fit(request->offsets) &&
                    fit(request->output_offsets) && (request->op != OpCode::kAllToAll || !request->offsets.empty());
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
  uint64_t waited_ns = 0;
  Py_BEGIN_ALLOW_THREADS;
  operation = context->Run((*handle)->communicator, std::move(request), kSignalSlice, &waited_ns);
  Py_END_ALLOW_THREADS;
  (*handle)->Waited(waited_ns);
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
  operation = (*handle)->owner->context->Issue((*handle)->communicator, std::move(request));
  Py_END_ALLOW_THREADS;
  return MakeCapsule(std::make_shared<WorkHandle>(WorkHandle{*handle, std::move(operation)}), kWorkName);
}

// message(communicator, is send, peer or -1 (a receive from anybody), tag, dtype, count, address, timeout seconds, call site) -> work
PyObject* Message(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 9)) return nullptr;
  const auto* handle = OpenCommunicator(args[0]);
  if (handle == nullptr) return nullptr;
  Request request;
  request.op = PyObject_IsTrue(args[1]) != 0 ? OpCode::kSend : OpCode::kRecv;
  request.peer = static_cast<int>(PyLong_AsLong(args[2]));
  request.root = static_cast<int>(PyLong_AsLong(args[3]));
  request.dtype = static_cast<DType>(PyLong_AsLong(args[4]));
  request.count = PyLong_AsSize_t(args[5]);
  request.output = Address(args[6]);
  request.timeout_ns = Nanoseconds(args[7]);
  request.site = static_cast<uint16_t>(PyLong_AsLong(args[8]));
  if (PyErr_Occurred()) return nullptr;
  Communicator* communicator = (*handle)->communicator;
  const int first = request.op == OpCode::kRecv ? -1 : 0;
  if (request.peer < first || request.peer >= communicator->size() || request.peer == communicator->rank() || request.root < 0 ||
      !ValidDType(static_cast<unsigned>(request.dtype))) {
    PyErr_SetString(PyExc_ValueError, "malformed message");
    return nullptr;
  }
  std::shared_ptr<Operation> operation;
  Py_BEGIN_ALLOW_THREADS;
  operation = (*handle)->owner->context->Issue(communicator, std::move(request));
  Py_END_ALLOW_THREADS;
  return MakeCapsule(std::make_shared<WorkHandle>(WorkHandle{*handle, std::move(operation)}), kWorkName);
}

// source(work) -> the rank at the other end of a message; of a receive from anybody known when it is done
PyObject* Source(PyObject*, PyObject* capsule) {
  const auto* work = FromCapsule<WorkHandle>(capsule, kWorkName);
  return work == nullptr ? nullptr : PyLong_FromLong((*work)->operation->request().peer);
}

// remote_reads(communicator) -> whether its members can read any memory of one another
PyObject* RemoteReads(PyObject*, PyObject* capsule) {
  const auto* handle = OpenCommunicator(capsule);
  return handle == nullptr ? nullptr : PyBool_FromLong((*handle)->communicator->remote_reads());
}

// held_nbytes(communicator) -> bytes of its rings, scratch memory and messages put aside
PyObject* HeldNBytes(PyObject*, PyObject* capsule) {
  const auto* handle = OpenCommunicator(capsule);
  return handle == nullptr ? nullptr : PyLong_FromSize_t((*handle)->owner->context->HeldNBytes((*handle)->communicator));
}

// peer_pages(context) -> {world rank: a new descriptor of its page} for the peers on this host, the dead included
PyObject* PeerPages(PyObject*, PyObject* capsule) {
  const auto* handle = OpenContext(capsule);
  if (handle == nullptr) return nullptr;
  PyObject* pages = PyDict_New();
  if (pages == nullptr) return nullptr;
  for (const auto& [rank, fd] : (*handle)->context->PeerPages()) {
    PyObject* key = PyLong_FromLong(rank);
    PyObject* value = PyLong_FromLong(fd);
    const bool bad = key == nullptr || value == nullptr || PyDict_SetItem(pages, key, value) != 0;
    Py_XDECREF(key);
    Py_XDECREF(value);
    if (bad) {
      Py_DECREF(pages);
      return nullptr;
    }
  }
  return pages;
}

// --- operations that another library carries out --------------------------------------------------------------------------------------

// enter(communicator, carrier, algorithm, op, dtype, reduction, root or tag, peer or -1, count, timeout seconds, site) -> work
PyObject* Enter(PyObject*, PyObject* args) {
  PyObject* capsule;
  const char* carrier;
  unsigned char algorithm, op, dtype, reduction;
  int root, peer;
  unsigned long long count;
  double timeout_s;
  unsigned short site;
  if (!PyArg_ParseTuple(args, "OsbbbbiiKdH", &capsule, &carrier, &algorithm, &op, &dtype, &reduction, &root, &peer, &count, &timeout_s, &site))
    return nullptr;
  const auto* handle = OpenCommunicator(capsule);
  if (handle == nullptr) return nullptr;
  if (op >= kOpCount || algorithm >= kAlgorithmCount || !ValidDType(dtype) || !ValidReduction(reduction)) {
    PyErr_SetString(PyExc_ValueError, "malformed request");
    return nullptr;
  }
  Request request;
  request.op = static_cast<OpCode>(op);
  request.dtype = static_cast<DType>(dtype);
  request.reduction = static_cast<Reduction>(reduction);
  request.root = root;
  request.peer = peer;
  request.count = count;
  request.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
  request.site = site;
  std::shared_ptr<Operation> operation;
  Py_BEGIN_ALLOW_THREADS;
  operation = (*handle)->owner->context->Enter((*handle)->communicator, std::move(request), carrier, algorithm);
  Py_END_ALLOW_THREADS;
  return MakeCapsule(std::make_shared<WorkHandle>(WorkHandle{*handle, std::move(operation)}), kWorkName);
}

// stand(work, rank that it has been waiting for or -1, steps done, steps)
PyObject* Stand(PyObject*, PyObject* args) {
  PyObject* capsule;
  int peer;
  unsigned long long steps_done, steps;
  if (!PyArg_ParseTuple(args, "OiKK", &capsule, &peer, &steps_done, &steps)) return nullptr;
  const auto* work = FromCapsule<WorkHandle>(capsule, kWorkName);
  if (work == nullptr || OwnerIsClosed(**work)) return work == nullptr ? nullptr : Py_NewRef(Py_None);
  Py_BEGIN_ALLOW_THREADS;
  (*work)->owner->owner->context->Stand((*work)->operation.get(), peer, steps_done, steps);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// leave(work): it is complete
PyObject* Leave(PyObject*, PyObject* capsule) {
  const auto* work = FromCapsule<WorkHandle>(capsule, kWorkName);
  if (work == nullptr || OwnerIsClosed(**work)) return work == nullptr ? nullptr : Py_NewRef(Py_None);
  Py_BEGIN_ALLOW_THREADS;
  (*work)->owner->owner->context->Leave((*work)->owner->communicator, (*work)->operation.get());
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// abandon(work, error code, text): it cannot be completed; the communicator fails on every member
PyObject* Abandon(PyObject*, PyObject* args) {
  PyObject* capsule;
  int code;
  const char* why;
  if (!PyArg_ParseTuple(args, "Ois", &capsule, &code, &why)) return nullptr;
  const auto* work = FromCapsule<WorkHandle>(capsule, kWorkName);
  if (work == nullptr || OwnerIsClosed(**work)) return work == nullptr ? nullptr : Py_NewRef(Py_None);
  Py_BEGIN_ALLOW_THREADS;
  (*work)->owner->owner->context->Abandon((*work)->owner->communicator, *(*work)->operation, static_cast<ErrorCode>(code), why);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// waited(work, seconds): somebody was blocked so long
PyObject* Waited(PyObject*, PyObject* args) {
  PyObject* capsule;
  double seconds;
  if (!PyArg_ParseTuple(args, "Od", &capsule, &seconds)) return nullptr;
  const auto* work = FromCapsule<WorkHandle>(capsule, kWorkName);
  if (work == nullptr) return nullptr;
  (*work)->owner->waited_ns += static_cast<uint64_t>(seconds * 1e9);
  (*work)->owner->owner->waited_ns += static_cast<uint64_t>(seconds * 1e9);
  Py_RETURN_NONE;
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

// forget_recorded(context): drop the records and counters of what has ended
PyObject* ForgetRecorded(PyObject*, PyObject* capsule) {
  const auto* handle = OpenContext(capsule);
  if (handle == nullptr) return nullptr;
  (*handle)->context->ForgetRecorded();
  Py_RETURN_NONE;
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
    {"shortcut", Fast(NewShortcut), METH_FASTCALL, nullptr},
    {"remember", Fast(Remember), METH_FASTCALL, nullptr},
    {"method", Fast(NewMethod), METH_FASTCALL, nullptr},
    {"message", Fast(Message), METH_FASTCALL, nullptr},
    {"source", Source, METH_O, nullptr},
    {"remote_reads", RemoteReads, METH_O, nullptr},
    {"held_nbytes", HeldNBytes, METH_O, nullptr},
    {"peer_pages", PeerPages, METH_O, nullptr},
    {"enter", Enter, METH_VARARGS, nullptr},
    {"stand", Stand, METH_VARARGS, nullptr},
    {"leave", Leave, METH_O, nullptr},
    {"abandon", Abandon, METH_VARARGS, nullptr},
    {"waited", Waited, METH_VARARGS, nullptr},
    {"wait", WaitWork, METH_O, nullptr},
    {"done", WorkDone, METH_O, nullptr},
    {"waited_seconds", WaitedSeconds, METH_O, nullptr},
    {"waited_seconds_in_all", WaitedSecondsInAll, METH_O, nullptr},
    {"forget_recorded", ForgetRecorded, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "ringfold._core", "The C++ core of ringfold.", 0, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace ringfold

PyMODINIT_FUNC PyInit__core(void) { return PyModule_Create(&ringfold::kModule); }
