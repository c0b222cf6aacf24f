#include "executor/program.h"

#include <cstring>
#include <map>
#include <utility>

namespace ringfold {
namespace {

constexpr uint32_t kMagic = 0x52465343;

class Reader {
 public:
  Reader(const char* bytes, size_t nbytes) : at_(bytes), end_(bytes + nbytes) {}

  template <typename T>
  T Take() {
    T value = {};
    if (static_cast<size_t>(end_ - at_) < sizeof value) {
      ok_ = false;
      return value;
    }
    std::memcpy(&value, at_, sizeof value);
    at_ += sizeof value;
    return value;
  }
  bool ok() const { return ok_; }

 private:
  const char* at_;
  const char* end_;
  bool ok_ = true;
};

Block TakeBlock(Reader* in) {
  Block block;
  block.buffer = static_cast<Buffer>(in->Take<uint8_t>());
  in->Take<uint8_t>();
  block.chunk = in->Take<uint16_t>();
  block.segment = in->Take<uint16_t>();
  return block;
}

bool Names(const Program& program, const Block& block) {
  if (!block.present()) return true;
  if (block.segment >= program.segments) return false;
  switch (block.buffer) {
    case Buffer::kInput:
    case Buffer::kOutput:
      return block.chunk < program.chunks;
    case Buffer::kScratch:
      return block.chunk < program.scratch_chunks;
    default:
      return false;
  }
}

bool Well(const Program& program, const Step& step, size_t index, int size) {
  const bool peer = step.peer >= 0 && step.peer < size;
  const bool src = step.src.present();
  const bool dst = step.dst.present();
  if (!Names(program, step.src) || !Names(program, step.dst)) return false;
  for (const uint32_t before : step.after)
    if (before >= index) return false;
  switch (step.kind) {
    case Kind::kSend:
    case Kind::kRecv:
    case Kind::kExpose:
    case Kind::kAttach:
      return peer;
    case Kind::kRecvReduce:
      return peer && src && dst;
    case Kind::kPull:
      return peer && dst;
    case Kind::kCopy:
    case Kind::kReduce:
      return src && dst;
    case Kind::kFold:
      return dst;
    case Kind::kFence:
      return true;
  }
  return false;
}

std::unique_ptr<Program> ParseOne(Reader* in, int size, bool is_fallback, std::string* why) {
  auto program = std::make_unique<Program>();
  const auto magic = in->Take<uint32_t>();
  program->chunks = in->Take<uint32_t>();
  program->segments = in->Take<uint32_t>();
  program->scratch_chunks = in->Take<uint32_t>();
  const auto n_steps = in->Take<uint32_t>();
  program->algorithm = static_cast<uint8_t>(in->Take<uint32_t>());
  program->input_full = in->Take<uint32_t>() != 0;
  program->output_full = in->Take<uint32_t>() != 0;
  const bool has_fallback = in->Take<uint32_t>() != 0;
  if (!in->ok() || magic != kMagic || program->chunks == 0 || program->segments == 0 || (is_fallback && has_fallback)) {
    *why = "the program's header is malformed";
    return nullptr;
  }
  for (uint32_t i = 0; i < n_steps; ++i) {
    Step step;
    step.kind = static_cast<Kind>(in->Take<uint8_t>());
    step.final = in->Take<uint8_t>() != 0;
    step.spread = in->Take<uint8_t>() != 0;
    in->Take<uint8_t>();
    step.peer = in->Take<int32_t>();
    step.src = TakeBlock(in);
    step.dst = TakeBlock(in);
    const auto n_after = in->Take<uint16_t>();
    for (uint16_t k = 0; k < n_after && in->ok(); ++k) step.after.push_back(in->Take<uint32_t>());
    if (!in->ok() || !Well(*program, step, i, size)) {
      *why = "step " + std::to_string(i) + " of the program is malformed";
      return nullptr;
    }
    program->steps.push_back(std::move(step));
  }
  if (has_fallback) {
    program->fallback = ParseOne(in, size, true, why);
    if (program->fallback == nullptr) return nullptr;
  }
  return program;
}

}  // namespace

std::unique_ptr<Program> Program::Parse(const char* bytes, size_t nbytes, int size, std::string* why) {
  Reader in(bytes, nbytes);
  auto program = ParseOne(&in, size, false, why);
  if (program == nullptr) return nullptr;
  program->BuildQueues();
  if (program->fallback != nullptr) program->fallback->BuildQueues();
  return program;
}

std::unique_ptr<Program> Program::Message(Kind kind, int peer) {
  auto program = std::make_unique<Program>();
  Step step = {kind, false, false, peer, {}, {}, {}};
  (kind == Kind::kSend ? step.src : step.dst).buffer = Buffer::kOutput;
  program->steps.push_back(std::move(step));
  program->BuildQueues();
  return program;
}

std::unique_ptr<Program> Program::Carried(std::string carrier, uint8_t algorithm) {
  auto program = std::make_unique<Program>();
  program->carrier = std::move(carrier);
  program->algorithm = algorithm;
  program->steps.push_back({Kind::kFence, false, false, -1, {}, {}, {}});
  return program;
}

void Program::BuildQueues() {
  std::map<std::pair<int, int>, size_t> known;
  for (uint32_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    exposes = exposes || step.kind == Kind::kExpose || step.kind == Kind::kAttach;
    Queue::Role role = Queue::Role::kLocal;
    if (step.kind == Kind::kSend || step.kind == Kind::kExpose) role = Queue::Role::kSend;
    if (step.kind == Kind::kRecv || step.kind == Kind::kRecvReduce || step.kind == Kind::kAttach) role = Queue::Role::kReceive;
    const int peer = role == Queue::Role::kLocal ? -1 : step.peer;
    const auto [entry, is_new] = known.try_emplace({static_cast<int>(role), peer}, queues.size());
    if (is_new) queues.push_back({role, peer, {}});
    queues[entry->second].steps.push_back(i);
  }
}

}  // namespace ringfold
