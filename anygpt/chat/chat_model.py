"""A trained model to talk to: loaded from a run's folder, answering conversations with settings that a person chooses.

The terminal chat and the servers stand on this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from anygpt.decoders.sampling import MAX_SEED
from anygpt.encoders.module import base_model
from anygpt.errors import InputError, reading
from anygpt.generation.events import Listener
from anygpt.generation.span_rules import SpanRules
from anygpt.media.files import MediaLimits, Place
from anygpt.media.types import MEDIA, media_type, media_type_of
from anygpt.model.multimodal import MultimodalModel
from anygpt.outputs import Answer, GenerationOutput, Segment
from anygpt.processing.processor import MultimodalProcessor

INPUT_LIMITS = MediaLimits(max_pixels=4096 * 4096, max_frames=60 * 60, max_seconds=60.0, max_bytes=128 * 1024**2)
"""What one attached medium may ask for."""
MAX_ASPECT = 50
"""Length to breadth of a picture or a frame: encoders scale the shorter side up to theirs, and the longer with it."""
LEAST_TEMPERATURE = 1e-3
"""Below it the likeliest token is taken: nothing else is ever sampled there, and scores divided by it overflow."""


@dataclass(frozen=True)
class Settings:
    """How to answer.

    Attributes:
        max_new_tokens: tokens of an answer, signal tokens included.
        temperature: 0 takes the likeliest token, else text is sampled.
        top_p: sampled from the likeliest tokens that make up this share.
        seed: of sampled text and of the media.
        require, forbid: decoders that the answer must call, and may not call.
        decoder_kwargs: `{decoder key: options}`, as `generate` takes them.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    require: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    decoder_kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass
class Reply:
    """One answer with its costs: `prompt_tokens`, features included, and `new_tokens`, signal tokens included."""

    answer: Answer
    prompt_tokens: int
    new_tokens: int


