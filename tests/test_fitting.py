"""Media that do not fit into an encoder's window: nothing is lost without a word, nothing hangs on chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_encoder_coverage import compose
from tiny_parts import CLIP, ENCODERS, LLAMA

from anygpt import InputError, MultimodalProcessor
from anygpt.data.lengths import Lengths
from anygpt.encoders import fitting
from anygpt.media.files import Audio
from anygpt.media.types import media_type
from anygpt.processing import repeatable
from anygpt.training.config import EncoderConfig

RATE = 16_000
BY_LABEL = {encoder.label: encoder for encoder in ENCODERS}
WINDOWED = ("Whisper", "Qwen2-Audio", "CLAP")  # of one second here


def speech(seconds: float, silent: float = 0.0, seed: int = 0) -> np.ndarray:
    """Noise that begins after some silence."""
    sound = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * RATE)).astype(np.float32)
    sound[: int(silent * RATE)] = 0
    return sound


def pipe(processor, media, text):
    return processor({"audio": {processor.media_argument("audio"): media, "sampling_rate": RATE}}, {"text": text})


@pytest.mark.parametrize("label", WINDOWED)
def test_what_comes_after_an_encoders_window_is_heard(parts, label):
    """A sound of two and a half windows gives what its three windows give by themselves, one behind the other."""
    model, processor = compose(BY_LABEL[label], LLAMA, parts.tokenizer())
    long = speech(2.5, silent=1.2)
    batch = pipe(processor, [long, speech(0.5)], ["<audio> and", "<audio>"])
    windows = [long[:RATE], long[RATE : 2 * RATE], long[2 * RATE :]]
    apart = pipe(processor, [*windows, speech(0.5)], ["<audio><audio><audio> and", "<audio>"])
    assert batch.keys() == apart.keys()
    for name in batch:
        torch.testing.assert_close(batch[name], apart[name], rtol=0, atol=0)
    torch.testing.assert_close(model(**batch).logits, model(**apart).logits)
    other = pipe(
        processor, [np.concatenate([long[:RATE], speech(1.5, seed=1)]), speech(0.5)], ["<audio> and", "<audio>"]
    )
    assert not torch.equal(model(**batch).logits, model(**other).logits)


@pytest.mark.parametrize("label", WINDOWED)
def test_windows_are_counted_wherever_a_sound_goes(parts, label):
    """By lengths, in conversations, and in rows to which features are prepended."""
    model, processor = compose(BY_LABEL[label], LLAMA, parts.tokenizer())
    long, one = Audio(speech(2.5)[None], RATE), Audio(speech(1.0)[None], RATE)
    lengths = Lengths(processor)
    counts = [lengths._count("audio", medium) for medium in (long, one)]
    assert counts[0] > counts[1] > 0 and not lengths.is_fixed("audio")
    said = [{"role": "user", "content": [{"type": "audio", "audio": long}, {"type": "text", "text": "what is it"}]}]
    batch = processor.apply_chat_template(said, tokenize=True)
    assert int((batch["input_ids"] == processor.token_ids["audio"]).sum()) == counts[0]
    rows = {"audio": {processor.media_argument("audio"): [[speech(2.5)], [speech(1.0)]], "sampling_rate": RATE}}
    batch = processor(rows, {"text": ["<audio> say", "say <audio>"]})
    assert (batch["input_ids"] == processor.token_ids["audio"]).sum(dim=1).tolist() == counts
    model.set_token_ids(None)
    processor.injects = False
    batch = processor(rows, {"text": ["say", "say"]})
    assert batch["items_per_row"] == {"audio": [3, 1]}
    assert model(**batch).logits.shape[0] == 2


@pytest.mark.parametrize("label", WINDOWED)
def test_long_sounds_are_refused_where_they_are_to_be(parts, label):
    encoder = BY_LABEL[label]
    model, processor = compose(encoder, LLAMA, parts.tokenizer())
    strict = MultimodalProcessor(processor.encoder_processors, parts.tokenizer(), model=model, fit={"audio": "refuse"})
    pipe(strict, [speech(1.0)], ["<audio>"])
    with pytest.raises(InputError, match=r"a sound of 1.5 s is given to an encoder of 1 s; cut it, or set .* split"):
        pipe(strict, [speech(1.5)], ["<audio>"])
    with pytest.raises(InputError, match="a sound of 0 s"):
        pipe(processor, [np.zeros(0, np.float32)], ["<audio>"])


@pytest.mark.parametrize(("truncation", "lengths"), [("rand_trunc", (0.4, 2.5, 1.0)), ("fusion", (0.4, 0.7, 1.0))])
def test_claps_features_hang_on_nothing_but_the_sound(truncation, lengths):
    """Its extractor draws from NumPy's global state: where it crops, or which of a batch it says is longer."""
    extractor = BY_LABEL["CLAP"].build_processor()
    extractor.truncation = truncation
    sounds = [speech(seconds, seed=i) for i, seconds in enumerate(lengths)]
    drawn = np.random.get_state()[1].tolist()
    options = {"sampling_rate": RATE, "return_tensors": "pt"}
    found = [repeatable.call(extractor, options | {"raw_speech": sounds}, "raw_speech") for _ in range(2)]
    alone = [repeatable.call(extractor, options | {"raw_speech": [sound]}, "raw_speech") for sound in sounds]
    assert np.random.get_state()[1].tolist() == drawn
    for name in found[0]:
        values = [torch.as_tensor(one[name]) for one in (*found, *alone)]
        torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)
        torch.testing.assert_close(values[0], torch.cat(values[2:]), rtol=0, atol=0)


