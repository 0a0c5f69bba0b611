"""Images from Stable Diffusion (1.x, 2.x)."""

from anygpt.decoders.forms import ImageDecoder


class StableDiffusionDecoder(ImageDecoder):
    """Conditions `(B, T, D)` of a CLIP text encoder -> PIL images."""

    pipeline_name = "StableDiffusionPipeline"
