"""LLaVA's JSON, and that of the many data sets in its form: `conversations`, markers, and files under `image`."""

from typing import Any

from anygpt.data.formats.turns import TurnsRow, inputs, messages
from anygpt.media.types import MEDIA


class LlavaRow(TurnsRow):
    """Its last five keys say where a row comes from and how large its images are, and are not read."""

    model: Any = None
    source: Any = None
    data_source: Any = None
    width: Any = None
    height: Any = None

    @classmethod
    def keys(cls) -> set[str]:
        return super().keys() | set(MEDIA)


def convert(row: LlavaRow, where: str) -> dict:
    """One row in the project's own form.

    `image` (and `video`, `audio`, as LLaVA's successors have them) names one file or a list; `<image>` in the human
    turns says where each stands, and where there is none they open the first human turn. Rows without media are text.
    """
    # A marker in an answer is text there: LLaVA's assistant answers with nothing else.
    return messages(row, {"human": {kind: inputs(row, kind, kind, where) for kind in MEDIA}})
