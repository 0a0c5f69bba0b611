"""Settings: the shipped files, the command line, and every mistake that can be made in them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import runpy
import sys
import typing

import pytest
import yaml
from training_utils import REPOSITORY, SCRIPTS

from anygpt.data.dataset import DataSource
from anygpt.errors import InputError
from anygpt.losses.formulas import LossWeights
from anygpt.training import config as module
from anygpt.training.cli import run_stage
from anygpt.training.config import Config, parse_config
from anygpt.training.stages import ENCODER_LLM

TINY = [
    p
    for p in sorted((REPOSITORY / "configs/tiny").rglob("*.yaml"))
    if p.name not in ("ablations.yaml", "matrix.yaml", "suite.yaml")
]
STAGE_1 = ["--config", str(REPOSITORY / "tests/configs/stage1.yaml")]
STAGE_2 = ["--config", str(REPOSITORY / "tests/configs/stage2.yaml")]


def fault(*arguments):
    """What is said about a command line; it must be one line."""
    with pytest.raises(InputError) as caught:
        parse_config(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_tiny_configs_are_there():
    assert {path.name for path in TINY} >= {"stage1.yaml", "stage2.yaml", "stage3.yaml"}


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.name)
def test_every_shipped_file_is_parsed(path):
    config = parse_config(["--config", str(path)])
    written = yaml.safe_load(path.read_text())
    assert config.run.output_dir == written["run"]["output_dir"]
    assert [source.path for source in config.data.train] == [source["path"] for source in written["data"]["train"]]
    for name, value in written["train"].items():
        assert getattr(config.train, name) == value
    encoders = written["model"].get("encoders", {})
    assert {key: part.path for key, part in config.model.encoders.items()} == {
        key: part["path"] for key, part in encoders.items()
    }


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/accelerate").glob("*.yaml")), ids=lambda p: p.name)
def test_accelerate_reads_its_files(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1


def config_classes():
    found = [
        cls for _, cls in inspect.getmembers(module, dataclasses.is_dataclass) if cls.__module__ == module.__name__
    ]
    return [*(cls for cls in found if cls is not Config), LossWeights, DataSource]


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_every_setting_is_documented(cls):
    text = "\n".join(base.__doc__ for base in cls.__mro__ if dataclasses.is_dataclass(base))
    for field in dataclasses.fields(cls):
        entry = rf"^ *(\w+, )*{field.name}(, \w+)*:|[,:] {field.name}[,:]"
        assert re.search(entry, text, re.MULTILINE), f"{cls.__name__}.{field.name}"


def test_a_resolved_config_gives_itself_back(tmp_path):
    """`config.yaml` of a run's folder is a config."""
    config = parse_config([*STAGE_2, "--loss.by_modality.image=0.5", "--model.decoders.image.hidden_layer=mix"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    assert parse_config(["--config", str(path)]) == config


# -- the command line ------------------------------------------------------------------------------------------


def test_overrides():
    config = parse_config(
        [
            *STAGE_2,
            "--model.encoders.image.path=zoo:other",
            "--model.decoders.video.num_signal_tokens",
            "5",
            "--data.train",
            "[{path: a.jsonl, weight: 0.5}, {path: b.json, format: nextgpt, media_root: /media}]",
            "--train.learning_rate",
            "1e-4",
            "--loss.by_modality",
            "{image: 0.5}",
            "--loss.snr_gamma=5",
            "--lora.target_modules=[q_proj, v_proj]",
            "--model.init_from=null",
        ]
    )
    assert config.model.encoders["image"].path == "zoo:other"
    assert config.model.encoders["image"].projector == {"projection_type": "mlp"}  # the rest stays
    assert config.model.encoders["video"].num_frames == 8
    assert config.model.decoders["video"].num_signal_tokens == 5
    assert config.data.train == [DataSource("a.jsonl", weight=0.5), DataSource("b.json", "nextgpt", "/media")]
    assert config.train.learning_rate == 1e-4
    assert config.loss.by_modality == {"image": 0.5}
    assert config.loss.snr_gamma == 5
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.model.init_from is None


def test_what_an_anchor_shares_is_overridden_alone(tmp_path):
    path = tmp_path / "config.yaml"
    tokenizers = "{image: &one {path: a, defaults: {temperature: 1}}, video: {<<: *one, num_frames: 2}}"
    path.write_text(
        f"model: {{language_model: {{path: x}}, tokenizers: {tokenizers}}}\ndata: {{train: [{{path: a}}]}}\n"
    )
    given = ["--config", str(path), "--model.tokenizers.image.defaults.temperature", "0.5"]
    found = parse_config(given).model.tokenizers
    assert {key: one.defaults for key, one in found.items()} == {
        "image": {"temperature": 0.5},
        "video": {"temperature": 1},
    }


def test_no_is_a_precision_and_no_truth_value(tmp_path):
    """YAML 1.1, which PyYAML reads, takes a bare `no` for false."""
    path = tmp_path / "c.yaml"
    path.write_text("train: {mixed_precision: no, gradient_checkpointing: true}\n")
    config = parse_config([*STAGE_1, "--config", str(path)])
    assert config.train.mixed_precision == "no" and config.train.gradient_checkpointing is True
    assert parse_config([*STAGE_1, "--train.mixed_precision", "no"]).train.mixed_precision == "no"


def test_the_order_of_encoders_is_the_files(tmp_path):
    path = tmp_path / "run.yaml"
    parts = {"video": {"path": "a"}, "audio": {"path": "b"}, "image": {"path": "c"}}
    content = {
        "model": {"encoders": parts, "language_model": {"path": "d"}},
        "data": {"train": [{"path": "x.jsonl"}]},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert list(parse_config(["--config", str(path)]).model.encoders) == ["video", "audio", "image"]


def test_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [SCRIPTS[1], "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / SCRIPTS[1]), run_name="__main__")
    assert end.value.code == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "--train.learning_rate" in shown.out
    assert "peak learning rate of AdamW" in shown.out  # from the docstring
    assert "Stage 1" in shown.out


def test_print_config(capsys):
    with pytest.raises(SystemExit) as end:
        run_stage(ENCODER_LLM, "", [*STAGE_1, "--train.max_steps=7", "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert set(printed) >= {field.name for field in dataclasses.fields(Config)}
    assert printed["train"]["max_steps"] == 7
    assert printed["train"]["batch_size"] == 8


# -- mistakes --------------------------------------------------------------------------------------------------


def test_unknown_keys_in_a_file_are_all_named(tmp_path):
    path = tmp_path / "run.yaml"
    content = yaml.safe_load((REPOSITORY / "configs/tiny/stage1.yaml").read_text())
    content["train"]["learning_rat"] = 1.0
    content["model"]["encoders"]["image"]["pth"] = "x"
    content["data"]["train"][0]["wieght"] = 2
    content["trian"] = {}
    path.write_text(yaml.safe_dump(content))
    said = fault("--config", str(path), "--run.sead", "3")
    for known, unknown in {
        "train.learning_rate": "train.learning_rat;",
        "model.encoders.image.path": "model.encoders.image.pth;",
        "data.train[0].weight": "data.train[0].wieght;",
        "train?": "trian;",
        "run.seed": "--run.sead: ",
    }.items():
        assert known in said and unknown in said
    assert said.count(str(path)) == 4
    assert said.count("did you mean") == 5


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("--train.learning_rat=1", "train.learning_rate"),  # no abbreviation
        ("--train.batch=1", "train.batch_size"),
        ("--loss.alignmnt=1", "loss.alignment"),
        ("--trian.batch_size=1", "train"),
        ("--model.encoders.image.pathh=x", "model.encoders.image.path"),
        ("--model.encoders.image={pathh: x}", "model.encoders.image.path"),
        ("--data.train=[{pth: x}]", "data.train[0].path"),
        ("--data.train+={path: x}", "data.train"),
        ("--train={learning_rat: 1}", "train.learning_rate"),
    ],
)
def test_unknown_arguments_name_the_nearest(argument, nearest):
    said = fault(*STAGE_1, argument)
    assert f"did you mean {nearest}?" in said
    assert argument.partition("=")[0] in said


def test_an_argument_that_is_no_option():
    assert "stray" in fault(*STAGE_1, "stray")
    for words in (("--model.init_from",), ("--model.init_from", "--train.max_steps", "300")):  # not null
        assert "--model.init_from has no value" in fault(*STAGE_1, *words)


VALUES = [
    ("run.seed", "-1", "greater than or equal to 0"),
    ("train.max_steps", "0", "greater than or equal to 1"),
    ("train.max_steps", "1" + "0" * 30, "less than or equal to 1000000000"),
    ("run.output_dir", "' '", "a folder"),
    ("train.abort_above.loss", ".nan", "a finite number"),
    ("data.max_length", "0", "greater than 0"),
    ("train.batch_size", "0", "greater than"),
    ("train.gradient_accumulation_steps", "0", "greater than"),
    ("train.learning_rate", "-0.001", "greater than 0"),
    ("train.learning_rate", "0", "greater than 0"),
    ("train.learning_rate", ".nan", "expected"),
    ("train.learning_rate", ".inf", "expected"),
    ("train.warmup_steps", "-1", "expected"),
    ("train.weight_decay", "-0.1", "expected"),
    ("train.weight_decay", ".inf", "expected"),
    ("train.max_grad_norm", "0", "greater than 0"),
    ("train.save_steps", "-1", "expected"),
    ("train.keep_checkpoints", "0", "greater than"),
    ("train.eval_steps", "-1", "expected"),
    ("train.log_steps", "0", "greater than"),
    ("data.num_workers", "-1", "expected"),
    ("loss.alignment_kind", "l3", "l2"),
    ("loss.snr_gamma", "0", "greater than 0"),
    ("loss.nll", "-1", "expected"),
    ("loss.encoder_llm", ".nan", "expected"),
    ("loss.by_modality.image", "-1", "expected"),
    ("lora.r", "-1", "greater than"),
    ("lora.alpha", "0", "greater than"),
    ("lora.dropout", "1", "less than 1"),
    ("model.encoders.video.num_frames", "0", "greater than"),
    ("model.decoders.image.num_signal_tokens", "0", "greater than"),
    ("train.batch_size", "1000000000000", "less than or equal to 1048576"),
    ("train.gradient_accumulation_steps", "1000000000000", "less than or equal to"),
    ("train.num_epochs", "0", "greater than 0"),
    ("train.warmup_steps", "1001", "at most train.max_steps"),
    ("train.sample_rows", "2", "no effect without train.sample_steps"),
    ("train.ema_for", "[final]", "no effect without train.ema_decay"),
    ("train.ema_for", "[]", "at least one name"),
    ("loss.binding", "text", "no effect without loss.encoder"),
    ("loss.temperature", "1", "no effect without loss.encoder"),
    ("loss.reference_dropout", "0.5", "no effect without loss.decoder"),
    ("data.num_workers", "100000", "less than or equal to"),
    ("lora.r", "10000000", "less than or equal to 4096"),
    ("model.decoders.image.num_signal_tokens", "10000000", "less than or equal to 4096"),
]


@pytest.mark.parametrize(("name", "value", "expected"), VALUES, ids=[f"{n}={v}" for n, v, _ in VALUES])
def test_values_out_of_range(name, value, expected):
    said = fault(*STAGE_2, f"--{name}={value}")
    assert name in said and expected in said


def test_a_negative_weight_of_data():
    assert "data.train[0].weight is -1.0" in fault(*STAGE_1, "--data.train=[{path: a.jsonl, weight: -1}]")
    assert "data.eval[0].weight is 0.5" in fault(*STAGE_1, "--data.eval=[{path: a.jsonl, weight: 0.5}]")


def test_all_values_out_of_range_are_named():
    said = fault(*STAGE_1, "--train.learning_rate", "-1", "--lora.r=-1", "--data.train=[]")
    assert all(name in said for name in ("train.learning_rate", "lora.r", "data.train"))


WRONG_TYPES = [
    "train.max_steps=many",
    "train.max_steps=1.5",
    "train.learning_rate=fast",
    "train.scheduler=cosin",
    "train.mixed_precision=fp16",
    "train.gradient_checkpointing=perhaps",
    "run.tracker=mlflow",
    "run.device=gpu",
    "data.on_bad_sample=ignore",
    "data.train=a.jsonl",
    "model.encoders=clip",
    "model.decoders.image.signal=smoke",
    "loss.by_modality=[1]",
    "train=5",
    "train=[1]",
    "data.train=[a.jsonl]",
    "train.learning_rate=null",
    "run.output_dir=null",
    "model.encoders=null",
    "model.encoders.image=null",
    "data.train=null",
    "lora.target_modules=null",
]


@pytest.mark.parametrize("setting", WRONG_TYPES)
def test_values_of_a_wrong_type(setting):
    name, _, value = setting.partition("=")
    said = fault(*STAGE_2, f"--{setting}")
    where = name.rpartition(".")[2] if name.startswith("model.decoders.") else name
    assert where in said and (value.strip("[]") in said or "a list" in said)
    assert "0x" not in said


def test_a_part_without_a_path(tmp_path):
    assert "path" in fault(*STAGE_1, "--model.encoders.extra={projector: {}}")


def test_no_model_and_no_data():
    said = fault()
    assert "language_model" in said and "init_from" in said and "data.train" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("train: {max_steps: 3", "not valid YAML"),
        ("train:\n\tmax_steps: 3", "not valid YAML"),
        ("- a\n- b", "expected the sections run, model, data"),
        ("only text", "expected the sections run, model, data"),
        (b"\xff\xfe\x00", "not valid YAML"),
        ("run: {seed: 1}\ntrain: {}\nrun: {seed: 2}", "the key 'run' is there twice"),
        ("train: {max_steps: 1, max_steps: 2}", "the key 'max_steps' is there twice"),
        ("run: {name: 2026-99-99}", "not valid YAML"),
        ("[" * 50_000, "not valid YAML"),
        ("train:\n", "train is null, expected a section of max_steps"),
        ("run: !!python/object/apply:os.system ['exit']", "not valid YAML"),
    ],
    ids=["unclosed", "tab", "list", "text", "bytes", "twice", "twice below", "no date", "deep", "empty", "code"],
)
def test_files_that_are_no_config(tmp_path, content, said):
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = fault("--config", str(path))
    assert str(path) in found and said in found


def test_no_such_file(tmp_path):
    path = tmp_path / "absent.yaml"
    assert f"'{path}'" in fault("--config", str(path)) and "no such file" in fault("--config", str(path))
    assert "--config" in fault("--config")
    assert "train.learning_rate is null" in fault(*STAGE_1, "--train.learning_rate")


def test_the_sections_of_the_contract_are_there():
    hints = typing.get_type_hints(Config)
    contract = {
        "run": "name output_dir seed tracker resume",
        "model": "init_from encoders language_model decoders",
        "data": "train eval num_workers on_bad_sample",
        "train": "max_steps batch_size gradient_accumulation_steps learning_rate warmup_steps weight_decay "
        "max_grad_norm mixed_precision save_steps eval_steps log_steps signal_rows gradient_checkpointing",
        "loss": "llm encoder_llm llm_decoder encoder_decoder nll alignment denoising",
        "lora": "r alpha dropout target_modules",
    }
    for section, names in contract.items():
        assert {field.name for field in dataclasses.fields(hints[section])} >= set(names.split()), section
