// Registered memory: mappings without a name, and the pool that cuts them up.

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "memory/mapping.h"
#include "memory/pool.h"
#include "test/check.h"

namespace ringfold {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kRegion = 16 * kMiB;

size_t OpenDescriptors() {
  DIR* const folder = opendir("/proc/self/fd");
  CHECK(folder != nullptr);
  size_t count = 0;
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  return count;
}

bool Aligned(const void* ptr, size_t alignment) { return reinterpret_cast<uintptr_t>(ptr) % alignment == 0; }

// ---- mappings

void TwoMappingsOfOneDescriptorAreOneMemory() {
  for (const size_t nbytes : {size_t{100}, size_t{3} << 20, kRegion}) {
    Mapping mine = Mapping::Create(nbytes);
    CHECK(mine.valid() && mine.size() == nbytes && (fcntl(mine.fd(), F_GETFD) & FD_CLOEXEC) != 0);
    CHECK(nbytes < 2 * kMiB || Aligned(mine.data(), 2 * kMiB));
    CHECK(mine.data()[0] == 0 && mine.data()[nbytes - 1] == 0);
    const Mapping theirs = Mapping::Attach(Descriptor(dup(mine.fd())), nbytes);
    CHECK(theirs.valid() && theirs.data() != mine.data() && (nbytes < 2 * kMiB || Aligned(theirs.data(), 2 * kMiB)));
    mine.data()[nbytes - 1] = 42;
    CHECK(theirs.data()[nbytes - 1] == 42);
    mine = Mapping();
    CHECK(theirs.data()[nbytes - 1] == 42);
  }
}

void AMappingMovesAndClosesOnce() {
  const size_t before = OpenDescriptors();
  {
    Mapping first = Mapping::Create(4096);
    char* const data = first.data();
    Mapping second(std::move(first));
    CHECK(!first.valid() && first.fd() == -1 && second.data() == data);
    Mapping third = Mapping::Create(4096);
    third = std::move(second);
    CHECK(third.data() == data && OpenDescriptors() == before + 1);
  }
  CHECK(OpenDescriptors() == before);
}

void APeerCannotShrinkAMapping() {
  const Mapping mapping = Mapping::Create(8192);
  CHECK(ftruncate(mapping.fd(), 0) != 0 && errno == EPERM);
}

void WhatCannotBeMappedIsAnError() {
  const size_t before = OpenDescriptors();
  const Mapping small = Mapping::Create(4096);
  CHECK(Mapping::Attach(Descriptor(dup(small.fd())), 8192).error() == EINVAL);
  CHECK(Mapping::Attach(Descriptor(dup(small.fd())), 0).error() == EINVAL);
  CHECK(Mapping::Attach(Descriptor(), 4096).error() == EBADF);
  CHECK(Mapping::Create(0).error() == EINVAL);
  CHECK(Mapping::Create(size_t{1} << 45).error() == ENOMEM);  // 32 TiB
  CHECK(Mapping::Create(~size_t{0}).error() == ENOMEM);
  CHECK(OpenDescriptors() == before + 1);
}

// ---- the pool

void AllocationsAreAlignedAndApart() {
  Pool pool;
  std::set<void*> empty;
  for (int i = 0; i < 100; ++i) empty.insert(pool.Allocate(0));
  CHECK(empty.size() == 100 && empty.count(nullptr) == 0);
  for (const size_t nbytes : {size_t{1}, size_t{63}, size_t{65}, size_t{5000}}) CHECK(Aligned(pool.Allocate(nbytes), 64));
  for (const size_t nbytes : {size_t{65536}, size_t{65537}, 20 * kMiB, 17 * kMiB + 1}) CHECK(Aligned(pool.Allocate(nbytes), 4096));
  CHECK(pool.stats().regions == 3 && pool.stats().reserved_nbytes == kRegion + 20 * kMiB + 18 * kMiB);
}

void FindSaysWhereARangeLies() {
  Pool pool;
  char* const first = static_cast<char*>(pool.Allocate(1000));
  char* const large = static_cast<char*>(pool.Allocate(40 * kMiB));
  RegionRef a = {};
  RegionRef b = {};
  CHECK(pool.Find(first, 1000, &a) && pool.Find(large + 12345, 30 * kMiB, &b));
  CHECK(a.id != b.id && a.id > 0 && a.offset == 0 && a.region_nbytes == kRegion);
  CHECK(b.offset == 12345 && b.region_nbytes == 40 * kMiB && b.fd != a.fd);
  CHECK(!pool.Find(large + 12345, 40 * kMiB, &b) && !pool.Find(large + 12345, ~size_t{0}, &b));
  CHECK(!pool.Find(&pool, 1, &b) && !pool.Find(nullptr, 0, &b) && !pool.Find(reinterpret_cast<void*>(~uintptr_t{0}), 1, &b));

  const Mapping peer = Mapping::Attach(Descriptor(dup(b.fd)), b.region_nbytes);
  large[12345] = 7;
  CHECK(peer.data()[12345] == 7);
}

void ReleaseKnowsWhatIsAllocated() {
  Pool pool;
  char* const ptr = static_cast<char*>(pool.Allocate(1000));
  int outside = 0;
  CHECK(!pool.Release(ptr + 64) && !pool.Release(&outside) && pool.Release(nullptr));
  CHECK(pool.Release(ptr) && !pool.Release(ptr));
  CHECK(pool.stats().allocated_nbytes == 0);
}

void NeighboursCoalesceInAnyOrder() {
  Pool pool;
  std::mt19937 random(1);
  for (int round = 0; round < 20; ++round) {
    std::vector<void*> blocks;
    for (size_t i = 0; i < 16; ++i) blocks.push_back(pool.Allocate(kMiB));
    CHECK(pool.stats().regions == 1 && pool.stats().allocated_nbytes == kRegion);
    std::shuffle(blocks.begin(), blocks.end(), random);
    for (void* block : blocks) CHECK(pool.Release(block));
    void* const whole = pool.Allocate(kRegion);
    CHECK(pool.stats().regions == 1 && pool.Release(whole));
  }
}

void OneFreeRegionIsKeptAndTheOthersAreLogged() {
  const size_t before = OpenDescriptors();
  {
    Pool pool;
    size_t cursor = 0;
    std::vector<void*> blocks;
    std::vector<uint64_t> ids;
    for (int i = 0; i < 4; ++i) {
      blocks.push_back(pool.Allocate(kRegion));
      RegionRef where = {};
      CHECK(pool.Find(blocks.back(), kRegion, &where));
      ids.push_back(where.id);
    }
    CHECK(OpenDescriptors() == before + 4 && pool.FreedSince(&cursor).empty());
    CHECK(pool.Release(blocks[1]) && pool.FreedSince(&cursor).empty());
    CHECK(pool.Release(blocks[3]) && pool.FreedSince(&cursor) == std::vector<uint64_t>{ids[1]});
    CHECK(pool.Release(blocks[0]) && pool.Release(blocks[2]));
    CHECK(pool.FreedSince(&cursor) == (std::vector<uint64_t>{ids[3], ids[0]}) && pool.FreedSince(&cursor).empty());
    CHECK(pool.stats().regions == 1 && OpenDescriptors() == before + 1);
    RegionRef where = {};
    CHECK(pool.Find(pool.Allocate(kRegion), kRegion, &where) && where.id == ids[2]);
    CHECK(pool.Find(pool.Allocate(kRegion), kRegion, &where) && where.id > ids[3]);  // never an old one again
    size_t other_cursor = 0;
    CHECK(pool.FreedSince(&other_cursor).size() == 3);
  }
  CHECK(OpenDescriptors() == before);
}

void TooMuchIsNullptrAndLeavesThePoolWorking() {
  Pool pool;
  const size_t before = OpenDescriptors();
  for (const size_t nbytes : {size_t{1} << 45, ~size_t{0}, ~size_t{0} / 2}) {
    errno = 0;
    CHECK(pool.Allocate(nbytes) == nullptr && errno == ENOMEM);
  }
  CHECK(OpenDescriptors() == before && pool.stats().regions == 0);
  void* const spare = pool.Allocate(kMiB);
  CHECK(spare != nullptr && pool.Release(spare) && pool.stats().regions == 1);
  CHECK(pool.Allocate(size_t{1} << 45) == nullptr && pool.stats().regions == 0);  // the spare was given up for it
  CHECK(pool.Allocate(kMiB) != nullptr);
}

// What is allocated never overlaps, keeps its contents, is found where it is, and the books agree.
void RandomUseMatchesAModel() {
  struct Block {
    size_t nbytes;
    unsigned char mark;
  };
  Pool pool;
  std::map<char*, Block> model;
  std::mt19937_64 random(2);
  size_t allocated = 0;
  const auto rounded = [](size_t nbytes) { return std::max<size_t>(64, (nbytes + 63) / 64 * 64); };
  for (int step = 0; step < 6000; ++step) {
    const bool grow = model.size() < 5 || (model.size() < 300 && random() % 100 < 52);
    if (grow) {
      const size_t nbytes = random() % (size_t{1} << (random() % 22));
      auto* const ptr = static_cast<char*>(pool.Allocate(nbytes));
      CHECK(ptr != nullptr);
      const auto after = model.lower_bound(ptr);
      CHECK(after == model.end() || ptr + rounded(nbytes) <= after->first);
      CHECK(after == model.begin() || std::prev(after)->first + rounded(std::prev(after)->second.nbytes) <= ptr);
      const auto mark = static_cast<unsigned char>(random());
      if (nbytes > 0) ptr[0] = ptr[nbytes / 2] = ptr[nbytes - 1] = static_cast<char>(mark);
      model[ptr] = {nbytes, mark};
      allocated += rounded(nbytes);
    } else {
      auto victim = model.begin();
      std::advance(victim, random() % model.size());
      const auto [ptr, block] = *victim;
      const auto mark = static_cast<char>(block.mark);
      if (block.nbytes > 0) CHECK(ptr[0] == mark && ptr[block.nbytes / 2] == mark && ptr[block.nbytes - 1] == mark);
      RegionRef where = {};
      CHECK(pool.Find(ptr, block.nbytes, &where) && where.offset + block.nbytes <= where.region_nbytes);
      CHECK(pool.Release(ptr));
      allocated -= rounded(block.nbytes);
      model.erase(victim);
    }
    CHECK(pool.stats().allocated_nbytes == allocated && pool.stats().reserved_nbytes >= allocated);
  }
  for (const auto& [ptr, block] : model) CHECK(pool.Release(ptr));
  CHECK(pool.stats().allocated_nbytes == 0 && pool.stats().regions == 1);
  size_t cursor = 0;
  const std::vector<uint64_t> freed = pool.FreedSince(&cursor);
  CHECK(std::set<uint64_t>(freed.begin(), freed.end()).size() == freed.size());
}

void ThreadsShareAPool() {
  Pool pool;
  std::atomic<bool> finished{false};
  std::vector<uint64_t> freed;
  std::thread watcher([&] {
    size_t cursor = 0;
    while (true) {
      const bool last = finished.load();
      for (const uint64_t id : pool.FreedSince(&cursor)) freed.push_back(id);
      if (last) return;
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> users;
  for (unsigned user = 0; user < 4; ++user) {
    users.emplace_back([&pool, user] {
      std::mt19937_64 random(user);
      std::vector<std::pair<char*, size_t>> mine;
      for (unsigned step = 0; step < 800; ++step) {
        if (mine.size() < 6 && random() % 2 == 0) {
          const size_t nbytes = step % 200 == user ? kRegion : 1 + random() % (kMiB / 2);
          auto* const ptr = static_cast<char*>(pool.Allocate(nbytes));
          CHECK(ptr != nullptr);
          ptr[0] = ptr[nbytes - 1] = static_cast<char>(user);
          mine.emplace_back(ptr, nbytes);
        } else if (!mine.empty()) {
          const auto [ptr, nbytes] = mine.back();
          mine.pop_back();
          RegionRef where = {};
          CHECK(pool.Find(ptr, nbytes, &where));
          CHECK(ptr[0] == static_cast<char>(user) && ptr[nbytes - 1] == static_cast<char>(user));
          CHECK(pool.Release(ptr));
        }
      }
      for (const auto& [ptr, nbytes] : mine) CHECK(pool.Release(ptr));
    });
  }
  for (auto& user : users) user.join();
  finished.store(true);
  watcher.join();
  CHECK(pool.stats().allocated_nbytes == 0 && pool.stats().regions == 1);
  CHECK(std::set<uint64_t>(freed.begin(), freed.end()).size() == freed.size());
  size_t cursor = 0;
  CHECK(pool.FreedSince(&cursor) == freed);
}

}  // namespace
}  // namespace ringfold

int main() {
  using namespace ringfold;
  RUN(TwoMappingsOfOneDescriptorAreOneMemory);
  RUN(AMappingMovesAndClosesOnce);
  RUN(APeerCannotShrinkAMapping);
  RUN(WhatCannotBeMappedIsAnError);
  RUN(AllocationsAreAlignedAndApart);
  RUN(FindSaysWhereARangeLies);
  RUN(ReleaseKnowsWhatIsAllocated);
  RUN(NeighboursCoalesceInAnyOrder);
  RUN(OneFreeRegionIsKeptAndTheOthersAreLogged);
  RUN(TooMuchIsNullptrAndLeavesThePoolWorking);
  RUN(RandomUseMatchesAModel);
  RUN(ThreadsShareAPool);
  return 0;
}
