"""Datasets of ToyWorld on disk: real PNG, MP4 and WAV files, and one JSON object a line that names them.

    <output>/<kind>.jsonl            the rows; their paths are relative to <output>
    <output>/<kind>/image/0.png      the media, by kind and row
    <output>/<kind>/manifest.json    what it was made from

Rows are in chat-content form. User media are inputs; assistant media are targets and carry a caption.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from anygpt.errors import InputError
from anygpt.media.writing import write_audio, write_image, write_video
from anygpt.toyworld import language
from anygpt.toyworld.render import SAMPLING_RATE, render_audio, render_image, render_video
from anygpt.toyworld.world import MODALITIES, MOTIONS, SEEN, Thing

KINDS = {  # with what each adds to the seed
    **{"stage1": 0, "stage2": 1, "stage3": 2, "eval": 3, "joint": 4},
    **{"words": 11, "pairs": 6, "pictures": 7, "clips": 8, "sounds": 9, "views": 10, "stills": 12},
}
COMPONENT_KINDS = tuple(KINDS)[5:]
"""Those that the parts themselves are trained on, in stage 0."""
_SHOWN = {"pictures": "image", "stills": "image", "clips": "video", "sounds": "audio"}
FPS = 8
"""Of the clips: 8 frames, one second."""
_CLIP_SCALE = 2
"""Clips are written larger than rendered: H.264 halves the resolution of colours, and thin shapes would lose theirs."""
SUFFIX = {"image": "png", "video": "mp4", "audio": "wav"}

Row = dict[str, Any]
Part = dict[str, str]


def write_dataset(
    output: Path, kind: str, num_samples: int, seed: int, things: Sequence[Thing] = SEEN, progress: bool = False
) -> Path:
    """Write one dataset, or leave it alone where the same one is there already.

    - `stage1`: a medium in, a caption out; image, video and audio in turn.
    - `stage2`: a request in words, answered by a short text and one medium; the three in turn.
    - `stage3`: in turn text only, media -> text, text -> media, media -> media; a third of the rows that
      answer with media answer with several.
    - `eval`: the 16 cells of the any-to-any matrix in turn, one medium (or text) each way. Ids are
      "eval-<row>-<input>-<output>", and the answers are reference answers.
    - `joint`: every other row has a picture and a clip, or a picture and a sound, of one thing in; the others are
      those of `stage3`.
    - `words`: text only: what `stage3` has of it, and media that are described in words, asked about and turned into
      others.
    - `views`: a picture in, the plain caption out.
    - `pairs`: a picture and a sound of one thing, or a sound alone, in turn, and the plain caption out.
    - `pictures`, `clips`, `sounds`: a request in words, answered by that medium; half of the captions are paraphrases.
    - `stills`: as `pictures`, but half of them are frames of clips, in which things are smaller.

    Row i depends on (kind, seed, things, i) only. The media folder is written beside its place and renamed, and
    the JSONL file comes last: where it exists, all its files do.

    Args:
        output: folder for this and other kinds.
        kind: one of `KINDS`.
        num_samples: rows, at least 1.
        seed: at least 0.
        things: what the rows are about.
        progress: show a progress bar.

    Returns:
        The path of the JSONL file.

    Raises:
        InputError: for an unknown kind, or nothing to write.
    """
    if kind not in KINDS:
        raise InputError(f"Unknown kind of dataset {kind!r}: expected one of {', '.join(KINDS)}.")
    if num_samples < 1 or seed < 0 or not things:
        raise InputError(
            "A dataset needs num_samples >= 1, seed >= 0 and at least one thing, "
            f"but got num_samples={num_samples}, seed={seed} and {len(things)} things."
        )
    output = Path(output)
    rows_path, folder = output / f"{kind}.jsonl", output / kind
    manifest = {
        "kind": kind,
        "num_samples": num_samples,
        "seed": seed,
        "things": [str(thing) for thing in things],
        "source": _source_hash(),
    }
    if rows_path.is_file() and _read_manifest(folder) == manifest:
        return rows_path

    output.mkdir(parents=True, exist_ok=True)
    temporary = output / f".{kind}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        for modality in MODALITIES:
            (temporary / modality).mkdir()
        writer = _RowWriter(temporary, kind, things)
        # A path is relative to `output`, so the rows can be moved out of the folder that they are written in.
        with (temporary / "rows.jsonl").open("w", encoding="utf-8") as file:
            for index in tqdm(range(num_samples), desc=kind, unit="row", disable=not progress):
                rng = np.random.default_rng([seed, KINDS[kind], index])
                file.write(json.dumps(writer.row(index, rng)) + "\n")
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        # Not one step, but at every moment either the rows are missing or all is there.
        rows_path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        (folder / "rows.jsonl").rename(rows_path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return rows_path


def write_render(path: Path, thing: Thing, modality: str, motion: str | None, rng: np.random.Generator) -> None:
    """Render a picture, a clip or a sound to a file of the modality's `SUFFIX`; `motion` matters for a clip only."""
    if modality == "image":
        write_image(path, render_image(thing, rng))
    elif modality == "video":
        frames = render_video(thing, motion, rng)
        write_video(path, frames.repeat(_CLIP_SCALE, axis=1).repeat(_CLIP_SCALE, axis=2), FPS)
    else:
        write_audio(path, render_audio(thing, rng), SAMPLING_RATE)


