"""The recipes in engines/: each fits its device, and says what its plan says. Broken ones are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT, load_example

from trimkv_export.build import recipe as recipe_module
from trimkv_export.build.recipe import read_recipe, recipe_names
from trimkv_export.checkpoint.aliases import find_alias
from trimkv_export.config import BuildOptions, PlanOptions, Precision, Recipe, options_of
from trimkv_export.errors import OptionError
from trimkv_export.plan import device
from trimkv_export.plan.planner import plan_model

table = load_example("recipe_table")
RECIPES: list[Path] = table.recipe_files()
GOOD: dict[str, Any] = {"model": "qwen3-4b", "budget": 256, "precision": "fp16", "device": "l4"}
# The deployments that the project promises, without what cannot be built (engines/README.md).
EXPECTED = {
    "qwen3-1.7b-orin-nano-8gb", "qwen3-vl-4b-orin-nano-8gb", "qwen3-vl-4b-orin-nx-16gb", "qwen3-vl-4b-agx-orin-64gb",
    "qwen3-4b-agx-orin-64gb", "qwen3-4b-l4", "qwen3-8b-agx-orin-64gb", "qwen3-8b-l4", "qwen3-vl-8b-h100",
    "qwen3-vl-8b-h200",
}  # fmt: skip


def written(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def test_every_deployment_is_there() -> None:
    assert {file.stem for file in RECIPES} >= EXPECTED


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_fits_its_device(file: Path) -> None:
    recipe = read_recipe(file)
    assert file.stem == f"{recipe.model}-{recipe.device}"
    assert find_alias(recipe.model)
    made = table.recipe_plan(file)
    plan = made.plan
    assert (made.profile.name, made.options.precision) == (recipe.device, recipe.precision)
    assert (plan.batch, plan.budget, plan.prefill_chunk) == (recipe.max_batch, recipe.budget, recipe.prefill_chunk)
    assert plan.fits
    assert plan.headroom_bytes > 0
    assert plan.max_sequences >= recipe.max_batch
    assert plan.max_budget >= recipe.budget
    assert plan.full_cache_context == recipe.context
    assert recipe.device is not None
    assert recipe.target == ("tensorrt" if device(recipe.device).kind == "jetson" else "onnxruntime")
    stated = file.read_text(encoding="utf-8").splitlines()[0]
    assert stated == table.comment(made), "run python examples/recipe_table.py --write"


def test_the_readme_has_the_plans() -> None:
    text = (ROOT / "engines" / "README.md").read_text(encoding="utf-8")
    assert table.with_tables(text) == text, "run python examples/recipe_table.py --write"
    assert table.plans_table().count("\n") == 2 + len(RECIPES)


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_what_needs_int4(precision: Precision) -> None:
    """Qwen3-VL-4B on Orin Nano 8 GB, as engines/README.md says: no budget, chunk or image size makes 16 bits fit."""
    least = PlanOptions(
        "qwen3-vl-4b", 1, device="orin-nano-8gb", precision=precision, prefill_chunk=1, max_image_tokens=1
    )
    plan = plan_model(least).plan
    assert plan.fits is False
    assert plan.weight_bytes > (plan.device_bytes or 0) > 0
    assert (plan.max_budget, plan.max_sequences) == (0, 0)


def test_every_field_arrives(tmp_path: Path) -> None:
    more: dict[str, Any] = {"gates": "g", "evict_every": 5, "prefill_chunk": 6, "max_batch": 7, "max_image_tokens": 8}
    more |= {"context": 9, "precision": "int4", "activations": "bf16", "block_size": 64, "symmetric": False}
    more |= {"head": "int8", "mixed": 5.0, "max_image_pixels": 1000, "max_frames": 10}
    more |= {"policy": "global", "target": "tensorrt", "revision": "v2"}
    assert set(GOOD | more) == {option.name for option in options_of(PlanOptions)}
    of_builds: dict[str, Any] = {"min_tokens_per_head": 3, "lookahead_steps": 4, "calibrate": "text.txt"}
    of_builds["calibration_method"] = "gptq"
    of_builds |= {"weights": "link", "engine_weights": "stripped", "timing_cache": "timing"}
    recipe = read_recipe(written(tmp_path, GOOD | more | of_builds))
    assert recipe == Recipe(**GOOD | more | of_builds)
    assert recipe.plan_options() == PlanOptions(**GOOD | more)
    assert (recipe.calibrate, recipe.weights) == (Path("text.txt"), "link")
    # All but what only the person who builds can say.
    names = [{option.name for option in options_of(kind)} for kind in (BuildOptions, Recipe)]
    assert names[0] - names[1] == {"output", "overwrite"}
    assert names[1] == set(GOOD | more | of_builds)


def test_recipes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(recipe_names().values()) == RECIPES
    assert read_recipe("qwen3-8b-l4") == read_recipe(ROOT / "engines" / "qwen3-8b-l4.yaml")
    with pytest.raises(
        OptionError, match=r"no recipe 'qwen3-8b-l44'; did you mean 'qwen3-8b-l4' .*are qwen3-1\.7b-orin"
    ):
        read_recipe("qwen3-8b-l44")
    # A file of that name in the working directory wins; an installed program has a folder of its own.
    monkeypatch.chdir(tmp_path)
    written(tmp_path, GOOD | {"budget": 7}).rename(tmp_path / "qwen3-8b-l4")
    assert read_recipe("qwen3-8b-l4").budget == 7
    monkeypatch.setattr(recipe_module, "FOLDERS", (tmp_path / "installed", ROOT / "engines"))
    (tmp_path / "installed").mkdir()
    written(tmp_path / "installed", GOOD).rename(tmp_path / "installed" / "mine.yaml")
    assert list(recipe_names()) == ["mine"]
    assert read_recipe("mine").budget == GOOD["budget"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GOOD | {"max-batch": 4}, r"key 'max-batch' \(value 4\) is not known; did you mean 'max_batch'\?"),
        (GOOD | {"budgets": 4}, "did you mean 'budget'"),
        (GOOD | {"zzz": None}, r"'zzz' \(value None\) is not known; the keys are model, budget, gates, "),
        (GOOD | {7: 8}, r"key 7 \(value 8\) is not known"),
        ({"model": "m", "precision": "fp16"}, "lacks 'budget', 'device'"),
        (GOOD | {"budget": "256"}, "budget must be a whole number from 1 to 1048576, got '256'"),
        (GOOD | {"budget": True}, "budget must be .* got True"),
        (GOOD | {"budget": 0}, "budget must be .* got 0"),
        (GOOD | {"max_batch": 1.5}, "max-batch must be .* got 1.5"),
        (GOOD | {"max_batch": 10**9}, "max-batch must be .* got 1000000000"),
        (GOOD | {"evict_every": None}, "evict-every must be .* got None"),
        (GOOD | {"context": -1}, "context must be .* got -1"),
        (GOOD | {"max_image_tokens": []}, r"max-image-tokens must be .* got \[\]"),
        (GOOD | {"precision": "int3"}, "precision must be one of fp32, fp16, bf16, int4, int8, got 'int3'"),
        (GOOD | {"activations": "fp16"}, "activations fp16 go with precision int4 or int8; fp16 is that of everything"),
        (GOOD | {"precision": ["fp16"]}, r"precision must be one of .* got \['fp16'\]"),
        (GOOD | {"model": 4}, "model must be a text, got 4"),
        (GOOD | {"model": " "}, "model must be a text, got ' '"),
        (GOOD | {"gates": 4}, "gates must be a text, got 4"),
        (GOOD | {"device": None}, "lacks 'device'"),
        (GOOD | {"policy": "threshold"}, "policy 'threshold' keeps .* its memory has no bound"),
        (GOOD | {"calibrate": 4}, "calibrate must be a path, got 4"),
        (GOOD | {"output": "x"}, "the key 'output' .* is not known"),
        (GOOD | {"engine_weights": "streamed"}, "engine-weights streamed is for TensorRT engines, not for onnxruntime"),
        (GOOD | {"device": "l44"}, "there is no device 'l44'; did you mean 'l4'"),
        ([GOOD], r"a recipe is keys and values, such as 'budget: 256', got \[\{"),
        ("", "a recipe is keys and values, .* got None"),
        ("model: a\nmodel: b\n", "line 2: .*the key 'model' is there twice"),
        ("model: [", "is not the YAML expected here"),
    ],
)
def test_broken_recipes(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        read_recipe(written(tmp_path, content))
    assert str(caught.value).startswith(str(tmp_path / "recipe.yaml"))


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"none\.yaml: cannot be read \(No such file"):
        read_recipe(tmp_path / "none.yaml")
