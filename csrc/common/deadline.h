// Monotonic time. Every wait in the core ends at a deadline given in these nanoseconds.
#pragma once

#include <ctime>

#include <cstdint>

namespace ringfold {

constexpr uint64_t kMillisecond = 1000000;
constexpr uint64_t kSecond = 1000 * kMillisecond;

// CLOCK_MONOTONIC is one clock for every process of a host, so pages of different ranks compare.
inline uint64_t NowNs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * kSecond + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace ringfold
