"""`retention`: the divergence of the language model from itself without adapters, against its formula and two runs."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_utils import argument_maker, cli_here, train_here, trained_tensors

from anygpt.errors import InputError
from anygpt.losses.formulas import LossWeights, kl_divergence
from anygpt.sequence import signal_tokens

TEXTS = ["just some text of a few words", "<image> is what?", "show me a circle: {image}", "other words"]


def test_divergence_is_its_formula():
    before, now = torch.randn(5, 11) * 3, torch.randn(5, 11) * 3
    expected = []
    for p, q in zip(before.double().tolist(), now.double().tolist(), strict=True):
        log_p, log_q = ([x - math.log(sum(map(math.exp, row))) for x in row] for row in (p, q))
        expected.append(sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True)))
    torch.testing.assert_close(
        kl_divergence(before, now).double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6
    )
    assert float(kl_divergence(now, now).abs().max()) < 1e-6
    assert kl_divergence(before.bfloat16(), now.bfloat16()).dtype == torch.float32


def test_a_token_that_cannot_be_said_counts_nothing():
    before, now = torch.randn(3, 7), torch.randn(3, 7, requires_grad=True)
    least = torch.finfo(torch.float32).min
    value = kl_divergence(before.index_fill(-1, torch.tensor([6]), least), now)
    value.sum().backward()
    share = now.detach().softmax(-1)[:, 6]
    among = kl_divergence(before[:, :6], now.detach()[:, :6])
    torch.testing.assert_close(value.detach(), among - torch.log1p(-share))  # q's probability of it is lost
    assert now.grad.isfinite().all()


@pytest.fixture
def adapted(tiny_model, parts):
    """A model whose adapters change what it says, with dropout, and its processor."""
    settings = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = get_peft_model(parts.language_model(), settings)
    model, processor = tiny_model(("image",), ("image",), language_model=network)
    model.loss_weights = LossWeights(retention=1.0, alignment=0.0)
    return model.eval(), processor


def make_batch(processor, media, texts, side="right"):
    processor.llm_tokenizer.padding_side = side
    span = "".join(processor.signal_tokens["image"])
    images = {"image": {"images": [media.image(0) for text in texts if "<image>" in text]}}
    given = [text.format(image=span) for text in texts]
    used = images if images["image"]["images"] else {}
    batch = processor(used, {"text": given, "padding": True})
    asked = batch["attention_mask"].cumsum(dim=1) <= 3
    batch["labels"] = batch["input_ids"].masked_fill(asked | (batch["attention_mask"] == 0), -100)
    return batch


def naive_retention(model, processor, media, text):
    """Sum of a row's divergences and their number, by two runs of the bare language model; no signal token in `p`."""
    batch = make_batch(processor, media, [text])
    with torch.no_grad(), model.signal_tokens.attached(model.language_model):
        embeds = model.get_input_embeddings()(batch["input_ids"])
        now = model.language_model(inputs_embeds=embeds).logits[0, :-1]
        with model.language_model.disable_adapter():
            before = model.language_model(inputs_embeds=embeds).logits[0, :-1]
    before[:, model.signal_tokens.ids["image"]] = -torch.inf
    kept = batch["labels"][0, 1:] != -100
    p, q = before[kept].double().softmax(-1), now[kept].double().softmax(-1)
    terms = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0)
    return float(terms.sum()), int(kept.sum())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("chunk", [512, 3])
def test_rows_of_text_alone_are_compared(adapted, media, monkeypatch, side, chunk):
    monkeypatch.setattr(signal_tokens, "CHUNK", chunk)
    model, processor = adapted
    output = model(**make_batch(processor, media, TEXTS, side))
    term = output.losses["llm/retention"]
    expected = [naive_retention(model, processor, media, text) for text in (TEXTS[0], TEXTS[3])]
    assert term.count == sum(count for _, count in expected)
    assert float(term.total) == pytest.approx(sum(value for value, _ in expected), rel=1e-4)
    assert float(term.total) > 0.1
    assert [name for name in output.losses if "retention" in name] == ["llm/retention"]
    assert model.count_losses(make_batch(processor, media, TEXTS, side)) == {
        n: t.count for n, t in output.losses.items()
    }


def test_only_rows_of_text_alone_are_run_again_and_only_adapters_learn(adapted, media):
    model, processor = adapted
    model.loss_weights = LossWeights(nll=0.0, alignment=0.0, retention=2.0)
    model.train_only(["language_model", "signal_tokens"])
    model.train()
    sizes = []
    layer = model.language_model.get_base_model().model.layers[0]
    hook = layer.register_forward_hook(lambda module, args, output: sizes.append((len(args[0]), module.training)))
    output = model(**make_batch(processor, media, TEXTS))
    hook.remove()
    assert [rows for rows, _ in sizes] == [4, 2]
    assert [training for _, training in sizes] == [True, False], "dropout is off in what is compared with"
    assert model.training and model.language_model.training
    assert float(output.loss) == pytest.approx(
        2 * float(output.losses["llm/retention"].total) / output.losses["llm/retention"].count
    )
    output.loss.backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    assert all("lora_" in name or name == "signal_tokens.output_rows.image" for name in learnt)
    assert any("lora_" in name for name in learnt) and "signal_tokens.output_rows.image" in learnt


