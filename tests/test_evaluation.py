"""The any-to-any matrix: what is asked, how it is judged and counted, and what is written."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from anygpt import InputError, commands
from anygpt.media.types import read_media
from anygpt.outputs import Answer, Segment
from anygpt.toyworld import COLOURS, HELD_OUT, SEEN, SHAPES, language
from anygpt.toyworld.evaluation.answers import Examiner, Settings, judge, moving_caption, share, wilson_interval
from anygpt.toyworld.evaluation.matrix import cell_table, check_settings, motion_table, turn_table
from anygpt.toyworld.evaluation.requests import TURNS, WAYS, conversation_requests, matrix_requests, talk_requests
from anygpt.toyworld.language import plain_caption
from anygpt.toyworld.render import render_audio, render_image, render_video
from anygpt.toyworld.world import VALIDATION

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from zoo_quality import fit_probe, probe_encoders

CELLS = [(source, target) for source in WAYS for target in WAYS]


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    folder = tmp_path_factory.mktemp("requests")
    return folder, matrix_requests(folder, WAYS, WAYS, HELD_OUT, 10, seed=0)


def right_answer(request, rng):
    """What a perfect model would give."""
    if request.target == "text":
        said = request.reference[0] if request.reference else f"It is {plain_caption(request.thing, request.motion)}."
        return Answer([Segment("text", said)])
    medium = {
        "image": lambda: render_image(request.thing, rng),
        "video": lambda: render_video(request.thing, request.motion, rng),
        "audio": lambda: render_audio(request.thing, rng),
    }[request.target]()
    return Answer([Segment("text", "Here it is: "), Segment(request.target, medium)])


def test_wilson_interval():
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert share([])["rate"] is None


def test_every_cell_is_asked_about_every_thing(requests):
    folder, asked = requests
    assert len(asked) == 160 and len({request.id for request in asked}) == 160
    for source, target in CELLS:
        cell = [request for request in asked if (request.source, request.target) == (source, target)]
        assert {request.thing for request in cell} == set(HELD_OUT)
        for request in cell:
            assert (request.path is None) == (source == "text")
            if request.path:
                stored = read_media(source, folder / request.path)
                assert type(stored) is type(request.medium)
            assert ("moving" in request.prompt or "move" in request.prompt) <= (target == "video" or source == "video")
    assert not any(str(thing) in request.prompt for request in asked for thing in SEEN)
    # what is shown is the same in all four cells of a row
    shown = {(request.source, request.id[-4:]): set() for request in asked}
    for request in asked:
        shown[request.source, request.id[-4:]].add(request.path)
    assert all(len(paths) == 1 for paths in shown.values())


def test_requests_depend_on_seed_and_number_alone(requests, tmp_path):
    _, asked = requests
    again = {request.id: request for request in matrix_requests(tmp_path, WAYS, WAYS, HELD_OUT, 3, seed=0)}
    for request in asked:
        if request.id in again:
            assert again[request.id].prompt == request.prompt and again[request.id].thing == request.thing
    other = matrix_requests(tmp_path / "other", WAYS, WAYS, HELD_OUT, 3, seed=1)
    assert [request.prompt for request in other] != [again[request.id].prompt for request in other]


def test_validation_things_are_seen_and_leave_every_shape_and_colour():
    assert set(VALIDATION) <= set(SEEN) and not set(VALIDATION) & set(HELD_OUT)
    left = [thing for thing in SEEN if thing not in VALIDATION]
    assert {thing.shape for thing in left} == set(SHAPES) and {thing.colour for thing in left} == set(COLOURS)


def test_right_answers_are_right(requests):
    _, asked = requests
    rng = np.random.default_rng(1)
    judged = [judge(request, right_answer(request, rng)) for request in asked]
    table = cell_table(judged)
    for source, target in CELLS:
        cell = table[source][target]
        assert cell["right"]["rate"] == 1.0, (source, target)
        assert cell["missing"]["right"] == cell["unasked"]["right"] == 0
    assert {(i, o) for i, row in motion_table(judged).items() for o in row} == {
        *((source, "video") for source in WAYS),
        ("video", "text"),
    }
    assert all(found["rate"] == 1.0 for row in motion_table(judged).values() for found in row.values())


def test_answers_to_another_request_are_wrong(requests):
    """About another thing, of another kind, or none at all."""
    _, asked = requests
    rng = np.random.default_rng(1)
    for request in asked[::7]:
        if (request.source, request.target) == ("text", "text"):
            continue
        other = next(r for r in asked if r.target == request.target and r.thing.shape != request.thing.shape)
        wrong = judge(request, right_answer(other, rng))
        assert not wrong.right and not wrong.missing and not wrong.shape_right
        nothing = judge(request, Answer())
        assert nothing.missing and not nothing.right
        if request.target != "text":
            unasked = next(way for way in WAYS[1:] if way != request.target)
            stray = next(r for r in asked if r.target == unasked and r.thing == request.thing)
            found = judge(request, right_answer(stray, rng))
            assert found.missing and not found.right and found.unasked == (unasked,)
            twice = right_answer(request, rng)
            twice.segments += [s for s in twice.segments if s.type == request.target]
            assert judge(request, twice).unasked == (request.target,)


def test_talk():
    asked = talk_requests(HELD_OUT, 6, seed=0)
    assert len(asked) == 18
    for request in asked:
        assert judge(request, Answer([Segment("text", request.reference[0])])).right
        assert not judge(request, Answer([Segment("text", "It is a shoe.")])).right


@pytest.mark.parametrize(
    ("said", "motion", "caption"),
    [
        ("It is a red circle moving left.", "up", "It is a red circle moving up."),
        ("The clip has a ring that moves down.", None, "The clip has a ring."),
        ("a red circle", "left", "a red circle moving left"),
        ("", None, ""),
    ],
)
def test_captions_move_as_they_are_asked_to(said, motion, caption):
    assert moving_caption(said, motion) == caption


def test_answers_come_back_with_their_own_requests(tiny_model, tmp_path):
    """Batches are put together by what is asked for; each answer is that of its row asked alone."""
    model, processor = tiny_model()
    asked = matrix_requests(tmp_path, WAYS, ("text", "image"), HELD_OUT, 1, seed=0)
    settings = Settings(batch_size=3, max_new_tokens=5, steps=dict.fromkeys(WAYS[1:], 1))
    together = list(Examiner(model, processor, settings).ask(asked))
    assert {request.id for request, _ in together} == {request.id for request in asked}
    for request, answer in together:
        ((_, alone),) = Examiner(model, processor, settings).ask([request])
        assert answer.text == alone.text


@pytest.fixture(scope="module")
def evaluated(tiny_model, tmp_path_factory):
    """An untrained model that likes to give media, and what the script makes of it."""
    folder = tmp_path_factory.mktemp("evaluated")
    model, processor = tiny_model(seed=3)
    with torch.no_grad():
        for rows in model.signal_tokens.output_rows.values():
            rows.mul_(30.0)
    model.save_pretrained(folder / "run/final")
    processor.save_pretrained(folder / "run/final")
    output = folder / "report"
    output.mkdir()
    (output / "mine.txt").write_text("stays")
    (output / "matrix.json").write_text("old")
    arguments = ["--checkpoint", str(folder / "run/final"), "--output", str(output), "--tracker", "tensorboard"]
    code = commands.run(
        "evaluate",
        [
            *arguments,
            "--samples",
            "2",
            "--talk-samples",
            "1",
            "--conversations",
            "2",
            "--steps",
            "1",
            "--max-new-tokens",
            "16",
        ],
    )
    assert code == 0
    return output


def test_matrix_json(evaluated):
    report = json.loads((evaluated / "matrix.json").read_text())
    assert [(i, o) for i, row in report["matrix"].items() for o in row] == CELLS
    assert report["samples"] == 2
    assert list(report["upper_bound"]) == list(WAYS[1:])
    assert [(i, o) for i, row in report["caption_baseline"].items() for o in row] == [
        c for c in CELLS if c[1] != "text"
    ]
    for source, target in CELLS:
        low, high = report["intervals"][source][target]
        assert 0 <= low <= report["matrix"][source][target] <= high <= 1
    assert report["settings"]["steps"] == {"image": 1, "video": 1, "audio": 1}
    assert report["missing"]["n"] == report["unasked"]["n"] == 32
    assert set(report["things"]) == {str(thing) for thing in HELD_OUT}
    assert [turn["right"]["n"] for turn in report["turns"]] == [2] * TURNS


def test_conversations_look_back(requests, tmp_path):
    """Every turn is about a thing that was named before, or new; "it" is the thing of the last turn that had one."""
    conversations = conversation_requests(tmp_path, WAYS, WAYS, HELD_OUT, 16, seed=0)
    assert {(first.source, first.target) for first, *_ in conversations} == set(CELLS)
    kinds = Counter()
    for turns in conversations:
        told = []
        for number, request in enumerate(turns):
            assert request.path is None or (tmp_path / request.path).is_file()
            for it, place in ((language.FIRST, 0), (language.LATEST, -1)):
                if number and request.path is None and re.search(rf"\b{it}\b(?!:)", request.prompt) and told:
                    if request.thing is not None and str(request.thing) not in request.prompt:
                        riddle = request.prompt.startswith(("There is", "I have", "Think of", "Something"))
                        assert riddle or request.thing == told[place]
                        kinds[it] += not riddle
                    break
            told += [request.thing] if request.thing is not None else []
    assert kinds[language.FIRST] and kinds[language.LATEST]


def test_a_conversation_is_held_with_its_own_answers(tiny_model, tmp_path):
    """Each turn's prompt holds what was asked and answered before, generated media as inputs of the next turn."""
    model, processor = tiny_model()
    conversations = conversation_requests(tmp_path, WAYS, WAYS, HELD_OUT, 2, seed=0)
    judged = Examiner(model, processor, Settings(max_new_tokens=20)).hold(conversations)
    for turn, ones in enumerate(judged):
        for one in ones:
            assert [m["role"] for m in one.request.before] == ["user", "assistant"] * turn
    assert all(table["right"]["n"] == 2 for table in turn_table(judged))


