// Speed of both operators at Qwen3-4B shapes, as Markdown on stdout.
//
//   bench_cuda_kernels [batch]    batch rows, 64 if not given
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "device.h"
#include "reference.h"

namespace trimkv::cuda {
namespace {

constexpr double kWeightBytes = 8.04e9;  // Qwen3-4B in fp16: what a decode step reads besides the cache

double TimeOf(cudaStream_t stream, int repeats, const std::function<void()>& launch) {
  cudaEvent_t begin, end;
  CUDA_OK(cudaEventCreate(&begin));
  CUDA_OK(cudaEventCreate(&end));
  launch();  // once to warm up
  CUDA_OK(cudaEventRecord(begin, stream));
  for (int i = 0; i < repeats; ++i) launch();
  CUDA_OK(cudaEventRecord(end, stream));
  CUDA_OK(cudaEventSynchronize(end));
  float milliseconds;
  CUDA_OK(cudaEventElapsedTime(&milliseconds, begin, end));
  CUDA_OK(cudaEventDestroy(begin));
  CUDA_OK(cudaEventDestroy(end));
  return milliseconds * 1e-3 / repeats;
}

// Bytes read and written per second by a copy within the device.
double CopyBandwidth() {
  const size_t bytes = size_t{1} << 30;
  void *from, *to;
  CUDA_OK(cudaMalloc(&from, bytes));
  CUDA_OK(cudaMalloc(&to, bytes));
  const double seconds =
      TimeOf(nullptr, 20, [&] { CUDA_OK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, nullptr)); });
  CUDA_OK(cudaFree(from));
  CUDA_OK(cudaFree(to));
  return 2.0 * static_cast<double>(bytes) / seconds;
}

Config Qwen(int32_t batch, int32_t steps) {
  Config config;
  config.shape = {batch, 36, 8, 128, 36 * 8 * 256, 32};
  config.group = 4;
  config.max_steps = steps;
  config.type = DataType::kFloat16;
  return config;
}

// A full pool after 100,000 tokens; entries are spread over the streams evenly, or as exp(2·normal) within each layer.
void FillPool(const Config& config, State& state, bool skewed, std::mt19937& random) {
  const CacheShape& s = config.shape;
  const int32_t streams = s.num_streams();
  std::normal_distribution<double> normal;
  for (int32_t b = 0; b < s.batch; ++b) {
    std::vector<int32_t> owner(s.num_slots);
    int32_t slot = 0;
    for (int32_t layer = 0; layer < s.num_layers; ++layer) {
      std::vector<double> weight(s.num_kv_heads);
      for (double& w : weight) w = skewed ? std::exp(2.0 * normal(random)) : 1.0;
      const double sum = std::accumulate(weight.begin(), weight.end(), 0.0);
      const int32_t layer_end = (layer + 1) * (s.num_slots / s.num_layers);
      double until = slot;
      for (int32_t head = 0; head < s.num_kv_heads; ++head) {
        until += weight[head] / sum * (s.num_slots / s.num_layers);
        const int32_t end = head + 1 == s.num_kv_heads ? layer_end : std::min(layer_end, static_cast<int32_t>(until));
        while (slot < end) owner[slot++] = layer * s.num_kv_heads + head;
      }
    }
    std::shuffle(owner.begin(), owner.end(), random);
    int32_t* start = &state.stream_start[static_cast<size_t>(b) * (streams + 1)];
    std::fill_n(start, streams + 1, 0);
    for (int32_t of : owner) ++start[of + 1];
    std::partial_sum(start, start + streams + 1, start);
    std::vector<int32_t> next(start, start + streams);
    const size_t pool = static_cast<size_t>(b) * s.num_slots;
    for (int32_t i = 0; i < s.num_slots; ++i) {
      state.slot_index[pool + next[owner[i]]++] = i;
      state.pool_log_beta[pool + i] = RandomLogBeta(Config::kRandom, 0, random) * 1e-3f;
      state.pool_position[pool + i] = static_cast<int32_t>(random() % 100000);
    }
    int32_t* counters = &state.counters[static_cast<size_t>(b) * kNumCounters];
    counters[kTokensSeen] = 100000;
    counters[kPoolEntries] = s.num_slots;
    counters[kRecentTokens] = counters[kEvictions] = 0;
  }
}

Step EmptyStep(const Config& config) {
  std::mt19937 random(1);
  Step step;
  const CacheShape& s = config.shape;
  const size_t rows = static_cast<size_t>(s.batch) * config.max_steps * s.num_kv_heads;
  step.step_tokens.assign(s.batch, config.max_steps);
  step.budget.assign(s.batch, 256);
  for (int32_t layer = 0; layer < s.num_layers; ++layer) {
    step.query.emplace_back(rows * config.group * s.head_dim * 2, 0x2c);
    step.key.emplace_back(rows * s.head_dim * 2, 0x2c);
    step.value.emplace_back(rows * s.head_dim * 2, 0x2c);
    std::vector<float> log_beta(rows);
    for (float& value : log_beta) value = RandomLogBeta(Config::kRandom, 0, random) * 1e-3f;
    step.log_beta.push_back(log_beta);
  }
  return step;
}

void UploadPool(const Config& config, DeviceModel& model, bool skewed) {
  std::mt19937 random(2);
  FillPool(config, model.state, skewed, random);
  model.mirror.Upload(model.state.pool_log_beta);
  model.mirror.Upload(model.state.pool_position);
  model.mirror.Upload(model.state.slot_index);
  model.mirror.Upload(model.state.stream_start);
  model.mirror.Upload(model.state.counters);
}

