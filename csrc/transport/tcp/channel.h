// Frames through stream sockets of their own, one set per pair and lane. The descriptors are nonblocking; the kernel's buffers are the flow control.
//
// With several streams a large payload is cut into one stripe for each, so that no single flow's limit (a shaper's, a hashed path's, one congestion
// window's) is the pair's. Stream 0 carries the headers, the small payloads and every first stripe. A stream holds the stripes of successive frames
// in their order, and both ends cut alike, so nothing on the wire says which stripe is which.
#pragma once

#include <cstddef>
#include <vector>

#include "transport/channel.h"

namespace ringfold::tcp {

// What one stream carries of the frame at hand.
struct Stripe {
  int fd;
  size_t begin = 0;  // in the payload
  size_t nbytes = 0;
  size_t moved = 0;
  size_t torn_nbytes = 0;  // received, but less than an element of a reduction: they wait in `torn`
  char torn[16] = {};      // no element is longer
};

class ChannelSender : public Sender {
 public:
  // `fds` are borrowed: both directions of a lane share their sockets, owned by its communicator. The peer has the other ends in the same order.
  explicit ChannelSender(const std::vector<int>& fds);
  Io Send(const FrameHeader& header, const char* payload) override;

 private:
  Io Push(const FrameHeader& wire, const char* payload, Stripe* stripe);

  std::vector<Stripe> stripes_;
  bool started_ = false;  // the stripes are those of a frame not yet sent whole
  size_t header_sent_ = 0;
};

class ChannelReceiver : public Receiver {
 public:
  explicit ChannelReceiver(const std::vector<int>& fds);
  Io Peek(FrameHeader* header) override;
  Io Receive(const Sink& sink) override;

 private:
  Io Pull(const Sink& sink, Stripe* stripe);

  std::vector<Stripe> stripes_;
  FrameHeader header_;
  size_t header_got_ = 0;
  std::vector<char> operand_;  // incoming elements of a reduction
};

}  // namespace ringfold::tcp
