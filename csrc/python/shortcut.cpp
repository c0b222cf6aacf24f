#include "python/shortcut.h"

#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <unordered_map>
#include <utility>

#include "python/handles.h"
#include "python/tensor.h"

namespace ringfold {
namespace {

constexpr char kShortcutName[] = "ringfold.shortcut";
constexpr char kMethodName[] = "ringfold.method";
// A training step has a few dozen forms, and a program some hundred call sites; beyond that the long way is taken.
constexpr size_t kForms = 4096;
constexpr size_t kSites = 4096;

// Names are compared by identity: those of operations and most others are Python's literals. Those of a form that is kept are kept alive, so that no
// other object can have their addresses.
struct Form {
  PyObject* operation;
  PyObject* reduction;
  PyObject* algorithm;
  DType dtype;
  long root;
  size_t count;

  bool operator==(const Form& b) const {
    return operation == b.operation && reduction == b.reduction && algorithm == b.algorithm && dtype == b.dtype && root == b.root && count == b.count;
  }
};

struct HashForm {
  size_t operator()(const Form& f) const {
    size_t hash = f.count * 0x9e3779b97f4a7c15u + static_cast<size_t>(f.root) * 16 + static_cast<size_t>(f.dtype);
    for (PyObject* object : {f.operation, f.reduction, f.algorithm}) hash = (hash ^ reinterpret_cast<size_t>(object)) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 29;
  }
};

struct Remembered {
  Reference operation, reduction, algorithm;
  Request request;
};

struct Shortcut {
  std::shared_ptr<CommunicatorHandle> owner;
  TensorReader reader;
  Reference row_of, f_lasti;
  std::unordered_map<Form, Remembered, HashForm> forms;
  std::unordered_map<uint64_t, uint16_t> rows;  // by code object and instruction
};

// The arguments of the methods.
enum Slot { kTensor, kOutput, kInput, kOp, kSrc, kDst, kAlgorithm, kAsync, kSlots };
constexpr const char* kSlotNames[kSlots] = {"tensor", "output", "input", "op", "src", "dst", "algorithm", "async_op"};

// How many elements input and output have, in a communicator of so many ranks.
enum class Pieces { kOne, kOutputHasAll, kInputHasAll, kBothHaveAll };

struct Signature {
  const char* name;
  Slot positional[3];
  int positionals;
  Pieces pieces;
};

constexpr Signature kSignatures[] = {
    {"all_reduce", {kTensor, kOp}, 2, Pieces::kOne},
    {"broadcast", {kTensor, kSrc}, 2, Pieces::kOne},
    {"reduce", {kTensor, kDst, kOp}, 3, Pieces::kOne},
    {"reduce_scatter", {kOutput, kInput, kOp}, 3, Pieces::kInputHasAll},
    {"all_gather", {kOutput, kInput}, 2, Pieces::kOutputHasAll},
    {"all_to_all", {kOutput, kInput}, 2, Pieces::kBothHaveAll},
};

struct Method {
  std::shared_ptr<Shortcut> shortcut;
  const Signature* signature;
  Reference communicator, function, name, sum, timeout_s, fail;
  Reference slots[kSlots];
};

// The row of a frame's place in the table of call sites. -1 with an exception set if that cannot be found out.
int RowOf(Shortcut* s, PyObject* frame) {
  const Reference code(reinterpret_cast<PyObject*>(PyFrame_GetCode(reinterpret_cast<PyFrameObject*>(frame)))), at(PyObject_GetAttr(frame, s->f_lasti.get()));
  if (code.get() == nullptr || at.get() == nullptr) return -1;
  const uint64_t place = reinterpret_cast<uint64_t>(code.get()) * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(PyLong_AsLong(at.get()));
  const auto known = s->rows.find(place);
  if (known != s->rows.end()) return known->second;
  const Reference answer(PyObject_CallFunctionObjArgs(s->row_of.get(), frame, nullptr));
  if (answer.get() == nullptr) return -1;
  const long row = PyLong_AsLong(answer.get());
  if (row < 0) return static_cast<int>(~row);  // of a caller's caller, which may be another one the next time
  if (s->rows.size() < kSites) s->rows[place] = static_cast<uint16_t>(row);
  return static_cast<int>(row);
}

bool Takes(const Signature& signature, int slot) {
  if (slot == kAlgorithm || slot == kAsync) return true;
  for (int i = 0; i < signature.positionals; ++i)
    if (signature.positional[i] == slot) return true;
  return false;
}

// The arguments by slot; false if they are not what the short way knows.
bool Parse(const Method& m, PyObject* const* args, Py_ssize_t n, PyObject* keywords, PyObject** values) {
  if (n > m.signature->positionals) return false;
  for (Py_ssize_t i = 0; i < n; ++i) values[m.signature->positional[i]] = args[i];
  const Py_ssize_t named = keywords == nullptr ? 0 : PyTuple_Size(keywords);
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* name = PyTuple_GetItem(keywords, i);
    int slot = 0;
    while (slot < kSlots && m.slots[slot].get() != name) ++slot;
    if (slot == kSlots || values[slot] != nullptr || !Takes(*m.signature, slot)) return false;
    values[slot] = args[n + i];
  }
  return values[kAsync] == nullptr || values[kAsync] == Py_False;
}

// The tensors of the operation: their memory, and the count of the whole vector. False if the core cannot work on them as they are.
bool Read(const Method& m, PyObject* const* values, long root, Request* request, DType* dtype) {
  const Shortcut& s = *m.shortcut;
  const size_t size = static_cast<size_t>(s.owner->communicator->size());
  TensorView output, input;
  if (m.signature->pieces == Pieces::kOne) {
    if (values[kTensor] == nullptr || !s.reader.Read(values[kTensor], &input)) return false;
    request->input = input.data;
    request->output = m.signature->positional[1] == kDst && root != s.owner->communicator->rank() ? nullptr : input.data;
    request->count = input.count;
    *dtype = input.dtype;
    return true;
  }
  if (values[kOutput] == nullptr || values[kInput] == nullptr) return false;
  if (!s.reader.Read(values[kOutput], &output) || !s.reader.Read(values[kInput], &input) || output.dtype != input.dtype) return false;
  request->input = input.data;
  request->output = output.data;
  request->count = output.count > input.count ? output.count : input.count;
  *dtype = output.dtype;
  switch (m.signature->pieces) {
    case Pieces::kOutputHasAll: return output.count == input.count * size;
    case Pieces::kInputHasAll: return input.count == output.count * size;
    default: return input.count == output.count && input.count % size == 0;
  }
}

// None, an outcome, or NotImplemented if the long way is to be taken.
PyObject* Try(Method* m, PyObject* communicator, PyObject* const* args, Py_ssize_t n, PyObject* keywords) {
  PyObject* values[kSlots] = {};
  Shortcut* s = m->shortcut.get();
  if (s->owner->closed || s->owner->owner->closed || !Parse(*m, args, n, keywords, values)) Py_RETURN_NOTIMPLEMENTED;
  const bool is_rooted = m->signature->positional[1] == kSrc || m->signature->positional[1] == kDst;
  PyObject* of = values[m->signature->positional[1]];
  const long root = !is_rooted ? -1 : of == nullptr ? 0 : PyLong_AsLong(of);
  Request what;
  DType dtype;
  if (PyErr_Occurred() != nullptr || !Read(*m, values, root, &what, &dtype)) {
    PyErr_Clear();
    Py_RETURN_NOTIMPLEMENTED;
  }
  PyObject* const reduction = values[kOp] == nullptr ? m->sum.get() : values[kOp];
  PyObject* const algorithm = values[kAlgorithm] == nullptr ? Py_None : values[kAlgorithm];
  const auto form = s->forms.find({m->name.get(), reduction, algorithm, dtype, root, what.count});
  if (form == s->forms.end()) Py_RETURN_NOTIMPLEMENTED;
  PyObject* frame = reinterpret_cast<PyObject*>(PyEval_GetFrame());
  if (frame == nullptr) Py_RETURN_NOTIMPLEMENTED;
  const int site = RowOf(s, frame);
  const Reference timeout_s(PyObject_GetAttr(communicator, m->timeout_s.get()));
  if (site < 0 || timeout_s.get() == nullptr) return nullptr;
  Request request = form->second.request;
  request.input = what.input;
  request.output = what.output;
  request.site = static_cast<uint16_t>(site);
  request.timeout_ns = Nanoseconds(timeout_s.get());
  if (PyErr_Occurred() != nullptr) return nullptr;
  std::shared_ptr<Operation> operation;
  const std::shared_ptr<CommunicatorHandle> owner = s->owner;
  uint64_t waited_ns = 0;
  Py_BEGIN_ALLOW_THREADS;
  operation = owner->owner->context->Run(owner->communicator, std::move(request), kSignalSlice, &waited_ns);
  Py_END_ALLOW_THREADS;
  owner->Waited(waited_ns);
  if (!Finish(owner.get(), *operation)) return nullptr;
  return Outcome(operation->error());
}

PyObject* TakeLongWay(const Method& m, PyObject* communicator, PyObject* const* args, Py_ssize_t n, PyObject* keywords) {
  const Reference positional(PyTuple_New(n + 1)), named(PyDict_New());
  if (positional.get() == nullptr || named.get() == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i <= n; ++i) {
    PyObject* value = i == 0 ? communicator : args[i - 1];
    Py_INCREF(value);
    PyTuple_SetItem(positional.get(), i, value);
  }
  for (Py_ssize_t i = 0; keywords != nullptr && i < PyTuple_Size(keywords); ++i)
    if (PyDict_SetItem(named.get(), PyTuple_GetItem(keywords, i), args[n + i]) != 0) return nullptr;
  return PyObject_Call(m.function.get(), positional.get(), named.get());
}

PyObject* Call(PyObject* self, PyObject* const* args, Py_ssize_t n, PyObject* keywords) {
  const auto* held = FromCapsule<Method>(self, kMethodName);
  if (held == nullptr) return nullptr;
  const std::shared_ptr<Method> method = *held;
  const Reference communicator = Reference::To(PyWeakref_GetObject(method->communicator.get()));
  if (communicator.get() == nullptr || communicator.get() == Py_None) {
    PyErr_SetString(PyExc_ReferenceError, "the communicator is gone");
    return nullptr;
  }
  Reference outcome(Try(method.get(), communicator.get(), args, n, keywords));
  if (outcome.get() == Py_NotImplemented) return TakeLongWay(*method, communicator.get(), args, n, keywords);
  if (outcome.get() == nullptr || outcome.get() == Py_None) return outcome.release();
  return PyObject_CallMethodObjArgs(communicator.get(), method->fail.get(), outcome.get(), nullptr);
}

template <size_t... I>
PyMethodDef* Definitions(std::index_sequence<I...>) {
  const auto call = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(Call));
  static PyMethodDef definitions[] = {{kSignatures[I].name, call, METH_FASTCALL | METH_KEYWORDS, nullptr}...};
  return definitions;
}

}  // namespace

