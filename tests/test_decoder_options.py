"""Options of the decoders in generation: checked before anything runs, and what they do."""

import numpy as np
import pytest
import tiny_pipelines
import torch
from training_utils import REPOSITORY, arguments, train_here

from anygpt import load_decoder
from anygpt.chat.chat_model import ChatModel, Settings
from anygpt.decoders import StableDiffusion3Decoder, StableDiffusionXLDecoder
from anygpt.errors import InputError
from anygpt.model.loading import read_config
from anygpt.toyworld.datasets import write_dataset
from anygpt.toyworld.evaluation.answers import Settings as Evaluation
from anygpt.training.config import parse_config
from anygpt.training.setup import build


@pytest.fixture(scope="module")
def full_model(tiny_model):
    return tiny_model((), ("image", "video", "audio"))


def tokenize(processor, texts):
    processor.llm_tokenizer.padding_side = "left"
    return processor(llm_inputs={"text": texts, "padding": True})


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("image", {"stps": 3}, r"no option 'stps'; it has num_inference_steps, .*seed, generator, height, width"),
        ("image", {"num_frames": 3}, "no option 'num_frames'"),
        ("audio", {"height": 8}, "no option 'height'; it has .*audio_length_in_s"),
        ("image", {"num_inference_steps": 0}, "is 0; expected a whole number from 1 to 1000"),
        ("image", {"num_inference_steps": 2.5}, "is 2.5; expected a whole number"),
        ("image", {"num_inference_steps": 1001}, "is 1001; expected"),
        ("image", {"num_inference_steps": True}, "is True; expected"),
        ("video", {"guidance_scale": float("nan")}, "guidance_scale of the video decoder is nan; expected a finite"),
        ("video", {"num_frames": 0}, "num_frames of the video decoder is 0"),
        ("image", {"height": 12}, "height of the image decoder is 12; expected a multiple of 8"),
        ("image", {"width": -8}, "width of the image decoder is -8"),
        ("audio", {"audio_length_in_s": 0.0}, "audio_length_in_s of the audio decoder is 0.0; expected .*seconds from"),
        ("audio", {"seed": -1}, "seed of the audio decoder is -1"),
        ("audio", {"seed": "1"}, "seed of the audio decoder is '1'"),
        ("image", {"negative_prompt": ["a"]}, "expected a text"),
        ("image", {"seed": 1, "generator": torch.Generator()}, "both seed and generator"),
        ("image", {"generator": []}, "a torch.Generator, or a list with one per sample"),
        ("image", {"negative_prompt": "a", "guidance_scale": 1}, "negative_prompt of the image decoder .* no effect"),
        ("audio", {"negative_condition": torch.zeros(1), "guidance_scale": -3.0}, "negative_condition .* no effect"),
    ],
)
def test_wrong_options_are_errors_before_anything_runs(full_model, key, wrong, message):
    model, processor = full_model
    with pytest.raises(InputError, match=message):
        # nothing can be said in no tokens at all: the options are looked at first
        model.generate(**tokenize(processor, ["a"]), max_new_tokens=0, decoder_kwargs={key: wrong})


def test_a_decoder_is_loaded_with_another_size():
    decoder = load_decoder("zoo:image_decoder", height=64, width=48)
    assert decoder.targets.note.startswith("48 × 64 pixels")
    with pytest.raises(InputError, match="height is set, but a decoder of audio makes no pictures or clips"):
        load_decoder("zoo:audio_decoder", height=64)


def test_options_reach_their_decoder(full_model):
    model, processor = full_model
    chosen = {
        "image": {"num_inference_steps": 1, "height": 16, "width": 24},
        "video": {"num_inference_steps": 1, "num_frames": 3, "height": 8, "width": 16, "guidance_scale": None},
        "audio": {"num_inference_steps": 1, "audio_length_in_s": 0.32},
    }
    output = model.generate(
        **tokenize(processor, ["a", "b c"]), max_new_tokens=9, require=list(chosen), decoder_kwargs=chosen
    )
    for answer in output.answers:
        assert answer.images[0].size == (24, 16)
        assert answer.videos[0].shape == (3, 8, 16, 3)
        assert answer.audios[0].shape == (5120,)


