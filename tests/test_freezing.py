"""Freezing by part: gradients and modes are two things, and each part goes by itself."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from anygpt import InputError, ModalEncoderModule, MultimodalModel


def lora(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))


def test_freezing_by_part(tiny_model):
    model, _ = tiny_model(("image",), ("image",))
    parts = {
        "image_encoder": model.image_encoder.module,
        "image_projector": model.image_encoder.projector,
        "language_model": model.language_model,
        "signal_tokens": model.signal_tokens,
        "image_decoder": model.image_decoder.module.denoiser,
        "image_output_projector": model.image_decoder.projector,
    }
    for name, module in parts.items():
        assert model.train(name, mode=True) is model
        assert all(p.requires_grad for p in module.parameters()), name
        assert model.train(name, mode=False) is model
        assert not any(p.requires_grad for p in module.parameters()), name
        assert model.train() is model and model.training
        assert not any(m.training for m in module.modules()), f"{name} must stay in eval mode"
        model.train(name)
        assert all(m.training for m in module.modules()), name
    assert model.train(False) is model and not any(m.training for m in model.modules())
    assert model.train() is model and model.eval() is model and not model.training


def test_frozen_parts_stay_in_eval_mode_and_others_do_not(tiny_model):
    model, _ = tiny_model(("image",), ("image",))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.train()
    assert model.language_model.training and model.image_encoder.module.training
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}, "mode is not freezing"
    model.train("image_encoder", mode=False).train("language_model", mode=False)
    model.train()
    assert not model.language_model.training and not model.image_encoder.module.training
    assert model.image_encoder.projector.training


def test_a_decoder_comes_frozen_and_stays_in_eval_mode(tiny_model):
    """CLAP's text encoder has dropout: in training mode the captions' encodings would be noise."""
    model, _ = tiny_model((), ("audio",))
    model.train()
    assert not any(p.requires_grad for p in model.audio_decoder.module.parameters())
    assert not any(m.training for m in model.audio_decoder.module.modules())
    encode = model.audio_decoder.module.encode_text
    torch.testing.assert_close(encode(["a red ring"]), encode(["a red ring"]))


def test_unknown_part_lists_the_known_ones(tiny_model):
    model, _ = tiny_model(("image",), ())
    for part in ("non_existing_encoder", "image", "image_output_projector"):
        with pytest.raises(ValueError) as error:
            model.train(part, mode=False)
        for known in (repr(part), "image_encoder", "image_projector", "language_model", "signal_tokens"):
            assert known in str(error.value)
    with pytest.raises(InputError, match="no part 'smell'"):
        model.train_only(["smell"])


def test_unfreezing_a_peft_part_trains_its_adapters_only(parts):
    model = MultimodalModel({"image": ModalEncoderModule(lora(parts.encoder("image")))}, lora(parts.language_model()))
    model.train_only([])
    assert model.trainable_names() == []
    model.train_only(["image_encoder", "language_model", "image_projector"])
    names = model.trainable_names()
    assert names and all(".lora_" in n or n.startswith("image_encoder.projector.") for n in names)
    assert any(n.startswith("language_model.") for n in names) and any("image_encoder.module." in n for n in names)


def test_signal_tokens_are_independent_of_the_language_model(tiny_model):
    model, _ = tiny_model((), ("image",))
    model.train_only(["signal_tokens"])
    assert sorted(model.trainable_names()) == ["signal_tokens.input_rows.image", "signal_tokens.output_rows.image"]
    model.train_only(["language_model"])
    assert all(n.startswith("language_model.") for n in model.trainable_names())


def test_summary_counts_each_parameter(tiny_model):
    model, _ = tiny_model(("image",), ("image",), hidden_layer="mix")
    model.train_only(["image_output_projector"])
    summary = {line.part: line for line in model.summarize_parts()}
    assert sum(line.parameters for line in summary.values()) == sum(p.numel() for p in model.parameters())
    assert {p for p, line in summary.items() if line.trainable} == {"image_output_projector"}
    assert "image_decoder.layer_weights" in model.trainable_names()