class ChatModel:
    """A model and its processor.

    Args:
        checkpoint: a run's `final/` folder.
        device: where to run.
        offload: move a decoder's networks to the device only while they are used.

    Raises:
        InputError: the folder is missing or damaged, or the device cannot be used.
    """

    def __init__(self, checkpoint: str | Path, device: str = "cpu", offload: bool = False):
        check_device(device, offload)
        if not Path(checkpoint).is_dir():
            raise InputError(
                f"{checkpoint} does not exist; name a run's final/ folder with --checkpoint, or make the quickstart's "
                "with bash scripts/quickstart.sh"
            )
        with reading(checkpoint):
            self.model = MultimodalModel.from_pretrained(checkpoint)
            self.processor = MultimodalProcessor.from_pretrained(checkpoint, model=self.model)
        self.model.eval()
        place(self.model, device, offload)

    @property
    def reads(self) -> tuple[str, ...]:
        """Media types that can be attached."""
        return tuple(dict.fromkeys(encoder.modality for encoder in self.model.encoders.values()))

    @property
    def makes(self) -> dict[str, str]:
        """`{decoder key: media type}`."""
        return {key: decoder.modality for key, decoder in self.model.decoders.items()}

    def options(self, key: str) -> dict[str, Any]:
        """Steps, guidance, sizes and whatever else a decoder samples with where nobody asks for anything."""
        decoder = self.model.decoders[key]
        return decoder.module.pipeline_options | decoder.options({})

    def read(self, modality: str, place: str | Place, limits: MediaLimits = INPUT_LIMITS) -> dict[str, Any]:
        """A medium as a content part of a message.

        Raises:
            InputError: no encoder reads it, it is broken, over a limit, or very long and thin.
        """
        key = self.processor.encoder_key(modality)
        # of a video, only the frames that its encoder looks at are kept in memory
        frames = getattr(self.processor.encoder_processors[key], "num_frames", None)
        kind = media_type(modality)
        medium = kind.read(place, frames, limits)
        if size := kind.size(medium):
            width, height = size
            if max(size) > MAX_ASPECT * min(size):
                raise InputError(
                    f"{place} has {width} × {height} pixels; a {modality} may be {MAX_ASPECT} times as long as broad, "
                    "so cut a piece out of it"
                )
        return {"type": modality, modality: medium}

    def check(self, settings: Settings) -> None:
        """Find mistakes in settings, which `answer` would find too, before there is anything to answer.

        Raises:
            InputError: a setting that this model cannot take.
        """
        if not 0 <= settings.seed <= MAX_SEED:
            raise InputError(f"the seed is {settings.seed}; expected a whole number from 0 to {MAX_SEED}")
        if settings.max_new_tokens < 1:
            raise InputError(f"an answer may have {settings.max_new_tokens} tokens; expected at least 1")
        require, forbid = self.model.check_request(settings.require, settings.forbid, settings.decoder_kwargs)
        SpanRules(self.model.signal_tokens.ids, settings.max_new_tokens, require, forbid)  # finds what has no room

    def answer(
        self, messages: Sequence[Mapping[str, Any]], settings: Settings, on_event: Listener | None = None
    ) -> Reply:
        """Answer a conversation; see `generate` for `on_event`.

        Args:
            messages: `{"role": …, "content": a text or parts}`, media parts as `read` gives them; the media of the
                assistant's parts are inputs of the user's next turn.

        Raises:
            InputError: a setting, a message or its length that the model cannot take.
        """
        self.check(settings)
        try:
            batch = self.processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses this conversation: {error}") from error
        prompt_tokens = batch["input_ids"].shape[1]
        self._check_length(prompt_tokens, settings.max_new_tokens)
        sampling = {"do_sample": False}
        if settings.temperature >= LEAST_TEMPERATURE:
            sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
        torch.manual_seed(settings.seed)
        seeded = {}
        for key in self.model.decoder_keys:
            own = settings.decoder_kwargs.get(key, {})
            seeded[key] = own if {"seed", "generator"} & set(own) else {**own, "seed": settings.seed}
        output: GenerationOutput = self.model.generate(
            **batch.to(self.model.device),
            max_new_tokens=settings.max_new_tokens,
            require=settings.require,
            forbid=settings.forbid,
            decoder_kwargs=seeded | {key: v for key, v in settings.decoder_kwargs.items() if key not in seeded},
            on_event=on_event,
            **sampling,
        )
        return Reply(output.answers[0], prompt_tokens, output.sequences.shape[1])

    def _check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        config = base_model(self.model.language_model).config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and prompt_tokens + new_tokens > most:
            raise InputError(
                f"the conversation has {prompt_tokens} tokens, media included, and an answer may have {new_tokens}, "
                f"but the language model reads {most} in all; begin a new conversation, or ask for a shorter answer"
            )


def check_device(device: str, offload: bool) -> None:
    """Raises `InputError` where a device cannot be used, or has nothing to offload to."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    if offload and torch.device(device).type == "cpu":
        raise InputError("--offload keeps decoders on the CPU while they are idle; name another --device, like cuda")


def place(model: MultimodalModel, device: str | torch.device, offload: bool = False) -> None:
    """Move a model to a device; with `offload` its decoders' networks only while each is used (diffusers' helper)."""
    if not offload:
        model.to(device)
        return
    modules = {key: decoder.module for key, decoder in model.decoders.items()}
    for name, part in model.named_children():
        if name.removesuffix("_decoder") not in modules or not name.endswith("_decoder"):
            part.to(device)
    for decoder in model.decoders.values():
        decoder.projector.to(device)
        if decoder.layer_weights is not None:
            decoder.layer_weights.data = decoder.layer_weights.data.to(device)
        decoder.module.pipeline.enable_model_cpu_offload(device=device)


def modality_of(path: str | Path) -> str:
    """What a file is by its suffix.

    Raises:
        InputError: a suffix that is not known.
    """
    if kind := media_type_of(path):
        return kind.name
    known = " ".join(suffix for kind in MEDIA.values() for suffix in kind.suffixes)
    raise InputError(f"cannot tell what {path} is by its suffix; known are {known}")


def write_segment(segment: Segment, stem: str | Path) -> Path:
    """Write a generated medium to `stem` with the suffix of its type; returns the path."""
    kind = media_type(segment.type)
    path = Path(f"{stem}{kind.suffixes[0]}")
    kind.write(path, segment.content, segment.rate)
    return path
