"""Measure the parts of the zoo separately, on the ten things that alignment never sees.

    python scripts/zoo_quality.py --samples 1000

Encoders: a linear probe fitted on renders of the other things. The language model: questions in words, small talk,
nonsense. Decoders: judged samples for plain true captions. `build_zoo.py` puts the results into the parts' model cards.
`--parts` measures another build (`build_zoo.py --output DIR`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from anygpt import (
    InputError,
    ModalDecoderModule,
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProcessor,
    load_decoder,
    load_encoder,
    load_encoder_processor,
    load_language_model,
    load_tokenizer,
)
from anygpt.parts.source import Source
from anygpt.toyworld.evaluation.answers import Settings, ask, judge
from anygpt.toyworld.evaluation.baselines import upper_bound
from anygpt.toyworld.evaluation.matrix import talk_table
from anygpt.toyworld.evaluation.probes import probe_encoders
from anygpt.toyworld.evaluation.requests import talk_requests
from anygpt.toyworld.world import HELD_OUT, MODALITIES
from anygpt.toyworld.zoo import PARTS, zoo
from anygpt.training.cli import MISTAKE, quiet_libraries

GUIDANCE = {"image": 2, "video": 2, "audio": 3}  # as in configs/tiny
OUTPUT = Path(__file__).resolve().parent.parent / "runs" / "zoo" / "quality.json"


def load(parts: Path) -> tuple[MultimodalModel, MultimodalProcessor]:
    """Load the encoders and the language model of a folder of parts, without trained links."""
    llm, eyes, ears = (str(parts / name) for name in ("language_model", "image_encoder", "audio_encoder"))
    encoders = {"image": Source(eyes), "video": Source(eyes, num_frames=8), "audio": Source(ears)}
    modules = {key: ModalEncoderModule(load_encoder(source, key)) for key, source in encoders.items()}
    model = MultimodalModel(modules, load_language_model(Source(llm)))
    processors = {key: load_encoder_processor(source, key) for key, source in encoders.items()}
    return model.eval(), MultimodalProcessor(processors, load_tokenizer(Source(llm)), model=model)


def measure(parts: Path, samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """`{part: {what: share}}` for the parts in a folder, from `samples` each, or 50 renders per thing for encoders."""
    model, processor = load(parts)
    probes = probe_encoders(model, processor, renders=40, fresh=50, seed=seed)
    settings = Settings(samples=samples, seed=seed)
    talk = talk_requests(HELD_OUT, samples, seed)
    quality: dict[str, dict[str, Any]] = {
        "image_encoder": {f"{what} of a picture, linear probe": found for what, found in probes["image"].items()}
        | {f"{what} of a clip, linear probe": found for what, found in probes["video"].items()},
        "audio_encoder": {f"{what} of a sound, linear probe": found for what, found in probes["audio"].items()},
        "language_model": talk_table([judge(*pair) for pair in ask(model, processor, talk, settings)]),
    }
    sources = {modality: Source(str(parts / f"{modality}_decoder")) for modality in MODALITIES}
    decoders = {
        key: ModalDecoderModule(
            load_decoder(source),
            num_signal_tokens=1,
            defaults={"guidance_scale": GUIDANCE[key], "num_inference_steps": 20},
        )
        for key, source in sources.items()
    }
    alone = MultimodalModel({}, model.language_model, decoders)
    with tqdm(total=samples * len(decoders), desc="decoders", unit="sample", mininterval=1) as bar:
        bounds = upper_bound(alone, HELD_OUT, settings, bar.update)
    for key, bound in bounds.items():
        motion = bound.pop("motion", None)
        quality[f"{key}_decoder"] = {"shape and colour under true captions": bound}
        if motion is not None:
            quality[f"{key}_decoder"]["motion under true captions"] = motion
    return quality


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--samples", type=int, default=200, help="of each kind (default: %(default)s)")
    parser.add_argument("--parts", type=Path, default=zoo(), help="folder of the parts (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0, help="of renders, questions and noise (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        if options.samples < 1:
            raise InputError(f"--samples is {options.samples}, expected at least 1")
        if not (options.parts / PARTS[0]).is_dir():
            raise InputError(f"--parts {options.parts} is no folder of parts; it should hold {', '.join(PARTS)}")
        quality = measure(options.parts, options.samples, options.seed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(quality, indent=1) + "\n", encoding="utf-8")
    for part, found in quality.items():
        for what, share in found.items():
            print(f"{part}: {what}: {share['rate']:.3f} ({share['right']} of {share['n']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
