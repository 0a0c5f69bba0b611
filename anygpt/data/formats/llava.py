"""LLaVA's JSON, and that of the many data sets in its form: `conversations`, markers, and files under `image`."""

from typing import Any

from anygpt.data.formats import turns as common
from anygpt.data.schema import MEDIA_TYPES, check_keys

TURN_KEYS = ("from", "value")
# The last five say where a row comes from and how large its images are: not needed, not read.
KEYS = ("id", "conversations", *MEDIA_TYPES, "model", "source", "data_source", "width", "height")


def convert(row: Any, where: str) -> dict:
    """One row in the project's own form.

    `image` (and `video`, `audio`, as LLaVA's successors have them) names one file or a list; `<image>` in the human
    turns says where each stands, and where there is none they open the first human turn. Rows without media are text.
    """
    check_keys(row, KEYS, where)
    turns = common.checked_turns(row, TURN_KEYS, where)
    media = {kind: common.inputs(row, kind, turns, kind, where) for kind in MEDIA_TYPES}
    # A marker in an answer is text there: LLaVA's assistant answers with nothing else.
    return common.with_id(row, common.messages(turns, {"human": media}))
