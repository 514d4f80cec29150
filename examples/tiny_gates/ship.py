"""Write the backbone as Hugging Face has it."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from data import END_OF_TEXT
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["write_base"]

# A question is asked as in the documents (documents.py).
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAnswer:' }}{% endif %}"
)


def write_base(folder: Path, model: PreTrainedModel, tokenizer: Path) -> None:
    """Write the backbone as Hugging Face has it, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(model.config))
    _write_json(folder / "generation_config.json", {"eos_token_id": model.config.eos_token_id, "do_sample": False})
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TEXT,
            "model_max_length": model.config.max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def _config(config: PretrainedConfig) -> dict[str, Any]:
    """config.json as transformers before 5 has it, which the official gates were made with."""
    fields: dict[str, Any] = config.to_diff_dict()
    rope = fields.pop("rope_parameters")
    fields |= {"model_type": config.model_type, "rope_theta": rope["rope_theta"], "torch_dtype": "bfloat16"}
    for name in ("dtype", "transformers_version", "layer_types", "use_cache"):
        fields.pop(name, None)
    return fields | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
