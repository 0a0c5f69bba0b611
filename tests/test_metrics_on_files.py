"""Each metric gets worse, step by step, as files get worse: ToyWorld's things, and real files where there are some.

Real files are those of a folder named by ANYGPT_REALDATA, with `cc3m`, `webvid` and `audiocap` in NExT-GPT's layout.
The zoo's encoder looks at pictures; other networks have random weights, and towers with text are aligned to the files'
captions by least squares, so that a caption is closest to its own medium. Noise stays below the level at which such a
network sees no further difference.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from anygpt.data.dataset import ConversationDataset, DataSource
from anygpt.data.schema import ContentPart, Message, Sample
from anygpt.evaluation.metrics import METRICS
from anygpt.evaluation.metrics.base import Batch, Item
from anygpt.evaluation.metrics.features import PretrainedNetwork
from anygpt.evaluation.rows import Row
from anygpt.media.types import MEDIA, read_media
from anygpt.toyworld.language import plain_caption
from anygpt.toyworld.render import render
from anygpt.toyworld.world import THINGS
from anygpt.toyworld.zoo import zoo

REAL = os.environ.get("ANYGPT_REALDATA")
PROMPT = Sample("0", (Message("user", (ContentPart("text", "make it"),)),), "here")
FRAMES = 6


def toy_files(kind, write):
    rng = np.random.default_rng(0)
    for number in range(16):
        thing = THINGS[number * 3]
        made = render(kind, thing, "left" if kind == "video" else None, rng)
        content, rate = (made, 8) if kind != "audio" else (made, 16_000)
        yield write(content, rate), plain_caption(thing)


def real_files(kind, write):
    name, folder = {"image": ("cc3m", "images"), "video": ("webvid", "videos"), "audio": ("audiocap", "audios")}[kind]
    source = DataSource(f"{REAL}/{name}/{name}_generation.json", media_root=f"{REAL}/{name}/{folder}")
    for sample in ConversationDataset.from_files([source]).samples:
        part = next(part for part in sample.messages[-1].content if part.path)
        medium = read_media(kind, part.path, FRAMES)
        if kind == "image":
            medium.thumbnail((128, 128))
        elif kind == "video":
            medium = np.stack([np.asarray(Image.fromarray(frame).resize((64, 48))) for frame in medium.frames])
        else:
            medium = MEDIA[kind].to_target(medium)[0]
            medium = np.asarray(medium).reshape(-1)[: 2 * 16_000]
        yield write(medium, 8 if kind == "video" else 16_000), part.caption


@pytest.fixture(
    scope="module", params=["toyworld", pytest.param("real", marks=pytest.mark.skipif(not REAL, reason=""))]
)
def files(request, tmp_path_factory):
    """`files(kind) -> (paths, captions)`, and `files.write(kind, content, rate) -> path`."""
    folder, found = tmp_path_factory.mktemp("files"), {}

    def write(kind, content, rate=None):
        path = folder / f"{len(list(folder.iterdir()))}{MEDIA[kind].suffixes[0]}"
        MEDIA[kind].write(path, content, rate)
        return path

    def of(kind):
        if kind not in found:
            make = real_files if request.param == "real" else toy_files
            found[kind] = list(zip(*make(kind, lambda content, rate: write(kind, content, rate)), strict=True))
        return found[kind]

    of.write, of.name = write, request.param
    return of


def worse(kind, path, level, write):
    """The medium with noise of a level from 0 to 1; pictures are blurred, too."""
    rng = np.random.default_rng(int(path.stem))
    medium = read_media(kind, path, FRAMES)
    if kind == "audio":
        sound = np.asarray(MEDIA[kind].to_target(medium)[0]).reshape(-1)
        return write(kind, np.clip(sound + 0.01 * level * rng.standard_normal(sound.shape), -1, 1), 16_000)
    if kind == "image":
        return write(kind, medium.filter(ImageFilter.GaussianBlur(level * max(medium.size) / 8)))
    noise = 100 * level * rng.standard_normal(medium.frames.shape)
    return write(kind, np.clip(medium.frames + noise, 0, 255).astype(np.uint8), 8)


def value(name, network, kind, rows, answers, **options):
    metric = METRICS[name].make(network, kind, **options)
    metric.update(Batch([Item(row, "", {kind: answer}) for row, answer in zip(rows, answers, strict=True)]))
    return metric.compute()[""]["value"]


def check(name, files, values, higher):
    print(f"\n{files.name}, {name}: {', '.join(f'{v:.4g}' for v in values)}")
    signed = values if higher else [-v for v in values]
    assert all(before > after for before, after in itertools.pairwise(signed)), (name, values)


DEGRADED = [
    ("fid", "zoo", "image", "target"),
    ("kid", "zoo", "image", "target"),
    ("cmmd", "zoo", "image", "target"),
    ("clip_i", "zoo", "image", "source"),
    ("dino", "dino", "image", "source"),
    ("fvd", "videomae", "video", "target"),
    ("frame_fid", "zoo", "video", "target"),
    ("fad", "clap", "audio", "target"),
    ("kl", "ast", "audio", "target"),
]


@pytest.mark.parametrize(("name", "features", "kind", "role"), DEGRADED, ids=lambda value: str(value))
def test_blur_and_noise_make_it_worse(name, features, kind, role, files, networks):
    paths, _ = files(kind)
    network = PretrainedNetwork(
        str(zoo() / "image_encoder" if features == "zoo" else networks / features),
        kind,
        classify=METRICS[name].classify,
    )
    rows = [Row("0", PROMPT, **{f"{role}s": {kind: path}}) for path in paths]
    degraded = [[worse(kind, path, level, files.write) for path in paths] for level in (0, 0.1, 0.3, 1)]
    check(name, files, [value(name, network, kind, rows, answers) for answers in degraded], METRICS[name].higher)


def test_frames_of_other_clips_make_it_worse(files):
    paths, _ = files("video")
    network = PretrainedNetwork(str(zoo() / "image_encoder"), "video")
    clips, values = [read_media("video", path, FRAMES).frames for path in paths], []
    size = min(frame.shape[:2] for clip in clips for frame in clip)
    for changed in ([], [2], [1, 3, 5]):
        answers = []
        for clip, other in zip(clips, [*clips[1:], clips[0]], strict=True):
            frames = [(other if i in changed else clip)[i, : size[0], : size[1]] for i in range(len(clip))]
            answers.append(files.write("video", np.stack(frames), 8))
        values.append(value("frame_consistency", network, "video", [Row("0", PROMPT)] * len(paths), answers))
    check("frame_consistency", files, values, higher=True)


def aligned(network, features, captions):
    """The network with its media tower's last layer solved so that features are those of their captions."""
    model = network.model
    layer = model.audio_projection.linear2 if hasattr(model, "audio_projection") else model.visual_projection
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features()
    handle.remove()
    states = torch.cat([one.reshape(-1, one.shape[-1]) for one in seen]).double()
    texts = network.of_texts(captions).double()
    texts = texts.repeat_interleave(len(states) // len(texts), 0)
    solved = torch.linalg.lstsq(states, texts, rcond=1e-6, driver="gelsd").solution
    with torch.no_grad():
        layer.weight.copy_(solved.T)
        if layer.bias is not None:
            layer.bias.zero_()
    return network


@pytest.mark.parametrize(
    ("name", "features", "kind"),
    [("clip_score", "clip", "image"), ("clipsim", "clip", "video"), ("clap_score", "clap", "audio")],
)
def test_shuffled_captions_make_it_worse(name, features, kind, files, networks):
    paths, captions = files(kind)
    media = [read_media(kind, path, FRAMES) for path in paths]
    network = PretrainedNetwork(str(networks / features), kind)
    read = network.of_media if kind != "video" else lambda clips: [network.of_frames(clip.frames) for clip in clips]
    network, values = aligned(network, lambda: read(media), captions), []
    for share in (0, 0.5, 1):
        count = round(share * len(captions))
        others = [*np.roll(captions[:count], 1).tolist(), *captions[count:]]
        rows = [Row("0", PROMPT, captions={kind: str(caption)}) for caption in others]
        values.append(value(name, network, kind, rows, paths))
    check(name, files, values, higher=True)


@pytest.mark.parametrize("name", ["bleu", "rouge_l", "cider", "exact_match", "vqa_accuracy"])
def test_shuffled_answers_make_it_worse(name, files):
    _, captions = files("image")
    values = []
    for share in (0, 0.5, 1):
        count = round(share * len(captions))
        said = [*np.roll(captions[:count], 1).tolist(), *captions[count:]]
        metric = METRICS[name].make()
        rows = [Row("0", PROMPT, (caption,)) for caption in captions]
        metric.update(Batch([Item(row, str(text), {}) for row, text in zip(rows, said, strict=True)]))
        values.append(next(iter(metric.compute().values()))["value"])
    check(name, files, values, higher=True)


def test_the_folder_is_that_of_real_files():
    assert REAL is None or (Path(REAL) / "cc3m/cc3m_generation.json").is_file()
