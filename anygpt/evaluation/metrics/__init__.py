"""The table of metrics: what each looks at, what it needs of a row, and how it is made. A new one is an entry."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from anygpt.errors import InputError
from anygpt.evaluation.metrics import detection, distances, similarity
from anygpt.evaluation.metrics.base import Batch, Item, Mean, Metric, Value
from anygpt.evaluation.metrics.features import load_network
from anygpt.evaluation.rows import Row
from anygpt.evaluation.suite import MetricSpec, near
from anygpt.media.types import MEDIA

PACKAGES = ("torchmetrics", "pycocoevalcap")
Loader = Callable[..., Any]


@dataclass(frozen=True)
class Kind:
    """A metric.

    Attributes:
        make: `(spec, modality, load)`, where `load(classify=False)` gives the network that the spec names.
        modality: what it looks at: `text`, a media type, or None for the one that `modality` or the suite names.
        needs: of a row: `references`, `choices`, `caption`, `expected`; `target`, `source`: a true medium, a given one.
        features: its network where the spec names none.
        options: of `MetricSpec`, that it takes beside `features`, `revision` and `modality`.
        higher: whether more is better.
    """

    make: Callable[[MetricSpec, str, Loader], Metric]
    modality: str | None
    needs: tuple[str, ...]
    features: str | None = None
    options: tuple[str, ...] = ()
    higher: bool = True


def _captions(kind: str) -> Kind:
    def make(spec: MetricSpec, modality: str, load: Loader) -> Metric:
        from anygpt.evaluation.metrics.text import CaptionMetric  # its library is an extra

        return CaptionMetric(kind)

    return Kind(make, "text", ("references",))


def _answers(name: str, needs: tuple[str, ...] = ("references",)) -> Kind:
    def make(spec: MetricSpec, modality: str, load: Loader) -> Metric:
        from anygpt.evaluation.metrics import text  # its library is an extra

        if name == "vqa":
            return Mean(lambda batch: [text.vqa_accuracy(i.text, i.row.references) for i in batch.items])
        return Mean(text.exact_match)

    return Kind(make, "text", needs)


def _distance(cls: type, modality: str | None, features: str | None, *options: str, frames: bool = False) -> Kind:
    def make(spec: MetricSpec, modality: str, load: Loader) -> Metric:
        given = {name: getattr(spec, name) for name in options if getattr(spec, name) is not None}
        return cls(load(), modality, frames=frames, **given)

    return Kind(make, modality, ("target",), features, options, higher=False)


def _cosine(modality: str | None, features: str, role: str, cls: type = Mean) -> Kind:
    def make(spec: MetricSpec, modality: str, load: Loader) -> Metric:
        return cls(similarity.cosine(load(), modality, role, spec.num_frames))

    return Kind(make, modality, (role,), features, ("num_frames",))


def _frames(score: Callable[..., similarity.Score], needs: tuple[str, ...]) -> Kind:
    return Kind(
        lambda spec, modality, load: Mean(score(load(), modality, spec.num_frames)),
        "video",
        needs,
        "openai/clip-vit-base-patch32",
        ("num_frames",),
    )


_CLIP, _CLAP = "openai/clip-vit-large-patch14", "laion/clap-htsat-unfused"
METRICS: dict[str, Kind] = {
    # words
    "bleu": _captions("bleu"),
    "rouge_l": _captions("rouge_l"),
    "cider": _captions("cider"),
    "exact_match": _answers("exact"),
    "vqa_accuracy": _answers("vqa"),
    "multiple_choice": _answers("exact", ("references", "choices")),
    # pictures
    "fid": _distance(distances.Frechet, "image", "inception"),
    "kid": _distance(distances.Kid, "image", "inception", "subset_size"),
    "cmmd": _distance(distances.Cmmd, "image", "openai/clip-vit-large-patch14-336"),
    "clip_score": _cosine("image", _CLIP, "caption", similarity.ClipScore),
    "clip_i": _cosine("image", _CLIP, "source"),
    "dino": _cosine("image", "facebook/dino-vits16", "source"),
    "composition": Kind(
        lambda spec, modality, load: detection.CompositionScore(
            detection.Detector(spec.detector or "google/owlvit-base-patch32", load.device, spec.threshold),
            load(),
            modality,
        ),
        "image",
        ("expected",),
        _CLIP,
        ("detector", "threshold"),
    ),
    # clips
    "fvd": _distance(distances.Frechet, "video", "MCG-NJU/videomae-base-finetuned-kinetics", "num_frames"),
    "frame_fid": _distance(distances.Frechet, "video", "inception", "num_frames", frames=True),
    "clipsim": _frames(similarity.frames_to_text, ("caption",)),
    "frame_consistency": _frames(similarity.frames_to_frames, ()),
    # sounds
    "fad": _distance(distances.Frechet, "audio", _CLAP),
    "clap_score": _cosine("audio", _CLAP, "caption"),
    "kl": Kind(
        lambda spec, modality, load: Mean(similarity.label_divergence(load(classify=True), modality)),
        "audio",
        ("target",),
        "MIT/ast-finetuned-audioset-10-10-0.4593",
        higher=False,
    ),
    # any medium
    "frechet_distance": _distance(distances.Frechet, None, None, "num_frames"),
    "kernel_distance": _distance(distances.Kid, None, None, "num_frames", "subset_size"),
    "similarity": _cosine(None, _CLIP, "target"),
}


@dataclass
class Load:
    """Loads the network that a metric names, each once for all metrics."""

    spec: MetricSpec
    kind: Kind
    modality: str
    device: torch.device
    loaded: dict[tuple, Any]

    def __call__(self, classify: bool = False) -> Any:
        path = self.spec.features or self.kind.features
        if path is None:
            raise InputError(f"metric {self.spec.metric} needs features: the id or folder of a network")
        key = (path, self.modality, self.spec.revision, classify)
        if key not in self.loaded:
            try:
                self.loaded[key] = load_network(path, self.modality, self.spec.revision, self.device, classify)
            except InputError as error:
                raise InputError(f"metric {self.spec.metric}: {error}") from error
        return self.loaded[key]


class MetricSet:
    """A suite's metrics over the answers of one way of answering.

    Args:
        specs: what the suite names.
        loaded: networks that were loaded before; others are added.
        device: where they run.

    Attributes:
        names: one a spec.
    """

    def __init__(self, specs: Sequence[MetricSpec], loaded: dict[tuple, Any], device: torch.device, only: str | None):
        self.specs, self.loaded, self.device = specs, loaded, device
        self.names = names_of(specs)
        self.modalities = [modality_of(spec, only) for spec in specs]
        self.metrics: list[Metric] = []
        for spec, modality in zip(specs, self.modalities, strict=True):
            kind = METRICS[spec.metric]
            self.metrics.append(kind.make(spec, modality, Load(spec, kind, modality, device, loaded)))
        self.taken = Counter()

    def update(self, items: Sequence[Item]) -> None:
        """Look at some answers; a metric passes over those that lack what it needs."""
        whole = Batch(items)
        for i, metric in enumerate(self.metrics):
            needs = needs_of(self.specs[i], self.modalities[i])
            fit = [item for item in items if all(item.has(need, self.modalities[i]) for need in needs)]
            self.taken[i] += len(fit)
            if fit:
                metric.update(whole if len(fit) == len(items) else Batch(fit))

    def compute(self, rows: int) -> dict[str, Value]:
        """Values by name; `left_out` of `rows` were passed over.

        Raises:
            InputError: a metric that could look at no answer.
        """
        values: dict[str, Value] = {}
        for i, (name, metric) in enumerate(zip(self.names, self.metrics, strict=True)):
            if not self.taken[i]:
                needs = needs_of(self.specs[i], self.modalities[i])
                raise InputError(f"{name} has no answer to look at: none of {rows} rows has {' and '.join(needs)}")
            left = {"left_out": rows - self.taken[i]} if self.taken[i] < rows else {}
            values |= {f"{name}{end}": value | left for end, value in metric.compute().items()}
        return values

    def describe(self) -> dict[str, Any]:
        """By name: the direction that is better, and the network with its revision."""
        told: dict[str, Any] = {}
        for name, spec, modality in zip(self.names, self.specs, self.modalities, strict=True):
            kind, path = METRICS[spec.metric], spec.features or METRICS[spec.metric].features
            told[name] = {"metric": spec.metric, "modality": modality, "better": "higher" if kind.higher else "lower"}
            network = next((n for key, n in self.loaded.items() if key[:3] == (path, modality, spec.revision)), None)
            if network is not None:
                told[name] |= {"features": path, "revision": network.revision}
            told[name] |= {o: getattr(spec, o) for o in kind.options if getattr(spec, o) is not None}
        return told


def names_of(specs: Sequence[MetricSpec]) -> list[str]:
    """The metrics' own names; with their features where two would be the same."""
    counts = Counter(spec.name or spec.metric for spec in specs)
    names = [spec.name or spec.metric for spec in specs]
    names = [
        f"{name}/{spec.features or METRICS[spec.metric].features}" if counts[name] > 1 else name
        for name, spec in zip(names, specs, strict=True)
    ]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"two metrics are called {twice[0]}; give each a name of its own")
    return names


