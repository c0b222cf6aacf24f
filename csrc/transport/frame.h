// The header in front of every payload, the same 64 bytes in shared memory and on the wire.
//
// It names the operation completely, so that a receiver in a different one knows at once (CollectiveMismatch), and it carries
// payloads of up to 16 bytes itself: a small all-reduce is one cache line each way.
#pragma once

#include <cstdint>

namespace ringfold {

constexpr uint32_t kInlineBytes = 16;

// What a rank is doing: equal on every rank of one operation.
struct Fingerprint {
  uint32_t sequence = 0;  // of the lane: collectives of the communicator, or messages from this peer
  uint8_t operation = 0;
  uint8_t dtype = 0;
  uint8_t reduction = 0;
  uint8_t algorithm = 0;
  int32_t root = -1;
  uint32_t shape = 0;   // digest of uneven chunk lengths, else 0
  uint64_t count = 0;  // elements of the whole vector

  bool operator==(const Fingerprint& b) const {
    return sequence == b.sequence && operation == b.operation && dtype == b.dtype && reduction == b.reduction &&
           algorithm == b.algorithm && root == b.root && shape == b.shape && count == b.count;
  }
  bool operator!=(const Fingerprint& b) const { return !(*this == b); }
};

struct FrameHeader {
  Fingerprint fingerprint;  // 24 bytes
  uint64_t nbytes = 0;      // of this payload
  uint64_t region = 0;      // EXPOSE: region of registered memory, or 0 for none
  uint64_t offset = 0;      // EXPOSE: of the exposed vector in its region
  uint8_t inline_payload[kInlineBytes] = {};
};

static_assert(sizeof(Fingerprint) == 24, "wire format");
static_assert(sizeof(FrameHeader) == 64, "one cache line");

}  // namespace ringfold
