"""Train a small Qwen3 and its retention gates, from nothing, on two cores.

    python examples/tiny_gates/train.py OUT [--seed 0] [--gate-seeds 0 1 2]

    OUT/checkpoint/base     the backbone as on Hugging Face: config.json, model.safetensors (bfloat16), tokenizer
    OUT/checkpoint/rg10     gates with one last projection for all layers and one budget for all heads (DBTrimKV)
    OUT/checkpoint/rg       gates with a budget per head (TrimKV)
    OUT/seeds/rg10-N        the rg10 gates again, of other seeds
    OUT/held_out.txt        the sentences that were kept from training, for `tasks.py`
    OUT/loss.png            losses

Ctrl-C is safe: the same command goes on where the last one was (at most 100 steps earlier), with the same batches. The
backbone's loop is here; gates are trained as by `trimkv-export train`, on this example's documents.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import Corpus, Mix, make_tokenizer
from model import make_config, seed_induction
from plots import draw_losses
from ship import write_base
from text import read_text
from torch.nn import functional
from tqdm import tqdm
from transformers import Qwen3ForCausalLM

from trimkv_export.training.options import TrainingOptions
from trimkv_export.training.rows import Row
from trimkv_export.training.trainer import RECORD, open_trainable, train

VOCABULARY = 2048
SAVE_EVERY = 100

# Backbone: steps, and their batches.
STAGES = (
    (450, Mix(rows=32, length=256, facts=5, asked=5, plain=0.4)),
    (450, Mix(rows=8, length=1024, facts=10, asked=10, plain=0.4)),
    (450, Mix(rows=4, length=2048, facts=12, asked=12, plain=0.4)),
)
MATRIX_RATE, OTHER_RATE = 3e-3, 2e-3  # of Muon, and of AdamW for embeddings and norms
ANSWER_WEIGHT = 5.0  # of an answer's tokens in the backbone's loss; all others count 1

# Gates. Facts are asked once and late: an answer is a copy of its fact, and gates that see many learn to keep facts
# briefly. At a learning rate of 2e-3, one seed in three forgot everything within 25 steps and did not come back.
GATE_MIX = Mix(rows=1, length=2048, facts=12, asked=12, plain=0.3, late=True)
GATE_OPTIONS: dict[str, Any] = {
    "budget": 64,
    "steps": 200,
    "context": 2048,
    "rows": 2,
    "positions": 0,
    "start_rows": 0,
    "bias": 10.0,
}


@dataclass
class Trainee:
    """What `fit` trains: parameters with their optimisers, and a step that returns the loss and what to log."""

    module: torch.nn.Module
    optimisers: list[torch.optim.Optimizer]
    rate: Callable[[int], float]
    loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]]


def fit(name: str, trainee: Trainee, steps: int, folder: Path) -> list[dict[str, float]]:
    """Train for `steps` steps, or what is left of them, and return the log; FOLDER/NAME.pt keeps the state."""
    state_file = folder / f"{name}.pt"
    peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in trainee.optimisers]
    first = 0
    log: list[dict[str, float]] = []
    if state_file.exists():
        state = torch.load(state_file)
        first, log = state["step"], state["log"]
        trainee.module.load_state_dict(state["module"])
        for optimiser, saved in zip(trainee.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps)
    for step in bar:
        for optimiser, rates in zip(trainee.optimisers, peaks, strict=True):
            for group, peak in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = peak * trainee.rate(step)
        loss, values = trainee.loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.module.parameters(), 1.0)
        for optimiser in trainee.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        log.append({"step": step, **values})
        bar.set_postfix({key: f"{value:.3f}" for key, value in values.items()})
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            part = state_file.with_suffix(".part")
            state = {
                "step": step + 1,
                "log": log,
                "module": trainee.module.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in trainee.optimisers],
            }
            torch.save(state, part)
            part.replace(state_file)
    return log


def batches(corpus: Corpus, seed: int, mix: Mix, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [rows, length], and which of tokens[:, 1:] are answers."""
    tokens, answers = corpus.batch(seed, step, mix)
    return torch.from_numpy(tokens), torch.from_numpy(answers)[:, 1:]


