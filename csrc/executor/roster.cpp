#include "executor/roster.h"

#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "common/deadline.h"
#include "executor/recorder.h"

namespace ringfold {

Roster::Roster(int rank, int size, std::string own_label, Pool* pool) : rank_(rank), pool_(pool), peers_(static_cast<size_t>(size)) {
  at(rank).label = std::move(own_label);
}

void Roster::Add(int peer, int fd, bool near, std::string label) {
  at(peer).label = std::move(label);
  at(peer).near = near;
  at(peer).link = std::make_unique<Link>(fd);
  ucred credentials = {};
  socklen_t nbytes = sizeof credentials;
  if (near && getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &nbytes) == 0) at(peer).pid = credentials.pid;
}

Error Roster::Greet(int page_fd, int doorbell_fd, uint64_t deadline_ns) {
  for (Peer& peer : peers_) {
    if (peer.link == nullptr || !peer.near) continue;
    const Error error = peer.link->Send(LinkType::kHello, sizeof(Page), reinterpret_cast<uint64_t>(&probe_), probe_, "", {page_fd, doorbell_fd}, deadline_ns);
    if (!error.ok()) return {error.code, -1, peer.label + ": " + error.text};
  }
  return {};
}

std::vector<Notice> Roster::Pump() {
  std::vector<Notice> notices;
  for (int p = 0; p < static_cast<int>(peers_.size()); ++p) {
    Peer& peer = at(p);
    while (peer.link != nullptr) {
      LinkMessage message;
      const Link::Next next = peer.link->Receive(&message);
      if (next == Link::Next::kNothing) break;
      if (next == Link::Next::kMessage) {
        Take(p, std::move(message), &notices);
        continue;
      }
      peer.unreachable = peer.link->unreachable();
      peer.link.reset();  // also leaves the epoll set
      if (!peer.left) notices.push_back({Notice::Kind::kLost, 0, {ErrorCode::kPeerLost, p, ""}});
    }
  }
  return notices;
}

void Roster::Take(int world_rank, LinkMessage message, std::vector<Notice>* notices) {
  Peer& peer = at(world_rank);
  const auto mapping = [&](size_t nbytes) {
    if (message.descriptors.empty()) return Mapping();
    return Mapping::Attach(std::move(message.descriptors[0]), nbytes);
  };
  switch (message.type) {
    case LinkType::kHello:
      peer.page = mapping(message.a);
      if (message.descriptors.size() > 1) peer.doorbell = std::move(message.descriptors[1]);
      {
        uint64_t seen = 0;
        peer.readable = Read(world_rank, message.b, reinterpret_cast<char*>(&seen), sizeof seen) && seen == message.c;
      }
      break;
    case LinkType::kArena:
      peer.arenas[static_cast<uint32_t>(message.a)] = {mapping(message.b), message.c != 0};
      break;
    case LinkType::kRegion:
      peer.regions[message.a] = mapping(message.b);
      break;
    case LinkType::kUnregion:
      peer.regions.erase(message.a);
      break;
    case LinkType::kAbort:
      notices->push_back({Notice::Kind::kAbort, static_cast<uint32_t>(message.a),
                          {static_cast<ErrorCode>(message.b), static_cast<int>(message.c) - 1, "reported by " + peer.label + ": " + message.text}});
      break;
    case LinkType::kLost:
      if (message.a < peers_.size() && static_cast<int>(message.a) != rank_)
        notices->push_back({Notice::Kind::kLost, 0, {ErrorCode::kPeerLost, static_cast<int>(message.a), ""}});
      break;
    case LinkType::kStanding:
      peer.told.operation = static_cast<uint8_t>(message.a >> 32);
      peer.told.sequence = static_cast<uint32_t>(message.a);
      peer.told.waiting_for = static_cast<int32_t>(message.b) - 1;
      peer.told.state.store(static_cast<uint8_t>(RecordState::kStarted));
      peer.told_site = message.text;
      peer.told_ns = NowNs();
      break;
    case LinkType::kAsk:
      notices->push_back({Notice::Kind::kAsk, static_cast<uint32_t>(message.a), {ErrorCode::kNone, world_rank, ""},
                          static_cast<uint8_t>(message.b >> 32), static_cast<uint32_t>(message.b)});
      break;
    case LinkType::kAnswer:
      peer.answer = " " + message.text;
      break;
    case LinkType::kBye:
      peer.left = true;
      break;
  }
}

bool Roster::Announce(int world_rank, const char* data, size_t nbytes, uint64_t* region, uint64_t* offset) {
  for (const uint64_t freed : pool_->FreedSince(&freed_cursor_)) {
    for (Peer& peer : peers_) {
      if (peer.announced.erase(freed) > 0 && peer.link != nullptr)
        peer.link->Send(LinkType::kUnregion, freed, 0, 0, "", {}, NowNs() + kSecond);
    }
  }
  RegionRef ref;
  if (!pool_->Find(data, nbytes, &ref)) return true;
  Peer& peer = at(world_rank);
  if (peer.announced.count(ref.id) == 0) {
    if (peer.link == nullptr) return false;
    if (!peer.link->Send(LinkType::kRegion, ref.id, ref.region_nbytes, 0, "", {ref.fd}, NowNs() + kSecond).ok()) return false;
    peer.announced.insert(ref.id);
  }
  *region = ref.id;
  *offset = ref.offset;
  return true;
}

char* Roster::MapRegion(int world_rank, uint64_t region, uint64_t offset) const {
  const auto found = at(world_rank).regions.find(region);
  if (found == at(world_rank).regions.end() || !found->second.valid() || offset > found->second.size()) return nullptr;
  return found->second.data() + offset;
}

