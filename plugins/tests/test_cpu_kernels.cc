// CPU kernels against reference.h, on random states. Every allocation is counted: kernels must make none.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>

#include "cpu/attention_tile.h"
#include "cpu/pool_attention.h"
#include "cpu/pool_update.h"
#include "reference.h"

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

int g_failures = 0;

#define EXPECT(condition, ...)                                    \
  do {                                                            \
    if (!(condition)) {                                           \
      ++g_failures;                                               \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      if (g_failures > 20) std::exit(1);                          \
    }                                                             \
  } while (false)

// Tasks in reverse and, with real threads, at once: no kernel may depend on their order.
void RunReversed(void*, size_t count, void (*task)(void*, size_t), void* user) {
  while (count > 0) task(user, --count);
}
void RunThreads(void*, size_t count, void (*task)(void*, size_t), void* user) {
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 3; ++t) {
    threads.emplace_back([=] {
      for (size_t i = t; i < count; i += 3) task(user, i);
    });
  }
  for (auto& thread : threads) thread.join();
}

// Storage of a type, and back.
std::vector<char> Store(const std::vector<float>& from, DataType type) {
  std::vector<char> out(from.size() * ItemSize(type));
  cpu::GetTileKernels().from_float(from.data(), type, static_cast<int>(from.size()), out.data());
  return out;
}
std::vector<float> Load(const std::vector<char>& from, DataType type) {
  std::vector<float> out(from.size() / ItemSize(type));
  cpu::GetTileKernels().to_float(from.data(), type, static_cast<int>(out.size()), out.data());
  return out;
}
// Rounds to what the type can hold, so that reference and kernel see the same numbers.
void Round(std::vector<float>& values, DataType type) { values = Load(Store(values, type), type); }

struct Stored {
  std::vector<char> pool_key, pool_value, recent_key, recent_value;
  std::vector<std::vector<char>> query, key, value;
};

void RoundStep(Problem& p, DataType type) {
  for (auto* layers : {&p.query, &p.key, &p.value}) {
    for (auto& values : *layers) Round(values, type);
  }
}

PoolAttentionArgs AttentionArgs(const Problem& p, const Stored& s, DataType type, int32_t layer) {
  PoolAttentionArgs args{};
  args.shape = p.shape;
  args.type = type;
  args.layer = layer;
  args.group = p.group;
  args.steps = p.steps;
  args.scale = 0.3f;
  args.query = s.query[layer].data();
  args.key = s.key[layer].data();
  args.value = s.value[layer].data();
  args.pool_key = s.pool_key.data();
  args.pool_value = s.pool_value.data();
  args.slot_index = p.slot_index.data();
  args.stream_start = p.stream_start.data();
  args.recent_key = s.recent_key.data();
  args.recent_value = s.recent_value.data();
  args.counters = p.counters.data();
  args.step_tokens = p.step_tokens.data();
  return args;
}

class Workspace {
 public:
  void* Of(size_t bytes) {
    memory_.assign(bytes + 256, static_cast<char>(0xAB));  // what is there must not matter
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.data()) + 255) / 256 * 256);
  }

 private:
  std::vector<char> memory_;
};

void CheckAttention(const Problem& p, const Stored& stored, DataType type, const cpu::Parallel& parallel) {
  const double tolerance = type == DataType::kFloat32 ? 2e-5 : type == DataType::kFloat16 ? 4e-3 : 3e-2;
  Workspace workspace;
  const int32_t dim = p.shape.head_dim, heads = p.shape.num_kv_heads * p.group;
  std::vector<char> attended(static_cast<size_t>(p.shape.batch) * p.steps * heads * dim * ItemSize(type), char(0x7f));
  for (int32_t layer = 0; layer < p.shape.num_layers; ++layer) {
    PoolAttentionArgs args = AttentionArgs(p, stored, type, layer);
    args.attended = attended.data();
    args.workspace = workspace.Of(cpu::PoolAttentionWorkspaceBytes(args));
    EXPECT(Check(args) == nullptr, "%s", Check(args));
    const long before = g_allocations;
    cpu::PoolAttention(args, parallel);
    EXPECT(parallel.run == RunThreads || g_allocations == before, "allocated");
    const std::vector<float> out = Load(attended, type);
    for (int32_t row = 0; row < p.shape.batch; ++row) {
      for (int32_t token = 0; token < p.steps; ++token) {
        for (int32_t head = 0; head < heads; ++head) {
          const float* got = &out[((static_cast<size_t>(row) * p.steps + token) * heads + head) * dim];
          std::vector<double> wanted(dim);
          if (token < p.step_tokens[row]) wanted = AttendOne(p, layer, row, token, head, args.scale);
          for (int32_t d = 0; d < dim; ++d) {
            EXPECT(std::fabs(got[d] - wanted[d]) <= tolerance * (1 + std::fabs(wanted[d])), "%g, expected %g", got[d],
                   wanted[d]);
          }
        }
      }
    }
  }
}

