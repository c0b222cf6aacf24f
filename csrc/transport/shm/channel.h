// Frames through shared memory, in the receiver's: one producer, one consumer, a ring of headers and a ring of payload bytes.
//
// A header is one cache line, and says itself that it has come: the word with its length also holds the number of the lap, and is written last, with
// release. So a small frame, whose payload is in its header, takes one line from core to core, and nothing else is written or read for it. The consumer
// says now and then how many headers it has taken.
//
// Of the payload ring the producer owns `tail`, the consumer `head`; bytes [head, tail) are the consumer's. The producer publishes a tail with release
// after the bytes are written, the consumer publishes a head with release after they are read. Payloads start at multiples of 64, and heads are
// published in multiples of 64, so every span but a payload's last is a multiple of 64 bytes: elements are never torn by the end of the ring, and a
// reduction reads its operand straight out of it.
#pragma once

#include <atomic>

#include "transport/channel.h"
#include "transport/shm/bell.h"

namespace ringfold::shm {

constexpr uint64_t kHeaders = 64;

// A FrameHeader with its lap in the upper bits of nbytes; 0 is that of no lap.
struct alignas(64) HeaderLine {
  Fingerprint fingerprint;
  std::atomic<uint64_t> lap_and_nbytes;
  uint64_t region;
  uint64_t offset;
  uint8_t inline_payload[kInlineBytes];
};

static_assert(sizeof(HeaderLine) == sizeof(FrameHeader), "one cache line");

struct Ring {
  alignas(64) std::atomic<uint64_t> tail;
  alignas(64) std::atomic<uint64_t> head;
  alignas(64) std::atomic<uint64_t> taken;  // headers
  HeaderLine headers[kHeaders];
  alignas(64) char bytes[1];  // `capacity` of them
};

constexpr size_t kRingHeader = 3 * 64 + kHeaders * sizeof(HeaderLine);
constexpr size_t RingBytes(size_t capacity) { return kRingHeader + capacity; }

class ChannelSender : public Sender {
 public:
  // `capacity`: bytes, a multiple of 64. `bell` wakes the receiver.
  ChannelSender(Ring* ring, size_t capacity, Bell bell) : ring_(ring), capacity_(capacity), bell_(bell) {}
  Io Send(const FrameHeader& header, const char* payload) override;

 private:
  bool SendHeader(const FrameHeader& header, const char* payload);
  size_t Free();
  void Publish();

  Ring* ring_;
  size_t capacity_;
  Bell bell_;
  uint64_t sent_ = 0;   // headers
  uint64_t taken_ = 0;  // of them, as last seen
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
  void TakeHeader();
  size_t Available();
  void Release();

  Ring* ring_;
  size_t capacity_;
  Bell bell_;
  uint64_t taken_ = 0;  // headers
  uint64_t head_ = 0;
  uint64_t tail_ = 0;  // last seen
  FrameHeader header_;  // of the frame at the front
  size_t offset_ = 0;   // payload bytes of the current frame already taken
  bool in_frame_ = false;
};

}  // namespace ringfold::shm
