"""ToyWorld 2: scenes, their captions and split, the exact judge, and its suite."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from training_utils import REPOSITORY
from transformers import AutoTokenizer

from anygpt import load_decoder, load_encoder
from anygpt.commands.evaluate import main as evaluate
from anygpt.data.dataset import ConversationDataset, DataSource
from anygpt.data.grammar import CATEGORIES, describe
from anygpt.decoders.conditions import Condition
from anygpt.errors import InputError
from anygpt.parts.source import ZOO
from anygpt.toyworld import HELD_OUT, SEEN, THINGS, scene_parts
from anygpt.toyworld.__main__ import main
from anygpt.toyworld.datasets import write_dataset
from anygpt.toyworld.scenes import (
    COUNTS_HELD_OUT,
    KINDS,
    PAIRS_HELD_OUT,
    Scene,
    find_things,
    fits,
    invent,
    read_caption,
    render_scene,
    scene_row,
)


def make(things, number, seed=0):
    """`number` scenes of each category, and their pictures."""
    rng = np.random.default_rng(seed)
    scenes = [invent(category, things, rng) for category in CATEGORIES for _ in range(number)]
    return scenes, [render_scene(scene, rng) for scene in scenes]


@pytest.fixture(scope="module")
def fresh():
    return make(THINGS, 15, seed=987_654)


def share_right(images, scenes):
    found = find_things(images)
    return np.mean([fits(scene.expected, things) for scene, things in zip(scenes, found, strict=True)])


def test_captions_say_what_is_expected(fresh):
    for scene in fresh[0]:
        assert read_caption(f"Here is the picture: {scene.caption}.") == scene.expected
    assert read_caption("Three crosses") == {
        "category": "counting",
        "things": [{"name": "cross", "count": 3, "colour": None}],
        "relation": None,
    }
    assert read_caption("a red ring left of an orange square")["relation"] == "left of"
    assert read_caption("a smell of Tuesday") is None


def test_things_without_a_relation_are_named_in_reading_order():
    scenes, _ = make(THINGS, 60)
    pairs = [scene for scene in scenes if len(scene.expected["things"]) == 2 and not scene.expected["relation"]]
    assert {scene.places for scene in pairs} == set(combinations(range(4), 2))
    assert all(
        [thing.shape for thing in scene.things] == [thing["name"] for thing in scene.expected["things"]]
        for scene in pairs
    )


@pytest.mark.parametrize(("things", "held_out"), [(SEEN, False), (HELD_OUT, True)], ids=["seen", "held out"])
def test_the_split_is_by_composition(things, held_out):
    scenes, _ = make(things, 30)
    for scene in scenes:
        assert all((thing in HELD_OUT) == held_out for thing in scene.things)
        category, shapes = scene.expected["category"], {thing.shape for thing in scene.things}
        if category in ("two_objects", "position"):
            assert (shapes in PAIRS_HELD_OUT) == held_out
        if category == "counting":
            assert (COUNTS_HELD_OUT[scene.things[0].shape] == len(scene.things)) == held_out
    assert {scene.expected["category"] for scene in make(THINGS, 1)[0]} == set(CATEGORIES)


def test_the_judge_is_right_on_renders(fresh):
    scenes, images = fresh
    found = find_things(images)
    for scene, things in zip(
        scenes, found, strict=True
    ):  # every shape, colour and number, also where a caption says less
        assert Counter((one.shape, one.colour) for one in things) == Counter((t.shape, t.colour) for t in scene.things)
    assert share_right(images, scenes) == 1
    assert share_right([image.filter(ImageFilter.GaussianBlur(0.6)) for image in images], scenes) >= 0.98
    assert share_right([image.resize((128, 128), Image.Resampling.BICUBIC) for image in images], scenes) >= 0.98


def test_the_judge_refuses_what_was_not_asked_for(fresh):
    """Another number, another colour, colours that are swapped, the other side, and one thing too many."""
    scenes, images = fresh
    found = find_things(images)
    for scene, things in zip(scenes, found, strict=True):
        first, *others = scene.expected["things"]
        wrong = [scene.expected | {"things": [first | {"count": first["count"] % 4 + 1}, *others]}]
        if first["colour"]:
            wrong.append(scene.expected | {"things": [first | {"colour": "none"}, *others]})
        if first["colour"] and others:
            swapped = [first | {"colour": others[0]["colour"]}, others[0] | {"colour": first["colour"]}]
            wrong.append(scene.expected | {"things": swapped})
        if scene.expected["relation"]:
            other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
            wrong.append(scene.expected | {"relation": other[scene.expected["relation"]]})
            wrong.append(scene.expected | {"things": scene.expected["things"][::-1]})
        for expected in wrong:
            assert not fits(expected, things), describe(expected)
        assert not fits(scene.expected, things[1:])
    grey = Image.new("RGB", (64, 64), (20, 20, 20))
    assert find_things([grey, Image.new("RGB", (64, 64), (250, 250, 250))])[0] == []


@pytest.mark.parametrize("kind", KINDS)
def test_datasets_are_valid(kind, tmp_path):
    path = write_dataset(tmp_path / "a", kind, 24, seed=1, world=2)
    samples = ConversationDataset.from_files([DataSource(str(path))]).samples
    ways = Counter(tuple(sample.id.split("-")[2:]) for sample in samples)
    assert len(samples) == 24 and len(ways) == 6 * len(KINDS[kind])
    for sample in samples:
        user, assistant = sample.messages
        caption = next((part.caption for part in assistant.content if part.path), assistant.content[0].text)
        assert read_caption(caption) and caption in assistant.content[0].text + caption
        for part in (*user.content, *assistant.content):
            if part.path:
                assert Image.open(part.path).size == (64, 64) and fits(read_caption(caption), *find_things_in(part))
        assert assistant.content[0].text.startswith("Here") == bool(assistant.content[1:]) or kind in ("words", "views")
    again = write_dataset(tmp_path / "b", kind, 24, seed=1, world=2)
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(InputError, match="world 2"):
        write_dataset(tmp_path, "dialogues", 1, seed=0, world=2)


def test_captions_in_full_do_not_tell_what_is_held_out():
    rng, captions = np.random.default_rng(0), []

    def show(name, scene):
        captions.append(read_caption(scene.caption))
        return {"type": "image", "path": name}

    for index in range(600):
        scene_row("stage2", index, SEEN, rng, show)
    related = [caption["things"] for caption in captions if caption["relation"]]
    assert any(thing["colour"] for things in related for thing in things)
    assert not any({thing["name"] for thing in things} in PAIRS_HELD_OUT for things in related)
    numbers = {
        (t["count"], t["name"], t["colour"]) for caption in captions for t in caption["things"] if t["count"] > 1
    }
    assert len(numbers) > 30 and not any(COUNTS_HELD_OUT[name] == count for count, name, _ in numbers)


def find_things_in(part):
    return find_things([Image.open(part.path)])


def test_the_suite_scores_by_category_and_input(tmp_path):
    """True pictures are all right; pictures of the next row are not."""
    main(["--world", "2", "--output", str(tmp_path / "data"), "--kinds", "eval", "--eval-samples", "24"])
    rows = [json.loads(line) for line in (tmp_path / "data/eval.jsonl").read_text().splitlines()]
    pictures = [row["messages"][1]["content"][1]["path"] for row in rows]
    scores = {}
    for name, shift in (("right", 0), ("wrong", 1)):
        lines = [
            {"id": row["id"], "text": "", "files": [{"type": "image", "path": pictures[i - shift]}]}
            for i, row in enumerate(rows)
        ]
        (tmp_path / "data/index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        suite = ["--suite", str(REPOSITORY / "configs/evaluation/toyworld2.yaml"), "--output", str(tmp_path / name)]
        data = json.dumps([{"path": str(tmp_path / "data/eval.jsonl")}])
        evaluate([*suite, "--answers", str(tmp_path / "data"), "--data", data])
        scores[name] = json.loads((tmp_path / name / "metrics.json").read_text())["metrics"]
    groups = {f"scenes_{category}_from_{source}" for category in CATEGORIES for source in ("text", "image")}
    assert set(scores["right"]) == groups | {"scenes"}
    assert all(found["model"]["value"] == 1 and found["model"]["n"] in (2, 24) for found in scores["right"].values())
    assert scores["wrong"]["scenes"]["model"]["value"] < 0.2


@pytest.mark.parametrize(
    ("caption", "told"),
    [
        ("a ring", {"ring": ("ring", None, None, 1)}),
        ("three red crosses", {"es": ("cross", "red", None, 3)}),
        (
            "a circle and a square",
            {
                "circle": ("circle", None, None, 1),
                "and": ("circle", None, "first", 1),
                "square": ("square", None, "second", 1),
            },
        ),
        (
            "a red circle left of a blue square",
            {
                "circle": ("circle", "red", None, 1),
                "of": ("circle", "red", "left of", 1),
                "square": ("square", "blue", "right of", 1),
            },
        ),
        (
            "a ring below a cross",
            {
                "ring": ("ring", None, None, 1),
                "ow": ("ring", None, "below", 1),
                "cross": ("cross", None, "above", 1),
            },
        ),
    ],
)
def test_the_text_encoder_learns_what_is_told_by_each_word(caption, told):
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "image_decoder/tokenizer")
    ids, labels = scene_parts.read_captions([Scene(read_caption(caption), (), ())], tokenizer, 16)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == caption
    found, after = {}, []
    for token, (shape, colour, side, number) in zip(ids[0].tolist(), labels[0].tolist(), strict=True):
        if shape >= 0:
            colour = scene_parts.COLOURS[colour - 1] if colour else None
            side = scene_parts.SIDES[side]
            what = (scene_parts.SHAPES[shape], colour, side, number)
            if token == tokenizer.eos_token_id:
                after.append(what)
            else:
                found[tokenizer.decode(token).strip()] = what
    assert found == told
    last = list(told.values())[-2:]
    assert len(after) == (ids[0] == tokenizer.eos_token_id).sum() and set(after) == set(last)
    assert all(one != other for one, other in pairwise(after)) or len(set(last)) == 1


def test_a_decoder_gets_a_text_encoder_that_tells_order(tmp_path, capsys):
    """After a few updates already the states tell more than chance; the rest of the decoder stays as it was."""
    scene_parts.main(["text", str(ZOO / "image_decoder"), "--output", str(tmp_path / "made"), "--steps", "100"])
    share = float(capsys.readouterr().out.split("%")[0].split()[-1])
    assert share > 15  # the most frequent label of each property: less than 5
    made, before = load_decoder(tmp_path / "made"), load_decoder(ZOO / "image_decoder")
    states = [made.encode_text([text]) for text in ("a ring left of a cross", "a cross left of a ring")]
    assert states[0].shape == before.encode_text(["a ring"]).shape and not torch.allclose(*states, atol=0.1)
    settings = [folder / "anygpt_decoder.json" for folder in (tmp_path / "made", ZOO / "image_decoder")]
    assert settings[0].read_text() == settings[1].read_text()
    assert type(made.pipeline.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert made.pipeline.scheduler.config.prediction_type == before.pipeline.scheduler.config.prediction_type
    for name in ("unet", "vae"):
        pair = zip(getattr(made.pipeline, name).parameters(), getattr(before.pipeline, name).parameters(), strict=True)
        assert all(torch.equal(*one) for one in pair)
    generators = [[torch.Generator().manual_seed(seed) for seed in (0, 1)] for _ in range(2)]
    texts, options = ["a ring", "a cross"], {"num_inference_steps": 2, "guidance_scale": 2.0}
    both = made.sample(Condition.of(made.encode_text(texts)), generator=generators[0], **options)
    for text, generator, picture in zip(texts, generators[1], both, strict=True):
        (alone,) = made.sample(Condition.of(made.encode_text([text])), generator=[generator], **options)
        assert np.abs(np.asarray(alone, int) - np.asarray(picture, int)).max() <= 1
    with pytest.raises(InputError, match="is there already"):
        scene_parts.main(["text", str(ZOO / "image_decoder"), "--output", str(tmp_path / "made")])
    with pytest.raises(InputError, match="TextToVideoSDPipeline, expected a StableDiffusionPipeline"):
        scene_parts.main(["text", str(ZOO / "video_decoder"), "--output", str(tmp_path / "other")])
    (tmp_path / "made/model_index.json").unlink()
    with pytest.raises(InputError, match="is missing, expected a StableDiffusionPipeline"):
        scene_parts.main(["text", str(tmp_path / "made"), "--output", str(tmp_path / "other")])
    with pytest.raises(InputError, match=r"holds no config\.json, expected clip_text_model"):
        scene_parts.main(["text", str(tmp_path), "--output", str(tmp_path / "other")])


def test_an_image_encoder_learns_what_is_in_each_quarter(tmp_path, capsys):
    red, blue = (next(t for t in THINGS if str(t) == name) for name in ("red ring", "blue square"))
    (labels,) = scene_parts.read_pictures([Scene({}, (red, blue), (1, 2))], 4)
    nothing, one, other = (0,) * 5, (5, 1, 2, 2, 1), (2, 3, 3, 1, 2)  # the square is one place to the left, one down
    upper, lower = [nothing, nothing, one, one], [other, other, nothing, nothing]
    assert list(map(tuple, labels.tolist())) == [(-100,) * 5, *upper, *upper, *lower, *lower]

    scene_parts.main(["image", str(ZOO / "image_encoder"), "--output", str(tmp_path / "made"), "--steps", "50"])
    assert float(capsys.readouterr().out.split("%")[0].split()[-1]) > 50  # without training: less than 10
    before, made = (load_encoder(str(folder), "image") for folder in (ZOO / "image_encoder", tmp_path / "made"))
    assert {name: p.shape for name, p in before.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}
    assert {file.name for file in (tmp_path / "made").iterdir()} == {
        file.name for file in (ZOO / "image_encoder").iterdir()
    }
