// An ordered set of ranks with channels between each pair, and the queues of operations issued on it.
//
// Collectives run one after the other. Messages to one peer run in order, as do messages from one peer, and neither waits for anything else.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/descriptor.h"
#include "executor/inbox.h"
#include "executor/operation.h"
#include "memory/mapping.h"
#include "transport/channel.h"
#include "transport/shm/bell.h"

namespace ringfold {

class Context;

class Communicator : public Peers {
 public:
  // `members`: world ranks, this one among them.
  Communicator(Context* context, uint32_t id, std::string name, std::vector<int> members);

  uint32_t id() const { return id_; }
  const std::string& name() const { return name_; }
  int rank() const { return rank_; }
  int size() const { return static_cast<int>(members_.size()); }
  const std::vector<int>& members() const { return members_; }
  int WorldRank(int peer) const { return members_[static_cast<size_t>(peer)]; }

  // Gives a peer of another host one more stream for a lane (takes `fd`); both ends add theirs in the same order.
  void AddSocket(int peer, Lane lane, int fd);
  // The inbound rings of this rank, for the peers on its host; their frames arrive here.
  Error CreateArena(size_t ring_nbytes);
  const Mapping& arena() const { return arena_; }
  // The rings of a peer on this host, of which one pair is this rank's to fill.
  void AttachArena(int peer, Mapping arena, Bell bell);
  // Ready once every peer has channels.
  bool IsOpen() const;
  std::vector<int> sockets() const;

  // Keeps a compiled schedule and returns its number.
  size_t Keep(std::unique_ptr<Program> program);
  const Program* program(size_t number) const { return number < programs_.size() ? programs_[number].get() : nullptr; }
  const Program* MessageProgram(Kind kind, int peer);

  // Queues an operation.
  std::shared_ptr<Operation> Issue(Request request);
  // Begins an operation that another library carries out under the same record, deadline and errors. It is in no queue: several run at once.
  std::shared_ptr<Operation> Enter(Request request, const std::string& carrier, uint8_t algorithm);
  void Leave(Operation* operation);
  bool Progress();
  bool busy() const { return in_flight_ > 0; }

  // Ends everything in flight, and everything to come, with this error.
  void Fail(const Error& error);
  const Error& error() const { return error_; }

  // Fails what has passed its deadline or waits for a peer that has left.
  void Check(uint64_t now);

  // Whether every member can read any memory of every other (process_vm_readv): known once it is open, and the same on all.
  bool remote_reads() const { return remote_reads_; }
  void set_remote_reads(bool possible) { remote_reads_ = possible; }
  // Bytes of messages put aside, of scratch memory and of rings.
  size_t held_nbytes() const { return inbox_.aside_nbytes() + scratch_nbytes_ + bounce_nbytes_ + arena_.size(); }

  // "all_reduce #412 (float32 x 1048576, ring over tcp, axis dp)"
  std::string Describe(const Operation& operation) const;

  Sender* SenderTo(int peer, Lane lane) override { return channels_[static_cast<size_t>(peer)].senders[lane].get(); }
  Receiver* ReceiverFrom(int peer, Lane lane) override { return channels_[static_cast<size_t>(peer)].receivers[lane].get(); }
  bool Expose(int peer, const char* data, size_t nbytes, uint64_t* region, uint64_t* offset) override;
  char* Attach(int peer, uint64_t region, uint64_t offset) override;
  bool Read(int peer, uint64_t address, char* dst, size_t nbytes) override;
  char* Scratch(size_t nbytes) override { return Grown(&scratch_, &scratch_nbytes_, nbytes); }
  char* Bounce(size_t nbytes) override { return Grown(&bounce_, &bounce_nbytes_, nbytes); }

 private:
  struct Channels {
    std::vector<Descriptor> sockets[kLanes];
    Mapping arena;
    std::unique_ptr<Sender> senders[kLanes];
    std::unique_ptr<Receiver> receivers[kLanes];
  };
  struct OperationQueue {
    std::deque<std::shared_ptr<Operation>> waiting;
    uint32_t next_sequence = 0;
  };

  static char* Grown(std::unique_ptr<char[]>* memory, size_t* held_nbytes, size_t nbytes);
  bool Turn(OperationQueue* queue);
  bool TurnInbox();
  void Close(Operation* operation);
  // False: it has failed, and with it everything else.
  bool CheckOne(const Operation& operation, uint64_t now, OperationQueue* queue);
  bool HasLeft(int peer) const;
  void FailOne(Operation* operation, const Error& error);
  // Tells every member that an operation is past its deadline; `peer` (rank in the communicator) is whom it waits for, or -1.
  void GiveUp(const Operation& operation, int peer);
  // Of carried operations. False: the communicator has failed.
  bool CheckCarried(uint64_t now);
  // The peer whose action an operation waits for; of a carried one that does not know, the first that has not begun it; or -1.
  int Awaited(const Operation& operation) const;
  void Broken(const Operation& operation);
  // How far it is and whom it waits for; `known`: a world rank that the message has described already.
  std::string Standing(const Operation& operation, int known) const;
  std::string SiteOf(const Operation& operation) const;

  Context* context_;
  uint32_t id_;
  std::string name_;
  std::vector<int> members_;
  int rank_ = 0;
  Mapping arena_;
  size_t ring_nbytes_ = 0;
  std::unique_ptr<char[]> scratch_;
  size_t scratch_nbytes_ = 0;
  std::unique_ptr<char[]> bounce_;
  size_t bounce_nbytes_ = 0;
  bool remote_reads_ = false;
  std::vector<Channels> channels_;  // by rank in the communicator
  std::vector<std::unique_ptr<Program>> programs_;
  std::map<std::pair<Kind, int>, const Program*> message_programs_;
  OperationQueue collectives_;
  std::vector<OperationQueue> sends_;  // by peer
  Inbox inbox_;
  std::shared_ptr<Operation> spare_;  // the last collective, to be used again
  std::vector<std::shared_ptr<Operation>> carried_;
  std::map<std::pair<std::string, uint8_t>, const Program*> carried_programs_;
  uint32_t next_carried_[2] = {0, 0};  // of collectives, which all ranks number alike, and of messages
  size_t in_flight_ = 0;
  size_t messages_in_flight_ = 0;
  Error error_;
};

}  // namespace ringfold