bool Roster::Read(int world_rank, uint64_t address, char* dst, size_t nbytes) const {
  // Longer calls are cut short by the kernel at MAX_RW_COUNT.
  constexpr size_t kMost = size_t{1} << 30;
  for (size_t at = 0; at < nbytes;) {
    const iovec here = {dst + at, std::min(kMost, nbytes - at)};
    const iovec there = {reinterpret_cast<void*>(address + at), here.iov_len};
    const ssize_t n = process_vm_readv(this->at(world_rank).pid, &here, 1, &there, 1, 0);
    if (n <= 0) return false;
    at += static_cast<size_t>(n);
  }
  return true;
}

const OperationRecord* Roster::LastRecord(int world_rank, uint64_t since_ns) const {
  const Peer& peer = at(world_rank);
  if (peer.page_or_null() != nullptr) return Recorder::Last(peer.page_or_null());
  return peer.told_ns > since_ns ? &peer.told : nullptr;
}

std::string Roster::LastOperation(int world_rank, uint64_t since_ns) const {
  const OperationRecord* last = LastRecord(world_rank, since_ns);
  const Page* page = at(world_rank).page_or_null();
  if (last != nullptr)
    return ", whose last operation was " + Recorder::Describe(*last) + (page != nullptr ? Recorder::Site(page, last->site) : at(world_rank).told_site);
  return at(world_rank).page_or_null() != nullptr ? ", which has issued no operation yet" : "";
}

bool Roster::HasIssued(int world_rank, uint32_t communicator, uint8_t operation, uint32_t sequence) const {
  Page* page = at(world_rank).page_or_null();
  if (page == nullptr) return true;
  const uint64_t next = page->next_operation.load(std::memory_order_acquire);
  for (uint64_t index = next; index > 0 && next - index < kRecords;) {
    const OperationRecord& record = page->Record(--index);
    if (record.communicator == communicator && record.operation == operation && record.sequence == sequence) return true;
  }
  return next > kRecords;
}

std::string Roster::Chain(int world_rank, uint64_t since_ns, int* end) const {
  std::string text = at(world_rank).label;
  *end = world_rank;
  for (size_t hops = 0; hops < peers_.size() && *end != rank_; ++hops) {
    const OperationRecord* last = LastRecord(*end, since_ns);
    const int next = last == nullptr ? -1 : Recorder::WaitingFor(*last);
    if (next < 0 || next == rank_ || next >= static_cast<int>(peers_.size())) break;
    *end = next;
    text += ", which waits for " + at(next).label;
  }
  return text + LastOperation(*end, since_ns);
}

void Roster::TellAbort(const std::vector<int>& members, uint32_t communicator, const Error& error) {
  const uint64_t deadline = NowNs() + 100 * kMillisecond;
  for (const int member : members) {
    Peer& peer = at(member);
    if (peer.link == nullptr || peer.left) continue;
    peer.link->Send(LinkType::kAbort, communicator, static_cast<uint64_t>(error.code), static_cast<uint64_t>(error.peer + 1), error.text, {}, deadline);
  }
}

void Roster::TellLost(int world_rank) {
  for (Peer& peer : peers_) {
    if (peer.link != nullptr) peer.link->Send(LinkType::kLost, static_cast<uint64_t>(world_rank), 0, 0, "", {}, NowNs() + kMillisecond);
  }
}

void Roster::TellStanding(Page* own_page, uint64_t now) {
  constexpr uint64_t kFirst = 250 * kMillisecond;
  const OperationRecord* last = Recorder::Last(own_page);
  if (last == nullptr || Recorder::WaitingFor(*last) < 0) return;
  const uint64_t index = own_page->next_operation.load() - 1;
  if (index != told_record_) tell_after_ns_ = kFirst;
  if (now - last->start_ns < tell_after_ns_) return;
  told_record_ = index;
  tell_after_ns_ = 2 * (now - last->start_ns);
  for (Peer& peer : peers_) {
    if (peer.near || peer.link == nullptr) continue;
    const uint64_t operation = uint64_t{last->operation} << 32 | last->sequence;
    peer.link->Send(LinkType::kStanding, operation, static_cast<uint64_t>(last->waiting_for + 1), 0, Recorder::Site(own_page, last->site), {}, now + kMillisecond);
  }
}

void Roster::TellAsk(int world_rank, uint32_t communicator, uint8_t operation, uint32_t sequence) {
  Peer& peer = at(world_rank);
  peer.answer.clear();
  if (peer.link != nullptr) peer.link->Send(LinkType::kAsk, communicator, uint64_t{operation} << 32 | sequence, 0, "", {}, NowNs() + 100 * kMillisecond);
}

void Roster::TellAnswer(int world_rank, const std::string& text) {
  Peer& peer = at(world_rank);
  if (peer.link != nullptr) peer.link->Send(LinkType::kAnswer, 0, 0, 0, text, {}, NowNs() + 100 * kMillisecond);
}

void Roster::TellFarewell() {
  for (Peer& peer : peers_) {
    if (peer.link != nullptr) peer.link->Send(LinkType::kBye, 0, 0, 0, "", {}, NowNs() + 100 * kMillisecond);
  }
}

void Roster::Clear() { peers_ = std::vector<Peer>(peers_.size()); }

void Roster::CloseDescriptors() {
  for (Peer& peer : peers_)
    if (peer.link != nullptr) close(peer.link->fd());
}

}  // namespace ringfold
