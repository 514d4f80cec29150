// PoolAttention and PoolUpdate as ONNX Runtime kernels, for one device. A device provides
//   void Attend(const PoolAttentionArgs&), size_t AttendBytes(const PoolAttentionArgs&)
//   void Update(const PoolUpdateArgs&), size_t UpdateBytes(const PoolUpdateArgs&)
//   void Copy(void* to, const void* from, size_t bytes)
// bound to the context of one call, and a Workspace class with Reserve(bytes) -> void*.
#pragma once

#include <mutex>
#include <optional>

#include "ort.h"
#include "trimkv/kernels.h"

namespace trimkv::ort {

inline DataType ToDataType(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return DataType::kFloat32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return DataType::kFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return DataType::kBFloat16;
    default:
      throw Error("keys and values must be float32, float16 or bfloat16, got element type " + std::to_string(type));
  }
}

inline void Expect(const char* name, const Tensor& tensor, ONNXTensorElementDataType type, const Dims& dims) {
  if (tensor.type != type) {
    throw Error(std::string(name) + " has element type " + std::to_string(tensor.type) + ", expected " +
                std::to_string(type));
  }
  if (!(tensor.dims == dims)) {
    throw Error(std::string(name) + " has shape " + tensor.dims.Text() + ", expected " + dims.Text());
  }
}

constexpr auto kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

template <typename Device>
class PoolAttentionKernel {
 public:
  static constexpr const char* kName = "PoolAttention";

  explicit PoolAttentionKernel(const OrtKernelInfo* info)
      : layer_(IntAttribute(info, "layer")),
        num_layers_(IntAttribute(info, "num_layers")),
        num_kv_heads_(IntAttribute(info, "num_kv_heads")),
        scale_(FloatAttribute(info, "scale")) {}

  void Compute(OrtKernelContext* context) {
    const Tensor query = Input(context, 0), key = Input(context, 1), value = Input(context, 2);
    const Tensor pool_key = Input(context, 3), pool_value = Input(context, 4), slot_index = Input(context, 5);
    const Tensor stream_start = Input(context, 6), recent_key = Input(context, 7), recent_value = Input(context, 8);
    const Tensor counters = Input(context, 9), step_tokens = Input(context, 10);
    if (query.dims.count != 4 || pool_key.dims.count != 3 || recent_key.dims.count != 5) {
      throw Error("query must be [B, S, H·G, D], pool_key [B, N, D], recent_key [B, L, H, b, D]");
    }
    const auto [batch, steps, query_heads, dim] =
        std::tie(query.dims.at[0], query.dims.at[1], query.dims.at[2], query.dims.at[3]);
    const int64_t slots = pool_key.dims.at[1], recent = recent_key.dims.at[3];
    const auto type = query.type;
    const Dims fresh = MakeDims(batch, steps, num_kv_heads_, dim), pool = MakeDims(batch, slots, dim);
    const Dims near = MakeDims(batch, num_layers_, num_kv_heads_, recent, dim);
    Expect("key", key, type, fresh);
    Expect("value", value, type, fresh);
    Expect("pool_key", pool_key, type, pool);
    Expect("pool_value", pool_value, type, pool);
    Expect("slot_index", slot_index, kInt32, MakeDims(batch, slots));
    Expect("stream_start", stream_start, kInt32, MakeDims(batch, num_layers_ * num_kv_heads_ + 1));
    Expect("recent_key", recent_key, type, near);
    Expect("recent_value", recent_value, type, near);
    Expect("counters", counters, kInt32, MakeDims(batch, static_cast<int>(kNumCounters)));
    Expect("step_tokens", step_tokens, kInt32, MakeDims(batch));
    if (query_heads % num_kv_heads_) throw Error("the query heads are not a multiple of num_kv_heads");

    PoolAttentionArgs args{};
    args.shape = {static_cast<int32_t>(batch), static_cast<int32_t>(num_layers_), static_cast<int32_t>(num_kv_heads_),
                  static_cast<int32_t>(dim),   static_cast<int32_t>(slots),       static_cast<int32_t>(recent)};
    args.type = ToDataType(type);
    args.layer = static_cast<int32_t>(layer_);
    args.group = static_cast<int32_t>(query_heads / num_kv_heads_);
    args.steps = static_cast<int32_t>(steps);
    args.scale = scale_;
    args.query = query.data;
    args.key = key.data;
    args.value = value.data;
    args.pool_key = pool_key.data;
    args.pool_value = pool_value.data;
    args.slot_index = static_cast<const int32_t*>(slot_index.data);
    args.stream_start = static_cast<const int32_t*>(stream_start.data);
    args.recent_key = recent_key.data;
    args.recent_value = recent_value.data;
    args.counters = static_cast<const int32_t*>(counters.data);
    args.step_tokens = static_cast<const int32_t*>(step_tokens.data);
    args.attended = Output(context, 0, query.dims);
    if (const char* error = Check(args)) throw Error(error);
    Device device(context);
    const std::lock_guard lock(mutex_);
    args.workspace = workspace_.Reserve(device.AttendBytes(args));
    device.Attend(args);
  }

