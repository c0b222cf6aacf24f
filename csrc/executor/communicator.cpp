#include "executor/communicator.h"

#include <sched.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstdio>

#include "common/deadline.h"
#include "executor/context.h"
#include "transport/shm/channel.h"
#include "transport/tcp/channel.h"

namespace ringfold {
namespace {

std::string Seconds(uint64_t nanoseconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", static_cast<double>(nanoseconds) / 1e9);
  return text;
}

// FNV-1a over the chunk offsets: uneven lengths must agree on every rank.
uint32_t ShapeDigest(const std::vector<uint64_t>& offsets) {
  uint32_t digest = offsets.empty() ? 0 : 2166136261u;
  for (const uint64_t offset : offsets)
    for (int shift = 0; shift < 64; shift += 8) digest = (digest ^ static_cast<uint8_t>(offset >> shift)) * 16777619u;
  return digest;
}

shm::Ring* RingFor(const Mapping& arena, int sender, Lane lane, size_t ring_nbytes) {
  return reinterpret_cast<shm::Ring*>(arena.data() + (static_cast<size_t>(sender) * kLanes + lane) * shm::RingBytes(ring_nbytes));
}

}  // namespace

Communicator::Communicator(Context* context, uint32_t id, std::string name, std::vector<int> members)
    : context_(context), id_(id), name_(std::move(name)), members_(std::move(members)), inbox_(static_cast<int>(members_.size())) {
  rank_ = static_cast<int>(std::find(members_.begin(), members_.end(), context->rank()) - members_.begin());
  channels_.resize(members_.size());
  sends_.resize(members_.size());
}

void Communicator::AddSocket(int peer, Lane lane, int fd) {
  Channels& channels = channels_[static_cast<size_t>(peer)];
  channels.sockets[lane].emplace_back(fd);
  std::vector<int> streams;
  for (const Descriptor& socket : channels.sockets[lane]) streams.push_back(socket.get());
  channels.senders[lane] = std::make_unique<tcp::ChannelSender>(streams);
  channels.receivers[lane] = std::make_unique<tcp::ChannelReceiver>(streams);
}

Error Communicator::CreateArena(size_t ring_nbytes) {
  ring_nbytes_ = ring_nbytes;
  arena_ = Mapping::Create(members_.size() * kLanes * shm::RingBytes(ring_nbytes));
  if (arena_.valid()) return {};
  return {ErrorCode::kSystem, -1,
          "no shared memory for the rings of a communicator of " + std::to_string(members_.size()) + " ranks (" +
              std::to_string(members_.size() * kLanes * shm::RingBytes(ring_nbytes)) + " bytes): errno " + std::to_string(arena_.error()) +
              "; see `ringfold doctor`"};
}

void Communicator::AttachArena(int peer, Mapping arena, Bell bell) {
  Channels& channels = channels_[static_cast<size_t>(peer)];
  channels.arena = std::move(arena);
  for (const Lane lane : {kCollectiveLane, kMessageLane}) {
    channels.senders[lane] = std::make_unique<shm::ChannelSender>(RingFor(channels.arena, rank_, lane, ring_nbytes_), ring_nbytes_, bell);
    channels.receivers[lane] = std::make_unique<shm::ChannelReceiver>(RingFor(arena_, peer, lane, ring_nbytes_), ring_nbytes_, bell);
  }
}

bool Communicator::IsOpen() const {
  for (int peer = 0; peer < size(); ++peer)
    if (peer != rank_ && channels_[static_cast<size_t>(peer)].senders[kMessageLane] == nullptr) return false;
  return true;
}

std::vector<int> Communicator::sockets() const {
  std::vector<int> fds;
  for (const Channels& channels : channels_)
    for (const auto& streams : channels.sockets)
      for (const Descriptor& socket : streams) fds.push_back(socket.get());
  return fds;
}

size_t Communicator::Keep(std::unique_ptr<Program> program) {
  programs_.push_back(std::move(program));
  return programs_.size() - 1;
}

const Program* Communicator::MessageProgram(Kind kind, int peer) {
  const Program*& known = message_programs_[{kind, peer}];
  if (known == nullptr) known = programs_[Keep(Program::Message(kind, peer))].get();
  return known;
}

std::shared_ptr<Operation> Communicator::Issue(Request request) {
  const bool receives = request.op == OpCode::kRecv;
  OperationQueue* const queue = request.op == OpCode::kSend ? &sends_[static_cast<size_t>(request.peer)] : &collectives_;
  if (IsMessage(request.op)) request.program = MessageProgram(receives ? Kind::kRecv : Kind::kSend, std::max(request.peer, 0));
  Fingerprint fingerprint;
  if (!receives) fingerprint.sequence = queue->next_sequence++;  // a receive gets its message's
  // Both ends of a message are one operation.
  fingerprint.operation = static_cast<uint8_t>(receives ? OpCode::kSend : request.op);
  fingerprint.dtype = static_cast<uint8_t>(request.dtype);
  fingerprint.reduction = static_cast<uint8_t>(request.reduction);
  fingerprint.algorithm = request.program->algorithm;
  fingerprint.root = request.root;
  // In all_to_all every pair has lengths of its own, which each message is checked for.
  const bool pairwise = request.op == OpCode::kAllToAll;
  fingerprint.shape = pairwise ? 0 : ShapeDigest(request.offsets);
  fingerprint.count = pairwise ? 0 : request.count;
  std::shared_ptr<Operation> operation;
  const bool collective = !IsMessage(request.op);
  if (collective && spare_ != nullptr && spare_.use_count() == 1 && spare_->finished()) {
    operation = std::move(spare_);
  } else {
    operation = std::make_shared<Operation>(rank_, size());
  }
  operation->Start(std::move(request), fingerprint);
  if (collective) spare_ = operation;
  operation->record = context_->recorder().Open(id_, *operation);
  if (!error_.ok()) operation->Fail(error_);
  if (operation->finished()) {
    context_->recorder().Close(*operation);
    return operation;
  }
  ++in_flight_;
  if (IsMessage(operation->request().op)) ++messages_in_flight_;
  if (!receives) {
    queue->waiting.push_back(operation);
  } else if (!inbox_.Post(operation)) {
    if (operation->broken_peer() >= 0) Broken(*operation);
    if (!operation->finished()) operation->Fail(error_);
    Close(operation.get());
  }
  return operation;
}

void Communicator::Close(Operation* operation) {
  context_->recorder().Close(*operation);
  --in_flight_;
  if (IsMessage(operation->request().op)) --messages_in_flight_;
}

bool Communicator::Turn(OperationQueue* queue) {
  bool moved = false;
  while (!queue->waiting.empty()) {
    Operation* operation = queue->waiting.front().get();
    context_->recorder().Start(*operation);
    moved = operation->Advance(this) || moved;
    if (operation->broken_peer() >= 0) {
      Broken(*operation);
      return true;
    }
    if (!operation->finished()) return moved;
    Close(operation);
    queue->waiting.pop_front();
  }
  return moved;
}

bool Communicator::TurnInbox() {
  Operation* broken = nullptr;
  int lost = -1;
  const bool moved = inbox_.Progress(
      this, [this](int peer) { return MessageProgram(Kind::kRecv, peer); }, [this](Operation* operation) { Close(operation); }, &broken, &lost);
  if (broken != nullptr) Broken(*broken);
  if (lost >= 0) {
    context_->PumpLinks();  // whose death, or farewell, came first?
    context_->Lost(WorldRank(lost));
  }
  return moved;
}

bool Communicator::Progress() {
  if (in_flight_ == 0) return false;
  bool moved = Turn(&collectives_);
  if (messages_in_flight_ > 0) {
    for (auto& queue : sends_) moved = Turn(&queue) || moved;
    if (!inbox_.empty()) moved = TurnInbox() || moved;
  }
  return moved;
}

std::string Communicator::Describe(const Operation& operation) const {
  const Fingerprint& f = operation.fingerprint();
  bool far = false;
  for (const Channels& channels : channels_) far = far || !channels.sockets[kCollectiveLane].empty();
  std::string text = std::string(OpName(static_cast<uint8_t>(operation.request().op))) + " #" + std::to_string(f.sequence) + " (";
  if (operation.request().op != OpCode::kBarrier)
    text += std::string(NameOf(operation.request().dtype)) + " x " + std::to_string(operation.request().count) + ", ";
  if (IsMessage(operation.request().op) && f.root != 0) text += "tag " + std::to_string(f.root) + ", ";
  if (IsReduction(operation.request().op))
    text += std::string(NameOf(operation.request().reduction)) + ", ";
  if (f.algorithm != 0) text += std::string(AlgorithmName(f.algorithm)) + " ";
  const std::string& carrier = operation.carrier();
  return text + "over " + (!carrier.empty() ? carrier : far ? "tcp" : "shm") + ", axis " + name_ + ")";
}

std::string Communicator::Standing(const Operation& operation, int known) const {
  std::string text = "rank " + std::to_string(context_->rank()) + " was at step " + std::to_string(operation.steps_done()) + " of " +
                     std::to_string(operation.steps());
  const int peer = Awaited(operation);
  if (peer < 0 && operation.request().op == OpCode::kRecv) return text + ", waiting for anybody";
  if (peer < 0) return text + (operation.carrier().empty() ? ", behind an earlier operation" : ", inside " + operation.carrier());
  if (WorldRank(peer) == known) return text + ", waiting for it";
  int end;
  return text + ", waiting for " + context_->roster().Chain(WorldRank(peer), operation.issued_ns(), &end);
}

std::string Communicator::SiteOf(const Operation& operation) const { return context_->recorder().Site(operation.request().site); }

void Communicator::Broken(const Operation& operation) {
  const int culprit = WorldRank(operation.broken_peer());
  const std::string label = context_->roster().at(culprit).label;
  if (operation.unshared()) {
    // A process that dies loses its memory a moment before its sockets, which tell us so.
    const uint64_t until = NowNs() + kSecond;
    while (error_.ok() && NowNs() < until) {
      context_->PumpLinks();
      sched_yield();
    }
    if (!error_.ok()) return;
    context_->Abort(*this, {ErrorCode::kSystem, culprit,
                            Describe(operation) + ": rank " + std::to_string(context_->rank()) + " could not reach the memory of " + label +
                                "\n  Is there address space and descriptors left (ulimit -v, ulimit -n)?"});
    return;
  }
  if (!operation.mismatched()) {
    context_->PumpLinks();  // whose death, or farewell, came first?
    context_->Lost(culprit);
    return;
  }
  const FrameHeader& header = operation.foreign();
  const Fingerprint& f = header.fingerprint;
  std::string text = "ranks issue different operations on axis " + name_ + "\n  rank " + std::to_string(context_->rank()) + " is in " +
                     Describe(operation) + SiteOf(operation) + "\n  " + label;
  if (f == operation.fingerprint()) {
    text += " sent " + std::to_string(header.nbytes) + " bytes of it, expected other lengths between the two";
  } else {
    text += std::string(" sent ") + OpName(f.operation) + " #" + std::to_string(f.sequence) + " (";
    if (ValidDType(f.dtype)) text += std::string(NameOf(static_cast<DType>(f.dtype))) + " x " + std::to_string(f.count);
    if (ValidReduction(f.reduction) && IsReduction(static_cast<OpCode>(f.operation))) text += std::string(", ") + NameOf(static_cast<Reduction>(f.reduction));
    if (f.algorithm != 0) text += std::string(", ") + AlgorithmName(f.algorithm);
    if (f.root >= 0) text += (f.operation == static_cast<uint8_t>(OpCode::kSend) ? ", tag " : ", root ") + std::to_string(f.root);
    text += ")";
  }
  text += context_->SiteAt(culprit, id_, f.operation, f.sequence);
  text += "\n  Every rank must issue the same operations with the same dtype, count and root, in the same order.";
  const Error error = {ErrorCode::kMismatch, culprit, text};
  context_->Abort(*this, error);
}

void Communicator::FailOne(Operation* operation, const Error& error) {
  Error own = error;
  if (error.code == ErrorCode::kPeerLost) own.text = Describe(*operation) + ": " + error.text + "\n  " + Standing(*operation, error.peer);
  operation->Fail(std::move(own));
}

void Communicator::Fail(const Error& error) {
  if (!error_.ok()) return;
  error_ = error;
  for (const auto& operation : carried_) {
    FailOne(operation.get(), error);
    context_->recorder().Close(*operation);
  }
  carried_.clear();
  const auto end = [&](Operation* operation) {
    FailOne(operation, error);
    Close(operation);
  };
  while (!inbox_.empty()) end(inbox_.Remove().get());
  const auto clear = [&](OperationQueue* queue) {
    while (!queue->waiting.empty()) {
      const std::shared_ptr<Operation> operation = std::move(queue->waiting.front());
      queue->waiting.pop_front();
      end(operation.get());
    }
  };
  clear(&collectives_);
  for (auto& queue : sends_) clear(&queue);
}

bool Communicator::HasLeft(int peer) const {
  return context_->roster().at(WorldRank(peer)).left && channels_[static_cast<size_t>(peer)].sockets[kCollectiveLane].empty();
}

bool Communicator::CheckOne(const Operation& operation, uint64_t now, OperationQueue* queue) {
  int peer = operation.WaitingFor();
  context_->recorder().Note(operation, peer < 0 ? -1 : WorldRank(peer));
  if (operation.request().op == OpCode::kRecv && peer < 0) {  // from anybody: in vain once everybody has left
    for (int p = 0; p < size(); ++p)
      if (p != rank_ && (peer < 0 || !HasLeft(p))) peer = p;
  }
  if (peer >= 0 && HasLeft(peer)) {
    // Its farewell came after everything it sent; nothing moved, so nothing more will come.
    if (queue != nullptr ? Turn(queue) : TurnInbox()) return false;
    Fail({ErrorCode::kPeerLost, WorldRank(peer), context_->roster().at(WorldRank(peer)).label + " has left the job (it shut down or finished its script)"});
    return false;
  }
  if (now < operation.deadline_ns()) return true;
  GiveUp(operation, peer);
  return false;
}

void Communicator::GiveUp(const Operation& operation, int peer) {
  std::string text = Describe(operation) + SiteOf(operation) + " gave up after its timeout of " + Seconds(operation.request().timeout_ns) + "\n  " +
                     Standing(operation, -1) +
                     "\n  If that rank is slow, raise timeout_s (--timeout); if it has ended the loop early or issues other collectives, "
                     "every rank must take part in each.";
  int culprit = -1;
  if (peer >= 0) context_->roster().Chain(WorldRank(peer), operation.issued_ns(), &culprit);
  context_->Abort(*this, {ErrorCode::kTimeout, culprit, text});
}

void Communicator::Check(uint64_t now) {
  if (!CheckCarried(now) || in_flight_ == 0) return;
  if (!collectives_.waiting.empty() && !CheckOne(*collectives_.waiting.front(), now, &collectives_)) return;
  if (messages_in_flight_ == 0) return;
  for (auto& queue : sends_)
    if (!queue.waiting.empty() && !CheckOne(*queue.waiting.front(), now, &queue)) return;
  for (const auto& operation : inbox_.posted())
    if (!CheckOne(*operation, now, nullptr)) return;  // the list may have changed
}

bool Communicator::Expose(int peer, const char* data, size_t nbytes, uint64_t* region, uint64_t* offset) {
  *region = 0;
  *offset = reinterpret_cast<uint64_t>(data);
  if (!channels_[static_cast<size_t>(peer)].sockets[kCollectiveLane].empty()) return true;
  return context_->roster().Announce(WorldRank(peer), data, nbytes, region, offset);
}

char* Communicator::Attach(int peer, uint64_t region, uint64_t offset) { return context_->MapRegion(WorldRank(peer), region, offset); }

bool Communicator::Read(int peer, uint64_t address, char* dst, size_t nbytes) { return context_->roster().Read(WorldRank(peer), address, dst, nbytes); }

char* Communicator::Grown(std::unique_ptr<char[]>* memory, size_t* held_nbytes, size_t nbytes) {
  constexpr size_t kAlignment = 64;
  if (nbytes + kAlignment > *held_nbytes) {
    *held_nbytes = nbytes + kAlignment;
    memory->reset(new char[*held_nbytes]);  // not zeroed: nobody reads what he has not written
  }
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory->get()) + kAlignment - 1) & ~(kAlignment - 1));
}

}  // namespace ringfold
