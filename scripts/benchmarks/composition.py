"""A training step of a vision-language model: ours against transformers' LLaVA class, with the same sizes and weights.

The language model has SmolLM2-135M's shape, with a vocabulary of 49k or 128k; the encoder is ViT-B/16 at 224. Only the
projector trains, and only the answer has labels. The native class computes logits at all positions, ours only at
labels. Our model is composed of the native one's parts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from anygpt import MultimodalModel
from anygpt.training.cli import quiet_libraries

VOCABULARIES = {"49k": 49152, "128k": 128256}
IMAGE_TOKEN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one of warm-up (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows, an image each (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="text tokens before the answer (default: %(default)s)")
    parser.add_argument("--answer", type=int, default=32, help="tokens of the answer (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of all parts (default: %(default)s)")


def sides(options: argparse.Namespace) -> list[str]:
    return [f"{who}, {size} vocabulary" for size in VOCABULARIES for who in ("native", "ours")]


def baseline(side: str) -> str:
    """The native class with the same vocabulary."""
    return side.replace("ours", "native")


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds per step (forward, backward, optimizer), and the loss, which must be equal on both sides."""
    quiet_libraries()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocabulary = VOCABULARIES[side.split()[1]]
    native = make_native(vocabulary).to(device, getattr(torch, options.dtype))
    batch = make_batch(native.config, vocabulary, options, device)
    batch["pixel_values"] = batch["pixel_values"].to(native.dtype)
    if side.startswith("ours"):
        model = MultimodalModel.from_pretrained_multimodal_model(native)
        model.train_only(["image_projector"])
        del native
    else:
        model = native.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    times, losses = [], []
    for _ in range(options.steps + 1):
        begin = clock(device)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(clock(device) - begin)
        losses.append(loss.item())
    return {"step_s": statistics.median(times[1:]), "first loss": losses[0]}


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_native(vocabulary: int) -> LlavaForConditionalGeneration:
    """LLaVA with random weights in the shapes of ViT-B/16 and SmolLM2-135M."""
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    vision = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, tie_word_embeddings=True
    )
    return LlavaForConditionalGeneration(config)


def make_batch(
    config: LlavaConfig, vocabulary: int, options: argparse.Namespace, device: str
) -> dict[str, torch.Tensor]:
    """A batch with an image, a prompt and an answer per row; only the answer has labels."""
    rows = options.batch_size
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    text = torch.randint(10, vocabulary, (rows, options.prompt + options.answer))
    ids = torch.cat([torch.full((rows, patches), IMAGE_TOKEN), text], dim=1)
    labels = ids.clone()
    labels[:, : -options.answer] = -100
    size = config.vision_config.image_size
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {n: t.to(device) for n, t in batch.items()} | {
        "pixel_values": torch.rand(rows, 3, size, size, device=device)
    }
