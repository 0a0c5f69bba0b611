"""`ChatModel`: a trained model that answers conversations with given settings, used by terminal chat and servers."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from anygpt.decoders.options import MAX_SEED, is_integer, is_number
from anygpt.encoders.module import base_model
from anygpt.errors import InputError, reading, refusing
from anygpt.generation.checks import check_options
from anygpt.generation.choosing import SpanRules
from anygpt.generation.decoding import special_tokens
from anygpt.generation.events import Listener, first_stop
from anygpt.media.files import MediaLimits, Place
from anygpt.media.types import MEDIA, media_type, media_type_of
from anygpt.model.multimodal import MultimodalModel
from anygpt.outputs import Answer, GenerationOutput, Segment
from anygpt.processing.processor import MultimodalProcessor
from anygpt.threads import choose_threads

INPUT_LIMITS = MediaLimits(max_pixels=4096 * 4096, max_frames=60 * 60, max_seconds=60.0, max_bytes=128 * 1024**2)
"""Limits of one attached medium."""
MAX_ASPECT = 50
"""Maximum aspect ratio of images and frames: encoders scale by the shorter side, and the longer could become huge."""
LEAST_TEMPERATURE = 1e-3
"""Below it decoding is greedy: nothing else would be sampled, and scores divided by it overflow."""


@dataclass(frozen=True)
class Settings:
    """Settings of an answer."""

    max_new_tokens: int = 128  # signal tokens included; the model's context is a limit, too
    temperature: float = 0.0  # 0 for greedy decoding
    top_p: float = 1.0  # probability mass of the tokens to sample from
    seed: int = 0  # of sampled text and of the media
    require: tuple[str, ...] = ()  # decoders that the answer must call
    forbid: tuple[str, ...] = ()  # decoders that it must not call
    decoder_kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # as `generate` takes them
    stop: tuple[str, ...] = ()  # texts that end an answer, which excludes them

    @property
    def kind(self) -> str:
        """Key of settings that can share a batch: everything except seeds and `max_new_tokens`."""
        decoders = {key: {n: v for n, v in own.items() if n != "seed"} for key, own in self.decoder_kwargs.items()}
        return repr(replace(self, seed=0, max_new_tokens=1, decoder_kwargs=decoders))


@dataclass
class Reply:
    """One answer, with its tokens and those of the conversation, media and signal tokens included. `complete` says
    whether it ended by itself or at a stop text, not at the maximum number of tokens."""

    answer: Answer
    prompt_tokens: int
    new_tokens: int
    complete: bool = True


def load_checkpoint(folder: str | Path) -> tuple[MultimodalModel, MultimodalProcessor]:
    """The model and the processor of a `final/` or `checkpoint-<step>/` folder; chooses the threads of a tiny one."""
    if not Path(folder).is_dir():
        raise InputError(
            f"{folder} does not exist; name a run's final/ folder with --checkpoint, or make the quickstart's with "
            "bash scripts/quickstart.sh"
        )
    with reading(folder):
        model = MultimodalModel.from_pretrained(folder)
        processor = MultimodalProcessor.from_pretrained(folder, model=model)
    choose_threads(model)
    return model, processor


class TooLong(InputError):
    """A conversation that leaves no room for an answer in the language model's context."""


