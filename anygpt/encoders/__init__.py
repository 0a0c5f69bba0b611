"""The input half: encoders, their projectors and the callbacks around them."""
# ruff: noqa: F401 (the names of the package)

from anygpt.encoders.families import FAMILIES
from anygpt.encoders.module import ModalEncoderModule
from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig
from anygpt.encoders.video import VideoEncoder, VideoFrameProcessor
