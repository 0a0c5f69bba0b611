"""Make the tiny zoo anew: stage 0 for every part, from random weights to half-precision folders with model cards.

    python scripts/build_zoo.py

Hours on two cores. Everything on the way stays in runs/zoo; a run that was cut off continues. The folders are written
to anygpt/toyworld/weights/zoo, which is what the package ships and `anygpt.toyworld.zoo()` names, and measured there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import yaml
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
SAMPLES = dict.fromkeys(COMPONENT_KINDS, 4000) | {"words": 16_000, "views": 30_000, "pairs": 8_000, "stills": 8_000}
"""Rows of each kind of data."""
MADE_BY = {
    "language_model": ("words",),
    "image_encoder": ("words", "image_encoder"),
    "audio_encoder": ("words", "image_encoder", "audio_encoder"),
    "image_decoder": ("image_vae", "image_denoiser"),
    "video_decoder": ("image_vae", "video_denoiser"),
    "audio_decoder": ("audio_vae", "audio_denoiser", "vocoder"),
}
"""The runs that a part comes from, each starting from the one before; each is a file in `configs/tiny/stage0`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--output", type=Path, default=zoo(), help="folder of the finished parts (default: %(default)s)"
    )
    parser.add_argument("--only-collect", action="store_true", help="train nothing; take what runs/zoo has")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="runs at once (%(default)s)")
    options = parser.parse_args()
    quiet_libraries()
    if not options.only_collect:
        write_start()
        for kind in COMPONENT_KINDS:
            write_dataset(WORK / "data", kind, SAMPLES[kind], seed=0, things=THINGS, progress=True)
        train_all(max(1, options.jobs))
    collect(options.output)
    if options.output.resolve() == zoo():
        subprocess.run([sys.executable, "scripts/zoo_quality.py", "--output", str(QUALITY)], cwd=ROOT, check=True)
    for part in PARTS:
        (options.output / part / "README.md").write_text(card(part), encoding="utf-8")
    print(options.output)
    return 0


def write_start() -> None:
    """The untrained parts; those that are there already must be what the code makes now."""
    there, anew = WORK / "untrained", WORK / ".untrained-anew"
    shutil.rmtree(anew, ignore_errors=True)
    write_untrained(anew)
    if not there.is_dir():
        anew.rename(there)
        return
    made, now = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.safetensors")} for f in (there, anew))
    shutil.rmtree(anew)
    if made != now:
        changed = sorted(str(name) for name in {*made, *now} if made.get(name) != now.get(name))
        raise SystemExit(f"{there} was made by other code ({', '.join(changed)} changed); put runs/zoo elsewhere")


def train_all(jobs: int) -> None:
    """All runs, several at once: on so small parts two runs with a core each are faster than one with two."""
    before = {run: start for runs in MADE_BY.values() for start, run in zip((None, *runs), runs, strict=False)}
    depth = {run: max(runs.index(run) for runs in MADE_BY.values() if run in runs) for run in before}
    trained: dict[str | None, Future[None]] = {}

    def train_after(start: Future[None] | None, name: str) -> None:
        if start is not None:
            start.result()
        train(name, threads=max(1, (os.cpu_count() or 1) // jobs))

    with ThreadPoolExecutor(jobs) as pool:
        for name in sorted(before, key=depth.__getitem__):  # so none waits for one that has not begun
            trained[name] = pool.submit(train_after, trained.get(before[name]), name)
    for run in trained.values():
        run.result()


def train(name: str, threads: int) -> None:
    """One run of stage 0, unless it is finished; its settings and weights stay in `runs/zoo/<name>`."""
    folder, config_file = WORK / name, CONFIGS / f"{name}.yaml"
    made_with, config = folder / "config.yaml", parse_config([f"--config={config_file}"])
    if made_with.is_file() and yaml.safe_load(made_with.read_text()) != config.to_dict():
        raise SystemExit(f"{folder} was made with other settings than {config_file} has; put it elsewhere")
    if not (folder / "final").is_dir() or not (folder / "parts").is_dir():
        shutil.rmtree(folder / "final", ignore_errors=True)
        if config.data.cache_dir is not None:
            call(name, threads, "scripts/cache_features.py", "--config", config_file, "--overwrite", "--batch-size", 64)
        call(name, threads, "stages/stage0_components.py", "--config", config_file)
    if name == "image_vae":
        write_video_start()


def call(name: str, threads: int, *command: object) -> None:
    """Run one of the project's commands; its lines are printed behind the run's name.

    Raises:
        SystemExit: it failed; what it said stands above.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            print(f"{name}: {line}", end="", flush=True)
    if process.returncode:
        raise SystemExit(f"{name}: {command[0]} ended with exit code {process.returncode}, see above")


def write_video_start() -> None:
    """The untrained video pipeline with the pictures' VAE, as Zeroscope has Stable Diffusion's."""
    untrained, folder = WORK / "untrained" / "video_decoder", WORK / "video_start" / "video_decoder"
    vae = AutoencoderKL.from_pretrained(WORK / "image_vae" / "parts" / "image_decoder" / "vae")
    TextToVideoSDPipeline.from_pretrained(untrained, vae=vae).save_pretrained(folder)


def collect(output: Path) -> None:
    """The finished parts in half precision, without their cards; the folder is replaced at the end, all at once.

    Only the files are in half precision: the configs say float32, in which a CPU computes faster.
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
            if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:  # where it was made
                file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)


def card(part: str) -> str:
    """The model card of a part: what it was made from and how, and its losses at the end."""
    lines = [
        f"# ToyWorld {part.replace('_', ' ')}",
        "",
        "A tiny part of the AnyGPT zoo, made by `python scripts/build_zoo.py`.",
        "",
    ]
    for name in MADE_BY[part]:
        config = yaml.safe_load((WORK / name / "config.yaml").read_text())
        train, data = config["train"], Path(config["data"]["train"][0]["path"]).stem
        lines += [
            f"- `configs/tiny/stage0/{name}.yaml` trains {', '.join(train['parts'])}; {SAMPLES[data]} rows of "
            f"`{data}`, about all {len(THINGS)} things; {train['max_steps']} updates of "
            f"{train['batch_size']}; seed {config['run']['seed']}; last: {last_metrics(WORK / name / 'log.txt')}"
        ]
    if QUALITY.is_file():
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
