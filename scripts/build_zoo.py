"""Rebuild the tiny zoo: stage 0 for every part, from random weights to half-precision folders with model cards.

    python scripts/build_zoo.py

Takes hours on two cores. Intermediate results stay in runs/zoo; interrupted runs continue. The parts are written to
anygpt/toyworld/weights/zoo, which the package ships and `anygpt.toyworld.zoo()` returns, and measured there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, TextToVideoSDPipeline
from safetensors.torch import load_file, save_file

from anygpt.toyworld.datasets import COMPONENT_KINDS, write_dataset
from anygpt.toyworld.world import THINGS
from anygpt.toyworld.zoo import PARTS, write_untrained, zoo
from anygpt.training.cli import quiet_libraries
from anygpt.training.config import parse_config

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "tiny" / "stage0"
WORK = ROOT / "runs" / "zoo"
QUALITY = WORK / "quality.json"
FINISHED = "finished.json"
"""File in a run's folder that records its inputs; written last."""
SAMPLES = dict.fromkeys(COMPONENT_KINDS, 4000) | {
    "words": 16_000,
    "dialogues": 24_000,
    "views": 30_000,
    "pairs": 8_000,
    "stills": 8_000,
    "clips": 8_000,
}
"""Rows of each kind of data."""
MADE_BY = {
    "language_model": ("words", "dialogues"),
    "image_encoder": ("words", "image_encoder"),
    "audio_encoder": ("words", "image_encoder", "audio_encoder"),
    "image_decoder": ("image_vae", "image_denoiser"),
    "video_decoder": ("video_vae", "video_frames", "video_frames_2", "video_frames_3", "video_denoiser"),
    "audio_decoder": ("audio_vae", "audio_denoiser", "vocoder"),
}
"""The runs that make a part, each starting from the one before; each has a config in `configs/tiny/stage0`."""
STARTS = {run: start for runs in MADE_BY.values() for start, run in zip((None, *runs), runs, strict=False)}
"""For each run, the run that it starts from."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--output", type=Path, default=zoo(), help="folder of the finished parts (default: %(default)s)"
    )
    parser.add_argument("--only-collect", action="store_true", help="train nothing; take what runs/zoo has")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="runs at once (%(default)s)")
    options = parser.parse_args()
    quiet_libraries()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    check_output(options.output)
    if not options.only_collect:
        write_start()
        for kind in COMPONENT_KINDS:
            write_dataset(WORK / "data", kind, SAMPLES[kind], seed=0, things=THINGS, progress=True)
        train_all(max(1, options.jobs))
    collect(options.output)
    measure = ("scripts/zoo_quality.py", "--parts", options.output.resolve(), "--output", QUALITY)
    subprocess.run([sys.executable, *map(str, measure)], cwd=ROOT, check=True)
    for part in PARTS:
        (options.output / part / "README.md").write_text(card(part), encoding="utf-8")
    print(options.output)
    return 0


def check_output(output: Path) -> None:
    """Raise `SystemExit` if `output`, which will be replaced, exists and is no zoo."""
    if output.exists() and not output.is_dir():
        raise SystemExit(f"error: --output {output} is a file; give a folder")
    if others := sorted({path.name for path in output.iterdir()} - set(PARTS) if output.is_dir() else ()):
        raise SystemExit(
            f"error: --output {output} holds {', '.join(others[:3])}, and would be replaced; give a new folder"
        )


def write_start() -> None:
    """Write the untrained parts; raise `SystemExit` if existing ones differ from what the code makes now."""
    there, anew = WORK / "untrained", WORK / ".untrained-anew"
    shutil.rmtree(anew, ignore_errors=True)
    write_untrained(anew)
    if not there.is_dir():
        anew.rename(there)
        return
    made, now = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (there, anew))
    shutil.rmtree(anew)
    if made != now:
        changed = sorted(str(name) for name in {*made, *now} if made.get(name) != now.get(name))
        raise SystemExit(f"{there} was made by other code ({', '.join(changed)} changed); put runs/zoo elsewhere")


def train_all(jobs: int) -> None:
    """Train all runs, `jobs` in parallel: with such small parts, two runs of one core each are faster than one of two.

    The first failure ends the others, which write a checkpoint.
    """
    waiting = dict(STARTS)
    for name in waiting:
        is_finished(name)  # refuses changed settings before any training
    running: dict[Future[None], str] = {}
    done: set[str | None] = {None}
    pool, children = ThreadPoolExecutor(jobs), Children()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    try:
        while waiting or running:
            ready = [name for name, start in waiting.items() if start in done]
            for name in ready[: jobs - len(running)]:
                del waiting[name]
                running[pool.submit(train, name, threads, children)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                done.add(running.pop(future))
                future.result()
    finally:
        children.end()
        pool.shutdown()


def is_finished(name: str) -> bool:
    """Whether a run is finished; raises `SystemExit` if it finished with other settings, data or start."""
    folder, now = WORK / name, made_from(name)
    made_with = json.loads((folder / FINISHED).read_text()) if (folder / FINISHED).is_file() else None
    if made_with not in (None, now):
        changed = ", ".join(key for key in now if made_with.get(key) != now[key])
        raise SystemExit(f"{folder} was made with other {changed} than now; remove it, or put runs/zoo elsewhere")
    return made_with is not None


def made_from(name: str) -> dict[str, Any]:
    """A run's inputs: its settings, the manifests of its data, and the inputs of the run that it starts from."""
    config = parse_config([f"--config={CONFIGS / name}.yaml"])
    data = [ROOT / Path(source.path).with_suffix("") / "manifest.json" for source in config.data.train]
    return {
        "settings": config.to_dict(),
        "data": [json.loads(path.read_text()) for path in data if path.is_file()],
        "start": made_from(STARTS[name]) if STARTS[name] else None,
    }


