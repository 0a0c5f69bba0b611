"""Decoders against the diffusers pipelines they wrap: conditions, samples, latents, saving and loading."""

import json
import logging

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from safetensors.torch import load_file

from anygpt.decoders import AudioLDMDecoder, Condition, DiffusionDecoder, StableDiffusionDecoder, ZeroscopeDecoder
from anygpt.errors import InputError

FAMILIES = {
    "image": (StableDiffusionDecoder, tiny_pipelines.stable_diffusion),
    "video": (ZeroscopeDecoder, tiny_pipelines.zeroscope),
    "audio": (AudioLDMDecoder, tiny_pipelines.audioldm),
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


def test_the_condition_and_the_seed_matter(decoder):
    condition = decoder.encode_text(CAPTIONS[:1])
    first, again, seed, other = (
        arrays(decoder.sample(c, num_inference_steps=3, guidance_scale=5.0, generator=generator(s)))[0].astype(float)
        for c, s in [(condition, 0), (condition, 0), (condition, 1), (condition.flip(-1), 0)]
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
    with pytest.raises(InputError, match=r"no argument height: sizes are audio_length_in_s"):
        audio.sample(condition, height=16, **one)


def test_condition_shape_comes_from_the_configs(decoder):
    shapes = {"image": (12, 32), "video": (10, 24), "audio": (1, 20)}
    encoding = decoder.encode_text(CAPTIONS)
    assert decoder.condition_shape == shapes[decoder.modality] and decoder.pooled_dim is None
    assert isinstance(encoding, torch.Tensor) and encoding.shape == (3, *decoder.condition_shape)
    assert not encoding.requires_grad


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
    torch.testing.assert_close(latents, modes * 0.37)
    assert not latents.requires_grad

    if decoder.modality != "video":
        expected = vae.encode(targets).latent_dist.sample(generator(3)) * 0.37
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
    assert decoder.unet is decoder.pipeline.unet
    assert not any(p.requires_grad for p in decoder.parameters()) and not any(m.training for m in decoder.modules())
    assert sum(p.numel() for p in decoder.unet.parameters()) < sum(p.numel() for p in decoder.parameters())
    assert decoder.train() is decoder and decoder.unet.training
    decoder.eval()


def test_dtype_moves_with_the_module(image_decoder):
    decoder = StableDiffusionDecoder(tiny_pipelines.stable_diffusion()).to(torch.bfloat16)
    condition = decoder.encode_text(CAPTIONS)
    assert condition.dtype == decoder.dtype == torch.bfloat16
    loss = decoder.denoising_loss(condition.float(), torch.randn(3, 4, 8, 8, generator=generator()))
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    assert len(decoder.sample(condition.float(), num_inference_steps=1, guidance_scale=2.0)) == 3


def test_round_trip_through_the_base_class(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    again = DiffusionDecoder.from_pretrained(tmp_path)
    assert type(again) is type(decoder) is type(type(decoder).from_pretrained(tmp_path))
    state, loaded = decoder.state_dict(), again.state_dict()
    assert list(state) == list(loaded) and all(torch.equal(state[name], loaded[name]) for name in state)
    condition = decoder.encode_text(CAPTIONS)
    torch.testing.assert_close(condition, again.encode_text(CAPTIONS), rtol=0, atol=0)
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
    with pytest.raises(InputError, match="use_safetensors can only be True"):
        DiffusionDecoder.from_pretrained(tmp_path, use_safetensors=False)


def test_the_wrong_class_and_no_pipeline_are_said(image_decoder, tmp_path):
    image_decoder.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"holds a StableDiffusionPipeline.*ZeroscopeDecoder.*TextToVideoSDPipeline"):
        ZeroscopeDecoder.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="needs a TextToVideoSDPipeline, but was given a StableDiffusionPipeline"):
        ZeroscopeDecoder(image_decoder.pipeline)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "ShapEPipeline"}))
    with pytest.raises(InputError, match=r"ShapEPipeline; known are AudioLDMPipeline, StableDiffusionPipeline"):
        DiffusionDecoder.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="No diffusers pipeline at"):
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


def test_a_safety_checker_stays_in_force_and_its_absence_is_logged_once(caplog):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    from anygpt.decoders import base

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config={**size, "image_size": 16, "patch_size": 8}, text_config=size, projection_dim=8)
    )
    checker.concept_embeds_weights.fill_(-2.0)  # a threshold that everything passes: all is flagged
    plain = tiny_pipelines.stable_diffusion()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    guarded = type(plain)(**{**plain.components, "safety_checker": checker, "feature_extractor": processor})

    base._warn_once.cache_clear()
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
