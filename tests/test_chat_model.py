"""Talking to a model from the terminal, and what may be attached and asked for, whoever asks."""

import json
import os
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anygpt import commands
from anygpt.chat.chat_model import ChatModel, Settings
from anygpt.errors import InputError

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("final")
    for one in tiny_model(("image", "audio"), ("image", "audio")):
        one.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(checkpoint):
    return ChatModel(checkpoint)


# ------------------------------------------------------------------------------------------ the terminal


def test_a_conversation_in_the_terminal(checkpoint, media, tmp_path):
    """Through a pipe, as a careless user types it; a terminal that knows ASCII alone, and no colours."""
    media.image(0).save(tmp_path / "a ring.png")
    (tmp_path / "01-0.png").write_bytes(b"of an earlier conversation")
    lines = [
        "/attach",
        "/attach nowhere.png",
        f"/attach {tmp_path}",
        "/attach notes.txt",
        f"/attach '{tmp_path}/a ring.png'",
        "What is this? \u00e9 \U0001f600 <image>[IMG1]",
        "/wipe",
        "",
        "/history",
        f"/save {tmp_path}/nowhere/talk.json",
        f"/save {tmp_path}/talk.json",
        "x " * 3000,
        "/reset",
        "/history",
        "And this?",
        "/quit",
        "never read",
    ]
    typed = "\n".join(lines).encode() + b"\n"
    options = ["--steps", "1", "--require", "image", "--forbid", "audio", "--max-new-tokens", "8"]
    done = subprocess.run(
        [sys.executable, "scripts/chat.py", "--checkpoint", checkpoint, "--output", tmp_path, *options],
        cwd=REPOSITORY,
        input=typed.replace(b"And", b"And\xff\xfe"),
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
    )
    said = done.stdout.decode("ascii")
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    assert "\x1b" not in said and "\r" not in said
    errors = [line.removeprefix("you: ") for line in said.splitlines() if "error: " in line]
    expected = [
        "/attach needs the path",
        "nowhere.png does not exist",
        "cannot tell what",
        "cannot tell what notes.txt is by its suffix; known are .png",
        "there is no command /wipe; there are /attach PATH",
        "nowhere/talk.json cannot be written: No such file or directory",
        "begin a new conversation",
    ]
    assert len(errors) == len(expected)
    for error, part in zip(errors, expected, strict=True):
        assert error.startswith("error: ") and part in error
    assert said.count("model: ") == 3 and "Everything is forgotten." in said and "never read" not in said

    # two answers, each with its picture; the earlier conversation's is still there
    made = sorted(path.name for path in tmp_path.glob("*-*.png"))
    assert len(made) == 3 and [name[:2] for name in made] == ["01", "02", "03"]
    assert (tmp_path / "01-0.png").read_bytes() == b"of an earlier conversation"
    for name in made[1:]:
        assert f"{tmp_path}/{name}]" in said
        with Image.open(tmp_path / name) as image:
            assert image.size == (32, 32)

    user, model = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert user["content"][0] == {"type": "image", "path": f"{tmp_path}/a ring.png"}
    assert {"type": "image", "path": f"{tmp_path}/{made[1]}"} in model["content"]
    history = said[said.index("you:\n") :]
    assert f"[image: {tmp_path}/a ring.png]" in history and history.count("you:\n") == 1, "/reset forgets"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere does not exist; name a run's final/ folder"),
        (["--checkpoint", "anygpt"], "anygpt holds no saved model"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "half \udcff a character"], "half a character"),
        (["--prompt", "a", "--attach", "nowhere.wav"], "nowhere.wav does not exist"),
        (["--prompt", "a", "--attach", "pyproject.toml"], "cannot tell what pyproject.toml is"),
        (["--prompt", "a", "--require", "smell"], "there is no decoder smell; there are ['image', 'audio']"),
        (["--require", "image", "--forbid", "image"], "required and forbidden"),
        (["--require", "image", "--max-new-tokens", "3"], "no room for the 4 signal tokens"),
        (["--steps", "5000"], "num_inference_steps of the image decoder is 5000"),
        (["--seed", "1" + "0" * 30], "--seed is 1000"),
        (["--guidance", "inf"], "--guidance is inf"),
        (["--output", "pyproject.toml"], "pyproject.toml is a file"),
        (["--prompt", "a", "--require", "image", "--output", "/proc/nowhere"], "--output /proc/nowhere cannot be"),
        (["--offload"], "--offload keeps decoders on the CPU"),
    ],
)
def test_mistakes_on_the_command_line(checkpoint, arguments, message, capsys):
    given = arguments if "--checkpoint" in arguments else ["--checkpoint", str(checkpoint), *arguments]
    given = given if "--steps" in given else [*given, "--steps", "1"]
    assert commands.run("chat", given) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1, said


