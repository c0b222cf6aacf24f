// oneCCL's collectives of host memory with C linkage, for ctypes; oneCCL itself has only C++. `make peers` builds it.
// Every function returns nullptr, or what oneCCL said against it.

#include <cstddef>
#include <cstring>
#include <memory>
#include <string>

#include "oneapi/ccl.hpp"

namespace {

std::shared_ptr<ccl::kvs> store;
std::unique_ptr<ccl::communicator> world;
std::string failure;

template <class Work>
const char* Try(const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
}

ccl::datatype Type(int code) { return static_cast<ccl::datatype>(code); }
ccl::reduction Reduction(int code) { return static_cast<ccl::reduction>(code); }

}  // namespace

extern "C" {

// The address of a new store, for the other ranks; `address` has room for kAddressSize bytes.
const char* oneccl_address(char* address) {
  return Try([&] {
    ccl::init();
    store = ccl::create_main_kvs();
    std::memcpy(address, store->get_address().data(), ccl::kvs::address_max_size);
  });
}

const char* oneccl_join(const char* address, int size, int rank) {
  return Try([&] {
    ccl::init();
    if (store == nullptr) {
      ccl::kvs::address_type main;
      std::memcpy(main.data(), address, main.size());
      store = ccl::create_kvs(main);
    }
    world = std::make_unique<ccl::communicator>(ccl::create_communicator(size, rank, store));
  });
}

const char* oneccl_leave() {
  return Try([] { world.reset(), store.reset(); });
}

size_t oneccl_address_size() { return ccl::kvs::address_max_size; }

const char* oneccl_all_reduce(void* tensor, size_t count, int type, int reduction) {
  return Try([&] { ccl::allreduce(tensor, tensor, count, Type(type), Reduction(reduction), *world).wait(); });
}

const char* oneccl_reduce_scatter(void* output, const void* input, size_t piece, int type, int reduction) {
  return Try([&] { ccl::reduce_scatter(input, output, piece, Type(type), Reduction(reduction), *world).wait(); });
}

const char* oneccl_all_gather(void* output, const void* input, size_t piece, int type) {
  return Try([&] { ccl::allgather(input, output, piece, Type(type), *world).wait(); });
}

const char* oneccl_broadcast(void* tensor, size_t count, int type, int root) {
  return Try([&] { ccl::broadcast(tensor, count, Type(type), root, *world).wait(); });
}

const char* oneccl_reduce(void* tensor, size_t count, int type, int reduction, int root) {
  return Try([&] { ccl::reduce(tensor, tensor, count, Type(type), Reduction(reduction), root, *world).wait(); });
}

const char* oneccl_all_to_all(void* output, const void* input, size_t piece, int type) {
  return Try([&] { ccl::alltoall(input, output, piece, Type(type), *world).wait(); });
}

const char* oneccl_barrier() {
  return Try([] { ccl::barrier(*world).wait(); });
}

}  // extern "C"