PyObject* NewShortcut(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 3)) return nullptr;
  const auto* handle = OpenCommunicator(args[0]);
  if (handle == nullptr) return nullptr;
  auto shortcut = std::make_shared<Shortcut>();
  shortcut->owner = *handle;
  shortcut->row_of = Reference::To(args[1]);
  shortcut->f_lasti = Reference::Interned("f_lasti");
  if (!shortcut->reader.Init(args[2]) || shortcut->f_lasti.get() == nullptr) return nullptr;
  return MakeCapsule(std::move(shortcut), kShortcutName);
}

PyObject* Remember(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 12)) return nullptr;
  const auto* shortcut = FromCapsule<Shortcut>(args[0], kShortcutName);
  if (shortcut == nullptr) return nullptr;
  Request request;
  request.program = (*shortcut)->owner->communicator->program(PyLong_AsSize_t(args[7]));
  request.op = static_cast<OpCode>(PyLong_AsLong(args[8]));
  request.dtype = static_cast<DType>(PyLong_AsLong(args[9]));
  request.reduction = static_cast<Reduction>(PyLong_AsLong(args[10]));
  const Form form = {args[1], args[2], args[3], request.dtype, PyLong_AsLong(args[5]), PyLong_AsSize_t(args[6])};
  request.root = static_cast<int>(form.root);
  request.count = form.count;
  if (!ParseOffsets(args[11], &request.offsets)) return nullptr;
  if (PyErr_Occurred()) return nullptr;
  if (request.program == nullptr) {
    PyErr_SetString(PyExc_ValueError, "no such program");
    return nullptr;
  }
  (*shortcut)->reader.Learn(args[4], request.dtype);
  if ((*shortcut)->forms.size() < kForms)
    (*shortcut)->forms[form] = {Reference::To(args[1]), Reference::To(args[2]), Reference::To(args[3]), std::move(request)};
  Py_RETURN_NONE;
}

