"""Formatting of a report's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
