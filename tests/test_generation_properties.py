"""Properties of generation over many random prompts with an untrained model: whole spans, order, batches as rows."""

import numpy as np
import pytest
import torch
from conftest import enlarge
from transformers import LlamaConfig, LlamaForCausalLM

BATCH = 30
# The smallest media there are: what is looked at here is which of them come, and where.
SMALLEST = {
    "image": {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 8, "width": 8, "seed": 0},
    "video": {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 8, "width": 8, "num_frames": 1, "seed": 0},
    "audio": {"num_inference_steps": 1, "guidance_scale": 1.0, "audio_length_in_s": 0.08, "seed": 0},
}
TYPES = {"image": "images", "video": "videos", "audio": "audios"}


@pytest.fixture(scope="module")
def talkative(tiny_model):
    """An untrained model that calls for media now and then, and ends its answers now and then."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    llm = enlarge(LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)), 6.0).eval()
    model, processor = tiny_model(("image",), tuple(SMALLEST), language_model=llm)
    with torch.no_grad():
        for rows in model.signal_tokens.output_rows.values():
            rows[0].mul_(2.0)
    return model, processor


def random_prompts(processor, media, count):
    rng = np.random.default_rng(0)
    ids = [i for i in range(len(processor.llm_tokenizer)) if i not in processor.llm_tokenizer.all_special_ids]
    for _ in range(count):
        text = processor.decode(rng.choice(ids, size=rng.integers(1, 24)).tolist(), skip_special_tokens=True)
        parts = [{"type": "text", "text": text}]
        for _ in range(rng.choice([0, 0, 1, 2])):
            parts.insert(int(rng.integers(2)), {"type": "image", "image": media.image(int(rng.integers(9)))})
        yield [{"role": "user", "content": parts}]


def check_answer(model, processor, ids, answer):
    """The answer is what its tokens say: whole spans and the text between them, in order."""
    first = {span[0]: key for key, span in model.signal_tokens.ids.items()}
    signal = {i for span in model.signal_tokens.ids.values() for i in span}
    expected, text, position = [], [], 0
    while position <= len(ids):
        key = first.get(ids[position]) if position < len(ids) else None
        if key or position == len(ids):
            said = processor.decode(text, skip_special_tokens=True)
            expected += [("text", said)] if said else []
            text = []
        if key:
            span = model.signal_tokens.ids[key]
            assert ids[position : position + len(span)] == span, "half a span"
            expected.append((key, key))
            position += len(span)
        else:
            assert position == len(ids) or ids[position] not in signal, "an inner token by itself"
            text += ids[position : position + 1]
            position += 1
    found = [(s.type, s.content if s.type == "text" else s.key) for s in answer.segments]
    assert found == expected
    for type, name in TYPES.items():
        assert len(getattr(answer, name)) == sum(key == type for key, _ in expected)
    return [key for key, _ in expected if key != "text"]


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_random_prompts(talkative, media, count):
    model, processor = talkative
    eos = [processor.llm_tokenizer.eos_token_id, *range(100, 900, 37)]
    options = {"max_new_tokens": 10, "eos_token_id": eos, "pad_token_id": 0, "decoder_kwargs": SMALLEST}
    conversations = list(random_prompts(processor, media, count))
    kinds, lengths = [], set()
    for begin in range(0, count, BATCH):
        group = conversations[begin : begin + BATCH]
        batch = processor.apply_chat_template(group, tokenize=True, add_generation_prompt=True)
        together = model.generate(**batch, **options)
        for row, conversation in enumerate(group):
            prompt = processor.apply_chat_template([conversation], tokenize=True, add_generation_prompt=True)
            alone = model.generate(**prompt, **options)
            ids = alone.sequences[0].tolist()
            answer = together.answers[row]
            assert together.sequences[row].tolist() == ids + [0] * (together.sequences.shape[1] - len(ids))
            said = check_answer(model, processor, ids, answer)
            for one, other in zip(alone.answers[0].segments, answer.segments, strict=True):
                assert one.type == other.type
                if one.type == "text":
                    assert one.content == other.content
                else:
                    assert (one.states - other.states).abs().max() < 1e-4
                    difference = np.asarray(one.content, np.float32) - np.asarray(other.content, np.float32)
                    assert np.abs(difference).max() <= (1 if one.type in ("image", "video") else 1e-3)
            kinds.append(tuple(said))
            lengths.add(len(ids))
    assert len(set(kinds)) >= 5 and () in kinds, "some rows say media and some do not, in several orders"
    assert {key for said in kinds for key in said} == set(SMALLEST)
    assert max(map(len, kinds)) > 1 and len(lengths) > 4
