"""Every language model with CLIP and a decoder: composed, forward, backward, generate, and no row heeds its padding."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import enlarge
from tiny_parts import CLIP, LANGUAGE_MODELS, LLAMA
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from anygpt import InputError, ModalDecoderModule, ModalEncoderModule, MultimodalModel, MultimodalProcessor
from anygpt.cache.text_states import TextStates, read_text
from anygpt.sequence import signal_tokens

TEXTS = ("<image> and <image> say", "then <image>", "nothing at all")
SEEDS = (0, 1, 2)


@pytest.fixture(params=LANGUAGE_MODELS, ids=lambda language_model: language_model.label)
def composed(request, parts):
    """A seeded model that reads and makes images, and its processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MultimodalModel(
            {"image": ModalEncoderModule(enlarge(CLIP.build(), 2.0))},
            enlarge(request.param.build()),
            {"image": ModalDecoderModule(parts.decoder("image"), num_signal_tokens=3)},
            init_output_projector_type="linear",
        ).eval()
    return model, MultimodalProcessor({"image": CLIP.build_processor()}, parts.tokenizer(), model=model)


def make_batch(processor, texts=TEXTS, seeds=SEEDS, side="right"):
    processor.llm_tokenizer.padding_side = side
    inputs = {"image": {"images": [CLIP.media(seed) for seed in seeds]}} if seeds else {}
    return processor(inputs, {"text": list(texts)})


def test_trains(composed):
    model, processor = composed
    span = "".join(processor.signal_tokens["image"])
    batch = make_batch(processor, [TEXTS[0] + span, TEXTS[1], TEXTS[2] + span])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels, decoder_targets={"image": {"captions": ["a red ring", "a cross"]}})
    output.loss.backward()
    for part in ("image_encoder", "image_projector", "language_model", "signal_tokens", "image_output_projector"):
        reached = [p.grad for p in model.part_parameters(part) if p.grad is not None]
        assert any(bool(grad.any()) for grad in reached), part
        assert all(grad.isfinite().all() for grad in reached), part


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_of_text_stand_for_the_layers(composed, side, monkeypatch):
    """Losses and gradients from the states of `read_text`, of rows read in another batch, are those of a whole pass."""
    model, processor = composed
    model.train_only(["signal_tokens", "image_output_projector"])
    model.signal_tokens.input_rows.requires_grad_(False)
    model.decoders["image"].hidden_layer = 1
    span = "".join(processor.signal_tokens["image"])
    texts = [f"draw {span} now", "nothing at all", f"{span} and {span}"]
    captions = ["a red ring", "a cross", "a blue star"]

    def step(**given):
        model.zero_grad()
        batch = make_batch(processor, texts, seeds=(), side=side)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        output = model(**batch, labels=labels, decoder_targets={"image": {"captions": captions}}, **given)
        output.loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return {name: term.total.detach() for name, term in output.losses.items()}, trained

    losses, gradients = step()
    rows = []
    for row in reversed(range(len(texts))):
        batch = make_batch(processor, texts[row : row + 1], seeds=())
        rows[:0] = read_text(model, batch["input_ids"], batch["attention_mask"], batch["input_ids"])
    states = TextStates.join(rows)
    assert len(states["image_decoder"]) == 3

    def fail(*_, **__):
        raise AssertionError("the layers ran")

    monkeypatch.setattr(type(model.language_model.get_decoder()), "forward", fail)
    from_states, their_gradients = step(text_states=states)
    torch.testing.assert_close(from_states, losses, rtol=1e-5, atol=1e-6)
    assert any(bool(gradient.any()) for gradient in gradients.values())
    torch.testing.assert_close(their_gradients, gradients, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="cannot be had from text_states"):
        step(text_states=states, return_logits=True)
    with pytest.raises(InputError, match="of other rows"):
        step(text_states=TextStates(states | {"head": states["head"][1:]}))
    with pytest.raises(AssertionError, match="the layers ran"):
        step()


