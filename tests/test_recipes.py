"""Every shipped configuration of real parts, at tiny sizes against a mirror of the hub, offline."""

import json
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from hub_mirror import REPOSITORIES, make_mirror
from PIL import Image
from test_check import run_check
from training_utils import REPOSITORY, load_script, reset_accelerate, shared, train_here, trained_tensors

from anygpt import MultimodalModel, MultimodalProcessor, load_encoder
from anygpt.media.writing import write_audio, write_video

RECIPES = {"small": (1, 2, 3), "nextgpt": (1, 2, 3), "llava": (1, 3)}
SHORT = (
    *("--train.max_steps", "2", "--train.batch_size", "2", "--train.warmup_steps", "0"),
    *("--train.gradient_accumulation_steps", "1", "--data.num_workers", "0"),
    *("--run.tracker", "none", "--run.device", "cpu"),
)


def path_of(recipe, stage):
    return REPOSITORY / f"configs/{recipe}/stage{stage}.yaml"


def narrow_projectors(recipe, stage):
    """Settings that make output projectors as narrow as the mirror's parts; at the paper's width they are the run."""
    decoders = yaml.safe_load(path_of(recipe, stage).read_text())["model"].get("decoders") or ()
    sizes = {"d_model": 32, "ffn_dim": 64}
    return [f"--model.decoders.{key}.projector.{name}={size}" for key in decoders for name, size in sizes.items()]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return shared(tmp_path_factory, "hub_mirror", make_mirror)


@pytest.fixture(autouse=True)
def _offline(mirror, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(mirror))
    yield
    reset_accelerate()  # a recipe's bf16 is not the next test's


def turn(asked, answered, **media):
    return {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}], **media}


def write_data(folder):
    """The data sets that the configurations name, in their own files, a few rows each."""
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (12, 40, 56, 3), dtype=np.uint8)
    media = {
        "image": ("cc3m/images/1.jpg", lambda path: Image.fromarray(frames[0]).save(path)),
        "video": ("webvid/videos/1.mp4", lambda path: write_video(path, frames, 6.0)),
        "audio": ("audiocap/audios/1.wav", lambda path: write_audio(path, random.normal(0, 0.1, 24000), 16000)),
    }
    for name, write in media.values():
        (folder / name).parent.mkdir(parents=True)
        write(folder / name)
    for kind, (name, _) in media.items():
        where, file = folder / Path(name).parts[0], Path(name).name
        reads = turn(f"<{kind}>\nWhat is this?", "a thing of many colours", **{f"input_{kind}": file})
        makes = turn("Make a thing.", f"Here: <{kind}>", **{f"output_{kind}": file, f"{kind}_captions": "a thing"})
        (where / f"{where.name}_comprehension.json").write_text(json.dumps([reads] * 3))
        (where / f"{where.name}_generation.json").write_text(json.dumps([makes] * 30))
    picture = folder / media["image"][0]
    for place in ("coco/train2017", "LLaVA-Pretrain/images", "LLaVA-Instruct-150K/images"):
        (folder / place).mkdir(parents=True)
        shutil.copy(picture, folder / place)
    rows = {
        "IT_data/T+X-T_data/llava/llava.json": turn("<image>\nWhat is it?", "a thing", input_image="1.jpg"),
        "IT_data/T+X-T_data/alpaca/alpaca.json": {"instruction": "Say hello.", "input": "", "output": "Hello."},
        "IT_data/T+X-T_data/videochat/videochat.json": {
            "video": "1.mp4",
            "QA": [{"i": "", "q": "What moves?", "a": "a thing"}],
        },
        "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": turn("<image>\nDescribe it.", "a thing", image="1.jpg"),
        "LLaVA-Instruct-150K/llava_v1_5_mix665k.json": turn("<image>\nDescribe it.", "a thing", image="1.jpg"),
    }
    for name, row in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps([row] * 4))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return shared(tmp_path_factory, "recipe_data", write_data)


@pytest.fixture
def place(data, tmp_path, monkeypatch):
    """A working directory with `data/`, as the configurations have it."""
    (tmp_path / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_mirror_has_every_repository_that_a_configuration_names():
    named = set()
    for file in (REPOSITORY / "configs").rglob("*.yaml"):
        model = (yaml.safe_load(file.read_text()) or {}).get("model") or {}
        kinds = ("encoders", "decoders", "tokenizers")
        parts = [part for kind in kinds for part in (model.get(kind) or {}).values()]
        paths = [part["path"] for part in (*parts, model.get("language_model")) if part]
        named |= {path for path in paths if not path.startswith(("zoo:", "runs/"))}
    assert named == set(REPOSITORIES)
    assert set(RECIPES) == {p.parent.name for p in (REPOSITORY / "configs").glob("*/stage[123].yaml")} - {
        "tiny",
        "real",
    }


@pytest.mark.parametrize(
    "recipe", ["small", *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES if name != "small")]
)
def test_every_stage_of_a_recipe_makes_two_updates(recipe, place):
    for stage in RECIPES[recipe]:
        args = ["--config", str(path_of(recipe, stage)), *SHORT, *narrow_projectors(recipe, stage)]
        final = train_here(stage, args)
        assert final.resolve() == place / f"runs/{recipe}/stage{stage}/final"
        assert all(tensor.isfinite().all() for tensor in trained_tensors(final).values())
    model = MultimodalModel.from_pretrained(final).eval()
    processor = MultimodalProcessor.from_pretrained(final, model=model)
    image = Image.open("data/cc3m/images/1.jpg")
    batch = processor({"image": {"images": [image]}}, {"text": "<image> What is it?"})
    wanted = [key for key in ("image", "audio") if key in model.decoders]
    few = {key: {"num_inference_steps": 1} for key in wanted}
    small = {"image": {"height": 16, "width": 16}, "audio": {"audio_length_in_s": 0.1}}
    answer = model.generate(
        **batch,
        max_new_tokens=16,
        require=wanted,
        decoder_kwargs={key: few[key] | small[key] for key in wanted},
    ).answers[0]
    assert len(answer.images) == ("image" in wanted) and len(answer.audios) == ("audio" in wanted)


