"""Decoders that edit a reference, and others that start from one: samples, losses, data, generation, bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_pipelines
import torch
from decoder_families import CAPTIONS
from decoder_families import FAMILIES as NEWER
from diffusers import AutoPipelineForImage2Image
from PIL import Image
from training_utils import REPOSITORY

from anygpt import ModalDecoderModule, ModalEncoderModule, MultimodalModel, MultimodalProcessor, load_encoder
from anygpt import load_language_model
from anygpt.data.collation import BAD, Collator
from anygpt.data.dataset import ConversationDataset
from anygpt.data.formats.base import DataSource
from anygpt.decoders import (
    Condition,
    DiffusionDecoder,
    FluxDecoder,
    FluxKontextDecoder,
    InstructPix2PixDecoder,
    SanaDecoder,
    StableDiffusion3Decoder,
    StableDiffusionDecoder,
    StableDiffusionXLDecoder,
    ZeroscopeDecoder,
)
from anygpt.errors import InputError
from anygpt.model.language_models import load_tokenizer

STARTING = {
    "sd": (StableDiffusionDecoder, tiny_pipelines.stable_diffusion),
    "sdxl": (StableDiffusionXLDecoder, tiny_pipelines.stable_diffusion_xl),
    "sd3": (StableDiffusion3Decoder, tiny_pipelines.stable_diffusion_3),
    "flux": (FluxDecoder, tiny_pipelines.flux),
}
EDITING = {
    "pix2pix": (InstructPix2PixDecoder, tiny_pipelines.instruct_pix2pix),
    "kontext": (FluxKontextDecoder, tiny_pipelines.flux_kontext),
    "kontext, undistilled": (FluxKontextDecoder, lambda: tiny_pipelines.flux_kontext(guidance_embeds=False)),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, size: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), atol=1)


@pytest.fixture(scope="module")
def made():
    known = {}

    def make(name: str) -> DiffusionDecoder:
        kind, pipeline = (EDITING | STARTING)[name]
        return known.setdefault(name, kind(pipeline()))

    return make


@pytest.fixture(params=EDITING)
def name(request):
    return request.param


@pytest.fixture
def decoder(made, name):
    return made(name)


# --------------------------------------------------------------------------------------------------------- sampling


def latents_of(decoder, condition, **options):
    """The latents that a sampling gives the VAE, and those of the same call of the pipeline."""
    found = []
    hook = decoder.vae.decoder.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    try:
        decoder.sample(condition, **options)
    finally:
        hook.remove()
    return torch.cat(found)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("rows", [1, 3])
def test_edits_are_the_pipelines(name, decoder, rows, scale):
    references = pictures(rows, (decoder.height, decoder.width))
    size = {"height": decoder.height, "width": decoder.width}
    options = {"num_inference_steps": 2}
    if name == "pix2pix":
        options |= {"guidance_scale": scale, "image_guidance_scale": 1.7}
        call: dict = {}
    else:
        call = {**size, "max_area": decoder.height * decoder.width, "_auto_resize": False}
        if decoder.transformer.config.guidance_embeds:
            options["guidance_scale"] = scale
        elif scale > 1:
            options["true_cfg_scale"] = scale
            call["negative_prompt"] = [""] * rows
    captions, found = CAPTIONS[:rows], []
    hook = decoder.vae.decoder.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    theirs = decoder.pipeline(image=references, prompt=captions, generator=generator(), **options, **call).images
    hook.remove()
    negative = {"negative_condition": decoder.encode_text([""] * rows)} if "negative_prompt" in call else {}
    given = {**options, **negative, "reference": references}
    same(decoder.sample(decoder.encode_text(captions), generator=generator(), **given), theirs)
    latents = latents_of(decoder, decoder.encode_text(captions), generator=generator(), **given)
    torch.testing.assert_close(latents, torch.cat(found), rtol=1e-5, atol=1e-5)
    others = [image.transpose(Image.Transpose.ROTATE_180) for image in references]
    given["reference"] = others
    moved = latents_of(decoder, decoder.encode_text(captions), generator=generator(), **given)
    assert (moved - latents).abs().flatten(1).amax(dim=1).min() > 1e-4


def test_without_a_reference_it_makes_a_new_picture(name, decoder):
    condition = decoder.encode_text(CAPTIONS)
    latents = latents_of(decoder, condition, num_inference_steps=2, generator=generator())
    if name == "pix2pix":  # the network on zeros, guided by the text alone, written out
        scheduler, unet, empty = decoder.pipeline.scheduler, decoder.unet, decoder.encode_text([""] * 3)
        scheduler.set_timesteps(2)
        state = torch.randn(3, 4, 8, 8, generator=generator())
        for t in scheduler.timesteps:
            wide = torch.cat([state, torch.zeros_like(state)], dim=1)
            with torch.no_grad():
                text, none = (unet(wide, t, encoder_hidden_states=c).sample for c in (condition, empty))
            state = scheduler.step(none + 7.5 * (text - none), t, state).prev_sample
        torch.testing.assert_close(latents, decoder.vae.post_quant_conv(state / 0.37), rtol=0, atol=1e-4)
    else:
        plain = FluxDecoder(tiny_pipelines.flux(decoder.transformer.config.guidance_embeds))
        options = {"num_inference_steps": 2, "generator": generator()}
        options |= {"guidance_scale": 2.5} if decoder.transformer.config.guidance_embeds else {}
        other = latents_of(decoder, condition, **options | {"generator": generator()})
        torch.testing.assert_close(other, latents_of(plain, condition, **options), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", STARTING)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_strength_is_the_image_to_image_pipelines(made, name, rows):
    decoder = made(name)
    size = {"height": decoder.height, "width": decoder.width} if name in ("sd3", "flux") else {}
    references = pictures(rows, (decoder.height, decoder.width))
    options = {"num_inference_steps": 4, "strength": 0.6, "guidance_scale": 3.0}
    pipeline = AutoPipelineForImage2Image.from_pipe(decoder.pipeline)
    theirs = pipeline(CAPTIONS[:rows], image=references, generator=generator(), **options, **size).images
    condition, steps = decoder.encode_text(CAPTIONS[:rows]), []
    given = {"reference": references, "on_step": lambda *step: steps.append(step)}
    same(decoder.sample(condition, generator=generator(), **options, **given), theirs)
    assert steps[-1] == (len(steps), len(steps)) and len(steps) < 4
    without = decoder.sample(condition, generator=generator(), **options)  # no picture to start from
    same(without, decoder.sample(condition, generator=generator(), num_inference_steps=4, guidance_scale=3.0))


def test_an_editor_is_widened_from_a_text_to_image_pipeline():
    """Its new channels are zeros, so that it begins as the old one, whatever the reference."""
    plain = StableDiffusionDecoder(tiny_pipelines.stable_diffusion())
    wide = InstructPix2PixDecoder.widened(plain.pipeline)
    latents, condition = torch.randn(2, 4, 8, 8, generator=generator()), plain.encode_text(CAPTIONS[:2])
    reference = wide.targets(pictures(2, (16, 16)))
    ours = wide.denoising_loss(condition, latents, generator=generator(), reference=reference)
    torch.testing.assert_close(ours, plain.denoising_loss(condition, latents, generator=generator()))


# --------------------------------------------------------------------------------------------------------- the loss


def naive_prediction(name, decoder, noisy, t, condition, reference):
    """The network's prediction for one sample and the unscaled mean of its reference's posterior, or None."""
    if name == "pix2pix":
        reference = torch.zeros_like(noisy) if reference is None else reference
        return decoder.unet(torch.cat([noisy, reference], dim=1), t, encoder_hidden_states=condition.embeds).sample

    def tokens(latents, number):
        blocks = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
        places = torch.stack(torch.meshgrid(*map(torch.arange, blocks.shape[1:3]), indexing="ij"), dim=-1)
        ids = torch.nn.functional.pad(places.flatten(0, 1), (1, 0), value=number).to(noisy)
        return blocks.flatten(3).flatten(1, 2), ids

    parts = [tokens(noisy, 0)] + ([] if reference is None else [tokens((reference - 0.2) * 0.37, 1)])
    distilled = decoder.transformer.config.guidance_embeds
    made = decoder.transformer(
        torch.cat([tensor for tensor, _ in parts], dim=1),
        timestep=t / 1000,
        guidance=noisy.new_tensor([3.5]) if distilled else None,
        pooled_projections=condition.pooled,
        encoder_hidden_states=condition.embeds,
        txt_ids=noisy.new_zeros(condition.embeds.shape[1], 3),
        img_ids=torch.cat([ids for _, ids in parts]),
    ).sample[:, : noisy[0, 0].numel() // 4]
    height, width = noisy.shape[2:]
    blocks = made.unflatten(1, (height // 2, width // 2)).unflatten(3, (noisy.shape[1], 2, 2))
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def test_the_loss_is_the_formula_in_float64(name):
    """Two references, and a row without."""
    kind, pipeline = EDITING[name]
    decoder = kind(pipeline()).double()
    reference = decoder.targets(pictures(3, (decoder.height, decoder.width))).double()
    reference[1] = 0
    condition = Condition.of(decoder.encode_text(CAPTIONS)).to(dtype=torch.float64)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator(), dtype=torch.float64)
    timesteps = torch.tensor([900, 431, 20])
    ours = decoder.denoising_loss(condition, latents, noise=noise, timesteps=timesteps, reference=reference)
    with torch.no_grad():
        means = decoder.vae.encode(reference).latent_dist.mean
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = []
    for row, t in enumerate(timesteps):
        level = torch.prod(1 - betas[: t + 1]) if name == "pix2pix" else t / 1000
        noisy, target = (1 - level) * latents[row] + level * noise[row], noise[row] - latents[row]
        if name == "pix2pix":
            noisy, target = level.sqrt() * latents[row] + (1 - level).sqrt() * noise[row], noise[row]
        given = None if row == 1 else means[[row]]
        with torch.no_grad():
            prediction = naive_prediction(name, decoder, noisy[None], t[None].double(), condition[[row]], given)
        expected.append((prediction[0] - target).square().mean())
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=1e-9)


def test_gradients_reach_the_condition_alone(decoder):
    condition = Condition.of(decoder.encode_text(CAPTIONS))
    condition.embeds = condition.embeds.detach().clone().requires_grad_()
    reference = decoder.targets(pictures(3, (decoder.height, decoder.width)))
    latents = torch.randn(3, 4, 8, 8, generator=generator())
    decoder.denoising_loss(condition, latents, generator=generator(), reference=reference)[1].backward()
    assert (condition.embeds.grad.flatten(1).norm(dim=1) > 0).tolist() == [False, True, False]
    assert all(p.grad is None for p in decoder.parameters())
