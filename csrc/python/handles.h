// What Python holds of the core: contexts, communicators and operations in capsules, each keeping alive what it stands on.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <unistd.h>

#include <memory>
#include <utility>
#include <vector>

#include "common/deadline.h"
#include "executor/context.h"
#include "python/capsule.h"

namespace ringfold {

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

  // With the GIL held.
  void Waited(uint64_t nanoseconds) {
    waited_ns += nanoseconds;
    owner->waited_ns += nanoseconds;
  }
};

struct WorkHandle {
  std::shared_ptr<CommunicatorHandle> owner;
  std::shared_ptr<Operation> operation;
};

// A context or communicator that is open here, else null with an exception set.
const std::shared_ptr<ContextHandle>* OpenContext(PyObject* capsule);
const std::shared_ptr<CommunicatorHandle>* OpenCommunicator(PyObject* capsule);
// None for success, else (code, world rank at fault or -1, text).
PyObject* Outcome(const Error& error);
// Bytes that hold chunk offsets, or None. False with an exception set if it is neither.
bool ParseOffsets(PyObject* from, std::vector<uint64_t>* offsets);
// Whether the communicator of an operation that another library carries out is gone, and the operation has failed with it.
bool OwnerIsClosed(const WorkHandle& work);
// Waits with the GIL released, letting signal handlers run. False with an exception set if one of them raised.
bool Finish(CommunicatorHandle* handle, const Operation& operation);

inline uint64_t Nanoseconds(PyObject* seconds) { return static_cast<uint64_t>(PyFloat_AsDouble(seconds) * 1e9); }

}  // namespace ringfold
