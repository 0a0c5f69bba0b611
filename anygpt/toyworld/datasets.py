"""ToyWorld's datasets on disk: PNG, MP4 and WAV files, and JSONL rows that reference them.

    <output>/<kind>.jsonl            the rows; their paths are relative to <output>
    <output>/<kind>/image/0.png      the media, by kind and row
    <output>/<kind>/manifest.json    the arguments, and a digest of the first rows and their media

Rows are chat messages. User media are inputs; assistant media are targets and have a caption.
"""

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from anygpt.errors import InputError
from anygpt.media.types import MEDIA
from anygpt.media.writing import write_image
from anygpt.toyworld import language
from anygpt.toyworld.render import SAMPLING_RATE, render, render_video
from anygpt.toyworld.scenes import KINDS as SCENE_KINDS
from anygpt.toyworld.scenes import Scene, render_scene, scene_row
from anygpt.toyworld.world import MODALITIES, MOTIONS, SEEN, Thing
from anygpt.toyworld.zoo import digest

KINDS = {  # by kind, a number that is mixed into the seed
    **{"stage1": 0, "stage2": 1, "stage3": 2, "eval": 3, "joint": 4},
    **{"words": 11, "pairs": 6, "pictures": 7, "clips": 8, "sounds": 9, "views": 10, "stills": 12, "dialogues": 13},
    "captions": 14,
}
KINDS_OF = {1: tuple(KINDS), 2: tuple(SCENE_KINDS)}
"""Kinds by world."""
WHOLE_KINDS = tuple(KINDS)[5:]
"""Kinds about all things."""
COMPONENT_KINDS = tuple(kind for kind in WHOLE_KINDS if kind != "captions")
"""Kinds that stage 0 trains the parts on."""
_SHOWN = {"pictures": "image", "stills": "image", "clips": "video", "sounds": "audio"}
_TOLD = ("words", "dialogues")
"""Kinds in which words stand for media."""
FPS = 8
"""Frame rate of clips, which have 8 frames."""
_CLIP_SCALE = 2
"""Enlargement of written clips: H.264 halves the resolution of chroma, which would wash out thin shapes."""
_FIRST_ROWS = 48
"""Rows that tell whether a dataset on disk is the one that this code writes."""

Part = dict[str, str]
Rng = np.random.Generator
Exchange = tuple[list[Part], list[Part]]
"""The user's and the assistant's content."""
EXCHANGES = {"stage3": (1, 2, 3, 4, 4), "dialogues": (1, 2, 3, 4, 6, 8)}
"""Numbers of exchanges in a conversation, equally likely; other kinds have one."""


def write_dataset(
    output: Path,
    kind: str,
    num_samples: int,
    seed: int,
    things: Sequence[Thing] = SEEN,
    progress: bool = False,
    world: int = 1,
) -> Path:
    """Write a dataset, unless the same one exists; returns the path of its JSONL file.

    - `stage1`: a medium in, a caption out; image, video and audio in turn.
    - `stage2`: a text request, answered by a short text and one medium; the three in turn.
    - `stage3`: conversations of one to four exchanges. The first is in turn text only, media -> text, text -> media,
      media -> media; a third of the answers with media have several. Later ones are small talk, refer to an earlier
      thing ("it", "the first one"), or introduce another.
    - `eval`: the 16 cells of the any-to-any matrix in turn, one medium (or text) each way. Ids are
      "eval-<row>-<input>-<output>", and the answers are reference answers.
    - `joint`: every other row shows a picture and a clip, or a picture and a sound, of one thing; the others are
      as in `stage3`.
    - `words`: text only: the text exchanges of `stage3`, and media described in words, asked about and converted.
    - `dialogues`: conversations of up to eight exchanges like those of `words`.
    - `views`: a picture in, the plain caption out.
    - `pairs`: a picture and a sound of one thing, or a sound alone, in turn, and the plain caption out.
    - `captions`: as `stage1`, for all at once.
    - `pictures`, `clips`, `sounds`: a text request, answered by that medium; half of the captions are paraphrases.
    - `stills`: as `pictures`, but half of them are frames of clips, in which things are smaller.

    In `world` 2 the rows are about scenes, see `anygpt.toyworld.scenes.KINDS`.

    Row i depends on (world, kind, seed, things, i) only. The JSONL file appears last, when all media files exist.

    An `InputError` refuses an unknown kind, and arguments without a row or a thing.
    """
    kinds = KINDS_OF[world]
    if kind not in kinds:
        raise InputError(f"unknown kind of dataset {kind!r} in world {world}: expected one of {', '.join(kinds)}")
    if num_samples < 1 or seed < 0 or not things:
        raise InputError(
            "a dataset needs num_samples >= 1, seed >= 0 and at least one thing, "
            f"but got num_samples={num_samples}, seed={seed} and {len(things)} things"
        )
    output = Path(output)
    rows_path, folder = output / f"{kind}.jsonl", output / kind
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{kind}-") as name:
        temporary = Path(name, kind)
        temporary.mkdir()
        writer = _RowWriter(temporary, kind, seed, things, world)
        rows = iter(tqdm(range(num_samples), desc=kind, unit="row", disable=not progress))
        writer.write(itertools.islice(rows, _FIRST_ROWS))
        made = {"kind": kind, "num_samples": num_samples, "seed": seed, "begins": digest(temporary)}
        made |= {"things": list(map(str, things))} | ({"world": world} if world > 1 else {})
        manifest = json.dumps(made, indent=1) + "\n"
        known = folder / "manifest.json"
        if rows_path.is_file() and known.is_file() and known.read_bytes() == manifest.encode():
            return rows_path
        writer.write(rows)
        (temporary / "manifest.json").write_text(manifest)
        # At every moment either the rows are missing or everything exists. Paths are relative to `output`.
        rows_path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        (folder / "rows.jsonl").rename(rows_path)
    return rows_path


