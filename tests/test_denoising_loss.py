"""The denoising loss against formulas written out in float64, and against diffusers' own training script."""

import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_snr

from anygpt.decoders import AudioLDMDecoder, StableDiffusionDecoder, ZeroscopeDecoder
from anygpt.errors import InputError

KINDS = ["epsilon", "v_prediction", "sample"]
FAMILIES = {
    "image": (StableDiffusionDecoder, tiny_pipelines.stable_diffusion, (4, 8, 8)),
    "video": (ZeroscopeDecoder, tiny_pipelines.zeroscope, (4, 3, 8, 8)),
    "audio": (AudioLDMDecoder, tiny_pipelines.audioldm, (4, 16, 8)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    cls, pipeline, shape = FAMILIES[request.param]
    decoder = cls(pipeline())
    batch = torch.Generator().manual_seed(0)
    condition = torch.randn(3, *decoder.condition_shape, generator=batch)
    return decoder, condition, torch.randn(3, *shape, generator=batch)


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
    ours = StableDiffusionDecoder(pipeline).training_schedule
    torch.testing.assert_close(ours.alphas_cumprod, scheduler().alphas_cumprod, rtol=1e-5, atol=1e-7)


def test_gradients_reach_the_condition_and_nothing_else(family):
    decoder, condition, latents = family
    condition = condition.clone().requires_grad_()
    loss = decoder.denoising_loss(condition, latents, generator=torch.Generator().manual_seed(0))
    assert loss.shape == (3,) and loss.dtype == torch.float32
    loss.sum().backward()
    assert (condition.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad is None for p in decoder.parameters())


def test_only_an_own_condition_moves_a_sample(family):
    decoder, condition, latents = family
    condition = condition.clone().requires_grad_()
    decoder.denoising_loss(condition, latents, generator=torch.Generator().manual_seed(0))[1].backward()
    reached = condition.grad.flatten(1).norm(dim=1) > 0
    assert reached.tolist() == [False, True, False]


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_with_a_generator_a_sample_the_split_does_not_matter(family, snr_gamma):
    decoder, condition, latents = family

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
    drawn = image_decoder().draw_timesteps(20000, torch.Generator().manual_seed(0))
    assert drawn.min() == 0 and drawn.max() == 999 and abs(drawn.float().mean() - 499.5) < 10


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_recomputes_and_changes_nothing(name):
    cls, pipeline, shape = FAMILIES[name]
    decoder = cls(pipeline())
    draw = torch.Generator().manual_seed(0)
    condition, latents = (
        torch.randn(2, *decoder.condition_shape, generator=draw),
        torch.randn(2, *shape, generator=draw),
    )
    calls = []
    decoder.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradient():
        calls.clear()
        leaf = condition.clone().requires_grad_()
        decoder.denoising_loss(leaf, latents, generator=torch.Generator().manual_seed(0)).sum().backward()
        return leaf.grad

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
    with pytest.raises(InputError, match=r"'x0', expected one of epsilon, v_prediction, sample"):
        image_decoder(prediction_type="x0").denoising_loss(condition, latents)


def test_min_snr_at_zero_terminal_snr():
    condition, latents, noise, timesteps = inputs()
    call = {"noise": noise, "timesteps": timesteps, "snr_gamma": 5.0}
    with pytest.raises(InputError, match="zero terminal SNR"):
        image_decoder(rescale_betas_zero_snr=True).denoising_loss(condition, latents, **call)
    loss = image_decoder("v_prediction", rescale_betas_zero_snr=True).denoising_loss(condition, latents, **call)
    assert loss.isfinite().all() and loss[-1] == 0


def test_noise_of_another_shape_is_refused():
    condition, latents, noise, _ = inputs()
    with pytest.raises(InputError, match=r"noise is \(4, 4, 8, 4\), expected the latents' shape \(4, 4, 8, 8\)"):
        image_decoder().denoising_loss(condition, latents, noise=noise[..., :4])
