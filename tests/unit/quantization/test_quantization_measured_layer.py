"""One layer by itself, for calibration; test_quantization_calibration.py tests what it computes."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from trimkv_export.models import DecoderSpec, decoder_spec
from trimkv_export.quantization.measured_layer import measured_layer


@pytest.fixture
def spec(checkpoint: Path) -> DecoderSpec:
    return decoder_spec(json.loads((checkpoint / "base" / "config.json").read_text()), checkpoint)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sees", [False, True])
def test_weights_of_one_layer_are_inputs(spec: DecoderSpec, fused: bool, sees: bool) -> None:
    spec = replace(spec, fused_projections=fused, takes_visual_inputs=sees, deepstack_layers=2 * sees, qkv_bias=True)
    found = measured_layer(spec)
    onnx.checker.check_model(found.model, full_check=True)
    own = [name for name in spec.tensors() if name.startswith(spec.layer(0))]
    assert sorted(found.weights) == sorted(own)
    names = [value.name for value in found.model.graph.input]
    assert names == [found.hidden, "input_ids", "position_ids", "step_tokens", *found.weights]
    first = ("self_attn.qkv_proj", "mlp.gate_up_proj") if fused else ("self_attn.q_proj", "mlp.gate_proj")
    expected = [first[0], "self_attn.o_proj", first[1], "mlp.down_proj"]
    assert found.matrices == [f"{spec.layer(0)}.{module}.weight" for module in expected]
    assert len(found.model.graph.output) == 1 + len(expected)