def test_samples_and_their_index(evaluated):
    lines = [json.loads(line) for line in (evaluated / "samples/index.jsonl").read_text().splitlines()]
    assert sorted((line["input"], line["output"]) for line in lines) == sorted(CELLS * 2)
    for line in lines:
        assert line["thing"] in {str(thing) for thing in HELD_OUT}
        assert (line["input_path"] is None) == (line["input"] == "text")
        for kind, path in ((line["input"], line["input_path"]), (line["output"], line.get("path"))):
            if path is not None:
                read_media(kind, evaluated / "samples" / path)
        assert ("path" in line) == (line["output"] != "text" and not line["missing"])
    assert any("path" in line for line in lines) and any(line["unasked"] for line in lines)


def test_report_and_sheet(evaluated):
    page = (evaluated / "report.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)  # nothing outside is needed
    assert len(re.findall(r"<small>\d+–\d+, n = 2</small>", page)) == 16
    assert read_media("image", evaluated / "contact_sheet.png").width > 500
    assert (evaluated / "mine.txt").read_text() == "stays"
    expected = {"mine.txt", "matrix.json", "samples", "report.html", "contact_sheet.png", "anygpt"}
    assert {path.name for path in evaluated.iterdir()} == expected  # the last one is the tracker's
    assert not list(evaluated.parent.glob(".report-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "--samples is 0"),
        (["--steps", "0"], "error: --steps is 0, expected greater than 0\n"),
        (["--guidance", "nan"], "finite"),
        (["--device", "nowhere"], "--device"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    assert commands.run("evaluate", ["--output", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_not_of_an_evaluation_is_not_replaced(tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/own.txt").write_text("mine")
    assert commands.run("evaluate", ["--output", str(tmp_path), "--checkpoint", "nowhere"]) == 2
    assert "is not from an evaluation" in capsys.readouterr().err
    assert commands.run("evaluate", ["--output", str(tmp_path / "samples/own.txt/out"), "--checkpoint", "nowhere"]) == 2
    assert "own.txt is a file" in capsys.readouterr().err
    assert (tmp_path / "samples/own.txt").read_text() == "mine"


def test_settings_are_checked():
    check_settings(Settings())
    with pytest.raises(InputError, match=r"--samples is 0.*--batch-size is 0"):
        check_settings(Settings(samples=0, batch_size=0))
    with pytest.raises(InputError, match=r"^--steps is 0, expected greater than 0$"):
        check_settings(Settings(steps={"image": 0, "video": 0}))


def test_linear_probe_finds_a_linear_rule():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(600, 8, generator=generator) * 3 + 5
    labels = (features[:, :3] - 5).argmax(-1)
    probe = fit_probe(features[:500], labels[:500], 3)
    assert (probe(features[500:]).argmax(-1) == labels[500:]).float().mean() > 0.85


def test_encoders_are_probed_on_things_that_the_probe_did_not_see(tiny_model):
    model, processor = tiny_model(decoders=())
    found = probe_encoders(model, processor, renders=2, fresh=3, seed=0)
    assert list(found) == ["image", "video", "audio"]
    assert all(share["n"] == 3 * len(HELD_OUT) for probes in found.values() for share in probes.values())
    assert found["image"]["colour"]["rate"] > 0.5  # random patches keep colours
