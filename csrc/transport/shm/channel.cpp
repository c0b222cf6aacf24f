#include "transport/shm/channel.h"

#include <algorithm>
#include <cstring>

#include "reduce/reduce.h"

namespace ringfold::shm {
namespace {

// Published this often, so that the consumer works on the front of a block while the producer copies its rest; half an L1 cache.
constexpr size_t kSpan = 16384;

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

Io ChannelSender::Send(const FrameHeader& header, const char* payload) {
  bool moved = false;
  if (!in_frame_) {
    if (Free() == 0) return Io::kBlocked;  // free space is a multiple of 64 between frames
    FrameHeader* slot = reinterpret_cast<FrameHeader*>(ring_->bytes + tail_ % capacity_);
    std::memcpy(slot, &header, sizeof header);
    tail_ += sizeof header;
    if (header.nbytes <= kInlineBytes) {
      if (header.nbytes > 0) std::memcpy(slot->inline_payload, payload, header.nbytes);
      Publish();
      return Io::kDone;
    }
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

Io ChannelReceiver::Peek(FrameHeader* header) {
  if (!in_frame_) {
    if (Available() == 0) return Io::kBlocked;
    std::memcpy(&header_, ring_->bytes + head_ % capacity_, sizeof header_);
  }
  *header = header_;
  return Io::kDone;
}

Io ChannelReceiver::Receive(const Sink& sink) {
  bool moved = false;
  if (!in_frame_) {
    if (Available() == 0) return Io::kBlocked;
    if (sink.nbytes <= kInlineBytes) {
      Land(sink, 0, reinterpret_cast<const char*>(header_.inline_payload), sink.nbytes);
      head_ += sizeof(FrameHeader);
      Release();
      return Io::kDone;
    }
    head_ += sizeof(FrameHeader);
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
