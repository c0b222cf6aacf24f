// Messages find the receives they are meant for, and vectors that are not registered are read where they lie.

#include <memory>
#include <string>
#include <vector>

#include "test/job.h"

namespace ringfold {
namespace {

constexpr size_t kLong = 5000;  // doubles: longer than a ring or what a socket takes at once

// Rank 1 waits for the second message before the first, which is longer than the channel holds; then both have their own values.
void AReceiveTakesTheMessageOfItsTag(bool near) {
  Job job(2, near);
  const auto axis = job.Communicate(1, Range(2));
  job.OnEachRank([&](int r, Context* context) {
    Communicator* communicator = axis[static_cast<size_t>(r)];
    std::vector<double> first(kLong, 1.0), second(3, 2.0);
    if (r == 0) {
      const auto a = context->Issue(communicator, Message(OpCode::kSend, first.data(), first.size(), 1, 7));
      const auto b = context->Issue(communicator, Message(OpCode::kSend, second.data(), second.size(), 1, 9));
      WaitFor(context, *b);
      WaitFor(context, *a);
      CHECK(a->error().ok() && b->error().ok());
      return;
    }
    std::vector<double> late(kLong), early(3);
    const auto b = context->Issue(communicator, Message(OpCode::kRecv, early.data(), early.size(), 0, 9));
    WaitFor(context, *b);
    CHECK(context->HeldNBytes(communicator) >= kLong * sizeof(double));  // the first was put aside
    const auto a = context->Issue(communicator, Message(OpCode::kRecv, late.data(), late.size(), 0, 7));
    WaitFor(context, *a);
    CHECK(a->error().ok() && b->error().ok() && late == first && early == second);
  });
}

void NothingIsPutAsideForNobody() {
  Job job(2, true);
  const auto axis = job.Communicate(1, Range(2));
  job.OnEachRank([&](int r, Context* context) {
    Communicator* communicator = axis[static_cast<size_t>(r)];
    const size_t held = context->HeldNBytes(communicator);
    std::vector<double> data(kLong, r + 1.0);
    if (r == 0) {
      const auto send = context->Issue(communicator, Message(OpCode::kSend, data.data(), data.size(), 1));
      uint64_t waited_ns = 0;
      CHECK(!context->Wait(*send, 50 * kMillisecond, &waited_ns) && waited_ns >= 50 * kMillisecond);  // its receiver is not there: it stays with its sender
      WaitFor(context, *send);
      return;
    }
    const uint64_t until = NowNs() + 100 * kMillisecond;
    while (NowNs() < until) CHECK(context->HeldNBytes(communicator) == held);
    const auto receive = context->Issue(communicator, Message(OpCode::kRecv, data.data(), data.size(), 0));
    WaitFor(context, *receive);
    CHECK(receive->error().ok() && data[kLong - 1] == 1.0);
  });
}

// Each of three ranks sends one message to rank 3, which receives from anybody, and from rank 1 in particular.
void AReceiveFromAnybodySaysWhoItWas(bool near) {
  constexpr int kSize = 4;
  Job job(kSize, near);
  const auto axis = job.Communicate(1, Range(kSize));
  job.OnEachRank([&](int r, Context* context) {
    Communicator* communicator = axis[static_cast<size_t>(r)];
    std::vector<double> data(kLong + static_cast<size_t>(r), r);
    if (r < 3) {
      data.resize(kLong);
      const auto send = context->Issue(communicator, Message(OpCode::kSend, data.data(), data.size(), 3));
      WaitFor(context, *send);
      CHECK(send->error().ok());
      return;
    }
    std::vector<std::vector<double>> in(3, std::vector<double>(kLong));
    std::vector<std::shared_ptr<Operation>> receives;
    for (int i = 0; i < 3; ++i)
      receives.push_back(context->Issue(communicator, Message(OpCode::kRecv, in[static_cast<size_t>(i)].data(), kLong, i == 0 ? 1 : -1)));
    int seen = 0;
    for (size_t i = 0; i < 3; ++i) {
      WaitFor(context, *receives[i]);
      CHECK(receives[i]->error().ok());
      const int source = receives[i]->request().peer;
      for (const double value : in[i]) CHECK(value == source);
      seen |= 1 << source;
    }
    CHECK(seen == 7 && receives[0]->request().peer == 1);
  });
}

void AMessageOfAnotherLengthIsAMismatch(bool aside) {
  Job job(2, true);
  const auto axis = job.Communicate(1, Range(2));
  job.OnEachRank([&](int r, Context* context) {
    Communicator* communicator = axis[static_cast<size_t>(r)];
    std::vector<double> data(20, 1.0), other(1);
    if (r == 0) {
      const auto send = context->Issue(communicator, Message(OpCode::kSend, data.data(), 20, 1, 1));
      const auto more = context->Issue(communicator, Message(OpCode::kSend, other.data(), 1, 1, 2));
      WaitFor(context, *more);
      WaitFor(context, *send);
      return;  // it has fit into the ring: only the receiver knows
    }
    if (aside) WaitFor(context, *context->Issue(communicator, Message(OpCode::kRecv, other.data(), 1, 0, 2)));
    const auto receive = context->Issue(communicator, Message(OpCode::kRecv, data.data(), 19, 0, 1));
    WaitFor(context, *receive);
    CHECK(receive->error().code == ErrorCode::kMismatch);
  });
}

// Chunk d of rank s is d + 1 doubles long, so lengths differ between pairs and between the buffers of one rank.
void UnevenPiecesGoFromAllToAll(bool near) {
  constexpr int kSize = 3;
  Job job(kSize, near);
  const auto axis = job.Communicate(1, Range(kSize));
  job.OnEachRank([&](int r, Context* context) {
    Communicator* communicator = axis[static_cast<size_t>(r)];
    Program program;
    program.chunks = kSize;
    for (int p = 0; p < kSize; ++p) {
      const auto chunk = static_cast<uint16_t>(p);
      if (p == r) {
        program.steps.push_back({Kind::kCopy, false, false, -1, {Buffer::kInput, chunk, 0}, {Buffer::kOutput, chunk, 0}, {}});
      } else {
        program.steps.push_back({Kind::kSend, false, false, p, {Buffer::kInput, chunk, 0}, {}, {}});
        program.steps.push_back({Kind::kRecv, false, false, p, {}, {Buffer::kOutput, chunk, 0}, {}});
      }
    }
    auto parsed = Finished(std::move(program), kSize);
    for (Step& step : parsed->steps) step.after.clear();  // INPUT and OUTPUT are different memory
    const size_t number = context->Keep(communicator, std::move(parsed));
    const size_t scale = 1000;
    std::vector<double> in(6 * scale), out(static_cast<size_t>(kSize * (r + 1)) * scale, -1.0);
    for (size_t i = 0; i < in.size(); ++i) in[i] = r * 100.0 + (i < scale ? 0 : i < 3 * scale ? 1 : 2);
    Request request;
    request.program = communicator->program(number);
    request.op = OpCode::kAllToAll;
    request.dtype = DType::F64;
    request.count = in.size();
    request.offsets = {0, scale, 3 * scale, 6 * scale};
    for (size_t s = 0; s <= kSize; ++s) request.output_offsets.push_back(s * static_cast<size_t>(r + 1) * scale);
    request.input = reinterpret_cast<char*>(in.data());
    request.output = reinterpret_cast<char*>(out.data());
    request.timeout_ns = kPatience;
    const auto operation = context->Issue(communicator, std::move(request));
    WaitFor(context, *operation);
    CHECK(operation->error().ok());
    const size_t piece = static_cast<size_t>(r + 1) * scale;
    for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == static_cast<double>(i / piece) * 100.0 + r);
  });
}

// The vectors of odd ranks are registered, the others are read through the kernel; nobody writes into another's.
void UnregisteredVectorsAreReadWhereTheyLie() {
  constexpr int kSize = 3;
  constexpr size_t kCount = 100003;  // more than is fetched at a time
  Job job(kSize, true);
  const auto axis = job.Communicate(1, Range(kSize));
  job.OnEachRank([&](int r, Context* context) {
    Communicator* communicator = axis[static_cast<size_t>(r)];
    CHECK(communicator->remote_reads());
    Program program;
    program.chunks = kSize;
    const auto with_all = [&](Kind kind) {
      for (int p = 0; p < kSize; ++p)
        if (p != r) program.steps.push_back({kind, false, false, p, {}, {}, {}});
    };
    const auto fence = [&] { program.steps.push_back({Kind::kFence, false, false, -1, {}, {}, {}}); };
    with_all(Kind::kExpose);
    with_all(Kind::kAttach);
    fence();
    program.steps.push_back({Kind::kFold, true, false, -1, {}, {Buffer::kOutput, static_cast<uint16_t>(r), 0}, {}});
    fence();
    with_all(Kind::kSend);
    with_all(Kind::kRecv);
    fence();
    for (int p = 0; p < kSize; ++p)
      if (p != r) program.steps.push_back({Kind::kPull, false, false, p, {}, {Buffer::kOutput, static_cast<uint16_t>(p), 0}, {}});
    fence();
    with_all(Kind::kSend);
    with_all(Kind::kRecv);
    const size_t number = context->Keep(communicator, Finished(std::move(program), kSize));
    std::vector<double> own(kCount);
    double* data = r % 2 == 1 ? static_cast<double*>(job.at(r).pool.Allocate(kCount * sizeof(double))) : own.data();
    for (size_t i = 0; i < kCount; ++i) data[i] = static_cast<double>(r + 1) * static_cast<double>(i);
    Request request;
    request.program = communicator->program(number);
    request.op = OpCode::kAllReduce;
    request.dtype = DType::F64;
    request.count = kCount;
    request.input = request.output = reinterpret_cast<char*>(data);
    request.timeout_ns = kPatience;
    const auto operation = context->Issue(communicator, std::move(request));
    WaitFor(context, *operation);
    CHECK(operation->error().ok());
    for (size_t i = 0; i < kCount; ++i) CHECK(data[i] == 6.0 * static_cast<double>(i));
  });
}

}  // namespace
}  // namespace ringfold

int main() {
  using namespace ringfold;
  for (const bool near : {true, false}) {
    AReceiveTakesTheMessageOfItsTag(near);
    AReceiveFromAnybodySaysWhoItWas(near);
    UnevenPiecesGoFromAllToAll(near);
    AMessageOfAnotherLengthIsAMismatch(near);
  }
  NothingIsPutAsideForNobody();
  UnregisteredVectorsAreReadWhereTheyLie();
  return 0;
}
