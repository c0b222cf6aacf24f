// What went wrong, whose fault it is, and the text for people. Crosses the Python boundary as (code, peer, text).
#pragma once

#include <string>

namespace ringfold {

// The numbers are shared with collectives/_native.py.
enum class ErrorCode : int { kNone = 0, kPeerLost = 1, kTimeout = 2, kMismatch = 3, kClosed = 4, kSystem = 5 };

struct Error {
  ErrorCode code = ErrorCode::kNone;
  int peer = -1;  // world rank at fault, or -1
  std::string text;

  bool ok() const { return code == ErrorCode::kNone; }
};

// "what: strerror(errno)" as a system error.
Error SystemError(const std::string& what);

}  // namespace ringfold
