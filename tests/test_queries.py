"""`signal: queries` (MetaQuery): a trigger is said, `N` learned input vectors follow it, and states are read there."""

import json

import pytest
import torch

from anygpt import ModalDecoderModule, MultimodalModel, MultimodalProcessor
from anygpt.errors import InputError
from anygpt.losses.formulas import LossWeights
from anygpt.sequence.signal_tokens import token_names
from anygpt.toyworld.datasets import write_dataset
from anygpt.training.config import Config, parse_config
from anygpt.training.stages import LLM_DECODER, prepare_stage
from anygpt.training.trainer import train

N = 3
SPAN = ["[IMG]", "[IMG0]", "[IMG1]", "[IMG2]"]
QUICK = {"decoder_kwargs": {key: {"num_inference_steps": 1} for key in ("image", "audio")}}


@pytest.fixture(scope="module")
def make(parts):
    """`make() -> (model, processor)`: queries for pictures, tokens for sounds."""

    def build():
        torch.manual_seed(0)
        decoders = {
            "image": ModalDecoderModule(parts.decoder("image"), num_signal_tokens=N, signal="queries"),
            "audio": ModalDecoderModule(parts.decoder("audio"), num_signal_tokens=2),
        }
        model = MultimodalModel({}, parts.language_model(), decoders, init_output_projector_type="linear")
        return model.eval(), MultimodalProcessor({}, parts.tokenizer(), model=model)

    return build


@pytest.fixture(scope="module")
def built(make):
    return make()


def tokenize(processor, texts, side="left", **options):
    return dict(processor(llm_inputs={"text": texts, "padding": True, "padding_side": side}, **options))


def batch_of(processor, texts, captions, side="left"):
    batch = tokenize(processor, texts, side, decoder_targets={"image": {"captions": captions}})
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


TEXTS = [f"show a ring {''.join(SPAN)} and a red square {''.join(SPAN)}", f"{''.join(SPAN)} a circle"]
CAPTIONS = ["a ring", "a red square", "a circle"]


def test_a_span_is_a_trigger_and_its_queries(built):
    model, processor = built
    assert token_names("image", N, "queries") == SPAN
    assert model.signal_tokens.input_rows["image"].shape[0] == 1 + N
    assert model.signal_tokens.output_rows["image"].shape[0] == 1
    ids = processor.llm_tokenizer.convert_tokens_to_ids(SPAN)
    assert model.signal_tokens.ids["image"] == ids and model.signal_tokens.query_ids == ids[1:]
    input_ids = tokenize(processor, TEXTS)["input_ids"]
    spans = model.signal_tokens.find_spans(input_ids, "image")
    assert spans.rows.tolist() == [0, 0, 1] and spans.positions.shape == (3, N)
    assert (input_ids[spans.rows[:, None], spans.positions] == torch.tensor(ids[1:])).all(), "the trigger is not read"


def test_states_are_those_of_vectors_written_by_hand(built):
    """The reference: the bare language model on embeddings with the rows put in by hand."""
    model, processor = built
    batch = processor(llm_inputs={"text": TEXTS[0]})
    ids = batch["input_ids"]
    embedding = model.language_model.get_input_embeddings()
    rows = dict(zip(model.signal_tokens.ids["image"], model.signal_tokens.input_rows["image"], strict=True))
    with torch.no_grad():
        embeds = torch.stack([rows[i] if i in rows else embedding.weight[i] for i in ids[0].tolist()])[None]
        hidden = model.language_model.model(inputs_embeds=embeds).last_hidden_state
        states = model.read_states(**batch)["image"]
    queries = [i for i, token in enumerate(ids[0].tolist()) if token in model.signal_tokens.query_ids]
    expected = (hidden + embeds)[0, queries].unflatten(0, (2, N))
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_nll_on_queries_but_on_the_trigger_and_on_what_follows(make, side):
    model, processor = make()
    batch = batch_of(processor, TEXTS, CAPTIONS, side)
    model.loss_weights = LossWeights(alignment=0, denoising=0)
    with torch.no_grad():
        output = model(**batch, return_logits=True)
        term = output.losses["llm_decoder/nll"]
    logits, labels = output.logits.double(), batch["labels"]
    queries = set(model.signal_tokens.query_ids)
    naive = [
        -logits[row, place - 1].log_softmax(-1)[labels[row, place]]
        for row in range(len(labels))
        for place in range(1, labels.shape[1])
        if labels[row, place] != -100 and batch["attention_mask"][row, place - 1]
        if int(labels[row, place]) not in queries
    ]
    assert term.count == len(naive) == model.count_losses(batch)["llm_decoder/nll"]
    torch.testing.assert_close(term.total.double(), sum(naive), rtol=1e-6, atol=1e-6)
    assert model.signal_tokens.ids["image"][0] in labels[:, 1:]


def test_alignment_reaches_the_query_rows(make):
    model, processor = make()
    model.train_only(["signal_tokens"])
    model.loss_weights = LossWeights(nll=0, denoising=0)
    model(**batch_of(processor, TEXTS, CAPTIONS)).loss.backward()
    rows = model.signal_tokens
    assert (rows.input_rows["image"].grad.abs().sum(dim=1) > 0).all(), "queries, and the trigger that they attend to"
    assert all(p.grad is None or not p.grad.any() for p in (rows.output_rows["image"], rows.input_rows["audio"]))


