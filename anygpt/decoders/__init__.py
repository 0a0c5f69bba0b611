"""Diffusion decoders: frozen diffusers pipelines that turn conditions into images, video and audio."""

from anygpt.decoders.audioldm import AudioLDMDecoder
from anygpt.decoders.base import Condition, DiffusionDecoder
from anygpt.decoders.module import ModalDecoderModule
from anygpt.decoders.projector import OutputProjector, OutputProjectorConfig
from anygpt.decoders.stable_diffusion import StableDiffusionDecoder
from anygpt.decoders.targets import (
    AudioTargets,
    ImageTargets,
    TargetProcessor,
    VideoTargets,
    target_processor_from_dict,
)
from anygpt.decoders.zeroscope import ZeroscopeDecoder

__all__ = [
    "AudioLDMDecoder",
    "AudioTargets",
    "Condition",
    "DiffusionDecoder",
    "ImageTargets",
    "ModalDecoderModule",
    "OutputProjector",
    "OutputProjectorConfig",
    "StableDiffusionDecoder",
    "TargetProcessor",
    "VideoTargets",
    "ZeroscopeDecoder",
    "target_processor_from_dict",
]
