"""Losses of the networks that turn latents into media: the VAE and the vocoder. Stage 0 alone trains these.

Shapes: `B` batch, `N` samples of a waveform, `M` mel bins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from anygpt.decoders.targets import AudioTargets

KL_WEIGHT = 1e-5
"""Of the KL divergence, summed over a sample's latents, against errors averaged over its pixels: a little, so that
latents keep to a range (latent diffusion, arXiv 2112.10752, §3.1, uses the like)."""


def autoencoder_loss(decoded: Tensor, media: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Absolute error of `(B, …)` media, and the KL divergence of the posterior from N(0, 1): `(B,)`."""
    error = decoded.float() - media.float()
    variance = std.float().square()
    divergence = 0.5 * (mean.float().square() + variance - 1 - variance.clamp(min=1e-12).log())
    return error.abs().flatten(1).mean(1) + KL_WEIGHT * divergence.flatten(1).sum(1)


def log_mel(waveform: Tensor, targets: AudioTargets) -> Tensor:
    """`AudioTargets`' log-mel of `(B, N)` waveforms as they are (no normalising), differentiable: `(B, frames, M)`."""
    padding = (targets.n_fft - targets.hop_length) // 2
    spectrum = torch.stft(
        F.pad(waveform[:, None], (padding, padding), mode="reflect")[:, 0],
        targets.n_fft,
        targets.hop_length,
        window=torch.hann_window(targets.n_fft, device=waveform.device, dtype=waveform.dtype),
        center=False,
        return_complex=True,
    )
    # The floor keeps the gradient of the magnitude finite where a bin is silent.
    magnitude = (spectrum.real.square() + spectrum.imag.square()).clamp(min=1e-12).sqrt()
    filters = mel_filter_bank(
        targets.n_fft // 2 + 1,
        targets.num_mel_bins,
        targets.fmin,
        targets.fmax,
        targets.sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    mels = magnitude.transpose(1, 2) @ torch.from_numpy(filters).to(magnitude)
    return mels.clamp(min=1e-5).log()


def vocoder_loss(waveform: Tensor, mels: Tensor, targets: AudioTargets) -> Tensor:
    """Mean absolute difference of the log-mel of `(B, N)` waveforms and the one asked for, `(B, frames, M)`: `(B,)`.

    The spectrogram loss of HiFi-GAN (arXiv 2010.05646, eq. 5), without its discriminators.
    """
    frames = min(mels.shape[1], waveform.shape[1] // targets.hop_length)
    made = log_mel(waveform[:, : frames * targets.hop_length], targets)
    return (made - mels[:, :frames].float()).abs().flatten(1).mean(1)
