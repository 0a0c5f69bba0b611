"""Every class of mistake that a run can stop at: one line, exit code 2, and nothing half-written.

Data and settings are in `test_bad_input.py`, checkpoints in `test_checkpoints.py`; here are the parts, the folders that
a run starts from, and the disk. The same command line as `python stages/…`, in this process.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_utils import (
    arguments,
    change_tensors,
    check_mistake,
    cli_here,
    stage2_start,
    toy_data,
    train_here,
)
from transformers import AutoModelForCausalLM

from anygpt.toyworld import part_path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory)


@pytest.fixture(scope="module")
def first(tmp_path_factory, data):
    """`final/` of stage 1."""
    folder = tmp_path_factory.mktemp("first")
    return train_here(1, arguments(1, data / "stage1.jsonl", folder / "run", steps=1, batch_size=2))


@pytest.fixture(scope="module")
def third(tmp_path_factory, data):
    """`final/` of stage 3, with an adapter."""
    folder, start = tmp_path_factory.mktemp("third"), stage2_start(tmp_path_factory, data)
    return train_here(3, arguments(3, data / "stage3.jsonl", folder / "run", init_from=start, steps=1, batch_size=2))


def refuse(stage, data, tmp_path, capsys, *said, more=(), init_from=None):
    output = tmp_path / "run"
    more = (*more, "--model.init_from", "null") if stage == 2 and init_from is None else more
    args = arguments(stage, data / f"stage{stage}.jsonl", output, *more, init_from=init_from, batch_size=2)
    code, lines = cli_here(stage, args, capsys)
    check_mistake(code, lines, *said)
    assert not output.exists()


# -- parts: corrupted, cut short, pickled, of a wrong kind -----------------------------------------------------


class Malice:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return (os.mkdir, (self.folder,))


def pickled(path, tmp_path):
    """The same tensors pickled, as `torch.save` does it, and something that would run."""
    tensors = load_file(path)
    path.unlink()
    name = path.name.replace("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    name = name.replace("model.safetensors", "pytorch_model.bin") if name == path.name else name
    torch.save(tensors | {"malice": Malice(tmp_path / "malice")}, path.with_name(name))


def pickled_under_the_same_name(path, tmp_path):
    path.write_bytes(pickle.dumps(Malice(tmp_path / "malice")))


SPOILED = {
    "cut short": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path, _: os.truncate(path, 0),
    "gone": lambda path, _: path.unlink(),
    "garbage": lambda path, _: path.write_bytes(b"\xff" * 1000),
    "pickled": pickled,
    "a pickle by another name": pickled_under_the_same_name,
}
ENCODER = ("encoder", "image_encoder", "model.safetensors", 1, "--model.encoders.image.path={}")
LLM = ("language model", "language_model", "model.safetensors", 1, "--model.language_model.path={}")
DECODER = (
    *("decoder", "image_decoder", "unet/diffusion_pytorch_model.safetensors", 2),
    "--model.decoders.image.path={}",
)


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("part", [ENCODER, LLM, DECODER], ids=lambda part: part[0])
def test_spoiled_weights_of_a_part(data, tmp_path, capsys, part, how):
    kind, name, file, stage, setting = part
    folder = tmp_path / "part"
    shutil.copytree(part_path(name), folder)
    SPOILED[how](folder / file, tmp_path)
    refuse(stage, data, tmp_path, capsys, kind, folder, more=(setting.format(folder),))
    assert not (tmp_path / "malice").exists()


@pytest.mark.parametrize(
    ("name", "file", "content", "setting"),
    [
        ("image_encoder", "config.json", "{", "--model.encoders.image.path={}"),
        ("image_encoder", "config.json", '{"model_type": "nonsense"}', "--model.encoders.image.path={}"),
        ("image_encoder", "preprocessor_config.json", "[", "--model.encoders.image.path={}"),
        ("language_model", "tokenizer.json", '{"version": "1.0"}', "--model.language_model.path={}"),
        ("language_model", "tokenizer.json", "", "--model.language_model.path={}"),
    ],
)
def test_spoiled_json_of_a_part(data, tmp_path, capsys, name, file, content, setting):
    folder = tmp_path / "part"
    shutil.copytree(part_path(name), folder)
    (folder / file).write_text(content)
    refuse(1, data, tmp_path, capsys, folder, more=(setting.format(folder),))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("--model.encoders.image.dtype=int8", ("int8", "bfloat16")),
        ("--model.language_model.dtype=complex64", ("complex64", "bfloat16")),
        ("--model.encoders.image.projector={in_features: 7}", ("7", "96")),
        ("--model.encoders.image.projector={out_features: 7}", ("7", "128")),
        ("--model.encoders.image.path=zoo:image_decoder", ("image encoder", "zoo:image_decoder")),
        ("--model.encoders.image.path=zoo:language_model", ("image encoder", "llama")),
        ("--model.language_model.path=zoo:audio_decoder", ("language model", "zoo:audio_decoder")),
        ("--model.encoders.image.attn_implementation=fast", ("image encoder", "fast")),
        ("--train.parts=[image_projecter]", ("image_projecter", "image_projector")),
    ],
)
def test_sizes_dtypes_and_kinds(data, tmp_path, capsys, setting, said):
    refuse(1, data, tmp_path, capsys, *said, more=(setting,))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("--model.decoders.image.projector.d_model=7", ("d_model", "7", "num_attention_heads")),
        ("--model.decoders.image.hidden_layer=99", ("hidden_layer", "99")),
        ("--model.decoders.image.num_signal_tokens=0", ("num_signal_tokens", "greater than or equal to 1")),
        ("--model.decoders.image.num_frames=8", ("decoder", "zoo:image_decoder", "num_frames", "makes no clips")),
        ("--model.decoders.image.projector.ffn_dim=10000000000", ("model.decoders.image.projector", "GiB")),
        ("--model.decoders.image.projector.num_encoder_layers=10000000", ("num_encoder_layers", "at most 1000")),
        ("--model.decoders.image.path=zoo:image_encoder", ("decoder", "zoo:image_encoder")),
    ],
)
def test_decoders_that_do_not_fit(data, tmp_path, capsys, setting, said):
    refuse(2, data, tmp_path, capsys, *said, more=(setting,))


def test_a_part_with_another_models_tokenizer(data, tmp_path, capsys):
    """It has more tokens than the language model has embeddings."""
    folder = tmp_path / "part"
    shutil.copytree(part_path("language_model"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)
    refuse(1, data, tmp_path, capsys, folder, "tokenizer", "100", more=(f"--model.language_model.path={folder}",))


def test_a_config_of_brackets_without_end(data, tmp_path, capsys):
    folder = tmp_path / "part"
    shutil.copytree(part_path("image_encoder"), folder)
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000)
    refuse(1, data, tmp_path, capsys, folder, more=(f"--model.encoders.image.path={folder}",))


# -- settings that do not go together --------------------------------------------------------------------------

STAGE_1_SETTINGS = {
    "frames of a picture": (("--model.encoders.image.num_frames=2",), ("num_frames is set", "reads no clips")),
    "a projector of any size": (
        ("--model.encoders.image.projector={projection_type: mlp, hidden_size: 10000000}",),
        ("model.encoders.image.projector",),
    ),
    "a gain of no ridge": (("--train.ridge_gain=2",), ("train.ridge_gain is 2.0", "train.projector_init ridge")),
    "nothing trains": (("--train.parts=[]",), ("train.parts is empty", "at least one name")),
    "adapters of no stage": (("--lora.r=4",), ("lora has settings", "stage 1")),
    "adapters of no denoiser": (("--denoiser_lora.r=4",), ("denoiser_lora has settings", "stage 1")),
    "no evaluation at checkpoints": (
        (
            "--train.keep_best=eval/loss",
            "--train.save_steps=3",
            "--train.eval_steps=2",
            "--data.eval=[{path: a.jsonl}]",
        ),
        ("train.save_steps is 3", "a multiple of train.eval_steps, 2"),
    ),
    "a network of no decoder": (("--train.parts=[image_decoder.vae]",), ("image_decoder.vae", "the decoders are none")),
    "a rate of no part": (("--train.learning_rates={decoder: 1.0e-3}",), ("names decoder", "image_projector")),
    "wandb in no mode that there is": (("--run.tracker=wandb",), ("run.tracker wandb cannot start",)),
    "tensorboard that is not there": (("--run.tracker=tensorboard",), ("pip install tensorboard",)),
}


@pytest.mark.parametrize("what", STAGE_1_SETTINGS)
def test_settings_that_do_not_go_together(data, tmp_path, capsys, monkeypatch, what):
    settings, said = STAGE_1_SETTINGS[what]
    if "wandb" in what:
        monkeypatch.setenv("WANDB_MODE", "sometimes")
    if "tensorboard" in what:
        monkeypatch.setitem(sys.modules, "tensorboard", None)
    refuse(1, data, tmp_path, capsys, *said, more=settings)


def test_an_adapters_settings_are_not_changed(data, third, tmp_path, capsys):
    for setting, said in (
        ("r=16", ("lora.r is 16", "made with 8")),
        ("target_modules=[q_proj]", ("['q_proj']", "k_proj")),
    ):
        refuse(3, data, tmp_path, capsys, *said, more=(f"--lora.{setting}",), init_from=third)


def test_ridge_without_captions_for_a_decoder(data, tmp_path, capsys):
    rows = [json.loads(line) for line in (data / "stage2.jsonl").read_text().splitlines()]
    images = [row for row in rows if any(part["type"] == "image" for part in row["messages"][-1]["content"])]
    path = tmp_path / "images.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in images))
    more = ("--train.projector_init=ridge", f"--data.train=[{{path: {path}, media_root: {data}}}]")
    refuse(2, data, tmp_path, capsys, "no captions for video, audio", "random", more=more)


# -- data files that do not fit their settings -----------------------------------------------------------------


def table(folder):
    datasets.Dataset.from_dict({"img": ["a.png"], "said": ["x"]}).to_parquet(folder / "t.parquet")
    return {"path": "t.parquet", "columns": {"image": "img", "text": "said"}, "task": "comprehension"}


def splits(folder):
    one = datasets.Dataset.from_dict({"img": ["a.png"], "said": ["x"]})
    datasets.DatasetDict(train=one, test=one).save_to_disk(str(folder / "saved"))
    return table(folder) | {"path": "saved", "format": "datasets"}


def spreadsheet(folder):
    (folder / "t.xlsx").write_bytes(b"PK")
    return table(folder) | {"path": "t.xlsx", "format": "datasets"}


def shards(folder):
    for name in "ab":
        (folder / f"{name}.jsonl").write_text("{}\n")


FILES = {
    "a glob of conversations": (lambda f: shards(f) or {"path": "*.jsonl", "format": "jsonl"}, ("several files",)),
    "no media root": (lambda f: shards(f) or {"path": "a.jsonl", "media_root": "nowhere"}, ("nowhere", "media root")),
    "a table without columns": (lambda f: table(f) | {"columns": None}, ("give columns",)),
    "a table without a task": (lambda f: table(f) | {"task": None}, ("comprehension", "generation")),
    "a table of several splits": (splits, ("several splits", "train, test")),
    "a table of another kind": (spreadsheet, ("t.xlsx", ".parquet")),
    "a task of conversations": (lambda f: shards(f) or {"path": "a.jsonl", "task": "generation"}, ("task is given",)),
    "a format that there is not": (lambda f: shards(f) or {"path": "a.jsonl", "format": "jsnl"}, ("mean 'jsonl'",)),
    "no format for a suffix": (lambda f: (f / "a.txt").write_text("x") and {"path": "a.txt"}, ("cannot be told",)),
    "a weight that rounds to none": (lambda f: table(f) | {"weight": 0.1}, ("rounds to none",)),
}


@pytest.mark.parametrize("what", FILES)
def test_data_files_that_do_not_fit_their_settings(data, tmp_path, capsys, monkeypatch, what):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    folder.mkdir()
    shutil.copy(next((data / "stage1").rglob("*.png")), folder / "a.png")
    make, said = FILES[what]
    source = make(folder)
    source |= {key: str(folder / source[key]) for key in ("path", "media_root") if key in source}
    refuse(1, data, tmp_path, capsys, *said, more=(f"--data.train=[{json.dumps(source)}]",))


# -- the folder that a run starts from -------------------------------------------------------------------------


def edit_config(change):
    def edit(folder, _):
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def smaller_tokenizer(folder, _):
    """Another model's: it knows no signal tokens, and its other ids mean something else."""
    shutil.copy(part_path("image_decoder") / "tokenizer/tokenizer_config.json", folder)
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        source = part_path("image_decoder") / "tokenizer" / name
        (folder / name).unlink(missing_ok=True)
        if source.exists():
            shutil.copy(source, folder)


