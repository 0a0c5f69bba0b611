"""Losses of the networks that turn latents into media: the VAE and the vocoder. Stage 0 alone trains these.

Shapes: `B` batch, `N` samples of a waveform.
"""

from __future__ import annotations

from torch import Tensor

KL_WEIGHT = 1e-5
"""Of the KL divergence, summed over a sample's latents, against errors averaged over its pixels: a little, so that
latents keep to a range (latent diffusion, arXiv 2112.10752, §3.1, uses the like)."""


def autoencoder_loss(decoded: Tensor, media: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Absolute error of `(B, …)` media, and the KL divergence of the posterior from N(0, 1): `(B,)`."""
    error = decoded.float() - media.float()
    variance = std.float().square()
    divergence = 0.5 * (mean.float().square() + variance - 1 - variance.clamp(min=1e-12).log())
    return error.abs().flatten(1).mean(1) + KL_WEIGHT * divergence.flatten(1).sum(1)


def vocoder_loss(made: Tensor, waveform: Tensor) -> Tensor:
    """Squared error of `(B, N)` waveforms, relative to the power of those asked for: `(B,)`.

    It asks for the phases too, so it fits sounds whose phases follow from their spectrograms, as ToyWorld's do. (For
    other sounds a vocoder needs HiFi-GAN's losses, arXiv 2010.05646.) A spectrogram's distance alone trains far
    slower: a tone that is not there yet gives it no direction.
    """
    error = (made - waveform.float()).square().sum(1)
    return error / waveform.float().square().sum(1).clamp(min=1e-8)
