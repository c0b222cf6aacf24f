// One rank of one generation of one job: its links, communicators, page and native thread. Nothing in the core lives outside a Context or a Pool.
//
// One mutex guards everything. Whoever waits for an operation runs Progress() itself; the native thread does so while operations are in
// flight and nobody waits. Neither holds the mutex while it sleeps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/descriptor.h"
#include "common/error.h"
#include "executor/communicator.h"
#include "executor/operation.h"
#include "executor/page.h"
#include "executor/recorder.h"
#include "executor/roster.h"
#include "memory/mapping.h"
#include "memory/pool.h"

namespace ringfold {

class Context {
 public:
  // `page_fd` (taken) is this rank's page, already sized. `spin_ns`: how long an inline wait spins before it sleeps; 0 where ranks outnumber cores.
  Context(int rank, int size, std::string label, int page_fd, uint64_t spin_ns, Pool* pool);
  ~Context();

  // Takes the connected, authenticated socket to a peer. `near`: on this host, the socket can carry descriptors.
  void AddPeer(int peer, int fd, bool near, std::string label);
  // Greets every peer and starts the native thread.
  Error Start(uint64_t timeout_ns);

  Communicator* AddCommunicator(uint32_t id, std::string name, std::vector<int> members);
  // Makes the channels to near peers and waits for theirs; sockets to far peers have been added before.
  Error Open(Communicator* communicator, size_t ring_nbytes, uint64_t timeout_ns);
  void Drop(Communicator* communicator);

  // Keeps a compiled schedule for Request::program; returns its number.
  size_t Keep(Communicator* communicator, std::unique_ptr<Program> program);
  // Queues an operation and takes its first steps.
  std::shared_ptr<Operation> Issue(Communicator* communicator, Request request);
  // Makes progress until the operation is finished, at most `longest_ns`; adds the time it took. True if it is finished.
  bool Wait(const Operation& operation, uint64_t longest_ns, uint64_t* waited_ns);
  // Both, the short way for small operations.
  std::shared_ptr<Operation> Run(Communicator* communicator, Request request, uint64_t longest_ns, uint64_t* waited_ns);
  void Cancel(Communicator* communicator, const std::string& why);
  size_t HeldNBytes(const Communicator* communicator);

  // Operations that another library carries out: see Communicator::Enter.
  std::shared_ptr<Operation> Enter(Communicator* communicator, Request request, const std::string& carrier, uint8_t algorithm);
  void Stand(Operation* operation, int peer, size_t steps_done, size_t steps);
  void Leave(Communicator* communicator, Operation* operation);
  void Abandon(Communicator* communicator, const Operation& operation, ErrorCode code, const std::string& why);

  // Ends everything, with a farewell to the peers unless this rank has failed. Afterwards only the destructor may be called.
  void Close(bool farewell = true);
  // In a forked child: gives up the descriptors so that peers can see the parent's death, touching no lock and no thread.
  void Forked();

  int rank() const { return rank_; }
  // (world rank, a new descriptor of its page) of every near peer, the dead included.
  std::vector<std::pair<int, int>> PeerPages();

  // For communicators, under the mutex.
  Recorder& recorder() { return recorder_; }
  // What was recorded so far is not the user's; nothing is in flight.
  void ForgetRecorded() {
    const std::unique_lock<std::mutex> lock(mutex_);
    recorder_.Forget();
  }
  Roster& roster() { return roster_; }
  // Reads what the peers have said on their links: descriptors, aborts, farewells, deaths.
  void PumpLinks();
  void Lost(int world_rank);
  // Fails a communicator here and on its other members.
  void Abort(Communicator& communicator, const Error& error);
  char* MapRegion(int world_rank, uint64_t region, uint64_t offset);
  // " at train.py:41 in step": where a peer issued an operation, as far as it can be found out in a moment.
  std::string SiteAt(int world_rank, uint32_t communicator, uint8_t operation, uint32_t sequence);

 private:
  std::unique_lock<std::mutex> Enter();
  uint64_t WaitLocked(std::unique_lock<std::mutex>* lock, const Operation& operation, uint64_t began, uint64_t longest_ns);
  bool Progress();
  bool Busy() const;
  void CheckDeadlines(uint64_t now);
  void FailAll(const Error& error);
  // Sleeps until something may have happened, counted in `sleepers`; the mutex is given up meanwhile. Does not sleep if a last look finds progress.
  void Sleep(std::unique_lock<std::mutex>* lock, uint64_t until_ns, int* sleepers);
  void ReadEvents(int timeout_ms, std::unique_lock<std::mutex>* lock);
  void Watch(int fd, uint32_t events);
  void WakeThread();
  void RingOwnDoorbell();
  void RunThread();
  void Beat(uint64_t now);

  const int rank_;
  const uint64_t spin_ns_;
  Mapping page_mapping_;
  Page* page_;
  Recorder recorder_;
  Descriptor epoll_;
  Descriptor doorbell_;

  std::mutex mutex_;
  std::atomic<int> submitters_{0};  // waiting for the mutex with something short to do
  std::condition_variable parked_;
  bool thread_parked_ = false;
  bool stop_ = false;
  int inline_waiters_ = 0;
  int inline_sleepers_ = 0;  // inline waiters inside epoll_wait
  int thread_sleepers_ = 0;  // 1 while the native thread is
  std::unique_ptr<std::thread> thread_;

  Roster roster_;
  std::vector<std::unique_ptr<Communicator>> communicators_;
  Error error_;
  bool closed_ = false;
  uint64_t last_beat_ns_ = 0;
};

}  // namespace ringfold
