"""Each loss against its formula in float64, rows to their terms, and sums that do not depend on the split."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from anygpt.data import DataSource
from anygpt.errors import InputError
from anygpt.losses import terms
from anygpt.losses.formulas import (
    MEDIA_OUT,
    LossWeights,
    caption_alignment,
    denominators,
    route,
    sum_by_term,
    token_nll,
    weighted_total,
)
from anygpt.outputs import LossTerm
from anygpt.training.setup import build_dataset
from anygpt.training.stages import LLM_DECODER


def naive_nll(logits, labels):
    return [
        math.log(sum(math.exp(float(x)) for x in row)) - float(row[label])
        for row, label in zip(logits.double(), labels, strict=True)
    ]


def naive_alignment(condition, target, kind):
    values = []
    for sample, other in zip(condition.double(), target.double(), strict=True):
        tokens = []
        for a, b in zip(sample.tolist(), other.tolist(), strict=True):
            squares = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
            norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            tokens.append({"l2": math.sqrt(squares), "mse": squares / len(a), "cosine": 1 - dot / norms}[kind])
        values.append(sum(tokens) / len(tokens))
    return values


def test_nll_is_minus_the_log_probability():
    logits, labels = torch.randn(5, 11), torch.tensor([0, 3, 10, 3, 7])
    expected = torch.tensor(naive_nll(logits, labels)).double()
    torch.testing.assert_close(token_nll(logits, labels).double(), expected, rtol=1e-5, atol=1e-6)


def test_nll_of_half_precision_logits_is_computed_in_fp32():
    logits, labels = (torch.randn(64, 500) * 8).bfloat16(), torch.randint(500, (64,))
    assert token_nll(logits, labels).dtype == torch.float32
    torch.testing.assert_close(
        token_nll(logits, labels).double(), torch.tensor(naive_nll(logits, labels)).double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["l2", "mse", "cosine"])
def test_caption_alignment(kind):
    condition, target = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    result = caption_alignment(condition, target, kind)
    assert result.shape == (3,)
    expected = torch.tensor(naive_alignment(condition, target, kind)).double()
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    assert float(caption_alignment(target, target, kind).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["l2", "mse", "cosine"])
def test_gradient_is_finite_at_zero_distance(kind):
    target = torch.randn(2, 3, 4)
    condition = target.clone().requires_grad_()
    caption_alignment(condition, target, kind).sum().backward()
    assert condition.grad.isfinite().all()


def test_alignment_refuses_other_shapes_and_kinds():
    with pytest.raises(InputError, match=r"\(1, 2, 3\).*\(1, 2, 4\)"):
        caption_alignment(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(InputError, match="'l1'; expected one of l2, mse, cosine"):
        caption_alignment(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), "l1")


def test_rows_go_to_the_four_terms():
    media_in = torch.tensor([False, True, False, True])
    media_out = torch.tensor([False, False, True, True])
    assert route(media_in, media_out) == ["llm", "encoder_llm", "llm_decoder", "encoder_decoder"]


def test_values_are_added_up_under_the_term_of_their_row():
    values, rows = torch.tensor([1.0, 2, 4, 8, 16]), torch.tensor([0, 0, 1, 2, 2])
    sums = sum_by_term(values, rows, ["llm", "encoder_llm", "llm"], "nll")
    assert {name: (float(term.total), term.count) for name, term in sums.items()} == {
        "llm/nll": (27.0, 4),
        "encoder_llm/nll": (4.0, 1),
    }


def test_total_is_the_weighted_sum_of_means_and_leaves_the_terms_alone():
    losses = {
        "llm/nll": LossTerm(torch.tensor(6.0), 3),
        "llm_decoder/alignment/image": LossTerm(torch.tensor(8.0), 2),
        "encoder_decoder/denoising/audio": LossTerm(torch.tensor(5.0), 1),
    }
    weights = LossWeights(
        llm=0.5, llm_decoder=2.0, encoder_decoder=3.0, alignment=0.25, denoising=10.0, by_modality={"audio": 0.1}
    )
    expected = 0.5 * 2 + 2 * 0.25 * 4 + 3 * 10 * 0.1 * 5
    assert float(weighted_total(losses, weights)) == pytest.approx(expected)
    assert [float(term.total) for term in losses.values()] == [6.0, 8.0, 5.0]
    counts = {"llm/nll": 6, "llm_decoder/alignment/image": 4, "encoder_decoder/denoising/audio": 2}
    assert float(weighted_total(losses, weights, counts)) == pytest.approx(expected / 2)
    assert weighted_total({}, weights) is None
    assert weighted_total(losses, LossWeights(llm=0, alignment=0, denoising=0)) is None


def test_a_decoders_factor_is_no_encoders_of_the_same_key():
    weights = LossWeights(encoder=2.0, decoder=3.0, by_modality={"image": 0.5})
    names = ("encoder/info_nce/image", "decoder/denoising/image", "llm_decoder/alignment/image")
    assert [weights.of(name) for name in names] == [2.0, 1.5, 0.5]


def test_what_rows_of_several_terms_have_is_one_mean():
    counts = {
        "llm/nll": 1,
        "encoder_llm/nll": 9,
        "llm_decoder/denoising/image": 2,
        "encoder_decoder/denoising/image": 3,
    }
    counts |= {"llm_decoder/denoising/audio": 7, "decoder/denoising/image": 4}
    assert list(denominators(counts).values()) == [10, 10, 5, 5, 7, 4]
    losses = {"llm/nll": LossTerm(torch.tensor(8.0), 1), "encoder_llm/nll": LossTerm(torch.tensor(9.0), 9)}
    assert float(weighted_total(losses, LossWeights())) == pytest.approx(1.7)
    assert float(weighted_total(losses, LossWeights(llm=0))) == pytest.approx(0.9), "a weight is that of a share"


# ------------------------------------------------------------------------------------------- through a whole model

ROWS = [
    {"text": "just some text of a few words"},
    {"text": "<image> is what?", "image": 1},
    {"text": "show me a circle: {image}", "image_out": 2},
    {"text": "<image> sounds like {audio} or {audio}, or else", "image": 3, "audio_out": [4, 5]},
    {"text": "two: {image}{image}", "image_out": [6, 7]},
]


@pytest.fixture(scope="module")
def setup(tiny_model):
    return tiny_model(("image",), ("image", "audio"))


def make_batch(processor, media, rows):
    """A batch of some of `ROWS`, and the seed of each of its targets."""
    texts, images, targets, seeds = [], [], {}, {}
    for row in (ROWS[i] for i in rows):
        spans = {key: "".join(names) for key, names in processor.signal_tokens.items()}
        texts.append(row["text"].format(**spans))
        images += [media.image(row["image"])] if "image" in row else []
        for key, name, make in (
            ("image", "images", media.image),
            ("audio", "audios", lambda seed: (media.audio(seed), 16_000)),
        ):
            given = row.get(f"{key}_out", [])
            for seed in given if isinstance(given, list) else [given]:
                target = targets.setdefault(key, {"captions": [], name: []})
                target["captions"].append(f"caption number {seed}")
                target[name].append(make(seed))
                seeds.setdefault(key, []).append(seed)
    processor.llm_tokenizer.padding_side = "right"
    inputs = {"image": {"images": images}} if images else {}
    batch = processor(inputs, {"text": texts, "padding": True}, decoder_targets=targets)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch, seeds


def run(model, processor, media, rows, counts=None):
    batch, seeds = make_batch(processor, media, rows)
    generators = {key: [torch.Generator().manual_seed(s) for s in values] for key, values in seeds.items()}
    return model(**batch, loss_counts=counts, generators=generators)


EVERY = {
    "llm/nll",
    "encoder_llm/nll",
    "llm_decoder/nll",
    "encoder_decoder/nll",
    "llm_decoder/alignment/image",
    "llm_decoder/denoising/image",
    "encoder_decoder/alignment/audio",
    "encoder_decoder/denoising/audio",
}


def test_every_term_appears_and_count_losses_agrees(setup, media):
    model, processor = setup
    output = run(model, processor, media, range(5))
    assert set(output.losses) == EVERY
    batch, _ = make_batch(processor, media, range(5))
    assert model.count_losses(batch) == {name: term.count for name, term in output.losses.items()}
    assert output.losses["llm_decoder/alignment/image"].count == 3
    assert output.losses["encoder_decoder/denoising/audio"].count == 2
    mask = batch["attention_mask"].sum(dim=1)
    assert output.losses["llm/nll"].count == int(mask[0]) - 1
    placeholders = int((batch["input_ids"][1] == model.token_ids["image"]).sum())
    assert placeholders == 17
    # the placeholders have no labels, and the row begins with them
    assert output.losses["encoder_llm/nll"].count == int(mask[1]) - placeholders


def test_counts_of_a_left_padded_batch(setup, media):
    model, processor = setup
    batch, _ = make_batch(processor, media, [0, 4])
    flipped = {
        "input_ids": batch["input_ids"].flip(1),
        "attention_mask": batch["attention_mask"].flip(1),
        "labels": batch["labels"].flip(1),
    }
    flipped["input_ids"][1], flipped["attention_mask"][1], flipped["labels"][1] = (
        batch["input_ids"][0],
        batch["attention_mask"][0],
        batch["labels"][0],
    )
    flipped["input_ids"] = flipped["input_ids"].clamp(max=900)
    assert model.count_losses(flipped) == {n: t.count for n, t in model(**flipped).losses.items()}


@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4]], [[0, 3], [1, 2, 4]], [[4], [3], [2], [1], [0]]])
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(setup, media, split):
    """The denominators are those of the whole update, the noise is each sample's own."""
    model, processor = setup
    whole = run(model, processor, media, range(5))
    counts = {name: term.count for name, term in whole.losses.items()}
    parameter = model.image_decoder.projector.projection.layers.weight
    (expected,) = torch.autograd.grad(whole.loss, parameter)
    total, gradient, sums = 0.0, torch.zeros_like(parameter), {}
    for rows in split:
        part = run(model, processor, media, rows, counts)
        total += float(part.loss.detach())
        if any(row in (2, 4) for row in rows):
            gradient += torch.autograd.grad(part.loss, parameter)[0]
        for name, term in part.losses.items():
            before = sums.get(name, (0.0, 0))
            sums[name] = before[0] + float(term.total.detach()), before[1] + term.count
    assert total == pytest.approx(float(whole.loss.detach()), rel=1e-6)
    for name, term in whole.losses.items():
        assert sums[name] == (pytest.approx(float(term.total.detach()), rel=2e-6), term.count), name
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_loss_is_the_sum_of_its_logged_terms(setup, media):
    model, processor = setup
    model.loss_weights = LossWeights(encoder_decoder=0.5, alignment=2.0, by_modality={"image": 3.0})
    try:
        output = run(model, processor, media, range(5))
    finally:
        model.loss_weights = LossWeights()
    factors = {
        "encoder_decoder/nll": 0.5,
        "encoder_decoder/alignment/audio": 1.0,
        "encoder_decoder/denoising/audio": 0.5,
        "llm_decoder/alignment/image": 6.0,
        "llm_decoder/denoising/image": 3.0,
    }
    tokens = sum(term.count for name, term in output.losses.items() if name.endswith("/nll"))
    expected = sum(
        factors.get(name, 1.0) * float(term.total.detach()) / (tokens if name.endswith("/nll") else term.count)
        for name, term in output.losses.items()
    )
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-6)
    plain = run(model, processor, media, range(5))
    for name, term in plain.losses.items():
        torch.testing.assert_close(output.losses[name].total, term.total, msg="logged terms are unweighted")


