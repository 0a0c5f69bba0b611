"""Features of pictures, clips, sounds and texts from any network by id: one vector each.

Shapes: `M` media or texts, `D` width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoTokenizer,
)

from anygpt.encoders.video import VideoFrameProcessor
from anygpt.errors import InputError
from anygpt.media.files import Audio
from anygpt.media.types import MEDIA, is_heard, is_timed


class PretrainedNetwork:
    """A transformers model as a source of features.

    Features of a medium: what `get_image_features` (or video, audio) gives where a model has it, as CLIP, SigLIP and
    CLAP do; else the pooled output; else the mean over the last states. A model of pictures gives the mean over a
    clip's frames. With `classify`, the logits of a classifier's labels.

    Sounds longer than CLAP's window are cut to it: its extractor would take a random part.

    Args:
        path: hub id or folder.
        modality: media type that it reads.
        revision: branch, tag or commit of a hub id.
        device: where it runs.
        classify: load a classifier of sounds.

    Raises:
        InputError: it is not there, damaged, or lacks tensors.
    """

    def __init__(
        self,
        path: str,
        modality: str,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        classify: bool = False,
    ):
        self.path, self.modality, self.device = path, modality, torch.device(device)
        auto = AutoModelForAudioClassification if classify else AutoModel
        extractor = AutoFeatureExtractor if is_heard(modality) else AutoImageProcessor
        try:
            config = AutoConfig.from_pretrained(path, revision=revision)
            options = {"revision": revision, "dtype": torch.float32, "output_loading_info": True}
            model, report = auto.from_pretrained(path, config=config, **options)
            self.processor: Any = extractor.from_pretrained(path, revision=revision)
            reads_text = hasattr(model, "get_text_features")
            self.tokenizer = AutoTokenizer.from_pretrained(path, revision=revision) if reads_text else None
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise InputError(
                f"the feature model {path!r} cannot be loaded ({reason}); where there is a network, download it with: "
                f"hf download {path}"
            ) from error
        lost = sorted(name for name in report["missing_keys"] if "pooler" not in name)
        if lost:
            raise InputError(f"the feature model {path!r} lacks {len(lost)} tensors, {lost[0]} first: it is damaged")
        self.pools = not report["missing_keys"]
        self.classify = classify
        if getattr(config, "is_encoder_decoder", False) and not classify:
            model = model.get_encoder()
        self.model = model.to(self.device).eval()
        self.config, self.revision = config, getattr(config, "_commit_hash", None) or revision
        self.num_frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)

    @torch.inference_mode()
    def of_media(self, media: Sequence[Any]) -> Tensor:
        """`(M, D)` float32."""
        if is_timed(self.modality) and not self.num_frames:
            return torch.stack([self.of_frames(clip.frames).mean(0) for clip in media])
        inputs = [self._prepare(medium) for medium in media]
        # Inputs of one shape go together; padded ones would depend on their neighbours.
        if len({tuple(value.shape for value in one.values()) for one in inputs}) == 1:
            joined = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
            return self._pooled(self._run(joined))
        return torch.cat([self._pooled(self._run(one)) for one in inputs])

    @torch.inference_mode()
    def of_frames(self, frames: np.ndarray) -> Tensor:
        """`(F, D)` of a clip, uint8 `(F, H, W, 3)`."""
        pixels = self.processor(images=list(frames), return_tensors="pt")["pixel_values"]
        return torch.cat([self._pooled(self._run({"pixel_values": part}, "image")) for part in pixels.split(16)])

    @torch.inference_mode()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """`(M, D)` float32, in the space of the media's.

        Raises:
            InputError: the model reads no text.
        """
        if self.tokenizer is None:
            raise InputError(f"the feature model {self.path!r} reads no text; name one like CLIP or CLAP")
        most = min(self.tokenizer.model_max_length, self.config.text_config.max_position_embeddings)
        # SigLIP was trained on texts padded to its full length.
        padding = "max_length" if "siglip" in self.config.model_type else True
        tokens = self.tokenizer(list(texts), padding=padding, truncation=True, max_length=most, return_tensors="pt")
        names = {"input_ids", "attention_mask"} if padding is True else {"input_ids"}
        return self._pooled(self._run({n: v for n, v in tokens.items() if n in names}, "text"))

    def _prepare(self, medium: Any) -> dict[str, Tensor]:
        if isinstance(medium, Audio):
            most = getattr(self.processor, "nb_max_samples", None)
            waveform = MEDIA[self.modality].to_input(medium, self.processor)[:most]
            found = self.processor(waveform, sampling_rate=self.processor.sampling_rate, return_tensors="pt")
            return {name: torch.as_tensor(value) for name, value in found.items()}
        if is_timed(self.modality):
            clips = VideoFrameProcessor(self.processor, self.num_frames)([medium.frames])
            return {self.model.main_input_name: clips["pixel_values_videos"]}
        found = self.processor(images=[medium], return_tensors="pt")
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def _run(self, inputs: dict[str, Tensor], kind: str | None = None) -> Any:
        call = getattr(self.model, f"get_{kind or self.modality}_features", self.model)
        return call(**{name: value.to(self.device) for name, value in inputs.items()})

    def _pooled(self, output: Any) -> Tensor:
        if isinstance(output, Tensor):
            return output.float()
        if self.classify:
            return output.logits.float()
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self.pools:
            return pooled.flatten(1).float()
        return output.last_hidden_state.flatten(1, -2).mean(1).float()


class InceptionNetwork:
    """The Inception of FID (arXiv 1706.08500) as torchmetrics has it, which needs torch-fidelity and its weights."""

    def __init__(self, modality: str, device: str | torch.device = "cpu"):
        from torchmetrics.image.fid import NoTrainInceptionV3  # its parts are only needed here

        self.path, self.revision, self.device = "inception", "inception-v3-compat", torch.device(device)
        try:
            self.model = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(self.device)
        except Exception as error:  # of a missing package, or of a download that cannot be made
            raise InputError(
                f"features: inception needs the package torch-fidelity and its weights ({error}); install it and "
                "run it once where there is a network, or name a vision model by id, like facebook/dinov2-base"
            ) from error

    @torch.inference_mode()
    def of_media(self, media: Sequence[Any]) -> Tensor:
        return torch.cat([self.of_frames(np.asarray(picture)[None]) for picture in media])

    @torch.inference_mode()
    def of_frames(self, frames: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        return self.model(pixels.to(self.device)).float()

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        raise InputError("features: inception reads no text; name a model like CLIP")


NETWORKS: dict[str, Callable[..., Any]] = {"inception": InceptionNetwork}
"""Networks by name, called with a modality and a device; a user's own (VGGish, PANNs) can be added here."""


def load_network(
    features: str, modality: str, revision: str | None, device: str | torch.device, classify: bool = False
) -> Any:
    """A network of `NETWORKS`, or any transformers model by id or folder."""
    if features in NETWORKS:
        return NETWORKS[features](modality, device=device)
    return PretrainedNetwork(features, modality, revision, device, classify)
