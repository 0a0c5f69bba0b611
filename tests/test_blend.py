"""Stage 3 on one config that blends NExT-GPT's JSON, LLaVA's, shards of all media types, and tables."""

import io
import json
import tarfile

import pytest
from PIL import Image
from training_utils import argument_maker, logged, train_here

from anygpt.toyworld.datasets import write_dataset

SUFFIXES = {"image": "png", "video": "mp4", "audio": "wav"}


@pytest.fixture(scope="module")
def make_arguments(tmp_path_factory):
    return argument_maker(tmp_path_factory)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """`data.train` of eight files; the media are ToyWorld's."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_dataset(tmp_path / "toy", "stage2", 12, seed=0)
    media = {kind: sorted((tmp_path / "toy").rglob(f"*.{suffix}"))[:3] for kind, suffix in SUFFIXES.items()}

    talk = [{"from": "human", "value": "<image>\nDraw it again."}, {"from": "gpt", "value": "Here: <image>"}]
    names = [path.name for path in media["image"]]
    for folder in ("images", "videos", "audios"):
        (tmp_path / "next" / folder).mkdir(parents=True)
    for kind, paths in media.items():
        for path in paths:
            (tmp_path / "next" / f"{kind}s" / path.name).write_bytes(path.read_bytes())
    rows = [
        {"conversations": talk, "input_image": name, "output_image": names[0], "image_captions": ["a ring"]}
        for name in names
    ]
    (tmp_path / "next/rows.json").write_text(json.dumps(rows))
    llava = [
        {"id": str(i), "image": name, "conversations": [talk[0], {"from": "gpt", "value": "No."}]}
        for i, name in enumerate(names)
    ]
    (tmp_path / "next/llava.json").write_text(json.dumps(llava))
    alpaca = [{"instruction": "Say it.", "input": "", "output": "It."}] * 2
    (tmp_path / "next/alpaca.json").write_text(json.dumps(alpaca))
    for kind, paths in media.items():
        with tarfile.open(tmp_path / f"{kind}.tar", "w") as tar:
            for i, path in enumerate(paths):
                for name, content in ((f"{i}.{SUFFIXES[kind]}", path.read_bytes()), (f"{i}.txt", b"a red ring")):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    table = {"img": [Image.open(path) for path in media["image"]], "said": ["a ring"] * 3}
    datasets.Dataset.from_dict(table).cast_column("img", datasets.Image()).to_parquet(tmp_path / "table.parquet")
    columns = {"image": "img", "text": "said"}
    return [
        {"path": str(tmp_path / "next/rows.json"), "format": "nextgpt"},
        {"path": str(tmp_path / "next/llava.json"), "format": "llava"},
        {"path": str(tmp_path / "next/alpaca.json"), "format": "alpaca", "weight": 0.5},
        {"path": str(tmp_path / "image.tar"), "task": "comprehension"},
        {"path": str(tmp_path / "video.tar"), "task": "generation"},
        {"path": str(tmp_path / "audio.tar"), "task": "generation", "weight": 2},
        {"path": str(tmp_path / "table.parquet"), "columns": columns, "task": "generation"},
        {"path": str(tmp_path / "table.parquet"), "columns": columns, "task": "comprehension"},
    ]


def test_stage_3_on_a_blend_of_all_formats(make_arguments, sources, tmp_path):
    args = make_arguments(3, tmp_path / "run", "--run.tracker=tensorboard", "--data.num_workers=1", batch_size=5)
    args[args.index("--data.train") + 1] = json.dumps(sources)
    args[args.index("--train.max_steps") + 1] = "5"  # 25 positions: an epoch is 1 + 6 + 6 · 3
    final = train_here(3, args)
    assert (final / "model.safetensors").is_file()
    seen = {name.rpartition("/")[0] or name for metrics in logged(tmp_path / "run").values() for name in metrics}
    assert {"llm", "encoder_llm", "llm_decoder", "encoder_decoder"} <= seen
    names = {name for metrics in logged(tmp_path / "run").values() for name in metrics}
    assert {f"llm_decoder/denoising/{key}" for key in SUFFIXES} <= names


def test_batches_of_one_kind_with_rows_cut_to_a_length(make_arguments, sources, tmp_path):
    more = ("--data.group_by_modality=true", "--data.group_by_length=true", "--data.max_length=60")
    args = make_arguments(3, tmp_path / "run", *more, "--data.on_long_sample=cut", "--train.log_steps=1", batch_size=4)
    args[args.index("--data.train") + 1] = json.dumps(sources[:-1])
    train_here(3, args)
    assert "20 samples" in (tmp_path / "run/log.txt").read_text()
