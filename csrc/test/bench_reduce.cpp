// Bandwidth of the reductions: bytes read plus bytes written a second, the best of several runs, beside memcpy on the same memory.
// One thread folds everything, or two threads fold one half each (two ranks of an all-reduce).

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "common/deadline.h"
#include "memory/mapping.h"
#include "reduce/kernels.h"
#include "reduce/reduce.h"

namespace ringfold {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr int kRuns = 15;

// Seconds of the fastest run. Small work is repeated, so that a run lasts long enough for the clock.
template <class Work>
double Best(size_t nbytes, const Work& work) {
  const size_t repeats = std::max<size_t>(1, 16 * kMiB / nbytes);
  uint64_t best = ~uint64_t{0};
  for (int run = 0; run < kRuns; ++run) {
    const uint64_t start = NowNs();
    for (size_t i = 0; i < repeats; ++i) work();
    best = std::min(best, NowNs() - start);
  }
  return static_cast<double>(best) * 1e-9 / static_cast<double>(repeats);
}

using FoldFunction = void (*)(DType, Reduction, const FoldJob&);

void Dispatched(DType dtype, Reduction reduction, const FoldJob& job) {
  Fold(dtype, reduction, job.dsts, job.n_dst, job.srcs, job.n_src, job.count, job.divisor);
}

// n vectors of nbytes each, folded in place into the first `n_dst` of them by `threads` threads.
double FoldGBs(FoldFunction fold, DType dtype, size_t nbytes, const std::vector<Mapping>& memory, size_t n_src, size_t n_dst,
               unsigned divisor, size_t threads) {
  const size_t part = nbytes / threads;
  const double seconds = Best(nbytes * n_src, [&] {
    std::vector<std::thread> others;
    auto run = [&](size_t thread) {
      std::vector<void*> vectors;
      for (size_t s = 0; s < n_src; ++s) vectors.push_back(memory[s].data() + thread * part);
      fold(dtype, Reduction::Sum, {vectors.data(), n_dst, vectors.data(), n_src, part / SizeOf(dtype), divisor});
    };
    for (size_t thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
    run(0);
    for (auto& other : others) other.join();
  });
  return static_cast<double>(nbytes) * static_cast<double>(n_src + n_dst) / seconds * 1e-9;
}

}  // namespace

int Main() {
  std::vector<Mapping> memory;
  for (int i = 0; i < 8; ++i) memory.push_back(Mapping::Create(64 * kMiB));
  for (const Mapping& mapping : memory) {
    if (!mapping.valid()) return 1;
    std::memset(mapping.data(), 0, mapping.size());
  }
  struct Set {
    const char* name;
    FoldFunction fold;
    bool supported;
  };
  const Set sets[] = {
      {"baseline", baseline::Fold, true},
#if defined(__x86_64__)
      {"avx2", avx2::Fold, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")},
      {"avx512", avx512::Fold, __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")},
#endif
      {"dispatched", Dispatched, true},
  };
  for (const size_t nbytes : {16 * kMiB / 1024, 256 * kMiB / 1024, 4 * kMiB, 64 * kMiB}) {
    const double copy = Best(nbytes, [&] { std::memcpy(memory[0].data(), memory[1].data(), nbytes); });
    std::printf("%zu KiB a vector: memcpy %.1f GB/s\n", nbytes / 1024, 2e-9 * static_cast<double>(nbytes) / copy);
    std::printf("  GB/s        f32 2->1  f32 2->2  f32 avg3  f32 4->4  f32 8->8  f16 2->2 bf16 2->2  f64 2->2   2->2 x2\n");
    for (const Set& set : sets) {
      if (!set.supported) continue;
      const auto measure = [&](DType dtype, size_t n_src, size_t n_dst, unsigned divisor, size_t threads) {
        std::printf(" %9.1f", FoldGBs(set.fold, dtype, nbytes, memory, n_src, n_dst, divisor, threads));
      };
      std::printf("  %-10s", set.name);
      measure(DType::F32, 2, 1, 1, 1);
      measure(DType::F32, 2, 2, 1, 1);
      measure(DType::F32, 2, 2, 3, 1);
      measure(DType::F32, 4, 4, 1, 1);
      measure(DType::F32, 8, 8, 1, 1);
      measure(DType::F16, 2, 2, 1, 1);
      measure(DType::BF16, 2, 2, 1, 1);
      measure(DType::F64, 2, 2, 1, 1);
      if (nbytes >= 4 * kMiB) measure(DType::F32, 2, 2, 1, 2);
      std::printf("\n");
    }
  }
  return 0;
}

}  // namespace ringfold

int main() { return ringfold::Main(); }
