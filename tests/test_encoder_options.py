"""What a recipe says of an encoder: its layer, its class token, its processor's settings; and processors of models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import CLIP, ENCODERS, LLAMA, TEXT, VISION
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPVisionModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from anygpt import InputError, ModalEncoderModule, MultimodalModel, MultimodalProcessor, load_encoder
from anygpt.cache import reading as keys
from anygpt.encoders import fitting
from anygpt.encoders.loading import load_encoder_processor
from anygpt.encoders.video import VideoEncoder
from anygpt.media.types import MEDIA
from anygpt.tokenizers import load_media_tokenizer

TINY = {encoder.label: encoder for encoder in ENCODERS}


@pytest.fixture
def clip(tmp_path):
    """A folder of a CLIP tower and its processor."""
    CLIP.build().save_pretrained(tmp_path / "clip")
    CLIP.build_processor().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_callbacks_of_loading_are_not_dropped_for_functions(clip):
    encoder = load_encoder(clip, "image", feature_layer=-2, drop_cls=True)
    with pytest.raises(InputError, match="loaded with feature_layer"):
        ModalEncoderModule(encoder, postprocess_projector_callback=lambda inputs, output: output)
    ModalEncoderModule(load_encoder(clip, "image"), postprocess_projector_callback=lambda inputs, output: output)


def test_frames_are_read_by_known_encoders_at_one_layer(clip):
    with pytest.raises(InputError, match="'beit' is no supported encoder family"):
        VideoEncoder(BeitModel(BeitConfig(**VISION)), num_frames=2)
    with pytest.raises(InputError, match=r"feature_layer is \[-1, -2\]"):
        VideoEncoder(load_encoder(clip, "image"), feature_layer=[-1, -2])


def picture(width=40, height=20):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def compose(folder, modality, tokenizer, **options):
    encoder = load_encoder(folder, modality, **options)
    model = MultimodalModel({modality: ModalEncoderModule(encoder)}, LLAMA.build()).eval()
    processor = load_encoder_processor(folder, modality, **options)
    return model, MultimodalProcessor({modality: processor}, tokenizer, model=model)


def test_a_layer_without_the_class_token(clip, parts, tmp_path):
    model, processor = compose(clip, "image", parts.tokenizer(), feature_layer=-2, drop_cls=True)
    batch = processor({"image": {"images": [picture()]}}, {"text": ["see <image>"]})
    tower = CLIPVisionModel.from_pretrained(clip)
    with torch.no_grad():
        expected = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        found = model.image_encoder.encode({"pixel_values": batch["pixel_values"]})
    torch.testing.assert_close(found[0], expected[0])
    assert int((batch["input_ids"] == model.token_ids["image"]).sum()) == expected.shape[1]
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again = MultimodalModel.from_pretrained(tmp_path / "saved")
    rerun = MultimodalProcessor.from_pretrained(tmp_path / "saved")(
        {"image": {"images": [picture()]}}, {"text": ["see <image>"]}
    )
    assert rerun["input_ids"].tolist() == batch["input_ids"].tolist()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("pool", [True, False])
def test_a_layer_of_each_frame(pool, clip, parts, tmp_path):
    options = {"num_frames": 3, "feature_layer": -2, "drop_cls": True, "pool_frames": pool}
    model, processor = compose(clip, "video", parts.tokenizer(), **options)
    clips = np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), dtype=np.uint8)
    batch = processor({"video": {"videos": [clips]}}, {"text": ["see <video>"]})
    states = model.video_encoder.module(batch["pixel_values_videos"]).last_hidden_state
    assert states.shape[1] == (3 if pool else 3 * 4) == int((batch["input_ids"] == model.token_ids["video"]).sum())
    model.save_pretrained(tmp_path / "saved")
    assert MultimodalModel.from_pretrained(tmp_path / "saved").video_encoder.config.feature_layer == -2


def test_options_are_part_of_the_cache_key(clip, parts):
    found = []
    for options in ({}, {"feature_layer": -2}, {"drop_cls": True}, {"processor": {"do_center_crop": False}}):
        model, processor = compose(clip, "image", parts.tokenizer(), **options)
        (entry,) = [e for e in keys.entries(model) if e.kind == keys.FEATURES]
        found.append(keys.store_key(entry, model, processor, None, "no"))
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_processor_settings_replace_those_of_the_folder(clip):
    changed = load_encoder_processor(
        clip, "image", processor={"do_center_crop": False, "size": {"height": 8, "width": 8}}
    )
    assert changed(picture(), return_tensors="pt")["pixel_values"].shape == (1, 3, 8, 8)


def test_pictures_are_padded_to_a_square_as_in_llava(clip):
    processor, square = load_encoder_processor(clip, "image"), LlavaImageProcessorPil.from_pretrained(clip, do_pad=True)
    [[padded]] = fitting.pieces(MEDIA["image"], [picture()], processor, "pad")
    found, expected = (p(image, return_tensors="pt") for p, image in ((processor, padded), (square, picture())))
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    "options, text",
    [
        ({"processor": {"do_centre_crop": False}}, "processor has the unknown setting 'do_centre_crop'; known are"),
        ({"feature_layer": 9}, "feature_layer is 9, but the encoder has 2 layers"),
        ({"num_frames": 4}, "num_frames is set, but an encoder of image reads no clips"),
        ({"weight": "any"}, "a part has no option 'weight'; known are revision"),
        ({"weights": "pickle"}, "weights 'pickle' .* expected safetensors or any"),
        ({"feature": "tokens"}, "feature is 'tokens', but a 'clip_vision_model' encoder has no such choice"),
    ],
)
def test_wrong_options_are_refused(options, text, clip):
    with pytest.raises(InputError, match=text):
        load_encoder(clip, "image", **options)
        load_encoder_processor(clip, "image", **options)


@pytest.mark.parametrize("label", ["VideoMAE", "ImageBind"])
@pytest.mark.parametrize("options", [{"num_frames": 3}, {"pool_frames": False}], ids=str)
def test_settings_of_frames_without_effect_are_refused(options, label, tmp_path):
    encoder = next(e for e in ENCODERS if (e.label, e.modality) == (label, "video"))
    encoder.build().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"_frames is \w+, but this encoder reads clips in its own way"):
        load_encoder(tmp_path, "video", **options)
    own = getattr(encoder.config(), "num_frames", None)
    load_encoder(tmp_path, "video", num_frames=own)


def test_a_tokenizer_of_diffusers_has_no_choice_of_attention():
    with pytest.raises(InputError, match="attn_implementation is set, but a VQModel"):
        load_media_tokenizer("zoo:image_tokenizer", "image", attn_implementation="nonsense")


def test_no_class_token_to_drop(tmp_path):
    TINY["SigLIP"].build().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'siglip_vision_model' encoder has no class token"):
        load_encoder(tmp_path, "image", drop_cls=True)


@pytest.mark.parametrize("config", [LlavaConfig, LlavaNextConfig])
def test_llavas_own_selection_comes_with_its_tower(config, parts, tmp_path):
    whole = LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIP.config(), text_config=TEXT | VISION))
    whole.config = config(vision_config=CLIP.config(), text_config={**TEXT, **VISION, "model_type": "llama"})
    whole.save_pretrained(tmp_path)
    whole.config.save_pretrained(tmp_path)
    CLIP.build_processor().save_pretrained(tmp_path)
    model, processor = compose(tmp_path, "image", parts.tokenizer())
    assert model.image_encoder.callbacks.settings == {"feature_layer": -2, "select_strategy": "default"}
    batch = processor({"image": {"images": [picture()]}}, {"text": ["see <image>"]})
    assert int((batch["input_ids"] == model.token_ids["image"]).sum()) == 4
    model(**batch)


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("pooled", [True, False])  # False: the norm behind the last layer is no identity
def test_internvls_features_are_its_own(pooled, layer, tmp_path):
    vision = TINY["InternViT"].config().to_dict() | {"use_mean_pooling": pooled}
    settings = {"vision_feature_layer": layer, "downsample_ratio": 1.0, "text_config": {**TEXT, "model_type": "llama"}}
    whole = InternVLForConditionalGeneration(InternVLConfig(vision_config=vision, **settings)).eval()
    for name, parameter in whole.model.vision_tower.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    whole.save_pretrained(tmp_path)
    pixels, given = torch.randn(2, 3, 16, 16), []
    whole.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: given.extend(inputs[0]))
    with torch.no_grad():
        whole.get_image_features(pixels, output_hidden_states=True)
        found = ModalEncoderModule(load_encoder(tmp_path, "image")).encode({"pixel_values": pixels})
    assert torch.equal(torch.stack(found), torch.stack(given))


def test_dinov3_needs_no_torchvision(tmp_path):
    TINY["DINOv3 ViT"].build().save_pretrained(tmp_path)
    settings = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 16, "width": 16}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load_encoder_processor(tmp_path, "image")(picture())["pixel_values"][0].shape == (3, 16, 16)
