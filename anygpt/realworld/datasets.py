"""Rows about emoji, animated emoji and sounds, in the project's own format; whole concepts are held out."""

import json
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anygpt.media.files import read_image
from anygpt.media.types import MEDIA

HELD_OUT = {"video": 20, "image": 200, "audio": 30}
SAME = 8
"""Mean difference, of 255, below which the thumbnails of two pictures make them one concept."""
LARGEST = 8
"""Most members of a concept that may be held out: of many clocks or flags, one cannot be told without the others."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Thing:
    """A medium with a name; those of one `concept` are on one side of the split. `group` is an emoji's category."""

    id: str
    modality: str
    name: str
    file: Path
    concept: str
    group: str = ""


# ----------------------------------------------------------------------------------------------------------- the media

_PEOPLE = {"man", "men", "woman", "women", "boy", "girl", "person", "people", "male", "female", "with", "and", "in"}
_ONE_CONCEPT = ("country-flag", "subdivision-flag", "keycap", "time", "family")
_SOUNDS = {  # by the first part of a file's name
    "ambi": "ambient",
    "arovane": "electronic",
    "bd": "bass drum",
    "elec": "electric",
    "guit": "guitar",
    "hat": "hi-hat",
    "mehackit": "electronic",
    "misc": "",
    "perc": "percussion",
    "ride": "ride cymbal",
    "sn": "snare drum",
    "tbd": "electronic",
}


def emoji(package: Path, clips: Path) -> list[Thing]:
    """Pictures without skin tones, and clips where there are animated ones.

    Pictures are of one concept if their names differ in who does something only, or if they look almost the same.
    """
    found, keys, thumbnails = [], {}, {}
    for row in json.loads((package / "package/emoji.json").read_text(encoding="utf-8")):
        code, name, kind = row["unified"].lower(), row["name"].lower(), row["subcategory"]
        file, clip = package / "package/img/google/64" / row["image"], clips / f"package/assets/{code}.webp"
        words = set(re.findall(r"\w+", name)) - _PEOPLE
        keys[code] = kind if kind in _ONE_CONCEPT else " ".join(sorted(words)) or "person"
        thumbnails[code] = np.asarray(read_image(file).resize((8, 8), Image.Resampling.BOX), np.int16)
        found.append((code, "image", name, file, code, row["category"].lower()))
        if clip.is_file() and getattr(Image.open(clip), "n_frames", 1) > 1:
            found.append((f"{code}-moving", "video", name, clip, code, row["category"].lower()))
    concepts = merge(keys, thumbnails)
    return [Thing(*start, concepts[code], group) for *start, code, group in found]


