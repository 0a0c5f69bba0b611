"""Proportions with their intervals, and the formatting of a report's numbers."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

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


def outputs_of(report: dict[str, Any]) -> list[str]:
    return list(next(iter(report["matrix"].values())))


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}" if 0 < share < 1 else f"{share:.0%}"


def interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0] * 100:.0f}–{bounds[1] * 100:.0f}"


def rate(found: dict[str, Any]) -> str:
    return f"{percent(found['rate'])} ({found['right']} of {found['n']})"


def turn_lines(turns: Sequence[dict[str, Any]]) -> list[str]:
    """Results of conversations, one line per turn."""
    return [
        f"turn {number}: right {rate(turn['right'])}, missing {rate(turn['missing'])}, unasked {rate(turn['unasked'])}"
        for number, turn in enumerate(turns, 1)
    ]
