"""Table of metrics: their inputs, requirements and constructors. A new metric is an entry."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from anygpt.errors import InputError
from anygpt.evaluation.metrics.base import (
    Batch,
    ClipSim,
    Cosine,
    FrameConsistency,
    Item,
    LabelDivergence,
    Metric,
    Value,
)
from anygpt.evaluation.metrics.composition import CompositionScore
from anygpt.evaluation.metrics.distances import Cmmd, Frechet, Kid
from anygpt.evaluation.metrics.features import load_network
from anygpt.evaluation.metrics.text import CaptionMetric, ExactMatch, VqaAccuracy
from anygpt.evaluation.rows import Row
from anygpt.evaluation.suite import MetricSpec
from anygpt.media.types import MEDIA

__all__ = ["METRICS", "Item", "MetricSet", "check_specs", "load_network", "modality_of"]


@dataclass(frozen=True)
class Kind:
    """A metric.

    Attributes:
        make: `(network, modality, **options) -> Metric`.
        modality: `text`, a media type, or None for the one that the spec or the suite names.
        needs: required of a row: `references`, `choices`, `caption`, `expected`, `target` (reference medium), `source`
            (input medium).
        features: default network; None for no network, `""` if the spec must name one.
        options: options of `MetricSpec` that it takes beside those of its network.
        higher: whether higher is better.
        classify: whether its network is a classifier.
    """

    make: Callable[..., Metric]
    modality: str | None
    needs: tuple[str, ...]
    features: str | None = None
    options: tuple[str, ...] = ()
    higher: bool = True
    classify: bool = False


_WORDS = partial(Kind, modality="text", needs=("references",))
_DISTANCE = partial(Kind, needs=("target",), higher=False)
_FRAMES = partial(Kind, modality="video", features="openai/clip-vit-base-patch32", options=("num_frames",))
_CLIP, _CLAP = "openai/clip-vit-large-patch14", "laion/clap-htsat-unfused"
METRICS: dict[str, Kind] = {
    "bleu": _WORDS(partial(CaptionMetric, scorer=Bleu)),
    "rouge_l": _WORDS(partial(CaptionMetric, scorer=Rouge)),
    "cider": _WORDS(partial(CaptionMetric, scorer=Cider)),
    "exact_match": _WORDS(ExactMatch),
    "vqa_accuracy": _WORDS(VqaAccuracy),
    "multiple_choice": _WORDS(ExactMatch, needs=("references", "choices")),
    "fid": _DISTANCE(Frechet, "image", features="inception"),
    "kid": _DISTANCE(Kid, "image", features="inception", options=("subset_size",)),
    "cmmd": _DISTANCE(Cmmd, "image", features="openai/clip-vit-large-patch14-336"),
    "clip_score": Kind(partial(Cosine, role="caption"), "image", ("caption",), _CLIP),
    "clip_i": Kind(partial(Cosine, role="source"), "image", ("source",), _CLIP),
    "dino": Kind(partial(Cosine, role="source"), "image", ("source",), "facebook/dino-vits16"),
    "composition": Kind(CompositionScore, "image", ("expected",), _CLIP, ("detector", "threshold")),
    "fvd": _DISTANCE(Frechet, "video", features="MCG-NJU/videomae-base-finetuned-kinetics", options=("num_frames",)),
    "frame_fid": _DISTANCE(partial(Frechet, by_frame=True), "video", features="inception", options=("num_frames",)),
    "clipsim": _FRAMES(ClipSim, needs=("caption",)),
    "frame_consistency": _FRAMES(FrameConsistency, needs=()),
    "fad": _DISTANCE(Frechet, "audio", features=_CLAP),
    "clap_score": Kind(partial(Cosine, role="caption"), "audio", ("caption",), _CLAP),
    "kl": _DISTANCE(LabelDivergence, "audio", features="MIT/ast-finetuned-audioset-10-10-0.4593", classify=True),
    "frechet_distance": _DISTANCE(Frechet, None, features="", options=("num_frames",)),
    "kernel_distance": _DISTANCE(Kid, None, features="", options=("num_frames", "subset_size")),
    "similarity": Kind(partial(Cosine, role="target"), None, ("target",), "", ("num_frames",)),
}


class MetricSet:
    """A suite's metrics over the answers of one way of answering; arguments as in `check_specs` and `load_network`."""

    def __init__(self, specs: Sequence[MetricSpec], only: str | None, load: Callable[..., Any]):
        self.count = Counter()
        self.metrics: dict[str, Metric] = {}
        self.kinds: dict[str, Kind] = {}
        for name, spec in zip(names_of(specs), specs, strict=True):
            kind, modality, network = METRICS[spec.metric], modality_of(spec, only), None
            options = {option: getattr(spec, option) for option in kind.options if getattr(spec, option) is not None}
            try:
                if kind.features is not None:
                    network = load(spec.features or kind.features, modality, spec.revision, kind.classify)
                self.metrics[name] = kind.make(network, modality, **options)
            except InputError as error:
                raise InputError(f"metric {spec.metric}: {error}") from error
            self.kinds[name] = kind

    def update(self, items: Sequence[Item]) -> None:
        """Add answers; a metric skips those that lack its needs."""
        whole = Batch(items)
        for name, metric in self.metrics.items():
            needs, kind = self._needs(name), metric.modality
            fit = [item for item in items if all(item.has(need, kind) for need in needs)]
            self.count[name] += len(fit)
            if fit:
                metric.update(whole if len(fit) == len(items) else Batch(fit))

    def _needs(self, name: str) -> tuple[str, ...]:
        return self.kinds[name].needs + (() if self.metrics[name].modality == "text" else ("answer",))

    def compute(self, rows: int) -> dict[str, Value]:
        """Values by name, None for a metric without answers; `left_out` is the number of skipped `rows`.

        Raises:
            InputError: no metric got an answer.
        """
        values: dict[str, Value] = {}
        for name, metric in self.metrics.items():
            left = {"left_out": rows - self.count[name]} if self.count[name] < rows else {}
            lack = {"value": None, "n": 0, "note": f"no answer has {' and '.join(self._needs(name))}"}
            found = metric.compute() if self.count[name] else {"": lack}
            values |= {f"{name}{end}": value | left for end, value in found.items()}
        if not any(self.count.values()):
            raise InputError(f"there is no answer to look at: none of {rows} rows has what the metrics need")
        return values

    def describe(self) -> dict[str, Any]:
        """Better direction, network and revision of each metric, by name."""
        told: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            told[name] = {"modality": metric.modality, "better": "higher" if self.kinds[name].higher else "lower"}
            if metric.network is not None:
                told[name] |= {"features": metric.network.path, "revision": metric.network.revision}
        return told


