// Operations that another library carries out: the part of Communicator that keeps their books.
#include <algorithm>
#include <string>
#include <utility>

#include "executor/communicator.h"
#include "executor/context.h"

namespace ringfold {

std::shared_ptr<Operation> Communicator::Enter(Request request, const std::string& carrier, uint8_t algorithm) {
  const Program*& program = carried_programs_[{carrier, algorithm}];
  if (program == nullptr) program = programs_[Keep(Program::Carried(carrier, algorithm))].get();
  request.program = program;
  Fingerprint fingerprint;
  fingerprint.sequence = next_carried_[IsMessage(request.op) ? 1 : 0]++;
  fingerprint.operation = static_cast<uint8_t>(request.op);
  fingerprint.dtype = static_cast<uint8_t>(request.dtype);
  fingerprint.reduction = static_cast<uint8_t>(request.reduction);
  fingerprint.algorithm = algorithm;
  fingerprint.root = request.root;
  fingerprint.count = request.count;
  auto operation = std::make_shared<Operation>(rank_, size());
  operation->Start(std::move(request), fingerprint);
  operation->record = context_->recorder().Open(id_, *operation);
  context_->recorder().Start(*operation);
  if (error_.ok()) {
    carried_.push_back(operation);
  } else {
    operation->Fail(error_);
    context_->recorder().Close(*operation);
  }
  return operation;
}

void Communicator::Leave(Operation* operation) {
  const auto found = std::find_if(carried_.begin(), carried_.end(), [=](const auto& o) { return o.get() == operation; });
  if (found == carried_.end()) return;  // it failed meanwhile
  operation->Complete();
  context_->recorder().Close(*operation);
  carried_.erase(found);
}

int Communicator::Awaited(const Operation& operation) const {
  const int peer = operation.WaitingFor();
  if (peer >= 0 || operation.carrier().empty()) return peer;
  if (IsMessage(operation.request().op)) return operation.request().peer;
  const Fingerprint& f = operation.fingerprint();
  for (int p = 0; p < size(); ++p)
    if (p != rank_ && !context_->roster().HasIssued(WorldRank(p), id_, f.operation, f.sequence)) return p;
  return -1;
}

bool Communicator::CheckCarried(uint64_t now) {
  for (const auto& operation : carried_) {
    const int peer = Awaited(*operation);
    context_->recorder().Note(*operation, peer < 0 ? -1 : WorldRank(peer));
    // A farewell may overtake what its sender has sent by another way. But who has not begun a collective sends nothing more for it, nor does
    // somebody for whose message the driver has looked for a while.
    const bool hopeless = operation->WaitingFor() >= 0 || !IsMessage(operation->request().op);
    if (peer >= 0 && hopeless && context_->roster().at(WorldRank(peer)).left) {
      Fail({ErrorCode::kPeerLost, WorldRank(peer), context_->roster().at(WorldRank(peer)).label + " has left the job (it shut down or finished its script)"});
      return false;
    }
    if (now < operation->deadline_ns()) continue;
    GiveUp(*operation, peer);
    return false;
  }
  return true;
}

}  // namespace ringfold
