"""`signal: codes`: the language model predicts a tokenizer's codes, and a decoder reads the states at them."""

import json

import numpy as np
import pytest
import torch
from code_utils import picture, turn, vq_model
from test_code_generation import prompts as prompted
from test_codes import resized
from training_utils import train_here

from anygpt import ModalDecoderModule, MultimodalModel, MultimodalProcessor
from anygpt.chat.chat_model import ChatModel, Settings
from anygpt.errors import InputError
from anygpt.tokenizers.base import MediaTokenizer
from anygpt.tokenizers.module import ModalTokenizerModule

N = 16
OPTIONS = {"image": {"num_inference_steps": 1, "seed": 0}}


def build(parts, tokenizer=None, **options):
    torch.manual_seed(0)
    tokenizer = tokenizer or ModalTokenizerModule(MediaTokenizer(vq_model(), "image"), defaults={"temperature": 0})
    decoder = ModalDecoderModule(parts.decoder("image"), signal="codes", **options)
    made = {"image": decoder}, {"image": tokenizer}
    model = MultimodalModel({}, parts.language_model(), *made, init_output_projector_type="linear").eval()
    return model, MultimodalProcessor({}, parts.tokenizer(), model=model)


@pytest.fixture(scope="module")
def built(parts):
    return build(parts)


def batch_of(processor, *talks):
    """Talks whose last message is an answer, which carries the labels, with captions as targets."""
    batch = dict(processor.apply_chat_template(list(talks), tokenize=True))
    asked = [processor.apply_chat_template([t[:-1]], tokenize=True)["input_ids"].shape[1] for t in talks]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, length in enumerate(asked):
        labels[row, :length] = -100
    return batch | {"labels": labels, "decoder_targets": {"image": {"captions": ["a ring"] * len(talks)}}}


TALKS = (
    [turn("user", picture(1), "Another!"), turn("assistant", "Here: ", picture(2))],
    [turn("user", "Draw a ring."), turn("assistant", picture(3))],
)


def test_conditions_are_the_states_at_the_answered_codes(built):
    """The reference: transformers' own model with resized matrices, on ids written by hand."""
    model, processor = built
    assert model.decoders["image"].num_signal_tokens == N and "image" not in model.signal_tokens.counts
    batch = batch_of(processor, *TALKS)
    output = model(**batch)
    codes = {"image.media": batch["image.media"]}
    ids, _, _ = model.write_codes(batch["input_ids"], None, codes)
    alone, (first, *_) = resized(model), model.signal_tokens.spans["image"]
    for row in range(2):
        own = ids[row][batch["attention_mask"][row].bool()]
        start = int((own == first).nonzero()[-1]) + 1
        with torch.no_grad():
            states = alone.model(own[None]).last_hidden_state[0]
            states = states + alone.get_input_embeddings()(own)
            expected = model.decoders["image"].condition(states[None, start : start + N]).embeds
        torch.testing.assert_close(output.conditions["image"][row], expected[0], atol=1e-4, rtol=1e-4)
    assert model.count_losses(batch) == {name: term.count for name, term in output.losses.items()}
    assert output.losses["encoder_decoder/alignment/image"].count == 1
    output.loss.backward()
    rows = model.signal_tokens.input_rows["image"].grad
    assert rows is not None and bool(rows[2:].any()), "the loss of the condition reaches the rows of codes"


@pytest.mark.parametrize("tokens", [24, 18])
def test_generated_media_are_the_decoders_from_states_as_in_training(built, tokens):
    """Also where the answer ends with the span, whose last code is still read."""
    model, processor = built
    prompts = [[turn("user", "Draw a ring.")], [turn("user", picture(1), "Draw it!")]]
    batch = prompted(processor, *prompts)
    options = {"max_new_tokens": tokens, "require": ["image"], "decoder_kwargs": OPTIONS}
    output = model.generate(**batch, **options)
    first = model.signal_tokens.ids["image"][-1]
    for row, answer in enumerate(output.answers):
        assert [s.type for s in answer.segments if s.type != "text"] == ["image"]
        assert answer.images[0].size == (32, 32), "the decoder's size, not the tokenizer's"
        said = output.sequences[row].tolist()
        start = said.index(model.signal_tokens.spans["image"][0]) + 1
        codes = torch.tensor([said[start : start + N]]) - first
        alone = prompted(processor, prompts[row])
        shown, ids = alone.pop("image.media", None), alone["input_ids"]
        if shown is not None:
            ids, _, _ = model.write_codes(ids, None, {"image.media": shown})
        whole = torch.cat([ids, output.sequences[row : row + 1, : start + N + 1]], dim=1)
        labels = whole.clone()
        labels[:, : ids.shape[1]] = -100
        assert whole[0, -N - 1 : -1].tolist() == (codes[0] + first).tolist()
        states = model.read_states(whole, labels=labels)["image"]
        segment = next(s for s in answer.segments if s.type == "image")
        torch.testing.assert_close(segment.states, states[0], atol=1e-4, rtol=1e-4)
    alone = model.generate(**prompted(processor, prompts[0]), **options)
    assert alone.answers[0].text == output.answers[0].text


