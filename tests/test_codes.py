"""Media as codes in the language model: rows, loss, spans, saving."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from code_utils import clip, code_model, picture, turn, vq_model

from anygpt import MultimodalModel, MultimodalProcessor, load_language_model, load_media_tokenizer
from anygpt.errors import InputError
from anygpt.losses.formulas import LossWeights
from anygpt.parts.files import shapes_only
from anygpt.sequence import signal_tokens
from anygpt.sequence.signal_tokens import SignalTokens
from anygpt.tokenizers.base import MediaTokenizer


@pytest.fixture(scope="module")
def made(parts):
    return code_model(parts, ("image", "video"))


def batch_of(model, processor):
    """Codes of users and assistants, two media in a row, and a row of text; ids and labels with the codes in them."""
    rows = [
        [turn("user", picture(1), "And as a clip?"), turn("assistant", "Here:", clip(1), picture(2))],
        [turn("user", "Hello."), turn("assistant", "Hello!")],
        [turn("user", clip(2), clip(3), "What is it?"), turn("assistant", "A ring.")],
    ]
    processor.llm_tokenizer.padding_side = "right"  # transformers counts positions over padding
    batch = processor.apply_chat_template(rows, tokenize=True)
    ids, labels = batch["input_ids"], batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :12] = -100  # among them codes
    inputs = {name: value for name, value in batch.items() if "." in name}
    ids, labels, rest = model.write_codes(ids, labels, inputs)
    assert not rest and all(int(value.shape[0]) == 2 + (name[0] == "v") for name, value in inputs.items())
    return dict(batch), {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": labels}


def resized(model):
    """The language model alone, whose resized matrices hold the rows: transformers' own way."""
    signal, alone = model.signal_tokens, copy.deepcopy(model.language_model)
    alone.resize_token_embeddings(len(signal._row_of_id), mean_resizing=False)
    with torch.no_grad():
        for key in signal.ids:
            alone.get_input_embeddings().weight[signal.row_ids(key)] = signal.input_rows[key]
            alone.get_output_embeddings().weight[signal.row_ids(key)] = signal.output_rows[key]
    return alone


@pytest.mark.parametrize("chunk", [512, 16])
def test_loss_and_gradients_are_transformers_own(made, chunk, monkeypatch):
    model, processor = made
    monkeypatch.setattr(signal_tokens, "CHUNK", chunk)
    raw, batch = batch_of(model, processor)
    alone = resized(model)
    theirs, ours = alone(**batch).loss, model(**batch).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    raw["labels"] = torch.where(batch["labels"] == -100, -100, raw["input_ids"])
    assert torch.equal(model(**raw).loss, ours), "media given as such"
    assert model.count_losses(raw) == {name: term.count for name, term in model(**batch).losses.items()}
    theirs.backward()
    model.zero_grad()
    ours.backward()
    for key in model.tokenizers:
        for rows, module in (
            (model.signal_tokens.input_rows, alone.get_input_embeddings()),
            (model.signal_tokens.output_rows, alone.get_output_embeddings()),
        ):
            expected = module.weight.grad[model.signal_tokens.row_ids(key)]
            torch.testing.assert_close(rows[key].grad, expected, rtol=1e-5, atol=1e-6)


def test_rows_are_routed_by_where_their_codes_are(made):
    model, processor = made
    _, batch = batch_of(model, processor)
    batch["labels"][0, :30] = -100  # the users' turns; only the texts of rows 1 and 2 remain
    batch["labels"][1:] = batch["input_ids"][1:].where(batch["input_ids"][1:] < 600, -100)
    assert set(model(**batch).losses) == {"encoder_decoder/nll", "llm/nll", "encoder_llm/nll"}


