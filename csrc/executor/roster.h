// Every other rank as this one knows it: its link, its page, its registered memory, what it said last, and whether it still lives.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "common/descriptor.h"
#include "common/error.h"
#include "executor/page.h"
#include "memory/mapping.h"
#include "memory/pool.h"
#include "transport/link.h"

namespace ringfold {

struct Arena {
  Mapping memory;
  bool is_readable = false;  // its owner can read the memory of all members
};

struct Peer {
  std::string label;  // "rank 1 (node-a, pid 4121)"
  bool near = false;  // on this host: memory can be shared
  int pid = 0;            // of a near peer, as this process sees it
  bool readable = false;  // process_vm_readv works
  std::unique_ptr<Link> link;
  bool left = false;  // it said farewell
  bool lost = false;
  bool unreachable = false;  // lost because its host does not answer
  Mapping page;
  Descriptor doorbell;
  std::map<uint32_t, Arena> arenas;     // by communicator, not yet attached
  std::map<uint64_t, Mapping> regions;  // its registered memory, as mapped here
  std::set<uint64_t> announced;         // regions of ours that it has
  OperationRecord told = {};            // far peers: what it has been waiting in
  std::string told_site;
  uint64_t told_ns = 0;
  std::string answer;  // far peers: to TellAsk, with a blank in front of what it says

  Page* page_or_null() const { return reinterpret_cast<Page*>(page.data()); }
};

// What a peer has said, or its silence, that concerns operations.
struct Notice {
  enum class Kind { kAbort, kLost, kAsk };
  Kind kind;
  uint32_t communicator;  // kAbort, kAsk
  Error error;            // kAbort: as this rank should report it; kLost, kAsk: only the peer
  uint8_t operation = 0;  // kAsk
  uint32_t sequence = 0;  // kAsk
};

class Roster {
 public:
  Roster(int rank, int size, std::string own_label, Pool* pool);

  // Takes the connected, authenticated socket to a peer.
  void Add(int peer, int fd, bool near, std::string label);
  // Gives near peers this rank's page and doorbell.
  Error Greet(int page_fd, int doorbell_fd, uint64_t deadline_ns);
  // Reads all links to their ends.
  std::vector<Notice> Pump();

  int size() const { return static_cast<int>(peers_.size()); }
  Peer& at(int world_rank) { return peers_[static_cast<size_t>(world_rank)]; }
  const Peer& at(int world_rank) const { return peers_[static_cast<size_t>(world_rank)]; }

  // Finds registered memory for [data, data + nbytes) and makes sure the peer has its descriptor; region 0 if it is not registered.
  bool Announce(int world_rank, const char* data, size_t nbytes, uint64_t* region, uint64_t* offset);
  // The address here of a peer's registered memory, or null.
  char* MapRegion(int world_rank, uint64_t region, uint64_t offset) const;
  // Copies from any memory of a near peer; false if the kernel does not let us.
  bool Read(int world_rank, uint64_t address, char* dst, size_t nbytes) const;

  // ", whose last operation was all_gather #411 (done)". Far ranks tell only what they wait for; what they told before `since_ns` does not count.
  std::string LastOperation(int world_rank, uint64_t since_ns) const;
  // Whether a rank of this host, of which all records can be read, has begun an operation of a communicator; true of far ranks, which cannot be asked.
  bool HasIssued(int world_rank, uint32_t communicator, uint8_t operation, uint32_t sequence) const;
  // Follows who waits for whom, from `world_rank` on, to a rank that waits for nobody: "rank 1 (...), which waits for rank 2 (...), whose last ...".
  std::string Chain(int world_rank, uint64_t since_ns, int* end) const;

  void TellAbort(const std::vector<int>& members, uint32_t communicator, const Error& error);
  void TellLost(int world_rank);
  // Tells far peers what this rank has been waiting for, the first time after 250 ms, then each time that span has doubled.
  void TellStanding(Page* own_page, uint64_t now);
  // Asks a far peer where it issued an operation; answers such a question.
  void TellAsk(int world_rank, uint32_t communicator, uint8_t operation, uint32_t sequence);
  void TellAnswer(int world_rank, const std::string& text);
  void TellFarewell();

  void Clear();
  // In a forked child: closes the sockets and nothing else.
  void CloseDescriptors();

 private:
  void Take(int world_rank, LinkMessage message, std::vector<Notice>* notices);
  const OperationRecord* LastRecord(int world_rank, uint64_t since_ns) const;

  const int rank_;
  Pool* const pool_;
  std::vector<Peer> peers_;  // by world rank; the own entry has only a label
  size_t freed_cursor_ = 0;
  const uint64_t probe_ = 0x72696e67666f6c64;  // what peers read to see whether they can
  uint64_t told_record_ = UINT64_MAX;  // the operation last told to far peers
  uint64_t tell_after_ns_ = 0;         // it is told again when it has waited this long
};

}  // namespace ringfold