def test_pictures_shown_as_codes_are_references_and_generators_may_be_a_list(parts):
    model, processor = build(parts, ModalTokenizerModule(MediaTokenizer(vq_model(), "image")))
    batch = prompted(processor, [turn("user", "Draw a ring.")], [turn("user", picture(1), picture(2), "Paint it red.")])
    first, second = batch["references"]["image"]
    assert first is None and second.tobytes() == picture(2).tobytes()
    made, several = [], [torch.Generator().manual_seed(seed) for seed in range(2)]
    for more in ({"seed": 0}, {"seed": 0, "strength": 0.5}, {"generator": several}):
        options = {"image": {"num_inference_steps": 2} | more}
        answers = model.generate(**batch, max_new_tokens=18, require=["image"], decoder_kwargs=options).answers
        made.append([np.asarray(answer.images[0], np.float32) for answer in answers])
    np.testing.assert_allclose(made[0][0], made[1][0], atol=2, err_msg="the row without a picture starts from noise")
    assert np.abs(made[0][1] - made[1][1]).max() > 10


def test_a_tokenizer_that_only_encodes_suffices(parts):
    class Encoding(MediaTokenizer):
        can_decode = False

    tokenizer = Encoding(vq_model(), "image")
    model, processor = build(parts, ModalTokenizerModule(tokenizer))
    batch = prompted(processor, [turn("user", "Draw!")])
    (answer,) = model.generate(**batch, max_new_tokens=24, require=["image"], decoder_kwargs=OPTIONS).answers
    assert len(answer.images) == 1


def test_trained_by_the_stages_and_loaded(tmp_path, parts):
    """Stage 2 gives a model of codes a decoder; what is saved answers as what was trained."""
    torch.manual_seed(0)
    MediaTokenizer(vq_model(size=8), "image").save_pretrained(tmp_path / "image")
    picture(2).save(tmp_path / "a.png")
    answer = [{"type": "text", "text": "Here:"}, {"type": "image", "path": "a.png", "caption": "a red ring"}]
    row = {"messages": [{"role": "user", "content": "Draw it."}, {"role": "assistant", "content": answer}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "first.yaml").write_text(f"""
model:
  language_model: {{path: "zoo:language_model"}}
  tokenizers: {{image: {{path: {tmp_path}/image, defaults: {{temperature: 0}}}}}}
data: {{train: [{{path: {tmp_path}/rows.jsonl}}]}}
run: {{tracker: none, output_dir: {tmp_path}/first, device: cpu}}
train: {{batch_size: 1, max_steps: 40, learning_rate: 3.0e-3, learning_rates: {{signal_tokens: 1.0e-2}}}}
lora: {{r: 0}}
""")
    (tmp_path / "second.yaml").write_text(f"""
model:
  init_from: {tmp_path}/first/final
  decoders: {{image: {{path: "zoo:image_decoder", signal: codes, projector: {{projection_type: linear}}}}}}
data: {{train: [{{path: {tmp_path}/rows.jsonl}}]}}
run: {{tracker: none, output_dir: {tmp_path}/second, device: cpu}}
train: {{batch_size: 1, max_steps: 2, learning_rate: 1.0e-6, projector_init: ridge, signal_rows: none}}
loss: {{alignment_kind: mse, denoising: 1}}
""")
    train_here("all_at_once", ["--config", str(tmp_path / "first.yaml")])
    train_here(2, ["--config", str(tmp_path / "second.yaml")])
    chat = ChatModel(tmp_path / "second/final")
    reply = chat.answer([{"role": "user", "content": "Draw it."}], Settings(max_new_tokens=30)).answer
    (segment,) = [segment for segment in reply.segments if segment.type == "image"]
    decoder = chat.model.decoders["image"].module
    torch.testing.assert_close(segment.condition, decoder.encode_text(["a red ring"])[0], atol=0.1, rtol=0.1)
    assert segment.content.size == (32, 32) and reply.text == "Here:"


@pytest.mark.parametrize(
    ("options", "tokenizers", "said"),
    [
        ({}, {}, "expected a media tokenizer of the same key and media type, but there is none"),
        ({}, {"image": "video"}, "but there is one of video"),
        ({"num_signal_tokens": 4}, {"image": "image"}, "has 4 signal tokens; its codes are 16"),
        ({"signal": "tokens"}, {"image": "image"}, "or give the decoder signal='codes'"),
    ],
)
def test_what_does_not_fit_is_refused(parts, options, tokenizers, said):
    decoder = ModalDecoderModule(parts.decoder("image"), **{"signal": "codes"} | options)
    made = {
        k: MediaTokenizer(vq_model(), m, **({"num_frames": 2} if m == "video" else {})) for k, m in tokenizers.items()
    }
    with pytest.raises(InputError, match=said):
        MultimodalModel({}, parts.language_model(), {"image": decoder}, made)
