"""A training step with and without the feature cache: reading, decoding, forward, backward and the optimizer.

`tiny` uses the parts and data of configs/tiny. `small` uses random weights in the shapes of SmolLM2-135M, ViT-B/16 at
224, and Stable Diffusion 1.5 with U-Net and VAE at a quarter of the width, and noise JPEGs of 512 × 384. Stage 1 has
media as inputs, with a projector of all features or `pooled` to one embedding per medium; stage 2 has them as targets,
with denoising or with caption alignment alone. The cache is written before timing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from benchmarks.stage2 import make_pipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from anygpt import ModalDecoderModule, ModalEncoderModule, MultimodalModel, MultimodalProcessor, StableDiffusionDecoder
from anygpt.data.caching import CacheWriter
from anygpt.data.collation import TARGET_IDS, Collator, move
from anygpt.model.language_models import load_tokenizer
from anygpt.toyworld.datasets import write_dataset
from anygpt.training.cli import quiet_libraries
from anygpt.training.config import Config, parse_config
from anygpt.training.loading import make_generators, make_loader, take_updates, use_cache, use_frames_of
from anygpt.training.optimization import clip_gradients, compile_layers, make_optimizer
from anygpt.training.setup import build, build_dataset
from anygpt.training.stages import ENCODER_LLM, LLM_DECODER, prepare_stage

ROOT = Path(__file__).resolve().parents[2]
CASES = {"stage 1": ENCODER_LLM, "stage 1 pooled": ENCODER_LLM, "stage 2": LLM_DECODER, "alignment": LLM_DECODER}
WAYS = ("without", "cached")
WARM_UP = 2  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rounds=3)  # a machine's speed drifts by a tenth, and a step of stage 1 is mostly language model
    parser.add_argument("--steps", type=int, help="timed steps, after two of warm-up (default: 5 of small, 20 of tiny)")
    parser.add_argument(
        "--batch-size", type=int, help="rows, a medium each (default: 8 of small, those of its config of tiny)"
    )
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "small"), default=["tiny", "small"])
    parser.add_argument("--num-workers", type=int, default=0, help="data.num_workers (default: %(default)s)")
    parser.add_argument("--latents", type=int, default=16, help="height of the latents of small (default: %(default)s)")
    parser.add_argument(
        "--signal-rows", choices=("both", "output", "none"), default="output", help="of stage 2 (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="with train.compile on")


def sides(options: argparse.Namespace) -> list[str]:
    return [f"{size}, {case}, {way}" for size in options.sizes for case in CASES for way in WAYS]


def baseline(side: str) -> str:
    """The same side without the cache."""
    return side.replace("cached", "without")


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds per step, waiting for data included, and the first loss, which must be equal on both sides."""
    quiet_libraries()
    size, case, way = side.split(", ")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), size, case, options)
        model, processor = build(config) if size == "tiny" else compose(case, options)
        model.loss_weights = config.loss
        prepare_stage(model, CASES[case], config)
        accelerator = Accelerator()
        model.to(accelerator.device)
        dataset = build_dataset(config.data.train, model, config, CASES[case])
        use_frames_of(dataset, processor)
        dataset.decode_targets = model.loss_weights.wants_media
        collator = Collator(processor)
        if way == "cached":
            CacheWriter(config.data.cache_dir, model.eval(), processor, [dataset], accelerator).write()
            use_cache([dataset], collator, model, processor, config)
        if options.compile:
            compile_layers(model)
        model.train()
        optimizer, _ = make_optimizer(model, config)
        times, losses = [], []
        begin = time.perf_counter()
        loader = make_loader(dataset, collator, config, accelerator, start=0)
        for step, ((batch, ids),) in enumerate(take_updates(loader, config)):
            generators = make_generators(ids[TARGET_IDS], 0, step)
            loss = model(**move(batch, accelerator.device), generators=generators).loss
            loss.backward()
            clip_gradients(model, optimizer, config.train.max_grad_norm, accelerator)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())  # synchronises with the device
            times.append(time.perf_counter() - begin)
            begin = time.perf_counter()
    return {"step_s": statistics.median(times[WARM_UP:]), "first loss": losses[0]}


def make_config(folder: Path, size: str, case: str, options: argparse.Namespace) -> Config:
    """Write the data of a side and return its settings."""
    kind = "stage1" if CASES[case] is ENCODER_LLM else "stage2"
    pooled = (f"--model.encoders.{key}.projector={{projection_type: pooled}}" for key in ("image", "video", "audio"))
    batch_size = options.batch_size or (8 if size == "small" else None)
    steps = options.steps or (5 if size == "small" else 20)
    config = parse_config(
        [
            f"--config={ROOT}/configs/tiny/{kind}.yaml",
            "--model.init_from=null",
            f"--data.train=[{{path: {folder / f'{kind}.jsonl'}}}]",
            f"--data.cache_dir={folder / 'cache'}",
            *(() if batch_size is None else (f"--train.batch_size={batch_size}",)),
            f"--train.max_steps={steps + WARM_UP}",
            "--train.warmup_steps=0",
            f"--train.signal_rows={options.signal_rows}",
            f"--data.num_workers={options.num_workers}",
            *(pooled if case == "stage 1 pooled" else ()),
        ]
    )
    count = config.train.batch_size * config.train.max_steps
    if size == "tiny":
        write_dataset(folder, kind, count, seed=0)
    else:
        write_photographs(folder / f"{kind}.jsonl", count, asked_for=CASES[case] is LLM_DECODER)
    config.loss.denoising = float(case == "stage 2")
    return config


def write_photographs(path: Path, count: int, asked_for: bool) -> None:
    """Write rows of a 512 × 384 JPEG and a caption; the picture is the target if `asked_for`, else the input."""
    draw, rows = np.random.default_rng(0), []
    for i in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8))
        coarse.resize((512, 384), Image.Resampling.BICUBIC).save(path.parent / f"{i}.jpg", quality=90)
        picture = {"type": "image", "path": f"{i}.jpg"}
        caption = f"a {'red' if i % 2 else 'blue'} thing of the kind {i}"
        asked, said = [picture, {"type": "text", "text": "What is it?"}], [{"type": "text", "text": caption}]
        if asked_for:
            asked, said = [{"type": "text", "text": f"Make {caption}"}], [picture | {"caption": caption}]
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def compose(case: str, options: argparse.Namespace) -> tuple[MultimodalModel, Any]:
    """The model and processor of `small`."""
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
    tokenizer = load_tokenizer("zoo:language_model")
    if CASES[case] is ENCODER_LLM:
        vision = CLIPVisionConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            image_size=224,
            patch_size=16,
        )
        encoders = {"image": ModalEncoderModule(CLIPVisionModel(vision))}
        projector = "pooled" if case == "stage 1 pooled" else "linear"
        model = MultimodalModel(encoders, llm, init_projector_type=projector)
        return model, MultimodalProcessor({"image": CLIPImageProcessor()}, tokenizer, model=model)
    decoder = StableDiffusionDecoder(make_pipeline(options.latents))
    model = MultimodalModel({}, llm, {"image": ModalDecoderModule(decoder)})
    return model, MultimodalProcessor({}, tokenizer, model=model)
