"""Decoders against the diffusers pipelines they wrap: conditions, samples, latents, saving and loading."""

import json
import logging

import accelerate
import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers.hooks import apply_group_offloading
from PIL import Image
from safetensors.torch import load_file

from anygpt.decoders import (
    AudioLDMDecoder,
    Condition,
    DiffusionDecoder,
    ModalDecoderModule,
    StableDiffusion3Decoder,
    StableDiffusionDecoder,
    StableDiffusionXLDecoder,
    ZeroscopeDecoder,
)
from anygpt.errors import InputError

FAMILIES = {
    "sd": (StableDiffusionDecoder, tiny_pipelines.stable_diffusion),
    "sdxl": (StableDiffusionXLDecoder, tiny_pipelines.stable_diffusion_xl),
    "sd3": (StableDiffusion3Decoder, tiny_pipelines.stable_diffusion_3),
    "zeroscope": (ZeroscopeDecoder, tiny_pipelines.zeroscope),
    "audioldm": (AudioLDMDecoder, tiny_pipelines.audioldm),
}
# condition_shape and pooled_dim
SHAPES = {
    StableDiffusionDecoder: ((12, 32), None),
    StableDiffusionXLDecoder: ((12, 56), 20),
    StableDiffusion3Decoder: ((12 + 256, 64), 48),
    ZeroscopeDecoder: ((10, 24), None),
    AudioLDMDecoder: ((1, 20), None),
}
CAPTIONS = ["a red ring", "two dogs, and rather more words than fit", ""]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arrays(media: list) -> list[np.ndarray]:
    return [np.asarray(item) for item in media]


