"""The denoising loss against formulas written out in float64, and against diffusers' own training script."""

import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr

from anygpt.decoders import (
    AudioLDMDecoder,
    Condition,
    StableDiffusion3Decoder,
    StableDiffusionDecoder,
    StableDiffusionXLDecoder,
    ZeroscopeDecoder,
)
from anygpt.errors import InputError
from anygpt.losses.formulas import LossWeights
from anygpt.losses.terms import Target

KINDS = ["epsilon", "v_prediction", "sample"]
FAMILIES = {
    "sd": (StableDiffusionDecoder, tiny_pipelines.stable_diffusion, (4, 8, 8)),
    "sdxl": (StableDiffusionXLDecoder, tiny_pipelines.stable_diffusion_xl, (4, 7, 5)),
    "sd3": (StableDiffusion3Decoder, tiny_pipelines.stable_diffusion_3, (4, 6, 10)),
    "zeroscope": (ZeroscopeDecoder, tiny_pipelines.zeroscope, (4, 3, 8, 8)),
    "audioldm": (AudioLDMDecoder, tiny_pipelines.audioldm, (4, 16, 8)),
}


def random_inputs(decoder, batch_size: int, shape: tuple[int, ...]) -> tuple[Condition, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    embeds = torch.randn(batch_size, *decoder.condition_shape, generator=draw)
    pooled = None if decoder.pooled_dim is None else torch.randn(batch_size, decoder.pooled_dim, generator=draw)
    return Condition(embeds, pooled), torch.randn(batch_size, *shape, generator=draw)


def leaves(condition: Condition) -> tuple[Condition, list[torch.Tensor]]:
    """The condition with gradients, and its tensors that have them."""
    parts = [None if x is None else x.clone().requires_grad_() for x in (condition.embeds, condition.pooled)]
    return Condition(*parts), [part for part in parts if part is not None]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    cls, pipeline, shape = FAMILIES[request.param]
    decoder = cls(pipeline())
    return decoder, *random_inputs(decoder, 3, shape)


def image_decoder(kind: str = "epsilon", **scheduler) -> StableDiffusionDecoder:
    pipeline = tiny_pipelines.stable_diffusion(kind)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **scheduler)
    return StableDiffusionDecoder(pipeline)


