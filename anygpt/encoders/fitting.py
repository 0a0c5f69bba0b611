"""Fitting of media to an encoder's input window: a medium becomes one or several pieces, whose features are joined."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from anygpt.errors import InputError
from anygpt.media.files import to_rgb
from anygpt.media.types import MEDIA, Clip, MediaType, Picture, Sound

_SHAPES = {
    "crop": "are cropped to the centre",
    "pad": "are padded to the encoder's shape",
    "stretch": "are stretched to the encoder's shape",
}
FITS: dict[type[MediaType], dict[str, str]] = {  # ways to fit media, by their class; the first is the default
    Picture: {**_SHAPES, "tile": "become as many tiles as cover them"},
    Clip: _SHAPES,
    Sound: {"split": "are split into windows of {window:g} s", "refuse": "(of more than {window:g} s) are refused"},
}


def checked(modalities: Mapping[str, str], fits: Mapping[str, str | None]) -> dict[str, str | None]:
    """Setting of each encoder with defaults filled in; None for media types without an entry in `FITS`.

    `modalities` and `fits` are by encoder key. A setting that the media type does not have is an `InputError`.
    """
    found: dict[str, str | None] = {}
    for key, modality in modalities.items():
        known = FITS.get(type(MEDIA.get(modality)), {})
        if fits.get(key) not in (None, *known):
            raise InputError(f"fit of the {key!r} encoder is {fits[key]!r}; expected {' or '.join(known) or 'none'}")
        found[key] = fits.get(key) or next(iter(known), None)
    return found


def varies(processor: Any, fit: str | None) -> bool:
    return fit == "tile" or (fit == "split" and window_of(processor) is not None)


def notes(modalities: Mapping[str, str], processors: Mapping[str, Any], fits: Mapping[str, str | None]) -> list[str]:
    """Lines for the start of a run, one per encoder whose window some media may not fit."""
    found = []
    for key, fit in fits.items():
        kind, processor = MEDIA.get(modalities[key]), processors[key]
        said = [processor.reads] if hasattr(processor, "reads") else []
        if isinstance(kind, Sound) and (window := window_of(processor)):
            said.append(f"long {kind.plural} {FITS[Sound][fit].format(window=window / processor.sampling_rate)}")
        elif isinstance(kind, (Picture, Clip)) and shape_of(processor):
            said.append(f"{kind.plural} of another shape {FITS[type(kind)][fit]}")
        if said:
            found.append(f"{key}_encoder: {'; '.join(said)}")
    return found


def window_of(processor: Any) -> int | None:
    """Number of samples that a feature extractor (Whisper's, CLAP's) takes; None for any number."""
    return getattr(processor, "n_samples", None) or getattr(processor, "nb_max_samples", None)


def shape_of(processor: Any) -> tuple[int, int] | None:
    """Width and height to which an image processor crops; None if it does not crop."""
    processor = getattr(processor, "image_processor", processor)
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", None) else None
    return (size["width"], size["height"]) if size else None


def pieces(kind: MediaType | None, media: Any, processor: Any, fit: str | None) -> list[list[Any]] | None:
    """Pieces of each medium (one, a list, or for sounds an array `(items, N)`); None if all fit as they are. Sounds
    without samples are an `InputError`, and too long ones if `fit` is "refuse"."""
    if isinstance(kind, Sound) and (window := window_of(processor)):
        sounds = [np.asarray(sound) for sound in ([media] if not len(media) or np.ndim(media[0]) == 0 else media)]
        if all(0 < len(sound) <= window for sound in sounds):
            return None
        for sound in sounds:
            if not len(sound) or (len(sound) > window and fit == "refuse"):
                raise InputError(
                    f"a sound of {len(sound) / processor.sampling_rate:g} s is given to an encoder of "
                    f"{window / processor.sampling_rate:g} s; cut it, or set the encoder's fit to split"
                )
        return [[sound[start : start + window] for start in range(0, len(sound), window)] for sound in sounds]
    shape = shape_of(processor)
    if shape is None or fit == "crop" or not isinstance(kind, (Picture, Clip)):
        return None
    several = isinstance(media, (list, tuple)) or np.ndim(media) == (5 if isinstance(kind, Clip) else 4)
    items = list(media) if several else [media]
    if isinstance(kind, Clip):
        return [[np.stack([np.asarray(_fitted(frame, shape, processor, fit)[0]) for frame in clip])] for clip in items]
    return [_fitted(picture, shape, processor, fit) for picture in items]


def _fitted(picture: Any, shape: tuple[int, int], processor: Any, fit: str) -> list[Image.Image]:
    image = to_rgb(picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture)))
    width, height = shape
    if fit == "stretch":
        return [image.resize(shape, Image.Resampling.BICUBIC)]
    if fit == "pad":  # with the mean colour, which normalizes to 0, as LLaVA does
        mean = getattr(getattr(processor, "image_processor", processor), "image_mean", None) or (0.5,) * 3
        size = (
            max(image.width, round(image.height * width / height)),
            max(image.height, round(image.width * height / width)),
        )
        canvas = Image.new("RGB", size, tuple(int(255 * value) for value in mean))
        canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
        return [canvas]
    across = min(image.width, math.ceil(image.height * width / height))
    down = min(image.height, math.ceil(image.width * height / width))
    # the starts of the fewest tiles that cover the image, evenly spaced
    lefts, tops = (
        np.linspace(0, length - part, math.ceil(length / part)).round().astype(int).tolist()
        for length, part in ((image.width, across), (image.height, down))
    )
    return [image.crop((x, y, x + across, y + down)) for y in tops for x in lefts]
