"""Decoders that edit a reference, and others that start from one: samples, losses, data, generation, bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_pipelines
import torch
from accelerate import Accelerator
from decoder_families import CAPTIONS
from diffusers import AutoPipelineForImage2Image
from PIL import Image
from training_utils import REPOSITORY, run_forked

from anygpt import (
    ModalDecoderModule,
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProcessor,
    load_encoder,
    load_language_model,
)
from anygpt.chat.chat_model import ChatModel, Settings
from anygpt.data.collation import BAD, Collator
from anygpt.data.dataset import ConversationDataset
from anygpt.data.formats.base import DataSource
from anygpt.data.lengths import Lengths
from anygpt.data.schema import MediaRoot, parse_sample
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
from anygpt.encoders.loading import load_encoder_processor
from anygpt.errors import InputError
from anygpt.evaluation.run import evaluate
from anygpt.evaluation.suite import read_suite
from anygpt.generation.answering import SpanStates, assemble
from anygpt.losses.formulas import LossWeights
from anygpt.losses.terms import Target
from anygpt.model.language_models import load_tokenizer
from anygpt.toyworld import edits, language
from anygpt.training.config import parse_config
from anygpt.training.loading import use_frames_of
from anygpt.training.stages import INSTRUCTION_TUNING
from anygpt.training.trainer import train

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
        options |= {"guidance_scale": scale} | ({"image_guidance_scale": 1.7} if scale > 1 else {})
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


# ---------------------------------------------------------------------------------------------------- data and chat


def conversation(**source) -> dict:
    """A picture that is described, a sound's picture, and an edit."""
    said = {"type": "text", "text": "Here it is."}
    return {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "Draw a ring."}]},
            {"role": "assistant", "content": [said, {"type": "image", "path": "b.png", "caption": "a ring"} | source]},
            {"role": "user", "content": "Make it blue."},
            {"role": "assistant", "content": [said, {"type": "image", "path": "c.png", "caption": "a blue ring"}]},
        ]
    }


@pytest.fixture
def folder(tmp_path):
    for name, image in zip("abc", pictures(3, (16, 16)), strict=True):
        image.save(tmp_path / f"{name}.png")
    return tmp_path


def read(folder, *rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ConversationDataset.from_files([DataSource(str(folder / "rows.jsonl"))], on_bad_sample="error")


def composed(decoder):
    """A model that reads pictures and makes them."""
    encoders = {"image": ModalEncoderModule(load_encoder("zoo:image_encoder", "image"))}
    module = ModalDecoderModule(decoder, num_signal_tokens=2)
    language_model = load_language_model("zoo:language_model")
    model = MultimodalModel(encoders, language_model, {"image": module}, init_output_projector_type="linear").eval()
    processors = {"image": load_encoder_processor("zoo:image_encoder", "image")}
    return model, MultimodalProcessor(processors, load_tokenizer("zoo:language_model"), model=model)


def test_a_target_names_its_source_or_edits_the_last_medium_of_its_type(made, folder):
    decoder = made("pix2pix")
    _, processor = composed(decoder)
    alone = {"messages": [{"role": "user", "content": "Draw."}, conversation()["messages"][1]]}
    rows = read(folder, conversation(), conversation() | {"messages": conversation()["messages"][:2]}, alone)
    use_frames_of(rows, processor)
    assert rows.references == {"image"}
    a, b, _ = decoder.targets([Image.open(folder / f"{name}.png") for name in "abc"])
    batch = Collator(processor)([rows[0], rows[1], rows[2]])
    references = batch["decoder_targets"]["image"]["references"]
    torch.testing.assert_close(references, torch.stack([a, b, a, torch.zeros_like(a)]))
    assert Collator(processor)([rows[2]])["decoder_targets"]["image"].keys() == {"captions", "media"}
    named = conversation()
    named["messages"][3]["content"][1]["source"] = 0
    rows = read(folder, named)
    use_frames_of(rows, processor)
    rows.samples = [sample.fed_back({"image"}) for sample in rows.samples]  # which does not move what it names
    references = Collator(processor)([rows[0]])["decoder_targets"]["image"]["references"]
    torch.testing.assert_close(references, torch.stack([a, a]))
    assert rows[0].first_messages(2).references["image"] == rows[0].references["image"][:1]


def test_bad_sources_are_named_by_row(folder):
    sound = {"type": "audio", "path": "a.wav", "caption": "a ring"}
    said = {"role": "assistant", "content": [sound, {"type": "image", "path": "b.png", "caption": "a", "source": 0}]}
    wrong = {
        "rows.jsonl:1 .* medium 1 has the source 1, which does not come before it": conversation(source=1),
        "rows.jsonl:1 .* medium 1 has the source 7, which does not come before it": conversation(source=7),
        r"content\[1\]: 'source' is -1": conversation(source=-1),
        "'source' is 'a.png'": conversation(source="a.png"),
        "rows.jsonl:1 .* medium 1 has the source 0, which is no image but a medium of type 'audio'": {
            "messages": [{"role": "user", "content": "a"}, said]
        },
        "which only a target": {
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": "a.png", "source": 0}]},
                {"role": "assistant", "content": "b"},
            ]
        },
        "'source' is not known": {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "text", "text": "b", "source": 0}]},
            ]
        },
    }
    for message, row in wrong.items():
        with pytest.raises(InputError, match=message):
            read(folder, row)