def inputs(dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    condition, latents, noise = (torch.randn(4, *s, generator=draw).to(dtype) for s in [(12, 32), (4, 8, 8), (4, 8, 8)])
    return condition, latents, noise, torch.tensor([0, 1, 500, 999])


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind, snr_gamma):
    decoder = image_decoder(kind).double()
    condition, latents, noise, timesteps = inputs(torch.float64)
    ours = decoder.denoising_loss(condition, latents, noise=noise, timesteps=timesteps, snr_gamma=snr_gamma)

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = []
    for c, x0, e, t in zip(condition, latents, noise, timesteps, strict=True):
        a = torch.prod(1 - betas[: t + 1])
        xt = a.sqrt() * x0 + (1 - a).sqrt() * e
        with torch.no_grad():
            prediction = decoder.unet(xt[None], t, c[None]).sample[0]
        target = {"epsilon": e, "v_prediction": a.sqrt() * e - (1 - a).sqrt() * x0, "sample": x0}[kind]
        snr, weight = a / (1 - a), torch.tensor(1.0)
        if snr_gamma is not None:
            clipped = min(snr, torch.tensor(snr_gamma))
            weight = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[kind]
        expected.append(weight * ((prediction - target) ** 2).mean())
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_mean_is_what_train_text_to_image_computes(kind, snr_gamma):
    decoder = image_decoder(kind)
    condition, latents, noise, timesteps = inputs()
    ours = decoder.denoising_loss(condition, latents, noise=noise, timesteps=timesteps, snr_gamma=snr_gamma)

    scheduler = DDPMScheduler.from_config(decoder.pipeline.scheduler.config)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    prediction = decoder.unet(noisy, timesteps, condition, return_dict=False)[0]
    loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=[1, 2, 3])
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        weights = torch.stack([snr, snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
        loss = loss * (weights / snr if kind == "epsilon" else weights / (snr + 1))
    torch.testing.assert_close(ours.mean(), loss.mean(), rtol=1e-6, atol=0)


def test_the_sampling_scheduler_is_not_used():
    pipeline = tiny_pipelines.stable_diffusion()
    condition, latents, noise, timesteps = inputs()
    call = {"noise": noise, "timesteps": timesteps}
    expected = StableDiffusionDecoder(pipeline).denoising_loss(condition, latents, **call)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    decoder = StableDiffusionDecoder(pipeline)
    decoder.sample(condition, num_inference_steps=2)
    torch.testing.assert_close(decoder.denoising_loss(condition, latents, **call), expected, rtol=0, atol=0)


@pytest.mark.parametrize("scheduler", [LCMScheduler, EulerDiscreteScheduler, PNDMScheduler, DDIMScheduler])
def test_the_training_schedule_has_the_noise_levels_of_the_pipelines(scheduler):
    # Schedulers made with their defaults, which are not all DDPM's: from_config alone would swap LCM's.
    pipeline = tiny_pipelines.stable_diffusion()
    pipeline.scheduler = scheduler()
    ours = StableDiffusionDecoder(pipeline).schedule.scheduler
    torch.testing.assert_close(ours.alphas_cumprod, scheduler().alphas_cumprod, rtol=1e-5, atol=1e-7)


def test_gradients_reach_the_condition_and_nothing_else(family):
    decoder, condition, latents = family
    condition, parts = leaves(condition)
    loss = decoder.denoising_loss(condition, latents, generator=torch.Generator().manual_seed(0))
    assert loss.shape == (3,) and loss.dtype == torch.float32
    loss.sum().backward()
    assert all((part.grad.flatten(1).norm(dim=1) > 0).all() for part in parts)
    assert all(p.grad is None for p in decoder.parameters())


def test_only_an_own_condition_moves_a_sample(family):
    decoder, condition, latents = family
    condition, parts = leaves(condition)
    decoder.denoising_loss(condition, latents, generator=torch.Generator().manual_seed(0))[1].backward()
    for part in parts:
        assert (part.grad.flatten(1).norm(dim=1) > 0).tolist() == [False, True, False]


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_with_a_generator_a_sample_the_split_does_not_matter(family, snr_gamma):
    decoder, condition, latents = family
    if snr_gamma is not None and isinstance(decoder, StableDiffusion3Decoder):
        with pytest.raises(InputError, match="flow matching, where snr_gamma has no meaning"):
            decoder.denoising_loss(condition, latents, snr_gamma=snr_gamma)
        return

    def loss(rows):
        generators = [torch.Generator().manual_seed(100 + row) for row in range(3)[rows]]
        return decoder.denoising_loss(condition[rows], latents[rows], generator=generators, snr_gamma=snr_gamma)

    parts = [loss(slice(0, 1)), loss(slice(1, 3))]
    torch.testing.assert_close(torch.cat(parts), loss(slice(0, 3)), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="1 generators for 3 samples"):
        decoder.denoising_loss(condition, latents, generator=[torch.Generator()])


def test_one_generator_is_reproducible_and_none_draws_anew(family):
    decoder, condition, latents = family
    a, b = (decoder.denoising_loss(condition, latents, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(decoder.denoising_loss(condition, latents), decoder.denoising_loss(condition, latents))


def test_timesteps_cover_the_schedule():
    drawn = image_decoder().schedule.draw(20000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert drawn.min() == 0 and drawn.max() == 999 and abs(drawn.float().mean() - 499.5) < 10


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_recomputes_and_changes_nothing(name):
    cls, pipeline, shape = FAMILIES[name]
    decoder = cls(pipeline())
    condition, latents = random_inputs(decoder, 2, shape)
    calls = []
    net = decoder.denoiser
    block = net.transformer_blocks[-1].attn if name == "sd3" else net.up_blocks[-1].resnets[-1]
    block.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradient():
        calls.clear()
        leaf, parts = leaves(condition)
        decoder.denoising_loss(leaf, latents, generator=torch.Generator().manual_seed(0)).sum().backward()
        return [part.grad for part in parts]

    expected = gradient()
    assert len(calls) == 1
    for _ in range(2):
        decoder.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), expected)
    assert len(calls) == 2


def test_schedules_that_cannot_be_trained_with_are_refused():
    condition, latents, *_ = inputs()
    pipeline = tiny_pipelines.stable_diffusion()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler is configured for flow"):
        StableDiffusionDecoder(pipeline).denoising_loss(condition, latents)
    with pytest.raises(InputError, match="configured for flow matching"):
        image_decoder(prediction_type="flow_prediction").denoising_loss(condition, latents)
    with pytest.raises(InputError, match="or continuous noise levels"):
        pipeline.scheduler = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
        StableDiffusionDecoder(pipeline).denoising_loss(condition, latents)
    with pytest.raises(InputError, match=r"'x0', expected one of epsilon, v_prediction, sample"):
        image_decoder(prediction_type="x0").denoising_loss(condition, latents)


def test_min_snr_at_zero_terminal_snr():
    condition, latents, noise, timesteps = inputs()
    call = {"noise": noise, "timesteps": timesteps, "snr_gamma": 5.0}
    with pytest.raises(InputError, match="zero terminal SNR"):
        image_decoder(rescale_betas_zero_snr=True).denoising_loss(condition, latents, **call)
    loss = image_decoder("v_prediction", rescale_betas_zero_snr=True).denoising_loss(condition, latents, **call)
    assert loss.isfinite().all() and loss[-1] == 0


@pytest.mark.parametrize("snr_gamma", [0, -1.0, float("nan"), "5"])
def test_a_gamma_of_nothing_is_refused(snr_gamma):
    condition, latents, *_ = inputs()
    with pytest.raises(InputError, match=rf"snr_gamma is '?{snr_gamma}'?, expected a number above 0"):
        image_decoder().denoising_loss(condition, latents, snr_gamma=snr_gamma)


@pytest.mark.parametrize("wrong", [[0, -1, 5, 9], [0, 1000, 5, 9], [0.0, 1.5, 5.0, 9.0], [0.0, float("nan"), 1, 1]])
def test_timesteps_beyond_the_schedule_are_refused(wrong):
    condition, latents, *_ = inputs()
    with pytest.raises(InputError, match="expected whole numbers from 0 to 999 for diffusion"):
        image_decoder().denoising_loss(condition, latents, timesteps=torch.tensor(wrong))
    decoder = StableDiffusion3Decoder(tiny_pipelines.stable_diffusion_3())
    for timesteps in ([-1.0, 1, 1, 1], [1, 1000.5, 1, 1]):
        with pytest.raises(InputError, match=r"expected numbers from 0 to 1000\.0 for flow matching"):
            decoder.denoising_loss(*random_inputs(decoder, 4, (4, 6, 10)), timesteps=torch.tensor(timesteps))


def test_noise_and_timesteps_of_another_shape_are_refused():
    condition, latents, noise, timesteps = inputs()
    with pytest.raises(InputError, match=r"timesteps are \(1,\), expected one per sample: \(4,\)"):
        image_decoder().denoising_loss(condition, latents, timesteps=timesteps[:1])
    with pytest.raises(InputError, match=r"noise is \(4, 4, 8, 4\), expected the latents' shape \(4, 4, 8, 8\)"):
        image_decoder().denoising_loss(condition, latents, noise=noise[..., :4])


# ---- Stable Diffusion XL: two encoders, pooled condition, sizes


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_the_mean_is_what_train_text_to_image_sdxl_computes(snr_gamma):
    decoder = StableDiffusionXLDecoder(tiny_pipelines.stable_diffusion_xl())
    condition, latents = random_inputs(decoder, 3, (4, 7, 5))
    noise, timesteps = (
        torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)),
        torch.tensor([3, 400, 999]),
    )
    ours = decoder.denoising_loss(condition, latents, noise=noise, timesteps=timesteps, snr_gamma=snr_gamma)

    def compute_time_ids(original_size, crops_coords_top_left, target_size=(14, 10)):
        return torch.tensor([list(original_size + crops_coords_top_left + target_size)], dtype=torch.float32)

    scheduler = DDPMScheduler.from_config(decoder.pipeline.scheduler.config)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    added = {
        "text_embeds": condition.pooled,
        "time_ids": torch.cat([compute_time_ids((14, 10), (0, 0)) for _ in range(3)]),
    }
    prediction = decoder.unet(noisy, timesteps, condition.embeds, added_cond_kwargs=added, return_dict=False)[0]
    loss = F.mse_loss(prediction.float(), noise.float(), reduction="none").mean(dim=[1, 2, 3])
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        loss = loss * torch.stack([snr, snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr
    torch.testing.assert_close(ours.mean(), loss.mean(), rtol=1e-6, atol=0)


# ---- Stable Diffusion 3: flow matching


def flow_inputs(decoder):
    condition, latents = random_inputs(decoder, 4, (4, 6, 10))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    return condition, latents, noise, decoder.schedule.scheduler.timesteps[[0, 250, 700, 999]]


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "cosmap", "sigma_sqrt", "none"])
@pytest.mark.parametrize("precondition_outputs", [0, 1])
def test_flow_matching_is_what_train_dreambooth_lora_sd3_computes(scheme, precondition_outputs):
    decoder = StableDiffusion3Decoder(tiny_pipelines.stable_diffusion_3(), weighting_scheme=scheme)
    condition, model_input, noise, timesteps = flow_inputs(decoder)
    ours = decoder.denoising_loss(condition, model_input, noise=noise, timesteps=timesteps)

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(decoder.pipeline.scheduler.config)
    sigmas = scheduler.sigmas[[(scheduler.timesteps == t).nonzero().item() for t in timesteps]].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * model_input + sigmas * noise
    prediction = decoder.transformer(noisy, condition.embeds, condition.pooled, timesteps, return_dict=False)[0]
    target = noise - model_input
    if precondition_outputs:
        prediction, target = prediction * (-sigmas) + noisy, model_input
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas)
    loss = torch.mean((weighting.float() * (prediction.float() - target.float()) ** 2).reshape(4, -1), 1)
    # with preconditioned outputs, the script's loss has another weight a sample and is the same otherwise
    expected = ours * sigmas.flatten() ** 2 if precondition_outputs else ours
    torch.testing.assert_close(expected, loss, rtol=1e-4, atol=1e-6)
    if not precondition_outputs:
        torch.testing.assert_close(ours.mean(), loss.mean(), rtol=1e-6, atol=0)


