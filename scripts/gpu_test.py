"""What only a GPU shows, as one command that takes under ten minutes on one card and prints a Markdown table.

    python scripts/gpu_test.py        # --tiny: with tiny parts, on a CPU too, to show that the command works
    python scripts/gpu_test.py --gpus 2 --only fsdp2

Rates: the stages at NExT-GPT's sizes (a language model of Vicuna-7B's shape, a ViT-H/14, Stable Diffusion 1.5; random
weights, bf16, rows of a 512 × 384 JPEG), beside its author's samples per second on a V100. Checks: the tiny parts
through `accelerate launch` with the files of configs/accelerate; each loss, per term and update, against the same run
on the CPU. The exit code is 0 if nothing failed, 1 if something did, 2 without a GPU.
"""

import argparse
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from anygpt.commands import REPOSITORY
from anygpt.commands.benchmark import machine
from anygpt.toyworld.datasets import write_dataset

import torch
from benchmarks._shared import DEVICE, read_log, run_stage, write_parts, write_photographs
from transformers import CLIPVisionConfig, LlamaConfig

STAGES = {1: "stage1_encoder_llm", 2: "stage2_llm_decoder", 3: "stage3_instruction_tuning"}
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
PACKED, FLASH = "--data.pack_to=2048", "--model.language_model.attn_implementation=flash_attention_2"
RATES = {  # stage, settings, samples per second of NExT-GPT's author
    "stage 1": (1, [], 7.4),
    "stage 2": (2, [], 5.6),
    "stage 3, LoRA": (3, [], 3.5),
    "stage 3, compiled": (3, ["--train.compile=true"], None),
    "stage 3, packed": (3, [PACKED], None),
    "stage 3, packed, FlashAttention varlen": (3, [PACKED, FLASH], None),
}
CHECKS = {  # stage, file of configs/accelerate, settings
    **{f"stage {stage} as on the CPU": (stage, "one_process", []) for stage in STAGES},
    "bf16": (3, "one_process", ["--train.mixed_precision=bf16"]),
    "gradient checkpointing": (3, "one_process", ["--train.gradient_checkpointing=true"]),
    "compile": (3, "one_process", ["--train.compile=true"]),
    **{name: (3, name, []) for name in ("several_gpus", "fsdp2", "deepspeed_zero2")},
}
UPDATES, BATCH = 4, 8
# Convolutions on a GPU round to TF32, and the size of AdamW's first updates does not depend on the gradient's.
CLOSE, CLOSE_IN_BF16 = 0.02, 0.1
MACHINE = ("/s", "MFU", "_share", "memory_gib", "norm")

Losses = dict[int, dict[str, float]]


class Failed(Exception):
    state = "FAIL"


class Skipped(Failed):
    state = "SKIP"


def write_real_sizes(folder: Path, tiny: bool) -> None:
    llm = LlamaConfig(vocab_size=32000, **SMALL if tiny else {})  # the defaults are the 7B model's
    vision = CLIPVisionConfig(**SMALL if tiny else VIT_H, patch_size=14)
    diffusion = {"latents": 8, "width": 1} if tiny else {"latents": 64, "width": 4}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        write_parts(folder, "language_model", "encoders", "decoders", llm=llm, vision=vision, **diffusion)
    torch.set_default_dtype(torch.float32)


def measure_rate(name: str, folder: Path, steps: int) -> dict[str, float]:
    stage, settings, _ = RATES[name]
    kinds = {1: [False], 2: [True], 3: [False, True]}[stage]
    data = [write_photographs(folder / f"rows_{made}.jsonl", BATCH * (steps + 3), asked_for=made) for made in kinds]
    common = [f"--config={folder / 'run.yaml'}", f"--train.batch_size={BATCH}", "--train.mixed_precision=bf16"]
    common += ["--data.train=" + json.dumps([{"path": str(path)} for path in data]), "--data.num_workers=2"]
    found = run_stage(stage, Path(tempfile.mkdtemp(dir=folder)), [*common, *settings], steps)
    return found | {"samples/s": BATCH / found["step_s"]}


def rate(name: str, folder: Path, options: argparse.Namespace) -> str:
    """Measure one row of `RATES` in a process of its own; returns it as text."""
    if FLASH in RATES[name][1]:
        needs(importlib.util.find_spec("flash_attn"), "flash-attn (pip install flash-attn)")
    command = [sys.executable, __file__, "--row", name, "--folder", folder, "--steps", options.steps]
    found = json.loads(call(command).splitlines()[-1])
    beside = "" if options.tiny or not RATES[name][2] else f" (NExT-GPT on a V100: {RATES[name][2]})"
    return f"{found['samples/s']:.1f} samples/s{beside}, {found['MFU']:.0%} MFU, {found['memory_gib']:.1f} GiB"


