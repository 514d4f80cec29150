"""Prompts with picture files through packages of Qwen2.5-VL and LLaVA, against transformers with a budget above the
context. Each side reads the images itself, and writes its own prompt.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import KINDS, picture
from PIL import Image
from seeing import PROCESSORS, make_seeing_checkpoint, seeing_model
from support import IMAGE, VIDEO, VISION_END, VISION_START, build, random_tokens
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trimkv_export.runtime import Engine, Video, VisualPrompt

TOLERANCE = 2e-4
PLACES = {IMAGE: [VISION_START, IMAGE, VISION_END], VIDEO: [VISION_START, VIDEO, VISION_END]}
# Numbers are text tokens, pairs the height and width of an image, triples frames, height and width of a video at 2
# frames per second: two positions in time for a temporal patch. A video that tokens follow is not longer than wide or
# high, for transformers 5 places them by these two alone; a video that ends the prompt has no vision_end.
CONVERSATIONS: list[list[Any]] = [
    [3, (56, 84), 4, (150, 90), 1],
    [(60, 200), (30, 28), 2],
    [2, (4, 56, 84), 3, (80, 56), 1],
    [5, (28, 56), 2, (12, 56, 30)],
]


@pytest.fixture(params=["qwen2_5_vl", "llava"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(family: str, tmp_path: Path) -> Iterator[Engine]:
    make_seeing_checkpoint(tmp_path, family)
    build(tmp_path, tmp_path / "package", budget=512, prefill_chunk=32, max_image_tokens=40)
    with Engine.open(tmp_path / "package", threads=1) as engine:
        yield engine


def source(part: tuple[int, int], number: int) -> Image.Image:
    """The image that is a part of a conversation."""
    return Image.fromarray(picture(*part, KINDS[number % len(KINDS)], number))


def read(engine: Engine, parts: list[Any], places: dict[int, list[int]]) -> VisualPrompt:
    """A conversation as the runtime reads it."""
    tokens: list[int] = []
    images, videos = [], []
    for number, part in enumerate(parts):
        if isinstance(part, int):
            tokens += random_tokens(part, seed=number)
        elif len(part) == 2:
            tokens += places[IMAGE]
            images.append(source(part, number))
        else:
            tokens += places[VIDEO]
            frames, height, width = part
            videos.append(Video([picture(height, width, seed=number + frame) for frame in range(frames)], fps=2.0))
            if number + 1 == len(parts):
                tokens.pop()
    return engine.pictures.read(tokens, images, videos)


def expected_logits(family: str, prompt: VisualPrompt, parts: list[Any]) -> NDArray[np.float32]:
    """[n, V] of transformers, which makes the pixels of images itself."""
    images = [source(part, number) for number, part in enumerate(parts) if isinstance(part, tuple) and len(part) == 2]
    inputs: dict[str, Any] = {}
    settings = {name: value for name, value in PROCESSORS[family].items() if name != "image_processor_type"}
    if family == "llava":
        inputs["pixel_values"] = CLIPImageProcessorPil(**settings)(images=images, return_tensors="pt")["pixel_values"]
    else:
        out = Qwen2VLImageProcessorPil(**settings)(images=images, return_tensors="pt")
        inputs |= {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}
        kinds = [{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in prompt.tokens]
        inputs["mm_token_type_ids"] = torch.tensor([kinds])
        videos = [shown for shown in prompt.pictures if shown.grid[0] > 1]
        if videos:
            inputs["pixel_values_videos"] = torch.from_numpy(np.concatenate([shown.pixel_values for shown in videos]))
            inputs["video_grid_thw"] = torch.tensor([shown.grid for shown in videos])
            inputs["second_per_grid_ts"] = torch.tensor([shown.second_per_grid for shown in videos])
    with torch.no_grad():
        out = seeing_model(family)(input_ids=torch.tensor([prompt.tokens]), **inputs)
    return np.asarray(out.logits[0].numpy())


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_logits_equal_transformers(engine: Engine, family: str, number: int) -> None:
    parts, places = CONVERSATIONS[number], PLACES
    if family == "llava":  # nothing encloses an image; it takes no videos
        parts, places = [part[-2:] if isinstance(part, tuple) else part for part in parts], {IMAGE: [IMAGE]}
    prompt = read(engine, parts, places)
    expected = expected_logits(family, prompt, parts)
    assert np.abs(expected).max() > 1
    with engine.session() as session:
        logits = session.prefill(prompt)
        np.testing.assert_allclose(logits, expected[-1], rtol=0, atol=TOLERANCE)
        assert len(session.kept()) == len(prompt.tokens) * engine.config.cache.num_streams
