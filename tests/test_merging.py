"""Features enter the sequence at their places, whatever the padding; wrong counts are named."""

import pytest
import torch

from anygpt.errors import InputError
from anygpt.sequence.merging import FEATURE_ID, IGNORE, Merged, inject, pad_left, prepend, without_right_padding

IMAGE, AUDIO, PAD = 7, 8, 0


def merged(rows, width=2, labels=True, side="right"):
    """A batch whose embeddings are the ids themselves, padded on one side."""
    length = max(map(len, rows))
    pad = [[PAD] * (length - len(row)) for row in rows]
    ids = torch.tensor([row + p if side == "right" else p + row for row, p in zip(rows, pad, strict=True)])
    mask = torch.tensor(
        [
            [1] * len(row) + [0] * len(p) if side == "right" else [0] * len(p) + [1] * len(row)
            for row, p in zip(rows, pad, strict=True)
        ]
    )
    target = ids.masked_fill(mask == 0, IGNORE) if labels else None
    embeds = ids[..., None].float().expand(-1, -1, width).clone()
    return Merged(embeds, ids, mask, target, torch.zeros(len(rows), dtype=torch.bool))


def features(*values, width=2):
    """`(items, n, width)`: one list of numbers an item."""
    return torch.tensor(values, dtype=torch.float)[..., None].expand(-1, -1, width)


def seen(result):
    """The first component of every embedding that the mask keeps, by row."""
    return [row[mask.bool(), 0].tolist() for row, mask in zip(result.inputs_embeds, result.attention_mask, strict=True)]


def test_inject_replaces_placeholders_in_order():
    text = merged([[1, IMAGE, IMAGE, 2, IMAGE, IMAGE, AUDIO], [AUDIO, 3, IMAGE, IMAGE], [4, 5]])
    given = {"image": features([10, 11], [12, 13], [14, 15]), "audio": features([20], [21])}
    result = inject(text, given, {"image": IMAGE, "audio": AUDIO})
    assert seen(result) == [[1, 10, 11, 2, 12, 13, 20], [21, 3, 14, 15], [4, 5]]
    assert result.media_in.tolist() == [True, True, False]
    assert result.attention_mask is text.attention_mask
    assert result.labels[0].tolist() == [1, IGNORE, IGNORE, 2, IGNORE, IGNORE, IGNORE]
    assert result.labels[1].tolist() == [IGNORE, 3, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE]
    assert result.labels[2].tolist() == [4, 5, *[IGNORE] * 5]
    assert text.inputs_embeds[0, 1, 0] == IMAGE, "the batch before merging must stay as it was"


def test_inject_takes_packed_features_of_uneven_inputs():
    text = merged([[IMAGE, 1, IMAGE, IMAGE], [IMAGE]])
    packed = torch.tensor([30.0, 31, 32, 33])[:, None].expand(-1, 2)
    assert seen(inject(text, {"image": packed}, {"image": IMAGE})) == [[30, 1, 31, 32], [33]]


@pytest.mark.parametrize(
    ("rows", "given", "parts"),
    [
        ([[IMAGE, IMAGE], [IMAGE, IMAGE, IMAGE]], features([1, 2], [3, 4]), ["'image'", "row 1", "5", "4", "3"]),
        ([[IMAGE, IMAGE], [1]], features([1, 2], [3, 4]), ["'image'", "row 0", "2", "4"]),
        ([[1], [IMAGE, IMAGE]], None, ["'image'", "row 1", "2", "0"]),
        ([[1], [2]], features([1, 2]), ["'image'", "0 placeholder", "2 features"]),
        ([[IMAGE], [IMAGE, IMAGE, IMAGE]], features([1, 2], [3, 4]), ["'image'", "row 0", "1", "2"]),
    ],
)
def test_wrong_counts_name_modality_row_and_both_counts(rows, given, parts):
    with pytest.raises(ValueError) as error:
        inject(merged(rows), {} if given is None else {"image": given}, {"image": IMAGE})
    assert isinstance(error.value, InputError)
    for part in parts:
        assert part in str(error.value)


