"""Answers as a stream of events: the same answers, piece by piece, and what happens when nobody listens any more."""

import threading
from functools import partial

import numpy as np
import pytest
import torch

from anygpt.errors import InputError
from anygpt.generation.answering import text_of
from anygpt.generation.events import (
    AnswerDone,
    Closed,
    DecodingStarted,
    DecodingStep,
    EventEmitter,
    MediumCalled,
    MediumDone,
    TextPiece,
)

ALL = ["image", "video", "audio"]


@pytest.fixture(scope="module")
def full_model(tiny_model):
    return tiny_model()


def prompt(processor, text="Draw a ring, and let me hear it."):
    conversation = [{"role": "user", "content": text}]
    return processor.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True)


def options(model, steps=2, **others):
    kwargs = {key: {"num_inference_steps": steps, "seed": 3} for key in model.decoder_keys}
    return {"max_new_tokens": 20, "decoder_kwargs": kwargs} | others


def same_content(one, other):
    return one == other if isinstance(one, str) else np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 2.0}], ids=["greedy", "sampling"])
def test_a_stream_is_the_answer_in_pieces(full_model, sampling):
    model, processor = full_model
    batch, chosen = prompt(processor), options(model, require=ALL, **sampling)
    torch.manual_seed(1)
    expected = model.generate(**batch, **chosen).answers[0]
    torch.manual_seed(1)
    events = list(model.generate_stream(**batch, **chosen))

    contents = {}
    for event in events:
        if isinstance(event, TextPiece):
            contents[event.segment] = contents.get(event.segment, "") + event.text
        if isinstance(event, MediumDone):
            contents[event.segment] = event.content.content
    assert sum(isinstance(e, TextPiece) for e in events) > 2, "text should come in pieces"
    assert sorted(contents) == list(range(len(expected.segments)))
    for segment, content in contents.items():
        assert same_content(content, expected.segments[segment].content)
    assert isinstance(events[-1], AnswerDone)
    final = events[-1].answer.segments
    assert [s.type for s in final] == [s.type for s in expected.segments]
    assert all(same_content(a.content, b.content) for a, b in zip(final, expected.segments, strict=True))
    assert {s.type: s.rate for s in final} == {"text": None, "image": None, "video": 8, "audio": 16000}


def test_events_come_in_order(full_model):
    model, processor = full_model
    events = list(model.generate_stream(**prompt(processor), **options(model, steps=3, require=["image", "audio"])))
    called = {e.segment: (e.key, e.type) for e in events if isinstance(e, MediumCalled)}
    assert sorted(called.values()) == [("audio", "audio"), ("image", "image")]
    after = [e for e in events if not isinstance(e, TextPiece | MediumCalled)]
    assert events[-len(after) :] == after, "decoders run when all is said"
    for key in ("image", "audio"):
        mine = [e for e in after if getattr(e, "key", None) == key or getattr(e, "segment", None) in called]
        mine = [e for e in mine if not isinstance(e, MediumDone) or called[e.segment][0] == key]
        mine = [e for e in mine if isinstance(e, MediumDone) or e.key == key]
        (segment,) = (s for s, (k, _) in called.items() if k == key)
        assert mine[0] == DecodingStarted(key, (segment,))
        assert mine[1:4] == [DecodingStep(key, step, 3) for step in (1, 2, 3)]
        assert isinstance(mine[4], MediumDone) and mine[4].content.key == key and len(mine) == 5


def test_pieces_are_whole_characters(full_model):
    model, processor = full_model
    text = "naïve 日本語 👩‍🚀 and a lone \ufffd too\ufffd"
    ids = processor.llm_tokenizer(text, add_special_tokens=False)["input_ids"]
    events = []
    emitter = EventEmitter(events.append, partial(text_of, model), {})
    for token in ids:
        emitter.said([token], None)
    emitter.end_text()
    pieces = [event.text for event in events]
    assert len(pieces) > 5 and "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces[:5])