@pytest.mark.parametrize("script", ["demo", "serve"])
def test_servers_without_a_checkpoint_say_so(script, capsys):
    assert commands.run(script, ["--checkpoint", "nowhere", "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert "nowhere does not exist; name a run's final/ folder" in said and said.count("\n") == 1, said


# ------------------------------------------------------------------------------ what is attached and asked for


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 40), (50, 1)], ids=lambda size: "×".join(map(str, size)))
def test_small_pictures_are_pictures(chat_model, tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    part = chat_model.read("image", str(tmp_path / "a.png"))
    text = Settings(max_new_tokens=1, forbid=("image", "audio"))
    assert chat_model.answer([{"role": "user", "content": [part]}], text).new_tokens == 1


def test_a_thread_of_pixels_is_refused(chat_model, tmp_path):
    """A file of a few kilobytes that an encoder, scaling its shorter side up, would make gigabytes of."""
    Image.new("RGB", (4_000_000, 1)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="4000000 × 1 pixels"):
        chat_model.read("image", str(tmp_path / "a.png"))


@pytest.mark.parametrize(("rate", "samples"), [(1, 5), (8_000, 1), (999_983, 2_000)])
def test_odd_sounds_are_sounds(chat_model, tmp_path, rate, samples):
    part = chat_model.read("audio", str(write_sound(tmp_path / "a.wav", rate, samples)))
    text = Settings(max_new_tokens=1, forbid=("image", "audio"))
    assert chat_model.answer([{"role": "user", "content": [part]}], text).new_tokens == 1


def test_a_rate_beyond_reason_costs_nothing(chat_model, tmp_path):
    """A file of some bytes whose rate has no divisor in common with the encoder's."""
    part = chat_model.read("audio", str(write_sound(tmp_path / "a.wav", 2**31 - 1, 100)))
    assert chat_model.answer([{"role": "user", "content": [part]}], Settings(max_new_tokens=1)).new_tokens == 1


def write_sound(path, rate, samples):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.arange(samples, dtype="<i2").tobytes())
    return path


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_hardly_any_temperature_is_none(chat_model, temperature):
    said = [
        chat_model.answer([{"role": "user", "content": "a"}], Settings(6, t, forbid=("image", "audio"))).answer.text
        for t in (0.0, temperature)
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(seed=2**64), "the seed is"),
        (Settings(seed=-1), "the seed is -1"),
        (Settings(max_new_tokens=0), "0 tokens; expected at least 1"),
        (Settings(max_new_tokens=2.5), "2.5 tokens; expected at least 1"),
        (Settings(temperature=-1.0), "the temperature is -1.0"),
        (Settings(temperature=float("nan")), "the temperature is nan"),
        *((Settings(top_p=value), f"top_p is {value}; expected a number above 0") for value in (2.0, 0.0, -3)),
        (Settings(stop=("",)), "stop is .*; expected a list of texts of at least one character"),
        (Settings(require="image"), r"require is the text 'image'; give a list"),
        (Settings(forbid=("smell",)), "no decoder smell"),
        (Settings(4, require=("image", "audio")), "no room for the 6"),
        (Settings(decoder_kwargs={"image": {"steps": 1}}), "no option 'steps'"),
    ],
)
def test_wrong_settings_are_found_before_there_is_a_conversation(chat_model, settings, message):
    with pytest.raises(InputError, match=message):
        chat_model.check(settings)


def test_a_decoder_that_is_required_twice_is_required_once(chat_model):
    few = {key: {"num_inference_steps": 1} for key in chat_model.makes}
    settings = Settings(5, require=("image", "image"), forbid=("audio",), decoder_kwargs=few)
    assert len(chat_model.answer([{"role": "user", "content": "a"}], settings).answer.images) == 1


def test_sampling_is_from_all_tokens(chat_model, monkeypatch):
    """transformers alone would take the 50 likeliest."""
    given, generate = [], chat_model.model.generate
    monkeypatch.setattr(chat_model.model, "generate", lambda **options: given.append(options) or generate(**options))
    settings = Settings(2, temperature=1.5, forbid=tuple(chat_model.makes))
    chat_model.answer([{"role": "user", "content": "a"}], settings)
    assert given[0]["do_sample"] and given[0]["top_k"] == 0
