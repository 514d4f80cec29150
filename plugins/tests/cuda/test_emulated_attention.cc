// PoolAttention's kernel bodies on emulated threads (matrix instructions included) against the reference and the CPU
// kernels.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "damage.h"
#include "emulated_launch.h"
#include "judges.h"

namespace trimkv::cuda {
namespace {

using namespace test;

// Memory that takes no room until it is written to; null if there is none.
class Sparse {
 public:
  explicit Sparse(size_t bytes) : bytes_(bytes) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory != MAP_FAILED) memory_ = memory;
  }
  Sparse(const Sparse&) = delete;
  ~Sparse() {
    if (memory_) munmap(memory_, bytes_);
  }
  void* data() const { return memory_; }

 private:
  void* memory_ = nullptr;
  size_t bytes_;
};

// The state is that of rows `first_row`… of the batch.
void Test(const Config& config, Path path, int depth, int32_t first_row = 0) {
  static uint32_t seed = 0;
  std::mt19937 random(++seed);
  const float near = config.type == DataType::kFloat32 ? 1e-5f : config.type == DataType::kFloat16 ? 3e-3f : 2.5e-2f;
  Judge judges[] = {SlowJudge(config), CpuJudge(config)};
  const State& state = judges[0].state;
  const auto update = [&](const std::vector<int32_t>& tokens) {
    const Step step = RandomStep(config, config.max_steps, tokens, random);
    for (Judge& judge : judges) judge.Update(config, step);
  };
  for (int round = 0; round < 4; ++round) {
    std::vector<int32_t> tokens(config.shape.batch, config.max_steps);
    for (int i = 0; i < 9 && round > 0; ++i) {  // round 0: nothing is cached
      update(RandomTokens(config, config.max_steps, random));
    }
    const int32_t enough = config.kept() + config.shape.evict_every;
    while (round > 0 && config.shape.batch < 10 && state.counters[kTokensSeen] < enough) update(tokens);
    if (round == 3) tokens[0] = 0;
    if (round == 2) tokens = RandomTokens(config, config.max_steps, random);
    const Step step = RandomStep(config, config.max_steps, tokens, random);
    const int32_t layer = static_cast<int32_t>(random() % config.shape.num_layers);
    Bytes attended(step.query[layer].size(), 0xff);
    const AsRow at{first_row};
    PoolAttentionArgs args = AttentionArgs(config, state, step, layer, at(attended), nullptr, at);
    args.shape.batch += first_row;
    const size_t workspace_bytes = path == Path::kDecode ? PlanDecode(args).bytes : 1;
    Garbage workspace(first_row ? 0 : workspace_bytes);
    const Sparse large(workspace_bytes);
    args.workspace = first_row ? large.data() : workspace.data();
    if (args.workspace == nullptr) return void(std::printf("%s: skipped, no address space\n", config.name));
    EmulateAttention(args, path, depth, first_row, random());
    for (const Judge& judge : judges) {
      if (Near(Load(attended, config.type), judge.Attend(config, step, layer), {near, 0})) continue;
      std::fprintf(stderr, "FAILED %s, D %d, round %d, by %s\n", config.name, config.shape.head_dim, round, judge.name);
      std::exit(1);
    }
  }
}

// A damaged state must not lead out of the cache (under AddressSanitizer).
void TestDamagedStates(const Config& config, Path path, int depth) {
  std::mt19937 random(depth);
  Judge judge = SlowJudge(config);
  for (int i = 0; i < 40; ++i) {
    const Step step = RandomStep(config, config.max_steps, RandomTokens(config, config.max_steps, random), random);
    State state = judge.state;
    Damage(config, state, random);
    const int32_t layer = static_cast<int32_t>(random() % config.shape.num_layers);
    Bytes attended(step.query[layer].size(), 0xff);
    PoolAttentionArgs args = AttentionArgs(config, state, step, layer, attended.data(), nullptr, kOnHost);
    Garbage workspace(path == Path::kDecode ? PlanDecode(args).bytes : 1);
    args.workspace = workspace.data();
    EmulateAttention(args, path, depth, 0, random());
    judge.Update(config, step);
  }
}

}  // namespace
}  // namespace trimkv::cuda

