// CPU kernels against reference.h: attention within rounding, the cache state to the bit. Every allocation is counted:
// kernels must make none.
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "configs.h"
#include "cpu/attention_tile.h"
#include "damage.h"
#include "failures.h"
#include "judges.h"

namespace {
std::atomic<long> g_allocations{0};
}
#if !defined(__SANITIZE_ADDRESS__)  // which has its own
void* operator new(size_t size) {
  ++g_allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
#endif

namespace trimkv::test {
namespace {

// Tasks in reverse or, with real threads, at once: no kernel may depend on their order.
void RunReversed(void*, size_t count, void (*task)(void*, size_t), void* user) {
  while (count > 0) task(user, --count);
}
size_t g_threads = 3;
const cpu::Parallel kReversed{RunReversed, nullptr, 3}, kThreads{RunThreads, &g_threads, 3};

// Runs a kernel, which must not allocate; threads do when they start.
template <class Kernel>
void RunKernel(const cpu::Parallel& parallel, const Kernel& kernel) {
  const long before = g_allocations;
  kernel();
  EXPECT(parallel.run == RunThreads || g_allocations == before, "allocated");
}

void CheckAttention(const Config& config, const State& state, const Step& step, const cpu::Parallel& parallel) {
  const float near = config.type == DataType::kFloat32 ? 2e-5f : config.type == DataType::kFloat16 ? 4e-3f : 3e-2f;
  for (int32_t layer = 0; layer < config.shape.num_layers; ++layer) {
    Bytes attended(step.query[layer].size(), 0x7f);
    PoolAttentionArgs args = AttentionArgs(config, state, step, layer, attended.data(), nullptr, kOnHost);
    EXPECT(Check(args) == nullptr, "%s", Check(args));
    Garbage workspace(cpu::PoolAttentionWorkspaceBytes(args));
    args.workspace = workspace.data();
    RunKernel(parallel, [&] { cpu::PoolAttention(args, parallel); });
    const std::vector<float> expected = ReferenceAttention(config, state, step, layer);
    EXPECT(Near(Load(attended, config.type), expected, {near, near}), "layer %d", layer);
  }
}

void Update(const Config& config, State& state, const Step& step, const cpu::Parallel& parallel) {
  PoolUpdateArgs args = UpdateArgs(config, state, step, nullptr, kOnHost);
  EXPECT(Check(args) == nullptr, "%s", Check(args));
  Garbage workspace(cpu::PoolUpdateWorkspaceBytes(args));
  args.workspace = workspace.data();
  RunKernel(parallel, [&] { cpu::PoolUpdate(args, parallel); });
}

// A conversation of random steps; rows are out of phase, idle at times, and reset midway.
void RandomConversation(uint32_t seed) {
  std::mt19937 random(seed);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  const int32_t layers = pick(1, 3), heads = pick(1, 3), budget = pick(1, seed % 5 == 0 ? 80 : 12);
  Config config;
  config.shape = {pick(1, 3), layers, heads, pick(1, 40), layers * heads * budget, pick(1, 9)};
  config.group = pick(1, 5);
  config.logit_scale = 0.3f;
  config.policy = pick(0, 2) ? Policy::kGlobal : Policy::kPerHead;
  config.min_tokens_per_head = config.policy == Policy::kGlobal && pick(0, 1) ? pick(0, budget) : 0;
  config.lookahead_steps = pick(0, 2) ? 1 : pick(2, 20);
  std::vector<int32_t> budgets(config.shape.batch);
  for (int32_t& of_row : budgets) of_row = pick(std::max(1, config.min_tokens_per_head), budget);
  config.type = static_cast<DataType>(pick(0, 2));
  config.retention = std::array{Config::kWide, Config::kWhole, Config::kHalves}[pick(0, 2)];
  const cpu::Parallel& parallel = pick(0, 1) ? kReversed : kThreads;
  State got(config), expected(config);
  for (int i = 0; i < 25 && g_failures == 0; ++i) {
    const int32_t steps = pick(0, 2) ? 1 : pick(1, 40);
    std::vector<int32_t> tokens(config.shape.batch);
    for (int32_t row = 0; row < config.shape.batch; ++row) {
      tokens[row] = pick(0, 5) ? pick(1, steps) : 0;
      if (pick(0, 12) == 0) expected.Reset(config, row), got.Reset(config, row);
    }
    Step step = RandomStep(config, steps, tokens, random);
    step.budget = budgets;
    CheckAttention(config, got, step, parallel);
    Update(config, got, step, parallel);
    ReferenceUpdate(config, expected, step);
    const char* difference = got.Difference(expected);
    EXPECT(difference == nullptr, "%s", difference);
  }
  if (g_failures) std::printf("seed %u failed\n", seed);
}

// The cases that the CUDA kernels are tried on.
void NamedConversation(const Config& config) {
  std::mt19937 random(config.shape.num_slots);
  State got(config), expected(config);
  for (int i = 0; i < 24 && g_failures == 0; ++i) {
    const Step step = RandomStep(config, config.max_steps, RandomTokens(config, config.max_steps, random), random);
    if (config.max_steps <= 40) CheckAttention(config, got, step, kReversed);
    Update(config, got, step, kReversed);
    ReferenceUpdate(config, expected, step);
    const char* difference = got.Difference(expected);
    EXPECT(difference == nullptr, "%s", difference);
  }
  EXPECT(expected.counter(0, kEvictions) > 0, "no eviction was tried");
  if (g_failures) std::printf("%s failed\n", config.name);
}

// Damaged states are refused, or do no harm (under AddressSanitizer); sound ones are taken.
void DamagedStates(const Config& config) {
  std::mt19937 random(config.shape.num_slots + 1);
  State sound(config);
  int refused = 0;
  for (int i = 0; i < 120 && g_failures == 0; ++i) {
    const Step step = RandomStep(config, config.max_steps, RandomTokens(config, config.max_steps, random), random);
    EXPECT(CheckState(UpdateArgs(config, sound, step, nullptr, kOnHost)) == nullptr, "a sound state");
    for (int tries = 0; tries < 8; ++tries) {
      State state = sound;
      Damage(config, state, random);
      const int32_t layer = static_cast<int32_t>(random() % config.shape.num_layers);
      Bytes attended(step.query[layer].size());
      PoolAttentionArgs attention = AttentionArgs(config, state, step, layer, attended.data(), nullptr, kOnHost);
      const bool attends = CheckState(attention) == nullptr;
      const bool updates = CheckState(UpdateArgs(config, state, step, nullptr, kOnHost)) == nullptr;
      refused += !updates;
      if (attends) {
        Garbage workspace(cpu::PoolAttentionWorkspaceBytes(attention));
        attention.workspace = workspace.data();
        cpu::PoolAttention(attention, kReversed);
      }
      if (updates) Update(config, state, step, kReversed);
    }
    Update(config, sound, step, kReversed);
  }
  EXPECT(refused > 300, "only %d were refused", refused);
}

// Every half and bfloat16 there is goes to float and back; halves of a float are found by rounding to nearest even.
void Conversions() {
  const auto& kernels = cpu::GetTileKernels();
  for (DataType type : {DataType::kFloat16, DataType::kBFloat16}) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const uint16_t half = static_cast<uint16_t>(bits);
      uint16_t eight[8], back;
      std::fill_n(eight, 8, half);
      float one, many[8];
      kernels.to_float(&half, type, 1, &one);  // element by element
      kernels.to_float(eight, type, 8, many);  // by vectors, where there are any
      kernels.from_float(&one, type, 1, &back);
      const float written_out = type == DataType::kFloat16 ? ToFloat(Half{half}) : ToFloat(BFloat16{half});
      if (std::isnan(one)) {
        EXPECT(std::isnan(written_out), "%#x", bits);
        EXPECT(std::isnan(many[3]), "%#x", bits);
        continue;
      }
      EXPECT(one == many[3] && back == half, "%#x: %g, %g, %#x", bits, one, many[3], back);
      EXPECT(one == written_out, "%#x: %g, %g", bits, one, written_out);
      // Half way to the next one goes to the even of the two.
      const uint16_t next = static_cast<uint16_t>(half + 1);
      float above;
      kernels.to_float(&next, type, 1, &above);
      if (!std::isfinite(above) || !std::isfinite(one) || (half & 0x7fff) == 0x7fff) continue;
      const float middle = static_cast<float>((static_cast<double>(one) + above) / 2);
      kernels.from_float(&middle, type, 1, &back);
      EXPECT(back == (half % 2 ? next : half), "%#x: half way to the next: %#x", bits, back);
      const Bytes stored = Store({middle}, type);
      EXPECT(std::memcmp(stored.data(), &back, 2) == 0, "%#x: half way to the next, written out", bits);
    }
  }
}

void Exponential() {
  double worst = 0;
  for (double x = -86; x <= 0; x += 1e-3) {
    const float rounded = static_cast<float>(x);
    const double wanted = std::exp(static_cast<double>(rounded));
    worst = std::max(worst, std::fabs(cpu::GetTileKernels().exp(rounded) - wanted) / wanted);
  }
  EXPECT(worst < 3e-7, "relative error %g", worst);
  EXPECT(cpu::GetTileKernels().exp(0) == 1, "exp(0)");
}

void Keys() {
  const float scores[] = {-INFINITY, -3e38f, -2.5f, -1e-40f, 0.0f, 1e-40f, 1.5f, INFINITY};
  for (size_t i = 1; i < std::size(scores); ++i) {
    EXPECT(OrderedKey(scores[i - 1]) < OrderedKey(scores[i]), "%g < %g", scores[i - 1], scores[i]);
  }
  EXPECT(OrderedKey(0.0f) == OrderedKey(-0.0f), "zeros");
  EXPECT(TieKey(5, 9) > TieKey(4, 0) && TieKey(5, 1) > TieKey(5, 2), "ties");
}

void Refusals() {
  PoolUpdateArgs args{};
  args.shape = {1, 2, 2, 8, 16, 4};
  args.steps = args.lookahead_steps = 1;
  EXPECT(Check(args) == nullptr, "%s", Check(args));
  args.shape.num_slots = 15;
  EXPECT(Check(args) != nullptr, "slots");
  args.shape = {1, kMaxLayers + 1, 2, 8, 2 * (kMaxLayers + 1), 4};
  EXPECT(Check(args) != nullptr, "layers");
  args.shape = {1, 2, 2, 8, 16, 4};
  args.min_tokens_per_head = 5;
  EXPECT(Check(args) != nullptr, "min_tokens_per_head");
}

}  // namespace
}  // namespace trimkv::test

int main() {
  using namespace trimkv::test;
  Keys();
  Refusals();
  Conversions();
  Exponential();
  for (const Config& config : UpdateConfigs()) NamedConversation(config);
  for (const Config& config : UpdateConfigs()) {
    if (config.max_steps <= 40) DamagedStates(config);
  }
  for (uint32_t seed = 0; seed < 150 && g_failures == 0; ++seed) RandomConversation(seed);
  std::printf(g_failures ? "%d failures\n" : "all passed\n", g_failures);
  return g_failures != 0;
}
