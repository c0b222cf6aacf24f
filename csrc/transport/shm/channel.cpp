#include "transport/shm/channel.h"

#include <algorithm>
#include <cstring>

#include "reduce/reduce.h"

namespace ringfold::shm {
namespace {

// Published this often, so that the consumer works on the front of a block while the producer copies its rest; half an L1 cache.
constexpr size_t kSpan = 16384;

constexpr int kLapShift = 48;  // no payload has that many bytes
constexpr uint64_t kTold = kHeaders / 4;

// Laps are told apart from the one before, which is what a line holds until it is written again.
constexpr uint64_t LapOf(uint64_t number) { return (number / kHeaders % 0xffff + 1) << kLapShift; }

constexpr uint64_t RoundUp(uint64_t position) { return (position + 63) & ~uint64_t{63}; }

void Land(const Sink& sink, size_t offset, const char* incoming, size_t nbytes) {
  if (nbytes == 0) return;
  if (sink.local == nullptr) {
    std::memcpy(sink.dst + offset, incoming, nbytes);
    return;
  }
  ReducePair(sink.dtype, sink.reduction, sink.dst + offset, sink.local + offset, incoming, nbytes / SizeOf(sink.dtype), sink.divisor);
}

}  // namespace

size_t ChannelSender::Free() {
  size_t free = capacity_ - static_cast<size_t>(tail_ - head_);
  if (free == 0) {
    head_ = ring_->head.load(std::memory_order_acquire);
    free = capacity_ - static_cast<size_t>(tail_ - head_);
  }
  return free;
}

void ChannelSender::Publish() {
  ring_->tail.store(tail_, std::memory_order_release);
  bell_.Ring();
}

bool ChannelSender::SendHeader(const FrameHeader& header, const char* payload) {
  if (sent_ - taken_ == kHeaders) {
    taken_ = ring_->taken.load(std::memory_order_acquire);
    if (sent_ - taken_ == kHeaders) return false;
  }
  HeaderLine& line = ring_->headers[sent_ % kHeaders];
  line.fingerprint = header.fingerprint;
  line.region = header.region;
  line.offset = header.offset;
  if (header.nbytes > 0 && header.nbytes <= kInlineBytes) std::memcpy(line.inline_payload, payload, header.nbytes);
  line.lap_and_nbytes.store(LapOf(sent_) | header.nbytes, std::memory_order_release);
  ++sent_;
  bell_.Ring();
  return true;
}

Io ChannelSender::Send(const FrameHeader& header, const char* payload) {
  bool moved = false;
  if (!in_frame_) {
    if (!SendHeader(header, payload)) return Io::kBlocked;
    if (header.nbytes <= kInlineBytes) return Io::kDone;
    in_frame_ = true;
    offset_ = 0;
    moved = true;
  }
  while (offset_ < header.nbytes) {
    const size_t free = Free();
    if (free == 0) {
      Publish();
      return moved ? Io::kMoved : Io::kBlocked;
    }
    const size_t at = tail_ % capacity_;
    const size_t span = std::min({header.nbytes - offset_, free, capacity_ - at, kSpan});
    std::memcpy(ring_->bytes + at, payload + offset_, span);
    tail_ += span;
    offset_ += span;
    moved = true;
    if (offset_ == header.nbytes) tail_ = RoundUp(tail_);
    Publish();
  }
  in_frame_ = false;
  return Io::kDone;
}

size_t ChannelReceiver::Available() {
  if (tail_ == head_) tail_ = ring_->tail.load(std::memory_order_acquire);
  return static_cast<size_t>(tail_ - head_);
}

void ChannelReceiver::Release() {
  ring_->head.store(head_, std::memory_order_release);
  bell_.Ring();
}

void ChannelReceiver::TakeHeader() {
  if (++taken_ % kTold != 0) return;
  ring_->taken.store(taken_, std::memory_order_release);
  bell_.Ring();
}

Io ChannelReceiver::Peek(FrameHeader* header) {
  if (!in_frame_) {
    const HeaderLine& line = ring_->headers[taken_ % kHeaders];
    const uint64_t word = line.lap_and_nbytes.load(std::memory_order_acquire);
    if ((word >> kLapShift << kLapShift) != LapOf(taken_)) return Io::kBlocked;
    header_.fingerprint = line.fingerprint;
    header_.nbytes = word ^ LapOf(taken_);
    header_.region = line.region;
    header_.offset = line.offset;
    std::memcpy(header_.inline_payload, line.inline_payload, kInlineBytes);
  }
  *header = header_;
  return Io::kDone;
}

Io ChannelReceiver::Receive(const Sink& sink) {
  bool moved = false;
  if (!in_frame_) {
    TakeHeader();  // which Peek has copied
    if (sink.nbytes <= kInlineBytes) {
      Land(sink, 0, reinterpret_cast<const char*>(header_.inline_payload), sink.nbytes);
      return Io::kDone;
    }
    in_frame_ = true;
    offset_ = 0;
    moved = true;
  }
  while (offset_ < sink.nbytes) {
    const size_t available = Available();
    if (available == 0) {
      Release();
      return moved ? Io::kMoved : Io::kBlocked;
    }
    const size_t at = head_ % capacity_;
    const size_t span = std::min({sink.nbytes - offset_, available, capacity_ - at, kSpan});
    Land(sink, offset_, ring_->bytes + at, span);
    head_ += span;
    offset_ += span;
    moved = true;
    if (offset_ == sink.nbytes) head_ = RoundUp(head_);
    Release();
  }
  in_frame_ = false;
  return Io::kDone;
}

}  // namespace ringfold::shm
