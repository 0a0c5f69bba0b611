"""Signal tokens: their rows, their spans, and that the language model itself is left as it is."""

import copy

import pytest
import torch
from conftest import enlarge
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from anygpt.errors import InputError
from anygpt.sequence.signal_tokens import SignalTokens, token_names

V, H = 40, 16


def llama(tied=False, vocab=V):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=H,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return enlarge(LlamaForCausalLM(config).eval())


def gemma():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=2.0,
        pad_token_id=0,
    )
    return enlarge(Gemma2ForCausalLM(config).eval())


def lora(model):
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))


def tokens_for(model, ids, count=3):
    torch.manual_seed(1)
    signals = SignalTokens({"image": count}, model.get_input_embeddings(), model.get_output_embeddings())
    signals.set_ids({"image": ids})
    return signals


MODELS = {"untied": llama, "tied": lambda: llama(tied=True), "softcap": gemma, "lora": lambda: lora(llama())}
PLACES = {"inside": [35, 36, 37], "beyond": [43, 44, 45], "both": [39, 40, 41], "scattered": [45, 38, 41]}


def test_names():
    assert token_names("image", 2) == ["[IMG0]", "[IMG1]"]
    assert token_names("video", 1) + token_names("audio", 1) == ["[VID0]", "[AUD0]"]
    assert token_names("depth", 1) == ["[DEPTH0]"]


def test_new_rows_differ_and_look_like_the_models_own():
    model = llama()
    signals = tokens_for(model, [43, 44, 45])
    for rows, matrix in (
        (signals.input_rows["image"], model.get_input_embeddings().weight),
        (signals.output_rows["image"], model.get_output_embeddings().weight),
    ):
        assert rows.shape == (3, H)
        assert torch.pdist(rows).min() > 0.1 * torch.pdist(matrix).mean()
        assert 0.3 < rows.std() / matrix.std() < 3


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", MODELS)
def test_model_computes_as_with_rows_written_into_its_matrices(kind, place):
    """The reference: a copy whose matrices are enlarged, with the rows written in at their ids."""
    ids = PLACES[place]
    model = MODELS[kind]()
    signals = tokens_for(model, ids)
    text = torch.tensor([[5, 6, *ids, 7, 8]])
    with torch.no_grad():
        with signals.attached(model) as tap:
            ours = model(input_ids=text).logits
        inner = copy.deepcopy(model.get_base_model() if kind == "lora" else model)
        size = max(V, max(ids) + 1)
        table = torch.zeros(size, H)
        table[:V] = inner.get_input_embeddings().weight
        head = torch.zeros(size, H)
        head[:V] = inner.get_output_embeddings().weight
        table[ids], head[ids] = signals.input_rows["image"], signals.output_rows["image"]
        inner.get_input_embeddings().weight = torch.nn.Parameter(table)  # Gemma's embedding also scales
        inner.lm_head = torch.nn.Linear(H, size, bias=False)
        inner.lm_head.weight.copy_(head)
        theirs = inner(input_ids=text).logits
    assert ours.shape == (1, 7, size)
    gap = [i for i in range(V, size) if i not in ids]
    known = [i for i in range(size) if i not in gap]
    torch.testing.assert_close(ours[..., known], theirs[..., known])
    assert tap.hidden.shape == (1, 7, H)
    if gap:
        # Nobody's ids are never more likely than the least likely of all others.
        assert (ours[..., gap].amax(-1) <= ours[..., known].amin(-1)).all()
        if kind != "softcap":
            assert ours.softmax(-1)[..., gap].sum() == 0


