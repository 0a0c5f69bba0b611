"""Evaluate a trained model with a suite of metrics on your data, or with the any-to-any matrix of ToyWorld.

    anygpt evaluate --checkpoint runs/quickstart/stage3/final --output runs/report
    anygpt evaluate --checkpoint DIR --suite configs/evaluation/coco_generation.yaml --output DIR

A suite file writes metrics.json, samples/ and report.html; answers that are already in the output folder are reused,
and the suite's settings can be overridden, as in `--ask.seed 1 --limit 1000`. `--suite toyworld` prints the matrix, its
upper bound and baseline, and writes matrix.json, samples/, contact_sheet.png and report.html. It uses things that
stages 1 to 3 have never seen, or with `--things seen` the others.
"""

import argparse
import tempfile
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from anygpt.chat.chat_model import check_device, load_checkpoint
from anygpt.commands import CHECKPOINT, new_parser
from anygpt.errors import InputError
from anygpt.evaluation import report as suite_report
from anygpt.evaluation import run as suite_run
from anygpt.evaluation.suite import read_suite
from anygpt.toyworld.evaluation.answers import Settings
from anygpt.toyworld.evaluation.matrix import THINGS, check_settings, evaluate
from anygpt.toyworld.evaluation.report import text_table, tracked_values, write_report
from anygpt.toyworld.evaluation.requests import WAYS


def parse(given: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and for a suite file the remaining arguments, which override its settings."""
    parser = new_parser("evaluate", __doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=CHECKPOINT, help="a run's final/ folder (default: the quickstart's last)")
    add("--suite", default="toyworld", help="toyworld, or a YAML file as in configs/evaluation/ (default: %(default)s)")
    add("--output", type=Path, required=True, help="folder to write to")
    add("--no-baselines", dest="baselines", action="store_false", help="leave out the upper bound and the baselines")
    add("--device", help="where to run, for example cuda (default: cpu; with a suite file an accelerator)")
    add("--tracker", choices=["none", "wandb", "tensorboard"], default="none", help="also log the numbers there")
    add("--answers", type=Path, help="with a suite file: score the finished answers in this folder, without a model")
    if "--help" not in given and parser.parse_known_args(given)[0].suite != "toyworld":
        return parser.parse_known_args(given)
    add = parser.add_argument_group("with --suite toyworld").add_argument
    add("--samples", type=int, help="requests per cell of the matrix (default: %(default)s)")
    add("--talk-samples", type=int, help="requests per kind of talk (default: %(default)s)")
    add("--conversations", type=int, help="number of conversations of four turns (default: %(default)s)")
    add("--batch-size", type=int, help="number answered at once (default: %(default)s)")
    add("--things", choices=sorted(THINGS), help="which things (default: %(default)s)")
    add("--steps", type=int, help="denoising steps (default: the checkpoint's own)")
    add("--guidance", type=float, help="guidance scale (default: the checkpoint's own)")
    add("--max-new-tokens", type=int, help="tokens per answer (default: %(default)s)")
    add("--seed", type=int, help="seed of requests, renders and noise (default: %(default)s)")
    parser.set_defaults(**vars(Settings()) | {"steps": None, "guidance": None})
    options = parser.parse_args(given)
    if options.answers is not None:
        parser.error("--answers needs a suite file: ToyWorld's requests are made anew each time")
    options.device = options.device or "cpu"
    return options, []


def run_matrix(options: argparse.Namespace) -> str:
    for name in ("steps", "guidance"):
        value = getattr(options, name)
        setattr(options, name, {} if value is None else dict.fromkeys(WAYS[1:], value))
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    check_settings(settings)
    made, samples = options.output, options.output / "samples"
    if file := next((path for path in (made, *made.parents) if path.exists() and not path.is_dir()), None):
        raise InputError(f"--output {made}: {file} is a file; give a folder")
    if samples.is_dir() and any(samples.iterdir()) and not (samples / "index.jsonl").is_file():
        raise InputError(f"--output {made}: {samples} is not from an evaluation, and would be lost; give another")
    check_device(options.device)
    model, processor = load_checkpoint(options.checkpoint)
    model.to(options.device).eval()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{options.output.name}-", dir=options.output.parent) as folder:
        samples = Path(folder, "samples")
        report, judged = evaluate(model, processor, samples, settings)
        report["checkpoint"] = str(options.checkpoint)
        sheet = write_report(options.output, samples, report, judged)
    suite_report.log_values(options.tracker, options.output, tracked_values(report), contact_sheet=sheet)
    return f"{text_table(report)}\n\nmatrix.json, contact_sheet.png, report.html and samples/ are in {options.output}"


def run_suite(options: argparse.Namespace, overrides: list[str]) -> str | None:
    suite = read_suite(options.suite, overrides)
    suite.baselines = suite.baselines if options.baselines else []
    # Processes may wait for each other for a long time. Without a device, accelerate must be told to use the CPU.
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=7))
    on_cpu = options.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[waiting])
    parts: dict[str, Any] = {"answers": options.answers}
    if options.answers is None:
        model, processor = load_checkpoint(options.checkpoint)
        parts = {"model": model.to(options.device or accelerator.device).eval(), "processor": processor}
        written = max(path.stat().st_mtime for path in options.checkpoint.rglob("*"))
        parts["facts"] = {"checkpoint": str(options.checkpoint), "written": written}
    report = suite_run.evaluate(suite, options.output, accelerator, **parts)
    accelerator.end_training()
    if report is None:
        return None
    suite_report.log_values(options.tracker, options.output, suite_report.flat_values(report))
    return f"{suite_report.text_table(report)}\n\nmetrics.json, report.html and samples/ are in {options.output}"


def main(arguments: list[str]) -> None:
    options, overrides = parse(arguments)
    told = run_matrix(options) if options.suite == "toyworld" else run_suite(options, overrides)
    if told is not None:
        print(told)
