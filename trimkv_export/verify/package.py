"""Everything that `verify` checks of a package: its files, its graphs, and what it computes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trimkv_export.backends.native import find_library
from trimkv_export.build.companions import Companions, resolve_companions
from trimkv_export.config import Precision
from trimkv_export.errors import OptionError, PackageError, UnsupportedModelError, VerificationError
from trimkv_export.graph.check import check_graph_file
from trimkv_export.package import DECODER, VISION, Package
from trimkv_export.runtime import Engine
from trimkv_export.runtime.session import MAX_TOKENS
from trimkv_export.text.resolve import read_folder_text
from trimkv_export.verify.compare import Comparison, compare_engines
from trimkv_export.verify.oracle import CaseReport, RecordedCase, replay_case
from trimkv_export.verify.polygraphy import BackendReport, compare_backends
from trimkv_export.verify.rounding import ROUNDING_TOLERANCE, RoundedSteps, exact_package, rounds_inputs, text_tokens
from trimkv_export.verify.selfcheck import SelfCheckReport, check_engine
from trimkv_export.words import shorten

__all__ = ["PackageReport", "check_package"]

BACKENDS = ("onnxruntime", "tensorrt")
# Tokens of a comparison with another package: random ones where there is no text, and those that follow.
RANDOM_TOKENS, NEW_TOKENS = 512, 64
# Of these the report has the worst over the kinds of kernels; nothing else differs between them.
WORST = {"kept_mismatches", "max_logit_difference", "max_visual_difference", "rounding_difference"}

# (what is being read, bytes read, bytes in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PackageReport:
    """What `check_package` found; the files and graphs are sound, or it would have raised an error.

    Attributes:
        package: the folder.
        files: how many files were checked.
        compared_with: what judged the engine; None where it could not run here.
        checks: one for each kind of kernels, "portable" and "native", or one for "tensorrt".
        companions: tokenizer, chat template and processors, in words.
        notes: what the package cannot do without those that it lacks.
        against: the other package, and how far this one is from it.
    """

    package: Path
    files: int
    compared_with: str | None
    checks: Mapping[str, CaseReport | SelfCheckReport | BackendReport]
    companions: str = "none"
    notes: tuple[str, ...] = ()
    against: tuple[Path, Comparison] | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks.values())

    def as_dict(self) -> dict[str, Any]:
        """For `verify --json`: the first check, with the worst of all checks, and each check on its own."""
        checks = {kernels: check.as_dict() for kernels, check in self.checks.items()}
        report: dict[str, Any] = {"package": str(self.package), "files": self.files, "graph": "valid"}
        report |= {"companions": self.companions, "notes": list(self.notes)}
        if self.compared_with is None:
            report["engine"] = "not run: ONNX Runtime's CPU provider has no bfloat16"
        else:
            report |= {"compared_with": self.compared_with} | next(iter(checks.values()))
        for worst in WORST & report.keys():
            report[worst] = max(check[worst] for check in checks.values())
        report |= {"passed": self.passed} | ({"kernels": checks} if checks else {})
        if self.against is not None:
            other, comparison = self.against
            report["against"] = {"package": str(other), **comparison.as_dict()}
        return report

    def require(self) -> None:
        """Raise VerificationError, with what differs, if a check failed."""
        for kernels, check in self.checks.items():
            if not check.passed:
                raise VerificationError(f"{self.package}: with {kernels} kernels, {_difference(check.as_dict())}")


def check_package(
    path: Path,
    *,
    case: Path | None = None,
    backend: str = "onnxruntime",
    against: Path | None = None,
    text: str | None = None,
    trust_package_plugin: bool = False,
    progress: Progress = lambda *_: None,
) -> PackageReport:
    """Check the sha256 of every file, the graphs, then logits and kept entries.

    The portable bodies are part of the package and are always checked; so are the native kernels where they are built.

    Args:
        path: the package.
        case: a case recorded from the official code, whose steps are replayed (`RecordedCase`). Without it, the engine
            is compared with a NumPy decoder and eviction policy on random tokens, and pictures if there is a vision
            tower.
        backend: "onnxruntime"; or "tensorrt", which is compared with ONNX Runtime through Polygraphy.
        against: a package of the same model, from which logits, tokens and kept entries are to differ little.
        text: what the comparison with `against` reads; None is random tokens.
        trust_package_plugin: as for `Engine.open`, with the backend tensorrt.
        progress: called as large files are read.

    Raises:
        OptionError: `case` is no recorded case, or goes with another build or backend; `against` is another model.
        PackageError: a file was changed.
        VerificationError: a graph is not valid.
        TrimKVError: as `Engine.open`.
    """
    if backend not in BACKENDS:
        raise OptionError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if case is not None and backend == "tensorrt":
        raise OptionError(f"the case {case} is replayed by ONNX Runtime; leave out the case, or the backend tensorrt")
    recorded = RecordedCase.open(case) if case is not None else None
    package = Package.open(path)
    config = package.config
    _check_files(package, progress)
    companions = _check_companions(package)
    graphs = (DECODER, VISION) if config.vision is not None else (DECODER,)
    for graph in graphs:
        check_graph_file(path / graph)
    checks: dict[str, CaseReport | SelfCheckReport | BackendReport] = {}
    compared_with = None
    if backend == "tensorrt":
        compared_with = "ONNX Runtime, by Polygraphy"
        checks["tensorrt"] = compare_backends(path, trust_package_plugin=trust_package_plugin)
    elif config.precision is not Precision.BF16:
        tower = "decoder, vision tower" if config.vision is not None else "decoder"
        compared_with = f"case {case}" if recorded else f"NumPy {tower} and policy"
        modes = {"portable": "off"} | ({"native": "require"} if find_library() else {})
        for kernels, native in modes.items():
            if recorded is None and rounds_inputs(config.quantization):
                checks[kernels] = _check_rounding(package, native)
                continue
            with Engine.open(path, native=native, context=MAX_TOKENS) as engine:
                checks[kernels] = replay_case(engine, recorded) if recorded else check_engine(engine)
    found = None if against is None else (against, _compare(path, against, text))
    return PackageReport(
        path, len(config.files), compared_with, checks, companions.words, companions.notes, against=found
    )


def _check_companions(package: Package) -> Companions:
    """Read what lies with the weights, and see that it is what config.json says.

    Raises:
        PackageError: a file cannot be used, or says something else.
    """
    config, said = package.config, package.config.companions
    try:
        found = resolve_companions(package.path, config.files, config.model.vocab_size, config.vision, said)
    except UnsupportedModelError as error:
        raise PackageError(str(error)) from None
    if said is None:  # before format 2.5
        return found
    for kind in ("images", "videos"):
        ours, theirs = (json.loads(json.dumps(getattr(each, kind))) for each in (found.info, said))
        _require_same(package, kind, ours, theirs)
    _require_same(package, "a tokenizer", found.info.text is not None, said.text is not None)
    if said.text is not None:
        files = read_folder_text(package.path, config.files)
        tokens = {name: said.text.special_tokens.get(name) for name in files.special_tokens}
        _require_same(package, "special tokens", dict(files.special_tokens), tokens)
        _require_same(package, "chat templates", sorted(files.chat_templates), list(said.text.chat_templates))
        if files.add_bos_token is not None:  # else what the checkpoint's config.json said
            ends = [(each.add_bos_token, each.add_eos_token) for each in (files, said.text)]
            _require_same(package, "add_bos_token and add_eos_token", *ends)
        known = set(said.text.eos_token_ids)
        _require_same(package, "eos_token_id", sorted(files.eos_token_ids), sorted(files.eos_token_ids & known))
    return found


def _require_same(package: Package, what: str, files: Any, config: Any) -> None:
    """Raise PackageError where a package's files say something else than its config.json."""
    if files != config:
        raise PackageError(
            f"{package.path}: of {what} the files say {shorten(files)}, and config.json {shorten(config)}; build the "
            "package again"
        )