def write_render(path: Path, thing: Thing, modality: str, motion: str | None, rng: np.random.Generator) -> None:
    """Render a picture, clip or sound to a file; only clips use `motion`."""
    medium = render(modality, thing, motion, rng)
    if modality == "video":
        medium = medium.repeat(_CLIP_SCALE, axis=1).repeat(_CLIP_SCALE, axis=2)
    MEDIA[modality].write(path, medium, SAMPLING_RATE if modality == "audio" else FPS)


class _RowWriter:
    """Writes the rows of one kind to `folder`/rows.jsonl, and their media to `folder`/<modality>/."""

    def __init__(self, folder: Path, kind: str, seed: int, things: Sequence[Thing], world: int) -> None:
        self.folder, self.kind, self.seed, self.things, self.world = folder, kind, seed, things, world

    def write(self, rows: Iterable[int]) -> None:
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            for index in rows:
                seeds = [self.seed, KINDS[self.kind], index]
                if self.world == 1:
                    row = self._row(index, np.random.default_rng(seeds))
                else:
                    rng = np.random.default_rng([*seeds, self.world])
                    row = scene_row(self.kind, index, self.things, rng, partial(self._scene, rng))
                file.write(json.dumps(row) + "\n")

    def _row(self, index: int, rng: Rng) -> dict[str, Any]:
        """Row number `index`; `rng` determines everything that the index does not."""
        thing, name, modality = language.pick(rng, self.things), f"{self.kind}-{index}", MODALITIES[index % 3]
        later: list[Exchange] = []
        if self.kind in ("stage1", "captions"):
            first = self._media_to_text(name, thing, modality, rng)
        elif self.kind == "stage2":
            first = self._to_media(name, thing, None, [modality], rng)
        elif self.kind in ("views", "pairs"):
            ask = self._pair_to_text if self.kind == "pairs" and index % 2 == 0 else self._media_to_text
            user, _ = ask(name, thing, "image" if self.kind == "views" else "audio", rng)
            first = user, [_text(language.plain_caption(thing))]
        elif self.kind in _SHOWN:
            first = self._to_media(name, thing, None, [_SHOWN[self.kind]], rng)
            if rng.integers(2):
                medium = first[1][-1]
                moving = medium["caption"].rpartition("moving ")[2] if self.kind == "clips" else None
                medium["caption"] = language.caption(thing, rng, moving, _SHOWN[self.kind])
        elif self.kind == "eval":
            ways = ("text", *MODALITIES)
            source, target = ways[index % 16 // 4], ways[index % 4]
            name = f"{name}-{source}-{target}"
            if target != "text":
                first = self._to_media(name, thing, None if source == "text" else source, [target], rng)
            elif source == "text":
                first = _said(language.text_qa(thing, rng))
            else:
                first = self._media_to_text(name, thing, source, rng)
        elif self.kind == "joint" and index % 2:
            first = self._pair_to_text(name, thing, ("video", "audio")[index // 2 % 2], rng)
        else:
            if self.kind in _TOLD:
                first, about = _in_words(thing, modality, rng)
            else:
                first, about = self._exchange(name, thing, (index // 2 if self.kind == "joint" else index) % 4, rng)
            later = self._later(name, [thing] if about else [], rng)
        roles = ("user", "assistant")
        messages = [{"role": r, "content": c} for said in (first, *later) for r, c in zip(roles, said, strict=True)]
        return {"id": name, "messages": messages}

    def _scene(self, rng: Rng, name: str, scene: Scene) -> Part:
        path = f"image/{name}.png"
        write_image(self.folder / path, render_scene(scene, rng))
        return {"type": "image", "path": f"{self.kind}/{path}"}

    def _exchange(self, name: str, thing: Thing, way: int, rng: Rng) -> tuple[Exchange, bool]:
        """An exchange of the type `way` (0 to 3), and whether it is about the thing."""
        modality = language.pick(rng, MODALITIES)
        if way == 0:
            return _talk(thing, rng)
        if way == 1:
            return self._media_to_text(name, thing, modality, rng), True
        how_many = language.pick(rng, (1, 1, 1, 1, 2, 3))
        targets = [MODALITIES[i] for i in rng.permutation(3)[:how_many]]
        return self._to_media(name, thing, None if way == 2 else modality, targets, rng), True

    def _later(self, name: str, told: list[Thing], rng: Rng) -> list[Exchange]:
        """The exchanges after the first; `told` are the things mentioned so far."""
        exchanges = []
        for turn in range(1, language.pick(rng, EXCHANGES.get(self.kind, (1,)))):
            way = language.pick(rng, ("anew", "anew", "it", "it", "first", "talk"))
            if way == "talk":
                exchanges.append(_said(language.pick(rng, (language.small_talk, language.refusal))(rng)))
            elif way == "anew" or not told:
                thing = language.pick(rng, self.things)
                if self.kind in _TOLD:
                    exchange, about = _in_words(thing, language.pick(rng, MODALITIES), rng)
                else:
                    exchange, about = self._exchange(f"{name}-{turn}", thing, int(rng.integers(4)), rng)
                exchanges.append(exchange)
                told += [thing] if about else []
            else:
                it, thing = (language.LATEST, told[-1]) if way == "it" else (language.FIRST, told[0])
                if rng.integers(3) == 0:
                    exchanges.append(_said(language.later_question(it, thing, rng)))
                else:
                    targets = [language.pick(rng, MODALITIES)]
                    exchanges.append(self._to_media(f"{name}-{turn}", thing, None, targets, rng, it))
                told.append(thing)  # later turns call it "it"
        return exchanges

    def _media_to_text(self, name: str, thing: Thing, modality: str, rng: Rng) -> Exchange:
        motion = language.pick(rng, MOTIONS) if modality == "video" else None
        medium = self._medium(f"{name}-in", thing, modality, motion, rng)
        question = _text(language.describe_question(modality, rng))
        return [medium, question], [_text(language.caption(thing, rng, motion, modality))]

    def _pair_to_text(self, name: str, thing: Thing, modality: str, rng: Rng) -> Exchange:
        """A question about a picture and another medium of the same thing."""
        user, assistant = self._media_to_text(name, thing, modality, rng)
        return [self._medium(f"{name}-in", thing, "image", None, rng), *user], assistant

    def _to_media(
        self, name: str, thing: Thing, source: str | None, targets: list[str], rng: Rng, it: str | None = None
    ) -> Exchange:
        """A request for the `targets`: in words (`source` None), about a given medium, or about an earlier thing that
        is called `it`. The answer has a text before each medium.
        """
        # A requested clip may move differently from a given one; the request names its motion.
        motion = language.pick(rng, MOTIONS)
        asked, given = [], []
        for target in targets:
            moving = motion if target == "video" else None
            told = thing if source is None and it is None else None
            asked.append(language.request(target, rng, moving, told, it))
            given.append(_text(language.media_reply(target, thing, rng, moving)))
            if self.kind not in _TOLD:
                medium = self._medium(f"{name}-out", thing, target, moving, rng)
                given.append({**medium, "caption": language.plain_caption(thing, moving)})
        user = [_text(" ".join(asked))]
        if source is not None:
            user.insert(0, self._medium(f"{name}-in", thing, source, language.pick(rng, MOTIONS), rng))
        return user, given

    def _medium(self, name: str, thing: Thing, modality: str, motion: str | None, rng: Rng) -> Part:
        path = f"{modality}/{name}{MEDIA[modality].suffixes[0]}"
        if self.kind == "stills" and rng.integers(2):
            frame = language.pick(rng, render_video(thing, language.pick(rng, MOTIONS), rng))
            write_image(self.folder / path, Image.fromarray(frame))
        else:
            write_render(self.folder / path, thing, modality, motion, rng)
        return {"type": modality, "path": f"{self.kind}/{path}"}


def _talk(thing: Thing, rng: Rng) -> tuple[Exchange, bool]:
    """A question about the thing, small talk or nonsense; and whether it is about the thing."""
    talk = language.pick(rng, ("question", "question", "small talk", "nonsense"))
    if talk == "question":
        return _said(language.text_qa(thing, rng)), True
    return _said(language.small_talk(rng) if talk == "small talk" else language.refusal(rng)), False


def _in_words(thing: Thing, modality: str, rng: Rng) -> tuple[Exchange, bool]:
    """A text-only exchange: talk, or one about a medium described in words; and whether it is about the thing."""
    motion = language.pick(rng, MOTIONS) if modality == "video" else None
    way = language.pick(rng, ("talk", "describe", "request", "convert"))
    if way == "talk":
        return _talk(thing, rng)
    if way == "describe":
        question = f"{language.caption(thing, rng, motion, modality)} {language.describe_question(modality, rng)}"
        return _said((question, language.caption(thing, rng, motion, modality))), True
    if way == "request":
        request = language.request(modality, rng, motion, thing)
        return _said((request, language.media_reply(modality, thing, rng, motion))), True
    target = language.pick(rng, MODALITIES)
    moving = language.pick(rng, MOTIONS) if target == "video" else None
    request = f"{language.caption(thing, rng, motion, modality)} {language.request(target, rng, moving)}"
    return _said((request, language.media_reply(target, thing, rng, moving))), True


def _said(said: tuple[str, str]) -> Exchange:
    return [_text(said[0])], [_text(said[1])]


def _text(text: str) -> Part:
    return {"type": "text", "text": text}
