"""Packed rows, and batches by tokens: the same loss, gradients and states as padded rows, with less padding."""

import numpy as np
import pytest
import torch
from conftest import enlarge
from tiny_parts import CLIP, LANGUAGE_MODELS
from training_utils import argument_maker, assert_same_losses, logged, losses_of, train_here
from transformers import MistralConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from anygpt import InputError, ModalDecoderModule, ModalEncoderModule, MultimodalModel, MultimodalProcessor
from anygpt.data import UpdateSampler
from anygpt.model.packing import BY_ROW, Packing, check_packing

CAPTIONS = ["a red ring", "a cross", "a blue star"]


def compose(parts, language_model, hidden_layer=-1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = ModalDecoderModule(parts.decoder("image"), num_signal_tokens=3, hidden_layer=hidden_layer)
        model = MultimodalModel(
            {"image": ModalEncoderModule(enlarge(CLIP.build(), 2.0))},
            enlarge(language_model.build()),
            {"image": decoder},
            init_output_projector_type="linear",
        ).eval()
    return model, MultimodalProcessor({"image": CLIP.build_processor()}, parts.tokenizer(), model=model)


def batch_of(processor, side="right", prepends=False):
    """Rows of all kinds and lengths, with labels."""
    processor.llm_tokenizer.padding_side = side
    span, mark = "".join(processor.signal_tokens["image"]), "" if prepends else "<image>"
    texts = [
        f"{mark} draw it anew {span} and once more {span}",
        "a word",
        f"{mark} say what there is, and what there is not",
        f"{mark} say a cross {span}",
        "nothing at all is here, and nothing will be: say that",
    ]
    media = [CLIP.media(seed) for seed in range(3)]
    media = [[media[0]], [], [media[1]], [media[2]], []] if prepends else media
    batch = processor({"image": {"images": media}}, {"text": texts})
    ids, signals = batch["input_ids"], torch.tensor(processor.signal_token_ids["image"])
    said = (batch["attention_mask"] == 1) & ((ids < 500) | torch.isin(ids, signals))  # the models know no more words
    labels = ids.masked_fill(~said, -100)
    return dict(batch) | {"labels": labels, "decoder_targets": {"image": {"captions": CAPTIONS}}}


def trained(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output, gradients


def in_float64(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def close(found, expected, name=None):
    """To 1e-5 of the largest entry."""
    bound = 1e-5 * float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=bound, msg=name)


def assert_same(model, batch, pack_to, double=True):
    """In float64, where kernels' rounding does not count; some models compute in part in float32 all the same."""
    if double:
        model.double()
        batch = {name: in_float64(value) for name, value in batch.items()}
    model.pack_to = None
    padded, gradients = trained(model, batch)
    inputs = {name: value for name, value in batch.items() if name != "items_per_row"}
    injects = model.token_ids is not None
    states = model.read_states(**inputs) if injects else {}
    model.pack_to = pack_to
    packed, gradients_packed = trained(model, batch)
    assert set(padded.losses) == set(packed.losses)
    for name, term in padded.losses.items():
        close(packed.losses[name].total, term.total)
    close(packed.loss, padded.loss)
    assert set(gradients) == set(gradients_packed)
    for name, gradient in gradients.items():
        close(gradients_packed[name], gradient, name)
    if injects:
        close(model.read_states(**inputs)["image"], states["image"])
    full = {name: value for name, value in batch.items() if name not in ("labels", "decoder_targets")}
    logits = model(**full).logits
    model.pack_to = None
    kept = batch["attention_mask"].bool() if logits.shape[1] == batch["input_ids"].shape[1] else None
    if kept is not None:
        close(logits[kept], model(**full).logits[kept])
    return padded, packed


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS, ids=lambda language_model: language_model.label)
def test_packed_rows_are_as_padded_ones(parts, language_model):
    model, processor = compose(parts, language_model)
    model.train_only(["image_projector", "language_model", "signal_tokens", "image_output_projector"])
    batch = batch_of(processor)
    if language_model.label == "OPT":
        with pytest.raises(InputError, match=r"cannot be packed .* for OPTForCausalLM"):
            check_packing(model)
        return
    check_packing(model)
    grouped = language_model.label in ("Mixtral", "Qwen3-MoE")  # torch multiplies their experts in no float64
    padded, packed = assert_same(model, batch, 45, not grouped)
    tokens = int(batch["attention_mask"].sum())
    assert padded.places == batch["input_ids"].numel() and tokens <= packed.places < padded.places


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prepends", [False, True], ids=["injected", "prepended"])
def test_features_spans_and_labels_keep_their_places(parts, side, prepends, attention):
    model, processor = compose(parts, LANGUAGE_MODELS[0], hidden_layer=1)
    model.language_model.set_attn_implementation(attention)
    check_packing(model)
    model.train_only(["image_projector", "signal_tokens", "image_output_projector"])
    if prepends:
        processor.injects = False
        model.set_token_ids(None)
    for pack_to in (1, 40, 1000):
        # transformers' eager attention turns the mask's least float64 into an infinity of float32 where all is masked
        assert_same(model, batch_of(processor, side, prepends), pack_to, not (side == "left" and attention == "eager"))


@pytest.mark.parametrize(("window", "suffices"), [(4, True), (3, False)])
def test_attention_by_row_needs_lengths_alone(window, suffices):
    """Where each row is causal and complete; a window that is shorter than a row needs the mask."""
    config = MistralConfig(sliding_window=window, attn_implementation=BY_ROW)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]])
    arguments = (config, torch.zeros(2, 6, 8), None, None)
    assert create_causal_mask(*arguments, positions).tolist() == [4, 2, 3, 3]
    local = create_sliding_window_causal_mask(*arguments, positions)
    assert local.tolist() == [4, 2, 3, 3] if suffices else local.shape == (2, 1, 6, 6)
    assert create_causal_mask(*arguments, torch.arange(6)[None]) is None


