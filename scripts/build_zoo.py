"""Rebuild the tiny zoo: stage 0 for every part, from random weights to half-precision folders with model cards.

    python scripts/build_zoo.py

Takes hours on two cores. Intermediate results and logs stay in runs/zoo; interrupted runs continue. The parts are
written to anygpt/toyworld/weights/zoo, which the package ships and `anygpt.toyworld.zoo()` returns, and measured there.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from anygpt.commands import REPOSITORY, execute, new_parser
from anygpt.errors import InputError
from anygpt.media.writing import replacing
from anygpt.parts.publishing import halve
from anygpt.toyworld.datasets import COMPONENT_KINDS, write_dataset
from anygpt.toyworld.world import THINGS
from anygpt.toyworld.zoo import PARTS, digest, write_untrained, zoo
from anygpt.training.config import parse_config
from zoo_quality import measure

from diffusers import AutoencoderKL, TextToVideoSDPipeline

CONFIGS = REPOSITORY / "configs" / "tiny" / "stage0"
WORK = REPOSITORY / "runs" / "zoo"
FINISHED = "finished.json"  # file in a run's folder that records its inputs; written last
SAMPLES = dict.fromkeys(COMPONENT_KINDS, 4000) | {  # rows of each kind of data
    "words": 16_000,
    "dialogues": 24_000,
    "views": 30_000,
    "pairs": 8_000,
    "stills": 8_000,
    "clips": 8_000,
}
MADE_BY = {  # the runs that make a part, each starting from the one before; each has a config in `configs/tiny/stage0`
    "language_model": ("words", "dialogues"),
    "image_encoder": ("words", "image_encoder"),
    "audio_encoder": ("words", "image_encoder", "audio_encoder"),
    "image_decoder": ("image_vae", "image_denoiser"),
    "video_decoder": ("video_vae", "video_frames", "video_frames_2", "video_frames_3", "video_denoiser"),
    "audio_decoder": ("audio_vae", "audio_denoiser", "vocoder"),
    "image_tokenizer": ("image_tokenizer",),
    "audio_tokenizer": ("audio_tokenizer",),
}
STARTS = {run: start for runs in MADE_BY.values() for start, run in zip((None, *runs), runs, strict=False)}
"""For each run, the run that it starts from."""


def build(arguments: list[str]) -> None:
    parser = new_parser(None, __doc__)
    parser.add_argument("--output", type=Path, default=zoo(), help="folder of the parts (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_output(options.output)
    shutil.rmtree(WORK / "untrained", ignore_errors=True)
    write_untrained(WORK / "untrained")
    for kind in COMPONENT_KINDS:
        write_dataset(WORK / "data", kind, SAMPLES[kind], seed=0, things=THINGS, progress=True)
    for name in STARTS:
        is_finished(name)  # refuses changed inputs before any training
    for name in STARTS:  # each after the run that it starts from
        train(name)
    collect(options.output)
    for part, shares in measure(options.output, samples=200, seed=0).items():
        (options.output / part / "README.md").write_text(card(part, shares), encoding="utf-8")
    print(options.output)


def check_output(output: Path) -> None:
    """Raise `InputError` if `output`, which will be replaced, exists and is no zoo."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; give a folder")
    if others := sorted({path.name for path in output.iterdir()} - set(PARTS) if output.is_dir() else ()):
        raise InputError(f"--output {output} holds {', '.join(others[:3])}, and would be replaced; give a new folder")


def is_finished(name: str) -> bool:
    folder, now = WORK / name, made_from(name)
    made_with = json.loads((folder / FINISHED).read_text()) if (folder / FINISHED).is_file() else None
    if made_with not in (None, now):
        changed = ", ".join(key for key in now if made_with.get(key) != now[key])
        raise InputError(f"{folder} was made with other {changed} than now; remove it, or put runs/zoo elsewhere")
    return made_with is not None


def made_from(name: str) -> dict[str, Any]:
    """A run's inputs: settings, manifests of the data, and its start's inputs or a digest of the untrained parts."""
    config = parse_config([f"--config={CONFIGS / name}.yaml"])
    data = [REPOSITORY / Path(source.path).with_suffix("") / "manifest.json" for source in config.data.train]
    return {
        "settings": config.to_dict(),
        "data": [json.loads(path.read_text()) for path in data if path.is_file()],
        "start": made_from(STARTS[name]) if STARTS[name] else digest(WORK / "untrained"),
    }


def train(name: str) -> None:
    """Execute a run of stage 0, unless it is finished; its settings and weights stay in `runs/zoo/<name>`."""
    folder, config_file = WORK / name, CONFIGS / f"{name}.yaml"
    if not is_finished(name):
        for half_done in ("final", "parts"):
            shutil.rmtree(folder / half_done, ignore_errors=True)
        if parse_config([f"--config={config_file}"]).data.cache_dir is not None:
            cache = ("scripts/cache_features.py", "--config", config_file, "--overwrite", "--batch-size", 64)
            call(name, *cache)
        call(name, "stages/stage0_components.py", "--config", config_file)
        (folder / FINISHED).write_text(json.dumps(made_from(name), indent=1) + "\n")
    if name == "video_vae":  # the frame VAE was trained in an image pipeline
        vae = AutoencoderKL.from_pretrained(folder / "parts" / "image_decoder" / "vae")
        pipeline = TextToVideoSDPipeline.from_pretrained(WORK / "untrained" / "video_decoder", vae=vae)
        pipeline.save_pretrained(WORK / "video_start" / "video_decoder")


def call(name: str, *command: object) -> None:
    said = WORK / f"{name}.txt"
    said.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {command[0]}, see {said}", flush=True)
    more = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    with said.open("ab") as file:  # unlike with a pipe, the run survives this process
        words = [sys.executable, *map(str, command)]
        code = subprocess.run(words, cwd=REPOSITORY, env=os.environ | more, stdout=file, stderr=file).returncode
    if code:
        raise InputError(f"{name}: {command[0]} ended with exit code {code}, see {said}")


def collect(output: Path) -> None:
    """Replace `output` by the finished parts in half precision, without their cards."""
    with replacing(output) as temporary:
        for part in PARTS:
            shutil.copytree(WORK / MADE_BY[part][-1] / "parts" / part, temporary / part)
        halve(temporary)
        shutil.rmtree(output, ignore_errors=True)


def card(part: str, shares: dict[str, Any]) -> str:
    title = f"# ToyWorld {part.replace('_', ' ')}"
    lines = [title, "", "A tiny part of the AnyGPT zoo, made by `python scripts/build_zoo.py`.", ""]
    for name in MADE_BY[part]:
        made = json.loads((WORK / name / FINISHED).read_text())
        train, (data,) = made["settings"]["train"], made["data"]
        log = (WORK / name / "log.txt").read_text().splitlines()
        last = [line.partition("  gradient_norm")[0] for line in log if line.startswith("update ")][-1]
        lines.append(
            f"- `configs/tiny/stage0/{name}.yaml` trains {', '.join(train['parts'])}; {data['num_samples']} rows of "
            f"`{data['kind']}`, about all {len(data['things'])} things; {train['max_steps']} updates of "
            f"{train['batch_size']}; seed {made['settings']['run']['seed']}; last: {last}"
        )
    lines += ["", "On the ten things that alignment never sees, by `python scripts/zoo_quality.py`:", ""]
    lines += [f"- {what}: {one['rate']:.3f} ({one['right']} of {one['n']})" for what, one in shares.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(execute(build))
