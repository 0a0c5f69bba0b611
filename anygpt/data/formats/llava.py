"""LLaVA's JSON format, which many datasets use: `conversations`, markers, and files under `image`."""

from typing import Any

from anygpt.data.formats.turns import TurnsRow, inputs, messages
from anygpt.media.types import MEDIA


class LlavaRow(TurnsRow):
    """The last five keys, the row's origin and image sizes, are ignored."""

    model: Any = None
    source: Any = None
    data_source: Any = None
    width: Any = None
    height: Any = None

    @classmethod
    def keys(cls) -> set[str]:
        return super().keys() | set(MEDIA)


def convert(row: LlavaRow, where: str) -> dict:
    """Convert one row.

    `image` (and `video`, `audio`, as in LLaVA's successors) names one file or a list. `<image>` in the human turns
    marks their places; without markers they open the first human turn. Rows without media are text.
    """
    # Markers in answers stay text: LLaVA's assistant produces nothing else.
    return messages(row, {"human": {kind: inputs(row, kind, kind, where) for kind in MEDIA}})