def rename_class(content):
    content["language_model"]["class"] = "os.path.join"


ADAPTER = "adapters/language_model/adapter_model.safetensors"
STARTS = {
    "another tokenizer": (smaller_tokenizer, ("start", "tokenizer", "other ids")),
    "no tokenizer": (lambda f, _: (f / "tokenizer.json").unlink(), ("start",)),
    "config of a newer format": (edit_config(lambda c: c.update(format_version=99)), ("start", "99")),
    "config that names other code": (edit_config(rename_class), ("os.path.join", "transformers")),
    "tensors cut short": (lambda f, _: os.truncate(f / "model.safetensors", 999), ("model.safetensors",)),
    "tensors pickled": (lambda f, t: pickled_under_the_same_name(f / "model.safetensors", t), ("model.safetensors",)),
    "adapter cut short": (lambda f, _: os.truncate(f / ADAPTER, 999), ("adapter",)),
    "adapter gone": (lambda f, _: (f / ADAPTER).unlink(), ("adapter",)),
    "adapter pickled": (lambda f, t: pickled(f / ADAPTER, t), ("adapter",)),
    "adapter pickled, same name": (lambda f, t: pickled_under_the_same_name(f / ADAPTER, t), ("adapter",)),
    "adapter config cut short": (
        lambda f, _: os.truncate(f / ADAPTER.replace("_model.safetensors", "_config.json"), 9),
        (),
    ),
    "a tensor too few": (lambda f, _: change_tensors(f, lambda t: dict(list(t.items())[1:])), ("missing",)),
    "a tensor too many": (
        lambda f, _: change_tensors(f, lambda t: t | {"more": torch.zeros(1)}),
        ("unexpected: more",),
    ),
}


