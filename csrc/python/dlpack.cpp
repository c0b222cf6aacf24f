#include "python/dlpack.h"

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

}  // namespace

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

}  // namespace ringfold
