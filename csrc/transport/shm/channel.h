// Frames through a ring of bytes in shared memory: one producer, one consumer, two positions that only grow.
//
// The ring lies in the receiver's memory. The producer owns `tail`, the consumer `head`; bytes [head, tail) are the consumer's. The producer
// publishes a tail with release after the bytes are written, the consumer publishes a head with release after they are read. Frames start at
// multiples of 64, and heads are published in multiples of 64, so every span but a frame's last is a multiple of 64 bytes: elements are never
// torn by the end of the ring, and a reduction reads its operand straight out of it.
#pragma once

#include <atomic>

#include "transport/channel.h"
#include "transport/shm/bell.h"

namespace ringfold::shm {

struct Ring {
  alignas(64) std::atomic<uint64_t> tail;
  alignas(64) std::atomic<uint64_t> head;
  alignas(64) char bytes[1];  // `capacity` of them
};

constexpr size_t kRingHeader = 128;
constexpr size_t RingBytes(size_t capacity) { return kRingHeader + capacity; }

class ChannelSender : public Sender {
 public:
  // `capacity`: bytes, a multiple of 64. `bell` wakes the receiver.
  ChannelSender(Ring* ring, size_t capacity, Bell bell) : ring_(ring), capacity_(capacity), bell_(bell) {}
  Io Send(const FrameHeader& header, const char* payload) override;

 private:
  size_t Free();
  void Publish();

  Ring* ring_;
  size_t capacity_;
  Bell bell_;
  uint64_t tail_ = 0;
  uint64_t head_ = 0;  // last seen
  size_t offset_ = 0;  // payload bytes of the current frame already in the ring
  bool in_frame_ = false;
};

class ChannelReceiver : public Receiver {
 public:
  // `bell` wakes the sender.
  ChannelReceiver(Ring* ring, size_t capacity, Bell bell) : ring_(ring), capacity_(capacity), bell_(bell) {}
  Io Peek(FrameHeader* header) override;
  Io Receive(const Sink& sink) override;

 private:
  size_t Available();
  void Release();

  Ring* ring_;
  size_t capacity_;
  Bell bell_;
  uint64_t head_ = 0;
  uint64_t tail_ = 0;  // last seen
  FrameHeader header_;  // of the frame at the front
  size_t offset_ = 0;   // payload bytes of the current frame already taken
  bool in_frame_ = false;
};

}  // namespace ringfold::shm
