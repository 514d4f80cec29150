"""Plans of real models from their config.json alone, and the sizes of activations they are made of."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import pytest
from support import shipped_config

from trimkv_export.checkpoint import ALIASES, read_gate_config, shipped_folder
from trimkv_export.checkpoint.shipped import bundled_gates
from trimkv_export.config import EvictionConfig, PlanOptions, Policy, Precision
from trimkv_export.errors import OptionError
from trimkv_export.graph import GateSpec, build_decoder, build_vision
from trimkv_export.graph.functions import GATE_FUNCTIONS, LOG_SIGMOID
from trimkv_export.graph.ops import DOMAIN
from trimkv_export.models import DecoderSpec, VisionSpec, decoder_spec, vision_spec
from trimkv_export.plan import device
from trimkv_export.plan.activations import Activations, graph_activations
from trimkv_export.plan.planner import ModelPlan, plan_model

PARTS = ("weight_bytes", "cache_bytes", "activation_bytes", "vision_bytes", "io_bytes", "reserve_bytes")
# Published counts of distinct parameters, as in test_checkpoint_shipped.py.
PARAMETERS = {
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Thinking": 8_767_123_696,
    "microsoft/Phi-3-mini-128k-instruct": 3_821_079_552,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}
PLAN_ALL = """
import json, sys
from trimkv_export.config import PlanOptions, Precision
from trimkv_export.plan.planner import plan_model
plans = {
    model: plan_model(PlanOptions(model, 256, device="agx-orin-64gb", precision=Precision.FP16)).as_dict()
    for model in sys.argv[1:]
}
banned = {"torch", "transformers", "onnxruntime", "huggingface_hub", "safetensors"}
print(json.dumps({"plans": plans, "loaded": sorted(banned & set(sys.modules))}))
"""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """All aliases, planned in one fresh process."""
    command = [sys.executable, "-c", PLAN_ALL, *ALIASES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_no_framework_is_loaded(report: dict[str, Any]) -> None:
    assert report["loaded"] == []
    assert {ALIASES[name].backbone for name in report["plans"]} == set(PARAMETERS)


@pytest.mark.parametrize("name", ALIASES)
def test_plan_of_an_alias(report: dict[str, Any], name: str) -> None:
    plan, (backbone, gates) = report["plans"][name], shipped_config(name)
    text = backbone.get("text_config", backbone)
    folder = bundled_gates(ALIASES[name].gates) or shipped_folder(ALIASES[name].gates)
    assert folder is not None
    gate_parameters = read_gate_config(folder, gates, 512).parameters(
        num_layers=text["num_hidden_layers"], num_kv_heads=text["num_key_value_heads"], hidden_size=text["hidden_size"]
    )
    expected = PARAMETERS[ALIASES[name].backbone] + gate_parameters
    assert plan["parameters"] == pytest.approx(expected, rel=1e-3)
    assert plan["total_bytes"] == sum(plan[part] for part in PARTS)
    assert (plan["vision_bytes"] > 0) == ("vision_config" in backbone)
    # Two bytes a parameter, those of the tower among its own part.
    held = plan["weight_bytes"] + plan["vision_bytes"]
    assert 2 * expected <= held * 1.0001
    assert held <= 2 * expected + (1 << 30)
    streams = text["num_hidden_layers"] * text["num_key_value_heads"]
    entry = 2 * text.get("head_dim", text["hidden_size"] // text["num_attention_heads"]) * 2
    assert streams * 256 * entry < plan["cache_bytes"] < 1.2 * streams * (256 + 32) * entry
    assert plan["full_cache_bytes"] == streams * text["max_position_embeddings"] * entry
    assert plan["fits"] is True
    assert plan["device_bytes"] - plan["total_bytes"] == plan["headroom_bytes"]
    assert plan["decode"]["activation_bytes"] < plan["prefill"]["activation_bytes"] == plan["activation_bytes"]
    assert plan["activation_bytes"] < 10**9
    bandwidth = device("agx-orin-64gb").bandwidth
    assert bandwidth is not None
    assert 0.5 * bandwidth / plan["weight_bytes"] < plan["tokens_per_second"] < 1.3 * bandwidth / plan["weight_bytes"]
    assert plan["full_cache_tokens_per_second"] < plan["tokens_per_second"]


def test_the_designs_cache(report: dict[str, Any]) -> None:
    """docs/design.md, section 4: Qwen3-VL-4B, M 256, b 32, float16."""
    assert round(report["plans"]["qwen3-vl-4b"]["cache_bytes"] / 1e6, 1) == 43.4


def planned(model: str = "qwen3-1.7b", **changes: Any) -> ModelPlan:
    values: dict[str, Any] = {"budget": 256, "precision": Precision.FP16, "device": "l4"}
    return plan_model(PlanOptions(model, **values | changes))


@pytest.mark.parametrize("where", ["l4", None])
@pytest.mark.parametrize(
    ("name", "values", "part"),
    [
        ("budget", (1, 64, 256, 1000), "cache_bytes"),
        ("max_batch", (1, 2, 5, 16), "cache_bytes"),
        ("prefill_chunk", (64, 256, 1000), "activation_bytes"),
        ("max_image_tokens", (16, 256, 1024, 4000), "vision_bytes"),
        ("max_image_pixels", (1, 40_000_000, 60_000_000, 178_956_970), "vision_bytes"),
        ("max_frames", (2, 8, 64), "vision_bytes"),
    ],
)
def test_more_takes_more(name: str, values: tuple[int, ...], part: str, where: str | None) -> None:
    model = "qwen3-vl-4b" if part == "vision_bytes" else "qwen3-1.7b"
    # Reading the picture is what takes most, unless it is small.
    small = {"max_image_pixels": 1000} if name in ("max_image_tokens", "max_frames") else {"max_image_tokens": 16}
    more_options = small if part == "vision_bytes" else {}
    plans = [planned(model, device=where, **more_options | {name: value}).plan for value in values]
    if where is not None and name in ("max_image_pixels", "max_frames"):  # a GPU's memory has none of it
        assert len(set(plans)) == 1
        return
    for less, more in pairwise(plans):
        assert all(getattr(less, each) <= getattr(more, each) for each in PARTS)
        assert getattr(less, part) < getattr(more, part)
        assert less.total_bytes < more.total_bytes


def test_precision_sets_the_sizes() -> None:
    half, single = planned().plan, planned(precision=Precision.FP32).plan
    # The gates' biases are float32 in both.
    assert 0 <= 2 * half.weight_bytes - single.weight_bytes < 2000
    assert planned(precision=Precision.BF16).plan == half


def test_a_plan_can_be_remade_from_its_workload() -> None:
    """The searches vary the workload; a plan made anew says the same."""
    found, anew = planned(), planned(budget=1000, max_batch=3, prefill_chunk=40)
    work = found.workload.work
    other = replace(work, cache=replace(work.cache, budget=1000), batch=3, prefill_chunk=40)
    assert other.activation_bytes(3, 40, 1000) == anew.workload.work.activation_bytes(3, 40, 1000)
    assert (other.weight_bytes, other.cache) == (anew.workload.work.weight_bytes, anew.workload.work.cache)


def test_bfloat16_on_the_cpu() -> None:
    with pytest.raises(OptionError, match="bf16 does not run on ONNX Runtime's CPU provider"):
        planned(precision=Precision.BF16, device="cpu")


def specs() -> tuple[DecoderSpec, VisionSpec]:
    """Qwen3-VL-4B with few layers."""
    config = shipped_config("qwen3-vl-4b")[0]
    vision = vision_spec(config, Path("config.json"))
    assert vision is not None
    return replace(decoder_spec(config, Path("config.json")), num_layers=4), vision[0]


def inferred(model: onnx.ModelProto, dims: Mapping[str, int]) -> dict[str, int]:
    """Bytes of what every node makes, by ONNX's shape inference at these very sizes."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for weight in probe.graph.initializer:
        probe.graph.input.append(onnx.helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims)))
    del probe.graph.initializer[:]
    for value in [*probe.graph.input, *probe.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in dims:
                dim.dim_value = dims[dim.dim_param]
    graph = onnx.shape_inference.infer_shapes(probe, data_prop=True).graph
    return {
        value.name: math.prod(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        * onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
        for value in [*graph.value_info, *graph.output]
        if all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    }


def check_sizes(activations: Activations, model: onnx.ModelProto, most_unknown: int, **dims: int) -> None:
    direct = inferred(model, dims)
    lifetimes = {lifetime.name: lifetime.nbytes for lifetime in activations.lifetimes(**dims)}
    known = {name: nbytes for name, nbytes in lifetimes.items() if name in direct}
    assert known == {name: direct[name] for name in known}
    assert len(lifetimes) - len(known) <= most_unknown
    constants = {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    made = {name for _, names in activations.steps for name in names} - {out.name for out in model.graph.output}
    assert len(made - set(lifetimes) - constants) <= most_unknown
    assert len(lifetimes) > 40


@pytest.mark.parametrize(("batch", "step", "visual"), [(3, 7, 5), (1, 1, 0), (8, 64, 512)])
def test_activations_of_the_decoder(batch: int, step: int, visual: int) -> None:
    decoder = build_decoder(specs()[0], GateSpec("rg10", 512), EvictionConfig(Policy.GLOBAL, 24), Precision.FP16)
    gates = [(DOMAIN, GATE_FUNCTIONS["rg10"]), (DOMAIN, LOG_SIGMOID)]
    activations = graph_activations(decoder.model, gates, skip=[out.name for out in decoder.model.graph.output])
    assert set(activations.dims) == {"batch", "step", "visual"}
    body = onnx.inliner.inline_selected_functions(decoder.model, gates, exclude=False)
    # Inference does not know how long a Range is, here the rows' numbers; with one row, nor what they then select.
    check_sizes(activations, body, 4 if batch == 1 else 1, batch=batch, step=step, visual=visual)


@pytest.mark.parametrize(("frames", "patches"), [(3, 28), (1, 4096), (7, 4)])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_activations_of_the_vision_tower(frames: int, patches: int, precision: Precision) -> None:
    tower = build_vision(replace(specs()[1], depth=6, deepstack_visual_indexes=(1, 2, 4)), precision).model
    activations = graph_activations(tower, multiple_of={"patches": 4})
    check_sizes(activations, tower, 0, frames=frames, patches=patches)


@pytest.mark.parametrize("patches", [64, 1024])
def test_scratch_lives_for_its_step_alone(patches: int) -> None:
    """Attention's own memory: as often as there are layers, three times its output, at one step each."""
    spec = replace(specs()[1], depth=2, deepstack_visual_indexes=())
    tower = build_vision(spec, Precision.FP32).model
    with_scratch = graph_activations(tower, multiple_of={"patches": 4}, scratch={"MultiHeadAttention": 3})
    without = graph_activations(tower, multiple_of={"patches": 4}).lifetimes(frames=2, patches=patches)
    added = [tensor for tensor in with_scratch.lifetimes(frames=2, patches=patches) if tensor not in without]
    assert [tensor.nbytes for tensor in added] == [3 * 2 * patches * spec.hidden_size * 4] * 2
    assert all(tensor.first == tensor.last for tensor in added)


def test_the_towers_attention_counts_on_the_cpu() -> None:
    """Of 4,096 patches of 1,024 numbers. In fp32 the MLP takes more, in fp16 the casts around attention do."""
    output = 4096 * 1024 * 2
    found = {
        (precision, where): planned("qwen3-vl-4b", precision=precision, device=where).workload.peaks["vision"]
        for precision in (Precision.FP32, Precision.FP16)
        for where in (None, "h100")
    }
    assert found[Precision.FP32, None] == found[Precision.FP32, "h100"]
    assert found[Precision.FP16, "h100"].nbytes < found[Precision.FP16, None].nbytes
    largest = found[Precision.FP16, None].tensors[0]
    assert (largest.name.endswith(".scratch"), largest.nbytes) == (True, 13 * output)


def test_activations_do_not_depend_on_the_budget() -> None:
    """So one graph serves every budget, and the plan's is built for the smallest."""
    found = []
    for budget in (1, 700):
        eviction = EvictionConfig(Policy.GLOBAL, budget)
        decoder = build_decoder(specs()[0], GateSpec("rg10", 512), eviction, Precision.FP16).model
        skip = [out.name for out in decoder.graph.output]
        activations = graph_activations(decoder, [(DOMAIN, GATE_FUNCTIONS["rg10"]), (DOMAIN, LOG_SIGMOID)], skip)
        found.append(activations.lifetimes(batch=2, step=9, visual=4))
    assert found[0] == found[1]
