"""Parts of ToyWorld 2 that know what is where: `python -m anygpt.toyworld.scene_parts text|image PART --output FOLDER`.

`text` writes a copy of a decoder with a new text encoder, whose states tell number, shape, colour and side of each
thing, or of two without a relation which comes first, and with a sampler that adds noise after each step (Euler
ancestral), with which more pictures are right. `image` writes a copy of an image encoder, trained on, whose patches
tell what is in their quarter and where the other of two things is.

The losses of stage 0 taught neither. After 20,000 updates of denoising the loss was the same with the two nouns of a
caption swapped, or with another relation between them. An encoder trained by captions told which shapes and colours a
picture shows, but not which belong together.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPVisionModel, PreTrainedTokenizerBase

from anygpt.data.grammar import CATEGORIES, COUNTS, RELATIONS
from anygpt.encoders.loading import load_encoder_processor
from anygpt.errors import InputError, exit_code
from anygpt.media.writing import replacing
from anygpt.parts.publishing import let_umask_decide
from anygpt.toyworld.scenes import PLACES, Scene, in_full, invent, render_scene
from anygpt.toyworld.world import COLOURS, SHAPES, THINGS

SIDES = [None, *RELATIONS, "first", "second"]
"""On which side of the other a thing is; without a relation, which comes first in reading order."""
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "first": "second"}
_SAID = (len(SHAPES), 1 + len(COLOURS), len(SIDES), 1 + max(COUNTS))
"""Classes of shape, colour, side and number in a caption; the first colour and side are "not said"."""
_SHOWN = (1 + len(SHAPES), 1 + len(COLOURS), 1 + len(PLACES), 3, 3)
"""Classes of shape, colour and place in a quarter of a picture, and of how far across and down the other of two things
lies from there (-1, 0 or 1 places, modulo 3). The first class of shape, colour and place is "nothing"."""
_EMBEDDING_GAIN = 10.0
"""Factor on the embeddings of words and positions, which CLIP draws so small that attention hardly tells them apart."""
_LEARNING_RATE, _WARMUP = 1e-3, 100


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m anygpt.toyworld.scene_parts", description=__doc__)
    add = parser.add_argument
    add("part", choices=("text", "image"), help="a decoder's text encoder, or an image encoder")
    add("source", type=Path, help="folder of a Stable Diffusion pipeline, or of a CLIPVisionModel and its processor")
    add("--output", type=Path, required=True, help="folder to write to")
    add("--steps", type=int, help="updates (default: 1000 for text, 1200 for image)")
    options = parser.parse_args(arguments)
    subfolder, model_type = ("text_encoder", "clip_text_model") if options.part == "text" else ("", "clip_vision_model")
    config = options.source / subfolder / "config.json"
    found = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else "no config.json"
    if found != model_type:
        raise InputError(f"{config.parent} holds {found}, expected {model_type}")
    index = options.source / "model_index.json"
    pipeline = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    if subfolder and pipeline.get("_class_name") != "StableDiffusionPipeline":
        kind = pipeline.get("_class_name", "missing")
        raise InputError(f"{index} is {kind}, expected a StableDiffusionPipeline")
    if options.output.exists():
        raise InputError(f"{options.output} is there already; remove it, or name another --output")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make = make_text_encoder if options.part == "text" else train_image_encoder
        network, share = make(options.source, *[options.steps] * (options.steps is not None))
    with replacing(options.output) as folder:
        shutil.copytree(options.source, folder, ignore=shutil.ignore_patterns(subfolder or "*.safetensors"))
        network.save_pretrained(folder / subfolder)
        if options.part == "text":
            pipeline["scheduler"] = ["diffusers", EulerAncestralDiscreteScheduler.__name__]
            (folder / index.name).write_text(json.dumps(pipeline, indent=2) + "\n", encoding="utf-8")
            scheduler = EulerAncestralDiscreteScheduler.from_pretrained(options.source, subfolder="scheduler")
            scheduler.save_pretrained(folder / "scheduler")
        let_umask_decide(folder)
    print(f"{options.output}: {100 * share:.1f}% of fresh tokens tell everything rightly")


def make_text_encoder(decoder: Path, steps: int = 1000) -> tuple[nn.Module, float]:
    """A new text encoder of the decoder's size, and the share of right tokens among those that have to tell something.

    Half of the captions leave nothing out.
    """
    config = CLIPTextConfig.from_pretrained(decoder / "text_encoder")
    network = CLIPTextModel(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "embedding" in name:
                parameter.mul_(_EMBEDDING_GAIN)
    rng = np.random.default_rng(0)
    scenes = [
        in_full(scene, rng) if rng.integers(2) else scene for scene in _invent(min(10_000, 128 * steps) + 1000, rng)
    ]
    tokenizer = AutoTokenizer.from_pretrained(decoder / "tokenizer")
    ids, labels = read_captions(scenes, tokenizer, config.max_position_embeddings)
    return _train(network, ids, labels, _SAID, steps, batch=128, fresh=1000)


def train_image_encoder(folder: Path, steps: int = 1200) -> tuple[nn.Module, float]:
    """The image encoder, trained on, and the share of patches that tell rightly what is in their quarter."""
    network, processor = CLIPVisionModel.from_pretrained(folder), load_encoder_processor(str(folder), "image")
    rng = np.random.default_rng(0)
    scenes = list(_invent(min(7500, 64 * steps) + 500, rng))
    images = (render_scene(scene, rng) for scene in scenes)
    pixels = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in images])
    labels = read_pictures(scenes, network.config.image_size // network.config.patch_size)
    return _train(network, pixels, labels, _SHOWN, steps, batch=64, fresh=500)


def _train(
    network: nn.Module, inputs: Tensor, labels: Tensor, sizes: tuple[int, ...], steps: int, batch: int, fresh: int
) -> tuple[nn.Module, float]:
    """Train the network and a linear map of its states `(B, T, H)` by the labels' cross-entropies; judge the last rows.

    `labels` are `(B, T, P)` for P properties of `sizes` classes, all -100 where a token has nothing to tell.
    """
    head = nn.Linear(network.config.hidden_size, sum(sizes))
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], _LEARNING_RATE, weight_decay=0.01)
    network.train()
    for step in tqdm(range(steps), unit="update", mininterval=1):
        share = min(1, (step + 1) / _WARMUP) * (1 + np.cos(np.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * share
        rows = torch.randint(len(inputs) - fresh, (batch,))
        answers = head(network(inputs[rows])[0]).split(sizes, -1)
        properties = zip(answers, labels[rows].unbind(-1), strict=True)
        loss = sum(F.cross_entropy(answer.flatten(0, 1), label.flatten()) for answer, label in properties)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    with torch.inference_mode():
        answers = head(network.eval()(inputs[-fresh:])[0]).split(sizes, -1)
    right = (torch.stack([answer.argmax(-1) for answer in answers], -1) == labels[-fresh:]).all(-1)
    return network, right[labels[-fresh:, :, 0] >= 0].float().mean().item()


def read_captions(scenes: Sequence[Scene], tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Tensor, Tensor]:
    """Tokens `(B, T)` of the captions, and shape, colour, side and number told by each `(B, T, 4)`, -100 by the others.

    A token of CLIP's sees those before it only. A thing is told by the last word of its noun phrase, the first of two
    again, now with its side, by the last word of the relation. All tokens after the words tell the things in turn:
    where few of sixteen tokens tell something, a denoiser takes several times as long to attend to them.
    """
    options = {"padding": "max_length", "max_length": length, "return_tensors": "pt"}
    tokens = tokenizer([scene.caption for scene in scenes], return_offsets_mapping=True, **options)
    labels = torch.full((*tokens.input_ids.shape, len(_SAID)), -100)
    for row, scene in enumerate(scenes):
        at = {end: token for token, (start, end) in enumerate(tokens.offset_mapping[row].tolist()) if start < end}
        first, *told = _told(scene)
        for end, label in (first, *told):
            labels[row, at[end]] = torch.tensor(label)
        told = told or [first]
        for token in range(max(at.values()) + 1, length):
            labels[row, token] = torch.tensor(told[token % len(told)][1])
    return tokens.input_ids, labels


def read_pictures(scenes: Sequence[Scene], side: int) -> Tensor:
    """What `_SHOWN` says of each token's quarter `(B, 1 + side², 5)`: 0 for nothing; -100 for the class token."""
    quarters = torch.zeros(len(scenes), len(PLACES), len(_SHOWN), dtype=torch.long)
    for row, scene in enumerate(scenes):
        for thing, place in zip(scene.things, scene.places, strict=True):
            shape, colour = SHAPES.index(thing.shape), COLOURS.index(thing.colour)
            quarters[row, place, :3] = torch.tensor([1 + shape, 1 + colour, 1 + place])
        if len(scene.places) == 2:
            one, other = scene.places
            to_other = torch.tensor(PLACES[other]) - torch.tensor(PLACES[one])
            quarters[row, one, 3:], quarters[row, other, 3:] = to_other % 3, -to_other % 3
    half = torch.arange(side) * 2 // side
    labels = quarters[:, (2 * half[:, None] + half).flatten()]
    return F.pad(labels, (0, 0, 1, 0), value=-100)


