"""The tiny parts load as their real classes do, run, and are the same every time."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AudioLDMPipeline, DiffusionPipeline, StableDiffusionPipeline, TextToVideoSDPipeline
from PIL import Image
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from anygpt.decoders import DiffusionDecoder
from anygpt.decoders.conditions import Condition
from anygpt.errors import InputError
from anygpt.toyworld import HELD_OUT, PARTS, THINGS, Thing, language, part_path, write_untrained, zoo

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import build_zoo

PIPELINES = {
    "image_decoder": StableDiffusionPipeline,
    "video_decoder": TextToVideoSDPipeline,
    "audio_decoder": AudioLDMPipeline,
}


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of every safetensors and tokenizer file below a folder."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("tokenizer.json")]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_image_encoder_runs():
    processor = AutoImageProcessor.from_pretrained(part_path("image_encoder"))
    model = CLIPVisionModel.from_pretrained(part_path("image_encoder")).eval()
    pixels = processor(images=[Image.new("RGB", (50, 40), "red")], return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32)
    assert model(pixels).last_hidden_state.shape == (1, 17, 96)


def test_audio_encoder_runs():
    extractor = AutoFeatureExtractor.from_pretrained(part_path("audio_encoder"))
    model = WhisperEncoder.from_pretrained(part_path("audio_encoder")).eval()
    features = extractor([np.zeros(10_240)], sampling_rate=16_000, return_tensors="pt").input_features
    assert features.shape == (1, 80, 100)
    assert model(features).last_hidden_state.shape == (1, 50, 64)


def test_language_model_generates():
    tokenizer = AutoTokenizer.from_pretrained(part_path("language_model"))
    model = AutoModelForCausalLM.from_pretrained(part_path("language_model")).eval()
    assert model.config.vocab_size == len(tokenizer)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    batch = tokenizer(["Hello", "Draw a red circle."], padding=True, return_tensors="pt")
    assert batch.attention_mask[0, 0] == 0  # padded on the left, for generation
    ids = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert ids.shape[0] == 2 and ids.shape[1] <= batch.input_ids.shape[1] + 3


@pytest.mark.parametrize("text", ["Zürich, 東京 🎉", "  two  spaces\n\ttab", "\x00\x7f", "A Red CIRCLE"])
def test_the_tokenizer_gives_any_text_back(text):
    tokenizer = AutoTokenizer.from_pretrained(part_path("language_model"))
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_the_chat_template_marks_what_the_assistant_says():
    tokenizer = AutoTokenizer.from_pretrained(part_path("language_model"))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there. "}]},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Bye."}]},
    ]
    batch = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(batch["input_ids"]) == (
        "<|bos|><|system|>Be brief.<|end|><|user|>Hello there. <|end|><|assistant|>Hi!<|end|>"
        "<|user|>And now?<|end|><|assistant|>Bye.<|end|>"
    )
    said = [token for token, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "Hi!<|end|>Bye.<|end|>"
    assert tokenizer.eos_token == "<|end|>"

    prompt = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, tokenize=False)
    assert prompt == "<|bos|><|system|>Be brief.<|end|><|user|>Hello there. <|end|><|assistant|>"
    with pytest.raises(Exception, match="text parts only, not image"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(Exception, match="Unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_make_media_of_the_size_that_they_are_for(name):
    pipeline = DiffusionPipeline.from_pretrained(part_path(name))
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, PIPELINES[name])

    def sample(prompt: str) -> np.ndarray:
        more = {"num_frames": 8} if name == "video_decoder" else {}
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt, num_inference_steps=2, generator=generator, output_type="np", **more)[0]

    shape = {"image_decoder": (1, 32, 32, 3), "video_decoder": (1, 8, 32, 32, 3), "audio_decoder": (1, 10_240)}
    first = sample("a red circle")
    assert first.shape == shape[name] and np.isfinite(first).all()
    assert first.std() > 1e-4  # neither flat nor silent: comparisons of it mean something
    assert np.array_equal(first, sample("a red circle"))
    assert np.abs(first - sample("a blue ring")).max() > first.std()  # the prompt matters


@pytest.mark.parametrize("name", PIPELINES)
def test_captions_fit_and_differ_in_the_decoders_tokenizers(name):
    tokenizer = DiffusionPipeline.from_pretrained(part_path(name)).tokenizer
    captions = [language.plain_caption(thing, motion) for thing in THINGS for motion in (None, "left", "right")]
    encoded = [tuple(tokenizer(caption).input_ids) for caption in captions]
    assert len(set(encoded)) == len(captions)
    assert max(map(len, encoded)) <= tokenizer.model_max_length
    odd = tokenizer("zürich 東京 🎉").input_ids[1:-1]
    assert odd and tokenizer.unk_token_id not in odd


@pytest.mark.parametrize(("name", "bound"), [("image_decoder", 0.15), ("video_decoder", 0.15), ("audio_decoder", 0.5)])
@torch.no_grad()
def test_unseen_things_are_encoded_where_their_shape_and_colour_point(name, bound):
    """Shape and colour of an unseen thing, each from another one, add up; the link has nothing else to go by."""
    decoder = DiffusionDecoder.from_pretrained(part_path(name))
    motion = "up" if name == "video_decoder" else None

    def encode(shape: str, colour: str) -> torch.Tensor:
        caption = language.plain_caption(Thing(shape, colour), motion)
        return Condition.of(decoder.encode_text([caption])).embeds.flatten()

    for thing in HELD_OUT:
        shape, colour = ("circle", "cyan") if "cross" in str(thing) or "purple" in str(thing) else ("cross", "purple")
        base, true = encode(shape, colour), encode(thing.shape, thing.colour)
        guess = encode(thing.shape, colour) + encode(shape, thing.colour) - base
        assert (guess - true).norm() < bound * (true - base).norm()


def test_parts_are_small_and_hold_no_pickles():
    folder = zoo()
    assert sorted(path.name for path in folder.iterdir()) == sorted(PARTS)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]
    with pytest.raises(InputError, match="smell_encoder"):
        part_path("smell_encoder")


def test_a_seed_decides_the_weights_and_nothing_else_does(tmp_path):
    state = torch.get_rng_state()
    again = write_untrained(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    other = write_untrained(tmp_path / "other", seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]  # and nothing half-written
    expected = weights(write_untrained(tmp_path / "first"))
    assert len(expected) == 15 + 4
    assert weights(again) == expected
    different = {name for name, digest in weights(other).items() if digest != expected[name]}
    assert different == {name for name in expected if name.endswith(".safetensors")}


@pytest.fixture
def nothing_built(tmp_path, monkeypatch):
    """A build that has not begun."""
    monkeypatch.setattr(build_zoo, "WORK", tmp_path)
    return tmp_path


def test_a_build_trains_each_part_after_the_one_that_it_starts_from():
    order = list(build_zoo.STARTS)
    assert sorted(order) == sorted({run for runs in build_zoo.MADE_BY.values() for run in runs})
    for runs in build_zoo.MADE_BY.values():
        assert list(runs) == sorted(runs, key=order.index)


def test_a_run_that_fails_ends_the_build(nothing_built):
    with pytest.raises(InputError, match=r"image_vae: -c ended with exit code 3, see .*image_vae\.txt"):
        build_zoo.call("image_vae", "-c", "raise SystemExit(3)")


def test_what_a_run_of_the_build_says_is_kept(nothing_built):
    build_zoo.call("words", "-c", "print('é')")
    assert (nothing_built / "words.txt").read_text() == "é\n"


def test_a_run_counts_as_finished_only_with_the_settings_and_data_that_it_had(nothing_built, monkeypatch):
    monkeypatch.setattr(build_zoo, "REPOSITORY", nothing_built)  # of the data
    manifest = nothing_built / "runs" / "zoo" / "data" / "words" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"num_samples": 5}')
    (nothing_built / "words" / "parts").mkdir(parents=True)
    assert not build_zoo.is_finished("words")  # there is something, but it was cut off
    (nothing_built / "words" / build_zoo.FINISHED).write_text(json.dumps(build_zoo.made_from("words")))
    assert build_zoo.is_finished("words")
    after = nothing_built / "image_encoder"  # which starts from it
    after.mkdir()
    (after / build_zoo.FINISHED).write_text(json.dumps(build_zoo.made_from("image_encoder")))
    assert build_zoo.is_finished("image_encoder")
    manifest.write_text('{"num_samples": 6}')
    with pytest.raises(InputError, match="words was made with other data than now"):
        build_zoo.is_finished("words")
    with pytest.raises(InputError, match="image_encoder was made with other start than now"):
        build_zoo.is_finished("image_encoder")


def test_a_build_does_not_go_on_from_parts_of_other_code(nothing_built, monkeypatch):
    monkeypatch.setattr(build_zoo, "REPOSITORY", nothing_built)
    unet, vae = (
        nothing_built / f"untrained/image_decoder/{name}/diffusion_pytorch_model.safetensors"
        for name in ("unet", "vae")
    )
    write_untrained(nothing_built / "untrained")
    (nothing_built / "words").mkdir()
    (nothing_built / "words" / build_zoo.FINISHED).write_text(json.dumps(build_zoo.made_from("words")))
    assert build_zoo.is_finished("words")
    unet.write_bytes(vae.read_bytes())
    with pytest.raises(InputError, match="words was made with other start than now"):
        build_zoo.is_finished("words")


def test_a_build_replaces_a_zoo_and_nothing_else(tmp_path):
    build_zoo.check_output(tmp_path / "new")
    (tmp_path / "language_model").mkdir()
    build_zoo.check_output(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds thesis\.txt, and would be replaced"):
        build_zoo.check_output(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        build_zoo.check_output(tmp_path / "thesis.txt")