  static OrtStatus* InferShapes(const OrtCustomOp*, OrtShapeInferContext* context) {
    return Guard([&] {
      OrtTensorTypeAndShapeInfo* info = nullptr;
      ThrowIfFailed(g_api->ShapeInferContext_GetInputTypeShape(context, 0, &info));
      ThrowIfFailed(g_api->ShapeInferContext_SetOutputTypeShape(context, 0, info));
    });
  }

 private:
  const int64_t layer_, num_layers_, num_kv_heads_;
  const float scale_;
  std::mutex mutex_;
  typename Device::Workspace workspace_;
};

template <typename Device>
class PoolUpdateKernel {
 public:
  static constexpr const char* kName = "PoolUpdate";
  static constexpr size_t kStateTensors = 10;

  explicit PoolUpdateKernel(const OrtKernelInfo* info)
      : num_layers_(IntAttribute(info, "num_layers")),
        num_kv_heads_(IntAttribute(info, "num_kv_heads")),
        evict_every_(IntAttribute(info, "evict_every")),
        min_tokens_per_head_(IntAttribute(info, "min_tokens_per_head")),
        lookahead_steps_(IntAttribute(info, "lookahead_steps")) {
    const std::string policy = StringAttribute(info, "policy");
    if (policy != "global" && policy != "per_head") {
      throw Error("policy must be global or per_head, got " + policy);
    }
    policy_ = policy == "global" ? Policy::kGlobal : Policy::kPerHead;
    if (num_layers_ < 1 || num_layers_ > kMaxLayers) {
      throw Error("num_layers must be 1 to " + std::to_string(kMaxLayers) + ", got " + std::to_string(num_layers_));
    }
  }

