"""Tiny networks with random weights for the metrics, in folders as the hub has them, and data to ask about."""

from __future__ import annotations

import json

import numpy as np
import torch
import transformers
from PIL import Image
from tiny_parts import SIZE, VISION
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from anygpt.media.writing import write_audio, write_image, write_video

_SQUARE = {"height": SIZE, "width": SIZE}


def write_networks(folder, tokenizer_folder):
    """`clip`, `dino`, `videomae`, `clap`, `ast`, `owlvit`, `bert` under `folder`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    padding_side = tokenizer.padding_side
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        **ids,
    }
    clip_images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=_SQUARE)
    sounds = {"feature_size": 8, "sampling_rate": 16_000, "hop_length": 160, "fft_window_size": 400}
    networks = {
        "clip": (
            transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)),
            clip_images,
        ),
        "dino": (transformers.Dinov2Model(transformers.Dinov2Config(**VISION)), ViTImageProcessorPil(size=_SQUARE)),
        "videomae": (
            transformers.VideoMAEModel(transformers.VideoMAEConfig(**VISION, num_frames=4, tubelet_size=2)),
            VideoMAEImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=_SQUARE),
        ),
        "clap": (
            transformers.ClapModel(
                transformers.ClapConfig(
                    text_config=text | {"type_vocab_size": 1},
                    audio_config={
                        "spec_size": 32,
                        "num_mel_bins": 8,
                        "patch_size": 2,
                        "patch_stride": [2, 2],
                        "patch_embeds_hidden_size": 8,
                        "hidden_size": 16,
                        "depths": [1, 1],
                        "num_attention_heads": [2, 2],
                        "window_size": 4,
                    },
                    projection_dim=12,
                )
            ),
            transformers.ClapFeatureExtractor(**sounds, max_length_s=1, truncation="rand_trunc"),
        ),
        "ast": (
            transformers.ASTForAudioClassification(
                transformers.ASTConfig(
                    **{k: v for k, v in VISION.items() if k not in ("image_size", "patch_size")},
                    patch_size=8,
                    frequency_stride=8,
                    time_stride=8,
                    max_length=64,
                    num_mel_bins=32,
                    num_labels=5,
                )
            ),
            transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=64),
        ),
        "owlvit": (
            transformers.OwlViTForObjectDetection(
                transformers.OwlViTConfig(
                    text_config=text | {"max_position_embeddings": 16}, vision_config=VISION, projection_dim=16
                )
            ),
            OwlViTImageProcessorPil(size=_SQUARE, do_center_crop=False),
        ),
        "bert": (transformers.BertModel(transformers.BertConfig(**text)), None),
    }
    for name, (network, processor) in networks.items():
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() > 1:  # or random weights would hardly look at what they are given
                    parameter.mul_(4)
        network.eval().save_pretrained(folder / name)
        if processor is not None:
            processor.save_pretrained(folder / name)
        tokenizer.padding_side = "right" if name == "bert" else padding_side
        tokenizer.save_pretrained(folder / name)


def write_grounding_dino(folder):
    """A tiny Grounding DINO with random weights, which reads the words of its own vocabulary."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "cat", "dog", "couch"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    swin = {"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 2}
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(**swin, out_features=["stage2", "stage3", "stage4"]),
        text_config=transformers.BertConfig(vocab_size=len(words), **bert),
        num_queries=20,
        d_model=32,
        num_feature_levels=3,
        max_text_len=32,
        **sizes,
    )
    transformers.GroundingDinoForObjectDetection(config).eval().save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def picture(seed, size=24):
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((size, size), Image.Resampling.BILINEAR)


def clip(seed, frames=6, size=16):
    first = np.asarray(picture(seed, size))
    return np.stack([np.roll(first, number, axis=1) for number in range(frames)])


def sound(seed, seconds=0.5):
    time = np.arange(int(16_000 * seconds)) / 16_000
    return (0.4 * np.sin(2 * np.pi * (200 + 90 * seed) * time)).astype(np.float32)


def write_medium(folder, kind, seed):
    """A made-up medium; returns its file name."""
    name = f"{kind}-{seed}{ {'image': '.png', 'video': '.mp4', 'audio': '.wav'}[kind] }"
    writers = {
        "image": lambda path: write_image(path, picture(seed)),
        "video": lambda path: write_video(path, clip(seed), 8),
        "audio": lambda path: write_audio(path, sound(seed), 16_000),
    }
    writers[kind](folder / name)
    return name


def text(value):
    return {"type": "text", "text": value}


def write_rows(path, rows):
    """`[(the user's parts, the assistant's parts)]` as a data file."""
    lines = [
        {"id": str(i), "messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]}
        for i, (u, a) in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