def names_of(specs: Sequence[MetricSpec]) -> list[str]:
    """Names of the metrics, with their features where two would be equal."""
    names = [spec.name or spec.metric for spec in specs]
    counts = Counter(names)
    return [f"{n}/{spec.features}" if counts[n] > 1 else n for n, spec in zip(names, specs, strict=True)]


def modality_of(spec: MetricSpec, only: str | None) -> str:
    """Modality of a metric."""
    return METRICS[spec.metric].modality or spec.modality or only or ""


def check_specs(specs: Sequence[MetricSpec], rows: Sequence[Row], only: str | None) -> None:
    """Check the metrics of a suite in advance; `only` is the single media type of its answers, or None.

    Raises:
        InputError: an unknown metric, an option that it does not take, or needs that no row meets.
    """
    for spec in specs:
        if spec.metric not in METRICS:
            close = difflib.get_close_matches(spec.metric, METRICS, n=1, cutoff=0)[0]
            raise InputError(
                f"there is no metric {spec.metric!r}; did you mean {close!r}? (known: {', '.join(METRICS)})"
            )
        kind = METRICS[spec.metric]
        takes = {"metric", "name", *kind.options} | ({"modality"} if kind.modality is None else set())
        takes |= set() if kind.features is None else {"features", "revision"}
        if given := [f.name for f in fields(spec) if getattr(spec, f.name) is not None and f.name not in takes]:
            raise InputError(f"metric {spec.metric} takes no {', '.join(given)}; it takes {', '.join(sorted(takes))}")
        if not (spec.features or kind.features) and kind.features is not None:
            raise InputError(f"metric {spec.metric} needs features: the id or folder of a network")
        modality = modality_of(spec, only)
        if modality not in ("text", *MEDIA):
            raise InputError(f"metric {spec.metric} looks at any medium; name one: modality: {' or '.join(MEDIA)}")
        for need in kind.needs:
            if not any(Item(row, "", {}).has(need, modality) for row in rows):
                raise InputError(f"metric {spec.metric} ({modality}) does not fit: none of {len(rows)} rows has {need}")
    if twice := [name for name, count in Counter(names_of(specs)).items() if count > 1]:
        raise InputError(f"two metrics are called {twice[0]}; give each a name of its own")