def _source_hash() -> str:
    """Of the code that decides what a dataset contains, so that changed code writes its data anew."""
    digest = hashlib.sha256()
    for name in ("world.py", "render.py", "language.py", "datasets.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:12]


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a dataset's folder; None where there is none that can be read."""
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


class _RowWriter:
    """Makes rows of one kind and writes their media to `folder`/<modality>/."""

    def __init__(self, folder: Path, kind: str, things: Sequence[Thing]) -> None:
        self.folder = folder
        self.kind = kind
        self.things = things

    def row(self, index: int, rng: np.random.Generator) -> Row:
        """Row number `index`; `rng` decides all that is not decided by the index."""
        thing = self.things[int(rng.integers(len(self.things)))]
        name = f"{self.kind}-{index}"
        modality = MODALITIES[index % 3]
        if self.kind == "stage1":
            return self._media_to_text(name, thing, modality, rng)
        if self.kind == "words":
            return _text_row(name, self._words(thing, modality, rng))
        if self.kind in ("views", "pairs"):
            if self.kind == "pairs" and index % 2 == 0:
                row = self._pair_to_text(name, thing, "audio", rng)
            else:
                row = self._media_to_text(name, thing, "image" if self.kind == "views" else "audio", rng)
            row["messages"][1]["content"] = [_text(language.plain_caption(thing))]
            return row
        if self.kind in _SHOWN:
            row = self._to_media(name, thing, None, [_SHOWN[self.kind]], rng)
            medium = row["messages"][1]["content"][-1]
            if rng.integers(2):
                moving = medium["caption"].rpartition("moving ")[2] if self.kind == "clips" else None
                medium["caption"] = language.caption(thing, rng, moving, _SHOWN[self.kind])
            return row
        if self.kind == "stage2":
            return self._to_media(name, thing, None, [modality], rng)
        if self.kind == "eval":
            ways = ("text", *MODALITIES)
            source, target = ways[index % 16 // 4], ways[index % 4]
            name = f"{name}-{source}-{target}"
            if target != "text":
                return self._to_media(name, thing, None if source == "text" else source, [target], rng)
            if source == "text":
                return _text_row(name, language.text_qa(thing, rng))
            return self._media_to_text(name, thing, source, rng)

        if self.kind == "joint":
            if index % 2:
                return self._pair_to_text(name, thing, ("video", "audio")[index // 2 % 2], rng)
            index //= 2
        modality = language.pick(rng, MODALITIES)
        if index % 4 == 0:  # text only: mostly questions
            return _text_row(name, self._talk(thing, rng))
        if index % 4 == 1:
            return self._media_to_text(name, thing, modality, rng)
        how_many = language.pick(rng, (1, 1, 1, 1, 2, 3))
        targets = [MODALITIES[i] for i in rng.permutation(3)[:how_many]]
        return self._to_media(name, thing, None if index % 4 == 2 else modality, targets, rng)

    def _talk(self, thing: Thing, rng: np.random.Generator) -> tuple[str, str]:
        talk = language.pick(rng, ("question", "question", "small talk", "nonsense"))
        said = {
            "question": lambda: language.text_qa(thing, rng),
            "small talk": lambda: language.small_talk(rng),
            "nonsense": lambda: language.refusal(rng),
        }
        return said[talk]()

    def _words(self, thing: Thing, modality: str, rng: np.random.Generator) -> tuple[str, str]:
        """What a language model that never met media knows: talk, and media told in words in place of the media."""
        motion = language.pick(rng, MOTIONS) if modality == "video" else None
        way = language.pick(rng, ("talk", "describe", "request", "convert"))
        if way == "describe":
            return language.described_question(modality, thing, rng, motion)
        if way == "request":
            request = language.media_request(modality, thing, rng, motion)
            return request, language.media_reply(modality, thing, rng, motion)
        if way == "convert":
            target = language.pick(rng, MODALITIES)
            moving = language.pick(rng, MOTIONS) if target == "video" else None
            given = language.caption(thing, rng, motion, modality)
            request = language.convert_request(target, rng, moving)
            return f"{given} {request}", language.media_reply(target, thing, rng, moving)
        return self._talk(thing, rng)

    def _media_to_text(self, name: str, thing: Thing, modality: str, rng: np.random.Generator) -> Row:
        motion = language.pick(rng, MOTIONS) if modality == "video" else None
        medium = self._write(f"{name}-in", thing, modality, motion, rng)
        question = _text(language.describe_question(modality, rng))
        return _row(name, [medium, question], [_text(language.caption(thing, rng, motion, modality))])

    def _pair_to_text(self, name: str, thing: Thing, modality: str, rng: np.random.Generator) -> Row:
        """A picture and another medium of the same thing."""
        row = self._media_to_text(name, thing, modality, rng)
        row["messages"][0]["content"].insert(0, self._write(f"{name}-in", thing, "image", None, rng))
        return row

    def _to_media(
        self, name: str, thing: Thing, source: str | None, targets: list[str], rng: np.random.Generator
    ) -> Row:
        """A request for the `targets`, in words (`source` None) or about a medium; one text before each medium."""
        # Given a clip, another clip that is asked for may move differently: the request says how.
        motion = language.pick(rng, MOTIONS)
        asked, given = [], []
        for target in targets:
            moving = motion if target == "video" else None
            if source is None:
                asked.append(language.media_request(target, thing, rng, moving))
            else:
                asked.append(language.convert_request(target, rng, moving))
            given.append(_text(language.media_reply(target, thing, rng, moving)))
            medium = self._write(f"{name}-out", thing, target, moving, rng)
            given.append({**medium, "caption": language.plain_caption(thing, moving)})
        user = [_text(" ".join(asked))]
        if source is not None:
            user.insert(0, self._write(f"{name}-in", thing, source, language.pick(rng, MOTIONS), rng))
        return _row(name, user, given)

    def _write(self, name: str, thing: Thing, modality: str, motion: str | None, rng: np.random.Generator) -> Part:
        """Render a medium to a file; `motion` matters for a video only."""
        path = f"{modality}/{name}.{SUFFIX[modality]}"
        if self.kind == "stills" and rng.integers(2):
            frame = language.pick(rng, render_video(thing, language.pick(rng, MOTIONS), rng))
            write_image(self.folder / path, Image.fromarray(frame))
        else:
            write_render(self.folder / path, thing, modality, motion, rng)
        return {"type": modality, "path": f"{self.kind}/{path}"}


def _row(name: str, user: list[Part], assistant: list[Part]) -> Row:
    return {"id": name, "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def _text_row(name: str, said: tuple[str, str]) -> Row:
    return _row(name, [_text(said[0])], [_text(said[1])])


def _text(text: str) -> Part:
    return {"type": "text", "text": text}
