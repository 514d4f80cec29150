"""The plans of the recipes in engines/, as the tables of engines/README.md and the first line of each recipe.

python examples/recipe_table.py            print the tables
python examples/recipe_table.py --write    put them into engines/README.md, and the plans into the recipes
"""

import argparse
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from trimkv_export.build.recipe import read_recipe
from trimkv_export.config import PlanOptions, Precision
from trimkv_export.plan.planner import ModelPlan, plan_model

ENGINES = Path(__file__).parents[1] / "engines"
README = ENGINES / "README.md"
VL_2B, VL_4B = "Qwen/Qwen3-VL-2B-Instruct", "qwen3-vl-4b"
# No official gates exist for the 2B; the sizes are those of gates as wide as the 4B's.
WAITING = {
    f"Qwen3-VL-2B on {name}": PlanOptions(VL_2B, 512, gates=VL_4B, device=name, precision=Precision.BF16)
    for name in ("orin-nano-8gb", "orin-nx-16gb", "agx-orin-64gb")
}


def recipe_files() -> list[Path]:
    """Every recipe, in the order of names."""
    return sorted(ENGINES.glob("*.yaml"))


@cache
def recipe_plan(file: Path) -> ModelPlan:
    """The plan of a recipe on its device."""
    return plan_model(read_recipe(file).plan_options())


def comment(made: ModelPlan) -> str:
    """The first line of a recipe."""
    total, memory, headroom, batch, _, fit, speed = _cells(made)
    return (
        f"# Plan: {total} of {memory} for {batch} sequences, headroom {headroom}; {fit} fit; at most {speed} tokens/s"
    )


def plans_table() -> str:
    """The recipes."""
    return _table({f"[{file.stem}]({file.name})": recipe_plan(file) for file in recipe_files()})


def waiting_table() -> str:
    """What cannot be built yet."""
    return _table({name: plan_model(options) for name, options in WAITING.items()})


def with_tables(text: str) -> str:
    """The README's text with tables as they are now."""
    for name, table in (("plans", plans_table()), ("waiting", waiting_table())):
        text = re.sub(rf"<!-- {name} -->\n.*?<!-- end -->", f"<!-- {name} -->\n{table}<!-- end -->", text, flags=re.S)
    return text


def _cells(made: ModelPlan) -> list[str]:
    plan = made.plan
    return [
        *(f"{(nbytes or 0) / 1e9:.2f} GB" for nbytes in (plan.total_bytes, plan.device_bytes, plan.headroom_bytes)),
        f"{plan.batch}",
        f"{plan.budget}",
        f"{plan.max_sequences:,}",
        f"{plan.tokens_per_second:,.0f}",
    ]


def _table(plans: Mapping[str, ModelPlan]) -> str:
    head = ["recipe", "total", "memory", "headroom", "`max_batch`", "budget", "fit", "tokens/s, at most"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *([name, *_cells(made)] for name, made in plans.items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into engines/README.md and the recipes")
    if not parser.parse_args().write:
        print(f"{plans_table()}\n{waiting_table()}", end="")
        return
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    for file in recipe_files():
        lines = file.read_text(encoding="utf-8").splitlines()
        body = lines[1:] if lines[0].startswith("# Plan:") else lines
        file.write_text("\n".join([comment(recipe_plan(file)), *body]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
