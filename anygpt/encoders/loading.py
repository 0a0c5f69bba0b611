"""Loading of encoders and their processors from a folder or the Hub, also out of whole models: `WHOLE_MODELS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import MODEL_MAPPING, AutoFeatureExtractor, AutoImageProcessor, AutoModel, PreTrainedConfig, ViTConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import is_torchvision_available

from anygpt.encoders.callbacks import LlavaCallbacks, check_selection
from anygpt.encoders.families import FAMILIES, EncoderFamily
from anygpt.encoders.imagebind import ImageBindConfig, processor_for
from anygpt.encoders.imagebind.processing import ImageBindProcessor
from anygpt.encoders.video import VideoEncoder, VideoFrameProcessor
from anygpt.errors import InputError
from anygpt.media.types import is_heard, is_timed
from anygpt.parts.files import built_from
from anygpt.parts.networks import load_network
from anygpt.parts.source import EncoderSettings, Source, load

# PIL replacements for image processors that transformers implements with torchvision only, which is not required here.
PIL_PROCESSORS = (
    {} if is_torchvision_available() else dict.fromkeys(("dinov3_vit", "dinov3_convnext"), ViTImageProcessorPil)
)


@dataclass(frozen=True)
class Whole:
    """An encoder inside a whole model, whose config determines its family.

    Attributes:
        config: name of the encoder's config in the whole model's, or a function that extracts it for a modality.
        names: `{prefix in the files: new prefix}`, the longest match wins; None for tensors of the rest of the model;
            a tensor without a match is an error. Or a function of the encoder's config that returns this mapping.
        processor: builds the processor of a modality if the folder has none.
        image_processor: class to use with the folder's settings, if the model's own makes tiles, which the tower does
            not take.
    """

    config: str | Callable[[PreTrainedConfig, str], PreTrainedConfig]
    names: Mapping[str, str | None] | Callable[[PreTrainedConfig], Mapping[str, str | None]]
    processor: Callable[[str], Any] | None = None
    image_processor: type | None = None


def _tower(name: str, *others: str) -> dict[str, str | None]:
    rest = ("model.", "lm_head.", "language_model.", "multi_modal_projector.", *others)
    return {f"model.{name}.": "", f"{name}.": "", **dict.fromkeys(rest)}


_VISION, _AUDIO = "vision_config", "audio_config"
_DUAL_IMAGE = {
    "vision_model.": "",
    **dict.fromkeys(("text_model.", "visual_projection.", "text_projection.", "logit_", "classifier.")),
}
WHOLE_MODELS: dict[str, Whole] = {
    **dict.fromkeys(("clip", "siglip", "siglip2"), Whole(_VISION, _DUAL_IMAGE)),
    **dict.fromkeys(("llava", "mistral3", "gemma3", "paligemma", "internvl"), Whole(_VISION, _tower("vision_tower"))),
    "llava_next": Whole(_VISION, _tower("vision_tower", "image_newline"), image_processor=CLIPImageProcessorPil),
    "llava_onevision": Whole(_VISION, _tower("vision_tower", "image_newline"), image_processor=SiglipImageProcessorPil),
    "qwen2_vl": Whole(_VISION, _tower("visual")),
    "qwen2_5_vl": Whole(_VISION, _tower("visual")),
    "vit_mae": Whole(  # as a ViT, since its own class drops patches at random
        lambda config, _: ViTConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"}),
        {"vit.": "", "decoder.": None},
    ),
    "clap": Whole(
        _AUDIO,
        {"audio_model.": "", **dict.fromkeys(("text_model.", "audio_projection.", "text_projection.", "logit_scale_"))},
    ),
    "qwen2_audio": Whole(_AUDIO, _tower("audio_tower")),
    "phi4_multimodal": Whole(
        _AUDIO, {"model.embed_tokens_extend.audio_embed.encoder.": "", **dict.fromkeys(("model.", "lm_head."))}
    ),
    "imagebind": Whole(
        lambda config, modality: config.encoder_of(modality), lambda config: config.left_out(), processor=processor_for
    ),
}


def load_encoder(path: str | Path | Source, modality: str, **options: Any) -> nn.Module:
    """Load an encoder with its family's class; for `video`, an image encoder is wrapped in a `VideoEncoder`.

    From a whole model (Whisper, CLAP, Qwen2-VL, LLaVA, …: `WHOLE_MODELS`) only the encoder's tensors are read. `path`
    is a folder, Hub id or `zoo:<name>`, and `options` are the other fields of `Source`, as in YAML. An `InputError`
    names a path that does not exist, has no encoder of the modality, or lacks tensors or has others.
    """
    source = Source.of(path, options, kind=EncoderSettings)

    def build() -> nn.Module:
        whole = _read_config(source)
        config, family, names = _find_encoder(whole, modality, source.feature)
        cls = family.load_class()
        encoder = load_network(
            MODEL_MAPPING[type(config)] if cls is AutoModel else cls,
            config,
            source.place,
            names=names,
            optional=family.optional,
            dtype=source.torch_dtype,
            fallback_dtype=whole.dtype,
            **source.model_options(),
        )
        check_selection(config, source.feature_layer, source.drop_cls)
        # Follow the whole model's choice: LLaVA leaves out the first feature of any encoder.
        layer, drop = source.feature_layer, source.drop_cls
        if layer is None:
            layer = getattr(whole, "vision_feature_layer", None)
        if drop is None:
            drop = layer is not None and getattr(whole, "vision_feature_select_strategy", None) == "default"
        if source.feature_layer is None and layer == -1 and whole.model_type == "internvl":
            layer = None  # its last layer means its output, after the norm
        frames = {"num_frames": source.num_frames, "pool_frames": source.pool_frames}
        frames = {name: value for name, value in frames.items() if value is not None}
        if is_timed(modality) and family.main_input == "pixel_values":
            return VideoEncoder(encoder, feature_layer=layer, drop_cls=drop, **frames)
        for name, value in frames.items():  # no effect without clips, or if the encoder reads whole clips
            if not is_timed(modality):
                raise InputError(f"{name} is set, but an encoder of {modality} reads no clips; leave it out")
            if value != getattr(config, name, None):
                raise InputError(f"{name} is {value}, but this encoder reads clips in its own way; leave it out")
        if layer is not None or drop:
            encoder.anygpt_callbacks = LlavaCallbacks(layer, "default" if drop else "full")
        return encoder

    return load(source, f"{modality} encoder", build, unused=("gguf_file",))


def _read_config(source: Source) -> PreTrainedConfig:
    content = source.place.json("config.json") or {}
    if "model_type" not in content and "imu_embed_dim" in content:  # original ImageBind saved with the Hub's mixin
        return ImageBindConfig(**content)
    return source.config()


def _find_encoder(
    config: PreTrainedConfig, modality: str, feature: str | None
) -> tuple[PreTrainedConfig, EncoderFamily, Mapping[str, str | None]]:
    whole = WHOLE_MODELS.get(config.model_type)
    own = config
    if whole is not None:
        own = getattr(config, whole.config) if isinstance(whole.config, str) else whole.config(config, modality)
    if feature is not None:
        if not hasattr(own, "feature"):
            raise InputError(f"feature is {feature!r}, but a {own.model_type!r} encoder has no such choice")
        own = type(own)(**own.to_dict() | {"feature": feature})
    family = FAMILIES.get(own.model_type)
    if family is None:
        raise InputError(
            f"{own.model_type!r} is no supported encoder family; expected one of {', '.join(sorted(FAMILIES))}, or "
            f"a whole model with one in it: {', '.join(sorted(WHOLE_MODELS))}"
        )
    heard, timed = is_heard(modality), is_timed(modality)
    reads = {"pixel_values": not heard, "pixel_values_videos": timed, "input_features": heard, "input_values": heard}
    if not reads.get(family.main_input.removeprefix("audio_"), True):
        raise InputError(f"the encoder in a {config.model_type!r} model does not read {modality}")
    if whole is None:
        return own, family, family.names
    names = whole.names(own) if callable(whole.names) else whole.names
    # a tower may use the names of its own family's checkpoints
    inner = {f"{p}{q}": r for p, new in names.items() if new == "" for q, r in family.names.items()}
    return own, family, {**inner, **names}


def load_encoder_processor(path: str | Path | Source, modality: str, **options: Any) -> Any:
    """Load the image processor or feature extractor of an encoder, wrapped to run on frames of clips for `video`."""
    source = Source.of(path, options, kind=EncoderSettings)
    config = load(source, "config", lambda: _read_config(source))
    with built_from(f"{source.place}/preprocessor_config.json"):
        processor = load(source, f"{modality} processor", lambda: _processor(source, config, modality))
    if isinstance(processor, ImageBindProcessor) and source.num_frames is not None:
        raise InputError(f"num_frames is {source.num_frames}, but ImageBind reads clips in its own way; leave it out")
    if is_timed(modality) and not isinstance(processor, ImageBindProcessor):
        frames = source.num_frames or getattr(config, "num_frames", None)  # a video encoder has its own number
        return VideoFrameProcessor(processor, **({"num_frames": frames} if frames else {}))
    return processor


def _processor(source: Source, config: PreTrainedConfig, modality: str) -> Any:
    whole = WHOLE_MODELS.get(config.model_type)
    if whole is not None and whole.processor is not None:
        processor = whole.processor(modality)
    else:
        heard = is_heard(modality)
        auto: Any = AutoFeatureExtractor if heard else AutoImageProcessor
        replacement: Any = None
        if not heard:
            replacement = whole.image_processor if whole is not None else PIL_PROCESSORS.get(config.model_type)
        content = source.place.json("preprocessor_config.json") or {}
        named = content.get("feature_extractor_type" if heard else "image_processor_type")
        if replacement is None and isinstance(named, str) and not hasattr(transformers, named):
            raise InputError(
                f"{source.place}/preprocessor_config.json names the class {named}, which this transformers does not "
                "have: name one there that does the same, such as CLIPImageProcessor or WhisperFeatureExtractor"
            )
        processor = (replacement or auto).from_pretrained(source.folder, **source.auto)
    if not source.processor:
        return processor
    settings = processor.to_dict()
    if unknown := sorted(set(source.processor) - set(settings)):
        raise InputError(f"processor has the unknown setting {unknown[0]!r}; known are {', '.join(sorted(settings))}")
    return type(processor).from_dict({**settings, **source.processor})