def token_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token losses [rows, length - 1] of logits [rows, length, V]."""
    flat = functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY).float(), tokens[:, 1:].reshape(-1), reduction="none"
    )
    return flat.view(len(tokens), -1)


def backbone_trainee(corpus: Corpus, seed: int) -> Trainee:
    """The backbone from random weights: next-token loss, answers weighted."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(make_config(VOCABULARY, end_of_text=0))
    seed_induction(model)
    named = dict(model.named_parameters())
    matrices = [value for name, value in named.items() if value.ndim == 2 and "embed" not in name]
    others = [value for name, value in named.items() if value.ndim != 2 or "embed" in name]
    total = sum(steps for steps, _ in STAGES)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        tokens, answers = batches(corpus, seed, stage(step), step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(tokens).logits
        losses = token_losses(logits, tokens)
        weight = 1 + (ANSWER_WEIGHT - 1) * answers.float()
        right = logits[:, :-1].argmax(-1) == tokens[:, 1:]
        values = {
            "text": losses[~answers].mean().item(),
            "answers": losses[answers].mean().item(),
            "right": right[answers].float().mean().item(),
        }
        return (losses * weight).sum() / weight.sum(), values

    return Trainee(
        model,
        [
            torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ],
        lambda step: min(1.0, (step + 1) / 50) * min(1.0, 2 * (total - step) / total),
        loss,
    )


def stage(step: int) -> Mix:
    """The batches of the backbone's step."""
    for steps, mix in STAGES:
        if step < steps:
            return mix
        step -= steps
    raise IndexError(step)


class Documents:
    """The rows that gates read. See `trimkv_export.training.rows.Rows`."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self._corpus, self._seed = corpus, 1000 + seed
        self.fingerprint = f"{len(corpus.sentences)} sentences, {GATE_MIX}, {seed}"

    def row(self, index: int) -> Row:
        """One document, or text alone."""
        tokens, answers = self._corpus.batch(self._seed, index, GATE_MIX)
        return Row(tokens[0], answers[0])


def train_gates(corpus: Corpus, base: Path, kind: str, seed: int, folder: Path) -> list[dict[str, float]]:
    """Train gates next to the frozen backbone, unless they are there, and return the log."""
    if not (folder / RECORD).exists():
        options = TrainingOptions(kind=kind, seed=seed, **GATE_OPTIONS)
        backbone, spec = open_trainable(base, options)
        with tqdm(total=options.steps, desc=folder.name) as bar:

            def show(_what: str, done: int, _total: int, losses: Mapping[str, float]) -> None:
                bar.update(done - bar.n)
                bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})

            rows = Documents(corpus, seed)
            train(backbone, spec, rows, options, folder, resume=True, save_every=SAVE_EVERY, progress=show)
    log: list[dict[str, float]] = json.loads((folder / RECORD).read_text())["log"]
    return log


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything")
    parser.add_argument("--seed", type=int, default=0, help="of the backbone")
    parser.add_argument(
        "--gate-seeds", type=int, nargs="+", default=[0, 1, 2], help="of the rg10 gates; rg has the first"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out
    work, checkpoint = out / "work", out / "checkpoint"
    work.mkdir(parents=True, exist_ok=True)

    sentences, held_out = read_text(out / "books")
    (out / "held_out.txt").write_text("\n".join(held_out) + "\n")
    tokenizer = make_tokenizer(sentences, VOCABULARY, work / "tokenizer.json")
    corpus = Corpus(tokenizer, sentences)

    trainee = backbone_trainee(corpus, arguments.seed)
    logs = {"backbone": fit("backbone", trainee, sum(steps for steps, _ in STAGES), work)}
    write_base(checkpoint / "base", trainee.module, work / "tokenizer.json")
    first, *rest = arguments.gate_seeds
    for kind, seed in (("rg10", first), ("rg", first), *(("rg10", seed) for seed in rest)):
        name = f"{kind}-{seed}"
        folder = checkpoint / kind if seed == first else out / "seeds" / name
        logs[name] = train_gates(corpus, checkpoint / "base", kind, seed, folder)
    draw_losses(logs, out / "loss.png")


if __name__ == "__main__":
    main()
