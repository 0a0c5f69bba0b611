"""Proportions and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

Z_95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927), also valid at 0 and 1 and for few trials; (0, 1) for none."""
    if n == 0:
        return 0.0, 1.0
    share, z = right / n, Z_95
    centre = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def share(outcomes: Iterable[bool]) -> dict[str, Any]:
    """`{"rate", "right", "n", "interval"}` of outcomes; the rate is None if there are none."""
    outcomes = list(outcomes)
    right, n = sum(outcomes), len(outcomes)
    return {"rate": right / n if n else None, "right": right, "n": n, "interval": list(wilson_interval(right, n))}


def bootstrap_interval(values: np.ndarray, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Deterministic 95% bootstrap percentile interval of the mean of `(n,)` values, at least one (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
