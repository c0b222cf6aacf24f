// Writes a rank's operations into its page, and reads the last one out of a peer's.
#pragma once

#include <string>

#include "executor/operation.h"
#include "executor/page.h"

namespace ringfold {

class Recorder {
 public:
  explicit Recorder(Page* page) : page_(page) {}

  // Begins the record of an operation just issued; returns its index.
  uint64_t Open(uint32_t communicator, const Operation& operation);
  void Start(const Operation& operation);
  // Writes how far it is and which world rank it waits for (-1: none).
  void Note(const Operation& operation, int waiting_for);
  void Close(const Operation& operation);
  // Somebody was blocked in it for so long.
  void Waited(const Operation& operation, uint64_t nanoseconds);
  // Drops all records and counters; nothing is in flight.
  void Forget();
  std::string Site(uint16_t site) const { return Site(page_, site); }

  // The last operation in a page, or null.
  static const OperationRecord* Last(const Page* page);
  // The record of an operation by its number in its communicator, or null. `operation`: as in a fingerprint, where a receive counts as a send.
  static const OperationRecord* Find(const Page* page, uint32_t communicator, uint8_t operation, uint32_t sequence);
  // " at train.py:41 in step", or nothing if the page does not know.
  static std::string Site(const Page* page, uint16_t site);
  // "all_gather #411 (done)"
  static std::string Describe(const OperationRecord& record);
  // The world rank that an unfinished operation waits for, or -1.
  static int WaitingFor(const OperationRecord& record);

 private:
  Page* page_;
};

}  // namespace ringfold