# -- pictures


def wide() -> Image.Image:
    """Three times as wide as high, red at the left, blue elsewhere."""
    image = Image.new("RGB", (96, 32), "blue")
    image.paste("red", (0, 0, 24, 32))
    return image


def pixels(parts, fit, image, encoder=CLIP):
    model, processor = compose(encoder, LLAMA, parts.tokenizer())
    processor = MultimodalProcessor(
        processor.encoder_processors, parts.tokenizer(), model=model, fit={encoder.modality: fit}
    )
    name = processor.media_argument(encoder.modality)
    batch = processor({encoder.modality: {name: [image]}}, {"text": [f"<{encoder.modality}>"]})
    return model, processor, batch


def reds(batch) -> list[float]:
    """The share of red pixels in each piece."""
    found = batch["pixel_values"]
    return [float((piece[0] > piece[2] + 0.5).float().mean()) for piece in found]


def test_pictures_of_another_shape(parts):
    assert reds(pixels(parts, None, wide())[2]) == [0]  # as the library does
    (padded,) = reds(pixels(parts, "pad", wide())[2])
    (stretched,) = reds(pixels(parts, "stretch", wide())[2])
    assert stretched == pytest.approx(1 / 4, abs=0.05) and padded == pytest.approx(1 / 12, abs=0.04)
    model, processor, batch = pixels(parts, "tile", wide())
    assert reds(batch) == pytest.approx([3 / 4, 0, 0], abs=0.1)
    one = pixels(parts, "tile", Image.new("RGB", (32, 32)))[2]
    assert len(one["pixel_values"]) == 1 and batch["input_ids"].shape[1] > 2 * one["input_ids"].shape[1]
    assert model(**batch).logits.isfinite().all() and fitting.varies(processor.encoder_processors["image"], "tile")
    tiles = fitting.pieces(
        media_type("image"), [Image.new("RGB", (64, 150))], processor.encoder_processors["image"], "tile"
    )
    assert [tile.size for tile in tiles[0]] == [(64, 64)] * 3


def test_a_square_picture_is_the_same_whatever_is_done(parts):
    square = Image.effect_noise((48, 48), 50).convert("RGB")
    batches = [pixels(parts, fit, square)[2]["pixel_values"] for fit in ("crop", "pad", "tile")]
    assert all(torch.equal(batches[0], other) for other in batches[1:])


def notes_of(processor):
    return fitting.notes(processor.modalities, processor.encoder_processors, processor.fit)


def test_what_is_done_is_said_and_saved(parts, tmp_path):
    _, processor, _ = pixels(parts, "pad", wide())
    assert notes_of(processor) == ["image_encoder: images of another shape are padded to the encoder's shape"]
    processor.save_pretrained(tmp_path)
    assert MultimodalProcessor.from_pretrained(tmp_path).fit == {"image": "pad"}
    _, processor = compose(BY_LABEL["Whisper"], LLAMA, parts.tokenizer())
    assert notes_of(processor) == ["audio_encoder: long audios are split into windows of 1 s"]
    assert EncoderConfig(path="x").fit is None
    with pytest.raises(
        InputError, match="fit of the 'image' encoder is 'split'; expected crop or pad or stretch or tile"
    ):
        pixels(parts, "split", wide())


@pytest.mark.parametrize("label", ["Qwen2-VL vision", "Pixtral"])
@pytest.mark.parametrize("size", [(900, 2), (2, 900)])
def test_extreme_pictures_are_refused_by_name(parts, label, size):
    _, processor = compose(BY_LABEL[label], LLAMA, parts.tokenizer())
    said = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", size)}]}]
    with pytest.raises(InputError, match="the 'image' encoder") as caught:
        processor.apply_chat_template(said, tokenize=True)
    assert " at 0x" not in str(caught.value)
