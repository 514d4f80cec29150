"""What others evict: SnapKV, H2O, TOVA, KeyDiff and windows on a Llama checkpoint, in PyTorch.

    python examples/smollm2/baselines.py CHECKPOINT --text FILE [--piece 4096] --budget 256 512 [--method h2o …]
    python examples/smollm2/baselines.py CHECKPOINT --task questions.jsonl --budget 256

Texts and questions are those of `trimkv-export eval`, measured alike (docs/quality.md). All have the same memory:
each KV head of each layer keeps M entries right after an eviction, and 32 more come in until the next. Prints
JSON lines: method, budget, perplexity, accuracy.

    full            keeps everything
    recent          the newest entries
    sinks+recent    the first four and the newest (arXiv 2309.17453)
    h2o             half of M for the newest, half for those with the most attention so far (arXiv 2306.14048)
    tova            those with the most attention of the newest token (arXiv 2401.06104)
    snapkv          the newest 32, and those with the most attention from them, over 7 neighbours (arXiv 2404.14469)
    keydiff         those whose keys are least like the mean key (arXiv 2504.15364)

SnapKV compresses a prompt once, in its paper; here it does so again whenever 32 tokens have come, or memory would grow.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (as everywhere)

from trimkv_export.evaluation import Question, read_tasks
from trimkv_export.evaluation.tasks import Task, Text, question_tokens, text_tokens
from trimkv_export.text.tokenizer import Tokenizer

EVERY, SINKS, WINDOW, POOLED = 32, 4, 32, 7


@dataclass
class Layer:
    """The cache of one layer: keys (after RoPE) and values [H, n, D], positions and attention received [H, n]."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    received: Tensor
    newest: Tensor  # attention from the last up to WINDOW queries, and
    last: Tensor  # from the last one

    def keep(self, chosen: Tensor) -> None:
        """Keep the entries [H, M] only."""
        wide = chosen[..., None].expand(-1, -1, self.keys.shape[-1])
        self.keys, self.values = self.keys.gather(1, wide), self.values.gather(1, wide)
        for name in ("positions", "received", "newest", "last"):
            setattr(self, name, getattr(self, name).gather(1, chosen))


def _newest_first(layer: Layer, score: Tensor, count: int) -> Tensor:
    """The score, with the newest `count` entries above all."""
    return torch.where(layer.positions > layer.positions.max() - count, math.inf, score)


