#include "transport/tcp/channel.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "reduce/reduce.h"

namespace ringfold::tcp {
namespace {

constexpr size_t kOperandBytes = 128 * 1024;
// A call moves at most this much, so that one fast stream does not keep the others waiting.
constexpr size_t kTurnBytes = 1024 * 1024;

}  // namespace

Io ChannelSender::Send(const FrameHeader& header, const char* payload) {
  FrameHeader wire = header;
  size_t total = sizeof wire;
  if (header.nbytes > 0 && header.nbytes <= kInlineBytes) {
    std::memcpy(wire.inline_payload, payload, header.nbytes);
  } else {
    total += header.nbytes;
  }
  const size_t start = offset_;
  while (offset_ < total) {
    if (offset_ - start > kTurnBytes) return Io::kMoved;
    iovec parts[2];
    size_t n = 0;
    if (offset_ < sizeof wire) parts[n++] = {reinterpret_cast<char*>(&wire) + offset_, sizeof wire - offset_};
    if (total > sizeof wire) {
      const size_t at = offset_ > sizeof wire ? offset_ - sizeof wire : 0;
      parts[n++] = {const_cast<char*>(payload) + at, header.nbytes - at};
    }
    msghdr message = {};
    message.msg_iov = parts;
    message.msg_iovlen = n;
    const ssize_t sent = sendmsg(fd_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return offset_ > start ? Io::kMoved : Io::kBlocked;
      return Io::kBroken;
    }
    offset_ += static_cast<size_t>(sent);
  }
  offset_ = 0;
  return Io::kDone;
}

Io ChannelReceiver::Read(char* dst, size_t nbytes, size_t* got) {
  for (;;) {
    const ssize_t n = recv(fd_, dst, nbytes, MSG_DONTWAIT);
    if (n > 0) {
      *got = static_cast<size_t>(n);
      return Io::kMoved;
    }
    if (n == 0) return Io::kBroken;
    if (errno == EINTR) continue;
    return errno == EAGAIN || errno == EWOULDBLOCK ? Io::kBlocked : Io::kBroken;
  }
}

Io ChannelReceiver::Peek(FrameHeader* header) {
  while (header_got_ < sizeof header_) {
    size_t got = 0;
    const Io io = Read(reinterpret_cast<char*>(&header_) + header_got_, sizeof header_ - header_got_, &got);
    if (io != Io::kMoved) return io;
    header_got_ += got;
  }
  *header = header_;
  return Io::kDone;
}

Io ChannelReceiver::Receive(const Sink& sink) {
  const size_t element = sink.local == nullptr ? 1 : SizeOf(sink.dtype);
  if (sink.nbytes > 0 && sink.nbytes <= kInlineBytes) {
    const char* incoming = reinterpret_cast<const char*>(header_.inline_payload);
    if (sink.local == nullptr) {
      std::memcpy(sink.dst, incoming, sink.nbytes);
    } else {
      ReducePair(sink.dtype, sink.reduction, sink.dst, sink.local, incoming, sink.nbytes / element, sink.divisor);
    }
    header_got_ = 0;
    return Io::kDone;
  }
  const size_t start = offset_;
  while (offset_ < sink.nbytes) {
    if (offset_ - start > kTurnBytes) return Io::kMoved;
    size_t got = 0;
    if (sink.local == nullptr) {
      const Io io = Read(sink.dst + offset_, sink.nbytes - offset_, &got);
      if (io == Io::kBlocked) return offset_ > start ? Io::kMoved : Io::kBlocked;
      if (io == Io::kBroken) return io;
      offset_ += got;
      continue;
    }
    operand_.resize(kOperandBytes);
    const size_t want = std::min(kOperandBytes - carried_, sink.nbytes - offset_ - carried_);
    const Io io = Read(operand_.data() + carried_, want, &got);
    if (io == Io::kBlocked) return offset_ > start ? Io::kMoved : Io::kBlocked;
    if (io == Io::kBroken) return io;
    carried_ += got;
    const size_t whole = carried_ / element * element;
    ReducePair(sink.dtype, sink.reduction, sink.dst + offset_, sink.local + offset_, operand_.data(), whole / element, sink.divisor);
    offset_ += whole;
    carried_ -= whole;
    std::memmove(operand_.data(), operand_.data() + whole, carried_);
  }
  offset_ = 0;
  header_got_ = 0;
  return Io::kDone;
}

}  // namespace ringfold::tcp
