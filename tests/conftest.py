"""What the tests share: the tiny zoo's parts with random weights, loaded once and copied, and small media."""

from __future__ import annotations

import copy
import gc
import os
import time
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: no test may need the hub
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import numpy as np
import pytest
import torch
from PIL import Image
from training_utils import shared

from anygpt import (
    ModalDecoderModule,
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProcessor,
    load_decoder,
    load_encoder,
    load_encoder_processor,
    load_language_model,
    load_tokenizer,
)
from anygpt.parts.source import Source
from anygpt.toyworld import write_untrained

gc.freeze()  # each run of a stage collects, and looked at the million objects of the libraries for a third of a second

SIGNAL_TOKENS = {"image": 4, "video": 3, "audio": 2}


class Parts:
    """The zoo's parts by name, untrained; every call gives a fresh copy of what was loaded once."""

    def __init__(self, folder):
        self.folder = folder
        self._loaded = {}

    def source(self, name, **settings):
        return Source(str(self.folder / name), **settings)

    def _copy(self, name, load):
        if name not in self._loaded:
            self._loaded[name] = load()
        return copy.deepcopy(self._loaded[name])

    def language_model(self, lively=True):
        """`lively`: weights four times as large, or random ones would hardly look at their context."""
        model = self._copy("llm", lambda: load_language_model(self.source("language_model")).eval())
        if lively:
            enlarge(model)
            model.anygpt_source = None  # it is no longer what lies there
        return model

    def tokenizer(self):
        return self._copy("tokenizer", lambda: load_tokenizer(self.source("language_model")))

    def encoder(self, modality):
        return self._copy(f"{modality}_encoder", lambda: load_encoder(self._encoder(modality), modality).eval())

    def processor(self, modality):
        return self._copy(f"{modality}_processor", lambda: load_encoder_processor(self._encoder(modality), modality))

    def decoder(self, modality):
        return self._copy(f"{modality}_decoder", lambda: load_decoder(self.source(f"{modality}_decoder")))

    def _encoder(self, modality):
        return self.source("image_encoder", num_frames=4) if modality == "video" else self.source(f"{modality}_encoder")


def enlarge(model, factor=4.0):
    """Scale all matrices of a model of random weights, so that its outputs depend on its inputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model


@pytest.fixture(autouse=True)
def cpu_seconds(request):
    """Fails a test that is marked with a limit and exceeds it."""
    begun, limit = time.process_time(), request.node.get_closest_marker("cpu_seconds")
    yield
    assert limit is None or time.process_time() - begun < limit.args[0]


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    return Parts(shared(tmp_path_factory, "untrained", lambda folder: write_untrained(folder / "parts")) / "parts")


@pytest.fixture(scope="session")
def tiny_model(parts):
    """`tiny_model(encoders=…, decoders=…) -> (model in eval mode, processor)`, fresh and seeded at each call."""

    def make(
        encoders=("image", "video", "audio"),
        decoders=("image", "video", "audio"),
        *,
        language_model=None,
        tokenizer=None,
        hidden_layer=-1,
        num_signal_tokens=SIGNAL_TOKENS,
        seed=0,
        **options,
    ):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = MultimodalModel(
                {key: ModalEncoderModule(parts.encoder(key)) for key in encoders},
                parts.language_model() if language_model is None else language_model,
                {
                    key: ModalDecoderModule(
                        parts.decoder(key), num_signal_tokens=num_signal_tokens[key], hidden_layer=hidden_layer
                    )
                    for key in decoders
                },
                **{"init_output_projector_type": "linear"} | options,
            )
        processor = MultimodalProcessor(
            {key: parts.processor(key) for key in encoders},
            parts.tokenizer() if tokenizer is None else tokenizer,
            model=model,
        )
        return model.eval(), processor

    return make


@pytest.fixture(scope="session")
def networks(tmp_path_factory, parts):
    """A folder with tiny networks for the metrics; see `evaluation_utils`."""
    from evaluation_utils import write_networks  # for the tests of metrics alone

    return shared(tmp_path_factory, "networks", lambda folder: write_networks(folder, parts.folder / "language_model"))


@pytest.fixture(scope="session")
def media():
    """Small media, different for every seed: `media.image(0)`, `media.video(0)`, `media.audio(0)`."""

    def image(seed=0):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))

    def video(seed=0, frames=5):
        return np.random.default_rng(seed).integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8)

    def audio(seed=0, seconds=0.5):
        time = np.arange(int(seconds * 16_000)) / 16_000
        return (0.4 * np.sin(2 * np.pi * (220 + 60 * seed) * time)).astype(np.float32)

    return SimpleNamespace(image=image, video=video, audio=audio)
