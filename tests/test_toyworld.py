"""ToyWorld's renders, language and datasets: deterministic, distinct, valid."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from anygpt.data.schema import MediaRoot, parse_sample
from anygpt.errors import InputError, exit_code
from anygpt.media.files import read_audio, read_image
from anygpt.media.videos import read_video
from anygpt.toyworld import COLOURS, HELD_OUT, MODALITIES, MOTIONS, SEEN, SHAPES, THINGS, Thing, language
from anygpt.toyworld.__main__ import main
from anygpt.toyworld.datasets import EXCHANGES, KINDS, WHOLE_KINDS, write_dataset
from anygpt.toyworld.judges import read_words
from anygpt.toyworld.render import AUDIO_SECONDS, render_audio, render_image, render_video

MEL_FILTERS = mel_filter_bank(513, 64, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")


def picture_features(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> the shape's mask in its bounding box, 16×16, and its mean colour."""
    pixels = image.astype(float) / 255
    brightness = pixels.max(axis=2)
    mask = brightness > 0.5 * (brightness.max() + brightness.min())
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = brightness[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / brightness.max()
    box = np.asarray(Image.fromarray(box.astype(np.float32)).resize((16, 16), Image.Resampling.BILINEAR))
    colour = np.median(pixels[mask], axis=0)
    return np.concatenate([box.ravel() / 4, 4 * colour / colour.max()])


def sound_features(waveform: np.ndarray) -> np.ndarray:
    """(N,) -> mean over time and spread over time of the 64-bin log-mel that AudioLDM is trained on."""
    waveform = np.pad(waveform / np.abs(waveform).max() / 2, 432, mode="reflect")
    window = window_function(1024, "hann")
    mel = spectrogram(waveform, window, 1024, 160, power=1.0, center=False, mel_filters=MEL_FILTERS, mel_floor=1e-5)
    assert mel.shape == (64, 64)
    mel = np.log(mel)
    return np.concatenate([mel.mean(axis=1), mel.std(axis=1)])


def nearest_centroid_accuracy(features) -> float:
    """Centroids of the 48 things from 12 renders each, judged on 6 others each. `features(thing, rng) -> vector`."""
    rng = np.random.default_rng(0)
    centroids = np.stack([np.mean([features(thing, rng) for _ in range(12)], axis=0) for thing in THINGS])
    right = [
        np.argmin(np.linalg.norm(centroids - features(thing, rng), axis=1)) == index
        for index, thing in enumerate(THINGS)
        for _ in range(6)
    ]
    return float(np.mean(right))


def test_the_split_leaves_every_shape_and_every_colour_several_times():
    assert len(THINGS) == 48 and len(HELD_OUT) == 10 and len(SEEN) == 38
    assert set(SEEN) | set(HELD_OUT) == set(THINGS)
    assert min(Counter(thing.shape for thing in SEEN)[shape] for shape in SHAPES) >= 6
    assert min(Counter(thing.colour for thing in SEEN)[colour] for colour in COLOURS) >= 4
    # Held out too, each of them: else a score would say nothing about that shape or colour.
    assert {thing.shape for thing in HELD_OUT} == set(SHAPES)
    assert {thing.colour for thing in HELD_OUT} == set(COLOURS)


def test_renders_are_decided_by_the_generator_and_vary():
    thing = Thing("ring", "cyan")
    renders = {
        "image": lambda seed: np.asarray(render_image(thing, np.random.default_rng(seed))),
        "video": lambda seed: render_video(thing, "up", np.random.default_rng(seed)),
        "audio": lambda seed: render_audio(thing, np.random.default_rng(seed)),
    }
    for render in renders.values():
        assert np.array_equal(render(3), render(3))
        assert not np.array_equal(render(3), render(4))
    assert renders["image"](0).shape == (32, 32, 3)
    assert renders["video"](0).shape == (8, 32, 32, 3) and renders["video"](0).dtype == np.uint8
    sound = renders["audio"](0)
    assert sound.shape == (round(AUDIO_SECONDS * 16_000),) and sound.dtype == np.float32
    assert 0.3 < np.abs(sound).max() < 1


def test_pictures_are_distinct():
    assert nearest_centroid_accuracy(lambda thing, rng: picture_features(np.asarray(render_image(thing, rng)))) >= 0.99


def test_frames_are_distinct():
    def features(thing, rng):
        return picture_features(render_video(thing, "left", rng, num_frames=2)[1])

    assert nearest_centroid_accuracy(features) >= 0.99


def test_sounds_are_distinct():
    assert nearest_centroid_accuracy(lambda thing, rng: sound_features(render_audio(thing, rng))) >= 0.99


@pytest.mark.parametrize("motion", MOTIONS)
def test_clips_move_as_they_are_told(motion):
    rng = np.random.default_rng(0)
    direction = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion]
    for thing in THINGS[::5]:
        frames = render_video(thing, motion, rng).max(axis=3).astype(float)
        weights = np.where(frames > 90, frames, 0)
        weights /= weights.sum(axis=(1, 2), keepdims=True)
        y, x = np.mgrid[:32, :32]
        centres = np.stack([(weights * x).sum(axis=(1, 2)), (weights * y).sum(axis=(1, 2))], axis=1)
        steps = np.diff(centres, axis=0)
        assert (steps @ direction > 0.5).all()  # pixels a frame
        assert np.abs(steps @ direction[::-1]).max() < 0.3


