// The control connection to one peer: small messages in order, descriptors with them (same host), and the peer's death as end of file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/descriptor.h"
#include "common/error.h"

namespace ringfold {

enum class LinkType : uint32_t {
  kHello = 1,     // a: bytes of the page, b: address of c in the sender's memory; descriptors: page, doorbell
  kArena = 2,     // a: communicator, b: bytes, c: whether the sender can read the memory of all members; descriptor: its inbound rings
  kRegion = 3,    // a: region, b: bytes; descriptor: registered memory
  kUnregion = 4,  // a: region, unmapped by its owner
  kAbort = 5,     // a: communicator, b: error code, c: rank at fault + 1; text: what happened
  kBye = 6,       // an orderly end
  kStanding = 7,  // a: operation << 32 | sequence, b: world rank it has been waiting for, + 1; text: its call site; for peers that cannot read the page
  kLost = 8,      // a: world rank whose death the sender has seen, so that nobody takes the sender's own end for the first
  kAsk = 9,       // a: communicator, b: operation << 32 | sequence: where did you issue that?
  kAnswer = 10,   // text: there
};

struct LinkMessage {
  LinkType type = LinkType::kBye;
  uint64_t a = 0;
  uint64_t b = 0;
  uint64_t c = 0;
  std::string text;
  std::vector<Descriptor> descriptors;
};

class Link {
 public:
  // Takes the connected, authenticated stream socket `fd` and makes it nonblocking.
  explicit Link(int fd);

  // Sends a whole message; waits for room until `deadline_ns`. Descriptors are borrowed.
  Error Send(LinkType type, uint64_t a, uint64_t b, uint64_t c, const std::string& text, const std::vector<int>& descriptors,
             uint64_t deadline_ns);

  enum class Next { kNothing, kMessage, kEnd };
  // Takes the next message if all of it has arrived.
  Next Receive(LinkMessage* message);

  // The link has ended without its peer: the kernel gave up on a host that no longer answers, or has no way to it.
  bool unreachable() const { return unreachable_; }

  int fd() const { return socket_.get(); }
  void Close() { socket_.Close(); }

 private:
  Descriptor socket_;
  std::string buffer_;
  std::vector<Descriptor> arrived_;  // descriptors of messages not yet taken, in order
  bool ended_ = false;
  bool unreachable_ = false;
};

}  // namespace ringfold
