"""Assignment of samples to updates, a pure function of the seed and the number of the update."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
from torch.utils.data import Sampler

from anygpt.errors import InputError

MAX_ROWS = 2**20
SORTED_BATCHES = 64  # batches sorted by size together; a larger window makes the order less random


@dataclass(eq=False)
class UpdateSampler(Sampler[list[tuple[int, int]]]):
    """A batch sampler that yields the micro-batches of one rank: lists of `batch_size` pairs of a dataset index and a
    number that chooses one of the sample's wordings.

    Epochs, each in its own order, form one endless sequence, which is dealt out to the micro-batches of all ranks, so
    that no sample is left out: one process with batch size 2b and two with b see the same samples in the same
    micro-batches. An epoch draws `round(weight · length)` samples from each dataset: as many whole copies as fit, and
    the rest at random without repetition. Order and wordings depend on `(seed, epoch)` alone, so starting at update k
    continues as the uninterrupted run would. Do not let accelerate shard the batches again.

    With `groups` or `sizes` of the samples, micro-batches are formed within an epoch, from one group or from similar
    sizes within a window of `SORTED_BATCHES` micro-batches, and shuffled; the last one of a group may be shorter. With
    `max_tokens`, a rank's micro-batch has as many rows as fit, instead of `batch_size`: the number of rows times the
    longest row, or the sum of the rows if `packed`, is limited. Micro-batches then depend on the number of ranks.

    `lengths` and `weights` (1 by default) are of the concatenated datasets, `num_updates` of the whole run. An
    `InputError` refuses a row that exceeds `max_tokens`, and a weight so small that its dataset would never be drawn.
    """

    lengths: int | Sequence[int]
    _: KW_ONLY
    batch_size: int
    num_updates: int
    weights: Sequence[float] | None = None
    gradient_accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    start_update: int = 0
    groups: Sequence[int] | None = None
    sizes: Sequence[int] | None = None
    max_tokens: int | None = None
    packed: bool = False

    def __post_init__(self) -> None:
        self.lengths = [self.lengths] if isinstance(self.lengths, int) else list(self.lengths)
        self.groups = None if self.groups is None else np.asarray(self.groups)
        self.sizes = None if self.sizes is None else np.asarray(self.sizes)
        if self.batch_size * self.world_size > MAX_ROWS:
            raise InputError(f"batch_size is {self.batch_size:,}: a micro-batch has no more than {MAX_ROWS:,} rows")
        if self.max_tokens is not None and self.sizes.max() > self.max_tokens:
            raise InputError(
                f"max_batch_tokens is {self.max_tokens:,}, and a row has about {self.sizes.max():,} tokens: raise it, "
                "or set max_length"
            )
        weights = [1.0] * len(self.lengths) if self.weights is None else list(self.weights)
        self.draws = _draws(self.lengths, weights)
        self.epoch_size = sum(self.draws)

    def __len__(self) -> int:
        return (self.num_updates - self.start_update) * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start_update * self.gradient_accumulation_steps
        batches = self._ungrouped(first) if self.groups is None and self.sizes is None else self._grouped(first)
        for draws, indices in itertools.islice(batches, len(self)):
            yield list(zip(indices.tolist(), draws.tolist(), strict=True))

    def _ungrouped(self, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield, from micro-batch `first` on and endlessly, the draws and the indices of this rank."""
        micro, start = self.batch_size * self.world_size, self.batch_size * self.rank
        epoch, passed = divmod(first * micro, self.epoch_size)
        held = np.empty((2, 0), np.int64)
        for number in itertools.count(epoch):
            order = self._epoch_order(number)[passed:]
            held, passed = np.concatenate([held, [self._draws(number)[order], order]], axis=1), 0
            while held.shape[1] >= micro:
                drawn, indices = held[:, start : start + self.batch_size]
                yield drawn, indices
                held = held[:, micro:]

    def _grouped(self, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield what `_ungrouped` yields, for micro-batches with one group or rows of similar sizes."""
        micro = self.batch_size * self.world_size
        if self.max_tokens is not None:
            micro = max(1, self.max_tokens * self.world_size // max(1, int(self.sizes.mean())))
        for epoch in itertools.count():
            order, draws = self._epoch_order(epoch), self._draws(epoch)
            groups = np.zeros(len(order), np.int64) if self.groups is None else self.groups[order]
            batches: list[list[np.ndarray]] = []
            for group in np.unique(groups):
                members = order[groups == group]
                if self.sizes is not None and not self.packed:
                    windows = np.arange(len(members)) // (micro * SORTED_BATCHES)
                    members = members[np.lexsort((self.sizes[members], windows))]
                if self.max_tokens is None:
                    split = np.split(members, range(micro, len(members), micro))
                    batches += [np.array_split(batch, self.world_size) for batch in split]
                    continue
                split = self._by_tokens(members)
                split += [members[:0]] * (-len(split) % self.world_size)
                batches += [split[i : i + self.world_size] for i in range(0, len(split), self.world_size)]
            shuffled = np.random.default_rng([self.seed, epoch, 1]).permutation(len(batches))
            for place in shuffled[first:]:
                indices = batches[place][self.rank]
                yield draws[indices], indices
            first = max(0, first - len(batches))

    def _by_tokens(self, members: np.ndarray) -> list[np.ndarray]:
        cuts, first, held, longest = [], 0, 0, 0
        for i, size in enumerate(self.sizes[members].tolist()):
            held, longest = held + size, max(longest, size)
            if (held if self.packed else (i + 1 - first) * longest) > self.max_tokens:
                cuts.append(i)
                first, held, longest = i, size, size
        return np.split(members, cuts)

    def _draws(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, 2]).integers(2**31, size=sum(self.lengths))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        firsts = np.cumsum([0, *self.lengths[:-1]]).tolist()
        parts = []
        for first, length, draws in zip(firsts, self.lengths, self.draws, strict=True):
            copies, rest = divmod(draws, length)
            parts += [np.arange(first, first + length)] * copies
            parts.append(first + generator.permutation(length)[:rest])
        return generator.permutation(np.concatenate(parts))


def _draws(lengths: list[int], weights: list[float]) -> list[int]:
    if len(weights) != len(lengths):
        raise InputError(f"there are {len(lengths)} datasets and {len(weights)} weights: give one weight per dataset")
    draws = []
    for i, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"the weight of dataset {i} is {weight}, expected a finite number of at least 0")
        draws.append(round(weight * length))
        if weight > 0 and draws[-1] == 0:
            raise InputError(
                f"the weight of dataset {i}, {weight}, of {length} sample(s) rounds to none: "
                f"raise it to {1 / length:.3g} or more, or set it to 0 to leave the dataset out"
            )
    if sum(draws) == 0:
        raise InputError("all weights are 0: give at least one dataset a positive weight")
    return draws