def _check_rounding(package: Package, native: str) -> SelfCheckReport:
    """Check a package whose kernels round: exactly without that, and on text with it."""
    with exact_package(package) as folder, Engine.open(folder, native=native, context=MAX_TOKENS) as exact:
        report = check_engine(exact, exact=True)
        steps = RoundedSteps(exact, text_tokens(package))
    with Engine.open(package.path, native=native, context=MAX_TOKENS, vision=False) as engine:
        difference = steps.difference(engine)
    return replace(report, rounding_difference=difference, rounding_tolerance=ROUNDING_TOLERANCE)


def _check_files(package: Package, progress: Progress) -> None:
    total, done = sum(size for _, size in package.large_files()), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("sha256", done, total)

    package.verify_large_files(advance)


def _compare(path: Path, against: Path, text: str | None) -> Comparison:
    with (
        Engine.open(path, vision=False, context=MAX_TOKENS) as engine,
        Engine.open(against, vision=False, context=MAX_TOKENS) as other,
    ):
        tokens = _random_tokens(engine) if text is None else engine.tokenizer.encode(text)
        return compare_engines(engine, other, tokens, NEW_TOKENS)


def _random_tokens(engine: Engine) -> Sequence[int]:
    drawn = np.random.default_rng(0).integers(0, engine.config.model.vocab_size, RANDOM_TOKENS)
    tokens: list[int] = drawn[~np.isin(drawn, engine.config.placeholder_ids)].tolist()
    return tokens


def _difference(check: Mapping[str, Any]) -> str:
    parts = [
        f"{check['kept_mismatches']} of {check['steps']} steps keep other entries",
        f"logits differ by {check['max_logit_difference']:.2g}",
    ]
    if check.get("pictures"):
        parts.append(f"the vision tower by {check['max_visual_difference']:.2g} on {check['pictures']} pictures")
    said = f"{', '.join(parts)} (tolerance {check['tolerance']:g})"
    if "rounding_difference" in check:
        tolerance = check["rounding_tolerance"]
        said += f"; rounding of inputs changes logits by {check['rounding_difference']:.2g} (tolerance {tolerance:g})"
    return said
