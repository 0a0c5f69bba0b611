"""`scripts/benchmark.py`, and what its `stage2` compares: where the graph ends for each `train.signal_rows`."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from anygpt.errors import InputError
from anygpt.training.config import Config
from anygpt.training.stages import LLM_DECODER, prepare_stage


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("anygpt.commands.benchmark")


@pytest.mark.parametrize("rows", ["both", "output", "none"])
def test_the_trunk_has_a_graph_only_where_input_rows_train(tiny_model, rows):
    model, processor = tiny_model((), ("image",))
    config = Config()
    config.train.signal_rows = rows
    names = prepare_stage(model, LLM_DECODER, config)
    span = "".join(processor.signal_tokens["image"])
    batch = processor(llm_inputs={"text": [f"a ring {span}"]}, decoder_targets={"image": {"captions": ["a ring"]}})
    output = model.train()(**batch, labels=batch["input_ids"])
    assert (output.hidden_states.grad_fn is not None) == (rows == "both")
    output.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == set(names)
    assert ("signal_tokens.input_rows.image" in names, "signal_tokens.output_rows.image" in names) == (
        rows == "both",
        rows != "none",
    )
    assert all(bool(p.grad.any()) for name, p in model.named_parameters() if name in names)


def test_the_peer_has_logits_and_gradients_everywhere(script, tiny_model):
    model, processor = tiny_model((), ("image",))
    llm, captions = model.language_model, ["a ring", "a red square"]
    llm.resize_token_embeddings(len(processor.llm_tokenizer))
    model.train_only(["image_output_projector"])
    rows, head = (matrix.requires_grad_(True).weight for matrix in (llm.get_input_embeddings(), llm.lm_head))
    texts = [f"a blue ring {''.join(processor.signal_tokens['image'])}"] * 2
    targets = {"captions": captions, "images": [Image.new("RGB", (32, 32), "red")] * 2}
    batch = processor(llm_inputs={"text": texts}, decoder_targets={"image": targets})
    labels = batch["input_ids"].clone()
    loss = script.load("stage2").peer_loss(model, **batch, labels=labels)
    del batch["decoder_targets"]["image"]["media"]
    alone = script.load("stage2").peer_loss(model, **batch, labels=labels)
    assert loss > alone > llm(batch["input_ids"], labels=labels).loss
    loss.backward()
    assert head.grad.any(dim=1).all() and rows.grad[labels].any(dim=-1).all()


def test_every_benchmark_can_be_run(script):
    assert "stage2" in script.names()
    for name in script.names():
        module = script.load(name)
        assert module.__doc__ and all(callable(getattr(module, f)) for f in ("add_arguments", "sides", "measure"))


def test_table_gives_medians_and_ratios_within_groups_and_rounds(script):
    rounds = [
        {
            "a: both": {"step_s": 2.0, "share": 4.0},
            "a: none": {"step_s": 0.5, "share": 3.0},
            "b: x": {"step_s": 7.0},
            "b: y": {"step_s": 7.0, "a_gib": 1.0},
        },
        {
            "a: both": {"step_s": 4.0, "share": 4.0},
            "a: none": {"step_s": 1.0, "share": 3.0},
            "b: x": {"step_s": 7.0},
            "b: y": {"step_s": 7.0, "a_gib": 1.0},
        },
        {
            "a: both": {"step_s": 9.0, "share": 4.0},
            "a: none": {"step_s": 0.6, "share": 3.0},
            "b: x": {"step_s": 7.0},
            "b: y": {"step_s": 7.0, "a_gib": 1.0},
        },
    ]
    assert script.table(rounds).splitlines() == [
        "| | step_s | share | a_gib |",
        "|---|---|---|---|",
        "| a: both | 4 (1.00×) | 4 |  |",
        "| a: none | 0.6 (0.25×) | 3 |  |",
        "| b: x | 7 (1.00×) |  |  |",
        "| b: y | 7 (1.00×) |  | 1 |",
    ]


def test_rounds_are_taken_in_turn_and_their_medians_shown(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "load", lambda name: SimpleNamespace(**vars(module)))
    module = SimpleNamespace(
        __doc__="", add_arguments=lambda parser: parser.set_defaults(rounds=3), sides=lambda options: ["a", "b"]
    )
    order, times = [], iter([4.0, 1.0, 2.0, 3.0, 8.0, 1.5])
    monkeypatch.setattr(script, "run_side", lambda side, options: order.append(side) or {"step_s": next(times)})
    script.main(["stage2"])
    assert order == ["a", "b"] * 3
    assert "| b | 1.5 (0.25×) |" in capsys.readouterr().out.splitlines()


def test_peak_memory_counts_what_was_held(script):
    held = torch.ones(2**27)  # 0.5 GiB
    assert 0.5 < script.peak_memory()["peak_gib"] < 64 and held.numel()


def test_unknown_benchmarks_are_refused(script, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(["nothing"])
    assert error.value.code == 2 and "stage2" in capsys.readouterr().err
    with pytest.raises(InputError, match="--rounds is 0, expected"):
        script.main(["stage2", "--rounds", "0"])
