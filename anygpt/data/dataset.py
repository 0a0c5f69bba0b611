"""A map-style dataset of conversations whose media are decoded on access."""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from anygpt.cache.reading import CAPTIONS, CODES, FEATURES, LATENTS, Cached, FeatureCache, StaleCache
from anygpt.data.formats.base import DataSource
from anygpt.data.formats.reading import read_samples, with_unique_ids
from anygpt.data.schema import ContentPart, Sample
from anygpt.decoders.conditions import Condition
from anygpt.errors import InputError
from anygpt.media.files import DEFAULT_LIMITS, Audio, MediaLimits, Place, Video
from anygpt.media.types import read_media

Media = Image.Image | Video | Audio


@dataclass
class LoadedSample:
    """A sample with its decoded media by media type, in order of appearance: the user's `inputs`, the assistant's
    `targets` with one caption each, and cached encodings of the captions.

    A `Cached` replaces a cached medium. A file that occurs twice is the same object twice: do not modify it in place.
    `references` has one entry for each target of a decoder that takes them, None without.
    """

    sample: Sample
    inputs: dict[str, list[Media | Any]] = field(default_factory=dict)
    targets: dict[str, list[Media | Any]] = field(default_factory=dict)
    captions: dict[str, list[str]] = field(default_factory=dict)
    references: dict[str, list[Media | None]] = field(default_factory=dict)
    conditions: dict[str, list[Condition]] = field(default_factory=dict)
    cut: int = 0

    def in_order(self) -> Iterator[tuple[str, str, Media | Any]]:
        """Yield (role, media type, medium) in order of appearance, without targets that were not decoded."""
        given = (("user", self.inputs), ("assistant", self.targets))
        left = {(role, kind): iter(media) for role, by_kind in given for kind, media in by_kind.items()}
        for role, part in self.sample.media():
            for medium in itertools.islice(left.get((role, part.type), ()), 1):
                yield role, part.type, medium

    def first_messages(self, count: int) -> "LoadedSample":
        sample = replace(self.sample, messages=self.sample.messages[:count])
        kept = Counter((role == "assistant", part.type) for role, part in sample.media())

        def of(media: dict[str, list], answered: bool) -> dict[str, list]:
            return {kind: items[:count] for kind, items in media.items() if (count := kept[answered, kind])}

        answers = (self.targets, self.captions, self.references, self.conditions)
        cut = self.cut + len(self.sample.messages) - count
        return LoadedSample(sample, of(self.inputs, False), *(of(media, True) for media in answers), cut)


@dataclass(frozen=True)
class BadSample:
    """Placeholder for a sample that could not be loaded; the collator drops and counts it.

    kind: "bad", "long" (too many tokens) or "stale" (missing from the feature cache; stops the run in any case).
    """

    id: str
    reason: str
    kind: Literal["bad", "long", "stale"] = "bad"

    @classmethod
    def of(cls, sample: Sample, error: InputError, kind: Literal["bad", "long", "stale"] = "bad") -> "BadSample":
        return cls(sample.id, sample.naming(error), kind)