def test_a_seed_gives_each_row_what_it_has_alone(full_model):
    """Also where rows before it have more media, and other seeds give others."""
    model, processor = full_model
    chosen = {key: {"num_inference_steps": 2, "seed": 11} for key in model.decoder_keys}
    options = {"max_new_tokens": 12, "require": ["image", "audio"], "decoder_kwargs": chosen}
    prompts = ["a red ring", "what", "a long blue square and something else"]
    together = model.generate(**tokenize(processor, prompts), **options)
    for row, text in enumerate(prompts):
        alone = model.generate(**tokenize(processor, [text]), **options).answers[0]
        for one, other in zip(alone.images, together.answers[row].images, strict=True):
            assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1
        for one, other in zip(alone.audios, together.answers[row].audios, strict=True):
            assert np.abs(one - other).max() < 1e-4
    options["decoder_kwargs"] = {"image": {"num_inference_steps": 2, "seed": 12}}
    again = model.generate(**tokenize(processor, prompts[:1]), **options).answers[0]
    assert not np.array_equal(np.asarray(again.images[0]), np.asarray(together.answers[0].images[0]))


def test_each_row_may_have_a_seed_of_its_own(full_model):
    model, processor = full_model
    options = {"max_new_tokens": 8, "require": ["image"]}

    def images(texts, seed):
        chosen = {"image": {"num_inference_steps": 2, "seed": seed}}
        answers = model.generate(**tokenize(processor, texts), decoder_kwargs=chosen, **options).answers
        return [np.asarray(answer.images[0], np.int16) for answer in answers]

    same = ["a red ring"] * 2
    first, second = images(same, [3, 4])
    assert np.abs(first - images(same[:1], 3)[0]).max() <= 1 and np.abs(second - images(same[:1], 4)[0]).max() <= 1
    assert not np.array_equal(first, second)
    with pytest.raises(InputError, match="image is given 1 seeds for 2 rows"):
        images(same, [3])
    with pytest.raises(InputError, match="a list with one per row"):
        images(same, [3, -1])


@pytest.mark.parametrize("key", ["image", "video", "audio"])
def test_a_negative_prompt_is_its_encoding(full_model, key):
    model, processor = full_model
    decoder, batch = model.decoders[key].module, tokenize(processor, ["a", "b"])
    first = {"num_inference_steps": 2, "seed": 0, "guidance_scale": 5.0}
    made = []
    for more in (
        {"negative_prompt": "a blue ring"},
        {"negative_condition": decoder.encode_text(["a blue ring"] * 2)},
        {},
    ):
        output = model.generate(**batch, max_new_tokens=4, require=[key], decoder_kwargs={key: first | more})
        made.append(np.asarray(output.answers[1].segments[-1].content))
    assert np.allclose(made[0], made[1], atol=1e-4) and not np.allclose(made[0], made[2], atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "make"),
    [(StableDiffusionXLDecoder, "stable_diffusion_xl"), (StableDiffusion3Decoder, "stable_diffusion_3")],
)
def test_pipelines_with_a_pooled_condition(kind, make):
    decoder = kind(getattr(tiny_pipelines, make)())
    size = 2 * decoder.size_multiple
    decoder.check_options({"height": size, "negative_prompt": "a", "seed": 2**63 - 1})
    arguments = decoder.sampling_arguments({"negative_prompt": "b", "seed": 2**63 - 1}, [0, 1])
    steps = []
    images = decoder.sample(
        decoder.encode_text(["a", "c"]),
        **arguments,
        num_inference_steps=2,
        height=size,
        width=size,
        on_step=lambda step, of: steps.append((step, of)),
    )
    assert [image.size for image in images] == [(size, size)] * 2
    assert steps == [(1, 2), (2, 2)]


