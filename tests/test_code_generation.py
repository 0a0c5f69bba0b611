"""Generation of codes: forced spans, guidance, sampling, and media of them."""

import numpy as np
import pytest
import torch
from code_utils import clip, code_model, picture, turn
from test_codes import resized

from anygpt import MultimodalModel, MultimodalProcessor
from anygpt.errors import InputError
from anygpt.generation.choosing import choose_code
from anygpt.generation.events import MediumCalled, MediumDone, TextPiece

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def made(parts):
    return code_model(parts, ("image", "video"), row_ends=True)


def prompts(processor, *talks):
    return processor.apply_chat_template([list(talk) for talk in talks], tokenize=True, add_generation_prompt=True)


def naive(model, processor, talk, key, guidance, length):
    """Codes of a span right after the prompt, greedily, each by a whole forward of transformers' own resized model."""
    alone, span = resized(model), model.signal_tokens.spans[key]
    batch = dict(prompts(processor, talk))
    ids, _, _ = model.write_codes(batch["input_ids"], None, {k: v for k, v in batch.items() if "." in k})
    answer = [span[0]]
    for place in span[1:length]:
        if isinstance(place, range):
            tokens = torch.tensor([answer])
            with torch.no_grad():
                logits = alone(torch.cat([ids, tokens], dim=1)).logits[0, -1, place].log_softmax(-1)
                free = alone(tokens).logits[0, -1, place].log_softmax(-1)
            answer.append(place[int((free + guidance * (logits - free)).argmax())])
        else:
            answer.append(place)
    return answer


TALKS = (
    [turn("user", "Draw a red ring, please."), turn("assistant", "No."), turn("user", "Draw!")],
    [turn("user", picture(3), "And as a clip?")],
)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_spans_are_what_whole_forwards_give(made, guidance):
    """Rows of different lengths in one batch; a forward a code and one for the text behind, with the cache."""
    model, processor = made
    lengths = []
    handle = model.language_model.model.register_forward_hook(
        lambda m, args, output: lengths.append(output[0].shape[:2])
    )
    try:
        output = model.generate(
            **prompts(processor, *TALKS),
            max_new_tokens=22,
            require=["image"],
            forbid=["video"],
            decoder_kwargs={"image": GREEDY | {"guidance_scale": guidance}},
        )
    finally:
        handle.remove()
    for row, talk in enumerate(TALKS):
        assert output.sequences[row].tolist() == naive(model, processor, talk, "image", guidance, 22)
    assert len(lengths) == 1 + 16 and all(batch == 2 * (1 + (guidance > 1)) for batch, _ in lengths)
    assert all(length <= 2 for _, length in lengths[1:])
    codes = torch.stack([answer.segments[0].codes for answer in output.answers])
    expected = model.tokenizers["image"].module.decode(codes)
    for answer, image in zip(output.answers, expected, strict=True):
        assert np.array_equal(answer.images[0], image)


def test_text_and_media_in_order_and_batched_as_alone(made):
    model, processor = made
    options = {
        "max_new_tokens": 80,
        "require": ["image", "video"],
        "decoder_kwargs": {"image": GREEDY, "video": GREEDY | {"guidance_scale": 2.0}},
    }
    together = model.generate(**prompts(processor, *TALKS), **options)
    for row, talk in enumerate(TALKS):
        assert {s.type for s in together.answers[row].segments} == {"image", "video", "text"}
        (alone,) = model.generate(**prompts(processor, talk), **options).answers
        assert [s.type for s in alone.segments] == [s.type for s in together.answers[row].segments]
        for one, other in zip(alone.segments, together.answers[row].segments, strict=True):
            assert one.content == other.content if one.type == "text" else torch.equal(one.codes, other.codes)
    video = next(s for s in together.answers[0].segments if s.type == "video")
    assert video.content.shape == (2, 16, 16, 3) and video.rate == 8


def test_seeds_make_media_independent_of_the_batch(made):
    model, processor = made
    options = {"max_new_tokens": 22, "require": ["image"], "forbid": ["video"]}
    both = model.generate(**prompts(processor, *TALKS), **options, decoder_kwargs={"image": {"seed": [3, 4]}})
    one = model.generate(**prompts(processor, TALKS[1]), **options, decoder_kwargs={"image": {"seed": [4]}})
    other = model.generate(**prompts(processor, TALKS[1]), **options, decoder_kwargs={"image": {"seed": 5}})
    assert torch.equal(both.sequences[1], one.sequences[0])
    assert not torch.equal(one.sequences, other.sequences)