// Live parts of the state; what is not live may be anything.
void CompareState(const Problem& a, const Problem& b) {
  const CacheShape& s = a.shape;
  const int32_t streams = s.num_streams(), dim = s.head_dim;
  EXPECT(a.counters == b.counters, "counters");
  EXPECT(a.stream_start == b.stream_start, "stream_start");
  for (int32_t row = 0; row < s.batch; ++row) {
    const size_t slots = static_cast<size_t>(row) * s.num_slots;
    const int32_t live = b.counters[row * kNumCounters + kPoolEntries], recent = b.counters[row * kNumCounters + 2];
    for (int32_t i = 0; i < (live ? s.num_slots : 0); ++i) {
      EXPECT(a.slot_index[slots + i] == b.slot_index[slots + i], "slot_index %d", i);
      if (i >= live) continue;
      const size_t slot = slots + b.slot_index[slots + i];
      EXPECT(a.pool_position[slot] == b.pool_position[slot], "pool_position");
      EXPECT(a.pool_log_beta[slot] == b.pool_log_beta[slot], "pool_log_beta");
      EXPECT(!std::memcmp(&a.pool_key[slot * dim], &b.pool_key[slot * dim], dim * 4), "pool_key");
      EXPECT(!std::memcmp(&a.pool_value[slot * dim], &b.pool_value[slot * dim], dim * 4), "pool_value");
    }
    for (int32_t stream = 0; stream < streams; ++stream) {
      for (int32_t i = 0; i < recent; ++i) {
        const size_t at = (static_cast<size_t>(row) * streams + stream) * s.evict_every + i;
        EXPECT(a.recent_log_beta[at] == b.recent_log_beta[at], "recent_log_beta");
        EXPECT(!std::memcmp(&a.recent_key[at * dim], &b.recent_key[at * dim], dim * 4), "recent_key");
        EXPECT(!std::memcmp(&a.recent_value[at * dim], &b.recent_value[at * dim], dim * 4), "recent_value");
      }
    }
  }
}

void RunUpdate(Problem& p, Stored& s, DataType type, const cpu::Parallel& parallel) {
  PoolUpdateArgs args{};
  args.shape = p.shape;
  args.type = type;
  args.policy = p.policy;
  args.min_tokens_per_head = p.min_tokens;
  args.lookahead_steps = p.lookahead;
  args.steps = p.steps;
  args.pool_key = s.pool_key.data();
  args.pool_value = s.pool_value.data();
  args.pool_log_beta = p.pool_log_beta.data();
  args.pool_position = p.pool_position.data();
  args.slot_index = p.slot_index.data();
  args.stream_start = p.stream_start.data();
  args.recent_key = s.recent_key.data();
  args.recent_value = s.recent_value.data();
  args.recent_log_beta = p.recent_log_beta.data();
  args.counters = p.counters.data();
  args.step_tokens = p.step_tokens.data();
  args.budget = p.budget.data();
  for (int32_t layer = 0; layer < p.shape.num_layers; ++layer) {
    args.key[layer] = s.key[layer].data();
    args.value[layer] = s.value[layer].data();
    args.log_beta[layer] = p.log_beta[layer].data();
  }
  EXPECT(Check(args) == nullptr, "%s", Check(args));
  Workspace workspace;
  args.workspace = workspace.Of(cpu::PoolUpdateWorkspaceBytes(args));
  const long before = g_allocations;
  cpu::PoolUpdate(args, parallel);
  EXPECT(parallel.run == RunThreads || g_allocations == before, "allocated");
  p.pool_key = Load(s.pool_key, type), p.pool_value = Load(s.pool_value, type);
  p.recent_key = Load(s.recent_key, type), p.recent_value = Load(s.recent_value, type);
}