PyObject* NewMethod(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 4)) return nullptr;
  const auto* shortcut = FromCapsule<Shortcut>(args[0], kShortcutName);
  if (shortcut == nullptr) return nullptr;
  auto method = std::make_shared<Method>();
  method->shortcut = *shortcut;
  size_t which = 0;
  while (which < std::size(kSignatures) && PyUnicode_CompareWithASCIIString(args[1], kSignatures[which].name) != 0) ++which;
  if (which == std::size(kSignatures)) {
    PyErr_Format(PyExc_ValueError, "%R has no short way", args[1]);
    return nullptr;
  }
  method->signature = &kSignatures[which];
  method->communicator = Reference::To(args[2]);
  method->function = Reference::To(args[3]);
  method->name = Reference::Interned(method->signature->name);
  method->sum = Reference::Interned("sum");
  method->timeout_s = Reference::Interned("timeout_s");
  method->fail = Reference::Interned("_fail");
  for (int slot = 0; slot < kSlots; ++slot) method->slots[slot] = Reference::Interned(kSlotNames[slot]);
  if (PyErr_Occurred() != nullptr) return nullptr;
  const Reference capsule(MakeCapsule(std::move(method), kMethodName));
  if (capsule.get() == nullptr) return nullptr;
  return PyCFunction_NewEx(Definitions(std::make_index_sequence<std::size(kSignatures)>()) + which, capsule.get(), nullptr);
}

}  // namespace ringfold
