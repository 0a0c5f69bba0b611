"""Parts from files as the hub has them: a report of every tensor, kinds of files, and what a user may get wrong."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import CLIP, LANGUAGE_MODELS, LLAMA
from tiny_pipelines import audioldm, stable_diffusion, stable_diffusion_3, zeroscope
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from anygpt import InputError
from anygpt.model.parts import load_decoder, load_encoder, load_language_model


@pytest.fixture
def llama(tmp_path):
    """A saved Llama."""
    LLAMA.build().save_pretrained(tmp_path)
    return tmp_path


def change(folder, function, file="model.safetensors"):
    tensors = load_file(folder / file)
    function(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", LANGUAGE_MODELS, ids=lambda part: part.label)
def test_language_models_are_their_checkpoints(part, tmp_path):
    model = part.build()
    model.save_pretrained(tmp_path)
    found = load_language_model(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, found[name]), name
    stored = sorted(load_file(tmp_path / "model.safetensors"))
    for name in (stored[0], stored[len(stored) // 2], stored[-1]):
        lost = {}
        change(tmp_path, lambda tensors, name=name, lost=lost: lost.update({name: tensors.pop(name)}))
        with pytest.raises(InputError, match="Nothing is filled with random numbers"):
            load_language_model(tmp_path)
        change(tmp_path, lambda tensors, lost=lost: tensors.update(lost))


def test_a_base_model_gets_no_random_head(tmp_path):
    LlamaModel(LLAMA.config()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is not what a LlamaForCausalLM needs: it lacks lm_head\.weight"):
        load_language_model(tmp_path)


def test_a_tied_head_need_not_be_stored(tmp_path):
    config = LlamaConfig(**{**LLAMA.config().to_dict(), "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_language_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_computed_buffers_of_older_checkpoints_are_no_fault(llama, tmp_path_factory):
    change(
        llama, lambda t: t.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)})
    )
    load_language_model(llama)
    folder = tmp_path_factory.mktemp("clip")
    CLIP.build().save_pretrained(folder)
    change(folder, lambda t: t.update({"embeddings.position_ids": torch.arange(5)[None]}))
    load_encoder(folder, "image")


def test_left_over_and_other_shapes_and_integers_are_named(llama):
    change(llama, lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}))
    with pytest.raises(InputError, match=r"has left over model\.layers\.7\.mlp\.up_proj\.weight"):
        load_language_model(llama)
    change(llama, lambda t: t.pop("model.layers.7.mlp.up_proj.weight"))
    change(llama, lambda t: t.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(InputError, match=r"in another shape model\.norm\.weight \(7,\), expected \(32,\)"):
        load_language_model(llama)
    change(llama, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}))
    with pytest.raises(InputError, match=r"has as integers model\.norm\.weight"):
        load_language_model(llama)


def test_many_faults_are_counted(llama):
    change(llama, lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n])
    with pytest.raises(InputError, match=r"it lacks model\.layers\.1\.\S+, .* and 4 more"):
        load_language_model(llama)


PIPELINES = {"image": stable_diffusion, "video": zeroscope, "audio": audioldm, "image, SD 3": stable_diffusion_3}


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_every_network_of_a_pipeline_is_its_checkpoint(make, tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    for name, network in pipeline.components.items():
        if not isinstance(network, torch.nn.Module):
            continue
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, decoder.get_submodule(name).state_dict()[key]), f"{name}.{key}"
        (file,) = (tmp_path / name).glob("*.safetensors")
        stored = sorted(load_file(file))
        for lost in (stored[0], stored[len(stored) // 2]):
            kept = load_file(file)
            save_file({n: t for n, t in kept.items() if n != lost}, file, metadata={"format": "pt"})
            with pytest.raises(InputError, match=f"{name}/{file.name} is not what a .* it lacks {lost}"):
                load_decoder(tmp_path)
            save_file(kept | {"stray": torch.ones(1)}, file, metadata={"format": "pt"})
            with pytest.raises(InputError, match=f"{name}/{file.name} is not what a .* it has left over stray"):
                load_decoder(tmp_path)
            save_file(kept, file, metadata={"format": "pt"})
