"""TensorRT-LLM's engine folder inside a package, for the versions that have an engine backend.

*Not run here*: TensorRT-LLM needs an NVIDIA GPU.
"""

import importlib.metadata
import json
import re
import shutil
from pathlib import Path
from typing import Any

from trimkv_export.backends.tensorrt import PLUGIN
from trimkv_export.errors import EngineError, MissingDependencyError
from trimkv_export.files import link_or_copy
from trimkv_export.package import DECODER_ENGINE, LLM_FOLDER, PackageConfig

__all__ = ["installed_version", "write_engine_folder"]

DISTRIBUTION = "tensorrt-llm"
# The last version with an engine backend: release, release candidate. Those after it run PyTorch models only.
LAST = ((1, 3, 0), 20)
FINAL = 1 << 30  # sorts behind every release candidate

LOADER = '''"""Loads this engine folder: the plugins, then the engine. `python load.py` prints its inputs and outputs.

TensorRT-LLM keeps a paged cache of its own, which this engine does not have: its cache are the tensors past.* and
present.*, bound to one address each. So its runtime loads the engine, and the caller runs it through the session:

    from load import load
    session = load()

The plugins are native code. Those of an installed trimkv-export are loaded; the library in this folder only when it is
asked for, by `load(trust_package_plugin=True)` or `python load.py --trust-package-plugin`.
"""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PLUGIN = "libtrimkv_plugin.so"


def find_plugin(trust_package_plugin: bool) -> Path:
    """The library of an installed trimkv-export; where there is none, and it is trusted, that of this folder."""
    found = importlib.util.find_spec("trimkv_export")
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (Path(folder) / "native" / PLUGIN).is_file():
            return Path(folder) / "native" / PLUGIN
    if trust_package_plugin:
        return FOLDER / PLUGIN
    sys.exit(
        f"error: {PLUGIN} is not installed here: install trimkv-export with it, or pass --trust-package-plugin "
        "(trust_package_plugin=True) if you trust whoever made this folder: it is native code"
    )


def load(trust_package_plugin: bool = False):
    """The session of the engine, with the prefill profile (0); decode is profile 1."""
    plugin = find_plugin(trust_package_plugin)
    import tensorrt
    from tensorrt_llm.runtime import Session

    tensorrt.get_plugin_registry().load_library(str(plugin))
    return Session.from_serialized_engine((FOLDER / "rank0.engine").read_bytes())


if __name__ == "__main__":
    engine = load("--trust-package-plugin" in sys.argv[1:]).engine
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        kind, dtype = engine.get_tensor_mode(name).name, engine.get_tensor_dtype(name).name
        print(name, kind, dtype, engine.get_tensor_shape(name))
'''


def installed_version() -> str:
    """The version of TensorRT-LLM.

    Raises:
        MissingDependencyError: it is not installed.
        EngineError: this version has no engine backend.
    """
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependencyError(
            "target tensorrt-llm needs TensorRT-LLM up to 1.3.0rc20; install it with: pip install tensorrt-llm==1.2.1"
        ) from None
    found = re.match(r"(\d+)\.(\d+)\.(\d+)(?:rc(\d+))?", version)
    if found is None:
        raise EngineError(f"TensorRT-LLM {version!r} is not a version that is known here; install tensorrt-llm==1.2.1")
    release = tuple(map(int, found.groups()[:3]))
    if (release, int(found[4]) if found[4] else FINAL) > LAST:
        raise EngineError(
            f"TensorRT-LLM {version} has no engine backend, which ended with 1.3.0rc20: it runs PyTorch models only. "
            "Use --target tensorrt, or install tensorrt-llm==1.2.1"
        )
    return version


def write_engine_folder(stage: Path, config: PackageConfig, version: str, max_batch: int) -> None:
    """Write `tensorrt-llm/` into a package that has its decoder's engine, which is linked, not copied."""
    folder = stage / LLM_FOLDER
    link_or_copy(stage / DECODER_ENGINE, folder / "rank0.engine")
    shutil.copyfile(stage / PLUGIN, folder / PLUGIN)
    content = {"version": version, "pretrained_config": _pretrained(config), "build_config": _build(config, max_batch)}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "load.py").write_text(LOADER, encoding="utf-8")


def _pretrained(config: PackageConfig) -> dict[str, Any]:
    """Fields of TensorRT-LLM's PretrainedConfig (tensorrt_llm/models/modeling_utils.py)."""
    model = config.model
    return {
        "architecture": "TrimKVForCausalLM",  # none of its own models: those have other inputs
        "dtype": config.precision.dtype,
        "logits_dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_size": model.head_dim,
        "hidden_act": model.hidden_act,
        "norm_epsilon": model.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox" if model.rope.axes is None else "mrope",
        "max_position_embeddings": model.max_position_embeddings,
        "qk_layernorm": model.qk_norm,
        "mapping": {"world_size": 1, "gpus_per_node": 8, "tp_size": 1, "pp_size": 1, "cp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }


def _build(config: PackageConfig, max_batch: int) -> dict[str, Any]:
    """Fields that TensorRT-LLM's BuildConfig and its C++ runtime (gptJsonConfig.cpp) read."""
    return {
        "max_input_len": config.prefill_chunk,
        "max_seq_len": config.model.max_position_embeddings,
        "opt_batch_size": max_batch,
        "max_batch_size": max_batch,
        "max_beam_width": 1,
        "max_num_tokens": max(config.prefill_chunk, max_batch),
        "opt_num_tokens": max_batch,
        "max_prompt_embedding_table_size": 0,
        "kv_cache_type": "DISABLED",
        "gather_context_logits": False,
        "gather_generation_logits": False,
        "strongly_typed": True,
        "lora_config": {},
        "plugin_config": {
            "gpt_attention_plugin": None,
            "lora_plugin": None,
            "remove_input_padding": False,
            "paged_kv_cache": False,
            "tokens_per_block": 32,
            "context_fmha": False,
            "use_paged_context_fmha": False,
        },
    }
