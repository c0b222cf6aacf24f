#include "executor/context.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>

#include "common/deadline.h"

namespace ringfold {
namespace {

constexpr uint64_t kBeat = 100 * kMillisecond;
constexpr uint64_t kLookAtLinks = 200 * 1000;  // while spinning, every 200 us
constexpr int kYields = 200;  // where ranks outnumber cores; with 20, an all_reduce of 1 MiB by 4 ranks on 2 takes 263 us instead of 223

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  asm volatile("yield");
#endif
}

}  // namespace

Context::Context(int rank, int size, std::string label, int page_fd, uint64_t spin_ns, Pool* pool)
    : rank_(rank),
      spin_ns_(spin_ns),
      page_mapping_(Mapping::Attach(Descriptor(page_fd), sizeof(Page))),
      page_(reinterpret_cast<Page*>(page_mapping_.data())),
      recorder_(page_),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      doorbell_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      roster_(rank, size, std::move(label), pool) {
  if (page_ == nullptr || !epoll_.valid() || !doorbell_.valid()) {
    error_ = SystemError("cannot map the rank's page or make its doorbell");
    return;
  }
  // What another generation of this process left in flight is over.
  page_->sleeping.store(0);
  Watch(doorbell_.get(), EPOLLIN);
}

Context::~Context() { Close(); }

void Context::Watch(int fd, uint32_t events) {
  epoll_event event = {};
  event.events = events;
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event);
}

void Context::AddPeer(int peer, int fd, bool near, std::string label) {
  roster_.Add(peer, fd, near, std::move(label));
  // Level-triggered: a link is always read to its end.
  Watch(fd, EPOLLIN | EPOLLRDHUP);
}

Error Context::Start(uint64_t timeout_ns) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!error_.ok()) return error_;
  const Error error = roster_.Greet(page_mapping_.fd(), doorbell_.get(), NowNs() + timeout_ns);
  if (!error.ok()) return error;
  Beat(NowNs());
  thread_ = std::make_unique<std::thread>([this] { RunThread(); });
  return {};
}

Communicator* Context::AddCommunicator(uint32_t id, std::string name, std::vector<int> members) {
  std::unique_lock<std::mutex> lock(mutex_);
  communicators_.push_back(std::make_unique<Communicator>(this, id, std::move(name), std::move(members)));
  return communicators_.back().get();
}

