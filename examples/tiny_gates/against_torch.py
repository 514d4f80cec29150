"""Ask the engine and PyTorch the same questions, and compare what they answer.

    python examples/tiny_gates/against_torch.py PACKAGE --task recall.jsonl [--budget 256 …] [--questions 40]

PyTorch runs the model of transformers and the gates in float32; what its attention sees, and what is evicted, is the
NumPy policy (trimkv_export.policy). The engine runs with native kernels, where there are any, and with portable bodies.
Prints JSON lines: budget, engine, questions, accuracy, torch_accuracy, same. Ends with 1 where an answer differs.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, Qwen3ForCausalLM

from trimkv_export.backends.native import find_library
from trimkv_export.checkpoint.config_file import read_config
from trimkv_export.config import EvictionConfig
from trimkv_export.evaluation import Question, evaluate, read_tasks
from trimkv_export.evaluation.tasks import QuestionTokens, question_tokens
from trimkv_export.models import decoder_spec
from trimkv_export.package import Package
from trimkv_export.policy import CacheSpec, ReferenceCache
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.training.gates import load_gates
from trimkv_export.training.model import run_gate

HERE = Path(__file__).resolve().parent


class TorchModel:
    """Backbone and gates in PyTorch, with the fixed cache of the NumPy policy."""

    def __init__(self, base: Path, gates: Path, spec: CacheSpec, eviction: EvictionConfig, chunk: int) -> None:
        self._model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="pool")
        config = read_config(base)
        _kind, _width, found = load_gates(decoder_spec(config, base / "config.json"), gates)
        for layer, gate in zip(self._model.model.layers, found, strict=True):
            layer.self_attn.__dict__["gate"] = gate
            layer.self_attn.register_forward_pre_hook(run_gate, with_kwargs=True)
        self._spec, self._eviction, self._chunk = spec, eviction, chunk

    def read(self, cache: ReferenceCache, tokens: Sequence[int]) -> int:
        """Feed tokens in steps of at most the prefill chunk, and return the likeliest next token."""
        for start in range(0, len(tokens), self._chunk):
            step = tokens[start : start + self._chunk]
            taken: list[tuple[Any, Any, Any]] = []
            for layer in self._model.model.layers:
                layer.self_attn.__dict__.update(cache=cache, taken=taken)
            position = torch.arange(cache.tokens_seen, cache.tokens_seen + len(step))
            with torch.no_grad():
                logits = self._model(torch.tensor([step]), position_ids=position[None]).logits
            key, value, log_beta = (np.stack(part) for part in zip(*taken, strict=True))
            cache.update(key, value, log_beta)
        return int(logits[0, -1].argmax())

    def answer(self, question: QuestionTokens, caches: dict[str, ReferenceCache]) -> list[int]:
        """Answer greedily, with as many tokens as the right answer has. `caches` keeps what the last context left."""
        context = question.question.context
        if context not in caches:
            caches.clear()
            caches[context] = ReferenceCache(self._spec, self._eviction)
            self.read(caches[context], question.context)
        cache = copy.deepcopy(caches[context])
        out = [self.read(cache, question.prompt)]
        while len(out) < question.new_tokens:
            out.append(self.read(cache, out[-1:]))
        return out


def _pool_attention(
    module: torch.nn.Module, query: Any, key: Any, value: Any, _mask: Any, scaling: float, **_: Any
) -> tuple[torch.Tensor, None]:
    """Attention of one step over the cache and itself; leaves key, value and log β for the update after it."""
    own = module.__dict__
    arrays = [x[0].transpose(0, 1).numpy() for x in (query, key, value)]
    own["taken"].append((*arrays[1:], own["log_beta"][0].transpose(0, 1).numpy()))
    return torch.from_numpy(own["cache"].attend(module.layer_idx, *arrays, scaling))[None], None


AttentionInterface.register("pool", _pool_attention)


def main() -> None:
    """Ask, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="built from checkpoint/rg10 or checkpoint/rg")
    parser.add_argument("--task", type=Path, required=True, help="from tasks.py")
    parser.add_argument("--budget", type=int, nargs="+", help="default: the package's")
    parser.add_argument("--questions", type=int, help="only the first so many")
    arguments = parser.parse_args()
    questions = [task for task in read_tasks(arguments.task) if isinstance(task, Question)][: arguments.questions]
    package = Package.open(arguments.package)
    tokenizer, config = Tokenizer.open(package.path), package.config
    gates = HERE / "checkpoint" / {"global": "rg10", "per_head": "rg"}[config.eviction.policy]
    different = 0
    for budget in arguments.budget or [config.eviction.budget]:
        cache, eviction = replace(config.cache, budget=budget), replace(config.eviction, budget=budget)
        model = TorchModel(HERE / "checkpoint/base", gates, cache, eviction, config.prefill_chunk)
        caches: dict[str, ReferenceCache] = {}
        asked = [question_tokens(question, tokenizer, None) for question in questions]
        expected = [tokenizer.decode(model.answer(question, caches)) for question in asked]
        for native in ("require", "off") if find_library() else ("off",):
            (result,) = evaluate(package.path, questions, [config.eviction.policy], [budget], native=native)
            same = sum(answer.generated == text for answer, text in zip(result.answers, expected, strict=True))
            right = sum(text.strip() == q.answer.strip() for text, q in zip(expected, questions, strict=True))
            different += len(questions) - same
            row = {"budget": budget, "engine": "native" if native == "require" else "portable"}
            row |= {"questions": len(questions), "accuracy": result.accuracy, "torch_accuracy": right / len(questions)}
            print(json.dumps(row | {"same": same}), flush=True)
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
