"""The zoo: tiny pretrained parts of the real classes, each an ordinary `from_pretrained` folder.

    image_encoder    CLIPVisionModel + CLIPImageProcessor      pixel_values (B, 3, 32, 32) -> (B, 17, 96)
    audio_encoder    WhisperEncoder + WhisperFeatureExtractor  input_features (B, 80, 100) -> (B, 50, 64)
    language_model   LlamaForCausalLM + tokenizer              hidden size 128, 4 layers
    image_decoder    StableDiffusionPipeline                   condition (B, 16, 64) -> 32×32 RGB
    video_decoder    TextToVideoSDPipeline                     condition (B, 16, 48) -> 8 frames of 32×32
    audio_decoder    AudioLDMPipeline                          condition (B, 32) -> 0.64 s at 16 kHz
    image_tokenizer  VQModel                                   32×32 RGB, or each frame of a clip -> 8×8 codes
    audio_tokenizer  VQModel                                   log-mels (audio_decoder's vocoder) -> 8×8 codes

Stage 0 trained them on ToyWorld (`scripts/build_zoo.py`); each folder's README.md gives the data and the results.
The files are in half precision and load as float32. The parts differ in size so that code that confuses them fails.
Their configs and tokenizers define the untrained parts, too, which training starts from.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from anygpt.media.writing import replacing
from anygpt.parts.source import ZOO
from anygpt.toyworld.language import caption, plain_caption
from anygpt.toyworld.world import THINGS

PARTS = (
    *("image_encoder", "audio_encoder", "language_model", "image_decoder", "video_decoder", "audio_decoder"),
    *("image_tokenizer", "audio_tokenizer"),
)
_NETWORKS = ("", "text_encoder", "unet", "vocoder", "vae")
"""Folders of networks in a part, in the order in which their weights are drawn."""
_EMBEDDING_GAIN = 50.0
"""Factor on the token embeddings of CLIP's text encoders, which are never trained. Positions and attention add little
to them, and an unseen pair of shape and colour is encoded as a sum of what both contribute elsewhere, with an error of
4 to 10% (15 to 37% at the usual size)."""
_ATTENTION_GAIN, _LEAST_VARIANCE = 3.0, 0.03
"""For `_whiten`: factor on the weights of CLAP's attention, least variance of a direction as a share of the largest."""


def zoo() -> Path:
    """The folder of the tiny pretrained parts that are shipped with the package."""
    return ZOO


def digest(folder: Path) -> str:
    """Hash of the files in a folder, without model cards."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


def write_untrained(folder: Path, seed: int = 0) -> Path:
    """Write all parts with random weights to `folder`, unless it exists; returns `folder`.

    The same seed gives the same bytes in every safetensors file. An existing folder is complete.
    """
    if folder.is_dir():
        return folder
    with replacing(folder) as temporary, torch.random.fork_rng(devices=[]):  # preserves the caller's random state
        for index, part in enumerate(PARTS):
            torch.manual_seed(seed * len(PARTS) + index)
            without = shutil.ignore_patterns("*.safetensors", "README.md", "anygpt_decoder.json")
            shutil.copytree(ZOO / part, temporary / part, ignore=without)
            for path in (temporary / part / name for name in _NETWORKS):
                if (path / "config.json").is_file():
                    _initialise(path).save_pretrained(path)
    return folder


@torch.no_grad()
def _initialise(folder: Path) -> Any:
    """The network of a folder's config.json, with weights from torch's global generator."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "_class_name" in settings:
        unscaled = {"scaling_factor": 1.0} if "scaling_factor" in settings else {}  # stage 0 measures it
        return getattr(diffusers, settings["_class_name"]).from_config(settings | unscaled)
    (name,) = settings["architectures"]
    network_type = WhisperEncoder if name == "WhisperEncoder" else getattr(transformers, name)
    network = network_type(network_type.config_class.from_dict(settings))
    if name == "CLIPTextModel":
        network.get_input_embeddings().weight.mul_(_EMBEDDING_GAIN)
    elif name == "ClapTextModelWithProjection":
        _whiten(network, transformers.AutoTokenizer.from_pretrained(folder.parent / "tokenizer"))
    elif name == "SpeechT5HifiGan":
        network.mean.fill_(-5.0)  # approximate statistics of log-mels, which lie between log(1e-5) and 1
        network.scale.fill_(4.0)
    return network


def _whiten(text_encoder: Any, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Set CLAP's last layer so that its caption embeddings have mean 0 and similar variance in all directions.

    AudioLDM's single condition vector must distinguish things, and must generalise to unseen pairs of shape and colour.
    Trained along with the denoiser, it distinguishes only. With small random weights it is nearly a sum over the words,
    which generalises, but nearly the same for all captions until it is whitened (arXiv 2103.15316). With attention
    weights three times as large they differ by 11% before that, in place of 1%, too little for bfloat16.
    """
    for layer in text_encoder.text_model.encoder.layer:
        layer.attention.self.value.weight.mul_(_ATTENTION_GAIN)
        layer.attention.output.dense.weight.mul_(_ATTENTION_GAIN)
    rng = np.random.default_rng(0)
    captions = [plain_caption(thing) for thing in THINGS]
    captions += [caption(thing, rng, modality="audio") for thing in THINGS for _ in range(8)]
    last = text_encoder.text_projection.linear2
    inputs: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    text_encoder.eval()(**tokenizer(captions, padding=True, return_tensors="pt"))
    hook.remove()
    features = inputs[0].double()
    variances, directions = torch.linalg.eigh(torch.cov(features.T, correction=0))
    # Directions of little variance are not a sum over the words; the floor keeps them small.
    weight = (variances + _LEAST_VARIANCE * variances.max()).rsqrt()[:, None] * directions.T
    last.weight.copy_(weight)
    last.bias.copy_(-weight @ features.mean(0))