def same(ours: list, theirs: list, exact: bool) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(arrays(ours), arrays(theirs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        # AudioLDM's condition is normalised once more, which may move its last bit.
        np.testing.assert_array_equal(a, b) if exact else np.testing.assert_allclose(a, b, atol=1e-6)


def mapped(condition, function):
    """A plain tensor or a `Condition`, with `function` applied to its tensors."""
    if isinstance(condition, torch.Tensor):
        return function(condition)
    return Condition(function(condition.embeds), function(condition.pooled))


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request):
    cls, pipeline = FAMILIES[request.param]
    return cls(pipeline())


@pytest.fixture(scope="module")
def image_decoder():
    return StableDiffusionDecoder(tiny_pipelines.stable_diffusion())


def raw_output(decoder: DiffusionDecoder, **call) -> list:
    """What the pipeline gives for captions, in our form but written out independently of `collect`."""
    output = decoder.pipeline(**call)
    if decoder.modality == "image":
        return output.images
    if decoder.modality == "video":
        return [np.uint8(np.rint(np.asarray(frames) * 255)) for frames in output.frames]
    return [np.asarray(audio, dtype=np.float32) for audio in output.audios]


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_sampling_the_text_encoding_is_what_the_pipeline_does(decoder, batch_size, guidance_scale):
    captions = CAPTIONS[:batch_size]
    steps = {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    theirs = raw_output(decoder, prompt=captions, generator=generator(), **steps)
    ours = decoder.sample(decoder.encode_text(captions), generator=generator(), **steps)
    same(ours, theirs, exact=decoder.modality != "audio")


SIZES = {
    "sd": (lambda: tiny_pipelines.stable_diffusion(vae_levels=4), {"height": 24, "width": 40}),  # latents 3 × 5
    "sdxl": (lambda: tiny_pipelines.stable_diffusion_xl(vae_levels=4), {"height": 40, "width": 24}),
    "sd3": (tiny_pipelines.stable_diffusion_3, {"height": 12, "width": 20}),  # 3 × 5 patches
    "zeroscope": (tiny_pipelines.zeroscope, {"height": 24, "width": 8, "num_frames": 3}),
    "audioldm": (tiny_pipelines.audioldm, {"audio_length_in_s": 0.2512}),  # latents 13 × 8
}


@pytest.mark.parametrize("name", SIZES)
def test_sampling_at_other_sizes_is_what_the_pipeline_does(name):
    pipeline, size = SIZES[name]
    decoder = FAMILIES[name][0](pipeline())
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, **size}
    theirs = raw_output(decoder, prompt=CAPTIONS, generator=generator(), **call)
    same(
        decoder.sample(decoder.encode_text(CAPTIONS), generator=generator(), **call),
        theirs,
        exact=name != "audioldm",
    )


@pytest.mark.parametrize(
    ("name", "pipeline", "settings"),
    [
        ("sd", lambda: tiny_pipelines.stable_diffusion("v_prediction"), {}),  # as Stable Diffusion 2
        ("sdxl", lambda: tiny_pipelines.stable_diffusion_xl(force_zeros=False), {}),
        ("sd3", lambda: tiny_pipelines.stable_diffusion_3(with_t5=False), {}),
        ("sd3", tiny_pipelines.stable_diffusion_3, {"max_sequence_length": 7}),
    ],
)
def test_variations_of_a_pipeline(name, pipeline, settings, tmp_path):
    decoder = FAMILIES[name][0](pipeline(), **settings)
    call = {"num_inference_steps": 2, "guidance_scale": 4.0}
    theirs = raw_output(decoder, prompt=CAPTIONS, generator=generator(), **call, **settings)
    condition = decoder.encode_text(CAPTIONS)
    assert Condition.of(condition).embeds.shape == (3, *decoder.condition_shape)
    same(decoder.sample(condition, generator=generator(), **call), theirs, exact=True)
    decoder.save_pretrained(tmp_path)
    again = DiffusionDecoder.from_pretrained(tmp_path)
    assert again.condition_shape == decoder.condition_shape
    same(again.sample(condition, generator=generator(), **call), theirs, exact=True)


def test_without_a_negative_sdxl_is_guided_away_from_zeros():
    decoder = StableDiffusionXLDecoder(tiny_pipelines.stable_diffusion_xl())
    condition = decoder.encode_text(CAPTIONS[:1])
    negatives = [None, mapped(condition, torch.zeros_like), decoder.encode_text([""])]
    default, zeros, empty = (
        decoder.sample(condition, negative_condition=n, num_inference_steps=2, generator=generator()) for n in negatives
    )
    same(default, zeros, exact=True)
    assert (np.asarray(default[0]) != np.asarray(empty[0])).any()


def test_the_condition_and_the_seed_matter(decoder):
    condition = decoder.encode_text(CAPTIONS[:1])
    first, again, seed, other = (
        arrays(decoder.sample(c, num_inference_steps=3, guidance_scale=5.0, generator=generator(s)))[0].astype(float)
        for c, s in [(condition, 0), (condition, 0), (condition, 1), (mapped(condition, lambda x: x.flip(-1)), 0)]
    )
    assert (first == again).all() and (first != seed).any() and (first != other).any()


def test_a_negative_condition_is_a_negative_prompt(decoder):
    steps = {"num_inference_steps": 2, "guidance_scale": 5.0}
    theirs = raw_output(decoder, prompt=CAPTIONS, negative_prompt=["ugly"] * 3, generator=generator(), **steps)
    negative = decoder.encode_text(["ugly"] * 3)
    ours = decoder.sample(decoder.encode_text(CAPTIONS), negative_condition=negative, generator=generator(), **steps)
    same(ours, theirs, exact=decoder.modality != "audio")


def test_one_generator_a_sample_makes_samples_independent_of_the_batch(decoder):
    condition = decoder.encode_text(CAPTIONS)
    call = {"num_inference_steps": 2, "guidance_scale": 5.0}
    together = decoder.sample(condition, generator=[generator(s) for s in range(3)], **call)
    for row in range(3):
        alone = decoder.sample(condition[row : row + 1], generator=[generator(row)], **call)
        # A batch of another size may round the last bit otherwise: one grey level.
        assert np.abs(np.float64(together[row]) - np.float64(alone[0])).max() <= (
            1 if decoder.modality != "audio" else 1e-4
        )
    with pytest.raises(InputError, match="2 generators for 3 samples"):
        decoder.sample(condition, generator=[generator(), generator()], **call)


@pytest.mark.parametrize(("wrong", "instead"), [({"seed": 3}, "generator"), ({"negative_prompt": "a"}, "negative_con")])
def test_sample_names_what_it_takes_instead(decoder, wrong, instead):
    with pytest.raises(InputError, match=f"sample takes no {next(iter(wrong))}, .*give {instead}"):
        decoder.sample(decoder.encode_text(CAPTIONS[:1]), **wrong)


def test_captions_are_a_list(decoder):
    for wrong in ("a ring", [1]):
        with pytest.raises(InputError, match="expected a list of texts"):
            decoder.encode_text(wrong)


def test_a_distilled_unet_takes_no_negative_and_is_not_trained():
    decoder = StableDiffusionDecoder(tiny_pipelines.stable_diffusion())
    decoder.unet.register_to_config(time_cond_proj_dim=8)
    condition = decoder.encode_text(CAPTIONS[:1])
    with pytest.raises(InputError, match=r"negative_condition .* no effect"):
        decoder.sample(condition, negative_condition=condition, guidance_scale=8.0)
    with pytest.raises(InputError, match=r"with its guidance as input .* not trained by denoising"):
        decoder.denoising_loss(condition, torch.zeros(1, 4, 8, 8))


def test_forms_and_default_sizes(decoder):
    sample = decoder.sample(decoder.encode_text(CAPTIONS[:1]), num_inference_steps=1, guidance_scale=1.0)[0]
    if decoder.modality == "image":
        assert isinstance(sample, Image.Image) and sample.size == (16, 16)
    elif decoder.modality == "video":
        assert sample.dtype == np.uint8 and sample.shape == (16, 16, 16, 3) and decoder.frame_rate == 8
    else:
        assert sample.dtype == np.float32 and sample.shape == (5120,) and decoder.sampling_rate == 16000


def test_sizes_can_be_set_for_a_call_and_for_a_decoder():
    one = {"num_inference_steps": 1, "guidance_scale": 1.0}
    image = StableDiffusionDecoder(tiny_pipelines.stable_diffusion(), width=24)
    condition = image.encode_text(["x"])
    assert image.sample(condition, **one)[0].size == (24, 16)
    # diffusers alone would ignore a height given without a width
    assert image.sample(condition, height=32, **one)[0].size == (24, 32)
    assert image.targets.height == 16 and image.targets.width == 24

    video = ZeroscopeDecoder(tiny_pipelines.zeroscope(), num_frames=4, frame_rate=12)
    condition = video.encode_text(["x"])
    assert video.sample(condition, **one)[0].shape == (4, 16, 16, 3) and video.frame_rate == 12
    assert video.sample(condition, num_frames=2, **one)[0].shape == (2, 16, 16, 3)
    assert video.targets.num_frames == 4

    audio = AudioLDMDecoder(tiny_pipelines.audioldm(), audio_length_in_s=0.25)
    condition = audio.encode_text(["x"])
    assert audio.sample(condition, **one)[0].shape == (4000,)
    assert audio.sample(condition, audio_length_in_s=0.1, **one)[0].shape == (1600,)
    # 25 frames, rounded up to what the VAE can halve
    assert audio.targets.num_frames == 26
    with pytest.raises(InputError, match=r"no option .height.*audio_length_in_s"):
        audio.sample(condition, height=16, **one)


def test_condition_shape_comes_from_the_configs(decoder):
    shape, pooled_dim = SHAPES[type(decoder)]
    encoding = decoder.encode_text(CAPTIONS)
    assert decoder.condition_shape == shape and decoder.pooled_dim == pooled_dim
    assert isinstance(encoding, torch.Tensor if pooled_dim is None else Condition)
    encoding = Condition.of(encoding)
    assert encoding.embeds.shape == (3, *shape) and not encoding.embeds.requires_grad
    assert pooled_dim is None or (encoding.pooled.shape == (3, pooled_dim) and not encoding.pooled.requires_grad)


def test_the_condition_of_audioldm_is_normalised_in_loss_and_sampling():
    decoder = AudioLDMDecoder(tiny_pipelines.audioldm())
    torch.testing.assert_close(decoder.encode_text(CAPTIONS).norm(dim=-1), torch.ones(3, 1))
    projected = torch.randn(2, *decoder.condition_shape, generator=generator())
    for given in (projected, Condition(projected)):
        normalised = decoder.normalize_condition(given)
        assert type(normalised) is type(given)
        torch.testing.assert_close(Condition.of(normalised).embeds.norm(dim=-1), torch.ones(2, 1))
    latents = torch.randn(2, 4, 16, 8, generator=generator())
    losses = [decoder.denoising_loss(scale * projected, latents, generator=generator()) for scale in (1, 7)]
    torch.testing.assert_close(*losses)
    media = [
        decoder.sample(scale * projected, num_inference_steps=2, guidance_scale=3.0, generator=generator())
        for scale in (1, 7)
    ]
    same(*media, exact=False)


def test_latents_follow_the_vae(decoder):
    targets = torch.rand(2, *decoder.targets([_medium(decoder)])[0].shape, generator=generator()) * 2 - 1
    vae = decoder.pipeline.vae
    latents = decoder.encode_media(targets)
    if decoder.modality == "video":
        modes = torch.stack([vae.encode(frame).latent_dist.mode() for frame in targets.unbind(2)], dim=2)
    else:
        modes = vae.encode(targets).latent_dist.mode()
    shift = 0.2 if isinstance(decoder, StableDiffusion3Decoder) else 0.0
    torch.testing.assert_close(latents, (modes - shift) * 0.37)
    assert not latents.requires_grad

    if decoder.modality != "video":
        expected = (vae.encode(targets).latent_dist.sample(generator(3)) - shift) * 0.37
        torch.testing.assert_close(decoder.encode_media(targets, generator(3)), expected)
    together = decoder.encode_media(targets, [generator(0), generator(1)])
    assert not torch.equal(together, latents)
    for row in range(2):
        torch.testing.assert_close(decoder.encode_media(targets[row : row + 1], [generator(row)])[0], together[row])


def test_the_shift_of_a_vae_is_undone(image_decoder):
    targets = torch.rand(1, 3, 16, 16, generator=generator())
    plain = image_decoder.encode_media(targets)
    image_decoder.vae.register_to_config(shift_factor=0.5)
    try:
        torch.testing.assert_close(image_decoder.encode_media(targets), plain - 0.5 * 0.37)
    finally:
        image_decoder.vae.register_to_config(shift_factor=None)


def test_raw_media_and_their_targets_give_the_same_latents(decoder):
    media = [_medium(decoder), _medium(decoder)]
    torch.testing.assert_close(decoder.encode_media(media), decoder.encode_media(decoder.targets(media)))


def _medium(decoder):
    rng = np.random.default_rng(0)
    return {
        "image": lambda: Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)),
        "video": lambda: rng.integers(0, 256, (5, 20, 30, 3), dtype=np.uint8),
        "audio": lambda: (rng.standard_normal(9000).astype(np.float32) * 0.1, 22050),
    }[decoder.modality]()


