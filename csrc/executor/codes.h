// The codes that collectives/ops.py and the wire use, and their names for messages.
#pragma once

#include <cstdint>

namespace ringfold {

enum class OpCode : uint8_t { kAllReduce = 0, kReduceScatter = 1, kAllGather = 2, kBroadcast = 3, kBarrier = 4, kSend = 5, kRecv = 6 };

constexpr const char* kOpNames[] = {"all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier", "send", "recv"};
constexpr const char* kAlgorithmNames[] = {"", "ring", "direct"};

inline const char* OpName(uint8_t code) { return code < 7 ? kOpNames[code] : "unknown operation"; }
inline const char* AlgorithmName(uint8_t code) { return code < 3 ? kAlgorithmNames[code] : "unknown algorithm"; }

// Two independent streams between each pair of a communicator: collectives, and messages that overtake them.
enum Lane { kCollectiveLane = 0, kMessageLane = 1, kLanes = 2 };

}  // namespace ringfold
