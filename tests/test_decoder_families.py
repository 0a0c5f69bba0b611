"""The newer decoder families: conditions, samples, latents and losses are their pipelines'."""

import math

import numpy as np
import pytest
import torch
from decoder_families import CAPTIONS, FAMILIES
from PIL import Image
from training_utils import run_forked

from anygpt import (
    ModalDecoderModule,
    MultimodalModel,
    MultimodalProcessor,
    OutputProjector,
    OutputProjectorConfig,
    load_language_model,
)
from anygpt.decoders import Condition, DiffusionDecoder
from anygpt.errors import InputError
from anygpt.losses.formulas import caption_alignment
from anygpt.model.language_models import load_tokenizer

MASKED = [name for name, family in FAMILIES.items() if family.kind.masked]
FLOWS = [name for name, family in FAMILIES.items() if family.kind.weighting_scheme]
DIFFUSIONS = [name for name in FAMILIES if name not in (*FLOWS, "stable-audio")]  # that one has a formula of its own


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def decoders():
    made = {}
    return lambda name: made.setdefault(name, FAMILIES[name].decoder())


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def decoder(decoders, name):
    return decoders(name)


def media_of(decoder, output) -> list[np.ndarray]:
    """What a pipeline gives, in our form but written out independently of `collect`."""
    if decoder.modality == "image":
        return [np.asarray(image) for image in output.images]
    if decoder.modality == "video":
        return [np.uint8(np.rint(np.asarray(frames) * 255)) for frames in output.frames]
    return [np.asarray(audio, dtype=np.float32) for audio in output.audios]


def same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(float), b.astype(float), atol=1 if a.dtype == np.uint8 else 1e-5)


def medium(decoder):
    rng = np.random.default_rng(0)
    return {
        "image": lambda: Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)),
        "video": lambda: rng.integers(0, 256, (11, 50, 40, 3), dtype=np.uint8),
        "audio": lambda: (rng.standard_normal((2, 9000)).astype(np.float32) * 0.1, 22050),
    }[decoder.modality]()


def inputs(name: str, decoder, rows: int = 3):
    """A random condition with padding, and latents."""
    family, draw = FAMILIES[name], generator(0)
    embeds = torch.randn(rows, *family.shape, generator=draw)
    pooled = None if family.pooled_dim is None else torch.randn(rows, family.pooled_dim, generator=draw)
    lengths = torch.tensor([family.shape[0] // 2, family.shape[0], 5])[:rows, None]
    mask = torch.arange(family.shape[0]) < lengths if decoder.masked else None
    return Condition(embeds, pooled, mask), torch.randn(rows, *family.latents, generator=draw)


# ------------------------------------------------------------------------------------------ conditions and samples


def test_a_condition_is_the_pipelines(name, decoder):
    family = FAMILIES[name]
    assert decoder.condition_shape == family.shape and decoder.pooled_dim == family.pooled_dim
    together = decoder.encode_text(CAPTIONS)
    assert together.embeds.shape == (len(CAPTIONS), *family.shape) and not together.embeds.requires_grad
    for row, caption in enumerate(CAPTIONS):  # each as the pipeline encodes it alone
        ours, theirs = together[[row]], family.encode(decoder.pipeline, [caption])
        torch.testing.assert_close(ours.embeds, theirs.embeds, rtol=0, atol=1e-5)
        assert (ours.pooled is None) == (theirs.pooled is None) and (ours.mask is not None) == decoder.masked
        if ours.pooled is not None:
            torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=0, atol=1e-5)
        if decoder.masked:
            assert ours.mask.dtype == torch.bool and torch.equal(ours.mask, theirs.mask.bool())


def test_captions_are_a_list(decoder):
    with pytest.raises(InputError, match="captions are 'a ring'; expected a list of texts"):
        decoder.encode_text("a ring")


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("rows", [1, 3])
def test_samples_are_the_pipelines(name, decoder, rows, scale):
    family = FAMILIES[name]
    if family.guidance is None and scale > 1:
        pytest.skip("it takes no guidance without a negative prompt")
    options = {"num_inference_steps": 2} | ({family.guidance: scale} if family.guidance else {})
    captions = CAPTIONS[:rows]
    theirs = media_of(decoder, decoder.pipeline(captions, generator=generator(), **options, **family.call))
    ours = decoder.sample(decoder.encode_text(captions), generator=generator(), **options)
    same(ours, theirs)
    again = decoder.sample(decoder.encode_text(captions), generator=generator(1), **options)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(ours, again, strict=True))


