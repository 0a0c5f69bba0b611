"""A suite: which rows are asked, how, and which metrics are taken; one YAML file."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anygpt.data.dataset import DataSource
from anygpt.errors import InputError
from anygpt.media.types import MEDIA
from anygpt.settings import parse_settings

TURNS = ("last", "all")
BASELINES = ("upper_bound", "caption_baseline", "without_media")


@dataclass
class Ask:
    """How the model is asked.

    Attributes:
        require: media types that every answer must hold.
        forbid: media types that no answer may hold; null forbids those that no metric looks at.
        prompt: what the user says in place of the row's own words, which `{text}` stands for; null leaves them.
        caption_prompt: what the user says where the model is to describe a medium (`{type}`) for the caption baseline.
        turns: `last` asks for a conversation's last answer, `all` for each with the true ones before it.
        choices: answers to choose from by likelihood; `lines` takes those that the question lists, as `A. a cat`. Null
            lets the model write.
        num_inference_steps, guidance_scale: of every decoder; the checkpoint's defaults if null.
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
    turns: str = "last"
    choices: list[str] | str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    decoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    max_new_tokens: int = 64
    num_beams: int = 1
    batch_size: int = 16
    num_workers: int = 0
    seed: int = 0


@dataclass
class Composition:
    """Prompts of our own grammar in place of data; see `anygpt.evaluation.composition`.

    Attributes:
        per_category: prompts of each category.
        seed: of the prompts.
    """

    per_category: int = 100
    seed: int = 0


@dataclass
class MetricSpec:
    """A metric and its options; which of them it takes is in `anygpt.evaluation.metrics.METRICS`.

    Attributes:
        metric: a key of that table.
        name: in the results; the metric's own by default, with its features where two would be the same.
        features: id or folder of the network whose features it looks at, or `inception`.
        revision: branch, tag or commit of that id.
        modality: media type that it looks at, where the metric leaves it open.
        num_frames: frames of a clip that are looked at, evenly spaced.
        subset_size: samples of a block, for KID.
        detector: id or folder of an open-vocabulary detector, for compositions.
        threshold: of its detections.
    """

    metric: str = ""
    name: str | None = None
    features: str | None = None
    revision: str | None = None
    modality: str | None = None
    num_frames: int | None = None
    subset_size: int | None = None
    detector: str | None = None
    threshold: float | None = None


@dataclass
class Suite:
    """All settings.

    Attributes:
        name: of the suite, in reports.
        data: files, of any format that training reads.
        composition: prompts of our own grammar in place of data.
        ask: how the model is asked.
        metrics: what is taken.
        baselines: what stands beside the model's numbers; null takes all that fit the rows.
        limit: rows that are asked, drawn evenly from all; null asks all.
        shown: rows in the report.
    """

    name: str = ""
    data: list[DataSource] = field(default_factory=list)
    composition: Composition | None = None
    ask: Ask = field(default_factory=Ask)
    metrics: list[MetricSpec] = field(default_factory=list)
    baselines: list[str] | None = None
    limit: int | None = None
    shown: int = 24


def read_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """A suite file with dotted overrides (`--ask.seed 1`) over it; data paths are relative to the working directory.

    Raises:
        InputError: no such file, unknown settings (all of them), values of a wrong type or out of range.
    """
    if not Path(path).is_file():
        raise InputError(f"--suite {str(path)!r} is no file; give toyworld, or a YAML file as in configs/evaluation/")
    suite = parse_settings(["--config", str(path), *overrides], Suite)
    suite.name = suite.name or Path(path).stem
    check_values(suite)
    return suite


def check_values(suite: Suite) -> None:
    """Raise one `InputError` that names every value out of range."""
    ask = suite.ask
    media = [("ask.require", ask.require), ("ask.forbid", ask.forbid or []), ("ask.decoders", ask.decoders)]
    rules = [
        *((f"ask.{name}", getattr(ask, name), getattr(ask, name) >= 1, "at least 1")
          for name in ("max_new_tokens", "num_beams", "batch_size")),
        ("ask.num_workers", ask.num_workers, ask.num_workers >= 0, "at least 0"),
        ("ask.seed", ask.seed, 0 <= ask.seed < 2**32, "from 0 to 4294967295"),
        ("ask.turns", ask.turns, ask.turns in TURNS, " or ".join(TURNS)),
        ("ask.guidance_scale", ask.guidance_scale, math.isfinite(ask.guidance_scale or 0), "a finite number"),
        ("ask.choices", ask.choices, not isinstance(ask.choices, str) or ask.choices == "lines", "a list, or lines"),
        ("limit", suite.limit, suite.limit is None or suite.limit >= 1, "at least 1, or null"),
        *((f"metrics[{i}].{name}", value, value is None or value >= 1, "at least 1")
          for i, spec in enumerate(suite.metrics)
          for name, value in (("num_frames", spec.num_frames), ("subset_size", spec.subset_size))),
        ("shown", suite.shown, suite.shown >= 0, "at least 0"),
        *((name, kind, kind in MEDIA, " or ".join(MEDIA)) for name, kinds in media for kind in kinds),
        *(("baselines", name, name in BASELINES, " or ".join(BASELINES)) for name in suite.baselines or []),
    ]  # fmt: skip
    faults = [f"{name} is {value!r}, expected {expected}" for name, value, good, expected in rules if not good]
    if bool(suite.data) == bool(suite.composition):
        faults.append("a suite has either data, as in [{path: captions.jsonl}], or composition")
    if not suite.metrics:
        faults.append("metrics is empty, expected at least one, as in [{metric: cider}]")
    if faults:
        raise InputError("; ".join(faults))


def near(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about an unknown name."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"(known: {', '.join(known)})"