def test_renderers_refuse_what_they_do_not_know():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="sideways"):
        render_video(THINGS[0], "sideways", rng)
    with pytest.raises(InputError, match="2 frames"):
        render_video(THINGS[0], "left", rng, num_frames=1)


def test_captions_name_the_thing_and_its_motion():
    rng = np.random.default_rng(0)
    for thing in THINGS:
        texts = {language.caption(thing, rng, "left", "video") for _ in range(40)}
        assert len(texts) > 8
        assert all(str(thing) in text and "left" in text for text in texts)
        assert not re.search(r"\ban [^aeiou]|\ba [aeiou]", " ".join(texts))
    assert language.plain_caption(Thing("ring", "orange"), "up") == "an orange ring moving up"


def test_answers_about_words_are_right():
    rng = np.random.default_rng(0)
    asked = Counter()
    for _ in range(600):
        thing = THINGS[rng.integers(48)]
        question, answer = language.text_qa(thing, rng)
        if "olour" in question:
            asked["colour"] += 1
            assert thing.colour in answer
        elif "Is it" in question:
            asked["yes" if answer.startswith("Yes") else "no"] += 1
            assert answer.startswith("Yes") == question.endswith(f" {thing.shape}?")
            assert thing.shape in answer
        elif question.startswith("Something"):
            asked["riddle"] += 1
            assert thing.shape not in question and str(thing) in answer
        else:
            asked["shape"] += 1
            assert thing.shape in answer
    assert min(asked[kind] for kind in ("colour", "yes", "no", "riddle", "shape")) > 30


def test_requests_name_modality_thing_and_motion():
    rng = np.random.default_rng(0)
    for modality in MODALITIES:
        motion = "down" if modality == "video" else None
        for _ in range(20):
            request = language.request(modality, rng, motion, THINGS[0])
            assert "red circle" in request and ("down" in request) == (modality == "video")
        reply = language.media_reply(modality, THINGS[0], rng, motion)
        assert reply.endswith(language.plain_caption(THINGS[0], motion)) and len(set(reply) & set(".:")) == 1
        assert language.describe_question(modality, rng)
        assert "None" not in language.request(modality, rng, motion)
    with pytest.raises(InputError, match="needs a motion"):
        language.request("video", rng)
    assert all(language.small_talk(rng)) and all(language.refusal(rng))


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def content_types(message) -> list[str]:
    return [part["type"] for part in message["content"]]