def test_the_flow_in_float64():
    decoder = StableDiffusion3Decoder(tiny_pipelines.stable_diffusion_3()).double()
    condition, latents, noise, timesteps = flow_inputs(decoder)
    condition, latents, noise = condition.to(dtype=torch.float64), latents.double(), noise.double()
    ours = decoder.denoising_loss(condition, latents, noise=noise, timesteps=timesteps.double())
    expected = []
    for row in range(4):
        t = timesteps[row].double()
        x = (1 - t / 1000) * latents[row] + t / 1000 * noise[row]
        part = condition[[row]]
        with torch.no_grad():
            velocity = decoder.transformer(x[None], part.embeds, part.pooled, t[None]).sample[0]
        expected.append(((velocity - (noise[row] - latents[row])) ** 2).mean())
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-6, atol=0)


def test_the_flows_timesteps_have_the_density_of_the_training_script():
    decoder = StableDiffusion3Decoder(tiny_pipelines.stable_diffusion_3())
    drawn = decoder.schedule.draw(20000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert drawn.dtype == torch.float32 and drawn.min() > 0 and drawn.max() <= 1000
    # σ' = 3σ / (1 + 2σ) undone; the schedule runs from σ = 1 down, in steps of 1/1000
    sigma = (drawn / 1000).double()
    logit = torch.logit((sigma / (3 - 2 * sigma)).clamp(1e-3, 1 - 1e-3))
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1) < 0.03
    a, b = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    together = decoder.schedule.draw(2, [a, b], torch.device("cpu"))
    alone = [decoder.schedule.draw(1, torch.Generator().manual_seed(seed), torch.device("cpu")) for seed in (1, 2)]
    assert torch.equal(together, torch.cat(alone))


