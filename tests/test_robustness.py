"""Overrides that inherit nothing, resume that restores everything, and runs that would silently do nothing."""

import json
import shutil

import pytest
import torch
from training_utils import REPOSITORY, STAGES, toy_data

from anygpt import InputError, commands
from anygpt.data.dataset import DataSource
from anygpt.sequence.merging import Merged, inject
from anygpt.training.checkpoint import load_tensors
from anygpt.training.config import parse_config
from anygpt.training.setup import build
from anygpt.training.stages import prepare_stage
from anygpt.training.trainer import train

STAGE1 = ["--config", str(REPOSITORY / "configs/tiny/stage1.yaml")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory)


def stage1(data, output, *arguments):
    source = f"[{{path: {data / 'stage1.jsonl'}}}]"
    steps = ["--train.max_steps", "2", "--train.warmup_steps", "0", "--train.batch_size", "3"]
    return parse_config([*STAGE1, "--run.output_dir", str(output), "--data.train", source, *steps, *arguments])


@pytest.fixture(scope="module")
def final(data, tmp_path_factory):
    return train(stage1(data, tmp_path_factory.mktemp("first") / "run"), STAGES[1])


def test_an_overridden_list_inherits_nothing(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: {train: [{path: a.json, format: nextgpt, media_root: /data, weight: 3}]}\n")
    config = parse_config([*STAGE1, "--config", str(path), "--data.train", "[{path: x.jsonl}]"])
    assert config.data.train == [DataSource("x.jsonl")]
    with pytest.raises(InputError, match="path"):
        parse_config([*STAGE1, "--config", str(path), "--data.train", "[{format: jsonl}]"])


def test_dotted_overrides_reach_into_projectors():
    config = parse_config([*STAGE1, "--model.encoders.image.projector.projection_type", "mlp"])
    assert config.model.encoders["image"].projector == {"projection_type": "mlp"}
    assert config.model.encoders["audio"].projector == {"projection_type": "linear"}


@pytest.mark.parametrize("override", [["--loss.encoder_llm", "0"], ["--loss.nll", "0"]])
def test_a_run_without_a_weighted_loss_is_refused(data, tmp_path, override):
    with pytest.raises(InputError, match="weight 0"):
        train(stage1(data, tmp_path / "run", *override), STAGES[1])
    assert not (tmp_path / "run").exists()


def test_a_run_that_moves_nothing_is_no_success(tmp_path, data):
    rows = [json.loads(line) for line in (data / "stage1.jsonl").read_text().splitlines()]
    images = [row for row in rows if any(p["type"] == "image" for p in row["messages"][0]["content"])]
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in images))
    source = f"[{{path: {tmp_path / 'images.jsonl'}, media_root: {data}}}]"
    config = stage1(data, tmp_path / "run", "--data.train", source, "--train.parts", "[audio_projector]")
    with pytest.raises(InputError, match="no gradient reached"):
        train(config, STAGES[1])
    assert not (tmp_path / "run").exists()


def test_frozen_language_models_recompute_their_layers(data, tmp_path):
    config = stage1(data, tmp_path / "run")
    model, _ = build(config)
    prepare_stage(model, STAGES[1], config)
    model.gradient_checkpointing_enable()
    model.train()
    layers = model.language_model.model.layers
    assert all(layer.training and layer.gradient_checkpointing for layer in layers)
    assert not any(module.training for layer in layers for module in list(layer.modules())[1:])
    model.eval()
    assert not any(layer.training for layer in layers)


def test_resume_restores_frozen_tensors_and_buffers(data, tmp_path, final):
    config = stage1(data, tmp_path / "run", "--train.save_steps", "1")
    train(config, STAGES[1])
    model, _ = build(config)
    prepare_stage(model, STAGES[1], config)
    model.train("image_projector", mode=False)  # as an earlier stage's projector is in a later one
    with torch.no_grad():
        for tensor in model.own_tensors().values():
            tensor += 1
    load_tensors(tmp_path / "run/checkpoint-2", model)
    saved = type(model).from_pretrained(tmp_path / "run/checkpoint-2").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "processor_config.json").write_text("{"),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "processors/image/preprocessor_config.json").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"broken"),
    ],
)
def test_damaged_folders_are_said_to_be(final, tmp_path, damage):
    shutil.copytree(final, tmp_path / "final")
    damage(tmp_path / "final")
    config = parse_config([*STAGE1, "--model.init_from", str(tmp_path / "final")])
    with pytest.raises(InputError, match="final"):
        build(config)


def test_chat_finds_mistakes_before_it_loads(capsys):
    for arguments in (["--max-new-tokens", "0"], ["--steps", "0"], ["--guidance", "nan"], ["--device", "nonsense"]):
        assert commands.run("chat", ["--prompt", "x", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: --") and len(said.splitlines()) == 1


def test_lists_of_features_must_end_with_rows():
    ids = torch.tensor([[9, 9, 9, 0], [9, 0, 0, 0]])
    text = Merged(torch.zeros(2, 4, 3), ids, torch.ones_like(ids), None, torch.zeros(2, dtype=torch.bool))
    with pytest.raises(InputError, match="row 0 has 3"):
        inject(text, {"image": [torch.ones(2, 3), torch.ones(2, 3)]}, {"image": 9})


def test_keys_are_names_and_modalities_have_one_encoder(data, tmp_path):
    part = "{path: 'zoo:image_encoder', modality: image}"
    for arguments, message in (
        (["--model.encoders", f"{{second: {part}}}"], "several encoders"),
        (["--model.encoders", f"{{'a.b': {part}}}"], "a.b"),
    ):
        with pytest.raises(InputError, match=message):
            build(stage1(data, tmp_path / "run", *arguments))
