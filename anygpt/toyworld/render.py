"""Rendering of things as pictures, clips and sounds.

Everything is drawn from a `numpy.random.Generator`: the same state gives the same pixels and samples.
Size, position, brightness, speed, tempo, loudness and hiss vary; shape and colour stay unambiguous.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from anygpt.errors import InputError
from anygpt.toyworld.world import COLOURS, MOTIONS, Thing

SIZE = 32
"""Width and height of pictures and clips, in pixels."""
SAMPLING_RATE = 16_000
"""Hz, as for Whisper and AudioLDM."""
AUDIO_SECONDS = 0.64
"""64 mel frames at a hop of 160 samples, the window of the tiny AudioLDM; it fits the tiny Whisper's 1 s."""

RGB = {
    "red": (230, 25, 35),
    "green": (30, 180, 40),
    "blue": (35, 60, 235),
    "yellow": (245, 230, 20),
    "purple": (160, 40, 200),
    "orange": (250, 130, 10),
    "cyan": (30, 215, 230),
    "white": (245, 245, 245),
}
# At least two bins (of 46 Hz) of a 64-bin Slaney mel scale apart, and multiples of its 100 frames per second: a
# vocoder is convolutional in frames, so its output for a constant spectrum repeats with every frame.
PITCH_HZ = dict(zip(COLOURS, (200.0, 300.0, 400.0, 500.0, 600.0, 800.0, 1000.0, 1300.0), strict=True))

# What is drawn of each shape, in units of its radius around its centre; a ring's second ellipse is the hole.
FORMS: dict[str, tuple[tuple[str, tuple[float, ...]], ...]] = {
    "circle": (("ellipse", (-1, -1, 1, 1)),),
    "square": (("rectangle", (-0.88, -0.88, 0.88, 0.88)),),
    "triangle": (("polygon", (0, -1, 1, 0.8, -1, 0.8)),),
    "cross": (("rectangle", (-1, -0.3, 1, 0.3)), ("rectangle", (-0.3, -1, 0.3, 1))),
    "ring": (("ellipse", (-1, -1, 1, 1)), ("ellipse", (-0.55, -0.55, 0.55, 0.55))),
    "diamond": (("polygon", (0, -1, 0.75, 0, 0, 1, -0.75, 0)),),
}
# (frequency as a multiple of the pitch, amplitude); the pitch itself is always included.
_PARTIALS: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": ((1, 1.0),),  # a pure tone
    "square": tuple((n, 1 / n) for n in (1, 3, 5, 7, 9, 11)),  # a square wave
    "triangle": ((1, 1.0), (2, 0.9), (4, 0.8), (8, 0.5)),  # octaves
    "cross": tuple((n, 1.0) for n in (1, 2, 3, 4, 5, 6)),  # bright: every harmonic
    "ring": ((1, 1.0), (3, 0.9), (8, 0.7)),  # a bell: few partials, far apart
    "diamond": ((1, 0.7), (4, 0.6), (5, 0.8), (6, 0.8)),  # a hollow, glassy tone
}
_DECAY = {"triangle": 5.0, "cross": 9.0, "ring": 1.5}
"""How fast a note dies away: plucked, struck, and ringing on."""
_SUPERSAMPLING = 8
Mark = tuple[str, np.ndarray, float, tuple[int, ...]]
"""Shape, centre (x, y) and radius in pixels, RGB."""
_MAX_HZ = 7_600.0
"""Partials above this frequency are omitted: they would alias, or fall outside the mel scale."""


def render(modality: str, thing: Thing, motion: str | None, rng: np.random.Generator) -> Any:
    """Render a picture, clip or sound with the sizes of the zoo; only clips use `motion`."""
    if modality == "video":
        return render_video(thing, motion, rng)
    return render_image(thing, rng) if modality == "image" else render_audio(thing, rng)


def render_image(thing: Thing, rng: np.random.Generator) -> Image.Image:
    """Draw the thing on a dark background, as an RGB image of 32 × 32 pixels.

    `rng` determines radius, position, brightness and background; it is advanced.
    """
    radius = SIZE * rng.uniform(0.20, 0.36)
    room = SIZE / 2 - radius - 1  # leaves a border of one pixel
    centre = SIZE / 2 + rng.uniform(-room, room, size=2)
    colour, background = colour_of(thing, rng), background_of(rng)
    return draw(SIZE, background, [(thing.shape, centre, radius, colour)])


