"""The model's answers to requests, the baselines beside them, their judgement, and shares of right ones."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import FiniteFloat, NonNegativeInt, PositiveInt

from anygpt.decoders.conditions import Condition
from anygpt.decoders.module import ModalDecoderModule
from anygpt.media.types import is_heard
from anygpt.model.multimodal import MultimodalModel
from anygpt.outputs import Answer
from anygpt.processing.chat_template import answer_message
from anygpt.processing.processor import MultimodalProcessor
from anygpt.tokenizers.module import ModalTokenizerModule
from anygpt.toyworld import language
from anygpt.toyworld.evaluation.requests import TURNS, WAYS, Request
from anygpt.toyworld.judges import answers_question, load_judges, read_words
from anygpt.toyworld.render import SAMPLING_RATE, render
from anygpt.toyworld.world import MOTIONS, Thing

Verdict = tuple[str | None, str | None]
"""(shape, colour), each None if it is not clear."""
Z_95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
_OPTIONS = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
_MOVES = re.compile(rf"\s+(?:that\s+)?(?:moving|going|moves)\s+(?:{'|'.join(MOTIONS)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation.

    Attributes:
        samples: requests per cell of the matrix.
        talk_samples: number of questions in words, and also of lines of small talk and of nonsense requests.
        conversations: number of conversations of four exchanges.
        batch_size: requests answered at once, and captions drawn at once for the baselines.
        seed: seed of requests, renders and noise; the noise also depends on `batch_size`.
        things: `held_out`, never seen in alignment; `seen`; or `validation`, a subset of the seen ones, for choosing
            settings with a model that was trained on the others.
        baselines: whether to measure the upper bound and the caption baseline.
        max_new_tokens: per answer, signal tokens included; a medium's codes come on top.
        steps, guidance: settings of the decoders by modality; by default the checkpoint's own.
    """

    samples: PositiveInt = 20
    talk_samples: PositiveInt = 100
    conversations: PositiveInt = 160
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0
    things: Literal["held_out", "seen", "validation"] = "held_out"
    baselines: bool = True
    max_new_tokens: PositiveInt = 64
    steps: Mapping[str, PositiveInt] = field(default_factory=dict)
    guidance: Mapping[str, FiniteFloat] = field(default_factory=dict)

    def resolved(self, model: MultimodalModel) -> "Settings":
        """A copy with the decoders' own steps and guidance where none are given."""
        chosen = {}
        for setting, name in _OPTIONS.items():
            own = {m.modality: m.own_options[name] for m in model.makers.values() if name in m.own_options}
            chosen[setting] = own | dict(getattr(self, setting))
        codes = max((len(grid) for grid in model.signal_tokens.grids.values()), default=0)
        return replace(self, max_new_tokens=self.max_new_tokens + codes, **chosen)

    def sampling(self, modality: str) -> dict[str, Any]:
        given = {name: getattr(self, setting).get(modality) for setting, name in _OPTIONS.items()}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class Judged:
    """A judged answer.

    Attributes:
        text: all text of the answer.
        medium: the first medium of the requested type; None if it is missing, and for text.
        rate: frames or samples per second of the medium.
        verdict: (shape, colour) found by the judge; None if there is nothing to judge.
        right: whether shape and colour are both right, or, for a question in words, whether the answer is.
        motion: direction in which the clip moves, or in which the text says that it moves.
        missing: whether the answer has nothing of the requested type.
        unasked: modalities that were not requested, or that occur more than once.
    """

    request: Request
    text: str
    medium: Any = None
    rate: float | None = None
    verdict: Verdict | None = None
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