def test_a_source_for_a_decoder_that_takes_none_is_refused(made, folder):
    _, processor = composed(made("sd"))
    rows = read(folder, conversation(source=0), conversation())
    use_frames_of(rows, processor)
    batch = Collator(processor)([rows[0], rows[1]])
    (bad,) = batch[BAD]
    assert "rows.jsonl:1" in bad.reason and "the decoder takes no reference" in bad.reason
    assert "references" not in batch["decoder_targets"]["image"]
    with pytest.raises(InputError, match=r"rows.jsonl:1.*the decoder takes no reference"):
        Lengths(processor).of(rows.samples[0])  # of --check and validate-data
    with pytest.raises(InputError, match="this decoder takes none"):
        processor(llm_inputs={"text": "a"}, decoder_targets={"image": {"references": pictures(1, (8, 8))}})


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_references_are_dropped_where_the_decoder_trains(made, share):
    decoder, given = made("pix2pix"), torch.ones(200, 3, 4, 4)
    generators = [generator(seed) for seed in range(200)]
    for weights, dropped in (
        (LossWeights(reference_dropout=share), 0),
        (LossWeights(decoder=1, reference_dropout=share), share),
    ):
        target = Target("image", torch.arange(200), {"references": given}, decoder, weights, generator=generators)
        kept = target.reference.flatten(1).all(dim=1)
        assert abs(kept.float().mean() - (1 - dropped)) < 0.1 and not target.reference[~kept].any()


def answer(model, processor, messages, **options):
    batch = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    options = {"image": {"num_inference_steps": 1, "seed": 3} | options}
    return model.generate(**batch, max_new_tokens=12, require=["image"], decoder_kwargs=options).answers


def test_generation_edits_the_last_picture_of_the_conversation(made):
    """In a batch of one that shows several, one that shows none, and one that the model made."""
    decoder = made("pix2pix")
    decoder.unet.conv_in.weight.data[:, 4:] *= 5
    model, processor = composed(decoder)
    first, last, _ = pictures(3, (16, 16))
    shown = [{"role": "user", "content": [{"type": "image", "image": one} for one in (first, last)]}]
    none = [{"role": "user", "content": "Draw a ring."}]
    again = [
        *none,
        {"role": "assistant", "content": [{"type": "image", "image": last}]},
        {"role": "user", "content": "Blue."},
    ]
    calls = []
    call = decoder.call_pipeline
    decoder.call_pipeline = lambda **given: calls.append(given.get("reference")) or call(**given)
    try:
        answers = answer(model, processor, [shown, none, again])
    finally:
        del decoder.call_pipeline
    with_one, without = sorted(calls, key=lambda one: one is None)
    assert without is None and with_one == [last, last]
    for row, messages in enumerate((shown, none, again)):
        same(answers[row].images, answer(model, processor, [messages])[0].images)
    batch = processor.apply_chat_template(shown, tokenize=True, add_generation_prompt=True)
    assert batch["references"] == {"image": [last]}
    model(**batch)  # where references have no use