def render_video(thing: Thing, motion: str | None, rng: np.random.Generator, num_frames: int = 8) -> np.ndarray:
    """Render the thing moving straight at constant speed: uint8 `(num_frames, 32, 32, 3)`, at least two frames.

    `rng` determines radius, path, speed, brightness and background; it is advanced.
    """
    if motion not in MOTIONS:
        raise InputError(f"unknown motion {motion!r}: expected one of {', '.join(MOTIONS)}")
    if num_frames < 2:
        raise InputError(f"a clip needs at least 2 frames to show a motion, but num_frames is {num_frames}")
    radius = SIZE * rng.uniform(0.18, 0.26)
    room = SIZE / 2 - radius - 1
    travel = rng.uniform(0.7, 1.0) * 2 * room
    # Along the motion, the path is placed at random within the remaining room; across it, anywhere.
    along = np.linspace(-travel / 2, travel / 2, num_frames) + rng.uniform(-1, 1) * (room - travel / 2)
    across = np.full(num_frames, rng.uniform(-room, room))
    if motion in ("left", "up"):  # image rows grow downwards
        along = along[::-1]
    x, y = (along, across) if motion in ("left", "right") else (across, along)
    colour, background = colour_of(thing, rng), background_of(rng)
    centres = np.stack([x, y], axis=1) + SIZE / 2
    return np.stack([np.asarray(draw(SIZE, background, [(thing.shape, at, radius, colour)])) for at in centres])


def render_audio(thing: Thing, rng: np.random.Generator) -> np.ndarray:
    """Render a few notes at the colour's pitch, with the shape's partials and envelope, in a faint hiss: float32
    `(10240,)` in [-1, 1], 0.64 s at 16 kHz.

    All partials start at phase zero, so that the waveform follows from its magnitudes and a vocoder can be trained by
    regression, without discriminators. `rng` determines tempo, loudness and hiss; it is advanced.
    """
    time = np.arange(round(SAMPLING_RATE * AUDIO_SECONDS)) / SAMPLING_RATE
    pitch = PITCH_HZ[thing.colour]
    # 2 to 3 notes in 0.64 s; `beat` runs from 0 to 1 within each note.
    beat = (time * rng.uniform(3.5, 5.0) + rng.uniform(0.0, 0.15)) % 1.0
    wave = np.zeros_like(time)
    for ratio, amplitude in _PARTIALS[thing.shape]:
        if ratio * pitch < _MAX_HZ:
            wave += amplitude * np.sin(2 * math.pi * ratio * pitch * time)
    wave *= _envelope(thing.shape, beat)
    wave = wave / np.abs(wave).max() + rng.uniform(0.002, 0.01) * rng.standard_normal(time.shape)
    wave *= np.minimum(1.0, np.minimum(time, time[::-1]) / 0.01)  # fade in and out over 10 ms, against clicks
    return (wave / np.abs(wave).max() * rng.uniform(0.4, 0.9)).astype(np.float32)


def _envelope(shape: str, beat: np.ndarray) -> np.ndarray:
    """Loudness as a function of the position in the note: `beat` (N,) in [0, 1) -> (N,) in [0, 1]."""
    if shape == "circle":  # held
        return np.ones_like(beat)
    if shape == "square":  # on and off
        return np.clip(12 * (0.35 - np.abs(beat - 0.4)), 0.02, 1.0)
    edges = np.clip(np.minimum(beat, 1 - beat) / 0.06, 0, 1)  # soft onsets and ends, against clicks between notes
    if shape == "diamond":  # swells
        return edges * (0.05 + 0.95 * beat**2)
    return edges * np.exp(-_DECAY[shape] * beat)


def colour_of(thing: Thing, rng: np.random.Generator) -> tuple[int, ...]:
    """RGB of the thing, at 80 to 100% brightness."""
    return tuple(int(c) for c in (np.array(RGB[thing.colour]) * rng.uniform(0.8, 1.0)).round())


def background_of(rng: np.random.Generator) -> tuple[int, ...]:
    """RGB of a dark, slightly tinted background."""
    return tuple(int(c) for c in (rng.uniform(5, 35) + rng.uniform(-5, 5, size=3)).round())


def draw(size: int, background: tuple[int, ...], marks: Sequence[Mark]) -> Image.Image:
    """Draw anti-aliased shapes: `_SUPERSAMPLING` times as large, then averaged down."""
    large = size * _SUPERSAMPLING
    image = Image.new("RGB", (large, large), background)
    canvas = ImageDraw.Draw(image)
    for shape, centre, radius, colour in marks:
        fills = (colour, background if shape == "ring" else colour)
        for fill, (form, corners) in zip(fills, FORMS[shape], strict=False):
            places = np.array(corners).reshape(-1, 2) * (radius * _SUPERSAMPLING) + centre * _SUPERSAMPLING
            getattr(canvas, form)(places.ravel().tolist(), fill=fill)
    return image.resize((size, size), Image.Resampling.BOX)