Error Context::Open(Communicator* communicator, size_t ring_nbytes, uint64_t timeout_ns) {
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t deadline = NowNs() + timeout_ns;
  // Edge-triggered: data of a later operation may wait in a socket for as long as the present one takes.
  for (const int fd : communicator->sockets()) Watch(fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
  const std::vector<int>& members = communicator->members();
  const bool any_near = std::any_of(members.begin(), members.end(), [this](int m) { return roster_.at(m).near; });
  // What a peer can read is known from its greeting.
  const auto greeted = [this](int m) { return !roster_.at(m).near || roster_.at(m).page.valid(); };
  while (!std::all_of(members.begin(), members.end(), greeted) && NowNs() < deadline) {
    PumpLinks();
    if (!error_.ok()) return error_;
    if (!std::all_of(members.begin(), members.end(), greeted)) ReadEvents(10, &lock);
  }
  bool readable = std::all_of(members.begin(), members.end(), [this](int m) { return m == rank_ || roster_.at(m).readable; });
  if (any_near) {
    Error error = communicator->CreateArena(ring_nbytes);
    for (const int member : members) {
      Peer& peer = roster_.at(member);
      if (!error.ok() || !peer.near) continue;
      if (peer.link == nullptr) return {ErrorCode::kPeerLost, member, peer.label + " has gone before axis " + communicator->name() + " was open"};
      const Mapping& arena = communicator->arena();
      error = peer.link->Send(LinkType::kArena, communicator->id(), arena.size(), readable ? 1 : 0, "", {arena.fd()}, deadline);
      if (!error.ok()) return {error.code, member, peer.label + ": " + error.text};
    }
    if (!error.ok()) return error;
  }
  for (;;) {
    PumpLinks();
    if (!error_.ok()) return error_;
    std::string missing;
    for (size_t i = 0; i < members.size(); ++i) {
      Peer& peer = roster_.at(members[i]);
      const auto arena = peer.arenas.find(communicator->id());
      if (peer.page.valid() && arena != peer.arenas.end()) {
        readable = readable && arena->second.is_readable;
        communicator->AttachArena(static_cast<int>(i), std::move(arena->second.memory), Bell(&peer.page_or_null()->sleeping, peer.doorbell.get()));
        peer.arenas.erase(arena);
      }
      if (members[i] == rank_ || communicator->SenderTo(static_cast<int>(i), kMessageLane) != nullptr) continue;
      missing += (missing.empty() ? "" : ", ") + peer.label;
      if (peer.left) return {ErrorCode::kPeerLost, members[i], peer.label + " left before axis " + communicator->name() + " was open"};
    }
    if (missing.empty()) {
      communicator->set_remote_reads(readable);
      return {};
    }
    if (NowNs() >= deadline)
      return {ErrorCode::kTimeout, -1,
              "axis " + communicator->name() + " (rank " + std::to_string(rank_) + " is a member) was not opened by: " + missing +
                  "\n  Every member must make the same communicator."};
    ReadEvents(10, &lock);
  }
}

void Context::Drop(Communicator* communicator) {
  std::unique_lock<std::mutex> lock(mutex_);
  communicator->Fail({ErrorCode::kClosed, -1, "axis " + communicator->name() + " is closed"});
  const auto found = std::find_if(communicators_.begin(), communicators_.end(), [=](const auto& c) { return c.get() == communicator; });
  if (found != communicators_.end()) communicators_.erase(found);
}

size_t Context::Keep(Communicator* communicator, std::unique_ptr<Program> program) {
  std::unique_lock<std::mutex> lock(mutex_);
  return communicator->Keep(std::move(program));
}

std::unique_lock<std::mutex> Context::Enter() {
  submitters_.fetch_add(1);
  std::unique_lock<std::mutex> lock(mutex_);
  submitters_.fetch_sub(1);
  return lock;
}

std::shared_ptr<Operation> Context::Issue(Communicator* communicator, Request request) {
  const std::unique_lock<std::mutex> lock = Enter();
  auto operation = communicator->Issue(std::move(request));
  // The first step is this thread's, so that peers can start; a small operation may end right here.
  Progress();
  if (!operation->finished() && inline_waiters_ == 0) WakeThread();
  return operation;
}

std::shared_ptr<Operation> Context::Run(Communicator* communicator, Request request, uint64_t longest_ns, uint64_t* waited_ns) {
  std::unique_lock<std::mutex> lock = Enter();
  auto operation = communicator->Issue(std::move(request));
  if (!operation->finished()) *waited_ns += WaitLocked(&lock, *operation, operation->issued_ns(), longest_ns);
  return operation;
}

bool Context::Progress() {
  bool moved = false;
  // By index: an operation that fails never removes a communicator, but user code may add one while the mutex is free.
  for (size_t i = 0; i < communicators_.size(); ++i) moved = communicators_[i]->Progress() || moved;
  // One event wakes one sleeper. Whoever took it tells an inline waiter that sleeps on: perhaps it is his operation that is finished.
  if (moved && inline_sleepers_ > 0) RingOwnDoorbell();
  return moved;
}

bool Context::Busy() const {
  return std::any_of(communicators_.begin(), communicators_.end(), [](const auto& c) { return c->busy(); });
}

void Context::CheckDeadlines(uint64_t now) {
  for (size_t i = 0; i < communicators_.size(); ++i) communicators_[i]->Check(now);
  roster_.TellStanding(page_, now);
}

bool Context::Wait(const Operation& operation, uint64_t longest_ns, uint64_t* waited_ns) {
  if (operation.finished()) return true;
  std::unique_lock<std::mutex> lock = Enter();
  *waited_ns += WaitLocked(&lock, operation, NowNs(), longest_ns);
  return operation.finished();
}

uint64_t Context::WaitLocked(std::unique_lock<std::mutex>* lock, const Operation& operation, uint64_t began, uint64_t longest_ns) {
  const uint64_t until_ns = began + longest_ns;
  ++inline_waiters_;
  // This thread listens now. What is 0 is not written: peers look at it with every message, and would have to fetch the line again.
  if (page_->sleeping.load(std::memory_order_relaxed) != 0) page_->sleeping.store(0, std::memory_order_relaxed);
  uint64_t now = began;
  uint64_t spin_until = now + spin_ns_;
  uint64_t look_at_links = now + kLookAtLinks;
  int idle = 0;
  while (!operation.finished() && !closed_) {
    if (Progress()) {
      idle = 0;
      continue;
    }
    ++idle;
    if (spin_ns_ > 0 && idle % 64 != 0) {
      Pause();
      continue;
    }
    now = NowNs();
    if (now >= until_ns) break;
    if (now >= look_at_links) {
      PumpLinks();
      CheckDeadlines(now);
      look_at_links = now + kLookAtLinks;
    }
    if (idle <= 64) spin_until = now + spin_ns_;
    const bool spinning = now < spin_until;
    if (spinning || (spin_ns_ == 0 && idle < kYields)) {
      lock->unlock();
      if (!spinning) sched_yield();
      while (submitters_.load(std::memory_order_relaxed) > 0) sched_yield();
      lock->lock();
      continue;
    }
    Sleep(lock, until_ns, &inline_sleepers_);
  }
  --inline_waiters_;
  const uint64_t waited_ns = NowNs() - began;
  recorder_.Waited(operation, waited_ns);
  if (inline_waiters_ == 0 && Busy()) WakeThread();
  return waited_ns;
}

void Context::Sleep(std::unique_lock<std::mutex>* lock, uint64_t until_ns, int* sleepers) {
  page_->sleeping.store(1);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (Progress()) return;  // awake; at worst the bell rings once for nothing
  const uint64_t now = NowNs();
  // Two inline sleepers cannot both be woken by one event, so then neither sleeps long.
  const uint64_t longest = inline_waiters_ > 1 ? kMillisecond : 50 * kMillisecond;
  const uint64_t ns = std::min(longest, until_ns > now ? until_ns - now : 0);
  ++*sleepers;
  ReadEvents(static_cast<int>(ns / kMillisecond) + 1, lock);
  --*sleepers;
  page_->sleeping.store(inline_sleepers_ + thread_sleepers_ > 0 ? 1 : 0);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  CheckDeadlines(NowNs());
}

void Context::ReadEvents(int timeout_ms, std::unique_lock<std::mutex>* lock) {
  epoll_event events[64];
  lock->unlock();
  const int n = epoll_wait(epoll_.get(), events, 64, timeout_ms);
  lock->lock();
  if (n <= 0) return;
  uint64_t rings;
  [[maybe_unused]] const ssize_t got = read(doorbell_.get(), &rings, sizeof rings);
  PumpLinks();
}

void Context::WakeThread() {
  if (thread_parked_) {
    parked_.notify_one();
  } else if (thread_sleepers_ > 0) {
    RingOwnDoorbell();
  }
}

void Context::RingOwnDoorbell() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(doorbell_.get(), &one, sizeof one);
}

