"""Small random models of the families with a vision tower, made by transformers and saved as checkpoints are."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support import randomize, write_gates
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

__all__ = ["IMAGE", "LLAVA_1_5_7B", "QWEN2_5_VL_7B", "merged", "save_checkpoint", "visual_model"]

# config.json of Qwen/Qwen2.5-VL-7B-Instruct, with the decoder's fields at the top.
QWEN2_5_VL_7B: dict[str, Any] = {
    "model_type": "qwen2_5_vl", "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 3584,
    "intermediate_size": 18944, "max_position_embeddings": 128000, "max_window_layers": 28, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
# Of llava-hf/llava-1.5-7b-hf, which leaves the defaults of transformers out.
LLAVA_1_5_7B: dict[str, Any] = {
    "model_type": "llava", "image_token_index": 32000, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064},
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    },
}  # fmt: skip
IMAGE = 90  # the image token of both
TEXT: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 2, 3]}},
        "vision_config": {
            "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 48,
            "patch_size": 4, "window_size": 24, "fullatt_block_indexes": [1], "tokens_per_second": 2,
        },
        "image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 3,
            "num_attention_heads": 3, "image_size": 20, "patch_size": 4,
        },
        "image_token_index": IMAGE, "image_seq_length": 25,
    },
}  # fmt: skip
CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
}
# What transformers calls a tensor in memory, and the checkpoints on the hub in a file.
HUB_NAMES = {
    "qwen2_5_vl": (("model.language_model.", "model."), ("model.visual.", "visual.")),
    "llava": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
}


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A config with changes, section by section."""
    out = dict(config)
    for key, value in changes.items():
        out[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    return out


def visual_model(family: str, **changes: Any) -> Any:
    """The model in memory."""
    kind, model_class = CLASSES[family]
    torch.manual_seed(0)
    model = model_class(kind(**merged(CONFIGS[family], changes))).eval()
    randomize(model)
    return model


def save_checkpoint(folder: Path, model: Any, layout: str = "hub", gate: str = "rg10") -> None:
    """Write folder/base and folder/gates.

    layout: the names of tensors: "memory", as transformers 4.52 writes them; "hub"; "library", as this version writes
        them.
    """
    base, config = folder / "base", model.config
    model.save_pretrained(base)
    if layout != "library":
        tied = config.tie_word_embeddings
        state = {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
        if layout == "hub":
            state = {_hub_name(config.model_type, name): value for name, value in state.items()}
        save_file({name: value.contiguous().clone() for name, value in state.items()}, base / "model.safetensors")
    text = config.text_config
    write_gates(folder / "gates", gate, text.num_hidden_layers, text.hidden_size, text.num_key_value_heads)
    assert json.loads((base / "config.json").read_text())["model_type"] == config.model_type


def _hub_name(family: str, name: str) -> str:
    return next((new + name.removeprefix(old) for old, new in HUB_NAMES[family] if name.startswith(old)), name)
