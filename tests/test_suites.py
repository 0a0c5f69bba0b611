"""Suites: what is asked, that nothing is asked twice, and that the numbers do not depend on how it was run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_utils import text, write_medium, write_rows
from training_utils import argument_maker, start_forked, toy_data, train_here, wait_for

from anygpt import InputError, commands
from anygpt.data.collation import NOT_FOR_MODEL
from anygpt.data.dataset import ConversationDataset, DataSource
from anygpt.evaluation.asking import Asker, answered
from anygpt.evaluation.metrics import METRICS
from anygpt.evaluation.report import text_table
from anygpt.evaluation.rows import read_rows
from anygpt.evaluation.run import asked_for, evaluate
from anygpt.evaluation.store import AnswerStore
from anygpt.evaluation.suite import read_suite
from anygpt.media.types import MEDIA, read_media

REPOSITORY = Path(__file__).parent.parent

ROWS = 6


def process(index=0, number=1):
    """As much of an accelerator as `evaluate` uses; processes run one after the other, the first one last."""
    return SimpleNamespace(
        is_main_process=index == 0,
        process_index=index,
        num_processes=number,
        device=torch.device("cpu"),
        wait_for_everyone=lambda: None,
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Rows that are answered with pictures, some from a picture."""
    folder = tmp_path_factory.mktemp("drawn")
    rows = []
    for i in range(ROWS):
        target = {"type": "image", "path": write_medium(folder, "image", i), "caption": f"a red ring {i}"}
        given = [{"type": "image", "path": write_medium(folder, "image", 10 + i)}] if i % 2 else []
        rows.append(([*given, text(f"make the picture of a red ring {i}")], [text("here "), target]))
    write_rows(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def draw_suite(drawn, networks):
    def make(*overrides, name="suite.yaml"):
        (drawn / name).write_text(
            f"""
name: pictures
data: [{{path: {drawn}/rows.jsonl}}]
ask: {{require: [image], num_inference_steps: 1, max_new_tokens: 4}}
metrics:
  - {{metric: frechet_distance, features: {networks}/dino}}
  - {{metric: clip_score, features: {networks}/clip}}
  - {{metric: clip_i, features: {networks}/clip}}
"""
        )
        return read_suite(drawn / name, overrides)

    return make


@pytest.fixture(scope="module")
def talker(tiny_model):
    return tiny_model()


def noted(monkeypatch):
    """Ids of the rows whose answers are made from now on."""
    asked, add = [], AnswerStore.add

    def noting(self, name, answer):
        asked.append((self.folder.name, name))
        add(self, name, answer)

    monkeypatch.setattr(AnswerStore, "add", noting)
    return asked


def values(report):
    return {
        (name, way): (found["value"], found["n"])
        for name, ways in report["metrics"].items()
        for way, found in ways.items()
    }


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key][0] == pytest.approx(other[key][0], rel=1e-3, abs=0.02) and one[key][1] == other[key][1], key