def test_image_targets_are_what_the_pipeline_makes_of_an_image(image_decoder):
    image = _medium(image_decoder).resize((16, 16))
    theirs = image_decoder.pipeline.image_processor.preprocess(image)
    torch.testing.assert_close(image_decoder.targets([image]), theirs, rtol=0, atol=1e-6)


def test_the_networks_are_frozen_submodules(decoder):
    networks = {name for name, c in decoder.pipeline.components.items() if isinstance(c, torch.nn.Module)}
    assert networks == {name for name, _ in decoder.named_children()}
    assert any(decoder.denoiser is child for child in decoder.children())
    assert not any(p.requires_grad for p in decoder.parameters()) and not any(m.training for m in decoder.modules())
    assert sum(p.numel() for p in decoder.denoiser.parameters()) < sum(p.numel() for p in decoder.parameters())
    assert decoder.train() is decoder and decoder.denoiser.training
    decoder.eval()


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_dtype_moves_with_the_module(name):
    cls, pipeline = FAMILIES[name]
    decoder = cls(pipeline()).to(torch.bfloat16)
    condition = Condition.of(decoder.encode_text(CAPTIONS))
    assert condition.embeds.dtype == decoder.dtype == torch.bfloat16
    condition = condition.to(dtype=torch.float32)
    loss = decoder.denoising_loss(condition, torch.randn(3, 4, 8, 8, generator=generator()))
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    assert len(decoder.sample(condition, num_inference_steps=1, guidance_scale=2.0)) == 3


