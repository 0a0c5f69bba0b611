"""The main job as a user runs it: three stages in a row, then a new process that answers in all four modalities."""

from __future__ import annotations

import json
import shutil
import wave

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_utils import (
    SCRIPTS,
    arguments,
    change_tensors,
    check_mistake,
    cli_here,
    launch,
    run_forked,
    shared,
    start_of,
    tensors_of,
    toy_data,
    trained_tensors,
)

from anygpt import MultimodalModel, MultimodalProcessor
from anygpt.data import read_media
from anygpt.training.config import Config, ModelConfig
from anygpt.training.setup import build

STEPS = 4
ENCODERS, DECODERS = ("image", "video", "audio"), ("image", "video", "audio")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory)


def run_arguments(stage, data, runs):
    """All rows of stage 1 and 2 in an update, and two thirds of stage 3's: every modality and kind of row is there."""
    before = runs / f"stage{stage - 1}/final" if stage > 1 else None
    size = {1: 12, 2: 12, 3: 16}[stage]
    return arguments(
        stage,
        data / f"stage{stage}.jsonl",
        runs / f"stage{stage}",
        init_from=before,
        steps=STEPS,
        batch_size=size,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """A folder with `stage1`, `stage2` and `stage3`, written by the commands of the README."""

    def make(folder):
        for stage in (1, 2, 3):
            args = run_arguments(stage, data, folder)
            done = launch(stage, args) if stage == 1 else run_forked(SCRIPTS[stage], *args)
            assert done.returncode == 0, done.stderr
            (folder / f"stage{stage}.out").write_text(done.stdout)
            (folder / f"stage{stage}.err").write_text(done.stderr)

    return shared(tmp_path_factory, "three_stages", make)


def expected_trainable(stage, model):
    """The contract's stage table, as prefixes of names; independent of `requires_grad` and of the stages' code."""
    inputs = [f"{key}_encoder.projector." for key in ENCODERS]
    outputs = [f"{key}_decoder.projector." for key in DECODERS]
    signal = [f"signal_tokens.{rows}.{key}" for rows in ("input_rows", "output_rows") for key in DECODERS]
    prefixes = {1: inputs, 2: outputs + signal, 3: inputs + outputs + signal}[stage]
    names = {name for name, _ in model.named_parameters()}
    found = {name for name in names if name.startswith(tuple(prefixes))}
    if stage == 3:
        found |= {name for name in names if ".lora_A." in name or ".lora_B." in name}
    return found


def test_each_stage_says_what_trains_and_what_it_lost(runs):
    for stage in (1, 2, 3):
        out = (runs / f"stage{stage}.out").read_text()
        log = (runs / f"stage{stage}/log.txt").read_text()
        for text in (out, log):
            assert f"stage {stage}, " in text
            assert "image_projector" in text
            assert f"update {STEPS}  loss " in text
        assert (runs / f"stage{stage}/config.yaml").is_file()
        assert (runs / f"stage{stage}.err").read_text() == "" or stage == 1  # nothing but mistakes goes there
        assert "deprecat" not in out.lower() and "successfully saved" not in out and "Loading" not in out
        left = sorted(path.name for path in (runs / f"stage{stage}").iterdir())
        assert left == ["config.yaml", "environment.json", "final", "log.txt"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_exactly_the_stages_tensors_moved(runs, data, stage):
    """With AdamW and no weight decay, a tensor moves if and only if it had a gradient."""
    start, _, names = start_of(stage, run_arguments(stage, data, runs))
    expected = expected_trainable(stage, start)
    assert set(names) == expected
    assert expected
    if stage == 1:
        assert len(expected) == 4 * len(ENCODERS)
    if stage == 3:
        lora = {name for name in expected if name.startswith("language_model.")}
        assert len(lora) == 4 * 7 * 2  # layers × linear maps × (A, B); the head is not among them
        assert not any("lm_head" in name for name in lora)
    final = runs / f"stage{stage}/final"
    assert not (final / "parts").exists()  # a frozen part that had changed would be written whole
    before, after = tensors_of(start), tensors_of(MultimodalModel.from_pretrained(final))
    assert before.keys() == after.keys()
    equal = {name for name in before if torch.equal(before[name], after[name])}
    assert before.keys() - equal == expected
    assert all(after[name].dtype == torch.float32 for name in expected)


def test_what_stage_1_trained_reaches_stage_3(runs, data):
    first, second, third = (load_file(runs / f"stage{stage}/final/model.safetensors") for stage in (1, 2, 3))
    projectors = {name for name in first if "_encoder.projector." in name}
    assert len(projectors) == 12
    assert all(torch.equal(first[name], second[name]) for name in projectors)
    start, _, _ = start_of(3, run_arguments(3, data, runs))
    begins = tensors_of(start)
    assert all(torch.equal(second[name], begins[name]) for name in second)
    assert projectors < set(second)
    assert not any(torch.equal(third[name], second[name]) for name in projectors)  # and there it goes on


def test_chat_answers_in_four_modalities(runs, data, tmp_path):
    picture, sound = (sorted(data.glob(f"stage1/{kind}/*"))[0] for kind in ("image", "audio"))
    done = run_forked(
        *("scripts/chat.py", "--checkpoint", runs / "stage3/final", "--output", tmp_path),
        *("--attach", picture, sound, "--prompt", "What are these? Answer with a picture, a clip and a sound."),
        *("--require", "image", "video", "audio", "--max-new-tokens", "64", "--steps", "2"),
    )
    assert done.returncode == 0, done.stderr
    (png,), (mp4,), (wav,) = (sorted(tmp_path.glob(f"*.{suffix}")) for suffix in ("png", "mp4", "wav"))
    lines = done.stdout.splitlines()
    assert all(any(str(path) in line for line in lines) for path in (png, mp4, wav))
    assert any(line and not line.startswith("[") for line in lines)  # text
    with Image.open(png) as image:
        image.load()
        assert image.size == (32, 32)
    assert read_media("video", mp4).frames.shape == (8, 32, 32, 3)
    with wave.open(str(wav)) as file:
        assert file.getframerate() == 16_000
        assert file.getnframes() > 0


API = """
import json, sys, torch
from anygpt import MultimodalModel, MultimodalProcessor
from anygpt.data import read_media
final, picture = sys.argv[1:]
model = MultimodalModel.from_pretrained(final)
processor = MultimodalProcessor.from_pretrained(final, model=model)
content = [{"type": "image", "image": read_media("image", picture)}, {"type": "text", "text": "What is it?"}]
batch = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True)
kwargs = {"num_inference_steps": 2}
out = model.generate(**batch, max_new_tokens=64, require=list(model.decoders),
                     decoder_kwargs={key: kwargs for key in model.decoders})
answer = out.answers[0]
print(json.dumps({"types": [s.type for s in answer.segments], "text": out.text[0],
                  "image": answer.images[0].size, "video": list(answer.videos[0].shape),
                  "samples": len(answer.audios[0]), "rate": model.decoders["audio"].module.sampling_rate}))
"""


def test_a_new_process_loads_final_and_generates(runs, data):
    picture = sorted(data.glob("stage1/image/*"))[0]
    done = run_forked("-c", API, runs / "stage3/final", picture)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"image", "video", "audio"} <= set(found["types"])
    assert found["image"] == [32, 32]
    assert found["video"] == [8, 32, 32, 3]
    assert found["rate"] == 16_000 and found["samples"] > 0


def test_processor_and_model_of_final_agree(runs):
    final = runs / "stage3/final"
    model = MultimodalModel.from_pretrained(final)
    processor = MultimodalProcessor.from_pretrained(final)
    assert model.token_ids == processor.token_ids
    assert model.signal_tokens.ids == processor.signal_token_ids
    assert {name for name in trained_tensors(final) if name.startswith("language_model/")}


def _without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def _smaller(name):
    return lambda tensors: tensors | {name: tensors[name][:-1].contiguous()}


TENSOR = "audio_encoder.projector.projection.2.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [(_without, ("missing", TENSOR)), (_smaller, ("of another shape", TENSOR, "(127, 128)", "(128, 128)"))],
    ids=["missing tensor", "changed size"],
)
def test_stage_2_from_a_folder_with_damaged_tensors(runs, data, tmp_path, capsys, change, said):
    folder = tmp_path / "final"
    shutil.copytree(runs / "stage1/final", folder)
    name = next(n for n in load_file(folder / "model.safetensors") if n.startswith("audio") and n.endswith("2.weight"))
    change_tensors(folder, change(name))
    args = arguments(2, data / "stage2.jsonl", tmp_path / "run", init_from=folder)
    code, lines = cli_here(2, args, capsys)
    check_mistake(code, lines, folder, *(text.replace(TENSOR, name) for text in said))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("--model.encoders.image.path=zoo:audio_encoder",), ("model.encoders.image.path", "zoo:image_encoder")),
        (("--model.encoders.video.num_frames=4",), ("model.encoders.video.num_frames", "4", "8")),
        (
            ("--model.encoders.audio.projector={projection_type: linear}",),
            ("model.encoders.audio.projector.projection_type", "'linear'", "'mlp'"),
        ),
        (("--model.language_model.path=/elsewhere",), ("model.language_model.path", "zoo:language_model")),
    ],
    ids=["encoder", "frames", "projector", "language model"],
)
def test_stage_2_with_a_part_other_than_stage_1s(runs, data, tmp_path, capsys, override, said):
    args = arguments(2, data / "stage2.jsonl", tmp_path / "run", *override, init_from=runs / "stage1/final")
    code, lines = cli_here(2, args, capsys)
    check_mistake(code, lines, runs / "stage1/final", *said)
    assert not (tmp_path / "run").exists()


