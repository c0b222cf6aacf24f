// The page of one rank, shared with its peers on the host and with the launcher: heartbeat, progress, failure, last operations, counters
// of each kind of operation, and the places in the user's program that issued them.
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
  uint8_t padding;
  uint16_t site;        // row of the table of call sites; 0: unknown
  uint32_t sequence;  // of the operation in its communicator: the same on every rank
};

constexpr uint64_t kPageMagic = 0x3130454741504652;  // "RFPAGE01"
// Of one kind of operation, since the rank joined: how many have ended, of how many bytes, how long they took and how long somebody was blocked in them.
struct OperationCounter {
  std::atomic<uint64_t> calls;
  std::atomic<uint64_t> nbytes;
  std::atomic<uint64_t> elapsed_ns;
  std::atomic<uint64_t> waited_ns;
  uint64_t reserved[4];
};

struct CallSite {
  char text[128];  // "train.py:41 in step", zero-terminated; written by Python before its row is used
};

constexpr uint32_t kPageVersion = 2;
constexpr size_t kRecords = 1024;
constexpr size_t kCounters = 16;
constexpr size_t kSites = 504;

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
  OperationCounter counters[kCounters];  // by operation code
  CallSite sites[kSites];

  OperationRecord& Record(uint64_t index) { return records[index % kRecords]; }
  const OperationRecord& Record(uint64_t index) const { return records[index % kRecords]; }
};

static_assert(sizeof(OperationRecord) == 64, "page format");
static_assert(offsetof(Page, sleeping) == 64, "page format");
static_assert(offsetof(Page, records) == 32768, "page format");
static_assert(offsetof(Page, counters) == 98304 && sizeof(Page) == 163840, "page format");

}  // namespace ringfold
