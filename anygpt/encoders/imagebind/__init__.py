"""ImageBind (arXiv 2305.05665): six modalities in one embedding space, with the tensor names of the original.

The published weights are under CC BY-NC-SA 4.0, for non-commercial use.
"""
# ruff: noqa: F401 (the names of the package)

from anygpt.encoders.imagebind.configuration import ImageBindConfig
from anygpt.encoders.imagebind.modeling import ImageBindEncoder, ImageBindModel
from anygpt.encoders.imagebind.processing import (
    ImageBindAudioProcessor,
    ImageBindImageProcessor,
    ImageBindTextProcessor,
    ImageBindVideoProcessor,
    processor_for,
)