def test_what_a_start_has_learnt_beside_its_parts_is_kept(tiny_model, tmp_path):
    """The weights of layers, which are neither a part's nor a projector's, and the signal tokens."""
    model, processor = tiny_model((), ("image",), hidden_layer="mix")
    mix = torch.arange(float(len(model.decoders["image"].layer_weights)))
    with torch.no_grad():
        model.decoders["image"].layer_weights.copy_(mix)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    started, _ = build(Config(model=ModelConfig(init_from=str(tmp_path))))
    torch.testing.assert_close(started.decoders["image"].layer_weights, mix, check_device=False)
    rows, others = model.signal_tokens.state_dict(), started.signal_tokens.state_dict()
    assert rows.keys() == others.keys() and all(torch.equal(rows[name], others[name]) for name in rows)


def test_stage_2_from_no_checkpoint(data, tmp_path, capsys):
    for folder in (tmp_path / "nothing", data):
        args = arguments(2, data / "stage2.jsonl", tmp_path / "run", init_from=folder)
        code, lines = cli_here(2, args, capsys)
        check_mistake(code, lines, folder, "config.json", "final/")
        assert not (tmp_path / "run").exists()


def test_stage_2_in_the_folder_that_it_starts_from(runs, data, tmp_path, capsys):
    """`run.resume=never` removes what lies there, and that would be the start itself."""
    shutil.copytree(runs / "stage1", tmp_path / "stage1")
    start = tmp_path / "stage1/final"
    args = arguments(2, data / "stage2.jsonl", start.parent, "--run.resume", "never", init_from=start)
    code, lines = cli_here(2, args, capsys)
    check_mistake(code, lines, "model.init_from", "run.output_dir", start)
    assert trained_tensors(start).keys() == trained_tensors(runs / "stage1/final").keys()
