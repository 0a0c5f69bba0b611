"""Waveforms: mono and sampling rates. Shapes: `N` samples, `C` channels; values in [-1, 1]."""

import math
from functools import cache

import av
import numpy as np
import soxr

from anygpt.errors import InputError


def to_mono(waveform: np.ndarray, layout: str | None = None) -> np.ndarray:
    """Mix all channels to one: `(N,)` or `(C, N)` -> `(N,)`, same dtype.

    `layout` is FFmpeg's name of the channel layout (`5.1(side)`), whose downmix weights are used (centre over fronts
    over surrounds, no low-frequency channel). An unknown layout and stereo get equal weights.
    """
    if waveform.ndim not in (1, 2):
        raise InputError(f"a waveform is (samples,) or (channels, samples), but this one is {waveform.shape}")
    if waveform.ndim == 1:
        return waveform
    weights = _downmix(layout) if layout is not None and len(waveform) > 2 else None
    if weights is None or len(weights) != len(waveform):
        return waveform.mean(axis=0, dtype=waveform.dtype)
    return (weights @ waveform).astype(waveform.dtype)


@cache
def _downmix(layout: str) -> np.ndarray | None:
    """FFmpeg's downmix weights, `(C,)`, with a sum of 1; None for layouts that it cannot downmix."""
    channels = av.AudioLayout(layout).nb_channels
    frame = av.AudioFrame.from_ndarray(np.eye(channels, dtype=np.float32).reshape(1, -1), "flt", layout)
    frame.rate = 16_000
    try:
        mixed = [part.to_ndarray() for part in av.AudioResampler("flt", "mono", 16_000).resample(frame)]
    except av.ArgumentError:
        return None
    weights = np.concatenate(mixed, axis=1)[0]
    return weights / weights.sum()


def resample(waveform: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Resample with soxr at its best quality: `(N,)` or `(C, N)` float32 -> `ceil(N · target / source)` samples.

    An `InputError` refuses a rate that is no positive integer.
    """
    for rate in (source_rate, target_rate):
        if rate != int(rate) or rate <= 0:
            raise InputError(f"a sampling rate is a positive whole number of Hz, not {rate}")
    if source_rate == target_rate:
        return waveform
    length = math.ceil(waveform.shape[-1] * target_rate / source_rate)
    # soxr rounds the length; trailing silence of at least one output sample allows cutting to the exact length
    silence = [(0, 0)] * (waveform.ndim - 1) + [(0, math.ceil(source_rate / target_rate) + 1)]
    padded = np.pad(waveform, silence).T
    return np.ascontiguousarray(soxr.resample(padded, source_rate, target_rate, quality="VHQ").T[..., :length])
