"""Record what the official Qwen3-VL model does with images, where the script of the text cases cannot.

    tests/golden/make_cases.sh PYTHON ORACLE_SCRIPT [CASE...]     # runs this too; the cases are in visual_cases.py

ORACLE_SCRIPT runs the official package on a CPU; `load_script` and what is called of it say what it has to offer. Its
`--arch qwen3_vl` knows one image in the first step. The official top-level `forward` goes little further:
it wants all placeholder tokens of an image in one call, and gives images after the first call the positions of text.
So the official *text model* is driven here, a call per step, with what `forward` would hand it: features of the
official vision tower in place of the placeholders' embeddings, DeepStack features, positions of the official
`get_rope_index` over the whole sequence, the official cache. Eviction stays where it is, at the end of the text model's
own forward, and goes by token positions (cache_position). Where `forward` can run a case itself it does, and both must
agree bit for bit, as they must on what the script itself records.

tests/golden_visual/ holds checkpoints/NAME/{base,gates}, which cases share, and CASE/{case.json,trace.npz}. The keys of
trace.npz are the script's: the tokens are `input_ids`, then `decoded`, in steps of `chunks`; greedy tokens of all turns
but the last are part of `input_ids`. What differs, for n tokens and V images and videos in the order of their tokens:

    step_{i}_logits [1, vocab] float32    of the step's last token only
    pixel_values [patches, dim] float32   in the processor's order of patches. These three are absent without images
    image_grid_thw [V, 3] int64           frames, height, width in patches; a video has its own placeholder token
    image_starts [V] int64                index of the first placeholder token: its step takes the pixel values
    position_ids [3, n] int32             M-RoPE positions: temporal, height, width
"""

import argparse
import importlib
import importlib.util
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from visual_cases import CASES, CHECKPOINTS, Case, Checkpoint

FOLDER = Path(__file__).parents[1] / "golden_visual"
# Ids of the official script's tiny model. Greedy choice is among the ordinary tokens: get_rope_index would take a
# placeholder that stands for no image for one.
ORDINARY, IMAGE, VIDEO, VISION_START, VISION_END = 140, 147, 148, 149, 150
MERGE = 2  # patches per token, each way
ROUNDING = 2e-5  # between float32 logits of about 6 that are computed in another order
TIMESTAMP_TOKENS = 3  # in front of each frame of a video, where the processor writes "<0.3 seconds>"

Trace = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Visual:
    """An image or a video."""

    grid: tuple[int, int, int]
    placeholder: int
    start: int  # index of the first placeholder token
    pixels: torch.Tensor  # [frames * height * width, dim]