def merge(keys: Mapping[str, str], thumbnails: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Concept by id: the same for ids with the same key or almost the same thumbnail, int16 `(8, 8, 3)`, also through
    others."""
    ids, table = list(keys), np.stack([thumbnails[one] for one in keys])
    concept, seen = {}, {}
    for i, (one, key) in enumerate(keys.items()):
        alike = np.flatnonzero(np.abs(table[:i] - table[i]).mean((1, 2, 3)) < SAME)
        old = {concept[ids[other]] for other in alike} | ({concept[seen[key]]} if key in seen else set())
        concept |= {other: one for other, name in concept.items() if name in old} | {one: one}
        seen[key] = one
    return concept


def sounds(samples: Path, animals: Path) -> list[Thing]:
    """Sounds, named by their files; a concept is a name without numbers and loudness."""
    things = []
    # By name, since the split depends on the order, and the folders' names do on the run.
    for file in sorted([*animals.rglob("*.mp3"), *samples.rglob("*.flac")], key=lambda file: file.name):
        first, *words = re.sub(r"(?<=[a-z])(?=\d)", "_", file.stem).split("_")
        name = " ".join([_SOUNDS.get(first, first), *words]).strip()
        concept = re.sub(r"[\d ]+$| (hard|soft|open|closed)$", "", name)
        things.append(Thing(file.stem, "audio", name, file, f"sound of {concept}"))
    return things


def split(things: Sequence[Thing], seed: int = 0) -> tuple[list[Thing], list[Thing]]:
    """Things to learn, and one of each type for every held-out concept: at most a quarter of a type is held out."""
    members = defaultdict(list)
    for one in things:
        members[one.concept].append(one)
    order = [name for name, found in members.items() if len(found) <= LARGEST]
    random.Random(seed).shuffle(order)
    held: dict[tuple[str, str], Thing] = {}
    for kind, most in HELD_OUT.items():  # clips first, whose pictures are then held out, too
        most = min(most, sum(one.modality == kind for one in things) // 4)
        order.sort(key=lambda name: all(one.modality != "video" for one in members[name]) == (kind == "video"))
        for name in order:
            if sum(one.modality == kind for one in held.values()) < most and kind in {
                t.modality for t in members[name]
            }:
                held |= {(name, one.modality): one for one in reversed(members[name])}
    concepts = {name for name, _ in held}
    return [one for one in things if one.concept not in concepts], list(held.values())


# ------------------------------------------------------------------------------------------------------------ the rows

ASKED = {
    "image": ["What is this?", "What does this picture show?", "Name this picture."],
    "video": ["What is this?", "What does this clip show?", "Name this clip."],
    "audio": ["What is this sound?", "What do you hear?", "Name this sound."],
}
WANTED = {
    "image": ["Draw {}.", "Show me a picture of {}.", "I would like to see {}."],
    "video": ["Show {} moving.", "Make a clip of {}.", "Animate {}."],
    "audio": ["What does {} sound like?", "Let me hear {}.", "Play {}."],
}
AGAIN = ["Make this again.", "Make one like this.", "I want the same."]


def rows_about(one: Thing, wordings: slice = slice(None)) -> dict[str, Row]:
    """Rows that ask for the medium's name (`names`), for the medium by its name (`made`) and by itself (`again`)."""
    wanted = [wording.format(one.name) for wording in WANTED[one.modality][wordings]]
    made = [_text(f"Here is {one.name}."), _medium(one) | {"caption": one.name}]
    return {
        "names": row(one.id, [_medium(one), _text(ASKED[one.modality][wordings])], [_text(one.name)]),
        "made": row(f"{one.id}-made", [_text(wanted)], made),
        "again": row(f"{one.id}-again", [_medium(one), _text(AGAIN[wordings])], made),
    }


NOUNS = {"image": 12000, "video": 2500, "audio": 2500}
_CONCRETE = {"05", "06", "08", "13", "17", "18", "19", "20", "27"}
"""WordNet's files of nouns for animals, artifacts, bodies, food, objects, people, phenomena, plants and substances."""


def nouns(wordnet: Path, vocabulary: Collection[str]) -> list[str]:
    """WordNet's concrete nouns of words in `vocabulary`, such as "love letter", in its order."""
    found: dict[str, None] = {}
    for line in (wordnet / "package/dict/data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence, above
            continue
        _, kind, _, count, *names = line.split()
        if kind in _CONCRETE:
            found |= dict.fromkeys(name.replace("_", " ") for name in names[: 2 * int(count, 16) : 2])
    return [name for name in found if len(name) > 2 and vocabulary >= set(re.split("[ -]", name))]


def write_nouns(folder: Path, nouns: Sequence[str], names: Collection[str], seed: int = 0) -> None:
    """Write rows that ask for media by a noun, which tell what no name does; none asks for one of the `names`.

    Stage 2 aligns captions alone, so all rows of a media type name one blank medium, which is never read.
    """
    asked = [text for text in nouns if text not in names]
    draw = random.Random(seed)
    for kind, count in NOUNS.items():
        medium = MEDIA[kind]
        blank = medium.to_target(medium.blank())
        content, rate = blank if isinstance(blank, tuple) else (blank, 1)
        file = folder / kind / f"none{medium.suffixes[0]}"
        medium.write(file, content, rate)
        chosen = draw.sample(asked, min(count, len(asked)))
        made = [rows_about(Thing("none", kind, text, file, ""))["made"] for text in chosen]
        write_rows(folder / f"{kind}_words.jsonl", [row | {"id": f"word-{i}"} for i, row in enumerate(made)])


def question(one: Thing, groups: Sequence[str], draw: random.Random) -> Row:
    """Whether the picture belongs to a group: to its own in half of the rows, to any in the others."""
    group = draw.choice([one.group, draw.choice(groups)])
    answer = "Yes." if group == one.group else "No."
    return row(f"{one.id}-group", [_medium(one), _text(f"Does it belong to {group}?")], [_text(answer)])


def row(name: str, user: Any, assistant: Any) -> Row:
    """A row of one exchange; each side is a text or a list of parts."""
    return {"id": name, "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def _text(text: str | list[str]) -> Row:
    return {"type": "text", "text": text}


def _medium(one: Thing) -> Row:
    return {"type": one.modality, "path": f"{one.modality}/{one.id}{one.file.suffix}"}


def write_data(folder: Path, learnt: Sequence[Thing], held: Sequence[Thing], seed: int = 0) -> None:
    """Copy all media to `folder`, and write rows that ask for a name, for a medium (by name, by itself), for a group.

    Names and media are in files by media type; held-out things, in files of their own, are asked in a single wording.
    """
    for one in [*learnt, *held]:
        target = folder / _medium(one)["path"]
        target.parent.mkdir(exist_ok=True)
        shutil.copy(one.file, target)
    draw, groups = random.Random(seed), sorted({one.group for one in [*learnt, *held] if one.group})
    for side, things, wordings in (("", learnt, slice(None)), ("held_", held, slice(1))):
        pictures = [one for one in things if one.modality == "image"]
        write_rows(folder / f"{side}questions.jsonl", [question(one, groups, draw) for one in pictures])
        for kind in HELD_OUT:
            rows = [rows_about(one, wordings) for one in things if one.modality == kind]
            for asked in ("names", "made", "again"):
                write_rows(folder / f"{side}{kind}_{asked}.jsonl", [row[asked] for row in rows])


def write_conversations(folder: Path, names: Sequence[str], count: int = 1000, seed: int = 0) -> None:
    """Write conversations of two to eight exchanges, each drawn from a file of `names`, so that what was made before is
    no reason to make it again, or to stop making media."""
    draw = random.Random(seed)
    files = [[json.loads(line) for line in (folder / name).read_bytes().splitlines()] for name in names]
    talks = [[draw.choice(draw.choice(files)) for _ in range(draw.randint(2, 8))] for _ in range(count)]
    rows = [
        {"id": f"talk-{i}", "messages": [said for one in talk for said in one["messages"]]}
        for i, talk in enumerate(talks)
    ]
    write_rows(folder / "conversations.jsonl", rows)


def write_rows(file: Path, rows: Any) -> None:
    """Write rows as JSON lines, and say how many."""
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in rows]
    file.write_text("".join(lines), encoding="utf-8")
    print(f"{file.name}: {len(lines)} rows", flush=True)