def test_frozen_queries_leave_the_trunk_without_a_graph(make):
    model, processor = make()
    model.train_only(["image_output_projector", "signal_tokens"])
    model.signal_tokens.input_rows.requires_grad_(False)
    output = model(**batch_of(processor, TEXTS, CAPTIONS))
    assert output.hidden_states.grad_fn is None and output.conditions["image"].grad_fn is not None


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "temperature": 5.0}])
def test_queries_are_never_said_and_follow_every_trigger(built, options):
    model, processor = built
    torch.manual_seed(4)
    batch = tokenize(processor, ["a picture, please", "and now another long one", "no"])
    output = model.generate(**batch, max_new_tokens=12, require=["image"], **options, **QUICK)
    span = model.signal_tokens.ids["image"]
    for row in output.sequences.tolist():
        starts = [i for i, token in enumerate(row) if token == span[0]]
        assert starts and all(row[i : i + 1 + N] == span for i in starts)
        assert sum(token in span[1:] for token in row) == N * len(starts)
    assert [len(images) for images in output.images] == [row.count(span[0]) for row in output.sequences.tolist()]


def test_logits_never_favour_a_query(built):
    model, processor = built
    batch = tokenize(processor, TEXTS)
    with torch.no_grad():
        logits = model(**batch).logits
    assert (logits[..., model.signal_tokens.query_ids] == torch.finfo(logits.dtype).min).all()


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_reads_the_states_of_a_teacher_forced_forward(built, num_beams):
    model, processor = built
    batch = tokenize(processor, ["a ring", "make a red square for me"])
    output = model.generate(
        **batch, max_new_tokens=14, num_beams=num_beams, require=["image", "audio"], eos_token_id=None, **QUICK
    )
    ids = torch.cat([batch["input_ids"], output.sequences], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(output.sequences)], dim=1)
    forced = model.read_states(ids, mask)
    for key in ("image", "audio"):
        segments = [segment for answer in output.answers for segment in answer.segments if segment.key == key]
        assert len(segments) == len(forced[key]) >= 2
        states = torch.stack([segment.states for segment in segments])
        assert states.shape[1] == (N if key == "image" else 2)
        torch.testing.assert_close(states, forced[key], rtol=0, atol=1e-5)


def test_save_and_load(built, tmp_path):
    model, processor = built
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = MultimodalModel.from_pretrained(tmp_path).eval(), MultimodalProcessor.from_pretrained(tmp_path)
    again.register(loaded)
    assert loaded.decoders["image"].signal == "queries" and loaded.decoders["audio"].signal == "tokens"
    assert loaded.signal_tokens.names == model.signal_tokens.names
    batch = batch_of(processor, TEXTS, CAPTIONS)
    same = batch_of(again, TEXTS, CAPTIONS)
    assert torch.equal(batch["input_ids"], same["input_ids"])
    with torch.no_grad():
        first, second = model(**batch), loaded(**same)
    assert torch.equal(first.conditions["image"], second.conditions["image"])


@pytest.mark.parametrize("signal_rows", ["both", "output", "none"])
def test_queries_train_with_the_output_rows(make, signal_rows):
    """They are input rows, and a decoder that reads queries has nothing else to learn in the language model."""
    model, _ = make()
    config = Config()
    config.train.signal_rows = signal_rows
    names = set(prepare_stage(model, LLM_DECODER, config))
    rows = {name.removeprefix("signal_tokens.") for name in names if name.startswith("signal_tokens.")}
    inputs = {"both": {"image", "audio"}, "output": {"image"}, "none": set()}[signal_rows]
    outputs = set() if signal_rows == "none" else {"image", "audio"}
    assert rows == {f"input_rows.{key}" for key in inputs} | {f"output_rows.{key}" for key in outputs}


def test_stage_2_by_an_override_in_the_configuration(tmp_path):
    rows = write_dataset(tmp_path / "data", "stage2", 6, seed=0)
    small = {"projection_type": "linear"}
    decoders = {f: {"path": f"zoo:{f}_decoder", "projector": small, "signal": "queries"} for f in ("image", "audio")}
    decoders["video"] = {"path": "zoo:video_decoder", "projector": small, "num_frames": 2}
    config = parse_config(
        [
            f"--run.output_dir={tmp_path / 'run'}",
            "--run.device=cpu",
            "--model.language_model.path=zoo:language_model",
            f"--model.decoders={json.dumps(decoders)}",
            f"--data.train={json.dumps([{'path': str(rows)}])}",
            "--train.max_steps=2",
            "--train.warmup_steps=0",
            "--train.batch_size=3",
        ]
    )
    model = MultimodalModel.from_pretrained(train(config, LLM_DECODER))
    assert {key: decoder.signal for key, decoder in model.decoders.items()} == {
        "image": "queries",
        "audio": "queries",
        "video": "tokens",
    }
    assert model.signal_tokens.input_rows["image"].shape[0] == 1 + 4


def test_another_signal_is_refused(parts):
    with pytest.raises(InputError, match="signal is 'query'; expected tokens or queries"):
        ModalDecoderModule(parts.decoder("image"), signal="query")
