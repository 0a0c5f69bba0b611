"""VideoChat's JSON (VideoChat2-IT): a video or an image, and questions with their answers."""

from typing import Annotated, Any

from pydantic import model_validator

from anygpt.data.rows import Id, RowModel, Text, at_least_one, fault


class Pair(RowModel):
    """An instruction, a question and its answer."""

    a: Text
    q: Text
    i: Text | None = None


class VideoChatRow(RowModel):
    """One medium, and pairs about it."""

    QA: Annotated[list[Pair], at_least_one("pair of question and answer")]
    video: Text | None = None
    image: Text | None = None
    start: Any = None
    end: Any = None
    id: Id = ""

    @model_validator(mode="after")
    def _has_one_whole_medium(self) -> "VideoChatRow":
        if (self.video is None) == (self.image is None):
            raise fault(f"must have either 'video' or 'image', and has {'neither' if self.video is None else 'both'}.")
        if self.start is not None or self.end is not None:
            raise fault("means a part of its video, from 'start' to 'end': cut that part out beforehand.")
        return self


def convert(row: VideoChatRow, where: str) -> dict:
    """Convert one row.

    The medium opens the first user turn, whose question may be empty (captions). The first pair's instruction `i`
    becomes a system message, and the others are ignored, as in VideoChat2's own loader; pairs keep their order.
    """
    kind = "image" if row.video is None else "video"
    messages: list[dict] = [{"role": "system", "content": row.QA[0].i}] if row.QA[0].i else []
    medium = [{"type": kind, "path": getattr(row, kind)}]
    for pair in row.QA:
        said = [*medium, *([{"type": "text", "text": pair.q}] if pair.q else [])]
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": pair.a}]
        medium = []
    return {"messages": messages}