@pytest.mark.parametrize("kind", [TextPiece, DecodingStep], ids=["in text", "in a decoder"])
def test_a_closed_stream_ends_the_work_and_leaves_the_model_usable(full_model, kind):
    model, processor = full_model
    chosen = options(model, steps=50, require=["image"])
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    stream = model.generate_stream(**prompt(processor), **chosen)
    assert any(isinstance(event, kind) for event in stream)
    stream.close()
    assert not any(t.name.startswith("generate_stream") for t in threading.enumerate())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    few = options(model, require=["image"])
    assert len(model.generate(**prompt(processor), **few).answers[0].images) == 1


PROMPTS = ["Draw a ring.", "What is a long blue square, and what does it sound like?", "Hello"]


def together(processor, prompts=PROMPTS):
    conversations = [[{"role": "user", "content": text}] for text in prompts]
    return processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.5}], ids=["greedy", "sampling"])
def test_each_row_of_a_batch_has_the_events_that_it_has_alone(full_model, sampling):
    """Text piece by piece, media and the end; sampled with a seed of its own, within a budget of its own."""
    model, processor = full_model
    seeds, budgets = [5, 2**63 - 1, 7], [20, 9, 14]
    told = [[], [], []]

    def kwargs(own):
        return {key: {"num_inference_steps": 2, "seed": own} for key in model.decoder_keys}

    given = {"require": ["image"], "max_new_tokens": 20, **sampling}
    text_seeds = seeds if sampling else None
    output = model.generate(
        **together(processor),
        **given,
        seeds=text_seeds,
        budgets=budgets,
        decoder_kwargs=kwargs(seeds),
        on_event=lambda event: told[event.row].append(event),
    )
    assert output.lengths[1] <= 9 and all(output.sequences.shape[1] >= length for length in output.lengths)
    for row, text in enumerate(PROMPTS):
        alone = []
        one = model.generate(
            **prompt(processor, text),
            **given | {"max_new_tokens": budgets[row]},
            seeds=text_seeds and text_seeds[row : row + 1],
            decoder_kwargs=kwargs(seeds[row]),
            on_event=alone.append,
        )
        assert one.sequences[0].tolist() == output.sequences[row, : output.lengths[row]].tolist()
        kinds = [(type(e), getattr(e, "text", getattr(e, "segment", None))) for e in told[row]]
        assert kinds == [(type(e), getattr(e, "text", getattr(e, "segment", None))) for e in alone]
        for a, b in zip(output.answers[row].images, one.answers[0].images, strict=True):
            assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1


@pytest.mark.parametrize("kind", [TextPiece, DecodingStep], ids=["in text", "in a decoder"])
def test_a_closed_row_leaves_the_others_as_they_are(full_model, kind):
    model, processor = full_model
    chosen = options(model, require=["image"])
    expected = model.generate(**together(processor), **chosen)
    after = []

    def close_the_second(event):
        if event.row == 1:
            after.append(event)
            if isinstance(event, kind):
                raise Closed

    output = model.generate(**together(processor), **chosen, on_event=close_the_second)
    assert isinstance(after[-1], kind), "nothing is told of a row once it is closed"
    if kind is TextPiece:
        assert output.lengths[1] < expected.lengths[1] and not output.answers[1].images
    for row in (0, 2):
        assert output.answers[row].text == expected.answers[row].text
        assert np.array_equal(np.asarray(output.answers[row].images[0]), np.asarray(expected.answers[row].images[0]))

    def close(event):
        if isinstance(event, kind):
            raise Closed

    with pytest.raises(Closed):
        model.generate(**together(processor), **chosen, on_event=close)


def test_what_cannot_be_streamed_is_said(full_model):
    model, processor = full_model
    with pytest.raises(InputError, match="not for beam_search"):
        list(model.generate_stream(**prompt(processor), **options(model, num_beams=2)))
    with pytest.raises(InputError, match="no decoder smell"):
        list(model.generate_stream(**prompt(processor), **options(model, require=["smell"])))
