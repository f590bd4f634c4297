"""Run all recipes and their hand-written forms, and put them side by side.

    python -m benchmarks.recipes --smoke [--only NAME ...] [--output DIR]

Every recipe and every hand-written form has a process of its own. Lines are those of code: no
blank ones, comments and docstrings, and of the hand-written form nothing of what measures it.
Seconds an epoch are the median of a stage's epochs after its first, which compiles; with `--smoke`
an epoch is a step or two of tiny images with its validation, and its ratio no more than that.
"""

import argparse
import ast
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.recipes import materials

# What each shows where the hand-written form goes wrong; tests/test_recipes.py measures it.
INSTEAD = {
    "flowers_hub": "the module is a layer; each backbone gets its own range; no statistic moves",
    "flowers_speed": "no statistic moves; one best checkpoint over both stages; the search trains "
    "heads on features that are computed once",
    "cats_dogs": "no statistic moves; one fit and History, the head's optimizer state goes on",
    "fruits": "BGR without the mean; validation and test as they are; shear of 0.2; all three ways "
    "to save load again",
    "food101": "one best checkpoint over both stages; the head's optimizer state goes on",
    "text_embedding": "the embedding trains; the model saves and loads",
    "custom_loop": "thawed, the backbone trains; one best checkpoint over both stages",
    "fashion_mnist": "thawed, the backbone trains, on what VGG16 expects",
}


def code_lines(path: Path) -> int:
    """Count the lines of a script that are code, without what measures the hand-written form."""
    source = path.read_text("utf-8")
    tree = ast.parse(source)
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr | ast.excepthandler | ast.alias | ast.arg):
            lines |= {node.lineno, node.end_lineno or node.lineno}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        told = ast.get_source_segment(source, node) if isinstance(node, ast.stmt) else None
        compound = hasattr(node, "body")
        measures = not compound and told is not None and ("measured" in told or "moved" in told)
        if is_text or measures:
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def epoch_seconds(rows: list[dict[str, Any]]) -> list[float]:
    """Seconds of an epoch of each stage."""
    by_stage: dict[Any, list[float]] = {}
    for row in rows:
        by_stage.setdefault(row["stage"], []).append(row["epoch_seconds"])
    return [statistics.median(own[1:] or own) for own in by_stage.values()]


def by_hand(name: str, options: argparse.Namespace, output: Path) -> None:
    """Run a hand-written form in this process; its last line is what it got wrong."""
    recipe = importlib.import_module(f"benchmarks.recipes.by_hand.{name}").main
    with tempfile.TemporaryDirectory() as folder:
        given = materials.Smoke(Path(folder)) if options.smoke else materials.Materials()
        print("WRONG", json.dumps(recipe(given, output)))


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a recipe and its hand-written form."""
    here, output = Path(__file__).parent, Path(options.output) / name
    (output / "by_hand").mkdir(parents=True, exist_ok=True)
    smoke = ["--smoke"] if options.smoke else []
    run = [sys.executable, "-m", f"benchmarks.recipes.{name}", *smoke, "--output", str(output)]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((output / "timing.json").read_text("utf-8"))["results"]
    run = [sys.executable, "-m", "benchmarks.recipes", *smoke, "--by-hand", name]
    run += ["--output", str(output / "by_hand")]
    told = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout
    wrong = next(line for line in told.splitlines() if line.startswith("WRONG "))
    seconds = epoch_seconds(rows)
    return {
        "recipe": name,
        "lines by hand": code_lines(here / "by_hand" / f"{name}.py"),
        "lines": code_lines(here / f"{name}.py"),
        "frozen, s": seconds[0] if len(seconds) > 1 else None,
        "fine-tuned, s": seconds[1] if len(seconds) > 1 else seconds[0],
        "ratio": seconds[1] / seconds[0] if len(seconds) > 1 else None,
        "by hand, on Keras 3": json.loads(wrong.removeprefix("WRONG ")),
        "keras_xfer": INSTEAD[name],
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Print the table, a row as soon as it is there, and write it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="on small data made here")
    parser.add_argument("--only", nargs="+", choices=list(INSTEAD), default=list(INSTEAD))
    parser.add_argument("--output", default="runs/recipes", help="a folder")
    parser.add_argument("--by-hand", choices=list(INSTEAD), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.by_hand:
        by_hand(options.by_hand, options, Path(options.output))
        return []
    rows = []
    for name in options.only:
        row = compare(name, options)
        if not rows:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        cells = (
            "-" if v is None else f"{v:.2f}" if isinstance(v, float) else v for v in row.values()
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        rows.append(row)
    machine.write(str(Path(options.output) / "recipes.json"), rows)
    return rows


if __name__ == "__main__":
    main()
