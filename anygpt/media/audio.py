"""Waveforms: mono and sampling rates. Shapes: `N` samples, `C` channels; values in [-1, 1]."""

from __future__ import annotations

import math

import numpy as np

from anygpt.errors import InputError

# Share of the narrower band over which the low-pass falls to zero. A brick wall there would ring; this keeps its
# tail below 50 ms, which is what the padding against wrap-around allows for.
ROLLOFF = 0.05
TAIL_SECONDS = 0.05
MAX_RATE = 1_000_000
"""Hz. Headers may claim any rate, and two rates without a common divisor are resampled in blocks of a second."""


def to_mono(waveform: np.ndarray) -> np.ndarray:
    """The mean of the channels: `(N,)` or `(C, N)` -> `(N,)`, same dtype.

    Raises:
        InputError: another number of dimensions.
    """
    if waveform.ndim not in (1, 2):
        raise InputError(f"A waveform is (samples,) or (channels, samples), but this one is {waveform.shape}.")
    return waveform if waveform.ndim == 1 else waveform.mean(axis=0, dtype=waveform.dtype)


def resample(waveform: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Change the sampling rate: `(N,)` or `(C, N)` float32 -> the same with `ceil(N · target / source)` samples.

    The band-limited signal is evaluated at the new instants in the frequency domain, with zero phase, for any pair
    of rates (Hz): nothing above either Nyquist frequency survives. (The resampler in FFmpeg's default setting lets a
    tone 2.5% above the new Nyquist back in at -15 dB.)

    Raises:
        InputError: a rate that is not a positive integer, or above `MAX_RATE`.
    """
    for rate in (source_rate, target_rate):
        if rate != int(rate) or not 0 < rate <= MAX_RATE:
            raise InputError(f"A sampling rate is a positive whole number of Hz up to {MAX_RATE:,}, not {rate}.")
    if source_rate == target_rate:
        return waveform
    divisor = math.gcd(int(source_rate), int(target_rate))
    source_block, target_block = int(source_rate) // divisor, int(target_rate) // divisor
    length = waveform.shape[-1]
    # Whole blocks, so that both lengths are integers; silence at the end, as the transform is periodic.
    blocks = math.ceil((length + TAIL_SECONDS * source_rate) / source_block)
    spectrum = np.fft.rfft(waveform.astype(np.float64), n=blocks * source_block)
    kept = min(blocks * source_block, blocks * target_block) // 2 + 1
    position = (np.arange(kept) / (kept - 1) - (1 - ROLLOFF)) / ROLLOFF  # 0 to 1 over the roll-off
    lowpass = 0.5 + 0.5 * np.cos(np.pi * position.clip(0, 1))
    resampled = np.fft.irfft(spectrum[..., :kept] * lowpass, n=blocks * target_block) * (target_block / source_block)
    return resampled[..., : math.ceil(length * target_block / source_block)].astype(waveform.dtype)
