"""The cases that record_visual.py records: tiny random models, and conversations with images."""

from dataclasses import dataclass

__all__ = ["CASES", "CHECKPOINTS", "Case", "Checkpoint", "Turn"]


@dataclass(frozen=True)
class Checkpoint:
    """A tiny random model, as the official script's `build` takes it."""

    gate: str
    seed: int
    layers: int = 3
    kv_heads: int = 2
    heads: int = 4
    head_dim: int = 16
    hidden: int = 32


@dataclass(frozen=True)
class Turn:
    """What a user adds to the conversation, fed in steps of `chunks` tokens; then `decode` greedy tokens.

    `parts` is a row of text:TOKENS, image:HEIGHTxWIDTH and video:FRAMESxHEIGHTxWIDTH, sizes in patches.
    """

    parts: str
    chunks: tuple[int, ...]
    decode: int


@dataclass(frozen=True)
class Case:
    """One recording."""

    checkpoint: str
    covers: str
    budget: int
    buffer: int
    turns: tuple[Turn, ...]
    min_per_head: int = 0
    lookahead: int = 1
    seed: int = 0


CHECKPOINTS = {
    "rg10": Checkpoint("rg10", 20),
    "rg10_wide": Checkpoint("rg10", 21, layers=4, kv_heads=3, heads=6, head_dim=24, hidden=40),
    "rg": Checkpoint("rg", 23, head_dim=8),
}

# Seeds are such that in no eviction the best entry that goes and the worst that stays are nearer than 1e-3 (the scores'
# rounding is about 1e-5).
CASES = {
    "rg10_one_image": Case(
        "rg10", "one image in one step", 8, 4, (Turn("text:4 image:8x12 text:12", (42,), 20),), seed=109
    ),
    "rg10_two_images": Case(
        "rg10", "two images of different grids in one step", 16, 8,
        (Turn("text:3 image:4x6 text:5 image:12x4 text:6", (36,), 24),), seed=2,
    ),
    "rg10_adjacent_images": Case(
        "rg10", "images without text between; a step border between two; one image of one token; both options", 6, 3,
        (Turn("text:2 image:6x4 image:2x2 image:4x10 text:3", (10, 18), 20),), min_per_head=2, lookahead=4, seed=3,
    ),
    "rg10_later_turns": Case(
        "rg10", "text first; images in the second and third turn, after decode steps", 8, 4,
        (
            Turn("text:9", (9,), 5),
            Turn("text:3 image:6x8 text:4", (21,), 7),
            Turn("text:2 image:8x4 text:6", (18,), 12),
        ), seed=115,
    ),
    "rg10_cut_image": Case(
        "rg10", "an image over three steps; borders also just before its first and just after its last token", 8, 4,
        (Turn("text:6 image:8x12 text:5", (7, 5, 9, 10, 6), 20),), seed=103,
    ),
    "rg10_cut_two_images": Case(
        "rg10", "a step with the end of one image and the beginning of the next; a cut image in a later turn", 10, 5,
        (
            Turn("text:2 image:6x8 text:1 image:8x6 text:4", (9, 15, 11), 6),
            Turn("text:1 image:4x4 text:2", (4, 5), 14),
        ), lookahead=8, seed=6,
    ),
    "rg10_token_by_token": Case(
        "rg10", "an image in steps of one token; an eviction in every step", 4, 1,
        (Turn("text:2 image:4x6 text:2", (1,) * 12, 20),), seed=111,
    ),
    "rg10_large_image": Case(
        "rg10_wide", "a grid beyond the learned one; a budget that holds half of it", 24, 16,
        (Turn("text:5 image:16x12 text:7", (30, 32), 50),), seed=8,
    ),
    "rg10_video": Case(
        "rg10_wide", "a video of three frames with timestamps, then an image, in one step", 12, 6,
        (Turn("text:3 video:3x4x6 text:2 image:4x4 text:4", (48,), 20),), seed=107,
    ),
    "rg10_cut_video": Case(
        "rg10_wide", "borders inside a frame and between two frames; a second video in a later turn", 12, 6,
        (
            Turn("text:3 video:3x4x6 text:4", (20, 6, 14), 5),
            Turn("text:2 video:2x6x4 text:3", (27,), 12),
        ), seed=10,
    ),
    "rg10_text_only": Case("rg10", "no image at all", 8, 4, (Turn("text:30", (20, 10), 20),), seed=11),
    "rg_one_image": Case(
        "rg", "one image in one step", 8, 4, (Turn("text:4 image:8x12 text:12", (42,), 20),), seed=12
    ),
    "rg_cut_later_turns": Case(
        "rg", "two images, one cut; a cut image in a later turn", 12, 3,
        (
            Turn("text:3 image:4x8 text:2 image:8x6 text:3", (21, 11), 6),
            Turn("text:2 image:6x6 text:4", (5, 12), 14),
        ), lookahead=2, seed=13,
    ),
    "rg_text_only": Case("rg", "no image at all", 8, 1, (Turn("text:20", (20,), 20),), seed=14),
}  # fmt: skip
