"""Rates by part, schedules, compiled layers."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from training_utils import (
    argument_maker,
    assert_same_losses,
    check_mistake,
    cli_here,
    logged,
    losses_of,
    start_of,
    train_here,
    trained_tensors,
)

from anygpt import InputError
from anygpt.training.config import Config, TrainConfig
from anygpt.training.optimization import (
    clip_gradients,
    compile_layers,
    make_optimizer,
    parameter_groups,
)
from anygpt.training.stages import LLM_DECODER, prepare_stage

BOARD = ("--run.tracker", "tensorboard")


@pytest.fixture(scope="module")
def make_arguments(tmp_path_factory):
    return argument_maker(tmp_path_factory)


@pytest.fixture
def model(tiny_model):
    model, _ = tiny_model(("image",), ("image", "audio"))
    prepare_stage(model, LLM_DECODER, Config())
    return model


def test_what_got_no_gradient_gets_zeros_and_the_rest_is_clipped(model):
    """So that its momentum and weight decay go on, as they do where several processes give it zeros."""
    config = Config()
    config.train.weight_decay = 0.5
    optimizer, _ = make_optimizer(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    used, unused = trained[0], trained[1:]
    used.grad = torch.full_like(used, 3.0)
    before = [p.detach().clone() for p in unused]
    norm = clip_gradients(model, optimizer, 1.0, Accelerator(cpu=True))
    assert norm == pytest.approx(3 * used.numel() ** 0.5, rel=1e-5)
    assert used.grad.norm().item() == pytest.approx(1, rel=1e-4)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in unused)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    optimizer.step()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for parameter, old in zip(unused, before, strict=True):
        torch.testing.assert_close(parameter.detach(), old * (1 - rates[id(parameter)] * 0.5))


def rates_of(model, rates):
    """The peak rate of each trainable tensor by name."""
    groups = parameter_groups(model, TrainConfig(learning_rate=1.0, learning_rates=rates))
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    return {name: found.pop(id(p)) for name, p in model.named_parameters() if p.requires_grad}, found


def test_rates_by_part_and_by_kind(model):
    """A part's own rate goes before its kind's; what neither names has the base rate; nothing is in two groups."""
    rates, others = rates_of(model, {"output_projector": 0.1, "audio_output_projector": 0.2, "signal_tokens": 0.3})
    assert not others
    expected = {"signal_tokens.": 0.3, "image_decoder.projector.": 0.1, "audio_decoder.projector.": 0.2}
    for name, rate in rates.items():
        assert rate == next(value for prefix, value in expected.items() if name.startswith(prefix)), name
    assert set(rates_of(model, {})[0].values()) == {1.0}


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ({"signal_token": 1.0}, "signal_token; the parts are .*signal_tokens"),
        ({"video_output_projector": 1.0}, "video_output_projector; the parts are"),
        ({"projector": 1.0}, "projector, of which nothing trains"),
        ({"language_model": 1.0}, "language_model, of which nothing trains"),
    ],
)
def test_rates_that_nothing_would_have_are_refused(model, rates, said):
    with pytest.raises(InputError, match=said):
        parameter_groups(model, TrainConfig(learning_rates=rates))


def test_a_rate_of_signal_tokens_may_stay_where_none_trains(model):
    model = copy.deepcopy(model)
    for parameter in model.part_parameters("signal_tokens"):
        parameter.requires_grad_(False)
    rates = {"signal_tokens": 1.0}
    names = [group["name"] for group in parameter_groups(model, TrainConfig(learning_rates=rates, signal_rows="none"))]
    assert names == ["learning_rate"]
    with pytest.raises(InputError, match="signal_tokens, of which nothing trains"):
        parameter_groups(model, TrainConfig(learning_rates=rates))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_schedules_by_hand(model, name, expected):
    """Two updates of warm-up, then four."""
    config = Config()
    config.train = TrainConfig(
        max_steps=6, warmup_steps=2, scheduler=name, learning_rate=4.0, learning_rates={"signal_tokens": 0.4}
    )
    optimizer, scheduler = make_optimizer(model, config)
    for share in expected:
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["learning_rate"] == pytest.approx(4.0 * share)
        assert rates["learning_rate/signal_tokens"] == pytest.approx(0.4 * share)
        optimizer.step()
        scheduler.step()


def test_rates_are_logged_and_move_their_parts_alone(make_arguments, tmp_path):
    """A rate so small that nothing of its part moves."""
    args = make_arguments(2, tmp_path / "run", "--train.learning_rates={signal_tokens: 1.0e-30}", *BOARD, steps=1)
    start = dict(start_of(2, args)[0].named_parameters())
    tensors = trained_tensors(train_here(2, args))
    rates = logged(tmp_path / "run")[1]
    assert rates["learning_rate/signal_tokens"] == pytest.approx(1e-30, rel=1e-3)
    assert rates["learning_rate"] > 1e-4
    still = {name for name in start if name in tensors and torch.equal(start[name], tensors[name])}
    assert {name for name in still if "_decoder." in name} == set()
    assert {name for name in tensors if name.startswith("signal_tokens.")} <= still


def test_the_largest_rates_are_mistakes(make_arguments, tmp_path, capsys):
    for rate, said in (
        ("1e38", "less than or equal to 1000"),
        ("-1", "greater than 0"),
        ("inf", "inf"),
        ("nan", "nan"),
    ):
        code, lines = cli_here(1, make_arguments(1, tmp_path / "run", "--train.learning_rate", rate), capsys)
        check_mistake(code, lines, "train.learning_rate", said)
    code, lines = cli_here(1, make_arguments(1, tmp_path / "run", "--train.learning_rates={a: -1}"), capsys)
    check_mistake(code, lines, "train.learning_rates.a is -1")
    assert not (tmp_path / "run").exists()


def test_without_a_compiler_compiling_is_refused(model, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with pytest.raises(InputError, match=r"torch\.compile does not work here"):
        compile_layers(model)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_runs_have_the_same_losses(make_arguments, tmp_path):
    """At a rate of next to nothing, so that no rounding is trained on."""
    for name in ("true", "false"):
        still = "--train.learning_rate=1e-12"
        args = make_arguments(3, tmp_path / name, f"--train.compile={name}", still, *BOARD, steps=4)
        train_here(3, args)
    assert_same_losses(losses_of(tmp_path / "false"), losses_of(tmp_path / "true"), relative=1e-3)
