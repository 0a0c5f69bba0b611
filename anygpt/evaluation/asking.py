"""Answers of the model, the upper bound and the baselines to the rows of a suite."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
import xxhash
from transformers import BatchFeature

from anygpt.data.collation import NOT_FOR_MODEL, Collator, move
from anygpt.data.dataset import ConversationDataset, LoadedSample
from anygpt.data.schema import ContentPart, Message, Sample
from anygpt.errors import InputError
from anygpt.evaluation.rows import Row, conversation, reworded, text_of
from anygpt.evaluation.suite import Baseline, Suite
from anygpt.outputs import Answer, Segment
from anygpt.sequence.merging import IGNORE

Way = tuple[Callable[[Row], Sample], Callable[[list[Row], list[LoadedSample]], list[Answer]]]
"""A way of answering: the sample to load for a row, and the function that answers loaded samples."""


class Asker:
    """Answers rows with a model.

    An answer depends on the suite's settings and the row alone: text is decoded greedily, noise seeded by (seed, id).

    Args:
        model, processor: in eval mode, on its device.
        looked_at: media types that the metrics use.

    An `InputError` refuses a required media type without a decoder, and an option that a decoder does not have.
    """

    def __init__(self, model: Any, processor: Any, suite: Suite, looked_at: Sequence[str]):
        self.model, self.processor, self.suite, ask = model, processor, suite, suite.ask
        self.looked_at = list(looked_at)
        self.makes = {maker.modality: key for key, maker in model.makers.items()}
        if lacking := sorted({*ask.require, *ask.decoders, *looked_at} - set(self.makes)):
            makes = ", ".join(self.makes) or "text alone"
            raise InputError(
                f"the suite sets or looks at {', '.join(lacking)}, and the model makes {makes}: take another suite"
            )
        self.require = [self.makes[kind] for kind in ask.require]
        unwanted = set(self.makes) - {*ask.require, *looked_at} if ask.forbid is None else set(ask.forbid)
        self.forbid = [self.makes[kind] for kind in sorted(unwanted & set(self.makes))]
        asked = {"num_inference_steps": ask.num_inference_steps, "guidance_scale": ask.guidance_scale}
        steering = {name: value for name, value in asked.items() if value is not None}
        self.options = {key: steering | ask.decoders.get(kind, {}) for kind, key in self.makes.items()}
        model.check_request(self.require, self.forbid, self.options)
        self.collator = Collator(processor)

    def ways(self, rows: Sequence[Row], words: bool) -> dict[str, Way]:
        """Ways of answering by name: `model` and the applicable baselines; `words`: whether a metric uses text."""
        say = self.choose if self.suite.ask.choices else self.write
        known = {
            "model": (lambda row: row.prompt, say),
            "upper_bound": (_in_words, lambda rows, _: self.draw(rows, [row.captions for row in rows])),
            "caption_baseline": (_to_describe, self.draw_described),
            "without_media": (_in_words, say),
            "without_reference": (lambda row: row.prompt, partial(self.write, edit=False)),
        }
        keys = [self.makes[kind] for kind in self.looked_at]
        decoders = [self.model.decoders[key] for key in keys if key in self.model.decoders]  # of codes there are none
        draws = any(decoder.modality in row.captions for row in rows for decoder in decoders)
        shown = any(row.sources for row in rows)
        edits = draws and shown and any(decoder.module.takes_reference for decoder in decoders)
        does_fit = {"without_media": words and shown, "without_reference": edits}
        fit = [name for name in get_args(Baseline) if does_fit.get(name, draws)]
        chosen = fit if self.suite.baselines is None else self.suite.baselines
        if wrong := [name for name in chosen if name not in fit]:
            raise InputError(f"baselines: {wrong[0]} does not fit the rows and metrics of this suite")
        return {name: known[name] for name in ("model", *chosen)}

    def answers(self, way: Way, rows: Sequence[Row]) -> Iterator[tuple[Row, Answer]]:
        size, (sample_of, answer) = self.suite.ask.batch_size, way
        if not rows:
            return
        # keep as many video frames as any encoder samples
        readers = [*self.processor.encoder_processors.values(), *self.processor.coded.values()]
        counts = (getattr(one, "num_frames", None) for one in readers)
        reads = {encoder.modality for encoder in self.model.encoders.values()}
        samples = [sample_of(row).fed_back(reads) for row in rows]  # as in training and in a chat
        dataset = ConversationDataset(samples, max(filter(None, counts), default=None))
        for start in range(0, len(rows), size):
            batch = list(rows[start : start + size])
            with torch.inference_mode():
                answers = answer(batch, [dataset[start + i] for i in range(len(batch))])
            yield from zip(batch, answers, strict=True)

    def write(
        self, rows: list[Row], items: list[LoadedSample], describe: bool = False, edit: bool = True
    ) -> list[Answer]:
        """The model's answers; text only if `describe`; unless `edit`, decoders do not see what they are to edit."""
        ask, seeds = self.suite.ask, self._seeds(rows)
        require, forbid = ([], list(self.makes.values())) if describe else (self.require, self.forbid)
        messages = [conversation(item, answered=bool(self.model.tokenizer_keys)) for item in items]
        batch = self.processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        batch = batch if edit else BatchFeature({k: v for k, v in batch.items() if k != "references"})
        return self.model.generate(
            **batch.to(self.model.device),
            max_new_tokens=ask.max_new_tokens + sum(len(self.model.signal_tokens.spans[key]) for key in require),
            do_sample=False,
            require=require,
            forbid=forbid,
            decoder_kwargs={key: {**options, "seed": seeds} for key, options in self.options.items()},
        ).answers

    def choose(self, rows: list[Row], items: list[LoadedSample]) -> list[Answer]:
        """Each row's most likely choice, by the mean log-probability of its tokens."""
        answers = []
        for row, item in zip(rows, items, strict=True):
            scores = self.log_probabilities([answered(item, choice) for choice in row.choices])
            answers.append(Answer([Segment("text", row.choices[scores.index(max(scores))])]))
        return answers

    def log_probabilities(self, items: list[LoadedSample]) -> list[float]:
        """Mean log-probability of the tokens of each sample's last answer."""
        batch = self.collator(items)
        if batch["bad_samples"]:
            raise InputError(batch["bad_samples"][0].reason)
        batch = {name: value for name, value in batch.items() if name not in NOT_FOR_MODEL}
        output = self.model(**move(batch, self.model.device), return_logits=True)
        found = []
        for logits, labels in zip(output.logits, output.labels, strict=True):
            places = (labels != IGNORE).nonzero()[:, 0]
            gaps = (places.diff() > 1).nonzero()[:, 0]  # earlier answers have labels too
            places = places[int(gaps[-1]) + 1 :] if len(gaps) else places
            chosen = logits[places - 1].float().log_softmax(-1).gather(1, labels[places, None])
            found.append(float(chosen.mean()))
        return found

    def draw(self, rows: list[Row], captions: Sequence[dict[str, str]]) -> list[Answer]:
        """Media that the decoders generate from captions with their own text encoders."""
        answers = [Answer() for _ in rows]
        for kind in self.looked_at:
            key = self.makes[kind]
            decoder = self.model.decoders.get(key)
            if decoder is None or not (wanted := [i for i, caption in enumerate(captions) if kind in caption]):
                continue
            options = decoder.options(self.options[key] | {"seed": self._seeds([rows[i] for i in wanted])})
            condition = decoder.module.encode_text([captions[i][kind] for i in wanted])
            contents = decoder.module.sample(condition, **decoder.module.sampling_arguments(options, [0] * len(wanted)))
            for i, content in zip(wanted, contents, strict=True):
                answers[i].segments.append(Segment(kind, content, key, rate=decoder.module.rate))
        return answers

    def draw_described(self, rows: list[Row], items: list[LoadedSample]) -> list[Answer]:
        """Media generated from the model's own description of the input media, or from the input text without media."""
        said = [row.question for row in rows]
        if shown := [i for i, row in enumerate(rows) if row.sources]:
            described = self.write([rows[i] for i in shown], [items[i] for i in shown], describe=True)
            for i, answer in zip(shown, described, strict=True):
                said[i] = answer.text
        drawn = self.draw(rows, [dict.fromkeys(row.captions, text) for row, text in zip(rows, said, strict=True)])
        return [Answer([Segment("text", text), *one.segments]) for text, one in zip(said, drawn, strict=True)]

    def _seeds(self, rows: Sequence[Row]) -> list[int]:
        return [xxhash.xxh3_64_intdigest(f"{self.suite.ask.seed} {row.id}".encode()) >> 1 for row in rows]


def _to_describe(row: Row) -> Sample:
    """A prompt to describe its last medium, if it has any."""
    if not row.sources:
        return row.prompt
    *before, last = row.prompt.messages
    last = reworded(last, f"Describe this {list(row.sources)[-1]} in one sentence.")
    return replace(row.prompt, messages=(*before, last))


def _in_words(row: Row) -> Sample:
    """A prompt without its media."""
    words = (Message(m.role, (ContentPart("text", text_of(m)),)) for m in row.prompt.messages)
    return replace(row.prompt, messages=tuple(words))


def answered(item: LoadedSample, choice: str) -> LoadedSample:
    answer = Message("assistant", (ContentPart("text", choice),))
    return replace(item, sample=replace(item.sample, messages=(*item.sample.messages, answer)))
