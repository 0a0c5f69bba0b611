"""Judges: classifiers of the thing in a picture, clip, sound or sentence, and of a clip's motion.

The networks are trained on real renders only, never on generated media, so that they cannot learn to accept a model's
faults. `load_judges()` loads the shipped ones; `python -m anygpt.toyworld.judge_training` trains new ones. Sentences
are judged by their words.

Shapes: `B` media, `F` frames, `N` samples of a waveform.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from anygpt.errors import InputError
from anygpt.media.audio import resample, to_mono
from anygpt.toyworld.render import AUDIO_SECONDS, SAMPLING_RATE
from anygpt.toyworld.world import COLOURS, MOTIONS, SHAPES, Thing

WEIGHTS = Path(__file__).parent / "weights" / "judges"
SIZE, FRAMES = 32, 8
"""Width and height of the networks' input, and frames of the motion network's; others are scaled, or chosen evenly."""
_SAMPLES = round(SAMPLING_RATE * AUDIO_SECONDS)
_FFT, _HOP, _MELS = 1024, 160, 80
_BATCH = 128
_RANGE = 5.0
"""Dynamic range as a natural logarithm (43 dB): anything quieter counts as silence, so that a vocoder's noise floor and
a renderer's exact zeros look the same."""

Verdict = tuple[str, str]
"""(shape, colour)"""


class _Heads(nn.Module):
    """Features `(B, width)` -> logits of shapes `(B, 6)` and colours `(B, 8)`."""

    def __init__(self, width: int):
        super().__init__()
        self.shape, self.colour = nn.Linear(width, len(SHAPES)), nn.Linear(width, len(COLOURS))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.shape(features), self.colour(features)


class PictureNet(nn.Module):
    """Pictures `(B, 3, 32, 32)` in [0, 1] -> logits of shapes and colours."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(_conv(3, 24), _conv(24, 48, 2), _conv(48, 64, 2), _conv(64, 64, 2))
        self.heads = _Heads(128)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        places = self.trunk(pixels * 2 - 1).flatten(2)  # (B, 64, 16)
        return self.heads(torch.cat([places.mean(-1), places.amax(-1)], dim=1))


class MotionNet(nn.Module):
    """Clips `(B, 8, 3, 32, 32)` in [0, 1] -> logits of motions `(B, 4)`, from the brightest channel of each frame."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(_conv(FRAMES, 32, 2), _conv(32, 48, 2), _conv(48, 48, 2))
        self.head = nn.Linear(48 * 16, len(MOTIONS))

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.trunk(clips.amax(dim=2) * 2 - 1).flatten(1))


