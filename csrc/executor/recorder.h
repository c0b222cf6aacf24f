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

  // The last operation in a page, or null.
  static const OperationRecord* Last(Page* page);
  // "all_gather #411 (done)"
  static std::string Describe(const OperationRecord& record);
  // The world rank that an unfinished operation waits for, or -1.
  static int WaitingFor(const OperationRecord& record);

 private:
  Page* page_;
};

}  // namespace ringfold