def test_kinds_draw_from_seeds_of_their_own():
    """Numbers that stay: with others, a rebuilt zoo would be made of other data than the shipped one."""
    assert len(set(KINDS.values())) == len(KINDS)
    assert [KINDS[kind] for kind in ("stage1", "stage2", "stage3", "eval", "joint", "words")] == [0, 1, 2, 3, 4, 11]


STAGE_KINDS = [kind for kind in KINDS if kind not in WHOLE_KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_datasets_are_valid(kind, tmp_path):
    path = write_dataset(tmp_path, kind, 48, seed=1)
    assert path == tmp_path / f"{kind}.jsonl"
    rows = read_rows(path)
    root = MediaRoot(tmp_path)
    samples = [parse_sample(row, "test", "0", root) for row in rows]
    assert len({sample.id for sample in samples}) == 48

    found = Counter()
    for sample in samples:
        for role, part in sample.media():
            found[role, part.type] += 1
            if part.type == "image":
                assert read_image(part.path).size == (32, 32)
            elif part.type == "video":
                assert read_video(part.path).frames.shape == (8, 64, 64, 3)
            else:
                audio = read_audio(part.path)
                assert audio.sampling_rate == 16_000 and audio.waveform.shape == (1, 10_240)
            if role == "assistant":
                assert any(str(thing) in part.caption for thing in SEEN)
                assert any(motion in part.caption.rstrip(".").split() for motion in MOTIONS) == (part.type == "video")
    files = [file for file in (tmp_path / kind).rglob("*.*") if file.name != "manifest.json"]
    assert len(files) == sum(found.values())
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([kind, f"{kind}.jsonl"])  # nothing left over

    users = Counter(role for role, _ in found.elements())
    if kind in ("stage1", "captions"):
        assert found == {("user", modality): 16 for modality in MODALITIES}
    elif kind == "stage2":
        assert found == {("assistant", modality): 16 for modality in MODALITIES}
    else:
        given = {"stage3": users["user"], "eval": 36, "joint": 24 * 2 + 12, "pairs": 24 * 2 + 24, "views": 48}
        assert users["user"] == given.get(kind, 0)
        if kind in ("pictures", "clips", "sounds", "stills"):
            assert users["assistant"] == 48


def test_stills_are_pictures_and_frames_of_clips(tmp_path):
    def areas(kind: str) -> np.ndarray:
        rows = read_rows(write_dataset(tmp_path, kind, 200, seed=0))
        pixels = [np.asarray(Image.open(tmp_path / row["messages"][1]["content"][-1]["path"])) for row in rows]
        return np.array([(p.max(axis=2) > 100).mean() for p in pixels])

    # Radii of 18 to 26% and of 20 to 36%: among stills there are more small things.
    small, pictures = areas("stills"), areas("pictures")
    assert small.mean() < 0.9 * pictures.mean()
    assert small.max() > 0.9 * pictures.max()


def test_joint_has_pairs_of_one_thing_between_the_rows_of_stage3(tmp_path):
    rows = read_rows(write_dataset(tmp_path, "joint", 80, seed=0))
    pairs = Counter(tuple(content_types(row["messages"][0])) for row in rows[1::2])
    assert pairs == {("image", "video", "text"): 20, ("image", "audio", "text"): 20}
    kinds = Counter(tuple(set(content_types(message)) != {"text"} for message in row["messages"]) for row in rows[::2])
    assert kinds == {(False, False): 10, (True, False): 10, (False, True): 10, (True, True): 10}


def test_stage3_mixes_the_four_kinds_of_rows(tmp_path):
    rows = read_rows(write_dataset(tmp_path, "stage3", 80, seed=0))
    kinds = Counter()
    several = 0
    for row in rows:
        user, assistant = row["messages"][:2]
        kinds[tuple(set(content_types(message)) != {"text"} for message in (user, assistant))] += 1
        targets = [kind for kind in content_types(assistant) if kind != "text"]
        assert len(targets) == len(set(targets))
        several += len(targets) > 1
    assert kinds == {(False, False): 20, (True, False): 20, (False, True): 20, (True, True): 20}
    assert several >= 5


def test_eval_covers_the_matrix(tmp_path):
    rows = read_rows(write_dataset(tmp_path, "eval", 32, seed=0, things=HELD_OUT))
    cells = Counter(tuple(row["id"].split("-")[2:]) for row in rows)
    assert len(cells) == 16 and set(cells.values()) == {2}
    for row in rows:
        source, target = row["id"].split("-")[2:]
        user, assistant = (content_types(message) for message in row["messages"])
        assert source in user and target in assistant
    assert not any(str(thing) in json.dumps(rows) for thing in SEEN)


def test_writing_again_changes_nothing_and_new_arguments_do(tmp_path):
    path = write_dataset(tmp_path, "stage2", 6, seed=0)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.rglob("*.*") if file.is_file()}
    write_dataset(tmp_path, "stage2", 6, seed=0)
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in before} == before

    path.unlink()  # as after a kill between the two renames
    write_dataset(tmp_path, "stage2", 6, seed=0)
    assert {file: file.read_bytes() for file in before} == {file: data for file, (_, data) in before.items()}

    write_dataset(tmp_path, "stage2", 9, seed=0)
    assert len(read_rows(path)) == 9
    assert path.read_bytes().startswith(before[path][1])  # row i does not depend on the number of rows
    write_dataset(tmp_path, "stage2", 9, seed=1)
    assert not path.read_bytes().startswith(before[path][1])