@pytest.fixture(scope="module")
def whole(draw_suite, talker, tmp_path_factory):
    """One process, batch 16, without an interruption."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, evaluate(draw_suite(), output, process(), *talker)


def test_what_is_written(whole):
    output, report = whole
    assert report == json.loads((output / "metrics.json").read_text())
    assert set(report["metrics"]) == {"frechet_distance", "clip_score", "clip_i"}
    for ways in report["metrics"].values():
        assert set(ways) == {"model", "upper_bound", "caption_baseline"}
    score = report["metrics"]["clip_score"]["model"]
    assert score["n"] == ROWS and score["interval"][0] <= score["value"] <= score["interval"][1]
    source = report["metrics"]["clip_i"]["model"]
    assert source["n"] == 3 and source["left_out"] == 3  # only half of the rows have a picture to be like
    assert "interval" not in report["metrics"]["frechet_distance"]["model"]
    assert report["about"]["frechet_distance"]["features"].endswith("dino")
    assert report["about"]["frechet_distance"]["better"] == "lower"
    assert report["seed"] == 0 and report["missing"] == {"image": 0} and "torchmetrics" in report["versions"]
    lines = [json.loads(line) for line in (output / "samples/index.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == [str(i) for i in range(ROWS)]
    for line in lines:
        assert [file["type"] for file in line["files"]] == ["image"]
        read_media("image", output / "samples" / line["files"][0]["path"])
    page = (output / "report.html").read_text()
    links = re.findall(r'src="([^"]+)"', page)
    assert len(links) == ROWS * 4 + 3 and all((output / link).is_file() for link in links)
    table = text_table(report)
    assert "upper bound" in table and "at least 17 samples are needed" in table


def test_noise_differs_from_row_to_row_and_the_upper_bound_has_the_same(whole):
    output, _ = whole
    pictures = [np.asarray(read_media("image", path)) for path in sorted((output / "samples").glob("*.png"))]
    assert not np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize("size", [1, 4])
def test_the_batch_size_changes_nothing(size, whole, draw_suite, talker, tmp_path):
    suite = draw_suite("--ask.batch_size", str(size))
    same(values(evaluate(suite, tmp_path / "out", process(), *talker)), values(whole[1]))


def test_two_processes_share_the_rows(whole, draw_suite, talker, tmp_path, monkeypatch):
    asked = noted(monkeypatch)
    suite = draw_suite("--ask.batch_size", "2")
    for way in ("samples", "baselines/upper_bound", "baselines/caption_baseline"):
        AnswerStore(tmp_path / "out" / way).claim(asked_for(suite))  # as the first process does before
    assert evaluate(suite, tmp_path / "out", process(1, 2), *talker) is None
    assert [row for way, row in asked if way == "samples"] == ["1", "3", "5"]
    same(values(evaluate(suite, tmp_path / "out", process(0, 2), *talker)), values(whole[1]))
    assert len(asked) == len(set(asked)) == 3 * ROWS
    assert [path.name for path in (tmp_path / "out/samples").glob("*.jsonl")] == ["index.jsonl"]


def test_after_a_kill_nothing_is_asked_twice(whole, draw_suite, talker, tmp_path, monkeypatch):
    asked = noted(monkeypatch)
    add = AnswerStore.add

    def dying(self, name, answer):
        if len(asked) == 8:
            with self.own.open("a") as index:
                index.write('{"id": "2", "te')  # what the kill left of the line
            raise KeyboardInterrupt
        add(self, name, answer)

    suite = draw_suite("--ask.batch_size", "2")
    with monkeypatch.context() as patch:
        patch.setattr(AnswerStore, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            evaluate(suite, tmp_path / "out", process(), *talker)
    assert not (tmp_path / "out/metrics.json").exists()
    report = evaluate(suite, tmp_path / "out", process(), *talker)
    assert len(asked) == len(set(asked)) == 3 * ROWS
    same(values(report), values(whole[1]))
    evaluate(suite, tmp_path / "out", process(), *talker)
    assert len(asked) == 3 * ROWS


def test_answers_of_other_settings_are_not_mixed(whole, draw_suite, talker):
    with pytest.raises(InputError, match=r"other questions \(ask changed\)"):
        evaluate(draw_suite("--ask.seed", "1"), whole[0], process(), *talker)
    with pytest.raises(InputError, match=r"other questions \(checkpoint changed\)"):
        evaluate(draw_suite(), whole[0], process(), *talker, facts={"checkpoint": "another"})


def test_finished_answers_are_scored_without_a_model(whole, draw_suite, tmp_path):
    output, report = whole
    found = evaluate(draw_suite(), tmp_path / "out", process(), answers=output / "samples")
    model = {key: value for key, value in values(report).items() if key[1] == "model"}
    same(values(found), model)


def test_answers_that_are_none(draw_suite, tmp_path):
    for line, message in (
        ({"id": "0", "files": [{"type": "image", "path": "../x.png"}]}, "not inside the media root"),
        ({"id": "0", "files": [{"type": "image", "path": "x.png"}]}, "does not exist"),
        ({"text": "a"}, "index.jsonl:1 is no answer"),
        ({"id": "another", "text": "a"}, "no answer to look at: none of 6 rows .* such as 'another'"),
        ({"id": "0", "text": None}, "is no answer: 'text' must be a string, and is missing"),
        ({"id": "0", "txt": "a"}, "is no answer: the key 'txt' is not known: did you mean 'text'"),
        ({"id": "0", "files": "x.png"}, "is no answer: 'files' is 'x.png'"),
        ({"id": "0", "files": [{"path": "x.png"}]}, r"is no answer, files\[0\]: the part type missing"),
        ('{"id": "0"}\n{"id": "0", "text": "a"}', ":2 is no answer: '0' has another answer above"),
        ('{"id": "0", "text": "\udce9"}', "expected .* in UTF-8"),
    ):
        line = line if isinstance(line, str) else json.dumps(line)
        (tmp_path / "index.jsonl").write_text(line + "\n", encoding="utf-8", errors="surrogateescape")
        with pytest.raises(InputError, match=message):
            evaluate(draw_suite(), tmp_path / "out", process(), answers=tmp_path)
    (tmp_path / "index.jsonl").write_text('{"id": "0", "text": "no picture"}\n')
    with pytest.raises(InputError, match="no answer to look at: none of 6 rows"):
        evaluate(draw_suite(), tmp_path / "out", process(), answers=tmp_path)


# ---- words


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """Pictures with two captions each, and clips with one."""
    folder = tmp_path_factory.mktemp("described")
    rows = []
    for i in range(3):
        given = [{"type": "image", "path": write_medium(folder, "image", i)}, text("What is it?")]
        rows += [(given, [text(said)]) for said in (f"a red ring {i}", f"one ring, number {i}")]
    rows.append(([{"type": "video", "path": write_medium(folder, "video", 0)}, text("What is it?")], [text("a ring")]))
    return write_rows(folder / "rows.jsonl", rows)


def word_suite(described, metrics, *overrides, **ask):
    path = described.parent / "suite.yaml"
    path.write_text(json.dumps({"data": [{"path": str(described)}], "ask": ask, "metrics": metrics}))
    return read_suite(path, overrides)


CAPTIONING = [{"metric": name} for name in ("bleu", "rouge_l", "cider", "exact_match", "vqa_accuracy")]


def test_captions_and_the_language_model_alone(described, talker, tmp_path):
    suite = word_suite(described, CAPTIONING, max_new_tokens=4, prompt="{text} Say it in a word.")
    rows = read_rows(suite)
    assert rows[0].references == ("a red ring 0", "one ring, number 0") and len(rows) == 4
    assert rows[0].question == "What is it? Say it in a word." and set(rows[3].sources) == {"video"}
    report = evaluate(suite, tmp_path / "out", process(), *talker)
    assert {"bleu_1", "bleu_4", "rouge_l", "cider", "exact_match", "vqa_accuracy"} <= set(report["metrics"])
    assert all(set(ways) == {"model", "without_media"} for ways in report["metrics"].values())
    said = [
        {line["id"]: line["text"] for line in map(json.loads, path.read_text().splitlines())}
        for path in (tmp_path / "out/samples/index.jsonl", tmp_path / "out/baselines/without_media/index.jsonl")
    ]
    assert said[0] != said[1]


def test_right_words_are_right(described, tmp_path):
    suite = word_suite(described, CAPTIONING)
    said = [{"id": row.id, "text": row.references[i % len(row.references)]} for i, row in enumerate(read_rows(suite))]
    said += [{"id": number, "text": "a"} for number in (98, 99)]
    lines = [json.dumps(line | {"text": line["text"] + " \u2028"}, ensure_ascii=False) for line in said]
    (tmp_path / "index.jsonl").write_text("\n\n".join(lines), encoding="utf-8-sig")
    report = evaluate(suite, tmp_path / "out", process(), answers=tmp_path)
    assert report["strangers"] == {"n": 2, "first": ["98"]} and not report["unanswered"]
    assert "2 answers are to none of these rows, such as to '98'" in text_table(report)
    found = {name: ways["model"]["value"] for name, ways in report["metrics"].items()}
    assert found["rouge_l"] == found["exact_match"] == 1.0 and found["bleu_1"] == pytest.approx(1.0)


def test_choices_are_taken_by_likelihood(described, talker, tmp_path):
    """The choice is the one that the model gives the smallest loss, alone and in a batch."""
    model, processor = talker
    suite = word_suite(described, [{"metric": "multiple_choice"}], choices=["a red ring 0", "a ring", "blue"])
    report = evaluate(suite, tmp_path / "out", process(), *talker)
    assert report["metrics"]["multiple_choice"]["model"]["n"] == 4
    chosen = {line["id"]: line["text"] for line in map(json.loads, (tmp_path / "out/samples/index.jsonl").open())}
    asker = Asker(model, processor, suite, [])
    way = asker.ways(read_rows(suite), True)["model"]
    for row in read_rows(suite):
        ((_, answer),) = asker.answers(way, [row])
        losses = []
        for choice in row.choices:
            item = ConversationDataset([way[0](row)], num_video_frames=4)[0]
            batch = {k: v for k, v in asker.collator([answered(item, choice)]).items() if k not in NOT_FOR_MODEL}
            with torch.no_grad():
                term = model(**batch).losses["encoder_llm/nll"]
            losses.append(float(term.mean))
        assert answer.text == chosen[row.id] == row.choices[int(np.argmin(losses))]


@pytest.mark.parametrize("form", ["{}. {}", "{}) {}", "({}) {}", "{}: {}"])
def test_choices_that_a_question_lists(form, tmp_path):
    question = "\n".join(["What is it?", form.format("A", "a cat"), form.format("B", "a dog"), ""])
    path = tmp_path / "rows.jsonl"
    write_rows(path, [([text(question)], [text(said)]) for said in ("B", "a cat", form.format("B", "a dog"), "(A)")])
    metrics = [{"metric": "multiple_choice"}]
    (row,) = read_rows(word_suite(path, metrics, choices="lines"))
    assert row.choices == ("A", "B") and row.references == ("B", "A", "B", "A")
    for asked, said, message in (
        ("What is it?", "a cat", "a question lists none"),
        (question, "a bird", "'a bird' is none of the choices; expected one of A, B"),
    ):
        write_rows(path, [([text(asked)], [text(said)])])
        with pytest.raises(InputError, match=message):
            read_rows(word_suite(path, metrics, choices="lines"))


def test_all_turns_of_a_dialogue(tmp_path, talker):
    said = [("user", "hello"), ("assistant", "hi"), ("user", "a ring?"), ("assistant", "yes")]
    messages = [{"role": role, "content": words} for role, words in said]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "messages": messages}))
    suite = word_suite(tmp_path / "rows.jsonl", [{"metric": "bleu"}], turns="all")
    rows = read_rows(suite)
    assert [(row.id, row.references, len(row.prompt.messages)) for row in rows] == [
        ("a#1", ("hi",), 1),
        ("a#3", ("yes",), 3),
    ]
    assert evaluate(suite, tmp_path / "out", process(), *talker)["rows"] == 2
    assert len(read_rows(word_suite(tmp_path / "rows.jsonl", [{"metric": "bleu"}]))) == 1


def test_a_dialogues_own_pictures_are_shown_again(described, talker):
    """As in training and in a chat: what the assistant made is an input of the user's next turn."""
    picture = next(described.parent.rglob("*.png")).resolve()
    made = {"type": "image", "path": str(picture), "caption": "a ring"}
    said = [("user", "draw"), ("assistant", [made]), ("user", "which colour?"), ("assistant", "red")]
    messages = [{"role": role, "content": content} for role, content in said]
    rows = described.parent / "dialogue.jsonl"
    rows.write_text(json.dumps({"id": "a", "messages": messages}))
    suite = word_suite(rows, [{"metric": "bleu"}], turns="all")
    asker, seen = Asker(*talker, suite, []), []
    way = (lambda row: row.prompt, lambda batch, items: seen.extend(items) or asker.write(batch, items))
    assert len(list(asker.answers(way, read_rows(suite)))) == len(seen) == 2
    assert [part.type for part in seen[1].sample.messages[-1].content] == ["image", "text"]
    assert [one.size for one in seen[1].inputs["image"]] == [read_media("image", picture).size]


