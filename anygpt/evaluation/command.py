"""`evaluate` for a suite file: the command's arguments, the model, the processes."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from anygpt.errors import InputError, reading
from anygpt.evaluation.report import text_table
from anygpt.evaluation.suite import Suite, read_suite
from anygpt.evaluation.tracking import log_values
from anygpt.model.multimodal import MultimodalModel
from anygpt.processing.processor import MultimodalProcessor


def add_arguments(parser: argparse.ArgumentParser, checkpoint: Path) -> None:
    """What every suite takes."""
    add = parser.add_argument
    add("--checkpoint", type=Path, default=checkpoint, help="a run's final/ folder (default: the quickstart's last)")
    add("--suite", default="toyworld", help="toyworld, or a YAML file as in configs/evaluation/ (default: %(default)s)")
    add("--output", type=Path, required=True, help="folder to write to")
    add("--no-baselines", action="store_true", help="leave out the upper bound and the baselines")
    add("--device", default=None, help="where to run, for example cuda")
    add("--tracker", choices=["none", "wandb", "tensorboard"], default="none", help="also log the numbers there")
    add("--answers", type=Path, help="score the finished answers in this folder, without a model")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> str | None:
    """Ask, score and write; returns what to print, in the first process.

    Args:
        overrides: dotted settings over the suite's own, as `--ask.seed 1 --data '[{path: rows.jsonl}]'`.
    """
    suite = read_suite(options.suite, overrides)
    suite.baselines = [] if options.no_baselines else suite.baselines
    check_installed()
    from anygpt.evaluation.run import evaluate  # its libraries are an extra

    # Others wait while one still asks. Without a device all processes must be told that they run on the CPU.
    accelerator = Accelerator(
        cpu=options.device == "cpu" or not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    parts: dict[str, Any] = {"answers": options.answers}
    if (folder := options.answers or options.checkpoint) and not folder.is_dir():
        raise InputError(f"{folder} is no folder; give --checkpoint a run's final/, --answers a folder of answers")
    if options.answers is None:
        with reading(folder):
            model = MultimodalModel.from_pretrained(folder).to(options.device or accelerator.device).eval()
            processor = MultimodalProcessor.from_pretrained(folder, model=model)
        # what is in a checkpoint is told by the sizes and times of its files
        stats = {str(p.relative_to(folder)): p.stat() for p in sorted(folder.rglob("*")) if p.is_file()}
        files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        parts |= {"model": model, "processor": processor, "facts": {"checkpoint": str(folder), "files": files}}
    report = evaluate(suite, options.output, accelerator, **parts)
    accelerator.end_training()
    if report is None:
        return None
    log_values(options.tracker, options.output, flat_values(suite, report))
    return f"{text_table(report)}\n\nmetrics.json, report.html and samples/ are in {options.output}"


def flat_values(suite: Suite, report: dict[str, Any]) -> dict[str, float]:
    """`{"<suite>/<metric>": value}` of the model, and with `/<baseline>` behind it of the others."""
    return {
        f"{suite.name}/{name}" + ("" if way == "model" else f"/{way}"): value["value"]
        for name, found in report["metrics"].items()
        for way, value in found.items()
    }


def check_installed() -> None:
    """Raises `InputError` where the extra is not there."""
    if missing := [name for name in ("torchmetrics", "pycocoevalcap") if importlib.util.find_spec(name) is None]:
        raise InputError(f"{', '.join(missing)} is not installed; pip install -e '.[evaluation]' brings it")
