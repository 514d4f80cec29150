"""Measure what eviction costs the small model: what `make quality` runs.

    python examples/tiny_gates/quality.py OUT [--gates FOLDER …] [--picture docs/quality.png]

Builds a package of each folder of gates and evaluates it on held-out documents of 1,024 and 2,048 tokens, at budgets
of 1/64 to 1/4 of that. Prints JSON lines:
gates, length, policy, budget, accuracy, accuracy_interval, perplexity.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "checkpoint"
LENGTHS = (1024, 2048)
DOCUMENTS, TEXTS = 30, 8
SHARES = (64, 32, 16, 8, 4)  # the budgets are so many parts of the length
# The baselines do not depend on the gates: they are measured with the first folder.
GATES_POLICIES = ("global", "per_head")
KEYS = ("policy", "budget", "accuracy", "accuracy_interval", "perplexity")
BASELINES = ("sinks+recent", "recent", "random", "full")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for packages and task files")
    parser.add_argument("--gates", type=Path, nargs="+", default=[CHECKPOINT / "rg10", CHECKPOINT / "rg"])
    parser.add_argument("--picture", type=Path, help="draw quality against budget at the longest length")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    packages = []
    for gates in arguments.gates:
        packages.append(out / gates.name)
        if not packages[-1].exists():
            _cli("build", "--model", gates, "--budget", max(LENGTHS) // min(SHARES), "--output", packages[-1])
    for length in LENGTHS:
        tasks = out / f"tasks-{length}"
        _run(HERE / "tasks.py", tasks, "--length", length, "--documents", DOCUMENTS, "--texts", TEXTS)
        files = ("--task", tasks / "recall.jsonl", "--task", tasks / "text.jsonl")
        budgets = [word for share in SHARES for word in ("--budget", length // share)]
        for package in packages:
            chosen = (*GATES_POLICIES, *BASELINES) if package == packages[0] else GATES_POLICIES
            options: list[object] = [*budgets, *(word for policy in chosen for word in ("--policy", policy))]
            options += ["--answers", out / f"{package.name}-{length}.jsonl"]
            if arguments.picture and package == packages[0] and length == max(LENGTHS):
                options += ["--plot", arguments.picture]
            for result in json.loads(_cli("eval", package, *files, *options, "--threads", 1, "--json"))["results"]:
                about = {key: result[key] for key in KEYS}
                print(json.dumps({"gates": package.name, "length": length} | about), flush=True)


def _cli(*arguments: object) -> str:
    return _run("-m", "trimkv_export", *arguments)


def _run(*arguments: object) -> str:
    """Run Python; progress and errors are shown, the output is returned."""
    words = [sys.executable, *(str(argument) for argument in arguments)]
    result = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout


if __name__ == "__main__":
    main()
