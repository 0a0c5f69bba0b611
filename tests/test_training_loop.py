"""The loop: losses fall, splits of an update agree, and settings do what they say."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from training_utils import (
    Bench,
    argument_maker,
    assert_same_losses,
    launch,
    logged,
    losses_of,
    sgd,
    start_of,
    tensors_of,
    toy_data,
    train_here,
    trained_tensors,
)

from anygpt.data.collation import TARGET_IDS, move
from anygpt.training.config import parse_config
from anygpt.training.loading import BadSampleError, count_epochs, make_generators

BOARD = ("--run.tracker", "tensorboard")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory)


@pytest.fixture(scope="module")
def make_arguments(tmp_path_factory):
    return argument_maker(tmp_path_factory)


# -- what an update does ---------------------------------------------------------------------------------------

EXPECTED = {
    1: {"encoder_llm/nll"},
    2: {"llm_decoder/nll"}
    | {f"llm_decoder/{sub}/{key}" for sub in ("alignment", "denoising") for key in ("image", "video", "audio")},
    3: {f"{term}/nll" for term in ("llm", "encoder_llm", "llm_decoder", "encoder_decoder")}
    | {"encoder_decoder/alignment/image", "llm_decoder/denoising/audio"},
}


DENOISING_ALONE = ("--loss.nll=0", "--loss.alignment=0")


@pytest.mark.parametrize(
    ("stage", "weights"),
    [(1, ()), (2, ("--loss.denoising=0",)), (2, DENOISING_ALONE), (3, ("--loss.denoising=0",)), (3, DENOISING_ALONE)],
    ids=["1", "2 NLL and alignment", "2 denoising", "3 NLL and alignment", "3 denoising"],
)
def test_every_loss_falls_on_a_fixed_batch(make_arguments, tmp_path, stage, weights):
    """And nothing that is frozen changes by a bit, buffers included, while everything else gets a gradient.

    Denoising is looked at alone: its slope through a random UNet is a hundredth of the others'.
    """
    args = make_arguments(stage, tmp_path / "run", *weights, batch_size=6 if stage == 2 else 12)
    bench = Bench(stage, args, lambda p: torch.optim.AdamW(p, lr=1e-2 if stage == 1 else 3e-3), tmp_path / "run")
    frozen = {name: t.clone() for name, t in tensors_of(bench.model).items() if name not in bench.names}
    with_gradient = set()
    for name, parameter in bench.parameters.items():
        parameter.register_hook(lambda g, n=name: with_gradient.add(n) if g.abs().max() > 0 else None)
    runs = [bench.update(step=0) for _ in range(10)]  # step 0 each time: the same noise
    first, final = runs[0], runs[-1]
    wanted = {name for name in EXPECTED[stage] if ("denoising" in name) == (weights == DENOISING_ALONE)}
    assert wanted <= set(first)
    assert first.keys() == final.keys()
    # The zoo's language model answers questions in words as well as their paraphrases allow before any training.
    learnt = {"llm/nll"} if first.get("llm/nll", 1) < 0.1 else set()
    falling = {name for name in first if "norm" not in name} - learnt
    rising = {name: (first[name], final[name]) for name in falling if final[name] >= first[name]}
    assert not rising
    silent = set(bench.names) - with_gradient
    if weights != DENOISING_ALONE:
        assert not silent
    else:
        assert {name for name in silent if "output_projector" in name or "input_rows" in name} == set()
    after = tensors_of(bench.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert not frozen.keys() <= bench.model.state_dict().keys()  # buffers that are not saved were looked at


def test_an_update_is_the_same_however_it_is_split(make_arguments, tmp_path):
    """Plain SGD at rate 1 without clipping: what moves is the gradient itself."""
    results = []
    for size, parts in ((12, 1), (6, 2), (1, 12)):
        args = make_arguments(
            3,
            tmp_path / "run",
            f"--train.gradient_accumulation_steps={parts}",
            "--train.max_grad_norm=1e9",
            batch_size=size,
        )
        bench = Bench(3, args, sgd, tmp_path / "run")
        before = {name: p.detach().clone() for name, p in bench.parameters.items()}
        ids = [sample for _, found in bench.batches for sample in found["sample_ids"]]
        metrics = bench.update()
        results.append((ids, metrics, {n: before[n] - p.detach() for n, p in bench.parameters.items()}))
    whole = results[0]
    kinds = [{name.split("/")[0] for name in whole[1]}]
    assert {"encoder_llm", "llm_decoder", "encoder_decoder"} <= kinds[0]
    for ids, metrics, gradients in results[1:]:
        assert ids == whole[0]
        assert metrics.keys() == whole[1].keys()
        for name, value in metrics.items():
            assert value == pytest.approx(whole[1][name], rel=2e-6), name
        size = torch.cat([g.flatten() for g in whole[2].values()]).norm()
        difference = torch.cat([(gradients[n] - g).flatten() for n, g in whole[2].items()]).norm()
        assert difference < 2e-6 * size
        for name, gradient in whole[2].items():
            assert (gradients[name] - gradient).norm() < 2e-5 * gradient.norm() + 1e-7 * size, name


def test_the_logged_loss_is_the_weighted_sum_of_its_terms(make_arguments, tmp_path):
    weights = ("--loss.nll=0.5", "--loss.llm_decoder=2", "--loss.denoising=0", "--loss.by_modality={image: 3}")
    args = make_arguments(2, tmp_path / "run", *BOARD, *weights, steps=2, batch_size=6)
    train_here(2, args)
    for metrics in losses_of(tmp_path / "run").values():
        terms = {name: value for name, value in metrics.items() if "/" in name}
        assert not any("denoising" in name for name in terms)
        total = sum(
            value * 2 * (0.5 if name.endswith("nll") else 1) * (3 if name.endswith("image") else 1)
            for name, value in terms.items()
        )
        assert metrics["loss"] == pytest.approx(total, rel=1e-5)


def test_rows_without_a_weighted_loss_do_no_harm(make_arguments, tmp_path):
    args = make_arguments(3, tmp_path / "run", *BOARD, "--loss.llm=0", "--loss.encoder_llm=0", steps=6, batch_size=1)
    train_here(3, args)
    losses = [metrics.get("loss") for metrics in logged(tmp_path / "run").values()]
    assert None in losses and all(loss > 0 for loss in losses if loss is not None)  # some row was of those kinds


# -- several processes -----------------------------------------------------------------------------------------


def test_two_processes_are_one_with_twice_the_batch(make_arguments, tmp_path):
    """With one row a process, each lacks most modalities in every update."""
    two, one = tmp_path / "two", tmp_path / "one"
    done = launch(3, make_arguments(3, two, *BOARD, steps=4, batch_size=1), processes="two_processes_cpu")
    assert done.returncode == 0, done.stderr
    train_here(3, make_arguments(3, one, *BOARD, steps=4, batch_size=2))
    losses = losses_of(one)
    assert list(losses) == [1, 2, 3, 4]
    assert_same_losses({1: losses[1]}, {1: losses_of(two)[1]}, relative=1e-5)
    assert_same_losses(losses, losses_of(two), relative=1e-3)  # later updates have trained on rounding
    first, second = trained_tensors(one / "final"), trained_tensors(two / "final")
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).norm() / first[name].norm()) for name in first) < 1e-2
    log = (two / "log.txt").read_text()
    assert log.count("update 1  ") == 1  # one process writes


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_over_20_updates(make_arguments, tmp_path, stage):
    """At a rate of next to nothing: each update starts from the same state, so that no rounding is trained on."""
    two, one = tmp_path / "two", tmp_path / "one"
    more = (*BOARD, "--train.gradient_accumulation_steps=2", "--train.learning_rate=1e-12")
    done = launch(stage, make_arguments(stage, two, *more, steps=20, batch_size=2), processes="two_processes_cpu")
    assert done.returncode == 0, done.stderr
    train_here(stage, make_arguments(stage, one, *more, steps=20, batch_size=4))
    first, second = losses_of(one), losses_of(two)
    norms = [[metrics.pop("gradient_norm") for metrics in run.values()] for run in (first, second)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    # Answers known before any training have an NLL of 5e-4, a difference of logits near 10: float32 has no more digits.
    assert_same_losses(first, second, relative=1e-5, absolute=1e-6)


# -- settings --------------------------------------------------------------------------------------------------


def test_evaluation_during_training(make_arguments, data, tmp_path):
    held_out = ("--data.eval", f"[{{path: {data / 'stage2.jsonl'}}}]", "--train.eval_steps=2")
    more = (*held_out, *BOARD, "--train.learning_rate=1e-12")
    train_here(2, make_arguments(2, tmp_path / "run", *more, steps=4, batch_size=12))
    metrics = logged(tmp_path / "run")
    assert [step for step in metrics if "eval/loss" in metrics[step]] == [2, 4]
    names = {f"eval/{name}" for name in EXPECTED[2]}
    assert names <= set(metrics[2])
    # The rate is nearly nothing and both see all 12 rows: NLL and alignment are the same, and so is the noise twice.
    for name in ("llm_decoder/nll", "llm_decoder/alignment/image"):
        assert metrics[2][f"eval/{name}"] == pytest.approx(metrics[2][name], rel=1e-5)
    assert metrics[4]["eval/loss"] == pytest.approx(metrics[2]["eval/loss"], rel=1e-5)


def test_evaluation_does_not_disturb_training(make_arguments, data, tmp_path):
    held_out = ("--data.eval", f"[{{path: {data / 'stage3.jsonl'}}}]", "--train.eval_steps=1")
    dropout = "--lora.dropout=0.2"  # draws from the process's random state
    with_it = train_here(3, make_arguments(3, tmp_path / "with", dropout, *held_out, steps=3, batch_size=3))
    without = train_here(3, make_arguments(3, tmp_path / "without", dropout, steps=3, batch_size=3))
    first, second = trained_tensors(with_it), trained_tensors(without)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_workers_change_nothing(make_arguments, tmp_path):
    finals = [
        train_here(3, make_arguments(3, tmp_path / str(n), f"--data.num_workers={n}", *BOARD, steps=3)) for n in (0, 2)
    ]
    assert losses_of(tmp_path / "0") == losses_of(tmp_path / "2")
    first, second = map(trained_tensors, finals)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_evaluation_has_the_same_numbers_whatever_the_workers(make_arguments, data, tmp_path, monkeypatch):
    """To the last digit, though a feature extractor draws from NumPy's global state, as CLAP's does."""
    held_out = [{"path": str(data / f"stage{stage}.jsonl")} for stage in (1, 3)]
    args = make_arguments(3, tmp_path, "--data.eval", json.dumps(held_out), "--loss.denoising=1", batch_size=4)
    bench = Bench(3, args, sgd, tmp_path)
    assert any(note.startswith("data.eval is not used") for note in bench.trainer.notes)
    extractor = type(bench.trainer.processor.encoder_processors["audio"])
    call, draws = extractor.__call__, []

    @functools.wraps(call)  # its signature is looked at
    def drawing(self, *args, **kwargs):
        found = call(self, *args, **kwargs)
        draws.append(np.random.standard_normal())
        (name,) = (name for name in found if name.startswith("input_"))
        found[name] = found[name] + draws[-1]
        return found

    monkeypatch.setattr(extractor, "__call__", drawing)
    evaluations = []
    for workers in (0, 1, 2, 0):
        bench.config.data.num_workers = workers
        np.random.seed(workers)
        evaluations.append(bench.trainer.evaluate())
    assert draws and len(evaluations[0]) > 5
    assert all(evaluation == evaluations[0] for evaluation in evaluations)


@pytest.mark.parametrize("kind", ["data.train", "data.eval"])
def test_what_an_encoders_forward_refuses_is_its_rows_fault(make_arguments, data, tmp_path, kind):
    """Pictures as they are, of which one has another size than the encoder's position embeddings."""
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data/stage1.jsonl"
    row = next(json.loads(line) for line in path.open() if '"image"' in line)
    (medium,) = (part for part in row["messages"][0]["content"] if part["type"] == "image")
    Image.open(path.parent / medium["path"]).resize((48, 32)).save(path.parent / "wide.png")
    wide = json.loads(json.dumps(row).replace(medium["path"], "wide.png")) | {"id": "wide"}
    path.write_text("".join(json.dumps(one) + "\n" for one in (row, wide)))
    whole = [{"path": str(data / "stage1.jsonl")}]
    files = {"data.train": whole, "data.eval": whole, kind: [{"path": str(path)}]}
    more = [option for name, value in files.items() for option in (f"--{name}", json.dumps(value))]
    more += ["--model.encoders.image.processor", "{do_resize: false, do_center_crop: false}", "--train.eval_steps=1"]
    with pytest.raises(BadSampleError, match=rf"{path}:2 \(sample 'wide'\): the 'image' encoder's \w+ refuses it"):
        train_here(1, make_arguments(1, tmp_path / "run", *more, batch_size=1, steps=2))


