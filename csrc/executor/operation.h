// One operation in flight: a program, where its queues stand, and the memory it works on.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/error.h"
#include "executor/codes.h"
#include "executor/page.h"
#include "executor/program.h"
#include "transport/channel.h"

namespace ringfold {

// What the caller asks for. The memory stays valid, and its contents the operation's, until it is finished.
struct Request {
  const Program* program = nullptr;
  OpCode op = OpCode::kBarrier;
  DType dtype = DType::U8;
  Reduction reduction = Reduction::Sum;
  int root = -1;                  // of a message: its tag
  int peer = -1;                  // of a message: its other end; -1: a receive from anybody
  uint64_t count = 0;             // elements of the whole vector
  std::vector<uint64_t> offsets;  // of the chunks, in elements (chunks + 1 of them); empty: cut evenly
  std::vector<uint64_t> output_offsets;  // where the chunks of OUTPUT have other lengths (all_to_all); else empty
  char* input = nullptr;
  char* output = nullptr;
  uint64_t timeout_ns = 0;
  uint16_t site = 0;  // where in the user's program it was issued: a row of the page's table
};

// What an operation needs of its communicator: one channel each way to each peer, and the peers' registered memory.
class Peers {
 public:
  virtual ~Peers() = default;
  virtual Sender* SenderTo(int peer, Lane lane) = 0;
  virtual Receiver* ReceiverFrom(int peer, Lane lane) = 0;
  // Finds registered memory for [data, data + nbytes) and makes sure the peer can map it; region 0, and the address as offset, if it is not
  // registered. False: the peer cannot be told.
  virtual bool Expose(int peer, const char* data, size_t nbytes, uint64_t* region, uint64_t* offset) = 0;
  // The address here of a peer's exposed memory, or null if it cannot be mapped.
  virtual char* Attach(int peer, uint64_t region, uint64_t offset) = 0;
  // Copies from any memory of a peer on this host. False: it is not there, or may not be read.
  virtual bool Read(int peer, uint64_t address, char* dst, size_t nbytes) = 0;
  // Memory for the one collective that is running, with the contents of the last.
  virtual char* Scratch(size_t nbytes) = 0;
  // Memory for the one step that is running.
  virtual char* Bounce(size_t nbytes) = 0;
};

class Operation {
 public:
  Operation(int rank, int size) : rank_(rank), size_(size) {}

  // Begins; also again, when the one before has finished and nobody looks at it any more: a small operation should not pay for memory.
  void Start(Request request, const Fingerprint& fingerprint);

  // Runs every step that can run now. True if anything moved. Sets `finished` (and perhaps `error`) at the end.
  bool Advance(Peers* peers);

  // A receive: takes the message that `header` announces and whose payload is to come from its sender (`program`), or is here already.
  void Bind(const Program* program, const FrameHeader& header);
  void Deliver(int sender, const FrameHeader& header, const char* payload);
  bool bound() const { return bound_; }

  // Of work that another library carries: how far it is, whom it has been waiting for, and that it is complete.
  void Stand(int peer, size_t steps_done, size_t steps);
  void Complete();
  const std::string& carrier() const { return program_->carrier; }

  // Ends the operation with an error.
  void Fail(Error error);

  bool finished() const { return finished_.load(std::memory_order_acquire); }
  const Error& error() const { return error_; }
  const Request& request() const { return request_; }
  const Fingerprint& fingerprint() const { return fingerprint_; }
  uint64_t deadline_ns() const { return deadline_ns_; }
  uint64_t issued_ns() const { return issued_ns_; }
  size_t nbytes() const { return request_.count * element_; }
  size_t steps() const { return carried_steps_ > 0 ? carried_steps_ : program_->steps.size(); }
  size_t steps_done() const { return steps() - remaining_; }

  // The peer (rank in the communicator) whose action the first blocked step waits for, or -1.
  int WaitingFor() const;
  // After Advance failed on a stream: the peer at its other end, or -1.
  int broken_peer() const { return broken_peer_; }
  // After Advance met a frame of another operation: its header and sender.
  bool mismatched() const { return mismatched_; }
  const FrameHeader& foreign() const { return foreign_; }
  // After Advance could not reach the memory of broken_peer(); every rank must take the same path, so there is no going on without.
  bool unshared() const { return unshared_; }

  uint64_t record = 0;  // index in the page

 private:
  struct Span {
    char* data;
    size_t nbytes;
  };

  void Load(const Program* program);
  Span At(const Block& block) const;
  char* Base(Buffer buffer, uint16_t chunk) const;
  const std::vector<uint64_t>& OffsetsOf(Buffer buffer) const {
    if (request_.offsets.empty()) return even_offsets_;
    return buffer == Buffer::kOutput && !request_.output_offsets.empty() ? request_.output_offsets : request_.offsets;
  }
  void Range(const Block& block, size_t* begin, size_t* nbytes) const;
  bool Matches(const FrameHeader& header, size_t nbytes, int peer);
  bool Ready(const Step& step) const;
  Io Run(const Step& step, Peers* peers);
  Io RunReceive(const Step& step, Peers* peers);
  Io RunExpose(const Step& step, Peers* peers);
  Io RunFold(const Step& step, Peers* peers);
  Io RunPull(const Step& step, Peers* peers);
  Io Unreachable(int peer);
  unsigned Divisor(const Step& step) const;
  Lane lane() const { return IsMessage(request_.op) ? kMessageLane : kCollectiveLane; }
  // Whoever has one vector exposes that; the other operations what they read.
  Buffer exposed_buffer() const {
    return request_.op == OpCode::kAllReduce || request_.op == OpCode::kBroadcast ? Buffer::kOutput : Buffer::kInput;
  }
  // Whether what a peer exposes are all chunks, or only the one that concerns the two of us.
  bool exposes_all() const {
    return request_.op != OpCode::kAllToAll && (exposed_buffer() == Buffer::kInput ? program_->input_full : program_->output_full);
  }

  const int rank_;
  const int size_;
  Request request_;
  Fingerprint fingerprint_;
  size_t element_ = 1;
  size_t align_ = 1;  // of chunk and segment boundaries, in elements
  uint64_t issued_ns_ = 0;
  uint64_t deadline_ns_ = 0;
  std::vector<uint64_t> even_offsets_;  // where the request has none

  const Program* program_ = nullptr;
  std::vector<uint8_t> done_;    // by step
  std::vector<uint32_t> at_;     // by queue: how many of its steps are done
  size_t remaining_ = 0;
  char* scratch_ = nullptr;
  size_t slot_nbytes_ = 0;

  std::vector<char*> exposed_;         // by rank: its exposed vector as mapped here, or null
  std::vector<uint64_t> addresses_;    // by rank: the address of an unregistered one in its own memory
  bool unregistered_ = false;    // some rank's vector is not in registered memory

  bool bound_ = false;
  int carried_peer_ = -1;
  size_t carried_steps_ = 0;

  int broken_peer_ = -1;
  bool mismatched_ = false;
  bool unshared_ = false;
  FrameHeader foreign_;

  Error error_;
  std::atomic<bool> finished_{false};
};

}  // namespace ringfold