  void Compute(OrtKernelContext* context) {
    const size_t first_key = kStateTensors + 3;  // after step_tokens, budget and attended
    const Tensor pool_key = Input(context, 0), recent_key = Input(context, 6), key = Input(context, first_key);
    if (pool_key.dims.count != 3 || recent_key.dims.count != 5 || key.dims.count != 4) {
      throw Error("pool_key must be [B, N, D], recent_key [B, L, H, b, D], each key [B, S, H, D]");
    }
    const int64_t batch = pool_key.dims.at[0], slots = pool_key.dims.at[1], dim = pool_key.dims.at[2];
    const int64_t steps = key.dims.at[1];
    const auto type = pool_key.type;
    const Dims pool = MakeDims(batch, slots), near = MakeDims(batch, num_layers_, num_kv_heads_, evict_every_);
    const Dims pool_rows = MakeDims(batch, slots, dim);
    const Dims near_rows = MakeDims(batch, num_layers_, num_kv_heads_, evict_every_, dim);
    const struct {
      const char* name;
      ONNXTensorElementDataType type;
      Dims dims;
    } state[kStateTensors] = {
        {"pool_key", type, pool_rows},     {"pool_value", type, pool_rows},
        {"pool_log_beta", kFloat, pool},   {"pool_position", kInt32, pool},
        {"slot_index", kInt32, pool},      {"stream_start", kInt32, MakeDims(batch, num_layers_ * num_kv_heads_ + 1)},
        {"recent_key", type, near_rows},   {"recent_value", type, near_rows},
        {"recent_log_beta", kFloat, near}, {"counters", kInt32, MakeDims(batch, static_cast<int>(kNumCounters))},
    };
    Device device(context);
    void* out[kStateTensors];
    for (size_t i = 0; i < kStateTensors; ++i) {
      const Tensor past = Input(context, i);
      Expect(state[i].name, past, state[i].type, state[i].dims);
      out[i] = Output(context, i, past.dims);
      // Bound to one memory, the state is updated in place; else the kernel works on a copy.
      if (out[i] != past.data) device.Copy(out[i], past.data, NumBytes(past));
    }
    const Tensor step_tokens = Input(context, kStateTensors), budget = Input(context, kStateTensors + 1);
    Expect("step_tokens", step_tokens, kInt32, MakeDims(batch));
    Expect("budget", budget, kInt32, MakeDims(batch));

    PoolUpdateArgs args{};
    args.shape = {static_cast<int32_t>(batch), static_cast<int32_t>(num_layers_), static_cast<int32_t>(num_kv_heads_),
                  static_cast<int32_t>(dim),   static_cast<int32_t>(slots),       static_cast<int32_t>(evict_every_)};
    args.type = ToDataType(type);
    args.policy = policy_;
    args.min_tokens_per_head = static_cast<int32_t>(min_tokens_per_head_);
    args.lookahead_steps = static_cast<int32_t>(lookahead_steps_);
    args.steps = static_cast<int32_t>(steps);
    args.pool_key = out[0];
    args.pool_value = out[1];
    args.pool_log_beta = static_cast<float*>(out[2]);
    args.pool_position = static_cast<int32_t*>(out[3]);
    args.slot_index = static_cast<int32_t*>(out[4]);
    args.stream_start = static_cast<int32_t*>(out[5]);
    args.recent_key = out[6];
    args.recent_value = out[7];
    args.recent_log_beta = static_cast<float*>(out[8]);
    args.counters = static_cast<int32_t*>(out[9]);
    args.step_tokens = static_cast<const int32_t*>(step_tokens.data);
    args.budget = static_cast<const int32_t*>(budget.data);
    const Dims fresh = MakeDims(batch, steps, num_kv_heads_, dim), gates = MakeDims(batch, steps, num_kv_heads_);
    for (int64_t layer = 0; layer < num_layers_; ++layer) {
      const Tensor k = Input(context, first_key + layer), v = Input(context, first_key + num_layers_ + layer);
      const Tensor log_beta = Input(context, first_key + 2 * num_layers_ + layer);
      Expect("key", k, type, fresh);
      Expect("value", v, type, fresh);
      Expect("log_beta", log_beta, kFloat, gates);
      args.key[layer] = k.data;
      args.value[layer] = v.data;
      args.log_beta[layer] = static_cast<const float*>(log_beta.data);
    }
    if (const char* error = Check(args)) throw Error(error);
    const std::lock_guard lock(mutex_);
    args.workspace = workspace_.Reserve(device.UpdateBytes(args));
    device.Update(args);
  }

  static OrtStatus* InferShapes(const OrtCustomOp*, OrtShapeInferContext* context) {
    return Guard([&] {
      for (size_t i = 0; i < kStateTensors; ++i) {
        OrtTensorTypeAndShapeInfo* info = nullptr;
        ThrowIfFailed(g_api->ShapeInferContext_GetInputTypeShape(context, i, &info));
        ThrowIfFailed(g_api->ShapeInferContext_SetOutputTypeShape(context, i, info));
      }
    });
  }

 private:
  static size_t NumBytes(const Tensor& tensor) {
    size_t size = tensor.type == kFloat || tensor.type == kInt32 ? 4 : 2;
    for (size_t i = 0; i < tensor.dims.count; ++i) size *= tensor.dims.at[i];
    return size;
  }

  const int64_t num_layers_, num_kv_heads_, evict_every_, min_tokens_per_head_, lookahead_steps_;
  Policy policy_;
  std::mutex mutex_;
  typename Device::Workspace workspace_;
};

// An OrtCustomOp for one kernel class. Inputs and outputs are variadic and of mixed types: the kernels check them, and
// one operator serves every element type.
template <typename Kernel>
struct CustomOp : OrtCustomOp {
  explicit CustomOp(const char* provider) : OrtCustomOp{}, provider_(provider) {
    version = ORT_API_VERSION;
    GetName = [](const OrtCustomOp*) { return Kernel::kName; };
    GetExecutionProviderType = [](const OrtCustomOp* op) { return static_cast<const CustomOp*>(op)->provider_; };
    GetInputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; };
    GetInputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
    GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_VARIADIC; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_VARIADIC; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    InferOutputShapeFn = Kernel::InferShapes;
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      return Guard([&] { *kernel = new Kernel(info); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return Guard([&] { static_cast<Kernel*>(kernel)->Compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

 private:
  const char* provider_;
};

}  // namespace trimkv::ort