def _snapkv(layer: Layer, budget: int) -> Tensor:
    smooth = F.max_pool1d(layer.newest[None], POOLED, stride=1, padding=POOLED // 2)[0]
    return _newest_first(layer, smooth, min(WINDOW, budget))


def _keydiff(layer: Layer, _: int) -> Tensor:
    anchor = F.normalize(layer.keys, dim=-1).mean(1, keepdim=True)
    return -F.cosine_similarity(layer.keys, anchor, dim=-1)


METHODS: dict[str, Callable[[Layer, int], Tensor] | None] = {
    "full": None,
    "recent": lambda layer, _: layer.positions.float(),
    "sinks+recent": lambda layer, _: torch.where(layer.positions < SINKS, math.inf, layer.positions.float()),
    "h2o": lambda layer, budget: _newest_first(layer, layer.received, budget // 2),
    "tova": lambda layer, _: layer.last,
    "snapkv": _snapkv,
    "keydiff": _keydiff,
}


@dataclass
class Llama:
    """The forward pass of a Llama checkpoint, float32, with a cache that may lack entries."""

    config: dict[str, float]
    weights: dict[str, Tensor]
    layers: list[Layer] = field(default_factory=list)
    seen: int = 0

    @classmethod
    def open(cls, folder: Path) -> "Llama":
        """Read config.json and all shards."""
        config = json.loads((folder / "config.json").read_text())
        if config["model_type"] != "llama" or config.get("rope_scaling"):
            sys.exit(f"{folder}: this script knows Llama without rope_scaling only")
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= {name: value.float() for name, value in load_file(file).items()}
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        return cls(config, weights)

    def reset(self) -> None:
        """Begin a text."""
        heads, size = int(self.config["num_key_value_heads"]), self._size
        empty, none = torch.zeros(heads, 0, size), torch.zeros(heads, 0)
        self.layers = [
            Layer(empty, empty, none.long(), none, none, none) for _ in range(int(self.config["num_hidden_layers"]))
        ]
        self.seen = 0

    @property
    def _size(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] / self.config["num_attention_heads"])

    def copy(self) -> list[Layer]:
        """The cache as it is; entries are never written in place."""
        return [Layer(**vars(layer)) for layer in self.layers]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed tokens [S]; return logits [S, V]."""
        w, eps, count = self.weights, self.config["rms_norm_eps"], len(tokens)
        positions = torch.arange(self.seen, self.seen + count)
        turn = self._rotary(positions)
        x = w["model.embed_tokens.weight"][torch.tensor(tokens)]
        for index, layer in enumerate(self.layers):
            at = f"model.layers.{index}."
            y = F.rms_norm(x, x.shape[-1:], w[at + "input_layernorm.weight"], eps)
            q, k, v = (self._heads(F.linear(y, w[f"{at}self_attn.{name}_proj.weight"])) for name in "qkv")
            y = self._attend(layer, turn(q), turn(k), v, positions)
            x = x + F.linear(y, w[at + "self_attn.o_proj.weight"])
            y = F.rms_norm(x, x.shape[-1:], w[at + "post_attention_layernorm.weight"], eps)
            gate, up = (F.linear(y, w[f"{at}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, w[at + "mlp.down_proj.weight"])
        self.seen += count
        return F.linear(F.rms_norm(x, x.shape[-1:], w["model.norm.weight"], eps), w["lm_head.weight"])

    def _heads(self, x: Tensor) -> Tensor:
        """[S, heads * D] as [heads, S, D]."""
        return x.view(len(x), -1, self._size).transpose(0, 1)

    def _rotary(self, positions: Tensor) -> Callable[[Tensor], Tensor]:
        size = self._size
        rope = self.config.get("rope_theta") or self.config["rope_parameters"]["rope_theta"]  # type: ignore[index]
        angle = positions[:, None] * rope ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        cos, sin = (torch.cat([part, part], -1).float() for part in (angle.cos(), angle.sin()))

        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        return turn

    def _attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Add the tokens' entries, and attend to all; [S, heads * D]."""
        heads, count, size = k.shape
        before = layer.keys.shape[1]
        layer.keys, layer.values = torch.cat([layer.keys, k], 1), torch.cat([layer.values, v], 1)
        layer.positions = torch.cat([layer.positions, positions.expand(heads, -1)], 1)
        logits = q.view(heads, -1, count, size) @ layer.keys[:, None].transpose(-1, -2) / math.sqrt(size)
        future = torch.ones(count, count, dtype=torch.bool).triu(1)
        logits[..., before:].masked_fill_(future, -math.inf)
        share = logits.softmax(-1)  # [H, G, S, n]
        received = share.mean(1)
        more = received.sum(1)
        layer.received = more + F.pad(layer.received, (0, count))
        layer.newest, layer.last = received[:, -WINDOW:].sum(1), received[:, -1]
        return (share @ layer.values[:, None]).permute(2, 0, 1, 3).reshape(count, -1)

    def evict(self, method: str, budget: int) -> None:
        """Keep `budget` entries in each head, in the order of their positions."""
        score = METHODS[method]
        if score is None:
            return
        for layer in self.layers:
            if layer.keys.shape[1] > budget:
                layer.keep(score(layer, budget).topk(budget).indices.sort().values)

    def feed(self, tokens: Sequence[int], method: str, budget: int) -> Iterator[Tensor]:
        """Feed tokens in pieces that end where an eviction is due; logits of each piece."""
        at = 0
        while at < len(tokens):
            count = min(EVERY - self.seen % EVERY, len(tokens) - at)
            yield self.step(tokens[at : at + count])
            at += count
            if self.seen % EVERY == 0:
                self.evict(method, budget)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, action="append", default=[], help="a plain text, cut into pieces")
    parser.add_argument("--piece", type=int, default=4096, help="tokens of a piece")
    parser.add_argument("--task", type=Path, action="append", default=[], help="a task file of `trimkv-export eval`")
    parser.add_argument("--budget", type=int, nargs="+", default=[256])
    parser.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS))
    arguments = parser.parse_args()
    tokenizer = Tokenizer.open(arguments.checkpoint)
    tasks: list[Task] = [Text(file.read_text(), arguments.piece) for file in arguments.text]
    tasks += [task for file in arguments.task for task in read_tasks(file)]
    pieces = [piece for task in tasks if isinstance(task, Text) for piece in text_tokens(task, tokenizer)]
    questions = [task for task in tasks if isinstance(task, Question)]
    model = Llama.open(arguments.checkpoint)
    with torch.inference_mode():
        for method in arguments.method:
            for budget in arguments.budget if METHODS[method] else [None]:
                losses = [_loss(model, piece, method, budget or 0) for piece in pieces]
                right = _right(model, tokenizer, questions, method, budget or 0)
                result: dict[str, object] = {"method": method, "budget": budget}
                if pieces:
                    result["perplexity"] = math.exp(sum(losses) / sum(len(piece) - 1 for piece in pieces))
                if questions:
                    result |= {"accuracy": right / len(questions), "questions": len(questions)}
                print(json.dumps(result), flush=True)


def _loss(model: Llama, piece: Sequence[int], method: str, budget: int) -> float:
    model.reset()
    at, total = 0, 0.0
    for logits in model.feed(piece[:-1], method, budget):
        target = torch.tensor(piece[at + 1 : at + 1 + len(logits)])
        total += float(F.cross_entropy(logits, target, reduction="sum"))
        at += len(logits)
    return total


def _right(model: Llama, tokenizer: Tokenizer, questions: Sequence[Question], method: str, budget: int) -> int:
    """How many questions are answered right, greedily; questions in sequence share the pass over their context."""
    right, before, read, seen = 0, None, [], 0
    for question in questions:
        entry = question_tokens(question, tokenizer, None)
        if before is None or question.context != before:
            model.reset()
            for _ in model.feed(entry.context, method, budget):
                pass
            before, read, seen = question.context, model.copy(), model.seen
        model.layers, model.seen = [Layer(**vars(layer)) for layer in read], seen
        *_, logits = model.feed(entry.prompt, method, budget)
        tokens: list[int] = []
        while len(tokens) < entry.new_tokens:
            tokens.append(int(logits[-1].argmax()))
            *_, logits = model.feed(tokens[-1:], method, budget)
        right += tokenizer.decode(tokens).strip() == question.answer.strip()
    return right


if __name__ == "__main__":
    main()
