"""Ablations: which runs they need, what these share, and the table."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from anygpt.errors import InputError
from anygpt.toyworld.datasets import write_dataset
from anygpt.training.config import parse_config

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "scripts"))
import ablate  # noqa: E402

PLAN = ablate.read_plan(REPOSITORY / "configs/tiny/ablations.yaml")
LONG = ablate.read_plan(REPOSITORY / "configs/tiny/long/matrix.yaml")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for stage in ablate.SCRIPTS:
        write_dataset(folder, stage, 3, seed=0)
    return folder


def planned(name, data, seed=0):
    return list(ablate.commands(PLAN, PLAN.ablations[name], seed, data, Path("/runs")))


@pytest.mark.parametrize(
    ("plan", "name"),
    [(plan, name) for plan in (PLAN, LONG) for name in plan.ablations],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_ablation_is_a_valid_run(plan, name, data):
    for folder, command in ablate.commands(plan, plan.ablations[name], 0, data, Path("/runs")):
        config = parse_config(command[2:])
        assert config.run.output_dir == str(folder)
        assert Path(config.data.train[0].path).parent == data


def test_runs_start_from_one_another_and_are_shared(data):
    default, other = planned("default", data), planned("denoising alone", data)
    for (before, _), (_, command) in itertools.pairwise(default):
        assert f'--model.init_from="{before}/final"' in command
    assert [a == b for (a, _), (b, _) in zip(default, other, strict=True)] == [True, False, False]
    assert "--loss.denoising=1" in other[1][1] and "--loss.denoising=1" not in other[0][1]
    assert planned("default", data) == default
    assert not {folder for folder, _ in planned("default", data, seed=1)} & {folder for folder, _ in default}


def test_a_stage_left_out_leaves_its_parts_to_the_next(data):
    (first, _), (_, command) = planned("no stage 2", data)
    config = parse_config(command[2:])
    assert config.model.init_from == f"{first}/final"
    assert set(config.model.decoders) == {"image", "video", "audio"}


def test_stars_stand_for_every_key():
    config = {"model": {"decoders": {"image": {}, "audio": {}}}}
    assert ablate.expand({"model.decoders.*.signal": "queries", "loss.nll": 0}, config) == {
        "model.decoders.image.signal": "queries",
        "model.decoders.audio.signal": "queries",
        "loss.nll": 0,
    }
    with pytest.raises(InputError, match=r"model\.encoders"):
        ablate.expand({"model.encoders.*.path": "x"}, config)


def test_table():
    def report(rate):
        talk = {"question": {"rate": 1.0}}
        matrix = {"text": {"text": rate, "image": rate}, "image": {"text": rate, "image": 1.0}}
        some = {"rate": 0.0}
        return {"matrix": matrix, "mean": rate, "min": rate, "unasked": some, "missing": some, "text_only": talk}

    text = ablate.table({"default": [report(0.5), report(0.7)], "other": [report(0.25)]})
    head, _, default, other = text.splitlines()
    assert head == "| | mean | least | to text | to image | unasked | missing | questions |"
    assert default.startswith("| default | 60.0 ± 14.1 | 60.0 ± 14.1 | 60.0 ± 14.1 | 80.0 ± 7.1 |")
    assert other.startswith("| other | 25.0 | 25.0 | 25.0 | 62.5 |")


def test_other_parts_make_other_runs(data, tmp_path, monkeypatch):
    before = [folder for folder, _ in planned("default", data)]
    parts = shutil.copytree(ablate.zoo(), tmp_path / "zoo")
    (parts / "video_decoder/README.md").write_text("another card")
    monkeypatch.setattr(ablate, "zoo", lambda: parts)
    assert [folder for folder, _ in planned("default", data)] == before
    (parts / "image_encoder/config.json").write_text("{}")
    assert not {folder for folder, _ in planned("default", data)} & set(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ablations": {"a": {"stage9": {}}}}, r"ablations\.a\.stage9: Extra inputs"),
        ({"ablations": {"a": {"skip": ["stage3"]}}}, r"skip\.0: Input should be 'stage1' or 'stage2'"),
        ({"ablations": {"a": {"stage3": 5}}}, r"a\.stage3: Input should be a valid dictionary"),
        ({"ablations": {"a": ["stage3"]}}, r"ablations\.a: Input should be a valid dictionary"),
        ({"ablations": None}, "ablations: Input should be a valid dictionary"),
        ({"stages": None}, "stages: Input should be a valid dictionary"),
        ({"rows": "many"}, "rows: Input should be a valid integer"),
    ],
)
def test_mistakes_in_the_list(change, message, tmp_path):
    content = yaml.safe_load((REPOSITORY / "configs/tiny/ablations.yaml").read_text()) | change
    path = tmp_path / "ablations.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=message):
        ablate.read_plan(path)


@pytest.mark.slow
def test_ablations_run_and_what_is_done_is_not_done_again(tmp_path, capfd):
    content = yaml.safe_load((REPOSITORY / "configs/tiny/ablations.yaml").read_text())
    short = {"train.max_steps": 1, "train.warmup_steps": 0, "train.batch_size": 2}
    content |= {
        "rows": 12,
        "evaluate": {"samples": 1, "talk_samples": 1, "steps": 1, "max_new_tokens": 8},
        "ablations": {
            "default": {"stage1, stage2, stage3": short},
            "none": {"stage1, stage2": short, "stage3": short | {"loss.denoising": 0}},
        },
    }
    path = tmp_path / "ablations.yaml"
    path.write_text(yaml.safe_dump(content))
    arguments = ["--config", str(path), "--output", str(tmp_path / "out")]
    assert ablate.execute(ablate.ablate, arguments) == 0
    assert len(list((tmp_path / "out/runs").iterdir())) == 4  # stages 1 and 2 once
    first = capfd.readouterr().out
    assert first.count("== stage") == 4 and "| none |" in first
    assert ablate.execute(ablate.ablate, arguments) == 0
    assert "== stage" not in capfd.readouterr().out
    assert (tmp_path / "out/table-validation.md").read_text().count("\n") == 4
    reports = [json.loads(p.read_text()) for p in (tmp_path / "out/reports").glob("*/matrix.json")]
    assert len(reports) == 2 and all(report["settings"]["things"] == "validation" for report in reports)
