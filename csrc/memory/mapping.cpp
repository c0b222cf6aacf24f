#include "memory/mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace ringfold {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kUnlimited = std::numeric_limits<size_t>::max();

struct FileCloser {
  void operator()(FILE* file) const { fclose(file); }
};

// The number after `key` in a file of "key number" lines, or after nothing if `key` is empty; `otherwise` if it is not there.
size_t ReadNumber(const char* path, const char* key, size_t otherwise) {
  const std::unique_ptr<FILE, FileCloser> file(fopen(path, "re"));
  char line[256];
  while (file != nullptr && fgets(line, sizeof(line), file.get()) != nullptr) {
    size_t number = 0;
    if (strncmp(line, key, strlen(key)) == 0 && sscanf(line + strlen(key), "%zu", &number) == 1) return number;
  }
  return otherwise;
}

// What the host, and the cgroup if it has a limit, could still give. At a page fault the kernel can no longer refuse: its answer is SIGBUS
// or the OOM killer. So this is asked beforehand. Page cache does not count, it is given back.
size_t AvailableNBytes() {
  const size_t host_kib = ReadNumber("/proc/meminfo", "MemAvailable:", kUnlimited / 1024);
  const size_t limit = ReadNumber("/sys/fs/cgroup/memory.max", "", kUnlimited);
  const size_t used = ReadNumber("/sys/fs/cgroup/memory.stat", "anon ", 0) + ReadNumber("/sys/fs/cgroup/memory.stat", "shmem ", 0);
  const size_t group = limit > used ? limit - used : 0;
  return host_kib * 1024 < group ? host_kib * 1024 : group;
}

int CreateMemfd() {
  const int fd = memfd_create("ringfold", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
  if (fd >= 0 || errno != EINVAL) return fd;
  return memfd_create("ringfold", MFD_CLOEXEC | MFD_ALLOW_SEALING);  // before Linux 6.3
}

// Maps at a 2 MiB boundary if a huge page fits: reserves a range with room to align in, and gives the ends back.
void* MapAligned(int fd, size_t nbytes) {
  if (nbytes < kHugePage) return mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t length = (nbytes + page - 1) / page * page;
  const size_t reserved_nbytes = length + kHugePage;
  void* reserved = mmap(nullptr, reserved_nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return MAP_FAILED;
  char* const begin = static_cast<char*>(reserved);
  const size_t skip = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  void* mapped = mmap(begin + skip, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
  if (mapped == MAP_FAILED) {
    const int error = errno;
    munmap(reserved, reserved_nbytes);
    errno = error;
    return MAP_FAILED;
  }
  if (skip > 0) munmap(begin, skip);
  if (skip < kHugePage) munmap(begin + skip + length, kHugePage - skip);
  madvise(mapped, nbytes, MADV_HUGEPAGE);  // enough where shmem_enabled is "advise"
  return mapped;
}

// Gives every page its memory now, as huge pages as far as there are any. 0 or an errno.
//
// Most kernels are set to give none to shared memory, even to who asks (shmem_enabled is "never"). MADV_COLLAPSE (Linux 6.1) is not bound
// by that: it makes a huge page of any 2 MiB range that holds at least one page. With one page each it has little to copy, and is faster
// than populating small pages.
int Populate(int fd, char* data, size_t nbytes) {
  const size_t huge_nbytes = nbytes / kHugePage * kHugePage;
  for (size_t at = 0; at < huge_nbytes; at += kHugePage) madvise(data + at, 1, MADV_POPULATE_WRITE);
  if (huge_nbytes > 0) madvise(data, huge_nbytes, MADV_COLLAPSE);
  while (madvise(data, nbytes, MADV_POPULATE_WRITE) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno == EINVAL) return posix_fallocate(fd, 0, static_cast<off_t>(nbytes));  // before Linux 5.14; in small pages
    return errno == EFAULT ? ENOMEM : errno;                                         // EFAULT: it would have been SIGBUS
  }
  return 0;
}

}  // namespace

Mapping::Mapping(Mapping&& from) noexcept
    : data_(std::exchange(from.data_, nullptr)),
      nbytes_(std::exchange(from.nbytes_, 0)),
      fd_(std::move(from.fd_)),
      error_(std::exchange(from.error_, 0)) {}

Mapping& Mapping::operator=(Mapping&& from) noexcept {
  if (this == &from) return *this;
  Unmap();
  data_ = std::exchange(from.data_, nullptr);
  nbytes_ = std::exchange(from.nbytes_, 0);
  fd_ = std::move(from.fd_);
  error_ = std::exchange(from.error_, 0);
  return *this;
}

Mapping::~Mapping() { Unmap(); }

void Mapping::Unmap() {
  if (data_ != nullptr) munmap(std::exchange(data_, nullptr), nbytes_);
}

Mapping Mapping::Failed(int error) {
  Mapping mapping;
  mapping.error_ = error;
  return mapping;
}

Mapping Mapping::Create(size_t nbytes) {
  if (nbytes == 0) return Failed(EINVAL);
  if (nbytes > static_cast<size_t>(std::numeric_limits<off_t>::max())) return Failed(ENOMEM);
  if (nbytes >= kHugePage && nbytes > AvailableNBytes()) return Failed(ENOMEM);
  Descriptor memfd(CreateMemfd());
  if (!memfd.valid()) return Failed(errno);
  const int fd = memfd.get();
  if (ftruncate(fd, static_cast<off_t>(nbytes)) != 0) return Failed(errno);
  // A peer that shrank the file would turn every access into SIGBUS.
  if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) return Failed(errno);
  Mapping mapping = Attach(std::move(memfd), nbytes);
  if (!mapping.valid()) return mapping;
  const int error = Populate(fd, mapping.data(), nbytes);
  return error == 0 ? std::move(mapping) : Failed(error);
}

Mapping Mapping::Attach(Descriptor fd, size_t nbytes) {
  struct stat status;
  if (fstat(fd.get(), &status) != 0) return Failed(errno);
  if (nbytes == 0 || status.st_size < 0 || static_cast<size_t>(status.st_size) < nbytes) return Failed(EINVAL);
  void* data = MapAligned(fd.get(), nbytes);
  if (data == MAP_FAILED) return Failed(errno);
  Mapping mapping;
  mapping.data_ = static_cast<char*>(data);
  mapping.nbytes_ = nbytes;
  mapping.fd_ = std::move(fd);
  return mapping;
}

}  // namespace ringfold
