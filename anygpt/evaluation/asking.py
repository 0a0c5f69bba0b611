"""The model's answers to rows, and those of what stands beside it: the upper bound and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash
from torch.utils.data import DataLoader

from anygpt.data.collation import NOT_FOR_MODEL, Collator, move
from anygpt.data.dataset import ConversationDataset, LoadedSample
from anygpt.data.schema import ContentPart, Message, Sample
from anygpt.decoders.conditions import Condition
from anygpt.errors import InputError
from anygpt.evaluation.rows import Row, conversation, reworded, without_media
from anygpt.evaluation.suite import BASELINES, Suite
from anygpt.outputs import Answer, Segment
from anygpt.sequence.merging import IGNORE


@dataclass(frozen=True)
class Way:
    """A way of answering: what is loaded of a row, and what is made of it."""

    sample_of: Callable[[Row], Sample]
    answer: Callable[[list[Row], list[LoadedSample]], list[Answer]]


class Asker:
    """A model that answers rows.

    A row's answer depends on the suite's settings and its own id alone: text is searched, not sampled, and the noise of
    its media comes from (seed, id).

    Args:
        model, processor: in eval mode, on its device.
        suite: how to ask.
        looked_at: media types that the metrics look at.

    Raises:
        InputError: something is required that no decoder makes, or an option that a decoder does not have.
    """

    def __init__(self, model: Any, processor: Any, suite: Suite, looked_at: Sequence[str]):
        self.model, self.processor, self.suite, ask = model, processor, suite, suite.ask
        self.makes = {decoder.modality: key for key, decoder in model.decoders.items()}
        if lacking := sorted({*ask.require, *looked_at} - set(self.makes)):
            makes = ", ".join(self.makes) or "text alone"
            raise InputError(
                f"the suite looks at {', '.join(lacking)}, and the model makes {makes}: take another suite"
            )
        self.looked_at = list(looked_at)
        self.require = [self.makes[kind] for kind in ask.require]
        unwanted = set(self.makes) - {*ask.require, *looked_at} if ask.forbid is None else set(ask.forbid)
        self.forbid = [self.makes[kind] for kind in sorted(unwanted & set(self.makes))]
        steering = {"num_inference_steps": ask.num_inference_steps, "guidance_scale": ask.guidance_scale}
        self.options = {
            key: {name: value for name, value in (steering | ask.decoders.get(kind, {})).items() if value is not None}
            for kind, key in self.makes.items()
        }
        model.check_request(self.require, self.forbid, self.options)
        self.collator = Collator(processor)

    def ways(self, rows: Sequence[Row], words: bool) -> dict[str, Way]:
        """By name: `model`, and those of the suite's baselines that fit; `words`: whether a metric looks at words."""
        known = {
            "model": Way(lambda row: row.prompt, self.choose if self.suite.ask.choices else self.write),
            "upper_bound": Way(_in_words, lambda rows, _: self.draw(rows, [row.captions for row in rows])),
            "caption_baseline": Way(self._to_describe, self.draw_described),
            "without_media": Way(_in_words, self.choose if self.suite.ask.choices else self.write),
        }
        draws = any(set(row.captions) & set(self.looked_at) for row in rows)
        fits = {
            "upper_bound": draws,
            "caption_baseline": draws,
            "without_media": words and any(row.sources for row in rows),
        }
        chosen = [name for name in BASELINES if fits[name]] if self.suite.baselines is None else self.suite.baselines
        if wrong := [name for name in chosen if not fits[name]]:
            raise InputError(f"baselines: {wrong[0]} does not fit the rows and metrics of this suite")
        return {name: known[name] for name in ("model", *chosen)}

    def answers(self, way: Way, rows: Sequence[Row]) -> Iterator[tuple[list[Row], list[Answer]]]:
        """Rows with their answers, batch by batch."""
        ask = self.suite.ask
        if not rows:
            return
        dataset = ConversationDataset([way.sample_of(row) for row in rows], num_video_frames=self._num_frames())
        loader = DataLoader(dataset, ask.batch_size, collate_fn=list, num_workers=ask.num_workers)
        for number, items in enumerate(loader):
            batch = list(rows[number * ask.batch_size :][: len(items)])
            with torch.inference_mode():
                yield batch, way.answer(batch, items)

    def _num_frames(self) -> int | None:
        """Of a clip, as many frames are kept as the encoder that looks closest samples."""
        counts = (getattr(one, "num_frames", None) for one in self.processor.encoder_processors.values())
        return max(filter(None, counts), default=None)

    # ---- the model's own

    def write(self, rows: list[Row], items: list[LoadedSample], describe: bool = False) -> list[Answer]:
        """What the model says; to `describe` it says it in words alone."""
        ask = self.suite.ask
        require, forbid = ([], list(self.makes.values())) if describe else (self.require, self.forbid)
        batch = self.processor.apply_chat_template(
            [conversation(item) for item in items], tokenize=True, add_generation_prompt=True
        )
        seeds = self._seeds(rows)
        output = self.model.generate(
            **batch.to(self.model.device),
            max_new_tokens=ask.max_new_tokens + sum(len(self.model.signal_tokens.ids[key]) for key in require),
            do_sample=False,
            num_beams=ask.num_beams,
            require=require,
            forbid=forbid,
            decoder_kwargs={key: {**options, "seed": seeds} for key, options in self.options.items()},
        )
        return output.answers

    def choose(self, rows: list[Row], items: list[LoadedSample]) -> list[Answer]:
        """Of each row's choices the likeliest, by the mean log-probability of its tokens."""
        pairs = [(row, item, choice) for row, item in zip(rows, items, strict=True) for choice in row.choices]
        scores: list[float] = []
        for start in range(0, len(pairs), len(items)):
            scores += self._log_probabilities([_answered(item, c) for _, item, c in pairs[start : start + len(items)]])
        best: dict[str, tuple[float, str]] = {}
        for (row, _, choice), score in zip(pairs, scores, strict=True):
            best[row.id] = max(best.get(row.id, (score, choice)), (score, choice), key=lambda pair: pair[0])
        return [Answer([Segment("text", best[row.id][1])]) for row in rows]

    def _log_probabilities(self, items: list[LoadedSample]) -> list[float]:
        """The mean log-probability of the tokens of each sample's last answer."""
        batch = self.collator(items)
        if batch["bad_samples"]:
            raise InputError(batch["bad_samples"][0].reason)
        batch = {name: value for name, value in batch.items() if name not in NOT_FOR_MODEL}
        output = self.model(**move(batch, self.model.device), return_logits=True)
        found = []
        for logits, labels in zip(output.logits, output.labels, strict=True):
            places = (labels != IGNORE).nonzero()[:, 0]
            # earlier answers have labels too: the last one's stand together
            begin = (places.diff() > 1).nonzero()[-1] + 1 if (places.diff() > 1).any() else 0
            places = places[int(begin) :]
            chosen = logits[places - 1].float().log_softmax(-1).gather(1, labels[places, None])
            found.append(float(chosen.mean()))
        return found

    # ---- what stands beside

    def draw(self, rows: list[Row], captions: Sequence[dict[str, str]]) -> list[Answer]:
        """What the decoders make of captions through their own text encoders."""
        answers = [Answer() for _ in rows]
        for kind in self.looked_at:
            decoder = self.model.decoders[self.makes[kind]]
            wanted = [i for i, caption in enumerate(captions) if kind in caption]
            if not wanted:
                continue
            seeds = self._seeds([rows[i] for i in wanted])
            options = decoder.options({**self.options[self.makes[kind]], "seed": seeds})
            arguments = decoder.module.sampling_arguments(options, [0] * len(wanted))
            condition = Condition.of(decoder.module.encode_text([captions[i][kind] for i in wanted]))
            for i, content in zip(wanted, decoder.module.sample(condition, **arguments), strict=True):
                answers[i].segments.append(Segment(kind, content, self.makes[kind], rate=decoder.module.rate))
        return answers

    def draw_described(self, rows: list[Row], items: list[LoadedSample]) -> list[Answer]:
        """What the decoders make of the model's own description of what it is given; given words, of these."""
        said = [row.question for row in rows]
        if shown := [i for i, row in enumerate(rows) if row.sources]:
            described = self.write([rows[i] for i in shown], [items[i] for i in shown], describe=True)
            for i, answer in zip(shown, described, strict=True):
                said[i] = answer.text
        drawn = self.draw(rows, [dict.fromkeys(row.captions, text) for row, text in zip(rows, said, strict=True)])
        return [Answer([Segment("text", text), *one.segments]) for text, one in zip(said, drawn, strict=True)]

    def _to_describe(self, row: Row) -> Sample:
        if not row.sources:
            return row.prompt
        prompt = self.suite.ask.caption_prompt.replace("{type}", list(row.sources)[-1])
        return replace(row.prompt, messages=reworded(row.prompt.messages, prompt))

    def _seeds(self, rows: Sequence[Row]) -> list[int]:
        """One a row."""
        return [xxhash.xxh3_64_intdigest(f"{self.suite.ask.seed} {row.id}".encode()) >> 1 for row in rows]


def _in_words(row: Row) -> Sample:
    return replace(row.prompt, messages=without_media(row.prompt.messages))


def _answered(item: LoadedSample, choice: str) -> LoadedSample:
    answer = Message("assistant", (ContentPart("text", choice),))
    return replace(item, sample=replace(item.sample, messages=(*item.sample.messages, answer)))
