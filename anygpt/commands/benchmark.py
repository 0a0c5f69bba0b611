"""Benchmarks: time and peak memory of alternative ways to do one thing, as ratios within one run.

    anygpt benchmark stage2 [--steps 5 …]
    anygpt benchmark stage2 --help

Each way runs in its own process, so that peak memories are separate. A benchmark is a file in `scripts/benchmarks/`
with a docstring and three functions:

    add_arguments(parser)          its settings
    sides(options) -> list[str]    the ways to compare
    measure(side, options) -> dict numbers by name, measured in a fresh process: times in seconds have names ending in
                                   `_s`; peak memory is added automatically

and optionally `baseline(side) -> str`, the way to compare `side` with, if that is not always the first one.

With `--rounds N` all ways are measured N times in turn, so that slow phases of the machine affect all of them, and
medians are shown.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from anygpt.commands import REPOSITORY, new_parser
from anygpt.errors import InputError

HERE = REPOSITORY / "scripts"
RESULT = "benchmark result: "
GIB = 2**30


def names() -> list[str]:
    """Names of the benchmarks.

    Raises:
        InputError: none found; they are part of the repository, not of the installed package.
    """
    found = sorted(path.stem for path in (HERE / "benchmarks").glob("*.py"))
    if not found:
        raise InputError("there are no benchmarks here; they are in scripts/benchmarks/ of the repository")
    return found


def load(name: str) -> ModuleType:
    """Module of a benchmark."""
    sys.path.insert(0, str(HERE))
    return importlib.import_module(f"benchmarks.{name}")


def peak_memory() -> dict[str, float]:
    """Peak resident memory of this process, and of the accelerator if there is one, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
    memory = {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    if torch.cuda.is_available():
        memory["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / GIB
    return memory


def run_side(arguments: list[str], side: str) -> dict[str, float]:
    """Measure one side in a fresh process.

    Raises:
        SystemExit: the process failed; its messages have been printed.
    """
    print(f"  {side} …", file=sys.stderr)
    command = [sys.executable, "-m", "anygpt", "benchmark", *arguments, "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode or RESULT not in done.stdout:
        sys.exit(f"error: the side {side} ended with {done.returncode}: {' '.join(command)}\n{done.stdout}")
    return json.loads(done.stdout.rpartition(RESULT)[2].splitlines()[0])


def table(results: dict[str, dict[str, float]], baseline: Callable[[str], str]) -> str:
    """Markdown table with a line per side, a column per number, and ratios to the baseline in brackets."""
    first = next(iter(results.values()))
    lines = ["| | " + " | ".join(first) + " |", "|---" * (len(first) + 1) + "|"]
    for side, numbers in results.items():
        other = results[baseline(side)]
        ratios = {name: value / other[name] if other[name] else float("nan") for name, value in numbers.items()}
        cells = [f"{value:.4g} ({ratios[name]:.2f}×)" for name, value in numbers.items()]
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> str:
    """Description of the machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def main(arguments: list[str]) -> None:
    parser = new_parser("benchmark", __doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar=f"{{{','.join(names())}}}")
    for name in names():
        module = load(name)
        layout = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, description=module.__doc__, formatter_class=layout)
        command.add_argument("--rounds", type=int, default=1, help="measurements of every way (default: %(default)s)")
        module.add_arguments(command)
        command.add_argument("--output", type=Path, metavar="FILE", help="also write the numbers to this file, as JSON")
        command.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    module = load(options.benchmark)
    if options.side is not None:
        print(RESULT + json.dumps(module.measure(options.side, options) | peak_memory()))
        return
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in module.sides(options)}
    for number in range(1, options.rounds + 1):
        print(f"{options.benchmark}: round {number} of {options.rounds}", file=sys.stderr)
        for side, measured in rounds.items():
            measured.append(run_side(arguments, side))
    results = {
        side: {name: statistics.median(numbers[name] for numbers in measured) for name in measured[0]}
        for side, measured in rounds.items()
    }
    baseline = getattr(module, "baseline", lambda side: next(iter(results)))
    print(f"{options.benchmark} on {machine()}\n\n{table(results, baseline)}")
    if options.output is not None:
        options.output.write_text(json.dumps({"machine": machine(), "sides": results}, indent=1) + "\n")
