"""VideoChat's JSON (VideoChat2-IT): a video or an image, and questions with their answers."""

from typing import Any

from anygpt.data.schema import check_keys, checked_text
from anygpt.errors import InputError

KEYS = ("id", "video", "image", "QA", "start", "end")
QA_KEYS = ("i", "q", "a")


def convert(row: Any, where: str) -> dict:
    """One row in the project's own form.

    The medium opens the first user turn, whose question may be empty (captions). The first pair's instruction `i` is
    a system message, and those of the others are not read, as in VideoChat2's own loader; the pairs keep their order.
    A row with `start` and `end` means a part of its video, and is an error: the whole would not match the answers.
    """
    check_keys(row, KEYS, where)
    kinds = [kind for kind in ("video", "image") if row.get(kind) is not None]
    if len(kinds) != 1:
        raise InputError(f"{where} must have either 'video' or 'image', and has {' and '.join(kinds) or 'neither'}.")
    if row.get("start") is not None or row.get("end") is not None:
        raise InputError(f"{where} means a part of its video, from 'start' to 'end': cut that part out beforehand.")
    pairs = row.get("QA")
    if not isinstance(pairs, list) or not pairs:
        raise InputError(f"{where}: 'QA' must be a list of at least one pair of question and answer.")
    messages: list[dict] = []
    for i, pair in enumerate(pairs):
        check_keys(pair, QA_KEYS, f"{where}.QA[{i}]")
        if i == 0 and pair.get("i"):
            messages.append({"role": "system", "content": checked_text(pair["i"], f"{where}.QA[0]: 'i'")})
        question = checked_text(pair.get("q"), f"{where}.QA[{i}]: 'q'")
        content = [{"type": "text", "text": question}] if question else []
        if i == 0:
            content.insert(0, {"type": kinds[0], "path": row[kinds[0]]})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": checked_text(pair.get("a"), f"{where}.QA[{i}]: 'a'")})
    return {"messages": messages} | ({"id": row["id"]} if "id" in row else {})
