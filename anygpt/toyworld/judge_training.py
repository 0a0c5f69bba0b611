"""Training of the judges on real renders: `python -m anygpt.toyworld.judge_training`.

Renders are slightly degraded (blur, noise, chroma subsampling, MP4; for sounds noise, tilted spectra, shifts, shuffled
phases), so that the judges accept media that are right but imperfect. No generated media are used.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from anygpt.errors import exit_code
from anygpt.media.videos import read_video
from anygpt.media.writing import write, write_video
from anygpt.toyworld.datasets import FPS
from anygpt.toyworld.judges import NETWORKS, WEIGHTS, Judges, load_judges
from anygpt.toyworld.render import SAMPLING_RATE, render_audio, render_image, render_video
from anygpt.toyworld.world import COLOURS, MOTIONS, SHAPES, THINGS

STEPS = {"image": 1500, "motion": 300, "audio": 400}
POOL = {"image": 150, "video": 40, "audio": 120}
"""Training renders per thing, by modality; they are degraded differently each time they are used."""
Wear = Callable[[Tensor, torch.Generator], Tensor]
_BATCH, _LEARNING_RATE = 96, 3e-3


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m anygpt.toyworld.judge_training", description=__doc__)
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder to write to (default: the package's own)")
    print(json.dumps(train_judges(parser.parse_args(arguments).output), indent=2))


def train_judges(
    folder: Path, seed: int = 0, steps: float = 1.0, fresh: int = 100, pool: float = 1.0
) -> dict[str, float]:
    """Train all three networks, write them and a card to `folder`, and return their accuracies (see `measure`).

    `steps` and `pool` are factors on `STEPS` and `POOL`; `fresh` is the number of test renders per thing.
    """
    began = time.perf_counter()
    updates = {name: math.ceil(count * steps) for name, count in STEPS.items()}
    for index, (name, renders) in enumerate(_pools(seed, pool).items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * len(NETWORKS) + index)
            network = _train(name, NETWORKS[name](), *renders, updates[name], seed)
        half = {key: tensor.half().contiguous() for key, tensor in network.state_dict().items()}
        write(folder / f"{name}.safetensors", save(half))
    # Measure the weights as shipped, in half precision.
    load_judges.cache_clear()
    accuracy = measure(load_judges(folder), seed + 1, fresh)
    card = {
        "data": "renders of all 48 things (anygpt.toyworld.render), worn a little; no generated media",
        "seed": seed,
        "updates": updates,
        "batch_size": _BATCH,
        "seconds": round(time.perf_counter() - began),
        "fresh_renders": fresh * len(THINGS),
        "accuracy": accuracy,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    write(folder / "card.json", (json.dumps(card, indent=2) + "\n").encode())
    return accuracy


def measure(judges: Judges, seed: int, per_thing: int) -> dict[str, float]:
    """Accuracy on fresh renders (all properties right): `{judge: accuracy}`; `video_mp4` are read back from MP4."""
    rng = np.random.default_rng([seed, 1])
    things = [thing for thing in THINGS for _ in range(per_thing)]
    right = [(thing.shape, thing.colour) for thing in things]
    motions = [MOTIONS[i % len(MOTIONS)] for i in range(len(things))]
    videos = [render_video(thing, motion, rng) for thing, motion in zip(things, motions, strict=True)]
    some = slice(None, None, max(1, per_thing // 10) | 1)
    judged = {
        "image": (judges.image([render_image(thing, rng) for thing in things]), right),
        "video": (judges.video(videos), right),
        "video_mp4": (judges.video([_through_mp4(video) for video in videos[some]]), right[some]),
        "motion": (judges.motion(videos), motions),
        "audio": (judges.audio([render_audio(thing, rng) for thing in things]), right),
    }
    return {
        name: round(sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected), 4)
        for name, (found, expected) in judged.items()
    }


def _pools(seed: int, factor: float) -> dict[str, tuple[Wear, Tensor, list[Tensor]]]:
    """By network: how its renders are degraded, the renders and their labels.

    Half of the clips are encoded as MP4 and read back.
    """
    rng = np.random.default_rng([seed, 0])
    sizes = {modality: math.ceil(count * factor) for modality, count in POOL.items()}
    images, clips, sounds = [], [], []
    for thing in tqdm(THINGS, desc="renders", unit="thing", mininterval=1):
        images += [np.asarray(render_image(thing, rng)) for _ in range(sizes["image"])]
        for index in range(sizes["video"]):
            clip = render_video(thing, MOTIONS[index % 4], rng)
            clips.append(clip if index // 4 % 2 else _through_mp4(clip))
        sounds += [render_audio(thing, rng) for _ in range(sizes["audio"])]
    pictures, frames, waveforms = (torch.from_numpy(np.stack(made)) for made in (images, clips, sounds))
    motions = torch.arange(sizes["video"]).remainder(4).repeat(len(THINGS))
    shown = [a + b for a, b in zip(_labels(sizes["image"]), _labels(sizes["video"] * frames.shape[1]), strict=True)]
    return {
        "image": (_wear_pixels, torch.cat([pictures, frames.flatten(0, 1)]), [torch.tensor(x) for x in shown]),
        "motion": (_wear_pixels, frames, [motions]),
        "audio": (_wear_waveforms, waveforms, [torch.tensor(x) for x in _labels(sizes["audio"])]),
    }


def _labels(count: int) -> tuple[list[int], list[int]]:
    """Shapes and colours of `count` renders of each thing, in turn."""
    things = [thing for thing in THINGS for _ in range(count)]
    return [SHAPES.index(thing.shape) for thing in things], [COLOURS.index(thing.colour) for thing in things]


def _through_mp4(clip: np.ndarray) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, clip, FPS)
        return read_video(path).frames


def _train(
    name: str, network: nn.Module, wear: Wear, media: Tensor, labels: list[Tensor], steps: int, seed: int
) -> nn.Module:
    """Train with the cross-entropy of all of the network's outputs, AdamW and a one-cycle learning rate."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    for _ in tqdm(range(steps), desc=name, unit="update", mininterval=1):
        rows = torch.randint(len(media), (_BATCH,), generator=generator)
        answers = network(wear(media[rows], generator))
        answers = answers if isinstance(answers, tuple) else (answers,)
        loss = sum(F.cross_entropy(answer, label[rows]) for answer, label in zip(answers, labels, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def _wear_pixels(images: Tensor, generator: torch.Generator) -> Tensor:
    """Darken, tint, blur, blotch and add noise to pictures, and coarsen their colours; a fifth is kept.

    uint8 `(…, H, W, 3)` -> float32 `(…, 3, H, W)` in [0, 1].
    """
    pixels = images.movedim(-1, -3).float() / 255
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


if __name__ == "__main__":
    sys.exit(exit_code(main))
