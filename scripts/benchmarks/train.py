"""The training loop: its overhead beside the model, and its wait for data.

Stage 1 as run by a user, on ToyWorld's rows decoded by two workers: `tiny` is the tiny configuration, `135m` the same
with a language model of SmolLM2-135M's shape (random weights). `stage3` is the tiny configuration of stage 3 with
padded rows, against rows packed to 512 tokens, or batches of about 3,200. `compute_s` is the time of forward, backward
and the optimizer per update; `wait_share` is the share of waiting for data, and `loop_share` the rest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anygpt import load_tokenizer
from anygpt.parts.source import Source
from anygpt.sequence.merging import IGNORE
from anygpt.toyworld.datasets import write_dataset
from anygpt.training import trainer
from anygpt.training.cli import quiet_libraries
from anygpt.training.config import parse_config
from anygpt.training.stages import ENCODER_LLM, INSTRUCTION_TUNING, LLM_DECODER

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SIDES = ["tiny", "135m", "stage3", "stage3_packed", "stage3_tokens"]
WAYS = {"stage3_packed": ("--data.pack_to", "512"), "stage3_tokens": ("--data.max_batch_tokens", "3200")}
WARM_UP = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20, help="updates, after five of warm-up (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode (default: %(default)s)")
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16"), help="(default: %(default)s)")


def sides(options: argparse.Namespace) -> list[str]:
    return SIDES


def baseline(side: str) -> str:
    return "stage3" if "stage3" in side else SIDES[0]


class Watch:
    """Timer of updates.

    Attributes:
        updates: `(whole, compute, wait)` of each update, in seconds.
        labels: label tokens of each update.
    """

    def __init__(self):
        self.updates: list[tuple[float, float, float]] = []
        self.labels: list[int] = []
        self.inside = {"compute": 0.0, "wait": 0.0}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function to add its time to the current update's compute time."""

        def timed(*arguments: Any, **options: Any) -> Any:
            begin = clock()
            result = function(*arguments, **options)
            self.inside[name] += clock() - begin
            return result

        return timed

    def take(self, updates: Iterable[Any]) -> Iterator[Any]:
        """Yield the same updates; the time until the next one is requested counts as the update."""
        iterator = iter(updates)
        fetch = self.around("wait", lambda: next(iterator, None))
        begin = clock()
        while (item := fetch()) is not None:
            self.labels.append(sum(int((batch["labels"] != IGNORE).sum()) for batch, _ in item))
            yield item
            end = clock()
            self.updates.append((end - begin, self.inside["compute"], self.inside["wait"]))
            self.inside, begin = dict.fromkeys(self.inside, 0.0), end


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of an update and of its parts, and their shares."""
    quiet_libraries()
    watch = Watch()

    class Watched(trainer.Trainer):
        """A trainer with timers around the model, the optimizer and the data."""

        def run_updates(self, updates: Iterable[Any], *others: Any) -> None:
            self.wrapped.forward = watch.around("compute", self.wrapped.forward)
            self.accelerator.backward = watch.around("compute", self.accelerator.backward)
            self.optimizer.step = watch.around("compute", self.optimizer.step)
            super().run_updates(watch.take(updates), *others)

    with tempfile.TemporaryDirectory() as folder:
        settings, stage = command(Path(folder), side, options), INSTRUCTION_TUNING if "stage3" in side else ENCODER_LLM
        trainer.Trainer = Watched
        trainer.train(parse_config(settings), stage)
    timed = watch.updates[WARM_UP:]
    whole, compute, wait = (sum(times) for times in zip(*timed, strict=True))
    return {
        "step_s": statistics.median(times[0] for times in timed),
        "compute_s": statistics.median(times[1] for times in timed),
        "loop_share": (whole - compute - wait) / whole,
        "wait_share": wait / whole,
        "labels_per_s": sum(watch.labels[WARM_UP : WARM_UP + len(timed)]) / whole,
    }


def command(folder: Path, side: str, options: argparse.Namespace) -> list[str]:
    """Write the run's data and language model, and return its command line."""
    name, more = "stage3" if "stage3" in side else "stage1", list(WAYS.get(side, ()))
    rows = write_dataset(folder, name, 64 if name == "stage1" else 256, seed=0)
    if name == "stage3":
        pairs, start = write_dataset(folder, "stage2", 8, seed=0), folder / "start"
        before = ["--config", str(REPOSITORY / "configs/tiny/stage2.yaml"), "--model.init_from", "null"]
        before += ["--run.output_dir", str(start), "--data.train", f"[{{path: {pairs}}}]", "--train.warmup_steps", "0"]
        trainer.train(parse_config([*before, "--train.max_steps", "1", "--train.batch_size", "2"]), LLM_DECODER)
        more += ["--model.init_from", str(start / "final"), "--data.in_memory", "true"]
    if side == "135m":
        more += ["--model.language_model.path", str(write_smollm2(folder / "llm"))]
    return [
        *("--config", str(REPOSITORY / f"configs/tiny/{name}.yaml"), *more),
        *("--run.output_dir", str(folder / "run"), "--data.train", f"[{{path: {rows}}}]"),
        *("--data.num_workers", str(options.workers), "--train.batch_size", str(options.batch_size)),
        *(
            "--train.max_steps",
            str(options.steps + WARM_UP),
            "--train.warmup_steps",
            "0",
            "--train.mixed_precision",
            options.mixed_precision,
        ),
    ]


def write_smollm2(folder: Path) -> Path:
    """Write a language model of SmolLM2-135M's shape with random weights, and the zoo's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(Source("zoo:language_model")).save_pretrained(folder)
    return folder
