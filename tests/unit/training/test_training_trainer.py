import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import build, random_tokens, randomize
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

from trimkv_export.checkpoint.gates import open_gates
from trimkv_export.errors import CheckpointError, EngineError, OptionError, OutputError, UnsupportedModelError
from trimkv_export.runtime import Engine
from trimkv_export.training import trainer
from trimkv_export.training.options import TrainingOptions
from trimkv_export.training.rows import Row
from trimkv_export.training.trainer import RECORD, Report, open_trainable, state_file, train

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama_tied": (LlamaConfig, {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "phi3": (Phi3Config, {"sliding_window": 256}),
}
OPTIONS: dict[str, Any] = {
    "budget": 12, "steps": 20, "context": 96, "width": 16, "positions": 32, "start_rows": 4, "precision": "fp32"
}  # fmt: skip


class Echoes:
    """Rows whose second half repeats the first, so that older tokens are needed."""

    fingerprint = "echoes"

    def row(self, index: int) -> Row:
        half = np.random.default_rng(index).integers(1, 101, 48)
        return Row(np.concatenate([half, half]), np.arange(96) >= 48)


def make_base(folder: Path, family: str = "llama") -> Path:
    kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES | changes)).eval()
    randomize(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


def run(base: Path, output: Path, read: Any = None, kind: str = "rg10", **changes: Any) -> Report:
    names = TrainingOptions.__dataclass_fields__
    values = {name: value for name, value in changes.items() if name in names}
    options = TrainingOptions(kind=kind, **OPTIONS | values)
    backbone, spec = open_trainable(base, options)
    rest = {name: value for name, value in changes.items() if name not in names}
    return train(backbone, spec, read or Echoes(), options, output, **rest)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", ["rg10", "rg"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_text(family: str, kind: str, tmp_path: Path) -> None:
    """Twenty steps; then the gates are built, and evict."""
    base = make_base(tmp_path / "base", family)
    report = run(base, tmp_path / "gates", kind=kind)
    assert (report.steps, report.resumed_from, report.tokens) == (20, 0, 20 * 96)
    gates = open_gates(tmp_path / "gates")
    assert (gates.kind, gates.base_model, gates.memory_size) == (kind, "../base", 12)
    record = json.loads((tmp_path / "gates" / RECORD).read_text())
    assert [row["step"] for row in record["log"]] == list(range(1, 21))
    assert all(np.isfinite(list(row.values())).all() for row in record["log"])
    build(tmp_path, tmp_path / "package", budget=12)
    with Engine.open(tmp_path / "package", threads=1) as engine:
        session = engine.session()
        assert np.isfinite(session.prefill(random_tokens(60, vocabulary=101))).all()
        assert session.evictions > 0


def test_gates_learn(base: Path, tmp_path: Path) -> None:
    """From gates that keep all, without the cheap start: what is retained falls to the budget."""
    report = run(base, tmp_path / "gates", steps=80, start_rows=0, learning_rate=0.02, rows=2)
    log = json.loads((tmp_path / "gates" / RECORD).read_text())["log"]
    assert log[0]["capacity"] > 0.9
    assert report.capacity < 0.1


def test_the_cheap_start_meets_the_budget(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "gates", steps=1, start_rows=40)
    first = json.loads((tmp_path / "gates" / RECORD).read_text())["log"][0]
    assert first["capacity"] < 0.2


def test_a_run_that_was_stopped_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(base, whole, save_every=3)

    def stop(what: str, done: int, _total: int, _losses: Mapping[str, float]) -> None:
        if (what, done) == ("training", 8):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, stopped, save_every=3, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped.training", "whole"]
    report = run(base, stopped, save_every=3, resume=True)
    assert report.resumed_from == 6
    assert files_of(stopped) == files_of(whole)
    assert not state_file(stopped).exists()


def test_a_run_that_was_stopped_in_its_start(base: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, _total: int, _losses: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "stopped", progress=stop)
    run(base, tmp_path / "stopped", resume=True)
    run(base, tmp_path / "whole")
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def stop_after_two(base: Path, output: Path, **changes: Any) -> None:
    def stop(what: str, done: int, _total: int, _losses: Mapping[str, float]) -> None:
        if (what, done) == ("training", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, output, save_every=1, progress=stop, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 11}, "other --budget (12, now 11)"),
        ({"learning_rate": 1e-4}, "other --learning-rate (0.001, now 0.0001)"),
        ({"kind": "rg"}, "other --kind ('rg10', now 'rg')"),
        ({"read": type("Others", (Echoes,), {"fingerprint": "others"})()}, "other texts or chats"),
    ],
)
def test_another_run_does_not_go_on(changes: dict[str, Any], said: str, base: Path, tmp_path: Path) -> None:
    stop_after_two(base, tmp_path / "gates")
    with pytest.raises(OptionError) as raised:
        run(base, tmp_path / "gates", resume=True, **changes)
    assert said in str(raised.value)


