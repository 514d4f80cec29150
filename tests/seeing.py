"""Small checkpoints of the families that see, with the demo's tokenizer and gates, and pictures of few pixels."""

import json
import shutil
from pathlib import Path
from typing import Any

from support import IMAGE, VIDEO, VISION_END, VISION_START, make_checkpoint
from visual_models import merged, save_checkpoint, visual_model

__all__ = ["FAMILIES", "PROCESSORS", "make_seeing_checkpoint", "seeing_model"]

FAMILIES = ("qwen2_5_vl", "llava")
TEXT = {"vocab_size": 263, "max_position_embeddings": 4096}
# Tokens of 28 x 28 pixels; images of 56 x 56 pixels, 16 tokens.
CHANGES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": TEXT, "vision_config": {"patch_size": 14, "window_size": 56}, "image_token_id": IMAGE,
        "video_token_id": VIDEO, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
    },
    "llava": {
        "text_config": TEXT, "vision_config": {"patch_size": 14, "image_size": 56}, "image_token_index": IMAGE,
        "image_seq_length": 16,
    },
}  # fmt: skip
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": CLIP | {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "min_pixels": 784, "max_pixels": 12845056,
    },
    "llava": CLIP | {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56}, "do_center_crop": True,
    },
}  # fmt: skip


def seeing_model(family: str, **changes: Any) -> Any:
    """A random model that knows the tokens of the demo's tokenizer."""
    return visual_model(family, **merged(CHANGES[family], changes))


def make_seeing_checkpoint(out: Path, family: str, **changes: Any) -> Path:
    """Write out/base and out/gates: a `seeing_model` and what a package needs to read text and pictures."""
    save_checkpoint(out, seeing_model(family, **changes))
    make_checkpoint(out / "demo", family="qwen3_vl")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(out / "demo" / "base" / name, out / "base" / name)
    shutil.rmtree(out / "demo")
    (out / "base" / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[family]))
    return out