def test_where_tokens_go():
    """First fit, longest first; a row beyond the limit is the limit; holes in a mask are left out."""
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [1, 0, 1, 1, 0]])
    packing = Packing.of(mask, 4)
    assert packing.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    values = torch.arange(20).view(4, 5)
    assert torch.equal(packing.unpack(packing.pack(values))[mask.bool()], values[mask.bool()])
    rows, places = packing.places((torch.tensor([2]), torch.tensor([4])))
    assert packing.pack(values)[rows, places].tolist() == [14]


# ----------------------------------------------------------------------------------------------- batches by tokens


@pytest.mark.parametrize("packed", [False, True])
def test_batches_hold_as_many_tokens_as_they_may(packed):
    sizes = np.random.default_rng(0).integers(5, 200, 1000)
    options = {"batch_size": 8, "num_updates": 400, "seed": 1, "sizes": sizes, "max_tokens": 800, "packed": packed}
    batches = [[index for index, _ in batch] for batch in UpdateSampler(1000, **options)]
    held = [sum(sizes[b]) if packed else len(b) * max(sizes[b]) for b in batches]
    assert max(held) <= 800 and np.mean(held) > 600
    epoch = []
    for batch in batches:
        epoch += batch if len(epoch) < 1000 else []
    assert sorted(epoch) == list(range(1000))
    halves = [list(UpdateSampler(1000, **options, rank=rank, world_size=2)) for rank in range(2)]
    filled = [[index for index, _ in batch] for half in halves for batch in half if batch]
    whole = [sum(sizes[b]) if packed else len(b) * max(sizes[b]) for b in filled]
    assert max(whole) <= 800 and len(halves[0]) == len(halves[1])
    assert [index for index, _ in next(iter(UpdateSampler(1000, **options | {"start_update": 3})))] == batches[3]


def test_a_row_beyond_the_budget_is_refused():
    with pytest.raises(InputError, match=r"max_batch_tokens is 50, and a row has about 60 tokens"):
        UpdateSampler(2, batch_size=1, num_updates=1, sizes=[10, 60], max_tokens=50)


# ------------------------------------------------------------------------------------------------------ in training


@pytest.mark.parametrize("stage", [1, 3])
def test_a_packed_run_is_as_a_padded_one(tmp_path_factory, tmp_path, stage):
    """And both ways report the share of padding."""
    make = argument_maker(tmp_path_factory)
    ways = {"padded": (), "packed": ("--data.pack_to", "256"), "by tokens": ("--data.max_batch_tokens", "400")}
    for name, more in ways.items():
        more = ("--run.tracker", "tensorboard", "--loss.denoising=0", *more)
        train_here(stage, make(stage, tmp_path / name, *more, steps=3, batch_size=12))
    padded, packed = (losses_of(tmp_path / name) for name in ("padded", "packed"))
    padding = [metrics.pop("padding") for metrics in packed.values()]
    assert_same_losses(padded, packed, 1e-4)
    assert max(padding) < 0.35
    assert all(0 <= metrics["padding"] < 0.35 for metrics in logged(tmp_path / "by tokens").values())
