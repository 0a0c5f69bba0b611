"""The zoo: tiny pretrained parts of the real classes, each an ordinary `from_pretrained` folder.

    image_encoder    CLIPVisionModel + CLIPImageProcessor      pixel_values (B, 3, 32, 32) -> (B, 17, 96)
    audio_encoder    WhisperEncoder + WhisperFeatureExtractor  input_features (B, 80, 100) -> (B, 50, 64)
    language_model   LlamaForCausalLM + tokenizer              hidden size 128, 4 layers
    image_decoder    StableDiffusionPipeline                   condition (B, 16, 64) -> 32×32 RGB
    video_decoder    TextToVideoSDPipeline                     condition (B, 16, 48) -> 8 frames of 32×32
    audio_decoder    AudioLDMPipeline                          condition (B, 32) -> 0.64 s at 16 kHz

Stage 0 trained them on ToyWorld (`scripts/build_zoo.py`); each folder's README.md gives the data and the results.
The files are in half precision and load as float32. The untrained parts are defined in `parts.py`.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anygpt.parts.source import ZOO

logger = logging.getLogger(__name__)

PARTS = ("image_encoder", "audio_encoder", "language_model", "image_decoder", "video_decoder", "audio_decoder")


def zoo() -> Path:
    """The folder of the tiny pretrained parts that are shipped with the package."""
    return ZOO


def write_untrained(folder: Path, seed: int = 0) -> Path:
    """Write all parts with random weights to `folder`, unless it exists; returns `folder`.

    The same seed gives the same bytes in every safetensors file. The parts are written under a temporary name and
    renamed, so an existing folder is complete, and concurrent processes do not disturb each other.
    """
    folder = Path(folder)
    if folder.is_dir():
        return folder

    import torch  # imported here, since it takes seconds and an existing zoo does not need it

    from anygpt.toyworld import parts

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        # fork_rng preserves the caller's random state.
        with _quiet_libraries(), torch.random.fork_rng(devices=[]):
            for index, name in enumerate(PARTS):
                logger.info("Building the tiny %s", name)
                torch.manual_seed(seed * len(PARTS) + index)
                getattr(parts, f"save_{name}")(temporary / name)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster and wrote the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silence the libraries' progress bars and deprecation notes (deprecated pipelines are used on purpose)."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (transformers_logging, diffusers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
