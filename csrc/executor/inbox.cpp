#include "executor/inbox.h"

#include <algorithm>

namespace ringfold {
namespace {

uint32_t TagOf(const FrameHeader& header) { return static_cast<uint32_t>(header.fingerprint.root); }

bool Takes(const Operation& operation, int sender, uint32_t tag) {
  const Request& request = operation.request();
  return (request.peer < 0 || request.peer == sender) && static_cast<uint32_t>(request.root) == tag;
}

}  // namespace

bool Inbox::Post(const std::shared_ptr<Operation>& operation) {
  for (auto message = aside_.begin(); message != aside_.end(); ++message) {
    if (!Takes(*operation, message->sender, TagOf(message->header))) continue;
    operation->Deliver(message->sender, message->header, message->payload.get());
    aside_nbytes_ -= message->header.nbytes;
    aside_.erase(message);
    return false;
  }
  posted_.push_back(operation);
  return true;
}

std::shared_ptr<Operation> Inbox::Remove() {
  std::shared_ptr<Operation> first = std::move(posted_.front());
  Forget(first.get());
  posted_.pop_front();
  return first;
}

void Inbox::Forget(const Operation* operation) {
  for (Sender& sender : senders_)
    if (sender.receiving.get() == operation) sender.receiving.reset();
}

// Whether some receive waits for this sender whose message is not known yet.
bool Inbox::Wanted(int sender) const {
  return std::any_of(posted_.begin(), posted_.end(), [sender](const auto& operation) {
    return !operation->bound() && (operation->request().peer < 0 || operation->request().peer == sender);
  });
}

// Whether some receive waits for this sender alone, or for anybody although all have ended.
bool Inbox::InVain(int ended) const {
  const auto gone = std::count_if(senders_.begin(), senders_.end(), [](const Sender& sender) { return sender.ended; });
  const bool all_gone = static_cast<size_t>(gone) + 1 >= senders_.size();
  return std::any_of(posted_.begin(), posted_.end(), [=](const auto& operation) {
    return !operation->bound() && (operation->request().peer == ended || (operation->request().peer < 0 && all_gone));
  });
}

std::shared_ptr<Operation> Inbox::Match(int sender, uint32_t tag) const {
  for (const auto& operation : posted_)
    if (!operation->bound() && Takes(*operation, sender, tag)) return operation;
  return nullptr;
}

bool Inbox::Progress(Peers* peers, const std::function<const Program*(int)>& program, const std::function<void(Operation*)>& finished,
                     Operation** broken, int* lost) {
  bool moved = false;
  for (int s = 0; s < static_cast<int>(senders_.size()); ++s) {
    Sender& sender = senders_[static_cast<size_t>(s)];
    for (;;) {
      Receiver* const channel = peers->ReceiverFrom(s, kMessageLane);
      if (channel == nullptr) break;  // this rank itself
      if (sender.receiving == nullptr && sender.putting_aside == nullptr) {
        if (!Wanted(s)) break;
        FrameHeader header;
        const Io io = sender.ended ? Io::kBroken : channel->Peek(&header);
        if (io == Io::kBroken) {
          // It said farewell, or its link tells of its death. Who receives from anybody can still hear from the others.
          sender.ended = true;
          if (!InVain(s)) break;
          *lost = s;
          return true;
        }
        if (io != Io::kDone) break;
        sender.receiving = Match(s, TagOf(header));
        if (sender.receiving != nullptr) {
          sender.receiving->Bind(program(s), header);
        } else {
          if (aside_nbytes_ + header.nbytes > kAsideNbytes) break;
          aside_nbytes_ += header.nbytes;
          sender.putting_aside.reset(new Aside{s, header, std::unique_ptr<char[]>(new char[header.nbytes])});
        }
      }
      if (sender.putting_aside != nullptr) {
        Sink sink;
        sink.dst = sender.putting_aside->payload.get();
        sink.nbytes = sender.putting_aside->header.nbytes;
        const Io io = channel->Receive(sink);
        if (io == Io::kBroken) *lost = s;
        if (io == Io::kBroken) return true;
        moved = moved || io != Io::kBlocked;
        if (io != Io::kDone) break;
        aside_.push_back(std::move(*sender.putting_aside));
        sender.putting_aside.reset();
        continue;
      }
      const std::shared_ptr<Operation> operation = sender.receiving;
      moved = operation->Advance(peers) || moved;
      if (operation->broken_peer() >= 0) {
        *broken = operation.get();
        return true;
      }
      if (!operation->finished()) break;
      sender.receiving.reset();
      posted_.erase(std::find(posted_.begin(), posted_.end(), operation));
      finished(operation.get());
    }
  }
  return moved;
}

}  // namespace ringfold
