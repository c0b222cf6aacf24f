// Frames through a stream socket of their own, one per direction and lane. The descriptor is nonblocking; the kernel's buffers are the flow control.
#pragma once

#include <memory>
#include <vector>

#include "common/descriptor.h"
#include "transport/channel.h"

namespace ringfold::tcp {

class ChannelSender : public Sender {
 public:
  // `fd` is borrowed: the two directions of a lane share one socket, owned by its communicator.
  explicit ChannelSender(int fd) : fd_(fd) {}
  Io Send(const FrameHeader& header, const char* payload) override;

 private:
  int fd_;
  size_t offset_ = 0;  // bytes of the current frame, header included, already given to the kernel
};

class ChannelReceiver : public Receiver {
 public:
  explicit ChannelReceiver(int fd) : fd_(fd) {}
  Io Peek(FrameHeader* header) override;
  Io Receive(const Sink& sink) override;

 private:
  Io Read(char* dst, size_t nbytes, size_t* got);

  int fd_;
  FrameHeader header_;
  size_t header_got_ = 0;
  size_t offset_ = 0;         // payload bytes landed
  std::vector<char> operand_;  // incoming elements of a reduction
  size_t carried_ = 0;        // bytes at the front of operand_ not yet reduced (a torn element)
};

}  // namespace ringfold::tcp