void BenchDecode(int32_t batch, bool skewed, double bandwidth) {
  const Config config = Qwen(batch, 1);
  const CacheShape& s = config.shape;
  DeviceModel model(config, EmptyStep(config), 0.088f);
  UploadPool(config, model, skewed);
  const auto attention = [&] {
    for (int32_t layer = 0; layer < s.num_layers; ++layer) model.LaunchAttention(layer);
  };

  // 31 steps without an eviction and one with it bring the cache back to where it was: a full pool, nothing recent.
  Graph quiet(model.stream, [&] {
    for (int i = 0; i < s.evict_every - 1; ++i) model.LaunchUpdate();
  });
  Graph evicting(model.stream, [&] { model.LaunchUpdate(); });
  Graph attending(model.stream, attention);
  Graph stepping(model.stream, [&] { model.LaunchStep(); });
  const double attention_s = TimeOf(model.stream, 20, [&] { attending.Replay(); });
  const double updates_s = TimeOf(model.stream, 10, [&] {
    quiet.Replay();
    evicting.Replay();
  });
  const double cycle_s = TimeOf(model.stream, 10, [&] {
    for (int i = 0; i < s.evict_every; ++i) stepping.Replay();
  });
  double quiet_s = 0.0;
  for (int i = 0; i < 10; ++i) {  // timed apart; the eviction between is not
    cudaEvent_t begin, end;
    CUDA_OK(cudaEventCreate(&begin));
    CUDA_OK(cudaEventCreate(&end));
    CUDA_OK(cudaEventRecord(begin, model.stream));
    quiet.Replay();
    CUDA_OK(cudaEventRecord(end, model.stream));
    evicting.Replay();
    CUDA_OK(cudaStreamSynchronize(model.stream));
    float milliseconds;
    CUDA_OK(cudaEventElapsedTime(&milliseconds, begin, end));
    quiet_s += milliseconds * 1e-4;
    CUDA_OK(cudaEventDestroy(begin));
    CUDA_OK(cudaEventDestroy(end));
  }

  const double rows = static_cast<double>(batch) * (s.num_slots + s.num_streams());  // pool, and the new token
  const double bytes = rows * 2 * s.head_dim * 2;
  const double step_s = cycle_s / s.evict_every;
  const double average_update_s = updates_s / s.evict_every;
  const double whole_s = step_s + kWeightBytes / bandwidth;
  std::printf("| %d | %s | %.1f | %.0f | %.0f %% | %.1f | %.1f | %.1f | %.2f | %.2f %% |\n", batch,
              skewed ? "skewed" : "even", attention_s * 1e6 / s.num_layers, bytes / attention_s * 1e-9,
              100 * bytes / attention_s / bandwidth, quiet_s * 1e6 / (s.evict_every - 1), (updates_s - quiet_s) * 1e6,
              average_update_s * 1e6, step_s * 1e3, 100 * average_update_s / whole_s);
}

void BenchPrefill(int32_t steps) {
  Config config = Qwen(1, steps);
  DeviceModel model(config, EmptyStep(config), 0.088f);
  UploadPool(config, model, false);
  Graph attending(model.stream, [&] {
    for (int32_t layer = 0; layer < config.shape.num_layers; ++layer) model.LaunchAttention(layer);
  });
  Graph updating(model.stream, [&] { model.LaunchUpdate(); });
  const double attention_s = TimeOf(model.stream, 10, [&] { attending.Replay(); }) / config.shape.num_layers;
  const double update_s = TimeOf(model.stream, 10, [&] { updating.Replay(); });
  const double pairs = static_cast<double>(steps) * 256 + 0.5 * steps * (steps + 1.0);
  const double operations = 4.0 * pairs * config.shape.num_kv_heads * config.group * config.shape.head_dim;
  std::printf("| %d | %.1f | %.1f | %.1f |\n", steps, attention_s * 1e6, operations / attention_s * 1e-12,
              update_s * 1e6);
}

}  // namespace
}  // namespace trimkv::cuda

int main(int argc, char** argv) {
  using namespace trimkv::cuda;
  const int32_t batch = argc > 1 ? std::atoi(argv[1]) : 64;
  cudaDeviceProp device;
  CUDA_OK(cudaGetDeviceProperties(&device, 0));
  const double bandwidth = CopyBandwidth();
  std::printf("%s, compute capability %d.%d; copies within the device move %.0f GB/s (read and written).\n\n",
              device.name, device.major, device.minor, bandwidth * 1e-9);
  std::printf("Qwen3-4B shapes (L 36, H 8, G 4, D 128, M 256, b 32), fp16, CUDA graphs.\n\n");
  std::printf(
      "| batch | heads | attention, us per layer | GB/s | of copy | update, us | evicting update, us | average update, "
      "us "
      "| attention and update, ms per step | update of a whole step* |\n|--|--|--|--|--|--|--|--|--|--|\n");
  for (int32_t rows : {1, batch}) {
    BenchDecode(rows, false, bandwidth);
    BenchDecode(rows, true, bandwidth);
  }
  std::printf("\n\\* a whole step: this, and reading %.1f GB of weights at the copy's speed.\n\n", kWeightBytes * 1e-9);
  std::printf("| prefill tokens | attention, us per layer | TFLOP/s | evicting update, us |\n|--|--|--|--|\n");
  for (int32_t steps : {64, 512}) BenchPrefill(steps);
  return 0;
}
