"""Measure the parts of the zoo separately, on the ten things that alignment never sees.

    python scripts/zoo_quality.py --samples 1000

Encoders: a linear probe fitted on renders of the other things. The language model: questions in words, small talk,
nonsense. Decoders: judged samples for plain true captions. Tokenizers: judged decode(encode(render)), of all 48 things.
`build_zoo.py` puts the results into the parts' model cards.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anygpt
from anygpt import MultimodalModel, MultimodalProcessor
from anygpt.commands import execute, new_parser
from anygpt.data.collation import move
from anygpt.errors import InputError
from anygpt.toyworld import language
from anygpt.toyworld.evaluation.answers import Examiner, Settings, batches, judge, share
from anygpt.toyworld.evaluation.matrix import talk_table
from anygpt.toyworld.evaluation.requests import talk_requests
from anygpt.toyworld.render import SAMPLING_RATE, render
from anygpt.toyworld.world import COLOURS, HELD_OUT, MODALITIES, MOTIONS, SEEN, SHAPES, THINGS
from anygpt.toyworld.zoo import PARTS, zoo

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

TOKENIZERS = {
    "image": ("image_tokenizer", {}),
    "video": ("image_tokenizer", {"num_frames": 2}),
    "audio": ("audio_tokenizer", {}),
}
"""Folders and options."""
ENCODERS = {"image": ("image_encoder", None), "video": ("image_encoder", 8), "audio": ("audio_encoder", None)}
"""Folders and numbers of frames."""
GUIDANCE = {"image": 2, "video": 2, "audio": 3}  # as in configs/tiny
PROPERTIES = {"shape": SHAPES, "colour": COLOURS}


def measure(parts: Path, samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """`{part: {what: share}}` for the parts in a folder, from `samples` each, or 50 renders per thing for encoders."""
    llm, settings = str(parts / "language_model"), Settings(samples=samples, seed=seed)
    encoders, processors = {}, {}
    for key, (name, frames) in ENCODERS.items():
        given = {"path": str(parts / name), "modality": key, "num_frames": frames}
        encoders[key] = anygpt.ModalEncoderModule(anygpt.load_encoder(**given))
        processors[key] = anygpt.load_encoder_processor(**given)
    model = MultimodalModel(encoders, anygpt.load_language_model(llm)).eval()
    processor = MultimodalProcessor(processors, anygpt.load_tokenizer(llm), model=model)
    names = {"image": "a picture", "video": "a clip", "audio": "a sound"}
    quality: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for key, found in probe_encoders(model, processor, renders=40, fresh=50, seed=seed).items():
        shares = {f"{what} of {names[key]}, linear probe": one for what, one in found.items()}
        quality[ENCODERS[key][0]] |= shares
    asked = Examiner(model, processor, settings).ask(talk_requests(HELD_OUT, samples, seed))
    quality["language_model"] = talk_table([judge(*pair) for pair in asked])
    decoders, tokenizers = {}, {}
    for key, guidance in GUIDANCE.items():
        defaults = {"guidance_scale": guidance, "num_inference_steps": 20}
        decoder = anygpt.load_decoder(str(parts / f"{key}_decoder"))
        decoders[key] = anygpt.ModalDecoderModule(decoder, num_signal_tokens=1, defaults=defaults)
    for key, (name, given) in TOKENIZERS.items():
        tokenizers[key] = anygpt.load_media_tokenizer(parts / name, key, **given)

    def add(part: str, what: str, bound: dict[str, Any]) -> None:
        motion = {f"motion {what}": bound.pop("motion")} if "motion" in bound else {}
        quality[part] |= {f"shape and colour {what}": bound} | motion

    with tqdm(total=samples * len(decoders), desc="decoders", unit="sample", mininterval=1) as bar:
        maker = MultimodalModel({}, model.language_model, decoders)
        for key, bound in Examiner(maker, processor, settings, bar.update).upper_bound(HELD_OUT).items():
            add(f"{key}_decoder", "under true captions", bound)
    maker = MultimodalModel({}, model.language_model, {}, tokenizers)
    for key, bound in Examiner(maker, processor, settings).upper_bound(THINGS).items():
        add(TOKENIZERS[key][0], f"of {names[key]} made of its codes", bound)
    return quality


def probe_encoders(
    model: MultimodalModel, processor: MultimodalProcessor, renders: int, fresh: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Fit linear probes, and return `{encoder key: {"shape": share, "colour": share}}` on held-out things.

    They are fitted on `renders` of each seen thing, and tested on `fresh` ones of each held-out thing.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, modality in ((key, encoder.modality) for key, encoder in model.encoders.items()):
        features, shown = [], []
        for number, (things, count) in enumerate(((SEEN, renders), (HELD_OUT, fresh))):
            rng = np.random.default_rng([seed, 4, MODALITIES.index(modality), number])
            shown.append([thing for thing in things for _ in range(count)])
            media = []
            for thing in shown[-1]:
                medium = render(modality, thing, language.pick(rng, MOTIONS) if modality == "video" else None, rng)
                media.append((medium, SAMPLING_RATE) if modality == "audio" else medium)
            features.append(pooled_features(model, processor, key, media))
        found[key] = {}
        for name, values in PROPERTIES.items():
            labels, expected = (torch.tensor([values.index(getattr(t, name)) for t in things]) for things in shown)
            given = fit_probe(features[0], labels, len(values))(features[1]).argmax(-1)
            found[key][name] = share((given == expected).tolist())
    return found


@torch.inference_mode()
def pooled_features(model: MultimodalModel, processor: MultimodalProcessor, key: str, media: Sequence[Any]) -> Tensor:
    """The mean of the features of each medium that an encoder's projector gets, `(media, width)`."""
    encoder, pooled = model.encoders[key], []
    for batch in batches(media, 128):
        data = processor.process_media(processor.arrange_media((encoder.modality, one) for one in batch))[0]
        inputs = model.assign_inputs(move(data, model.device))[key]
        pooled += [features.float().mean(0).cpu() for features in encoder.encode(inputs)]
    return torch.stack(pooled)


def fit_probe(features: Tensor, labels: Tensor, classes: int, decay: float = 1e-3) -> Callable[[Tensor], Tensor]:
    """Ridge regression of classes on standardised features `(M, D)` of labels `(M,)`; gives scores `(M, classes)`."""
    mean, std = features.double().mean(0), features.double().std(0).clamp(min=1e-6)
    x, y = (features - mean) / std, F.one_hot(labels, classes).double()
    gram = x.T @ x + decay * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.T @ (y - y.mean(0)))
    return lambda new: (new - mean) / std @ weight + y.mean(0)


def report(arguments: list[str]) -> None:
    parser = new_parser(None, __doc__)
    parser.add_argument("--samples", type=int, default=200, help="samples of each kind (default: %(default)s)")
    parser.add_argument("--parts", type=Path, default=zoo(), help="folder of the parts (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.samples < 1:
        raise InputError(f"--samples is {options.samples}, expected at least 1")
    for part, found in measure(options.parts, options.samples, options.seed).items():
        for what, one in found.items():
            print(f"{part}: {what}: {one['rate']:.3f} ({one['right']} of {one['n']})")


if __name__ == "__main__":
    raise SystemExit(execute(report))
