"""Conversion of the packages' weights to `from_pretrained` folders of transformers."""

import re
import shutil
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import EfficientNetConfig, EfficientNetModel, WhisperConfig, WhisperFeatureExtractor
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from anygpt.model.language_models import load_language_model, load_tokenizer


def convert_language_model(source: Path, target: Path) -> None:
    """SmolLM2-135M-Instruct from its 4-bit GGUF file, in bfloat16.

    The chat template loses its default system turn, which would be half of the tokens of a short question.
    """
    (file,) = source.rglob("*.gguf")
    load_language_model(file.parent, gguf_file=file.name, dtype="bfloat16").save_pretrained(target)
    tokenizer = load_tokenizer(file.parent, gguf_file=file.name)
    tokenizer.chat_template = re.sub(r"{% if loop\.first.*?{% endif %}", "", tokenizer.chat_template, flags=re.S)
    tokenizer.save_pretrained(target)


def convert_sentence_encoder(source: Path, target: Path) -> None:
    """MiniLM (all-MiniLM-L6-v2), which the package holds as transformers saves it."""
    (config,) = source.rglob("model/config.json")
    shutil.copytree(config.parent, target, dirs_exist_ok=True, ignore=lambda _, names: {"1_Pooling"} & {*names})


# ------------------------------------------------------------------------------------------------------- the pictures

_BLOCK = {  # lite0 names a block's three pairs of convolution and normalization by their order
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
_ENDS = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}


def convert_image_encoder(source: Path, target: Path) -> None:
    """EfficientNet-lite0, whose layers are those of EfficientNet-B0 with ReLU6 and without squeeze and excitation.

    transformers' network always multiplies by the latter: a gate with weights 0 and a bias of 100 is exactly 1.
    """
    (file,) = source.rglob("*.pth")
    found = torch.load(file, weights_only=True, map_location="cpu")
    network = EfficientNetModel(
        EfficientNetConfig(
            width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280, hidden_act="relu6"
        )
    )
    state = {}
    for name, tensor in found.items():
        if name.startswith("_fc."):
            continue
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        layer, end = name.rsplit(".", 1)
        state[f"encoder.blocks.{block[1]}.{_BLOCK[block[2]]}.{end}" if block else f"{_ENDS[layer]}.{end}"] = tensor
    for name, parameter in network.state_dict().items():
        if "squeeze_excite" in name:
            state[name] = torch.full_like(parameter, 100.0 if name.endswith("expand.bias") else 0.0)
    network.load_state_dict(state)
    network.save_pretrained(target)
    size = {"height": 224, "width": 224}
    EfficientNetImageProcessorPil(size=size, include_top=False).save_pretrained(target)


# --------------------------------------------------------------------------------------------------------- the sounds

_LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}


def convert_audio_encoder(source: Path, target: Path) -> None:
    """The encoder of Whisper tiny.en from CTranslate2's `model.bin`, with Whisper's feature extractor."""
    (file,) = source.rglob("model.bin")
    state = {}
    for name, tensor in read_ctranslate2(file).items():
        if not name.startswith("encoder/") or tensor.ndim == 0:
            continue
        where, end = name.removeprefix("encoder/").rsplit("/", 1)
        end = {"gamma": "weight", "beta": "bias", "encodings": "weight"}.get(end, end)
        layer = re.fullmatch(r"layer_(\d+)/(.+)", where)
        if layer and layer[2] == "self_attention/linear_0":  # query, key and value in one; Whisper's key has no bias
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                if (part, end) != ("k_proj", "bias"):
                    state[f"encoder.layers.{layer[1]}.self_attn.{part}.{end}"] = piece.clone()
        elif layer:
            state[f"encoder.layers.{layer[1]}.{_LAYER[layer[2]]}.{end}"] = tensor
        else:
            state[f"encoder.{where.replace('position_encodings', 'embed_positions')}.{end}"] = tensor
    width, mels = state["encoder.conv1.weight"].shape[:2]
    layers = 1 + max(int(name.split(".")[2]) for name in state if ".layers." in name)
    WhisperConfig(
        d_model=width,
        num_mel_bins=mels,
        encoder_layers=layers,
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=len(state["encoder.layers.0.fc1.bias"]),
        vocab_size=51864,
        architectures=["WhisperModel"],
        dtype="float16",
    ).save_pretrained(target)
    save_file(state, target / "model.safetensors", {"format": "pt"})
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(target)


_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_ctranslate2(path: Path) -> dict[str, torch.Tensor]:
    """All tensors by name of a model file of CTranslate2, of binary version 6 (the package's checksum is pinned)."""
    tensors = {}
    with path.open("rb") as file:
        _read(file, "<I"), _text(file), _read(file, "<I")  # the version; the architecture's name and revision
        for _ in range(*_read(file, "<I")):
            name, (rank,) = _text(file), _read(file, "B")
            shape, (kind, size) = _read(file, f"<{rank}I"), _read(file, "<BI")
            values = np.frombuffer(file.read(size), _DTYPES[kind])
            tensors[name] = torch.from_numpy(values.reshape(shape).copy())
    return tensors


def _read(file: BinaryIO, form: str) -> tuple:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _text(file: BinaryIO) -> str:
    return file.read(*_read(file, "<H")).rstrip(b"\0").decode()


CONVERSIONS = {
    "language_model": convert_language_model,
    "audio_encoder": convert_audio_encoder,
    "image_encoder": convert_image_encoder,
    "sentence_encoder": convert_sentence_encoder,
}
