// The codes that collectives/ops.py and the wire use, and their names for messages.
#pragma once

#include <cstdint>

namespace ringfold {

enum class OpCode : uint8_t {
  kAllReduce = 0,
  kReduceScatter = 1,
  kAllGather = 2,
  kBroadcast = 3,
  kBarrier = 4,
  kSend = 5,
  kRecv = 6,
  kReduce = 7,
  kGather = 8,
  kScatter = 9,
  kAllToAll = 10,
};

constexpr const char* kOpNames[] = {"all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier", "send",
                                    "recv",       "reduce",         "gather",     "scatter",   "all_to_all"};
constexpr const char* kAlgorithmNames[] = {"", "ring", "direct", "halving_doubling", "tree", "hierarchical", "native"};
constexpr uint8_t kOpCount = 11;
constexpr uint8_t kAlgorithmCount = 7;

inline const char* OpName(uint8_t code) { return code < kOpCount ? kOpNames[code] : "unknown operation"; }
inline const char* AlgorithmName(uint8_t code) { return code < kAlgorithmCount ? kAlgorithmNames[code] : "unknown algorithm"; }

// Two independent streams between each pair of a communicator: collectives, and messages that overtake them.
enum Lane { kCollectiveLane = 0, kMessageLane = 1, kLanes = 2 };

constexpr bool IsMessage(OpCode op) { return op == OpCode::kSend || op == OpCode::kRecv; }
// Whether an operation folds, so that its reduction means something.
constexpr bool IsReduction(OpCode op) { return op == OpCode::kAllReduce || op == OpCode::kReduceScatter || op == OpCode::kReduce; }

}  // namespace ringfold
