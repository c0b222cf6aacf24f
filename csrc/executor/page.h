// The page of one rank, shared with its peers on the host and with the launcher: heartbeat, progress, failure, last operations.
// It is a memfd that survives the rank. Same numbers as collectives/page.py.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace ringfold {

enum class RecordState : uint8_t { kIssued = 1, kStarted = 2, kDone = 3, kFailed = 4 };

struct OperationRecord {
  uint64_t index;  // of the record: how many this rank had issued before
  uint32_t communicator;
  uint8_t operation;
  uint8_t dtype;
  uint8_t reduction;
  std::atomic<uint8_t> state;
  uint64_t count;
  uint64_t start_ns;
  uint64_t end_ns;
  int32_t waiting_for;  // world rank, or -1
  uint16_t step;
  uint16_t steps;
  uint64_t nbytes;
  uint8_t algorithm;
  uint8_t padding[3];
  uint32_t sequence;  // of the operation in its communicator: the same on every rank
};

constexpr uint64_t kPageMagic = 0x3130454741504652;  // "RFPAGE01"
constexpr uint32_t kPageVersion = 1;
constexpr size_t kRecords = 1024;

struct Page {
  uint64_t magic;
  uint32_t version;
  int32_t rank;
  int32_t pid;
  uint32_t state;  // Python's
  std::atomic<uint64_t> heartbeat_ns;
  uint64_t started_ns;
  std::atomic<uint64_t> progress_step;
  std::atomic<uint64_t> progress_ns;
  std::atomic<uint64_t> next_operation;
  std::atomic<uint32_t> sleeping;
  char reserved[32768 - 68];  // the failure record of page.py begins at byte 256
  OperationRecord records[kRecords];

  OperationRecord& Record(uint64_t index) { return records[index % kRecords]; }
};

static_assert(sizeof(OperationRecord) == 64, "page format");
static_assert(offsetof(Page, sleeping) == 64, "page format");
static_assert(offsetof(Page, records) == 32768, "page format");

}  // namespace ringfold
