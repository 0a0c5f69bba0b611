"""The input half: encoders, their projectors and the callbacks around them."""

from anygpt.encoders.families import FAMILIES, EncoderFamily
from anygpt.encoders.module import ModalEncoderModule
from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig
from anygpt.encoders.video import VideoEncoder, VideoEncoderConfig, VideoFrameProcessor

__all__ = [
    "FAMILIES",
    "EncoderFamily",
    "ModalEncoderModule",
    "MultimodalProjector",
    "MultimodalProjectorConfig",
    "VideoEncoder",
    "VideoEncoderConfig",
    "VideoFrameProcessor",
]
