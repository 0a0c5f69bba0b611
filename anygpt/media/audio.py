"""Waveforms: mono and sampling rates. Shapes: `N` samples, `C` channels; values in [-1, 1]."""

from __future__ import annotations

import math
from functools import cache

import av
import numpy as np
import soxr

from anygpt.errors import InputError


def to_mono(waveform: np.ndarray, layout: str | None = None) -> np.ndarray:
    """One channel of several: `(N,)` or `(C, N)` -> `(N,)`, same dtype.

    Args:
        layout: FFmpeg's name of the channel layout (`5.1(side)`), whose downmix is then used: the centre counts more
            than the fronts, they more than the surrounds, and the low-frequency channel not at all. Where it is not
            known, and for stereo, all channels count the same.

    Raises:
        InputError: another number of dimensions.
    """
    if waveform.ndim not in (1, 2):
        raise InputError(f"A waveform is (samples,) or (channels, samples), but this one is {waveform.shape}.")
    if waveform.ndim == 1:
        return waveform
    weights = _downmix(layout) if layout is not None and len(waveform) > 2 else None
    if weights is None or len(weights) != len(waveform):
        return waveform.mean(axis=0, dtype=waveform.dtype)
    return (weights @ waveform).astype(waveform.dtype)


@cache
def _downmix(layout: str) -> np.ndarray | None:
    """What FFmpeg multiplies each channel by, `(C,)`, scaled to a sum of 1; None for layouts that it does not mix."""
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
    """Change the sampling rate with soxr's best quality: `(N,)` or `(C, N)` float32 -> `ceil(N · target / source)`.

    Raises:
        InputError: a rate that is not a positive integer.
    """
    for rate in (source_rate, target_rate):
        if rate != int(rate) or rate <= 0:
            raise InputError(f"A sampling rate is a positive whole number of Hz, not {rate}.")
    if source_rate == target_rate:
        return waveform
    length = math.ceil(waveform.shape[-1] * target_rate / source_rate)
    # soxr rounds the length; with silence behind, of one sample of the result at least, it can be cut to the one wanted
    silence = [(0, 0)] * (waveform.ndim - 1) + [(0, math.ceil(source_rate / target_rate) + 1)]
    padded = np.pad(waveform, silence).T
    return np.ascontiguousarray(soxr.resample(padded, source_rate, target_rate, quality="VHQ").T[..., :length])
