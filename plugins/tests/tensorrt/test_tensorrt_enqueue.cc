// Both plugins at work: a model's steps through enqueue against the reference and the CPU kernels, attention within
// rounding and every state tensor to the bit, call by call and as replayed CUDA graphs; on random states and on
// recorded runs of the official package, whose kept sets must come out. On a GPU, or on a stand-in for CUDA.
//
//   test_tensorrt_enqueue LIBRARY ORACLE [short [STATES]]
//
// short: small caches and recorded runs, as emulated threads can afford, on STATES random states (12). Else 200 states
// and models' shapes over 2,000 tokens. Exit status 77: there is no GPU.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <string>

#include "configs.h"
#include "oracle.h"
#include "plugin_model.h"
#include "trial.h"

namespace trimkv::test {
namespace {

Config RandomConfig(uint32_t seed) {
  static std::deque<std::string> names;
  const char* name = names.emplace_back("random " + std::to_string(seed)).c_str();
  std::mt19937 random(seed);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  const int32_t layers = pick(1, 3), heads = pick(1, 3), budget = pick(2, 12),
                depth = pick(0, 1) ? 8 * pick(1, 9) : pick(1, 40);
  Config config = Config::Of(name, {pick(1, 3), layers, heads, depth, layers * heads * budget, pick(1, 6)}, pick(1, 5),
                             pick(1, 12), static_cast<DataType>(pick(0, 2)));
  config.logit_scale = 0.3f;
  config.policy = pick(0, 2) ? Policy::kGlobal : Policy::kPerHead;
  config.min_tokens_per_head = config.policy == Policy::kGlobal && pick(0, 1) ? pick(0, budget) : 0;
  config.budget = pick(std::max(1, config.min_tokens_per_head), budget);
  config.retention = std::array{Config::kWide, Config::kWhole, Config::kHalves, Config::kOneStream}[pick(0, 3)];
  return config;
}

// A recorded run, with random queries, keys and values, which decide nothing.
void RunOracle(const OracleCase& run, DataType type) {
  Config config = run.config;
  config.type = type;
  config.group = 1;
  config.max_steps = *std::max_element(run.lengths.begin(), run.lengths.end());
  std::mt19937 random(7);
  PluginModel model(config, RandomStep(config, config.max_steps, {config.max_steps}, random));
  Judge judge = CpuJudge(config);
  const Tolerance near = type == DataType::kFloat32 ? Tolerance{2e-5f, 0} : Tolerance{2e-3f, 1e-3f};
  const CacheShape& s = config.shape;
  int32_t seen = 0;
  for (size_t i = 0; i < run.lengths.size(); ++i) {
    Step step = RandomStep(config, run.lengths[i], {run.lengths[i]}, random);
    for (int32_t layer = 0; layer < s.num_layers; ++layer) {
      for (int32_t token = 0; token < step.steps; ++token) {
        for (int32_t head = 0; head < s.num_kv_heads; ++head) {
          step.log_beta[layer][token * s.num_kv_heads + head] =
              run.log_beta[static_cast<size_t>(layer * s.num_kv_heads + head) * run.tokens + seen + token];
        }
      }
    }
    seen += step.steps;
    model.UploadStep(step);
    model.LaunchStep();
    CUDA_OK(cudaDeviceSynchronize());
    model.DownloadResults();
    for (int32_t layer = 0; layer < s.num_layers; ++layer) {
      const bool same = Near(Load(model.attended[layer], type), judge.Attend(config, step, layer), near);
      if (!Expect(same, config, static_cast<int>(i), "attended", judge.name)) return;
    }
    judge.Update(config, step);
    const char* difference = model.state.Difference(judge.state);
    if (!Expect(difference == nullptr, config, static_cast<int>(i), difference, judge.name)) return;
    const bool kept = Kept(config, model.state, 0) == run.kept[i];
    if (!Expect(kept, config, static_cast<int>(i), "kept entries", "the official package")) return;
  }
  std::printf("%-50s %4zu steps as the official package\n", config.name, run.lengths.size());
}

bool CountsAllocations() {
#if defined(__SANITIZE_ADDRESS__)
  return true;
#else
  return Allocations() > 0;
#endif
}

// Models' shapes; a conversation of 2,000 tokens and more.
std::vector<Config> ModelConfigs() {
  return {Config::Of("Qwen3-4B, M 256, b 32, fp16", {1, 36, 8, 128, 288 * 256, 32}, 4, 64, DataType::kFloat16),
          Config::Of("Qwen3-4B, M 64, b 32, bf16, 3 rows", {3, 36, 8, 128, 288 * 64, 32}, 4, 64, DataType::kBFloat16)};
}

}  // namespace
}  // namespace trimkv::test

