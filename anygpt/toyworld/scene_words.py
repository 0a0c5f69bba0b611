"""Training of ToyWorld 2's text encoder on captions: `python -m anygpt.toyworld.scene_words DECODER --output FOLDER`.

Writes a copy of the decoder with a text encoder whose states tell number, shape, colour and side of each thing.
Denoising alone did not teach the text encoder order: after 20,000 updates the denoiser's loss was the same with the two
nouns of a caption swapped, and with another relation between them.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from anygpt.data.grammar import CATEGORIES, COUNTS, RELATIONS
from anygpt.errors import InputError, exit_code
from anygpt.media.writing import replacing
from anygpt.toyworld.scenes import Scene, in_full, invent
from anygpt.toyworld.world import COLOURS, SHAPES, THINGS

STEPS, CAPTIONS = 1000, 10_000
_BATCH, _LEARNING_RATE, _WARMUP = 128, 1e-3, 100
_EMBEDDING_GAIN = 10.0
"""Factor on the embeddings of words and positions, which CLIP draws so small that attention hardly tells them apart."""
_SIDES = list(RELATIONS)
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_SIZES = (len(SHAPES), 1 + len(COLOURS), 1 + len(_SIDES), 1 + max(COUNTS))
"""Classes of shape, colour, side and number; the first colour and side are "not said"."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m anygpt.toyworld.scene_words", description=__doc__)
    add = parser.add_argument
    add("decoder", type=Path, help="folder of a Stable Diffusion pipeline whose tokenizer knows the captions' words")
    add("--output", type=Path, required=True, help="folder to write to")
    add("--steps", type=int, default=STEPS, help="updates (default: %(default)s, half a minute of one core)")
    options = parser.parse_args(arguments)
    network, accuracy = train(options.decoder, options.steps)
    with replacing(options.output) as folder:
        shutil.copytree(options.decoder, folder, ignore=shutil.ignore_patterns("text_encoder"))
        network.save_pretrained(folder / "text_encoder")
    print(f"{options.output}: {100 * accuracy:.1f}% of fresh captions' things told rightly")


def train(decoder: Path, steps: int = STEPS, seed: int = 0) -> tuple[CLIPTextModel, float]:
    """A new text encoder of the decoder's size, and the share of things in fresh captions that a linear map tells."""
    if not (decoder / "tokenizer").is_dir() or not (decoder / "text_encoder").is_dir():
        raise InputError(
            f"{decoder} has no tokenizer/ and text_encoder/; expected a Stable Diffusion pipeline's folder"
        )
    tokenizer = AutoTokenizer.from_pretrained(decoder / "tokenizer")
    config = CLIPTextConfig.from_pretrained(decoder / "text_encoder")
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CLIPTextModel(config)
        head = torch.nn.Linear(config.hidden_size, sum(_SIZES))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "embedding" in name:
                    parameter.mul_(_EMBEDDING_GAIN)
        ids, labels = read(_invent(CAPTIONS, rng), tokenizer, config.max_position_embeddings)
        optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], _LEARNING_RATE, weight_decay=0.01)
        for step in tqdm(range(steps), desc="text encoder", unit="update", mininterval=1):
            share = min(1, (step + 1) / _WARMUP) * (1 + np.cos(np.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = _LEARNING_RATE * share
            rows = torch.randint(len(ids), (_BATCH,))
            answers = head(network(ids[rows])[0]).split(_SIZES, -1)
            wanted = labels[rows].unbind(-1)
            loss = sum(
                F.cross_entropy(answer.flatten(0, 1), label.flatten())
                for answer, label in zip(answers, wanted, strict=True)
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    ids, labels = read(_invent(1000, rng), tokenizer, config.max_position_embeddings)
    with torch.inference_mode():
        told = torch.stack([part.argmax(-1) for part in head(network(ids)[0]).split(_SIZES, -1)], -1)
    asked = labels[..., 0] >= 0
    return network.eval(), (told == labels).all(-1)[asked].float().mean().item()


def read(scenes: list[Scene], tokenizer: AutoTokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Tokens `(B, T)` of the captions, and shape, colour, side and number told by each `(B, T, 4)`, -100 by the others.

    A token of CLIP's sees those before it only. A thing is told by the last word of its noun phrase, the first of two
    again, now with its side, by the last word of the relation. All tokens after the words tell the things in turn:
    where few of sixteen tokens tell something, a denoiser takes several times as long to attend to them.
    """
    options = {"padding": "max_length", "max_length": length, "return_tensors": "pt"}
    tokens = tokenizer([scene.caption for scene in scenes], return_offsets_mapping=True, **options)
    labels = torch.full((*tokens.input_ids.shape, len(_SIZES)), -100)
    for row, scene in enumerate(scenes):
        at = {end: token for token, (start, end) in enumerate(tokens.offset_mapping[row].tolist()) if start < end}
        first, *told = _told(scene)
        for end, label in (first, *told):
            labels[row, at[end]] = torch.tensor(label)
        told = told or [first]
        for token in range(max(at.values()) + 1, length):
            labels[row, token] = torch.tensor(told[token % len(told)][1])
    return tokens.input_ids, labels


def _told(scene: Scene) -> list[tuple[int, list[int]]]:
    """What is told of a thing, and after how many characters of the caption; of two things the first is told twice."""
    things, relation, caption = scene.expected["things"], scene.expected["relation"], scene.caption
    named = [
        (SHAPES.index(thing["name"]), COLOURS.index(thing["colour"]) + 1 if thing["colour"] else 0) for thing in things
    ]
    (one, *_), count = named, things[0]["count"]
    if len(things) == 1:
        return [(len(caption), [*one, 0, count])]
    link = f" {relation or 'and'} "
    middle = caption.index(link)
    sides = [1 + _SIDES.index(side) if side else 0 for side in (relation, _OPPOSITE.get(relation))]
    later = zip((middle + len(link) - 1, len(caption)), named, sides, strict=True)
    return [(middle, [*one, 0, count]), *((end, [*what, side, 1]) for end, what, side in later)]


def _invent(number: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes of all things and categories; half of the captions leave nothing out."""
    scenes = (invent(CATEGORIES[int(rng.integers(len(CATEGORIES)))], THINGS, rng) for _ in range(number))
    return [in_full(scene, rng) if rng.integers(2) else scene for scene in scenes]


if __name__ == "__main__":
    sys.exit(exit_code(main))
