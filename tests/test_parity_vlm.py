"""Existing multimodal models in our parts: logits, loss and projector gradients as theirs, and the same answers."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
import transformers
from conftest import enlarge
from safetensors.torch import load_file, save_file
from tiny_parts import TEXT, VISION

from anygpt import InputError, MultimodalModel, load_language_model

IMAGE, AUDIO, PAD = 120, 121, 0
LENGTHS = (9, 14, 11)  # text tokens a row


def _llava_config(cls, **values):
    return cls(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        **values,
    )


def llava():
    model = transformers.LlavaForConditionalGeneration(_llava_config(transformers.LlavaConfig))
    return model, {"pixel_values": torch.randn(3, 3, 16, 16)}, [4, 4, 4]


def llava_of_several_layers():
    config = _llava_config(
        transformers.LlavaConfig, vision_feature_layer=[-2, -1], vision_feature_select_strategy="full"
    )
    config.multimodal_projector_bias = False
    model = transformers.LlavaForConditionalGeneration(config)
    return model, {"pixel_values": torch.randn(3, 3, 16, 16)}, [5, 5, 5]


def llava_next():
    config = _llava_config(transformers.LlavaNextConfig, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]])
    model = transformers.LlavaNextForConditionalGeneration(config)
    sizes = torch.tensor([[10, 40], [30, 30], [37, 21]])
    counts = [4 + rows * (columns + 1) for rows, columns in ((2, 4), (4, 4), (4, 2))]
    return model, {"pixel_values": torch.randn(3, 5, 3, 16, 16), "image_sizes": sizes}, counts


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=IMAGE + 3,
        vision_start_token_id=IMAGE + 4,
        vision_end_token_id=IMAGE + 5,
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    grids = torch.tensor([[1, 4, 6], [1, 2, 4], [1, 6, 2]])
    pixels = torch.randn(int(grids.prod(-1).sum()), 3 * 2 * 4 * 4)
    return model, {"pixel_values": pixels, "image_grid_thw": grids}, (grids.prod(-1) // 4).tolist()


def qwen2_audio():
    audio = transformers.Qwen2AudioEncoderConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=50,
    )
    config = transformers.Qwen2AudioConfig(
        audio_config=audio, text_config=transformers.Qwen2Config(**TEXT), audio_token_index=AUDIO
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    frames = torch.tensor([100, 61, 34])
    mask = (torch.arange(100) < frames[:, None]).long()
    counts = (((frames - 1) // 2 + 1 - 2) // 2 + 1).tolist()
    return model, {"input_features": torch.randn(3, 8, 100), "feature_attention_mask": mask}, counts


MODELS = [llava, llava_of_several_layers, llava_next, qwen2_vl, qwen2_audio]


def make(build):
    """A lively native model, ours of its parts, the media, and how many features each has."""
    torch.manual_seed(0)
    model, media, counts = build()
    model = enlarge(model.eval())
    return model, MultimodalModel.from_pretrained_multimodal_model(model), media, counts


def batch(counts, token, side, media_per_row=(1, 2, 0)):
    """Rows of text with media in it; `labels` on the second half of each row's text."""
    random = torch.Generator().manual_seed(1)
    rows, labels, items = [], [], iter(counts)
    for length, number in zip(LENGTHS, media_per_row, strict=False):
        text = torch.randint(3, 100, (length,), generator=random).tolist()
        row = text[:2]
        for n in (next(items) for _ in range(number)):
            row += [token] * n + [text[2]]
        row += text[2:]
        rows.append(row)
        labels.append([-100] * (len(row) - length // 2) + row[-(length // 2) :])
    longest = max(map(len, rows))

    def pad(values, fill):
        blank = [[fill] * (longest - len(v)) for v in values]
        return torch.tensor([b + v if side == "left" else v + b for v, b in zip(values, blank, strict=True)])

    return {
        "input_ids": pad(rows, PAD),
        "attention_mask": pad([[1] * len(row) for row in rows], 0),
        "labels": pad(labels, -100),
    }


def native_inputs(model, inputs):
    """What only the native class wants."""
    if model.config.model_type == "qwen2_vl":
        return {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}
    return {}


def native_projector(model):
    kind = model.config.model_type
    return model.model.visual.merger if kind == "qwen2_vl" else model.model.multi_modal_projector


def token_of(model):
    return AUDIO if model.config.model_type == "qwen2_audio" else IMAGE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_logits(build, side):
    native, ours, media, counts = make(build)
    inputs = batch(counts, token_of(native), side)
    del inputs["labels"]
    with torch.no_grad():
        expected = native(**inputs, **media, **native_inputs(native, inputs)).logits
        found = ours(**inputs, **media).logits
    kept = inputs["attention_mask"].bool()
    assert expected[kept].std() > 0.1  # or equality would say little
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_loss_and_projector_gradients(build, side):
    native, ours, media, counts = make(build)
    # every row has media, so that all rows are of one term, as the native loss is one mean
    inputs = batch(counts, token_of(native), side, media_per_row=(1, 2))
    expected = native(**inputs, **media, **native_inputs(native, inputs))
    found = ours(**inputs, **media)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=0)

    parameters = list(native_projector(native).parameters())
    key = ours.encoder_keys[0]
    shared = [p for p in ours.part_parameters(f"{key}_projector") if any(p is q for q in parameters)]
    assert len(shared) == len(parameters)
    extra = [p for p in ours.part_parameters(f"{key}_projector") if not any(p is q for q in parameters)]
    wanted = [*shared, *extra]
    for a, b in zip(torch.autograd.grad(found.loss, wanted), torch.autograd.grad(expected.loss, wanted), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_generation(build, beams):
    native, ours, media, counts = make(build)
    # transformers repeats Qwen2-Audio's sounds beam by beam, not row by row: wrong as soon as a row has several
    media_per_row = (1, 1, 1) if build is qwen2_audio and beams > 1 else (1, 2, 0)
    inputs = batch(counts, token_of(native), "left", media_per_row)
    del inputs["labels"]
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": PAD, "eos_token_id": 2}
    unsaid = {"suppress_tokens": [token_of(native)]}  # ours never says a placeholder
    expected = native.generate(**inputs, **media, **native_inputs(native, inputs), **options, **unsaid)
    found = ours.generate(**inputs, **media, **options).sequences
    new = expected[:, inputs["input_ids"].shape[1] :]
    assert found.tolist() == new.tolist()


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_saved_and_loaded_again(build, tmp_path):
    _, ours, media, counts = make(build)
    ours.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path)
    inputs = batch(counts, ours.token_ids[ours.encoder_keys[0]], "left")
    del inputs["labels"]
    with torch.no_grad():
        assert torch.equal(again(**inputs, **media).logits, ours(**inputs, **media).logits)


@pytest.mark.parametrize("ties", itertools.product((True, False, None), repeat=2), ids=str)
@pytest.mark.parametrize("build", [llava, qwen2_vl, qwen2_audio], ids=lambda build: build.__name__)
def test_embeddings_are_tied_as_natively_whatever_the_configs_say(build, ties, tmp_path):
    content = build()[0].config.to_dict()
    for part, tie in zip((content, content["text_config"]), ties, strict=True):
        part.pop("tie_word_embeddings", None)
        part |= {} if tie is None else {"tie_word_embeddings": tie}
    native = type(build()[0])
    native(native.config_class.from_dict(content)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    native, ours = native.from_pretrained(tmp_path), MultimodalModel.from_pretrained_multimodal_model(tmp_path)
    ours.save_pretrained(tmp_path / "saved")
    again = MultimodalModel.from_pretrained(tmp_path / "saved")
    for model in (ours.language_model, again.language_model, load_language_model(tmp_path)):
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == (
            native.lm_head.weight is native.get_input_embeddings().weight
        )
        assert torch.equal(model.lm_head.weight, native.lm_head.weight)


def test_from_a_folder(tmp_path):
    native, ours, media, counts = make(llava_next)
    native.save_pretrained(tmp_path)
    loaded = MultimodalModel.from_pretrained_multimodal_model(str(tmp_path)).eval()
    inputs = batch(counts, IMAGE, "right")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs, **media).loss, ours(**inputs, **media).loss)