def test_a_limit_draws_from_all_rows(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [([text(f"{i}?")], [text("a")]) for i in range(200)])
    metrics = [{"metric": "bleu"}]
    ids = [int(row.id) for row in read_rows(word_suite(path, metrics, "--limit", "40"))]
    assert len(ids) == 40 and ids == sorted(ids) and max(ids) > 150
    assert ids != [int(row.id) for row in read_rows(word_suite(path, metrics, "--limit", "40", "--ask.seed", "1"))]


def test_baselines_that_fit_a_model_of_codes():
    """It makes media without decoders, which the upper bound and references belong to."""
    asker = object.__new__(Asker)
    asker.model, asker.looked_at, asker.makes = SimpleNamespace(decoders={}), ["image"], {"image": "image"}
    asker.suite = SimpleNamespace(ask=SimpleNamespace(choices=None), baselines=None)
    rows = [SimpleNamespace(sources={"image": "a.png"}, captions={"image": "a ring"})]
    assert list(asker.ways(rows, words=True)) == ["model", "without_media"]


# ---- mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--metrics", "[{metric: fidd}]"], "no metric 'fidd': did you mean 'fid'"),
        (["--metrics", "[{metric: fid, threshold: 0.1}]"], "metric fid takes no threshold"),
        (["--metrics", "[{metric: fid, revision: main}]"], "metric fid takes no revision"),
        (["--metrics", "[{metric: similarity, features: a, num_frames: 4}]"], "metric similarity takes no num_frames"),
        (["--metrics", "[{metric: composition, threshold: .nan}]"], "threshold"),
        (["--metrics", "[{metric: fvd}]"], r"metric fvd \(video\) does not fit: none of 6 rows has target"),
        (["--metrics", "[{metric: composition}]"], "none of 6 rows has expected"),
        (["--metrics", "[{metric: clip_score, features: nobody/nothing}]"], "hf download nobody/nothing"),
        (["--metrics", "[{metric: fid}]"], "needs the package torch-fidelity"),
        (["--metrics", "[{metric: frechet_distance}]"], "needs features"),
        (["--metrics", "[{metric: multiple_choice}]"], "none of 6 rows has choices"),
        (["--metrics", "[{metric: bleu}, {metric: bleu}]"], "two metrics are called bleu"),
        (["--metrics", "[]"], "metrics is empty"),
        (["--metric", "[]"], "unknown setting metric; did you mean metrics"),
        (["--ask.sed", "1"], "unknown setting ask.sed"),
        (["--ask.require", "[smell]"], "ask.require names 'smell', expected image or video or audio"),
        (["--ask.require", "image"], "ask.require"),
        (["--limit", "0"], "limit"),
        (["--ask.turns", "first"], "turns"),
        (["--baselines", "[upper]"], "upper_bound"),
        (["--baselines", "[without_media]"], "baselines: without_media does not fit"),
        (["--ask.num_inference_steps", "0"], "ask.num_inference_steps"),
        (["--data", "[{path: nowhere.jsonl}]"], "nowhere.jsonl does not exist"),
    ],
)
def test_mistakes_are_said_before_anything_is_asked(overrides, message, draw_suite, talker, tmp_path):
    with pytest.raises(InputError, match=message):
        evaluate(draw_suite(*overrides), tmp_path / "out", process(), *talker)
    assert not (tmp_path / "out").exists()