@pytest.mark.parametrize(
    ("weights", "gone"),
    [
        (LossWeights(alignment=0.0), "alignment"),
        (LossWeights(denoising=0.0), "denoising"),
        (LossWeights(nll=0.0), "nll"),
        (LossWeights(by_modality={"audio": 0.0}), "audio"),
    ],
)
def test_what_has_no_weight_is_not_computed(setup, media, weights, gone):
    model, processor = setup
    calls = []
    hooks = [model.audio_decoder.module.unet.register_forward_hook(lambda *_: calls.append("denoising"))]
    hooks.append(model.audio_decoder.module.text_encoder.register_forward_hook(lambda *_: calls.append("alignment")))
    model.loss_weights = weights
    try:
        output = run(model, processor, media, range(5))
        counts = model.count_losses(make_batch(processor, media, range(5))[0])
    finally:
        model.loss_weights = LossWeights()
        for hook in hooks:
            hook.remove()
    assert set(output.losses) == {name for name in EVERY if gone not in name.split("/")} == set(counts)
    assert set(calls) == {"alignment", "denoising"} - {gone} if gone != "audio" else not calls


@dataclass
class NewWeights(LossWeights):
    consistency: float = 0.0


def test_a_new_loss_is_one_entry_and_one_weight(setup, media, monkeypatch, tmp_path):
    """Nothing else has a list of losses: it can be the only one of a run, which then reads captions alone."""
    new = terms.SubTerm("consistency", terms.Target, terms.Target.alignment, MEDIA_OUT, needs=("captions",))
    monkeypatch.setattr(terms, "SUB_TERMS", (*terms.SUB_TERMS, new))
    model, processor = setup
    weights = NewWeights(nll=0.0, alignment=0.0, denoising=0.0, consistency=2.0)
    monkeypatch.setattr(model, "loss_weights", weights)
    output = run(model, processor, media, range(5))
    assert set(output.losses) == {"llm_decoder/consistency/image", "encoder_decoder/consistency/audio"}
    assert set(model.count_losses(make_batch(processor, media, range(5))[0])) == set(output.losses)
    assert set(output.losses) <= set(model.loss_names())
    expected = sum(2 * float(term.total.detach()) / term.count for term in output.losses.values())
    assert float(output.loss.detach()) == pytest.approx(expected)
    assert terms.is_read("captions", weights, "image") and not terms.is_read("media", weights)

    media.image(0).save(tmp_path / "0.png")
    image = {"type": "image", "path": "0.png", "caption": "a ring"}
    messages = [{"role": "user", "content": "draw"}, {"role": "assistant", "content": [image]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "0", "messages": messages}))
    given = (
        [DataSource(str(tmp_path / "rows.jsonl"))],
        model,
        SimpleNamespace(data=SimpleNamespace(on_bad_sample="error")),
    )
    assert len(build_dataset(*given, LLM_DECODER)) == 1
    weights.consistency = 0.0
    with pytest.raises(InputError, match=r"every loss of the data's rows \(llm_decoder\) has weight 0"):
        build_dataset(*given, LLM_DECODER)


