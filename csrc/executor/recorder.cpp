#include "executor/recorder.h"

#include <algorithm>
#include <cstring>

#include "common/deadline.h"

namespace ringfold {
namespace {

uint16_t Clip(size_t steps) { return static_cast<uint16_t>(std::min<size_t>(steps, 65535)); }

RecordState StateOf(const OperationRecord& record) { return static_cast<RecordState>(record.state.load(std::memory_order_acquire)); }

}  // namespace

uint64_t Recorder::Open(uint32_t communicator, const Operation& operation) {
  const uint64_t index = page_->next_operation.load(std::memory_order_relaxed);
  OperationRecord& record = page_->Record(index);
  const Fingerprint& f = operation.fingerprint();
  record.index = index;
  record.sequence = f.sequence;
  record.communicator = communicator;
  record.operation = static_cast<uint8_t>(operation.request().op);
  record.dtype = f.dtype;
  record.reduction = f.reduction;
  record.count = f.count;
  record.start_ns = operation.issued_ns();
  record.end_ns = 0;
  record.waiting_for = -1;
  record.step = 0;
  record.steps = Clip(operation.steps());
  record.nbytes = operation.nbytes();
  record.algorithm = f.algorithm;
  record.site = operation.request().site;
  record.state.store(static_cast<uint8_t>(RecordState::kIssued), std::memory_order_release);
  page_->next_operation.store(index + 1, std::memory_order_release);
  return index;
}

void Recorder::Start(const Operation& operation) {
  page_->Record(operation.record).state.store(static_cast<uint8_t>(RecordState::kStarted), std::memory_order_relaxed);
}

void Recorder::Note(const Operation& operation, int waiting_for) {
  OperationRecord& record = page_->Record(operation.record);
  record.step = Clip(operation.steps_done());
  record.waiting_for = waiting_for;
}

void Recorder::Close(const Operation& operation) {
  OperationRecord& record = page_->Record(operation.record);
  record.end_ns = NowNs();
  record.step = Clip(operation.steps_done());
  record.sequence = operation.fingerprint().sequence;  // a receive has its message's
  OperationCounter& counter = page_->counters[record.operation % kCounters];
  counter.calls.fetch_add(1, std::memory_order_relaxed);
  counter.nbytes.fetch_add(record.nbytes, std::memory_order_relaxed);
  counter.elapsed_ns.fetch_add(record.end_ns - record.start_ns, std::memory_order_relaxed);
  record.state.store(static_cast<uint8_t>(operation.error().ok() ? RecordState::kDone : RecordState::kFailed), std::memory_order_release);
}

void Recorder::Waited(const Operation& operation, uint64_t nanoseconds) {
  page_->counters[static_cast<uint8_t>(operation.request().op) % kCounters].waited_ns.fetch_add(nanoseconds, std::memory_order_relaxed);
}

void Recorder::Forget() {
  page_->next_operation.store(0, std::memory_order_release);
  for (OperationRecord& record : page_->records) record.state.store(0, std::memory_order_relaxed);
  for (OperationCounter& counter : page_->counters)
    for (auto* number : {&counter.calls, &counter.nbytes, &counter.elapsed_ns, &counter.waited_ns}) number->store(0, std::memory_order_relaxed);
}

const OperationRecord* Recorder::Last(const Page* page) {
  const uint64_t next = page->next_operation.load(std::memory_order_acquire);
  return next == 0 ? nullptr : &page->Record(next - 1);
}

const OperationRecord* Recorder::Find(const Page* page, uint32_t communicator, uint8_t operation, uint32_t sequence) {
  const uint64_t next = page->next_operation.load(std::memory_order_acquire);
  const bool is_message = IsMessage(static_cast<OpCode>(operation));
  for (uint64_t back = 1; back <= std::min<uint64_t>(next, kRecords); ++back) {
    const OperationRecord& record = page->Record(next - back);
    if (record.communicator == communicator && record.sequence == sequence && is_message == IsMessage(static_cast<OpCode>(record.operation))) return &record;
  }
  return nullptr;
}

std::string Recorder::Site(const Page* page, uint16_t site) {
  if (site == 0 || site >= kSites) return "";
  const CallSite& row = page->sites[site];
  return " at " + std::string(row.text, strnlen(row.text, sizeof row.text));
}

std::string Recorder::Describe(const OperationRecord& record) {
  const RecordState state = StateOf(record);
  return std::string(OpName(record.operation)) + " #" + std::to_string(record.sequence) +
         (state == RecordState::kDone ? " (done)" : state == RecordState::kFailed ? " (failed)" : " (under way)");
}

int Recorder::WaitingFor(const OperationRecord& record) { return StateOf(record) == RecordState::kDone ? -1 : record.waiting_for; }

}  // namespace ringfold
