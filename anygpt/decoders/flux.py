"""Images from FLUX.1: a transformer of image and text tokens, with or without distilled guidance."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anygpt.decoders.conditions import Condition
from anygpt.decoders.forms import ImageDecoder
from anygpt.decoders.options import Rule, is_number
from anygpt.errors import InputError


class FluxDecoder(ImageDecoder):
    """Conditions of T5, embeds `(B, T, D)`, and CLIP, pooled `(B, P)` -> PIL images. Padding counts as text.

    A model with `guidance_embeds` (FLUX.1 dev) has the guidance as an input number: `guidance_scale`, in training the
    pipeline's default. Others (schnell) have none. `true_cfg_scale` is classifier-free guidance, with a second pass
    on a negative condition.
    """

    pipeline_name = "FluxPipeline"
    weighting_scheme = "none"
    encodes = ("embeds", "pooled")
    pixel_multiple = 1
    patch = (2, 2)
    most_tokens = 512
    guided = ()  # `check_options` handles them

    @property
    def native_size(self) -> tuple[int, int]:
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, reference: Tensor | None = None
    ) -> Tensor:
        """The transformer's velocity prediction, of packed latents; those of `reference` are further tokens."""
        rows, _, height, width = noisy.shape
        tokens, ids = self._tokens(noisy)
        if reference is not None:
            more, places = self._tokens(reference)
            places[:, 0] = 1
            tokens, ids = torch.cat([tokens, more], dim=1), torch.cat([ids, places])
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = timesteps.new_full((rows,), self.call_default("guidance_scale"), dtype=noisy.dtype)
        prediction = self.denoiser(
            tokens,
            encoder_hidden_states=condition.embeds,
            pooled_projections=condition.pooled,
            timestep=timesteps.to(noisy.dtype) / 1000,
            img_ids=ids,
            txt_ids=ids.new_zeros(condition.embeds.shape[1], 3),
            guidance=guidance,
        ).sample[:, : height * width // 4]
        return self.pipeline._unpack_latents(prediction, height, width, vae_scale_factor=1)

    def _tokens(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Packed latents, and the places of the tokens."""
        rows, channels, height, width = latents.shape
        ids = self.pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, latents.device, latents.dtype)
        return self.pipeline._pack_latents(latents, rows, channels, height, width), ids

    @property
    def option_rules(self) -> dict[str, Rule]:
        """Also `true_cfg_scale`; a guidance that the model would ignore is refused."""
        rules = super().option_rules
        rules["true_cfg_scale"] = (lambda value: is_number(value) and value > 1, "a number above 1")
        if not self.transformer.config.guidance_embeds:
            advice = "none: this FLUX has no guidance_embeds; true_cfg_scale guides away from a negative_prompt"
            rules["guidance_scale"] = (lambda value: is_number(value) and value <= 1, advice)
        return rules

    @property
    def pipeline_options(self) -> dict[str, Any]:
        found = super().pipeline_options
        if not self.transformer.config.guidance_embeds:
            del found["guidance_scale"]
        return found

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Also refuses a negative or `true_cfg_scale` without the other, which the pipeline would ignore."""
        super().check_options(options)
        scaled = options.get("true_cfg_scale") is not None
        if scaled != any(options.get(name) is not None for name in ("negative_prompt", "negative_condition")):
            raise InputError(
                f"the {self.modality} decoder is given only one of true_cfg_scale and a negative prompt, which FLUX "
                "ignores without the other: give both, or neither"
            )


class FluxKontextDecoder(FluxDecoder):
    """FLUX.1 Kontext (arXiv 2506.15742): edits a reference, whose latents are more tokens; without one like FLUX.1."""

    pipeline_name = "FluxKontextPipeline"
    takes_reference = True

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, reference: Tensor | None = None
    ) -> Tensor:
        """The velocity prediction; rows without a reference, whose latents are zeros, run separately."""
        given = torch.zeros_like(timesteps, dtype=torch.bool) if reference is None else reference.flatten(1).any(dim=1)
        prediction = torch.empty_like(noisy)
        for rows in filter(len, (given.nonzero()[:, 0], (~given).nonzero()[:, 0])):
            own = reference[rows] if given[rows[0]] else None
            prediction = prediction.index_copy(
                0, rows, super().predict(noisy[rows], timesteps[rows], condition[rows], own)
            )
        return prediction

    def call_pipeline(self, **arguments: Any) -> Any:
        """Call the pipeline with the reference's latents, at exactly the size that was asked for."""
        height, width, reference = arguments["height"], arguments["width"], arguments.pop("reference", None)
        image = None
        if reference is not None:
            image = self.encode_reference(self.reference_pixels(reference, height, width) * 2 - 1).to(self.dtype)
        return self.pipeline(image=image, max_area=height * width, _auto_resize=False, **arguments)
