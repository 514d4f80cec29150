"""Small checkpoints of the families that see, beside the demo's Qwen3-VL: its decoder's sizes, tokenizer and gates."""

import json
from pathlib import Path
from typing import Any

import torch
from support import IMAGE, SMALL, VIDEO, VISION_END, VISION_START, make_checkpoint, randomize
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

__all__ = ["FAMILIES", "make_seeing_checkpoint", "model"]

FAMILIES = ("qwen2_5_vl", "llava")
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
# Tokens of 28 x 28 pixels; images of 56 x 56 pixels, 16 tokens.
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": CLIP
    | {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "min_pixels": 784, "max_pixels": 12845056,
    },
    "llava": CLIP
    | {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56}, "do_center_crop": True,
    },
}  # fmt: skip


def model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model; `changes` are fields of the configuration, those of a section in a dictionary."""
    text = {
        "vocab_size": 263, "hidden_size": SMALL["hidden"], "intermediate_size": SMALL["intermediate"],
        "num_hidden_layers": SMALL["layers"], "num_attention_heads": SMALL["heads"],
        "num_key_value_heads": SMALL["kv_heads"], "max_position_embeddings": 4096,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 14}
    torch.manual_seed(0)
    if family == "llava":
        vision |= {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "projection_dim": 16}
        sections = {
            "text_config": text | {"model_type": "llama"},
            "vision_config": vision | {"model_type": "clip_vision_model"},
        }
        made = LlavaForConditionalGeneration(LlavaConfig(**sections, image_token_id=IMAGE, **changes))
    else:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
        vision |= {
            "depth": 2, "num_heads": 2, "out_hidden_size": SMALL["hidden"], "window_size": 56,
            "fullatt_block_indexes": [1], "tokens_per_second": 2,
        }  # fmt: skip
        tokens = {"image": IMAGE, "video": VIDEO, "vision_start": VISION_START, "vision_end": VISION_END}
        ids = {f"{name}_token_id": token for name, token in tokens.items()}
        made = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids | changes)
        )
    randomize(made)
    return made.eval()


def make_seeing_checkpoint(out: Path, family: str, **changes: Any) -> Path:
    """Write out/base and out/gates: a `model` and its processor's configuration."""
    make_checkpoint(out, family="qwen3_vl")
    for file in (out / "base").glob("*preprocessor_config.json"):
        file.unlink()
    model(family, **changes).save_pretrained(out / "base")
    (out / "base" / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[family]))
    return out