def test_bf16_keeps_trained_tensors_in_float32(make_arguments, data, tmp_path):
    bf16 = ("--train.mixed_precision=bf16", *BOARD, "--train.eval_steps=2")
    held_out = ("--data.eval", f"[{{path: {data / 'stage2.jsonl'}}}]")
    args = make_arguments(2, tmp_path / "half", *bf16, *held_out, steps=2)
    model, _, names = start_of(2, args)
    parameters = dict(model.named_parameters())
    assert {parameters[name].dtype for name in names} == {torch.float32}
    assert model.language_model.dtype == torch.bfloat16
    assert next(model.decoders["image"].module.parameters()).dtype == torch.bfloat16
    final = train_here(2, args)
    tensors = trained_tensors(final)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    fine = tensors["signal_tokens.input_rows.image"]  # more than bfloat16 can hold
    assert not torch.equal(fine, fine.bfloat16().float())
    train_here(2, make_arguments(2, tmp_path / "full", *BOARD, steps=2))
    half, full = losses_of(tmp_path / "half"), losses_of(tmp_path / "full")
    for name in EXPECTED[2]:
        assert half[1][name] == pytest.approx(full[1][name], rel=0.05), name


def test_gradient_checkpointing_changes_no_loss(make_arguments, tmp_path):
    for value in ("true", "false"):
        more = (*BOARD, f"--train.gradient_checkpointing={value}")
        final = train_here(3, make_arguments(3, tmp_path / value, *more, steps=2))
    noted = json.loads((final / "config.json").read_text())["trained"]["parts"]
    assert noted[:2] == ["adapters of the language model", "signal_tokens"] and "image_output_projector" in noted
    assert_same_losses(losses_of(tmp_path / "false"), losses_of(tmp_path / "true"), relative=1e-5)


