// The two ends of a one-way stream of frames between two ranks. Nothing here blocks: a call moves what it can and is repeated
// with the same arguments until it answers kDone. A channel is used by one thread at a time.
//
// A transport is a pair of these (shm/channel.h, tcp/channel.h); csrc/test/test_channel.cpp is the contract both pass.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "transport/frame.h"

namespace ringfold {

enum class Io {
  kBlocked,  // nothing moved: the peer must act first
  kMoved,    // something moved, more is to come
  kDone,     // the frame is complete
  kBroken,   // the stream has ended: the peer is gone
};

// Where a payload goes: dst = incoming, or dst = local op incoming.
struct Sink {
  char* dst = nullptr;
  size_t nbytes = 0;
  const char* local = nullptr;  // null: no reduction
  DType dtype = DType::U8;
  Reduction reduction = Reduction::Sum;
  unsigned divisor = 1;
};

class Sender {
 public:
  virtual ~Sender() = default;
  // Sends one frame. `payload` (header.nbytes long) must stay as it is until kDone.
  virtual Io Send(const FrameHeader& header, const char* payload) = 0;
};

class Receiver {
 public:
  virtual ~Receiver() = default;
  // Shows the header of the frame at the front without taking it: kDone once it has arrived, and until Receive has answered kDone.
  virtual Io Peek(FrameHeader* header) = 0;
  // Takes the payload of the frame that Peek showed; sink.nbytes equals its nbytes.
  virtual Io Receive(const Sink& sink) = 0;
};

}  // namespace ringfold
