"""Checks that need GPUs: each stage on a GPU, in bf16, compiled, on several GPUs, with FSDP2 and DeepSpeed.

    python scripts/gpu_test.py
    python scripts/gpu_test.py --gpus 2 --only FSDP2

Runs the tiny parts through `accelerate launch` with the files of configs/accelerate, about a minute per check. The
losses of each run, per term and update, are compared with those of the same run on the CPU; those of a resumed run with
an uninterrupted one. Each check prints PASS, FAIL, or SKIP with what is missing. The exit code is 0 if none failed, 1
if one did, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anygpt.toyworld.datasets import write_dataset

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = {1: "stage1_encoder_llm", 2: "stage2_llm_decoder", 3: "stage3_instruction_tuning"}
ROWS, UPDATES, BATCH = 24, 4, 8
# Convolutions on a GPU round to TF32, and the size of AdamW's first updates does not depend on the gradient's.
CLOSE, CLOSE_IN_BF16 = 0.02, 0.1
LINE = re.compile(r"update (\d+)  (.*)")
OF_THE_MACHINE = ("/s", "MFU", "_share", "memory_gib")

Losses = dict[int, dict[str, float]]


class Failed(Exception):
    """A check failed; the message gives the reason."""


class Skipped(Exception):
    """A check's requirement is missing."""