def test_chunks_of_the_head_change_nothing(composed, monkeypatch):
    """Loss and gradients, of the head and the new rows too, where the logits of few labels are computed at a time."""
    model, processor = composed
    span = "".join(processor.signal_tokens["image"])
    batch = make_batch(processor, [TEXTS[0] + span, TEXTS[1], TEXTS[2] + span])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def step():
        model.zero_grad()
        output = model(**batch, labels=labels)
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return output.losses, gradients

    (losses, gradients), run_head, chunks = step(), signal_tokens.SignalTokens.run_head, []

    def noting(self, language_model, states):
        chunks.append(len(states))
        return run_head(self, language_model, states)

    monkeypatch.setattr(signal_tokens, "CHUNK", 5)
    monkeypatch.setattr(signal_tokens.SignalTokens, "run_head", noting)
    chunked = step()
    assert max(chunks) == 5 and sum(chunks) == 2 * sum(term.count for term in losses.values()), "and again backward"
    for name, term in losses.items():
        torch.testing.assert_close(chunked[0][name].total, term.total, rtol=1e-6, atol=1e-6)
    assert any(name.startswith("signal_tokens.output_rows") for name in gradients)
    torch.testing.assert_close(chunked[1], gradients, rtol=1e-5, atol=1e-6)


PEAK = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from anygpt import MultimodalModel

sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
model = MultimodalModel({}, LlamaForCausalLM(LlamaConfig(vocab_size=131072, tie_word_embeddings=True, **sizes)))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
before, ids = peak(), torch.randint(131072, (int(sys.argv[1]) // 256, 257))
model(ids, labels=ids).loss.backward()
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_of_the_head_does_not_grow_with_the_labels():
    """At a vocabulary of 128k, a step on 4,096 labels takes at most 1.2 times the memory of one on 512."""
    runs = [subprocess.run([sys.executable, "-c", PEAK, n], capture_output=True, text=True) for n in ("512", "4096")]
    few, many = (float(run.stdout) for run in runs)
    assert many <= 1.2 * few, f"{few:.0f} and {many:.0f} MiB"


def test_answers_in_text_and_images(composed):
    model, processor = composed
    batch = make_batch(processor, side="left")
    output = model.generate(
        **batch, max_new_tokens=8, require=["image"], decoder_kwargs={"image": {"num_inference_steps": 1}}
    )
    assert all(len(answer.images) >= 1 for answer in output.answers)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["inject", "prepend"])
def test_rows_do_not_heed_their_padding(composed, mode, side):
    model, processor = composed
    texts, per_row = TEXTS, (SEEDS[:2], SEEDS[2:], ())
    if mode == "prepend":
        model.set_token_ids(None)
        processor.injects = False
        texts = [text.replace("<image>", "") for text in TEXTS]
    processor.llm_tokenizer.padding_side = side

    def read(rows):
        images = [[CLIP.media(seed) for seed in per_row[row]] for row in rows]
        inputs = {"image": {"images": images}} if any(images) else {}
        batch = processor(inputs, {"text": [texts[row] for row in rows]})
        with torch.no_grad():
            output = model(**batch)
        kept = output.attention_mask.bool()
        return [logits[mask] for logits, mask in zip(output.logits, kept, strict=True)]

    for row, found in enumerate(read([0, 1, 2])):
        torch.testing.assert_close(found, read([row])[0], atol=1e-4, rtol=0)


def test_greedy_answers_do_not_heed_padding_either(composed):
    model, processor = composed
    options = {"max_new_tokens": 6, "forbid": ["image"], "eos_token_id": None}
    together = model.generate(**make_batch(processor, side="right"), **options).sequences
    alone = model.generate(**make_batch(processor, TEXTS[1:2], SEEDS[2:]), **options).sequences
    assert together[1].tolist() == alone[0].tolist()


def test_a_model_without_a_head_is_refused():
    with pytest.raises(InputError, match="LlamaModel has no language-model head; give a causal language model"):
        MultimodalModel({}, LLAMA.build().model)


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "electra", "rembert", "xlnet", "xlm", "bloom", "gpt_neox_japanese"]
)
def test_a_model_that_sees_later_tokens_is_refused(kind):
    own = {"xlnet": {"n_head": 2, "d_head": 8, "d_inner": 16}, "xlm": {"n_layers": 1, "emb_dim": 16}}
    config = CONFIG_MAPPING[kind](**SMALL | own.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config).train()
    if kind in ("bloom", "gpt_neox_japanese"):
        assert MultimodalModel({}, model).language_model.training
    else:
        with pytest.raises(InputError, match=f"{type(model).__name__} attends to later tokens"):
            MultimodalModel({}, model)
    if kind == "bert":
        config.is_decoder = True
        MultimodalModel({}, AutoModelForCausalLM.from_config(config))
