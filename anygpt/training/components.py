"""Output of stage 0: each trained part as an ordinary `from_pretrained` folder."""

import logging
from pathlib import Path
from typing import Any

import torch

from anygpt.data.collation import Collator
from anygpt.data.dataset import ConversationDataset
from anygpt.model.language_models import load_tokenizer
from anygpt.model.multimodal import MultimodalModel
from anygpt.model.parts import part_modules
from anygpt.parts.publishing import let_umask_decide
from anygpt.processing.processor import MultimodalProcessor
from anygpt.training.config import Config
from anygpt.training.folder import PARTS
from anygpt.training.loading import use_frames_of
from anygpt.training.setup import source

logger = logging.getLogger(__name__)

SCALED_SAMPLES = 512
"""Media used to measure the scale of a VAE's latents."""


def write_components(final: Path, config: Config) -> None:
    """Write the trained parts of `final` to `output_dir/parts/<part>`; a trained VAE gets the scaling factor that gives
    its latents unit variance (arXiv 2112.10752, §G)."""
    model = MultimodalModel.from_pretrained(final)
    processor = MultimodalProcessor.from_pretrained(final)
    processor.describe_targets(model)
    trained = {part.partition(".")[0] for part in config.train.parts}
    for part, module in part_modules(model).items():  # projectors are left out: they belong to this composition
        if part not in trained:
            continue
        folder = Path(config.run.output_dir) / PARTS / part
        key, _, kind = part.rpartition("_")
        if f"{part}.vae" in config.train.parts:
            module.vae.register_to_config(scaling_factor=1 / latent_deviation(model, processor, key, config))
        module.save_pretrained(folder)
        if part == "language_model":  # the original tokenizer, without the tokens added by this composition
            load_tokenizer(source(config.model.language_model, "no")).save_pretrained(folder)
        elif kind == "encoder":
            processor.encoder_processors[key].save_pretrained(folder)
        let_umask_decide(folder)
        logger.info("%s", folder)


@torch.no_grad()
def latent_deviation(model: MultimodalModel, processor: Any, key: str, config: Config) -> float:
    dataset = ConversationDataset.from_files(config.data.train, on_bad_sample=config.data.on_bad_sample)
    use_frames_of(dataset, processor)
    collator, decoder = Collator(processor), model.decoders[key].module
    latents = []
    for start in range(0, min(SCALED_SAMPLES, len(dataset)), config.train.batch_size):
        rows = range(start, min(start + config.train.batch_size, len(dataset)))
        target = collator([dataset[row] for row in rows])["decoder_targets"].get(key)
        if target is not None:
            latents.append(decoder.posterior(target["media"].to(decoder.vae.dtype))[0])
    return float(torch.cat(latents).std())
