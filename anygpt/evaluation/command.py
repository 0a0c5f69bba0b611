"""`evaluate` for a suite file: the command's arguments, the model, the processes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from anygpt.errors import reading
from anygpt.evaluation.report import text_table
from anygpt.evaluation.suite import read_suite
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
    if options.no_baselines:
        suite.baselines = []
    from anygpt.evaluation.run import describe_checkpoint, evaluate  # its libraries are an extra

    # Others wait while one still asks. Without a device all processes must be told that they run on the CPU.
    accelerator = Accelerator(
        cpu=options.device == "cpu" or not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    parts: dict[str, Any] = {"answers": options.answers}
    if options.answers is None:
        facts = describe_checkpoint(options.checkpoint)
        with reading(options.checkpoint):
            model = MultimodalModel.from_pretrained(options.checkpoint)
            processor = MultimodalProcessor.from_pretrained(options.checkpoint, model=model)
        parts |= {
            "model": model.to(options.device or accelerator.device).eval(),
            "processor": processor,
            "facts": facts,
        }
    try:
        report = evaluate(suite, options.output, accelerator, **parts)
    finally:
        accelerator.end_training()
    if report is None:
        return None
    values = {
        f"{suite.name}/{name}" + ("" if way == "model" else f"/{way}"): value["value"]
        for name, found in report["metrics"].items()
        for way, value in found.items()
    }
    log_values(options.tracker, options.output, values)
    return f"{text_table(report)}\n\nmetrics.json, report.html and samples/ are in {options.output}"
