// Registered memory: an allocator over memfd regions whose descriptors can be given to peers.
//
// A region holds at least 16 MiB and is cut first-fit; neighbours coalesce when released. A region that is wholly free is unmapped, but for
// the last one (the spare). Peers map whole regions, once, by id.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <shared_mutex>
#include <vector>

#include "memory/mapping.h"

namespace ringfold {

// Where a range lies. `fd` belongs to the pool and stays open as long as something in the region is allocated.
struct RegionRef {
  uint64_t id;
  size_t offset;
  size_t region_nbytes;
  int fd;
};

struct PoolStats {
  size_t reserved_nbytes;   // of all regions
  size_t allocated_nbytes;  // handed out, rounded up to 64 bytes
  size_t regions;
};

// Every member may be called from any thread. Allocations still held when the pool ends are unmapped with it.
class Pool {
 public:
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // At least `nbytes`, aligned to 64 bytes, or to 4 KiB from 64 KiB up. The contents are whatever was there. Zero bytes give a pointer of
  // their own. nullptr if there is no memory for it; errno then says why.
  void* Allocate(size_t nbytes);

  // False (and nothing happens) if `ptr` is not the start of an allocation. nullptr is allowed.
  bool Release(void* ptr);

  // Whether [ptr, ptr + nbytes) lies in one region; then `out` says where. Cheap enough for every collective.
  bool Find(const void* ptr, size_t nbytes, RegionRef* out) const;

  // Ids of the regions unmapped since `*cursor` (begin with 0), which moves on. Ids start at 1 and are never reused.
  std::vector<uint64_t> FreedSince(size_t* cursor) const;

  PoolStats stats() const;

 private:
  struct Region {
    uint64_t id;
    Mapping mapping;
    std::map<size_t, size_t> holes;   // offset -> nbytes, never adjacent
    std::map<size_t, size_t> blocks;  // offset -> nbytes, handed out
  };
  using Regions = std::map<uintptr_t, Region>;  // by address

  // With the lock held:
  void* Cut(Region* region, size_t nbytes, size_t alignment);
  void* CutAny(size_t nbytes, size_t alignment);
  Mapping TakeSpare(const Region* except);  // out of the books, for the caller to unmap; not valid() if nothing is wholly free

  bool DropSpare();

  mutable std::shared_mutex mutex_;
  Regions regions_;
  uint64_t next_id_ = 1;
  size_t reserved_nbytes_ = 0;
  size_t allocated_nbytes_ = 0;
  std::vector<uint64_t> freed_;          // all ids ever unmapped: 8 bytes each
  std::atomic<size_t> freed_count_{0};  // its size, so that FreedSince needs no lock when nothing happened
};

}  // namespace ringfold
