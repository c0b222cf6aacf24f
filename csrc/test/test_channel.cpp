// The contract of a transport: frames arrive whole, in order and unchanged, whatever their sizes and however late either end is; a reduction lands
// as dst = local op incoming; nothing is taken by looking. Every transport runs the same cases, sender and receiver as threads over one ring, or over one or several sockets.

#include <sys/socket.h>

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "common/deadline.h"
#include "common/descriptor.h"
#include "test/check.h"
#include "transport/shm/channel.h"
#include "transport/tcp/channel.h"

namespace ringfold {
namespace {

struct Pair {
  std::unique_ptr<Sender> sender;
  std::unique_ptr<Receiver> receiver;
  std::vector<std::shared_ptr<void>> owned;
  std::vector<std::shared_ptr<Descriptor>> sending;  // the sender's ends of its streams; none where only the link can tell of an end
};

Pair ShmPair(size_t capacity) {
  auto memory = std::shared_ptr<char>(static_cast<char*>(std::aligned_alloc(64, shm::RingBytes(capacity))), std::free);
  std::memset(memory.get(), 0, shm::RingBytes(capacity));
  auto* ring = reinterpret_cast<shm::Ring*>(memory.get());
  return {std::make_unique<shm::ChannelSender>(ring, capacity, Bell()), std::make_unique<shm::ChannelReceiver>(ring, capacity, Bell()), {memory}, {}};
}

Pair TcpPair(size_t streams, size_t buffer) {
  std::vector<int> sending, receiving;
  Pair pair;
  for (size_t s = 0; s < streams; ++s) {
    int fds[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) == 0);
    const int size = static_cast<int>(buffer);
    CHECK(setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size) == 0);
    pair.sending.push_back(std::make_shared<Descriptor>(fds[0]));
    pair.owned.push_back(std::make_shared<Descriptor>(fds[1]));
    sending.push_back(fds[0]);
    receiving.push_back(fds[1]);
  }
  pair.sender = std::make_unique<tcp::ChannelSender>(sending);
  pair.receiver = std::make_unique<tcp::ChannelReceiver>(receiving);
  return pair;
}

template <typename Try>
void Finish(Try attempt) {
  const uint64_t deadline = NowNs() + 20 * kSecond;
  for (Io io = Io::kBlocked; io != Io::kDone; io = attempt()) {
    CHECK(io != Io::kBroken);
    CHECK(NowNs() < deadline);
    std::this_thread::yield();
  }
}

char Pattern(size_t frame, size_t byte) { return static_cast<char>(frame * 131 + byte * 7); }

void FramesArriveInOrder(Pair pair, const std::vector<size_t>& sizes) {
  std::thread sending([&] {
    for (size_t f = 0; f < sizes.size(); ++f) {
      std::vector<char> payload(sizes[f]);
      for (size_t i = 0; i < payload.size(); ++i) payload[i] = Pattern(f, i);
      FrameHeader header;
      header.fingerprint.sequence = static_cast<uint32_t>(f);
      header.nbytes = payload.size();
      Finish([&] { return pair.sender->Send(header, payload.data()); });
    }
  });
  for (size_t f = 0; f < sizes.size(); ++f) {
    FrameHeader header;
    Finish([&] { return pair.receiver->Peek(&header); });
    CHECK(header.fingerprint.sequence == f);
    CHECK(header.nbytes == sizes[f]);
    std::vector<char> payload(sizes[f], 'x');
    Sink sink;
    sink.dst = payload.data();
    sink.nbytes = payload.size();
    Finish([&] {
      FrameHeader again;  // looking takes nothing, even in the middle of a frame
      CHECK(pair.receiver->Peek(&again) == Io::kDone);
      CHECK(again.fingerprint.sequence == f);
      return pair.receiver->Receive(sink);
    });
    for (size_t i = 0; i < payload.size(); ++i) CHECK(payload[i] == Pattern(f, i));
  }
  sending.join();
}

void ReductionsLand(Pair pair, size_t count) {
  std::vector<double> sent(count), local(count), result(count, -1.0);
  for (size_t i = 0; i < count; ++i) {
    sent[i] = static_cast<double>(i);
    local[i] = 1000.0 + static_cast<double>(i % 7);
  }
  std::thread sending([&] {
    FrameHeader header;
    header.nbytes = count * sizeof(double);
    Finish([&] { return pair.sender->Send(header, reinterpret_cast<const char*>(sent.data())); });
  });
  FrameHeader header;
  Finish([&] { return pair.receiver->Peek(&header); });
  Sink sink;
  sink.dst = reinterpret_cast<char*>(result.data());
  sink.local = reinterpret_cast<const char*>(local.data());
  sink.nbytes = count * sizeof(double);
  sink.dtype = DType::F64;
  sink.reduction = Reduction::Sum;
  sink.divisor = 2;
  Finish([&] { return pair.receiver->Receive(sink); });
  sending.join();
  for (size_t i = 0; i < count; ++i) CHECK(result[i] == (local[i] + sent[i]) / 2);
}

// One dead stream is a dead channel.
void AnEndInsideAFrameIsNoticed(Pair pair) {
  std::vector<char> payload(1 << 20);
  FrameHeader header;
  header.nbytes = payload.size();
  Finish([&] {
    CHECK(pair.sender->Send(header, payload.data()) != Io::kDone);  // the buffers are smaller
    return pair.receiver->Peek(&header);
  });
  pair.sending.back()->Close();
  CHECK(pair.sender->Send(header, payload.data()) == Io::kBroken);
  Sink sink;
  sink.dst = payload.data();
  sink.nbytes = payload.size();
  Io io = Io::kMoved;
  while (io == Io::kMoved) io = pair.receiver->Receive(sink);
  CHECK(io == Io::kBroken);
}

void Contract(const std::function<Pair(size_t)>& make) {
  for (const size_t capacity : {size_t{4096}, size_t{65536}}) {
    FramesArriveInOrder(make(capacity), {0, 1, 15, 16, 17, 63, 64, 65, 0, 4095, 4096, 4097, 32768, 65535, 65536, 65537, 100000, 3, 98305, 300001, 0});
    std::mt19937 random(7);
    std::vector<size_t> sizes(300);
    for (size_t& size : sizes) size = random() % 3 == 0 ? random() % 20000 : random() % 80;
    FramesArriveInOrder(make(capacity), sizes);
    for (const size_t count : {0, 1, 2, 3, 8, 1000, 8191, 8193, 50001}) ReductionsLand(make(capacity), count);
  }
  Pair idle = make(4096);
  FrameHeader header;
  CHECK(idle.receiver->Peek(&header) == Io::kBlocked);
  if (idle.sending.empty()) return;
  AnEndInsideAFrameIsNoticed(make(4096));
  idle.sending.front()->Close();
  CHECK(idle.receiver->Peek(&header) == Io::kBroken);
}

}  // namespace
}  // namespace ringfold

int main() {
  ringfold::Contract(ringfold::ShmPair);
  for (const size_t streams : {1, 2, 3, 8}) ringfold::Contract([streams](size_t buffer) { return ringfold::TcpPair(streams, buffer); });
  return 0;
}
