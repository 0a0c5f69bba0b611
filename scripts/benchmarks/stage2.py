"""A step of stage 2: what trains of the signal tokens, the feature cache, and NExT-GPT's way.

With `train.signal_rows` both, the input rows of the signal tokens train, and gradients pass through the whole language
model; with output and none nothing below its last states trains, and it runs without a graph. Reading JPEGs counts.

`--peer` compares with a step as NExT-GPT's public code makes it, on the same rows: the whole embedding matrix and head
train beside the output projector, so that gradients pass through the whole language model; logits at all positions;
text encoder and VAE run in each step; noise is the target, and weights of min-SNR multiply the mean over the batch.
"""

import argparse
import tempfile
from pathlib import Path

from anygpt.data.collation import move
from anygpt.model.multimodal import MultimodalModel
from anygpt.training.config import parse_config
from anygpt.training.loading import make_loader, take_updates
from anygpt.training.setup import build, build_data
from anygpt.training.stages import LLM_DECODER

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from benchmarks._shared import WARM_UP, run_stage, seconds, write_parts, write_photographs
from diffusers import DDPMScheduler
from torch import Tensor

CASES = {"denoising": 1, "alignment alone": 0}
PEER, CACHED = "NExT-GPT's way", "output, cached"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rounds=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two of warm-up (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows, a picture each (default: %(default)s)")
    parser.add_argument("--latents", type=int, default=16, help="height of the latents; SD 1.5 has 64 (%(default)s)")
    parser.add_argument("--peer", action="store_true", help="against a step as NExT-GPT makes it")


def sides(options: argparse.Namespace) -> list[str]:
    ways = (PEER, "output", CACHED) if options.peer else ("both", "output", "none", CACHED)
    return [f"{case}: {way}" for case in CASES for way in ways]


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds and shares of a step, and the first loss."""
    case, _, way = side.partition(": ")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = write_parts(folder, "language_model", "decoders", latents=options.latents)
        rows = write_photographs(folder / "rows.jsonl", options.batch_size * (options.steps + WARM_UP + 1), True)
        settings = [f"--config={parts}", f"--data.train=[{{path: {rows}}}]", f"--train.batch_size={options.batch_size}"]
        settings.append(f"--loss.denoising={CASES[case]}")
        if way == PEER:
            return {"step_s": time_peer([*settings, f"--train.max_steps={WARM_UP + options.steps}"], options.steps)}
        rows_trained, _, cached = way.partition(", ")
        settings.append(f"--train.signal_rows={rows_trained}")
        if cached:
            settings.append(f"--data.cache_dir={folder / 'cache'}")
        return run_stage(2, folder, settings, options.steps)


def time_peer(settings: list[str], steps: int) -> float:
    """Median seconds of a step as NExT-GPT makes it."""
    config = parse_config(settings)
    model, processor = build(config)
    dataset, _, collator = build_data(model, processor, config, LLM_DECODER)
    model.train_only(["image_output_projector"])
    model.language_model.get_input_embeddings().requires_grad_(True)  # and so the head, which is tied to it
    accelerator = Accelerator()
    model.to(accelerator.device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    updates = take_updates(make_loader(dataset, collator, config, accelerator, start=0), config)

    def step() -> None:
        ((batch, _),) = next(updates)
        peer_loss(model, **move(batch, accelerator.device)).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return seconds(step, steps, WARM_UP)


def peer_loss(
    model: MultimodalModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, decoder_targets: dict[str, dict]
) -> Tensor:
    """Cross-entropy, caption alignment and, where there are pictures, denoising, as in NExT-GPT's public code."""
    llm, decoder, targets = model.language_model, model.decoders["image"], decoder_targets["image"]
    output = llm(input_ids, attention_mask, labels=labels, output_hidden_states=True, use_cache=False)
    at = torch.isin(input_ids, torch.tensor(model.signal_tokens.ids["image"], device=input_ids.device))
    states = output.hidden_states[-1][at] + llm.get_input_embeddings()(input_ids)[at]
    condition = decoder.projector(states.unflatten(0, (len(input_ids), -1))).embeds
    encoded = decoder.module.encode_text(targets["captions"])
    loss = output.loss + torch.linalg.vector_norm(condition - encoded, dim=-1).mean()
    if "media" not in targets:
        return loss
    pipeline = decoder.module.pipeline
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    latents = pipeline.vae.encode(targets["media"]).latent_dist.sample() * pipeline.vae.config.scaling_factor
    noise, times = torch.randn_like(latents), torch.randint(1000, (len(latents),), device=latents.device)
    predicted = pipeline.unet(scheduler.add_noise(latents, noise, times), times, condition).sample
    signal = scheduler.alphas_cumprod.to(times.device)[times]
    ratio = signal / (1 - signal)
    return loss + (F.mse_loss(predicted, noise) * ratio.clip(max=5) / ratio).mean()
