"""Checkpoints that are quantised already: the layouts of GPTQ, AWQ and compressed-tensors on the Hugging Face hub.

All mean value = (number - zero point) * scale, a scale (and zero point) for each group of columns of a row. They differ
in how numbers of N rows and K columns are packed into int32, low bits first, and in their names:

    gptq                 X.qweight [K·bits/32, N], X.qzeros [G, N·bits/32], X.scales [G, N], X.g_idx [K], the group of
                         each column; in its first version a zero point is stored less one, subtracted in the word
    awq (gemm)           X.qweight [K, N/8], X.qzeros [G, N/8], of eight rows 0 2 4 6 1 3 5 7, X.scales [G, N]
    compressed-tensors   X.weight_packed [N, K·bits/32], X.weight_scale [N, G], X.weight_shape [2] and, if asymmetric,
                         X.weight_zero_point [N·bits/32, G]

Here they become numbers [N, K], scales and zero points [N, G]; nothing is computed, so nothing is rounded.

Modules may be left in float: the tensors say which, and config.json says it for those who have no tensors. A key of
config.json that is neither read nor known not to matter is refused by name.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.checkpoint.config_keys import is_empty, refuse_unknown
from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.files import is_file, read_json_object
from trimkv_export.words import shorten

__all__ = ["QUANTIZE_CONFIGS", "StoredQuantization", "read_quantization"]

METHODS = ("awq", "compressed-tensors", "gptq")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# What compressed-tensors calls those of the other two.
COMPRESSED_NAMES = {"qweight": "weight_packed", "scales": "weight_scale", "qzeros": "weight_zero_point"}

# Where older programs wrote what config.json has in quantization_config, and whose layout that is.
QUANTIZE_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# What AutoAWQ called some keys there.
AWQ_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}
# How numbers were found, by which program, and which kernels it would take: of no matter for what they stand for.
_SEARCH = """
    act_data_type act_dynamic act_group_aware act_group_size act_sym amp asym auto_gc autoround_version backend
    batch_size bits block_name_to_quantize cache_block_outputs calibration_data_min_length damp_auto_increment
    damp_percent dataset desc_act disable_exllama do_fuse dynamic_max_gap enable_alg_ext enable_full_range
    enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input enable_torch_compile exllama_config failsafe
    fallback foem fuse_max_seq_len gc_mode gptaq gradient_accumulate_steps group_size hyb_act infer_loss iters lm_head
    low_cpu_mem_usage low_gpu_mem_usage lr max_input_length meta minmax_lr mock_quantization model_file_base_name
    model_name_or_path model_seqlen module_name_preceding_first_block modules_to_fuse mse not_use_best_mse nsamples
    offload_to_disk offload_to_disk_path packing_format pad_token_id parallel_packing provider quant_method
    quant_nontext_module quantizer sampler scale_dtype seed seqlen static_groups supported_types sym
    to_quant_block_names tokenizer train_bs true_sequential use_cuda_fp16 use_exllama v2 v2_alpha v2_memory_device
    version vram_strategy wait_for_submodule_finalizers zero_point