int main() {
  using namespace trimkv;
  using namespace trimkv::cuda;
  using namespace trimkv::test;
  const auto config = Config::Of;
  const DataType f16 = DataType::kFloat16, bf16 = DataType::kBFloat16, f32 = DataType::kFloat32;
  Test(config("decode", {2, 2, 3, 64, 6 * 24, 4}, 4, 1, f16), Path::kDecode, 64);
  Test(config("decode, bf16", {2, 2, 2, 64, 4 * 24, 4}, 4, 1, bf16), Path::kDecode, 64);
  Test(config("decode, few tokens", {2, 2, 2, 40, 4 * 16, 4}, 4, 4, f16), Path::kDecode, 64);
  Test(config("decode, 16 heads", {1, 2, 2, 128, 4 * 40, 3}, 16, 1, f16), Path::kDecode, 128);
  Test(config("decode, deep", {1, 2, 2, 168, 4 * 20, 3}, 2, 1, f16), Path::kDecode, 256);
  Config skewed = config("decode, one stream holds all", {2, 2, 4, 8, 8 * 24, 4}, 2, 3, f16);
  skewed.retention = Config::kOneStream;
  Test(skewed, Path::kDecode, 64);
  Test(config("decode, many rows", {700, 1, 2, 8, 2 * 40, 2}, 1, 1, f16), Path::kDecode, 64);
  Test(config("prefill", {2, 2, 2, 64, 4 * 16, 4}, 4, 21, f16), Path::kPrefill, 64);
  Test(config("prefill, bf16", {1, 2, 2, 72, 4 * 16, 4}, 3, 40, bf16), Path::kPrefill, 128);
  for (int i = 0; i < 3; ++i) Test(config("prefill, long", {1, 1, 2, 64, 2 * 130, 8}, 4, 12, f16), Path::kPrefill, 64);
  Test(config("prefill, deep", {1, 2, 1, 256, 2 * 40, 4}, 5, 15, f16), Path::kPrefill, 256);
  skewed = config("prefill, one stream holds all", {2, 2, 4, 8, 8 * 24, 4}, 2, 11, f16);
  skewed.retention = Config::kOneStream;
  Test(skewed, Path::kPrefill, 64);
  Test(config("simple", {2, 2, 3, 44, 6 * 8, 4}, 3, 5, f32), Path::kSimple, 0);
  Test(config("simple, fp16", {1, 2, 2, 13, 4 * 8, 4}, 2, 5, f16), Path::kSimple, 64);
  TestDamagedStates(config("damaged, decode", {2, 2, 3, 64, 6 * 24, 4}, 4, 1, f16), Path::kDecode, 64);
  TestDamagedStates(config("damaged, prefill", {2, 2, 2, 64, 4 * 16, 4}, 4, 21, f16), Path::kPrefill, 64);
  TestDamagedStates(config("damaged, simple", {2, 2, 3, 44, 6 * 8, 4}, 3, 5, f32), Path::kSimple, 0);
  // Every tensor, and the workspace, has more than 2^31 elements before this row.
  const CacheShape one_row = {1, 1, 10, 256, 10 * 16, 16};
  Test(config("decode, last row of a large batch", one_row, 1, 16, f16), Path::kDecode, 256, kLastRow);
  Test(config("prefill, last row of a large batch", one_row, 2, 16, f16), Path::kPrefill, 256, kLastRow);
  Test(config("simple, last row of a large batch", one_row, 1, 16, f32), Path::kSimple, 0, kLastRow);
  std::puts("emulated PoolAttention: all right");
  return 0;
}
