// What a Context promises, with ranks as threads: right results, no blocking, errors that name who and what.

#include <algorithm>
#include <array>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "test/job.h"

namespace ringfold {
namespace {

Block Out(int chunk, int segment) { return {Buffer::kOutput, static_cast<uint16_t>(chunk), static_cast<uint16_t>(segment)}; }

std::unique_ptr<Program> RingAllReduce(int rank, int size, int segments) {
  Program program;
  program.chunks = static_cast<uint32_t>(size);
  program.segments = static_cast<uint32_t>(segments);
  const int right = (rank + 1) % size, left = (rank + size - 1) % size;
  const auto chunk = [&](int c) { return ((c % size) + size) % size; };
  for (int phase = 0; phase < 2; ++phase) {
    for (int hop = 0; hop + 1 < size; ++hop) {
      for (int s = 0; s < segments; ++s) {
        const Block sent = Out(chunk(rank - hop + phase), s), got = Out(chunk(rank - hop - 1 + phase), s);
        program.steps.push_back({Kind::kSend, false, false, right, sent, {}, {}});
        if (phase == 0) {
          program.steps.push_back({Kind::kRecvReduce, hop + 2 == size, false, left, got, got, {}});
        } else {
          program.steps.push_back({Kind::kRecv, false, false, left, {}, got, {}});
        }
      }
    }
  }
  return Finished(std::move(program), size);
}

std::unique_ptr<Program> RegisteredAllReduce(int rank, int size) {
  Program program;
  program.chunks = static_cast<uint32_t>(size);
  for (const Kind kind : {Kind::kExpose, Kind::kAttach})
    for (int peer = 0; peer < size; ++peer)
      if (peer != rank) program.steps.push_back({kind, false, false, peer, {}, {}, {}});
  program.steps.push_back({Kind::kFence, false, false, -1, {}, {}, {}});
  program.steps.push_back({Kind::kFold, true, true, -1, {}, Out(rank, 0), {}});
  program.steps.push_back({Kind::kFence, false, false, -1, {}, {}, {}});
  for (const Kind kind : {Kind::kSend, Kind::kRecv})
    for (int peer = 0; peer < size; ++peer)
      if (peer != rank) program.steps.push_back({kind, false, false, peer, {}, {}, {}});
  return Finished(std::move(program), size);
}

Request AllReduce(Communicator* communicator, size_t program, double* data, size_t count, uint64_t timeout_ns = kPatience) {
  Request request;
  request.program = communicator->program(program);
  request.op = OpCode::kAllReduce;
  request.dtype = DType::F64;
  request.count = count;
  request.input = request.output = reinterpret_cast<char*>(data);
  request.timeout_ns = timeout_ns;
  return request;
}

void RingSumsAreExact(bool near) {
  for (int size = 2; size <= 4; ++size) {
    Job job(size, near);
    const auto axis = job.Communicate(1, Range(size));
    job.OnEachRank([&](int r, Context* context) {
      Communicator* communicator = axis[static_cast<size_t>(r)];
      const size_t program = context->Keep(communicator, RingAllReduce(r, size, 3));
      for (const size_t count : {size_t{0}, size_t{1}, size_t{3}, size_t{17}, size_t{1000}, size_t{40001}}) {
        std::vector<double> data(count);
        for (size_t i = 0; i < count; ++i) data[i] = static_cast<double>(i % 13 + static_cast<size_t>(r));
        const auto operation = context->Issue(communicator, AllReduce(communicator, program, data.data(), count));
        WaitFor(context, *operation);
        CHECK(operation->error().ok());
        for (size_t i = 0; i < count; ++i) CHECK(data[i] == static_cast<double>(static_cast<size_t>(size) * (i % 13)) + size * (size - 1) / 2.0);
      }
    });
  }
}

void RegisteredMemoryIsFoldedWhereItLies() {
  constexpr int kSize = 3;
  constexpr size_t kCount = 5003;
  Job job(kSize, true, 50000);
  const auto axis = job.Communicate(1, Range(kSize));
  job.OnEachRank([&](int r, Context* context) {
    Communicator* communicator = axis[static_cast<size_t>(r)];
    const size_t program = context->Keep(communicator, RegisteredAllReduce(r, kSize));
    for (int round = 0; round < 20; ++round) {
      auto* data = static_cast<double*>(job.at(r).pool.Allocate(kCount * sizeof(double)));
      for (size_t i = 0; i < kCount; ++i) data[i] = static_cast<double>(r + 1) * static_cast<double>(i);
      uint64_t waited_ns = 0;
      const auto operation = round % 2 == 0 ? context->Run(communicator, AllReduce(communicator, program, data, kCount), kPatience, &waited_ns)
                                            : context->Issue(communicator, AllReduce(communicator, program, data, kCount));
      WaitFor(context, *operation);
      CHECK(operation->error().ok());
      for (size_t i = 0; i < kCount; ++i) CHECK(data[i] == 6.0 * static_cast<double>(i));
      job.at(r).pool.Release(data);
    }
  });
}

// Operations of three communicators in a different order on every rank: a core that waits inside one of them would deadlock.
void CommunicatorsDoNotWaitForOneAnother(bool near) {
  Job job(4, near);
  const auto row_a = job.Communicate(1, {0, 1}), row_b = job.Communicate(2, {2, 3});
  const auto column_a = job.Communicate(3, {0, 2}), column_b = job.Communicate(4, {1, 3});
  const auto world = job.Communicate(5, Range(4));
  job.OnEachRank([&](int r, Context* context) {
    const size_t at = static_cast<size_t>(r);
    const std::array<Communicator*, 3> axes = {r < 2 ? row_a[at] : row_b[at], r % 2 == 0 ? column_a[at] : column_b[at], world[at]};
    std::array<size_t, 3> programs;
    for (size_t a = 0; a < 3; ++a) programs[a] = context->Keep(axes[a], RingAllReduce(axes[a]->rank(), axes[a]->size(), 2));
    std::mt19937 random(static_cast<unsigned>(r));
    for (int round = 0; round < 60; ++round) {
      std::array<size_t, 3> order = {0, 1, 2};
      std::shuffle(order.begin(), order.end(), random);
      std::array<std::vector<double>, 3> data;
      std::array<std::shared_ptr<Operation>, 3> operations;
      for (const size_t a : order) {
        data[a].assign(static_cast<size_t>(1 + (round * 37) % 3000), static_cast<double>(r + round));
        operations[a] = context->Issue(axes[a], AllReduce(axes[a], programs[a], data[a].data(), data[a].size()));
      }
      std::shuffle(order.begin(), order.end(), random);
      for (const size_t a : order) {
        WaitFor(context, *operations[a]);
        CHECK(operations[a]->error().ok());
        double expected = 0;
        for (const int m : axes[a]->members()) expected += m + round;
        for (const double value : data[a]) CHECK(value == expected);
      }
    }
  });
}

void MessagesOvertakeCollectives(bool near) {
  Job job(2, near);
  const auto axis = job.Communicate(1, Range(2));
  job.OnEachRank([&](int r, Context* context) {
    Communicator* communicator = axis[static_cast<size_t>(r)];
    const size_t program = context->Keep(communicator, RingAllReduce(r, 2, 1));
    std::vector<double> sum(10, 1.0), out(30000, r + 1.0), in(30000, 0.0);
    // Rank 1 joins the collective only after the messages, which are longer than a ring or a socket holds.
    std::shared_ptr<Operation> all;
    if (r == 0) all = context->Issue(communicator, AllReduce(communicator, program, sum.data(), sum.size()));
    const auto send = context->Issue(communicator, Message(OpCode::kSend, out.data(), out.size(), 1 - r));
    const auto receive = context->Issue(communicator, Message(OpCode::kRecv, in.data(), in.size(), 1 - r));
    WaitFor(context, *receive);
    WaitFor(context, *send);
    if (r == 1) all = context->Issue(communicator, AllReduce(communicator, program, sum.data(), sum.size()));
    WaitFor(context, *all);
    CHECK(all->error().ok() && send->error().ok() && receive->error().ok());
    for (const double value : in) CHECK(value == 2.0 - r);
    for (const double value : sum) CHECK(value == 2.0);
  });
}

void EveryRankLearnsOfATimeoutAndWhoIsMissing() {
  Job job(3, true);
  const auto axis = job.Communicate(1, Range(3));
  job.OnEachRank([&](int r, Context* context) {
    if (r == 2) return;  // never comes
    Communicator* communicator = axis[static_cast<size_t>(r)];
    const size_t program = context->Keep(communicator, RingAllReduce(r, 3, 1));
    std::vector<double> data(100, 1.0);
    const auto operation = context->Issue(communicator, AllReduce(communicator, program, data.data(), data.size(), 300 * kMillisecond));
    WaitFor(context, *operation);
    CHECK(operation->error().code == ErrorCode::kTimeout);
    CHECK(operation->error().text.find("rank 2") != std::string::npos);
    const auto later = context->Issue(communicator, AllReduce(communicator, program, data.data(), data.size()));
    CHECK(later->finished() && later->error().code == ErrorCode::kTimeout);
  });
}

void DifferentOperationsAreAMismatchOnBothSides() {
  Job job(2, true);
  const auto axis = job.Communicate(1, Range(2));
  job.OnEachRank([&](int r, Context* context) {
    Communicator* communicator = axis[static_cast<size_t>(r)];
    const size_t program = context->Keep(communicator, RingAllReduce(r, 2, 1));
    std::vector<double> data(200, 1.0);
    const size_t count = r == 0 ? 100 : 200;
    const auto operation = context->Issue(communicator, AllReduce(communicator, program, data.data(), count));
    WaitFor(context, *operation);
    CHECK(operation->error().code == ErrorCode::kMismatch);
  });
}

void ADeadPeerFailsEveryCommunicatorAndIsNamed(bool near) {
  Job job(3, near);
  const auto axis = job.Communicate(1, Range(3)), pair = job.Communicate(2, {0, 1});
  job.OnEachRank([&](int r, Context* context) {
    if (r == 2) {
      for (int peer = 0; peer < 2; ++peer) shutdown(job.at(peer).links[2], SHUT_RDWR);
      return;
    }
    Communicator* communicator = (r == 0 ? axis : pair)[static_cast<size_t>(r)];
    const size_t program = context->Keep(communicator, RingAllReduce(communicator->rank(), communicator->size(), 1));
    std::vector<double> data(100, 1.0);
    const auto operation = context->Issue(communicator, AllReduce(communicator, program, data.data(), data.size()));
    WaitFor(context, *operation);
    CHECK(operation->error().code == ErrorCode::kPeerLost);
    CHECK(operation->error().peer == 2);
  });
}

void AFarewellIsNoDeath() {
  Job job(2, true);
  const auto axis = job.Communicate(1, Range(2));
  job.OnEachRank([&](int r, Context* context) {
    Communicator* communicator = axis[static_cast<size_t>(r)];
    if (r == 1) {
      std::vector<double> data(4, 3.0);
      const auto send = context->Issue(communicator, Message(OpCode::kSend, data.data(), data.size(), 0));
      WaitFor(context, *send);
      context->Close();
      context->Close();
      return;
    }
    std::vector<double> data(4);
    const auto last = context->Issue(communicator, Message(OpCode::kRecv, data.data(), data.size(), 1));
    WaitFor(context, *last);
    CHECK(last->error().ok() && data[3] == 3.0);
    const auto beyond = context->Issue(communicator, Message(OpCode::kRecv, data.data(), data.size(), 1));
    WaitFor(context, *beyond);
    CHECK(beyond->error().code == ErrorCode::kPeerLost);
    CHECK(beyond->error().text.find("left") != std::string::npos);
  });
}

}  // namespace
}  // namespace ringfold

int main() {
  using namespace ringfold;
  for (const bool near : {true, false}) {
    RingSumsAreExact(near);
    CommunicatorsDoNotWaitForOneAnother(near);
    MessagesOvertakeCollectives(near);
    ADeadPeerFailsEveryCommunicatorAndIsNamed(near);
  }
  RegisteredMemoryIsFoldedWhereItLies();
  EveryRankLearnsOfATimeoutAndWhoIsMissing();
  DifferentOperationsAreAMismatchOnBothSides();
  AFarewellIsNoDeath();
  return 0;
}