def _told(scene: Scene) -> list[tuple[int, list[int]]]:
    """Pairs of a position in the caption, in characters, and the label of the token that ends there.

    One pair for a single thing. Of two, the first thing has a pair before the relation and one after it.
    """
    things, relation, caption = scene.expected["things"], scene.expected["relation"], scene.caption
    named = [
        (SHAPES.index(thing["name"]), COLOURS.index(thing["colour"]) + 1 if thing["colour"] else 0) for thing in things
    ]
    (one, *_), count = named, things[0]["count"]
    if len(things) == 1:
        return [(len(caption), [*one, 0, count])]
    link = f" {relation or 'and'} "
    middle = caption.index(link)
    side = relation or "first"
    sides = [SIDES.index(side), SIDES.index(_OPPOSITE[side])]
    later = zip((middle + len(link) - 1, len(caption)), named, sides, strict=True)
    return [(middle, [*one, 0, count]), *((end, [*what, side, 1]) for end, what, side in later)]


def _invent(number: int, rng: np.random.Generator) -> Iterator[Scene]:
    """Scenes of all things and categories."""
    return (invent(CATEGORIES[int(rng.integers(len(CATEGORIES)))], THINGS, rng) for _ in range(number))


if __name__ == "__main__":
    sys.exit(exit_code(main))
