import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import Cli

from trimkv_export.build.recipe import read_recipe
from trimkv_export.config import MAX_COUNT, PlanOptions, Precision
from trimkv_export.errors import OptionError
from trimkv_export.plan import device, devices, plan_memory
from trimkv_export.plan.fit import solve, would_fit
from trimkv_export.plan.planner import plan_model

# docs/design.md, section 8.
KEYS = {
    "weight_bytes", "cache_bytes", "activation_bytes", "vision_bytes", "reserve_bytes", "total_bytes", "device_bytes",
    "fits", "max_sequences", "max_budget", "full_cache_bytes",
}  # fmt: skip
FP16 = ("--precision", "fp16")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables without folded lines."""
    monkeypatch.setenv("COLUMNS", "300")


def options(**changes: Any) -> PlanOptions:
    values: dict[str, Any] = {"model": "qwen3-1.7b", "budget": 256, "precision": Precision.FP16, "device": "l4"}
    return PlanOptions(**values | changes)


def changed(asked: PlanOptions, **changes: Any) -> PlanOptions:
    return replace(asked, **changes)


def test_json_is_the_plan(cli: Cli) -> None:
    done = cli("plan", "--model", "qwen3-1.7b", "--budget", "256", "--device", "L4", *FP16, "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert set(report) >= KEYS
    assert report == json.loads(json.dumps(plan_model(options(device="L4")).as_dict()))
    assert report["device_bytes"] == device("l4").memory_bytes
    assert report["fits"] is True


def test_every_option_arrives(cli: Cli, checkpoint: Path) -> None:
    values: dict[str, Any] = {
        "model": str(checkpoint / "base"), "gates": str(checkpoint / "gates"), "budget": 8, "device": "orin-nano-8gb",
        "precision": "fp16", "max_batch": 3, "prefill_chunk": 17, "context": 999, "evict_every": 5,
        "max_image_tokens": 40, "policy": "per_head",
    }  # fmt: skip
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = cli("plan", *flags, "--json")
    assert (done.code, done.err) == (0, "")
    expected = plan_model(PlanOptions(**values)).as_dict()
    assert json.loads(done.out) == json.loads(json.dumps(expected))
    assert expected["full_cache_context"] == 999


def test_the_table(cli: Cli) -> None:
    done = cli("plan", "--model", "qwen3-vl-4b", "--budget", "256", "--device", "orin-nx-16gb", *FP16)
    assert (done.code, done.err) == (0, "")
    names = [
        "weights", "cache", "activations", "vision tower", "inputs, outputs", "reserve", "total", "device memory",
        "headroom", "fits", "sequences", "largest budget", "decode speed", "full cache", "full cache fits",
    ]  # fmt: skip
    assert re.findall(r"^(\w[\w ,]*?)  +", done.out, re.MULTILINE) == names
    assert re.search(r"^cache +43\.4 MB: 1 sequence of 256 entries for 288 heads", done.out, re.MULTILINE)
    assert re.search(r"^fits +yes *$", done.out, re.MULTILINE)


def test_without_a_device_or_a_tower(cli: Cli) -> None:
    done = cli("plan", "--model", "qwen3-1.7b", "--budget", "256")
    assert (done.code, done.err) == (0, "")
    for absent in ("vision tower", "headroom", "fits", "decode speed"):
        assert f"\n{absent} " not in done.out
    assert "add --device to compare with one" in done.out


def test_the_target_decides_what_is_quantised(cli: Cli) -> None:
    """For TensorRT the embedding, 151,936 rows of 2,048, stays in fp16, and the head in int8 has one scale a row."""
    asked = ("plan", "--model", "qwen3-1.7b", "--budget", "64", "--device", "orin-nano-8gb", "--precision", "int4",
             "--block-size", "128", "--json", "--target")  # fmt: skip
    ours, theirs = (json.loads(cli(*asked, target).out) for target in ("tensorrt", "onnxruntime"))
    assert ours["weight_bytes"] - theirs["weight_bytes"] == 151936 * (2048 * 2 - (2048 // 128 - 1) * 2)
    assert ours["parameters"] == theirs["parameters"]
    for kind in ("prefill", "decode"):
        more = theirs["peaks"][kind]["bytes"] - ours["peaks"][kind]["bytes"]
        assert 0 <= more < 2048 * 2048 * 2  # there q, k and v are made together; no matrix in float


def test_a_refusal_says_what_tensorrt_takes(cli: Cli) -> None:
    asked = ("--model", "qwen3-8b", "--budget", "512", "--device", "orin-nx-16gb", "--target", "tensorrt", *FP16)
    said = json.loads(cli("plan", *asked, "--json").out)["would_fit"]
    assert "--precision int4 --block-size 128" in said
    done = cli("plan", *asked[:-2], "--precision", "int4")
    assert done.code == 2
    assert "int4 with blocks of 32, without zero points, does not run on TensorRT" in done.err


def test_a_refusal_says_what_would_fit(cli: Cli) -> None:
    asked = ("--model", "qwen3-1.7b", "--budget", "60000", "--device", "orin-nano-8gb", "--max-batch", "2", *FP16)
    done = cli("plan", *asked, "--context", "20000")
    assert (done.code, done.err) == (11, "")
    said = re.search(r"^fits +no, ([\d.]+ GB) too much\. What would fit: (.+?) *$", done.out, re.MULTILINE)
    assert said is not None
    budgets = re.fullmatch(
        r"--budget (\d+) or less; or --precision int4 with --budget (\d+) or less; or --device agx-orin-32gb", said[2]
    )
    assert budgets is not None
    assert int(budgets[2]) > int(budgets[1])
    assert re.search(r"^headroom +-" + re.escape(said[1]), done.out, re.MULTILINE)
    done = cli("plan", *asked, "--json")
    assert (done.code, done.err) == (11, "")
    report = json.loads(done.out)
    assert report["fits"] is False
    assert said[2] == "; or ".join(report["would_fit"])


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "orin-nano-8gb", "precision": Precision.FP32},
        {"device": "orin-nano-4gb", "budget": 2000, "max_batch": 4},
        {"device": "orin-nano-8gb", "precision": Precision.FP32, "budget": 60000},
        {"device": "orin-nano-8gb", "max_batch": 60000},
        {"model": "qwen3-vl-4b", "device": "orin-nano-8gb"},
        {"device": "orin-nano-8gb", "prefill_chunk": 60000},
        {"model": "qwen3-vl-4b", "device": "orin-nx-16gb", "max_image_tokens": 60000},
    ],
)
def test_each_change_makes_it_fit(changes: dict[str, Any]) -> None:
    refused = options(**changes)
    found = plan_model(refused)
    assert found.plan.fits is False
    said = would_fit(found)
    assert said
    for change in said:
        values: dict[str, Any] = {
            flag.replace("-", "_"): int(value) if value.isdecimal() else value
            for flag, value in re.findall(r"--(\S+) (\S+)", change)
        }
        assert plan_model(changed(refused, **values)).plan.fits is True
        # A number is the largest.
        more = {name: value + 1 if isinstance(value, int) else value for name, value in values.items()}
        assert more == values or plan_model(changed(refused, **more)).plan.fits is False
    assert any("--max-image-tokens" in change for change in said) == ("max_image_tokens" in changes)
    assert would_fit(plan_model(options())) == []


@pytest.mark.parametrize("unknown", ["budget", "batch"])
@pytest.mark.parametrize("name", ["l4", "orin-nano-8gb"])
def test_solutions_are_exact(unknown: Any, name: str) -> None:
    solution, found = solve(options(device=name, max_batch=3, prefill_chunk=100), unknown)
    value, work, memory = solution.value, found.workload.work, device(name).memory_bytes
    assert value > 1
    assert value == (found.plan.budget if unknown == "budget" else found.plan.batch)
    assert found.plan.fits is True
    assert memory is not None
    # By the plan's own arithmetic, and by a plan made anew.
    more = replace(work, cache=replace(work.cache, budget=value + 1))
    if unknown == "batch":
        more = replace(work, batch=value + 1)
    assert plan_memory(work).total_bytes <= memory < plan_memory(more).total_bytes == solution.one_more_bytes
    anew = changed(found.options, **{"budget" if unknown == "budget" else "max_batch": value + 1})
    assert plan_model(anew).plan.total_bytes == solution.one_more_bytes


def test_what_is_asked_for_does_not_change_its_solution() -> None:
    assert solve(options(budget=1), "budget")[0] == solve(options(budget=5000), "budget")[0]
    assert solve(options(max_batch=1), "batch")[0] == solve(options(max_batch=99), "batch")[0]


def test_solve_on_the_command_line(cli: Cli) -> None:
    done = cli("plan", "--model", "qwen3-1.7b", "--device", "l4", *FP16, "--solve", "budget")
    assert (done.code, done.err) == (0, "")
    said = re.search(
        r"^solved +the largest budget that fits is ([\d,]+); ([\d,]+) would take .* more than l4 has *$",
        done.out, re.MULTILINE,
    )  # fmt: skip
    assert said is not None
    value, more = (int(number.replace(",", "")) for number in said.groups())
    assert more == value + 1
    assert f"1 sequence of {value:,} entries" in done.out
    report = json.loads(
        cli("plan", "--model", "qwen3-1.7b", "--device", "l4", *FP16, "--solve", "budget", "--json").out
    )
    assert report["solved"]["value"] == value == report["max_budget"] == report["budget"]
    assert report["solved"]["one_more_fits"] is False
    assert report["solved"]["one_more_bytes"] > report["device_bytes"] >= report["total_bytes"]


def test_solve_at_its_ends(cli: Cli, checkpoint: Path) -> None:
    done = cli("plan", "--model", "qwen3-8b", "--device", "orin-nano-8gb", *FP16, "--solve", "budget")
    assert done.code == 11
    assert "no budget fits; the plan above is for a budget of 1" in done.out
    small = ("--model", checkpoint / "base", "--gates", checkpoint / "gates", "--budget", "1", "--prefill-chunk", "1")
    done = cli("plan", *small, "--device", "b200", *FP16, "--solve", "batch", "--json")
    report = json.loads(done.out)
    assert report["batch"] == MAX_COUNT
    assert report["solved"] == {"unknown": "batch", "value": MAX_COUNT, "one_more_bytes": None, "one_more_fits": None}


@pytest.mark.parametrize("more", [["--device", "l4"], ["--device", "orin-nano-4gb", "--budget", "40000"], []])
def test_plot(cli: Cli, tmp_path: Path, more: list[str]) -> None:
    picture = tmp_path / "plan.png"
    done = cli("plan", "--model", "qwen3-1.7b", "--budget", "256", *FP16, *more, "--plot", picture, "--json")
    assert (done.code, done.err) == (11 if "orin-nano-4gb" in more else 0, "")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads(done.out)["picture"] == str(picture)


def test_list_devices(cli: Cli) -> None:
    done = cli("plan", "--list-devices")
    assert (done.code, done.err) == (0, "")
    for profile in devices():
        assert re.search(rf"^{profile.name} +{re.escape(profile.title)}", done.out, re.MULTILINE)
    for arguments in (("--list-devices", "--json"), ("--json", "--list-devices")):
        done = cli("plan", *arguments)
        assert (done.code, done.err) == (0, "")
        listed = json.loads(done.out)["devices"]
        assert [each["name"] for each in listed] == [profile.name for profile in devices()]
        assert [each["memory_bytes"] for each in listed] == [profile.memory_bytes for profile in devices()]


@pytest.mark.parametrize(
    ("picture", "said"),
    [("no/plan.png", "there is no folder"), (".", "is a folder")],
)
def test_a_picture_that_cannot_be_written(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: str, said: str
) -> None:
    """It is refused before the work, which does not begin."""
    monkeypatch.setattr("trimkv_export.plan.planner.plan_model", None)
    done = cli("plan", "--model", "qwen3-1.7b", "--budget", "256", "--plot", tmp_path / picture)
    assert (done.code, done.out) == (7, "")
    assert said in done.err


def test_the_plan_of_a_recipe(cli: Cli) -> None:
    """As `build` and engines/README.md have it; what is given wins."""
    done = cli("plan", "--recipe", "qwen3-vl-4b-orin-nano-8gb", "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    recipe = read_recipe("qwen3-vl-4b-orin-nano-8gb")
    assert report == json.loads(json.dumps(plan_model(recipe.plan_options()).as_dict()))
    assert (report["batch"], report["device"], report["precision"]) == (2, "orin-nano-8gb", "int4")
    given = json.loads(cli("plan", "--recipe", "qwen3-vl-4b-orin-nano-8gb", "--max-batch", "1", "--json").out)
    assert (given["batch"], given["budget"]) == (1, report["budget"])
    assert given["total_bytes"] < report["total_bytes"]


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--device", "h10"], 2, "there is no device 'h10'; did you mean 'h100'"),
        (["--device", ""], 2, "device must be a text, got ''"),
        (["--budget", "0"], 2, "budget must be a whole number from 1 to 1048576, got 0"),
        (["--max-batch", "1000000000"], 2, "max-batch must be a whole number from 1 to 65536, got 1000000000"),
        (["--prefill-chunk", "0"], 2, "prefill-chunk must be"),
        (["--context", "0"], 2, "context must be"),
        (["--evict-every", "0"], 2, "evict-every must be"),
        (["--solve", "budget", "--device", "l4"], 2, "--solve budget finds the budget itself: leave out --budget 256"),
        (["--solve", "batch", "--max-batch", "2"], 2, "finds the batch itself: leave out --max-batch 2"),
        (["--solve", "batch"], 2, "--solve batch needs a device"),
        (["--solve", "chunk"], 2, "--solve: 'chunk' is not one of"),
        (["--policy", "threshold"], 2, "memory has no bound"),
        (["--revision", "main"], 2, "revision 'main' needs a hub id"),
        (["--model", "qwen3-vl4b"], 3, "did you mean 'qwen3-vl-4b'"),
        (["--precision", "bf16", "--device", "cpu"], 2, "bf16 does not run on ONNX Runtime's CPU provider"),
        (["--plot", "/no/such/folder/plan.png"], 7, "/no/such/folder/plan.png: cannot be written: there is no folder"),
    ],
)
def test_bad_input(cli: Cli, more: list[str], code: int, said: str) -> None:
    done = cli("plan", "--model", "qwen3-1.7b", "--budget", "256", *more)
    assert done.code == code
    assert done.out == ""
    assert said in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


def test_no_budget(cli: Cli) -> None:
    for more in ([], ["--solve", "batch", "--device", "l4"]):
        done = cli("plan", "--model", "qwen3-1.7b", *more)
        assert (done.code, done.out) == (2, "")
        assert "give --budget M" in done.err
    done = cli("plan", "--model", "qwen3-1.7b", "--solve", "budget")
    assert (done.code, done.out) == (2, "")
    assert "--solve budget needs a device" in done.err
    done = cli("plan", "--budget", "256")
    assert (done.code, done.out) == (2, "")
    assert "there is no model: give --model, or a --recipe that says it" in done.err
    with pytest.raises(OptionError, match="add --device NAME"):
        solve(options(device=None), "budget")


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        (None, 3, "has no config.json"),
        ({"architectures": ["ResNetForImageClassification"], "depths": [3, 4]}, 3, "has the model_type None"),
        ({"model_type": "bert", "hidden_size": 768}, 5, "model_type 'bert' is not supported"),
        ({"model_type": "qwen3"}, 3, "config.json"),
        ({"model_type": "qwen3", "hidden_size": "wide"}, 3, "config.json"),
        ([], 3, "config.json"),
    ],
)
def test_a_folder_that_is_no_decoder(cli: Cli, tmp_path: Path, config: Any, code: int, said: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    done = cli("plan", "--model", tmp_path, "--gates", "qwen3-1.7b", "--budget", "256")
    assert (done.code, done.out) == (code, "")
    assert said in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(("module", "extra"), [("onnx", "export"), ("matplotlib", "plot")])
def test_a_missing_package(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in [
        name
        for name in sys.modules
        if name.startswith(
            (
                "trimkv_export.plan.planner",
                "trimkv_export.plan.fit",
                "trimkv_export.plan.activations",
                "trimkv_export.cli.plots.",
            )
        )
    ]:
        monkeypatch.delitem(sys.modules, name)
    done = cli("plan", "--model", "qwen3-1.7b", "--budget", "256", "--plot", tmp_path / "plan.png")
    assert (done.code, done.out) == (10, "")
    assert f"trimkv-export[{extra}]" in done.err