@pytest.mark.parametrize("kind", MODELS)
def test_ordinary_tokens_are_untouched_and_hooks_are_gone_afterwards(kind):
    model = MODELS[kind]()
    signals = tokens_for(model, [43, 44, 45])
    state = copy.deepcopy(model.state_dict())
    text = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(input_ids=text).logits
        with signals.attached(model):
            inside = model(input_ids=text).logits
        after = model(input_ids=text).logits
    torch.testing.assert_close(inside[..., :V], before, rtol=0, atol=1e-6)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_hooks_go_when_the_block_fails():
    model = llama()
    with pytest.raises(RuntimeError, match="inside"), tokens_for(model, [43, 44, 45]).attached(model):
        raise RuntimeError("inside")
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("kind", MODELS)
def test_only_the_rows_get_gradients(kind):
    model = MODELS[kind]()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    signals = tokens_for(model, [39, 40, 41])
    with signals.attached(model):
        logits = model(input_ids=torch.tensor([[5, 39, 40, 41, 6]])).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor([39, 40, 41, 6])).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    for rows in (signals.input_rows["image"], signals.output_rows["image"]):
        assert (rows.grad.abs().sum(dim=1) > 0).all(), "every row is used"


def test_logits_only_at_selected_places():
    model = gemma()
    signals = tokens_for(model, [43, 44, 45])
    text = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad(), signals.attached(model) as tap:
        full = model(input_ids=text).logits
        tap.select = (torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1]))
        some = model(input_ids=text).logits
    torch.testing.assert_close(some, full[[0, 1, 1], [2, 0, 1]][None])


def test_spans_are_found_in_row_major_order():
    signals = tokens_for(llama(), [43, 44, 45])
    ids = torch.tensor([[43, 44, 45, 1, 43, 44, 45], [1, 2, 3, 4, 5, 6, 7], [1, 1, 43, 44, 45, 1, 1]])
    spans = signals.find_spans(ids, "image")
    assert spans.rows.tolist() == [0, 0, 2]
    assert spans.positions.tolist() == [[0, 1, 2], [4, 5, 6], [2, 3, 4]]
    states = torch.arange(21.0).reshape(3, 7, 1)
    assert spans.gather(states)[..., 0].tolist() == [[0, 1, 2], [4, 5, 6], [16, 17, 18]]
    assert len(signals.find_spans(ids[1:2], "image")) == 0


@pytest.mark.parametrize(
    "row",
    [
        [1, 43, 44, 1, 1, 1],  # ends too early
        [1, 1, 1, 1, 43, 44],  # cut off by the end of the row
        [1, 44, 45, 1, 1, 1],  # no beginning
        [43, 45, 44, 1, 1, 1],  # out of order
        [43, 43, 44, 45, 1, 1],  # begun twice
        [43, 44, 45, 45, 1, 1],  # one too many
        [43, 44, -1, 45, 1, 1],  # interrupted
    ],
)
def test_broken_spans_are_refused_with_their_row(row):
    signals = tokens_for(llama(), [43, 44, 45])
    good = [43, 44, 45, 43, 44, 45]
    with pytest.raises(InputError, match=r"row 1 .*'image'.*3 tokens \[IMG0\] \[IMG1\] \[IMG2\]"):
        signals.find_spans(torch.tensor([good, row]), "image")


def test_single_token_spans():
    signals = tokens_for(llama(), [43], count=1)
    assert signals.find_spans(torch.tensor([[43, 43, 1]]), "image").positions.tolist() == [[0], [1]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"image": [1, 2]}, "3 signal tokens, but 2 ids"),
        ({"image": [1, 2, 2]}, "must all differ"),
        ({"video": [1, 2, 3]}, "expected .'image'."),
        ({}, "expected .'image'."),
    ],
)
def test_wrong_ids_are_refused(ids, message):
    with pytest.raises(InputError, match=message):
        tokens_for(llama(), [43, 44, 45]).set_ids(ids)


def test_zero_tokens_are_refused():
    model = llama()
    with pytest.raises(InputError, match="num_signal_tokens=0"):
        SignalTokens({"image": 0}, model.get_input_embeddings(), model.get_output_embeddings())


def test_rows_in_a_half_precision_model():
    model = llama().to(torch.bfloat16)
    signals = tokens_for(model, [43, 44, 45])
    assert signals.input_rows["image"].dtype == torch.float32
    with signals.attached(model):
        logits = model(input_ids=torch.tensor([[43, 44, 45, 1]])).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
