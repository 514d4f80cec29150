"""The main jobs, start to end, in a minute: what `make demo` runs.

    python examples/demo.py [--output demo-output] [--budget 256]

Builds a package of a small model whose gates are trained, gives it a long document with facts in it and asks for one,
draws what the cache kept, compares with other ways to keep a small cache, and verifies the package. Then the same with
a random vision model, and a picture. Every command is printed as a user would type it.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from demo_checkpoint import make_checkpoint
from demo_picture import draw_picture
from rich.console import Console
from rich.table import Table

from trimkv_export.runtime import Engine
from trimkv_export.words import amount

TINY_GATES = Path(__file__).resolve().parent / "tiny_gates"
CONSOLE = Console(highlight=False)
MARKS = (100, 500, 1000)  # tokens at which sizes are shown
FACT = r"The code is \w+ \w+ \d+"
POLICIES = ("global", "sinks+recent", "full")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder, made anew")
    parser.add_argument("--budget", type=int, default=256, help="M: entries kept per layer and KV head")
    arguments = parser.parse_args()
    out: Path = arguments.output
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    package, document, question = out / "package", out / "document.txt", out / "question.txt"

    CONSOLE.rule("1. A checkpoint, and a document")
    checkpoint = Path(_short(TINY_GATES / "checkpoint" / "rg10"))
    CONSOLE.print(f"a Qwen3 of 3.7M parameters that can recall facts, with trained gates: {checkpoint}", soft_wrap=True)
    tasks = [sys.executable, str(TINY_GATES / "tasks.py"), str(out), "--documents", "10", "--seed", "1"]
    subprocess.run(tasks, check=True)
    asked = json.loads((out / "recall.jsonl").read_text(encoding="utf-8").splitlines()[0])
    document.write_text(asked["context"], encoding="utf-8")
    place = asked["context"].index(asked["answer"])
    excerpt = asked["context"][max(0, place - 120) : place + 120]
    CONSOLE.print(f"a document of {len(asked['context']):,} characters with 12 facts: {document}", soft_wrap=True)
    CONSOLE.print(f"  …{excerpt}…", style="italic")
    CONSOLE.print(f"and at its end, {len(asked['context']) - place:,} characters later: {question}", soft_wrap=True)
    CONSOLE.print(f"  {asked['prompt'].strip()}", style="italic")

    CONSOLE.rule("2. Build a package with a cache of 1/8 of the document")
    _cli("build", "--model", checkpoint, "--budget", arguments.budget, "--output", package)

    CONSOLE.rule("3. Run: the cache does not grow with the text, and the fact is still in it")
    _growth(package, document)
    _cli("run", package, "--prompt-file", question, "--max-new-tokens", 6, "--stats")
    CONSOLE.print(f"the document says:{asked['answer']}")

    CONSOLE.rule("4. What the cache kept")
    _cli("inspect", package, "--kept", out / "kept.png", "--prompt-file", document, "--mark", FACT)

    CONSOLE.rule("5. Quality: 40 questions about 10 documents")
    policies = [word for policy in POLICIES for word in ("--policy", policy)]
    budgets = ("--budget", max(1, arguments.budget // 2), "--budget", arguments.budget)
    _cli("eval", package, "--task", out / "recall.jsonl", *policies, *budgets)

    CONSOLE.rule("6. Verify: engine against the NumPy decoder and policy")
    _cli("verify", package)

    CONSOLE.rule("7. Images: text and patches compete for one cache")
    _images(out / "images", 64)
    CONSOLE.print(
        f"\nThe heat map is {out / 'kept.png'}, the picture {out / 'images/kept-images.png'}.", soft_wrap=True
    )


def _short(path: Path) -> str:
    """The path as seen from here, where that is shorter."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _cli(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    CONSOLE.print(f"$ trimkv-export {shlex.join(words)}", style="bold cyan", soft_wrap=True)
    result = subprocess.run([sys.executable, "-m", "trimkv_export", *words], check=False)
    if result.returncode:
        sys.exit(result.returncode)


def _growth(package: Path, text: Path) -> None:
    """Feed the text and print sizes as it goes."""
    table = Table("tokens", "entries", "evictions", "our cache", "full cache", "this process", box=None)
    with Engine.open(package) as engine, engine.session() as session:
        tokens = engine.tokenizer.encode(text.read_text(encoding="utf-8"))
        for mark in (*(mark for mark in MARKS if mark < len(tokens)), len(tokens)):
            session.prefill(tokens[session.tokens_seen : mark])
            table.add_row(
                f"{mark:,}",
                f"{len(session.kept()):,}",
                f"{session.evictions:,}",
                amount(engine.cache_bytes),
                amount(engine.config.cache.full_cache_nbytes(mark)),
                amount(_resident_bytes()),
            )
    CONSOLE.print(table)


def _images(out: Path, budget: int) -> None:
    """Build a small Qwen3-VL, show it a picture, and draw which of its patches the cache kept."""
    package, picture = out / "package", out / "picture.png"
    make_checkpoint(out / "checkpoint", family="qwen3_vl")
    draw_picture().save(picture)
    CONSOLE.print(f"a random Qwen3-VL in {out / 'checkpoint'}, and a picture of 300 patches: {picture}", soft_wrap=True)
    _cli("build", "--model", out / "checkpoint" / "gates", "--budget", budget, "--output", package)
    question = ("--image", picture, "--prompt", "Who lives on the lake?")
    sampling = ("--max-new-tokens", 32, "--temperature", 1, "--seed", 0)
    _cli("run", package, "--chat", *question, *sampling, "--stats")
    # A package serves smaller budgets too.
    _cli("inspect", package, "--kept", out / "kept.png", "--budget", max(1, budget // 2), "--chat", *question)
    _cli("verify", package)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    main()
