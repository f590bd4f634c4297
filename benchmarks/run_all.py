"""Run every benchmark and write its JSON, with machine and versions, into one folder.

python -m benchmarks.run_all --output runs/benchmarks
"""

import argparse
import importlib
import pkgutil
from pathlib import Path

import benchmarks

HELPERS = {"machine", "run_all"}


def main() -> None:
    """Run them one after the other; a benchmark offers `main(arguments)`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/benchmarks", help="a folder")
    folder = Path(parser.parse_args().output)
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name not in HELPERS and not module.ispkg:
            print(f"=== {module.name}", flush=True)
            benchmark = importlib.import_module(f"benchmarks.{module.name}")
            benchmark.main(["--output", str(folder / f"{module.name}.json")])


if __name__ == "__main__":
    main()