def test_inject_refuses_features_that_would_be_dropped():
    with pytest.raises(InputError, match=r"'audio'.*dropped"):
        inject(merged([[1, 2]]), {"audio": features([1])}, {"image": IMAGE})


def test_prepend_right_padding():
    text = merged([[1, 2, 3], [4]])
    result = prepend(text, {"image": features([10, 11], [12, 13]), "audio": features([20], [21])})
    assert seen(result) == [[10, 11, 20, 1, 2, 3], [12, 13, 21, 4]]
    assert result.attention_mask.tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert result.position_ids[1, :4].tolist() == [0, 1, 2, 3]
    assert result.labels.tolist() == [[*[IGNORE] * 3, 1, 2, 3], [*[IGNORE] * 3, 4, IGNORE, IGNORE]]
    assert result.input_ids.tolist() == [[*[FEATURE_ID] * 3, 1, 2, 3], [*[FEATURE_ID] * 3, 4, PAD, PAD]]


def test_prepend_left_padding_stands_between_padding_and_text():
    text = merged([[1, 2, 3], [4]], side="left")
    result = prepend(text, {"image": features([10, 11], [12, 13])})
    assert seen(result) == [[10, 11, 1, 2, 3], [12, 13, 4]]
    assert result.attention_mask.tolist() == [[1] * 5, [0, 0, 1, 1, 1]]
    assert result.position_ids[1, 2:].tolist() == [0, 1, 2]
    assert result.labels[1].tolist() == [IGNORE] * 4 + [4]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prepend_several_inputs_a_row_and_rows_without(side):
    text = merged([[1], [2, 3], [4]], side=side)
    given = {"image": features([10, 11], [12, 13], [14, 15])}
    result = prepend(text, given, {"image": [2, 0, 1]})
    assert seen(result) == [[10, 11, 12, 13, 1], [2, 3], [14, 15, 4]]
    assert result.media_in.tolist() == [True, False, True]
    kept = [row[mask.bool()].tolist() for row, mask in zip(result.labels, result.attention_mask, strict=True)]
    assert kept == [[IGNORE] * 4 + [1], [2, 3], [IGNORE, IGNORE, 4]]


def test_prepend_keeps_a_mask_with_holes():
    text = merged([[1, 2, 3, 4]])
    text.attention_mask[0, 2] = 0
    assert seen(prepend(text, {"image": features([10])})) == [[10, 1, 2, 4]]


def test_prepend_one_row_takes_all_inputs():
    result = prepend(merged([[1]]), {"image": features([10], [11], [12])})
    assert seen(result) == [[10, 11, 12, 1]]


@pytest.mark.parametrize("items", [None, {"image": [2, 2]}, {"image": [1, 2, 0]}])
def test_prepend_refuses_inputs_that_fit_no_row(items):
    with pytest.raises(InputError, match="'image': 3 inputs cannot be assigned to 2 rows"):
        prepend(merged([[1], [2]]), {"image": features([10], [11], [12])}, items)


def test_labels_and_features_may_be_missing():
    text = merged([[1, 2]], labels=False)
    assert prepend(text, {"image": features([10])}).labels is None
    assert inject(text, {}, {"image": IMAGE}).labels is None
    assert seen(prepend(text, {})) == [[1, 2]]


def test_pad_left_moves_padding_and_keeps_order():
    text = merged([[1, 2, 3], [4]])
    moved = pad_left(text)
    assert moved.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert seen(moved) == [[1, 2, 3], [4]]
    assert moved.labels.tolist() == [[1, 2, 3], [IGNORE, IGNORE, 4]]


# ------------------------------------------------------------------------------------------- through a whole model


def make_rows(processor, media):
    """Three rows of different lengths: two images, none, an image and a sound."""
    texts = ["<image> and <image> are two", "nothing to see here, only quite a few words", "<audio> is that <image>?"]
    images = [[media.image(0), media.image(1)], [], [media.image(2)]]
    audios = [[], [], [media.audio(0)]]
    return texts, images, audios