class ChatModel:
    """A model with its processor, from a run's `final/` folder; `offload` keeps idle decoders off the device."""

    def __init__(self, checkpoint: str | Path, device: str = "cpu", offload: bool = False):
        check_device(device, offload)
        self.model, self.processor = load_checkpoint(checkpoint)
        self.model.eval()
        for decoder in self.model.decoders.values():
            if offload and decoder.module.offload is None:
                decoder.module.save_memory(offload="model")
        self.model.to(device)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(reader.modality for reader in self.model.readers.values()))

    @property
    def makes(self) -> dict[str, str]:
        return {key: maker.modality for key, maker in self.model.makers.items()}

    def options(self, key: str) -> dict[str, Any]:
        return self.model.makers[key].own_options

    def read(self, modality: str, place: str | Place, limits: MediaLimits = INPUT_LIMITS) -> dict[str, Any]:
        """Read a medium as a content part; an `InputError` if nothing reads it, or it is damaged or beyond a limit."""
        key, kind = self.processor.encoder_key(modality), media_type(modality)
        # keep only the video frames that the encoder samples
        consumer = self.processor.encoder_processors.get(key) or self.processor.coded[key]
        medium = kind.read(place, getattr(consumer, "num_frames", None) if kind.timed else None, limits, whole=False)
        if size := getattr(medium, "size", None):  # of a picture or a clip
            width, height = size
            if max(size) > MAX_ASPECT * min(size):
                raise InputError(
                    f"{place} has {width} × {height} pixels; the longer side of a {modality} may be at most "
                    f"{MAX_ASPECT} times the shorter one, so crop it"
                )
        return {"type": modality, modality: medium}

    def check(self, settings: Settings) -> None:
        """Raise `InputError` for a setting that this model does not support."""
        if not is_integer(settings.seed) or not 0 <= settings.seed <= MAX_SEED:
            raise InputError(f"the seed is {settings.seed!r:.80}; expected a whole number from 0 to {MAX_SEED}")
        if not is_integer(settings.max_new_tokens) or settings.max_new_tokens < 1:
            raise InputError(f"an answer may have {settings.max_new_tokens!r:.80} tokens; expected at least 1")
        if not is_number(settings.temperature) or settings.temperature < 0:
            raise InputError(f"the temperature is {settings.temperature!r:.80}; expected a number from 0 (greedy)")
        if not is_number(settings.top_p) or not 0 < settings.top_p <= 1:
            raise InputError(f"top_p is {settings.top_p!r:.80}; expected a number above 0, up to 1")
        check_options({}, 1, settings.stop, settings.require)
        require, forbid = self.model.check_request(settings.require, settings.forbid, settings.decoder_kwargs)
        # raises if the spans do not fit
        SpanRules(self.model.signal_tokens.spans, settings.max_new_tokens, require, forbid)

    def answer(
        self, messages: Sequence[Mapping[str, Any]], settings: Settings, on_event: Listener | None = None
    ) -> Reply:
        """Answer a conversation of `{"role": …, "content": text or parts}`, with media parts as returned by `read`.

        Media of the assistant become inputs of the user's next turn. An `InputError` names a setting or message that
        the model does not support, or a conversation that is too long.
        """
        return self.answer_together([messages], [settings], on_event)[0]

    def answer_together(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        settings: Sequence[Settings],
        on_event: Listener | None = None,
    ) -> list[Reply]:
        """Answer several conversations, whose settings have the same `kind`, in one batch, as one by one."""
        shared = settings[0]
        for one in settings:
            self.check(one)
        batch = self.processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)
        prompt_tokens = batch["attention_mask"].sum(dim=1).tolist()
        rooms = map(self._room, prompt_tokens)
        budgets = [min(one.max_new_tokens, room) for one, room in zip(settings, rooms, strict=True)]
        sampling: dict[str, Any] = {"do_sample": False}
        if shared.temperature >= LEAST_TEMPERATURE:
            sampling = {"do_sample": True, "temperature": shared.temperature, "top_p": shared.top_p, "top_k": 0}
            sampling["seeds"] = [one.seed for one in settings]
        decoder_kwargs = {}
        for key in self.model.makers:
            seeds = [one.decoder_kwargs.get(key, {}).get("seed", one.seed) for one in settings]
            decoder_kwargs[key] = {**shared.decoder_kwargs.get(key, {}), "seed": seeds}
        output: GenerationOutput = self.model.generate(
            **batch.to(self.model.device),
            max_new_tokens=max(budgets),
            budgets=budgets,
            require=shared.require,
            forbid=shared.forbid,
            decoder_kwargs=decoder_kwargs,
            on_event=on_event,
            stop=shared.stop,
            **sampling,
        )
        replies = []
        for row, answer in enumerate(output.answers):
            new_tokens = output.lengths[row]
            stopped = cut_at_stop(answer, shared.stop)
            ended = new_tokens < budgets[row] or int(output.sequences[row, new_tokens - 1]) in self._ends
            replies.append(Reply(answer, prompt_tokens[row], new_tokens, stopped or ended))
        return replies

    def _room(self, prompt_tokens: int) -> int:
        config = base_model(self.model.language_model).config.get_text_config()
        most = getattr(config, "max_position_embeddings", None) or sys.maxsize
        if prompt_tokens >= most:
            raise TooLong(
                f"the conversation has {prompt_tokens} tokens, media included, and the language model reads {most}, "
                "an answer included; begin a new conversation"
            )
        return most - prompt_tokens

    @cached_property
    def _ends(self) -> set[int]:
        own = base_model(self.model.language_model).generation_config
        return set(special_tokens(self.model, own).get("eos_token_id", ()))


def cut_at_stop(answer: Answer, stop: Sequence[str]) -> bool:
    """Cut an answer at its first stop text; returns whether there was one."""
    for index, segment in enumerate(answer.segments):
        end = first_stop(segment.content, stop) if segment.type == "text" else None
        if end is not None:
            answer.segments[index:] = [replace(segment, content=segment.content[:end])] if end else []
            return True
    return False


def check_device(device: str, offload: bool = False) -> None:
    with refusing(f"--device {device!r} cannot be used", (RuntimeError, AssertionError)):
        torch.empty(0, device=device)
    if offload and torch.device(device).type == "cpu":
        raise InputError("--offload keeps decoders on the CPU while they are idle; name another --device, like cuda")


def modality_of(path: str | Path) -> str:
    """Media type of a file by its suffix; raises `InputError` for an unknown one."""
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
