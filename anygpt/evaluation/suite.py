"""A suite: which rows are asked, how, and which metrics are taken; one YAML file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from anygpt.data.dataset import DataSource
from anygpt.errors import InputError
from anygpt.media.types import MEDIA
from anygpt.settings import parse_settings

Baseline = Literal["upper_bound", "caption_baseline", "without_media"]


@dataclass
class Ask:
    """How the model is asked.

    Attributes:
        require: media types that every answer must hold.
        forbid: media types that no answer may hold; null forbids those that no metric looks at.
        prompt: what the user says in place of the row's own words, which `{text}` stands for.
        caption_prompt: what the user says for the caption baseline, about a medium of a `{type}`.
        turns: `last` asks for a conversation's last answer, `all` for each with the true ones before it.
        choices: answers to choose from by likelihood; `lines` takes those that the question lists, as `A. a cat`. Null
            lets the model write.
        num_inference_steps, guidance_scale: of every decoder; null for the checkpoint's own.
        decoders: further options by media type, as `generate` takes them: `{image: {height: 512, width: 512}}`.
        max_new_tokens: of an answer, beside the signal tokens of what is required.
        num_beams: 1 is greedy search.
        batch_size: rows answered at once; it changes no number beyond rounding.
        num_workers: processes that decode media.
        seed: of the noise, which also depends on the row's id, and of the choice of rows under `limit`.
    """

    require: list[str] = field(default_factory=list)
    forbid: list[str] | None = None
    prompt: str | None = None
    caption_prompt: str = "Describe this {type} in one sentence."
    turns: Literal["last", "all"] = "last"
    choices: list[str] | Literal["lines"] | None = None
    num_inference_steps: PositiveInt | None = None
    guidance_scale: float | None = None
    decoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    max_new_tokens: PositiveInt = 64
    num_beams: PositiveInt = 1
    batch_size: PositiveInt = 16
    num_workers: NonNegativeInt = 0
    seed: NonNegativeInt = 0


@dataclass
class MetricSpec:
    """A metric and its options; which of them it takes is in `anygpt.evaluation.metrics.METRICS`.

    Attributes:
        metric: a key of that table.
        name: in the results; the metric's own by default.
        features, revision: id or folder of the network whose features it looks at, or `inception`.
        modality: media type that it looks at, where the metric leaves it open.
        num_frames: frames of a clip that are looked at, evenly spaced.
        subset_size: samples of a block, for KID.
        detector, threshold: id or folder of an open-vocabulary detector, and what it must be sure of.
    """

    metric: str = ""
    name: str | None = None
    features: str | None = None
    revision: str | None = None
    modality: str | None = None
    num_frames: PositiveInt | None = None
    subset_size: PositiveInt | None = None
    detector: str | None = None
    threshold: float | None = None


@dataclass
class Suite:
    """All settings.

    Attributes:
        name: of the suite, in reports.
        data: files, of any format that training reads.
        composition: in place of data, so many prompts of our own grammar in each category.
        ask: how the model is asked.
        metrics: what is taken.
        baselines: what stands beside the model's numbers; null takes all that fit the rows.
        limit: rows that are asked, drawn evenly from all; null asks all.
        shown: rows in the report.
    """

    name: str = ""
    data: list[DataSource] = field(default_factory=list)
    composition: PositiveInt | None = None
    ask: Ask = field(default_factory=Ask)
    metrics: list[MetricSpec] = field(default_factory=list)
    baselines: list[Baseline] | None = None
    limit: PositiveInt | None = None
    shown: NonNegativeInt = 24


def read_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """A suite file with dotted overrides (`--ask.seed 1`) over it; data paths are relative to the working directory.

    Raises:
        InputError: no such file, unknown settings (all of them), values of a wrong type or out of range.
    """
    if not Path(path).is_file():
        raise InputError(f"--suite {str(path)!r} is no file; give toyworld, or a YAML file as in configs/evaluation/")
    suite = parse_settings(["--config", str(path), *overrides], Suite)
    suite.name, ask = suite.name or Path(path).stem, suite.ask
    faults = [
        f"ask.{name} names {kind!r}, expected {' or '.join(MEDIA)}"
        for name in ("require", "forbid", "decoders")
        for kind in getattr(ask, name) or ()
        if kind not in MEDIA
    ]
    if not math.isfinite(ask.guidance_scale or 0):
        faults.append(f"ask.guidance_scale is {ask.guidance_scale}, expected a finite number")
    if bool(suite.data) == bool(suite.composition):
        faults.append("a suite has either data, as in [{path: captions.jsonl}], or composition")
    if not suite.metrics:
        faults.append("metrics is empty, expected at least one, as in [{metric: cider}]")
    if faults:
        raise InputError("; ".join(faults))
    return suite
