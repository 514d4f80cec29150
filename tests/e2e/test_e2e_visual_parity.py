"""With a budget above the context nothing is evicted, and a package is an ordinary Qwen3-VL: transformers is the judge.

Each side reads the pictures itself (of videos only the patches are shared) and writes its own prompt.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import KINDS, picture
from PIL import Image
from safetensors.torch import save_file
from support import IMAGE, VIDEO, VISION_END, VISION_START, build, make_visual_checkpoint, random_tokens
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trimkv_export.runtime import Engine, Video

TOLERANCE = 2e-4
MAX_TOKENS = 60  # of an image, by the preprocessor's own limit
# What each variant changes: arguments of the demo checkpoint, then fields of its config.json.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied": ({}, {}),
    "untied_rg": (
        {"tie": False, "gate": "rg", "head_dim": 24, "hidden": 40},
        {"vision_config": {"deepstack_visual_indexes": [1, 3], "num_heads": 5, "hidden_size": 20}},
    ),
    "small_grid_late_deepstack": (
        {"tie": False, "layers": 2, "kv_heads": 4},
        {
            "text_config": {"attention_bias": True, "rope_theta": 5000.0, "rms_norm_eps": 1e-3},
            "vision_config": {
                "deepstack_visual_indexes": [3, 0], "num_position_embeddings": 49, "hidden_act": "gelu", "depth": 5,
            },
        },
    ),
    "no_deepstack_small_patches": (
        {"gate": "rg", "kv_heads": 1},
        {"vision_config": {"deepstack_visual_indexes": [], "patch_size": 8, "num_position_embeddings": 1024}},
    ),
}  # fmt: skip
# Numbers are text tokens, pairs the height and width of an image, triples frames, height and width of a video.
# The sizes of images are such that Pillow 13 begins with the width, as we and torchvision do; for others the reference
# here would not be that of the official files (test_runtime_images.py).
CONVERSATIONS: dict[str, list[Any]] = {
    "square": [3, (96, 96), 4],
    "wide": [(64, 256), 2],
    "tall": [5, (290, 70)],
    "very_wide": [1, (32, 711), 3],
    "odd_sides": [2, (98, 135), 2],
    "scaled_down": [4, (700, 520), 2],
    "scaled_up": [2, (9, 13), 2],
    "two_images": [3, (128, 64), (64, 96), 2],
    "text_between": [(64, 64), 5, (33, 165), 7, (96, 64), 1],
    "video": [4, (8, 64, 96), 3],
    "odd_video_and_image": [1, (5, 96, 64), 2, (64, 64), (8, 32, 64)],
    "text": [40],
}
LENGTHS = (7, 1, 19, 1, 1, 30, 2)


@dataclass
class Pair:
    """A package, and the model it was made of."""

    engine: Engine
    model: Qwen3VLForConditionalGeneration
    processor: Qwen2VLImageProcessorPil


def save_model(folder: Path, fields: dict[str, Any], *, version: int) -> Qwen3VLForConditionalGeneration:
    """Put a random model into a demo checkpoint's base folder, as transformers 4.57 or 5 writes it."""
    config = json.loads((folder / "config.json").read_text())
    for section, changes in fields.items():
        config[section] |= changes
    if "patch_size" in fields.get("vision_config", {}):
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            file = folder / name
            file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": 8}))
    torch.manual_seed(0)
    (folder / "config.json").write_text(json.dumps(config))
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(std=scale).add_(float(is_norm))
    if version == 5:
        model.save_pretrained(folder)
        assert "rope_parameters" in json.loads((folder / "config.json").read_text())["text_config"]
        return model
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    arguments, fields = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("checkpoint")
    base = make_visual_checkpoint(folder, **arguments) / "base"
    file = base / "preprocessor_config.json"
    size = {"shortest_edge": 4 * 1024, "longest_edge": MAX_TOKENS * 1024}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": size}))
    model = save_model(base, fields, version=4 if request.param == "tied" else 5)
    build(folder, folder / "package", budget=1024, prefill_chunk=32)
    with Engine.open(folder / "package", threads=1) as engine:
        yield Pair(engine, model, Qwen2VLImageProcessorPil.from_pretrained(base))


def source(size: tuple[int, int], seed: int) -> Image.Image:
    """The image of a part of a conversation."""
    return Image.fromarray(picture(*size, KINDS[seed % len(KINDS)], seed))


def clip(size: tuple[int, int, int], seed: int) -> Video:
    """The video of a part of a conversation, at 2 frames a second: all of them are taken."""
    return Video([picture(*size[1:], seed=seed + frame) for frame in range(size[0])], fps=2.0)


