// Wakes a peer that sleeps. Before it sleeps a rank sets `sleeping` and looks once more; whoever changes shared memory for it looks at
// `sleeping` afterwards. With a full fence on both sides one of the two always sees the other, and a system call is made only for a sleeper.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace ringfold {

class Bell {
 public:
  Bell() = default;
  Bell(std::atomic<uint32_t>* sleeping, int eventfd) : sleeping_(sleeping), eventfd_(eventfd) {}

  void Ring() const {
    if (sleeping_ == nullptr) return;
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (sleeping_->load(std::memory_order_relaxed) == 0) return;
    if (sleeping_->exchange(0) == 0) return;
    const uint64_t one = 1;
    // The counter cannot overflow (one write per sleep); a peer that has died needs no bell.
    [[maybe_unused]] const ssize_t written = write(eventfd_, &one, sizeof one);
  }

 private:
  std::atomic<uint32_t>* sleeping_ = nullptr;
  int eventfd_ = -1;
};

}  // namespace ringfold
