"""Losses of the VAE and the vocoder, which only stage 0 trains.

Shapes: `B` batch, `N` samples of a waveform.
"""

from torch import Tensor

KL_WEIGHT = 0.03072
"""Weight of the KL divergence beside the absolute error, both summed over a sample: small, to keep latents bounded
(similar to latent diffusion, arXiv 2112.10752, §3.1)."""


def autoencoder_loss(decoded: Tensor, media: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean absolute error of `(B, …)` media plus the weighted KL divergence of the posterior from N(0, 1): `(B,)`.

    The divergence is summed over the latents and divided by the number of values of a medium, as the error is: larger
    media have more latents, and each of these a smaller share in the mean error.
    """
    error = decoded.float() - media.float()
    variance = std.float().square()
    divergence = 0.5 * (mean.float().square() + variance - 1 - variance.clamp(min=1e-12).log())
    return error.abs().flatten(1).mean(1) + KL_WEIGHT * divergence.flatten(1).sum(1) / media[0].numel()


def vocoder_loss(made: Tensor, waveform: Tensor) -> Tensor:
    """Squared error of `(B, N)` waveforms, relative to the power of the target: `(B,)`.

    It penalises phase, so it suits only sounds whose spectrograms determine the phases, as ToyWorld's; others need
    HiFi-GAN's losses (arXiv 2010.05646). A distance of spectrograms trains far slower, because a tone that is still
    missing gives it no gradient.
    """
    error = (made - waveform.float()).square().sum(1)
    return error / waveform.float().square().sum(1).clamp(min=1e-8)
