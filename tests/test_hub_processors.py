"""Processors out of whole models' folders, whose `preprocessor_config.json` has the form that it has at the hub.

The forms are those of Qwen/Qwen2-VL-2B-Instruct, Qwen/Qwen2.5-VL-3B-Instruct, Qwen/Qwen2-Audio-7B-Instruct,
OpenGVLab/InternVL3-1B-hf, google/gemma-3-4b-it, microsoft/Phi-4-multimodal-instruct (refs/pr/70) and
llava-hf/llava-v1.6-vicuna-7b-hf; only sizes are those of the tiny towers.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_parts import LLAMA, SIZE
from whole_models import WHOLE_MODELS

from anygpt import (
    InputError,
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProcessor,
    load_encoder,
    load_language_model,
    load_tokenizer,
)
from anygpt import load_encoder_processor as load_processor
from anygpt.encoders.families import FAMILIES, EncoderFamily

WHOLE = {whole.label: whole for whole in WHOLE_MODELS}
SQUARE = {"height": SIZE, "width": SIZE}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
STEPS = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 0.00392156862745098}
QWEN = {
    "min_pixels": 8 * 8, "max_pixels": 64 * 64, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, **CLIP,
    "image_processor_type": "Qwen2VLImageProcessor",
}  # fmt: skip
SETTINGS = {
    "Qwen2-VL": QWEN | {"processor_class": "Qwen2VLProcessor"},
    "Qwen2.5-VL": QWEN | {"processor_class": "Qwen2_5_VLProcessor"},
    "Qwen2-Audio": {
        "chunk_length": 1, "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8, "hop_length": 160,
        "n_fft": 400, "n_samples": 16000, "nb_max_frames": 100, "padding_side": "right", "padding_value": 0.0,
        "processor_class": "Qwen2AudioProcessor", "return_attention_mask": True, "sampling_rate": 16000,
    },
    "InternVL": STEPS | {
        "crop_size": None, "crop_to_patches": False, "data_format": "channels_first", "default_to_square": True,
        "device": None, "do_center_crop": None, "do_convert_rgb": True, "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "GotOcr2ImageProcessorFast", "image_std": [0.229, 0.224, 0.225],
        "input_data_format": None, "max_patches": 12, "min_patches": 1, "processor_class": "InternVLProcessor",
        "resample": 3, "return_tensors": None, "size": SQUARE,
    },
    "Gemma 3": STEPS | HALF | {
        "do_convert_rgb": None, "do_pan_and_scan": None, "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": 4, "pan_and_scan_max_num_crops": None, "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None, "processor_class": "Gemma3Processor", "resample": 2, "size": SQUARE,
    },
    "Phi-4": {
        "audio_compression_rate": 8, "audio_downsample_rate": 1, "audio_feat_stride": 1, "dynamic_hd": 36,
        "feature_extractor_type": "Phi4MultimodalFeatureExtractor", "feature_size": 80,
        "image_processor_type": "Phi4MultimodalImageProcessorFast", "padding_value": 0.0,
        "processor_class": "Phi4MultimodalProcessor", "sampling_rate": 16000,
    },
    "LLaVA-NeXT": STEPS | CLIP | {
        "aspect_ratio_setting": "anyres", "crop_size": SQUARE, "do_center_crop": True, "do_convert_rgb": True,
        "do_pad": True, "image_grid_pinpoints": [[SIZE, 2 * SIZE]], "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor", "resample": 3, "size": {"shortest_edge": SIZE},
    },
}  # fmt: skip


def media(modality):
    rng = np.random.default_rng(0)
    if modality == "audio":
        return [rng.standard_normal(16000 * length // 10).astype(np.float32) for length in (9, 4)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((20, 40), (24, 16))]


@pytest.mark.parametrize("label", SETTINGS)
def test_the_processor_of_a_whole_folder_suits_its_encoder(label, parts, tmp_path):
    whole = WHOLE[label]
    whole.save(whole.build(), tmp_path, "hub")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS[label]))
    encoder, processor = (load(tmp_path, whole.modality) for load in (load_encoder, load_processor))
    model = MultimodalModel({whole.modality: ModalEncoderModule(encoder)}, LLAMA.build()).eval()
    processor = MultimodalProcessor({whole.modality: processor}, parts.tokenizer(), model=model)
    modality = whole.modality
    token, given, batches = f"<{modality}>", media(modality), []
    options = {"raw_speech": given, "sampling_rate": 16000} if modality == "audio" else {"images": given}
    for chosen in (slice(0, 2), slice(0, 1), slice(1, 2)):
        inputs = options | {next(iter(options)): given[chosen]}
        batch = processor({modality: inputs}, {"text": [" and ".join([token] * len(given[chosen]))]})
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()
            features = model.encode({k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")})
        placeholders = int((batch["input_ids"] == model.token_ids[modality]).sum())
        assert placeholders == sum(map(len, features[modality]))
        batches.append(features[modality])
    if label == "Phi-4":  # its convolutions see the padding behind a shorter sound, in transformers too
        return
    for one, other in zip(batches[0], (batches[1][0], batches[2][0]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_code_of_a_repository_is_neither_run_nor_asked_for(tmp_path):
    phi4 = {"model_type": "phi4mm", "auto_map": {"AutoConfig": "configuration_phi4mm.Phi4MMConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(phi4))
    text = "describes a 'phi4mm' model, which transformers .* does not have; code of its repository is never run"
    for load in (load_language_model, lambda folder: load_encoder(folder, "audio")):
        with pytest.raises(InputError, match=text):
            load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}})
    )
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def test_a_waveforms_encoder_is_none_of_images(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "wav2vec2", EncoderFamily("input_values", None))
    transformers.Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    for modality in ("image", "video"):
        with pytest.raises(InputError, match=f"'wav2vec2' model does not read {modality}"):
            load_encoder(tmp_path, modality)


def test_an_encoder_of_another_medium_is_refused(tmp_path):
    for label, modality in (("Whisper", "image"), ("CLIP", "audio"), ("VideoMAE", "image"), ("LLaVA", "audio")):
        folder = tmp_path / label
        WHOLE[label].save(WHOLE[label].build(), folder, "today")
        with pytest.raises(InputError, match=f"model does not read {modality}"):
            load_encoder(folder, modality)


def test_a_processor_that_transformers_does_not_have_is_named(tmp_path):
    config = transformers.CLIPVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    settings = tmp_path / "preprocessor_config.json"
    settings.write_text(json.dumps({"image_processor_type": "OurImageProcessor"}))
    with pytest.raises(
        InputError, match=r"names the class OurImageProcessor, which this transformers does not have: name"
    ):
        load_processor(tmp_path, "image")
    transformers.WhisperConfig(d_model=16, encoder_attention_heads=2).save_pretrained(tmp_path)
    settings.write_text("{}")
    with pytest.raises(InputError, match="cannot load the image processor") as caught:
        load_processor(tmp_path, "image")
    assert len(str(caught.value)) < 700
