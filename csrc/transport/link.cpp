#include "transport/link.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "common/deadline.h"

namespace ringfold {
namespace {

constexpr uint32_t kMagic = 0x4b4e4c52;
constexpr uint32_t kMaxText = 4096;
constexpr int kMaxDescriptors = 4;

struct Wire {
  uint32_t magic;
  LinkType type;
  uint64_t a;
  uint64_t b;
  uint64_t c;
  uint32_t text_nbytes;
  uint32_t descriptors;
};

}  // namespace

Link::Link(int fd) : socket_(fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

Error Link::Send(LinkType type, uint64_t a, uint64_t b, uint64_t c, const std::string& text, const std::vector<int>& descriptors,
                 uint64_t deadline_ns) {
  Wire wire = {kMagic, type, a, b, c, static_cast<uint32_t>(std::min<size_t>(text.size(), kMaxText)), static_cast<uint32_t>(descriptors.size())};
  std::string bytes(reinterpret_cast<const char*>(&wire), sizeof wire);
  bytes.append(text, 0, wire.text_nbytes);
  size_t sent = 0;
  while (sent < bytes.size()) {
    iovec part = {bytes.data() + sent, bytes.size() - sent};
    msghdr message = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))] = {};
    if (sent == 0 && !descriptors.empty()) {
      message.msg_control = control;
      message.msg_controllen = CMSG_SPACE(descriptors.size() * sizeof(int));
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
      std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size() * sizeof(int));
    }
    const ssize_t n = sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
    if (n >= 0) {
      sent += static_cast<size_t>(n);
      continue;
    }
    if (errno == EINTR) continue;
    if (errno == EPIPE || errno == ECONNRESET) return {ErrorCode::kPeerLost, -1, "it has closed its link"};
    if (errno != EAGAIN && errno != EWOULDBLOCK) return SystemError("cannot write to a peer's link");
    const uint64_t now = NowNs();
    if (now >= deadline_ns) return {ErrorCode::kTimeout, -1, "a peer does not read its link"};
    pollfd wait = {socket_.get(), POLLOUT, 0};
    poll(&wait, 1, static_cast<int>(std::min<uint64_t>((deadline_ns - now) / kMillisecond + 1, 100)));
  }
  return {};
}

Link::Next Link::Receive(LinkMessage* message) {
  for (;;) {
    Wire wire;
    if (buffer_.size() >= sizeof wire) {
      std::memcpy(&wire, buffer_.data(), sizeof wire);
      if (wire.magic != kMagic || wire.text_nbytes > kMaxText || wire.descriptors > kMaxDescriptors) return Next::kEnd;
      if (buffer_.size() >= sizeof wire + wire.text_nbytes && arrived_.size() >= wire.descriptors) {
        message->type = wire.type;
        message->a = wire.a;
        message->b = wire.b;
        message->c = wire.c;
        message->text = buffer_.substr(sizeof wire, wire.text_nbytes);
        message->descriptors.clear();
        for (uint32_t i = 0; i < wire.descriptors; ++i) message->descriptors.push_back(std::move(arrived_[i]));
        arrived_.erase(arrived_.begin(), arrived_.begin() + wire.descriptors);
        buffer_.erase(0, sizeof wire + wire.text_nbytes);
        return Next::kMessage;
      }
    }
    if (ended_) return Next::kEnd;
    char bytes[4096];
    iovec part = {bytes, sizeof bytes};
    alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))];
    msghdr header = {};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    const ssize_t n = recvmsg(socket_.get(), &header, MSG_CMSG_CLOEXEC);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return Next::kNothing;
      ended_ = true;
      unreachable_ = errno == ETIMEDOUT || errno == EHOSTUNREACH || errno == ENETUNREACH;
      continue;
    }
    for (cmsghdr* c = CMSG_FIRSTHDR(&header); c != nullptr; c = CMSG_NXTHDR(&header, c)) {
      if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
      const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (size_t i = 0; i < count; ++i) {
        int fd;
        std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof fd);
        arrived_.emplace_back(fd);
      }
    }
    if (n == 0) ended_ = true;
    buffer_.append(bytes, static_cast<size_t>(n));
  }
}

}  // namespace ringfold
