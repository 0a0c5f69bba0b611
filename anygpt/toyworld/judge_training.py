"""Training of the judges on real renders: `python -m anygpt.toyworld.judge_training`.

Renders are slightly degraded (blur, noise, chroma subsampling, MP4; for sounds noise, tilted spectra, shifts, shuffled
phases), so that the judges accept media that are right but imperfect. No generated media are used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from anygpt.media.videos import read_video
from anygpt.media.writing import write_video
from anygpt.toyworld.datasets import FPS
from anygpt.toyworld.judges import NETWORKS, WEIGHTS, Judges, load_judges
from anygpt.toyworld.render import SAMPLING_RATE, render_audio, render_image, render_video
from anygpt.toyworld.world import COLOURS, MOTIONS, SHAPES, THINGS, Thing

STEPS = {"image": 1500, "motion": 300, "audio": 400}
POOL = {"image": 150, "video": 40, "audio": 120}
"""Training renders per thing, by modality; they are degraded differently each time they are used."""
FRESH = 100
"""Test renders per thing, from another seed."""
_BATCH = 96
_LEARNING_RATE = 3e-3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m anygpt.toyworld.judge_training",
        description="Train the judges of ToyWorld on real renders, measure them on fresh ones, and write both.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder to write to (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0, help="of renders, weights and wear (default: %(default)s)")
    parser.add_argument("--steps", type=float, default=1.0, help="factor on the updates (default: %(default)s)")
    options = parser.parse_args(arguments)
    train_judges(options.output, options.seed, options.steps)
    return 0


def train_judges(
    folder: Path, seed: int = 0, steps: float = 1.0, fresh: int = FRESH, pool: float = 1.0
) -> dict[str, float]:
    """Train all three networks, write them and a card to `folder`, and return their accuracies (see `measure`).

    Args:
        folder: created if missing.
        seed: of renders, weights and degradation; the test renders use `seed + 1`.
        steps: factor on `STEPS`.
        fresh: test renders per thing.
        pool: factor on `POOL`.
    """
    began = time.perf_counter()
    networks = {}
    for index, (name, renders) in enumerate(_pools(seed, pool).items()):
        wear = _wear_waveforms if name == "audio" else lambda x, generator: _wear_pixels(_to_pixels(x), generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * len(NETWORKS) + index)
            networks[name] = _train(name, NETWORKS[name](), renders, wear, math.ceil(STEPS[name] * steps), seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in networks.items():
        half = {key: tensor.half().contiguous() for key, tensor in network.state_dict().items()}
        _replace(folder / f"{name}.safetensors", lambda path, half=half: save_file(half, path))
    # Measure the weights as shipped, in half precision.
    load_judges.cache_clear()
    accuracy = measure(load_judges(folder), seed + 1, fresh)
    card = {
        "what": "judges of ToyWorld: picture -> shape and colour, clip -> motion, sound -> shape and colour",
        "data": "renders of all 48 things (anygpt.toyworld.render), worn a little; no generated media",
        "command": "python -m anygpt.toyworld.judge_training",
        "seed": seed,
        "updates": {name: math.ceil(count * steps) for name, count in STEPS.items()},
        "batch_size": _BATCH,
        "seconds": round(time.perf_counter() - began),
        "fresh_renders": fresh * len(THINGS),
        "accuracy": accuracy,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    _replace(folder / "card.json", lambda path: Path(path).write_text(json.dumps(card, indent=2) + "\n"))
    print(json.dumps(accuracy, indent=2))
    return accuracy


def measure(judges: Judges, seed: int, per_thing: int) -> dict[str, float]:
    """Accuracy on fresh renders (all properties right): `{judge: accuracy}`.

    `…_worn` are renders degraded as in training; `video_mp4` and `motion_mp4` are clips read back from MP4.
    """
    rng = np.random.default_rng([seed, 1])
    generator = torch.Generator().manual_seed(seed)
    things = [thing for thing in THINGS for _ in range(per_thing)]
    right = [(thing.shape, thing.colour) for thing in things]
    motions = [MOTIONS[i % len(MOTIONS)] for i in range(len(things))]
    images = [np.asarray(render_image(thing, rng)) for thing in things]
    worn = _wear_pixels(_to_pixels(torch.from_numpy(np.stack(images))), generator).permute(0, 2, 3, 1)
    videos = [render_video(thing, motion, rng) for thing, motion in zip(things, motions, strict=True)]
    some = slice(None, None, max(1, per_thing // 10) | 1)  # an odd step covers every motion
    coded = [_through_mp4(video) for video in videos[some]]
    sounds = torch.from_numpy(np.stack([render_audio(thing, rng) for thing in things]))
    faint = [_wear_waveforms(sound[None], generator)[0].numpy() for sound in sounds]
    return {
        "image": _share(judges.image(images), right),
        "image_worn": _share(judges.image((worn * 255).round().to(torch.uint8).numpy()), right),
        "video": _share(judges.video(videos), right),
        "video_mp4": _share(judges.video(coded), right[some]),
        "motion": _share(judges.motion(videos), motions),
        "motion_mp4": _share(judges.motion(coded), motions[some]),
        "audio": _share(judges.audio(list(sounds.numpy())), right),
        "audio_worn": _share(judges.audio(faint), right),
    }


def _pools(seed: int, factor: float) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Training renders and their labels, by network; half of the clips are encoded as MP4 and read back."""
    rng = np.random.default_rng([seed, 0])
    sizes = {modality: math.ceil(count * factor) for modality, count in POOL.items()}
    images, image_things = [], []
    clips, clip_things, motions = [], [], []
    sounds, sound_things = [], []
    for thing in tqdm(THINGS, desc="renders", unit="thing", mininterval=1):
        images += [np.asarray(render_image(thing, rng)) for _ in range(sizes["image"])]
        image_things += [thing] * sizes["image"]
        for index in range(sizes["video"]):
            clip = render_video(thing, MOTIONS[index % 4], rng)
            clips.append(clip if index // 4 % 2 else _through_mp4(clip))
            motions.append(index % 4)
        clip_things += [thing] * sizes["video"]
        sounds += [render_audio(thing, rng) for _ in range(sizes["audio"])]
        sound_things += [thing] * sizes["audio"]
    frames = torch.from_numpy(np.stack(clips))
    pictures = torch.cat([torch.from_numpy(np.stack(images)), frames.flatten(0, 1)])
    shown = image_things + [thing for thing in clip_things for _ in range(frames.shape[1])]
    return {
        "image": (pictures, _labels(shown)),
        "motion": (frames, [torch.tensor(motions)]),
        "audio": (torch.from_numpy(np.stack(sounds)), _labels(sound_things)),
    }


def _labels(things: list[Thing]) -> list[Tensor]:
    shapes = torch.tensor([SHAPES.index(thing.shape) for thing in things])
    return [shapes, torch.tensor([COLOURS.index(thing.colour) for thing in things])]


def _through_mp4(clip: np.ndarray) -> np.ndarray:
    """Write a clip as MP4 and read it back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, clip, FPS)
        return read_video(path).frames


def _train(
    name: str,
    network: nn.Module,
    pool: tuple[Tensor, list[Tensor]],
    wear: Callable[[Tensor, torch.Generator], Tensor],
    steps: int,
    seed: int,
) -> nn.Module:
    """Train with the cross-entropy of all of the network's outputs, AdamW and a one-cycle learning rate."""
    media, labels = pool
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    bar = tqdm(range(steps), desc=name, unit="update", mininterval=1)
    for step in bar:
        rows = torch.randint(len(media), (_BATCH,), generator=generator)
        answers = network(wear(media[rows], generator))
        answers = answers if isinstance(answers, tuple) else (answers,)
        loss = sum(F.cross_entropy(answer, label[rows]) for answer, label in zip(answers, labels, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return network.eval()


# ---- degradation


def _to_pixels(images: Tensor) -> Tensor:
    """uint8 `(…, H, W, 3)` -> float32 `(…, 3, H, W)` in [0, 1]."""
    return images.movedim(-1, -3).float() / 255


def _wear_pixels(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Darken, tint, blur, blotch and add noise to pictures `(…, 3, H, W)`, and coarsen colours; a fifth is kept."""
    flat = pixels.flatten(0, -4)
    batch, _, height, width = flat.shape

    def some(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(batch, channels, 1, 1, generator=generator)

    worn = flat * some(0.85, 1.05) * some(0.95, 1.05, 3) + some(-0.02, 0.04, 3)
    blurred = F.avg_pool2d(F.pad(worn, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    worn = torch.lerp(worn, blurred, some(-0.5, 0.8).clamp(min=0))
    coarse = F.interpolate(F.avg_pool2d(worn, 2), scale_factor=2)
    grey, grey_coarse = worn.mean(1, keepdim=True), coarse.mean(1, keepdim=True)
    worn = torch.where(some(0, 1) < 0.3, grey + coarse - grey_coarse, worn)  # chroma at half resolution, as in MP4
    blotches = F.interpolate(torch.randn(batch, 3, 8, 8, generator=generator), (height, width), mode="bilinear")
    worn = worn + blotches * some(-0.03, 0.05).clamp(min=0)
    worn = worn + torch.randn(worn.shape, generator=generator) * some(-0.03, 0.06).clamp(min=0)
    return torch.where(some(0, 1) < 0.2, flat, worn.clamp(0, 1)).view_as(pixels)


def _wear_waveforms(waveforms: Tensor, generator: torch.Generator) -> Tensor:
    """Shift sounds `(B, N)` in time, tilt their spectra, shuffle phases and add noise; a fifth is kept.

    Phases are shuffled because a vocoder invents its own.
    """
    batch, length = waveforms.shape

    def some(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, generator=generator)

    octaves = torch.linspace(0, SAMPLING_RATE / 2, length // 2 + 1).clamp(min=50).div(1000).log2()
    spectrum = torch.fft.rfft(waveforms)
    bands = F.interpolate(torch.randn(batch, 1, 12, generator=generator), len(octaves), mode="linear")[:, 0]
    decibels = some(-1.5, 1.5) * octaves + bands * some(0, 2)
    delay = some(-0.02, 0.02) * SAMPLING_RATE
    turn = -2 * math.pi * torch.arange(len(octaves)) / length * delay
    worn = torch.fft.irfft(spectrum * torch.polar(10 ** (decibels / 20), turn), n=length)

    window = torch.hann_window(512)
    bins = torch.stft(worn, 512, 128, window=window, return_complex=True)
    angles = some(-math.pi / 2, math.pi / 2).clamp(min=0)[..., None] * (
        2 * torch.rand(bins.shape, generator=generator) - 1
    )
    worn = torch.istft(bins * torch.polar(torch.ones_like(angles), angles), 512, 128, window=window, length=length)

    noise = torch.randn(worn.shape, generator=generator) * worn.std(dim=1, keepdim=True)
    worn = worn + noise * 10 ** (some(-60, -22) / 20)
    return torch.where(some(0, 1) < 0.2, waveforms, worn)


# ---- helpers


def _share(given: list, right: list) -> float:
    return round(sum(a == b for a, b in zip(given, right, strict=True)) / len(right), 4)


def _replace(path: Path, write: Callable[[str], object]) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write(str(temporary))
        temporary.chmod(0o644)  # safetensors makes files readable by their owner only
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