@dataclass
class Sequence:
    """All tokens that are known so far, fed or about to be, and the images among them."""

    tokens: list[int] = field(default_factory=list)
    visuals: list[Visual] = field(default_factory=list)

    def add(self, parts: str, generator: torch.Generator, patch_dim: int) -> None:
        """Append what a turn brings; random tokens and pixels."""
        for part in parts.split():
            kind, size = part.split(":")
            numbers = [int(number) for number in size.split("x")]
            if kind == "text":
                self._add_text(numbers[0], generator)
                continue
            frames, height, width = numbers if kind == "video" else (1, *numbers)
            placeholder = VIDEO if kind == "video" else IMAGE
            # The values that 8 bits have after the processor's scaling.
            pixels = (
                torch.randint(0, 256, (frames * height * width, patch_dim), generator=generator).float() / 127.5 - 1
            )
            for frame in range(frames):
                if kind == "video":
                    self._add_text(TIMESTAMP_TOKENS, generator)
                if frame == 0:
                    start = len(self.tokens) + 1
                    self.visuals.append(Visual((frames, height, width), placeholder, start, pixels))
                self.tokens += [VISION_START, *[placeholder] * (height * width // MERGE**2), VISION_END]

    def _add_text(self, count: int, generator: torch.Generator) -> None:
        self.tokens += torch.randint(0, ORDINARY, (count,), generator=generator).tolist()

    def of_kind(self, placeholder: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Pixel values and grids [count, 3] of images (or videos) that start within the tokens; None without any."""
        found = [v for v in self.visuals if v.placeholder == placeholder and start <= v.start < stop]
        if not found:
            return None
        return torch.cat([visual.pixels for visual in found]), torch.tensor([visual.grid for visual in found])


class Driver:
    """Feeds a sequence to the official model."""

    def __init__(self, model: Any, sequence: Sequence, cache: Any) -> None:
        self.model, self.sequence, self.cache = model, sequence, cache
        self.fed = 0
        self.greedy = 0  # the best ordinary token after the last step

    def step(self, count: int) -> NDArray[np.float32]:
        """Feed the next `count` tokens; logits [count, vocab]."""
        start, self.fed = self.fed, self.fed + count
        logits = self._forward(start, self.fed)
        self.greedy = int(logits[-1, :ORDINARY].argmax())
        return np.asarray(logits.float().numpy())

    def _forward(self, start: int, stop: int) -> torch.Tensor:
        raise NotImplementedError


class TopLevel(Driver):
    """The official `forward`. It can run sequences whose images all lie in the first step."""

    def _forward(self, start: int, stop: int) -> torch.Tensor:
        visual: dict[str, Any] = {}
        if images := self.sequence.of_kind(IMAGE, start, stop):
            visual["pixel_values"], visual["image_grid_thw"] = images
        if videos := self.sequence.of_kind(VIDEO, start, stop):
            visual["pixel_values_videos"], visual["video_grid_thw"] = videos
        logits: torch.Tensor = self.model(
            input_ids=torch.tensor([self.sequence.tokens[start:stop]]),
            past_key_values=self.cache,
            use_cache=True,
            cache_position=torch.arange(start, stop),
            **visual,
        ).logits[0]
        return logits


class Direct(Driver):
    """The official text model, fed with what `forward` would feed it. Images may begin and be cut anywhere."""

    def __init__(self, model: Any, sequence: Sequence, cache: Any) -> None:
        super().__init__(model, sequence, cache)
        self.positions = torch.zeros(3, 0, dtype=torch.int64)
        # By placeholder, features of tokens still to be fed, in order: [tokens, hidden] and [levels, tokens, hidden].
        self.waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _forward(self, start: int, stop: int) -> torch.Tensor:
        ids = torch.tensor([self.sequence.tokens[start:stop]])
        embeds = self.model.get_input_embeddings()(ids)
        mask = (ids == IMAGE) | (ids == VIDEO)
        visual: dict[str, Any] = {}
        if mask.any():
            levels = len(self.model.config.vision_config.deepstack_visual_indexes)
            deepstack = torch.zeros(levels, *embeds.shape[1:])
            for placeholder in (IMAGE, VIDEO):
                self._encode(placeholder, start, stop)
                mine = ids[0] == placeholder
                if count := int(mine.sum()):
                    rows, deep = self.waiting[placeholder]
                    embeds[0, mine], deepstack[:, mine] = rows[:count], deep[:, :count]
                    self.waiting[placeholder] = rows[count:], deep[:, count:]
            visual = {"visual_pos_masks": mask, "deepstack_visual_embeds": list(deepstack[:, mask[0]])}
        output = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=self._position_ids(start, stop),
            past_key_values=self.cache,
            use_cache=True,
            cache_position=torch.arange(start, stop),
            **visual,
        )
        logits: torch.Tensor = self.model.lm_head(output.last_hidden_state)[0]
        return logits

    def _encode(self, placeholder: int, start: int, stop: int) -> None:
        """Put the features of images that start within the step at the end of those that wait."""
        if (found := self.sequence.of_kind(placeholder, start, stop)) is None:
            return
        embeds, deepstack = self.model.get_image_features(*found)
        rows, deep = torch.cat(embeds), torch.stack(deepstack)
        if placeholder in self.waiting:
            before = self.waiting[placeholder]
            rows, deep = torch.cat([before[0], rows]), torch.cat([before[1], deep], 1)
        self.waiting[placeholder] = rows, deep

    def _position_ids(self, start: int, stop: int) -> torch.Tensor:
        """[3, 1, step]: from the whole known sequence, since get_rope_index wants whole images."""
        tokens = self.sequence.tokens
        grids = [
            found and found[1] for found in (self.sequence.of_kind(kind, 0, len(tokens)) for kind in (IMAGE, VIDEO))
        ]
        positions, _ = self.model.model.get_rope_index(torch.tensor([tokens]), *grids)
        if not torch.equal(positions[:, 0, :start], self.positions):
            raise SystemExit("get_rope_index moved tokens that were already fed")
        self.positions = positions[:, 0, :stop]
        return torch.as_tensor(positions[:, :, start:stop])


@dataclass
class Recorder:
    """The official model of one checkpoint, as its own loader reads it back from disk."""

    official: Any
    shape: Checkpoint
    model: Any

    def cache(self, case: Case) -> Any:
        """The cache that the official script would make."""
        classes = importlib.import_module("trimkv.cache_utils")
        common = {"memory_size": case.budget, "buffer_size": case.buffer, "lookahead_steps": case.lookahead}
        if self.shape.gate == "rg":
            return classes.TrimKVCache(**common, device="cpu")
        return classes.PagedTrimKVCache(
            num_layers=self.shape.layers,
            num_heads=self.shape.kv_heads,
            max_seq_len=4096,
            min_tokens_per_head=case.min_per_head,
            strategy="fixed_budget",
            device="cpu",
            **common,
        )

    def run(self, driver: Driver, chunks: Iterable[int]) -> Trace:
        """Feed steps of `chunks` tokens; logits, kept entries, chunks and log_beta under the script's keys."""
        layers = self.model.model.language_model.layers
        log_beta: list[list[NDArray[np.float32]]] = [[] for _ in layers]
        hooks = [
            layer.self_attn.retention_gate.register_forward_hook(
                lambda _module, _inputs, output, values=values: values.append(output[0].T.float().numpy().copy())
            )
            for layer, values in zip(layers, log_beta, strict=True)
        ]
        trace: Trace = {}
        fed = []
        with torch.no_grad():
            for step, count in enumerate(chunks):
                trace[f"step_{step}_logits"] = driver.step(count)
                trace[f"step_{step}_kept"] = self.official.kept(driver.cache, self.shape.layers, self.shape.kv_heads)
                fed.append(count)
        for hook in hooks:
            hook.remove()
        return trace | {"chunks": np.array(fed), "log_beta": np.stack([np.concatenate(v, -1) for v in log_beta])}

    def record(self, case: Case) -> Trace:
        """The trace of a case, checked against the official `forward` where that can run it."""
        sequence = Sequence()
        driver = Direct(self.model, sequence, self.cache(case))
        trace = self.run(driver, self._steps(case, driver))
        last = max((index for index, token in enumerate(sequence.tokens) if token in (IMAGE, VIDEO)), default=0)
        if last < trace["chunks"][0]:
            top = TopLevel(self.model, sequence, self.cache(case))
            expect_equal(trace, self.run(top, trace["chunks"].tolist()), "the official forward")
        self._check_whole(case, sequence, trace["chunks"].tolist())

        end = len(sequence.tokens) - case.turns[-1].decode
        trace["input_ids"] = np.array([sequence.tokens[:end]])
        trace["decoded"] = np.array(sequence.tokens[end:])
        trace["position_ids"] = driver.positions.numpy().astype(np.int32)
        if sequence.visuals:
            trace["pixel_values"] = torch.cat([visual.pixels for visual in sequence.visuals]).numpy()
            trace["image_grid_thw"] = np.array([visual.grid for visual in sequence.visuals])
            trace["image_starts"] = np.array([visual.start for visual in sequence.visuals])
        return {key: value[-1:] if key.endswith("_logits") else value for key, value in trace.items()}

    def _check_whole(self, case: Case, sequence: Sequence, chunks: list[int]) -> None:
        """Without eviction, the steps must give the logits of one official `forward` over the whole sequence."""
        roomy = replace(case, budget=2000)
        steps = self.run(Direct(self.model, sequence, self.cache(roomy)), chunks)
        whole = self.run(TopLevel(self.model, sequence, self.cache(roomy)), [sum(chunks)])["step_0_logits"]
        ours = np.concatenate([steps[f"step_{step}_logits"] for step in range(len(chunks))])
        worst = float(np.abs(ours - whole).max())
        print(f"  without eviction, against the whole sequence in one call: largest difference of logits {worst:.1e}")
        if not worst < ROUNDING:
            raise SystemExit("steps differ from the whole sequence in one call")

    def _steps(self, case: Case, driver: Direct) -> Iterator[int]:
        """Tokens of each step; the sequence grows as the model decodes."""
        generator = torch.Generator().manual_seed(case.seed + 1000)
        vision, sequence = self.model.config.vision_config, driver.sequence
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        for turn in case.turns:
            sequence.add(turn.parts, generator, patch_dim)
            if len(sequence.tokens) - driver.fed != sum(turn.chunks):
                raise SystemExit(f"{turn}: has {len(sequence.tokens) - driver.fed} tokens")
            yield from turn.chunks
            for _ in range(turn.decode):
                sequence.tokens.append(driver.greedy)
                yield 1

    def check(self) -> None:
        """Drive the case that the official script itself records of this model."""
        case = Case("", "", budget=8, buffer=4, turns=())
        arguments = argparse.Namespace(
            **asdict(self.shape),
            arch="qwen3_vl",
            budget=8,
            buffer=4,
            min_per_head=0,
            lookahead=1,
            chunks=[40, 9],
            decode=16,
        )
        recorded: Trace = self.official.record(self.model, self.model.model.language_model, arguments)
        tokens = [*recorded["input_ids"][0].tolist(), *recorded["decoded"].tolist()]
        pixels, grid = (torch.from_numpy(recorded[key]) for key in ("pixel_values", "image_grid_thw"))
        sequence = Sequence(tokens, [Visual((1, 8, 12), IMAGE, 4, pixels)])
        if grid.tolist() != [[1, 8, 12]] or tokens.index(IMAGE) != 4:
            raise SystemExit("the official script has another image than this file expects")
        driver = Direct(self.model, sequence, self.cache(case))
        expect_equal(self.run(driver, recorded["chunks"].tolist()), recorded, "the official script")


def expect_equal(ours: Trace, theirs: Trace, what: str) -> None:
    """Print the largest difference; end the program when kept entries differ, or any other value by a bit."""
    wrong = [key for key in ours if not np.array_equal(ours[key], theirs[key])]
    worst = max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours if key.endswith("_logits"))
    print(f"  against {what}: {len(ours['chunks'])} steps, largest difference of logits {worst:g}")
    if wrong:
        raise SystemExit(f"differs from {what} in {wrong}")


def load_script(path: Path) -> Any:
    """The official script as a module, with its stand-ins in place."""
    spec = importlib.util.spec_from_file_location("official_trimkv", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._install_flash_attn_stand_in()
    # The official loader reads the backbone first, and transformers then tells at length which gates it lacks.
    importlib.import_module("transformers").logging.set_verbosity_error()
    return module


def make_checkpoint(official: Any, name: str) -> Recorder:
    """Write checkpoints/NAME, and load it back through the official loader."""
    shape, folder = CHECKPOINTS[name], FOLDER / "checkpoints" / name
    folder.mkdir(parents=True, exist_ok=True)
    model, plain = official.build(
        "qwen3_vl", shape.gate, shape.seed, shape.layers, shape.kv_heads, shape.heads, shape.head_dim, shape.hidden
    )
    extra = {"base_model": "base", "trainable_params": "retention_gate", "memory_size": 8}
    official.save(model, plain, "retention_gate", folder, extra)
    return Recorder(official, shape, official.reload(model, "qwen3_vl", folder)[0])


def write_case(recorder: Recorder, name: str, case: Case) -> None:
    """Record CASE/ anew."""
    folder = FOLDER / name
    trace = recorder.record(case)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    np.savez_compressed(folder / "trace.npz", allow_pickle=False, **trace)
    decode = case.turns[-1].decode
    about = {
        "arch": "qwen3_vl",
        **asdict(recorder.shape),
        **asdict(case),
        "checkpoint": f"../checkpoints/{case.checkpoint}",
        "chunks": trace["chunks"][: len(trace["chunks"]) - decode].tolist(),
        "decode": decode,
    }
    (folder / "case.json").write_text(json.dumps(about) + "\n")
    rows = [0, *(len(trace[f"step_{step}_kept"]) for step in range(len(trace["chunks"])))]
    streams = recorder.shape.layers * recorder.shape.kv_heads
    evictions = sum(
        after < before + streams * count for before, after, count in zip(rows, rows[1:], trace["chunks"], strict=False)
    )
    tokens = trace["log_beta"].shape[-1]
    print(f"{name}: {len(trace['chunks'])} steps, {tokens} tokens, {evictions} evictions")


def main() -> None:
    """Record all cases, or those that are named."""
    parser = argparse.ArgumentParser(description="Record visual cases of the official code.")
    parser.add_argument("script", type=Path, help="a script that runs the official package")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all by default; unknown names are left to others")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order on every machine
    wanted = {name: case for name, case in CASES.items() if name in arguments.cases or not arguments.cases}
    if not wanted:
        return
    official = load_script(arguments.script)
    for checkpoint in dict.fromkeys(case.checkpoint for case in wanted.values()):
        recorder = make_checkpoint(official, checkpoint)
        print(f"checkpoint {checkpoint}")
        recorder.check()
        for name, case in wanted.items():
            if case.checkpoint == checkpoint:
                write_case(recorder, name, case)


if __name__ == "__main__":
    main()