def test_round_trip_through_the_base_class(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    again = DiffusionDecoder.from_pretrained(tmp_path)
    assert type(again) is type(decoder) is type(type(decoder).from_pretrained(tmp_path))
    state, loaded = decoder.state_dict(), again.state_dict()
    assert list(state) == list(loaded) and all(torch.equal(state[name], loaded[name]) for name in state)
    condition = decoder.encode_text(CAPTIONS)
    torch.testing.assert_close(
        Condition.of(condition).embeds, Condition.of(again.encode_text(CAPTIONS)).embeds, rtol=0, atol=0
    )
    same(*(d.sample(condition, num_inference_steps=2, generator=generator()) for d in (decoder, again)), exact=True)
    assert not list(tmp_path.rglob("*.bin")) and load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")


def test_settings_come_back_and_can_be_overridden(tmp_path):
    ZeroscopeDecoder(tiny_pipelines.zeroscope(), num_frames=8, frame_rate=4).save_pretrained(tmp_path)
    again = DiffusionDecoder.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert (again.num_frames, again.frame_rate, again.dtype) == (8, 4, torch.bfloat16)
    assert DiffusionDecoder.from_pretrained(tmp_path, num_frames=2).num_frames == 2


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_pickled_weights_are_refused(image_decoder, tmp_path, part):
    image_decoder.save_pretrained(tmp_path)
    (weights,) = (tmp_path / part).glob("*.safetensors")
    name = "diffusion_pytorch_model.bin" if part == "unet" else "pytorch_model.bin"
    torch.save(load_file(weights), tmp_path / part / name)
    weights.unlink()
    with pytest.raises(InputError, match="pickled weights are refused"):
        DiffusionDecoder.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="no argument 'use_safetensors'"):
        DiffusionDecoder.from_pretrained(tmp_path, use_safetensors=False)