"""
_KNOWN = frozenset(_SEARCH.split()) | AWQ_NAMES.keys()
_COMPRESSED_KNOWN = frozenset(
    {"format", "global_compression_ratio", "is_quantized", "quant_method", "quantization_status", "run_compressed"}
) | {"version"}
_COMPRESSED_WEIGHTS_KNOWN = frozenset({"observer", "observer_kwargs"})

Numbers = NDArray[np.uint8]


@dataclass(frozen=True)
class StoredQuantization:
    """How the linear layers of a checkpoint are quantised.

    Attributes:
        method: one of `METHODS`.
        bits: 4 or 8.
        group_size: columns with one scale; None means the whole row.
        zeros: whether zero points are stored; without them they are 2^(bits-1).
        zero_offset: what is added to the stored ones.
        middle_zeros: they are stored, and config.json says that they are 2^(bits-1).
        ordered: columns lie in the order of their groups; otherwise the checkpoint must say that they do (`g_idx`).
        head: config.json says that the head is quantised too.
        in_float: parts of the names of modules that config.json leaves in float.
        only: the ends of the names of those that are quantised; empty where config.json does not say.
    """

    method: str
    bits: int
    group_size: int | None
    zeros: bool
    zero_offset: int = 0
    middle_zeros: bool = False
    ordered: bool = True
    head: bool = False
    in_float: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def leaves_in_float(self, module: str) -> bool:
        """What config.json says of a module. Names that it gives as regular expressions are passed over."""
        listed = any(part in module for part in self.in_float)
        return listed or bool(self.only and not module.endswith(self.only))

    def tensors(self, weight: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What a checkpoint has in place of a `weight` of this shape: qweight, scales, qzeros -> name and shape."""
        rows, columns = shape
        groups, per = (1 if self.group_size is None else -(-columns // self.group_size)), 32 // self.bits
        row_words, column_words = -(-rows // per), -(-columns // per)  # the last may have room to spare
        shapes = {
            "gptq": {"qweight": (column_words, rows), "scales": (groups, rows), "qzeros": (groups, row_words)},
            "awq": {"qweight": (columns, row_words), "scales": (groups, rows), "qzeros": (groups, row_words)},
            "compressed-tensors": {
                "qweight": (rows, column_words), "scales": (rows, groups), "qzeros": (row_words, groups),
            },
        }[self.method]  # fmt: skip
        stem = weight.removesuffix("weight")
        names = COMPRESSED_NAMES if self.method == "compressed-tensors" else {}
        if not self.zeros:
            del shapes["qzeros"]
        return {part: (stem + names.get(part, part), found) for part, found in shapes.items()}

    @property
    def beside(self) -> tuple[str, ...]:
        """Ends of the names of further tensors, which say nothing new: the shape."""
        return (".weight_shape",) if self.method == "compressed-tensors" else ()

    def order(self, weight: str) -> str | None:
        """Name of the tensor that says which group each column of a `weight` is of; None where the layout has none."""
        return weight.removesuffix("weight") + "g_idx" if self.method == "gptq" else None

    def check_order(self, groups: NDArray[Any], name: str) -> None:
        """Check what the tensor `name` says of the columns.

        Raises:
            UnsupportedModelError: they do not lie in the order of their groups.
        """
        wanted = np.arange(len(groups)) // (self.group_size or max(len(groups), 1))
        wrong = np.flatnonzero(groups != wanted)
        if len(wrong):
            raise UnsupportedModelError(
                f"{name} puts column {wrong[0]} into group {groups[wrong[0]]}, and not {wanted[wrong[0]]}: columns in "
                f"another order (desc_act) are not supported ({len(wrong)} such in this tensor); quantise with "
                "desc_act false, or with static_groups"
            )

    def numbers(self, packed: NDArray[Any], shape: tuple[int, ...]) -> Numbers:
        """Stored qweight of a matrix of this shape -> numbers [N, K]."""
        rows, columns = shape
        if self.method == "awq":
            return self._awq(packed).T[:rows]
        if self.method == "gptq":
            return self._unpacked(packed, 0).T[:, :columns]
        return self._unpacked(packed, 1)[:, :columns]

    def zero_points(self, packed: NDArray[Any], rows: int, name: str) -> Numbers:
        """Stored qzeros of a matrix of N rows -> zero points [N, G].

        Raises:
            CheckpointError: one is not what config.json says.
        """
        if self.method == "awq":
            return self._awq(packed).T[:rows]
        if self.method == "gptq":
            words, middle = packed.view(np.uint32), 1 << (self.bits - 1)
            # Symmetric ones are all alike. Some programs write the second version and call it the first.
            if self.zero_offset and not (self.middle_zeros and (words == self._word(middle)).all()):
                words = words + self._word(self.zero_offset)  # with carries, as they were subtracted
            found = self._unpacked(words, 1).T[:rows]
            if self.middle_zeros and (found != middle).any():
                raise CheckpointError(
                    f"{name} has a zero point of {found[found != middle][0]}, though config.json says that all are "
                    f"{middle} (sym): the two are of different checkpoints; fetch both again"
                )
            return found
        return self._unpacked(packed, 0)[:rows]

    def scales(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Stored scales -> scales [N, G], in their own type."""
        return stored if self.method == "compressed-tensors" else stored.T

    def _word(self, number: int) -> np.uint32:
        """A word of int32 that holds a number as often as there is room."""
        return np.uint32(sum(number << at for at in range(0, 32, self.bits)))

    def _unpacked(self, packed: NDArray[Any], axis: int) -> Numbers:
        """Numbers of int32, those of one word side by side along `axis`."""
        words, per = packed.view(np.uint32), 32 // self.bits
        parts = [(words >> np.uint32(self.bits * i)).astype(np.uint8) & ((1 << self.bits) - 1) for i in range(per)]
        shape = [size * (per if at == axis else 1) for at, size in enumerate(packed.shape)]
        return np.stack(parts, axis + 1).reshape(shape)

    def _awq(self, packed: NDArray[Any]) -> Numbers:
        found = self._unpacked(packed, 1).reshape(len(packed), -1, 8)
        out = np.empty_like(found)
        out[..., AWQ_ORDER] = found
        return out.reshape(len(packed), -1)


def read_quantization(config: Mapping[str, Any], where: Path) -> StoredQuantization | None:
    """What a Hugging Face config.json (read from `where`) says, or else a file of `QUANTIZE_CONFIGS` next to it.

    None if the checkpoint is not quantised.

    Raises:
        CheckpointError: a file next to config.json cannot be read.
        UnsupportedModelError: a method, or an option, that this version cannot read or does not know; key and value
            are named.
    """
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if found is None:
        for name, method in QUANTIZE_CONFIGS.items():
            file = where.parent / name
            if is_file(file):
                content = read_json_object(file, CheckpointError, "fetch it again")
                return _read({"quant_method": method} | content, file, "")
        return None
    return _read(found, where, "quantization_config.")


def _read(found: Any, where: Path, path: str) -> StoredQuantization:
    if not isinstance(found, dict) or found.get("quant_method") not in METHODS:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise UnsupportedModelError(
            f"{where}: {path}quant_method {shorten(method)} is not supported; supported: "
            f"{', '.join(METHODS)}; or take the checkpoint that is not quantised"
        )
    if found["quant_method"] == "compressed-tensors":
        return _compressed(_Reader(found, where, path))
    if found["quant_method"] == "awq":
        return _awq(_Reader({AWQ_NAMES.get(str(key), str(key)): value for key, value in found.items()}, where, path))
    return _gptq(_Reader(found, where, path))


def _awq(read: "_Reader") -> StoredQuantization:
    bits, group = read.one_of("bits", (4, 8)), read.group(read.get("group_size"))
    for key in ("version", "format", "checkpoint_format"):
        read.one_of(key, ("gemm", "GEMM"), "gemm")
    read.one_of("method", ("awq",), "awq")
    read.one_of("pack_dtype", ("int32",), "int32")
    read.one_of("bits", (4,))
    read.one_of("zero_point", (True,), True)
    _check_rounding(read)
    skipped = [*read.names("modules_to_not_convert"), *_overrides(read, "dynamic"), *_overrides(read, "extra_config")]
    read.refuse_rest(_KNOWN)
    head = read.get("lm_head") is True
    return StoredQuantization("awq", bits, group, zeros=True, head=head, in_float=tuple(skipped))


def _gptq(read: "_Reader") -> StoredQuantization:
    bits, group = read.one_of("bits", (4, 8)), read.group(read.get("group_size"))
    ordered = not read.one_of("desc_act", (False, True, None), False)
    versions = {read.one_of(key, ("gptq", "gptq_v2", None)) for key in ("checkpoint_format", "format")} - {None}
    if len(versions) > 1:
        raise read.unsupported("format", read.get("format"), "the same as checkpoint_format")
    read.one_of("method", ("gptq",), "gptq")
    read.one_of("pack_dtype", ("int32",), "int32")
    _check_rounding(read)
    skipped = [*read.names("modules_to_not_convert"), *_overrides(read, "dynamic"), *_overrides(read, "extra_config")]
    blocks = read.get("modules_in_block_to_quantize") or []
    flat = [name for block in blocks for name in (block if isinstance(block, list) else [block])]
    if not all(isinstance(name, str) for name in flat):
        raise read.unsupported("modules_in_block_to_quantize", blocks, "lists of names")
    read.refuse_rest(_KNOWN)
    return StoredQuantization(
        "gptq",
        bits,
        group,
        zeros=True,
        zero_offset=int("gptq_v2" not in versions),
        middle_zeros=read.get("sym") is True,
        ordered=ordered,
        head=read.get("lm_head") is True,
        in_float=tuple(skipped),
        only=tuple(flat),
    )


def _check_rounding(read: "_Reader") -> None:
    """What AutoRound writes of numbers: whole ones, of weights alone."""
    read.one_of("data_type", ("int",), "int")
    read.one_of("act_bits", (16, 32), 16)


def _overrides(read: "_Reader", key: str) -> list[str]:
    """Options of single modules, by their names: they may be left in float, and else must be as all others are.

    GPTQModel calls it `dynamic`, its names are regular expressions, and "-:" leaves modules in float; AutoRound calls
    it `extra_config`. Returns the names of those in float that are plain text.
    """
    found, out = read.get(key) or {}, []
    if not isinstance(found, dict):
        raise read.unsupported(key, found, "an object")
    for name, options in found.items():
        options = options or {}
        if not isinstance(options, dict):
            raise read.unsupported(f"{key}.{name}", options, "an object")
        if name.startswith("-:") or options.get("bits") in (16, 32):
            plain = name.removeprefix("-:").removeprefix("+:").replace("\\.", ".").strip("^$").removeprefix(".*")
            out.append(plain.removesuffix(".*"))
            continue
        for option, value in options.items():
            changes = option not in ("desc_act", "sym") and value != read.get(option)
            if changes and (option not in _KNOWN or option in ("bits", "group_size")) and not is_empty(value):
                raise read.unsupported(f"{key}.{name}.{option}", value, f"what all modules have, {read.get(option)}")
    return [name for name in out if not set(name) & set("\\[](){}*+?|^$")]


def _compressed(read: "_Reader") -> StoredQuantization:
    read.one_of("format", ("pack-quantized",))
    groups = read.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise read.unsupported("config_groups", groups, "one group of layers")
    ((name, group),) = groups.items()
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise read.unsupported("config_groups", groups, "weights, and activations that are not quantised")
    group = _Reader(group, read.where, f"{read.path}config_groups.{name}.")
    for key in ("input_activations", "output_activations"):
        if not is_empty(group.get(key)):
            raise group.unsupported(key, group.get(key), "activations that are not quantised (null)")
    group.one_of("format", ("pack-quantized", None))
    group.refuse_rest({"weights", "targets"})
    inner = _Reader(group.get("weights"), read.where, f"{group.path}weights.")
    bits = inner.one_of("num_bits", (4, 8))
    inner.one_of("type", ("int",), "int")
    inner.one_of("actorder", (None, "weight", "static"), None)
    inner.one_of("dynamic", (None, False))
    per_row = inner.one_of("strategy", ("group", "channel")) == "channel"
    size = None if per_row else inner.group(inner.get("group_size"))
    if per_row:
        inner.one_of("group_size", (None, -1, 0))
    symmetric = inner.one_of("symmetric", (True, False), True)
    for key in ("scale_dtype", "zp_dtype"):
        inner.get(key)  # the tensors say it
    inner.refuse_rest(_COMPRESSED_WEIGHTS_KNOWN)
    read.one_of("quantization_status", ("compressed", None))
    sparsity = read.get("sparsity_config")
    if not is_empty(sparsity) and not (isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"):
        raise read.unsupported("sparsity_config", sparsity, "weights that are not sparse (dense)")
    skipped = read.names("ignore")
    read.refuse_rest(_COMPRESSED_KNOWN)
    plain = tuple(each for each in skipped if not each.startswith("re:"))
    head = not any("lm_head" in each for each in skipped)
    return StoredQuantization("compressed-tensors", bits, size, zeros=not symmetric, head=head, in_float=plain)


class _Reader:
    """Values of an object in config.json, each one of a few; it remembers which were read."""

    def __init__(self, config: Mapping[str, Any], where: Path, path: str) -> None:
        self.config, self.where, self.path = config, where, path
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        """The value; None where there is none."""
        self._read.add(key)
        return self.config.get(key)

    def refuse_rest(self, known: Collection[str]) -> None:
        """Refuse keys that were not read and are not known."""
        refuse_unknown(self.config, self._read | set(known), self.where, self.path)

    def unsupported(self, key: str, value: Any, supported: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.where}: {self.path}{key} {shorten(value)} is not supported; supported: {supported}"
        )

    def one_of(self, key: str, supported: tuple[Any, ...], default: Any = None) -> Any:
        self._read.add(key)
        value = self.config.get(key, default)
        if not any(value is known or (type(value) is type(known) and value == known) for known in supported):
            raise self.unsupported(key, value, ", ".join(map(str, supported)))
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names, or none."""
        value = self.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.unsupported(key, value, "a list of names")
        return tuple(value)

    def group(self, value: Any) -> int | None:
        """Columns with one scale; -1 is the whole row."""
        if type(value) is not int or value not in (-1, 16, 32, 64, 128, 256):
            raise self.unsupported("group_size", value, "-1, 16, 32, 64, 128, 256")
        return None if value == -1 else value