def train(name: str, threads: int, children: Children) -> None:
    """Execute a run of stage 0, unless it is finished; its settings and weights stay in `runs/zoo/<name>`."""
    folder, config_file = WORK / name, CONFIGS / f"{name}.yaml"
    if not is_finished(name):
        for half_done in ("final", "parts"):
            shutil.rmtree(folder / half_done, ignore_errors=True)
        if parse_config([f"--config={config_file}"]).data.cache_dir is not None:
            cache = ("scripts/cache_features.py", "--config", config_file, "--overwrite", "--batch-size", 64)
            children.call(name, threads, *cache)
        children.call(name, threads, "stages/stage0_components.py", "--config", config_file)
        (folder / FINISHED).write_text(json.dumps(made_from(name), indent=1) + "\n")
    if name == "video_vae":
        write_video_start()


class Children:
    """The running commands."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ended = False

    def call(self, name: str, threads: int, *command: object) -> None:
        """Run one of the project's commands, log to `runs/zoo/<name>.txt`, and print its lines prefixed by the name.

        Raises:
            SystemExit: the command failed.
        """
        said = WORK / f"{name}.txt"
        said.parent.mkdir(parents=True, exist_ok=True)
        threads_only = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
        with said.open("wb") as file:  # unlike with a pipe, the run survives this process
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=os.environ | threads_only,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        if self.ended:
            process.terminate()
        with said.open(errors="replace") as lines:
            over = False
            while not over:
                over = process.poll() is not None  # before reading, so that the last lines are read, too
                for line in lines:
                    print(f"{name}: {line}", end="", flush=True)
                time.sleep(0 if over else 0.5)
        if process.returncode:
            raise SystemExit(f"{name}: {command[0]} ended with exit code {process.returncode}, see above")

    def end(self) -> None:
        """Terminate all commands; training writes a checkpoint first, from which the next build continues."""
        self.ended = True
        for process in self.processes:
            if process.poll() is None:
                process.terminate()


def write_video_start() -> None:
    """Write the untrained video pipeline with the frame VAE, which was trained in an image pipeline."""
    untrained, folder = WORK / "untrained" / "video_decoder", WORK / "video_start" / "video_decoder"
    vae = AutoencoderKL.from_pretrained(WORK / "video_vae" / "parts" / "image_decoder" / "vae")
    TextToVideoSDPipeline.from_pretrained(untrained, vae=vae).save_pretrained(folder)


def collect(output: Path) -> None:
    """Replace `output` by the finished parts in half precision, without their cards.

    Only the files are in half precision: the configs keep float32, in which a CPU is faster.
    """
    temporary = output.with_name(f".{output.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    for part in PARTS:
        shutil.copytree(WORK / MADE_BY[part][-1] / "parts" / part, temporary / part)
        for file in (temporary / part).rglob("*.safetensors"):
            tensors = {name: x.half() if x.dtype == torch.float32 else x for name, x in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
            file.chmod(0o644)
        for file in (temporary / part).rglob("*.json"):
            content = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:  # a local path
                file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)


def card(part: str) -> str:
    """The model card of a part: its training runs, final losses and quality."""
    lines = [
        f"# ToyWorld {part.replace('_', ' ')}",
        "",
        "A tiny part of the AnyGPT zoo, made by `python scripts/build_zoo.py`.",
        "",
    ]
    for name in MADE_BY[part]:
        made = json.loads((WORK / name / FINISHED).read_text())
        train, (data,) = made["settings"]["train"], made["data"]
        lines += [
            f"- `configs/tiny/stage0/{name}.yaml` trains {', '.join(train['parts'])}; {data['num_samples']} rows of "
            f"`{data['kind']}`, about all {len(data['things'])} things; {train['max_steps']} updates of "
            f"{train['batch_size']}; seed {made['settings']['run']['seed']}; "
            f"last: {last_metrics(WORK / name / 'log.txt')}"
        ]
    lines += ["", "On the ten things that alignment never sees, by `python scripts/zoo_quality.py`:", ""]
    lines += [
        f"- {what}: {share['rate']:.3f} ({share['right']} of {share['n']})"
        for what, share in json.loads(QUALITY.read_text())[part].items()
    ]
    return "\n".join(lines) + "\n"


def last_metrics(log: Path) -> str:
    """The last line of metrics of a run."""
    metrics = [line for line in log.read_text().splitlines() if line.startswith("update ")]
    return metrics[-1].partition("  gradient_norm")[0] if metrics else "not logged"


if __name__ == "__main__":
    sys.exit(main())
