"""The training loop: gates learn, the backbone stays; stopped, it goes on exactly where it was."""

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trimkv_export import __version__
from trimkv_export.checkpoint.backbone import Backbone, open_backbone
from trimkv_export.checkpoint.check import check_tensors
from trimkv_export.errors import CheckpointError, EngineError, OptionError, UnsupportedModelError
from trimkv_export.files import open_regular, writable
from trimkv_export.models import DecoderSpec, decoder_spec, tensor_names, vision_spec
from trimkv_export.package.staging import require_free, staged_folder
from trimkv_export.training.gates import load_gates, make_gates, write_gates
from trimkv_export.training.losses import capacity_loss, prediction_losses
from trimkv_export.training.model import GatedModel, load_backbone
from trimkv_export.training.options import TrainingOptions
from trimkv_export.training.rows import Row, Rows
from trimkv_export.training.start import start_gates
from trimkv_export.words import first_line, shorten

__all__ = ["RECORD", "Report", "open_trainable", "require_output", "state_file", "train"]

RECORD = "training.json"  # in the folder of the gates: how they were made
LOOKED_AT = 64  # positions of a row where the capacity loss looks
AVERAGED = 20  # the last steps, in the report

Progress = Callable[[str, int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        output: the folder of the gates.
        steps: in all.
        resumed_from: the step that this run began at.
        tokens: that the gates have seen, in all.
        parameters: of the gates.
        kl, next_token, capacity: losses, each the mean of the last steps.
        precision: "bf16" or "fp32".
        seconds: of this run.
    """

    output: Path
    steps: int
    resumed_from: int
    tokens: int
    parameters: int
    kl: float
    next_token: float
    capacity: float
    precision: str
    device: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"output": str(self.output)}


def open_trainable(folder: Path, options: TrainingOptions) -> tuple[Backbone, DecoderSpec]:
    """Open a backbone and check, before anything large is loaded, that gates can be trained for it.

    Raises:
        CheckpointError: it is damaged or incomplete.
        UnsupportedModelError: a family or an option that this version does not have; a model of pictures; quantised
            weights.
    """
    backbone = open_backbone(folder)
    where = folder / "config.json"
    spec = decoder_spec(backbone.config, where, options.context)
    if vision_spec(backbone.config, where) is not None:
        raise UnsupportedModelError(
            f"{where}: a {shorten(backbone.config['model_type'])} sees pictures, and training reads text alone: gates "
            "that have seen no picture would not know what to keep of one"
        )
    if backbone.config.get("quantization_config"):
        raise UnsupportedModelError(
            f"{where}: its weights are quantised, and gates are trained with those that they were made of: name that "
            "checkpoint; the gates fit both"
        )
    if options.context > spec.max_position_embeddings:
        raise OptionError(
            f"--context {options.context} is beyond the {spec.max_position_embeddings:,} positions of the model"
        )
    names = tensor_names(backbone.config, where, backbone.tensors)
    tied = {"lm_head.weight"} if spec.tie_word_embeddings else set()
    check_tensors(
        {ours: backbone.tensors[stored] for ours, stored in names.items()},
        spec.tensors(),
        where=folder,
        ignore=lambda name: name in tied or name.endswith("rotary_emb.inv_freq"),
    )
    return backbone, spec


def require_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse, before the work, an output that `train` would refuse after it.

    Raises:
        OutputError: it exists, or cannot be written.
        OptionError: a stopped run left its state, and `resume` is not set.
    """
    require_free(output, overwrite=overwrite, ours=_is_ours)
    if state_file(output).exists() and not resume:
        raise OptionError(f"{state_file(output)}: an earlier run was stopped: go on with --resume, or remove the file")


def _is_ours(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def state_file(output: Path) -> Path:
    """Where the state of a run lies until it has ended."""
    return output.with_name(f"{output.name}.training")


def train(
    backbone: Backbone,
    spec: DecoderSpec,
    rows: Rows,
    options: TrainingOptions,
    output: Path,
    *,
    base_model: str | None = None,
    start: Path | None = None,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    save_every: int = 20,
    progress: Progress = lambda _what, _done, _total, _values: None,
) -> Report:
    """Train gates and write them, in the layout of the official checkpoints.

    Every `save_every` steps the state goes to `state_file(output)`; the folder appears at the end, as a whole, and the
    state is removed. On one machine, a run that was stopped and resumed gives the same bytes as one that was not.

    Args:
        backbone, spec: of `open_trainable`.
        rows: what is read; row `step * options.rows + k` is the k-th of a step.
        options: how.
        output: folder that is written.
        base_model: what config.json names as the backbone; None is its path from `output`.
        start: gates to begin with, of the kind and width of `options`; None makes new ones.
        device: as torch names it.
        resume: go on with the state of an earlier run, if there is one.
        overwrite: replace gates that were trained before.
        save_every: steps from one saved state to the next.
        progress: called with what is done, steps (or rows of the start) done and in all, and the losses of the last.

    Raises:
        OptionError: a state is there, of other options, rows or backbone, or `resume` was not asked for.
        CheckpointError: the state is damaged, `start` does not fit, or transformers cannot load the backbone.
        OutputError: the output exists, or cannot be written.
        EngineError: no such device, its memory does not suffice, or losses are no longer finite.
    """
    began = time.monotonic()
    place = _device(device)
    bf16 = options.precision == "bf16" or (options.precision == "auto" and _has_bf16(place))
    require_output(output, resume=resume, overwrite=overwrite)
    with staged_folder(output, overwrite=overwrite, ours=_is_ours) as folder:
        run = _Run(backbone, spec, rows, options, place, bf16, start)
        state = state_file(output)
        run.open_state(state)
        first = run.step
        with _memory(place):
            run.load()
            if not run.step and not state.exists() and start is None:
                run.start(progress)
                run.save_state(state)
            while run.step < options.steps:
                values = run.advance()
                if run.step % save_every == 0 or run.step == options.steps:
                    run.save_state(state)
                progress("training", run.step, options.steps, values)
        write_gates(
            folder,
            spec,
            run.gates,
            backbone.config,
            kind=options.kind,
            memory_size=options.budget,
            base_model=base_model or os.path.relpath(backbone.path.resolve(), output.absolute()),
        )
        (folder / RECORD).write_text(json.dumps(run.record(), indent=1) + "\n", encoding="utf-8")
    state.unlink(missing_ok=True)
    last = run.log[-AVERAGED:]
    return Report(
        output=output,
        steps=options.steps,
        resumed_from=first,
        tokens=options.steps * options.rows * options.context,
        parameters=sum(parameter.numel() for parameter in run.gates.parameters()),
        **{name: float(np.mean([row[name] for row in last])) for name in ("kl", "next_token", "capacity")},
        precision="bf16" if bf16 else "fp32",
        device=str(place),
        seconds=round(time.monotonic() - began, 1),
    )


class _Run:
    """The gates with their optimiser, and how far they are.

    Attributes:
        step: steps done.
        log: losses of each.
        gates: of all layers.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: DecoderSpec,
        rows: Rows,
        options: TrainingOptions,
        device: torch.device,
        bf16: bool,
        start: Path | None = None,
    ) -> None:
        self._backbone, self._rows, self._options, self._device, self._bf16 = backbone, rows, options, device, bf16
        self.step, self.log = 0, list[dict[str, float]]()
        gates = make_gates(spec, options.kind, options.width, bias=options.bias, seed=options.seed)
        self.gates = (gates if start is None else _begun(spec, start, options)).to(device)
        self._optimiser = torch.optim.AdamW(
            self.gates.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self._about: dict[str, Any] = {
            "trimkv_export": __version__,
            "options": asdict(options) | {"precision": "bf16" if bf16 else "fp32"},
            "read": rows.fingerprint,
            "backbone": _fingerprint(backbone),
            "start": None if start is None else _digest(self.gates),
        }

    def load(self) -> None:
        """Load the backbone."""
        model = load_backbone(self._backbone, self._device, bf16=self._bf16)
        self._model = GatedModel(model, self.gates, recompute=self._options.recompute)

    def start(self, progress: Progress) -> None:
        """The cheap start, if there is one."""
        rows = self._options.start_rows
        if rows:
            start_gates(
                self._model,
                self._rows,
                self._options,
                bf16=self._bf16,
                progress=lambda done: progress("starting", done, rows, {}),
            )

    def advance(self) -> dict[str, float]:
        """One step; its losses.

        Raises:
            EngineError: they are not finite.
        """
        options = self._options
        for group in self._optimiser.param_groups:
            group["lr"] = options.rate(self.step)
        self._optimiser.zero_grad()
        found = []
        for number in range(self.step * options.rows, (self.step + 1) * options.rows):
            loss, values = self._losses(self._rows.row(number), number)
            (loss / options.rows).backward()
            found.append(values)
        values = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
        norm = nn.utils.clip_grad_norm_(self.gates.parameters(), 1.0)
        if not (np.isfinite(list(values.values())).all() and torch.isfinite(norm)):
            raise EngineError(
                f"the losses of step {self.step + 1} are not finite: {values}: use --precision fp32, or a lower "
                "--learning-rate"
            )
        self._optimiser.step()
        self.step += 1
        self.log.append({"step": self.step, **values})
        return values

    def _losses(self, row: Row, number: int) -> tuple[torch.Tensor, dict[str, float]]:
        options = self._options
        draw = np.random.default_rng([options.seed, number, 1])
        tokens = torch.from_numpy(row.tokens).to(self._device)
        places = torch.from_numpy(_places(row, options.positions, draw)).to(self._device)
        length = len(row.tokens)
        queries = np.sort(draw.choice(length, min(LOOKED_AT, length), replace=False))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            full = self._model.full(tokens[None])[0, places]
            hidden, log_beta = self._model.weighted(tokens[None])
            kl, next_token = prediction_losses(self._model.head, hidden[0, places], full, tokens[places + 1])
        capacity = capacity_loss(log_beta, options.kind, options.budget, torch.from_numpy(queries).to(self._device))
        values = {"kl": kl.item(), "next_token": next_token.item(), "capacity": capacity.item()}
        return kl + next_token + options.capacity_weight * capacity, values

    def open_state(self, path: Path) -> None:
        """Take what an earlier run left, if anything.

        Raises:
            OptionError: it was another run.
            CheckpointError: it is damaged.
        """
        if not path.exists():
            return
        try:
            with open_regular(path) as file:
                state = torch.load(file, map_location=self._device, weights_only=True)
            about, step, log = state["about"], state["step"], state["log"]
        except Exception as error:  # torch has errors of many kinds for a file that is not one of its own
            raise CheckpointError(
                f"{path}: is no state of a training run, or a damaged one ({first_line(error)}): remove it"
            ) from error
        if about != self._about:
            theirs, ours = ({**each, **each["options"]} for each in (about, self._about))
            for each in (theirs, ours):
                del each["options"]
            name = next(name for name in ours if theirs.get(name) != ours[name])
            flag = "--" + name.replace("_", "-")
            raise OptionError(
                f"{path}: is of a run with other {_NAMES.get(name, flag)} "
                f"({shorten(theirs.get(name))}, now {shorten(ours[name])}): give what it had, or remove the file"
            )
        try:
            self.gates.load_state_dict(state["gates"])
            self._optimiser.load_state_dict(state["optimiser"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: is damaged ({first_line(error)}): remove it") from error
        self.step, self.log = step, log

    def save_state(self, path: Path) -> None:
        """Write what `open_state` takes. Raises: OutputError."""
        state = {
            "about": self._about,
            "step": self.step,
            "log": self.log,
            "gates": self.gates.state_dict(),
            "optimiser": self._optimiser.state_dict(),
        }
        content = io.BytesIO()
        torch.save(state, content)
        with writable(path, "the state of the training cannot be written") as file:
            file.write(content.getbuffer())

    def record(self) -> dict[str, Any]:
        """What the gates' folder says of their training."""
        return self._about | {"torch": torch.__version__, "device": self._device.type, "log": self.log}


_NAMES = {
    "read": "texts or chats",
    "backbone": "weights of the model",
    "start": "gates to begin with",
    "trimkv_export": "version of trimkv-export",
}


def _begun(spec: DecoderSpec, folder: Path, options: TrainingOptions) -> nn.ModuleList:
    """Gates that are trained further.

    Raises:
        CheckpointError: they are damaged, or of another backbone.
        OptionError: they are of another kind or width.
    """
    kind, width, gates = load_gates(spec, folder)
    for name, theirs, ours in (("kind", kind, options.kind), ("width", width, options.width)):
        if theirs != ours:
            raise OptionError(f"--{name} is {ours}, and the gates {folder} have {theirs}: give --{name} {theirs}")
    return gates.requires_grad_(True)


def _digest(gates: nn.ModuleList) -> str:
    digest = hashlib.sha256()
    for value in gates.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def _places(row: Row, count: int, draw: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The places whose next tokens are predicted, ascending: up to half of them before answers."""
    every = np.arange(len(row.tokens) - 1)
    if not 0 < count < len(every):
        return every
    answers = every[row.answers[1:]]
    first = draw.choice(answers, min(len(answers), count // 2), replace=False)
    rest = np.setdiff1d(every, first)
    return np.sort(np.concatenate([first, draw.choice(rest, count - len(first), replace=False)]))


def _fingerprint(backbone: Backbone) -> str:
    """sha256 of a backbone's configuration and weights."""
    digest = hashlib.sha256(json.dumps(backbone.config, sort_keys=True).encode())
    for path in backbone.files:
        with open_regular(path) as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise EngineError(f"device {shorten(name)} cannot be used here: {first_line(error)}") from None
    return device


def _has_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 there."""
    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device) >= (8, 0))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextlib.contextmanager
def _memory(device: torch.device) -> Iterator[None]:
    """Around work on a device: its memory running out is one of our errors."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # of torch's own, that of GPUs has a type, and that of CPUs a text
        lacking = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not lacking:
            raise
        raise EngineError(
            f"the memory of {device} does not suffice: give a shorter --context, or --recompute"
        ) from error
