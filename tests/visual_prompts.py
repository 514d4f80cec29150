"""Prompts with pictures for tests of sessions, and feeding them by hand."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pictures import picture
from support import IMAGE, VIDEO, VISION_END, VISION_START, random_tokens

from trimkv_export.models import VisionModules
from trimkv_export.package import VisionInfo
from trimkv_export.runtime import Engine, Session, Video, VisualPrompt

__all__ = ["Conversation", "by_hand", "image", "prompt", "snapshot", "starts", "step_by_hand", "video", "vision_info"]

IMAGE_PLACE = [VISION_START, IMAGE, VISION_END]
VIDEO_PLACE = [VISION_START, VIDEO, VISION_END]


def vision_info(**changes: Any) -> VisionInfo:
    """A tower that only says how large patches and tokens are, and which tokens stand for pictures."""
    modules = dict.fromkeys(
        ("patch", "block", "norm1", "norm2", "proj", "mlp_out", "merger", "merger_in", "merger_out"), ""
    )
    values: dict[str, Any] = {
        "modules": VisionModules(**modules, qkv=(), mlp_in=()), "prefix": "", "hidden_act": "gelu",
        "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "max_image_tokens": 40, "weight_bytes": 0,
        "image_token_id": IMAGE, "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
    }  # fmt: skip
    sizes = ("depth", "hidden_size", "intermediate_size", "num_heads", "merger_size", "out_hidden_size")
    return VisionInfo(**dict.fromkeys(sizes, 8) | values | changes)


def image(rows: int, columns: int, seed: int = 0) -> NDArray[np.uint8]:
    """A picture of rows x columns tokens."""
    return picture(32 * rows, 32 * columns, seed=seed)


def video(frames: int, rows: int, columns: int, seed: int = 0) -> Video:
    """A video whose frames have rows x columns tokens; two make a temporal patch. All of them are taken."""
    return Video([image(rows, columns, seed + i) for i in range(frames)], fps=2.0)


def prompt(engine: Engine, *parts: Any, seed: int = 0) -> VisualPrompt:
    """Parts are numbers (of random text tokens), lists (of tokens), images and videos, in their order."""
    tokens: list[int] = []
    images, videos = [], []
    for number, part in enumerate(parts):
        if isinstance(part, int):
            tokens += random_tokens(part, seed=seed + number)
        elif isinstance(part, list):
            tokens += part
        elif isinstance(part, Video):
            tokens += VIDEO_PLACE
            videos.append(part)
        else:
            tokens += IMAGE_PLACE
            images.append(part)
    return engine.pictures.read(tokens, images, videos)


def starts(read: VisualPrompt, start: int, end: int) -> tuple[Any, Any]:
    """pixel_values and image_grid_thw of a step of the tokens start:end."""
    begun = [p for p, at in zip(read.pictures, read.starts, strict=True) if start <= at[0] < end]
    if not begun:
        return None, None
    return np.concatenate([p.pixel_values for p in begun]), np.array([p.grid for p in begun])


def step_by_hand(session: Session, read: VisualPrompt, start: int, end: int) -> NDArray[np.float32]:
    """One step of the tokens start:end."""
    return session.step(read.tokens[start:end], *starts(read, start, end))


def by_hand(session: Session, read: VisualPrompt, lengths: Sequence[int]) -> list[NDArray[np.float32]]:
    """Steps of these lengths, over and over until the end; the logits of each."""
    logits: list[NDArray[np.float32]] = []
    at = 0
    for length in itertools.cycle(lengths):
        if at >= len(read.tokens):
            return logits
        end = min(at + length, len(read.tokens))
        logits.append(step_by_hand(session, read, at, end))
        at = end
    raise ValueError("no lengths")


def snapshot(session: Session) -> dict[str, Any]:
    """All of a session's state that can be seen."""
    found: dict[str, Any] = {name: array.tobytes() for name, array in session.state.items()}
    found |= {"kept": session.kept().tobytes(), "seen": session.tokens_seen, "next": session.next_position}
    return found


class Conversation:
    """A session of `engine` after an image and some text, `turns`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.turns = prompt(engine, 3, image(2, 3), 4)
        self.session = self.start()

    def start(self) -> Session:
        """Another session that has come as far."""
        session = self.engine.session()
        session.prefill(self.turns)
        session.step([1])
        return session

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Around what must change nothing: neither the state, nor what the next prompt gives."""
        before = snapshot(self.session)
        yield
        assert snapshot(self.session) == before
        feed = self.session._visual
        assert feed is not None
        assert (feed.empty, feed._features, len(feed._waiting), feed.count) == (True, None, 0, 0)
        following = prompt(self.engine, 2, image(3, 2, 9), 2, seed=9)
        with self.start() as other:
            assert self.session.prefill(following).tobytes() == other.prefill(following).tobytes()
            assert snapshot(self.session) == snapshot(other)
