#include "python/shortcut.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>
#include <utility>

#include "python/handles.h"

namespace ringfold {
namespace {

constexpr char kShortcutName[] = "ringfold.shortcut";
// A training step has a few dozen forms, and a program some hundred call sites; beyond that the long way is taken.
constexpr size_t kForms = 4096;
constexpr size_t kSites = 4096;

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
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// Objects are compared by identity: operations, reductions and algorithms come as the literals of one module, and torch has one object for each dtype. Those
// of a form that is kept are kept alive, so that no other object can have their addresses.
struct Form {
  PyObject* operation;
  PyObject* reduction;
  PyObject* algorithm;
  PyObject* dtype;
  long root;
  size_t count;

  bool operator==(const Form& b) const {
    return operation == b.operation && reduction == b.reduction && algorithm == b.algorithm && dtype == b.dtype && root == b.root && count == b.count;
  }
};

struct HashForm {
  size_t operator()(const Form& f) const {
    size_t hash = f.count * 0x9e3779b97f4a7c15u + static_cast<size_t>(f.root);
    for (PyObject* object : {f.operation, f.reduction, f.algorithm, f.dtype}) hash = (hash ^ reinterpret_cast<size_t>(object)) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 29;
  }
};

struct Remembered {
  Reference operation, reduction, algorithm, dtype;
  Request request;
};

struct Shortcut {
  std::shared_ptr<CommunicatorHandle> owner;
  Reference row_of;
  std::unordered_map<Form, Remembered, HashForm> forms;
  std::unordered_map<uint64_t, uint16_t> rows;  // by code object and instruction
  Reference dtype, is_cpu, is_contiguous, is_neg, numel, data_ptr, f_code, f_lasti;  // names
};

// The answer of a method without arguments is True.
bool Says(PyObject* object, const Reference& name, bool is_property) {
  const Reference answer(is_property ? PyObject_GetAttr(object, name.get()) : PyObject_CallMethodObjArgs(object, name.get(), nullptr));
  return answer.get() == Py_True;
}

// Whether the core can work on the tensor's memory as it is; then also where that is, how much, and of which dtype (borrowed, torch keeps it).
bool IsPlain(const Shortcut& s, PyObject* tensor, char** data, size_t* count, PyObject** dtype) {
  if (!Says(tensor, s.is_contiguous, false) || !Says(tensor, s.is_cpu, true)) return false;
  const Reference numel(PyObject_CallMethodObjArgs(tensor, s.numel.get(), nullptr));
  if (numel.get() == nullptr) return false;
  *count = PyLong_AsSize_t(numel.get());
  // A negated view (of a conjugate's imaginary part) has gaps, unless it is of one element.
  if (*count <= 1 && Says(tensor, s.is_neg, false)) return false;
  const Reference type(PyObject_GetAttr(tensor, s.dtype.get()));
  const Reference address(PyObject_CallMethodObjArgs(tensor, s.data_ptr.get(), nullptr));
  if (type.get() == nullptr || address.get() == nullptr) return false;
  *dtype = type.get();
  *data = Address(address.get());
  return PyErr_Occurred() == nullptr;
}

// The row of a frame's place in the table of call sites. -1 with an exception set if that cannot be found out.
int RowOf(Shortcut* s, PyObject* frame) {
  const Reference code(PyObject_GetAttr(frame, s->f_code.get())), at(PyObject_GetAttr(frame, s->f_lasti.get()));
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

}  // namespace

PyObject* NewShortcut(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 2)) return nullptr;
  const auto* handle = OpenCommunicator(args[0]);
  if (handle == nullptr) return nullptr;
  auto shortcut = std::make_shared<Shortcut>();
  shortcut->owner = *handle;
  shortcut->row_of = Reference::To(args[1]);
  const std::pair<Reference*, const char*> names[] = {{&shortcut->dtype, "dtype"},   {&shortcut->is_cpu, "is_cpu"}, {&shortcut->is_contiguous, "is_contiguous"},
                                                      {&shortcut->is_neg, "is_neg"}, {&shortcut->numel, "numel"},   {&shortcut->data_ptr, "data_ptr"},
                                                      {&shortcut->f_code, "f_code"}, {&shortcut->f_lasti, "f_lasti"}};
  for (const auto& [reference, name] : names) {
    *reference = Reference(PyUnicode_InternFromString(name));
    if (reference->get() == nullptr) return nullptr;
  }
  return MakeCapsule(std::move(shortcut), kShortcutName);
}

PyObject* Remember(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 12)) return nullptr;
  const auto* shortcut = FromCapsule<Shortcut>(args[0], kShortcutName);
  if (shortcut == nullptr) return nullptr;
  const Form form = {args[1], args[2], args[3], args[4], PyLong_AsLong(args[5]), PyLong_AsSize_t(args[6])};
  Request request;
  request.program = (*shortcut)->owner->communicator->program(PyLong_AsSize_t(args[7]));
  request.op = static_cast<OpCode>(PyLong_AsLong(args[8]));
  request.dtype = static_cast<DType>(PyLong_AsLong(args[9]));
  request.reduction = static_cast<Reduction>(PyLong_AsLong(args[10]));
  request.root = static_cast<int>(form.root);
  request.count = form.count;
  if (!ParseOffsets(args[11], &request.offsets)) return nullptr;
  if (PyErr_Occurred()) return nullptr;
  if (request.program == nullptr) {
    PyErr_SetString(PyExc_ValueError, "no such program");
    return nullptr;
  }
  if ((*shortcut)->forms.size() < kForms) {
    (*shortcut)->forms[form] = {Reference::To(args[1]), Reference::To(args[2]), Reference::To(args[3]), Reference::To(args[4]), std::move(request)};
  }
  Py_RETURN_NONE;
}

PyObject* Again(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 9)) return nullptr;
  const auto* held = FromCapsule<Shortcut>(args[0], kShortcutName);
  if (held == nullptr) return nullptr;
  Shortcut* s = held->get();
  PyObject *input = args[5], *output = args[6], *dtype = nullptr, *output_dtype = nullptr;
  char *source = nullptr, *target = nullptr;
  size_t count = 0, output_count = 0;
  const bool has_input = input != Py_None, has_output = output != Py_None;
  bool plain = !s->owner->closed && !s->owner->owner->closed && (has_input || has_output);
  plain = plain && (!has_input || IsPlain(*s, input, &source, &count, &dtype));
  if (output == input) {
    target = source;
  } else {
    plain = plain && (!has_output || IsPlain(*s, output, &target, &output_count, &output_dtype));
    // The vector is whichever is the longer; pieces of it are checked the long way.
    count = count > output_count ? count : output_count;
    plain = plain && (!has_input || !has_output || dtype == output_dtype);
    if (dtype == nullptr) dtype = output_dtype;
  }
  if (!plain) {
    PyErr_Clear();
    Py_RETURN_NOTIMPLEMENTED;
  }
  const auto form = s->forms.find({args[1], args[2], args[3], dtype, PyLong_AsLong(args[4]), count});
  if (form == s->forms.end()) Py_RETURN_NOTIMPLEMENTED;
  const int site = RowOf(s, args[8]);
  if (site < 0) return nullptr;
  Request request = form->second.request;
  request.input = source;
  request.output = target;
  request.site = static_cast<uint16_t>(site);
  request.timeout_ns = Nanoseconds(args[7]);
  if (PyErr_Occurred()) return nullptr;
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

}  // namespace ringfold
