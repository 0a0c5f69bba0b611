"""Diffusion decoders: frozen diffusers pipelines that turn conditions into images, video and audio."""
# ruff: noqa: F401 (the names of the package)

from anygpt.decoders.audioldm import AudioLDM2Decoder, AudioLDMDecoder
from anygpt.decoders.base import DiffusionDecoder
from anygpt.decoders.conditions import Condition
from anygpt.decoders.flux import FluxDecoder, FluxKontextDecoder
from anygpt.decoders.instruct_pix2pix import InstructPix2PixDecoder
from anygpt.decoders.module import ModalDecoderModule
from anygpt.decoders.projector import OutputProjector, OutputProjectorConfig
from anygpt.decoders.sana import SanaDecoder
from anygpt.decoders.stable_audio import StableAudioDecoder
from anygpt.decoders.stable_diffusion import (
    StableDiffusion3Decoder,
    StableDiffusionDecoder,
    StableDiffusionXLDecoder,
)
from anygpt.decoders.targets import (
    AudioTargets,
    ImageTargets,
    TargetProcessor,
    VideoTargets,
    WaveformTargets,
    target_processor_from_dict,
)
from anygpt.decoders.videos import LTXDecoder, WanDecoder, ZeroscopeDecoder