@pytest.mark.parametrize("recipe", ["small", pytest.param("full", marks=pytest.mark.slow)])
def test_all_at_once_with_tokenizers_of_the_hub(recipe, place):
    """Two updates, and media made of codes, few of which a tiny codebook has."""
    given = ["--config", str(REPOSITORY / f"configs/{recipe}/all_at_once.yaml"), *SHORT]
    final = train_here("all_at_once", [*given, "--lora.r", "0"])
    assert all(tensor.isfinite().all() for tensor in trained_tensors(final).values())
    model = MultimodalModel.from_pretrained(final).eval()
    sizes = {key: (one.module.shape, one.module.codebook_size) for key, one in model.tokenizers.items()}
    assert (
        sizes
        == {
            "small": {"image": ((16, 16), 16), "video": ((4, 8, 8), 16), "audio": ((50, 8), 128)},
            "full": {"image": ((32, 32), 16), "video": ((2, 24, 24), 16), "audio": ((100, 8), 128)},
        }[recipe]
    )


@pytest.mark.parametrize(
    "recipe", [name if name == "llava" else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_check_of_every_stage(recipe, place, capsys):
    for stage in RECIPES[recipe]:
        code, out, err = run_check(stage, ["--config", str(path_of(recipe, stage)), "--run.device", "cpu"], capsys)
        assert (code, err) == (0, []) and "computed, not measured" in out and "not counted" not in out
    if recipe == "small":
        given = ["--config", str(REPOSITORY / "configs/small/all_at_once.yaml"), "--run.device", "cpu"]
        code, out, err = run_check("all_at_once", given, capsys)
        assert (code, err) == (0, []) and "image_tokenizer" in out and "not counted" not in out
    assert not (place / "runs").exists()


def test_a_check_fetches_no_weight_files(place, capsys, mirror, tmp_path, monkeypatch):
    """From a cache with configs and tokenizers alone: the same parts, and a plan."""
    args = ["--config", str(path_of("llava", 1)), "--run.device", "cpu"]
    whole = run_check(1, args, capsys)
    empty = tmp_path / "hub"
    shutil.copytree(mirror, empty, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(empty))
    code, out, err = run_check(1, args, capsys)
    assert (code, err) == (0, []) and "computed, not measured" in out
    counts = [[line.split("|")[1:4] for line in said.splitlines() if "_encoder |" in line] for said in (whole[1], out)]
    assert counts[0] == counts[1] and len(counts[0]) == 1


def test_check_tells_of_ids_and_files_that_are_not_right(place, capsys, mirror, tmp_path, monkeypatch):
    broken = tmp_path / "hub"
    shutil.copytree(mirror, broken)
    (snapshot,) = broken.glob("models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/*")
    content = (snapshot / "model.safetensors").read_bytes()
    (snapshot / "model.safetensors").write_bytes(content[:-10])
    (snapshot,) = broken.glob("models--openai--whisper-tiny/snapshots/*")
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"d_model": 32}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(broken))
    args = ["--config", str(path_of("small", 2)), "--model.decoders.audio.path", "nobody/nothing"]
    code, _, err = run_check(2, [*args, "--run.device", "cpu"], capsys)
    assert code == 2
    for said in (
        ("model.language_model: ", "model.safetensors", "cut off"),
        ("model.encoders.audio: ", "openai/whisper-tiny", "another shape"),
        ("model.decoders.audio: ", "nobody/nothing"),
    ):
        assert sum(all(word in line for word in said) for line in err) == 1, (said, err)


def test_tokens_of_the_recipe(mirror):
    """One token an image, 15 a video, 3 a sound; the signal tokens of the paper; CLIP's layer −2 without its class."""
    model = yaml.safe_load(path_of("nextgpt", 2).read_text())["model"]
    counts = {key: part["num_signal_tokens"] for key, part in model["decoders"].items()}
    assert counts == {"image": 4, "video": 24, "audio": 8}
    for key, shape in (("image", (1, 1, 24)), ("video", (1, 15, 24)), ("audio", (1, 3, 24))):
        encoder = load_encoder(model["encoders"][key]["path"], key)
        sizes = {"image": (1, 3, 224, 224), "video": (1, 15, 3, 2, 224, 224), "audio": (1, 3, 1, 128, 204)}
        assert encoder(torch.zeros(sizes[key])).last_hidden_state.shape == shape


@pytest.mark.slow
def test_the_plan_agrees_with_what_a_run_takes(place, tmp_path):
    """Stage 1 of `small` at its parts' real sizes, with random weights."""
    real_sizes = load_script("real_sizes")
    model = yaml.safe_load(path_of("small", 1).read_text())["model"]
    ids = {part["path"] for part in (*model["encoders"].values(), model["language_model"])}
    make_mirror(tmp_path / "hub", sorted(ids), real=True)
    command = [sys.executable, str(REPOSITORY / "stages/stage1_encoder_llm.py"), "--config", str(path_of("small", 1))]
    command += [*SHORT, "--run.output_dir", str(tmp_path / "run")]
    said = real_sizes.run([*command, "--check"], tmp_path / "hub")["output"]
    device, process = re.search(r"measured: ([\d.]+) GiB on one device, and ([\d.]+) GiB", said).groups()
    peak = real_sizes.run(command, tmp_path / "hub")["peak_gib"]
    assert float(device) + float(process) == pytest.approx(peak, rel=0.15)
