#include "executor/operation.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/deadline.h"
#include "reduce/reduce.h"

namespace ringfold {

void Operation::Start(Request request, const Fingerprint& fingerprint) {
  request_ = std::move(request);
  fingerprint_ = fingerprint;
  element_ = SizeOf(request_.dtype);
  align_ = std::max<size_t>(1, 64 / element_);
  issued_ns_ = NowNs();
  deadline_ns_ = issued_ns_ + request_.timeout_ns;
  if (request_.offsets.empty()) {
    const Partition chunks(request_.count, request_.program->chunks, align_);
    even_offsets_.clear();
    for (uint32_t c = 0; c <= request_.program->chunks; ++c) even_offsets_.push_back(chunks.Offset(c));
  }
  unregistered_ = false;
  bound_ = false;
  broken_peer_ = -1;
  mismatched_ = false;
  unshared_ = false;
  error_ = Error();
  finished_.store(false, std::memory_order_relaxed);
  if (request_.program->exposes) {
    exposed_.assign(static_cast<size_t>(size_), nullptr);
    addresses_.assign(static_cast<size_t>(size_), 0);
  }
  Load(request_.program);
}

void Operation::Load(const Program* program) {
  program_ = program;
  done_.assign(program->steps.size(), 0);
  at_.assign(program->queues.size(), 0);
  remaining_ = program->steps.size();
  slot_nbytes_ = 0;
  scratch_ = nullptr;  // not before this operation runs: the one before may still use it
  if (program->scratch_chunks > 0) {
    const std::vector<uint64_t>& offsets = OffsetsOf(Buffer::kInput);
    uint64_t longest = 0;
    for (size_t c = 0; c + 1 < offsets.size(); ++c) longest = std::max(longest, offsets[c + 1] - offsets[c]);
    slot_nbytes_ = (longest * element_ + 63) & ~size_t{63};
  }
  if (remaining_ == 0) finished_.store(true, std::memory_order_release);
}

char* Operation::Base(Buffer buffer, uint16_t chunk) const {
  if (buffer == Buffer::kScratch) return scratch_ + slot_nbytes_ * chunk;
  const bool full = buffer == Buffer::kInput ? program_->input_full : program_->output_full;
  char* base = buffer == Buffer::kInput ? request_.input : request_.output;
  return full ? base + OffsetsOf(buffer)[chunk] * element_ : base;
}

void Operation::Range(const Block& block, size_t* begin, size_t* nbytes) const {
  // Slot k of the scratch is cut as chunk k (modulo their number) is.
  const size_t chunk = block.chunk % program_->chunks;
  const std::vector<uint64_t>& offsets = OffsetsOf(block.buffer);
  const size_t length = offsets[chunk + 1] - offsets[chunk];
  const Partition segments(length, program_->segments, align_);
  *begin = segments.Offset(block.segment) * element_;
  *nbytes = segments.Offset(block.segment + 1) * element_ - *begin;
}

Operation::Span Operation::At(const Block& block) const {
  if (!block.present()) return {nullptr, 0};
  size_t begin, nbytes;
  Range(block, &begin, &nbytes);
  return {Base(block.buffer, block.chunk) + begin, nbytes};
}

bool Operation::Ready(const Step& step) const {
  for (const uint32_t before : step.after)
    if (!done_[before]) return false;
  return true;
}

unsigned Operation::Divisor(const Step& step) const {
  return step.final && request_.reduction == Reduction::Avg ? static_cast<unsigned>(size_) : 1;
}

bool Operation::Matches(const FrameHeader& header, size_t nbytes, int peer) {
  if (header.fingerprint == fingerprint_ && header.nbytes == nbytes) return true;
  mismatched_ = true;
  foreign_ = header;
  broken_peer_ = peer;
  return false;
}

void Operation::Bind(const Program* program, const FrameHeader& header) {
  bound_ = true;
  request_.peer = program->steps[0].peer;
  fingerprint_.sequence = header.fingerprint.sequence;
  Load(program);
}

void Operation::Deliver(int sender, const FrameHeader& header, const char* payload) {
  bound_ = true;
  request_.peer = sender;
  fingerprint_.sequence = header.fingerprint.sequence;
  const size_t nbytes = request_.count * element_;
  if (!Matches(header, nbytes, request_.peer)) return;
  if (nbytes > 0) std::memcpy(request_.output, payload, nbytes);
  remaining_ = 0;
  finished_.store(true, std::memory_order_release);
}

Io Operation::RunReceive(const Step& step, Peers* peers) {
  Receiver* receiver = peers->ReceiverFrom(step.peer, lane());
  FrameHeader header;
  const Io arrived = receiver->Peek(&header);
  if (arrived != Io::kDone) return arrived;
  const Span dst = At(step.dst);
  const bool attach = step.kind == Kind::kAttach;
  if (!Matches(header, attach ? 0 : dst.nbytes, step.peer)) return Io::kBroken;
  Sink sink;
  sink.dst = dst.data;
  sink.nbytes = header.nbytes;
  if (step.kind == Kind::kRecvReduce) {
    sink.local = At(step.src).data;
    sink.dtype = request_.dtype;
    sink.reduction = request_.reduction;
    sink.divisor = Divisor(step);
  }
  if (attach) {
    char* data = header.region == 0 ? nullptr : peers->Attach(step.peer, header.region, header.offset);
    exposed_[static_cast<size_t>(step.peer)] = data;
    addresses_[static_cast<size_t>(step.peer)] = header.offset;
    unregistered_ = unregistered_ || header.region == 0;
    unshared_ = data == nullptr && header.region != 0;
    if (unshared_) return Io::kBroken;
  }
  return receiver->Receive(sink);
}

Io Operation::RunExpose(const Step& step, Peers* peers) {
  const Buffer buffer = exposed_buffer();
  const bool to_each_its_own = request_.op == OpCode::kAllToAll;
  const size_t own = static_cast<size_t>(rank_);
  const size_t chunk = to_each_its_own ? static_cast<size_t>(step.peer) : own;
  char* base = buffer == Buffer::kInput ? request_.input : request_.output;
  char* data = to_each_its_own ? base + OffsetsOf(buffer)[chunk] * element_ : base;
  const size_t count = exposes_all() ? request_.count : OffsetsOf(buffer)[chunk + 1] - OffsetsOf(buffer)[chunk];
  FrameHeader header;
  header.fingerprint = fingerprint_;
  unshared_ = !peers->Expose(step.peer, data, count * element_, &header.region, &header.offset);
  if (unshared_) return Io::kBroken;
  unregistered_ = unregistered_ || header.region == 0;
  exposed_[own] = base;
  return peers->SenderTo(step.peer, lane())->Send(header, nullptr);
}

Io Operation::Unreachable(int peer) {
  unshared_ = true;
  broken_peer_ = peer;
  return Io::kBroken;
}

Io Operation::RunFold(const Step& step, Peers* peers) {
  // Of vectors that are not mapped here, so much at a time is fetched from each; two of them and the result stay in the second-level cache.
  constexpr size_t kFetched = 128 * 1024;
  size_t begin, nbytes;
  Range(step.dst, &begin, &nbytes);
  char* own = At(step.dst).data;
  if (exposes_all()) begin += OffsetsOf(Buffer::kInput)[step.dst.chunk] * element_;
  const size_t ranks = static_cast<size_t>(size_);
  std::vector<const void*> srcs(ranks);
  std::vector<void*> dsts;
  const size_t remote = static_cast<size_t>(std::count(exposed_.begin(), exposed_.end(), nullptr));
  char* const fetched = remote > 0 ? peers->Bounce(remote * kFetched) : nullptr;
  const size_t most = remote > 0 ? kFetched : nbytes;
  for (size_t at = 0; at < nbytes; at += most) {
    const size_t piece = std::min(most, nbytes - at);
    char* slot = fetched;
    for (size_t r = 0; r < ranks; ++r) {
      srcs[r] = exposed_[r] + begin + at;
      if (exposed_[r] != nullptr) continue;
      if (!peers->Read(static_cast<int>(r), addresses_[r] + begin + at, slot, piece)) return Unreachable(static_cast<int>(r));
      srcs[r] = slot;
      slot += kFetched;
    }
    dsts.clear();
    if (step.spread) {
      for (char* vector : exposed_) dsts.push_back(vector + begin + at);
    } else {
      dsts.push_back(step.peer < 0 ? own + at : exposed_[static_cast<size_t>(step.peer)] + begin + at);
    }
    Fold(request_.dtype, request_.reduction, dsts.data(), dsts.size(), srcs.data(), ranks, piece / element_,
         request_.reduction == Reduction::Avg ? static_cast<unsigned>(size_) : 1);
  }
  return Io::kDone;
}

Io Operation::RunPull(const Step& step, Peers* peers) {
  size_t begin, nbytes;
  Range(step.dst, &begin, &nbytes);
  if (exposes_all()) begin += OffsetsOf(Buffer::kInput)[step.dst.chunk] * element_;
  char* dst = At(step.dst).data;
  const size_t peer = static_cast<size_t>(step.peer);
  if (nbytes == 0) return Io::kDone;
  if (exposed_[peer] != nullptr) {
    std::memcpy(dst, exposed_[peer] + begin, nbytes);
    return Io::kDone;
  }
  return peers->Read(step.peer, addresses_[peer] + begin, dst, nbytes) ? Io::kDone : Unreachable(step.peer);
}

Io Operation::Run(const Step& step, Peers* peers) {
  switch (step.kind) {
    case Kind::kSend: {
      const Span src = At(step.src);
      FrameHeader header;
      header.fingerprint = fingerprint_;
      header.nbytes = src.nbytes;
      return peers->SenderTo(step.peer, lane())->Send(header, src.data);
    }
    case Kind::kExpose:
      return RunExpose(step, peers);
    case Kind::kRecv:
    case Kind::kRecvReduce:
    case Kind::kAttach:
      return RunReceive(step, peers);
    case Kind::kCopy: {
      const Span src = At(step.src);
      const Span dst = At(step.dst);
      if (src.nbytes > 0 && src.data != dst.data) std::memmove(dst.data, src.data, src.nbytes);
      if (Divisor(step) > 1) Divide(request_.dtype, dst.data, dst.nbytes / element_, Divisor(step));
      return Io::kDone;
    }
    case Kind::kReduce: {
      const Span src = At(step.src);
      const Span dst = At(step.dst);
      ReducePair(request_.dtype, request_.reduction, dst.data, dst.data, src.data, dst.nbytes / element_, Divisor(step));
      return Io::kDone;
    }
    case Kind::kFold:
      return RunFold(step, peers);
    case Kind::kPull:
      return RunPull(step, peers);
    case Kind::kFence:
      return Io::kDone;
  }
  return Io::kDone;
}

bool Operation::Advance(Peers* peers) {
  bool moved = false;
  if (slot_nbytes_ > 0 && scratch_ == nullptr) scratch_ = peers->Scratch(slot_nbytes_ * program_->scratch_chunks);
  for (bool again = true, worked = false; again && !worked && remaining_ > 0;) {
    again = false;
    for (size_t q = 0; q < program_->queues.size(); ++q) {
      const Queue& queue = program_->queues[q];
      while (at_[q] < queue.steps.size()) {
        const uint32_t index = queue.steps[at_[q]];
        const Step& step = program_->steps[index];
        if (!Ready(step)) break;
        const Io io = Run(step, peers);
        if (io == Io::kBlocked) break;
        moved = true;
        if (io == Io::kMoved) break;
        if (io == Io::kBroken) {
          if (broken_peer_ < 0) broken_peer_ = step.peer;
          return true;
        }
        done_[index] = 1;
        ++at_[q];
        --remaining_;
        again = true;  // another queue may have waited for this step
        if (step.kind == Kind::kFence && unregistered_ && program_->fallback != nullptr) {
          // Every rank has seen the same answers at its first fence, so every rank turns here.
          Load(program_->fallback.get());
          if (slot_nbytes_ > 0) scratch_ = peers->Scratch(slot_nbytes_ * program_->scratch_chunks);
          q = program_->queues.size();
          break;
        }
        if (queue.role == Queue::Role::kLocal) {
          worked = true;  // perhaps a millisecond of folding: the other operations take their turn before the next
          break;
        }
      }
    }
  }
  if (remaining_ == 0) finished_.store(true, std::memory_order_release);
  return moved;
}

void Operation::Stand(int peer, size_t steps_done, size_t steps) {
  carried_peer_ = peer;
  carried_steps_ = steps;
  remaining_ = steps - std::min(steps_done, steps);
}

void Operation::Complete() {
  remaining_ = 0;
  finished_.store(true, std::memory_order_release);
}

void Operation::Fail(Error error) {
  error_ = std::move(error);
  finished_.store(true, std::memory_order_release);
}

int Operation::WaitingFor() const {
  if (!carrier().empty()) return carried_peer_;
  if (request_.op == OpCode::kRecv) return request_.peer;
  for (const Queue::Role role : {Queue::Role::kReceive, Queue::Role::kSend}) {
    for (size_t q = 0; q < program_->queues.size(); ++q) {
      const Queue& queue = program_->queues[q];
      if (queue.role != role || at_[q] >= queue.steps.size()) continue;
      const Step& step = program_->steps[queue.steps[at_[q]]];
      if (Ready(step)) return step.peer;
    }
  }
  return -1;
}

}  // namespace ringfold