def test_weight_and_smoothing_of_codes(made):
    model, processor = made
    _, batch = batch_of(model, processor)
    logits = model(**batch, return_logits=True).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    log_p, values = logits[kept].log_softmax(-1), labels[kept]
    codes = values >= model.get_input_embeddings().weight.shape[0]
    said = torch.isin(values, torch.tensor([i for key in model.tokenizers for i in model.signal_tokens.ids[key]]))
    expected = 0.9 * -log_p.gather(1, values[:, None])[:, 0] - 0.1 * log_p.mean(-1)
    expected = torch.where(codes | said, 0.5 * expected, expected).sum() / len(values)
    try:
        model.loss_weights = LossWeights(media_weight=0.5, label_smoothing=0.1)
        torch.testing.assert_close(model(**batch).loss.double(), expected, rtol=1e-5, atol=1e-6)
    finally:
        model.loss_weights = LossWeights()


def test_rows_begin_as_a_linear_map_of_the_codebook(parts):
    """Near entries have near rows, with the mean and deviation of the model's own; equal ones differ."""
    llm, book = parts.language_model(), torch.randn(300, 6)
    book[1] = book[0]
    grid = signal_tokens.Grid(300, [(0, 300)] * 4, None, book)
    rows = SignalTokens({}, llm.get_input_embeddings(), llm.get_output_embeddings(), grids={"image": grid})
    own = llm.get_input_embeddings().weight
    new = rows.input_rows["image"][2:].detach()
    torch.testing.assert_close(new.std(0), own.std(0), rtol=0.1, atol=1e-3)
    torch.testing.assert_close(new.mean(0), own.mean(0), rtol=0.1, atol=0.1)
    flat = [
        (x[:, None] - x[None]).norm(dim=-1)[~torch.eye(300, dtype=bool)]
        for x in ((new - own.mean(0)) / own.std(0), book)
    ]
    assert torch.corrcoef(torch.stack(flat))[0, 1] > 0.7
    assert not torch.equal(new[0], new[1])


def test_one_codebook_has_one_set_of_rows(parts, tmp_path):
    """The frames of a clip are, code for code, the pictures that they are; saved and loaded too."""
    network = vq_model()
    tokenizers = {"video": MediaTokenizer(network, "video", num_frames=2), "image": MediaTokenizer(network, "image")}
    model = MultimodalModel({}, parts.language_model(), tokenizers=tokenizers).eval()
    processor = MultimodalProcessor({}, parts.tokenizer(), model=model)
    signal = model.signal_tokens
    assert {key: len(rows) for key, rows in signal.input_rows.items()} == {"video": 2, "image": 34}
    moving = np.stack([np.asarray(picture(0)), np.asarray(picture(1))])
    asked = [turn("user", moving, picture(0), "What?"), turn("assistant", "It is."), turn("user", picture(1), "And?")]
    batch = processor.apply_chat_template(asked, tokenize=True)
    ids, _, _ = model.write_codes(
        batch["input_ids"], None, {name: batch[name] for name in ("image.media", "video.media")}
    )
    codes = {key: ids[0][signal.find_spans(ids, key).positions].flatten() for key in ("image", "video")}
    assert torch.equal(codes["image"], codes["video"])
    with pytest.raises(InputError, match="row 0 holds a broken"):
        signal.find_spans(torch.cat([ids, codes["image"][None, :1]], dim=1), "video")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = MultimodalModel.from_pretrained(tmp_path).eval()
    MultimodalProcessor.from_pretrained(tmp_path, model=loaded)
    torch.testing.assert_close(loaded(ids, return_logits=True).logits, model(ids, return_logits=True).logits)


def test_a_check_shares_rows_as_a_run_does():
    """On the meta device codebooks have no values to compare."""
    found = []
    for place in (nullcontext, shapes_only):
        with place():
            picked = {"audio": "audio", "image": "image", "video": "image"}
            options = {"audio": {}, "image": {}, "video": {"num_frames": 2}}
            made = {
                key: load_media_tokenizer(f"zoo:{one}_tokenizer", key, **options[key]) for key, one in picked.items()
            }
            language_model = load_language_model("zoo:language_model")
            signal = MultimodalModel({}, language_model, tokenizers=made).signal_tokens
        assert signal.owners == picked
        found.append({name: rows.shape for name, rows in signal.named_parameters()})
    assert found[0] == found[1]