// A conversation of random steps; rows are out of phase, idle at times, and reset midway.
void RandomConversation(uint32_t seed) {
  std::mt19937 random(seed);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  const int32_t layers = pick(1, 3), heads = pick(1, 3), budget = pick(1, seed % 5 == 0 ? 80 : 12);
  Problem wanted({pick(1, 3), layers, heads, pick(1, 40), layers * heads * budget, pick(1, 9)});
  wanted.group = pick(1, 5);
  wanted.policy = pick(0, 2) ? Policy::kGlobal : Policy::kPerHead;
  wanted.min_tokens = wanted.policy == Policy::kGlobal && pick(0, 1) ? pick(0, budget) : 0;
  wanted.lookahead = pick(0, 2) ? 1 : pick(2, 20);
  for (int32_t& row_budget : wanted.budget) row_budget = pick(std::max(1, wanted.min_tokens), budget);
  const DataType type = static_cast<DataType>(pick(0, 2));
  const int levels = pick(0, 2);  // 1 and 2: many ties
  const cpu::Parallel parallel{pick(0, 1) ? RunReversed : RunThreads, nullptr, 3};
  // NaN in places that are not live must never show.
  for (auto* values : {&wanted.pool_key, &wanted.pool_value, &wanted.recent_key, &wanted.recent_value}) {
    std::fill(values->begin(), values->end(), NAN);
  }
  Problem got = wanted;
  Stored stored{Store(got.pool_key, type),
                Store(got.pool_value, type),
                Store(got.recent_key, type),
                Store(got.recent_value, type),
                {},
                {},
                {}};
  for (int step = 0; step < 25 && g_failures == 0; ++step) {
    const int32_t tokens = pick(0, 2) ? 1 : pick(1, 40);
    wanted.NewStep(random, tokens, levels);
    RoundStep(wanted, type);
    for (int32_t row = 0; row < wanted.shape.batch; ++row) {
      wanted.step_tokens[row] = pick(0, 5) ? pick(1, tokens) : 0;
      if (pick(0, 12) == 0) wanted.Reset(row), got.Reset(row);
    }
    got.steps = tokens, got.step_tokens = wanted.step_tokens;
    got.query = wanted.query, got.key = wanted.key, got.value = wanted.value, got.log_beta = wanted.log_beta;
    stored.query.clear(), stored.key.clear(), stored.value.clear();
    for (int32_t layer = 0; layer < layers; ++layer) {
      stored.query.push_back(Store(wanted.query[layer], type));
      stored.key.push_back(Store(wanted.key[layer], type));
      stored.value.push_back(Store(wanted.value[layer], type));
    }
    CheckAttention(got, stored, type, parallel);
    RunUpdate(got, stored, type, parallel);
    for (int32_t row = 0; row < wanted.shape.batch; ++row) UpdateRow(wanted, row);
    CompareState(got, wanted);
  }
  if (g_failures) std::printf("seed %u failed\n", seed);
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
      if (std::isnan(one)) {
        EXPECT(std::isnan(many[3]), "%#x", bits);
        continue;
      }
      EXPECT(one == many[3] && back == half, "%#x: %g, %g, %#x", bits, one, many[3], back);
      // Half way to the next one goes to the even of the two.
      const uint16_t next = static_cast<uint16_t>(half + 1);
      float above;
      kernels.to_float(&next, type, 1, &above);
      if (!std::isfinite(above) || !std::isfinite(one) || (half & 0x7fff) == 0x7fff) continue;
      const float middle = static_cast<float>((static_cast<double>(one) + above) / 2);
      kernels.from_float(&middle, type, 1, &back);
      EXPECT(back == (half % 2 ? next : half), "%#x: half way to the next: %#x", bits, back);
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
  for (uint32_t seed = 0; seed < 150 && g_failures == 0; ++seed) RandomConversation(seed);
  std::printf(g_failures ? "%d failures\n" : "all passed\n", g_failures);
  return g_failures != 0;
}
