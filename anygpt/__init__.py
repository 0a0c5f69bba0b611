"""Any-to-any multimodal language models from pretrained Hugging Face parts."""

import logging
import os

# Read by OpenMP when torch is loaded. Its threads that wait for work would keep their cores busy; where another program
# wants one of these, every operation then waits for the scheduler, and small models take a hundred times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Notes at every start that say nothing new. The image processors that diffusers imports have PIL versions, which are
# what we want; torchao, where it is installed, looks for kernels of other machines, and diffusers for what it dropped.
for name, note in {
    "transformers.utils.import_utils": "requires torchvision",
    "torchao": "Failed to load",
    "torch.utils._pytree": "register_constant",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import",
}.items():
    logging.getLogger(name).addFilter(lambda record, note=note: note not in record.getMessage())

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

from anygpt.decoders import (
    AudioLDM2Decoder,
    AudioLDMDecoder,
    Condition,
    DiffusionDecoder,
    FluxDecoder,
    LTXDecoder,
    ModalDecoderModule,
    OutputProjector,
    OutputProjectorConfig,
    SanaDecoder,
    StableAudioDecoder,
    StableDiffusion3Decoder,
    StableDiffusionDecoder,
    StableDiffusionXLDecoder,
    WanDecoder,
    ZeroscopeDecoder,
)
from anygpt.decoders.base import load_decoder
from anygpt.encoders import ModalEncoderModule, MultimodalProjector, MultimodalProjectorConfig
from anygpt.encoders.loading import load_encoder, load_encoder_processor
from anygpt.errors import InputError
from anygpt.losses.formulas import LossWeights
from anygpt.model.configuration import MultimodalConfig
from anygpt.model.language_models import load_language_model, load_tokenizer
from anygpt.model.multimodal import MultimodalModel
from anygpt.processing.processor import MultimodalProcessor
from anygpt.tokenizers.base import MediaTokenizer, load_media_tokenizer
from anygpt.tokenizers.module import ModalTokenizerModule
from anygpt.version import __version__

AutoConfig.register(MultimodalConfig.model_type, MultimodalConfig, exist_ok=True)
AutoModel.register(MultimodalConfig, MultimodalModel, exist_ok=True)
AutoModelForMultimodalLM.register(MultimodalConfig, MultimodalModel, exist_ok=True)
AutoProcessor.register(MultimodalConfig, MultimodalProcessor, exist_ok=True)

__all__ = [
    "AudioLDM2Decoder",
    "AudioLDMDecoder",
    "Condition",
    "DiffusionDecoder",
    "FluxDecoder",
    "InputError",
    "LTXDecoder",
    "LossWeights",
    "MediaTokenizer",
    "ModalDecoderModule",
    "ModalEncoderModule",
    "ModalTokenizerModule",
    "MultimodalConfig",
    "MultimodalModel",
    "MultimodalProcessor",
    "MultimodalProjector",
    "MultimodalProjectorConfig",
    "OutputProjector",
    "OutputProjectorConfig",
    "SanaDecoder",
    "StableAudioDecoder",
    "StableDiffusion3Decoder",
    "StableDiffusionDecoder",
    "StableDiffusionXLDecoder",
    "WanDecoder",
    "ZeroscopeDecoder",
    "__version__",
    "load_decoder",
    "load_encoder",
    "load_encoder_processor",
    "load_language_model",
    "load_media_tokenizer",
    "load_tokenizer",
]