def make_batch(processor, texts, images, audios, side):
    processor.llm_tokenizer.padding_side = side
    inputs = {"image": {"images": images}, "audio": {"raw_speech": audios, "sampling_rate": 16_000}}
    inputs = {key: value for key, value in inputs.items() if any(next(iter(value.values())))}
    batch = processor(inputs, {"text": texts, "padding": True})
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    return batch


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["inject", "prepend"])
def test_padding_does_not_change_a_row(tiny_model, media, side, mode):
    """Each row gives alone what it gives in a batch, and the loss is the mean over tokens, not over rows."""
    model, processor = tiny_model(("image", "audio"), ())
    texts, images, audios = make_rows(processor, media)
    if mode == "prepend":
        model.set_token_ids(None)
        processor.injects = False
        texts = [text.replace("<image>", "").replace("<audio>", "") for text in texts]
    with torch.no_grad():
        batch = make_batch(processor, texts, images, audios, side)
        together = model(**batch, return_logits=True)
        alone = [
            model(**make_batch(processor, [t], [i], [a], side), return_logits=True)
            for t, i, a in zip(texts, images, audios, strict=True)
        ]
    for row, one in enumerate(alone):
        kept = together.logits[row, together.attention_mask[row].bool()]
        assert one.attention_mask.all()
        torch.testing.assert_close(kept, one.logits[0], atol=1e-4, rtol=0)
    terms = {"encoder_llm/nll": [alone[0], alone[2]], "llm/nll": [alone[1]]}
    assert set(together.losses) == set(terms)
    for name, ones in terms.items():
        assert together.losses[name].count == sum(one.losses[name].count for one in ones)
        expected = sum(one.losses[name].total for one in ones)
        torch.testing.assert_close(together.losses[name].total, expected, atol=1e-3, rtol=1e-5)
        assert len({round(float(one.losses[name].mean), 3) for one in ones}) == len(ones), "rows must differ"


def test_content_under_the_mask_does_not_matter(tiny_model):
    model, _processor = tiny_model((), ())
    ids = torch.tensor([[30, 31, 32, 33], [40, 41, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    other = ids.masked_fill(mask == 0, 99)
    with torch.no_grad():
        one, two = model(ids, mask).logits, model(other, mask).logits
        unmasked = model(other).logits
    torch.testing.assert_close(one[mask.bool()], two[mask.bool()])
    assert one.shape == unmasked.shape


@pytest.mark.parametrize(
    ("mask", "dropped"),
    [
        ([[1, 1, 1], [1, 0, 0]], True),
        ([[1, 1, 1], [1, 1, 1]], True),
        ([[1, 1, 1], [0, 0, 1]], False),
        ([[1, 1, 0], [0, 1, 1]], False),
        ([[1, 0, 1], [1, 1, 0]], False),  # a hole
        ([[[[1, 0], [1, 1]]]], False),  # whole, as a callback may give it
    ],
)
def test_only_right_padding_is_dropped_from_the_mask(mask, dropped):
    mask = torch.tensor(mask)
    assert torch.equal(without_right_padding(mask), torch.ones_like(mask) if dropped else mask)
    for other in (None, {"full_attention": mask}):  # transformers takes masks by kind of layer, too
        assert without_right_padding(other) is other


@pytest.mark.parametrize(("side", "masked"), [("right", False), ("left", True)])
def test_right_padding_needs_no_mask_in_attention(tiny_model, side, masked):
    """Losses and gradients are those of transformers under its own mask; only the kernel's argument is spared."""
    model, processor = tiny_model((), ())
    processor.llm_tokenizer.padding_side = side
    batch = processor(llm_inputs={"text": ["a red ring", "a long text of quite a few more words"], "padding": True})
    # from the second token on: transformers has padding on the left predict the first
    labels = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(dim=1) * batch["attention_mask"] < 2, IGNORE)
    seen = []
    attention = model.language_model.model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    theirs = model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=labels).loss
    (their_gradient,) = torch.autograd.grad(theirs, embeds)
    model.get_input_embeddings().register_forward_hook(lambda *_: embeds)
    ours = model(**batch, labels=labels).loss
    (our_gradient,) = torch.autograd.grad(ours, embeds)
    assert batch["attention_mask"].min() == 0 and [mask is not None for mask in seen] == [True, masked]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradient, their_gradient)
    assert our_gradient.any()