@dataclass
class Examiner:
    """Asks a model; `progress` is called with numbers of answers that are there."""

    model: MultimodalModel
    processor: MultimodalProcessor
    settings: Settings
    progress: Callable[[int], object] = lambda count: None

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer]]:
        """Generate answers greedily, with no modality required or forbidden.

        Requests for the same type of medium are batched together, so that each decoder has full batches.
        """
        ordered = sorted(requests, key=lambda request: WAYS.index(request.target))  # stable
        for number, batch in enumerate(batches(ordered, self.settings.batch_size)):
            messages = [request.messages() for request in batch]
            inputs = self.processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number)
            options = {key: self.settings.sampling(maker.modality) for key, maker in self.model.makers.items()}
            answers = self.model.generate(
                **inputs.to(self.model.device),
                max_new_tokens=self.settings.max_new_tokens,
                do_sample=False,
                decoder_kwargs={key: {"generator": generator, **asked} for key, asked in options.items()},
            ).answers
            yield from zip(batch, answers, strict=True)
            self.progress(len(batch))

    def hold(self, conversations: Sequence[Sequence[Request]]) -> list[list[Judged]]:
        """Hold all conversations, in which the model sees its own answers, and judge these: `[turn][conversation]`."""
        before: list[tuple[dict[str, Any], ...]] = [()] * len(conversations)
        judged = []
        for turn in range(TURNS):
            requests = [replace(one[turn], before=said) for one, said in zip(conversations, before, strict=True)]
            answers = {request.id: answer for request, answer in self.ask(requests)}
            judged.append([judge(request, answers[request.id]) for request in requests])
            before = [(*request.messages(), answer_message(answers[request.id])) for request in requests]
        return judged

    def upper_bound(self, things: Sequence[Thing]) -> dict[str, dict[str, Any]]:
        """`{output modality: share}` of right media that the decoders make of plain true captions; for clips also the
        share of right motions. A tokenizer is given renders in place of captions: decode(encode(render)).
        """
        result = {}
        for maker in self.model.makers.values():
            rng, drawn = np.random.default_rng([self.settings.seed, 77]), []
            for number in range(self.settings.samples):
                thing = things[number % len(things)]
                motion = language.pick(rng, MOTIONS) if maker.modality == "video" else None
                given = language.plain_caption(thing, motion)
                if isinstance(maker, ModalTokenizerModule):
                    given = render(maker.modality, thing, motion, rng)
                drawn.append((given, thing, motion))
            result[maker.modality] = self._draw(maker, drawn)
        return result

    def caption_baseline(self, judged: Sequence[Judged]) -> dict[str, dict[str, dict[str, Any]]]:
        """`{input modality: {output modality: share}}` of right media, for the same requests as the matrix, with text
        in place of the learned link: the decoder's own text encoder reads the model's description of its input (the
        matrix's own answers in text, in `judged`), or of a text the request itself.
        """
        said = {one.request.id: one.text for one in judged}
        result: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        for source, row in by_cell(judged).items():
            for decoder in self.model.decoders.values():
                drawn = []
                for request in (one.request for one in row[decoder.modality]):
                    caption = request.prompt
                    if source != "text":
                        described = said[request.id.replace(f"-{decoder.modality}-", "-text-")]
                        caption = moving_caption(described, request.motion)
                    drawn.append((caption, request.thing, request.motion))
                result[source][decoder.modality] = self._draw(decoder, drawn)
        return dict(result)

    def _draw(
        self, maker: ModalDecoderModule | ModalTokenizerModule, drawn: Sequence[tuple[Any, Thing, str | None]]
    ) -> dict[str, Any]:
        """Share of right media that a decoder makes of captions, or a tokenizer of renders; with things and motions."""
        module, generator, media = maker.module, torch.Generator().manual_seed(self.settings.seed), []
        for batch in batches(drawn, self.settings.batch_size):
            given = [one for one, _, _ in batch]
            self.progress(len(batch))
            if isinstance(maker, ModalTokenizerModule):
                given = [(one, SAMPLING_RATE) if is_heard(maker.modality) else one for one in given]
                media += module.decode(module.encode(given))
                continue
            condition = Condition.of(module.encode_text(given))
            options = maker.options({"generator": generator, **self.settings.sampling(maker.modality)})
            media += module.sample(condition, **module.sampling_arguments(options, [0] * len(batch)))
        found = list(zip(judge_media(maker.modality, media, module.rate), drawn, strict=True))
        result = share(verdict == (thing.shape, thing.colour) for (verdict, _), (_, thing, _) in found)
        if maker.modality == "video":
            result["motion"] = share(moves == motion for (_, moves), (_, _, motion) in found)
        return result


def judge(request: Request, answer: Answer) -> Judged:
    media = {way: [segment for segment in answer.segments if segment.type == way] for way in WAYS[1:]}
    unasked = tuple(way for way, found in media.items() if len(found) > (way == request.target))
    judged = Judged(request, answer.text, unasked=unasked)
    if request.target == "text":
        words = read_words(answer.text)
        judged.missing, judged.verdict, judged.motion = not answer.text.strip(), words.thing, words.motion
    elif media[request.target]:
        first = media[request.target][0]
        judged.medium, judged.rate = first.content, first.rate
        ((judged.verdict, judged.motion),) = judge_media(request.target, [first.content], first.rate)
    else:
        judged.missing = True
    if request.thing is None:
        judged.right = answer.text.strip() in request.reference
    elif request.source == request.target == "text":
        judged.right = answers_question(answer.text, request.reference[0], request.thing)
    else:
        judged.right = judged.shape_right and judged.colour_right
    return judged


def judge_media(modality: str, media: Sequence[Any], rate: float | None) -> list[tuple[Verdict, str | None]]:
    """Judge decoders' outputs: shape and colour, and the motion of clips."""
    judges = load_judges()
    if modality == "video":
        return list(zip(judges.video(media), judges.motion(media), strict=True))
    if modality == "image":
        return [(verdict, None) for verdict in judges.image(media)]
    sounds = [np.nan_to_num(sound) for sound in media]
    return [(verdict, None) for verdict in judges.audio(sounds, round(rate or SAMPLING_RATE))]


def moving_caption(caption: str, motion: str | None) -> str:
    """Replace the motion in a caption by the requested one.

    A full stop is kept, since a text encoder trained on sentences encodes a caption without one differently.
    """
    still = _MOVES.sub("", caption).strip()
    words = still.removesuffix(".")
    return words + (f" moving {motion}" if motion else "") + still[len(words) :]


def by_cell(judged: Iterable[Judged]) -> dict[str, dict[str, list[Judged]]]:
    """Answers by input and output, in the order of the matrix."""
    cells: dict[str, dict[str, list[Judged]]] = defaultdict(lambda: defaultdict(list))
    for one in sorted(judged, key=lambda one: (WAYS.index(one.request.source), WAYS.index(one.request.target))):
        cells[one.request.source][one.request.target].append(one)
    return cells


def batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927), also valid at 0 and 1 and for few trials; (0, 1) for none."""
    if n == 0:
        return 0.0, 1.0
    share, z = right / n, Z_95
    centre = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def share(outcomes: Iterable[bool]) -> dict[str, Any]:
    """`{"rate", "right", "n", "interval"}` of outcomes; the rate is None if there are none."""
    outcomes = list(outcomes)
    right, n = sum(outcomes), len(outcomes)
    return {"rate": right / n if n else None, "right": right, "n": n, "interval": list(wilson_interval(right, n))}