@dataclass
class Bench:
    """Runs stages in one folder; the rows per update do not depend on the number of processes."""

    folder: Path
    gpus: int

    @property
    def rows(self) -> int:
        return max(1, BATCH // self.gpus) * self.gpus

    def prepare(self) -> None:
        """Write the data of all stages, and run each stage on the CPU (stage 3 starts from stage 2)."""
        for stage in SCRIPTS:
            write_dataset(self.folder, f"stage{stage}", ROWS, seed=0)
        for stage in (2, 1, 3):
            self.run(f"cpu{stage}", stage, "one_process", 1, "--run.device=cpu")

    def run(self, name: str, stage: int, config: str, processes: int, *more: str) -> Losses:
        """Launch a stage, and return its losses from `log.txt`; raises `Failed` if it does not finish."""
        output, data = self.folder / name, self.folder / f"stage{stage}.jsonl"
        start = self.folder / "cpu2/final" if stage == 3 else "null"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", REPOSITORY / f"configs/accelerate/{config}.yaml"),
            *("--num_processes", processes, "--main_process_port", port),
            *(REPOSITORY / f"stages/{SCRIPTS[stage]}.py", "--config", REPOSITORY / f"configs/tiny/stage{stage}.yaml"),
            *("--run.output_dir", output, "--model.init_from", start),
            *("--data.train", f"[{{path: {data}}}]", "--data.eval", f"[{{path: {data}}}]"),
            *("--train.max_steps", UPDATES, "--train.warmup_steps", "0", "--train.batch_size", self.rows // processes),
            *("--loss.denoising", 1, "--train.projector_init", "random"),
            *("--train.log_steps", 1, "--train.save_steps", 0, "--train.eval_steps", 0, "--train.sample_steps", 0),
            *more,
        ]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        log = output.with_name(f"{name}.out")
        with log.open("a") as file:
            done = subprocess.run(list(map(str, command)), stdout=file, stderr=file, env=environment, cwd=REPOSITORY)
        if done.returncode or not (output / "final/model.safetensors").is_file():
            lines = [line for line in log.read_text().splitlines() if "rror" in line] or ["no error was printed"]
            raise Failed(f"ended with {done.returncode}: {lines[0].strip()[:200]} (all of it: {log})")
        return read_losses(output)

    def compare(self, name: str, stage: int, config: str, processes: int, *more: str, close: float = CLOSE) -> str:
        """Compare a run's losses with the CPU's; returns their difference in words."""
        return difference(
            read_losses(self.folder / f"cpu{stage}"), self.run(name, stage, config, processes, *more), close
        )

    def resume(self, name: str, config: str, processes: int) -> str:
        """Compare a run with itself after losing its last updates and resuming from a checkpoint."""
        output, save = self.folder / name, "--train.save_steps=2"
        whole = self.run(name, 3, config, processes, save)
        for lost in ("final", f"checkpoint-{UPDATES}"):
            shutil.rmtree(output / lost)
        (output / "log.txt").unlink()
        again = self.run(name, 3, config, processes, save)
        if sorted(again) != list(range(3, UPDATES + 1)):
            raise Failed(f"went on with the updates {sorted(again)}, expected 3 to {UPDATES}")
        return difference({step: whole[step] for step in again}, again, CLOSE)


def read_losses(output: Path) -> Losses:
    found: Losses = {}
    for line in (output / "log.txt").read_text().splitlines():
        if match := LINE.fullmatch(line):
            pairs = (pair.rsplit(" ", 1) for pair in match[2].split("  "))
            values = {name: float(value) for name, value in pairs if not name.endswith(OF_THE_MACHINE)}
            found.setdefault(int(match[1]), {}).update(values)
    return found


def difference(expected: Losses, found: Losses, close: float) -> str:
    """The largest relative difference, in words.

    Raises:
        Failed: it exceeds `close`, or the logged updates or terms differ.
    """
    if {step: set(v) for step, v in expected.items()} != {step: set(v) for step, v in found.items()}:
        raise Failed("other updates or loss terms were logged")
    # The floor on the denominator avoids large relative differences of losses near zero.
    distances = [
        (abs(value - found[step][name]) / max(abs(value), 0.05), step, name)
        for step, values in expected.items()
        for name, value in values.items()
        if "norm" not in name
    ]
    distances = [(math.inf if math.isnan(distance) else distance, *place) for distance, *place in distances]
    largest, step, name = max(distances)
    said = f"losses differ by {largest:.2%} at most ({name}, update {step})"
    if not largest <= close:
        raise Failed(f"{said}, more than {close:.0%}")
    return said


def answers(bench: Bench) -> str:
    """Check that training generates sample answers with media."""
    bench.run("answers", 3, "one_process", 1, f"--train.sample_steps={UPDATES}")
    index = bench.folder / f"answers/samples/{UPDATES:06d}/index.jsonl"
    files = [file["path"] for line in index.read_text().splitlines() for file in json.loads(line)["files"]]
    if not files or any(not (index.parent / file).stat().st_size for file in files):
        raise Failed(f"no media in {index}")
    return f"{len(files)} media were generated"


def needs(condition: bool, what: str) -> None:
    if not condition:
        raise Skipped(f"needs {what}")


def several(bench: Bench) -> str:
    needs(bench.gpus > 1, "two GPUs")
    return bench.compare("several", 3, "several_gpus", bench.gpus)


def deepspeed(bench: Bench) -> str:
    needs(importlib.util.find_spec("deepspeed") is not None, "deepspeed (pip install deepspeed)")
    return bench.compare("deepspeed", 3, "deepspeed_zero2", bench.gpus)


CHECKS: dict[str, Callable[[Bench], str]] = {
    **{f"stage {n}": lambda bench, n=n: bench.compare(f"gpu{n}", n, "one_process", 1) for n in SCRIPTS},
    "bf16": lambda bench: bench.compare(
        "bf16", 3, "one_process", 1, "--train.mixed_precision=bf16", close=CLOSE_IN_BF16
    ),
    "gradient checkpointing": lambda bench: bench.compare(
        "recomputed", 3, "one_process", 1, "--train.gradient_checkpointing=true"
    ),
    "compile": lambda bench: bench.compare("compiled", 3, "one_process", 1, "--train.compile=true"),
    "answers": answers,
    "resume": lambda bench: bench.resume("resumed", "one_process", 1),
    "several GPUs": several,
    "FSDP2": lambda bench: bench.compare("fsdp2", 3, "fsdp2", bench.gpus),
    "FSDP2 resume": lambda bench: bench.resume("fsdp2_resumed", "fsdp2", bench.gpus),
    "DeepSpeed ZeRO-2": deepspeed,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="of runs on several (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="checks to make")
    options = parser.parse_args()
    if not 0 < options.gpus <= torch.cuda.device_count():
        found = torch.cuda.device_count()
        print(f"error: --gpus is {options.gpus}, and there are {found} GPUs here; nothing was tried", file=sys.stderr)
        return 2
    folder, failed = Path(tempfile.mkdtemp(prefix="gpu_test_")), False
    print(f"{torch.cuda.get_device_name()}, {options.gpus} of {torch.cuda.device_count()}; runs: {folder}", flush=True)
    bench = Bench(folder, options.gpus)
    bench.prepare()
    for name in options.only:
        try:
            state, said = "PASS", CHECKS[name](bench)
        except Skipped as reason:
            state, said = "SKIP", str(reason)
        except Failed as reason:
            state, said, failed = "FAIL", str(reason), True
        print(f"{state} {name}: {said}", flush=True)
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