int main(int argc, char** argv) {
  using namespace trimkv::test;
  using trimkv::DataType;
  if (argc < 3) return std::fprintf(stderr, "usage: test_tensorrt_enqueue LIBRARY ORACLE [short [STATES]]\n"), 2;
  const bool brief = argc > 3 && std::strcmp(argv[3], "short") == 0;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("skipped: there is no GPU");
    return 77;
  }
  PluginLibrary library(argv[1]);
  g_library = &library;

  const Trial small = {brief ? 6 : 40, brief ? 1 : 8, false, {2e-5f, 0}, {4e-3f, 0}, {3e-2f, 0}};
  for (const Config& config : UpdateConfigs()) {
    if (brief && (config.max_steps > 30 || config.shape.num_streams() > 20)) continue;
    Run<PluginModel>(config, small, {SlowJudge(config), CpuJudge(config)});
  }
  const DataType f16 = DataType::kFloat16, bf16 = DataType::kBFloat16;
  for (const Config& config : {Config::Of("decode, fp16", {2, 2, 2, 64, 4 * 12, 4}, 4, 1, f16),
                               Config::Of("decode, bf16, few tokens", {2, 2, 1, 72, 2 * 12, 4}, 3, 4, bf16),
                               Config::Of("prefill and decode, fp16", {1, 2, 2, 40, 4 * 10, 4}, 4, 9, f16),
                               Config::Of("prefill, bf16", {2, 1, 2, 128, 2 * 12, 4}, 2, 20, bf16)}) {
    Trial trial = small;
    trial.large = config.max_steps > 4;  // steps of several lengths
    Run<PluginModel>(config, trial, {SlowJudge(config), CpuJudge(config)});
  }
  Trial random = small;
  random.steps = brief ? 5 : 20;
  random.evictions = 0;
  random.float16 = {2e-3f, 1e-3f};
  const int states = argc > 4 ? std::atoi(argv[4]) : brief ? 12 : 200;
  for (int seed = 0; seed < states; ++seed) {
    const Config config = RandomConfig(static_cast<uint32_t>(seed));
    Run<PluginModel>(config, random, {SlowJudge(config), CpuJudge(config)});
  }
  const std::vector<OracleCase> oracle = ReadOracle(argv[2]);
  int recorded = 0;
  for (const OracleCase& run : oracle) {
    if (brief && run.log_beta.size() > 450) continue;
    ++recorded;
    RunOracle(run, f16);
    if (!brief) RunOracle(run, DataType::kFloat32);
  }
  if (!brief) {
    Trial large = {700, 20, true, {2e-5f, 2e-5f}, {2e-3f, 1e-3f}, {1.6e-2f, 8e-3f}};
    for (const Config& config : ModelConfigs()) Run<PluginModel>(config, large, {CpuJudge(config)});
  }
  EXPECT(library.logger.errors.empty(), "left in the log: %s", library.logger.Take().c_str());
  EXPECT(CountsAllocations(), "allocations are not counted");
  std::printf("TensorRT %d.%d, enqueue: %d checks of calls, %d failed, %d results differ, %d of %zu recorded runs\n",
              NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, g_checks, g_failed, failures, recorded, oracle.size());
  return g_failed != 0 || failures != 0;
}
