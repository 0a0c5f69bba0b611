"""Tiny media tokenizers, and models that read and write their codes."""

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image

from anygpt import MultimodalModel, MultimodalProcessor
from anygpt.tokenizers.base import MediaTokenizer
from anygpt.tokenizers.module import ModalTokenizerModule


def vq_model(codes=32, size=16, channels=3):
    """A grid of `size / 4` squared."""
    blocks = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    sizes = {"latent_channels": 8, "num_vq_embeddings": codes, "norm_num_groups": 8, "sample_size": size}
    return VQModel(channels, channels, *blocks, (8, 8, 8), **sizes)


def code_model(parts, keys=("image",), row_ends=False, seed=0, **defaults):
    """The zoo's language model with tokenizers of pictures and clips (of two frames), and the processor."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizers = {"image": MediaTokenizer(vq_model(), "image")} if "image" in keys else {}
        if "video" in keys:
            tokenizers["video"] = MediaTokenizer(vq_model(48), "video", num_frames=2)
        modules = {key: ModalTokenizerModule(one, row_ends, defaults) for key, one in tokenizers.items()}
        model = MultimodalModel({}, parts.language_model(), tokenizers=modules).eval()
    return model, MultimodalProcessor({}, parts.tokenizer(), model=model)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))


def clip(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)


def turn(role, *content):
    """A message of texts, pictures and clips."""
    kinds = {str: "text", np.ndarray: "video", Image.Image: "image"}
    return {"role": role, "content": [{"type": kinds[type(one)], kinds[type(one)]: one} for one in content]}