def test_temperature_and_top_k_are_softmax_of_scaled_logits():
    torch.manual_seed(0)
    logits, free, allowed = torch.randn(20), torch.randn(20), range(4, 12)
    options = {"guidance_scale": 2.0, "temperature": 0.5, "top_k": 3, "generator": torch.Generator().manual_seed(1)}
    drawn = torch.tensor([choose_code(logits, free, allowed, options) for _ in range(4000)])
    c, u = (x[4:12].double().log_softmax(-1) for x in (logits, free))
    scores = u + 2 * (c - u)
    scores[scores < scores.sort().values[-3]] = -torch.inf
    shares = torch.bincount(drawn - 4, minlength=8) / 4000
    torch.testing.assert_close(shares.double(), (scores / 0.5).softmax(-1), atol=0.03, rtol=0)


def test_events_tell_of_a_span_once(made):
    model, processor = made
    events = []
    options = {"max_new_tokens": 30, "require": ["image"], "forbid": ["video"], "on_event": events.append}
    (answer,) = model.generate(**prompts(processor, TALKS[0]), **options).answers
    called = [event.segment for event in events if isinstance(event, MediumCalled)]
    done = [event for event in events if isinstance(event, MediumDone)]
    assert (
        called == [i for i, s in enumerate(answer.segments) if s.type == "image"] == [event.segment for event in done]
    )
    said = "".join(event.text for event in events if isinstance(event, TextPiece))
    assert said == answer.text


def test_media_of_the_assistant_are_codes_in_later_turns(made):
    model, processor = made
    talk = [*TALKS[0], turn("assistant", "Here:", picture(5), clip(1)), turn("user", "And now?")]
    batch = prompts(processor, talk)
    ids, _, _ = model.write_codes(batch["input_ids"], None, {k: v for k, v in batch.items() if "." in k})
    (start,) = (ids[0] == model.signal_tokens.ids["image"][0]).nonzero()[:, 0].tolist()
    codes = ids[0, start : start + 22] - model.signal_tokens.ids["image"][-1]
    assert codes[codes >= 0].tolist() == model.tokenizers["image"].module.encode([picture(5)])[0].tolist()


def test_refused_requests(made):
    model, processor = made
    batch = prompts(processor, TALKS[0])
    for options, said in [
        ({"num_beams": 2, "do_sample": False}, "beam search cannot generate codes"),
        ({"require": ["image"], "max_new_tokens": 20}, "no room for the 22 signal tokens"),
        ({"decoder_kwargs": {"image": {"num_inference_steps": 4}}}, "has no option 'num_inference_steps'"),
        ({"decoder_kwargs": {"image": {"temperature": -1}}}, "temperature of the image tokenizer is -1; expected"),
        ({"require": ["audio"]}, "there is no decoder audio"),
    ]:
        with pytest.raises(InputError, match=said):
            model.generate(**batch, **{"max_new_tokens": 30} | options)


def test_a_tokenizer_that_cannot_decode_makes_nothing(made, monkeypatch):
    model, processor = made
    monkeypatch.setattr(model.tokenizers["image"].module, "can_decode", False)  # as of ChameleonVQVAE
    model = MultimodalModel({}, model.language_model, tokenizers=model.tokenizers)
    processor = MultimodalProcessor({}, processor.llm_tokenizer, model=model)
    assert model.output_modalities == ("text", "video") and model.input_modalities == ("text", "image", "video")
    with pytest.raises(InputError, match="no decoder makes 'image'"):
        prompts(processor, [turn("user", "Hi."), turn("assistant", picture()), turn("user", "Hi.")])
    with pytest.raises(InputError, match="there is no decoder image"):
        model.generate(**prompts(processor, TALKS[1]), max_new_tokens=30, require=["image"])
    output = model.generate(**prompts(processor, TALKS[1]), max_new_tokens=30)
    assert model.signal_tokens.ids["image"][0] not in output.sequences