def test_a_negative_condition_is_a_negative_prompt(name, decoder):
    family = FAMILIES[name]
    options = {"num_inference_steps": 2, family.negative: 4.0}
    negatives = ["ugly"] * 3
    output = decoder.pipeline(CAPTIONS, negative_prompt=negatives, generator=generator(), **options, **family.call)
    negative = decoder.encode_negative(negatives)
    ours = decoder.sample(decoder.encode_text(CAPTIONS), negative_condition=negative, generator=generator(), **options)
    same(ours, media_of(decoder, output))
    arguments = decoder.sampling_arguments({"negative_prompt": "ugly", **options}, [0, 1, 2])
    same(decoder.sample(decoder.encode_text(CAPTIONS), generator=generator(), **arguments), ours)


def test_samples_with_their_own_generators_do_not_depend_on_the_batch(name, decoder):
    condition = decoder.encode_text(CAPTIONS)
    together = decoder.sample(condition, generator=[generator(s) for s in range(3)], num_inference_steps=2)
    for row in range(3):
        alone = decoder.sample(condition[[row]], generator=[generator(row)], num_inference_steps=2)
        same(alone, together[row : row + 1])


def test_latents_are_scaled_as_the_pipeline_undoes_it(name, decoder):
    targets = decoder.targets([medium(decoder)] * 2)
    mean, _ = decoder.posterior(targets)
    latents = decoder.encode_media([medium(decoder)] * 2)
    assert latents.shape == (2, *FAMILIES[name].latents) and not latents.requires_grad
    torch.testing.assert_close(FAMILIES[name].unscale(decoder.pipeline, latents), mean, rtol=1e-4, atol=1e-5)
    drawn = decoder.encode_media(targets, [generator(0), generator(1)])
    torch.testing.assert_close(decoder.encode_media(targets[1:], [generator(1)])[0], drawn[1], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("name", FLOWS)
def test_the_loss_is_the_flows_formula_in_float64(name):
    decoder = FAMILIES[name].decoder().double()
    condition, latents = inputs(name, decoder)
    condition, latents = condition.to(dtype=torch.float64), latents.double()
    noise = torch.randn(latents.shape, generator=generator(1), dtype=torch.float64)
    timesteps = torch.tensor([900.0, 431.5, 20.0], dtype=torch.float64)
    ours = decoder.denoising_loss(condition, latents, noise=noise, timesteps=timesteps)
    expected = []
    for row in range(3):
        sigma, part = timesteps[row] / 1000, decoder.normalize_condition(condition[[row]])
        noisy = (1 - sigma) * latents[[row]] + sigma * noise[[row]]
        with torch.no_grad():
            velocity = FAMILIES[name].predict(decoder.pipeline, noisy, timesteps[[row]], part)
        expected.append((velocity - (noise[row] - latents[row])).square().mean())
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-6, atol=1e-9)


def test_gradients_reach_the_own_condition_alone(name, decoder):
    condition, latents = inputs(name, decoder)
    leaves = [None if x is None else x.clone().requires_grad_() for x in (condition.embeds, condition.pooled)]
    loss = decoder.denoising_loss(Condition(*leaves, condition.mask), latents, generator=generator())
    assert loss.shape == (3,) and loss.dtype == torch.float32
    loss[1].backward()
    for leaf in filter(lambda x: x is not None, leaves):
        assert (leaf.grad.flatten(1).norm(dim=1) > 0).tolist() == [False, True, False]
    assert all(p.grad is None for p in decoder.parameters())


def test_with_a_generator_a_sample_the_split_does_not_matter(name, decoder):
    condition, latents = inputs(name, decoder)

    def loss(rows):
        generators = [generator(100 + row) for row in range(3)[rows]]
        return decoder.denoising_loss(condition[rows], latents[rows], generator=generators)

    parts = torch.cat([loss(slice(0, 1)), loss(slice(1, 3))])
    torch.testing.assert_close(parts, loss(slice(0, 3)), rtol=1e-4, atol=1e-5)