void Context::Beat(uint64_t now) {
  last_beat_ns_ = now;
  page_->heartbeat_ns.store(now);
}

void Context::RunThread() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    const uint64_t now = NowNs();
    if (now - last_beat_ns_ >= kBeat) {
      Beat(now);
      PumpLinks();
      CheckDeadlines(now);
    }
    if (inline_waiters_ > 0 || !Busy()) {
      thread_parked_ = true;
      parked_.wait_for(lock, std::chrono::nanoseconds(kBeat));
      thread_parked_ = false;
      continue;
    }
    if (Progress()) {
      if (submitters_.load(std::memory_order_relaxed) > 0) {
        lock.unlock();
        while (submitters_.load(std::memory_order_relaxed) > 0) sched_yield();
        lock.lock();
      }
      continue;
    }
    Sleep(&lock, now + kBeat, &thread_sleepers_);
    if (inline_waiters_ > 0) Progress();  // before it parks: the event may have been meant for a waiter that sleeps on
  }
}

void Context::PumpLinks() {
  for (const Notice& notice : roster_.Pump()) {
    if (notice.kind == Notice::Kind::kLost && !closed_) Lost(notice.error.peer);
    if (notice.kind == Notice::Kind::kAsk) {
      const OperationRecord* record = Recorder::Find(page_, notice.communicator, notice.operation, notice.sequence);
      roster_.TellAnswer(notice.error.peer, record == nullptr ? "" : recorder_.Site(record->site));
    }
    if (notice.kind != Notice::Kind::kAbort) continue;
    for (const auto& communicator : communicators_)
      if (communicator->id() == notice.communicator) communicator->Fail(notice.error);
  }
}

