// A range of shared memory without a name: a memfd, or one that a peer sent, mapped read-write.
#pragma once

#include <cstddef>

#include "common/descriptor.h"

namespace ringfold {

// Owns the mapping and the descriptor. Mappings of at least 2 MiB begin on a 2 MiB boundary and are made of huge pages as far as the kernel
// gives any; it is no failure if it does not. 64 MiB take about 20 ms, and save each peer 10 ms of page faults.
class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& from) noexcept;
  Mapping& operator=(Mapping&& from) noexcept;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  // New zeroed memory, close-on-exec, every page of it present: no SIGBUS later, and whoever gets the descriptor cannot shrink it.
  // On failure the result is not valid() and error() is the errno (ENOMEM: the host or the cgroup has not that much).
  static Mapping Create(size_t nbytes);

  // Maps the first `nbytes` of `fd`, which it closes on failure too. EINVAL if the file is shorter.
  static Mapping Attach(Descriptor fd, size_t nbytes);

  bool valid() const { return data_ != nullptr; }
  int error() const { return error_; }
  int fd() const { return fd_.get(); }
  char* data() const { return data_; }
  size_t size() const { return nbytes_; }

 private:
  static Mapping Failed(int error);
  void Unmap();

  char* data_ = nullptr;
  size_t nbytes_ = 0;
  Descriptor fd_;
  int error_ = 0;
};

}  // namespace ringfold
