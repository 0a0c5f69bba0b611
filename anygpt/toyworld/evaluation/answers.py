"""The model's own answers to requests, and what the judges say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from anygpt.model.multimodal import MultimodalModel
from anygpt.outputs import Answer
from anygpt.processing.processor import MultimodalProcessor
from anygpt.toyworld.evaluation.requests import WAYS, Request
from anygpt.toyworld.judges import Judges, answers_question, read_words
from anygpt.toyworld.world import Thing


@dataclass(frozen=True)
class Settings:
    """How an evaluation is done.

    Attributes:
        samples: requests a cell of the matrix.
        talk_samples: questions in words, and as many lines of small talk and of nonsense.
        conversations: of four exchanges.
        batch_size: requests answered at once, and captions sampled at once.
        seed: of requests, renders and the decoders' noise; the latter also depends on `batch_size`.
        things: `held_out`, those that alignment never saw; `seen`; or `validation`, some of the seen ones, to choose
            settings on with a model that was trained on the others.
        baselines: also take the upper bound and the caption baseline.
        max_new_tokens: an answer's budget, signal tokens included.
        steps, guidance: of the decoders, by modality; the checkpoint's own defaults where one is left out.
    """

    samples: int = 20
    talk_samples: int = 100
    conversations: int = 160
    batch_size: int = 64
    seed: int = 0
    things: str = "held_out"
    baselines: bool = True
    max_new_tokens: int = 64
    steps: Mapping[str, int] = field(default_factory=dict)
    guidance: Mapping[str, float] = field(default_factory=dict)

    def resolved(self, model: MultimodalModel) -> Settings:
        """With the steps and the guidance that the model's decoders have where none are given."""
        own = {d.modality: d.module.pipeline_options | d.options({}) for d in model.decoders.values()}
        return replace(
            self,
            steps={kind: options["num_inference_steps"] for kind, options in own.items()} | dict(self.steps),
            guidance={kind: options["guidance_scale"] for kind, options in own.items()} | dict(self.guidance),
        )

    def sampling(self, modality: str) -> dict[str, Any]:
        return {"num_inference_steps": self.steps.get(modality), "guidance_scale": self.guidance.get(modality)}


@dataclass
class Judged:
    """One answer, judged.

    Attributes:
        request: what was asked.
        text: everything that the answer says in words.
        medium: the first medium of the kind asked for; None where it is missing, and for text.
        verdict: (shape, colour) that the judge found; None where there is nothing to judge.
        right: shape and colour are both right (of a question in words: the answer is).
        motion: which way the clip moves, or is said to move.
        missing: nothing of the kind asked for came.
        unasked: modalities that came without having been asked for, or more often than that.
    """

    request: Request
    text: str
    medium: Any = None
    verdict: tuple[str | None, str | None] | None = None
    right: bool = False
    motion: str | None = None
    missing: bool = False
    unasked: tuple[str, ...] = ()

    @property
    def shape_right(self) -> bool:
        return self.verdict is not None and self.verdict[0] == self.request.thing.shape

    @property
    def colour_right(self) -> bool:
        return self.verdict is not None and self.verdict[1] == self.request.thing.colour

    @property
    def motion_right(self) -> bool:
        return self.motion == self.request.motion


def ask(
    model: MultimodalModel,
    processor: MultimodalProcessor,
    requests: Sequence[Request],
    settings: Settings,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[tuple[Request, Answer]]:
    """Answers in the model's own way: greedily, nothing required and nothing forbidden.

    Requests for the same kind of medium are answered together, so that each decoder has full batches.
    """
    ordered = sorted(requests, key=lambda request: WAYS.index(request.target))  # stable
    for number, batch in enumerate(batches(ordered, settings.batch_size)):
        inputs = processor.apply_chat_template(
            [request.messages() for request in batch], tokenize=True, add_generation_prompt=True
        )
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        kwargs = {key: settings.sampling(decoder.modality) for key, decoder in model.decoders.items()}
        answers = model.generate(
            **inputs.to(model.device),
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            decoder_kwargs={key: {"generator": generator, **options} for key, options in kwargs.items()},
        ).answers
        yield from zip(batch, answers, strict=True)
        progress(len(batch))


def judge(request: Request, answer: Answer, judges: Judges, sampling_rate: int) -> Judged:
    """One answer judged; `sampling_rate` is that of the sounds, Hz."""
    media = {way: [s.content for s in answer.segments if s.type == way] for way in WAYS[1:]}
    unasked = tuple(way for way, found in media.items() if len(found) > (way == request.target))
    judged = Judged(request, answer.text, unasked=unasked)
    if request.target == "text":
        judged.missing = not answer.text.strip()
        words = read_words(answer.text)
        judged.verdict = words.thing
        judged.motion = words.motion
        if request.source != "text":
            judged.right = is_thing(judged.verdict, request.thing)
        elif request.thing is not None:
            judged.right = answers_question(answer.text, request.reference[0], request.thing)
        else:
            judged.right = answer.text.strip() in request.reference
        return judged
    judged.missing = not media[request.target]
    if not judged.missing:
        judged.medium = media[request.target][0]
        judged.verdict = judge_media(request.target, [judged.medium], judges, sampling_rate)[0]
        judged.right = is_thing(judged.verdict, request.thing)
        if request.target == "video":
            judged.motion = judges.motion([judged.medium])[0]
    return judged


def judge_media(
    modality: str, media: Sequence[Any], judges: Judges, sampling_rate: int
) -> list[tuple[str | None, str | None]]:
    """(shape, colour) of media as decoders give them."""
    if modality == "audio":
        return judges.audio([np.nan_to_num(sound) for sound in media], sampling_rate)
    return {"image": judges.image, "video": judges.video}[modality](media)


def is_thing(verdict: tuple[str | None, str | None], thing: Thing) -> bool:
    return verdict == (thing.shape, thing.colour)


def batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