def test_a_decoder_that_is_not_there(draw_suite, tiny_model, tmp_path):
    with pytest.raises(InputError, match="looks at image, and the model makes audio"):
        evaluate(draw_suite(), tmp_path / "out", process(), *tiny_model(decoders=("audio",)))
    with pytest.raises(InputError, match="sets or looks at audio, and the model makes image"):
        suite = draw_suite("--ask.decoders", "{audio: {guidance_scale: 2}}")
        evaluate(suite, tmp_path / "out", process(), *tiny_model(decoders=("image",)))


def test_rows_that_ask_nothing(tmp_path):
    lines = {"messages": [{"role": "assistant", "content": "hello"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(lines))
    with pytest.raises(InputError, match="there is nothing to ask"):
        read_rows(word_suite(tmp_path / "rows.jsonl", [{"metric": "bleu"}]))


# ---- the command


def test_the_command(draw_suite, drawn, talker, whole, tmp_path, capsys):
    draw_suite()
    model, processor = talker
    model.save_pretrained(tmp_path / "final")
    processor.save_pretrained(tmp_path / "final")
    arguments = ["--checkpoint", str(tmp_path / "final"), "--suite", str(drawn / "suite.yaml"), "--limit", "2"]
    assert commands.run("evaluate", [*arguments, "--output", str(tmp_path / "out"), "--tracker", "tensorboard"]) == 0
    assert "clip_score" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/metrics.json").read_text())["rows"] == 2
    assert list((tmp_path / "out").rglob("events*"))
    for more, message in (
        (["--samples", "3"], "unknown setting samples"),
        (["--suite", "nowhere.yaml"], "is no file"),
        (["--checkpoint", "nowhere"], "nowhere does not exist"),
    ):
        assert commands.run("evaluate", [*arguments, "--output", str(tmp_path / "other"), *more]) == 2
        assert message in capsys.readouterr().err


def test_a_killed_command_goes_on(draw_suite, drawn, talker, tmp_path):
    """SIGKILL while it asks: the same command again writes the numbers of a run that was left alone."""
    draw_suite()
    talker[0].save_pretrained(tmp_path / "final")
    talker[1].save_pretrained(tmp_path / "final")
    arguments = ["--checkpoint", str(tmp_path / "final"), "--suite", str(drawn / "suite.yaml"), "--ask.batch_size", "1"]
    index = tmp_path / "killed/samples/index.jsonl"
    process = start_forked("scripts/evaluate.py", *arguments, "--output", tmp_path / "killed")
    wait_for(lambda: index.is_file() and index.read_text().count("\n") >= 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before, found = index.read_text(), []
    assert not (tmp_path / "killed/metrics.json").exists()
    for name in ("killed", "alone"):
        assert commands.run("evaluate", [*arguments, "--output", str(tmp_path / name)]) == 0
        found.append(json.loads((tmp_path / name / "metrics.json").read_text()) | {"seconds": None})
    kept, all_lines = ([json.loads(line) for line in text.splitlines()] for text in (before, index.read_text()))
    assert all(line in all_lines for line in kept[:2]) and len(all_lines) == ROWS
    assert found[0] == found[1]


@pytest.mark.slow
def test_two_real_processes(draw_suite, drawn, talker, whole, tmp_path):
    draw_suite()
    talker[0].save_pretrained(tmp_path / "final")
    talker[1].save_pretrained(tmp_path / "final")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29713"]
    arguments = ["scripts/evaluate.py", "--checkpoint", str(tmp_path / "final"), "--suite", str(drawn / "suite.yaml")]
    subprocess.run([*launch, *arguments, "--output", str(tmp_path / "out")], cwd=REPOSITORY, check=True)
    same(values(json.loads((tmp_path / "out/metrics.json").read_text())), values(whole[1]))


# ---- the suites that are shipped

SUITES = sorted((REPOSITORY / "configs/evaluation").glob("*.yaml"))


def layout(suite, folder):
    """Five made-up rows in the form that the suite's own comment shows; returns the data file's replacement."""
    kind = next((kind for kind in MEDIA if kind in f"{suite.ask.require} {suite.name}"), "image")
    kind = {"msrvtt_captions": "video", "audiocaps_captions": "audio"}.get(suite.name, kind)
    rows = []
    for i in range(5):
        medium = {"type": kind, "path": write_medium(folder, kind, i)}
        if suite.name == "dialogues":
            said = [("user", [text("hello")]), ("assistant", [text("hi")]), ("user", [medium, text("draw it")])]
            answer = ("assistant", [text("here"), {**medium, "caption": f"ring {i}"}])
            rows.append({"messages": [{"role": role, "content": parts} for role, parts in [*said, answer]]})
        elif suite.ask.require:
            answer = [text("Here it is."), {**medium, "caption": f"a ring {i}"}]
            rows.append(
                {"messages": [{"role": "user", "content": f"Make ring {i}."}, {"role": "assistant", "content": answer}]}
            )
        else:
            asked = {"role": "user", "content": [medium, text("What is it?")]}
            rows += [{"messages": [asked, {"role": "assistant", "content": said}]} for said in ("a ring", f"ring {i}")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_shipped_suites_run(path, talker, networks, tmp_path):
    """End to end on tiny parts, with networks of the same kinds in the place of those of the hub."""
    suite = read_suite(path)
    tiny = {"text": "bert", "image": "clip", "video": "videomae", "audio": "clap"}
    for spec in suite.metrics:
        kind = METRICS[spec.metric]
        if kind.features is not None:
            by_frame = spec.metric in ("clipsim", "frame_consistency", "frame_fid")
            name = "clip" if by_frame else "ast" if kind.classify else tiny[kind.modality or suite.ask.require[0]]
            spec.features = str(networks / name)
        spec.detector = spec.detector and str(networks / "owlvit")
    if suite.data:
        suite.data = [DataSource(layout(suite, tmp_path))]
    else:
        suite.composition = 1
    suite.ask.num_inference_steps, suite.ask.max_new_tokens = 1, 3
    report = evaluate(suite, tmp_path / "out", process(), *talker)
    # the first turns of the dialogues ask the same
    assert report["rows"] == {"geneval": 6, "dialogues": 6}.get(suite.name, 5) and not report["unanswered"]
    for name, ways in report["metrics"].items():
        words = name.split("_")[0] in ("bleu", "rouge", "cider", "vqa", "exact", "retrieval")
        assert len(ways) == (2 if words else 3), name
        for way, found in ways.items():  # nothing asks the untrained model for pictures in dialogues
            lacks = (suite.name, name, way) == ("dialogues", "clip_score", "model")
            assert (found["value"] is None and "no answer has caption" in found["note"]) if lacks else found["n"], name
    first = path.read_text().splitlines()
    assert first[0].startswith("# ") and any(line.startswith("# Data:") for line in first)


# ---- during training


def test_a_suite_runs_during_training(described, tmp_path_factory, tmp_path):
    """Its numbers are metrics: logged, and the checkpoint where one was best can be kept."""
    make = argument_maker(tmp_path_factory)
    word_suite(described, [{"metric": "rouge_l"}], "--name", "words", max_new_tokens=3)
    suite = described.parent / "suite.yaml"
    suite.write_text(json.dumps(json.loads(suite.read_text()) | {"name": "words"}))
    options = ["--train.eval_suite", str(suite), "--train.eval_steps", "1", "--train.save_steps", "1"]
    data = json.dumps([{"path": str(toy_data(tmp_path_factory) / "stage1.jsonl")}])
    final = train_here(
        1, make(1, tmp_path / "run", *options, "--data.eval", data, "--train.keep_best", "max:words/rouge_l", steps=2)
    )
    log = (final.parent / "log.txt").read_text()
    assert log.count("words/rouge_l") == 3 and "highest words/rouge_l" in log
    report = json.loads((final.parent / "evaluation/000002/metrics.json").read_text())
    assert list(report["metrics"]["rouge_l"]) == ["model"]  # without baselines
    bleu = tmp_path / "bleu.yaml"
    bleu.write_text(suite.read_text().replace('"rouge_l"', '"bleu"'))
    watched = ("--train.eval_suite", bleu, "--train.eval_steps", "1", "--train.save_steps", "1", "--data.eval", data)
    with pytest.raises(InputError, match=r"names 'words/bleu', which the suite does not give; it gives words/bleu_1"):
        train_here(1, make(1, tmp_path / "bleu", *watched, "--train.keep_best", "max:words/bleu", steps=2))
    with pytest.raises(InputError, match=r"names the metric 'words/bleu', which does not exist"):
        train_here(
            1, make(1, tmp_path / "other", *options, "--data.eval", data, "--train.keep_best", "words/bleu", steps=2)
        )
