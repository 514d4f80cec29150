"""check_engine accepts good packages of every kind, and finds an engine that computes something else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support import build, copy_package, make_checkpoint, seal

from trimkv_export.config import EvictionConfig, Policy
from trimkv_export.graph.functions import pool_update_function
from trimkv_export.graph.ops import PoolUpdateAttributes
from trimkv_export.runtime import Engine
from trimkv_export.verify import check_engine

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rg10": ({}, {}),
    "rg_untied": ({"gate": "rg", "tie": False}, {}),
    "fp16": ({}, {"precision": "fp16"}),
    "minimum": ({}, {"min_tokens_per_head": 3}),
    "lookahead": ({}, {"lookahead_steps": 6}),
    "per_head": ({}, {"policy": "per_head", "evict_every": 1}),
    "large_budget": ({}, {"budget": 40, "prefill_chunk": 100}),
    "single_steps": ({}, {"prefill_chunk": 1}),
    "one_kv_head": ({"kv_heads": 1}, {"budget": 1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_good_packages_pass(variant: str, tmp_path: Path) -> None:
    sizes, options = VARIANTS[variant]
    path = build(make_checkpoint(tmp_path / "checkpoint", **sizes), tmp_path / "package", **options).path
    with Engine.open(path, threads=1) as engine:
        report = check_engine(engine)
        again = check_engine(engine, seed=1)
    assert report.passed
    assert again.passed
    assert report.evictions >= 3
    assert report.as_dict()["passed"] is True
    if variant != "fp16":
        assert (report.kept_mismatches, report.near_ties) == (0, 0)
        assert report.max_logit_difference < 1e-5


Edit = Callable[[onnx.ModelProto], None]


def attribute(name: str, value: Any) -> Edit:
    """Change an attribute of PoolUpdate alone; config.json still says the old value."""

    def edit(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "PoolUpdate")
        old = next(a for a in node.attribute if a.name == name)
        old.CopyFrom(onnx.helper.make_attribute(name, value))

    return edit


def scale(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "PoolAttention":
            next(a for a in node.attribute if a.name == "scale").f *= 1.05


def other_linear(model: onnx.ModelProto) -> None:
    nodes = {node.name: node for node in model.graph.node}
    nodes["model.layers.1.mlp.gate_proj"].input[1] = "model.layers.0.mlp.gate_proj.weight"


def no_gate_bias(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "RetentionGate10":
            node.input[6] = "model.layers.0.self_attn.retention_gate.bias"


def swap_policy(model: onnx.ModelProto) -> None:
    """The body of the other policy, as a build with --policy per_head has it."""
    body = pool_update_function(PoolUpdateAttributes(3, 2, EvictionConfig(Policy.PER_HEAD, 8, 4)))
    next(function for function in model.functions if function.name == "PoolUpdate").CopyFrom(body)


@pytest.mark.parametrize("edit", [attribute("evict_every", 3), scale, other_linear, no_gate_bias, swap_policy])
def test_a_graph_that_computes_something_else(package: Path, tmp_path: Path, edit: Edit) -> None:
    bad = copy_package(package, tmp_path / "bad")
    model = onnx.load(str(bad / "decoder.onnx"), load_external_data=False)
    edit(model)
    (bad / "decoder.onnx").write_bytes(model.SerializeToString())
    seal(bad)
    with Engine.open(bad, native="off", threads=1) as engine:
        report = check_engine(engine)
    assert not report.passed
    assert report.as_dict()["passed"] is False
    assert report.kept_mismatches or report.max_logit_difference > report.tolerance


def test_logits_that_are_not_finite(package: Path, tmp_path: Path) -> None:
    bad = copy_package(package, tmp_path / "bad")
    data = np.fromfile(bad / "decoder.onnx.data", np.float32)
    data[:] = np.inf
    data.tofile(bad / "decoder.onnx.data")
    seal(bad)
    with Engine.open(bad, threads=1) as engine, np.errstate(all="ignore"):
        assert not check_engine(engine).passed