def test_another_backbone_does_not_go_on(base: Path, tmp_path: Path) -> None:
    stop_after_two(base, tmp_path / "gates")
    other = make_base(tmp_path / "other", "llama_tied")
    with pytest.raises(OptionError, match="other weights of the model"):
        run(other, tmp_path / "gates", resume=True)


def test_a_state_is_not_lost_by_accident(base: Path, tmp_path: Path) -> None:
    stop_after_two(base, tmp_path / "gates")
    with pytest.raises(OptionError, match="an earlier run was stopped: go on with --resume, or remove the file"):
        run(base, tmp_path / "gates")


@pytest.mark.parametrize("content", [b"", b"no state", None])
def test_a_damaged_state_is_refused(content: bytes | None, base: Path, tmp_path: Path) -> None:
    stop_after_two(base, tmp_path / "gates")
    state = state_file(tmp_path / "gates")
    state.write_bytes(state.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(CheckpointError, match="is no state of a training run, or a damaged one"):
        run(base, tmp_path / "gates", resume=True)


def test_gates_are_trained_further(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "first")
    run(base, tmp_path / "second", start=tmp_path / "first", steps=1, learning_rate=1e-9)
    for name in ("trimkv_weights.pth",):
        first, second = (torch.load(tmp_path / each / name) for each in ("first", "second"))
        assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(OptionError, match=r"--width is 8, and the gates .*first have 16"):
        run(base, tmp_path / "third", start=tmp_path / "first", width=8)
    with pytest.raises(OptionError, match=r"--kind is rg, and the gates .*first have rg10"):
        run(base, tmp_path / "third", start=tmp_path / "first", kind="rg")


def test_output_that_is_there(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "gates", steps=1)
    before = files_of(tmp_path / "gates")
    with pytest.raises(OutputError, match="exists already; choose another --output, or pass --overwrite"):
        run(base, tmp_path / "gates", steps=2)
    assert files_of(tmp_path / "gates") == before
    run(base, tmp_path / "gates", steps=2, overwrite=True)
    assert files_of(tmp_path / "gates") != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="trimkv-export did not write it"):
        run(base, tmp_path / "mine", overwrite=True)


def test_rows_of_a_step_count_alike(base: Path, tmp_path: Path) -> None:
    """A step of two rows that are the same is a step of one."""

    class Same(Echoes):
        def row(self, index: int) -> Row:
            return super().row(0)

    changes: dict[str, Any] = {"steps": 1, "start_rows": 0, "positions": 0, "context": 96}
    run(base, tmp_path / "one", Same(), **changes)
    run(base, tmp_path / "two", Same(), **changes, rows=2)
    logs = [json.loads((tmp_path / name / RECORD).read_text())["log"][0] for name in ("one", "two")]
    assert logs[0]["kl"] == pytest.approx(logs[1]["kl"], rel=1e-5)


def test_losses_that_are_not_finite_end_the_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr(trainer, "capacity_loss", lambda *_: nothing)
    with pytest.raises(EngineError, match=r"the losses of step 1 are not finite: .*use --precision fp32"):
        run(base, tmp_path / "gates")
    assert not (tmp_path / "gates").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out(
    error: BaseException, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(trainer, "capacity_loss", fail)
    with pytest.raises(EngineError, match="the memory of cpu does not suffice: give a shorter --context, or --recom"):
        run(base, tmp_path / "gates")
    monkeypatch.setattr(trainer, "capacity_loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(base, tmp_path / "gates", resume=True)


@pytest.mark.parametrize("device", ["cuda:99", "abacus", ""])
def test_a_device_that_is_not_there(device: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"device '.*' cannot be used here"):
        run(base, tmp_path / "gates", device=device)
    assert list(tmp_path.iterdir()) == []


def test_models_that_gates_are_not_trained_for(base: Path, visual_checkpoint: Path, tmp_path: Path) -> None:
    options = TrainingOptions(kind="rg10", **OPTIONS)
    with pytest.raises(UnsupportedModelError, match="'qwen3_vl' sees pictures, and training reads text alone"):
        open_trainable(visual_checkpoint / "base", options)
    with pytest.raises(OptionError, match="--context 300 is beyond the 256 positions of the model"):
        open_trainable(base, TrainingOptions(kind="rg10", **OPTIONS | {"context": 300}))
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "gptq").mkdir()
    (tmp_path / "gptq" / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    quantised = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UnsupportedModelError, match="its weights are quantised"):
        open_trainable(tmp_path / "gptq", options)
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"missing 'model\.layers\.3\."):
        open_trainable(tmp_path / "gptq", options)


def test_places_prefer_answers() -> None:
    row = Row(np.arange(100), np.arange(100) >= 90)
    draw = np.random.default_rng(0)
    places = trainer._places(row, 16, draw)
    assert len(places) == len(set(places)) == 16
    assert ((places >= 89).sum()) >= 8
    assert max(places) < 99
    assert len(trainer._places(row, 0, draw)) == 99
    assert len(trainer._places(row, 200, draw)) == 99