class SoundNet(nn.Module):
    """Waveforms `(B, N)` at 16 kHz -> logits of shapes and colours, from the log-mel spectrogram."""

    filters: Tensor

    def __init__(self):
        super().__init__()
        # Pitch encodes the colour, so positions in frequency are kept; positions in time are pooled.
        self.trunk = nn.Sequential(_conv(1, 16, 2), _conv(16, 32, 2), _conv(32, 32, (1, 2)))
        self.heads = _Heads(2 * 32 * _MELS // 8)
        filters = mel_filter_bank(_FFT // 2 + 1, _MELS, 0.0, SAMPLING_RATE / 2, SAMPLING_RATE, "slaney", "slaney")
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)

    def forward(self, waveforms: Tensor) -> tuple[Tensor, Tensor]:
        places = self.trunk(self.spectrogram(waveforms)[:, None] * (2 / _RANGE) + 1)  # (B, 32, frames / 4, 10)
        return self.heads(torch.cat([places.mean(2), places.amax(2)], dim=1).flatten(1))

    def spectrogram(self, waveforms: Tensor) -> Tensor:
        """`(B, N)` -> `(B, 65, 80)` log-mel magnitudes relative to the sound's loudest one, from -5 to 0."""
        waveforms = waveforms - waveforms.mean(dim=1, keepdim=True)
        window = torch.hann_window(_FFT, device=waveforms.device)
        bins = torch.stft(waveforms, _FFT, _HOP, window=window, return_complex=True).abs()  # (B, 513, 65)
        mels = bins.transpose(1, 2) @ self.filters
        loudest = mels.amax(dim=(1, 2), keepdim=True).clamp(min=1e-5)
        return (mels / loudest).clamp(min=1e-9).log().clamp(min=-_RANGE)


NETWORKS: dict[str, type[nn.Module]] = {"image": PictureNet, "motion": MotionNet, "audio": SoundNet}


@dataclass(frozen=True)
class Words:
    """Shapes and colours that a sentence names, its motion, and its "yes" or "no"; None unless exactly one occurs."""

    shapes: frozenset[str]
    colours: frozenset[str]
    motion: str | None
    verdict: str | None

    @property
    def thing(self) -> tuple[str | None, str | None]:
        """(shape, colour), each None unless exactly one is named."""
        return _only(self.shapes), _only(self.colours)


class Judges:
    """The three networks, by name as in `NETWORKS`."""

    def __init__(self, networks: dict[str, nn.Module]):
        self.networks = {name: network.eval() for name, network in networks.items()}

    @torch.inference_mode()
    def image(self, images: Sequence[Image.Image | np.ndarray] | np.ndarray) -> list[Verdict]:
        """Judge PIL images or uint8 `(B, H, W, 3)`: (shape, colour) of each."""
        return self._classify("image", [_pixels(image) for image in images])

    @torch.inference_mode()
    def video(self, videos: Sequence[np.ndarray]) -> list[Verdict]:
        """Judge clips, uint8 `(F, H, W, 3)` each: (shape, colour) from probabilities averaged over frames."""
        verdicts = []
        for video in videos:
            logits = self.networks["image"](torch.stack([_pixels(frame) for frame in video]))
            verdicts += _verdicts(*(one.softmax(-1).mean(0, keepdim=True) for one in logits))
        return verdicts

    @torch.inference_mode()
    def motion(self, videos: Sequence[np.ndarray]) -> list[str]:
        """Judge the motion of clips, uint8 `(F, H, W, 3)` each: one of `MOTIONS` each."""
        motions = []
        for video in videos:
            chosen = np.linspace(0, len(video) - 1, FRAMES).round().astype(int)
            clip = torch.stack([_pixels(video[i]) for i in chosen])
            motions.append(MOTIONS[int(self.networks["motion"](clip[None]).argmax())])
        return motions

    @torch.inference_mode()
    def audio(self, sounds: Sequence[np.ndarray], sampling_rate: int = SAMPLING_RATE) -> list[Verdict]:
        """Judge the first 0.64 s of waveforms, float `(N,)` or `(C, N)`, at a rate in Hz: (shape, colour) of each."""
        heard = []
        for sound in sounds:
            sound = resample(to_mono(np.asarray(sound, dtype=np.float32)), sampling_rate, SAMPLING_RATE)[:_SAMPLES]
            heard.append(torch.from_numpy(np.nan_to_num(np.pad(sound, (0, _SAMPLES - len(sound))))))
        return self._classify("audio", heard)

    def _classify(self, name: str, inputs: list[Tensor]) -> list[Verdict]:
        """Shapes and colours by a network, in batches, since spectra take memory."""
        batches = (torch.stack(inputs[start : start + _BATCH]) for start in range(0, len(inputs), _BATCH))
        return [verdict for batch in batches for verdict in _verdicts(*self.networks[name](batch))]


def read_words(text: str) -> Words:
    """The words of a sentence that matter in ToyWorld, ignoring case and punctuation."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    motion, verdict = (_only(words & set(known)) for known in (MOTIONS, ("yes", "no")))
    return Words(frozenset(words & set(SHAPES)), frozenset(words & set(COLOURS)), motion, verdict)


def answers_question(answer: str, reference: str, thing: Thing) -> bool:
    """Whether an answer has the shapes, colours and "yes" or "no" of the reference; beyond these it may only name the
    thing's own shape and colour."""
    given, right = read_words(answer), read_words(reference)
    return (
        right.shapes <= given.shapes <= right.shapes | {thing.shape}
        and right.colours <= given.colours <= right.colours | {thing.colour}
        and given.verdict == right.verdict
    )


@cache
def load_judges(folder: Path = WEIGHTS) -> Judges:
    """Load the judges on the CPU, in float32."""
    networks = {}
    for name, network in NETWORKS.items():
        with torch.random.fork_rng(devices=[]):  # the initial weights are random, and replaced
            networks[name] = network()
        state = load_file(folder / f"{name}.safetensors")
        networks[name].load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return Judges(networks)


def _only(names: frozenset[str] | set[str]) -> str | None:
    return next(iter(names)) if len(names) == 1 else None


def _conv(channels: int, out_channels: int, stride: int | tuple[int, int] = 1) -> nn.Module:
    convolution = nn.Conv2d(channels, out_channels, 3, stride, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(8, out_channels), nn.GELU())


def _pixels(image: Image.Image | np.ndarray) -> Tensor:
    """RGB -> float32 `(3, 32, 32)` in [0, 1]."""
    array = np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise InputError(f"a picture is uint8 (height, width, 3), but this one is {array.dtype} {array.shape}")
    pixels = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    if pixels.shape[1:] != (SIZE, SIZE):
        pixels = F.interpolate(pixels[None], (SIZE, SIZE), mode="bilinear", antialias=True)[0].clamp(0, 1)
    return pixels


def _verdicts(shapes: Tensor, colours: Tensor) -> list[Verdict]:
    return [(SHAPES[s], COLOURS[c]) for s, c in zip(shapes.argmax(-1), colours.argmax(-1), strict=True)]