def test_without_rows_of_text_nothing_is_run_again(adapted, media, monkeypatch):
    model, processor = adapted
    calls = []
    layer = model.language_model.get_base_model().model.layers[0]
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    output = model(**make_batch(processor, media, TEXTS[1:3]))
    assert len(calls) == 1 and not [name for name in output.losses if "retention" in name]
    # Of several processes, each runs one row, since a sharded model needs all of them.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    again = model(**make_batch(processor, media, TEXTS[1:3]))
    hook.remove()
    assert len(calls) == 3 and again.losses.keys() == output.losses.keys()


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["embed_tokens", "lm_head"]}]
)
def test_adapted_embeddings_are_left_out_too(tiny_model, parts, media, options):
    bare = parts.language_model()
    bare.config.tie_word_embeddings = False
    bare.lm_head.weight = torch.nn.Parameter(bare.lm_head.weight.detach().clone())
    given = {"target_modules": ["q_proj"], "init_lora_weights": False} | options
    network = get_peft_model(copy.deepcopy(bare), LoraConfig(**given))
    model, processor = tiny_model(("image",), ("image",), language_model=network)
    model.loss_weights = LossWeights(retention=1.0, alignment=0.0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=float(parameter.std()))
    batch = make_batch(processor, media, TEXTS[:1])
    kept = batch["labels"][0, 1:] != -100
    with torch.no_grad():
        before = bare(batch["input_ids"]).logits[0, :-1][kept]
        now = model(**batch, return_logits=True).logits[0, :-1][kept]
    wide = torch.full_like(now, -torch.inf)
    wide[:, : before.shape[1]] = before
    wide[:, model.signal_tokens.ids["image"]] = torch.finfo(torch.float32).min
    wide = wide.clamp(min=torch.finfo(torch.float32).min)
    expected = float(kl_divergence(wide, now).sum())
    assert float(model(**batch).losses["llm/retention"].total.detach()) == pytest.approx(expected, rel=1e-4)


def test_frozen_adapters_stay_frozen(adapted, media):
    model, processor = adapted
    model.train_only(["signal_tokens"])
    names = model.trainable_names()
    model.train()
    model(**make_batch(processor, media, TEXTS)).loss.backward()
    assert model.trainable_names() == names


def test_biases_that_cannot_be_undone_are_refused(tiny_model, parts, media):
    network = get_peft_model(parts.language_model(), LoraConfig(target_modules=["q_proj"], bias="lora_only"))
    model, processor = tiny_model(("image",), ("image",), language_model=network)
    model.loss_weights = LossWeights(retention=1.0)
    with pytest.raises(InputError, match=r"loss.retention cannot undo the biases"):
        model(**make_batch(processor, media, TEXTS[:1]))


def test_it_pulls_the_model_back(adapted, media):
    model, processor = adapted
    model.loss_weights = LossWeights(nll=0.0, alignment=0.0, retention=1.0)
    model.train_only(["language_model", "signal_tokens"])
    batch = make_batch(processor, media, [TEXTS[0], TEXTS[3]])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(20):
        loss = model(**batch).loss
        values.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.1 * values[0]


def test_a_model_without_adapters_is_refused(tiny_model, media):
    model, processor = tiny_model(("image",), ("image",))
    model.loss_weights = LossWeights(retention=1.0)
    with pytest.raises(InputError, match=r"loss.retention compares .* without its LoRA adapters, and it has none"):
        model(**make_batch(processor, media, TEXTS[:1]))


def test_a_run_keeps_its_english_and_one_without_adapters_is_refused(tmp_path_factory, tmp_path, capsys):
    arguments = argument_maker(tmp_path_factory)
    given = arguments(2, tmp_path / "refused", "--loss.retention=1", steps=1)
    code, lines = cli_here(2, given, capsys)
    assert code == 2 and "loss.retention compares" in lines[-1] and not (tmp_path / "refused").exists(), lines
    folders = [tmp_path / name for name in ("with", "without")]
    for folder, weight in zip(folders, (1, 0), strict=True):
        train_here(3, arguments(3, folder, f"--loss.retention={weight}", steps=2, batch_size=12))
    said = [(folder / "log.txt").read_text() for folder in folders]
    assert "llm/retention" in said[0] and "retention" not in said[1]
    first, second = (trained_tensors(folder / "final") for folder in folders)
    assert any(not torch.equal(first[name], second[name]) for name in first)