def test_the_wrong_class_and_no_pipeline_are_said(image_decoder, tmp_path):
    image_decoder.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"holds a StableDiffusionPipeline.*ZeroscopeDecoder.*TextToVideoSDPipeline"):
        ZeroscopeDecoder.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="needs a TextToVideoSDPipeline, but was given a StableDiffusionPipeline"):
        ZeroscopeDecoder(image_decoder.pipeline)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "ShapEPipeline"}))
    with pytest.raises(InputError, match=r"ShapEPipeline; known are AudioLDM2Pipeline, AudioLDMPipeline, Flux"):
        DiffusionDecoder.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="no diffusers pipeline at"):
        DiffusionDecoder.from_pretrained(tmp_path / "unet")


def test_a_variation_of_a_family_loads_as_itself(image_decoder, tmp_path):
    class Variation(StableDiffusionDecoder):
        pass

    image_decoder.save_pretrained(tmp_path)
    assert type(Variation.from_pretrained(tmp_path)) is Variation
    assert type(DiffusionDecoder.from_pretrained(tmp_path)) is StableDiffusionDecoder


def test_conditions_that_do_not_fit_name_both_shapes(decoder):
    tokens, dim = decoder.condition_shape
    wrong = torch.zeros(2, tokens, dim + 1)
    with pytest.raises(InputError, match=rf"\(2, {tokens}, {dim + 1}\), expected .* \(2, {tokens}, {dim}\)"):
        decoder.sample(wrong)
    with pytest.raises(InputError, match=rf"\(2, {tokens}, {dim}\), expected .* \(3, {tokens}, {dim}\)"):
        decoder.denoising_loss(wrong[..., :-1], torch.zeros(3, 4, 8, 8))
    if decoder.pooled_dim is not None:
        for pooled in (None, torch.zeros(2, decoder.pooled_dim - 1), torch.zeros(1, decoder.pooled_dim)):
            shape = "None" if pooled is None else rf"\({pooled.shape[0]}, {pooled.shape[1]}\)"
            with pytest.raises(InputError, match=rf"pooled .* is {shape}, expected .* \(2, {decoder.pooled_dim}\)"):
                decoder.sample(Condition(wrong[..., :-1], pooled))


def test_a_plain_tensor_means_a_condition_of_embeds(decoder):
    tensor = torch.randn(2, *decoder.condition_shape, generator=generator())
    if decoder.pooled_dim is not None:  # it has no pooled part
        with pytest.raises(InputError, match=r"pooled .* is None"):
            decoder.sample(tensor)
        return
    latents = decoder.encode_media([_medium(decoder)] * 2)
    losses, media = [], []
    for condition in (tensor, Condition(tensor)):
        normalised = decoder.normalize_condition(condition)
        assert type(normalised) is type(condition)
        losses.append(decoder.denoising_loss(condition, latents, generator=generator()))
        call = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator()}
        media.append(decoder.sample(condition, negative_condition=normalised[[1, 0]], **call))
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    same(*media, exact=True)


