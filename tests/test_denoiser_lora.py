"""LoRA on a decoder's denoiser: what trains, what is saved, and the same media after loading and after merging."""

import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from decoder_families import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from training_utils import (
    arguments,
    check_mistake,
    cli_here,
    run_forked,
    start_of,
    tensors_of,
    toy_data,
    train_here,
    trained_tensors,
)

from anygpt import MultimodalModel, commands
from anygpt.decoders.base import load_decoder
from anygpt.training.memory import measure_part

PARTS = "[image_denoiser, image_output_projector]"
SAMPLE = """
import sys
import numpy
import torch
from anygpt import MultimodalModel
decoder = MultimodalModel.from_pretrained(sys.argv[1]).decoders["image"].module
seen = []
decoder.vae.post_quant_conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
condition = torch.randn(2, *decoder.condition_shape, generator=torch.Generator().manual_seed(0))
decoder.sample(condition, num_inference_steps=3, generator=torch.Generator().manual_seed(1))
numpy.save(sys.argv[2], torch.cat(seen).numpy())
"""


def sample_anew(folder, file):
    """What the decoder of a saved model samples in a new process, before the VAE."""
    run_forked("-c", SAMPLE, folder, file).check_returncode()
    return np.load(file)


def sample_here(folder, file, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample", str(folder), str(file)])
    exec(SAMPLE, {})
    return np.load(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory)


def start(data, output, *more, parts=PARTS):
    settings = ("--denoiser_lora.r", 2, "--denoiser_lora.dropout", 0.1, "--train.learning_rate", 0.01)
    more = ("--train.parts", parts, *settings, *more)
    return arguments(2, data / "stage2.jsonl", output, "--model.init_from", "null", *more)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A run's folder after two updates, its tensors before them, and the names that train."""
    folder = tmp_path_factory.mktemp("denoiser") / "run"
    args = start(data, folder, "--train.save_steps", 1, "--run.seed", 3)
    model, _, names = start_of(2, args)
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    train_here(2, args)
    return folder, before, names


def test_exactly_the_named_parts_train(run):
    folder, before, names = run
    adapters = {name for name in names if ".lora_" in name}
    assert adapters and all(name.startswith("image_decoder.module.unet.") for name in adapters)
    assert all(name.startswith("image_decoder.projector.") for name in set(names) - adapters)
    after = tensors_of(MultimodalModel.from_pretrained(folder / "final"))
    assert after.keys() == before.keys()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved <= set(names) and adapters <= moved


def test_adapters_are_in_pefts_own_format(run):
    folder = run[0] / "final"
    assert [path.name for path in (folder / "adapters").iterdir()] == ["image_denoiser"]
    assert not (folder / "parts").exists()
    denoiser = load_decoder("zoo:image_decoder").denoiser
    wrapped = PeftModel.from_pretrained(denoiser, folder / "adapters/image_denoiser")
    ours = MultimodalModel.from_pretrained(folder).decoders["image"].module.denoiser.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in denoiser.state_dict().items()) and wrapped


def test_reloaded_saved_again_and_merged_give_the_same_sample(run, tmp_path, monkeypatch):
    final = run[0] / "final"
    ours = sample_here(final, tmp_path / "ours.npy", monkeypatch)
    np.testing.assert_array_equal(sample_anew(final, tmp_path / "anew.npy"), ours)
    model = MultimodalModel.from_pretrained(final)
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    model.save_pretrained(tmp_path / "whole", standalone=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(model).items())
    np.testing.assert_array_equal(sample_here(tmp_path / "whole", tmp_path / "whole.npy", monkeypatch), ours)

    main = partial(commands.run, "merge-lora")
    assert main(["--output", str(tmp_path / "merged"), "--checkpoint", str(final)]) == 0
    assert not (tmp_path / "merged/adapters").exists()
    merged = sample_here(tmp_path / "merged", tmp_path / "merged.npy", monkeypatch)
    np.testing.assert_allclose(merged, ours, rtol=1e-5, atol=1e-5)
    decoder = model.decoders["image"].module
    decoder.denoiser_adapter.unload()
    decoder.set_adapter(None)
    model.save_pretrained(tmp_path / "without")
    without = sample_here(tmp_path / "without", tmp_path / "without.npy", monkeypatch)
    assert abs(without - ours).max() > 1e-3


def test_resume_is_bit_identical(run, data, tmp_path):
    folder, again = run[0], tmp_path / "run"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "final")
    shutil.rmtree(again / "checkpoint-2")
    train_here(2, start(data, again, "--train.save_steps", 1, "--run.seed", 3))
    ours, theirs = trained_tensors(again / "final"), trained_tensors(folder / "final")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_stage_goes_on_with_the_adapter_that_is_there(run, data, tmp_path, capsys):
    more = ("--model.init_from", run[0] / "final")
    model, _, names = start_of(2, start(data, tmp_path / "run", *more, parts="[image_denoiser]"))
    assert names and all(".lora_" in name for name in names)
    summary = {line.part: line for line in model.summarize_parts()}
    assert summary["image_denoiser"].parameters == summary["image_denoiser"].trainable
    counted = set()
    parts = [measure_part(model, name, counted) for name in reversed(model.parts)]
    assert sum(part.trainable for part in parts) == summary["image_denoiser"].trainable
    model.train()
    denoiser = model.decoders["image"].module.denoiser
    modes = {name for name, module in denoiser.named_modules() if module.training}
    assert modes and all(".lora_" in name for name in modes)

    for wrong, said in (
        (("--denoiser_lora.r", 4), ("denoiser_lora.r is 4", "made with 2")),
        (("--train.parts", "[image_decoder]"), ("image_decoder", "image_denoiser", "merge-lora")),
    ):
        code, lines = cli_here(2, start(data, tmp_path / "other", *more, *wrong), capsys)
        check_mistake(code, lines, *said)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--denoiser_lora.target_modules", "[qq]"), ("denoiser_lora.target_modules", "qq")),
        (("--train.parts", "[sound_denoiser]"), ("sound_denoiser",)),
    ],
)
def test_mistakes(wrong, said, data, tmp_path, capsys):
    code, lines = cli_here(2, start(data, tmp_path / "run", *wrong), capsys)
    check_mistake(code, lines, *said)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_predicts_the_same_when_merged(name):
    family = FAMILIES[name]
    decoder = family.decoder()
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    condition, noise = decoder.encode_text(["a red ring"]), torch.randn(1, *family.latents)
    time = torch.full((1,), 0.5 if name == "stable-audio" else 500)

    def predict(decoder):
        with torch.no_grad():
            return decoder.predict(noise, time, decoder._ready(condition))

    before = predict(decoder)
    decoder.set_adapter(get_peft_model(decoder.denoiser, settings))
    adapted = predict(decoder)
    assert not torch.allclose(adapted, before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(predict(decoder.without_adapter(merge=True)), adapted, rtol=1e-4, atol=1e-5)
    assert torch.equal(predict(decoder.without_adapter()), before) and torch.equal(predict(decoder), adapted)
