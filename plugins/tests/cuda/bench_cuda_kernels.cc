// Speed of both operators at Qwen3-4B shapes (L 36, H 8, G 4, D 128, M 256, b 32, fp16), all launches in CUDA graphs.
// benchmarks/gpu_attention.py runs this, makes tables of it and holds it against the limits.
//
//   bench_cuda_kernels [batch ...]    batch rows, 1 and 64 if none are given; prints one JSON object for each result
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "device.h"

namespace trimkv::test {
namespace {

// Seconds of what `launch` puts into the stream.
double TimeOnce(cudaStream_t stream, const std::function<void()>& launch) {
  cudaEvent_t begin, end;
  CUDA_OK(cudaEventCreate(&begin));
  CUDA_OK(cudaEventCreate(&end));
  CUDA_OK(cudaEventRecord(begin, stream));
  launch();
  CUDA_OK(cudaEventRecord(end, stream));
  CUDA_OK(cudaEventSynchronize(end));
  float milliseconds;
  CUDA_OK(cudaEventElapsedTime(&milliseconds, begin, end));
  CUDA_OK(cudaEventDestroy(begin));
  CUDA_OK(cudaEventDestroy(end));
  return milliseconds * 1e-3;
}

// The average of `repeats`, after one to warm up.
double TimeOf(cudaStream_t stream, int repeats, const std::function<void()>& launch) {
  launch();
  const auto all = [&] {
    for (int i = 0; i < repeats; ++i) launch();
  };
  return TimeOnce(stream, all) / repeats;
}

// Bytes read and written per second by a copy within the model.
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
  config.name = "Qwen3-4B";
  config.shape = {batch, 36, 8, 128, 36 * 8 * 256, 32};
  config.group = 4;
  config.max_steps = steps;
  config.type = DataType::kFloat16;
  return config;
}

// Random 16-bit values of magnitude 0.5 to 1, the same in each of `copies` parts.
void FillHalves(Bytes& out, size_t copies, std::mt19937_64& random) {
  const size_t part = out.size() / copies;
  for (size_t i = 0; i + 8 <= part; i += 8) {
    const uint64_t four = (random() & 0x83ff83ff83ff83ff) | 0x3800380038003800;
    std::memcpy(&out[i], &four, sizeof four);
  }
  for (size_t copy = 1; copy < copies; ++copy) std::copy_n(out.begin(), part, out.begin() + copy * part);
}

// Pool entries of each stream: as many for all, or spread as exp(2 * normal) over the heads of each layer.
std::vector<int32_t> StreamSizes(const CacheShape& s, bool skewed, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  std::vector<int32_t> sizes;
  const int32_t of_layer = s.num_slots / s.num_layers;
  for (int32_t layer = 0; layer < s.num_layers; ++layer) {
    std::vector<double> weight(s.num_kv_heads);
    for (double& w : weight) w = skewed ? std::exp(2.0 * normal(random)) : 1.0;
    const double sum = std::accumulate(weight.begin(), weight.end(), 0.0);
    int32_t left = of_layer;
    for (int32_t head = 0; head < s.num_kv_heads; ++head) {
      const bool last = head + 1 == s.num_kv_heads;
      sizes.push_back(last ? left : std::min(left, static_cast<int32_t>(weight[head] / sum * of_layer)));
      left -= sizes.back();
    }
  }
  return sizes;
}

constexpr int32_t kSeen = 100000;

// A full pool after kSeen tokens, in random slots. A stream of n entries has its n newest tokens and a log-retention of
// -1 / n: every eviction then takes as many from each stream as came in, so that sizes stay as they are.
void FillRow(const Config& config, State& state, Step& step, int32_t b, bool skewed, std::mt19937_64& random) {
  const CacheShape& s = config.shape;
  const std::vector<int32_t> sizes = StreamSizes(s, skewed, random);
  std::vector<int32_t> slots(s.num_slots);
  std::iota(slots.begin(), slots.end(), 0);
  std::shuffle(slots.begin(), slots.end(), random);
  const size_t pool = static_cast<size_t>(b) * s.num_slots;
  int32_t* start = &state.stream_start[static_cast<size_t>(b) * (s.num_streams() + 1)];
  start[0] = 0;
  for (int32_t stream = 0; stream < s.num_streams(); ++stream) {
    start[stream + 1] = start[stream] + sizes[stream];
    std::sort(slots.begin() + start[stream], slots.begin() + start[stream + 1]);
    const float log_beta = -1.0f / static_cast<float>(std::max(sizes[stream], 1));
    for (int32_t i = start[stream]; i < start[stream + 1]; ++i) {
      state.slot_index[pool + i] = slots[i];
      state.pool_log_beta[pool + slots[i]] = log_beta;
      state.pool_position[pool + slots[i]] = kSeen - 1 - (i - start[stream]);
    }
    std::vector<float>& fresh = step.log_beta[stream / s.num_kv_heads];
    for (int32_t token = 0; token < step.steps; ++token) {
      fresh[(static_cast<size_t>(b) * step.steps + token) * s.num_kv_heads + stream % s.num_kv_heads] = log_beta;
    }
  }
  int32_t* counters = &state.counters[static_cast<size_t>(b) * kNumCounters];
  counters[kTokensSeen] = kSeen;
  counters[kPoolEntries] = s.num_slots;
  counters[kRecentTokens] = counters[kEvictions] = 0;
}

Step MakeStep(const Config& config, std::mt19937_64& random) {
  const CacheShape& s = config.shape;
  const size_t rows = static_cast<size_t>(s.batch) * config.max_steps * s.num_kv_heads;
  Step step;
  step.steps = config.max_steps;
  step.step_tokens.assign(s.batch, config.max_steps);
  step.budget.assign(s.batch, config.kept());
  const auto halves = [&](size_t count) {
    Bytes out(count * 2);
    FillHalves(out, 1, random);
    return out;
  };
  for (int32_t layer = 0; layer < s.num_layers; ++layer) {
    step.query.push_back(halves(rows * config.group * s.head_dim));
    step.key.push_back(halves(rows * s.head_dim));
    step.value.push_back(halves(rows * s.head_dim));
    step.log_beta.emplace_back(rows);
  }
  return step;
}

// Makes the model's pool full; whatever was in it.
void Fill(const Config& config, DeviceModel& model, bool skewed, std::mt19937_64& random) {
  model.LaunchStep();  // loads the kernels: a capture is no time for that
  CUDA_OK(cudaStreamSynchronize(model.stream));
  for (Bytes* rows : {&model.state.pool_key, &model.state.pool_value}) FillHalves(*rows, config.shape.batch, random);
  for (int32_t b = 0; b < config.shape.batch; ++b) FillRow(config, model.state, model.step, b, skewed, random);
  model.UploadState();
  for (const auto& log_beta : model.step.log_beta) model.mirror.Upload(log_beta);
}

void BenchDecode(int32_t batch, bool skewed, double bandwidth) {
  const Config config = Qwen(batch, 1);
  const CacheShape& s = config.shape;
  std::mt19937_64 random(2);
  DeviceModel model(config, MakeStep(config, random));
  Fill(config, model, skewed, random);

  // 31 steps without an eviction and one with it bring the cache back to where it was: a full pool, nothing recent.
  Graph quiet(model.stream, [&] {
    for (int i = 0; i < s.evict_every - 1; ++i) model.LaunchUpdate();
  });
  Graph evicting(model.stream, [&] { model.LaunchUpdate(); });
  Graph attending(model.stream, [&] {
    for (int32_t layer = 0; layer < s.num_layers; ++layer) model.LaunchAttention(layer);
  });
  Graph stepping(model.stream, [&] { model.LaunchStep(); });  // a whole step's operators in one graph
  const double attention_s = TimeOf(model.stream, 20, [&] { attending.Replay(); });
  const double updates_s = TimeOf(model.stream, 10, [&] {
    quiet.Replay();
    evicting.Replay();
  });
  double quiet_s = 0.0;
  const int cycles = 10;
  for (int i = 0; i < cycles; ++i) {  // alone; the eviction between is not timed
    quiet_s += TimeOnce(model.stream, [&] { quiet.Replay(); }) / cycles;
    evicting.Replay();
  }
  const double cycle_s = TimeOf(model.stream, 10, [&] {
    for (int i = 0; i < s.evict_every; ++i) stepping.Replay();
  });

  const double rows = static_cast<double>(batch) * (s.num_slots + s.num_streams());  // pool, and the new token
  const double bytes = rows * 2 * s.head_dim * 2;
  std::printf(
      "{\"what\": \"decode\", \"batch\": %d, \"heads\": \"%s\", \"us_per_layer\": %.2f, "
      "\"gb_s\": %.1f, \"share_of_copy\": %.4f, \"quiet_us\": %.2f, \"evicting_us\": %.2f, "
      "\"average_us\": %.2f, \"step_us\": %.2f}\n",
      batch, skewed ? "skewed" : "even", attention_s * 1e6 / s.num_layers, bytes / attention_s * 1e-9,
      bytes / attention_s / bandwidth, quiet_s * 1e6 / (s.evict_every - 1), (updates_s - quiet_s) * 1e6,
      updates_s * 1e6 / s.evict_every, cycle_s * 1e6 / s.evict_every);
}

void BenchPrefill(int32_t steps) {
  const Config config = Qwen(1, steps);
  std::mt19937_64 random(2);
  DeviceModel model(config, MakeStep(config, random));
  Fill(config, model, false, random);
  Graph attending(model.stream, [&] {
    for (int32_t layer = 0; layer < config.shape.num_layers; ++layer) model.LaunchAttention(layer);
  });
  Graph updating(model.stream, [&] { model.LaunchUpdate(); });
  const double attention_s = TimeOf(model.stream, 10, [&] { attending.Replay(); }) / config.shape.num_layers;
  const double update_s = TimeOf(model.stream, 10, [&] { updating.Replay(); });
  const double pairs = static_cast<double>(steps) * config.kept() + 0.5 * steps * (steps + 1.0);
  const double operations = 4.0 * pairs * config.shape.num_kv_heads * config.group * config.shape.head_dim;
  std::printf(
      "{\"what\": \"prefill\", \"tokens\": %d, \"us_per_layer\": %.2f, \"tflop_s\": %.2f, "
      "\"evicting_us\": %.2f}\n",
      steps, attention_s * 1e6, operations / attention_s * 1e-12, update_s * 1e6);
}

}  // namespace
}  // namespace trimkv::test

int main(int argc, char** argv) {
  using namespace trimkv::test;
  std::vector<int32_t> batches;
  for (int i = 1; i < argc; ++i) batches.push_back(std::atoi(argv[i]));
  if (batches.empty()) batches = {1, 64};
  if (*std::min_element(batches.begin(), batches.end()) < 1) {
    std::fprintf(stderr, "bench_cuda_kernels [batch ...]: each a number from 1\n");
    return 2;
  }
  cudaDeviceProp device;
  CUDA_OK(cudaGetDeviceProperties(&device, 0));
  const double bandwidth = CopyBandwidth();
  std::printf(
      "{\"what\": \"device\", \"name\": \"%s\", \"capability\": \"%d.%d\", \"multiprocessors\": %d, \"copy_gb_s\": "
      "%.1f}\n",
      device.name, device.major, device.minor, device.multiProcessorCount, bandwidth * 1e-9);
  for (const int32_t batch : batches) {
    for (const bool skewed : {false, true}) BenchDecode(batch, skewed, bandwidth);
  }
  for (const int32_t tokens : {64, 512}) BenchPrefill(tokens);
  return 0;
}