def needs_of(spec: MetricSpec, modality: str) -> tuple[str, ...]:
    return METRICS[spec.metric].needs + (() if modality == "text" else ("answer",))


def modality_of(spec: MetricSpec, only: str | None) -> str:
    """What a metric looks at; `only` is the one medium of the suite's answers, where there is just one."""
    found = METRICS[spec.metric].modality or spec.modality or only
    if found is None:
        raise InputError(f"metric {spec.metric} looks at any medium; name one: modality: {' or '.join(MEDIA)}")
    return found


def check_specs(specs: Sequence[MetricSpec], rows: Sequence[Row], only: str | None) -> None:
    """Find metrics that do not fit a suite before anything is asked.

    Raises:
        InputError: an unknown metric, an option that it does not take, a package that is not installed, or a metric
            that no row has enough for.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"{', '.join(missing)} is not installed; pip install -e '.[evaluation]' brings it")
    for spec in specs:
        if spec.metric not in METRICS:
            raise InputError(f"there is no metric {spec.metric!r}; {near(spec.metric, list(METRICS))}")
        kind = METRICS[spec.metric]
        takes = {"metric", "name", *kind.options}
        takes |= {"modality"} if kind.modality is None else set()
        takes |= {"features", "revision"} if kind.modality != "text" else set()
        given = [f.name for f in fields(spec) if getattr(spec, f.name) is not None and f.name not in takes]
        if given:
            raise InputError(f"metric {spec.metric} takes no {', '.join(given)}; it takes {', '.join(sorted(takes))}")
        modality = modality_of(spec, only)
        if modality != "text" and modality not in MEDIA:
            raise InputError(f"metric {spec.metric}: modality is {modality!r}; expected {' or '.join(MEDIA)}")
        for need in kind.needs:
            if not any(Item(row, "", {}).has(need, modality) for row in rows):
                raise InputError(f"metric {spec.metric} ({modality}) does not fit: none of {len(rows)} rows has {need}")
    names_of(specs)
