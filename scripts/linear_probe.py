"""How much of a thing the frozen encoders' features hold: linear probes, and what the language model says in words.

    python scripts/linear_probe.py                                               # the zoo's parts
    python scripts/linear_probe.py --checkpoint runs/quickstart/stage3/final     # a trained model, after stage 3

A logistic regression from each encoder's pooled features to the shape, and another one to the colour, is fitted on
renders of the things that training sees and measured on fresh renders of those that it does not. Questions in words
are asked of the language model; run on the zoo and on a trained model this says what training has made it forget.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from anygpt import InputError, ModalEncoderModule, MultimodalModel, MultimodalProcessor
from anygpt.errors import reading
from anygpt.model.parts import Source, load_encoder, load_encoder_processor, load_language_model, load_tokenizer
from anygpt.toyworld.evaluation.answers import Settings
from anygpt.toyworld.evaluation.probes import probe_encoders, question_accuracy
from anygpt.toyworld.zoo import zoo
from anygpt.training.cli import MISTAKE, quiet_libraries


def load(checkpoint: Path | None, parts: Path) -> tuple[MultimodalModel, MultimodalProcessor]:
    """A checkpoint, or the encoders and the language model in a folder of parts with nothing between them."""
    if checkpoint is not None:
        with reading(checkpoint):
            model = MultimodalModel.from_pretrained(checkpoint)
            return model.eval(), MultimodalProcessor.from_pretrained(checkpoint, model=model)
    llm, eyes, ears = (str(parts / name) for name in ("language_model", "image_encoder", "audio_encoder"))
    encoders = {"image": Source(eyes), "video": Source(eyes, num_frames=8), "audio": Source(ears)}
    modules = {key: ModalEncoderModule(load_encoder(source, key)) for key, source in encoders.items()}
    model = MultimodalModel(modules, load_language_model(Source(llm)))
    processors = {key: load_encoder_processor(source, key) for key, source in encoders.items()}
    return model.eval(), MultimodalProcessor(processors, load_tokenizer(Source(llm)), model=model)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=Path, help="a run's final/ folder (default: the zoo's own parts)")
    parser.add_argument("--renders", type=int, default=40, help="of each thing, to fit on (default: %(default)s)")
    parser.add_argument("--fresh", type=int, default=50, help="of each thing, to measure on (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=500, help="asked in words (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of renders and questions (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        for name in ("renders", "fresh", "questions"):
            if getattr(options, name) < 1:
                raise InputError(f"--{name} is {getattr(options, name)}, expected at least 1")
        model, processor = load(options.checkpoint, zoo())
        found = {"encoders": probe_encoders(model, processor, options.renders, options.fresh, options.seed)}
        settings = Settings(talk_samples=options.questions, seed=options.seed)
        found["questions"] = question_accuracy(model, processor, settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    text = json.dumps(found, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
