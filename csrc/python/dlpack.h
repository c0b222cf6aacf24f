// Gives registered memory to torch (or anything else that reads DLPack) without a copy.
#pragma once

#include <Python.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "memory/pool.h"

namespace ringfold {

// A "dltensor" capsule over `memory`, an allocation of `pool`, contiguous. The allocation goes back to the pool when its last user lets go of it,
// on whatever thread, with or without the GIL; the pool itself lives as long as its tensors.
PyObject* ExportDlpack(std::shared_ptr<Pool> pool, void* memory, std::vector<int64_t> shape, uint8_t code, uint8_t bits);

}  // namespace ringfold