def test_the_loss_of_stable_audio_is_its_formula_in_float64():
    decoder = FAMILIES["stable-audio"].decoder().double()
    condition, latents = (x.to(dtype=torch.float64) for x in inputs("stable-audio", decoder))
    noise = torch.randn(latents.shape, generator=generator(1), dtype=torch.float64)
    timesteps = torch.tensor([0.9, 0.4315, 0.02], dtype=torch.float64)
    ours = decoder.denoising_loss(condition, latents, noise=noise, timesteps=timesteps)
    scheduler, expected = decoder.pipeline.scheduler, []
    for row in range(3):
        part = decoder.normalize_condition(condition[[row]])
        level = torch.tan(timesteps[row] * torch.pi / 2)
        noisy = latents[[row]] + level * noise[[row]]
        given = scheduler.precondition_inputs(noisy, level)
        with torch.no_grad():
            velocity = FAMILIES["stable-audio"].predict(decoder.pipeline, given, timesteps[[row]], part)
        # what the scheduler makes of it misses x₀ by sin(πt/2) times the error of the velocity
        error = scheduler.precondition_outputs(noisy, velocity, level) - latents[[row]]
        expected.append((error / torch.sin(timesteps[row] * torch.pi / 2)).square().mean())
        torch.testing.assert_close(scheduler.precondition_noise(level), timesteps[row])
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-6, atol=1e-9)
    drawn = decoder.schedule.draw(4000, generator(), torch.device("cpu"))
    assert drawn.min() >= 0 and drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.02


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_loss_is_ddpms_formula_in_float64(name):
    decoder = FAMILIES[name].decoder().double()
    condition, latents = (x.to(dtype=torch.float64) for x in inputs(name, decoder))
    noise = torch.randn(latents.shape, generator=generator(1), dtype=torch.float64)
    timesteps = torch.tensor([999, 431, 20])
    ours = decoder.denoising_loss(condition, latents, noise=noise, timesteps=timesteps)
    config, expected = decoder.pipeline.scheduler.config, []
    power = {"linear": 1, "scaled_linear": 2}[config.beta_schedule]
    ends = (config.beta_start ** (1 / power), config.beta_end ** (1 / power))
    betas = torch.linspace(*ends, config.num_train_timesteps, dtype=torch.float64) ** power
    for row in range(3):
        a = torch.prod(1 - betas[: timesteps[row] + 1])
        noisy = a.sqrt() * latents[[row]] + (1 - a).sqrt() * noise[[row]]
        with torch.no_grad():
            made = FAMILIES[name].predict(decoder.pipeline, noisy, timesteps[[row]], condition[[row]])
        expected.append((made - noise[row]).square().mean())
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("kind", "factor"), [("exponential", math.exp), ("linear", float)])
def test_training_levels_follow_the_resolution_where_sampling_does(kind, factor):
    """FLUX draws σ from a uniform density, then shifts it as its pipeline does for the number of tokens."""
    decoder = FAMILIES["flux-dev"].decoder()
    decoder.pipeline.scheduler.register_to_config(time_shift_type=kind)
    drawn = decoder.schedule.draw(4000, generator(), torch.device("cpu"))
    assert abs(drawn.mean() / 1000 - 0.5) < 0.02
    for side, mu in ((32, 0.5), (128, 1.15)):  # 256 tokens, and 4096
        tokens = decoder.count_tokens(torch.zeros(1, 4, side, side))
        shifted = decoder.schedule.shift(drawn, tokens) / 1000
        raw = (drawn / 1000).double()
        torch.testing.assert_close(shifted.double(), factor(mu) / (factor(mu) + 1 / raw - 1), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("name", MASKED)
def test_padding_moves_nothing(name, decoders):
    decoder = decoders(name)
    condition, latents = inputs(name, decoder)
    other = Condition(torch.where(condition.mask[..., None], condition.embeds, 7.0), condition.pooled, condition.mask)
    one, two = (decoder.denoising_loss(c, latents, generator=generator()) for c in (condition, other))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    same(*(decoder.sample(c, num_inference_steps=1, generator=generator()) for c in (condition, other)))


@pytest.mark.parametrize("name", MASKED)
def test_logits_say_which_tokens_are_real(name, decoders):
    decoder = decoders(name)
    condition, latents = inputs(name, decoder)
    logits = Condition(condition.embeds, condition.pooled, torch.where(condition.mask, 0.5, -3.0))
    assert torch.equal(logits.real, condition.mask)
    one, two = (decoder.denoising_loss(c, latents, generator=generator()) for c in (condition, logits))
    assert torch.equal(one, two)
    none = Condition(
        condition.embeds, mask=torch.full(condition.mask.shape, -1.0).index_fill(1, torch.tensor([2]), -0.5)
    )
    assert none.real.nonzero().tolist() == [[0, 2], [1, 2], [2, 2]]
    with pytest.raises(InputError, match=rf"mask .* is \(3, {condition.mask.shape[1] - 1}\)"):
        decoder.sample(Condition(condition.embeds, condition.pooled, condition.mask[:, 1:]))


def test_a_mask_is_refused_where_every_token_counts(decoders):
    decoder = decoders("flux")
    condition, _ = inputs("flux", decoder)
    with pytest.raises(InputError, match="attends to every token"):
        decoder.sample(Condition(condition.embeds, condition.pooled, torch.ones(condition.embeds.shape[:2])))


@pytest.mark.parametrize("kind", ["l2", "mse", "cosine"])
def test_alignment_compares_real_tokens_alone(kind):
    condition, target = torch.randn(2, 5, 4, generator=generator()), torch.randn(2, 5, 4, generator=generator(1))
    real = torch.tensor([[True] * 5, [True, True, False, False, False]])
    ours = caption_alignment(condition, target, kind, real)
    cut = caption_alignment(condition[1:, :2], target[1:, :2], kind)
    torch.testing.assert_close(ours[1:], cut)
    torch.testing.assert_close(ours[:1], caption_alignment(condition[:1], target[:1], kind))


# ------------------------------------------------------------------------------------------------ the whole model


SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from anygpt import MultimodalModel, MultimodalProcessor
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = MultimodalModel.from_pretrained(folder)
    processor = MultimodalProcessor.from_pretrained(folder, model=model)
    options = {"thing": {"num_inference_steps": 1, "seed": 3}}
    batch = processor(llm_inputs={"text": ["a red ring"]})
    answer = model.generate(**batch, max_new_tokens=4, require=["thing"], decoder_kwargs=options).answers[0]
    np.save(folder / "made.npy", np.asarray((answer.images or answer.videos or answer.audios)[0]))
"""


def test_saved_loaded_and_generating_in_a_new_process(tmp_path):
    made = {}
    for name, family in FAMILIES.items():
        module = ModalDecoderModule(family.decoder(), num_signal_tokens=2)
        language_model = load_language_model("zoo:language_model")
        model = MultimodalModel({}, language_model, {"thing": module}, init_output_projector_type="linear").eval()
        processor = MultimodalProcessor({}, load_tokenizer("zoo:language_model"), model=model)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        options = {"thing": {"num_inference_steps": 1, "seed": 3}}
        batch = processor(llm_inputs={"text": ["a red ring"]})
        answer = model.generate(**batch, max_new_tokens=4, require=["thing"], decoder_kwargs=options).answers[0]
        made[name] = (answer.images or answer.videos or answer.audios)[0]
    done = run_forked("-c", SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, ours in made.items():
        same([np.load(tmp_path / name / "made.npy")], [np.asarray(ours)])


def test_round_trip_through_the_base_class(name, decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    again = DiffusionDecoder.from_pretrained(tmp_path)
    assert type(again) is type(decoder) and again.condition_shape == decoder.condition_shape
    saved, loaded = decoder.state_dict(), again.state_dict()
    assert list(saved) == list(loaded) and all(torch.equal(saved[key], loaded[key]) for key in saved)


def test_an_output_projector_feeds_it(name, decoder):
    module = ModalDecoderModule(decoder, num_signal_tokens=3)
    module.init_projector(in_features=6, num_layers=2, projection_type="linear")
    condition = module.condition(torch.randn(2, 3, 6, generator=generator()))
    assert (condition.mask is not None) == decoder.masked and condition.real.all()
    latents = torch.randn(2, *FAMILIES[name].latents, generator=generator())
    decoder.denoising_loss(condition, latents, generator=generator()).sum().backward()
    moved = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    heads = {n for n, p in module.named_parameters() if p.requires_grad and not n.startswith("projector.mask_head")}
    assert moved == heads and all(n.startswith("projector.") for n in moved)


# -------------------------------------------------------------------------------------------------------- bad input


def test_settings_and_options_that_cannot_be_are_refused(name, decoder):
    family, condition = FAMILIES[name], decoder.encode_text(CAPTIONS[:1])
    with pytest.raises(InputError, match=r"'x': expected logit_normal|has no weighting_scheme"):
        family.kind(family.make(), weighting_scheme="x")
    for size in decoder.size_names:
        for value in (0, -8, "big", *([7.5] if decoder.modality != "audio" else [])):
            with pytest.raises(InputError, match=f"{size} of the {decoder.modality} decoder is"):
                decoder.sample(condition, **{size: value})
    with pytest.raises(InputError, match="has no option 'steps'"):
        decoder.sample(condition, steps=3)
    if "height" in decoder.size_names:
        with pytest.raises(InputError, match=f"expected a multiple of {decoder.size_multiple}"):
            decoder.sample(condition, height=decoder.size_multiple + 4)
        with pytest.raises(InputError, match=f"expected a multiple of {decoder.size_multiple}"):
            family.kind(family.make(), height=decoder.size_multiple + 4)


def test_guidance_that_flux_would_ignore_is_refused(decoders):
    schnell, dev = decoders("flux"), decoders("flux-dev")
    condition = schnell.encode_text(CAPTIONS[:1])
    with pytest.raises(InputError, match="no guidance_embeds; true_cfg_scale guides"):
        schnell.sample(condition, guidance_scale=3.0)
    for decoder in (schnell, dev):
        with pytest.raises(InputError, match="only one of true_cfg_scale and a negative"):
            decoder.sample(condition, negative_condition=condition)
        with pytest.raises(InputError, match="only one of true_cfg_scale and a negative"):
            decoder.check_options({"true_cfg_scale": 3.0})
        with pytest.raises(InputError, match="a number above 1"):
            decoder.check_options({"true_cfg_scale": 0.5, "negative_prompt": "a"})


@pytest.mark.parametrize("name", ["ltx", "wan"])
def test_frames_that_are_not_whole_latent_frames_are_refused(name, decoders):
    decoder, family = decoders(name), FAMILIES[name]
    with pytest.raises(InputError, match=f"num_frames .* is 4; expected a multiple of {decoder.frame_multiple}, and"):
        decoder.sample(decoder.encode_text(CAPTIONS[:1]), num_frames=4)
    with pytest.raises(InputError, match="num_frames"):
        family.kind(family.make(), height=32, width=32, num_frames=4)


def test_a_wan_of_two_transformers_is_refused():
    pipeline = FAMILIES["wan"].make()
    pipeline.register_modules(transformer_2=pipeline.transformer)
    with pytest.raises(InputError, match="this is a Wan 2"):
        FAMILIES["wan"].kind(pipeline)


def test_a_perceiver_repeats_one_layer():
    sizes = {"in_features": 8, "num_signal_tokens": 2, "condition_shape": (5, 6), "d_model": 16, "ffn_dim": 32}

    def make(repetitions, **options):
        settings = {"projection_type": "perceiver", "num_attention_heads": 2, "num_decoder_layers": repetitions}
        return OutputProjector(OutputProjectorConfig(**sizes, **settings, **options))

    one, three = make(1), make(3)
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in three.parameters())
    three.load_state_dict(one.state_dict())
    states = torch.randn(4, 2, 8, generator=generator())
    assert three(states).embeds.shape == (4, 5, 6) and not torch.equal(one(states).embeds, three(states).embeds)
    lined = make(2, linear_path=True)
    torch.testing.assert_close(lined(states).embeds.flatten(1), lined.line(states.flatten(1)))
