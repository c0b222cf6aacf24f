#include "python/memory.h"

#include <cstdint>
#include <utility>
#include <vector>

#include "memory/pool.h"

namespace ringfold {
namespace {

// The DLPack ABI, version 0.x: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};
constexpr int32_t kCpu = 1;

struct Export {
  DLManagedTensor tensor;
  std::shared_ptr<Pool> pool;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};

void Delete(DLManagedTensor* tensor) {
  auto* exported = static_cast<Export*>(tensor->manager_ctx);
  exported->pool->Release(tensor->dl_tensor.data);
  delete exported;
}

// A consumer renames the capsule to "used_dltensor" and calls the deleter itself.
void DeleteUnused(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  Delete(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
}


// A "dltensor" capsule over `memory`, an allocation of `pool`, contiguous. The allocation goes back to the pool when its last user lets go of it,
// on whatever thread, with or without the GIL; the pool itself lives as long as its tensors.
PyObject* ExportDlpack(std::shared_ptr<Pool> pool, void* memory, std::vector<int64_t> shape, uint8_t code, uint8_t bits) {
  auto* exported = new Export{};
  exported->pool = std::move(pool);
  exported->shape = std::move(shape);
  exported->strides.assign(exported->shape.size(), 1);
  for (size_t i = exported->shape.size(); i-- > 1;) exported->strides[i - 1] = exported->strides[i] * exported->shape[i];
  DLTensor& tensor = exported->tensor.dl_tensor;
  tensor = {memory, {kCpu, 0}, static_cast<int32_t>(exported->shape.size()), {code, bits, 1}, exported->shape.data(), exported->strides.data(), 0};
  exported->tensor.manager_ctx = exported;
  exported->tensor.deleter = Delete;
  PyObject* capsule = PyCapsule_New(&exported->tensor, "dltensor", DeleteUnused);
  if (capsule == nullptr) Delete(&exported->tensor);
  return capsule;
}

}  // namespace

PyObject* NewPool(PyObject*, PyObject*) { return MakeCapsule(std::make_shared<Pool>(), kPoolName); }

PyObject* Allocate(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 5)) return nullptr;
  const auto* pool = FromCapsule<Pool>(args[0], kPoolName);
  if (pool == nullptr) return nullptr;
  const size_t nbytes = PyLong_AsSize_t(args[1]);
  std::vector<int64_t> shape;
  for (Py_ssize_t i = 0; i < PyTuple_Size(args[4]); ++i) shape.push_back(PyLong_AsLongLong(PyTuple_GetItem(args[4], i)));
  const auto code = static_cast<uint8_t>(PyLong_AsLong(args[2]));
  const auto bits = static_cast<uint8_t>(PyLong_AsLong(args[3]));
  if (PyErr_Occurred()) return nullptr;
  void* memory;
  Py_BEGIN_ALLOW_THREADS;
  memory = (*pool)->Allocate(nbytes);
  Py_END_ALLOW_THREADS;
  if (memory == nullptr) return PyErr_SetFromErrno(PyExc_OSError);
  return ExportDlpack(*pool, memory, std::move(shape), code, bits);
}

PyObject* IsRegistered(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!Expect(n, 3)) return nullptr;
  const auto* pool = FromCapsule<Pool>(args[0], kPoolName);
  if (pool == nullptr) return nullptr;
  RegionRef ref;
  return PyBool_FromLong((*pool)->Find(Address(args[1]), PyLong_AsSize_t(args[2]), &ref));
}

PyObject* Stats(PyObject*, PyObject* capsule) {
  const auto* pool = FromCapsule<Pool>(capsule, kPoolName);
  if (pool == nullptr) return nullptr;
  const PoolStats stats = (*pool)->stats();
  return Py_BuildValue("(nnn)", static_cast<Py_ssize_t>(stats.reserved_nbytes), static_cast<Py_ssize_t>(stats.allocated_nbytes),
                       static_cast<Py_ssize_t>(stats.regions));
}

}  // namespace ringfold