@pytest.mark.parametrize("rows", ["both", "output", "none"])
def test_which_signal_rows_train(make_arguments, tmp_path, rows):
    _, _, names = start_of(2, make_arguments(2, tmp_path / "run", f"--train.signal_rows={rows}"))
    found = {name.split(".")[1] for name in names if name.startswith("signal_tokens.")}
    assert found == {"both": {"input_rows", "output_rows"}, "output": {"output_rows"}, "none": set()}[rows]


@pytest.mark.parametrize(
    ("grouping", "batches"), [((), 5), (("length",), 6), (("modality",), 8), (("length", "modality"), 8)], ids=str
)
def test_epochs_of_groups_are_whole(make_arguments, tmp_path, grouping, batches):
    """Twice ten rows by four: micro-batches end with the epoch, and with each of two groups."""
    rows = SimpleNamespace(lengths=[10], weights=[1.0], output_groups=lambda: [0] * 5 + [1] * 5)
    more = [f"--data.group_by_{kind}=true" for kind in grouping]
    for processes, size, parts in ((1, 4, 1), (2, 2, 1), (1, 4, 3)):
        split = (f"--train.batch_size={size}", f"--train.gradient_accumulation_steps={parts}", "--train.num_epochs=2")
        config = parse_config(make_arguments(1, tmp_path, *more, *split))
        count_epochs(config, rows, processes)
        assert config.train.max_steps == math.ceil(batches / parts)


# -- noise -----------------------------------------------------------------------------------------------------


def test_noise_belongs_to_seed_update_and_target(make_arguments, tmp_path):
    """The denoising loss of a batch depends on the update's number, and on nothing that was drawn before."""
    args = make_arguments(2, tmp_path / "run", batch_size=3)
    bench = Bench(2, args, sgd, tmp_path / "run")
    batch, ids = bench.batches[0]

    def losses(step, seed=0):
        generators = make_generators(ids[TARGET_IDS], seed, step)
        with torch.no_grad():
            found = bench.model(**move(batch, "cpu"), generators=generators).losses
        return {name: float(term.total) for name, term in found.items() if "denoising" in name}

    first = losses(step=1)
    assert first
    torch.rand(100)
    assert losses(step=1) == first
    for other in (losses(step=2), losses(step=1, seed=1)):
        assert all(other[name] != first[name] for name in first)
    targets = list(itertools.chain(*ids[TARGET_IDS].values()))
    assert len(set(targets)) == len(targets) == 3
