"""A merged model gives the logits of the one that it was made of: as a composition, and its language model alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import enlarge
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from anygpt import MultimodalModel, MultimodalProcessor, commands

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(parts, tied):
    rows = len(parts.tokenizer())
    config = LlamaConfig(vocab_size=rows, **SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
    return LlamaForCausalLM(config), ["q_proj", "down_proj"]


def padded_llama(parts):
    config = LlamaConfig(vocab_size=len(parts.tokenizer()) + 100, **SIZES, tie_word_embeddings=True)
    return LlamaForCausalLM(config), ["q_proj"]


def gemma2(parts):
    """Embeddings are scaled, logits capped."""
    sizes = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=len(parts.tokenizer()), **sizes)), ["q_proj"]


def gpt2(parts):
    """Linear maps stored the other way round."""
    config = GPT2Config(vocab_size=len(parts.tokenizer()), n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config), ["c_attn"]


FAMILIES = {
    "untied": lambda parts: llama(parts, False),
    "tied": lambda parts: llama(parts, True),
    "padded": padded_llama,
    "scaled and capped": gemma2,
    "transposed": gpt2,
}


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def adapted(request, parts, tiny_model):
    """A composition around an adapted language model, and its processor."""
    torch.manual_seed(0)
    base, targets = FAMILIES[request.param](parts)
    base = enlarge(base, 2.0)
    llm = get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False))
    return tiny_model(("image",), ("image",), language_model=llm)


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_merged_models_give_the_same_logits(adapted, media, tmp_path):
    model, processor = adapted
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "merged", merge=True)
    processor.save_pretrained(tmp_path / "merged")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "merged/adapters").exists()

    again = MultimodalModel.from_pretrained(tmp_path / "merged")
    assert not isinstance(again.language_model, PeftModel)
    span = "".join(processor.signal_tokens["image"])
    with_image = processor({"image": {"images": [media.image(0)]}}, {"text": f"<image> goes to this {span} and on"})
    for batch in (with_image, processor({}, {"text": f"so {span} it goes"})):
        torch.testing.assert_close(logits_of(again, batch), logits_of(model, batch), rtol=1e-4, atol=1e-4)

    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "merged/parts/language_model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged/parts/language_model")
    batch = tokenizer(f"so {span} it goes", return_tensors="pt")
    assert batch["input_ids"].tolist() == processor({}, {"text": f"so {span} it goes"})["input_ids"].tolist()
    ours, alone = logits_of(model, batch), logits_of(llm, batch)
    never_said = list(model.token_ids.values())
    said = [i for i in range(ours.shape[-1]) if i not in never_said]
    torch.testing.assert_close(alone[..., said], ours[..., said], rtol=1e-4, atol=1e-4)
    assert set(model.signal_tokens.ids["image"]) <= set(said)
    assert llm.generation_config.suppress_tokens == never_said


def test_merged_models_are_saved_and_merged_again(adapted, tmp_path):
    model, processor = adapted
    model.save_pretrained(tmp_path / "once", merge=True)
    processor.save_pretrained(tmp_path / "once")
    again = MultimodalModel.from_pretrained(tmp_path / "once")
    again.save_pretrained(tmp_path / "plain")
    again.save_pretrained(tmp_path / "twice", merge=True)
    batch = processor({}, {"text": "so " + "".join(processor.signal_tokens["image"])})
    for name in ("plain", "twice"):
        found = MultimodalModel.from_pretrained(tmp_path / name)
        torch.testing.assert_close(logits_of(found, batch), logits_of(again, batch), rtol=0, atol=0)


def test_the_script_merges_a_folder(parts, tiny_model, tmp_path, capsys):
    llm = get_peft_model(parts.language_model(lively=False), LoraConfig(target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    model, processor = tiny_model(("image",), ("image",), language_model=llm)
    model.save_pretrained(tmp_path / "final")
    processor.save_pretrained(tmp_path / "final")
    main = partial(commands.run, "merge-lora")
    arguments = ["--output", str(tmp_path / "merged"), "--checkpoint", str(tmp_path / "final")]
    assert main(arguments) == 0
    merged = MultimodalModel.from_pretrained(tmp_path / "merged")
    loaded = MultimodalProcessor.from_pretrained(tmp_path / "merged", model=merged)
    batch = loaded({}, {"text": "so " + "".join(processor.signal_tokens["image"])})
    torch.testing.assert_close(logits_of(merged, batch), logits_of(model, batch), rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "already exists" in said and len(said.splitlines()) == 1
