"""The demo checkpoint: transformers loads it, and its gates have the keys of the official files."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from support import ROOT, load_example
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2VLImageProcessor,
    Qwen3ForCausalLM,
    Qwen3VLForConditionalGeneration,
)

from trimkv_export.errors import OptionError
from trimkv_export.text.chat import render_chat
from trimkv_export.text.tokenizer import Tokenizer

SCRIPT = ROOT / "examples" / "demo_checkpoint.py"
RG = {"bias", "linear1.weight", "linear1.bias", "linear2.weight"}
SHARED = "linear3.weight"


make_checkpoint = load_example("demo_checkpoint").make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "checkpoint"
    make_checkpoint(out)
    return out


@pytest.fixture(scope="module")
def visual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the Qwen3-VL family."""
    out = tmp_path_factory.mktemp("demo") / "visual"
    make_checkpoint(out, family="qwen3_vl")
    return out


def load_gates(out: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(out / "gates" / "trimkv_weights.pth", weights_only=True)
    return state


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_loads_the_backbone(tmp_path: Path, tie: bool) -> None:
    make_checkpoint(tmp_path, tie=tie, layers=2, heads=6, kv_heads=3, head_dim=16)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert type(model) is Qwen3ForCausalLM
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert model.config.rope_parameters["rope_theta"] == 1e6
    assert model.config.max_position_embeddings == 131072
    assert model.generation_config.eos_token_id == [258, 256]


def test_activations_stay_sane(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "base", dtype=torch.float32)
    with torch.no_grad():
        output = model(torch.arange(259)[None], output_hidden_states=True)
    assert 0.3 < output.logits.std() < 3
    assert all(state.abs().max() < 20 for state in output.hidden_states)
    assert len(output.logits[0].argmax(-1).unique()) > 50


@pytest.mark.parametrize(("gate", "names"), [("rg", RG), ("rg10", RG | {"linear2.bias", SHARED})])
def test_gates_have_the_keys_and_shapes_of_the_official_files(tmp_path: Path, gate: str, names: set[str]) -> None:
    make_checkpoint(tmp_path, gate=gate, layers=3, hidden=48, heads=6, kv_heads=3, gate_hidden=20)
    state = load_gates(tmp_path)
    prefixes = [f"model.layers.{layer}.self_attn.retention_gate." for layer in range(3)]
    assert set(state) == {prefix + name for prefix in prefixes for name in names}
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    shapes = {"bias": [3], "linear1.weight": [20, 48], "linear1.bias": [20], "linear2.bias": [20], SHARED: [3, 20]}
    shapes["linear2.weight"] = [3, 20] if gate == "rg" else [20, 20]
    assert all(list(value.shape) == shapes[name.split("retention_gate.")[1]] for name, value in state.items())
    if gate == "rg10":
        copies = [state[prefix + SHARED] for prefix in prefixes]
        assert all(torch.equal(copy, copies[0]) for copy in copies)
    config = json.loads((tmp_path / "gates" / "config.json").read_text())
    assert (tmp_path / "gates" / config["base_model"]).resolve() == (tmp_path / "base").resolve()
    assert config["retention_gate"] == gate
    assert config["retention_gate_intermediate_size"] == 20
    assert {"trainable_params", "memory_size", "num_hidden_layers", "hidden_size"} <= set(config)


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_loads_the_model_that_sees(tmp_path: Path, tie: bool) -> None:
    make_checkpoint(tmp_path, family="qwen3_vl", tie=tie, layers=3, heads=6, kv_heads=3)
    model, info = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tie
    rope = model.config.text_config.rope_parameters
    assert (rope["rope_theta"], rope["mrope_interleaved"], sum(rope["mrope_section"])) == (1e6, True, 16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    names = {"<|image_pad|>": "image", "<|video_pad|>": "video", "<|vision_start|>": "vision_start"}
    for token, name in (names | {"<|vision_end|>": "vision_end"}).items():
        assert tokenizer.encode(token) == [getattr(model.config, f"{name}_token_id")]
    processor = Qwen2VLImageProcessor.from_pretrained(tmp_path / "base")
    vision = model.config.vision_config
    assert (processor.patch_size, processor.merge_size) == (vision.patch_size, vision.spatial_merge_size)


def test_activations_stay_sane_with_an_image(visual: Path) -> None:
    model = Qwen3VLForConditionalGeneration.from_pretrained(visual / "base", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    patches, grid = torch.rand((256, 1536), generator=generator) * 2 - 1, torch.tensor([[1, 16, 16]])
    tokens = torch.tensor([[*range(100), 259, *[261] * 64, 260, *range(100, 256)]])
    with torch.no_grad():
        seen = model.model.visual(patches, grid)
        output = model(
            tokens, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=(tokens == 261).int(),
            output_hidden_states=True,
        )  # fmt: skip
    assert 0.3 < output.logits.std() < 3
    assert all(state.abs().max() < 20 for state in output.hidden_states)
    for features in (seen.pooler_output, *seen.deepstack_features):
        assert features.shape == (64, 128)
        assert 0.1 < features.std() < 3
        # The tokens of an image differ: one feature for all would hide mistakes in their order.
        assert features.std(dim=0).mean() > 0.1


def test_gates_of_the_model_that_sees(visual: Path) -> None:
    names = RG | {"linear2.bias", SHARED}
    prefixes = [f"model.language_model.layers.{layer}.self_attn.retention_gate." for layer in range(4)]
    assert set(load_gates(visual)) == {prefix + name for prefix in prefixes for name in names}
    config = json.loads((visual / "gates" / "config.json").read_text())
    assert config["text_config"]["retention_gate"] == "rg10"
    assert "retention_gate" not in config
    assert config["memory_size"] == 64


def test_heads_retain_for_different_times(checkpoint: Path) -> None:
    biases = torch.cat([value for name, value in load_gates(checkpoint).items() if name.endswith("gate.bias")])
    assert biases.min() < 1.5
    assert biases.max() > 2.5


def test_without_torch_the_gates_are_safetensors(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        make_checkpoint(tmp_path)
    assert [path.name for path in sorted((tmp_path / "gates").iterdir())] == [
        "config.json",
        "trimkv_weights.safetensors",
    ]
    state, expected = load_file(tmp_path / "gates" / "trimkv_weights.safetensors"), load_gates(checkpoint)
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl"])
def test_the_seed_decides_the_tensors(tmp_path: Path, family: str) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_checkpoint(tmp_path / name, family=family, seed=seed, layers=1)
        found.append(load_file(tmp_path / name / "base" / "model.safetensors") | load_gates(tmp_path / name))
    assert found[0].keys() == found[1].keys() == found[2].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    same = {name for name, value in found[0].items() if torch.equal(value, found[2][name])}
    assert all(re.search(r"norm\d?\.(weight|bias)$", name) for name in same), same


def test_tokenizer_gives_one_token_per_byte(checkpoint: Path) -> None:
    tokenizer = Tokenizer.open(checkpoint / "base")
    assert tokenizer.vocab_size == 259
    assert tokenizer.eos_ids == {256, 258}
    assert len(tokenizer.encode("aé😀")) == 1 + 2 + 4
    assert tokenizer.encode("<|im_start|>a<|im_end|>")[::2] == [257, 258]

    @settings(max_examples=200)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def round_trip(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text

    round_trip()


def test_transformers_agrees_on_the_tokenizer_and_chat(checkpoint: Path) -> None:
    ours, theirs = Tokenizer.open(checkpoint / "base"), AutoTokenizer.from_pretrained(checkpoint / "base")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Grüße,\n😀 & <b>"}]
    prompt = render_chat(ours.chat_template or "", messages)
    assert prompt == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    ids = ours.encode(prompt, add_special_tokens=False)
    assert ids == theirs.encode(prompt, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads must be a multiple of kv-heads, got 3 and 2"),
        ({"head_dim": 31}, "head-dim must be even, got 31"),
        ({"layers": 0}, "at least 1"),
        ({"gate": "rg2"}, "gate must be rg or rg10, got 'rg2'"),
        ({"family": "qwen2"}, "family must be one of qwen3, qwen3_vl, got 'qwen2'"),
    ],
)
def test_sizes_that_make_no_model_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_checkpoint(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path: Path) -> None:
    options = ["--gate=rg", "--seed=3", "--layers=1", "--hidden=32", "--head-dim=8", "--no-tie"]
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
    with safe_open(tmp_path / "out" / "base" / "model.safetensors", "np") as file:
        assert file.get_slice("lm_head.weight").get_shape() == [259, 32]
    assert len(load_gates(tmp_path / "out")) == len(RG)
    failed = subprocess.run([*command, "--heads=3"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "heads must be a multiple of kv-heads" in failed.stderr
