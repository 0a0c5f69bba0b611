"""The newer decoder families out of their repositories' own layouts, by hub id."""

import huggingface_hub
import pytest
import torch
from decoder_families import CAPTIONS
from hub_decoders import LAYOUTS, write

from anygpt import DiffusionDecoder, load_decoder
from anygpt.decoders import Condition
from anygpt.decoders.wrapping import WrappedPipeline
from anygpt.errors import InputError
from anygpt.parts.files import shapes_only


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    made = {}
    return folder, lambda name: made.setdefault(name, write(folder, name))


def test_a_repository_in_a_cache_of_its_own(tmp_path):
    name = "timbrooks/instruct-pix2pix"  # its networks are of transformers and of diffusers
    pipeline = write(tmp_path, name)
    found = DiffusionDecoder.from_pretrained(name, cache_dir=str(tmp_path))
    for key, tensor in pipeline.text_encoder.state_dict().items():
        assert torch.equal(found.text_encoder.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_repository_loads_by_its_id(name, cache, monkeypatch):
    folder, pipeline = cache[0], cache[1](name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    variant = LAYOUTS[name].variant
    if variant:
        with pytest.raises(InputError, match=r"has no weights.*set the variant if their names have one"):
            load_decoder(name)
    decoder = load_decoder(name, variant=variant) if variant else load_decoder(name)
    kind = WrappedPipeline._registry[type(pipeline).__name__]
    assert type(decoder) is kind
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}
    for part, network in pipeline.components.items():
        if isinstance(network, torch.nn.Module):
            ours = getattr(decoder, part)
            ours = getattr(ours, "transformer", ours) if part == "language_model" and "large" in name else ours
            ours = ours.state_dict()
            for tensor, value in network.state_dict().items():
                torch.testing.assert_close(
                    ours[tensor], value, rtol=1e-2 if variant else 0, atol=1e-2 if variant else 0
                )
    expected = kind(pipeline).encode_text(CAPTIONS)
    found, expected = Condition.of(decoder.encode_text(CAPTIONS)), Condition.of(expected)
    tolerance = {"rtol": 0.05, "atol": 0.05} if variant else {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(found.embeds, expected.embeds, **tolerance)
    if expected.mask is not None:
        assert torch.equal(found.mask, expected.mask)
    with shapes_only():
        outline = load_decoder(name, **({"variant": variant} if variant else {}))
    shapes = {n: t.shape for n, t in decoder.state_dict().items()}
    assert {n: t.shape for n, t in outline.state_dict().items()} == shapes