def test_every_scheme_draws_timesteps_of_the_schedule_and_an_unknown_one_is_refused():
    pipeline = tiny_pipelines.stable_diffusion_3()
    for scheme in ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none"):
        decoder = StableDiffusion3Decoder(pipeline, weighting_scheme=scheme)
        drawn = decoder.schedule.draw(500, torch.Generator().manual_seed(0), torch.device("cpu"))
        assert torch.isin(drawn, decoder.schedule.scheduler.timesteps).all() and len(drawn.unique()) > 200
    with pytest.raises(InputError, match="'uniform': expected logit_normal, mode"):
        StableDiffusion3Decoder(pipeline, weighting_scheme="uniform")


def test_the_flows_sampling_schedule_is_not_used():
    pipeline = tiny_pipelines.stable_diffusion_3()
    decoder = StableDiffusion3Decoder(pipeline)
    condition, latents, noise, timesteps = flow_inputs(decoder)
    call = {"noise": noise, "timesteps": timesteps}
    expected, levels = decoder.denoising_loss(condition, latents, **call), decoder.schedule.scheduler.sigmas.clone()
    decoder.sample(condition, num_inference_steps=2)
    assert len(pipeline.scheduler.sigmas) != len(levels)
    for scheduler in (
        pipeline.scheduler,
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ):
        pipeline.scheduler = scheduler
        again = StableDiffusion3Decoder(pipeline)
        torch.testing.assert_close(again.schedule.scheduler.sigmas, levels, rtol=0, atol=0)
        torch.testing.assert_close(again.denoising_loss(condition, latents, **call), expected, rtol=0, atol=0)
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(InputError, match="DDIMScheduler is not configured for it"):
        StableDiffusion3Decoder(pipeline).denoising_loss(condition, latents)


def test_denoising_learns_samples_of_the_posterior_or_its_mode():
    """From media and from what the feature cache keeps of them."""
    decoder = image_decoder()
    height, width = decoder.height, decoder.width
    media = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean, std = decoder.posterior(media)
    for given in ({"media": media}, {"posterior": torch.stack([mean, std], dim=1)}):
        for latents, noise in (("samples", 1), ("mode", 0)):
            generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            drawn = torch.cat([torch.randn(mean[:1].shape, generator=generator) for generator in generators])
            generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            target = Target("image", torch.arange(2), given, decoder, LossWeights(latents=latents), None, generators)
            torch.testing.assert_close(target.latents, decoder.scale_latents(mean + noise * std * drawn))
