"""A language model out of a GGUF file, written as llama.cpp's converter writes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import enlarge
from tiny_parts import TEXT
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from anygpt import InputError, load_language_model, load_tokenizer

gguf = pytest.importorskip("gguf")
SPECIAL = ["<s>", "</s>", "<unk>"]
TOKENS = [*bytes_to_unicode().values(), "re", "red", *SPECIAL]


def permuted(weight, heads):
    """llama.cpp's order of the rows that are rotated together."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(folder, model, left_out=(), packing=None):
    config = model.config
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - len(SPECIAL)) + [3] * len(SPECIAL))
    writer.add_token_merges(["r e", "re d"])
    for place, add in enumerate((writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id)):
        add(len(TOKENS) - len(SPECIAL) + place)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        kind = next((kind for kind in heads if kind in name), None)
        weight = tensor.numpy() if kind is None else permuted(tensor.numpy(), heads[kind])
        if name not in left_out:
            weight, packed = np.ascontiguousarray(weight), packing if weight.ndim == 2 else None
            weight = weight if packed is None else gguf.quants.quantize(weight, packed)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight, raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return enlarge(LlamaForCausalLM(LlamaConfig(**TEXT | {"vocab_size": len(TOKENS)}, tie_word_embeddings=False)))


def test_a_language_model_and_its_tokenizer(llama, tmp_path):
    write(tmp_path, llama)
    loaded, tokenizer = (load(tmp_path, gguf_file="tiny.gguf") for load in (load_language_model, load_tokenizer))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, llama.state_dict()[name]), name
    ids = tokenizer("a red circle", return_tensors="pt")["input_ids"]
    assert "red" in tokenizer.convert_ids_to_tokens(ids[0]) and "a red circle" in tokenizer.decode(ids[0])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, llama(ids).logits)


def test_a_quantized_file_becomes_a_plain_model(llama, tmp_path):
    """One that adapters train on and that is saved, as a model whose weights stay packed is not."""
    write(tmp_path, llama, packing=gguf.GGMLQuantizationType.Q8_0)
    loaded = load_language_model(tmp_path, gguf_file="tiny.gguf", dtype="float32")
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, llama.state_dict()[name], atol=0.01, rtol=0)
    loaded.save_pretrained(tmp_path / "saved")
    again = load_language_model(tmp_path / "saved")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert not getattr(loaded, "is_quantized", False)


def test_what_is_wrong_with_a_file_is_one_line(llama, tmp_path):
    write(tmp_path, llama, left_out=["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(InputError, match=r"tiny\.gguf .* it lacks model\.layers\.1\.mlp\.up_proj\.weight") as refusal:
        load_language_model(tmp_path, gguf_file="tiny.gguf")
    assert "\n" not in str(refusal.value)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds a PEFT adapter"):
        load_language_model(tmp_path, gguf_file="tiny.gguf")
    (tmp_path / "adapter_config.json").unlink()
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    (tmp_path / "other.gguf").write_bytes(b"something else")
    for name in ("cut", "other", "missing"):
        for load in (load_language_model, load_tokenizer):
            if (name, load) == ("cut", load_tokenizer):
                continue  # the tokenizer stands before the tensors
            with pytest.raises(InputError, match="cannot load the") as refusal:
                load(tmp_path, gguf_file=f"{name}.gguf")
            assert "\n" not in str(refusal.value)
