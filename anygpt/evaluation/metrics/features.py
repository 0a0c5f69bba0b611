"""Feature vectors of images, clips, sounds and texts from any pretrained network.

Shapes: `M` media or texts, `D` width of the features.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from torchmetrics.image.fid import NoTrainInceptionV3

from anygpt.encoders.video import VideoFrameProcessor
from anygpt.errors import InputError, refusing
from anygpt.media.files import Audio
from anygpt.media.types import MEDIA, is_heard, is_timed


def loading(what: str, path: str) -> AbstractContextManager[None]:
    """Context in which an id or folder is loaded; what libraries raise becomes an `InputError` with advice."""
    advice = f"; where there is a network, download it with: hf download {path}"
    return refusing(f"the {what} {path!r} cannot be loaded", (OSError, ValueError, KeyError, SafetensorError), advice)


class PretrainedNetwork:
    """A transformers model as a source of features, loaded strictly.

    Features of a medium are `get_image_features` (or video, audio) if the model has it, as CLIP, SigLIP and CLAP do;
    else the pooled output; else the mean of the last states. For clips, an image model's features are averaged over
    frames. With `classify`, features are the logits of a sound classifier. With modality `text` the model is a sentence
    encoder: the mean of the tokens' last states (arXiv 1908.10084).

    Sounds longer than CLAP's window are truncated: its extractor would take a random part.
    """

    def __init__(
        self, path: str, modality: str, revision: str | None = None, classify: bool = False, device: Any = "cpu"
    ):
        self.path, self.modality, self.classify, self.device = path, modality, classify, torch.device(device)
        auto = transformers.AutoModelForAudioClassification if classify else transformers.AutoModel
        extractor = transformers.AutoFeatureExtractor if is_heard(modality) else transformers.AutoImageProcessor
        with loading("feature model", path):
            options = {"revision": revision, "dtype": torch.float32, "output_loading_info": True}
            model, report = auto.from_pretrained(path, **options)
            self.processor: Any = None if modality == "text" else extractor.from_pretrained(path, revision=revision)
            reads = hasattr(model, "get_text_features") or modality == "text"
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, revision=revision) if reads else None
        self.config = model.config
        encoder_only = getattr(self.config, "is_encoder_decoder", False) and not classify
        self.model = (model.get_encoder() if encoder_only else model).to(self.device).eval()
        unread = "decoder." if encoder_only else ()  # a folder may hold an encoder alone, as of Whisper
        missing = sorted(name for name in report["missing_keys"] if not name.startswith(unread))
        if lost := [name for name in missing if "pooler" not in name]:
            raise InputError(f"the feature model {path!r} lacks {len(lost)} tensors, {lost[0]} first: it is damaged")
        self.pools = not missing
        self.revision = getattr(self.config, "_commit_hash", None) or revision
        self.num_frames = getattr(self.config, "num_frames", None) or getattr(self.config, "frames_per_clip", None)

    @torch.inference_mode()
    def of_media(self, media: Sequence[Any]) -> Tensor:
        """`(M, D)` float32."""
        if is_timed(self.modality) and not self.num_frames:
            return torch.stack([self.of_frames(clip.frames).mean(0) for clip in media])
        inputs = [self._prepare(medium) for medium in media]
        # Batch inputs of equal shape only: features of padded ones would depend on the batch.
        if len({tuple(value.shape for value in one.values()) for one in inputs}) == 1:
            inputs = [{name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}]
        return torch.cat([self._run(one, self.modality) for one in inputs])

    @torch.inference_mode()
    def of_frames(self, frames: np.ndarray) -> Tensor:
        """Features `(F, D)` of a clip's frames, uint8 `(F, H, W, 3)`."""
        pixels = self.processor(images=list(frames), return_tensors="pt")["pixel_values"]
        return torch.cat([self._run({"pixel_values": part}, "image") for part in pixels.split(16)])

    @torch.inference_mode()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Features `(M, D)` float32 in the space of the media's; raises `InputError` if the model reads no text."""
        if self.tokenizer is None:
            raise InputError(f"the feature model {self.path!r} reads no text; name one like CLIP or CLAP")
        text = self.config.get_text_config()
        most = min(self.tokenizer.model_max_length, text.max_position_embeddings)
        # SigLIP was trained on texts padded to its full length, without a mask.
        padding, names = (True, ("input_ids", "attention_mask"))
        if "siglip" in self.config.model_type:
            padding, names = ("max_length", ("input_ids",))
        tokens = self.tokenizer(list(texts), padding=padding, truncation=True, max_length=most, return_tensors="pt")
        if self.modality == "text":
            tokens = tokens.to(self.device)
            mask = tokens["attention_mask"][..., None]
            return (self.model(**tokens).last_hidden_state.float() * mask).sum(1) / mask.sum(1)
        return self._run({name: tokens[name] for name in names}, "text")

    def _prepare(self, medium: Any) -> dict[str, Tensor]:
        if isinstance(medium, Audio):
            most = getattr(self.processor, "nb_max_samples", None)
            waveform = MEDIA[self.modality].to_input(medium, self.processor)[:most]
            found = self.processor(waveform, sampling_rate=self.processor.sampling_rate, return_tensors="pt")
            return {name: torch.as_tensor(value) for name, value in found.items()}
        if is_timed(self.modality):
            clips = VideoFrameProcessor(self.processor, self.num_frames)([medium.frames])
            return {self.model.main_input_name: clips["pixel_values_videos"]}
        return dict(self.processor(images=[medium], return_tensors="pt"))

    def _run(self, inputs: dict[str, Tensor], kind: str) -> Tensor:
        call = getattr(self.model, f"get_{kind}_features", self.model)
        output = call(**{name: value.to(self.device) for name, value in inputs.items()})
        if self.classify:
            return output.logits.float()
        if (pooled := getattr(output, "pooler_output", None)) is not None and self.pools:
            return pooled.flatten(1).float()
        return output.last_hidden_state.flatten(1, -2).mean(1).float()


class InceptionNetwork:
    """The Inception network of FID (arXiv 1706.08500) from torchmetrics; needs torch-fidelity and its weights."""

    path, revision = "inception", "inception-v3-compat"

    def __init__(self, device: Any = "cpu"):
        self.device = torch.device(device)
        advice = "; install it and run it once where there is a network, or name a vision model by id"
        with refusing("features: inception needs the package torch-fidelity and its weights", advice=advice):
            self.model = NoTrainInceptionV3(self.revision, ["2048"]).to(self.device)

    def of_media(self, media: Sequence[Any]) -> Tensor:
        return torch.cat([self.of_frames(np.asarray(picture)[None]) for picture in media])

    @torch.inference_mode()
    def of_frames(self, frames: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
        return self.model(pixels.to(self.device)).float()


NETWORKS: dict[str, Callable[..., Any]] = {"inception": InceptionNetwork}
"""Constructors of networks by name, called with a device; others (VGGish, PANNs) can be added here."""


def load_network(path: str, modality: str, revision: str | None, classify: bool = False, device: Any = "cpu") -> Any:
    """Load a network of `NETWORKS`, or any transformers model by id or folder."""
    if path in NETWORKS:
        return NETWORKS[path](device)
    return PretrainedNetwork(path, modality, revision, classify, device)