@dataclass(eq=False, repr=False)
class ConversationDataset(Dataset):
    """Samples in the order given: an index gives the first wording, `(index, number)` the wording of that number.

    Attributes:
        samples: from `read_samples`; repeated ids get a number appended.
        num_video_frames: frames per video, evenly spaced (see `read_video`); None keeps all.
        on_bad_sample: for media that cannot be decoded, "error" raises `InputError` and "skip" returns a `BadSample`,
            so that indices and lengths do not change.
        lengths, weights: one per data source, for `UpdateSampler`.
        faults: with "skip" and `from_files`, one `InputError` per row left out on reading.
        in_memory: keep decoded media, so that a process decodes each file once.
        decode_targets: whether to decode the assistant's media; False if only captions are needed.
        references: media types whose targets get a reference: their `source`, else the last one of the type before.
    """

    samples: Sequence[Sample]
    num_video_frames: int | None = None
    on_bad_sample: str = "error"
    limits: MediaLimits = DEFAULT_LIMITS
    _: KW_ONLY
    lengths: Sequence[int] = ()
    weights: Sequence[float] = (1.0,)
    faults: Sequence[InputError] = ()
    in_memory: bool = False
    decode_targets: bool = True
    references: Collection[str] = ()
    cache: FeatureCache | None = None

    def __post_init__(self) -> None:
        if self.on_bad_sample not in ("error", "skip"):
            raise InputError(f"on_bad_sample is {self.on_bad_sample!r}, expected 'error' or 'skip'")
        if not self.samples:
            raise InputError("the dataset has no samples: give at least one data file with a usable row")
        self.samples = with_unique_ids(self.samples)
        self.lengths = self.lengths or [len(self.samples)]
        self._kept: dict[tuple[str, Place], Media] = {}

    @classmethod
    def from_files(
        cls,
        sources: Sequence[DataSource],
        num_video_frames: int | None = None,
        on_bad_sample: str = "error",
        limits: MediaLimits = DEFAULT_LIMITS,
    ) -> "ConversationDataset":
        """Build a dataset from the samples of all files, one file after the other; each must have a usable row."""
        faults: list[InputError] = []
        by_source = []
        for source in sources:
            before = len(faults)
            by_source.append(read_samples(**vars(source), faults=faults if on_bad_sample == "skip" else None))
            if not by_source[-1]:
                raise InputError(f"{source.path} has no usable row, and the first fault is: {faults[before]}")
        lengths, weights = [len(samples) for samples in by_source], [source.weight for source in sources]
        whole = list(itertools.chain(*by_source))
        return cls(whole, num_video_frames, on_bad_sample, limits, lengths=lengths, weights=weights, faults=faults)

    def output_groups(self) -> list[int]:
        """Group number of each sample; samples whose targets have the same media types share one."""
        numbers: dict[frozenset[str], int] = {}
        kinds = (frozenset(p.type for role, p in s.media() if role == "assistant") for s in self.samples)
        return [numbers.setdefault(kind, len(numbers)) for kind in kinds]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | tuple[int, int]) -> LoadedSample | BadSample:
        index, draw = index if isinstance(index, tuple) else (index, 0)
        sample = self.samples[index].worded(draw)
        try:
            return self._load(sample)
        except InputError as error:
            if self.on_bad_sample == "error":
                raise
            return BadSample(sample.id, str(error), "stale" if isinstance(error, StaleCache) else "bad")

    def _load(self, sample: Sample) -> LoadedSample:
        loaded = LoadedSample(sample)
        decoded: dict[tuple[str | None, str, Place], Any] = {}  # each file is decoded once
        before: dict[str, Place] = {}
        for role, part in sample.media():
            answered = role == "assistant"
            if answered:
                loaded.captions.setdefault(part.type, []).append(part.caption)
                if (found := self._cached(sample, CAPTIONS, part.type, part.caption)) is not None:
                    loaded.conditions.setdefault(part.type, []).append(Condition(**found))
                if not self.decode_targets:
                    continue
                if part.type in self.references:
                    source = part.source or before.get(part.type)
                    found = None if source is None else self.decode(sample, "user", part.type, source)
                    loaded.references.setdefault(part.type, []).append(found)
            before[part.type] = part.path
            kind = None if self.cache is None else LATENTS if answered else FEATURES
            if kind is not None and part.type in self.cache.stores[CODES]:
                kind = CODES
            key = (kind, part.type, part.path)
            if key not in decoded:
                decoded[key] = self._medium(sample, role, part, kind)
            (loaded.targets if answered else loaded.inputs).setdefault(part.type, []).append(decoded[key])
        return loaded

    def _medium(self, sample: Sample, role: str, part: ContentPart, kind: str | None) -> Any:
        """A medium, or what the cache stores in place of it."""
        try:
            if (found := self._cached(sample, kind, part.type, part.path)) is not None:
                return Cached(found[kind])
        except OSError:
            pass  # decoding raises the proper error
        except StaleCache:
            self.decode(sample, role, part.type, part.path)  # unreadable media are not cached: raise their own error
            raise
        return self.decode(sample, role, part.type, part.path)

    def _cached(self, sample: Sample, kind: str, modality: str, content: Place | str) -> dict[str, Tensor] | None:
        try:
            return self.cache.get(kind, modality, content) if self.cache else None
        except StaleCache as error:
            raise StaleCache(f"{sample.name}: {error}") from error

    def use_cache(self, cache: FeatureCache) -> None:
        """Read from a cache. Captions, in every wording, are looked up now, so that a missing one does not end a run
        late; media are looked up when they are loaded, since that reads their files."""
        self.cache = cache
        for sample in self.samples if cache.stores[CAPTIONS] else ():
            for role, part in sample.media():
                for caption in (part.caption, *part.others) if role == "assistant" else ():
                    try:
                        cache.check_caption(part.type, caption)
                    except StaleCache as error:
                        raise StaleCache(f"{sample.name}: {error}") from error

    def decode(self, sample: Sample, role: str, media_type: str, path: Place) -> Media:
        """Decode one medium of a sample; an `InputError` names both."""
        if (media_type, path) in self._kept:
            return self._kept[media_type, path]
        try:
            medium = read_media(media_type, path, self.num_video_frames, self.limits)
            if self.in_memory:
                self._kept[media_type, path] = medium
            return medium
        except InputError as error:
            use = "target" if role == "assistant" else "input"
            raise InputError(f"{sample.name}, {use} {media_type}: {error}") from error