@pytest.mark.parametrize("how", STARTS)
def test_spoiled_starts(data, third, tmp_path, capsys, how):
    spoil, said = STARTS[how]
    start = tmp_path / "start"
    shutil.copytree(third, start)
    (start / "manifest.json").unlink()  # which would tell first
    spoil(start, tmp_path)
    refuse(3, data, tmp_path, capsys, *said, init_from=start)
    assert not (tmp_path / "malice").exists()


def test_an_adapter_of_another_size(data, third, tmp_path, capsys):
    start = tmp_path / "start"
    shutil.copytree(third, start)
    (start / "manifest.json").unlink()  # which would tell first
    tensors = load_file(start / ADAPTER)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, start / ADAPTER)
    refuse(3, data, tmp_path, capsys, "adapter", init_from=start)


def test_stages_in_a_wrong_order(data, first, third, tmp_path, capsys):
    """Stage 3 without stage 2 has no decoders for its rows; stage 2 after stage 3 would train below an adapter."""
    refuse(3, data, tmp_path, capsys, "needs a decoder", "stage3.jsonl", init_from=first)
    code, _ = cli_here(
        2, arguments(2, data / "stage2.jsonl", tmp_path / "run", init_from=third, steps=1, batch_size=1), capsys
    )
    assert code == 0  # the adapter stays as it is, and what stage 2 trains goes on


