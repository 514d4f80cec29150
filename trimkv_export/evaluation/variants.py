"""A package under another policy, or with a larger budget: the same weights with another decoder.onnx."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from trimkv_export.config import EvictionConfig, Policy
from trimkv_export.engine.package import CONFIG, DECODER, PLAN, Package, PackageConfig, hash_file
from trimkv_export.errors import OutputError
from trimkv_export.evaluation.policies import RANDOM_LOOKAHEAD, EvaluatedPolicy, log_betas
from trimkv_export.graph.functions import pool_update_function
from trimkv_export.graph.ops import DOMAIN, POOL_UPDATE, PoolUpdateAttributes
from trimkv_export.policy import CacheSpec

__all__ = ["open_variant", "variant_eviction"]


def variant_eviction(eviction: EvictionConfig, policy: EvaluatedPolicy, budget: int) -> EvictionConfig:
    """The eviction settings of a package under another policy.

    What a policy has no use for is left out: a minimum where each head keeps as much as the others, and the package's
    lookahead where its gates do not decide.

    Raises OptionError when the budget is below the minimum per head.
    """
    if policy in (EvaluatedPolicy.GLOBAL, EvaluatedPolicy.PER_HEAD):
        minimum = eviction.min_tokens_per_head if policy is EvaluatedPolicy.GLOBAL else 0
        return replace(eviction, policy=Policy(policy), budget=budget, min_tokens_per_head=minimum)
    if policy is EvaluatedPolicy.FULL:
        return replace(eviction, budget=budget)
    lookahead = RANDOM_LOOKAHEAD if policy is EvaluatedPolicy.RANDOM else 1
    return EvictionConfig(Policy.PER_HEAD, budget, eviction.evict_every, lookahead_steps=lookahead)


@contextlib.contextmanager
def open_variant(
    package: Package, policy: EvaluatedPolicy, budget: int, positions: int, seed: int = 0
) -> Iterator[Path]:
    """A folder with the package under `policy`, for budgets up to `budget`; gone afterwards.

    positions: the most tokens of a session, for policies that go by position. seed: of the random policy.

    It lies beside the package, whose other files are hard links there; where that cannot be, it is a copy in the
    system's folder for temporary files. If the package is as asked, the folder is its own.

    Raises OptionError as `variant_eviction`, OutputError when the folder cannot be written.
    """
    eviction = variant_eviction(package.config.eviction, policy, budget)
    cache = package.config.cache
    table = log_betas(policy, cache.num_streams, positions, seed)
    if table is None and eviction == replace(package.config.eviction, budget=budget) and budget <= cache.budget:
        yield package.path
        return
    # Hashes of memory_plan.json would be right, its numbers not.
    others = {name: entry for name, entry in package.config.files.items() if name not in (DECODER, PLAN)}
    with _folder_beside(package.path) as folder:
        try:
            config = replace(package.config, eviction=eviction, files=others)
            (folder / DECODER).write_bytes(_decoder(package.path / DECODER, config, table))
            size, digest = (folder / DECODER).stat().st_size, hash_file(folder / DECODER)
            config = replace(config, files=others | {DECODER: {"bytes": size, "sha256": digest}})
            for name in others:
                _link(package.path / name, folder / name)
            (folder / CONFIG).write_bytes(config.dump())
        except OSError as error:
            raise OutputError(
                f"{folder}: the package cannot be written with the policy {policy}: {error.strerror or error}"
            ) from None
        yield folder


@contextlib.contextmanager
def _folder_beside(package: Path) -> Iterator[Path]:
    package = package.resolve()
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{package.name}.eval-", dir=package.parent)
    except OSError:
        folder = tempfile.TemporaryDirectory(prefix="trimkv-eval-")
    with folder as path:
        yield Path(path)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _decoder(file: Path, config: PackageConfig, table: NDArray[np.float32] | None) -> bytes:
    """The package's decoder graph with the eviction of `config` and, where there is a table, its log-retentions."""
    model = onnx.load(str(file), load_external_data=False)
    onnx.helper.set_model_props(model, config.graph_metadata())
    _resize_state(model.graph, config.cache)
    attributes = PoolUpdateAttributes(config.model.num_layers, config.model.num_kv_heads, config.eviction)
    (body,) = (body for body in model.functions if (body.domain, body.name) == (DOMAIN, POOL_UPDATE))
    body.CopyFrom(pool_update_function(attributes))
    (update,) = (node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, POOL_UPDATE))
    del update.attribute[:]
    update.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.as_dict().items())
    if table is not None:
        tables = table.reshape(config.model.num_layers, config.model.num_kv_heads, -1)
        nodes = _look_up(model.graph, tables, by_axis=config.model.rope.axes is not None)
        del update.input[-len(tables) :]
        update.input.extend(node.output[0] for node in nodes[-len(tables) :])
        # Before what reads them.
        following = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*nodes, *following])
    return bytes(model.SerializeToString(deterministic=True))


def _resize_state(graph: onnx.GraphProto, cache: CacheSpec) -> None:
    shapes = {tensor.name: tensor.shape for tensor in cache.tensors()}
    for value in (*graph.input, *graph.output):
        name = value.name.removeprefix("past.").removeprefix("present.")
        if name in shapes:
            for dim, size in zip(value.type.tensor_type.shape.dim[1:], shapes[name][1:], strict=True):
                dim.dim_value = size


def _look_up(graph: onnx.GraphProto, tables: NDArray[np.float32], *, by_axis: bool) -> list[onnx.NodeProto]:
    """Nodes, the last L one for each layer, that read tables [L, H, positions] at the step's positions: [B, S, H] each.

    by_axis: whether positions have three axes, all the same for text.
    """
    position, nodes = "position_ids", []
    if by_axis:
        position, first = "eval.position", "eval.first_axis"
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), first))
        nodes.append(onnx.helper.make_node("Gather", ["position_ids", first], [position], name=position, axis=0))
    for layer, table in enumerate(tables):
        stored, found = f"eval.log_beta_table_{layer}", f"eval.log_beta_{layer}"
        graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(table.T), stored))
        nodes.append(onnx.helper.make_node("Gather", [stored, position], [found], name=found, axis=0))
    return nodes
