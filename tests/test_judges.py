"""The judges of ToyWorld: right on fresh renders, also on worn ones, and not fooled by the wrong thing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from anygpt import InputError
from anygpt.media.files import read_audio
from anygpt.media.videos import read_video
from anygpt.media.writing import write_audio, write_video
from anygpt.toyworld import COLOURS, MOTIONS, SHAPES, THINGS, Thing
from anygpt.toyworld.judge_training import train_judges
from anygpt.toyworld.judges import WEIGHTS, answers_question, load_judges, read_words
from anygpt.toyworld.render import render_audio, render_image, render_video

SEED = 987_654  # neither that of training nor that of the card
PER_THING = 8


@pytest.fixture(scope="module")
def judges():
    return load_judges()


@pytest.fixture(scope="module")
def things():
    return [thing for thing in THINGS for _ in range(PER_THING)]


def rate(given, things):
    return np.mean([verdict == (thing.shape, thing.colour) for verdict, thing in zip(given, things, strict=True)])


def test_pictures(judges, things):
    rng = np.random.default_rng(SEED)
    images = [render_image(thing, rng) for thing in things]
    assert rate(judges.image(images), things) >= 0.99
    assert judges.image(np.stack([np.asarray(image) for image in images])) == judges.image(images)
    blurred = [image.filter(ImageFilter.GaussianBlur(0.6)) for image in images]
    assert rate(judges.image(blurred), things) >= 0.98
    larger = [image.resize((64, 64), Image.Resampling.BICUBIC) for image in images]
    assert rate(judges.image(larger), things) >= 0.98


def test_clips(judges, things, tmp_path):
    rng = np.random.default_rng(SEED)
    motions = [MOTIONS[i % 4] for i in range(len(things))]
    clips = [render_video(thing, motion, rng) for thing, motion in zip(things, motions, strict=True)]
    assert rate(judges.video(clips), things) >= 0.99
    assert np.mean([a == b for a, b in zip(judges.motion(clips), motions, strict=True)]) >= 0.99
    backwards = {"left": "right", "right": "left", "up": "down", "down": "up"}
    reversed_clips = [clip[::-1] for clip in clips[:48]]
    assert judges.motion(reversed_clips) == [backwards[motion] for motion in motions[:48]]
    coded = []
    for index, clip in enumerate(clips[::6]):
        write_video(tmp_path / f"{index}.mp4", clip, 8)
        coded.append(read_video(tmp_path / f"{index}.mp4").frames)
    assert rate(judges.video(coded), things[::6]) >= 0.98
    assert judges.motion(coded) == motions[::6]


def test_sounds(judges, things, tmp_path):
    rng = np.random.default_rng(SEED)
    sounds = [render_audio(thing, rng) for thing in things]
    assert rate(judges.audio(sounds), things) >= 0.99
    noisy = [sound + 0.03 * sound.std() * rng.standard_normal(len(sound)).astype(np.float32) for sound in sounds]
    assert rate(judges.audio(noisy), things) >= 0.98
    assert judges.audio([sound * 0.1 for sound in sounds[::8]]) == judges.audio(sounds[::8])  # loudness says nothing
    write_audio(tmp_path / "sound.wav", sounds[0], 16_000)
    stored = read_audio(tmp_path / "sound.wav")
    assert judges.audio([stored.waveform], stored.sampling_rate) == judges.audio(sounds[:1])
    assert len(judges.audio([sounds[0][:5000], np.zeros(0, np.float32)])) == 2


def test_the_right_answer_comes_from_what_is_there_alone(judges):
    rng = np.random.default_rng(SEED)
    for thing in THINGS:
        other = Thing(SHAPES[(SHAPES.index(thing.shape) + 1) % 6], COLOURS[(COLOURS.index(thing.colour) + 1) % 8])
        assert (
            judges.image([render_image(other, rng)]) == [(other.shape, other.colour)] != [tuple(vars(thing).values())]
        )
    noise = rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    said = judges.image(noise)
    right = [thing for thing in THINGS for _ in range(5)][:200]
    assert rate(said, right) < 0.2  # noise is nothing in particular
    assert rate(judges.audio(list(rng.standard_normal((48, 10_240)).astype(np.float32))), THINGS) < 0.2


def test_nothing_and_the_wrong_thing(judges):
    assert judges.image([]) == judges.video([]) == judges.motion([]) == judges.audio([]) == []
    with pytest.raises(InputError, match="uint8"):
        judges.image([np.zeros((32, 32, 3), np.float32)])


def test_sentences():
    captions = ["A Red circle, moving left.", "It is red.", "a red and blue circle", "nothing", "circles redder"]
    assert [read_words(caption).thing for caption in captions] == [
        ("circle", "red"),
        (None, "red"),
        ("circle", None),
        (None, None),
        (None, None),
    ]
    assert read_words("No, it is a ring. Yes!").verdict is None


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("Its colour is red.", "It is red.", True),
        ("It is a red ring.", "It is red.", True),
        ("It is red or blue.", "It is red.", False),
        ("It is a circle.", "It is red.", False),
        ("Yes, it is a ring.", "Yes, it is a ring.", True),
        ("No, it is a ring.", "Yes, it is a ring.", False),
        ("It is a ring.", "No, it is a ring.", False),
        ("", "It is red.", False),
    ],
)
def test_answers_to_questions(answer, reference, right):
    assert answers_question(answer, reference, Thing("ring", "red")) is right


def test_what_is_shipped_is_small_and_its_card_is_kept():
    card = json.loads((WEIGHTS / "card.json").read_text())
    assert min(card["accuracy"].values()) >= 0.99
    assert all(path.stat().st_size < 300_000 for path in WEIGHTS.glob("*.safetensors"))


def test_training_gives_the_same_weights_again(tmp_path):
    """From the seed alone, whatever the global generator's state, which it leaves alone."""
    for folder in ("a", "b"):
        torch.manual_seed(len(folder) if folder == "a" else 5)
        before = torch.get_rng_state()
        train_judges(tmp_path / folder, seed=3, steps=0.001, fresh=1, pool=0.02)
        assert torch.equal(torch.get_rng_state(), before)
    for name in ("image", "motion", "audio"):
        first, second = (tmp_path / folder / f"{name}.safetensors" for folder in "ab")
        assert first.read_bytes() == second.read_bytes()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        f"{n}.safetensors" for n in ("image", "motion", "audio")
    } | {"card.json"}