def test_a_stage_without_a_start_or_parts(data, tmp_path, capsys):
    path = tmp_path / "empty.yaml"
    path.write_text("run: {device: cpu}\n")
    args = arguments(3, data / "stage3.jsonl", tmp_path / "run", config=path)
    code, lines = cli_here(3, args, capsys)
    check_mistake(code, lines, "model has neither language_model nor init_from")


# -- the disk -------------------------------------------------------------------------------------------------


def mounted(folder, options):
    """A file system of its own, where that is allowed."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("needs the right to mount a file system")


def test_a_full_disk(data, tmp_path, capsys):
    """Room for one checkpoint and not for two: the first stays whole, and the run goes on where there is room."""
    disk = tmp_path / "disk"
    mounted(disk, "size=1500k")
    try:
        args = arguments(1, data / "stage1.jsonl", disk / "run", "--train.save_steps=1", steps=6, batch_size=2)
        code, lines = cli_here(1, args, capsys)
        check_mistake(code, lines, "No space left on device", "the last checkpoint is")
        kept = sorted(disk.glob("run/checkpoint-*"))
        assert kept and not list(disk.glob("run/.*.incomplete")) and not (disk / "run/final").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert cli_here(1, args, capsys)[0] == 0
        assert f"continues from {kept[-1]}" in (disk / "run/log.txt").read_text()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_read_only_file_system(data, tmp_path, capsys):
    disk = tmp_path / "disk"
    mounted(disk, "size=1m,ro")
    try:
        code, lines = cli_here(1, arguments(1, data / "stage1.jsonl", disk / "run"), capsys)
        check_mistake(code, lines, "run.output_dir", disk, "may not be written to")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_start_that_is_no_folder(data, tmp_path, capsys):
    start = tmp_path / "final"
    start.write_text("")
    refuse(2, data, tmp_path, capsys, start, "config.json", init_from=start)
