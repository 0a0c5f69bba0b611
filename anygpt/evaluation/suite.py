"""A suite, read from one YAML file: the rows, how the model is prompted, and the metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from anygpt.data.dataset import DataSource
from anygpt.errors import InputError
from anygpt.media.types import MEDIA
from anygpt.settings import parse_settings

Baseline = Literal["upper_bound", "caption_baseline", "without_media", "without_reference"]


@dataclass
class Ask:
    """How the model is prompted.

    Attributes:
        require: media types that every answer must contain.
        forbid: media types that no answer may contain; null forbids those that no metric uses.
        prompt: text that replaces the row's own, which it may include as `{text}`.
        turns: `last` evaluates a conversation's last answer, `all` each answer, given the reference ones before it.
        choices: answers to choose from by likelihood; `lines` takes those listed in the question, such as `A. a cat`;
            if null, the model writes its answer.
        num_inference_steps, guidance_scale: settings of every decoder; null for the checkpoint's own.
        decoders: further options by media type, as `generate` takes them: `{image: {height: 512, width: 512}}`.
        max_new_tokens: maximum tokens of an answer, in addition to the signal tokens of required media.
        batch_size: rows answered at once; affects numbers only by rounding.
        seed: seed of the noise, which also depends on the row's id, and of the choice of rows under `limit`.
    """

    require: list[str] = field(default_factory=list)
    forbid: list[str] | None = None
    prompt: str | None = None
    turns: Literal["last", "all"] = "last"
    choices: list[str] | Literal["lines"] | None = None
    num_inference_steps: PositiveInt | None = None
    guidance_scale: float | None = None
    decoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    max_new_tokens: PositiveInt = 64
    batch_size: PositiveInt = 16
    seed: NonNegativeInt = 0


@dataclass
class MetricSpec:
    """A metric and its options; `anygpt.evaluation.metrics.METRICS` lists those that each metric takes.

    Attributes:
        metric: a key of that table.
        name: name in the results; the metric's own by default.
        features, revision: id or folder of the feature network, or `inception`, and its revision.
        modality: media type to evaluate, if the metric leaves it open.
        num_frames: evenly spaced frames of a clip to use.
        subset_size: samples per block, at least 2, for KID.
        detector, threshold: id or folder of an open-vocabulary detector, and its confidence threshold.
    """

    metric: str = ""
    name: str | None = None
    features: str | None = None
    revision: str | None = None
    modality: str | None = None
    num_frames: PositiveInt | None = None
    subset_size: PositiveInt | None = None
    detector: str | None = None
    threshold: ClosedUnitInterval | None = None


@dataclass
class Suite:
    """All settings of a suite.

    Attributes:
        name: name of the suite in reports.
        data: files, in any format that training reads.
        composition: in place of data, the number of composed prompts per category.
        ask: how the model is prompted.
        metrics: the metrics.
        baselines: baselines to report; null for all that fit the rows.
        limit: number of rows, drawn evenly from all; null for all.
    """

    name: str = ""
    data: list[DataSource] = field(default_factory=list)
    composition: PositiveInt | None = None
    ask: Ask = field(default_factory=Ask)
    metrics: list[MetricSpec] = field(default_factory=list)
    baselines: list[Baseline] | None = None
    limit: PositiveInt | None = None


def read_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Read a suite file with dotted overrides (`--ask.seed 1`); data paths are relative to the working directory.

    An `InputError` refuses a missing file, unknown settings, and values of a wrong type or out of range.
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