def test_a_second_picture_of_an_answer_edits_the_first(made):
    decoder = made("pix2pix")
    model, processor = composed(decoder)
    (shown,) = pictures(1, (16, 16))
    spans = [SpanStates(0, start, "image", torch.randn(2, 128, generator=generator(start))) for start in (0, 2)]
    ids = torch.tensor([processor.signal_token_ids["image"] * 2])
    options = {"image": {"num_inference_steps": 1, "seed": 3}}
    one, two = assemble(model, ids, spans, options, references={"image": [shown]})[0].images
    module, arguments = model.decoders["image"], {"num_inference_steps": 1, "generator": [generator(4)]}
    condition = module.condition(spans[1].states[None])
    same([two], module.module.sample(condition, reference=[one], **arguments))


def test_a_strength_starts_from_the_last_picture(made):
    model, processor = composed(made("sd"))
    one = pictures(1, (16, 16))[0]

    def draw(image, **options):
        shown = [{"role": "user", "content": [{"type": "image", "image": image}]}]
        return np.asarray(answer(model, processor, shown, num_inference_steps=4, **options)[0].images[0], float)

    assert np.abs(draw(one) - one).mean() > np.abs(draw(one, strength=0.3) - draw(one)).mean() > 0
    model.decoders["image"].defaults = {"strength": 0.3}
    assert (draw(one) == draw(one, strength=0.3)).all()


SCRIPT = """
import sys, numpy as np
from PIL import Image
from anygpt import MultimodalModel, MultimodalProcessor
for name in sys.argv[2:]:
    final = f"{sys.argv[1]}/{name}/run/final"
    model = MultimodalModel.from_pretrained(final)
    processor = MultimodalProcessor.from_pretrained(final, model=model)
    shown = [{"role": "user", "content": [{"type": "image", "image": Image.open(f"{sys.argv[1]}/a.png")}]}]
    batch = processor.apply_chat_template(shown, tokenize=True, add_generation_prompt=True)
    options = {"image": {"num_inference_steps": 1, "seed": 3}}
    answer = model.generate(**batch, max_new_tokens=12, require=["image"], decoder_kwargs=options).answers[0]
    np.save(f"{sys.argv[1]}/{name}.npy", np.asarray(answer.images[0]))
"""


def test_stage_3_trains_saves_and_generates_in_a_new_process(folder):
    """Rows with references and without, and a chat with what was trained."""
    read(folder, conversation(), conversation(source=0))
    linear, made = {"projector": {"projection_type": "linear"}}, {}
    for name in ("pix2pix", "kontext"):
        kind, pipeline = EDITING[name]
        settings = {} if name == "pix2pix" else {"max_sequence_length": 8}
        kind(pipeline(), **settings).save_pretrained(folder / name / "decoder")
        decoder = {"path": str(folder / name / "decoder"), "num_signal_tokens": 2, **linear}
        arguments = {
            "run.output_dir": str(folder / name / "run"),
            "run.device": "cpu",
            "model.encoders": json.dumps({"image": {"path": "zoo:image_encoder", **linear}}),
            "model.language_model.path": "zoo:language_model",
            "model.decoders": json.dumps({"image": decoder}),
            "data.train": json.dumps([{"path": str(folder / "rows.jsonl")}]),
            "train.batch_size": 2,
            "train.max_steps": 2,
        }
        final = train(parse_config([f"--{name}={value}" for name, value in arguments.items()]), INSTRUCTION_TUNING)
        chat = ChatModel(final)
        assert chat.processor.targets["image"].reference
        steps = {"image": {"num_inference_steps": 1}}
        settings = Settings(max_new_tokens=12, seed=3, require=("image",), decoder_kwargs=steps)
        image = Image.open(folder / "a.png")
        shown, turned = (
            [{"role": "user", "content": [{"type": "image", "image": one}]}] for one in (image, image.rotate(90))
        )
        made[name] = chat.answer(shown, settings).answer.images
        assert (np.asarray(chat.answer(turned, settings).answer.images[0]) != np.asarray(made[name][0])).any()
    done = run_forked("-c", SCRIPT, folder, *made)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, ours in made.items():
        same(ours, [np.load(folder / f"{name}.npy")])


