// PoolUpdate's kernel bodies on emulated threads against the reference and the CPU kernels: every state tensor to the
// bit, step by step.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "configs.h"
#include "damage.h"
#include "emulated_launch.h"
#include "judges.h"

namespace trimkv::cuda {
namespace {

using namespace test;

void Require(bool condition, const char* what, const char* where) {
  if (condition) return;
  std::fprintf(stderr, "FAILED %s: %s\n", where, what);
  std::exit(1);
}

// The state is that of rows `first`… of the batch.
void Update(const Config& config, State& state, const Step& step, int threads, uint32_t seed, int32_t first = 0) {
  const size_t scratch = LayOutPlan(config.shape, step.steps).bytes;
  Garbage workspace(scratch * config.shape.batch);
  const AsRow at{first};
  PoolUpdateArgs args = UpdateArgs(config, state, step, at.Move(workspace.data(), scratch), at);
  args.shape.batch += first;
  EmulateUpdate(args, threads, first, seed);
}

void TestUpdates() {
  uint32_t seed = 0;
  for (const Config& config : UpdateConfigs()) {
    for (int threads : {32, 64, 160}) {
      if (config.max_steps > 30 && threads > 64) continue;
      std::mt19937 random(++seed);
      State actual(config);
      Judge judges[] = {SlowJudge(config), CpuJudge(config)};
      int32_t evictions = 0;
      for (int i = 0; i < 24; ++i) {
        const std::vector<int32_t> tokens = RandomTokens(config, config.max_steps, random);
        const Step step = RandomStep(config, config.max_steps, tokens, random);
        const bool reset = random() % 12 == 0;
        if (reset) actual.Reset(config, 0);
        Update(config, actual, step, threads, random());
        for (Judge& judge : judges) {
          if (reset) judge.state.Reset(config, 0);
          judge.Update(config, step);
          const char* difference = actual.Difference(judge.state);
          Require(difference == nullptr, difference, config.name);
        }
        for (int32_t row = 0; row < config.shape.batch; ++row) evictions += actual.counter(row, kEvictions);
      }
      Require(evictions > 0, "no eviction was tried", config.name);
    }
  }
}

// A damaged state must not lead out of the cache (under AddressSanitizer), and rest within bounds.
void TestDamagedStates() {
  std::mt19937 random(11);
  for (const Config& config : UpdateConfigs()) {
    if (config.max_steps > 30) continue;
    Judge judge = SlowJudge(config);
    for (int i = 0; i < 24; ++i) {
      const std::vector<int32_t> tokens = RandomTokens(config, config.max_steps, random);
      const Step step = RandomStep(config, config.max_steps, tokens, random);
      for (int tries = 0; tries < 2; ++tries) {
        State state = judge.state;
        Damage(config, state, random);
        Update(config, state, step, 32, random());
        for (int32_t row = 0; row < config.shape.batch; ++row) {
          if (step.step_tokens[row] == 0) continue;
          const int32_t recent = state.counter(row, kRecentTokens);
          Require(recent >= 0 && recent <= config.shape.evict_every, "recent", config.name);
        }
      }
      judge.Update(config, step);
    }
  }
}

// Every tensor of keys and values has more than 2^31 elements before this row.
void TestLastRow() {
  Config config;
  config.name = "last row of a large batch";
  config.shape = {1, 1, 2, 256, 2 * 80, 80};
  config.max_steps = 80;
  config.type = DataType::kFloat16;
  std::mt19937 random(4);
  State actual(config);
  Judge judge = SlowJudge(config);
  for (int i = 0; i < 6; ++i) {
    const std::vector<int32_t> tokens = {1 + static_cast<int32_t>(random() % config.max_steps)};
    const Step step = RandomStep(config, config.max_steps, tokens, random);
    Update(config, actual, step, 64, random(), kLastRow);
    judge.Update(config, step);
    const char* difference = actual.Difference(judge.state);
    Require(difference == nullptr, difference, config.name);
  }
  Require(actual.counter(0, kEvictions) > 0, "no eviction was tried", config.name);
}

void TestSortWithFewTables() {
  std::mt19937 random(3);
  for (int table_ints : {40, 97, 400}) {
    const int bins = 37, n = 1000;
    std::vector<int32_t> bin(n), order(n), start(bins), table(table_ints), sums(kScanInts);
    for (int32_t& b : bin) b = random() % bins;
    Emulator emulator(128, random());
    emulator.Run([&](EmulatedBlock& block) {
      SortByBin(block, bin.data(), n, bins, order.data(), start.data(), table.data(), table_ints, sums.data());
    });
    std::vector<int32_t> expected(n);
    std::iota(expected.begin(), expected.end(), 0);
    std::stable_sort(expected.begin(), expected.end(), [&](int32_t x, int32_t y) { return bin[x] < bin[y]; });
    Require(order == expected, "order", "SortByBin");
    for (int b = 0; b < bins; ++b) {
      const auto before = std::count_if(bin.begin(), bin.end(), [&](int32_t other) { return other < b; });
      Require(start[b] == before, "start", "SortByBin");
    }
  }
}

// Both digits, keys of 32 and 64 bits, with many equal keys, every k.
template <int kBits, int kDigit>
void TestKthLargest(uint64_t mask) {
  std::mt19937_64 random(kBits + kDigit);
  std::vector<uint64_t> keys(300);
  for (uint64_t& key : keys) key = random() & mask & (kBits == 64 ? ~0ull : 0xffffffffull);
  std::vector<uint64_t> sorted = keys;
  std::sort(sorted.rbegin(), sorted.rend());
  std::vector<int32_t> histogram(HistogramInts(kDigit)), sums(kScanInts);
  for (int32_t k = 1; k <= 300; k += 13) {
    Emulator emulator(64, k);
    emulator.Run([&](EmulatedBlock& block) {
      BlockGroup<EmulatedBlock> group{block, sums.data()};
      const auto source = [&](int32_t i, uint64_t* key) {
        *key = keys[i];
        return true;
      };
      const KthKey kth = KthLargest<kBits, kDigit>(group, block, 300, k, histogram.data(), source);
      Require(kth.value == sorted[k - 1], "value", "KthLargest");
      const auto above = std::count_if(keys.begin(), keys.end(), [&](uint64_t key) { return key > kth.value; });
      Require(kth.wanted == k - above, "wanted", "KthLargest");
      Require(kth.present == std::count(keys.begin(), keys.end(), kth.value), "present", "KthLargest");
    });
  }
}

}  // namespace
}  // namespace trimkv::cuda

int main() {
  using namespace trimkv::cuda;
  TestKthLargest<32, kBlockDigit>(~0ull);
  TestKthLargest<32, kWarpDigit>(0xff0000ff);
  TestKthLargest<64, kBlockDigit>(0xf00000000000000full);
  TestKthLargest<64, kWarpDigit>(~0ull);
  TestSortWithFewTables();
  TestUpdates();
  TestDamagedStates();
  TestLastRow();
  std::puts("emulated PoolUpdate: all right");
  return 0;
}