def test_a_folder_is_taken_apart_only_if_whole(tmp_path):
    native, _, _, _ = make(llava)
    native.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    first = next(name for name in whole if "layers.1.mlp" in name)
    for change, text in (
        ({first: None}, f"lacks {first}"),
        ({first: whole[first][1:].clone()}, f"in another shape {first}"),
        ({"model.other": torch.ones(2)}, r"left over model\.other"),
    ):
        save_file({n: t for n, t in (whole | change).items() if t is not None}, file, {"format": "pt"})
        with pytest.raises(InputError, match=text):
            MultimodalModel.from_pretrained_multimodal_model(tmp_path)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot load the multimodal model"):
        MultimodalModel.from_pretrained_multimodal_model(tmp_path)


def test_taking_apart_leaves_the_model_as_it_was():
    native, _, media, counts = make(qwen2_vl)
    inputs = batch(counts, IMAGE, "left")
    inputs |= native_inputs(native, inputs) | media
    with torch.no_grad():
        before = native(**inputs).logits
        MultimodalModel.from_pretrained_multimodal_model(native)
        assert torch.equal(native(**inputs).logits, before)


def test_another_kind_of_model_is_refused():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    with pytest.raises(InputError, match="cannot take a 'llama' model apart; expected llava"):
        MultimodalModel.from_pretrained_multimodal_model(model)


def test_image_newline_trains_with_the_projector():
    _, ours, _, _ = make(llava_next)
    ours.train_only(["image_projector"])
    names = ours.trainable_names()
    assert "image_encoder.callbacks.image_newline" in names
    assert all(name.startswith(("image_encoder.projector.", "image_encoder.callbacks.")) for name in names)
    assert copy.deepcopy(ours).trainable_names() == names
