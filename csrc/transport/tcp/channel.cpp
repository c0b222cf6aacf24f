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
// A call moves at most this much of a stripe, so that one fast stream does not keep the others waiting.
constexpr size_t kTurnBytes = 1024 * 1024;
// No stripe is shorter, unless it is all there is: below this another system call costs more than another flow brings.
constexpr size_t kStripeBytes = 32 * 1024;
// Stripes begin on cache lines, so no element of any dtype lies in two of them.
constexpr size_t kAlignment = 64;

std::vector<Stripe> Stripes(const std::vector<int>& fds) {
  std::vector<Stripe> stripes;
  for (const int fd : fds) stripes.push_back({fd});
  return stripes;
}

// Cuts a payload for the streams; those that it is too short for get nothing.
void Cut(uint64_t payload_nbytes, std::vector<Stripe>* stripes) {
  const size_t nbytes = payload_nbytes <= kInlineBytes ? 0 : payload_nbytes;  // else it is in the header
  const size_t number = std::clamp<size_t>(nbytes / kStripeBytes, 1, stripes->size());
  const size_t length = ((nbytes + number - 1) / number + kAlignment - 1) / kAlignment * kAlignment;
  for (size_t s = 0; s < stripes->size(); ++s) {
    Stripe& stripe = (*stripes)[s];
    stripe.begin = std::min(s * length, nbytes);
    stripe.nbytes = std::min(length, nbytes - stripe.begin);
    stripe.moved = 0;
  }
}

// What a system call's answer means; `errno` is still its own.
Io Meaning(ssize_t answer) {
  if (answer >= 0) return Io::kMoved;
  return errno == EAGAIN || errno == EWOULDBLOCK ? Io::kBlocked : Io::kBroken;
}

Io Read(int fd, char* dst, size_t nbytes, size_t* got) {
  for (;;) {
    const ssize_t n = recv(fd, dst, nbytes, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n == 0) return Io::kBroken;
    if (n > 0) *got = static_cast<size_t>(n);
    return Meaning(n);
  }
}

// Gives every stripe a turn: `turn` moves what it can of one, and answers kDone once that is complete.
template <typename Turn>
Io All(std::vector<Stripe>* stripes, Turn turn) {
  bool moved = false;
  bool complete = true;
  for (Stripe& stripe : *stripes) {
    const size_t before = stripe.moved;
    const Io io = turn(&stripe);
    if (io == Io::kBroken) return io;
    moved = moved || io == Io::kMoved || stripe.moved != before;
    complete = complete && io == Io::kDone;
  }
  if (complete) return Io::kDone;
  return moved ? Io::kMoved : Io::kBlocked;
}

}  // namespace

ChannelSender::ChannelSender(const std::vector<int>& fds) : stripes_(Stripes(fds)) {}

Io ChannelSender::Send(const FrameHeader& header, const char* payload) {
  if (!started_) {
    Cut(header.nbytes, &stripes_);
    header_sent_ = 0;
    started_ = true;
  }
  FrameHeader wire = header;
  if (header.nbytes > 0 && header.nbytes <= kInlineBytes) std::memcpy(wire.inline_payload, payload, header.nbytes);
  const Io io = All(&stripes_, [&](Stripe* stripe) { return Push(wire, payload, stripe); });
  started_ = io != Io::kDone;
  return io;
}

Io ChannelSender::Push(const FrameHeader& wire, const char* payload, Stripe* stripe) {
  for (size_t pushed = 0;;) {
    const size_t of_header = stripe == &stripes_.front() ? sizeof wire - header_sent_ : 0;
    const size_t of_payload = stripe->nbytes - stripe->moved;
    if (of_header + of_payload == 0) return Io::kDone;
    if (pushed > kTurnBytes) return Io::kMoved;
    iovec parts[2];
    size_t n = 0;
    if (of_header > 0) parts[n++] = {const_cast<char*>(reinterpret_cast<const char*>(&wire)) + header_sent_, of_header};
    if (of_payload > 0) parts[n++] = {const_cast<char*>(payload) + stripe->begin + stripe->moved, of_payload};
    msghdr message = {};
    message.msg_iov = parts;
    message.msg_iovlen = n;
    const ssize_t sent = sendmsg(stripe->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EINTR) continue;
    const Io io = Meaning(sent);
    if (io != Io::kMoved) return io == Io::kBlocked && pushed > 0 ? Io::kMoved : io;
    pushed += static_cast<size_t>(sent);
    const size_t header_part = std::min(static_cast<size_t>(sent), of_header);
    header_sent_ += header_part;
    stripe->moved += static_cast<size_t>(sent) - header_part;
  }
}

ChannelReceiver::ChannelReceiver(const std::vector<int>& fds) : stripes_(Stripes(fds)) {}

Io ChannelReceiver::Peek(FrameHeader* header) {
  while (header_got_ < sizeof header_) {
    size_t got = 0;
    const Io io = Read(stripes_.front().fd, reinterpret_cast<char*>(&header_) + header_got_, sizeof header_ - header_got_, &got);
    if (io != Io::kMoved) return io;
    header_got_ += got;
    if (header_got_ == sizeof header_) Cut(header_.nbytes, &stripes_);
  }
  *header = header_;
  return Io::kDone;
}

Io ChannelReceiver::Receive(const Sink& sink) {
  Io io = Io::kDone;
  if (sink.nbytes > 0 && sink.nbytes <= kInlineBytes) {
    const char* incoming = reinterpret_cast<const char*>(header_.inline_payload);
    if (sink.local == nullptr) {
      std::memcpy(sink.dst, incoming, sink.nbytes);
    } else {
      ReducePair(sink.dtype, sink.reduction, sink.dst, sink.local, incoming, sink.nbytes / SizeOf(sink.dtype), sink.divisor);
    }
  } else {
    io = All(&stripes_, [&](Stripe* stripe) { return Pull(sink, stripe); });
  }
  if (io == Io::kDone) header_got_ = 0;
  return io;
}

Io ChannelReceiver::Pull(const Sink& sink, Stripe* stripe) {
  for (size_t pulled = 0; stripe->moved < stripe->nbytes;) {
    if (pulled > kTurnBytes) return Io::kMoved;
    const size_t at = stripe->begin + stripe->moved;
    const size_t left = stripe->nbytes - stripe->moved;
    size_t got = 0;
    Io io;
    if (sink.local == nullptr) {
      io = Read(stripe->fd, sink.dst + at, left, &got);
      stripe->moved += got;
    } else {
      operand_.resize(kOperandBytes);
      std::memcpy(operand_.data(), stripe->torn, stripe->torn_nbytes);
      io = Read(stripe->fd, operand_.data() + stripe->torn_nbytes, std::min(kOperandBytes, left) - stripe->torn_nbytes, &got);
      const size_t present = stripe->torn_nbytes + got;
      const size_t elements = present / SizeOf(sink.dtype);
      const size_t whole = elements * SizeOf(sink.dtype);
      ReducePair(sink.dtype, sink.reduction, sink.dst + at, sink.local + at, operand_.data(), elements, sink.divisor);
      stripe->moved += whole;
      stripe->torn_nbytes = present - whole;
      std::memcpy(stripe->torn, operand_.data() + whole, stripe->torn_nbytes);
    }
    if (io != Io::kMoved) return io == Io::kBlocked && pulled > 0 ? Io::kMoved : io;
    pulled += got;
  }
  return Io::kDone;
}

}  // namespace ringfold::tcp
