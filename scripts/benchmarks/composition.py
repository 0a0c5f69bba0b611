"""A training step of a vision-language model: ours against transformers' LLaVA class, with the same sizes and weights.

The language model has SmolLM2-135M's shape, with a vocabulary of 49k or 128k; the encoder is ViT-B/16 at 224. Only the
projector trains, and only the answer has labels. The native class computes logits at all positions, ours only at
labels. Our model is composed of the native one's parts. `gemm_tflops` is the measured rate of a matrix product in the
parts' dtype, bfloat16, and `gemm_share` the step's arithmetic (products, convolutions, attention) as a share of it.
"""

import argparse

from anygpt import MultimodalModel

import torch
from benchmarks._shared import DEVICE, seconds, smollm2, vit
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration

VOCABULARIES = {"49k": 49152, "128k": 128256}
IMAGE_TOKEN = 5
PROMPT, ANSWER = 32, 32  # tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one of warm-up (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows, an image each (default: %(default)s)")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of all parts (default: %(default)s)")


def sides(options: argparse.Namespace) -> list[str]:
    return [f"{size} vocabulary: {who}" for size in VOCABULARIES for who in ("native", "ours")]


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds per step (forward, backward, optimizer), and the loss, which must be equal on both sides."""
    torch.manual_seed(0)
    size, who = side.split(" vocabulary: ")
    vision, text, dtype = vit(), smollm2(VOCABULARIES[size]), torch.bfloat16
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, tie_word_embeddings=True
    )
    model = LlavaForConditionalGeneration(config).to(DEVICE, dtype)
    model.set_attn_implementation(options.attention)
    if who == "ours":
        model = MultimodalModel.from_pretrained_multimodal_model(model)
        model.train_only(["image_projector"])
    else:
        model.requires_grad_(False).model.multi_modal_projector.requires_grad_(True)
    model.train()
    words = torch.randint(10, text.vocab_size, (options.batch_size, PROMPT + ANSWER))
    patches = torch.full((options.batch_size, (vision.image_size // vision.patch_size) ** 2), IMAGE_TOKEN)
    ids = torch.cat([patches, words], dim=1).to(DEVICE)
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    pixels = torch.rand(options.batch_size, 3, vision.image_size, vision.image_size, device=DEVICE, dtype=dtype)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    with FlopCounterMode(display=False) as counter:
        first_loss = step()
    matrix = torch.randn(2048, 2048, device=DEVICE, dtype=dtype)
    step_s, rate = seconds(step, options.steps), 2 * 2048**3 / seconds(lambda: matrix @ matrix, 9) / 1e12
    share = counter.get_total_flops() / step_s / 1e12 / rate
    return {"step_s": step_s, "gemm_tflops": rate, "gemm_share": share, "first loss": first_loss}
