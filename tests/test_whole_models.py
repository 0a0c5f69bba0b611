"""Encoders and language models out of the whole models that the hub holds: exactly their tensors, or a refusal."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_parts import IMAGEBIND
from whole_models import WHOLE_MODELS, rewrite

from anygpt import InputError
from anygpt.encoders import FAMILIES
from anygpt.encoders.imagebind import ImageBindConfig, ImageBindModel
from anygpt.model.parts import load_encoder, load_encoder_processor, load_language_model


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
    assert set(found) <= set(expected) and not set(expected) - set(found) - {"embeddings.mask_token"}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("whole", WHOLE_MODELS, ids=by_label)
def test_a_missing_tensor_is_refused_by_name(whole, tmp_path):
    model = build(whole)
    folder = whole.save(model, tmp_path, "hub")
    own = [whole.hub_name(name) for name in model.state_dict() if name.startswith(whole.encoder)]
    kept = {}
    rewrite(folder, lambda tensors: kept.setdefault("all", tensors))
    own = [name for name in own if name in kept["all"] and not name.endswith("mask_token")]
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
