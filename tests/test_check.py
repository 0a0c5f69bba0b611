"""`--check`: a run looked at without making it."""

import re

import pytest
import torch
from training_utils import REPOSITORY, argument_maker, cli_here

from anygpt.training.memory import LiveBytes, measure_part


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return argument_maker(tmp_path_factory)


def run_check(stage, args, capsys):
    """Exit code, what is printed, and the lines on stderr."""
    out = []
    code, err = cli_here(stage, [*args, "--check"], capsys, out)
    return code, out[0], err


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_that_is_right(stage, arguments, tmp_path, capsys):
    code, out, err = run_check(stage, arguments(stage, tmp_path / "run"), capsys)
    assert (code, err) == (0, [])
    assert not (tmp_path / "run").exists()
    assert "| language_model |" in out and "tokens per row" in out and "computed, not measured" in out
    assert "not counted" not in out
    trained = {1: "image_projector", 2: "image_output_projector", 3: "language_model"}[stage]
    row = next(line for line in out.splitlines() if line.startswith(f"| {trained} |"))
    assert int(row.split("|")[3].replace(",", "")) > 0


def test_all_faults_at_once(arguments, tmp_path, capsys):
    code, _, err = run_check(
        2,
        arguments(
            2,
            tmp_path / "run",
            *("--model.encoders.image.path", tmp_path / "no-encoder"),
            *("--model.decoders.audio.path", "zoo:image_encoder"),
            *("--data.train", f"[{{path: {tmp_path / 'nothing.jsonl'}}}, {{path: {REPOSITORY / 'README.md'}}}]"),
        ),
        capsys,
    )
    assert code == 2 and all(line.startswith("error: ") for line in err)
    for where in ("model.encoders.image: ", "model.decoders.audio: ", "data.train[0]: ", "data.train[1]: "):
        assert sum(where in line for line in err) == 1, (where, err)


def test_a_start_that_is_not_there_yet_is_a_note(arguments, tmp_path, capsys):
    args = arguments(2, tmp_path / "run", "--model.init_from", tmp_path / "later")
    code, out, _ = run_check(2, args, capsys)
    assert code == 0 and "does not exist yet" in out
    code, _, err = run_check(3, arguments(3, tmp_path / "run", "--model.init_from", tmp_path / "later"), capsys)
    assert code == 2 and "later" in err[0]  # it names no parts of its own


def test_rows_that_the_stage_has_no_use_for(arguments, tmp_path, capsys):
    args = arguments(1, tmp_path / "run")
    args += ["--data.train", re.sub("stage1", "stage2", args[args.index("--data.train") + 1])]
    code, _, err = run_check(1, args, capsys)
    assert code == 2 and "needs a decoder" in err[0]


def test_live_bytes_are_what_lives():
    held = torch.zeros(500)
    with LiveBytes([held]) as live:
        assert held.view(5, 100).shape == (5, 100) and live.now == 0  # a view is nothing new
        first = torch.zeros(1000, dtype=torch.float32)
        second = first * 2
        assert live.now == 8000
        del second
        assert live.now == 4000
        view = first[10:]
        torch.add(first, 1)
    assert live.peak == 8000 and view is not None


def test_a_part_is_counted_once(tiny_model):
    model, _ = tiny_model(encoders=("image",), decoders=("image",))
    model.train_only(["image_projector"])
    part = measure_part(model, "image_projector")
    count = sum(p.numel() for p in model.part_parameters("image_projector"))
    assert (part.parameters, part.trainable) == (count, count)
    assert part.weights == part.gradients == 4 * count and part.moments == 8 * count
    frozen = measure_part(model, "language_model")
    assert frozen.trainable == frozen.gradients == frozen.moments == 0
    assert frozen.parameters == sum(p.numel() for p in model.language_model.parameters())
