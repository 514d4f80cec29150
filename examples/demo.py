"""The main jobs, start to end, in under a minute: what `make demo` runs.

    python examples/demo.py [--output demo-output] [--budget 64] [--text LICENSE]

Makes a small random checkpoint in the official layout, builds a package, feeds it a real text of 11,000 tokens, draws
what the cache kept, and verifies the package. Then the same with a model that sees, and a picture. Every command is
printed as a user would type it.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from demo_checkpoint import make_checkpoint
from demo_picture import draw_picture
from rich.console import Console
from rich.table import Table

from trimkv_export.cli.console import amount
from trimkv_export.runtime import Engine

ROOT = Path(__file__).resolve().parent.parent
CONSOLE = Console(highlight=False)
MARKS = (100, 1000, 5000, 10_000)  # tokens at which sizes are shown


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder, made anew")
    parser.add_argument("--budget", type=int, default=64, help="M: entries kept per layer and KV head")
    parser.add_argument("--text", type=Path, default=ROOT / "LICENSE", help="a long text file")
    arguments = parser.parse_args()
    out: Path = arguments.output
    shutil.rmtree(out, ignore_errors=True)
    package = out / "package"

    CONSOLE.rule("1. A checkpoint: backbone and retention gates")
    make_checkpoint(out / "checkpoint")
    CONSOLE.print(f"random Qwen3 with rg10 gates in {out / 'checkpoint'}: it writes nonsense, its arithmetic is real")

    CONSOLE.rule("2. Build")
    _cli("build", "--model", out / "checkpoint" / "gates", "--budget", arguments.budget, "--output", package)

    CONSOLE.rule("3. Run: the cache does not grow with the text")
    _growth(package, arguments.text)
    _cli(
        "run",
        package,
        "--prompt-file",
        arguments.text,
        "--max-new-tokens",
        32,
        "--temperature",
        1,
        "--seed",
        0,
        "--stats",
    )

    CONSOLE.rule("4. What the cache kept")
    _cli("inspect", package, "--kept", out / "kept.png", "--prompt-file", arguments.text)

    CONSOLE.rule("5. Verify: engine against the NumPy decoder and policy")
    _cli("verify", package)

    CONSOLE.rule("6. Images: text and patches compete for one cache")
    _images(out / "images", arguments.budget)
    CONSOLE.print(f"\nThe heat map is {out / 'kept.png'}, the picture {out / 'images' / 'kept-images.png'}.")


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
    CONSOLE.print(f"random Qwen3-VL in {out / 'checkpoint'}, and a picture of 300 patches: {picture}")
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