def launch(folder: Path, name: str, stage: int, config: str, processes: int, *more: str) -> Losses:
    output, data = folder / name.replace(" ", "_"), folder / f"stage{stage}.jsonl"
    write_dataset(folder, f"stage{stage}", 24, seed=0)
    start = folder / "cpu2/final" if stage == 3 else "null"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes),
        *("--config_file", REPOSITORY / f"configs/accelerate/{config}.yaml", "--main_process_port", 0),
        *(REPOSITORY / f"stages/{STAGES[stage]}.py", "--config", REPOSITORY / f"configs/tiny/stage{stage}.yaml"),
        *(f"--run.output_dir={output}", f"--data.train=[{{path: {data}}}]", f"--train.max_steps={UPDATES}"),
        *(f"--model.init_from={start}", f"--train.batch_size={max(1, BATCH // processes)}", "--loss.denoising=1"),
        *("--train.warmup_steps=0", "--train.log_steps=1", "--train.projector_init=random", *more),
    ]
    call(command)
    return read_losses(output)


def call(command: list[object]) -> str:
    """Run a command; returns its output, or raises `Failed` with the first line about an error."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or ["no error was printed"]
        raise Failed(f"ended with {done.returncode}: {lines[0].strip()[:200]}")
    return done.stdout


def read_losses(output: Path) -> Losses:
    log = read_log(output).items()
    return {step: {name: x for name, x in values.items() if not name.endswith(MACHINE)} for step, values in log}


def difference(expected: Losses, found: Losses, close: float) -> str:
    """The largest relative difference, as text; raises `Failed` if it exceeds `close`, or other losses were logged."""
    if {step: set(v) for step, v in expected.items()} != {step: set(v) for step, v in found.items()}:
        raise Failed("other updates or loss terms were logged")
    # The floor on the denominator avoids large relative differences of losses near zero.
    pairs = [(value, found[step][name]) for step, values in expected.items() for name, value in values.items()]
    largest = max(abs(a - b) / max(abs(a), 0.05) if math.isfinite(b) else math.inf for a, b in pairs)
    if largest > close:
        raise Failed(f"losses differ by {largest:.2%}, more than {close:.0%}")
    return f"losses differ by {largest:.2%} at most"


def check(name: str, folder: Path, options: argparse.Namespace) -> str:
    stage, config, settings = CHECKS[name]
    needs(config == "one_process" or options.gpus > 0, "a GPU")
    needs(config != "several_gpus" or options.gpus > 1, "two GPUs")
    needs("deepspeed" not in config or importlib.util.find_spec("deepspeed"), "deepspeed")
    for number in {3: (2, 3)}.get(stage, (stage,)):  # stage 3 starts from stage 2
        if not (folder / f"cpu{number}").exists():
            launch(folder, f"cpu{number}", number, "one_process", 1, "--run.device=cpu")
    found = launch(folder, name, stage, config, 1 if config == "one_process" else options.gpus, *settings)
    return difference(read_losses(folder / f"cpu{stage}"), found, CLOSE_IN_BF16 if name == "bf16" else CLOSE)


def needs(condition: object, what: str) -> None:
    if not condition:
        raise Skipped(f"needs {what}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = torch.cuda.device_count()
    parser.add_argument("--gpus", type=int, default=count, help="GPUs of runs on several (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[*RATES, *CHECKS], default=[*RATES, *CHECKS], help="rows")
    parser.add_argument("--tiny", action="store_true", help="rates of tiny parts")
    parser.add_argument("--steps", type=int, default=10, help="timed updates of a rate (default: %(default)s)")
    parser.add_argument("--row", choices=RATES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure_rate(options.row, options.folder, options.steps)))
        return 0
    if not (0 < options.gpus <= count or options.tiny):
        print(f"error: --gpus is {options.gpus}, and there are {count} GPUs here; nothing was run", file=sys.stderr)
        return 2
    folder, failed = Path(tempfile.mkdtemp(prefix="gpu_test_")), False
    if not RATES.keys().isdisjoint(options.only):
        write_real_sizes(folder, options.tiny)
    print(f"{machine()}\n\n| | | |\n|---|---|---|", flush=True)
    for name in options.only:
        try:
            state, said = "PASS", (rate if name in RATES else check)(name, folder, options)
        except Failed as reason:
            state, said = reason.state, str(reason)
        failed |= state == Failed.state
        print(f"| {name} | {state} | {said} |", flush=True)
    shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