void Context::Lost(int world_rank) {
  Peer& peer = roster_.at(world_rank);
  if (peer.lost) return;
  peer.lost = true;
  if (!peer.left) roster_.TellLost(world_rank);
  const std::string how = peer.left          ? " has left the job (it shut down or finished its script)"
                          : peer.unreachable ? " cannot be reached any more: its host is down, or the network between is cut"
                                             : " is gone: it failed or was killed (its connection closed without a farewell)";
  FailAll({ErrorCode::kPeerLost, world_rank, peer.label + how + roster_.LastOperation(world_rank, 0)});
}

void Context::FailAll(const Error& error) {
  if (error_.ok()) error_ = error;
  for (const auto& communicator : communicators_) communicator->Fail(error_);
}

void Context::Abort(Communicator& communicator, const Error& error) {
  roster_.TellAbort(communicator.members(), communicator.id(), error);
  communicator.Fail(error);
}

void Context::Cancel(Communicator* communicator, const std::string& why) {
  std::unique_lock<std::mutex> lock(mutex_);
  Abort(*communicator, {ErrorCode::kClosed, rank_, why});
}

size_t Context::HeldNBytes(const Communicator* communicator) {
  std::unique_lock<std::mutex> lock(mutex_);
  return communicator->held_nbytes();
}

std::shared_ptr<Operation> Context::Enter(Communicator* communicator, Request request, const std::string& carrier, uint8_t algorithm) {
  std::unique_lock<std::mutex> lock(mutex_);
  return communicator->Enter(std::move(request), carrier, algorithm);
}

void Context::Stand(Operation* operation, int peer, size_t steps_done, size_t steps) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!operation->finished()) operation->Stand(peer, steps_done, steps);
}

void Context::Leave(Communicator* communicator, Operation* operation) {
  std::unique_lock<std::mutex> lock(mutex_);
  communicator->Leave(operation);
}

void Context::Abandon(Communicator* communicator, const Operation& operation, ErrorCode code, const std::string& why) {
  std::unique_lock<std::mutex> lock(mutex_);
  PumpLinks();  // a death that broke it comes first
  if (!operation.finished()) Abort(*communicator, {code, -1, communicator->Describe(operation) + ": " + why});
}

char* Context::MapRegion(int world_rank, uint64_t region, uint64_t offset) {
  char* mapped = roster_.MapRegion(world_rank, region, offset);
  if (mapped != nullptr) return mapped;
  PumpLinks();  // the descriptor was sent before the frame that names it
  return roster_.MapRegion(world_rank, region, offset);
}

std::string Context::SiteAt(int world_rank, uint32_t communicator, uint8_t operation, uint32_t sequence) {
  Peer& peer = roster_.at(world_rank);
  if (const Page* page = peer.page_or_null()) {
    const OperationRecord* record = Recorder::Find(page, communicator, operation, sequence);
    return record == nullptr ? "" : Recorder::Site(page, record->site);
  }
  roster_.TellAsk(world_rank, communicator, operation, sequence);
  // Its waiter reads links every 0.2 ms, its native thread every 0.1 s.
  const uint64_t deadline = NowNs() + 300 * kMillisecond;
  while (peer.answer.empty() && peer.link != nullptr && NowNs() < deadline) {
    sched_yield();
    PumpLinks();
  }
  return peer.answer.empty() ? "" : peer.answer.substr(1);
}

std::vector<std::pair<int, int>> Context::PeerPages() {
  std::unique_lock<std::mutex> lock(mutex_);
  std::vector<std::pair<int, int>> pages;
  for (int r = 0; r < roster_.size(); ++r)
    if (roster_.at(r).page.valid()) pages.emplace_back(r, fcntl(roster_.at(r).page.fd(), F_DUPFD_CLOEXEC, 0));
  return pages;
}

void Context::Close(bool farewell) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (closed_) return;
    closed_ = true;
    stop_ = true;
    if (farewell) roster_.TellFarewell();
    for (const auto& communicator : communicators_) communicator->Fail({ErrorCode::kClosed, -1, "this rank has shut down"});
    if (thread_parked_) parked_.notify_one();
    RingOwnDoorbell();
  }
  if (thread_ != nullptr) thread_->join();
  thread_.reset();
  std::unique_lock<std::mutex> lock(mutex_);
  communicators_.clear();
  roster_.Clear();
}

void Context::Forked() {
  closed_ = true;
  [[maybe_unused]] std::thread* gone = thread_.release();  // the thread exists in the parent only
  for (const auto& communicator : communicators_)
    for (const int fd : communicator->sockets()) close(fd);
  roster_.CloseDescriptors();
  close(epoll_.get());
  close(doorbell_.get());
}

}  // namespace ringfold
