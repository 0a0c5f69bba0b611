"""Encoders and language models out of the whole models that the hub holds: exactly their tensors, or a refusal."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_parts import IMAGEBIND
from whole_models import MROPE, WHOLE_MODELS, rewrite

from anygpt import InputError, load_encoder, load_encoder_processor, load_language_model
from anygpt.encoders import FAMILIES
from anygpt.encoders.imagebind import ImageBindConfig, ImageBindModel

MASKS = ("mask_token", "masked_spec_embed")  # stand for hidden patches or frames in pretraining; not loaded


def by_label(whole):
    return whole.label


def build(whole):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return whole.build()


@pytest.mark.parametrize("layout", ["hub", "today"])
@pytest.mark.parametrize("whole", WHOLE_MODELS, ids=by_label)
def test_every_tensor_of_the_encoder_is_the_checkpoints(whole, layout, tmp_path):
    model = build(whole)
    expected = {
        name.removeprefix(whole.encoder): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(whole.encoder)
    }
    encoder = load_encoder(whole.save(model, tmp_path, layout), whole.modality)
    found = encoder.state_dict()
    assert set(found) <= set(expected)
    assert {name for name in set(expected) - set(found) if not name.endswith(MASKS)} == set()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("whole", WHOLE_MODELS, ids=by_label)
def test_a_missing_tensor_is_refused_by_name(whole, tmp_path):
    model = build(whole)
    folder = whole.save(model, tmp_path, "hub")
    own = [whole.hub_name(name) for name in model.state_dict() if name.startswith(whole.encoder)]
    kept = {}
    rewrite(folder, lambda tensors: kept.setdefault("all", tensors))
    own = [name for name in own if name in kept["all"] and not name.endswith(MASKS)]
    for name in random.Random(0).sample(own, min(10, len(own))):
        rewrite(folder, lambda _, name=name: {n: t for n, t in kept["all"].items() if n != name})
        with pytest.raises(InputError) as refusal:
            load_encoder(folder, whole.modality)
        assert f" {name}" in str(refusal.value) and "model.safetensors" in str(refusal.value)


def test_every_family_is_tried(tmp_path):
    families = {load_encoder(w.save(build(w), tmp_path / w.label, "today"), w.modality).config.model_type
                for w in WHOLE_MODELS}  # fmt: skip
    ours = {name for name in FAMILIES if name.startswith("anygpt_")}
    assert set(FAMILIES) - families == ours


@pytest.mark.parametrize("layout", ["hub", "today"])
@pytest.mark.parametrize("whole", [w for w in WHOLE_MODELS if w.text], ids=by_label)
def test_every_tensor_of_the_language_model_is_the_checkpoints(whole, layout, tmp_path):
    model = build(whole)
    found = load_language_model(whole.save(model, tmp_path, layout)).state_dict()
    expected = {"lm_head.weight": model.lm_head.weight}
    expected |= {
        name.replace(whole.text, "model."): t for name, t in model.state_dict().items() if name.startswith(whole.text)
    }
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("whole", [w for w in WHOLE_MODELS if w.text], ids=by_label)
def test_a_language_model_that_lacks_a_tensor_is_refused_by_name(whole, tmp_path):
    model = build(whole)
    folder = whole.save(model, tmp_path, "hub")
    lost = [whole.hub_name(f"{whole.text}layers.1.self_attn.q_proj.weight"), whole.hub_name("lm_head.weight")]
    kept = {}
    rewrite(folder, lambda tensors: kept.setdefault("all", tensors))
    for name in lost:
        rewrite(folder, lambda _, name=name: {n: t for n, t in kept["all"].items() if n != name})
        with pytest.raises(InputError, match=f" {name}"):
            load_language_model(folder)


@pytest.mark.parametrize("feature", ["embedding", "tokens"])
@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_a_tower_out_of_imagebind(modality, feature, tmp_path):
    model = ImageBindModel(ImageBindConfig(**IMAGEBIND))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path, modality, feature=feature)
    expected = model.state_dict()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert encoder.config.feature == feature
    assert load_encoder_processor(tmp_path, modality) is not None


MEASURED = """
import sys
import torch
import anygpt

def peak():  # of this program alone: getrusage's begins with that of the process which started it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak()
encoder = anygpt.load_encoder(sys.argv[1], "image")
for tensor in encoder.state_dict().values():  # they are mapped from the file until something reads them
    tensor.reshape(-1).view(torch.uint8).max()
print(peak() - before, sum(tensor.nbytes for tensor in encoder.state_dict().values()))
"""


def save_at_size(folder, depth, embed_dim, hidden_size, layers, intermediate_size):
    """A sharded Qwen2-VL of random bfloat16 tensors, in the hub's layout; made without ever being in memory whole."""
    text = {"hidden_size": hidden_size, "num_hidden_layers": layers, "intermediate_size": intermediate_size}
    text |= {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 1024}
    vision = {"depth": depth, "embed_dim": embed_dim, "num_heads": 16, "hidden_size": hidden_size}
    config = transformers.Qwen2VLConfig(text_config=text | MROPE, vision_config=vision, dtype="bfloat16")
    with torch.device("meta"):
        model = transformers.Qwen2VLForConditionalGeneration(config)
    config.save_pretrained(folder)
    whole = next(w for w in WHOLE_MODELS if w.label == "Qwen2-VL")
    random, index = torch.randn(1 << 22).bfloat16(), {}
    for number, start in enumerate(("model.visual.", "model.language_model.", "lm_head.")):
        shard, tensors = f"model-{number}.safetensors", {}
        for name, tensor in model.state_dict().items():
            if name.startswith(start):
                repeats = -(-tensor.numel() // len(random))
                tensors[whole.hub_name(name)] = random.repeat(repeats)[: tensor.numel()].view(tensor.shape).clone()
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize(
    "sizes",
    [(8, 1024, 1536, 4, 4096), pytest.param((32, 1280, 1536, 28, 8960), marks=pytest.mark.slow)],
    ids=["a tenth", "Qwen2-VL-2B"],
)
def test_the_peak_is_the_encoders_own(sizes, tmp_path):
    save_at_size(tmp_path, *sizes)
    done = subprocess.run([sys.executable, "-c", MEASURED, tmp_path], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, own = map(int, done.stdout.split()[-2:])
    assert 0.9 * own < peak < 1.5 * own, f"{peak / own:.2f} times the encoder's {own / 1e6:.0f} MB"