# -------------------------------------------------------------------------------------------------------- bad input


def test_a_strength_of_sana_runs_its_schedule_from_a_later_step():
    """Equal to a loop over the scheduler's last steps; and a later call without is as before."""
    decoder, steps = SanaDecoder(tiny_pipelines.sana()), 5
    condition = decoder.encode_text(CAPTIONS[:2])
    options = {"num_inference_steps": steps, "guidance_scale": 1.0}
    before = latents_of(decoder, condition, **options, generator=generator())
    shown, told = pictures(2, (decoder.height, decoder.width)), []
    given = {"reference": shown, "strength": 0.6, "on_step": lambda step, all_steps: told.append((step, all_steps))}
    ours = latents_of(decoder, condition, **options, **given, generator=generator())
    assert told == [(1, 3), (2, 3), (3, 3)]
    scheduler = type(decoder.pipeline.scheduler).from_config(decoder.pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(2)
    latents = decoder.encode_media(shown)
    noise = torch.randn(latents.shape, generator=generator())
    latents = scheduler.add_noise(latents, noise, scheduler.timesteps[2:3].expand(2))
    for timestep in scheduler.timesteps[2:]:
        prediction = decoder.predict(latents, timestep.expand(2), condition)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(ours, latents / decoder.vae.config.scaling_factor, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(latents_of(decoder, condition, **options, generator=generator()), before)
    again = latents_of(decoder, condition, **options, **given, generator=[generator(1), generator(2)])
    alone = latents_of(decoder, condition[[1]], **options, **given | {"reference": shown[1:]}, generator=generator(2))
    torch.testing.assert_close(again[1:], alone, atol=1e-5, rtol=1e-5)


def test_options_that_cannot_be_are_refused(made):
    sd, editor, kontext = made("sd"), made("pix2pix"), made("kontext, undistilled")
    condition, shown = sd.encode_text(CAPTIONS[:1]), pictures(1, (16, 16))
    for strength in (-0.5, 0, 1.01, float("nan"), "half"):
        with pytest.raises(InputError, match=r"strength of the image decoder is .* expected a number above 0, up to 1"):
            sd.sample(condition, reference=shown, strength=strength)
    with pytest.raises(InputError, match=r"strength 0.1 of 5 steps is less than one step"):
        sd.sample(condition, reference=shown, strength=0.1, num_inference_steps=5)
    with pytest.raises(InputError, match="takes no reference"):
        sd.sample(condition, reference=shown)
    with pytest.raises(InputError, match="takes no reference"):
        sd.denoising_loss(condition, torch.zeros(1, 4, 8, 8), reference=torch.zeros(1, 3, 16, 16))
    with pytest.raises(InputError, match="takes no reference"):
        ZeroscopeDecoder(tiny_pipelines.zeroscope()).sample(torch.zeros(1, 10, 24), reference=[None])
    for decoder in (editor, kontext):
        with pytest.raises(InputError, match="has no option 'strength'"):
            decoder.check_options({"strength": 0.5})
    with pytest.raises(InputError, match="2 references for 1 samples"):
        editor.sample(condition, reference=shown * 2)
    with pytest.raises(InputError, match="image 0 is a str, expected a PIL image"):
        editor.sample(condition, reference=["a.png"])
    for decoder in (editor, kontext):
        with pytest.raises(InputError, match=f"expected a multiple of {decoder.size_multiple}"):
            decoder.sample(decoder.encode_text(CAPTIONS[:1]), reference=shown, height=decoder.size_multiple + 2)
    for scale in (0.5, -1, "much"):
        with pytest.raises(InputError, match=r"image_guidance_scale of the image decoder is .* a number from 1"):
            editor.check_options({"image_guidance_scale": scale})
    with pytest.raises(InputError, match="no guidance_embeds; true_cfg_scale guides"):
        kontext.check_options({"guidance_scale": 3.0})
    assert "guidance_scale" not in kontext.pipeline_options  # the page has a slider for each


def test_references_of_a_generation_are_one_a_row_for_a_decoder_that_could_use_them(made):
    model, processor = composed(made("pix2pix"))
    batch = processor.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True, add_generation_prompt=True)
    (shown,) = pictures(1, (16, 16))
    for wrong, message in (
        ({"image": [shown, None]}, "for 1 rows; expected .* one per row"),
        ({"image": shown}, "one per row"),
        ({"image": None}, "one per row"),
        ([shown], "expected {decoder key"),
        ({"picture": [shown]}, "references name the decoder 'picture'; there are"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(**batch, max_new_tokens=4, references=wrong)
    for options in (None, ["height"], 3):
        with pytest.raises(InputError, match=r"expected \{decoder key: \{option: value\}\}"):
            model.generate(**batch, max_new_tokens=4, decoder_kwargs={"image": options})
    for name in ("generator", "negative_condition"):
        with pytest.raises(InputError, match=f"{name} of the image decoder is 'x'"):
            model.generate(**batch, max_new_tokens=4, decoder_kwargs={"image": {name: "x"}})
    targets = {"captions": ["a"], "images": [shown]}
    for references in ([shown] * 2, [], shown):
        with pytest.raises(InputError, match="one for each target"):
            processor(llm_inputs={"text": "a"}, decoder_targets={"image": targets | {"references": references}})
    module = ModalDecoderModule(ZeroscopeDecoder(tiny_pipelines.zeroscope()), num_signal_tokens=2)
    language_model = load_language_model("zoo:language_model")
    model = MultimodalModel({}, language_model, {"video": module}, init_output_projector_type="linear")
    batch.pop("references", None)
    with pytest.raises(InputError, match="ZeroscopeDecoder takes no reference"):
        model.generate(**batch, max_new_tokens=4, references={"video": [[shown]]})


def test_what_is_given_one_a_medium_goes_to_its_medium(made):
    """Also where rows with a reference and rows without one run by themselves."""
    model, processor = composed(made("sd"))
    said = [[{"role": "user", "content": "a"}]] * 2
    batch = processor.apply_chat_template(said, tokenize=True, add_generation_prompt=True)
    batch["references"] = {"image": [None, *pictures(1, (16, 16))]}

    def draw(**options):
        options |= {"strength": 0.5, "num_inference_steps": 2}
        output = model.generate(**batch, max_new_tokens=4, require=["image"], decoder_kwargs={"image": options})
        return [np.asarray(answer.images[0]) for answer in output.answers]

    negative = made("sd").encode_text(["b", "c"])
    ours = draw(generator=[generator(3), generator(4)], negative_condition=negative)
    same(ours, draw(seed=[3, 4], negative_condition=negative))
    assert not np.array_equal(ours[0], draw(seed=[3, 4], negative_condition=negative[[1, 0]])[0])
    with pytest.raises(InputError, match="generator of image holds 3 for 2 media"):
        draw(generator=[generator()] * 3)


def test_options_of_a_request_are_checked_over_the_defaults(made):
    module = ModalDecoderModule(made("sd"), num_signal_tokens=2, defaults={"strength": 0.2, "num_inference_steps": 20})
    with pytest.raises(InputError, match=r"strength 0.2 of 2 steps is less than one step"):
        module.check_options({"num_inference_steps": 2})
    module = ModalDecoderModule(made("flux"), defaults={"true_cfg_scale": 3.0, "negative_prompt": "a"})
    module.check_options({"negative_prompt": "b"})
    module = ModalDecoderModule(made("pix2pix"), defaults={"negative_prompt": "a", "image_guidance_scale": 2.0})
    module.check_options({"guidance_scale": 1.0})  # which goes without what the defaults guide by
    assert module.options({"guidance_scale": 1.0}) == {"guidance_scale": 1.0}
    with pytest.raises(InputError, match="image_guidance_scale of the image decoder would have no effect"):
        module.check_options({"guidance_scale": 1.0, "image_guidance_scale": 2.0})


@pytest.mark.parametrize("settings", [{"height": 0}, {"width": 0}, {"height": "16"}, {"height": 20}])
def test_a_size_of_nothing_is_refused_and_not_the_default(settings):
    with pytest.raises(InputError, match="expected a multiple of 8"):
        StableDiffusionDecoder(tiny_pipelines.stable_diffusion(), **settings)
    with pytest.raises(InputError, match="num_frames of the video decoder is 0"):
        ZeroscopeDecoder(tiny_pipelines.zeroscope(), num_frames=0)
    with pytest.raises(InputError, match="max_sequence_length is 0"):
        SanaDecoder(tiny_pipelines.sana(), max_sequence_length=0)
    for kind, make in (STARTING["sd3"], STARTING["flux"]):
        with pytest.raises(InputError, match="max_sequence_length is 600; expected a number of tokens up to 512"):
            kind(make(), max_sequence_length=600)
    for rate in (0, -3, float("nan"), "24"):
        with pytest.raises(InputError, match=f"frame_rate is '?{rate}'?, expected a number above 0"):
            ZeroscopeDecoder(tiny_pipelines.zeroscope(), frame_rate=rate)


# --------------------------------------------------------------------------------------------------------- ToyWorld


def test_edits_of_toyworld_are_judged_by_what_was_asked_and_by_the_rest(tmp_path):
    for name, things in edits.FILES.items():
        (tmp_path / name).mkdir()
        for index in range(6):
            row = edits.row_of(tmp_path, name, index, np.random.default_rng(index))
            results = [m["content"][1]["caption"] for m in row["messages"] if m["role"] == "assistant"]
            assert all(any(str(thing) in caption for thing in things) for caption in results)
            read_back = parse_sample(row, "here", "0", MediaRoot(tmp_path))
            assert not read_back.missing_files()
    scenes = [edits.Scene.drawn(thing, np.random.default_rng(i)) for i, thing in enumerate(edits.THINGS)]
    seen = edits.look([scene.picture() for scene in scenes])
    for scene, found in zip(scenes, seen, strict=True):
        assert found.thing == scene.thing and np.abs(found.centre - (scene.x, scene.y)).max() < 1
        assert abs(found.radius - scene.radius) < 1
    scene = edits.Scene.drawn(edits.Thing("ring", "red"), np.random.default_rng(0))
    for kind, wrong in (
        ("colour", {"x": 16.0}),
        ("shape", {"radius": scene.radius + 3}),
        ("place", {"background": (90, 0, 0)}),
    ):
        _, _, result = language.pick(np.random.default_rng(0), scene.edits(kind, edits.THINGS))
        others = (result, replace(result, **wrong), scene)
        source, target, *more = edits.look([one.picture() for one in (scene, *others)])
        assert [edits.judge(source, target, one) for one in (target, *more)] == [
            (True, True),
            (True, False),
            (False, True),
        ]


def test_a_suite_scores_edits_beside_the_same_model_without_references(made, tmp_path):
    (tmp_path / "eval").mkdir()
    rows = [edits.row_of(tmp_path, "eval", index, np.random.default_rng(index)) for index in range(3)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = read_suite(REPOSITORY / "configs/tiny/edits/suite.yaml", ["--ask.num_inference_steps", "1"])
    suite.data = [DataSource(str(tmp_path / "eval.jsonl"))]
    parts = dict(zip(("model", "processor"), composed(made("pix2pix")), strict=True))
    report = evaluate(suite, tmp_path / "out", Accelerator(cpu=True), **parts)
    assert report["metrics"].keys() == {"edit_changed", "edit_kept", "edit_right"}
    assert all(found[way]["n"] == 3 for found in report["metrics"].values() for way in ("model", "without_reference"))
    ours, without = (sorted((tmp_path / "out" / folder).rglob("*.png")) for folder in ("samples", "baselines"))
    for one, other in zip(ours, without, strict=True):
        assert (np.asarray(Image.open(one)) != np.asarray(Image.open(other))).any()
    suite.baselines = ["without_reference"]
    with pytest.raises(InputError, match="without_reference does not fit"):
        evaluate(suite, tmp_path / "out2", Accelerator(cpu=True), *composed(made("sd")))
