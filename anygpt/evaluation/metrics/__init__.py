"""Table of metrics: their inputs, requirements and constructors. A new metric is an entry."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from tqdm.auto import tqdm

from anygpt.data.rows import nearest
from anygpt.errors import InputError
from anygpt.evaluation.metrics import base, text
from anygpt.evaluation.metrics.base import Batch, Cmmd, Frechet, Item, Kid, Mean, MeanOfMeans, Metric, Value
from anygpt.evaluation.metrics.composition import CompositionScore, edits, scenes
from anygpt.evaluation.metrics.features import NETWORKS
from anygpt.evaluation.rows import Row
from anygpt.evaluation.suite import MetricSpec
from anygpt.media.types import MEDIA, is_timed

SCORED = 32  # answers scored in a batch
Load = Callable[..., Any]
"""`features.load_network`, cached."""


@dataclass(frozen=True)
class Kind:
    """A metric.

    Attributes:
        make: `(network, modality, **options) -> Metric`.
        modality: `text`, a media type, or None for the one that the spec or the suite names.
        needs: what a row must have: `references`, `choices`, `caption`, `expected`, `target` or `source` medium.
        features: default network; None for no network, `""` if the spec must name one.
        options: options of `MetricSpec` that it takes beside those of its network.
        higher: whether higher is better.
        classify: whether its network is a classifier.
        unanswered: whether it also takes rows whose answer lacks the medium, in place of leaving them out.
    """

    make: Callable[..., Metric]
    modality: str | None
    needs: tuple[str, ...]
    features: str | None = None
    options: tuple[str, ...] = ()
    higher: bool = True
    classify: bool = False
    unanswered: bool = False


def _mean(score: Callable, **options: Any) -> Callable[..., Metric]:
    return partial(Mean, score=partial(score, **options))


_WORDS = partial(Kind, modality="text", needs=("references",))
_DISTANCE = partial(Kind, needs=("target",), higher=False)
_FRAMES = partial(Kind, modality="video", features="openai/clip-vit-base-patch32", options=("num_frames",))
_CLIP, _CLAP = "openai/clip-vit-large-patch14", "laion/clap-htsat-unfused"
_TO_CAPTION, _TO_SOURCE = _mean(base.cosine, role="caption"), _mean(base.cosine, role="source")
METRICS: dict[str, Kind] = {
    "bleu": _WORDS(partial(text.CaptionMetric, scorer=Bleu)),
    "rouge_l": _WORDS(partial(text.CaptionMetric, scorer=Rouge)),
    "cider": _WORDS(partial(text.CaptionMetric, scorer=Cider)),
    "exact_match": _WORDS(_mean(text.exact_matches)),
    "vqa_accuracy": _WORDS(_mean(text.vqa_accuracies)),
    "retrieval": _WORDS(text.Retrieval, features=""),
    "multiple_choice": _WORDS(_mean(text.exact_matches), needs=("references", "choices")),
    "fid": _DISTANCE(Frechet, "image", features="inception"),
    "kid": _DISTANCE(Kid, "image", features="inception", options=("subset_size",)),
    "cmmd": _DISTANCE(Cmmd, "image", features="openai/clip-vit-large-patch14-336"),
    "clip_score": Kind(_TO_CAPTION, "image", ("caption",), _CLIP),
    "clip_i": Kind(_TO_SOURCE, "image", ("source",), _CLIP),
    "dino": Kind(_TO_SOURCE, "image", ("source",), "facebook/dino-vits16"),
    "composition": Kind(CompositionScore, "image", ("expected",), _CLIP, ("detector", "threshold")),
    "scenes": Kind(partial(MeanOfMeans, score=scenes), "image", ("caption",)),
    "toyworld_edit": Kind(_mean(edits), "image", ("target", "source")),
    "fvd": _DISTANCE(Frechet, "video", features="MCG-NJU/videomae-base-finetuned-kinetics", options=("num_frames",)),
    "frame_fid": _DISTANCE(partial(Frechet, by_frame=True), "video", features="inception", options=("num_frames",)),
    "clipsim": _FRAMES(_mean(base.clipsim), needs=("caption",)),
    "frame_consistency": _FRAMES(_mean(base.frame_consistency), needs=()),
    "fad": _DISTANCE(Frechet, "audio", features=_CLAP),
    "clap_score": Kind(_TO_CAPTION, "audio", ("caption",), _CLAP),
    "kl": _DISTANCE(
        _mean(base.label_divergence), "audio", features="MIT/ast-finetuned-audioset-10-10-0.4593", classify=True
    ),
    "frechet_distance": _DISTANCE(Frechet, None, features="", options=("num_frames",)),
    "kernel_distance": _DISTANCE(Kid, None, features="", options=("num_frames", "subset_size")),
    "media_retrieval": Kind(text.Retrieval, None, ("target",), "", ("num_frames",), unanswered=True),
    "similarity": Kind(_mean(base.cosine, role="target"), None, ("target",), "", ("num_frames",)),
}


@dataclass(frozen=True, eq=False)
class Chosen:
    """A metric of a suite, under its name in the results, with the medium (or `text`) that it looks at."""

    name: str
    kind: Kind
    modality: str
    spec: MetricSpec

    @property
    def needs(self) -> tuple[str, ...]:
        return self.kind.needs + (() if self.modality == "text" or self.kind.unanswered else ("answer",))

    def make(self, load: Load) -> Metric:
        """An empty metric; raises `InputError` if its network cannot be loaded."""
        spec, kind = self.spec, self.kind
        options = {option: getattr(spec, option) for option in kind.options if getattr(spec, option) is not None}
        try:
            path = spec.features or kind.features  # None for no network
            network = path and load(path, self.modality, spec.revision, kind.classify)
            return kind.make(network, self.modality, **options)
        except InputError as error:
            raise InputError(f"metric {spec.metric}: {error}") from error

    def describe(self, load: Load) -> dict[str, Any]:
        network = self.make(load).network
        told = {"modality": self.modality, "better": "higher" if self.kind.higher else "lower"}
        return told | ({"features": network.path, "revision": network.revision} if network is not None else {})


def choose(specs: Sequence[MetricSpec], rows: Sequence[Row], only: str | None) -> list[Chosen]:
    """Check the metrics of a suite; `only` is the single media type of its answers, or None.

    An `InputError` refuses an unknown metric, an option that it does not take, and needs that no row meets.
    """
    chosen = []
    named = Counter(spec.name or spec.metric for spec in specs)
    for spec in specs:
        if spec.metric not in METRICS:
            raise InputError(f"there is no metric {spec.metric!r}{nearest(spec.metric, METRICS)}")
        kind = METRICS[spec.metric]
        modality = kind.modality or spec.modality or only or ""
        takes = {"metric", "name", *kind.options} | ({"modality"} if kind.modality is None else set())
        takes |= set() if kind.features is None else {"features", "revision"}
        takes -= {"num_frames"} if modality in MEDIA and not is_timed(modality) else set()
        takes -= {"revision"} if (spec.features or kind.features) in NETWORKS else set()
        if given := [f.name for f in fields(spec) if getattr(spec, f.name) is not None and f.name not in takes]:
            raise InputError(f"metric {spec.metric} takes no {', '.join(given)}; it takes {', '.join(sorted(takes))}")
        if not (spec.features or kind.features) and kind.features is not None:
            raise InputError(f"metric {spec.metric} needs features: the id or folder of a network")
        if modality not in ("text", *MEDIA):
            raise InputError(f"metric {spec.metric} looks at any medium; name one: modality: {' or '.join(MEDIA)}")
        for need in kind.needs:
            if not any(Item(row, "", {}).find(need, modality) for row in rows):
                raise InputError(f"metric {spec.metric} ({modality}) does not fit: none of {len(rows)} rows has {need}")
        name = spec.name or spec.metric
        chosen.append(Chosen(f"{name}/{spec.features}" if named[name] > 1 else name, kind, modality, spec))
    if twice := [name for name, count in Counter(one.name for one in chosen).items() if count > 1]:
        raise InputError(f"two metrics are called {twice[0]}; give each a name of its own")
    return chosen


def score(metrics: Sequence[Chosen], load: Load, items: Sequence[Item], rows: int, way: str) -> dict[str, Value]:
    """Values by name of one way of answering, None for a metric without answers; `left_out` of `rows` were skipped.
    An `InputError` says that no metric got an answer."""
    made = {one: one.make(load) for one in metrics}
    count: Counter[Chosen] = Counter()
    for start in tqdm(range(0, len(items), SCORED), f"scoring {way}", unit="batch"):
        whole = Batch(items[start : start + SCORED])
        for one, metric in made.items():
            fit = [item for item in whole.items if all(item.find(need, one.modality) for need in one.needs)]
            count[one] += len(fit)
            if fit:
                metric.update(whole if len(fit) == len(whole.items) else Batch(fit))
    values: dict[str, Value] = {}
    for one, metric in made.items():
        left = {"left_out": rows - count[one]} if count[one] < rows else {}
        lack = {"value": None, "n": 0, "note": f"no answer has {' and '.join(one.needs)}"}
        found = metric.compute() if count[one] else {"": lack}
        values |= {f"{one.name}{end}": value | left for end, value in found.items()}
    if not any(count.values()):
        raise InputError(f"there is no answer to look at: none of {rows} rows has what the metrics need")
    return values
