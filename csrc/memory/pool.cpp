#include "memory/pool.h"

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <limits>
#include <mutex>
#include <utility>

namespace ringfold {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kLarge = size_t{64} << 10;
constexpr size_t kLargeAlignment = size_t{4} << 10;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kRegionMinimum = size_t{16} << 20;

constexpr size_t RoundUp(size_t nbytes, size_t multiple) { return (nbytes + multiple - 1) / multiple * multiple; }

// The region that holds `ptr`, or the end. For constant and other maps.
template <class Regions>
auto RegionOf(Regions& regions, const void* ptr) {
  const auto address = reinterpret_cast<uintptr_t>(ptr);
  auto region = regions.upper_bound(address);
  if (region == regions.begin()) return regions.end();
  --region;
  return address - region->first < region->second.mapping.size() ? region : regions.end();
}

}  // namespace

void* Pool::Cut(Region* region, size_t nbytes, size_t alignment) {
  for (auto hole = region->holes.begin(); hole != region->holes.end(); ++hole) {
    const auto [begin, length] = *hole;
    const size_t offset = RoundUp(begin, alignment);  // regions begin on a page
    if (offset + nbytes > begin + length) continue;
    region->blocks.emplace(offset, nbytes);
    region->holes.erase(hole);
    if (offset > begin) region->holes.emplace(begin, offset - begin);
    if (offset + nbytes < begin + length) region->holes.emplace(offset + nbytes, begin + length - offset - nbytes);
    allocated_nbytes_ += nbytes;
    return region->mapping.data() + offset;
  }
  return nullptr;
}

void* Pool::CutAny(size_t nbytes, size_t alignment) {
  for (auto& [address, region] : regions_) {
    if (void* ptr = Cut(&region, nbytes, alignment)) return ptr;
  }
  return nullptr;
}

void* Pool::Allocate(size_t nbytes) {
  if (nbytes > std::numeric_limits<size_t>::max() / 2) {
    errno = ENOMEM;
    return nullptr;
  }
  const size_t rounded = RoundUp(std::max(nbytes, kAlignment), kAlignment);
  const size_t alignment = rounded >= kLarge ? kLargeAlignment : kAlignment;
  {
    const std::lock_guard lock(mutex_);
    if (void* ptr = CutAny(rounded, alignment)) return ptr;
  }
  // Making a region takes milliseconds, and Find must not wait for it.
  const size_t wanted = std::max(RoundUp(rounded, kHugePage), kRegionMinimum);
  Mapping mapping = Mapping::Create(wanted);
  if (!mapping.valid() && DropSpare()) mapping = Mapping::Create(wanted);
  if (!mapping.valid()) {
    errno = mapping.error();
    return nullptr;
  }
  const std::lock_guard lock(mutex_);
  const size_t region_nbytes = mapping.size();
  const auto address = reinterpret_cast<uintptr_t>(mapping.data());
  Region region{next_id_++, std::move(mapping), {{0, region_nbytes}}, {}};
  reserved_nbytes_ += region_nbytes;
  return Cut(&regions_.emplace(address, std::move(region)).first->second, rounded, alignment);
}

Mapping Pool::TakeSpare(const Region* except) {
  for (auto region = regions_.begin(); region != regions_.end(); ++region) {
    if (&region->second == except || !region->second.blocks.empty()) continue;
    Mapping mapping = std::move(region->second.mapping);
    freed_.push_back(region->second.id);
    freed_count_.store(freed_.size(), std::memory_order_release);
    reserved_nbytes_ -= mapping.size();
    regions_.erase(region);
    return mapping;
  }
  return Mapping();
}

bool Pool::DropSpare() {
  std::unique_lock lock(mutex_);
  const Mapping unmapped = TakeSpare(nullptr);
  lock.unlock();
  return unmapped.valid();
}

bool Pool::Release(void* ptr) {
  if (ptr == nullptr) return true;
  Mapping unmapped;  // unmaps after the lock is gone
  const std::lock_guard lock(mutex_);
  const auto found = RegionOf(regions_, ptr);
  if (found == regions_.end()) return false;
  Region& region = found->second;
  const auto block = region.blocks.find(static_cast<size_t>(static_cast<char*>(ptr) - region.mapping.data()));
  if (block == region.blocks.end()) return false;

  auto [begin, length] = *block;
  allocated_nbytes_ -= length;
  region.blocks.erase(block);
  auto next = region.holes.lower_bound(begin);
  if (next != region.holes.end() && next->first == begin + length) {
    length += next->second;
    next = region.holes.erase(next);
  }
  if (next != region.holes.begin() && std::prev(next)->first + std::prev(next)->second == begin) {
    std::prev(next)->second += length;
  } else {
    region.holes.emplace_hint(next, begin, length);
  }
  // The region that is free now becomes the spare: it is the likeliest to be wanted again in its size.
  if (region.blocks.empty()) unmapped = TakeSpare(&region);
  return true;
}

bool Pool::Find(const void* ptr, size_t nbytes, RegionRef* out) const {
  const std::shared_lock lock(mutex_);
  const auto found = RegionOf(regions_, ptr);
  if (found == regions_.end()) return false;
  const Mapping& mapping = found->second.mapping;
  const auto offset = static_cast<size_t>(static_cast<const char*>(ptr) - mapping.data());
  if (nbytes > mapping.size() - offset) return false;
  *out = {found->second.id, offset, mapping.size(), mapping.fd()};
  return true;
}

std::vector<uint64_t> Pool::FreedSince(size_t* cursor) const {
  if (*cursor == freed_count_.load(std::memory_order_acquire)) return {};
  const std::shared_lock lock(mutex_);
  const std::vector<uint64_t> news(freed_.begin() + static_cast<ptrdiff_t>(*cursor), freed_.end());
  *cursor = freed_.size();
  return news;
}

PoolStats Pool::stats() const {
  const std::shared_lock lock(mutex_);
  return {reserved_nbytes_, allocated_nbytes_, regions_.size()};
}

}  // namespace ringfold