def test_an_output_projector_feeds_it(decoder):
    module = ModalDecoderModule(decoder, num_signal_tokens=3)
    module.init_projector(in_features=6, num_layers=2, projection_type="linear")
    states = torch.randn(2, 3, 6, generator=generator())
    condition = module.condition(states)
    latents = decoder.encode_media([_medium(decoder)] * 2)
    decoder.denoising_loss(condition, latents, generator=generator()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert all(name.startswith("projector.") and gradient.any() for name, gradient in gradients.items())
    assert len(gradients) == (2 if decoder.pooled_dim is None else 4)  # the pooled head's too
    assert len(decoder.sample(condition, num_inference_steps=1)) == 2


# ---- the pipeline's memory helpers


def test_slicing_and_tiling_of_the_vae_change_nothing(decoder):
    condition = decoder.encode_text(CAPTIONS)
    media = [_medium(decoder)] * 2
    call = {"num_inference_steps": 2, "guidance_scale": 3.0}
    expected, latents = decoder.sample(condition, generator=generator(), **call), decoder.encode_media(media)
    vae = decoder.pipeline.vae
    vae.enable_slicing()
    vae.enable_tiling()  # what is smaller than a tile stays whole
    try:
        sliced = decoder.sample(condition, generator=generator(), **call)
        torch.testing.assert_close(decoder.encode_media(media), latents)
    finally:
        vae.disable_slicing()
        vae.disable_tiling()
    for a, b in zip(expected, sliced, strict=True):
        tolerance = 1e-4 if decoder.modality == "audio" else 1  # a grey level
        assert np.abs(np.float64(a) - np.float64(b)).max() <= tolerance


def test_tiles_of_the_vae_are_used_where_they_are_smaller_than_the_image(image_decoder):
    condition = image_decoder.encode_text(["x"])
    vae, calls = image_decoder.pipeline.vae, []
    hook = vae.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    sizes = vae.tile_sample_min_size, vae.tile_latent_min_size
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 8
    try:
        (image,) = image_decoder.sample(condition, height=32, width=32, num_inference_steps=1)
    finally:
        hook.remove()
        vae.disable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = sizes
    assert image.size == (32, 32) and len(calls) > 1


def test_attention_slicing_changes_nothing(decoder):
    condition = decoder.encode_text(CAPTIONS[:2])
    latents = decoder.encode_media([_medium(decoder)] * 2)
    expected = decoder.denoising_loss(condition, latents, generator=generator())
    processors = {
        name: module.processor for name, module in decoder.denoiser.named_modules() if hasattr(module, "processor")
    }
    decoder.pipeline.enable_attention_slicing(1)
    try:
        now = [decoder.denoiser.get_submodule(name).processor for name in processors]
        # SD 3's transformer has no such attention: there the pipeline's switch does nothing
        sliced = any("Sliced" in type(processor).__name__ for processor in now)
        assert sliced != isinstance(decoder, StableDiffusion3Decoder)
        loss = decoder.denoising_loss(condition, latents, generator=generator())
    finally:
        for name, processor in processors.items():
            decoder.denoiser.get_submodule(name).set_processor(processor)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_may_be_kept_elsewhere_than_where_is_computed(name):
    # What enable_sequential_cpu_offload does, which itself asks for an accelerator: the weights are on the "meta"
    # device, and come to the CPU layer by layer.
    cls, pipeline = FAMILIES[name]
    plain, offloaded = cls(pipeline()), cls(pipeline())
    for network in offloaded.children():
        accelerate.cpu_offload(network, torch.device("cpu"), offload_buffers=True)
    assert offloaded.pipeline.device.type == "meta" and offloaded.device == torch.device("cpu")
    assert {p.device.type for p in offloaded.denoiser.parameters()} == {"meta"}
    results = []
    for decoder in (plain, offloaded):
        condition = Condition.of(decoder.encode_text(CAPTIONS))
        embeds = condition.embeds.clone().requires_grad_()
        latents = decoder.encode_media([_medium(decoder)] * 3)
        loss = decoder.denoising_loss(Condition(embeds, condition.pooled), latents, generator=generator())
        loss.sum().backward()
        media = decoder.sample(condition, num_inference_steps=1, guidance_scale=3.0, generator=generator())
        results.append((latents, loss, embeds.grad, media))
    for ours, theirs in zip(*(result[:3] for result in results), strict=True):
        torch.testing.assert_close(ours, theirs)
    same(results[0][3], results[1][3], exact=name != "audioldm")


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_the_device_is_where_offloaded_groups_compute(monkeypatch, offload_type):
    cls, pipeline = FAMILIES["sd"]
    decoder = cls(pipeline())
    monkeypatch.setattr(type(decoder.pipeline), "_execution_device", torch.device("meta"))  # as if there were another
    assert decoder.device == torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    apply_group_offloading(decoder.unet, torch.device("cpu"), offload_type=offload_type, **blocks)
    assert decoder.device == torch.device("meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="enable_model_cpu_offload needs an accelerator")
@pytest.mark.parametrize("name", FAMILIES)
def test_model_offloading(name):
    cls, pipeline = FAMILIES[name]
    decoder = cls(pipeline())
    decoder.pipeline.enable_model_cpu_offload()
    assert decoder.device.type == "cuda" and decoder.vae.device.type == "cpu"
    condition = Condition.of(decoder.encode_text(CAPTIONS))
    embeds = condition.embeds.clone().requires_grad_()
    latents = decoder.encode_media([_medium(decoder)] * 3)
    decoder.denoising_loss(Condition(embeds, condition.pooled), latents, generator=generator()).sum().backward()
    assert latents.device.type == "cuda" and embeds.grad.isfinite().all() and embeds.grad.any()
    assert len(decoder.sample(condition, num_inference_steps=1, guidance_scale=3.0)) == 3


# ---- half precision and other VAEs of SDXL


def test_the_vae_of_sdxl_encodes_in_float32_where_it_overflows_in_float16():
    decoder = StableDiffusionXLDecoder(tiny_pipelines.stable_diffusion_xl())
    expected = decoder.encode_media([_medium(decoder)])
    decoder.vae.half()
    seen = []
    hook = decoder.vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    try:
        torch.testing.assert_close(decoder.encode_media([_medium(decoder)]), expected, rtol=1e-2, atol=1e-2)
    finally:
        hook.remove()
    assert seen == [torch.float32] and decoder.vae.dtype == torch.float16


def test_channel_means_of_a_vae_are_undone():
    decoder = StableDiffusionXLDecoder(tiny_pipelines.stable_diffusion_xl())
    means, deviations = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    decoder.vae.register_to_config(latents_mean=means, latents_std=deviations)
    latents = decoder.encode_media([_medium(decoder)])
    mean, std = (torch.tensor(x).view(1, 4, 1, 1) for x in (means, deviations))
    modes = decoder.vae.encode(decoder.targets([_medium(decoder)])).latent_dist.mode()
    # the pipeline's line
    torch.testing.assert_close(latents * std / decoder.vae.config.scaling_factor + mean, modes)


def test_a_safety_checker_stays_in_force_and_its_absence_is_logged_once(caplog):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    from anygpt.errors import warn_once

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config={**size, "image_size": 16, "patch_size": 8}, text_config=size, projection_dim=8)
    )
    checker.concept_embeds_weights.fill_(-2.0)  # a threshold that everything passes: all is flagged
    plain = tiny_pipelines.stable_diffusion()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    guarded = type(plain)(**{**plain.components, "safety_checker": checker, "feature_extractor": processor})

    warn_once.cache_clear()
    with caplog.at_level(logging.INFO):
        decoder = StableDiffusionDecoder(guarded)
        assert "safety checker" not in caplog.text
        for _ in range(2):
            StableDiffusionDecoder(plain)
    assert caplog.text.count("has no safety checker") == 1
    (image,) = decoder.sample(decoder.encode_text(["x"]), num_inference_steps=1)
    assert not np.asarray(image).any()


def test_condition_is_indexed_and_moved():
    condition = Condition(torch.ones(3, 2, 4), pooled=torch.ones(3, 5), mask=torch.ones(3, 2, dtype=torch.bool))
    part = condition[1:].to(dtype=torch.float64)
    assert len(part) == 2 and part.embeds.shape == (2, 2, 4) and part.pooled.shape == (2, 5)
    assert part.embeds.dtype == part.pooled.dtype == torch.float64 and part.mask.dtype == torch.bool
    assert Condition.of(condition) is condition and Condition.of(condition.embeds).pooled is None