def test_a_new_loss_of_labels_alone(setup, media, monkeypatch):
    new = terms.SubTerm("consistency", terms.Labels, lambda labels: labels.values.float(), terms.TERMS)
    monkeypatch.setattr(terms, "SUB_TERMS", (*terms.SUB_TERMS, new))
    model, processor = setup
    assert not terms.reads_labels(NewWeights(nll=0.0))
    monkeypatch.setattr(model, "loss_weights", NewWeights(nll=0.0, alignment=0.0, denoising=0.0, consistency=2.0))
    output = run(model, processor, media, range(5))
    assert set(output.losses) == {f"{term}/consistency" for term in terms.TERMS}
    counts = model.count_losses(make_batch(processor, media, range(5))[0])
    assert counts == {name: term.count for name, term in output.losses.items()}
    mean = sum(float(term.total) for term in output.losses.values()) / sum(counts.values())
    assert float(output.loss) == pytest.approx(2 * mean) and mean > 0


def test_targets_without_captions_or_without_media(setup, media):
    model, processor = setup
    batch, _ = make_batch(processor, media, [2])
    only = {key: value for key, value in batch.items() if key != "decoder_targets"}
    targets = batch["decoder_targets"]["image"]
    names = {part: set(model(**only, decoder_targets={"image": {part: targets[part]}}).losses) for part in targets}
    assert names["captions"] == {"llm_decoder/nll", "llm_decoder/alignment/image"}
    assert names["media"] == {"llm_decoder/nll", "llm_decoder/denoising/image"}


def test_precomputed_caption_encodings_give_the_same_numbers(setup, media):
    model, processor = setup
    batch, _ = make_batch(processor, media, range(5))
    fly = {key: target["captions"] for key, target in batch["decoder_targets"].items()}
    ready = {key: model.decoders[key].module.encode_text(captions) for key, captions in fly.items()}
    only = {key: value for key, value in batch.items() if key != "decoder_targets"}
    losses = [
        model(**only, decoder_targets={key: {name: value} for key, value in given.items()}).losses
        for name, given in (("captions", fly), ("conditions", ready))
    ]
    assert losses[0].keys() == losses[1].keys() and "llm_decoder/alignment/image" in losses[0]
    assert all(torch.equal(losses[0][name].total, losses[1][name].total) for name in losses[0])


def test_targets_that_fit_no_span_are_refused(setup, media):
    model, processor = setup
    batch, _ = make_batch(processor, media, [2])
    batch["decoder_targets"]["image"]["captions"] *= 2
    with pytest.raises(InputError, match="1 'image' signal spans but 2 captions"):
        model(**batch)
    batch["decoder_targets"] = {"smell": {"captions": ["rose"]}}
    with pytest.raises(InputError, match="targets for 'smell'; the decoders are"):
        model(**batch)
