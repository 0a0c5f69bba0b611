"""Conversations as text and as labels, and the processor on disk."""

import json
import re

import pytest
import torch

from anygpt import InputError, MultimodalProcessor
from anygpt.processing.chat_template import DEFAULT_CHAT_TEMPLATE, tokenize_with_labels

CONVERSATION = [
    {"role": "system", "content": "be short"},
    {
        "role": "user",
        "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "Sounds like? "}, {"type": "audio"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "This: "}, {"type": "image", "caption": "a ring"}]},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No more."},
]


def test_media_parts_become_placeholders_and_spans(tiny_model):
    _, processor = tiny_model(("image", "audio"), ("image",))
    text = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>be short<|end|><|user|><image>Sounds like? <audio><|end|>"
        "<|assistant|>This: [IMG0][IMG1][IMG2][IMG3]<|end|><|user|>And?<|end|><|assistant|>No more.<|end|><|assistant|>"
    )
    assert processor.apply_chat_template(CONVERSATION, return_tensors="pt") == text.removesuffix("<|assistant|>")
    assert processor.apply_chat_template([CONVERSATION, CONVERSATION[3:]]) == [
        text.removesuffix("<|assistant|>"),
        "<|bos|><|user|>And?<|end|><|assistant|>No more.<|end|>",
    ]


def test_media_that_nothing_reads_or_makes_are_refused(tiny_model):
    _, processor = tiny_model(("image",), ("image",))
    with pytest.raises(InputError, match="no encoder reads 'audio'"):
        processor.apply_chat_template(CONVERSATION)
    with pytest.raises(InputError, match="no decoder makes 'video'"):
        processor.apply_chat_template([{"role": "assistant", "content": [{"type": "video"}]}])


def conversation(processor):
    return processor.flatten_messages(CONVERSATION)


def test_labels_are_the_assistants_turns(tiny_model):
    _, processor = tiny_model(("image", "audio"), ("image",))
    ids, labels = tokenize_with_labels(processor.llm_tokenizer, conversation(processor))
    said = [i for i in labels if i != -100]
    assert processor.decode(said) == "This: [IMG0][IMG1][IMG2][IMG3]<|end|>No more.<|end|>"
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    assert processor.decode(ids) == processor.apply_chat_template(CONVERSATION)


def without_marks(template):
    return re.sub(r"{%-? (end)?generation -?%}", "", template)


@pytest.mark.parametrize("own", [True, False], ids=["own template", "default template"])
def test_marked_templates_and_prefix_lengths_give_the_same_labels(tiny_model, own):
    _, processor = tiny_model(("image", "audio"), ("image",))
    tokenizer = processor.llm_tokenizer
    if not own:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    marked = tokenize_with_labels(tokenizer, conversation(processor))
    tokenizer.chat_template = without_marks(tokenizer.chat_template)
    assert "generation %}" not in tokenizer.chat_template
    by_prefix = tokenize_with_labels(tokenizer, conversation(processor))
    assert marked == by_prefix


def test_template_that_rewrites_the_past_is_refused(tiny_model):
    """As those that drop the reasoning of earlier turns do."""
    _, processor = tiny_model(("image", "audio"), ("image",))
    processor.llm_tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}{{ m['role'] ~ m['content'] }}"
        "{% else %}{{ m['role'] ~ 'cut' }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    with pytest.raises(InputError, match="generation"):
        tokenize_with_labels(processor.llm_tokenizer, conversation(processor))


def test_tokenizer_without_a_template(tiny_model):
    _, processor = tiny_model(("image", "audio"), ("image",))
    processor.llm_tokenizer.chat_template = None
    text = processor.apply_chat_template(CONVERSATION[1:3])
    assert text == "<|bos|>USER: <image>Sounds like? <audio>\nASSISTANT: This: [IMG0][IMG1][IMG2][IMG3]<|end|>"
    _, labels = tokenize_with_labels(processor.llm_tokenizer, processor.flatten_messages(CONVERSATION[1:3]))
    assert processor.decode([i for i in labels if i != -100]) == "This: [IMG0][IMG1][IMG2][IMG3]<|end|>"


# ------------------------------------------------------------------------------------------------ on disk


def test_save_and_load(tiny_model, media, tmp_path):
    model, processor = tiny_model()
    processor.save_pretrained(tmp_path)
    again = MultimodalProcessor.from_pretrained(tmp_path)
    image, video, audio = media.image(0), media.video(0), media.audio(0)
    arguments = {
        "encoder_inputs": {
            "image": {"images": image},
            "video": {"videos": [video]},
            "audio": {"raw_speech": audio, "sampling_rate": 16_000},
        },
        "llm_inputs": {"text": ["<image><video><audio>[IMG0][IMG1][IMG2][IMG3]", ""]},
        "decoder_targets": {"image": {"captions": ["a"], "images": [image]}},
    }
    one, two = processor(**arguments), again(**arguments)
    assert set(one) == set(two)
    for name in one:
        if name not in ("decoder_targets", "references"):
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
    assert torch.equal(*(batch["decoder_targets"]["image"]["media"] for batch in (one, two)))
    assert again.apply_chat_template(CONVERSATION) == processor.apply_chat_template(CONVERSATION)
    assert again.signal_token_ids == processor.signal_token_ids
    model.set_token_ids(None)
    MultimodalProcessor.from_pretrained(tmp_path, model=model)
    assert model.token_ids == processor.token_ids


def test_own_feature_function_has_to_be_given_again(parts, media, tmp_path):
    functions = {"image": lambda inputs, outputs: 3}
    processor = MultimodalProcessor(
        {"image": parts.processor("image")}, parts.tokenizer(), num_feature_calculation_funcs=functions
    )
    processor.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"feature functions of your own for \['image'\].*cannot be saved"):
        MultimodalProcessor.from_pretrained(tmp_path)
    again = MultimodalProcessor.from_pretrained(tmp_path, num_feature_calculation_funcs=functions)
    assert again.count_features("image", {}, {"pixel_values": torch.zeros(2, 3, 4, 4)}) == [3, 3]


def test_wrong_folder_and_foreign_classes(parts, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        MultimodalProcessor.from_pretrained(tmp_path / "nowhere")
    MultimodalProcessor({"image": parts.processor("image")}, parts.tokenizer()).save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    content = json.loads(path.read_text())
    content["encoders"]["image"]["class"] = "os.path"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"os\.path"):
        MultimodalProcessor.from_pretrained(tmp_path)
