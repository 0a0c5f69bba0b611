"""A saved composition through transformers' own doors: auto classes, push_to_hub, the any-to-any pipeline."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline
from transformers.utils import is_torchvision_available

from anygpt import MultimodalConfig, MultimodalModel, MultimodalProcessor


@pytest.fixture
def saved(tiny_model, tmp_path):
    """`saved(encoders, decoders) -> (folder, model, processor)`."""

    def save(encoders, decoders=()):
        model, processor = tiny_model(encoders, decoders)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        return tmp_path, model, processor

    return save


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMultimodalLM])
def test_auto_classes(saved, auto, media):
    folder, model, _ = saved(("image", "audio"), ("image",))
    assert isinstance(AutoConfig.from_pretrained(folder), MultimodalConfig)
    again, reader = auto.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert isinstance(again, MultimodalModel) and isinstance(reader, MultimodalProcessor)
    batch = reader(text="<image> what?", images=media.image(0))
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_media_by_modality(saved, media):
    _, _, processor = saved(("image", "audio"))
    short = processor(text=["<image> and <audio>"], images=[media.image(0)], audio=[media.audio(1)])
    options = {"raw_speech": [media.audio(1)], "sampling_rate": 16_000}
    long = processor({"image": {"images": [media.image(0)]}, "audio": options}, {"text": ["<image> and <audio>"]})
    assert short.keys() == long.keys()
    assert all(torch.equal(short[name], long[name]) for name in short)


def answer_of(model, batch):
    return model.generate(**batch, max_new_tokens=5, do_sample=False).sequences


def test_pipeline_with_text_and_audio(saved, media):
    folder, model, processor = saved(("audio",))
    pipe = pipeline("any-to-any", model=str(folder))
    text = "<audio> what?"
    found = pipe(text=text, audio=media.audio(0), max_new_tokens=5, return_full_text=False)
    batch = processor(text=text, audio=media.audio(0))
    assert found[0]["generated_text"] == processor.batch_decode(answer_of(model, batch), skip_special_tokens=True)[0]


def test_pipeline_with_a_conversation(saved, media):
    folder, model, processor = saved(("audio",))
    pipe = pipeline("any-to-any", model=str(folder))
    content = [{"type": "audio", "audio": media.audio(0)}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}]
    found = pipe(text=messages, max_new_tokens=5, return_full_text=False)
    batch = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert found[0]["generated_text"] == processor.batch_decode(answer_of(model, batch), skip_special_tokens=True)[0]


def test_pipeline_with_text_alone(saved):
    _, model, processor = saved(())
    pipe = pipeline("any-to-any", model=model, processor=processor)
    found = pipe(text="a red ring", max_new_tokens=5, return_full_text=False)
    assert isinstance(found[0]["generated_text"], str)


@pytest.mark.skipif(not is_torchvision_available(), reason="transformers' pipeline wants torchvision for images")
def test_pipeline_with_images(saved, media):
    folder, model, processor = saved(("image",))
    pipe = pipeline("any-to-any", model=str(folder))
    found = pipe(text="<image> what?", images=media.image(0), max_new_tokens=5, return_full_text=False)
    batch = processor(text="<image> what?", images=media.image(0))
    assert found[0]["generated_text"] == processor.batch_decode(answer_of(model, batch), skip_special_tokens=True)[0]
