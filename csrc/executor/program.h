// One rank's schedule, as compiled by collectives/schedule.py: steps, their dependencies, and the queues in which they are tried.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ringfold {

enum class Kind : uint8_t {
  kSend = 1,
  kRecv = 2,
  kRecvReduce = 3,
  kCopy = 4,
  kExpose = 5,
  kAttach = 6,
  kFold = 7,
  kPull = 8,
  kFence = 9,
  kReduce = 10,
};

enum class Buffer : uint8_t { kInput = 0, kOutput = 1, kScratch = 2, kNone = 255 };

struct Block {
  Buffer buffer = Buffer::kNone;
  uint16_t chunk = 0;
  uint16_t segment = 0;

  bool present() const { return buffer != Buffer::kNone; }
};

struct Step {
  Kind kind;
  bool final;
  bool spread;
  int peer;
  Block src;
  Block dst;
  std::vector<uint32_t> after;
};

// The steps of one queue run in order: sends to a peer, receives from a peer, or local work.
struct Queue {
  enum class Role { kSend, kReceive, kLocal };
  Role role;
  int peer;  // rank in the communicator; -1 for local work
  std::vector<uint32_t> steps;
};

struct Program {
  uint32_t chunks = 1;
  uint32_t segments = 1;
  uint32_t scratch_chunks = 0;
  uint8_t algorithm = 0;
  bool input_full = true;   // all chunks, or this rank's only
  bool output_full = true;
  bool exposes = false;  // some step shows a vector to peers
  std::vector<Step> steps;
  std::vector<Queue> queues;
  std::unique_ptr<Program> fallback;
  std::string carrier;  // the library that moves the bytes, "mpi", if not the core: there are no queues then

  // Reads the bytes of Schedule.compile(). Returns null and says why if they are malformed or name a peer outside [0, size).
  static std::unique_ptr<Program> Parse(const char* bytes, size_t nbytes, int size, std::string* why);

  // One message: the whole vector to or from `peer`.
  static std::unique_ptr<Program> Message(Kind kind, int peer);

  // Work of another library: one step, in no queue, that its driver completes.
  static std::unique_ptr<Program> Carried(std::string carrier, uint8_t algorithm);

 private:
  void BuildQueues();
};

// Offsets of `parts` pieces of `count` elements: equal blocks rounded up to `align` elements, the tail shorter or empty.
struct Partition {
  size_t count;
  size_t block;

  Partition(size_t count, size_t parts, size_t align) : count(count), block((count + parts - 1) / parts) {
    block = (block + align - 1) / align * align;
  }
  size_t Offset(size_t i) const { return i * block < count ? i * block : count; }
};

}  // namespace ringfold
