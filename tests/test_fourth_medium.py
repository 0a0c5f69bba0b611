"""A fourth medium, depth as 16-bit PNG, by one entry of the table: data, training, generation, chat and HTTP."""

from __future__ import annotations

import base64
import io
import json

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from serving_utils import serving
from tiny_pipelines import stable_diffusion
from training_utils import train_here

from anygpt import MultimodalModel, MultimodalProcessor, StableDiffusionDecoder
from anygpt.chat.chat_model import ChatModel, Settings, modality_of, write_segment
from anygpt.data import ConversationDataset, DataSource, read_media, read_samples
from anygpt.data.collation import Collator
from anygpt.media.types import MEDIA, Picture
from anygpt.serving.engine import Engine
from anygpt.serving.http import Interface

SIDE, SIGNALS = 16, 2
OPTIONS = {"depth": {"num_inference_steps": 2}}


@pytest.fixture(scope="module", autouse=True)
def depth():
    """The one entry."""
    MEDIA["depth"] = Picture("depth", "depths", (".depth.png",), "image/png", "DEP", SIGNALS, "depth_url", mode="I;16")
    yield MEDIA["depth"]
    del MEDIA["depth"]


def ramp(seed: int = 0) -> Image.Image:
    """More than 256 distances."""
    values = np.linspace(seed, 65535 - seed, SIDE * SIDE).reshape(SIDE, SIDE)
    return Image.fromarray(values.round().astype(np.uint16))


@pytest.fixture(scope="module")
def rows(depth, tmp_path_factory):
    """A file of conversations in which depth is asked about, and asked for."""
    folder = tmp_path_factory.mktemp("depth")
    lines = []
    for i in range(4):
        ramp(i).save(folder / f"{i}.depth.png")
        medium = {"type": "depth", "path": f"{i}.depth.png"}
        asked, told = {"type": "text", "text": "how far is it"}, {"type": "text", "text": "far"}
        turns = ([medium, asked], [told]) if i % 2 else ([asked], [medium | {"caption": "a slope"}])
        messages = [
            {"role": role, "content": content} for role, content in zip(("user", "assistant"), turns, strict=True)
        ]
        lines.append(json.dumps({"id": str(i), "messages": messages}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def final(rows, parts, tmp_path_factory):
    """What a run on these rows leaves, whose decoder has one channel."""
    folder = tmp_path_factory.mktemp("run")
    with torch.random.fork_rng():
        StableDiffusionDecoder(stable_diffusion(channels=1)).save_pretrained(folder / "decoder")
    config = {
        "run": {"output_dir": str(folder / "out"), "device": "cpu"},
        "model": {
            "encoders": {"depth": {"path": str(parts.folder / "image_encoder")}},
            "language_model": {"path": str(parts.folder / "language_model")},
            "decoders": {"depth": {"path": str(folder / "decoder"), "modality": "depth"}},
        },
        "data": {"train": [{"path": str(rows)}]},
        "train": {"max_steps": 2, "batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-3},
        "lora": {"r": 2},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return train_here(3, ["--config", str(folder / "config.yaml")])


def test_data(rows):
    """All 16 bits are there, from the file to what the decoder is trained on."""
    image = read_media("depth", rows.parent / "1.depth.png")
    assert image.mode == "I;16" and np.array_equal(np.asarray(image), np.asarray(ramp(1)))
    assert modality_of("x.depth.png") == "depth" and modality_of("x.png") == "image"
    sample = ConversationDataset(read_samples(rows))[0]
    assert sample.targets["depth"][0].mode == "I;16" and sample.captions == {"depth": ["a slope"]}
    pixels = StableDiffusionDecoder(stable_diffusion(channels=1)).targets([ramp()])
    assert pixels.shape == (1, 1, SIDE, SIDE) and len(pixels.unique()) == SIDE * SIDE
    assert pixels.min() == -1 and pixels.max() == 1


def test_training(final, rows):
    """Every loss of the new medium is there, and what reads and makes it has been trained and saved."""
    model = MultimodalModel.from_pretrained(final)
    processor = MultimodalProcessor.from_pretrained(final, model=model)
    assert processor.signal_tokens == {"depth": ["[DEP0]", "[DEP1]"]} and processor.makes == {"depth": "depth"}
    dataset = ConversationDataset.from_files([DataSource(str(rows))])
    batch = Collator(processor)([dataset[i] for i in range(4)])
    assert batch["pixel_values"].shape[0] == 2 and batch["decoder_targets"]["depth"]["media"].shape[:2] == (2, 1)
    names = ("input_ids", "attention_mask", "labels", "pixel_values", "decoder_targets")
    output = model(**{name: batch[name] for name in names})
    assert {"llm_decoder/alignment/depth", "llm_decoder/denoising/depth"} <= set(output.losses)
    assert output.loss.isfinite()


def test_generation(final, tmp_path):
    """An answer holds it under its type, written as a 16-bit PNG."""
    model = MultimodalModel.from_pretrained(final)
    processor = MultimodalProcessor.from_pretrained(final, model=model)
    inputs = processor(text="<depth> how far", depths=[ramp()])
    output = model.generate(**inputs, max_new_tokens=6, require=["depth"], decoder_kwargs=OPTIONS)
    (image,) = output.answers[0].of("depth")
    assert image.mode == "I;16" and image.size == (SIDE, SIDE) and len(np.unique(np.asarray(image))) > 100
    path = write_segment(next(s for s in output.answers[0].segments if s.type == "depth"), tmp_path / "a")
    assert path.name == "a.depth.png" and np.array_equal(np.asarray(read_media("depth", path)), np.asarray(image))


def test_chat_and_http(final, tmp_path):
    """A file is attached by its suffix; a request sends `depth_url` and gets one back, which it may send again."""
    ramp().save(tmp_path / "a.depth.png")
    engine = Engine(ChatModel(final))
    try:
        talk = engine.chat_model
        assert talk.reads == ("depth",) and talk.makes == {"depth": "depth"}
        part = talk.read(modality_of(tmp_path / "a.depth.png"), tmp_path / "a.depth.png")
        said = [{"role": "user", "content": [part, {"type": "text", "text": "how far"}]}]
        reply = talk.answer(said, Settings(max_new_tokens=6, require=("depth",), decoder_kwargs=OPTIONS))
        assert len(reply.answer.of("depth")) == 1
        url = f"data:image/png;base64,{base64.b64encode((tmp_path / 'a.depth.png').read_bytes()).decode()}"
        asked = [{"type": "depth_url", "depth_url": {"url": url}}, {"type": "text", "text": "how far"}]
        body = {"model": "anygpt", "messages": [{"role": "user", "content": asked}], "max_tokens": 6}
        body |= {"require": ["depth"], "decoders": OPTIONS, "modalities": ["text", "depth"]}
        with serving(Interface(engine, "anygpt").app()) as address:
            for _ in range(2):
                answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
                message = answer["choices"][0]["message"]
                (made,) = [part for part in message["parts"] if part["type"] == "depth_url"]
                data = base64.b64decode(made["depth_url"]["url"].removeprefix("data:image/png;base64,"))
                assert Image.open(io.BytesIO(data)).mode == "I;16"
                body["messages"] += [message, {"role": "user", "content": "and now"}]
    finally:
        engine.close()
