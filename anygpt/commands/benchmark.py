"""Benchmarks: time and peak memory of alternative ways to do one thing, as ratios within one run.

    anygpt benchmark stage2 [--steps 5 …]
    anygpt benchmark stage2 --help

Each way runs in its own process, so that peak memories are separate. A benchmark is a file in `scripts/benchmarks/`
with a docstring and three functions:

    add_arguments(parser)          its settings
    sides(options) -> list[str]    the ways to compare, as "group: way", with the first of their group
    measure(side, options) -> dict numbers by name, measured in a fresh process: times in seconds have names ending in
                                   `_s`; peak memory is added automatically

Modules that start with `_` are shared by benchmarks. With `--rounds N` all ways are measured N times in turn, so that
slow phases of the machine affect all of them; medians are shown, of ratios those within rounds.
"""

import argparse
import importlib
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from types import ModuleType

import torch

from anygpt.commands import REPOSITORY, check_range, new_parser
from anygpt.errors import InputError

HERE = REPOSITORY / "scripts"
GIB = 2**30

Numbers = dict[str, dict[str, float]]  # by side and name


def names() -> list[str]:
    """Names of the benchmarks; an `InputError` outside a checkout, since no package has them."""
    found = sorted(path.stem for path in (HERE / "benchmarks").glob("[!_]*.py"))
    if not found:
        raise InputError("there are no benchmarks here; they are in scripts/benchmarks/ of the repository")
    return found


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(HERE))
    return importlib.import_module(f"benchmarks.{name}")


def peak_memory() -> dict[str, float]:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
    memory = {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    if torch.cuda.is_available():
        memory["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / GIB
    return memory


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    if options.cpu_seconds:
        load("_shared").timer = time.process_time
    return load(options.benchmark).measure(side, options) | peak_memory()


def run_side(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure one side in a fresh process, whose exception is raised here."""
    print(f"  {side} …", file=sys.stderr)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(measure, side, options).result()


def table(rounds: list[Numbers]) -> str:
    """Markdown table of medians: a line per side, a column per number; ratios of times and memory in brackets."""
    sides = rounds[0]
    names = list(dict.fromkeys(name for numbers in sides.values() for name in numbers))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for side, numbers in sides.items():
        group = side.rpartition(": ")[0]
        first = next(other for other in sides if other.rpartition(": ")[0] == group)
        cells = []
        for name in names:
            cells.append(f"{statistics.median(found[side][name] for found in rounds):.4g}" if name in numbers else "")
            if name.endswith(("_s", "_gib")) and name in numbers and name in sides[first]:
                ratios = [found[side][name] / found[first][name] for found in rounds]
                cells[-1] += f" ({statistics.median(ratios):.2f}×)"
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> str:
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
        command.add_argument("--only", metavar="TEXT", default="", help="only the ways whose names contain this")
        command.add_argument("--cpu-seconds", action="store_true", help="the process's CPU time, on a busy machine")
    options = parser.parse_args(arguments)
    check_range(options, 1, 1000, "rounds")
    module = load(options.benchmark)
    sides = [side for side in module.sides(options) if options.only in side]
    if not sides:
        raise InputError(f"--only {options.only!r} is in none of {', '.join(module.sides(options))}")
    rounds: list[Numbers] = []
    for number in range(1, options.rounds + 1):
        print(f"{options.benchmark}: round {number} of {options.rounds}", file=sys.stderr)
        rounds.append({side: run_side(side, options) for side in sides})
    print(f"{options.benchmark} on {machine()}\n\n{table(rounds)}")