# ------------------------------------------------------------------------------------------------ defaults


def test_defaults_are_kept_and_used_and_requests_override_them(tiny_model, tmp_path):
    """`final/` knows what suits its decoders: generation uses it, after loading as before, and a request goes first."""
    model, processor = tiny_model((), ("image",))
    batch = tokenize(processor, ["a"])

    def draw(model, **options):
        kwargs = {"image": {"seed": 3, **options}}
        answer = model.generate(**batch, max_new_tokens=4, require=["image"], decoder_kwargs=kwargs).answers[0]
        return np.asarray(answer.images[0])

    explicit = draw(model, num_inference_steps=2, guidance_scale=2.0, height=16, negative_prompt="b")
    model.decoders["image"].defaults = {
        **{"num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "negative_prompt": "b"}
    }
    assert np.array_equal(draw(model), explicit) and explicit.shape[0] == 16
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert np.array_equal(draw(again), explicit)
    assert draw(again, height=24).shape[0] == 24 and draw(again, height=None).shape[0] == 16
    assert not np.array_equal(draw(again, guidance_scale=9.0), explicit)
    negative = again.decoders["image"].module.encode_text(["b"])
    assert np.abs(draw(again, negative_condition=negative).astype(int) - explicit).max() <= 1

    chat_model = ChatModel(tmp_path)
    assert chat_model.options("image") == {
        **{"num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 32, "negative_prompt": "b"}
    }
    said = [{"role": "user", "content": "a"}]
    own = chat_model.answer(said, Settings(max_new_tokens=4, require=("image",), seed=3)).answer.images[0]
    named = {"image": {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "negative_prompt": "b"}}
    asked = chat_model.answer(said, Settings(max_new_tokens=4, require=("image",), seed=3, decoder_kwargs=named))
    assert np.array_equal(np.asarray(own), np.asarray(asked.answer.images[0])) and own.size == (32, 16)
    settings = Evaluation().resolved(chat_model.model)
    assert settings.steps == {"image": 2} and settings.guidance == {"image": 2.0}
    assert Evaluation(steps={"image": 5}).resolved(chat_model.model).steps == {"image": 5}


@pytest.mark.parametrize(
    ("defaults", "message"),
    [({"steps": 3}, "no option 'steps'"), ({"seed": 3}, "cannot set seed"), ({"height": 7}, "height .* is 7")],
)
def test_wrong_defaults_are_refused(tiny_model, defaults, message):
    model, _ = tiny_model((), ("image",))
    with pytest.raises(InputError, match=message):
        model.decoders["image"].defaults = defaults


def test_the_tiny_configs_set_defaults(tmp_path_factory, tmp_path):
    """From the training config into `final/`; a later stage may set others."""
    (data := tmp_path / "data").mkdir()
    write_dataset(data, "stage2", 6, seed=0)
    options = {"steps": 1, "config": REPOSITORY / "configs/tiny/stage2.yaml"}
    more = ("--model.init_from", "null", "--train.projector_init", "random")
    final = train_here(2, arguments(2, data / "stage2.jsonl", tmp_path / "run", *more, **options))
    own = {key: entry["defaults"] for key, entry in read_config(final).decoders.items()}
    assert own == {
        key: {"guidance_scale": guidance, "num_inference_steps": 20}
        for key, guidance in {"image": 2, "video": 2, "audio": 3}.items()
    }
    decoders = "{image: {path: 'zoo:image_decoder', hidden_layer: 2, num_signal_tokens: 16, defaults: {height: 64}}}"
    given = ("--model.init_from", str(final), "--model.decoders", decoders)
    config = parse_config(["--data.train", f"[{{path: {data}/stage2.jsonl}}]", *given])
    model, _ = build(config)
    assert model.decoders["image"].defaults == {"height": 64}
    assert model.decoders["audio"].defaults == own["audio"]