def test_row_ends_are_part_of_a_span(parts):
    model, processor = code_model(parts, row_ends=True)
    batch = processor.apply_chat_template([turn("user", picture(), "What?")], tokenize=True)
    ids, _, _ = model.write_codes(batch["input_ids"], None, {"image.media": batch["image.media"]})
    begin, end, row, first = model.signal_tokens.ids["image"]
    (start,) = (ids[0] == begin).nonzero()[:, 0].tolist()
    span = ids[0, start : start + 22]
    assert span[5:21:5].tolist() == [row] * 4 and span[21] == end
    assert torch.equal(
        span[1:21].view(4, 5)[:, :4].flatten() - first, model.tokenizers["image"].module.encode([picture()])[0]
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ids, span: ids[:, :-3], "row 0 holds a broken 'image' signal span"),
        (lambda ids, span: ids.index_fill(1, torch.tensor([span + 3]), 5), "expected <image>, 16 codes"),
    ],
    ids=["truncated", "interrupted"],
)
def test_broken_spans_are_errors(made, change, said):
    model, _ = made
    ids = torch.cat([torch.tensor([[1, 5]]), torch.full((1, 18), model.signal_tokens.ids["image"][0])], dim=1)
    ids, _ = model.signal_tokens.write_codes(ids, None, {"image": torch.zeros(1, 16, dtype=torch.long)})
    with pytest.raises(InputError, match=said):
        model(input_ids=change(ids, 2))


def test_bad_codes_are_errors(made):
    model, _ = made
    begin = model.signal_tokens.ids["image"][0]
    ids = torch.full((1, 18), begin)
    for codes, said in [
        (torch.full((1, 16), 32), "codes are out of range; the media tokenizer has 32"),
        (torch.full((1, 16), -1), "codes are out of range"),
        (torch.zeros(1, 9, dtype=torch.long), r"codes have shape \(1, 9\); expected \(media, 16\)"),
        (torch.zeros(2, 16, dtype=torch.long), r"has \[18\] places by row for the codes of 2 media"),
    ]:
        with pytest.raises(InputError, match=said):
            model(ids, **{"image.codes": codes})


def test_memory_of_rows_is_theirs_alone(parts):
    """131,072 codes at the zoo's width: two matrices of rows, and no copy of them or of the model's in a forward."""
    llm = parts.language_model()
    grid = signal_tokens.Grid(131_072, [(0, 131_072)] * 4)
    signal = SignalTokens({}, llm.get_input_embeddings(), llm.get_output_embeddings(), grids={"image": grid})
    signal.set_ids({"image": [683, 684, 700]})
    width = llm.config.hidden_size
    assert sum(p.numel() for p in signal.parameters()) == 2 * (131_072 + 2) * width
    with torch.no_grad(), signal.attached(llm) as tap, torch.profiler.profile(profile_memory=True) as profile:
        tap.select = torch.tensor([0]), torch.tensor([1])
        logits = llm(inputs_embeds=llm.get_input_embeddings()(torch.tensor([[683, 131_771]]))).logits
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 4 * 131_072 * width / 10
    assert logits.shape == (1, 1, 131_772) and bool(logits[..., 700:].isfinite().all())


def test_saved_and_loaded(made, tmp_path):
    model, processor = made
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path)
    raw, _ = batch_of(model, processor)
    loaded = MultimodalProcessor.from_pretrained(tmp_path, model=again)
    other, _ = batch_of(again, loaded)
    assert {name: bool(torch.equal(raw[name], other[name])) for name in raw} == dict.fromkeys(raw, True)
    assert torch.equal(model(**raw).logits, again(**other).logits)
    assert again.config.tokenizers["video"]["modality"] == "video"
    assert again.output_modalities == again.input_modalities == ("text", "image", "video")
