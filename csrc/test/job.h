// A whole job in one process: every rank is a thread with its own Context, Pool and page, joined by socket pairs. So the sanitizers see all of the protocol.
#pragma once

#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "common/deadline.h"
#include "executor/context.h"
#include "test/check.h"

namespace ringfold {

constexpr size_t kRing = 16384;
constexpr uint64_t kPatience = 30 * kSecond;

inline int MakePage() {
  const int fd = memfd_create("page", MFD_CLOEXEC);
  CHECK(fd >= 0 && ftruncate(fd, sizeof(Page)) == 0);
  return fd;
}

struct Rank {
  Pool pool;
  std::unique_ptr<Context> context;
  std::vector<int> links;  // duplicates, by peer, to cut from outside
};

class Job {
 public:
  Job(int size, bool near, uint64_t spin_ns = 0) : near_(near), ranks_(static_cast<size_t>(size)) {
    for (int r = 0; r < size; ++r) {
      Rank& rank = ranks_[static_cast<size_t>(r)];
      rank.context = std::make_unique<Context>(r, size, "rank " + std::to_string(r), MakePage(), spin_ns, &rank.pool);
      rank.links.assign(static_cast<size_t>(size), -1);
    }
    for (int a = 0; a < size; ++a) {
      for (int b = a + 1; b < size; ++b) {
        int fds[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
        at(a).links[static_cast<size_t>(b)] = dup(fds[0]);
        at(a).context->AddPeer(b, fds[0], near, "rank " + std::to_string(b));
        at(b).context->AddPeer(a, fds[1], near, "rank " + std::to_string(a));
      }
    }
    for (Rank& rank : ranks_) CHECK(rank.context->Start(kPatience).ok());
  }

  ~Job() {
    for (Rank& rank : ranks_)
      for (const int fd : rank.links)
        if (fd >= 0) close(fd);
  }

  Rank& at(int r) { return ranks_[static_cast<size_t>(r)]; }
  int size() const { return static_cast<int>(ranks_.size()); }

  // Makes one communicator on every member, its channels included; returns them by world rank.
  std::vector<Communicator*> Communicate(uint32_t id, const std::vector<int>& members) {
    std::vector<Communicator*> made(ranks_.size(), nullptr);
    for (const int m : members) made[static_cast<size_t>(m)] = at(m).context->AddCommunicator(id, "axis" + std::to_string(id), members);
    for (size_t a = 0; !near_ && a < members.size(); ++a) {
      for (size_t b = a + 1; b < members.size(); ++b) {
        for (const Lane lane : {kCollectiveLane, kMessageLane}) {
          int fds[2];
          CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) == 0);
          made[static_cast<size_t>(members[a])]->AddSocket(static_cast<int>(b), lane, fds[0]);
          made[static_cast<size_t>(members[b])]->AddSocket(static_cast<int>(a), lane, fds[1]);
        }
      }
    }
    std::vector<std::thread> opening;
    for (const int m : members)
      opening.emplace_back([&, m] { CHECK(at(m).context->Open(made[static_cast<size_t>(m)], kRing, kPatience).ok()); });
    for (std::thread& thread : opening) thread.join();
    return made;
  }

  void OnEachRank(const std::function<void(int, Context*)>& body) {
    std::vector<std::thread> threads;
    for (int r = 0; r < size(); ++r) threads.emplace_back([&, r] { body(r, at(r).context.get()); });
    for (std::thread& thread : threads) thread.join();
  }

 private:
  bool near_;
  std::vector<Rank> ranks_;
};

inline std::vector<int> Range(int n) {
  std::vector<int> all;
  for (int i = 0; i < n; ++i) all.push_back(i);
  return all;
}

// A program with the plainest dependencies: every step waits for all earlier ones of other queues that touch its block, and for every fence.
inline std::unique_ptr<Program> Finished(Program program, int size) {
  const auto same = [](const Block& a, const Block& b) {
    return a.present() && b.present() && a.chunk == b.chunk && a.segment == b.segment && (a.buffer == Buffer::kScratch) == (b.buffer == Buffer::kScratch);
  };
  std::string bytes;
  const auto put = [&](auto value) { bytes.append(reinterpret_cast<const char*>(&value), sizeof value); };
  for (const uint32_t word : {0x52465343u, program.chunks, program.segments, program.scratch_chunks, static_cast<uint32_t>(program.steps.size()), 1u, 1u, 1u, 0u}) put(word);
  for (size_t i = 0; i < program.steps.size(); ++i) {
    const Step& step = program.steps[i];
    std::vector<uint32_t> after;
    for (uint32_t j = 0; j < i; ++j) {
      const Step& before = program.steps[j];
      const bool fenced = step.kind == Kind::kFence || before.kind == Kind::kFence;
      if (fenced || same(before.dst, step.src) || same(before.dst, step.dst) || same(before.src, step.dst)) after.push_back(j);
    }
    put(static_cast<uint8_t>(step.kind));
    put(static_cast<uint8_t>(step.final));
    put(static_cast<uint8_t>(step.spread));
    put(uint8_t{0});
    put(int32_t{step.peer});
    for (const Block& block : {step.src, step.dst}) {
      put(static_cast<uint8_t>(block.buffer));
      put(uint8_t{0});
      put(block.chunk);
      put(block.segment);
    }
    put(static_cast<uint16_t>(after.size()));
    for (const uint32_t j : after) put(j);
  }
  std::string why;
  auto parsed = Program::Parse(bytes.data(), bytes.size(), size, &why);
  CHECK(parsed != nullptr);
  return parsed;
}

inline Request Message(OpCode op, double* data, size_t count, int peer, int tag = 0) {
  Request request;
  request.op = op;
  request.peer = peer;
  request.root = tag;
  request.dtype = DType::F64;
  request.count = count;
  request.output = reinterpret_cast<char*>(data);
  request.timeout_ns = kPatience;
  return request;
}

inline void WaitFor(Context* context, const Operation& operation) { 
  uint64_t waited_ns = 0;
  CHECK(context->Wait(operation, kPatience, &waited_ns));
 }

}  // namespace ringfold
