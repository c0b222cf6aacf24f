// Operations that another library carries out: the core keeps their deadline and their failure, and names who is at fault.

#include <memory>
#include <string>

#include "test/job.h"

namespace ringfold {
namespace {

constexpr uint8_t kNative = 1;

std::shared_ptr<Operation> Carry(Context* context, Communicator* communicator, uint64_t timeout_ns = kPatience) {
  Request request;
  request.op = OpCode::kAllReduce;
  request.dtype = DType::F32;
  request.count = 10;
  request.timeout_ns = timeout_ns;
  return context->Enter(communicator, std::move(request), "courier", kNative);
}

void ItIsCompleteWhenItsDriverSaysSoInAnyOrder(bool near) {
  Job job(2, near);
  const auto axis = job.Communicate(1, Range(2));
  job.OnEachRank([&](int r, Context* context) {
    Communicator* communicator = axis[static_cast<size_t>(r)];
    const auto first = Carry(context, communicator), second = Carry(context, communicator);
    CHECK(first->carrier() == "courier" && !first->finished());
    context->Leave(communicator, second.get());
    CHECK(second->finished() && second->error().ok() && !first->finished());
    uint64_t waited_ns = 0;
    CHECK(!context->Wait(*first, 20 * kMillisecond, &waited_ns));  // its driver has not said anything
    context->Leave(communicator, first.get());
    WaitFor(context, *first);
    CHECK(first->error().ok());
    context->Leave(communicator, first.get());  // once more is harmless
  });
}

void WhoHasNotBegunItIsNamedAtItsDeadline() {
  Job job(3, true);
  const auto axis = job.Communicate(1, Range(3));
  job.OnEachRank([&](int r, Context* context) {
    if (r == 1) return;  // never comes
    Communicator* communicator = axis[static_cast<size_t>(r)];
    const auto operation = Carry(context, communicator, 300 * kMillisecond);
    WaitFor(context, *operation);
    CHECK(operation->error().code == ErrorCode::kTimeout);
    CHECK(operation->error().text.find("rank 1") != std::string::npos);
    context->Leave(communicator, operation.get());  // a driver that is late changes nothing
    CHECK(operation->error().code == ErrorCode::kTimeout);
    const auto later = Carry(context, communicator);
    CHECK(later->finished() && later->error().code == ErrorCode::kTimeout);
  });
}

// All have begun it, so only its driver can know: it says that it has looked in vain for something of rank 2's.
void WhomItsDriverWaitsForIsNamed() {
  Job job(3, true);
  const auto axis = job.Communicate(1, Range(3));
  job.OnEachRank([&](int r, Context* context) {
    Communicator* communicator = axis[static_cast<size_t>(r)];
    const auto operation = Carry(context, communicator, 300 * kMillisecond);
    context->Stand(operation.get(), 2, 1, 4);
    WaitFor(context, *operation);
    CHECK(operation->error().code == ErrorCode::kTimeout);
    CHECK(operation->error().text.find("rank 2") != std::string::npos);
  });
}

void ADeathFailsIt(bool near) {
  Job job(3, near);
  const auto axis = job.Communicate(1, Range(3));
  job.OnEachRank([&](int r, Context* context) {
    if (r == 2) {
      for (int peer = 0; peer < 2; ++peer) shutdown(job.at(peer).links[2], SHUT_RDWR);
      return;
    }
    const auto operation = Carry(context, axis[static_cast<size_t>(r)]);
    WaitFor(context, *operation);
    CHECK(operation->error().code == ErrorCode::kPeerLost && operation->error().peer == 2);
  });
}

void WhoHasLeftWithoutBeginningItIsNamed() {
  Job job(2, true);
  const auto axis = job.Communicate(1, Range(2));
  job.OnEachRank([&](int r, Context* context) {
    if (r == 1) return context->Close();
    const auto operation = Carry(context, axis[0]);
    WaitFor(context, *operation);
    CHECK(operation->error().code == ErrorCode::kPeerLost && operation->error().peer == 1);
    CHECK(operation->error().text.find("left") != std::string::npos);
  });
}

// What the driver of one rank gives up, every rank gives up, with its reason.
void WhatIsAbandonedFailsEverywhere(bool near) {
  Job job(2, near);
  const auto axis = job.Communicate(1, Range(2));
  job.OnEachRank([&](int r, Context* context) {
    Communicator* communicator = axis[static_cast<size_t>(r)];
    const auto operation = Carry(context, communicator), another = Carry(context, communicator);
    if (r == 0) context->Abandon(communicator, *operation, ErrorCode::kSystem, "the courier is ill");
    WaitFor(context, *operation);
    WaitFor(context, *another);
    CHECK(!operation->error().ok() && !another->error().ok());
    CHECK(operation->error().text.find("the courier is ill") != std::string::npos);
  });
}

}  // namespace
}  // namespace ringfold

int main() {
  using namespace ringfold;
  for (const bool near : {true, false}) {
    ItIsCompleteWhenItsDriverSaysSoInAnyOrder(near);
    ADeathFailsIt(near);
    WhatIsAbandonedFailsEverywhere(near);
  }
  WhoHasNotBegunItIsNamedAtItsDeadline();
  WhomItsDriverWaitsForIsNamed();
  WhoHasLeftWithoutBeginningItIsNamed();
  return 0;
}
