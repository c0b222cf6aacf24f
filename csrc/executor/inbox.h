// The receives of one communicator, and the messages that arrive for them: a message goes to the first receive posted for its tag and for its
// sender, or for anybody.
//
// A message that nobody waits for stays where it is, in its sender's channel, and its sender waits: nothing is queued. Only where a receive
// waits for a later message of the same sender is the one in front put aside, in the heap, up to kAsideNbytes in all.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "executor/operation.h"

namespace ringfold {

class Inbox {
 public:
  static constexpr size_t kAsideNbytes = size_t{1} << 30;

  explicit Inbox(int size) : senders_(static_cast<size_t>(size)) {}

  // Adds a receive from request().peer, or from anybody (-1). False: a message put aside was for it, and it is finished or broken already.
  bool Post(const std::shared_ptr<Operation>& operation);

  // Receives what it can. `program(peer)`: the one step that receives from that peer. Calls `finished(operation)` for each receive that has
  // ended. Sets `broken` to an operation whose stream or message is bad (or leaves it), or `lost` to a sender whose stream ended between messages.
  bool Progress(Peers* peers, const std::function<const Program*(int)>& program, const std::function<void(Operation*)>& finished,
                Operation** broken, int* lost);

  const std::deque<std::shared_ptr<Operation>>& posted() const { return posted_; }
  bool empty() const { return posted_.empty(); }
  // Takes out the first receive, whatever its state.
  std::shared_ptr<Operation> Remove();
  size_t aside_nbytes() const { return aside_nbytes_; }

 private:
  struct Aside {
    int sender;
    FrameHeader header;
    std::unique_ptr<char[]> payload;
  };
  struct Sender {
    std::shared_ptr<Operation> receiving;   // the receive that its message in front goes to
    std::unique_ptr<Aside> putting_aside;
    bool ended = false;  // its stream has
  };

  bool Wanted(int sender) const;
  bool InVain(int ended) const;
  std::shared_ptr<Operation> Match(int sender, uint32_t tag) const;
  void Forget(const Operation* operation);

  std::deque<std::shared_ptr<Operation>> posted_;  // in the order of their posting, those being received included
  std::vector<Sender> senders_;                    // by rank
  std::deque<Aside> aside_;                        // in the order of their arrival
  size_t aside_nbytes_ = 0;
};

}  // namespace ringfold