def test_a_failure_leaves_the_old_dataset(tmp_path, monkeypatch):
    path = write_dataset(tmp_path, "stage1", 3, seed=0)
    old = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("anygpt.media.types.write_audio", fail)
    with pytest.raises(OSError, match="disk full"):
        write_dataset(tmp_path, "stage1", 6, seed=0)
    assert path.read_bytes() == old
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stage1", "stage1.jsonl"]


def test_dataset_arguments_are_checked(tmp_path):
    with pytest.raises(InputError, match="stage9"):
        write_dataset(tmp_path, "stage9", 3, seed=0)
    for wrong in ({"num_samples": 0}, {"seed": -1}, {"things": ()}):
        with pytest.raises(InputError, match="num_samples >= 1"):
            write_dataset(tmp_path, "stage1", **{"num_samples": 3, "seed": 0, **wrong})


def test_the_command_writes_all_kinds(tmp_path, capsys):
    main(["--output", str(tmp_path), "--samples", "4", "--eval-samples", "16"])
    assert capsys.readouterr().out.split() == [str(tmp_path / f"{kind}.jsonl") for kind in STAGE_KINDS]
    held_out = [str(thing) for thing in HELD_OUT]
    for kind in STAGE_KINDS:
        about = (tmp_path / f"{kind}.jsonl").read_text()
        assert any(thing in about for thing in held_out) == (kind == "eval")
    assert exit_code(main, ["--output", str(tmp_path), "--samples", "0"]) == 2
    assert "num_samples=0" in capsys.readouterr().err


def test_the_command_writes_the_kinds_that_it_is_asked_for(tmp_path):
    main(["--output", str(tmp_path), "--samples", "2", "--kinds", "stage2", "stage1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage1", "stage1.jsonl", "stage2", "stage2.jsonl"]


@pytest.mark.parametrize("kind", ["stage3", "dialogues"])
def test_later_turns_speak_of_the_first_thing(kind, tmp_path):
    rows = read_rows(write_dataset(tmp_path, kind, 300, seed=0))
    assert {len(row["messages"]) // 2 for row in rows} == set(EXCHANGES[kind])
    resolved = 0
    for row in rows:
        said = [" ".join(part.get("text", "") for part in message["content"]) for message in row["messages"]]
        for question, answer in zip(said[2::2], said[3::2], strict=True):
            if "the first one" not in question:
                continue
            if named := [str(thing) for text in said for thing in THINGS if f" {thing}" in text]:
                thing = read_words(f"a {named[0]}")
                assert read_words(answer).shapes <= thing.shapes and read_words(answer).colours <= thing.colours
                resolved += 1
    assert resolved > 20