class Reference:
    """Tokens and pixels of a conversation, as transformers takes them."""

    def __init__(self, pair: Pair, parts: list[Any]) -> None:
        self.pair = pair
        self.tokens: list[int] = []
        self.kinds: list[int] = []
        self.pixels: dict[str, list[torch.Tensor]] = {}
        for number, part in enumerate(parts):
            if isinstance(part, list):
                self.add(part)
            elif isinstance(part, int):
                self.add(random_tokens(part, seed=number))
            elif len(part) == 2:
                self.add_image(source(part, number))
            else:
                self.add_video(clip(part, number))

    def add(self, tokens: list[int], kind: int = 0) -> None:
        """Kinds are 0 for text, 1 for images, 2 for videos."""
        self.tokens += tokens
        self.kinds += [kind] * len(tokens)

    def add_pixels(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self.pixels.setdefault(name, []).append(value)

    def add_image(self, image: Image.Image) -> None:
        out = self.pair.processor(images=[image], return_tensors="pt")
        self.add_pixels(pixel_values=out["pixel_values"], image_grid_thw=out["image_grid_thw"])
        self.add([VISION_START])
        self.add([IMAGE] * (int(out["image_grid_thw"].prod()) // 4), 1)
        self.add([VISION_END])

    def add_video(self, video: Video) -> None:
        read = self.pair.engine.pictures.read([VIDEO], videos=[video]).pictures[0]
        self.add_pixels(
            pixel_values_videos=torch.from_numpy(read.pixel_values), video_grid_thw=torch.tensor([read.grid])
        )
        last = len(read.pixels) - 1
        for frame in range(read.grid[0]):
            seconds = (2 * frame + min(2 * frame + 1, last)) / 4
            self.add(self.pair.engine.tokenizer.encode(f"<{seconds:.1f} seconds>"))
            self.add([VISION_START])
            self.add([VIDEO] * (read.grid[1] * read.grid[2] // 4), 2)
            self.add([VISION_END])

    def logits(self) -> NDArray[np.float32]:
        """[n, V], of all tokens at once."""
        inputs = {name: torch.cat(values) for name, values in self.pixels.items()}
        with torch.no_grad():
            out = self.pair.model(
                input_ids=torch.tensor([self.tokens]), mm_token_type_ids=torch.tensor([self.kinds]), **inputs
            )
        return np.asarray(out.logits[0].numpy())


def prompt(parts: list[Any], first: int = 0) -> tuple[list[int], list[Image.Image], list[Video]]:
    """The same with placeholders, as a user of the runtime writes it; `first` is the number of the first part."""
    tokens: list[int] = []
    images, videos = [], []
    for number, part in enumerate(parts, first):
        if isinstance(part, int):
            tokens += random_tokens(part, seed=number)
        elif len(part) == 2:
            tokens += [VISION_START, IMAGE, VISION_END]
            images.append(source(part, number))
        else:
            tokens += [VISION_START, VIDEO, VISION_END]
            videos.append(clip(part, number))
    return tokens, images, videos


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_logits_equal_transformers(pair: Pair, conversation: str) -> None:
    parts = CONVERSATIONS[conversation]
    reference = Reference(pair, parts)
    expected = reference.logits()
    assert np.abs(expected).max() > 1
    read = pair.engine.pictures.read(*prompt(parts))
    assert list(read.tokens) == reference.tokens
    images = [picture.pixel_values for picture in read.pictures if picture.grid[0] == 1]
    for ours, theirs in zip(images, reference.pixels.get("pixel_values", []), strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
    with pair.engine.session() as session:
        # Whole steps, then odd ones that cut the pictures.
        np.testing.assert_allclose(session.prefill(*prompt(parts)), expected[-1], rtol=0, atol=TOLERANCE)
        session.reset()
        at = 0
        for length in itertools.cycle(LENGTHS):
            end = min(at + length, len(read.tokens))
            begun = [p for p, place in zip(read.pictures, read.starts, strict=True) if at <= place[0] < end]
            pixels: Any = (None, None)
            if begun:
                pixels = np.concatenate([p.pixel_values for p in begun]), np.array([p.grid for p in begun])
            logits = session.step(read.tokens[at:end], *pixels)
            np.testing.assert_allclose(logits, expected[end - 1], rtol=0, atol=TOLERANCE)
            if end == len(read.tokens):
                break
            at = end
        assert session.evictions == 0
        assert len(session.kept()) == len(read.tokens) * pair.engine.config.cache.num_streams


def test_turns_and_answers(pair: Pair) -> None:
    """Two prompts and two greedy answers; the reference sees it all at once, and would have said the same."""
    turns: list[list[Any]] = [[3, (96, 64), 2], [(64, 250), 4, (8, 64, 64), 1]]
    with pair.engine.session() as session:
        tokens, images, videos = prompt(turns[0])
        first = list(session.generate(tokens, 6, images=images, stop_ids=frozenset()))
        tokens, images, videos = prompt(turns[1], first=4)
        tokens = [*first[-1:], *tokens]  # the last token was not fed
        second = list(session.generate(tokens, 6, images=images, videos=videos, stop_ids=frozenset()))
        last = session.step(second[-1:])
        reference = Reference(pair, [*turns[0], first, *turns[1], second])
        assert session.tokens_seen == len(reference.tokens)
    expected = reference.logits()
    np.testing.assert_allclose(last, expected[-1], rtol=0, atol=TOLERANCE)
    expected[:, [IMAGE, VIDEO]] = -np.inf
    assert expected[-7:-1].argmax(axis=1).tolist() == second
    start = len(Reference(pair, turns[0]).tokens)
    assert expected[start - 1 : start + 5].argmax(axis=1).tolist() == first
