"""Peak memory of a whole evaluation, reports included, on 500 and on 5,000 images.

python benchmarks/memory.py --shared ../shared
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

# A child of its own for each run, so that its peak is its own.
CHILD = """
import resource, sys
from robust import cli, evaluate
try:
    cli.main(evaluate.evaluate)
except SystemExit as ended:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
    sys.exit(ended.code)
"""

CASES = {"cifar10_resnet20": "cifar10_test.zip", "mnist_robust_03": "mnist_test.npz"}


def peak(model: str, data: Path, limit: int) -> float:
    """MB at the peak of one run with the default attacks and eps."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--model", model, "--data", data, "--limit", limit, "--output", Path(folder) / "run", "--quiet"]
        command = [sys.executable, "-c", CHILD, *map(str, options)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
    return int(done.stderr.split()[-1]) / (1024 * 1024 if sys.platform == "darwin" else 1024)


def main(shared: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = Path("../shared")) -> None:
    """Print the table as Markdown."""
    print("| network | 500 images | 5,000 images | difference |\n|---|---|---|---|")
    for factory, data in CASES.items():
        model = f"{shared / 'models' / 'architectures.py'}:{factory}"
        small, large = (peak(model, shared / "data" / data, limit) for limit in (500, 5000))
        print(f"| {factory} | {small:.0f} MB | {large:.0f} MB | {large - small:.0f} MB |", flush=True)


if __name__ == "__main__":
    typer.run(main)
