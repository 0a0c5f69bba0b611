"""A step of stage 2, with `train.signal_rows` both, output and none.

With `both` the input rows of the signal tokens train, so gradients pass through the whole language model; with `output`
and `none` nothing below its last states trains, and it runs without a graph. The weights are random, in the shapes of
SmolLM2-135M and of Stable Diffusion 1.5 with a U-Net of a quarter of the width.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaForCausalLM

from anygpt import ModalDecoderModule, MultimodalModel, StableDiffusionDecoder
from anygpt.toyworld import part_path
from anygpt.training.cli import quiet_libraries
from anygpt.training.config import Config
from anygpt.training.stages import LLM_DECODER, prepare_stage

SIDES = ["both", "output", "none"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one of warm-up (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--latents", type=int, default=16, help="height of the latents; SD 1.5 has 64 (%(default)s)")


def sides(options: argparse.Namespace) -> list[str]:
    return SIDES


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of forward, backward (including the optimizer) and the whole step, and trained parameters."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(options.latents)
    config = Config()
    config.train.signal_rows = side
    prepare_stage(model, LLM_DECODER, config)
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = make_batch(model, options, device)
    forward, backward = [], []
    for _ in range(options.steps + 1):
        begin = clock(device)
        output = model(**batch)
        middle = clock(device)
        assert (output.hidden_states.grad_fn is None) == (side != "both"), "the trunk's graph"
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        forward.append(middle - begin)
        backward.append(clock(device) - middle)
    whole = [a + b for a, b in zip(forward, backward, strict=True)]
    times = {"forward_s": forward, "backward_s": backward, "step_s": whole}
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_model(latents: int, num_signal_tokens: int = 4) -> MultimodalModel:
    """A model of SmolLM2-135M's shape, the paper's output projector and a narrow Stable Diffusion 1.5."""
    quiet_libraries()
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )
    decoder = StableDiffusionDecoder(make_pipeline(latents))
    module = ModalDecoderModule(decoder, num_signal_tokens=num_signal_tokens)
    model = MultimodalModel({}, llm, {"image": module})
    model.signal_tokens.set_ids({"image": list(range(49152, 49152 + num_signal_tokens))})
    return model


def make_pipeline(latents: int) -> StableDiffusionPipeline:
    tokenizer = CLIPTokenizer.from_pretrained(part_path("image_decoder") / "tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=latents,
        block_out_channels=(80, 160, 320, 320),
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    # The VAE encodes the targets; it has four levels like the real one, and is as narrow as the U-Net.
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_batch(model: MultimodalModel, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """A batch of random text that ends in a signal span, with captions and pictures as targets."""
    rows, size = options.batch_size, 8 * options.latents
    span = torch.tensor(model.signal_tokens.ids["image"]).expand(rows, -1)
    ids = torch.cat([torch.randint(49152, (rows, options.length - span.shape[1])), span], dim=1).to(device)
    media = torch.rand(rows, 3, size, size, device=device) * 2 - 1
    targets = {"image": {"captions": ["a red circle"] * rows, "media": media}}
    return {"input_ids": ids, "labels": ids, "decoder_targets": targets}
