import importlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import Cli, Result, make_checkpoint

from trimkv_export.checkpoint import ALIASES
from trimkv_export.config import PlanOptions, Precision
from trimkv_export.package import Package
from trimkv_export.plan import device
from trimkv_export.plan.planner import plan_model
from trimkv_export.policy import plan_slab

L4 = device("l4")


def build_arguments(checkpoint: Path, *more: str | Path) -> list[str | Path]:
    return ["build", "--model", checkpoint / "base", "--gates", checkpoint / "gates", "--budget", "8", *more]


def test_json_report(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    done = cli(*build_arguments(checkpoint, "--output", tmp_path / "package", "--json"))
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    config = Package.open(tmp_path / "package").config
    assert report["package"] == str(tmp_path / "package")
    assert report["weight_bytes"] == config.weight_bytes
    assert report["cache_bytes"] == plan_slab(config.cache).nbytes
    assert report["full_cache_bytes"] == config.cache.full_cache_nbytes(131072)
    assert report["package_bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "package").iterdir() if file.name != "config.json"
    )
    assert report["eviction"] == {
        "policy": "global", "budget": 8, "evict_every": 32, "min_tokens_per_head": 0, "lookahead_steps": 1
    }  # fmt: skip


def test_every_option_arrives(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "evict-every": 5, "prefill-chunk": 17, "precision": "fp16", "policy": "global", "min-tokens-per-head": 2,
        "lookahead-steps": 3, "weights": "link", "output": tmp_path / "package",
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert cli(*build_arguments(checkpoint, *flags)).code == 0
    config = Package.open(tmp_path / "package").config
    eviction = config.eviction
    assert (eviction.policy, eviction.budget, eviction.evict_every) == ("global", 8, 5)
    assert (eviction.min_tokens_per_head, eviction.lookahead_steps) == (2, 3)
    assert (config.prefill_chunk, config.precision) == (17, "fp16")


def test_calibration(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    text, package = tmp_path / "text.txt", tmp_path / "package"
    text.write_text("Which errors count, and which do not? " * 20)
    options = ("--precision", "int8", "--head", "float", "--calibrate", text, "--output", package, "--json")
    wide = make_checkpoint(tmp_path / "checkpoint", hidden=32, intermediate=64)
    done = cli(*build_arguments(wide, *options))
    assert (done.code, done.err) == (0, "")
    method = json.loads(done.out)["quantization_method"]
    assert (method["name"], method["text_tokens"]) == ("awq", 760)
    shown = cli("inspect", package)
    assert shown.code == 0
    assert f"awq, calibrated on 760 tokens of a text of sha256 {method['text_sha256'][:12]}" in shown.out
    done = cli(*build_arguments(checkpoint, "--calibrate", text, "--output", tmp_path / "other"))
    assert done.code == 2
    assert f"calibrate {text} is for --precision int4 and int8; fp32 rounds no weights" in done.err


@pytest.mark.parametrize(("weights", "links"), [("link", 2), ("copy", 1)])
def test_linked_weights(cli: Cli, tmp_path: Path, weights: str, links: int) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    output = tmp_path / "package"
    done = cli(*build_arguments(checkpoint, "--precision", "bf16", "--weights", weights, "--output", output))
    assert done.code == 0
    assert (output / "model.safetensors").stat().st_nlink == links


def test_text_report_and_default_name(
    cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(*build_arguments(checkpoint))
    assert (done.code, done.err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["base-m8"]
    assert "Built base-m8" in done.out
    assert "trimkv-export run base-m8 --prompt TEXT" in done.out
    assert "qwen3, rg10 gates, fp32" in done.out
    again = cli(*build_arguments(checkpoint))
    assert again.code == 7
    assert "pass --overwrite" in again.err
    assert cli(*build_arguments(checkpoint, "--overwrite")).code == 0


@pytest.mark.parametrize("gate", ["rg", "rg10"])
def test_the_policy_follows_the_gates(cli: Cli, tmp_path: Path, gate: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", gate=gate)
    done = cli(*build_arguments(checkpoint, "--output", tmp_path / "package", "--json"))
    assert json.loads(done.out)["eviction"]["policy"] == {"rg": "per_head", "rg10": "global"}[gate]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "0"], "budget must be a whole number from 1 to 1048576, got 0"),
        (["--budget", "many"], "budget must be a whole number from 1 to 1048576, got 'many'"),
        (["--policy", "threshold"], "policy 'threshold' .* memory has no bound"),
        (["--policy", "best"], "policy must be one of global, per_head, got 'best'"),
        (["--evict-every", "0"], "evict-every must be"),
        (["--prefill-chunk", "0"], "prefill-chunk must be"),
        (["--lookahead-steps", "0"], "lookahead-steps must be"),
        (["--min-tokens-per-head", "9"], "min-tokens-per-head must not exceed the budget"),
        (["--min-tokens-per-head", "2", "--policy", "per_head"], "applies to the global policy only"),
        (["--precision", "int3"], "precision must be one of fp32, fp16, bf16, int4, int8, got 'int3'"),
        (["--weights", "move"], "weights must be one of copy, link, got 'move'"),
        (["--revision", "main"], "revision 'main' needs a hub id"),
        (["--no-such-option"], "there is no option '--no-such-option'"),
    ],
)
def test_bad_options(cli: Cli, checkpoint: Path, tmp_path: Path, options: list[str], said: str) -> None:
    done = cli(*build_arguments(checkpoint, "--output", tmp_path / "package", *options))
    assert done.code == 2
    assert done.out == ""
    assert re.search(said, done.err)
    assert not list(tmp_path.iterdir())


def test_minimum_per_head_with_gates_of_the_other_policy(cli: Cli, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", gate="rg")
    done = cli(*build_arguments(checkpoint, "--min-tokens-per-head", "2", "--output", tmp_path / "package"))
    assert done.code == 2
    assert "applies to the global policy only" in done.err


def tiny_device(monkeypatch: pytest.MonkeyPatch, memory_bytes: int) -> None:
    """Let there be one device, `tiny` or `tiny-board`, that takes nothing for itself."""
    tiny = replace(L4, name="tiny", aliases=("tiny-board",), memory_bytes=memory_bytes, reserve_bytes=0)
    # By its full name: in the package it is hidden by the function of the same name.
    monkeypatch.setattr(importlib.import_module("trimkv_export.plan.devices"), "devices", lambda: (tiny,))


def total_bytes(checkpoint: Path, **changes: Any) -> int:
    """Of the plan for any device with a GPU, less what that one takes for itself."""
    values: dict[str, Any] = {"budget": 8, "device": "l4"} | changes
    plan = plan_model(PlanOptions(str(checkpoint / "base"), gates=str(checkpoint / "gates"), **values)).plan
    return plan.total_bytes - plan.reserve_bytes


def test_a_device_that_it_fits(cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = total_bytes(checkpoint, max_batch=3, context=100)
    tiny_device(monkeypatch, need)
    output = tmp_path / "package"
    arguments = ("--device", "Tiny Board", "--max-batch", "3", "--context", "100", "--output", output)
    done = cli(*build_arguments(checkpoint, *arguments, "--json"))
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["device"] == Package.open(output).config.device == "tiny"
    plan = json.loads((output / "memory_plan.json").read_text())["device_plan"]
    assert (plan["device"], plan["batch"], plan["full_cache_context"]) == ("tiny", 3, 100)
    assert (plan["total_bytes"], plan["headroom_bytes"], plan["max_sequences"]) == (need, 0, 3)
    assert "fits tiny" in cli(*build_arguments(checkpoint, *arguments, "--overwrite")).out
    assert "held to the plan for tiny" in cli("inspect", output).out


def test_without_a_device_none_is_recorded(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    assert cli(*build_arguments(checkpoint, "--output", tmp_path / "package")).code == 0
    assert Package.open(tmp_path / "package").config.device is None
    assert json.loads((tmp_path / "package" / "memory_plan.json").read_text())["device_plan"] is None


def test_what_does_not_fit_is_refused_before_weights_are_looked_for(
    cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("base", "gates"):
        (tmp_path / part).mkdir()
        shutil.copy(checkpoint / part / "config.json", tmp_path / part)
    tiny_device(monkeypatch, total_bytes(checkpoint, budget=500))
    output = tmp_path / "package"

    def build(*more: str) -> Result:
        return cli(*build_arguments(tmp_path, "--device", "tiny", "--output", output, *more))

    refused = build("--budget", "600")
    assert refused.code == 11
    assert re.search(r"does not fit tiny: fp32, budget 600 and batch 1 take [\d,]+ bytes of [\d,]+", refused.err)
    found = re.search(r"What would fit: --budget 5\d\d or less; or .*", refused.err)
    assert found
    assert "--precision fp16" in found[0]
    budget = int(re.findall(r"--budget (\d+)", refused.err)[0])
    assert build("--budget", str(budget + 1)).code == 11
    assert build("--budget", str(budget)).code == 3  # it fits, and there are no weights
    sequences = re.findall(r"--max-batch (\d+) or less", build("--budget", "8", "--max-batch", "900").err)[0]
    assert build("--budget", "8", "--max-batch", str(int(sequences) + 1)).code == 11
    assert build("--budget", "8", "--max-batch", sequences).code == 3
    assert not output.exists()


def test_not_even_the_weights_fit(cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, gates = str(checkpoint / "base"), str(checkpoint / "gates")
    options = PlanOptions(model=base, gates=gates, budget=8, device="l4", precision=Precision.FP16)
    weights = plan_model(options).plan.weight_bytes
    tiny_device(monkeypatch, weights - 1)
    done = cli(*build_arguments(checkpoint, "--device", "tiny", "--output", tmp_path / "package"))
    assert done.code == 11
    assert re.search(r"Its weights alone do not: with the reserve they take [\d,]+ bytes\. What would fit: ", done.err)
    assert "--budget" not in done.err.partition("What would fit")[2]
    tiny_device(monkeypatch, weights)
    arguments = ("--device", "tiny", "--precision", "fp16", "--output", tmp_path / "package")
    done = cli(*build_arguments(checkpoint, *arguments))
    assert done.code == 11
    assert "weights alone" not in done.err
    assert "What would fit: --device " in done.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "l44"], "there is no device 'l44'; did you mean 'l4'"),
        (["--device", "cpu", "--precision", "bf16"], "bf16 does not run on .* CPU provider; take --precision fp32 or"),
        (["--max-batch", "2"], "max-batch 2 is for the plan of a device: name one with --device"),
        (["--device", "l4", "--max-batch", "0"], "max-batch must be a whole number from 1 to 65536, got 0"),
        (["--recipe", "none.yaml"], r"none.yaml: cannot be read"),
    ],
)
def test_bad_devices(cli: Cli, checkpoint: Path, tmp_path: Path, options: list[str], said: str) -> None:
    done = cli(*build_arguments(checkpoint, "--output", tmp_path / "package", *options))
    assert done.code == 2
    assert re.search(said, done.err)
    assert not list(tmp_path.iterdir())


def test_recipe_and_what_is_given_beside_it(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {checkpoint / 'base'}\ngates: {checkpoint / 'gates'}\nbudget: 9\nprecision: fp16\ndevice: l4\n"
        "evict_every: 5\nprefill_chunk: 17\nmax_batch: 4\ncontext: 77\n"
    )

    def build(name: str, *more: str | Path) -> Package:
        done = cli("build", "--recipe", recipe, "--output", tmp_path / name, *more)
        assert (done.code, done.err) == (0, "")
        return Package.open(tmp_path / name)

    config = build("as-it-is").config
    assert (config.eviction.budget, config.eviction.evict_every, config.prefill_chunk) == (9, 5, 17)
    assert (config.precision, config.device) == ("fp16", "l4")
    plan = json.loads((tmp_path / "as-it-is" / "memory_plan.json").read_text())["device_plan"]
    assert (plan["batch"], plan["full_cache_context"]) == (4, 77)
    # Also where what is given is the default.
    config = build("changed", "--evict-every", "32", "--budget", "8", "--device", "h100").config
    assert (config.eviction.budget, config.eviction.evict_every, config.prefill_chunk) == (8, 32, 17)
    assert (config.precision, config.device) == ("fp16", "h100")
    # The recipe's gates are not for another model.
    other = cli("build", "--recipe", recipe, "--model", checkpoint / "base", "--output", tmp_path / "other")
    assert other.code == 3
    assert "name the gates of this backbone with --gates" in other.err


def test_neither_model_nor_recipe(cli: Cli, tmp_path: Path) -> None:
    for arguments, missing in ((["--budget", "8"], "model"), (["--model", "qwen3-4b"], "budget")):
        done = cli("build", "--output", tmp_path / "package", *arguments)
        assert done.code == 2
        assert f"there is no {missing}: give --{missing}, or a --recipe that says it" in done.err


def test_recipes_by_name(cli: Cli, tmp_path: Path) -> None:
    done = cli("build", "--recipe", "qwen3-8b-l4", "--device", "orin-nano-4gb", "--output", tmp_path / "package")
    assert done.code == 11
    assert "qwen3-8b does not fit orin-nano-4gb: bf16, budget 512 and batch 8 take " in done.err
    done = cli("build", "--recipe", "qwen3-8b-l44", "--output", tmp_path / "package")
    assert done.code == 2
    assert done.err.startswith("error: there is no recipe 'qwen3-8b-l44'; did you mean 'qwen3-8b-l4'")


def test_recipes_with_every_kind_of_option(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {checkpoint / 'base'}\ngates: {checkpoint / 'gates'}\nbudget: 9\nprecision: bf16\ndevice: l4\n"
        "policy: global\nmin_tokens_per_head: 2\nlookahead_steps: 3\nweights: link\ntarget: onnxruntime\n"
    )
    done = cli("build", "--recipe", recipe, "--output", tmp_path / "package", "--lookahead-steps", "4")
    assert (done.code, done.err) == (0, "")
    eviction = Package.open(tmp_path / "package").config.eviction
    assert (eviction.min_tokens_per_head, eviction.lookahead_steps) == (2, 4)
    assert (tmp_path / "package" / "model.safetensors").stat().st_nlink == 2


@pytest.mark.parametrize("command", ["build", "plan"])
def test_list_models(cli: Cli, command: str) -> None:
    done = cli(command, "--list-models")
    assert (done.code, done.err) == (0, "")
    assert all(re.search(rf"^{re.escape(name)} ", done.out, re.MULTILINE) for name in ALIASES)
    done = cli(command, "--list-models", "--json")
    assert (done.code, done.err) == (0, "")
    models = json.loads(done.out)["models"]
    assert {each["name"]: (each["backbone"], each["gates"]) for each in models} == {
        alias.name: (alias.backbone, alias.gates) for alias in ALIASES.values()
    }
